"""The pieces that screens of `laxity top` are made of, beside the tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len
from textual.content import Content
from textual.widgets import Static

from cli.live.view import LiveView
from cli.top.cells import Cell, Span, Tone, plain
from cli.top.totals import cluster_line, figures_line, time_of, trouble_line

_STYLES: dict[Tone, str] = {
    "": "",
    "good": "$success",
    "warn": "$warning",
    "bad": "$error bold",
    "quiet": "dim",
    "accent": "$secondary",
    "strong": "bold",
}


def content(cell: Cell) -> Content:
    """A cell as textual draws it."""
    if isinstance(cell, str):
        return Content(cell)
    return Content.assemble(*((text, _STYLES[tone]) for text, tone in cell))


def lines(cells: Iterable[Cell]) -> Content:
    return Content("\n").join([content(cell) for cell in cells])


class Head(Static):
    """The cluster in two lines, and a third one where something is wrong with all of it."""

    def __init__(self) -> None:
        super().__init__(id="head")
        self._view: LiveView | None = None
        self._paused = False

    def show(self, view: LiveView, paused: bool) -> None:
        self._view, self._paused = view, paused
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        if self._view is None:
            return
        right: list[Span] = [("PAUSED ", "warn")] if self._paused else []
        right.append((time_of(self._view), ""))
        width = self.app.size.width - self.gutter.width
        trouble = trouble_line(self._view)
        figures = figures_line(self._view)
        if cell_len(plain(figures)) > width:
            figures = figures_line(self._view, words=False)
        shown = [beside(content(cluster_line(self._view)), content(right), width), content(figures)]
        if trouble:
            shown.append(content([(trouble, "bad")]))
        self.update(Content("\n").join(shown))


def beside(left: Content, right: Content, width: int) -> Content:
    """Two texts in one line, one at each end; of the left one what there is room for."""
    left = left.truncate(max(width - right.cell_length - 1, 0), ellipsis=True)
    return left + " " * max(width - left.cell_length - right.cell_length, 1) + right


class Facts(Static):
    """What is known of one thing: names and values in two columns, the values wrapped."""

    def __init__(self) -> None:
        super().__init__(id="facts")
        self._facts: list[tuple[str, Cell]] = []

    def show(self, facts: Iterable[tuple[str, Cell]]) -> None:
        self._facts = list(facts)
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        size = max((len(name) for name, _ in self._facts), default=0) + 2
        found: list[Content] = []
        for name, value in self._facts:
            wrapped = content(value).wrap(max(self.app.size.width - self.gutter.width - size, 8))
            for number, line in enumerate(wrapped):
                found.append(content([((name if number == 0 else "").ljust(size), "quiet")]) + line)
        self.update(Content("\n").join(found))
