"""A report of simulated runs: one HTML file that needs nothing else, to be opened in any browser, offline too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from simulation.markup import Element, element, page
from simulation.plots import (
    HALF,
    WIDE,
    Axis,
    Bar,
    Line,
    Mark,
    Segment,
    bar_chart,
    binned,
    line_chart,
    number,
    percent,
    small_shape,
    top_of,
    whole_percent,
)
from simulation.results import RunResult, StageSeries, alike
from simulation.style import style_sheet

_SMALL_POINTS = 90


class Column(msgspec.Struct, frozen=True):
    """A column of the summary: its head, its unit, its value, how that is shown, whether the ``best`` is the highest
    (max) or the lowest (min), and what it means."""

    head: str
    unit: str
    value: Callable[[RunResult], float]
    show: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None
    meaning: str


COLUMNS: tuple[Column, ...] = (
    Column(
        "goodput",
        "req/s",
        lambda r: r.goodput_rps,
        "{:,.0f}".format,
        max,
        "requests answered within the SLO, per second",
    ),
    Column(
        "of bound",
        "%",
        lambda r: r.bound_ratio,
        percent,
        max,
        "goodput / the fluid bound: the sum over the seconds of min(offered, capacity)",
    ),
    Column("drops", "%", lambda r: r.drop_rate, percent, min, "drop rate: requests that were dropped or late"),
    Column(
        "avoidable",
        "%",
        lambda r: r.avoidable_drop_rate,
        percent,
        min,
        "the part of the drop rate above what the fluid bound leaves",
    ),
    Column("invalid", "%", lambda r: r.invalid_rate, percent, min, "GPU time spent on requests that were not good"),
    Column(
        "GPU busy", "GPU-s", lambda r: r.gpu_seconds_busy, "{:,.0f}".format, None, "GPU-seconds in which batches ran"
    ),
    Column(
        "busy",
        "%",
        lambda r: r.gpu_seconds_busy / r.gpu_seconds_allocated if r.gpu_seconds_allocated else 0.0,
        percent,
        None,
        "the same as a part of all GPU-seconds of the cluster",
    ),
    Column(
        "busy / floor",
        "×",
        lambda r: r.gpu_seconds_busy / r.gpu_seconds_floor if r.gpu_seconds_floor else math.nan,
        "{:.2f}".format,
        min,
        "busy GPU-seconds / those that the good requests would take in planned batches",
    ),
    Column("batch", "mean", lambda r: r.mean_batch, "{:,.1f}".format, None, "elements per batch, over all stages"),
    Column("p50", "ms", lambda r: r.latency_ms.p50, "{:,.0f}".format, None, "median latency of the good requests"),
    Column("p99", "ms", lambda r: r.latency_ms.p99, "{:,.0f}".format, None, "99th percentile of their latency"),
)


def render(results: Sequence[RunResult], slos: Mapping[str, float], command: str = "") -> str:
    """The report's HTML. ``slos`` holds each pipeline's latency objective in seconds, ``command`` is what was run. Runs
    of one pipeline under the same load and on the same GPUs are shown together, one curve a policy."""
    policies = list(dict.fromkeys(result.policy for result in results))
    stages = max((len(result.drops_by_stage) for result in results), default=0)
    pipelines = ", ".join(dict.fromkeys(result.pipeline for result in results))
    body = [
        element(
            "header",
            element("h1", f"Laxity simulation: {pipelines}"),
            element("p", "A cluster in virtual time, scheduled by the engines that run in production.", class_="soft"),
            *([element("pre", command)] if command else []),
        ),
        _legend(policies),
        element("main", *(_section(group, policies, slos) for group in alike(results)), _words()),
    ]
    return page(f"Laxity simulation: {pipelines}", style_sheet(len(policies), stages), *body)


def _legend(policies: Sequence[str]) -> Element:
    entries = [
        element(
            "label",
            element("input", type="checkbox", id=f"show{index}", checked="checked", autocomplete="off"),
            element("span", class_="key"),
            policy,
            class_=f"p{index} of{index}",
        )
        for index, policy in enumerate(policies)
    ]
    fixed = [
        element("span", element("span", class_="key load"), " offered"),
        element("span", element("span", class_="key bound"), " fluid bound"),
    ]
    return element("nav", element("form", *entries, *fixed), class_="legend")


def _section(group: Sequence[RunResult], policies: Sequence[str], slos: Mapping[str, float]) -> Element:
    first = group[0]
    styles = [f"p{policies.index(result.policy)}" for result in group]
    return element(
        "section",
        element("h2", f"{first.pipeline} under {first.trace} at load {_load(first):.2f}"),
        _facts(first, slos[first.pipeline]),
        element("div", _table(group, styles), class_="card wide"),
        _figure(
            "Offered load, goodput and fluid bound",
            "Requests by the second of their arrival; good are those answered within the SLO. The bound is "
            "min(offered, capacity), with the capacity of planned batches: only larger ones can stay above it.",
            _load_chart(group, styles),
        ),
        *_allocated(group, styles),
        element(
            "div",
            _figure(
                "Latency",
                "Part of all requests that were answered within a time; what is missing at the end was not good.",
                _latency_chart(group, styles, slos[first.pipeline]),
            ),
            _figure("GPU use", "Part of the pipeline's GPUs on which a batch runs.", _use_chart(group, styles)),
            class_="pair",
        ),
        _drops(group, styles),
        _small(
            group,
            styles,
            "Queueing by stage",
            "Mean wait of what is granted, in ms, up to the SLO; all to one scale.",
            _queued,
            slos[first.pipeline] * 1e3,
        ),
        _small(group, styles, "Batches by stage", "Mean batch; all to one scale.", _batches),
        _small(
            group,
            styles,
            "Drops by stage over time",
            "Requests dropped or expired, per second; all to one scale. What ends after the run counts as its last.",
            _dropped,
        ),
    )


def _load(result: RunResult) -> float:
    return result.offered_rps / result.capacity_rps if result.capacity_rps else 0.0


def _facts(result: RunResult, slo: float) -> Element:
    split = " + ".join(map(str, result.split)) if result.split else "each serves every stage"
    own = sum(result.split) or result.gpus
    if result.scaler:
        split, own = f"scaled by the {result.scaler}", result.gpus
    if own < result.gpus:
        split += f", of {number(result.gpus)}"
    over = sum(offered > bound + 0.5 for offered, bound in zip(result.series.offered, result.series.bound, strict=True))
    peak = max(result.series.offered, default=0)
    facts = [
        ("SLO", f"{number(slo * 1e3)} ms", ""),
        ("GPUs", number(own), split),
        ("duration", f"{number(result.seconds)} s", f"{number(result.submitted)} requests, seed {result.seed}"),
        ("offered", f"{number(result.offered_rps)} req/s", f"peak {number(peak)}"),
        ("capacity", f"{number(result.capacity_rps)} req/s", f"load {_load(result):.2f}"),
        ("fluid bound", f"{number(result.bound_rps)} req/s", f"overloaded in {over} of {len(result.series.offered)} s"),
    ]
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", f"{value} ", element("small", more)))
            for name, value, more in facts
        ),
        class_="facts",
    )


def _table(group: Sequence[RunResult], styles: Sequence[str]) -> Element:
    heads = [element("th", "policy")]
    heads += [element("th", column.head, element("small", column.unit), title=column.meaning) for column in COLUMNS]
    rows = []
    best: list[float | None] = []
    for column in COLUMNS:
        known = [value for value in map(column.value, group) if not math.isnan(value)]
        best.append(column.best(known) if column.best is not None and len(group) > 1 and known else None)
    for result, style in zip(group, styles, strict=True):
        cells = [element("td", element("span", class_="key"), result.policy)]
        for column, leader in zip(COLUMNS, best, strict=True):
            value = column.value(result)
            cell = element("td", "–" if math.isnan(value) else column.show(value))
            if value == leader:
                cell.set("class", "best")
            cells.append(cell)
        rows.append(element("tr", *cells, class_=style))
    return element("table", element("thead", element("tr", *heads)), element("tbody", *rows))


def _figure(title: str, caption: str, *content: Element) -> Element:
    return element(
        "figure", element("figcaption", element("h3", title), element("p", caption)), *content, class_="card"
    )


def _seconds(result: RunResult) -> Axis:
    return Axis(label="time (s)", high=float(len(result.series.offered) or 1), format=number)


def _over_time(label: str, style: str, values: Sequence[float], most: int, *, filled: bool = False) -> Line:
    x, y = binned(values, len(values), most)
    return Line(label=label, style=style, x=x, y=y, filled=filled)


def _load_chart(group: Sequence[RunResult], styles: Sequence[str]) -> Element:
    first = group[0]
    lines = [
        _over_time(result.policy, style, result.series.good, 600) for result, style in zip(group, styles, strict=True)
    ]
    lines.append(_over_time("fluid bound", "bound", first.series.bound, 600))
    lines.append(_over_time("offered", "load", first.series.offered, 600, filled=True))
    high = top_of((value for line in lines for value in line.y), 1.0)
    marks = [Mark(f"capacity {number(first.capacity_rps)}", first.capacity_rps, False)]
    axis = Axis(label="requests per second", high=high, format=number)
    return line_chart("offered load, goodput and fluid bound", lines, _seconds(first), axis, WIDE, marks)


def _allocated(group: Sequence[RunResult], styles: Sequence[str]) -> list[Element]:
    """GPUs over time, where any run's were scaled."""
    if not any(result.scaler for result in group):
        return []
    first = group[0]
    each = first.gpus / first.capacity_rps if first.capacity_rps else 0.0
    lines = [
        _over_time(result.policy, style, result.series.allocated, 600)
        for result, style in zip(group, styles, strict=True)
    ]
    lines.append(_over_time("offered", "load", [each * offered for offered in first.series.offered], 600, filled=True))
    # High enough for the mark's label above it.
    high = top_of([1.08 * first.gpus, *(value for line in lines for value in line.y)], 1.0)
    axis = Axis(label="GPUs", high=high, format=number)
    told = "; ".join(
        f"{result.policy}: {result.gpu_seconds_allocated / 3600:,.2f} GPU-hours, {number(result.moves_per_hour)} moves "
        f"an hour, {number(result.gpu_seconds_loading)} GPU-seconds spent loading"
        for result in group
    )
    return [
        _figure(
            "Allocated GPUs",
            f"GPUs of the whole cluster that hold or load a model, scaled by the {first.scaler}, and those that the "
            f"offered load takes in planned batches. {told}.",
            line_chart(
                "allocated GPUs",
                lines,
                _seconds(first),
                axis,
                WIDE,
                [Mark(f"all {number(first.gpus)}", float(first.gpus), False)],
            ),
        )
    ]


def _latency_chart(group: Sequence[RunResult], styles: Sequence[str], slo: float) -> Element:
    lines = []
    for result, style in zip(group, styles, strict=True):
        reached, x, y = 0, [0.0], [0.0]
        step = max(len(result.latencies_ms) // 300, 1)
        for millisecond, count in enumerate(result.latencies_ms, 1):
            reached += count
            if millisecond % step == 0 or millisecond == len(result.latencies_ms):
                x.append(float(millisecond))
                y.append(reached / (result.submitted or 1))
        if x[-1] < slo * 1e3:
            x.append(slo * 1e3)
            y.append(y[-1])
        lines.append(Line(label=result.policy, style=style, x=x, y=y))
    across = Axis(label="latency (ms)", high=slo * 1e3 * 1.04, format=number)
    up = Axis(label="part of all requests", high=1.0, format=whole_percent)
    return line_chart("latency", lines, across, up, HALF, [Mark("SLO", slo * 1e3, True)])


def _use_chart(group: Sequence[RunResult], styles: Sequence[str]) -> Element:
    lines = []
    for result, style in zip(group, styles, strict=True):
        gpus = result.gpus if result.scaler else sum(result.split) or result.gpus
        busy = [sum(second) / gpus for second in zip(*(stage.busy for stage in result.series.stages), strict=True)]
        lines.append(_over_time(result.policy, style, busy, 300))
    up = Axis(label="GPUs busy", high=1.0, format=whole_percent)
    return line_chart("GPU use", lines, _seconds(group[0]), up, HALF)


def _drops(group: Sequence[RunResult], styles: Sequence[str]) -> Element:
    stages = list(group[0].drops_by_stage)
    bars = []
    for result, style in zip(group, styles, strict=True):
        whole = result.submitted or 1
        segments = []
        for index, (stage, count) in enumerate(result.drops_by_stage.items()):
            title = f"{result.policy}: {count:,} at {stage}, {percent(count / whole)} of all requests"
            segments.append(Segment(f"g{index}", count / whole, title))
        other = result.drop_rate - sum(segment.value for segment in segments)
        if other > 1e-9:
            title = f"{result.policy}: {percent(other)} of all requests ended at no stage: rejected or unavailable"
            segments.append(Segment("other", other, title))
        bars.append(Bar(result.policy, style, segments, percent(result.drop_rate)))
    high = top_of((result.drop_rate for result in group), 0.01)
    keys = [
        element("span", element("span", class_=f"square g{index}"), stage) for index, stage in enumerate(stages)
    ] + [element("span", element("span", class_="square other"), "elsewhere")]
    return _figure(
        "Drops by stage",
        "Where requests ended that were not good, as a part of all requests. The later, the more GPU time was wasted.",
        element("div", *keys, class_="stages"),
        bar_chart("drops by stage", bars, Axis(label="part of all requests", high=high, format=whole_percent), WIDE),
    )


def _queued(stage: StageSeries) -> list[float]:
    return [wait if batch else math.nan for wait, batch in zip(stage.queued_ms, stage.batch, strict=True)]


def _batches(stage: StageSeries) -> list[float]:
    return [batch or math.nan for batch in stage.batch]


def _dropped(stage: StageSeries) -> list[float]:
    return [float(count) for count in stage.dropped]


def _small(
    group: Sequence[RunResult],
    styles: Sequence[str],
    title: str,
    caption: str,
    values: Callable[[StageSeries], list[float]],
    most: float = math.inf,
) -> Element:
    """One small chart a stage, all to the same scale, which ends at ``most`` at the latest."""
    by_stage: dict[str, list[Line]] = {}
    for result, style in zip(group, styles, strict=True):
        for stage in result.series.stages:
            line = _over_time(result.policy, style, values(stage), _SMALL_POINTS)
            by_stage.setdefault(stage.name, []).append(line)
    # Not the last point, which holds all that ended after the run and would flatten the rest.
    shown = (value for lines in by_stage.values() for line in lines for value in line.y[: max(len(line.y) - 1, 1)])
    high = min(top_of(shown, 1.0), most)
    up = Axis(label="", high=high, format=number)
    shape = small_shape(len(by_stage))
    charts = [
        element("div", element("h4", name), line_chart(f"{title}: {name}", lines, _seconds(group[0]), up, shape))
        for name, lines in by_stage.items()
    ]
    # A little less than its own width, so that scroll bars do not wrap the last chart of a row.
    return _figure(title, caption, element("div", *charts, class_="many", style=f"--least: {shape.width - 20}px"))


def _words() -> Element:
    words = [item for column in COLUMNS for item in (element("dt", column.head), element("dd", column.meaning))]
    return element(
        "footer",
        element("details", element("summary", "What the columns mean"), element("dl", *words, class_="words")),
        element("p", "Point at a chart for its values, at a policy above to single it out; untick it to hide it."),
    )
