"""What a table shows of a view: which rows, in which columns, and which of these where there is little room."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.cells import cell_len

from cli.live.view import LiveView
from cli.top.cells import Cell, plain

R = TypeVar("R")
GAP = 1
"""Blanks between two columns."""


@dataclass(frozen=True)
class Column(Generic[R]):
    """``cell`` gets the width that there is. ``key`` sorts: numbers from the greatest at first, texts from A.
    ``rank`` says how much it matters: columns with a rank of 0 are always there, others as long as there is room, the
    lowest first. ``most``: up to how wide it grows with what stands in it; ``fills``: it takes all that is left."""

    title: str
    width: int
    cell: Callable[[R, int], Cell]
    key: Callable[[R], float | str]
    rank: int = 0
    right: bool = False
    most: int = 0
    fills: bool = False


@dataclass(frozen=True)
class Listing(Generic[R]):
    """``rows`` are in their natural order, the one before anybody sorts. ``ident`` names a row from one view to the
    next, ``text`` is what filters look in; ``nothing`` says why there may be no rows."""

    name: str
    columns: tuple[Column[R], ...]
    rows: Callable[[LiveView], Sequence[R]]
    ident: Callable[[R], str]
    text: Callable[[R], str]
    nothing: str

    def without(self, *titles: str) -> tuple[Column[R], ...]:
        """The columns but for those of which a page says it all."""
        return tuple(column for column in self.columns if column.title not in titles)


@dataclass(frozen=True)
class Order:
    """By which column (its title), '' for the natural order, and whether the other way round."""

    title: str = ""
    reverse: bool = False


def arranged(columns: Sequence[Column[R]], rows: Sequence[R], order: Order) -> list[R]:
    """The rows as they are to be shown; those that are equal in their natural order."""
    column = next((column for column in columns if column.title == order.title), None)
    if column is None:
        return list(reversed(rows)) if order.reverse else list(rows)
    # Numbers from the greatest first: `reverse` keeps equal ones in their order.
    return sorted(rows, key=column.key, reverse=column.right != order.reverse)


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a text has the regular expression in it, or the very pattern where that is none; in any case."""
    try:
        found = re.compile(pattern, re.IGNORECASE).search
    except re.error:
        lower = pattern.lower()
        return lambda text: lower in text.lower()
    return lambda text: found(text) is not None


def fit(columns: Sequence[Column[R]], rows: Sequence[R], width: int) -> list[tuple[Column[R], int]]:
    """The columns that there is room for, in their order, with their widths."""
    taken: list[Column[R]] = []
    room = width + GAP
    for column in sorted(columns, key=lambda column: column.rank):
        if column.rank and room < column.width + GAP:
            break
        taken.append(column)
        room -= column.width + GAP
    widths = {column.title: column.width for column in taken}
    for column in taken:
        if column.most > column.width and room > 0:
            needs = max((cell_len(plain(column.cell(row, column.most))) for row in rows), default=0)
            more = max(0, min(needs - column.width, column.most - column.width, room))
            widths[column.title] += more
            room -= more
    filling = next((column for column in taken if column.fills), None)
    if filling is not None:
        widths[filling.title] += max(0, room)
    return [(column, widths[column.title]) for column in columns if column.title in widths]
