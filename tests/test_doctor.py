"""`laxity doctor`: each kind of finding where it really happens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509

from cli.check_gpus import check_gpus
from cli.check_host import check_clock, check_disks, check_limits
from cli.check_ports import check_ports, holder_of
from cli.check_processes import check_leftovers, check_releases
from cli.check_store import check_certificates, check_store, file_system
from cli.finding import Finding
from cli.snapshot import look
from cluster import certificates
from cluster.certificates import Certificates, make_certificates
from cluster.records import BrokerRecord, NodeRecord, Paths, encode
from cluster.store import open_store, sqlite_url
from cluster.store.etcd_address import EtcdAddress

pytestmark = pytest.mark.usefixtures("runtime")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("LAXITY_")]:
        monkeypatch.delenv(name)


def doctor(*arguments: str, before: Callable[[], Any] | None = None) -> tuple[int, list[dict[str, str]]]:
    """(exit status, findings) of the command, in a process of its own."""
    command = [sys.executable, "-P", "-m", "cli.main", "doctor", "--json", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=before)
    assert not ended.stderr, ended.stderr
    return ended.returncode, json.loads(ended.stdout)


def said(findings: Iterator[Finding], state: str, *parts: str) -> None:
    """One finding has this state and speaks of all that; what is wrong has advice."""
    found = list(findings)
    assert any(
        finding.state == state and all(part in f"{finding.found} {finding.advice}" for part in parts)
        for finding in found
    ), found
    assert all(finding.advice for finding in found if finding.state in ("warning", "error"))


def lower_limits() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    resource.setrlimit(resource.RLIMIT_NPROC, (512, 512))


def test_tiny_limits_and_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    config = tmp_path / "laxity.yaml"
    config.write_text("broker: {heartbeat: never}")
    status, findings = doctor("--config", str(config), before=lower_limits)
    assert status == 1
    by_check = {finding["check"]: finding for finding in findings}
    assert by_check["open files"]["state"] == "warning"
    assert by_check["open files"]["found"] == "at most 256"
    assert by_check["processes"]["state"] == "warning"
    assert by_check["configuration"]["state"] == "error"
    assert "broker.heartbeat" in by_check["configuration"]["found"]


def test_a_port_that_is_held_and_the_store_of_a_file(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        (tmp_path / "file").touch()
        config = tmp_path / "laxity.yaml"
        config.write_text(
            f"store: {sqlite_url(tmp_path / 'none' / 'store.db')}\n"
            f"broker: {{frontend: 'tcp://127.0.0.1:{port}', cache: '{tmp_path / 'file' / 'cache'}'}}\n"
        )
        status, findings = doctor("--config", str(config))
        assert status == 1
        wrong = {finding["check"]: finding for finding in findings if finding["state"] == "error"}
        assert wrong.keys() == {"ports", "store", "broker.cache"}
        assert f"process {os.getpid()}" in wrong["ports"]["found"]
        assert "is no directory" in wrong["store"]["found"]
        assert holder_of(port) is not None
    assert not (tmp_path / "none").exists()


def test_ports() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said(check_ports({"broker.frontend": f"tcp://127.0.0.1:{port}"}), "ok", "is free")
    said(check_ports({"broker.frontend": f"tcp://192.0.2.1:{port}"}), "error", "no address of this host")
    said(check_ports({"broker.http": f"nowhere.invalid:{port}"}), "error", "nowhere.invalid")
    said(check_ports({"broker.http": "127.0.0.1:99999"}), "error", "99999")
    assert not list(check_ports({"broker.frontend": "tcp://127.0.0.1:*", "broker.backend": "ipc:///tmp/x"}))


def test_the_clock_is_judged() -> None:
    found = {finding.check: finding for finding in check_clock()}
    assert found.keys() == {"clock", "monotonic clock"}
    assert found["monotonic clock"].state != "error"


def test_limits_of_the_kernel(tmp_path: Path) -> None:
    core = tmp_path / "net" / "core"
    core.mkdir(parents=True)
    (core / "somaxconn").write_text("128\n")
    (core / "rmem_max").write_text("212992\n")
    said(check_limits(tmp_path), "note", "net.core.somaxconn", "sysctl -w")
    said(check_limits(tmp_path), "note", "net.core.rmem_max: 212992")
    said(check_limits(tmp_path, tmp_path / "none"), "note", "none", "tmpfs")


def test_disks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said(check_disks({"cache": tmp_path / "file" / "x"}), "error", "is no directory")
    said(check_disks({"cache": tmp_path / "new" / "x"}), "ok", "GiB free")
    assert file_system(Path("/proc/self")) == "proc"


def test_stores(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "store.db")
    said(check_store(url), "note", "not there yet")
    assert not (tmp_path / "store.db").exists()
    open_store(url).close()
    said(check_store(url), "ok", "answers in")
    (tmp_path / "broken.db").write_bytes(b"no database " * 1000)
    said(check_store(sqlite_url(tmp_path / "broken.db")), "error", "broken.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"etcd://127.0.0.1:{free.getsockname()[1]}"
    said(check_store(address), "error", "without a quorum")
    said(check_store(address), "note", "without TLS")


def test_an_etcd_loses_a_member_and_its_quorum(make_etcd: Callable[[int], Any]) -> None:
    etcd = make_etcd(3)
    said(check_store(etcd.url), "ok", "version 3", "leads")
    said(check_store(etcd.url), "ok", "good until")
    first, second, _ = etcd.names
    etcd.kill(first)
    while not any(finding.state == "warning" and "start it" in finding.advice for finding in check_store(etcd.url)):
        pass  # while another one is elected, nobody answers
    etcd.kill(second)
    said(check_store(etcd.url), "error", "without a quorum")


@contextmanager
def serving_tls(made: Certificates) -> Iterator[int]:
    """A server that shows its certificate; its port."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(made.server_cert), str(made.server_key)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.communicate()


SERVER = """
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(*sys.argv[1:])
with socket.create_server(("127.0.0.1", 0)) as listening:
    print(listening.getsockname()[1], flush=True)
    while True:
        plain, _ = listening.accept()
        try:
            context.wrap_socket(plain, server_side=True).close()
        except OSError:
            pass
"""


def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = make_certificates(tmp_path / "good", ["127.0.0.1"])
    other = make_certificates(tmp_path / "other", ["elsewhere.example"])
    with serving_tls(good) as port, serving_tls(other) as misnamed:
        address = EtcdAddress((f"127.0.0.1:{port}",), good.ca, good.client_cert, good.client_key)
        said(check_certificates(address), "ok", "good until", str(port))
        wrong = msgspec.structs.replace(address, ca=other.ca)
        said(check_certificates(wrong), "error", "was not issued by")
        said(check_certificates(wrong), "error", f"127.0.0.1:{port}", "name the CA")
        named = EtcdAddress((f"127.0.0.1:{misnamed}",), other.ca, other.client_cert, other.client_key)
        said(check_certificates(named), "error", "alternative ones")
        said(check_certificates(msgspec.structs.replace(named, server_name="elsewhere.example")), "ok", "good until")
        good.client_key.chmod(0o644)
        said(check_certificates(address), "error", "can be read by others (mode 0644)", "chmod 600")
    said(check_certificates(msgspec.structs.replace(address, key=tmp_path / "none")), "error", "is not there")
    mixed = msgspec.structs.replace(address, key=other.client_key)
    said(check_certificates(mixed), "error", "are no certificate and its key")

    monkeypatch.setattr(certificates, "LIFE", certificates.datetime.timedelta(days=10))
    soon = make_certificates(tmp_path / "soon", ["127.0.0.1"])
    said(check_certificates(EtcdAddress(("127.0.0.1:1",), soon.ca)), "warning", "ends on")
    monkeypatch.setattr(certificates, "LIFE", certificates.datetime.timedelta(minutes=-1))
    over = make_certificates(tmp_path / "over", ["127.0.0.1"])
    assert x509.load_pem_x509_certificate(over.ca.read_bytes()).not_valid_after_utc.timestamp() < time.time()
    said(check_certificates(EtcdAddress(("127.0.0.1:1",), over.ca)), "error", "ended on")


def test_releases_of_a_cluster(tmp_path: Path) -> None:
    paths = Paths("local")
    url = sqlite_url(tmp_path / "store.db")
    store = open_store(url)
    said(check_releases(look(url, "local")), "note", "no process")
    store.put(paths.broker("s0"), encode(BrokerRecord("tcp://h:1", "tcp://h:2", 1, "h", {}, release="9.0")))
    said(check_releases(look(url, "local")), "warning", "9.0", "install the same release")
    store.put(paths.node("a0"), encode(NodeRecord(1, "h", "ready", [], release="8.0")))
    said(check_releases(look(url, "local")), "warning", "2 releases", "8.0: a0", "end the upgrade")
    store.close()
    status, findings = doctor("--store", url)
    assert any(finding["check"] == "cluster" and finding["state"] == "warning" for finding in findings)
    assert status == 0


def test_what_dead_processes_left(tmp_path: Path) -> None:
    (tmp_path / "laxity-worker-dead").mkdir()
    base = tmp_path / "laxity" / "gone"
    base.mkdir(parents=True)
    ended = subprocess.Popen(["true"])
    ended.wait()
    sleep = "import time; time.sleep(60)"
    worker = [sys.executable, "-c", sleep, "nodes.worker", "--parent", str(ended.pid)]
    shard = [sys.executable, "-c", sleep, "cli.main", "broker", "run", "--store", sqlite_url(base / "store.db")]
    left = [subprocess.Popen(command) for command in (worker, shard)]
    try:
        said(check_leftovers(tmp_path), "warning", f"process {left[0].pid} is a worker whose agent")
        said(check_leftovers(tmp_path), "warning", f"process {left[1].pid} belongs to the cluster 'gone'")
        said(check_leftovers(tmp_path), "note", "laxity-worker-dead")
    finally:
        for process in left:
            process.kill()
            process.wait()


NVIDIA_SMI = """#!/bin/sh
{}
"""


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(NVIDIA_SMI.format("echo '0, NVIDIA T4, 550.54, 15360, 9000, Exclusive_Process'"))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = list(check_gpus())
    said(iter(found), "note", "9000 are taken")
    said(iter(found), "note", "exclusive mode")
    said(iter(found), "note", "CUDA_VISIBLE_DEVICES=0")
    (tmp_path / "control").touch()
    said(check_gpus(), "note", "CUDA MPS runs")
    tool.write_text(NVIDIA_SMI.format("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"))
    said(check_gpus(), "warning", "version mismatch")
