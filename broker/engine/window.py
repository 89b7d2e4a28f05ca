"""The schedulable window and the target batch (Symphony, arXiv 2308.07470, sections 3 and 4).

A batch need not start when a GPU is free: until ``opens`` a larger batch can still meet the earliest
deadline, after ``closes`` this one cannot. Starting at ``opens`` (Symphony's *frontrun*) therefore costs
nothing and makes batches as large as the deadlines allow.
"""

from typing import TYPE_CHECKING, Final

from broker.engine.predictor import LatencyTable

if TYPE_CHECKING:
    from broker.engine.stage import Stage

FULL_LOAD: Final = 1e18
"""A rate in requests per second that keeps any number of GPUs busy."""
EASY: Final = 0.5
"""The part of one GPU that requests run one by one may take before batches are waited for. It also bounds how long
clients that wait for their answers before they send more are made to wait: the longer, the fewer they send."""
RESPONSE: Final = 0.002
"""Seconds that Symphony allows for answers where it knows no rate yet."""
PATIENCE: Final = 2.0
"""How many times as long as the target batch should take to fill, by the arrival rate, it is waited for at most."""
SPARE: Final = 0.8
"""The load up to which a stage has devices to spare for those behind the plan, while others within it may still wait:
above it small batches for the ones make the others late."""


def target_batch(table: LatencyTable, gpus: int, rate: float, budget: float, max_batch: int) -> int:
    """Symphony's b* within a stage's ``budget`` of the SLO: the largest feasible batch, at least 1.

    N GPUs that start l(b)/N apart give a worst case of l(b)·(1 + 1/N), so with n = rate·l(b)/b GPUs busy
    (at most ``gpus``) b is feasible iff l(b)·(1 + 1/n) <= budget; that is l(b) + b/rate, the time in which the batch
    fills and runs, until all GPUs are busy. Without a rate: l(b) <= budget/2 - 2 ms. :data:`FULL_LOAD` asks for all
    GPUs busy.
    """
    best = 1
    for batch in range(1, max_batch + 1):
        latency = table.upper(batch)
        if rate <= 0.0:
            feasible = latency <= budget / 2.0 - RESPONSE
        elif rate * latency >= gpus * batch:  # saturated: batches fill at once, all GPUs run staggered
            feasible = latency * (1.0 + 1.0 / gpus) <= budget
        else:  # l(b)·(1 + 1/n)
            feasible = latency + batch / rate <= budget
        if feasible:
            best = batch
        elif latency > budget:
            break
    return best


def patience_ends(queued_at: float, target: int, rate: float) -> float:
    """When to stop waiting for a target batch that should have been full long ago: the rate is not what it was, or
    its clients wait for this very batch before they send more."""
    return queued_at + PATIENCE * target / rate


def opens_at(table: LatencyTable, batch: int, earliest_deadline: float, reserve: float, delay: float) -> float:
    """When a batch of ``batch`` waiting requests need wait no longer (frontrun): δ − l(b+1) − delay, with
    δ = deadline − reserve. After it a batch of b+1 could not meet δ any more."""
    return earliest_deadline - reserve - table.upper(batch + 1) - delay


def closes_at(table: LatencyTable, batch: int, earliest_deadline: float, remaining: float) -> float:
    """The latest start with which the earliest deadline can still be met: deadline − sub − l(b)."""
    return earliest_deadline - remaining - table.upper(batch)


class Window:
    """When a stage's window opens and closes: one of the four parts of a policy. It has no state of its own."""

    def update(self, now: float, stage: "Stage", table: LatencyTable, travel: float) -> None:
        """Set ``stage.opens`` and ``stage.closes`` for its queue, which is not empty. ``travel`` is how long a grant
        takes to a device."""
        raise NotImplementedError


class EagerWindow(Window):
    """Open as soon as anybody waits."""

    def update(self, now: float, stage: "Stage", table: LatencyTable, travel: float) -> None:
        size = len(stage.queue) if len(stage.queue) < stage.target else stage.target
        stage.opens = now
        stage.closes = closes_at(table, size, stage.queue.lowest().due, stage.remaining)


class DeferredWindow(Window):
    """Opens with the target batch, or when no larger one could meet the earliest deadline (Symphony)."""

    def update(self, now: float, stage: "Stage", table: LatencyTable, travel: float) -> None:
        head = stage.queue.lowest()
        size = len(stage.queue)
        stage.opens = now
        if size >= stage.target:
            size = stage.target
        else:
            stage.opens = opens_at(table, size, head.due, stage.reserve, travel)
        stage.closes = closes_at(table, size, head.due, stage.remaining)


class PlannedWindow(Window):
    """As :class:`DeferredWindow` for those within the plan (form_planned.py). While they may still wait, it is the turn
    of those behind it, whose window is open."""

    def update(self, now: float, stage: "Stage", table: LatencyTable, travel: float) -> None:
        queue = stage.queue
        alone = now + travel + table.upper(1) + stage.reserve - stage.margin
        while len(queue) and queue.lowest().due < alone and not queue.lowest().settled():
            stage.behind.push(queue.pop_lowest())
        stage.behind_turn = False
        if len(queue):
            head = queue.lowest()
            size = len(queue)
            stage.opens = now
            if size >= stage.target:
                size = stage.target
            elif not head.settled():
                stage.opens = opens_at(table, size, head.due, stage.reserve, travel)
                if stage.rate > 0.0:
                    stage.opens = min(stage.opens, patience_ends(head.queued_at, stage.target, stage.rate))
            stage.closes = closes_at(table, size, head.due, stage.remaining)
            if stage.opens <= now or not len(stage.behind) or stage.order.load > SPARE:
                return
        stage.behind_turn = True
        stage.opens = now
        size = len(stage.behind) if len(stage.behind) < stage.target else stage.target
        stage.closes = closes_at(table, size, stage.behind.lowest().due, stage.remaining)
