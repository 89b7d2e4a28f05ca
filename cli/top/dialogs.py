"""What is asked and explained on top of everything else."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from cli.live.view import LiveNode
from cli.options import cluster_argument
from cli.top.cells import clean, counted
from cli.top.totals import held
from cli.top.widgets import content, lines


class DrainDialog(ModalScreen[bool]):
    """Whether a node is to be drained; it says what that means."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)"),
        Binding("n,escape,q", "answer(False)"),
        Binding("left,right", "app.focus_next", show=False),
    ]

    def __init__(self, node: LiveNode, others: int, cluster: str) -> None:
        """``others``: how many devices are active beside this node's."""
        super().__init__()
        self._node = node
        self._others = others
        self._cluster = cluster

    def compose(self) -> ComposeResult:
        node = self._node
        resume = f"laxity node resume {clean(node.name)}{cluster_argument(self._cluster)}"
        left = f"{counted(self._others, 'device')} of other nodes stay active."
        devices = counted(len(node.devices), "device")
        with Vertical(id="dialog"):
            yield Static(f"Drain {clean(node.name)}?", id="question", markup=False)
            yield Static(
                lines(
                    [
                        f"What it holds ({counted(held(node), 'model')} on {devices}) is loaded "
                        "elsewhere first, and what it runs is finished: no request is lost by it. Then it stays "
                        "empty until somebody takes it back, with r or",
                        f"  {resume}",
                        "",
                        left if self._others else [("No other node is active: nothing would be served.", "bad")],
                    ]
                )
            )
            with Horizontal(id="answers"):
                yield Button("Drain (y)", variant="warning", id="yes", compact=True)
                yield Button("Leave it (n)", id="no", compact=True)

    def on_mount(self) -> None:
        self.query_one("#no").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)


_KEYS = (
    ("1 2 3 4, Tab", "pipelines, stages, nodes, drops"),
    ("↑ ↓ PgUp PgDn", "move; Home goes to the top and stays there"),
    ("Enter", "more about the row: a pipeline's stages and drops, ..."),
    ("Esc", "back; ends the filter"),
    ("s, S", "sort by the next column; the other way round (or click)"),
    ("/", "filter by a part of the name or a regular expression"),
    ("d, r", "drain the node; resume it (take it back)"),
    ("p", "pause: what is shown stays as it is"),
    ("Ctrl+P", "themes, a screenshot as SVG, ..."),
    ("q", "quit"),
)
_WORDS = (
    ("GOOD", "of what ended, the part that was answered in time"),
    ("SLACK10/50", "how long before it had to start a batch was granted: 10th percentile, median"),
    ("LOAD", "what comes to a stage, over what its GPUs can do: above 1 there are drops"),
    ("λ, WINDOW", "the quantile of batch waits that drops count on; the time they look back"),
    ("ADMIT", "the part of the requests that is let in"),
    ("DEVICES", "B busy, I idle, L loading, D draining, S standby, X lost"),
)


class Help(ModalScreen[None]):
    """The keys, and the words."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter", "app.pop_screen")]

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="dialog"):
            for title, entries in (("Keys", _KEYS), ("Words", _WORDS)):
                size = max(len(name) for name, _ in entries)
                yield Static(title, classes="heading")
                for name, text in entries:
                    with Horizontal(classes="entry"):
                        term = Static(content([(name, "strong")]), classes="term")
                        term.styles.width = size + 2
                        yield term
                        yield Static(text, markup=False, classes="meaning")
