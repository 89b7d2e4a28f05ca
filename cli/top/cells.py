"""What stands in a cell: text in tones, numbers as people read them, bars and charts made of characters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Literal

import click

Tone = Literal["", "good", "warn", "bad", "quiet", "accent", "strong"]
"""How a text is meant; colours and styles follow from it. What it says stands in the text as well."""
Span = tuple[str, Tone]
Cell = str | list[Span]
"""A text in one tone (none), or in several."""

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_BAR = "█▏▎▍▌▋▊▉"
LEAST_SHARE, MOST_SHARE = 0.9, 0.99
"""Of the requests that ended, the part that is good: below the first it is bad, below the second worth a look."""


def plain(cell: Cell) -> str:
    """A cell's text alone."""
    return cell if isinstance(cell, str) else "".join(text for text, _ in cell)


def clean(text: str) -> str:
    """A text from elsewhere on one line, without what terminals would obey."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else " " for letter in click.unstyle(text))


def middle(text: str, width: int) -> str:
    """A text of this width at most, with its beginning and its end."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def rate(value: float) -> str:
    """Six characters at most, below 10 million: '0', '0.25', '12.5', '1,234', '56.7k', '1.23M'."""
    if value < 0.005:
        return "0"
    if value < 9.995:
        return f"{value:.2f}".rstrip("0").rstrip(".")
    if value < 99.95:
        return f"{value:.1f}"
    if value < 9999.5:
        return f"{value:,.0f}"
    if value < 999_950:
        return f"{value / 1e3:.1f}k"
    return f"{value / 1e6:.2f}M"


def count(value: int) -> str:
    return f"{value:,}" if value < 100_000 else rate(value)


def counted(value: int, what: str) -> str:
    """'1 model', '1,204 models'."""
    return f"{count(value)} {what}{'' if value == 1 else 's'}"


def duration(seconds: float | None) -> str:
    """Six characters at most, for columns: '0.42ms', '8.1ms', '142ms', '1.25s', '90s', '10m'; '-' where there is
    none."""
    if seconds is None:
        return "-"
    size = abs(seconds)
    if size < 0.9995:
        ms = seconds * 1e3
        if round(abs(ms), 2) == 0.0:
            return "0ms"
        digits = 2 if abs(ms) < 0.995 else 1 if abs(ms) < 9.95 else 0
        return f"{ms:.{digits}f}ms"
    if size < 9.995:
        return f"{seconds:.2f}s"
    return f"{seconds:.0f}s" if size < 600 else f"{seconds / 60:.0f}m"


def percent(part: float | None) -> str:
    """'97.3%'; all of it is '100%', and only all of it."""
    if part is None:
        return "-"
    if part >= 1.0:
        return "100%"
    return f"{min(part * 100, 99.9):.1f}%" if part >= 0.0005 else "0%"


def share_tone(part: float | None) -> Tone:
    """Of a part that had better be all."""
    if part is None:
        return "quiet"
    return "bad" if part < LEAST_SHARE else "warn" if part < MOST_SHARE else "good"


def clock(at: float) -> str:
    """The time of day here."""
    return datetime.fromtimestamp(at).strftime("%H:%M:%S")


def bar(part: float, width: int) -> str:
    """A part of ``width`` characters."""
    eighths = round(min(max(part, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_BAR[rest] if rest else "")).ljust(width)


Point = tuple[int, float, float, float]
"""(Unix second, offered, good, dropped) per second."""


def _columns(history: Sequence[Point], width: int) -> list[Point | None]:
    """The last ``width`` seconds, the newest at the right; None for seconds of which nothing is known."""
    if not history or width <= 0:
        return [None] * max(width, 0)
    newest = history[-1][0]
    found: list[Point | None] = [None] * width
    for point in history[-width:]:
        place = width - 1 - (newest - point[0])
        if 0 <= place < width:
            found[place] = point
    return found


def sparkline(history: Sequence[Point], width: int) -> list[Span]:
    """Goodput second by second, one character high: the highest is the most that was offered in all of the history;
    the tone says which part of what was offered it is."""
    columns = _columns(history, width)
    most = max((max(point[1], point[2]) for point in history), default=0.0)
    spans: list[Span] = []
    for point in columns:
        if point is None:
            spans.append((" ", ""))
            continue
        _, offered, good, _ = point
        if not offered and not good:
            spans.append(("▁", "quiet"))
            continue
        height = max(1, math.ceil(good / most * 8 - 1e-9))
        spans.append((_EIGHTHS[height], share_tone(good / offered if offered else 1.0)))
    return joined(spans)


def chart(history: Sequence[Point], width: int, height: int) -> list[list[Span]]:
    """Goodput in blocks, and above it, shaded, what was offered beyond; the lines from the top, the scale at the
    left."""
    label = 8
    columns = _columns(history, width - label)
    most = max((max(point[1], point[2]) for point in columns if point is not None), default=0.0)
    lines: list[list[Span]] = []
    for row in reversed(range(height)):
        head = rate(most) if row == height - 1 else "0" if row == 0 else ""
        spans: list[Span] = [(f"{head:>{label - 2}} ", "quiet"), ("▕", "quiet")]
        for point in columns:
            if point is None or not most:
                spans.append((" ", ""))
                continue
            good = min(point[2] / most * height * 8 - row * 8, 8.0)
            offered = min(point[1] / most * height * 8 - row * 8, 8.0)
            if good >= 0.5:
                spans.append((_EIGHTHS[min(8, max(1, round(good)))], "good"))
            elif offered >= 4.0:
                spans.append(("░", "bad"))
            else:
                spans.append((" ", ""))
        lines.append(joined(spans))
    return lines


def joined(spans: Iterable[Span]) -> list[Span]:
    """Neighbours of one tone as one."""
    found: list[Span] = []
    for text, tone in spans:
        if found and found[-1][1] == tone:
            found[-1] = (found[-1][0] + text, tone)
        else:
            found.append((text, tone))
    return found
