"""Warm-up and profiling: how long a batch of each size takes when a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pipelines.profile import LatencyProfile
from pipelines.spec import StageSpec

REPEATS = 5
"""How often each batch size is measured. The worst but one counts: a prediction must hold, and a single outlier is more
often the host's doing than the model's."""
TIME_BUDGET = 5.0
"""Seconds after which no larger batch is begun."""
CHEAP = 0.5
"""A batch of a known profile that takes no more seconds is run once to warm up."""


def batch_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... and ``max_batch`` itself."""
    sizes = [2**power for power in range(max_batch.bit_length()) if 2**power < max_batch]
    return [*sizes, max_batch]


def measure_profile(
    run: Callable[[int], float],
    *,
    max_batch: int,
    longest: float,
    clock: Callable[[], float],
    progress: Callable[[int], None],
) -> list[tuple[int, float]]:
    """(batch size, worst but one of the seconds that ``run(size)`` returns) for growing sizes, each warmed up once.

    Stops behind the first batch that takes more than ``longest`` seconds (no scheduler would want a larger
    one), and when ``TIME_BUDGET`` is spent; batch 1 is always there. ``progress`` hears each size beforehand.
    """
    profile: list[tuple[int, float]] = []
    ends = clock() + TIME_BUDGET
    for size in batch_sizes(max_batch):
        progress(size)
        seconds = sorted(measure_batch(partial(run, size), repeats=REPEATS, ends=ends, clock=clock))
        bound = seconds[-2] if len(seconds) > 2 else seconds[-1]
        profile.append((size, bound))
        if bound > longest or clock() > ends:
            break
    return profile


def measure_batch(run: Callable[[], float], *, repeats: int, ends: float, clock: Callable[[], float]) -> list[float]:
    """What each ``run()`` returns, after one to warm up: ``repeats`` of them, or as many as begin before ``ends``, at
    least one."""
    run()
    seconds = [run()]
    while len(seconds) < repeats and clock() <= ends:
        seconds.append(run())
    return seconds


def warm_up_sizes(profile: list[tuple[int, float]]) -> list[int]:
    """Which batch sizes to run once where the profile is known: the smallest, and the largest one that is cheap."""
    smallest = min(profile)[0]
    largest = max((size for size, seconds in profile if seconds <= CHEAP), default=smallest)
    return sorted({smallest, largest})


def stated_profile(stage: StageSpec, device_type: str) -> list[tuple[int, float]]:
    """(batch size, seconds) of the profile that the spec states for devices of a type; [] where it states none."""
    stated = stage.profile
    if stated is None:
        return []
    latency = LatencyProfile.from_spec(stated, device_type).latency
    return [(size, latency(size)) for size in batch_sizes(stage.max_batch)]
