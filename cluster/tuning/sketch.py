"""A compact distribution of waits that shards can send and the leader can add up: counts in log-spaced bins.

Bin 0 has the waits up to :data:`LEAST`, bin i those in (LEAST·γ^(i-1), LEAST·γ^i] with γ = (1 + ERROR) / (1 - ERROR),
so that every wait between LEAST and :data:`MOST` is within ERROR of its bin's value (as in DDSketch, VLDB'19). A sketch
is a list of up to :data:`BINS` ints without zeros at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

BINS: Final = 64
LEAST: Final = 1e-4
"""Seconds; less is as good as none."""
ERROR: Final = 0.1
"""How far a wait may be from its bin's value, as a part of it."""
GAMMA: Final = (1.0 + ERROR) / (1.0 - ERROR)
MOST: Final = LEAST * GAMMA ** (BINS - 1)
"""Seconds (31); longer waits count as this long."""

Sketch = list[int]
Floats = npt.NDArray[np.float64]


def sketch(waits: Sequence[float]) -> Sketch:
    """The sketch of these waits in seconds."""
    if not waits:
        return []
    with np.errstate(divide="ignore"):
        at = np.ceil(np.log(np.maximum(np.asarray(waits, dtype=np.float64), 0.0) / LEAST) / np.log(GAMMA) - 1e-9)
    counts: list[int] = np.bincount(np.clip(at, 0, BINS - 1).astype(np.int64)).tolist()
    return counts


def merged(sketches: Sequence[Sketch]) -> Sketch:
    """The sketch of all the waits of several."""
    total = [0] * max((len(one) for one in sketches), default=0)
    for one in sketches:
        for at, count in enumerate(one):
            total[at] += count
    return total


def values(bins: int = BINS) -> Floats:
    """The seconds that each bin stands for."""
    upper = LEAST * GAMMA ** np.arange(bins, dtype=np.float64)
    upper[1:] *= 1.0 - ERROR  # the value that is as far from both edges, as a part of them
    upper[:1] = 0.0
    return upper


def quantile(waits: Sketch, part: float) -> float:
    """The wait in seconds below which ``part`` (0 to 1) of them lie; 0 for an empty sketch."""
    total = sum(waits)
    if not total:
        return 0.0
    rank = part * (total - 1)
    at = int(np.searchsorted(np.cumsum(waits), rank, side="right"))
    return float(values(len(waits))[min(at, len(waits) - 1)])


def distribution(waits: Sketch, width: float, bins: int) -> Floats:
    """The waits' probabilities in ``bins`` even bins of ``width`` seconds, the last one open; all in the first where
    nothing is known."""
    parts = np.zeros(bins)
    total = sum(waits)
    if not total:
        parts[0] = 1.0
        return parts
    at = np.minimum(values(len(waits)) / width, bins - 1).astype(np.int64)
    np.add.at(parts, at, np.asarray(waits, dtype=np.float64) / total)
    return parts
