"""What services tell systemd, over a real socket: units of Type=notify with a watchdog need it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.sd_notify import ServiceManager

COMMANDS = {
    "broker": ("--shard", "s0"),
    "node": ("--agent", "n0", "--devices", "emulated:1"),
    "coordinator": ("--name", "c0"),
}


@pytest.mark.parametrize("service", COMMANDS)
def test_a_service_tells_when_it_serves_that_it_lives_and_when_it_ends(service: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "cli.main", service, "run", *COMMANDS[service], "--http", ""),
                *("--store", f"sqlite://{tmp_path}/store.db"),
            ],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
        )
        try:
            heard: list[str] = []
            while "READY=1" not in heard or heard[-1] != "WATCHDOG=1":
                heard.append(manager.recv(100).decode())
            assert heard.count("READY=1") == 1
            process.send_signal(signal.SIGTERM)
            while heard[-1] != "STOPPING=1":
                heard.append(manager.recv(100).decode())
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()


def test_an_abstract_socket_is_found_and_one_that_is_gone_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"laxity-notify-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(60)
        service = ServiceManager()
        service.ready()
        service.ready()
        service.alive()
        assert [manager.recv(100), manager.recv(100)] == [b"READY=1", b"WATCHDOG=1"]
    service.stopping()
    monkeypatch.delenv("NOTIFY_SOCKET")
    ServiceManager().ready()
