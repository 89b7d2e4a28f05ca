"""Traces as OpenTelemetry spans, sent to a collector by OTLP over HTTP.

Needs the extra ``laxity[otlp]``, which is imported when the first span is made.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import cached_property
from hashlib import blake2b
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from cluster.observe.trace import Estimate, StageSpan, TraceRecord
from laxity.traceparent import parse_traceparent
from laxity.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Event, ReadableSpan

log = logging.getLogger("laxity.observe")

PAGE: Final = 200
"""Traces that are sent at a time."""
PERIOD: Final = 1.0
"""Seconds between two looks for new ones."""
LONGEST_PAUSE: Final = 30.0
"""Seconds before what could not be sent is tried again, at most; the first time it is PERIOD, then twice as long."""
ATTEMPTS: Final = 8
"""How often the same traces are tried: the collector may take all but these."""
TIMEOUT: Final = 5.0
"""Seconds that one attempt may take."""
QUIET: Final = 60.0
"""Seconds between two lines of the log about what cannot be sent."""
PATH: Final = "/v1/traces"
"""Where collectors take traces, where the address names no path."""
SCOPE: Final = "laxity"


class OtlpError(ValueError):
    """Traces cannot be sent there."""


def check_otlp(url: str) -> str:
    """The address at which traces are taken, from that of a collector. Raises :class:`OtlpError` for what is none, and
    where the extra is not installed."""
    parts = urlsplit(url)
    try:
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise OtlpError(f"{url!r} is no address of a collector; write one such as http://collector:4318")
    try:
        found = find_spec("opentelemetry.exporter.otlp.proto.http") is not None
        found = found and find_spec("opentelemetry.sdk.trace") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise OtlpError("OTLP needs the extra `otlp`: pip install 'laxity[otlp]'")
    return url if parts.path.strip("/") else parts._replace(path=PATH).geturl()


# ---- spans ------------------------------------------------------------------------------------


class SpanMaker:
    """Makes spans of traces. Their ids follow from the request's, so that one that is sent again is the same."""

    def spans(self, trace: TraceRecord) -> list[ReadableSpan]:
        """One for the request, as a child of the client's span; below it one for each stage, and below these what the
        stage's time went into."""
        from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

        client = parse_traceparent(trace.traceparent)
        parent = None
        if client is not None:
            parent = SpanContext(int(client.trace, 16), int(client.span, 16), True, TraceFlags(int(client.sampled)))
        trace_id = parent.trace_id if parent is not None else _id(16, trace)
        estimate = trace.estimate
        root = self._span(
            trace,
            trace_id,
            "",
            f"laxity {trace.pipeline}",
            parent,
            (0.0, trace.latency),
            {
                "laxity.request": trace.request,
                "laxity.pipeline": trace.pipeline,
                "laxity.version": trace.version,
                "laxity.outcome": trace.outcome,
                "laxity.slo": trace.slo,
                "laxity.budget": trace.budget,
                "laxity.priority": trace.priority,
                "laxity.cold": trace.cold,
                "laxity.sampled": trace.sampled,
                **({"laxity.ended_at_stage": trace.stage} if trace.stage else {}),
            },
            events=[] if estimate is None else [_estimated(trace, estimate)],
            kind=SpanKind.SERVER,
            error="" if trace.outcome == "ok" else f"{trace.outcome}: {trace.detail}",
        )
        found = [root]
        for number, span in enumerate(trace.spans):
            found += self._stage(trace, trace_id, root, number, span)
        return found

    def _stage(
        self, trace: TraceRecord, trace_id: int, root: ReadableSpan, number: int, span: StageSpan
    ) -> list[ReadableSpan]:
        ended = span.ended if span.ended >= 0.0 else max(trace.latency, span.queued)
        blamed = trace.outcome != "ok" and trace.stage == span.stage
        attributes: dict[str, Any] = {
            "laxity.pipeline": trace.pipeline,
            "laxity.stage": span.stage,
            "laxity.items": span.items,
            "laxity.attempts": span.attempts,
            "laxity.remaining_budget": span.remaining,
        }
        events: list[Event] = []
        if span.granted >= 0.0:
            attributes |= {
                "laxity.device": span.device,
                "laxity.batch": span.batch,
                "laxity.batch_size": span.size,
                "laxity.batches": span.batches,
                "laxity.forced_wait": span.forced,
                "laxity.chosen_wait": max(span.granted - span.queued - span.forced, 0.0),
                "laxity.predicted_execution": span.predicted,
            }
            events.append(_event(trace, "window opens", span.opens, {}))
            closes = {"laxity.window_closes_in": span.closes - span.granted} if span.closes >= 0.0 else {}
            events.append(_event(trace, "granted", span.granted, closes))
        stage = self._span(
            trace,
            trace_id,
            f"{number}",
            span.stage,
            root.context,
            (span.queued, ended),
            attributes,
            events=events,
            error=f"{trace.outcome}: {trace.detail}" if blamed else "",
        )
        parts = [
            self._span(trace, trace_id, f"{number} {name}", name, stage.context, times, {"laxity.stage": span.stage})
            for name, times in phases(span, ended).items()
        ]
        return [stage, *parts]

    def _span(
        self,
        trace: TraceRecord,
        trace_id: int,
        which: str,
        name: str,
        parent: Any,
        times: tuple[float, float],
        attributes: dict[str, Any],
        *,
        events: list[Event] | None = None,
        kind: Any = None,
        error: str = "",
    ) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        return ReadableSpan(
            name,
            SpanContext(trace_id, _id(8, trace, which), False, TraceFlags(TraceFlags.SAMPLED)),
            parent,
            self._resource(trace.shard),
            attributes,
            events or (),
            kind=kind or SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, error) if error else Status(StatusCode.OK),
            start_time=_ns(trace, times[0]),
            end_time=_ns(trace, max(times)),
            instrumentation_scope=self._scope,
        )

    @cached_property
    def _scope(self) -> Any:
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        return InstrumentationScope(SCOPE, __version__)

    @cached_property
    def _resources(self) -> dict[str, Any]:
        return {}

    def _resource(self, shard: str) -> Any:
        if shard not in self._resources:
            from opentelemetry.sdk.resources import Resource

            names = {"service.name": "laxity", "service.instance.id": shard, "service.version": __version__}
            self._resources[shard] = Resource.create(names)
        return self._resources[shard]


def phases(span: StageSpan, ended: float) -> dict[str, tuple[float, float]]:
    """What a stage's time until ``ended`` went into, from when to when: queue, and for what is known to have run input,
    execution and output. With several batches these are the last one's."""
    if span.granted < 0.0:
        return {"queue": (span.queued, ended)}
    found = {"queue": (span.queued, span.granted)}
    if span.started < 0.0:
        return found
    executed = span.started + span.execution
    if span.input > 0.0:
        found["input"] = (max(span.started - span.input, span.granted), span.started)
    found["execution"] = (span.started, executed)
    if span.output > 0.0:
        found["output"] = (executed, executed + span.output)
    return found


def _estimated(trace: TraceRecord, estimate: Estimate) -> Event:
    return _event(
        trace,
        "predicted to miss its deadline",
        estimate.at,
        {
            "laxity.stage": estimate.stage,
            "laxity.remaining_budget": estimate.remaining,
            "laxity.estimate.wait": estimate.wait,
            "laxity.estimate.execution": estimate.execution,
            "laxity.estimate.batch_size": estimate.size,
            "laxity.estimate.downstream": estimate.downstream,
            "laxity.estimate.short": estimate.short,
        },
    )


def _event(trace: TraceRecord, name: str, at: float, attributes: dict[str, Any]) -> Event:
    from opentelemetry.sdk.trace import Event

    return Event(name, attributes, _ns(trace, at))


def _ns(trace: TraceRecord, at: float) -> int:
    # In microseconds first: floats of the size of Unix time in nanoseconds are 256 of them apart.
    return round(trace.at * 1e6) * 1000 + round(at * 1e9)


def _id(size: int, trace: TraceRecord, which: str = "") -> int:
    """Never 0, which would be none."""
    text = f"{trace.shard}\0{trace.request}\0{trace.at:.6f}\0{which}"
    return int.from_bytes(blake2b(text.encode(), digest_size=size).digest(), "big") or 1


# ---- sending them -----------------------------------------------------------------------------


class TraceExport:
    """Asks ``traces`` (:meth:`cluster.observe.source.Source.traces`) for new ones and sends them to ``url``, in a
    thread of its own.

    What cannot be sent stays where it is: nothing is kept here, and what is no longer there when the collector is back
    is ``lost``. So are traces that the collector goes on to refuse. OtlpError as of :func:`check_otlp`.
    """

    def __init__(
        self,
        traces: Callable[[int, int], tuple[int, list[TraceRecord]]],
        url: str,
        period: float = PERIOD,
        timeout: float = TIMEOUT,
    ) -> None:
        self.url = check_otlp(url)
        from opentelemetry.exporter.otlp.proto.http import Compression
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        self.sent = 0
        self.lost = 0
        """Traces that were, and will never be."""
        self._traces = traces
        self._period = period
        self._maker = SpanMaker()
        self._words = _LastWords()
        self._exporter: Any = OTLPSpanExporter(self.url, timeout=timeout, compression=Compression.Gzip)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._failing = False
        self._log_after = 0.0

    def start(self) -> None:
        self._words.listen()
        self._thread.start()

    def stop(self) -> None:
        """End at once; what has not been sent is left."""
        self._stopping.set()
        self._exporter.shutdown()
        self._thread.join(TIMEOUT)
        self._words.leave()

    def _run(self) -> None:
        after = failures = 0
        while not self._stopping.is_set():
            try:
                last, page = self._traces(after, PAGE)
            except TimeoutError:
                self._stopping.wait(self._period)
                continue
            except RuntimeError:
                return  # the process that has them is ending
            if page and not self._send(page):
                failures += 1
                if failures < ATTEMPTS:
                    self._tell_failure()
                    self._stopping.wait(min(self._period * 2.0 ** (failures - 1), LONGEST_PAUSE))
                    continue
                self.lost += len(page)
                self._tell_failure()
            elif page:
                self.sent += len(page)
                self._tell_success()
            self.lost += last - after - len(page)
            after, failures = last, 0
            if len(page) < PAGE:
                self._stopping.wait(self._period)

    def _send(self, page: list[TraceRecord]) -> bool:
        from opentelemetry.sdk.trace.export import SpanExportResult

        spans = [span for trace in page for span in self._maker.spans(trace)]
        try:
            return self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception as error:
            # What it does not expect of a collector must not end the sending for good.
            self._words.text = f"{type(error).__name__}: {error}"
            return False

    def _tell_failure(self) -> None:
        now = time.monotonic()
        if self._stopping.is_set() or (self._failing and now < self._log_after):
            return
        self._failing = True
        self._log_after = now + QUIET
        lost = f"; {self.lost} are lost by now" if self.lost else ""
        log.warning("traces cannot be sent to %s (%s)%s", self.url, self._words.text or "no reason given", lost)

    def _tell_success(self) -> None:
        if self._failing:
            self._failing = False
            log.warning("traces are sent to %s again; %d were lost", self.url, self.lost)


class _LastWords(logging.Handler):
    """Why the exporter last failed, in place of its own lines in the log, which are several for each attempt."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self._logger = logging.getLogger("opentelemetry.exporter.otlp.proto.http")

    def listen(self) -> None:
        self._logger.addHandler(self)
        self._logger.propagate = False

    def leave(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if "due to timeout" not in said:  # says nothing more: the line before it has the reason
            self.text = said
