"""What a cluster of a benchmark wrote as telemetry."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np


def rows(directory: Path, kind: str) -> list[dict[str, str]]:
    """All rows of a kind (``actions`` or ``requests``) that the cluster wrote."""
    found = []
    for path in sorted(directory.rglob(f"*{kind}*.csv")):
        with path.open(newline="") as file:
            found += list(csv.DictReader(file))
    return found


def percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{q:g}": round(float(np.percentile(values, q)), 2) for q in (50, 99, 99.9)}
