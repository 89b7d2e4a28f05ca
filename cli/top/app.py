"""``laxity top``'s application: what a cluster does, live, and draining a node from there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import click
from textual import on, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.css.query import NoMatches
from textual.message import Message
from textual.theme import Theme
from textual.widgets import ContentSwitcher, Footer, Input, Static

from cli.live.view import LiveDrop, LiveNode, LivePipeline, LiveView
from cli.top.cells import Span, count, counted
from cli.top.details import Detail, DropDetail, NodeDetail, PipelineDetail, StageDetail
from cli.top.dialogs import DrainDialog, Help
from cli.top.listing import Listing
from cli.top.listings import DROPS, NODES, PIPELINES, STAGES, StageRow
from cli.top.table import LiveTable
from cli.top.totals import emptying, held
from cli.top.widgets import Head, content
from cluster.records import RecordError
from cluster.store.base import StoreError

LISTINGS: tuple[Listing[Any], ...] = (PIPELINES, STAGES, NODES, DROPS)

NIGHT = Theme(
    name="laxity",
    primary="#4c9be8",
    secondary="#56b6c2",
    accent="#b48ead",
    success="#3fb950",
    warning="#e3a93c",
    error="#ff6b61",
    foreground="#d5dbe3",
    background="#0d1117",
    surface="#131920",
    panel="#1c2530",
    dark=True,
    variables={"footer-key-foreground": "#4c9be8"},
)


class NodeActions(Protocol):
    """How nodes are drained and taken back: see :mod:`cli.draining`."""

    def drain(self, name: str) -> None: ...

    def resume(self, name: str) -> None: ...


class Top(App[None]):
    """``views`` makes the views, in a thread of its own, until the event it is given is set."""

    TITLE = "laxity top"
    CSS_PATH = "top.tcss"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(number), f"tab('{listing.name}')", show=False) for number, listing in enumerate(LISTINGS, 1)),
        Binding("tab", "next_tab(1)", show=False, priority=True),
        Binding("shift+tab", "next_tab(-1)", show=False, priority=True),
        # First of all, or what is typed right after it would be the table's.
        Binding("slash", "filter", "Filter", key_display="/", priority=True),
        Binding("escape", "end_filter", show=False),
        Binding("d", "drain", "Drain"),
        Binding("r", "resume", "Resume"),
        Binding("p", "pause", "Pause"),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("q", "quit", "Quit"),
    ]

    class Arrived(Message):
        """A view has come."""

        def __init__(self, view: LiveView) -> None:
            super().__init__()
            self.view = view

    class Failed(Message):
        """There will be no more views."""

        def __init__(self, error: Exception) -> None:
            super().__init__()
            self.error = error

    class Noted(Message):
        """A drain or its end was written down, or (``error``) could not be."""

        def __init__(self, text: str, error: bool) -> None:
            super().__init__()
            self.text = text
            self.error = error

    def __init__(self, views: Callable[[threading.Event], Iterator[LiveView]], actions: NodeActions) -> None:
        super().__init__()
        self.register_theme(NIGHT)
        # A terminal of 16 colours has its own, which people have chosen.
        self.theme = NIGHT.name if self.console.color_system in ("256", "truecolor") else "ansi-dark"
        self._views = views
        self._actions = actions
        self._stop = threading.Event()
        self._paused = False
        self._view: LiveView | None = None
        """As it is shown."""
        self._newest: LiveView | None = None
        self._emptying: set[str] = set()
        self._asked: set[str] = set()
        """Nodes that were asked here to be drained, and are yet to be seen as such."""

    def compose(self) -> ComposeResult:
        yield Head()
        yield Static(id="tabs")
        with ContentSwitcher(initial=_ident(PIPELINES), id="panes"):
            for listing in LISTINGS:
                yield LiveTable(listing, id=_ident(listing))
        yield Static(id="notice", markup=False)
        yield Input(placeholder="part of a name, or a regular expression", id="filter", compact=True)
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        self._table.focus()
        self._draw_tabs()
        threading.Thread(target=self._follow, name="views", daemon=True).start()

    def on_unmount(self) -> None:
        self._stop.set()

    # ---- views -------------------------------------------------------------------------------

    def _follow(self) -> None:
        try:
            for view in self._views(self._stop):
                if not self.post_message(self.Arrived(view)):
                    return
        except (StoreError, RecordError, click.ClickException) as error:
            self.post_message(self.Failed(error))

    @on(Arrived)
    def _arrived(self, message: Arrived) -> None:
        self._newest = message.view
        self._tell_of_drains(message.view)
        if not self._paused:
            self._view = message.view
        self._draw()

    @on(Failed)
    def _failed(self, message: Failed) -> None:
        self.exit(return_code=1, message=f"Error: {message.error}")

    def _draw(self) -> None:
        if self._view is None:
            return
        main = self.screen_stack[0]
        main.query_one(Head).show(self._view, self._paused)
        self._table.show(self._view)
        for screen in self.screen_stack[1:]:
            if isinstance(screen, Detail):
                screen.show(self._view, self._paused)
        self._draw_tabs()

    @on(LiveTable.Changed)
    def _draw_tabs(self) -> None:
        bar: list[Content] = []
        for number, listing in enumerate(LISTINGS, 1):
            here = listing is self._table.listing
            rows = f" {count(len(listing.rows(self._view)))}" if self._view is not None else ""
            style = "bold reverse" if here else "dim"
            link = f"[@click=app.tab('{listing.name}')] {number} {listing.name}{rows} [/]"
            bar.append(Content.from_markup(link).stylize(style))
        table = self._table
        how: list[Span] = []
        if table.order.title or table.order.reverse:
            way = " reversed" if table.order.reverse else ""
            how.append((f"  by {table.order.title or 'natural order'}{way}", "quiet"))
        if table.filter:
            how.append((f"  /{table.filter}/ {count(len(table.rows))} of {count(table.total)}", "accent"))
        self._main("#tabs", Static).update(Content(" ").join(bar) + content(how))

    # ---- tabs and pages ----------------------------------------------------------------------

    def _main(self, selector: str, kind: type[Any]) -> Any:
        return self.screen_stack[0].query_one(selector, kind)

    @property
    def _table(self) -> LiveTable[Any]:
        """The one that is shown."""
        table = self._main("#panes", ContentSwitcher).visible_content
        assert isinstance(table, LiveTable)
        return table

    def action_tab(self, name: str) -> None:
        while len(self.screen_stack) > 1:
            self.pop_screen()
        listing = next(listing for listing in LISTINGS if listing.name == name)
        self._main("#panes", ContentSwitcher).current = _ident(listing)
        self.screen_stack[0].set_focus(self._table)
        self._main("#filter", Input).display = False
        self._draw()
        self._draw_tabs()
        self.refresh_bindings()

    def action_next_tab(self, by: int) -> None:
        at = LISTINGS.index(self._table.listing)
        self.action_tab(LISTINGS[(at + by) % len(LISTINGS)].name)

    @on(LiveTable.Opened)
    def _opened(self, message: LiveTable.Opened) -> None:
        match message.row:
            case LivePipeline(name=name):
                self._open(PipelineDetail(name))
            case StageRow():
                self._open(StageDetail(message.row))
            case LiveNode(name=name):
                self._open(NodeDetail(name))
            case LiveDrop():
                self._open(DropDetail(message.row))

    def _open(self, page: Detail) -> None:
        self.push_screen(page)
        self.call_after_refresh(self._draw)

    # ---- keys --------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Which keys mean something where."""
        try:
            modal = not (len(self.screen_stack) == 1 or isinstance(self.screen, Detail))
            if action in ("drain", "resume"):
                return not modal and self._node() is not None
            if action == "filter":
                return len(self.screen_stack) == 1 and not isinstance(self.focused, Input)
            if action == "end_filter":
                return len(self.screen_stack) == 1
            if action in ("next_tab", "tab", "help", "pause"):
                return not modal
        except (NoMatches, IndexError):
            return False  # before all is there
        return True

    def action_pause(self) -> None:
        self._paused = not self._paused
        if not self._paused and self._newest is not None:
            self._view = self._newest
        self._draw()

    def action_help(self) -> None:
        self.push_screen(Help())

    def action_filter(self) -> None:
        box = self._main("#filter", Input)
        box.display = True
        box.value = self._table.filter
        # At once: what is typed next is meant for it, however soon it comes.
        self.screen.set_focus(box)

    def action_end_filter(self) -> None:
        self.screen.set_focus(self._table)
        self._main("#filter", Input).display = False
        self._table.set_filter("")

    @on(Input.Changed, "#filter")
    def _filter_typed(self, event: Input.Changed) -> None:
        if event.input.display:
            self._table.set_filter(event.value)

    @on(Input.Submitted, "#filter")
    def _filter_done(self, event: Input.Submitted) -> None:
        self.screen.set_focus(self._table)
        event.input.display = False

    # ---- draining ----------------------------------------------------------------------------

    def _node(self) -> LiveNode | None:
        """The node that d and r are about: the page's, or the one under the cursor."""
        name = ""
        if isinstance(self.screen, NodeDetail):
            name = self.screen.node
        elif len(self.screen_stack) == 1 and isinstance(self._table.selected, LiveNode):
            name = self._table.selected.name
        view = self._newest
        return next((node for node in view.nodes if node.name == name), None) if view is not None and name else None

    def action_drain(self) -> None:
        node, view = self._node(), self._newest
        if node is None or view is None:
            return
        if node.drained:
            self.notify(f"{node.name} is drained already; r takes it back")
            return
        others = sum(len(other.devices) for other in view.nodes if other.state == "active" and other.name != node.name)

        def answered(yes: bool | None) -> None:
            if yes:
                self._asked.add(node.name)
                self._write(lambda: self._actions.drain(node.name), f"{node.name} is being emptied")

        self.push_screen(DrainDialog(node, others, view.cluster), answered)

    def action_resume(self) -> None:
        node = self._node()
        if node is None:
            return
        if not node.drained:
            self.notify(f"{node.name} was not drained")
            return
        self._write(lambda: self._actions.resume(node.name), f"{node.name} may hold models again")

    @work(thread=True)
    def _write(self, write: Callable[[], None], done: str) -> None:
        try:
            write()
        except (StoreError, RecordError, click.ClickException) as error:
            text = error.message if isinstance(error, click.ClickException) else str(error)
            self.post_message(self.Noted(text, error=True))
        else:
            self.post_message(self.Noted(done, error=False))

    @on(Noted)
    def _noted(self, message: Noted) -> None:
        self.notify(message.text, severity="error" if message.error else "information", markup=False)

    def _tell_of_drains(self, view: LiveView) -> None:
        """Which nodes are being emptied, how far that is, and which are now empty."""
        waits = {node.name: held(node) for node in view.nodes if emptying(node)}
        drained = {node.name for node in view.nodes if node.drained}
        at_once = self._asked & drained  # the others are still to be seen as drained
        self._asked -= drained
        for name in (self._emptying | at_once) - waits.keys():
            if name in drained:
                self.notify(f"{name} is empty; r takes it back", markup=False)
        self._emptying = set(waits)
        told = ", ".join(f"{name}: {counted(left, 'model')} left" for name, left in waits.items())
        notice = self._main("#notice", Static)
        notice.display = bool(told)
        notice.update(f"Draining {told}")


def _ident(listing: Listing[Any]) -> str:
    return listing.name.lower()
