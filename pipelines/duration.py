"""Durations as people write them: '400ms', '1.5s', '1m', '24h'."""

from __future__ import annotations

import math
import re

DURATION_PATTERN = r"^\d+(\.\d+)?\s*(ms|s|m|h)?$"
"""What a duration text looks like; without a unit it counts seconds."""
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"^(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h)?$", re.ASCII)


def parse_duration(value: object) -> float:
    """Seconds of a text such as '400ms', '5s', '1m' or '24h', or of a plain number (seconds).

    Raises ValueError, saying what to write, unless the duration is finite and above zero.
    """
    seconds = math.nan
    if isinstance(value, str):
        match = _DURATION.match(value.strip())
        if match:
            seconds = float(match["number"]) * _SECONDS[match["unit"] or "s"]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value) if abs(value) < 1e300 else math.inf
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{value!r} is no duration above zero; write one such as 400ms, 5s, 1m or 24h")
    return seconds


def format_duration(seconds: float) -> str:
    """'400ms' or '5s', with three digits at least."""
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.4g}ms"
    return f"{seconds:.4g}s" if abs(seconds) < 1000 else f"{seconds:.0f}s"
