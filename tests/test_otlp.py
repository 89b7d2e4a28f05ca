"""Traces as OpenTelemetry spans, sent to a collector that is an HTTP server of the test's own."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest
from conftest import eventually
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from cluster.observe import otlp
from cluster.observe.otlp import ATTEMPTS, PAGE, OtlpError, SpanMaker, TraceExport, check_otlp
from cluster.observe.trace import Estimate, StageSpan, TraceRecord

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SPAN = StageSpan(
    stage="detect", queued=0.010, opens=0.015, closes=0.4, granted=0.020, started=0.025, ended=0.050, execution=0.020,
    input=0.003, output=0.002, forced=0.004, device="gpu-1/0", batch=77, size=8, items=1, batches=1, attempts=1,
    predicted=0.021, remaining=0.95,
)  # fmt: skip
ESTIMATE = Estimate("recognize", 0.060, 0.0412, 0.012, 0.0351, 8, 0.0203, 0.0262)
TRACE = TraceRecord(
    request="c-1", shard="s0", pipeline="ocr", version="v1", traceparent=CLIENT, sampled=True, at=1_700_000_000.25,
    slo=1.0, budget=1.0, latency=0.060, outcome="dropped", stage="recognize", detail="predicted to miss", cold=False,
    priority=0,
    spans=[
        SPAN,
        StageSpan("recognize", 0.050, -1.0, -1.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0, "", -1, 0, 3, 0, 0, 0.0, 0.94),
    ],
    estimate=ESTIMATE,
)  # fmt: skip


class Collector:
    """Takes traces, or refuses them by ``status``."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                outer.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def spans(self) -> list[Any]:
        return [
            span
            for _, request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def roots(self) -> list[str]:
        """The requests whose traces came, in order."""
        return [attributes(span)["laxity.request"] for span in self.spans() if span.name.startswith("laxity ")]


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


class Kept:
    """A source of traces: the newest ``most``, all the same but for their request."""

    def __init__(self, most: int = 1000) -> None:
        self.count = 0
        self.most = most
        self.error: Exception | None = None

    def __call__(self, after: int, limit: int) -> tuple[int, list[TraceRecord]]:
        if self.error is not None:
            raise self.error
        first = max(after, self.count - self.most, 0)
        last = min(self.count, first + limit)
        return last, [msgspec.structs.replace(TRACE, request=f"c-{number}") for number in range(first, last)]


def attributes(thing: Any) -> dict[str, Any]:
    found = {}
    for entry in thing.attributes:
        kind = entry.value.WhichOneof("value")
        found[entry.key] = getattr(entry.value, kind)
    return found


def export(kept: Kept, url: str, timeout: float = 0.2) -> TraceExport:
    return TraceExport(kept, url, period=0.01, timeout=timeout)


def test_a_trace_becomes_spans_of_its_clients_trace(collector: Collector) -> None:
    kept = Kept()
    kept.count = 1
    exporting = export(kept, collector.url)
    exporting.start()
    try:
        eventually(lambda: exporting.sent == 1, "it is sent")
    finally:
        exporting.stop()
    ((path, request),) = collector.requests
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    assert attributes(resource.resource)["service.name"] == "laxity"
    assert attributes(resource.resource)["service.instance.id"] == "s0"
    spans = {span.span_id: span for span in collector.spans()}
    assert len(spans) == 8
    assert {span.trace_id.hex() for span in spans.values()} == {"0af7651916cd43dd8448eb211c80319c"}
    root, detect, *_ = collector.spans()
    assert (root.name, root.parent_span_id.hex()) == ("laxity ocr", "b7ad6b7169203331")
    assert root.end_time_unix_nano - root.start_time_unix_nano == 60_000_000
    assert root.start_time_unix_nano == 1_700_000_000_250_000_000
    found = attributes(root)
    assert found["laxity.request"] == "c-0"
    assert (found["laxity.outcome"], found["laxity.ended_at_stage"], found["laxity.slo"]) == (
        "dropped",
        "recognize",
        1.0,
    )
    assert (root.status.code, root.status.message) == (2, "dropped: predicted to miss")
    (event,) = root.events
    assert event.name == "predicted to miss its deadline"
    reckoned = attributes(event)
    total = sum(reckoned[f"laxity.estimate.{part}"] for part in ("wait", "execution", "downstream"))
    assert total == pytest.approx(reckoned["laxity.remaining_budget"] + reckoned["laxity.estimate.short"])

    names = {span.name: span for span in spans.values() if span.parent_span_id == detect.span_id}
    assert set(names) == {"queue", "input", "execution", "output"}
    assert detect.parent_span_id == root.span_id
    found = attributes(detect)
    assert (found["laxity.device"], found["laxity.batch"], found["laxity.batch_size"]) == ("gpu-1/0", 77, 8)
    assert (found["laxity.forced_wait"], found["laxity.chosen_wait"]) == pytest.approx((0.004, 0.006))
    assert [event.name for event in detect.events] == ["window opens", "granted"]
    assert detect.status.code == 1
    times = [names[name].start_time_unix_nano - root.start_time_unix_nano for name in ("queue", "input", "execution")]
    assert times == pytest.approx([10_000_000, 22_000_000, 25_000_000], abs=2)
    (stuck,) = [span for span in spans.values() if span.name == "recognize"]
    assert stuck.status.code == 2
    assert [span.name for span in spans.values() if span.parent_span_id == stuck.span_id] == ["queue"]
    for span in spans.values():
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano


def test_a_trace_without_a_client_is_one_of_its_own() -> None:
    alone = msgspec.structs.replace(TRACE, traceparent="", outcome="ok", stage="", estimate=None, spans=[SPAN])
    other = msgspec.structs.replace(alone, request="c-2")
    maker = SpanMaker()
    root, *children = maker.spans(alone)
    assert root.parent is None
    assert root.context is not None
    assert all(span.context is not None and span.context.trace_id == root.context.trace_id for span in children)
    again = [span.context for span in maker.spans(alone)]
    assert again == [root.context, *(span.context for span in children)], "sent again it is the same"
    first = maker.spans(other)[0].context
    assert first is not None
    assert first.trace_id != root.context.trace_id
    assert all(span.status.is_ok for span in (root, *children))


def test_many_are_sent_a_page_at_a_time(collector: Collector) -> None:
    kept = Kept()
    kept.count = 2 * PAGE + 5
    exporting = export(kept, collector.url)
    exporting.start()
    try:
        eventually(lambda: exporting.sent == kept.count, "all are sent")
        assert collector.roots() == [f"c-{number}" for number in range(kept.count)]
        assert len(collector.requests) == 3
    finally:
        exporting.stop()
    assert exporting.lost == 0


def test_a_collector_that_is_away_costs_only_what_is_no_longer_kept(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept(most=50)
    kept.count = 50
    url = collector.url
    collector.close()
    exporting = export(kept, url, timeout=1.5)  # it tries again within that, and says why
    with caplog.at_level("WARNING"):
        exporting.start()
        eventually(lambda: bool(caplog.records), "it is logged")
        exporting.stop()
    (line,) = caplog.messages
    assert line.startswith(f"traces cannot be sent to {url}/v1/traces (")
    assert "refused" in line.lower()

    kept.count = 80
    back = Collector()
    exporting = export(kept, back.url)
    exporting.start()
    try:
        eventually(lambda: exporting.sent == 50, "what is kept yet is sent")
        assert exporting.lost == 30
        assert back.roots() == [f"c-{number}" for number in range(30, 80)]
    finally:
        exporting.stop()
        back.close()


def test_what_a_collector_goes_on_to_refuse_is_given_up(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "LONGEST_PAUSE", 0.01)
    collector.status = 400
    kept = Kept()
    kept.count = 3
    exporting = export(kept, collector.url)
    exporting.start()
    try:
        eventually(lambda: exporting.lost == 3, "they are given up")
        assert len(collector.requests) == ATTEMPTS
        collector.status = 200
        kept.count = 4
        eventually(lambda: exporting.sent == 1, "others are sent")
        assert collector.roots()[-1] == "c-3"
    finally:
        exporting.stop()


def test_what_the_exporter_does_not_expect_does_not_end_it(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept()
    kept.count = 3
    exporting = export(kept, collector.url)
    exports = exporting._exporter.export

    def breaks(_spans: Any) -> Any:
        raise AssertionError("what is this?")

    exporting._exporter.export = breaks
    exporting.start()
    try:
        eventually(lambda: "what is this?" in caplog.text, "the log tells of it")
        exporting._exporter.export = exports
        eventually(lambda: exporting.sent == 3, "they are sent")
    finally:
        exporting.stop()


def test_it_ends_while_the_collector_is_away_and_with_its_source() -> None:
    kept = Kept()
    kept.count = 1
    exporting = export(kept, "http://127.0.0.1:1")
    exporting.start()
    exporting.stop()
    assert not exporting._thread.is_alive()
    kept.error = RuntimeError("it is ending")
    exporting = export(kept, "http://127.0.0.1:1")
    exporting.start()
    exporting._thread.join(10.0)
    assert not exporting._thread.is_alive()
    exporting.stop()


@pytest.mark.parametrize(
    "url", ["", "collector:4318", "tcp://collector:4318", "http://", "http://host:port", "http://host:99999"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(OtlpError, match="no address of a collector"):
        check_otlp(url)


def test_the_path_is_added_where_there_is_none() -> None:
    assert check_otlp("http://collector:4318") == "http://collector:4318/v1/traces"
    assert check_otlp("https://collector/") == "https://collector/v1/traces"
    assert check_otlp("https://collector/otlp/x?k=v") == "https://collector/otlp/x?k=v"
