"""Warm-up and profiling: how long a batch of each size takes when a model is loaded."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.profile import LatencyProfile
from pipelines.spec import StageSpec

REPEATS = 5
"""How often each batch size is measured; the worst counts, for a prediction must hold."""
TIME_BUDGET = 5.0
"""Seconds after which no larger batch is begun."""


def batch_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... and ``max_batch`` itself."""
    sizes = [2**power for power in range(max_batch.bit_length()) if 2**power < max_batch]
    return [*sizes, max_batch]


def measure_profile(
    run: Callable[[int], None],
    *,
    max_batch: int,
    longest: float,
    clock: Callable[[], float],
    progress: Callable[[int], None],
) -> list[tuple[int, float]]:
    """(batch size, worst seconds) of ``run(size)`` for growing sizes, each warmed up once.

    Stops behind the first batch that takes more than ``longest`` seconds (no scheduler would want a larger
    one), and when ``TIME_BUDGET`` is spent; batch 1 is always there. ``progress`` hears each size beforehand.
    """
    profile: list[tuple[int, float]] = []
    ends = clock() + TIME_BUDGET
    for size in batch_sizes(max_batch):
        progress(size)
        run(size)
        worst = 0.0
        for _ in range(REPEATS):
            begun = clock()
            run(size)
            now = clock()
            worst = max(worst, now - begun)
            if now > ends:
                break
        profile.append((size, worst))
        if worst > longest or clock() > ends:
            break
    return profile


def stated_profile(stage: StageSpec, device_type: str) -> list[tuple[int, float]]:
    """(batch size, seconds) of the profile that the spec states for devices of a type; [] where it states none."""
    stated = stage.profile
    if stated is None:
        return []
    latency = LatencyProfile.from_spec(stated, device_type).latency
    return [(size, latency(size)) for size in batch_sizes(stage.max_batch)]
