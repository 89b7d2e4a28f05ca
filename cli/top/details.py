"""What there is to know of one pipeline, stage, node or drop: a page each, which goes on while it is looked at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.widgets import Footer, Static

from cli.live.view import LiveDrop, LiveNode, LivePipeline, LiveView
from cli.options import cluster_argument
from cli.top.cells import Cell, Span, chart, clean, clock, count, counted, duration, percent, rate, share_tone
from cli.top.listings import (
    DROPS,
    OUTCOME_TONES,
    STAGES,
    StageRow,
    devices_of,
    models_by_pipeline,
    node_busy,
    node_state,
    pipeline_share,
    stage_rows,
)
from cli.top.table import LiveTable
from cli.top.totals import dropped, emptying, held
from cli.top.widgets import Facts, Head, content, lines

_ORDERS = {"fcfs": "first come, first served", "lbf": "lowest budget first", "hbf": "highest budget first"}
Known = Iterable[tuple[str, Cell]]


class Detail(Screen[None]):
    """One thing in full; the last that was known of it, once it is gone."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,backspace,left", "app.pop_screen", "Back"),
    ]

    def __init__(self, title: str) -> None:
        super().__init__()
        self.heading = title

    def compose(self) -> ComposeResult:
        yield Head()
        yield Static(self.heading, id="title", markup=False)
        yield from self.body()
        yield Footer(compact=True, show_command_palette=False)

    def body(self) -> ComposeResult:
        with VerticalScroll(id="page"):
            yield Facts()

    def show(self, view: LiveView, paused: bool) -> None:
        try:
            self.query_one(Head).show(view, paused)
        except NoMatches:
            return  # it is only being put together; it asks for the view once it is there
        there = self.draw(view)
        title: list[Span] = [(self.heading, "strong")]
        if not there:
            title.append((" is gone; this is what was known last", "bad"))
        self.query_one("#title", Static).update(content(title))

    def draw(self, view: LiveView) -> bool:
        """Show what the view says of it; False where it says nothing."""
        raise NotImplementedError


class PipelineDetail(Detail):
    """Goodput against what is offered, the stages, and who was dropped."""

    CHART = 6

    def __init__(self, name: str) -> None:
        super().__init__(f"Pipeline {clean(name)}")
        self._name = name

    def body(self) -> ComposeResult:
        yield Facts()
        yield Static(id="chart")
        yield LiveTable(STAGES, STAGES.without("PIPELINE"), id="stages")
        yield LiveTable(DROPS, DROPS.without("PIPELINE"), id="drops")

    def draw(self, view: LiveView) -> bool:
        self.query_one("#drops", LiveTable).show_rows([drop for drop in view.drops if drop.pipeline == self._name])
        pipeline = next((one for one in view.pipelines if one.name == self._name), None)
        if pipeline is None:
            return False
        self.query_one("#facts", Facts).show(_pipeline_facts(pipeline))
        box = self.query_one("#chart", Static)
        box.update(lines(chart(pipeline.history, box.content_size.width, self.CHART)))
        stages = self.query_one("#stages", LiveTable)
        stages.styles.height = min(len(pipeline.stages) + 1, max(self.size.height // 3, 4))
        stages.show_rows(stage_rows([pipeline]))
        return True


def _pipeline_facts(pipeline: LivePipeline) -> Known:
    part = pipeline_share(pipeline)
    late = pipeline.latency is not None and bool(pipeline.slo) and pipeline.latency[1] > pipeline.slo
    p50, p99 = pipeline.latency if pipeline.latency is not None else (None, None)
    yield (
        "traffic",
        [
            (f"offered {rate(pipeline.offered)}/s  good {rate(pipeline.good)}/s ", ""),
            (percent(part), share_tone(part)),
            (f"  dropped {rate(dropped(pipeline.outcomes))}/s", "bad" if dropped(pipeline.outcomes) else ""),
            (f"  in flight {count(pipeline.in_flight)}", ""),
        ],
    )
    yield (
        "latency",
        [
            (f"p50 {duration(p50)}  ", ""),
            (f"p99 {duration(p99)}", "bad" if late else ""),
            (f"  SLO {duration(pipeline.slo)}  ", ""),
            (f"{clean(pipeline.policy)}, version {clean(pipeline.version)}", "quiet"),
        ],
    )
    quantile = "-" if pipeline.quantile is None else f"{pipeline.quantile:.2f}"
    others = {how: value for how, value in pipeline.outcomes.items() if how != "ok"}
    yield (
        "drop",
        f"λ {quantile}  window {duration(pipeline.window)}  admission {percent(pipeline.admission)}  "
        + "  ".join(f"{clean(how)} {rate(value)}/s" for how, value in others.items() if value),
    )
    if pipeline.waits_for:
        yield "waits", [(clean(pipeline.waits_for), "warn")]


class StageDetail(Detail):
    """A stage's figures with what they mean."""

    def __init__(self, row: StageRow) -> None:
        super().__init__(f"Stage {clean(row.pipeline)}/{clean(row.stage.name)}")
        self._pipeline = row.pipeline
        self._stage = row.stage.name

    def body(self) -> ComposeResult:
        yield Facts()
        yield LiveTable(DROPS, DROPS.without("PIPELINE", "STAGE"), id="drops")

    def draw(self, view: LiveView) -> bool:
        drops = [drop for drop in view.drops if (drop.pipeline, drop.stage) == (self._pipeline, self._stage)]
        self.query_one("#drops", LiveTable).show_rows(drops)
        pipeline = next((one for one in view.pipelines if one.name == self._pipeline), None)
        row = next((row for row in stage_rows([pipeline] if pipeline else []) if row.stage.name == self._stage), None)
        if pipeline is None or row is None:
            return False
        self.query_one("#facts", Facts).show(_stage_facts(pipeline, row))
        return True


def _stage_facts(pipeline: LivePipeline, row: StageRow) -> Known:
    stage = row.stage
    behind = [other.name for other in pipeline.stages if stage.name in other.inputs]
    into = clean(", ".join(behind) or "the answer")
    each = ", once for each element" if stage.map else ""
    yield "way", f"{clean(', '.join(stage.inputs))} → {clean(stage.name)} → {into}{each}"
    yield "arrived", f"{rate(stage.arrived)}/s, {count(stage.waiting)} wait, for {duration(stage.queued)} on average"
    yield (
        "batches",
        f"{rate(stage.batches)}/s of {rate(stage.batch)} on average, {duration(stage.execution)} to execute each, "
        f"on {counted(stage.devices, 'GPU')}",
    )
    if stage.slack is None:
        yield "slack", [("no batch was granted lately", "quiet")]
    else:
        tight = stage.least_slack is not None and stage.least_slack <= 0.0
        yield (
            "slack",
            [
                (f"half of the batches were granted {duration(stage.slack)} before they had to start, ", ""),
                (f"a tenth less than {duration(stage.least_slack)}", "warn" if tight else ""),
            ],
        )
    load = "of what its GPUs can do comes" + (": more than all of it" if stage.load_factor > 1.0 else "")
    yield "load", [(f"{stage.load_factor:.2f}", "bad" if stage.load_factor > 1.0 else ""), (f"  {load}", "quiet")]
    yield (
        "drop",
        [
            (f"{rate(stage.dropped)}/s", "bad" if stage.dropped else ""),
            (f"  order {_ORDERS.get(stage.order, clean(stage.order) or '-')}", ""),
            (f"  λ {'-' if pipeline.quantile is None else f'{pipeline.quantile:.2f}'}", ""),
            (f"  window {duration(pipeline.window)}", ""),
        ],
    )
    if stage.failed:
        yield "failed", [(clean(stage.failed), "bad")]


class NodeDetail(Detail):
    """A node and what each of its devices does."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Node {clean(name)}")
        self.node = name

    def body(self) -> ComposeResult:
        yield Facts()
        yield LiveTable(devices_of(self.node), id="devices")

    def draw(self, view: LiveView) -> bool:
        node = next((one for one in view.nodes if one.name == self.node), None)
        if node is None:
            return False
        self.query_one("#facts", Facts).show(_node_facts(node))
        self.query_one("#devices", LiveTable).show(view)
        return True


def _node_facts(node: LiveNode) -> Known:
    here = "" if node.registered else "  its agent is not here"
    yield "state", [node_state(node), (f"  {clean(node.why)}", ""), (here, "bad")]
    yield "host", clean(node.host) or "-"
    busy = f", {node_busy(node) * 100:.0f}% busy" if node.devices else ""
    models = f"{counted(held(node), 'model')}: {models_by_pipeline(node.devices)}"
    yield "devices", f"{count(len(node.devices))}{busy}, {models}"
    if emptying(node):
        yield "drain", [(f"{counted(held(node), 'model')} left until it is empty", "warn")]
    elif node.drained:
        yield "drain", [("it is empty and stays so; r resumes it", "good")]


class DropDetail(Detail):
    """Why a request did not make it, in full."""

    def __init__(self, drop: LiveDrop) -> None:
        super().__init__(f"Request {clean(drop.request)}")
        self._drop = drop

    def draw(self, view: LiveView) -> bool:
        drop = self._drop
        trace = f"laxity trace {clean(drop.request)}{cluster_argument(view.cluster)}"
        self.query_one("#facts", Facts).show(
            [
                ("outcome", [(clean(drop.outcome), OUTCOME_TONES.get(drop.outcome, ""))]),
                ("at", f"{clock(drop.at)}, {max(view.at - drop.at, 0.0):.0f} s ago"),
                ("pipeline", clean(drop.pipeline)),
                ("stage", clean(drop.stage) or "none was reached"),
                ("shard", clean(drop.shard)),
                ("reason", clean(drop.detail) or "none was given"),
                ("trace", [(trace, "strong")]),
            ]
        )
        return True
