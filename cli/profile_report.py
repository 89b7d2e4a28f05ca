"""The report of ``laxity profile``: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from cli.profile_tables import milliseconds
from nodes.meter import StageTimes
from pipelines import PipelineSpec, format_duration
from simulation.markup import Element, element, page
from simulation.plots import Axis, Line, Shape, line_chart, number, top_of
from simulation.style import style_sheet

_HALF = Shape(590, 290, 0, left=78)
_STYLE = """
.curve.point { stroke-width: 7; } .curve.p99 { stroke-width: 1; opacity: .7; }
"""
_HEADS = ("batch", "runs", "median ms", "p99 ms", "worst ms", "inputs ms", "per second")


def render(spec: PipelineSpec, measured: Sequence[StageTimes], host: str, command: str) -> str:
    """A page with two charts and a table for each stage; a device type has the same colour throughout."""
    types = list(dict.fromkeys(times.device_type for times in measured))
    title = f"{spec.name}: measured latencies"
    body = [
        element(
            "header",
            element("h1", title),
            element("p", f"On {host}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; SLO {format_duration(spec.slo)}"),
            element("pre", command),
        ),
        element(
            "main",
            *(
                _stage(stage, [times for times in measured if times.stage == stage], types)
                for stage in dict.fromkeys(times.stage for times in measured)
            ),
            element(
                "footer",
                "Latency: from the start of a batch's execution until its answers are there. The line αb + β is the "
                "least-squares fit to the medians.",
            ),
        ),
    ]
    return page(title, style_sheet(len(types), 1) + _STYLE, *body)


def _stage(stage: str, measured: Sequence[StageTimes], types: Sequence[str]) -> Element:
    return element(
        "section",
        element("h2", stage),
        element("div", _latency(stage, measured, types), _throughput(stage, measured, types), class_="pair"),
        *(_table(times, types.index(times.device_type)) for times in measured),
    )


def _latency(stage: str, measured: Sequence[StageTimes], types: Sequence[str]) -> Element:
    lines: list[Line] = []
    for times in measured:
        batches = [float(each.batch) for each in times.batches]
        style = f"p{types.index(times.device_type)}"
        median = [1e3 * each.median for each in times.batches]
        p99 = [1e3 * each.p99 for each in times.batches]
        # From an empty batch on: where the line meets the axis is β.
        ends = [0.0, batches[-1]]
        fit = [1e3 * times.fit().seconds(end) for end in ends]
        lines += [
            *_points(style, batches, median),
            Line(label="median", style=style, x=batches, y=median),
            Line(label="p99", style=f"{style} p99", x=batches, y=p99),
            Line(label="αb + β", style="bound", x=ends, y=fit),
        ]
    y = Axis(label="latency in ms", high=top_of((value for line in lines for value in line.y), 1.0), format=number)
    chart = line_chart(f"latency of {stage}", lines, _batch_axis(measured), y, _HALF)
    return _figure("Latency", "Median, 99th percentile (thin), and αb + β (dashed)", chart)


def _throughput(stage: str, measured: Sequence[StageTimes], types: Sequence[str]) -> Element:
    lines: list[Line] = []
    for times in measured:
        batches = [float(each.batch) for each in times.batches]
        style = f"p{types.index(times.device_type)}"
        rates = [each.throughput for each in times.batches]
        lines += [*_points(style, batches, rates), Line(label="throughput", style=style, x=batches, y=rates)]
    y = Axis(
        label="elements per second", high=top_of((value for line in lines for value in line.y), 1.0), format=number
    )
    chart = line_chart(f"throughput of {stage}", lines, _batch_axis(measured), y, _HALF)
    return _figure("Throughput", "Of batches at the median latency", chart)


def _points(style: str, x: Sequence[float], y: Sequence[float]) -> list[Line]:
    """A dot at each place."""
    return [Line(label="", style=f"{style} point", x=[across], y=[up]) for across, up in zip(x, y, strict=True)]


def _batch_axis(measured: Sequence[StageTimes]) -> Axis:
    largest = max(each.batch for times in measured for each in times.batches)
    return Axis(label="batch", high=1.03 * largest, format=number)


def _figure(title: str, caption: str, chart: Element) -> Element:
    said = element("figcaption", element("h3", title), element("p", caption))
    return element("figure", said, chart, class_="card", style="margin: 0 0 16px")


def _table(times: StageTimes, colour: int) -> Element:
    fit = times.fit()
    sign = "+" if fit.beta >= 0 else "−"
    memory = f", {times.memory_mb:,.1f} MB of its memory" if times.memory_mb else ""
    heading = element(
        "p",
        element("span", class_="key"),
        f" {times.device_type}: {milliseconds(fit.alpha)} ms · b {sign} {milliseconds(abs(fit.beta))} ms, off by up to "
        f"{fit.error:.1%}; loaded in {milliseconds(times.load_seconds)} ms{memory}",
        class_=f"p{colour}",
    )
    rows = [
        element(
            "tr",
            element("td", str(each.batch)),
            element("td", str(len(each.latency))),
            *(element("td", milliseconds(value)) for value in (each.median, each.p99, each.worst, each.inputs_median)),
            element("td", f"{each.throughput:,.1f}"),
        )
        for each in times.batches
    ]
    head = element("tr", *(element("th", text) for text in _HEADS))
    return element("div", heading, element("table", head, *rows), class_="card wide")
