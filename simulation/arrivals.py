"""When requests arrive: traces from files, and processes by name.

Counts say how many requests came in a step and nothing of when within it, so each step of a trace is taken as a Poisson
process of constant rate, scaled so that the mean over the whole source is the rate asked for; the number of requests in
a step is Poisson too. Stamps are taken by their counts in whole seconds in the same way, since stamps cannot be scaled
to a rate otherwise; bursts shorter than a second are lost with that.
"""

from __future__ import annotations

import csv
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from _csv import Reader

Floats = npt.NDArray[np.float64]

PROCESSES = "poisson, constant, gamma:CV (as in gamma:2), step:RATExSECONDS,... (as in step:1x60,3x30)"
MOST_ARRIVALS = 200_000_000
"""What a draw may hold at most: 1.6 GB of stamps."""
LONGEST_STAMPED = 10_000_000
"""Seconds that a trace of stamps may be long: it is counted second by second."""


class TraceError(ValueError):
    """A trace, a window or a process that cannot be used; the text says what to do."""


class Source(ABC):
    """Where arrivals come from: ``name`` says what was made of it, ``length`` is in seconds (inf: no end)."""

    def __init__(self, name: str, length: float) -> None:
        self.name = name
        self.length = length

    def window(self, begin: float, end: float) -> Source:
        """The part [begin, end), in seconds from the start, as a source that starts at 0."""
        if not 0 <= begin < end < math.inf:
            raise TraceError(f"window {begin:g}:{end:g} must be BEGIN:END with 0 <= BEGIN < END, in seconds")
        if end > self.length:
            raise TraceError(
                f"window {begin:g}:{end:g} lies outside of {self.name}, which is {self.length:g} s long; "
                f"choose one within 0:{self.length:g}"
            )
        return self._cut(begin, end, f"{self.name} {begin:g}:{end:g}")

    def superpose(self, copies: int) -> Source:
        """``copies`` of it laid over each other, each shifted by one ``copies``-th of the length more, and wrapped.
        Shifts are rounded to whole steps where all steps are equal, so that none is smeared over two."""
        raise TraceError(f"{self.name} has no end to wrap around: only traces can be superposed")

    def as_seconds(self) -> Source:
        """Each row of a trace of counts read as one second, however long its step was."""
        raise TraceError(f"{self.name} has no rows to read as seconds: only traces of counts have")

    def draw(self, mean_rate: float, seed: int | Sequence[int]) -> Floats:
        """Arrival times in [0, length), ascending, whose expected number is ``mean_rate`` (per second) × length.

        The same arguments give the same times. Raises :class:`TraceError` for a source without an end or without
        requests, and for a rate that is not positive or gives too many.
        """
        if not math.isfinite(self.length):
            raise TraceError(f"{self.name} has no end: say how many seconds of it")
        if not 0 < mean_rate < math.inf:
            raise TraceError(f"the mean rate must be above 0 requests per second, not {mean_rate:g}")
        if mean_rate * self.length > MOST_ARRIVALS:
            raise TraceError(
                f"{mean_rate:g} requests per second for {self.length:g} s are more than {MOST_ARRIVALS:,}: "
                "lower the rate or shorten the window"
            )
        times = self._draw(mean_rate, np.random.default_rng(seed))
        return np.minimum(times, np.nextafter(self.length, 0.0))

    @abstractmethod
    def _cut(self, begin: float, end: float, name: str) -> Source: ...

    @abstractmethod
    def _draw(self, mean_rate: float, generator: np.random.Generator) -> Floats: ...


class Renewal(Source):
    """Gaps that are independent and gamma-distributed with a coefficient of variation ``cv``: 1 is Poisson, 0 constant.
    It is stationary: the first arrival lies as if the process had run for ever."""

    def __init__(self, name: str, cv: float, length: float = math.inf) -> None:
        super().__init__(name, length)
        self.cv = cv

    def _cut(self, begin: float, end: float, name: str) -> Source:
        return Renewal(self.name, self.cv, end - begin)  # any part of it is like any other

    def _draw(self, mean_rate: float, generator: np.random.Generator) -> Floats:
        expected = mean_rate * self.length
        chunk = int(expected + 6.0 * self.cv * math.sqrt(expected)) + 16
        # The gap that spans a given moment is longer than others in proportion to its length: gamma of one shape more.
        if self.cv == 0.0:
            first = generator.random() / mean_rate
            gaps = np.full(chunk, 1.0 / mean_rate)
        else:
            shape = self.cv**-2
            scale = 1.0 / (mean_rate * shape)
            first = generator.random() * generator.gamma(shape + 1.0, scale)
            gaps = generator.gamma(shape, scale, chunk)
        parts = [first + np.concatenate(([0.0], np.cumsum(gaps)))]
        while parts[-1][-1] < self.length:
            parts.append(parts[-1][-1] + np.cumsum(generator.gamma(shape, scale, chunk)))
        times = np.concatenate(parts)
        return times[: int(np.searchsorted(times, self.length))]


class Trace(Source):
    """A rate that is constant in each step: ``edges`` (n + 1, seconds, from 0 up) and ``rates`` (n, any unit)."""

    def __init__(self, name: str, edges: Floats, rates: Floats, *, stamps: bool = False) -> None:
        super().__init__(name, float(edges[-1]))
        self.edges = edges
        self.rates = rates
        self._stamps = stamps

    def superpose(self, copies: int) -> Trace:
        if copies < 1:
            raise TraceError(f"the number of copies must be at least 1, not {copies}")
        widths = np.diff(self.edges)
        shifts = np.arange(copies) * self.length / copies
        if np.allclose(widths, widths[0]):
            shifts = np.round(shifts / widths[0]) * widths[0]
        shifted = np.concatenate([(self.edges[:-1] + shift) % self.length for shift in shifts])
        edges = np.append(np.unique(np.append(shifted, 0.0)), self.length)
        # A copy's rate is looked up in the middle of each new step, so that rounding at the edges does no harm.
        middles = (edges[:-1] + edges[1:]) / 2.0
        rates = np.sum([self._rate_at((middles - shift) % self.length) for shift in shifts], axis=0)
        return Trace(f"{self.name} x{copies}", edges, rates, stamps=self._stamps)

    def as_seconds(self) -> Trace:
        if self._stamps:
            raise TraceError(f"{self.name} holds stamps, which are seconds already: only rows of counts can be read so")
        counts = self.rates * np.diff(self.edges)
        return Trace(f"{self.name} as seconds", np.arange(len(counts) + 1, dtype=np.float64), counts)

    def _rate_at(self, times: Floats) -> Floats:
        found: Floats = self.rates[np.searchsorted(self.edges[1:-1], times, side="right")]
        return found

    def _cut(self, begin: float, end: float, name: str) -> Source:
        inner = (self.edges > begin) & (self.edges < end)
        edges = np.concatenate(([begin], self.edges[inner], [end]))
        return Trace(name, edges - begin, self._rate_at(edges[:-1]), stamps=self._stamps)

    def _draw(self, mean_rate: float, generator: np.random.Generator) -> Floats:
        widths = np.diff(self.edges)
        weights = self.rates * widths
        total = weights.sum()
        if not total > 0:
            raise TraceError(f"{self.name} has no requests: choose another window or trace")
        counts = generator.poisson(weights * (mean_rate * self.length / total))
        times = np.repeat(self.edges[:-1], counts) + generator.random(int(counts.sum())) * np.repeat(widths, counts)
        times.sort()
        return times


def prepare(
    text: str,
    *,
    as_seconds: bool = False,
    superpose: int = 1,
    window: tuple[float, float] | None = None,
    seconds: float | None = None,
) -> Source:
    """The source that a command line describes, with an end: rows are read as seconds first, then copies superposed,
    then the window is cut, and of that the first ``seconds`` (a trace without either: all of it)."""
    source = parse_source(text)
    if as_seconds:
        source = source.as_seconds()
    if superpose != 1:
        source = source.superpose(superpose)
    if window is not None:
        begin, end = window
        if seconds is not None and seconds > end - begin:
            raise TraceError(f"{seconds:g} s do not fit into the window {begin:g}:{end:g}; leave one of the two out")
        return source.window(begin, end if seconds is None else begin + seconds)
    if seconds is not None:
        return source.window(0.0, seconds)
    if not math.isfinite(source.length):
        raise TraceError(f"{source.name} has no end: say how many seconds of it")
    return source


def parse_window(text: str) -> tuple[float, float]:
    """(330.0, 450.0) of '330:450'."""
    begin, colon, end = text.partition(":")
    try:
        found = (float(begin), float(end))
    except ValueError:
        found = (math.nan, math.nan)
    if not (colon and 0 <= found[0] < found[1] < math.inf):
        raise TraceError(f"a window is BEGIN:END in seconds, as in 330:450, not {text!r}")
    return found


def parse_source(text: str) -> Source:
    """A trace file's path, or a process: ``poisson``, ``constant``, ``gamma:CV``, ``step:RATExSECONDS,...`` (relative
    rates, each for so many seconds)."""
    kind, _, rest = text.partition(":")
    if text == "poisson":
        return Renewal(text, 1.0)
    if text == "constant":
        return Renewal(text, 0.0)
    if kind == "gamma":
        cv = _number(rest)
        if not 0.05 <= cv <= 20.0:
            raise TraceError(f"gamma:CV needs the gaps' coefficient of variation, from 0.05 to 20, not {rest!r}")
        return Renewal(text, cv)
    if kind == "step":
        return _steps(text, rest)
    path = Path(text)
    try:
        there = path.exists()
    except OSError:  # a name that is too long for one
        there = False
    if not there:
        raise TraceError(f"there is no trace file {text!r}; a process is one of {PROCESSES}")
    return read_trace(path)


def read_trace(path: Path) -> Trace:
    """Read a CSV file with the columns ``seconds_offset,requests`` (requests in [offset, next offset), the last step
    being as long as the one before) or ``arrival_s`` (one row a request)."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            columns = [column.strip() for column in next(reader, [])]
            if "seconds_offset" in columns and "requests" in columns:
                offsets, counts = _columns(path, reader, columns, "seconds_offset", "requests")
                return _of_counts(path, offsets, counts)
            if "arrival_s" in columns:
                (stamps,) = _columns(path, reader, columns, "arrival_s")
                return _of_stamps(path, stamps)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path} is not a CSV file: {error}") from error
    has = f"has the columns {', '.join(columns)}" if columns else "is empty"
    raise TraceError(f"{path} {has}; a trace's first line is 'seconds_offset,requests' or 'arrival_s'")


def _columns(path: Path, reader: Reader, columns: list[str], *names: str) -> list[Floats]:
    """The named columns; the first one's values must ascend, and none may be negative."""
    places = [columns.index(name) for name in names]
    found: list[list[float]] = [[] for _ in names]
    for row in reader:
        if not row:
            continue
        for name, place, values in zip(names, places, found, strict=True):
            text = row[place] if place < len(row) else ""
            value = _number(text)
            if not 0 <= value < math.inf:
                raise TraceError(f"{path}:{reader.line_num}: {name} must be a number of 0 or more, not {text!r}")
            values.append(value)
        key = found[0]
        if len(key) > 1 and (key[-1] < key[-2] or (len(names) > 1 and key[-1] == key[-2])):
            raise TraceError(f"{path}:{reader.line_num}: {names[0]} must ascend, but {key[-1]:g} follows {key[-2]:g}")
    if not found[0]:
        raise TraceError(f"{path} has no rows below its first line; a trace needs some")
    return [np.array(values) for values in found]


def _of_counts(path: Path, offsets: Floats, counts: Floats) -> Trace:
    if len(offsets) < 2:
        raise TraceError(f"{path} has one row only; a trace of counts needs two to tell how long a step is")
    edges = np.append(offsets, 2.0 * offsets[-1] - offsets[-2]) - offsets[0]
    return Trace(path.stem, edges, counts / np.diff(edges))


def _of_stamps(path: Path, stamps: Floats) -> Trace:
    if stamps[-1] >= LONGEST_STAMPED:
        raise TraceError(
            f"{path}: arrival_s goes up to {stamps[-1]:g}, and a trace has {LONGEST_STAMPED:,} seconds at most: count "
            "them from its begin"
        )
    counts = np.bincount(stamps.astype(np.int64)).astype(np.float64)
    return Trace(path.stem, np.arange(len(counts) + 1, dtype=np.float64), counts, stamps=True)


def _steps(text: str, rest: str) -> Trace:
    rates, seconds = [], []
    for part in rest.split(","):
        rate, _, length = part.partition("x")
        rates.append(_number(rate))
        seconds.append(_number(length))
        if not (0 <= rates[-1] < math.inf and 0 < seconds[-1] < math.inf):
            raise TraceError(
                f"step:RATExSECONDS,... needs relative rates and seconds, as in step:1x60,3x30, not {part!r}"
            )
    return Trace(text, np.concatenate(([0.0], np.cumsum(seconds))), np.array(rates))


def _number(text: str) -> float:
    """The number that a text is; nan for anything else."""
    try:
        return float(text)
    except ValueError:
        return math.nan
