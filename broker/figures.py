"""What a shard counts, as it is handed to the one that speaks HTTP for it.

It is read in another thread while the shard serves. Nobody is stopped: each list and dict is copied in one step, and
what a sample says may be a moment younger than what the one before it says.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from broker.agents import Agents
from broker.clients import Clients
from broker.engine.metrics import Histogram, Metrics, PipelineMetrics, StageMetrics
from broker.engine.plan import Pipeline
from broker.engine.report import order_name
from broker.engine.scheduler import Scheduler
from broker.engine.stage import Stage
from broker.files import ShardFiles
from broker.gate import Gate
from broker.refusals import Refusals
from broker.tracing import Tracer
from cluster.observe.families import SHARD
from cluster.observe.figures import Figures, HistogramFigures, Sample
from cluster.observe.trace import TraceRecord
from laxity.outcomes import Outcome

OTHER: Final = "_other"
"""The pipeline under which stages beyond the most share one series."""
TURN: Final = 0.0002
"""Seconds for which figures are put together at a time: the thread that serves may be kept waiting for as long, ..."""
PAUSE: Final = 0.0001
"""... until it gets so many to go on: it would not get the interpreter for 5 ms otherwise."""


class ShardSource:
    """A :class:`~cluster.observe.source.Source`. ``waits_for`` says why the shard does not serve ('': it does)."""

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        clients: Clients,
        agents: Agents,
        files: ShardFiles,
        gates: tuple[Gate, Gate],
        refusals: Refusals,
        tracer: Tracer | None,
        waits_for: Callable[[], str],
    ) -> None:
        self._name = name
        self._scheduler = scheduler
        self._clients = clients
        self._agents = agents
        self._files = files
        self._gates = gates
        self._refusals = refusals
        self._tracer = tracer
        self._waits_for = waits_for
        self._started_at = time.time()

    def figures(self) -> Figures:
        """All families of a shard; those of pipelines and stages are empty where nothing is counted."""
        found = _Samples(self._name)
        self._shell(found)
        metrics = self._scheduler.metrics
        if metrics is not None:
            pipelines = self._scheduler.serving()
            _gauges(found, pipelines)
            _counters(found, metrics)
        return Figures("shard", self._name, os.getpid(), self._started_at, self._waits_for(), found.samples())

    def trace(self, request: str) -> TraceRecord | None:
        return self._tracer.trace(request) if self._tracer is not None else None

    def traces(self, after: int, limit: int) -> tuple[int, list[TraceRecord]]:
        return self._tracer.traces(after, limit) if self._tracer is not None else (after, [])

    def _shell(self, found: _Samples) -> None:
        clients, agents = self._clients, self._agents
        found.add("laxity_clients", len(clients))
        found.add("laxity_agents", len(agents))
        found.add("laxity_devices", len(self._scheduler.fleet.devices))
        found.add("laxity_payload_bytes", self._scheduler.ledger.bytes)
        for peer, gate in zip(("client", "agent"), self._gates, strict=True):
            found.add("laxity_connections", len(gate.connections), peer)
        for reason, count in self._refusals.counts.items():
            found.add("laxity_refused", count, reason)
        found.add("laxity_agents_lost", agents.lost)
        found.add("laxity_reconnects", clients.reconnects, "client")
        found.add("laxity_reconnects", agents.reconnects, "agent")
        found.add("laxity_heartbeats", clients.heartbeats, "client")
        found.add("laxity_heartbeats", agents.heartbeats, "agent")
        found.add("laxity_malformed_messages", clients.malformed + agents.malformed + self._files.malformed)
        found.add("laxity_undeliverable_answers", clients.undeliverable)
        found.add("laxity_traces", self._tracer.kept if self._tracer is not None else 0)


class _Samples:
    """Samples by family. Several of the same labels add up."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._numbers: dict[str, dict[tuple[str, ...], float]] = {family.name: {} for family in SHARD}
        self._histograms: dict[str, list[Sample]] = {}
        self._rested_at = time.perf_counter()

    def rest(self) -> None:
        """Let the shard's thread go on, if it was some time ago that it could."""
        if time.perf_counter() >= self._rested_at + TURN:
            time.sleep(PAUSE)
            self._rested_at = time.perf_counter()

    def add(self, family: str, value: float, *labels: str) -> None:
        """A number; ``labels`` are those behind the shard's."""
        numbers = self._numbers[family]
        numbers[labels] = numbers.get(labels, 0) + value

    def histogram(self, family: str, histogram: Histogram, *labels: str) -> None:
        figures = HistogramFigures(histogram.buckets.copy(), histogram.sum)
        self._histograms.setdefault(family, []).append(([self._shard, *labels], figures))

    def samples(self) -> dict[str, list[Sample]]:
        found: dict[str, list[Sample]] = {}
        for family, numbers in self._numbers.items():
            plain: list[Sample] = [([self._shard, *labels], value) for labels, value in numbers.items()]
            found[family] = self._histograms.get(family, plain)
        return found


# ---- what is so at present ---------------------------------------------------------------------


def _gauges(found: _Samples, pipelines: list[Pipeline]) -> None:
    """Of several versions of a pipeline requests and elements add up; the rest is the serving one's. What shares a
    series has no more than sums."""
    for pipeline in pipelines:
        counted = pipeline.metrics
        if counted is None:
            continue
        name = OTHER if counted.shared else pipeline.name
        found.add("laxity_requests_in_flight", pipeline.in_flight, name)
        if not counted.shared and not pipeline.retired:
            first = pipeline.stages[pipeline.roots[0]].stage
            found.add("laxity_pipeline_slo_seconds", pipeline.slo, name)
            found.add("laxity_pipeline_quantile", pipeline.quantile, name)
            found.add("laxity_pipeline_history_seconds", first.waits.history, name)
            found.add("laxity_pipeline_admission_ratio", first.admits, name)
        for plan in pipeline.stages:
            _stage_gauges(found, plan.stage, pipeline, plan.name)
        found.rest()


def _stage_gauges(found: _Samples, stage: Stage, pipeline: Pipeline, name: str) -> None:
    metrics = stage.metrics
    if metrics is None:
        return
    labels = (OTHER, "") if metrics.shared else (pipeline.name, name)
    found.add("laxity_stage_queue_depth", sum(_waiting(lane) for lane in stage.lanes), *labels)
    if pipeline.retired:
        return
    found.add("laxity_stage_devices", sum(len(group.members) for group in stage.groups.copy()), *labels)
    if not metrics.shared:
        found.add("laxity_stage_drop_probability", metrics.drop_probability, *labels)
        found.add("laxity_stage_load_factor", stage.order.load, *labels)
        found.add("laxity_stage_order", 1, *labels, order_name(stage))


def _waiting(lane: Stage) -> int:
    collected = sum(len(device.collected) for device in list(lane.collecting.values()))
    return len(lane.queue) + len(lane.behind) + lane.alone_count + collected


# ---- what was counted ------------------------------------------------------------------------------


def _counters(found: _Samples, metrics: Metrics) -> None:
    others = PipelineMetrics(OTHER, True, deque())
    pipelines = list(metrics.pipelines.values())
    others.absorb(metrics.gone)  # at once: one that goes meanwhile would be counted twice
    for counted in pipelines:
        if counted.shared:
            others.absorb(counted)
        elif counted.name or counted.submitted:  # none asked for an unknown one
            _pipeline(found, counted)
            for name, stage in list(counted.stages.items()):
                if not stage.shared:
                    _stage(found, stage, counted.name, name)
                    _no_drops(found, counted.name, name)
        found.rest()
    if others.submitted:
        _pipeline(found, others)
    if any(metrics.others.at_enqueue.buckets):
        _stage(found, metrics.others, OTHER, "")


def _no_drops(found: _Samples, pipeline: str, stage: str) -> None:
    """Series that begin at 0: rates are known from their first drop on."""
    for outcome in (Outcome.DROPPED, Outcome.EXPIRED):
        found.add("laxity_requests", 0, pipeline, stage, outcome.value)


def _pipeline(found: _Samples, counted: PipelineMetrics) -> None:
    name = counted.name
    found.add("laxity_requests_submitted", counted.submitted, name)
    found.add("laxity_requests", counted.ok, name, "", Outcome.OK.value)
    for (stage, outcome), count in list(counted.not_ok.items()):
        found.add("laxity_requests", count, name, stage, outcome)
    found.histogram("laxity_request_latency_seconds", counted.latency, name)


def _stage(found: _Samples, counted: StageMetrics, pipeline: str, stage: str) -> None:
    labels = (pipeline, stage)
    arrived = sum(counted.at_enqueue.buckets)
    found.add("laxity_stage_arrivals", arrived, *labels)
    found.add("laxity_batches", 0, *labels, "ok")
    for code, count in list(counted.batches.items()):
        found.add("laxity_batches", count, *labels, code)
    if not arrived:
        return  # thousands of stages may be served of which few are used
    found.histogram("laxity_stage_budget_at_enqueue_seconds", counted.at_enqueue, *labels)
    found.histogram("laxity_stage_budget_at_dispatch_seconds", counted.at_dispatch, *labels)
    found.histogram("laxity_stage_queueing_seconds", counted.forced, *labels, "forced")
    found.histogram("laxity_stage_queueing_seconds", counted.chosen, *labels, "chosen")
    if any(counted.batch_wait.buckets):
        found.histogram("laxity_stage_batch_wait_seconds", counted.batch_wait, *labels)
    found.histogram("laxity_stage_execution_seconds", counted.execution, *labels)
    found.histogram("laxity_stage_batch_size", counted.sizes, *labels)
    found.histogram("laxity_stage_window_slack_seconds", counted.slack, *labels)
    found.histogram("laxity_stage_prediction_error_seconds", counted.error, *labels)
