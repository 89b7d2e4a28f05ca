"""What each stage may take: its share of the SLO, its target batch, and what it leaves to the stages behind it.

Planned execution times d come from one common batch size: the largest with which the longest path, run at
twice its latency (one batch running while the next one fills: Nexus' rule), fits into the SLO. A stage's
budget is its share of the SLO in proportion to d along the longest path through it.
"""

from typing import Final

from broker.engine.plan import Pipeline
from broker.engine.predictor import LatencyTable
from broker.engine.window import FULL_LOAD, target_batch

MARGIN: Final = 0.02
"""The part of the SLO that a window leaves unused, for what the predictions do not see: a process that gets the
processor late, a message on its way."""


def replan(pipeline: Pipeline) -> None:
    """Bring budget, target, remaining and reserve of a pipeline's stages up to date with rates and predictions."""
    stages = pipeline.stages
    tables: list[LatencyTable | None] = []
    for plan in stages:
        stage = plan.stage
        slowest: LatencyTable | None = None
        for group in stage.groups:
            table = group.tables[stage.key]
            if slowest is None or table.upper(1) > slowest.upper(1):
                slowest = table
        stage.table = slowest
        tables.append(slowest)
    common = common_batch(pipeline, tables)
    times = _times(pipeline, tables, common)
    after = pipeline.downstream(times)
    before = pipeline.upstream(times)
    for number, plan in enumerate(stages):
        stage = plan.stage
        known = tables[number]
        if known is None:
            continue
        path = before[number] + times[number] + after[number]
        share = times[number] / path if path > 0.0 else 1.0
        stage.budget = pipeline.slo * share
        gpus = stage.devices
        stage.target = target_batch(known, gpus, stage.rate, stage.budget, stage.max_batch)
        stage.ceiling = max(stage.target, target_batch(known, gpus, FULL_LOAD, stage.budget, stage.max_batch))
    means = [
        plan.rounds(plan.stage.typical_batch()) * table.mean(plan.stage.typical_batch()) if table is not None else 0.0
        for plan, table in zip(stages, tables, strict=True)
    ]
    remaining = pipeline.downstream(means)
    for number, plan in enumerate(stages):
        stage = plan.stage
        stage.remaining = remaining[number]
        path = before[number] + times[number] + after[number]
        share = after[number] / path if path > 0.0 else 0.0
        stage.reserve = max(stage.remaining, pipeline.slo * share) + MARGIN * pipeline.slo


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
