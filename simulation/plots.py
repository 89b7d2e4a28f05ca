"""Line and bar charts in SVG. Colours come from the page's style sheet, by class; no scripts, no outside resources."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

import msgspec

from simulation.markup import Element, append, element

Format = Callable[[float], str]

MOST_POINTS = 600
"""Points that a line has at most; longer series are averaged over bins."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One curve: ``y`` over ``x`` (ascending), of one length; nan where it has a gap. ``style`` holds CSS classes."""

    label: str
    style: str
    x: list[float]
    y: list[float]
    filled: bool = False
    """Fill the area below instead of drawing a line."""


class Axis(msgspec.Struct, frozen=True, kw_only=True):
    """A linear scale from ``low`` to ``high``; ``label`` names the quantity and its unit."""

    label: str
    low: float = 0.0
    high: float
    format: Format


class Mark(msgspec.Struct, frozen=True):
    """A line across the whole chart at a value of x (``vertical``) or of y."""

    label: str
    value: float
    vertical: bool


class Segment(msgspec.Struct, frozen=True):
    """A part of a bar, with what is shown when it is pointed at."""

    style: str
    value: float
    title: str


class Bar(msgspec.Struct, frozen=True):
    """One stacked bar: its name, its classes, its parts from left to right, and the text behind it."""

    label: str
    style: str
    segments: list[Segment]
    text: str


class Shape(msgspec.Struct, frozen=True):
    """Size of a chart and of its margins, in pixels; ``bands``: in how many places it can be pointed at."""

    width: int
    height: int
    bands: int
    left: int = 64
    right: int = 14
    top: int = 12
    bottom: int = 40


WIDE = Shape(1200, 330, 120)
HALF = Shape(590, 290, 80)


def small_shape(count: int) -> Shape:
    """The shape of each of ``count`` charts beside one another: from two to five fit into a row."""
    return Shape(1200 // min(max(count, 2), 5) - 12, 172, 40, left=46, right=8, bottom=36)


def number(value: float) -> str:
    """'12,345', '123', '12.3' or '1.23': three digits at least."""
    size = abs(value)
    if size >= 100 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def percent(value: float) -> str:
    """'12.3 %' of 0.123."""
    return f"{100 * value:.1f} %"


def whole_percent(value: float) -> str:
    """'12 %' of 0.12, and '2.5 %' of 0.025: for the numbers at an axis."""
    return f"{round(100 * value, 2):g} %"


def binned(values: Sequence[float], seconds: float, most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """(x, y): ``values``, evenly spaced over ``seconds``, averaged over at most ``most`` bins that are whole numbers of
    values; x is the middle of each. nan are left out of a mean; a bin of nan only is nan."""
    count = len(values)
    width = max(math.ceil(count / most), 1)
    x, y = [], []
    for begin in range(0, count, width):
        part = values[begin : begin + width]
        x.append((begin + len(part) / 2) * seconds / count)
        y.append(mean(part))
    return x, y


def mean(values: Iterable[float]) -> float:
    """The mean of what is not nan; nan of nothing."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``, at distances of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def top_of(values: Iterable[float], least: float) -> float:
    """The end of an axis that shows all ``values``, a little above the highest; ``least`` at the least."""
    return 1.05 * max((value for value in values if not math.isnan(value)), default=0.0) or least


def line_chart(
    title: str, lines: Sequence[Line], x: Axis, y: Axis, shape: Shape, marks: Sequence[Mark] = ()
) -> Element:
    """Curves over one another, the first in front; what exceeds the axes is cut off."""
    plot = _Plot(title, x, y, shape)
    plot.grid(5 if shape.height > 200 else 4, max(shape.width // 100, 3))
    for line in reversed(lines):
        plot.curve(line)
    for mark in marks:
        plot.mark(mark)
    plot.bands(lines)
    return plot.svg


def bar_chart(title: str, bars: Sequence[Bar], x: Axis, shape: Shape) -> Element:
    """Horizontal stacked bars below one another; as high as it takes."""
    row = 26
    left = shape.left + min(max((len(bar.label) for bar in bars), default=0) * 7, 170) - 40
    sized = Shape(
        shape.width, shape.top + row * len(bars) + shape.bottom, 0, left, shape.right + 56, shape.top, shape.bottom
    )
    plot = _Plot(title, x, Axis(label="", high=float(len(bars)), format=number), sized)
    plot.grid(0, 5)
    for index, bar in enumerate(bars):
        plot.bar(bar, sized.top + row * index, row)
    return plot.svg


class _Plot:
    """A chart in the making: values to pixels, and what is drawn with them."""

    def __init__(self, title: str, x: Axis, y: Axis, shape: Shape) -> None:
        self._x, self._y, self._shape = x, y, shape
        self._wide = shape.width - shape.left - shape.right
        self._high = shape.height - shape.top - shape.bottom
        self.svg = element(
            "svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {shape.width} {shape.height}", role="img"
        )
        self.svg.set("aria-label", title)
        # An inner svg cuts off what leaves it, without the ids that a clipPath needs.
        self._inner = element(
            "svg", x=shape.left, y=shape.top, width=self._wide, height=self._high, overflow="hidden", class_="plot"
        )

    def _across(self, value: float) -> float:
        return (value - self._x.low) / ((self._x.high - self._x.low) or 1.0) * self._wide

    def _down(self, value: float) -> float:
        return self._high - (value - self._y.low) / ((self._y.high - self._y.low) or 1.0) * self._high

    def grid(self, rows: int, columns: int) -> None:
        """Grid lines with their numbers, and the axes' names; the curves go on top. No ``rows``: y has no numbers."""
        left, top = self._shape.left, self._shape.top
        bottom = top + self._high
        for value in ticks(self._y.low, self._y.high, rows) if rows else []:
            height = top + self._down(value)
            self._add("line", x1=left, x2=left + self._wide, y1=height, y2=height, class_="grid")
            self._write(self._y.format(value), left - 6, height + 4, "end")
        for value in ticks(self._x.low, self._x.high, columns):
            place = left + self._across(value)
            self._add("line", x1=place, x2=place, y1=top if not rows else bottom, y2=bottom + 4, class_="grid")
            self._write(self._x.format(value), place, bottom + 17, "middle")
        self._add("line", x1=left, x2=left + self._wide, y1=bottom, y2=bottom, class_="axis")
        self._write(self._x.label, left + self._wide / 2, self._shape.height - 3, "middle", "name")
        if self._y.label:
            middle = top + self._high / 2
            label = element("text", self._y.label, x=12, y=middle, text_anchor="middle", class_="name")
            label.set("transform", f"rotate(-90 12 {middle:.1f})")
            self.svg.append(label)
        self.svg.append(self._inner)

    def curve(self, line: Line) -> None:
        """A line, or an area, with gaps where y is nan."""
        for run in _runs(line):
            points = [f"{self._across(x):.1f} {self._down(y):.1f}" for x, y in run]
            if line.filled:
                first, last = self._across(run[0][0]), self._across(run[-1][0])
                path = f"M{first:.1f} {self._high} L{' L'.join(points)} L{last:.1f} {self._high} Z"
            else:
                # A single point would be a line without length: invisible but for its round cap.
                path = f"M{' L'.join(points if len(points) > 1 else points * 2)}"
            self._inner.append(element("path", d=path, class_=f"{'area' if line.filled else 'curve'} {line.style}"))

    def mark(self, mark: Mark) -> None:
        place = self._across(mark.value) if mark.vertical else self._down(mark.value)
        ends = (
            {"x1": place, "x2": place, "y1": 0, "y2": self._high}
            if mark.vertical
            else {"x1": 0, "x2": self._wide, "y1": place, "y2": place}
        )
        self._inner.append(element("line", class_="mark", **ends))
        across, down, anchor = (place - 5, 12.0, "end") if mark.vertical else (5.0, place - 6, "start")
        self._inner.append(element("text", mark.label, x=across, y=down, text_anchor=anchor, class_="marked"))

    def bands(self, lines: Sequence[Line]) -> None:
        """Places to point at: each tells the mean of every curve there."""
        count = min(self._shape.bands, max((len(line.x) for line in lines), default=0))
        width = (self._x.high - self._x.low) / count if count else 0.0
        for band in range(count):
            begin = self._x.low + band * width
            said = [f"{self._x.label}: {self._x.format(begin)} to {self._x.format(begin + width)}"]
            for line in lines:
                value = mean(line.y[bisect_left(line.x, begin) : bisect_left(line.x, begin + width)])
                if not math.isnan(value):
                    said.append(f"{line.label}: {self._y.format(value)}")
            if len(said) > 1:
                place, wide = self._across(begin), self._across(begin + width) - self._across(begin)
                rect = element("rect", element("title", "\n".join(said)), class_="band", height=self._high, y=0)
                rect.set("x", f"{place:.1f}")
                rect.set("width", f"{wide:.1f}")
                self._inner.append(rect)

    def bar(self, bar: Bar, top: int, row: int) -> None:
        """One bar in the strip that begins at ``top``."""
        group = element("g", class_=bar.style)
        left = self._shape.left
        append(group, element("text", bar.label, x=left - 8, y=top + row / 2 + 4, text_anchor="end", class_="row"))
        place = left + self._across(self._x.low)
        for segment in bar.segments:
            wide = self._across(segment.value)
            rect = element("rect", element("title", segment.title), class_=segment.style, y=top + 4, height=row - 8)
            rect.set("x", f"{place:.2f}")
            rect.set("width", f"{wide:.2f}")
            group.append(rect)
            place += wide
        append(group, element("text", bar.text, x=place + 6, y=top + row / 2 + 4, class_="tick"))
        self.svg.append(group)

    def _add(self, tag: str, **attributes: str | float) -> None:
        self.svg.append(element(tag, **attributes))

    def _write(self, text: str, x: float, y: float, anchor: str, style: str = "tick") -> None:
        self.svg.append(element("text", text, x=x, y=y, text_anchor=anchor, class_=style))


def _runs(line: Line) -> list[list[tuple[float, float]]]:
    """The parts of a line between its gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if math.isnan(y):
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]
