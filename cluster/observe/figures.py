"""What a process counts, as it is handed to the one that speaks HTTP for it (``sidecar.py``)."""

from __future__ import annotations

from typing import Literal

import msgspec


class HistogramFigures(msgspec.Struct, array_like=True, frozen=True):
    """How many values fell into each bucket of the family's bounds (one more than bounds, not cumulated), and their
    sum."""

    buckets: list[int]
    sum: float


Sample = tuple[list[str], float | HistogramFigures]
"""(label values in the family's order, value)."""


class Figures(msgspec.Struct, array_like=True, frozen=True):
    """All of one process at one moment: ``samples`` by the family's name (families.py). ``ready`` is empty once it
    serves; else for what it waits."""

    process: Literal["shard", "agent", "coordinator", "gateway"]
    name: str
    pid: int
    started_at: float
    """Unix seconds."""
    ready: str
    samples: dict[str, list[Sample]]
