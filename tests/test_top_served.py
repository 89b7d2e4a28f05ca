"""`laxity top` as people use it: in a terminal, on a cluster that serves; and a node is drained from it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ECHO

from laxity import Client

COMMAND = [sys.executable, "-P", "-m", "cli.main"]
WAIT = 40.0
_ESCAPES = re.compile(rb"\x1b\[[0-9;?<>=$ ]*[a-zA-Z]|\x1b[()][A-Z0-9]|\x1b[=>P\\78]")


class Terminal:
    """A command in a terminal of 80 by 24, and what it wrote there."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._mine, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self._before = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        self._theirs = theirs
        self.written = b""
        self._seen = 0

    @property
    def restored(self) -> bool:
        """Whether the terminal is as it was: its settings, and not on the screen of an application."""
        return termios.tcgetattr(self._theirs) == self._before and self.written.rfind(b"\x1b[?1049l") > 0

    def type(self, keys: str) -> None:
        os.write(self._mine, keys.encode())

    def read(self) -> None:
        if select.select([self._mine], [], [], 0.05)[0]:
            self.written += os.read(self._mine, 65536)

    def until(self, pattern: str) -> str:
        """Wait until this is written after all that was waited for before; the match."""
        ends = time.monotonic() + WAIT
        while True:
            text = _ESCAPES.sub(b"", self.written[self._seen :]).decode(errors="replace")
            match = re.search(pattern, text)
            if match:
                self._seen = len(self.written)
                return match[0]
            assert time.monotonic() < ends, f"no {pattern!r} within {WAIT:g} s; there came:\n{text[-4000:]}"
            self.read()

    def end(self) -> int:
        """Read until it has ended; its exit status."""
        ends = time.monotonic() + WAIT
        while self.process.poll() is None:
            assert time.monotonic() < ends, "it goes on"
            self.read()
        self.read()
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._mine)
        os.close(self._theirs)


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLORTERM")}
    return known | {"XDG_RUNTIME_DIR": str(tmp_path), "TERM": "xterm-256color", "TEXTUAL_ANIMATIONS": "none"}


@pytest.fixture
def shard(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """A cluster of two nodes with a coordinator that serves `echo`: its shard's address."""
    options = ["--gpus", "4", "--agents", "2", "--coordinators", "1", "--detach"]
    spec = tmp_path / "echo.yaml"
    spec.write_text(ECHO)
    up = run(environment, "up", str(spec), *options)
    try:
        assert up.returncode == 0, up.stderr
        yield json.loads(run(environment, "status", "--json").stdout)["shards"][0]["frontend"]
    finally:
        run(environment, "down")


@contextmanager
def traffic(shard: str) -> Iterator[list[Exception]]:
    """Requests one after the other until the end; what went wrong with them."""
    stop = threading.Event()
    failed: list[Exception] = []

    def send() -> None:
        with Client(shard) as client:
            while not stop.is_set():
                try:
                    client.infer("echo", "hello")
                except Exception as error:
                    failed.append(error)
                    return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield failed
    finally:
        stop.set()
        thread.join()


def test_live_figures_and_a_drain(environment: dict[str, str], shard: str) -> None:
    with traffic(shard) as failed:
        terminal = Terminal(["top"], environment)
        try:
            terminal.until(r"laxity local  leader coordinator-0")
            terminal.until(r"offered [\d,.k]*[1-9][\d,.k]*/s  good")
            terminal.until(r"echo +[\d,.k]*[1-9][\d,.k]* +[\d,.k]+ +\d+(\.\d+)?%")
            terminal.type("3")
            terminal.until(r"agent-1 +active +[BI]+ .* echo 2")
            terminal.type("/agent-1\r")
            terminal.until(r"/agent-1/ 1 of 2")
            terminal.type("d")
            terminal.until(r"Drain agent-1\?")
            terminal.type("y")
            terminal.until(r"agent-1 is empty")
            listed = subprocess.run(
                [*COMMAND, "node", "list", "--json"], env=environment, capture_output=True, text=True
            )
            nodes = {node["node"]: node for node in json.loads(listed.stdout)}
            assert nodes["agent-1"]["drained"]
            assert not nodes["agent-1"]["models"]
            assert nodes["agent-1"]["drained_why"] == "from laxity top"
            terminal.type("q")
            assert terminal.end() == 0
            assert terminal.restored
        finally:
            terminal.close()
    assert not failed, "no request is lost by a drain"
