"""`laxity trace`: against shards that answer as the real ones do, and against a real cluster."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn
from click.testing import CliRunner, Result
from conftest import eventually
from rich.console import Console
from test_otlp import CLIENT, ESTIMATE, SPAN, TRACE, Collector

from cli.children import laxity
from cli.main import main
from cli.waterfall import Waterfall, ms, reckoning, told
from cluster.observe.exporter import exporter_app
from cluster.observe.sidecar import Beginning
from cluster.observe.trace import StageSpan, TraceRecord
from cluster.observe.trace_json import trace_to_json
from cluster.records import BrokerRecord, Paths, decode, encode
from cluster.store import open_store, sqlite_url
from laxity import Client
from laxity.http_access import HttpAccess
from laxity.http_tokens import HttpTokens

OK = msgspec.structs.replace(
    TRACE, request="c-9", outcome="ok", stage="", detail="", estimate=None, spans=[SPAN], latency=0.05, at=TRACE.at + 5
)


def drawn(trace: TraceRecord, width: int = 80) -> str:
    console = Console(width=width, highlight=False, color_system=None, file=StringIO())
    with console.capture() as captured:
        console.print(Waterfall(trace))
    return captured.get()


# ---- how it is drawn ------------------------------------------------------------------------


def test_the_sum_that_led_to_a_drop_is_told_in_words() -> None:
    assert reckoning(ESTIMATE) == (
        "Dropped 60.0 ms after it came: it had 41.2 ms left at 'recognize'; needed 12.0 ms for a device + 35.1 ms "
        "(p99, batch of 8) + 20.3 ms behind it = 26.2 ms too much."
    )
    late = msgspec.structs.replace(ESTIMATE, size=0, execution=0.0, downstream=0.0, wait=0.05, short=0.0088)
    assert "a device could begin in 50.0 ms at the earliest: 8.8 ms too late." in reckoning(late)


def test_a_waterfall_fits_into_80_columns() -> None:
    picture = drawn(TRACE)
    assert all(len(line) <= 80 for line in picture.splitlines())
    assert "dropped at stage 'recognize' after 60.0 ms" in picture
    assert "gpu-1/0, in a batch of 8 (number 77)" in picture.replace("\n", " ")
    (detect,) = [line for line in picture.splitlines() if line.startswith("detect ")]
    assert re.fullmatch(r"detect +░+▒+─+▏+█+▕+─+ +950.0 ms *", detect)
    (recognize,) = [line for line in picture.splitlines() if line.startswith("recognize ")]
    assert re.fullmatch(r"recognize +·+ +940.0 ms *", recognize)
    assert recognize.index("·") > detect.rindex("█")
    long = msgspec.structs.replace(TRACE, spans=[msgspec.structs.replace(SPAN, stage="a" * 100)], pipeline="p" * 190)
    assert all(len(line) <= 80 for line in drawn(long).splitlines())


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_any_trace_can_be_drawn(width: int) -> None:
    nothing = msgspec.structs.replace(TRACE, spans=[], latency=0.0, estimate=None)
    at_once = StageSpan("s", 0.0, 0.0, -1.0, 0.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0, "a/0", 1, 1, 1, 1, 1, 0.0, -0.1)
    for trace in (nothing, OK, msgspec.structs.replace(OK, spans=[at_once], latency=0.0)):
        assert trace.request in drawn(trace, width)


def test_a_stage_is_told_in_words() -> None:
    assert told(SPAN).startswith("waited 10.0 ms (4.0 ms of it for a device), input 3.0 ms, execution 20.0 ms")
    way = SPAN.ended - SPAN.granted - SPAN.input - SPAN.execution - SPAN.output
    assert f", on the way {ms(way)}; on gpu-1/0" in told(SPAN)
    again = msgspec.structs.replace(SPAN, attempts=2, batches=3, items=12, started=-1.0, ended=-1.0)
    assert told(again).endswith(
        "in a batch of 8 (number 77), the last of 3; 12 items; given to a device 2 times; it did not end"
    )
    assert ms(12.5) == "12.50 s"


# ---- from the shards ------------------------------------------------------------------------


class Kept(Beginning):
    """What a shard has."""

    def __init__(self, *traces: TraceRecord) -> None:
        super().__init__("shard", "s", "")
        self._kept = list(traces)

    def trace(self, request: str) -> TraceRecord | None:
        return next((one for one in self._kept if one.request == request), None)

    def traces(self, after: int, limit: int) -> tuple[int, list[TraceRecord]]:
        begin = max(after + len(self._kept), 0) if after < 0 else after
        return min(begin + limit, len(self._kept)), self._kept[begin : begin + limit]


class Shards:
    """A store with shards in it whose HTTP is served by threads, and the command line upon it."""

    def __init__(self, directory: Path) -> None:
        self.url = sqlite_url(directory / "store.db")
        self._store = open_store(self.url)
        self._servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def add(self, name: str, *traces: TraceRecord, tokens: Path | None = None) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        access = HttpAccess("127.0.0.1", None if tokens is None else HttpTokens(tokens))
        app = exporter_app(Kept(*traces), access)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        self._servers.append((server, thread))
        self.write(name, f"http://127.0.0.1:{listener.getsockname()[1]}")

    def write(self, name: str, http: str) -> None:
        record = BrokerRecord("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", 1, "host", http=http)
        self._store.put(Paths("local").broker(name), encode(record))

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["trace", *arguments, "--store", self.url])

    def close(self) -> None:
        for server, thread in self._servers:
            server.should_exit = True
            thread.join()
        self._store.close()


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Shards]:
    made = Shards(tmp_path)
    yield made
    made.close()


def test_a_trace_is_found_wherever_it_is(shards: Shards) -> None:
    shards.add("s0", OK)
    shards.add("s1", TRACE)
    shown = shards("c-1")
    assert shown.exit_code == 0, shown.output
    assert "26.2 ms too much" in shown.stdout.replace("\n", " ").replace("  ", " ")
    assert json.loads(shards("c-1", "--json").stdout) == trace_to_json(TRACE)
    missing = shards("c-2")
    assert missing.exit_code == 1
    assert "no trace of 'c-2' is kept" in missing.stderr
    assert shards("c-1", "--outcome", "ok").exit_code == 2
    strange = shards("c/../1?x=%2e\n")
    assert (strange.exit_code, "no trace of" in strange.stderr) == (1, True)


def test_the_newest_are_listed(shards: Shards) -> None:
    shards.add("s0", msgspec.structs.replace(OK, request="c-3", latency=0.9, at=TRACE.at - 9), OK)
    shards.add("s1", TRACE)

    def listed(*arguments: str) -> list[str]:
        result = shards(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return [one["request"] for one in json.loads(result.stdout)]

    assert listed() == ["c-9", "c-1", "c-3"]
    assert listed("--limit", "1") == ["c-9"]
    assert listed("--slowest") == ["c-3", "c-1", "c-9"]
    assert listed("--slowest", "--limit", "1") == ["c-3"]
    assert listed("--outcome", "dropped") == ["c-1"]
    assert listed("--pipeline", "ocr") == ["c-9", "c-1", "c-3"]
    assert listed("--pipeline", "nope") == []
    table = shards()
    assert re.search(r"c-1 .* ocr .* dropped .* recognize .* 60.0 ms", table.stdout)
    assert "no request of pipeline 'nope' left a trace yet" in shards("--pipeline", "nope").stderr
    assert "no request ended 'failed'\n" in shards("--outcome", "failed").stderr
    assert "no request ended 'rejected'; those that" in shards("--outcome", "rejected").stderr


def test_the_token_is_shown_to_shards_that_want_one(shards: Shards, tmp_path: Path) -> None:
    tokens, other = tmp_path / "tokens", tmp_path / "other"
    for file, text in ((tokens, "mine a-token-of-the-shards\n"), (other, "a-token-of-others\n")):
        file.touch(0o600)
        file.write_text(text)
    shards.add("s0", TRACE, tokens=tokens)
    assert "wants a token: give a file with one of its --http-token-file (LAXITY_HTTP" in shards("c-1").stderr
    assert "does not know this token" in shards("c-1", "--http-token-file", str(other)).stderr
    found = shards("c-1", "--json", "--http-token-file", str(tokens))
    assert json.loads(found.stdout) == trace_to_json(TRACE)
    tokens.chmod(0o640)
    refused = shards("c-1", "--http-token-file", str(tokens))
    assert (refused.exit_code, "can be read by others (mode 0640)" in refused.stderr) == (2, True)


def speak_another_protocol(listener: socket.socket) -> None:
    """As what may have taken the port of a shard that is gone."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.recv(65536)
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")


def test_a_shard_that_cannot_be_asked_is_named(shards: Shards) -> None:
    assert "no service of the cluster 'local' is registered in the store sqlite:" in shards().stderr
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    shards.write("gone", f"http://127.0.0.1:{port}")
    shards.write("silent", "")
    other = socket.create_server(("127.0.0.1", 0))
    speaks = threading.Thread(target=speak_another_protocol, args=(other,), daemon=True)
    speaks.start()
    shards.write("other", f"http://127.0.0.1:{other.getsockname()[1]}")
    alone = shards()
    assert alone.exit_code == 1
    shards.add("s0", OK)
    for result in (alone, shards()):
        assert f"shard gone could not be asked: http://127.0.0.1:{port} cannot be reached" in result.stderr
        assert "shard silent could not be asked: it serves no HTTP: start it with --http" in result.stderr
    assert shards().exit_code == 0
    assert shards("c-9").exit_code == 0
    missing = shards("c-1")
    assert missing.exit_code == 1
    assert "shard gone could not be asked" in missing.stderr
    assert "shard other could not be asked" in missing.stderr
    other.shutdown(socket.SHUT_RDWR)
    speaks.join()
    other.close()


# ---- a real cluster -------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    environment: dict[str, Any] = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path), "COLUMNS": "80"}

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "cli.main", *arguments]
        return subprocess.run(command, env=environment | settings, capture_output=True, text=True)

    yield run
    run("down")


SLOW = """
name: slow
slo: 30s
stages:
  think: {executor: emulated, profile: {alpha_ms: 0, beta_ms: 20000}}
output: think
"""


def test_requests_of_a_real_cluster_can_be_traced(
    shell: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "slow.yaml").write_text(SLOW)
    began = time.time()
    up = shell("up", "lv", str(tmp_path / "slow.yaml"), "--gpus", "6", "--detach")
    assert up.returncode == 0, up.stderr
    for _ in range(4):  # while other tests run, the machine may take longer than the objective
        good = shell("submit", "lv", "--text", "x", "--trace")
        if good.returncode == 0:
            break
    assert good.returncode == 0, good.stderr
    (command,) = re.findall(r"laxity (trace \S+)$", good.stderr, re.MULTILINE)
    shown = shell(*command.split())
    assert shown.returncode == 0, shown.stderr
    assert "ok after " in shown.stdout
    found = json.loads(shell(*command.split(), "--json").stdout)
    assert (found["pipeline"], found["outcome"], found["sampled"]) == ("lv", "ok", True)
    assert began < found["at"] < time.time()
    assert len(found["spans"]) == 5
    for span in found["spans"]:
        moments = [span[name] for name in ("queued", "opens", "granted", "started", "ended")]
        assert moments == sorted(moments)
        assert 0.0 < span["execution"] <= span["ended"] - span["started"] + 1e-6
        assert span["device"]

    hasty = shell("submit", "slow", "--text", "x", "--slo", "10s", "--json")
    answer = json.loads(hasty.stdout)
    assert answer["outcome"] == "dropped", hasty.stdout
    dropped = shell("trace", answer["request_id"])
    assert dropped.returncode == 0, dropped.stderr
    assert " ".join(dropped.stdout.split()).endswith("too much.")
    listed = json.loads(shell("trace", "--limit", "1000", "--json").stdout)
    assert [one["request"] for one in listed][:1] == [answer["request_id"]]
    assert found["request"] in [one["request"] for one in listed]
    assert {one["outcome"] for one in listed} <= {"ok", "dropped", "expired"}


def test_a_shard_exports_what_it_keeps(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "store.db")
    collector = Collector()
    options = ("--shard", "s0", "--store", url, "--cluster", "test", "--trace-sample", "0", "--otlp", collector.url)
    with (tmp_path / "log").open("wb") as log:
        shard = subprocess.Popen(laxity("broker", "run", *options), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    store = open_store(url)
    key = Paths("test").broker("s0")
    try:
        eventually(lambda: store.get(key) is not None, "the shard is there")
        entry = store.get(key)
        assert entry is not None
        with Client(decode(BrokerRecord, key, entry.value).frontend) as client:
            plain, traced = client.submit("nope", "x"), client.submit("nope", "x", traceparent=CLIENT)
            assert plain.reply().outcome == traced.reply().outcome == "rejected"
        eventually(lambda: bool(collector.spans()), "it is exported")
        (root,) = collector.spans()
        assert collector.roots() == [traced.request_id]
        assert root.trace_id.hex() == CLIENT.split("-")[1]
        assert "unknown pipeline 'nope'" in root.status.message
    finally:
        store.close()
        shard.terminate()
        status = shard.wait(30)
        collector.close()
    assert status == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--otlp", "collector:4318"), "no address of a collector"),
        (("--otlp", "http://collector:4318", "--traces", "0"), "--otlp has nothing to send with --traces 0"),
        (("--trace-sample", "1.5"), "range"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: tuple[str, ...], why: str) -> None:
    arguments = ["broker", "run", "--shard", "s", "--store", sqlite_url(tmp_path / "store.db"), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert why in result.stderr
