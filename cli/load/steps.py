"""One step of a load after another: warm-up, what is measured, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cli.load.generator import Generator
from cli.load.results import Demand, Measured, judged_ms
from cli.load.tally import STEADY, Recent, StepTally
from simulation.metrics import Floats


class Step(NamedTuple):
    """What to ask for: requests at ``arrivals`` (seconds), or so many at a time for ``seconds``."""

    demand: Demand
    arrivals: Floats | None
    seconds: float


class Steadiness(NamedTuple):
    """Measure intervals of so many seconds until three in a row agree within ``tolerance`` percent, at most ``trials``
    of them; without one, a step is measured as a whole."""

    interval: float
    trials: int
    tolerance: float


class Done(NamedTuple):
    """A step that has been run."""

    step: Step
    tally: StepTally
    measured: Measured


Show = Callable[[float, StepTally], None]


def run_step(
    generator: Generator,
    step: Step,
    kinds: int,
    percentile: float,
    steadiness: Steadiness | None,
    warmup: int,
    stopped: Callable[[], bool],
    show: Show,
) -> Done:
    """Run one step; requests of the ``warmup`` come before it, at its load, and are not counted."""
    if warmup and not stopped():
        _warm_up(generator, step, kinds, warmup, stopped)
    recent = None if steadiness is None else Recent(*steadiness[:2], percentile, steadiness.tolerance)
    tally = StepTally(kinds, math.inf if steadiness is None else steadiness.interval, recent)

    def watch(elapsed: float) -> bool:
        show(elapsed, tally)
        if recent is not None:
            recent.until(elapsed)
        return stopped() or (recent is not None and recent.over())

    ended = _run(generator, step, tally, watch)
    interrupted = stopped()
    if recent is None or steadiness is None or interrupted:
        seconds = min(ended, step.seconds)
        return Done(step, tally, Measured(0, None, 0.0, max(seconds, 1e-3), None, interrupted))
    recent.until(step.seconds if ended == math.inf else ended)
    # What was due behind the last whole interval, before that was looked at, is left out.
    last = recent.intervals
    first = max(last - STEADY, 0)
    interval = steadiness.interval
    measured = Measured(first, last, first * interval, (last - first) * interval, recent.steady(), False)
    return Done(step, tally, measured)


def judged(done: Done, percentile: float) -> float:
    """The latency in ms at the percentile by which loads are judged."""
    return judged_ms(done.tally.of_intervals(done.measured.first, done.measured.last), percentile)


def _warm_up(generator: Generator, step: Step, kinds: int, requests: int, stopped: Callable[[], bool]) -> None:
    tally = StepTally(kinds)
    if step.arrivals is None:
        assert step.demand.concurrency is not None
        generator.closed_loop(step.demand.concurrency, math.inf, tally, lambda _: stopped(), requests)
    else:
        rate = step.demand.rate or len(step.arrivals) / step.seconds
        generator.open_loop(np.arange(requests) / rate, tally, lambda _: stopped())


def _run(generator: Generator, step: Step, tally: StepTally, watch: Callable[[float], bool]) -> float:
    if step.arrivals is not None:
        return generator.open_loop(step.arrivals, tally, watch)
    assert step.demand.concurrency is not None
    return generator.closed_loop(step.demand.concurrency, step.seconds, tally, watch)


def run_steps(
    steps: Sequence[Step],
    run: Callable[[Step], Done],
    percentile: float,
    threshold_ms: float | None,
    stopped: Callable[[], bool],
) -> list[Done]:
    """Run steps in order, until one's latency at the percentile is above a threshold, or it is to be stopped."""
    done: list[Done] = []
    for step in steps:
        if stopped():
            break
        done.append(run(step))
        if threshold_ms is not None and judged(done[-1], percentile) > threshold_ms:
            break
    return done
