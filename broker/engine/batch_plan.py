"""How large the batches of a pipeline's stages are to be, so that requests take the least GPU time within their SLO.

Symphony and Nexus divide an SLO over stages in proportion to their latencies, and then take the largest batch that
fits each stage's part. But a stage whose l(b)/b hardly falls any more gains nothing from a larger batch, and spends
budget that another stage would turn into throughput, or into slack for the queueing that no plan foresees. So batches
are chosen together: the sum over stages of weight · l(b)/b is made as small as can be, the time along the longest path
being bounded; with a price on time (a Lagrange multiplier, found by bisection) each stage's batch is a choice of its
own.

A stage's planned time is its execution and the wait for it: for a device of n that run staggered, l(b)/n
(Symphony, arXiv 2308.07470, section 4), or until b have arrived, if that takes longer. Behind the first stages requests
come in whole batches, and not evenly: :data:`BURSTS` more times l(b)/n. With few devices that leaves time for small
batches only. Where those do not carry the load (:data:`CARRIED`) and larger ones carry more of it, no such room is
left: it would not keep requests from waiting.

The weights put the stage first that limits the throughput: (use of its devices / the largest)^:data:`EMPHASIS`. On
devices that serve several stages, the work of all of them limits it, and they weigh the same.
"""

from math import sqrt
from typing import Final

from broker.engine.plan import Pipeline, StagePlan
from broker.engine.predictor import LatencyTable
from broker.engine.stage import Stage
from broker.engine.window import EASY, FULL_LOAD

BURSTS: Final = 3.0
CARRIED: Final = 0.85
"""With what use of the busiest stage's devices a plan with that room still carries the load."""
WORTH: Final = 0.05
"""By how much less use those without room have to get by, to be taken instead."""
EMPHASIS: Final = 4.0
ROUNDS: Final = 4
"""How often the weights are brought in line with the batches that they lead to, half-way each time: all the way, they
turn to and fro between stages."""
MOST_PRICE: Final = 1e9
STEPS: Final = 24
"""Bisections of the price, between two that are not far apart: where stages weigh little, so does a second."""


class BatchPlan:
    """By stage: the batch to wait for at the present rates (``targets``), the largest worth forming when many wait
    (``ceilings``), and the seconds that a request is to take there (``times``), with room for so many ``bursts``."""

    def __init__(self, stages: int) -> None:
        self.targets = [1] * stages
        self.ceilings = [1] * stages
        self.times = [0.0] * stages
        self.bursts = BURSTS


def plan_batches(pipeline: Pipeline, tables: list[LatencyTable | None], budget: float) -> BatchPlan:
    """Plan the stages' batches for paths of ``budget`` seconds at most; batches of 1 where even those do not fit."""
    count = len(pipeline.stages)
    rates = [stage.lead.rate for stage in pipeline.stages]
    plan = _plan(pipeline, tables, budget, rates, BURSTS)
    use = _use(pipeline, tables, plan.ceilings, rates)
    if use > CARRIED:
        dense = _plan(pipeline, tables, budget, rates, 0.0)
        if _use(pipeline, tables, dense.ceilings, rates) < use * (1.0 - WORTH):
            plan = dense
    for number in range(count):
        table = tables[number]
        if table is not None and rates[number] * table.upper(1) <= EASY:
            # One by one they take part of one GPU: waiting for others would save nothing.
            plan.targets[number] = 1
            plan.times[number] = pipeline.stages[number].rounds(1) * table.upper(1)
        if plan.ceilings[number] < plan.targets[number]:
            plan.ceilings[number] = plan.targets[number]
    return plan


def plan_lane(plan: StagePlan, lane: Stage, time: float, bursts: float) -> None:
    """Choose the batches of a lane, where those of another one were planned to take ``time``: what is cheapest and
    takes no longer, with as much room for ``bursts``."""
    if not plan.parents:
        bursts = 0.0
    table = lane.table
    if table is None or not lane.devices:
        lane.target = lane.ceiling = 1
        return
    lane.target = (
        1 if lane.rate * table.upper(1) <= EASY else _cheapest_within(plan, lane, table, lane.rate, time, bursts)
    )
    lane.ceiling = max(lane.target, _cheapest_within(plan, lane, table, FULL_LOAD, time, bursts))


def _cheapest_within(plan: StagePlan, lane: Stage, table: LatencyTable, rate: float, time: float, bursts: float) -> int:
    chosen = 1
    least = table.upper(1)
    held_up_by = lane.held_up_by()
    for batch in range(2, lane.max_batch + 1):
        took = planned_time(table, batch, lane.devices, rate, plan.rounds(batch), bursts, held_up_by)
        cost = table.upper(batch) / batch
        if took <= time and cost < least * (1.0 - 1e-9):
            chosen = batch
            least = cost
    return chosen


def _plan(
    pipeline: Pipeline, tables: list[LatencyTable | None], budget: float, rates: list[float], bursts: float
) -> BatchPlan:
    count = len(pipeline.stages)
    plan = BatchPlan(count)
    plan.bursts = bursts
    full = [FULL_LOAD] * count
    weights = [1.0] * count
    for _ in range(ROUNDS if count > 1 else 0):  # one stage has nothing to be weighed against
        _least_work(pipeline, tables, full, weights, budget, bursts, plan.ceilings, plan.times)
        _reweigh(pipeline, tables, plan.ceilings, weights)
    _least_work(pipeline, tables, full, weights, budget, bursts, plan.ceilings, plan.times)
    _least_work(pipeline, tables, rates, weights, budget, bursts, plan.targets, plan.times)
    return plan


def _use(pipeline: Pipeline, tables: list[LatencyTable | None], batches: list[int], rates: list[float]) -> float:
    """What part of its devices the busiest stage needs in these batches for what comes to the pipeline."""
    came = max([rates[number] / pipeline.stages[number].items_or_one() for number in pipeline.roots], default=0.0)
    return came * max(_uses(pipeline, tables, batches), default=0.0)


def _uses(pipeline: Pipeline, tables: list[LatencyTable | None], batches: list[int]) -> list[float]:
    """By stage: seconds of all its devices that a request of the pipeline takes."""
    uses = [0.0] * len(pipeline.stages)
    for number in range(len(pipeline.stages)):
        stage = pipeline.stages[number]
        table = tables[number]
        if table is not None and stage.stage.devices:
            batch = batches[number]
            uses[number] = stage.items_or_one() * table.upper(batch) / batch / stage.stage.devices
    return uses


def planned_time(
    table: LatencyTable, batch: int, gpus: int, rate: float, rounds: float, bursts: float, held_up_by: float
) -> float:
    """Seconds that a request takes at a stage in batches of ``batch``: execution, and the wait for it, where devices
    may be held up by batches of ``held_up_by`` seconds of other stages and ``bursts`` more of its own go before."""
    execution = rounds * table.upper(batch)
    longest = execution if execution > held_up_by else held_up_by
    stagger = longest / gpus * (1.0 + bursts)
    fill = batch / rate if rate > 0.0 else FULL_LOAD
    if batch == 1:
        fill = 0.0
    return execution + (stagger if stagger > fill else fill)


def _reweigh(pipeline: Pipeline, tables: list[LatencyTable | None], batches: list[int], weights: list[float]) -> None:
    uses = _uses(pipeline, tables, batches)
    most = max(uses, default=0.0)
    for number in range(len(pipeline.stages)):
        if most > 0.0 and not pipeline.stages[number].stage.shares():
            weights[number] = sqrt(weights[number] * (uses[number] / most) ** EMPHASIS)


def _least_work(
    pipeline: Pipeline,
    tables: list[LatencyTable | None],
    rates: list[float],
    weights: list[float],
    budget: float,
    bursts: float,
    batches: list[int],
    times: list[float],
) -> None:
    """Choose ``batches`` (and set their ``times``)."""
    low, high = 0.0, 1.0
    if _choose(pipeline, tables, rates, weights, low, bursts, batches, times) <= budget:
        return
    while _choose(pipeline, tables, rates, weights, high, bursts, batches, times) > budget:
        low = high
        high *= 8.0
        if high > MOST_PRICE:
            return
    while low == 0.0 and high > 1.0 / MOST_PRICE:
        if _choose(pipeline, tables, rates, weights, high / 8.0, bursts, batches, times) <= budget:
            high /= 8.0
        else:
            low = high / 8.0
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        if _choose(pipeline, tables, rates, weights, middle, bursts, batches, times) <= budget:
            high = middle
        else:
            low = middle
    _choose(pipeline, tables, rates, weights, high, bursts, batches, times)


def _choose(
    pipeline: Pipeline,
    tables: list[LatencyTable | None],
    rates: list[float],
    weights: list[float],
    price: float,
    bursts: float,
    batches: list[int],
    times: list[float],
) -> float:
    """Each stage's cheapest batch if a second costs ``price``; how long the longest path takes then."""
    for number in range(len(pipeline.stages)):
        stage = pipeline.stages[number]
        table = tables[number]
        batches[number] = 1
        times[number] = 0.0
        if table is None or not stage.stage.devices:
            continue
        work = weights[number] * stage.items_or_one()
        least = FULL_LOAD
        own_bursts = bursts if stage.parents else 0.0
        held_up_by = stage.lead.held_up_by()
        for batch in range(1, stage.stage.max_batch + 1):
            time = planned_time(
                table, batch, stage.stage.devices, rates[number], stage.rounds(batch), own_bursts, held_up_by
            )
            cost = work * table.upper(batch) / batch + price * time
            free = table.upper(batch) <= 0.0 and rates[number] >= FULL_LOAD  # nothing is lost by taking everybody
            if cost < least * (1.0 - 1e-9) or free:
                least = cost
                batches[number] = batch
                times[number] = time
    after = pipeline.downstream(times)
    return max([times[number] + after[number] for number in pipeline.roots], default=0.0)
