"""What arrivals and answers amount to: the arithmetic that the simulation and the load generator have in common."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from simulation.results import Latency

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


class Rates(NamedTuple):
    """The figures of those names in :class:`simulation.results.RunResult`."""

    offered_rps: float
    goodput_rps: float
    bound_rps: float
    bound_ratio: float
    drop_rate: float
    avoidable_drop_rate: float


def per_second(times: Floats, seconds: float) -> Counts:
    """How many of ``times`` (seconds from 0, below ``seconds``) lie in each second; the last one may be a part."""
    return np.bincount(times.astype(np.int64), minlength=math.ceil(seconds))


def fluid_bound(arrivals: Floats, seconds: float, capacity: float) -> tuple[Counts, Floats]:
    """(offered, min(offered, capacity)) in requests, for each second of ``arrivals`` (seconds from 0)."""
    offered = per_second(arrivals, seconds)
    lengths = np.minimum(1.0, seconds - np.arange(len(offered)))
    return offered, np.minimum(offered, capacity * lengths)


def rates(offered: int, good: int, bound: float, seconds: float) -> Rates:
    """Of so many requests offered, good, and possible by the fluid bound, in ``seconds``. Ratios to nothing are 0 for
    drops and 1 for the bound."""
    dropped = offered - good
    return Rates(
        offered_rps=offered / seconds,
        goodput_rps=good / seconds,
        bound_rps=bound / seconds,
        bound_ratio=good / bound if bound else 1.0,
        drop_rate=dropped / offered if offered else 0.0,
        avoidable_drop_rate=max(0.0, bound - good) / offered if offered else 0.0,
    )


def latency(seconds: Floats) -> Latency:
    """The percentiles of latencies given in seconds; 0 where there are none."""
    if not len(seconds):
        return Latency(0.0, 0.0, 0.0)
    p50, p99, p999 = np.percentile(seconds, (50.0, 99.0, 99.9)) * 1e3
    return Latency(float(p50), float(p99), float(p999))
