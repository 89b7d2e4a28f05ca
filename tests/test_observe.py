"""What is to be seen of a process from outside: metrics, health and traces over HTTP, by the process beside it."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from conftest import eventually
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from cli.children import laxity
from cluster.observe.families import AGENT, BY_NAME, COORDINATOR, PROCESS, SHARD, Family
from cluster.observe.figures import Figures
from cluster.observe.prometheus import exposition
from cluster.observe.sidecar import Beginning, Sidecar
from cluster.observe.source import Source
from cluster.observe.trace import Estimate, StageSpan, TraceRecord
from cluster.observe.trace_json import trace_from_json
from cluster.records import BrokerRecord, CoordinatorRecord, NodeRecord, Paths, PipelineRecord, encode
from cluster.store import open_store, sqlite_url
from laxity import Client, LaxityError, Rejected
from pipelines.load import parse_spec

PATIENCE = 30.0
COMMAND = laxity("observe", "--process", "shard", "--name", "s")
SPEC = """
name: two
slo: 20s
stages:
  first: {executor: emulated, profile: {alpha_ms: 0, beta_ms: 1}, max_batch: 2, inputs: [request]}
  second: {executor: emulated, profile: {alpha_ms: 0, beta_ms: 1}, max_batch: 2, inputs: [first]}
output: second
"""
REQUESTS = 12
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def get(address: str, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def get_json(address: str, path: str) -> tuple[int, Any]:
    status, _, body = get(address, path)
    return status, json.loads(body)


def children(pid: int) -> list[int]:
    """Its child processes."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def observer(pid: int) -> int:
    """The process that speaks HTTP for another one."""
    (found,) = [child for child in children(pid) if b"observe" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return found


class Ending:
    """Waits for the end of a process, whoever's child it is."""

    def __init__(self, pid: int) -> None:
        self._fd = os.pidfd_open(pid)

    def wait(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        try:
            return bool(poll.poll(PATIENCE * 1e3))
        finally:
            os.close(self._fd)


# ---- a small cluster ---------------------------------------------------------------------------


class Processes:
    """A shard, an agent and a coordinator, each a process."""

    def __init__(self, directory: Path) -> None:
        self.url = sqlite_url(directory / "store.db")
        self._directory = directory
        self.store = open_store(self.url)
        self.paths = Paths("test")
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        spec = parse_spec(SPEC, file="two.yaml", root="")
        self.store.put(self.paths.pipeline("two"), encode(PipelineRecord(spec.version, spec)))
        self.start("s0", "broker", "run", "--shard", "s0", "--trace-sample", "1")
        advertise = ("--advertise", "localhost")
        self.start("a0", "node", "run", "--agent", "a0", "--devices", "emulated:2", *advertise)
        token = directory / "token"
        token.touch(0o600)
        token.write_text("some-token-of-tests\n")
        self.start("c0", "coordinator", "run", "--name", "c0", "--no-rest", "--http-token-file", str(token), *advertise)

    def start(self, name: str, *command: str) -> None:
        with (self._directory / f"{name}.log").open("ab") as log:
            arguments = [*command, "--store", self.url, "--cluster", "test"]
            self.running[name] = subprocess.Popen(laxity(*arguments), stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def record(self, kind: type[msgspec.Struct], key: str) -> Any:
        """A record once it is there."""
        eventually(lambda: self.store.get(key) is not None, f"{key} is written")
        entry = self.store.get(key)
        assert entry is not None
        return msgspec.json.decode(entry.value, type=kind)

    @property
    def shard(self) -> str:
        return str(self.record(BrokerRecord, self.paths.broker("s0")).http)

    @property
    def agent(self) -> str:
        return str(self.record(NodeRecord, self.paths.node("a0")).http)

    @property
    def coordinator(self) -> str:
        return str(self.record(CoordinatorRecord, self.paths.coordinator("c0")).http)

    def close(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait(PATIENCE)
        self.store.close()


def is_served(client: Client) -> bool:
    try:
        return client.infer("two", b"x") == b"x"
    except Rejected:  # the shard has not heard of it yet
        return False


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """They have served :data:`REQUESTS` requests, and dropped one."""
    found = Processes(tmp_path_factory.mktemp("observed"))
    try:
        frontend = found.record(BrokerRecord, found.paths.broker("s0")).frontend
        with Client(frontend) as client:
            eventually(lambda: is_served(client), "the pipeline is served")
            with pytest.raises(LaxityError):
                client.infer("two", b"x", slo=0.001)
            for future in [client.submit("two", b"x") for _ in range(REQUESTS - 1)]:
                future.result()
        yield found
    finally:
        found.close()


def parsed(address: str) -> dict[str, Any]:
    """The families by name, as both of Prometheus' formats have them."""
    status, headers, body = get(address, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {family.name: family for family in parse_text(body.decode())}
    status, headers, body = get(address, "/metrics", Accept=OPENMETRICS)
    assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    open_families = {family.name for family in parse_openmetrics(body.decode())}
    assert {name for name in open_families if name.startswith("laxity")} == {
        name for name in found if name.startswith("laxity")
    }
    return found


def check(found: dict[str, Any], wanted: list[Family], *, empty: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """These families and no others are there, with their labels; histograms make sense."""
    names = {name for name in found if name.startswith("laxity_")}
    assert names == {family.name for family in [*PROCESS, *wanted]}
    for family in [*PROCESS, *wanted]:
        here = found[family.name]
        assert here.type == family.kind
        assert here.documentation == family.help
        assert bool(here.samples) != (family.name in empty), family.name
        for sample in here.samples:
            assert set(sample.labels) - {"le"} == set(family.labels)
        if family.kind == "histogram":
            check_histogram(family, here.samples)
    assert found["process_resident_memory_bytes"].samples[0].value > 1e6


def check_histogram(family: Family, samples: list[Any]) -> None:
    series: dict[tuple[str, ...], list[float]] = {}
    others: dict[tuple[str, tuple[str, ...]], float] = {}
    for sample in samples:
        key = tuple(sample.labels[label] for label in family.labels)
        if sample.name.endswith("_bucket"):
            series.setdefault(key, []).append(sample.value)
            bound = (*family.bounds, float("inf"))[len(series[key]) - 1]
            assert float(sample.labels["le"]) == bound
        else:
            others[sample.name.rpartition("_")[2], key] = sample.value
    for key, counts in series.items():
        assert len(counts) == len(family.bounds) + 1
        assert counts == sorted(counts)
        if family.bounds[0] >= 0.0:
            assert others["count", key] == counts[-1]
            assert others["sum", key] >= 0.0


def value(found: dict[str, Any], sample: str, **labels: str) -> float:
    (only,) = [
        each.value
        for family in found.values()
        for each in family.samples
        if each.name == sample and labels.items() <= each.labels.items()
    ]
    return float(only)


def test_a_shard_tells_all_its_families(processes: Processes) -> None:
    def told() -> bool:
        """Histograms are brought up to date once a second."""
        families = parsed(processes.shard).values()
        samples = [sample for family in families for sample in family.samples if sample.labels.get("pipeline") == "two"]
        wanted = {"laxity_request_latency_seconds_count", "laxity_stage_batch_size_sum"}
        return [sample.value for sample in samples if sample.name in wanted] == [REQUESTS] * 3

    eventually(told, "all that ended is told")
    found = parsed(processes.shard)
    batch_wait = {"laxity_stage_batch_wait_seconds"}  # counted by a policy that takes batches ahead of time
    check(found, SHARD, empty=batch_wait)
    assert value(found, "laxity_requests_submitted_total", pipeline="two") == REQUESTS + 1
    assert value(found, "laxity_requests_total", pipeline="two", outcome="ok") == REQUESTS
    assert value(found, "laxity_request_latency_seconds_count", pipeline="two") == REQUESTS
    for stage in ("first", "second"):
        at = {"pipeline": "two", "stage": stage}
        batches = value(found, "laxity_batches_total", code="ok", **at)
        assert value(found, "laxity_stage_execution_seconds_count", **at) == batches
        assert value(found, "laxity_stage_batch_size_sum", **at) == REQUESTS
        assert value(found, "laxity_stage_devices", **at) == 1
    info = found["laxity_build_info"].samples[0].labels
    assert (info["process"], info["name"]) == ("shard", "s0")


def test_an_agent_tells_all_its_families(processes: Processes) -> None:
    found = parsed(processes.agent)
    gpus = {family.name for family in AGENT if family.name.startswith("laxity_gpu")}  # emulated ones have no driver
    check(found, AGENT, empty=gpus)
    assert value(found, "laxity_node_shards", node="a0") == 1
    for device in "01":
        at = {"node": "a0", "device": device}
        assert value(found, "laxity_device_models_resident", **at) == 1
        assert value(found, "laxity_device_actions_total", kind="HOLD", code="ok", **at) == 1
        assert value(found, "laxity_device_actions_total", kind="INFER", code="ok", **at) > 0
        assert value(found, "laxity_device_busy_seconds_total", **at) > 0.0


def test_a_coordinator_tells_all_its_families_and_serves_the_dashboard(processes: Processes) -> None:
    found = parsed(processes.coordinator)
    check(found, COORDINATOR)
    assert value(found, "laxity_coordinator_leader", coordinator="c0") == 1
    assert value(found, "laxity_coordinator_store_up") == 1
    assert value(found, "laxity_coordinator_moves_total") == 2
    assert value(found, "laxity_nodes", state="active") == 1
    assert value(found, "laxity_nodes", state="lost") == 0
    assert value(found, "laxity_devices_allocated", pipeline="two") == 2
    status, headers, _ = get(processes.coordinator, "/")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/html")
    assert get_json(processes.coordinator, "/api/session") == (
        200,
        {"possible": True, "needed": True, "signed_in": False},
    )


def test_all_of_them_live_and_are_ready(processes: Processes) -> None:
    for address in (processes.shard, processes.agent, processes.coordinator):
        assert get_json(address, "/v2/health/live") == (200, {"live": True})
        assert get_json(address, "/v2/health/ready") == (200, {"ready": True})
    hosts = [urlsplit(address).hostname for address in (processes.shard, processes.agent, processes.coordinator)]
    assert hosts == ["127.0.0.1", "localhost", "localhost"]


def placed(trace: TraceRecord) -> TraceRecord:
    """Without the host's clock, which each answer reads anew."""
    return msgspec.structs.replace(trace, at=0.0)


def test_a_shards_traces_are_read_by_name_and_newest_first(processes: Processes) -> None:
    _, all_of_them = get_json(processes.shard, "/traces?pipeline=two")
    traces = [trace_from_json(each) for each in all_of_them["traces"]]
    assert len(traces) == REQUESTS + 1
    ends = [trace.at + trace.latency for trace in traces]
    assert all(newer > older - 1e-3 for newer, older in pairwise(ends))  # some end at the same moment
    (bad,) = [trace for trace in traces if trace.outcome != "ok"]
    _, found = get_json(processes.shard, f"/traces?outcome={bad.outcome}&limit=1")
    assert [placed(trace_from_json(each)) for each in found["traces"]] == [placed(bad)]
    status, found = get_json(processes.shard, f"/traces/{traces[0].request}")
    assert (status, placed(trace_from_json(found))) == (200, placed(traces[0]))
    assert [span.stage for span in traces[0].spans] == ["first", "second"]


def test_what_is_not_there_is_refused_as_json(processes: Processes) -> None:
    assert get_json(processes.shard, "/nowhere")[0] == 404
    status, why = get_json(processes.shard, "/traces/nobody-1")
    assert status == 404
    assert "no trace of 'nobody-1'" in why["error"]
    assert get_json(processes.shard, "/traces?limit=many")[0] == 400
    for method in ("POST", "DELETE"):
        status, _, body = get(processes.shard, "/metrics", method)
        assert status == 405
        assert "error" in json.loads(body)
    at = urlsplit(processes.shard)
    with socket.create_connection((at.hostname, at.port), PATIENCE) as endless:
        endless.sendall(b"GET /metrics HTTP/1.1\r\nPadding: " + b"x" * 20_000)
        assert endless.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_many_scrape_at_once(processes: Processes) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: get(processes.agent, "/metrics"), range(32)))
    assert {status for status, _, _ in answers} == {200}


def test_clients_that_never_finish_their_requests_hold_nobody_up(processes: Processes) -> None:
    at = urlsplit(processes.agent)
    with ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection((at.hostname, at.port), PATIENCE)) for _ in range(300)]
        for each in slow:
            with suppress(ConnectionError):  # the first ones have to make room meanwhile
                each.sendall(b"GET /metrics HTTP/1.1\r\nHost: ")
        assert get(processes.agent, "/metrics")[0] == 200
        with suppress(ConnectionResetError):
            assert slow[0].recv(1) == b""


def test_another_one_is_started_when_it_died(processes: Processes) -> None:
    pid = processes.running["a0"].pid
    get(processes.agent, "/metrics")
    first = observer(pid)
    os.kill(first, signal.SIGINT)  # it leaves that to the agent
    assert get(processes.agent, "/metrics")[0] == 200
    ending = Ending(first)
    os.kill(first, signal.SIGKILL)
    assert ending.wait()
    assert get(processes.agent, "/metrics")[0] == 200
    assert observer(pid) != first


def test_it_ends_with_the_process_that_it_speaks_for(processes: Processes) -> None:
    processes.start("c1", "coordinator", "run", "--name", "c1", "--no-rest")
    killed = processes.running.pop("c1")
    address = processes.record(CoordinatorRecord, processes.paths.coordinator("c1")).http
    assert get_json(address, "/v2/health/live")[0] == 200
    ending = Ending(observer(killed.pid))
    killed.kill()
    assert ending.wait()
    killed.wait()


def test_a_port_in_use_is_told_before_anything_is_started(processes: Processes) -> None:
    address = urlsplit(processes.shard).netloc
    command = laxity("broker", "run", "--shard", "s1", "--store", processes.url, "--http", address)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert f"HTTP cannot be served at {address} (Address already in use)" in done.stderr
    assert "--http" in done.stderr


# ---- the process beside it, alone ----------------------------------------------------------------


@pytest.fixture
def observed() -> Iterator[Any]:
    """Has a source observed at an address."""
    with ExitStack() as stack:
        yield lambda source: stack.enter_context(Sidecar("127.0.0.1:*", "", COMMAND, source))


def test_nothing_is_started_until_somebody_asks_and_nothing_stays(observed: Any) -> None:
    before = set(children(os.getpid()))
    with Sidecar("127.0.0.1:*", "", COMMAND, Beginning("shard", "s", "")) as sidecar:
        assert set(children(os.getpid())) == before
        get(sidecar.address, "/v2/health/live")
        (started,) = set(children(os.getpid())) - before
        ending = Ending(started)
    assert ending.wait()
    with pytest.raises(ConnectionRefusedError):
        get(sidecar.address, "/v2/health/live")


class Shown:
    """A source of these traces, the oldest first, that the test can have stall or end."""

    def __init__(self, count: int, kept_from: int) -> None:
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.ended = False
        self.ready = "2 models are not loaded yet"
        self._count = count
        self._kept_from = kept_from

    def figures(self) -> Figures:
        self.goes_on.wait(PATIENCE)
        if self.ended:
            raise RuntimeError("the thread has ended")
        return Figures("shard", "s", os.getpid(), 0.0, self.ready, {})

    def trace(self, request: str) -> TraceRecord | None:
        return record(int(request)) if request.isdigit() else None

    def traces(self, after: int, limit: int) -> tuple[int, list[TraceRecord]]:
        first = min(max(after if after >= 0 else self._count + after, self._kept_from), self._count)
        last = min(first + limit, self._count)
        return last, [record(number) for number in range(first, last)]


def record(number: int) -> TraceRecord:
    span = StageSpan("a", 0.0, 0.1, 0.9, 0.2, 0.3, 0.4, 0.1, 0.0, 0.0, 0.0, "x/0", number, 1, 1, 1, 1, 0.1, 0.5)
    bad = number % 100 == 0
    return TraceRecord(
        request=str(number),
        shard="s",
        pipeline="p",
        version="1",
        traceparent="",
        sampled=not bad,
        at=float(number),
        slo=1.0,
        budget=1.0,
        latency=0.5,
        outcome="dropped" if bad else "ok",
        stage="a" if bad else "",
        detail="",
        cold=False,
        priority=0,
        spans=[span],
        estimate=Estimate("a", 0.1, 0.9, 0.5, 0.5, 2, 0.2, 0.3) if bad else None,
    )


def test_all_traces_that_are_kept_are_found_each_once(observed: Any) -> None:
    sidecar = observed(Shown(count=2250, kept_from=1050))
    _, found = get_json(sidecar.address, "/traces?limit=1000000")
    assert [each["at"] for each in found["traces"]] == list(range(2249, 1249, -1))  # a thousand at most
    _, found = get_json(sidecar.address, "/traces?outcome=dropped")
    assert [trace_from_json(each) for each in found["traces"]] == [record(n) for n in range(2200, 1050, -100)]
    assert get_json(sidecar.address, "/traces?pipeline=another") == (200, {"traces": []})


def test_who_does_not_answer_does_not_live_and_who_waits_is_not_ready(observed: Any) -> None:
    source = Shown(0, 0)
    sidecar = observed(source)
    assert get_json(sidecar.address, "/v2/health/live") == (200, {"live": True})
    why = {"ready": False, "why": "2 models are not loaded yet"}
    assert get_json(sidecar.address, "/v2/health/ready") == (503, why)
    source.ready = ""
    assert get_json(sidecar.address, "/v2/health/ready") == (200, {"ready": True})
    source.goes_on.clear()
    status, found = get_json(sidecar.address, "/v2/health/live")
    source.goes_on.set()
    assert (status, found["live"]) == (503, False)
    source.ended = True
    eventually(lambda: get(sidecar.address, "/v2/health/live")[0] == 200, "it answers again")
    assert get_json(sidecar.address, "/v2/health/ready") == (503, {"ready": False, "why": "the thread has ended"})
    assert get(sidecar.address, "/metrics")[0] == 503


def test_odd_requests_end_nothing(observed: Any, caplog: pytest.LogCaptureFixture) -> None:
    sidecar = observed(Shown(0, 0))
    get(sidecar.address, "/v2/health/live")
    before = children(os.getpid())
    assert get(sidecar.address, f"/traces/{'a' * 5000}")[0] == 404
    for accept in ("application/openmetrics-text;version=abc", "text/plain;version=;escaping", ";,=;"):
        assert get(sidecar.address, "/metrics", accept=accept)[0] == 200
    assert children(os.getpid()) == before
    assert "it is started again" not in caplog.text


def test_a_source_that_breaks_is_asked_again(observed: Any) -> None:
    source = Shown(0, 0)
    tells = source.figures

    def breaks() -> Figures:
        raise KeyError("laxity_none")

    source.figures = breaks  # type: ignore[method-assign]
    sidecar = observed(source)
    assert get(sidecar.address, "/metrics")[0] == 503
    source.figures = tells  # type: ignore[method-assign]
    assert get(sidecar.address, "/metrics")[0] == 200


ASKED_TOO_OFTEN = """
import socket
from concurrent.futures import ThreadPoolExecutor
from cluster.observe.link import MOST_UNANSWERED, RemoteSource
mine, its = socket.socketpair()
source = RemoteSource(its)
def ask(_):
    try:
        source.figures()
    except TimeoutError as error:
        return str(error)
with ThreadPoolExecutor(2 * MOST_UNANSWERED) as pool:
    said = list(pool.map(ask, range(2 * MOST_UNANSWERED)))
print(MOST_UNANSWERED, *(sum(words in each for each in said) for words in ("within", "has not answered the last")))
"""


def test_questions_are_not_piled_up_before_a_process_that_is_stuck() -> None:
    # In a process of its own, which ends with the link.
    command = [sys.executable, "-c", ASKED_TOO_OFTEN]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
    most, waited, refused = done.stdout.split()
    assert most == waited == refused


def test_one_that_cannot_begin_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    source = Beginning("shard", "s", "")
    with Sidecar("127.0.0.1:*", "", [sys.executable, "-c", "raise SystemExit(3)"], source) as sidecar:
        at = urlsplit(sidecar.address)
        with socket.create_connection((at.hostname, at.port)):
            eventually(lambda: "ended with status 3" in caplog.text, "the log tells of it")


def test_large_figures_are_compressed_for_who_takes_that(observed: Any) -> None:
    names = [f"p{number}" for number in range(200)]
    figures = Figures("shard", "s", os.getpid(), 0.0, "", {"laxity_requests_in_flight": [(["s", n], 1) for n in names]})
    source: Source = Shown(0, 0)
    source.figures = lambda: figures  # type: ignore[method-assign]
    sidecar = observed(source)
    _, headers, body = get(sidecar.address, "/metrics", **{"Accept-Encoding": "gzip"})
    assert headers["content-encoding"] == "gzip"
    assert len(body) < len(exposition(figures, "")[0]) / 3
    assert BY_NAME["laxity_requests_in_flight"].help.encode() in get(sidecar.address, "/metrics")[2]
