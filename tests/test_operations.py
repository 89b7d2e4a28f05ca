"""Signals, reloading, logs: what operators do to processes that run."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import laxity
from broker.shell import Shard, ShardConfig
from cli.children import rotate
from cluster.logs import IDS, JsonFormatter, TextFormatter
from cluster.records import BrokerRecord, DevicePlacement, Paths, PlacementRecord, ServingRecord, decode, encode
from cluster.store import open_store, sqlite_url
from cluster.store.base import Store
from laxity.outcomes import Outcome
from nodes.worker_output import LONGEST, log_output
from pipelines import load_spec
from pipelines.spec import PipelineSpec

PATHS = Paths("local")
SLOW = """
name: slow
slo: 30s
stages: {s: {executor: emulated, profile: {alpha_ms: 0, beta_ms: 300}, max_batch: 1}}
output: s
"""


class Service:
    """One service as a process of its own, its log read as it comes."""

    def __init__(self, kind: str, *arguments: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LAXITY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cli.main", kind, "run", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []

    def said(self, *words: str) -> str:
        """The next line that has all these words; the test times out where none comes."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if all(word in line for word in words):
                return line
        raise AssertionError(f"it ended without saying {words}: {''.join(self.lines)}")

    def rest(self) -> list[str]:
        """What it says until it ends."""
        assert self.process.stderr is not None
        return list(self.process.stderr)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        status = self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


class World:
    """A store, and services beside it."""

    def __init__(self, directory: Path) -> None:
        self.url = sqlite_url(directory / "store.db")
        self.store: Store = open_store(self.url)
        self.services: list[Service] = []

    def run(self, kind: str, *arguments: str) -> Service:
        made = Service(kind, *arguments, "--store", self.url, *(["--http", ""] if kind != "gateway" else []))
        self.services.append(made)
        return made

    def shard(self, name: str, *arguments: str) -> tuple[Service, str]:
        """A shard that is registered, and its address for services."""
        service = self.run("broker", "--shard", name, *arguments)
        watch = self.store.watch(PATHS.broker(name), 1)
        while True:
            for event in watch.get(timeout=60):
                if event.entry is not None:
                    watch.close()
                    return service, decode(BrokerRecord, event.key, event.entry.value).frontend

    def serve(self, spec: PipelineSpec, shards: dict[str, float]) -> None:
        self.store.put(PATHS.served(spec.name), encode(ServingRecord(spec.version, spec, shards)))

    def place(self, spec: PipelineSpec, agent: str, shards: list[str]) -> None:
        models = [spec.model_key(stage) for stage in spec.stages]
        devices = {number: DevicePlacement(shard, models) for number, shard in enumerate(shards)}
        self.store.put(PATHS.placement(agent), encode(PlacementRecord(devices)))

    def close(self) -> None:
        for service in self.services:
            if service.process.poll() is None:
                service.process.kill()
            service.ended()
        self.store.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def slow(tmp_path: Path) -> PipelineSpec:
    (tmp_path / "slow.yaml").write_text(SLOW)
    return load_spec(tmp_path / "slow.yaml")


# ---- the end ---------------------------------------------------------------------------------------


def test_a_rolling_restart_of_shards_loses_nothing(world: World, slow: PipelineSpec) -> None:
    world.serve(slow, {"s0": 0.5, "s1": 0.5})
    world.place(slow, "a0", ["s0", "s1"])
    first, home = world.shard("s0")
    second, other = world.shard("s1")
    agent = world.run("node", "--agent", "a0", "--devices", "emulated:2")
    with laxity.Client(f"{home},{other}") as client:
        assert client.infer("slow", "warm") == "warm"
        for leaving, name, address in ((first, "s0", home), (second, "s1", other)):
            waiting = [client.submit("slow", number) for number in range(6)]
            leaving.send(signal.SIGTERM)
            leaving.said("leaving: ")
            waiting += [client.submit("slow", number) for number in range(6, 8)]
            assert leaving.ended() == 0
            # The record stays for a moment: nobody gives its device to somebody else meanwhile.
            assert world.store.get(PATHS.broker(name)) is not None
            world.shard(name, "--frontend", address)
            assert [future.result(60) for future in waiting] == list(range(8))
        assert client.infer("slow", "still here") == "still here"
    agent.send(signal.SIGTERM)
    assert agent.ended() == 0


def test_a_lone_shard_finishes_what_is_in_flight(cluster: Any, echo: PipelineSpec) -> None:
    cluster.serve(echo)
    client = cluster.client()
    futures = [client.submit("echo", number) for number in range(20)]
    cluster.wait_for(lambda status: status.submitted == 20, "all are in")
    cluster.shard.drain()
    assert [future.result(60) for future in futures] == list(range(20))
    cluster._thread.join(60)
    assert not cluster._thread.is_alive()


def test_a_shard_without_anybody_ends_at_once() -> None:
    shard = Shard(ShardConfig(name="s0", drain_timeout=3600.0))
    thread = threading.Thread(target=shard.run)
    thread.start()
    shard.drain()
    thread.join(60)
    assert not thread.is_alive()


def test_draining_is_bounded(cluster: Any, echo: PipelineSpec) -> None:
    cluster.start(drain_timeout=0.05)
    cluster.shard.apply(echo)
    client = cluster.client()
    future = client.submit("echo", "nobody runs it", slo=0.3)
    cluster.wait_for(lambda status: status.in_flight == 1, "it is in flight")
    cluster.shard.drain()
    cluster._thread.join(60)
    assert not cluster._thread.is_alive()
    assert future.reply(60).outcome in (Outcome.EXPIRED, Outcome.UNAVAILABLE)


FLOODS = """
import sys, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
while True:
    socket.send(b"none of this protocol")
"""


def test_draining_ends_in_a_flood_of_messages(cluster: Any) -> None:
    cluster.start(drain_timeout=0.05)
    flood = subprocess.Popen([sys.executable, "-c", FLOODS, cluster.shard.frontend])
    try:
        cluster.wait_for(lambda status: status.malformed > 5000, "it is flooded")
        cluster.shard.drain()
        cluster._thread.join(20)
        assert not cluster._thread.is_alive()
    finally:
        flood.kill()
        flood.wait()


def test_a_second_signal_ends_at_once(world: World, slow: PipelineSpec) -> None:
    world.serve(slow, {"s0": 1.0})
    shard, address = world.shard("s0", "--drain-timeout", "60m")
    with laxity.Client(address) as client:
        future = client.submit("slow", "nobody runs it")
        watch = world.store.watch(PATHS.broker("s0"), 1)
        while not any(
            event.entry is not None and decode(BrokerRecord, event.key, event.entry.value).counters["in_flight"]
            for event in watch.get(timeout=60)
        ):
            pass
        watch.close()
        shard.send(signal.SIGTERM)
        shard.said("leaving: 1 requests are in flight")
        shard.send(signal.SIGTERM)
        assert "1 requests are in flight: their services" in "".join(shard.rest())
        assert shard.ended() == 0
        assert not future.done()


TAKES_SIGNALS = """
import signal
from cli.control import take_control
control = take_control(lambda: None)
with control.stop._cond:  # as while it is being waited for, or set
    signal.raise_signal(signal.SIGTERM)
assert control.stop.wait(60) and not control.at_once.is_set()
signal.raise_signal(signal.SIGINT)
assert control.at_once.wait(60)
print("told", flush=True)
signal.raise_signal(signal.SIGTERM)
signal.raise_signal(signal.SIGINT)
"""


def test_a_signal_that_comes_while_a_lock_is_held_is_taken() -> None:
    done = subprocess.run([sys.executable, "-c", TAKES_SIGNALS], stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("told\n", -signal.SIGINT)


# ---- reloading -------------------------------------------------------------------------------------


HANGS_UP = """
import os, signal, sys
from cli import main
signal.signal(signal.SIGHUP, signal.SIG_DFL)
try:
    main.main(sys.argv[1:])
finally:
    os.kill(os.getpid(), signal.SIGHUP)
"""


@pytest.mark.parametrize(("arguments", "status"), [(["broker", "run"], 0), (["node", "list"], -signal.SIGHUP)])
def test_a_service_that_is_still_starting_takes_no_harm_from_sighup(arguments: list[str], status: int) -> None:
    command = [sys.executable, "-c", HANGS_UP, *arguments, "--help"]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60).returncode == status


def test_a_configuration_is_read_again(world: World, tmp_path: Path, slow: PipelineSpec) -> None:
    config = tmp_path / "laxity.yaml"
    config.write_text("broker: {heartbeat: 1s, max_requests: 100}")
    world.serve(slow, {"s0": 1.0})
    shard, address = world.shard("s0", "--config", str(config), "--max-bytes", "1GiB")
    config.write_text("broker: {heartbeat: 2s, max_requests: 1, max_bytes: 2GiB, frontend: 'tcp://127.0.0.1:7199'}")
    shard.send(signal.SIGHUP)
    shard.said("frontend: changed in the file; takes effect after a restart")
    shard.said("heartbeat: now 2.0 (was 1.0)")
    shard.said("max_requests: now 1 (was 100)")
    with laxity.Client(address) as client:
        futures = [client.submit("slow", number, slo=20.0) for number in range(3)]
        rejected = futures[-1].reply(60)
        assert rejected.outcome is Outcome.REJECTED
        assert "1 requests are in flight" in rejected.detail

    # A broken file is refused whole, one that says how to log is followed; flags go before it.
    config.write_text("log_format: json\nbroker: {heartbeat: 3s, hearbeat: 4s}")
    shard.send(signal.SIGHUP)
    assert "did you mean 'heartbeat'?" in shard.said("is not taken on, what runs goes on")
    config.write_text("log_format: json\nbroker: {heartbeat: 2s, max_requests: 1}")
    shard.send(signal.SIGHUP)
    line = json.loads(shard.said("log_format"))
    assert (line["process"], line["name"], line["level"], line["logger"]) == ("shard", "s0", "info", "laxity.cluster")
    assert line["time"].endswith("Z")
    assert not any("max_bytes" in line for line in shard.lines)
    shard.send(signal.SIGTERM)
    assert shard.ended() == 0


@pytest.mark.parametrize(
    ("kind", "named", "before", "after", "says"),
    [
        (
            "node",
            "--agent",
            "{drain_timeout: 1s}",
            "{drain_timeout: 2s, devices: 'emulated:3'}",
            "drain_timeout: now 2.0",
        ),
        ("coordinator", "--name", "{patience: 1m}", "{patience: 2m, ttl: 9s}", "patience: now 120.0 (was 60.0)"),
    ],
)
def test_agents_and_coordinators_read_theirs_again(
    world: World, tmp_path: Path, kind: str, named: str, before: str, after: str, says: str
) -> None:
    config = tmp_path / "laxity.yaml"
    config.write_text(f"{kind}: {before}")
    devices = ["--devices", "emulated:1"] if kind == "node" else []
    service = world.run(kind, named, "x0", "--config", str(config), *devices)
    prefix = PATHS.nodes if kind == "node" else PATHS.coordinators
    watch = world.store.watch(prefix, 1)
    assert watch.get(timeout=60)
    watch.close()
    config.write_text(f"{kind}: {after}")
    service.send(signal.SIGHUP)
    if kind == "coordinator":
        service.said("ttl: changed in the file; takes effect after a restart")
    service.said(says)
    service.send(signal.SIGTERM)
    assert service.ended() == 0
    # Flags go before the file.
    assert not any("devices" in line for line in service.lines)


def test_a_shard_takes_on_other_settings(cluster: Any, echo: PipelineSpec, tmp_path: Path) -> None:
    cluster.serve(echo)
    with cluster.client() as client:
        assert client.infer("echo", 1) == 1
        told = ShardConfig(name="s0", heartbeat=0.5, max_payload=1000, telemetry=str(tmp_path / "rows"))
        cluster.shard.configure(told)
        assert client.infer("echo", 2) == 2

        def taken() -> bool:
            try:
                return bool(client.infer("echo", b"x" * 2000))
            except laxity.Rejected:
                return False

        cluster.eventually(lambda: not taken(), "the limit is told")
        cluster.shard.configure(ShardConfig(name="s0"))
        cluster.eventually(taken, "and lifted")
    (rows,) = (tmp_path / "rows").iterdir()
    assert ",echo," in rows.read_text()


# ---- logs ------------------------------------------------------------------------------------------


def test_each_batch_is_a_line_at_debug(world: World, slow: PipelineSpec) -> None:
    world.serve(slow, {"s0": 1.0})
    world.place(slow, "a0", ["s0"])
    shard, address = world.shard("s0", "--log-level", "debug", "--log-format", "json")
    agent = world.run("node", "--agent", "a0", "--devices", "emulated:1")
    with laxity.Client(address) as client:
        assert client.infer("slow", "x") == "x"
        granted = json.loads(shard.said('"requests"'))
        ended = json.loads(shard.said(str(granted["batch"])))
    assert granted["level"] == "debug"
    assert granted["model"] == slow.model_key("s")
    assert (granted["agent"], granted["device"]) == ("a0", 0)
    (request,) = granted["requests"]
    assert request.count(":") == 1
    assert (ended["batch"], ended["agent"]) == (granted["batch"], "a0")
    agent.send(signal.SIGTERM)
    assert agent.ended() == 0


def record(message: str, **extra: Any) -> logging.LogRecord:
    return logging.getLogger("laxity.test").makeRecord(
        "laxity.test", logging.WARNING, __file__, 1, message, (), None, extra=extra
    )


def test_forms_of_lines() -> None:
    one = record("a batch\nfailed", batch=7, requests=["c:1", "c:2"], agent="a0", other="no field")
    line = json.loads(JsonFormatter("shard", "s0").format(one))
    assert line["message"] == "a batch\nfailed"
    assert (line["batch"], line["requests"], line["agent"]) == (7, ["c:1", "c:2"], "a0")
    assert "other" not in line
    assert TextFormatter().format(one).endswith("laxity.test: a batch\n    failed [requests c:1 c:2, batch 7]")
    named = TextFormatter().format(record("agent a\x1b[2J\nERROR: b\u202e"))
    assert named.endswith("agent a\\x1b[2J\n    ERROR: b\\u202e")
    assert "[" not in TextFormatter().format(record("nothing to add", agent="a0"))
    try:
        raise ValueError("deep")
    except ValueError:
        broken = record("failed")
        broken.exc_info = sys.exc_info()
    assert "ValueError: deep" in json.loads(JsonFormatter("shard", "s0").format(broken))["exception"]
    assert set(IDS) == {"request", "requests", "batch", "action"}


WRITES = """
import logging, os, sys
from nodes.worker_output import note_work, speak_in_lines
speak_in_lines()
print("before any model")
note_work("mine@1/detect")
print("printed by a stage", end="")
print(", in two steps")
print("to stderr", file=sys.stderr)
logging.getLogger("their.library").error("logged")
os.write(2, b"by the library itself\\n")
"""


def test_what_workers_write_comes_to_the_agents_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "laxity.worker")
    worker = subprocess.Popen([sys.executable, "-c", WRITES], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert worker.stdout is not None
    log_output(worker.stdout, worker.pid, "cuda:1")
    for thread in threading.enumerate():
        if thread.name == f"output of {worker.pid}":
            thread.join(60)
    assert worker.wait() == 0
    found = {one.getMessage().rpartition(": ")[2]: one for one in caplog.records}
    assert set(found) == {
        "before any model",
        "printed by a stage, in two steps",
        "to stderr",
        "logged",
        "by the library itself",
    }
    printed = found["printed by a stage, in two steps"].__dict__
    assert (printed["model"], printed["stage"], printed["pipeline"]) == ("mine@1/detect", "detect", "mine")
    assert (printed["device"], printed["levelno"]) == ("cuda:1", logging.INFO)
    assert (found["logged"].levelno, found["to stderr"].levelno) == (logging.ERROR, logging.WARNING)
    assert "their.library" in found["logged"].getMessage()
    assert "model" not in found["before any model"].__dict__


WRITES_MUCH = """
import sys
from nodes.worker_output import LONGEST, speak_in_lines
speak_in_lines()
print(("語" * LONGEST + "😀" * LONGEST + "x" * LONGEST) * 2)
print("語" * LONGEST + "x", end="")
print("y", file=sys.stdout)
sys.stdout.buffer.write(f"bytes in {sys.stdout.encoding}\\n".encode())
"""


def test_long_lines_of_workers_are_several(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "laxity.worker")
    worker = subprocess.Popen([sys.executable, "-c", WRITES_MUCH], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert worker.stdout is not None
    log_output(worker.stdout, worker.pid, "cpu")
    for thread in threading.enumerate():
        if thread.name == f"output of {worker.pid}":
            thread.join(60)
    assert worker.wait() == 0
    said = [one.getMessage().rpartition(": ")[2] for one in caplog.records]
    assert said == [*[mark * LONGEST for mark in "語😀x"] * 2, "語" * LONGEST, "xy", "bytes in utf-8"]


def test_logs_are_rotated(tmp_path: Path) -> None:
    log = tmp_path / "shard-0.log"
    with log.open("ab", buffering=0) as stream:
        stream.write(b"x" * 100)
        assert not rotate(log, 100)
        stream.write(b"the last line\n")
        assert rotate(log, 100)
        stream.write(b"the first one\n")
    assert log.read_bytes() == b"the first one\n"
    assert (tmp_path / "shard-0.log.1").read_bytes().endswith(b"the last line\n")
    assert not rotate(tmp_path / "none.log", 1)
