"""What a cluster of a benchmark wrote as telemetry."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

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


def predictions(ran: list[dict[str, str]]) -> dict[str, Any]:
    """By how many microseconds batches that ran took less (over) or more (under) than was expected, and how steady the
    executions of the commonest batch size were."""
    errors = [float(row["expected_us"]) - float(row["duration_us"]) for row in ran]
    by_batch: dict[str, list[float]] = {}
    for row in ran:
        by_batch.setdefault(row["batch"], []).append(float(row["duration_us"]))
    common = max(by_batch.values(), key=len, default=[])
    steady = {"p99.99": round(float(np.percentile(common, 99.99)), 1)} if common else {}
    return {
        "batches": len(ran),
        "over_us": percentiles([error for error in errors if error > 0.0]),
        "under_us": percentiles([-error for error in errors if error <= 0.0]),
        "execution_us": percentiles(common) | steady,
        "p9999_to_median": round(steady["p99.99"] / float(np.median(common)), 3) if common else None,
    }
