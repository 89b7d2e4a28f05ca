"""When there are too few devices: how much of each pipeline is planned for. Max-min fair by goodput."""

from __future__ import annotations

from collections.abc import Mapping

STEPS = 40
"""Bisections of a level: far below a request per second."""


def water_level(demands: Mapping[str, float], work: Mapping[str, float], devices: float) -> float:
    """The requests per second up to which every pipeline's demand can be met: those that want less get what they want,
    all others the same. ``work``: devices per request per second."""
    low, high = 0.0, max(demands.values(), default=0.0)
    if sum(demand * work[name] for name, demand in demands.items()) <= devices:
        return high
    for _ in range(STEPS):
        middle = (low + high) / 2
        if sum(min(demand, middle) * work[name] for name, demand in demands.items()) <= devices:
            low = middle
        else:
            high = middle
    return low


def floor_level(demands: Mapping[str, float], work: Mapping[str, float], devices: float) -> float:
    """The requests per second to which every pipeline can be raised that wants less, with the devices that are left."""
    low, high = 0.0, devices / max(min(work.values(), default=1.0), 1e-12)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if sum(max(demand, middle) * work[name] for name, demand in demands.items()) <= devices:
            low = middle
        else:
            high = middle
    return low
