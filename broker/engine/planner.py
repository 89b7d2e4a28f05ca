"""What each stage may take: its part of the SLO, its target batch, and what it leaves to the stages behind it.

The peers' batches come from one common size: the largest with which the longest path, run at twice its latency (one
batch running while the next one fills: Nexus' rule), fits into the SLO; their parts of the SLO are in proportion to
the stages' latencies at that size. ``laxity`` plans batches and parts together (batch_plan.py).
"""

from math import log
from typing import Final

from broker.engine.batch_plan import plan_batches, plan_lane
from broker.engine.downstream import downstream
from broker.engine.overhead import Overhead
from broker.engine.plan import Pipeline
from broker.engine.policy import COMMON, PLANNED, UNBOUNDED, WORST_CASE
from broker.engine.predictor import LatencyTable
from broker.engine.stage import Stage
from broker.engine.window import target_batch

MARGIN: Final = 0.01
"""The part of the SLO that the plan leaves unused, for what the predictions do not see: a process that gets the
processor late, a message on its way."""
ROOM: Final = 0.15
ROOM_FOR_BURSTS: Final = 0.5
MOST_ROOM: Final = 0.5
"""The part of the SLO, of a pipeline with many stages, in which requests may wait for their first batches: ROOM, and
ROOM_FOR_BURSTS of the part by which arrivals stray from their mean. The batches are planned for the rest. With one
stage nothing lies behind, and the planned wait for a device is all there is."""
LEAST: Final = 0.5
"""The part of the SLO that is planned with at least, however long the messages take."""
COARSE: Final = 0.05
"""Rates that differ by less than this part are planned for alike: plans need not be made anew each second."""
COARSE_BUDGET: Final = 0.02
"""Likewise budgets, by this part of the SLO."""


def replan(pipeline: Pipeline, travel: Overhead, response: Overhead) -> None:
    """Bring parts, targets, remaining and reserve of a pipeline's stages up to date with rates and predictions.
    ``travel`` and ``response`` are what a batch takes to its device and its results take back: on average for the
    stages behind, at the worst of late for a stage's own results."""
    tables = slowest_tables(pipeline)
    hops: list[float] = []
    for plan, table in zip(pipeline.stages, tables, strict=True):
        typical = plan.lead.typical_batch()
        inputs = table.input(typical) if table is not None else 0.0
        hops.append(travel.mean(typical) + inputs + response.mean(0))
    behind = downstream(pipeline, tables, hops)
    for number, plan in enumerate(pipeline.stages):
        for lane in plan.stage.lanes:
            lane.remaining = behind[number] + response.base
            lane.reserve = lane.remaining
    if pipeline.policy.targets == PLANNED:
        _plan_together(pipeline, tables, hops, response.base)
    else:
        _plan_by_common_batch(pipeline, tables)


def _plan_together(pipeline: Pipeline, tables: list[LatencyTable | None], hops: list[float], response: float) -> None:
    slo = pipeline.slo
    hops_behind = pipeline.downstream(hops)
    on_the_way = max([hops_behind[number] for number in pipeline.roots], default=0.0)
    depth = 1.0 + max(pipeline.downstream([1.0] * len(pipeline.stages)), default=0.0)
    bursts = max([pipeline.stages[number].lead.order.bursts for number in pipeline.roots], default=0.0)
    room = min(ROOM + ROOM_FOR_BURSTS * bursts, MOST_ROOM)
    budget = slo * (1.0 - room * (1.0 - 1.0 / depth)) - on_the_way
    if budget < LEAST * slo:
        budget = LEAST * slo
    inputs = _inputs(pipeline, tables, budget)
    batch_plan = pipeline.batch_plan
    if batch_plan is None or inputs != pipeline.planned_for:
        batch_plan = plan_batches(pipeline, tables, budget)
        pipeline.batch_plan = batch_plan
        pipeline.planned_for = inputs
    after = pipeline.downstream(batch_plan.times)
    for number, plan in enumerate(pipeline.stages):
        planned = after[number] + hops_behind[number] + response
        for lane in plan.stage.lanes:
            if lane is plan.lead:
                lane.target = batch_plan.targets[number]
                lane.ceiling = batch_plan.ceilings[number]
            else:
                plan_lane(plan, lane, batch_plan.times[number], batch_plan.bursts)
            lane.margin = MARGIN * slo
            lane.reserve = lane.margin + (planned if planned > lane.remaining else lane.remaining)


def _inputs(pipeline: Pipeline, tables: list[LatencyTable | None], budget: float) -> list[int]:
    """What a plan depends on, coarsely."""
    inputs = [round(budget / (COARSE_BUDGET * pipeline.slo))]
    for number, plan in enumerate(pipeline.stages):
        table = tables[number]
        stage = plan.lead
        if plan.cost is not None:
            inputs.append(plan.stage.lanes.index(stage))
        inputs.append(table.version if table is not None else -1)
        inputs.append(stage.devices)
        inputs.append(round(stage.held_up_by() / (COARSE * pipeline.slo)))
        inputs.append(round(log(stage.rate) / COARSE) if stage.rate > 0.0 else -(1 << 30))
        inputs.append(round(log(plan.items_or_one()) / COARSE))
    return inputs


def _plan_by_common_batch(pipeline: Pipeline, tables: list[LatencyTable | None]) -> None:
    common = common_batch(pipeline, tables)
    times = _times(pipeline, tables, common)
    if pipeline.policy.budget == WORST_CASE:
        times = [
            plan.lead.waits.longest if plan.lead.waits.longest > 0.0 else time
            for plan, time in zip(pipeline.stages, times, strict=True)
        ]
    before, after = pipeline.upstream(times), pipeline.downstream(times)
    for number, plan in enumerate(pipeline.stages):
        path = before[number] + times[number] + after[number]
        budget = pipeline.slo * (times[number] / path if path > 0.0 else 1.0)
        for stage in plan.stage.lanes:
            table = stage.table
            stage.due_share = (before[number] + times[number]) / path if path > 0.0 else 1.0
            largest = stage.max_batch
            if pipeline.policy.targets == COMMON:
                stage.target = stage.ceiling = common if common < largest else largest
            elif pipeline.policy.targets == UNBOUNDED:
                stage.target = stage.ceiling = largest
            elif table is not None:
                stage.target = target_batch(table, stage.devices, stage.rate, budget, largest)
                stage.ceiling = largest  # it grows as far as its deadlines allow


def slowest_tables(pipeline: Pipeline) -> list[LatencyTable | None]:
    """Each stage's predictions for the slowest of its device types; sets them as the stages' tables. Of a stage with
    lanes those of the lane with the most work, which leads."""
    tables: list[LatencyTable | None] = []
    for plan in pipeline.stages:
        most = 0.0
        plan.lead = plan.stage
        for lane in plan.stage.lanes:
            lane.table = _slowest_table(lane)
            if plan.cost is not None and lane.table is not None:
                work = lane.rate * lane.table.busy(lane.target) / lane.target
                if work > most:
                    most = work
                    plan.lead = lane
        tables.append(plan.lead.table)
    return tables


def _slowest_table(stage: Stage) -> LatencyTable | None:
    slowest: LatencyTable | None = None
    for group in stage.groups:
        table = group.tables[stage.key]
        if slowest is None or table.upper(1) > slowest.upper(1):
            slowest = table
    if slowest is None:
        for model in stage.paged:
            table = model.table.lane(stage.key, stage.part)
            if slowest is None or table.upper(1) > slowest.upper(1):
                slowest = table
    return slowest


def common_batch(pipeline: Pipeline, tables: list[LatencyTable | None]) -> int:
    """The largest batch size with which twice the longest path fits into the SLO; at least 1."""
    largest = max([plan.stage.max_batch for plan in pipeline.stages], default=1)
    low, high = 1, largest
    while low < high:
        middle = (low + high + 1) // 2
        times = _times(pipeline, tables, middle)
        after = pipeline.downstream(times)
        longest = max([times[number] + after[number] for number in pipeline.roots], default=0.0)
        if 2.0 * longest <= pipeline.slo:
            low = middle
        else:
            high = middle - 1
    return low


def _times(pipeline: Pipeline, tables: list[LatencyTable | None], batch: int) -> list[float]:
    """What a request takes at each stage in batches of ``batch``; a map stage's all rounds of its items."""
    times: list[float] = []
    for plan, table in zip(pipeline.stages, tables, strict=True):
        size = batch if batch < plan.stage.max_batch else plan.stage.max_batch
        times.append(plan.rounds(size) * table.upper(size) if table is not None else 0.0)
    return times
