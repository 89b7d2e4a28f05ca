"""From a store's records, looked at again and again, to a live view: rates, history, what devices do, who was dropped.

An engine: the times come in, nothing is waited for. Records may say anything; what cannot be true is left out.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from graphlib import CycleError

import msgspec

from cli.live.fleet import Fleet
from cli.live.reports import Freshness, PipelineRates, Pressure, pipeline_rates, pressures
from cli.live.view import HISTORY, LiveDrop, LivePipeline, LiveShard, LiveStage, LiveView
from cli.rollout import missing_services, waits_for
from cli.snapshot import Snapshot
from cluster.planner.keys import natural
from cluster.records import LONGEST, READY, PipelineRecord, ServingRecord, failure
from cluster.tuning.merge import MOST, StageState, merge
from cluster.tuning.report import LONGEST_DETAIL, MOST_DROPS, ReportRecord
from pipelines.graph import Graph
from pipelines.spec import REQUEST, PipelineSpec

MOST_KEPT_DROPS = 100
MOST_EXPLAINED = 20
"""Pipelines of which it is found out at length what they wait for."""
CATCH_UP = 3
"""Seconds of history that one look may fill; what was missed beyond that stays a gap."""

Point = tuple[int, float, float, float]


class LiveFeed:
    """A cluster as it is looked at, about once a second. ``now`` is monotonic, ``unix`` the time of day, in seconds."""

    def __init__(self, cluster: str, store: str) -> None:
        self._reports = Freshness()
        self._fleet = Fleet()
        self._history: dict[str, deque[Point]] = {}
        self._drops: deque[LiveDrop] = deque(maxlen=MOST_KEPT_DROPS)
        self._second = 0
        self._shapes: dict[str, tuple[PipelineSpec, _Shape]] = {}
        self._view = LiveView(at=0.0, cluster=cluster, store=store)

    def away(self, now: float, unix: float, why: str) -> LiveView:
        """The store could not be looked at: the last view, with ``why``."""
        # What is not seen to change meanwhile has not fallen silent.
        self._reports.forgive(now)
        self._fleet.forgive(now)
        self._view = msgspec.structs.replace(self._view, at=unix, stale=why)
        return self._view

    def update(self, now: float, unix: float, seen: Snapshot) -> LiveView:
        """The cluster now."""
        fresh = self._reports.note(now, seen.reports)
        reports = self._reports.current(now)
        self._note_drops(unix, {shard: seen.reports[shard] for shard in fresh})
        rates = pipeline_rates(reports.values())
        shown: dict[str, PipelineRecord | ServingRecord] = {**seen.pipelines, **seen.serving}
        self._note_history(int(unix), {name: rates[name] for name in shown if name in rates})
        stages = _Stages(seen, reports)
        pipelines = [self._pipeline(name, shown[name], seen, rates, stages) for name in sorted(shown)]
        self._shapes = {name: known for name, known in self._shapes.items() if name in shown}
        missing = missing_services(seen)
        _explain(seen, pipelines, missing)
        self._view = LiveView(
            at=unix,
            cluster=self._view.cluster,
            store=self._view.store,
            leader=seen.leader.coordinator if seen.leader is not None else "",
            coordinators=sorted(seen.coordinators, key=natural),
            fixed_plan=seen.fixed,
            pipelines=pipelines,
            nodes=self._fleet.nodes(now, seen),
            shards=[_shard(name, seen, reports.get(name)) for name in sorted(seen.brokers, key=natural)],
            drops=list(self._drops),
            missing=missing,
        )
        return self._view

    # ---- what came before ------------------------------------------------------------------

    def _note_drops(self, unix: float, fresh: Mapping[str, ReportRecord]) -> None:
        """Each report is told of once, however often it is seen."""
        new = [
            LiveDrop(
                at=unix - drop.ago,
                request=drop.request[:LONGEST_DETAIL],
                pipeline=drop.pipeline[:LONGEST_DETAIL],
                stage=drop.stage[:LONGEST_DETAIL],
                outcome=drop.outcome[:LONGEST_DETAIL],
                detail=drop.detail[:LONGEST_DETAIL],
                shard=shard,
            )
            for shard, report in fresh.items()
            for drop in report.drops[:MOST_DROPS]
            if 0.0 <= drop.ago < LONGEST
        ]
        if new:
            merged = sorted([*new, *self._drops], key=lambda drop: drop.at, reverse=True)
            self._drops = deque(merged[:MOST_KEPT_DROPS], MOST_KEPT_DROPS)

    def _note_history(self, second: int, rates: Mapping[str, PipelineRates]) -> None:
        """One point a second for each pipeline that anybody wanted anything of in all that time: thousands sleep."""
        if second < self._second:
            self._history.clear()  # the clock was set back
            self._second = 0
        elif second == self._second:
            return
        first = second if not self._second else max(self._second + 1, second - CATCH_UP + 1)
        self._second = second
        for name in list(self._history):
            points = self._history[name]
            while points and points[0][0] <= second - HISTORY:
                points.popleft()
            if name not in rates and not any(offered or good or lost for _, offered, good, lost in points):
                del self._history[name]
        for name in self._history.keys() | rates.keys():
            one = rates.get(name, PipelineRates())
            points = self._history.setdefault(name, deque(maxlen=HISTORY))
            points.extend((at, one.offered, one.good, one.lost) for at in range(first, second + 1))

    # ---- what is -----------------------------------------------------------------------------

    def _pipeline(
        self,
        name: str,
        record: PipelineRecord | ServingRecord,
        seen: Snapshot,
        rates: Mapping[str, PipelineRates],
        stages: _Stages,
    ) -> LivePipeline:
        spec = record.spec
        shape = self._shape(name, spec)
        version = f"{name}@{record.version}"
        rate = rates.get(name, PipelineRates())
        tuning = seen.tuning.get(name)
        live = LivePipeline(
            name=name,
            version=record.version,
            slo=_within(spec.slo, LONGEST),
            offered=rate.offered,
            good=rate.good,
            outcomes=rate.outcomes,
            in_flight=stages.in_flight[name],
            latency=rate.latency,
            policy=spec.policy,
            stages=[
                stages.live(f"{version}/{stage}", stage, spec.stages[stage].map, inputs)
                for stage, inputs in shape.stages
            ],
            outputs=shape.outputs,
            history=list(self._history.get(name, ())),
        )
        if tuning is not None:
            live.quantile = _within(tuning.quantile, 1.0)
            live.window = _within(tuning.history, LONGEST)
            live.admission = _within(tuning.admission, 1.0)
        return live

    def _shape(self, name: str, spec: PipelineSpec) -> _Shape:
        known = self._shapes.get(name)
        if known is None or known[0] is not spec:
            known = self._shapes[name] = (spec, _Shape(spec))
        return known[1]


def _explain(seen: Snapshot, pipelines: Sequence[LivePipeline], missing: str) -> None:
    """Say of those that are not served, or not by what is wanted, what they wait for."""
    explained = 0
    for live in pipelines:
        wanted, serving = seen.pipelines.get(live.name), seen.serving.get(live.name)
        served = serving is not None and wanted is not None and serving.version == wanted.version
        if wanted is None or (served and all(stage.devices for stage in live.stages)):
            continue
        explained += 1
        if missing or explained <= MOST_EXPLAINED:
            live.waits_for = missing or waits_for(seen, wanted.spec)
        else:
            live.waits_for = "it is not served yet, as others are not"


class _Shape:
    """A pipeline's graph: the stages in topological order, each with what it gets its input from."""

    def __init__(self, spec: PipelineSpec) -> None:
        try:
            order = list(Graph(spec).order)
        except CycleError:
            order = list(spec.stages)  # nobody checks what lies in a store
        known = {REQUEST, *order}
        self.stages = [(name, _among(known, [source for source, _ in spec.stages[name].sources()])) for name in order]
        self.outputs = _among(set(order), [stage for stage, _ in spec.outputs().values()])


def _among(known: set[str], names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name in known]


class _Stages:
    """What is known of the stages of all pipelines at one moment."""

    def __init__(self, seen: Snapshot, reports: Mapping[str, ReportRecord]) -> None:
        self._states = merge(reports.values())
        self._pressures = pressures(reports.values())
        self._ready: Counter[str] = Counter()
        self._failed: dict[str, str] = {}
        for agent, node in seen.nodes.items():
            for device in node.devices:
                for model, how in device.models.items():
                    self._ready[model] += how == READY
                    why = failure(how)
                    if why is not None:
                        self._failed.setdefault(model, f"on {agent}, device {device.device}: {why}")
        self.in_flight: Counter[str] = Counter()
        """Requests by pipeline name, all versions together."""
        for report in reports.values():
            for version, count in report.in_flight.items():
                self.in_flight[version.rpartition("@")[0]] += count if 0 <= count < MOST else 0

    def live(self, model: str, name: str, each: bool, inputs: list[str]) -> LiveStage:
        """The stage ``name``, with its model's key; ``each``: a map stage."""
        live = LiveStage(
            name=name,
            inputs=inputs,
            map=each,
            devices=self._ready[model],
            failed=self._failed.get(model, "")[: 2 * LONGEST_DETAIL],
        )
        state = self._states.get(model.rpartition("/")[0], {}).get(name)
        if state is not None:
            _fill(live, state, self._pressures[model])
        return live


def _fill(live: LiveStage, state: StageState, pressure: Pressure) -> None:
    live.arrived, live.started, live.batches = state.arrived, state.started, state.batches
    live.batch = state.started / state.batches if state.batches else 0.0
    live.dropped, live.waiting = state.dropped, state.waiting
    live.queued, live.execution = state.queued, state.execution
    live.least_slack, live.slack = pressure.slack if pressure.slack is not None else (None, None)
    live.load_factor, live.order = pressure.load_factor, pressure.order


def _shard(name: str, seen: Snapshot, report: ReportRecord | None) -> LiveShard:
    record = seen.brokers[name]
    rates = pipeline_rates([report] if report is not None else [])
    return LiveShard(
        name=name,
        host=record.host,
        frontend=record.frontend,
        in_flight=record.counters.get("in_flight", 0),
        submitted=sum(rate.offered for rate in rates.values()),
        ended={how: count for how, count in record.counters.items() if how not in ("submitted", "in_flight")},
    )


def _within(value: float, most: float) -> float:
    return min(max(value, 0.0), most) if value == value else 0.0
