"""A table of which only the lines in sight are ever drawn, so that thousands of rows cost what a screenful does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from cli.live.view import LiveView
from cli.top.cells import Cell, plain
from cli.top.listing import GAP, Column, Listing, Order, arranged, fit, matcher

R = TypeVar("R")
_MARGIN = 1
"""Blanks at the left."""


class LiveTable(ScrollView, Generic[R], can_focus=True):
    """The rows of a :class:`Listing`, sorted and filtered. The cursor stays on its row wherever that goes; a click on
    a head sorts by it."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *(f"table--{tone}" for tone in ("good", "warn", "bad", "quiet", "accent", "strong")),
        "table--head",
        "table--sorted",
        "table--cursor",
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Open"),
        Binding("s", "sort", "Sort"),
        Binding("S", "reverse", "Reverse", show=False),
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home,g", "end(-1)", show=False),
        Binding("end,G", "end(1)", show=False),
    ]

    class Opened(Message):
        """Somebody wants to see more of a row."""

        def __init__(self, table: LiveTable[object], row: object) -> None:
            super().__init__()
            self.table = table
            self.row = row

        @property
        def control(self) -> LiveTable[object]:
            return self.table

    class Changed(Message):
        """Sorted or filtered otherwise, or of another length."""

    def __init__(
        self, listing: Listing[R], columns: Sequence[Column[R]] | None = None, *, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self._listing = listing
        self._columns = tuple(columns if columns is not None else listing.columns)
        self._all: Sequence[R] = ()
        self._rows: list[R] = []
        self._fitted: list[tuple[Column[R], int]] = []
        self._cursor = ""
        self._pinned = False
        """Whether the cursor stays on its row: from when somebody moves it until that is taken to the top."""
        self.order = Order()
        self.filter = ""

    # ---- what is shown -----------------------------------------------------------------------

    @property
    def listing(self) -> Listing[R]:
        return self._listing

    @property
    def rows(self) -> list[R]:
        """As they are shown."""
        return self._rows

    @property
    def total(self) -> int:
        """How many there would be without a filter."""
        return len(self._all)

    @property
    def selected(self) -> R | None:
        """The row under the cursor."""
        index = self._index()
        return None if index is None else self._rows[index]

    def show(self, view: LiveView) -> None:
        """What is there now."""
        self.show_rows(self._listing.rows(view))

    def show_rows(self, rows: Sequence[R]) -> None:
        self._all = rows
        self._arrange()

    def set_filter(self, pattern: str) -> None:
        self.filter = pattern
        self._arrange()

    def _arrange(self) -> None:
        before = self._index() if self._pinned else 0
        seen = before is not None and self._in_sight(before)
        matches = matcher(self.filter)
        rows = [row for row in self._all if matches(self._listing.text(row))] if self.filter else self._all
        self._rows = arranged(self._columns, rows, self.order)
        if not self._pinned or self._index() is None:
            # Its row is gone: the one that has taken its place.
            at = min(before or 0, len(self._rows) - 1)
            self._cursor = self._listing.ident(self._rows[at]) if at >= 0 else ""
        self._fit()
        if seen:
            self._follow()
        self.post_message(self.Changed())

    def _fit(self) -> None:
        width = self.scrollable_content_region.width - _MARGIN
        self._fitted = fit(self._columns, self._rows, width) if width > 0 else []
        # One more for the head, which does not scroll.
        self.virtual_size = Size(max(width + _MARGIN, 0), len(self._rows) + 1)
        self.refresh()

    def on_resize(self) -> None:
        self._fit()
        self._follow()

    # ---- the cursor --------------------------------------------------------------------------

    def _index(self) -> int | None:
        """Where the cursor's row is now."""
        ident = self._listing.ident
        return next((index for index, row in enumerate(self._rows) if ident(row) == self._cursor), None)

    def _select(self, index: int) -> None:
        if 0 <= index < len(self._rows):
            self._cursor = self._listing.ident(self._rows[index])
            self._pinned = index > 0
            self._follow()
        self.refresh()

    def _in_sight(self, index: int) -> bool:
        top = round(self.scroll_y)
        return top <= index < top + self.scrollable_content_region.height - 1

    def _follow(self) -> None:
        """Have the cursor in sight."""
        index = self._index()
        height = self.scrollable_content_region.height - 1
        if index is None or height <= 0 or self._in_sight(index):
            return
        self.scroll_to(y=index if index < self.scroll_y else index - height + 1, animate=False)

    def action_move(self, by: int) -> None:
        self._select(min(max((self._index() or 0) + by, 0), len(self._rows) - 1))

    def action_page(self, by: int) -> None:
        self.action_move(by * max(self.scrollable_content_region.height - 2, 1))

    def action_end(self, by: int) -> None:
        self._select(0 if by < 0 else len(self._rows) - 1)

    def action_open(self) -> None:
        row = self.selected
        if row is not None:
            self.post_message(self.Opened(self, row))  # type: ignore[arg-type]

    # ---- sorting -----------------------------------------------------------------------------

    def action_sort(self) -> None:
        """By the next of the columns that are in sight; after the last one, in the natural order."""
        titles = ["", *(column.title for column, _ in self._fitted)]
        at = titles.index(self.order.title) if self.order.title in titles else 0
        self._sort(Order(titles[(at + 1) % len(titles)]))

    def action_reverse(self) -> None:
        self._sort(Order(self.order.title, not self.order.reverse))

    def _sort(self, order: Order) -> None:
        self.order = order
        self._arrange()
        self._follow()

    def on_click(self, event: events.Click) -> None:
        if event.y == 0:
            self._click_head(event.x)
            return
        self._select(round(self.scroll_y) + event.y - 1)
        if event.chain == 2:
            self.action_open()

    def _click_head(self, x: int) -> None:
        left = _MARGIN
        for column, width in self._fitted:
            if left <= x < left + width + GAP:
                again = self.order.title == column.title
                self._sort(Order(column.title, not self.order.reverse if again else False))
                return
            left += width + GAP

    # ---- drawing -----------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        if y == 0:
            return self._head(width)
        index = round(self.scroll_y) + y - 1
        base = self.rich_style
        if index >= len(self._rows):
            return self._empty(y, width, base)
        row = self._rows[index]
        marked = self._listing.ident(row) == self._cursor and self.has_focus
        over = self._cursor_style() if marked else Style.null()
        segments = [Segment(" " * _MARGIN, base + over)]
        for number, (column, size) in enumerate(self._fitted):
            if number:
                segments.append(Segment(" " * GAP, base + over))
            segments += self._cell(column.cell(row, size), size, column.right, base, over)
        return Strip(segments).adjust_cell_length(width, base + over)

    def _cell(self, cell: Cell, width: int, right: bool, base: Style, over: Style) -> list[Segment]:
        spans = [(cell, "")] if isinstance(cell, str) else cell
        used = cell_len(plain(cell))
        blank = Segment(" " * max(width - used, 0), base + over)
        found = [] if not right else [blank]
        room = width
        for text, tone in spans:
            size = cell_len(text)
            if size > room or (used > width and size == room):
                text = set_cell_size(text, max(room - 1, 0)) + "…"[:room]
                size = room
            room -= size
            # Tones turned round would be patches of colour.
            style = self._style(f"table--{tone}") if tone and not over.reverse else base
            found.append(Segment(text, style + over))
            if room <= 0:
                break
        return found if right else [*found, blank]

    def _head(self, width: int) -> Strip:
        base = self._style("table--head")
        segments = [Segment(" " * _MARGIN, base)]
        for number, (column, size) in enumerate(self._fitted):
            if number:
                segments.append(Segment(" " * GAP, base))
            style, title = base, column.title
            if column.title == self.order.title:
                style = self._style("table--sorted")
                arrow = "▼" if column.right != self.order.reverse else "▲"
                title = f"{title[: size - 1]}{arrow}"
            text = set_cell_size(title, min(size, cell_len(title)))
            segments.append(Segment(f"{text:>{size}}" if column.right else f"{text:<{size}}", style))
        return Strip(segments).adjust_cell_length(width, base)

    def _empty(self, y: int, width: int, base: Style) -> Strip:
        if y != 2 or self._rows:
            return Strip.blank(width, base)
        text = f"Nothing matches {self.filter!r}." if self._all else self._listing.nothing
        return Strip([Segment(f"  {text}", self._style("table--quiet"))]).adjust_cell_length(width, base)

    def _style(self, name: str) -> Style:
        return self.get_component_rich_style(name)

    def _cursor_style(self) -> Style:
        """What the cursor changes: texts keep their colours on it."""
        style = self._style("table--cursor")
        return Style(reverse=True) if style.reverse else Style(bgcolor=style.bgcolor)
