"""A load's report: one HTML file that needs nothing else, to be opened in any browser, offline too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from cli.load.results import Figures, StepResult
from cli.load.tables import kind_name, label
from cli.load.tally import Bin
from laxity.outcomes import Outcome
from simulation.markup import Element, element, page
from simulation.plots import HALF, WIDE, Axis, Line, Mark, line_chart, number, percent, top_of
from simulation.style import style_sheet

_OUTCOMES: Final = (*(str(outcome) for outcome in Outcome), "not sent")
_COLOURS: Final = {
    "ok": ("#2f9e6a", "#46b983"),
    "dropped": ("#e0a020", "#e6b450"),
    "expired": ("#d1495b", "#e66a7a"),
    "rejected": ("#8b3fc7", "#b98af0"),
    "cancelled": ("#8a94a6", "#8a94a6"),
    "failed": ("#7a1f2b", "#b5303f"),
    "unavailable": ("#3d4654", "#c2cad6"),
    "not sent": ("#0b93a6", "#45cfe0"),
}
_LATENCIES: Final = {"p50": "median", "p90": "p90", "p99": "p99", "max": "longest"}


def render(results: Sequence[StepResult], title: str, about: Sequence[str], command: str) -> str:
    """The report's HTML. ``about`` are lines on what was done, ``command`` is what was run."""
    steps: list[Element] = []
    if len(results) > 1:
        steps.append(_overview(results))
    body = [
        element(
            "header",
            element("h1", f"Load test: {title}"),
            *(element("p", line, class_="soft") for line in about),
            element("pre", command),
        ),
        element("main", element("section", _table(results), class_="first"), *steps, *map(_section, results), _words()),
    ]
    return page(f"Load test: {title}", style_sheet(4, 1) + _style(), *body)


def _style() -> str:
    light = "".join(
        f".o-{_class(name)} {{ fill: {colours[0]}; background: {colours[0]}; }}\n" for name, colours in _COLOURS.items()
    )
    dark = "".join(
        f".o-{_class(name)} {{ fill: {colours[1]}; background: {colours[1]}; }}\n" for name, colours in _COLOURS.items()
    )
    return (
        "\n.first { margin-top: 18px; }\n.area { stroke: none; }\ntd.text { text-align: left; white-space: normal; }\n"
        f"th.text {{ text-align: left; }}\n{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"
    )


def _class(outcome: str) -> str:
    return outcome.replace(" ", "-")


def _figure(title: str, caption: str, *content: Element) -> Element:
    return element(
        "figure", element("figcaption", element("h3", title), element("p", caption)), *content, class_="card"
    )


# ---- all steps ---------------------------------------------------------------------------


_COLUMNS: Final[tuple[tuple[str, str, Callable[[Figures], str], str], ...]] = (
    ("offered", "req/s", lambda f: f"{f.offered_rps:,.1f}", "requests that were due, per second"),
    ("goodput", "req/s", lambda f: f"{f.goodput_rps:,.1f}", "requests answered within their budget, per second"),
    ("in SLO", "%", lambda f: percent(f.slo_attainment), "requests answered within their budget, of all offered"),
    ("dropped", "", lambda f: f"{f.outcomes['dropped']:,}", "given up early, as they would have missed their deadline"),
    ("expired", "", lambda f: f"{f.outcomes['expired']:,}", "missed their deadline"),
    (
        "other",
        "",
        lambda f: f"{sum(f.outcomes[name] for name in ('rejected', 'cancelled', 'failed', 'unavailable')):,}",
        "rejected, cancelled, failed or unavailable",
    ),
    ("not sent", "", lambda f: f"{f.unsent:,}", "not sent, as too many others were under way"),
    ("p50", "ms", lambda f: _shown(f, "p50"), "median latency of the good requests"),
    ("p90", "ms", lambda f: _shown(f, "p90"), "90th percentile of their latency"),
    ("p95", "ms", lambda f: _shown(f, "p95"), "95th percentile"),
    ("p99", "ms", lambda f: _shown(f, "p99"), "99th percentile"),
    ("p99.9", "ms", lambda f: _shown(f, "p999"), "99.9th percentile"),
    ("max", "ms", lambda f: _shown(f, "max"), "the longest"),
)


def _shown(figures: Figures, name: str) -> str:
    return f"{figures.latency_ms[name]:,.1f}" if figures.outcomes["ok"] else "–"


def _table(results: Sequence[StepResult]) -> Element:
    heads = [element("th", "load"), element("th", "requests", class_="text")]
    heads += [element("th", head, element("small", unit), title=meaning) for head, unit, _, meaning in _COLUMNS]
    rows = []
    for result in results:
        parts = [(figures.pipeline, figures) for figures in result.pipelines]
        if len(parts) > 1:
            parts.insert(0, ("all", result.total))
        parts += [(kind_name(figures), figures) for figures in result.kinds]
        for index, (name, figures) in enumerate(parts):
            cells = [element("td", "" if index else label(result)), element("td", name, class_="text")]
            rows.append(element("tr", *cells, *(element("td", show(figures)) for _, _, show, _ in _COLUMNS)))
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows))
    return element("div", table, class_="card wide")


def _overview(results: Sequence[StepResult]) -> Element:
    """How goodput and latency grow with the load."""
    closed = all(result.demand.concurrency is not None for result in results)
    loads = [float(result.demand.concurrency or result.total.offered_rps) for result in results]
    name = "requests at a time" if closed else "offered requests per second"
    across = Axis(label=name, high=top_of(loads, 1.0), format=number)
    good = [result.total.goodput_rps for result in results]
    lines = [Line(label="goodput", style="p0", x=loads, y=good)]
    if not closed:
        lines.append(Line(label="offered", style="bound", x=[0.0, loads[-1]], y=[0.0, loads[-1]]))
    up = Axis(label="good requests per second", high=top_of([*good, *([] if closed else loads)], 1.0), format=number)
    latencies = [
        Line(
            label=shown,
            style=f"p{index}",
            x=loads,
            y=[result.total.latency_ms[name] if result.total.outcomes["ok"] else math.nan for result in results],
        )
        for index, (name, shown) in enumerate(_LATENCIES.items())
        if name != "max"
    ]
    high = top_of((value for line in latencies for value in line.y), 1.0)
    return element(
        "div",
        _figure(
            "Goodput by load",
            "One point a step; dashed: all that was offered.",
            line_chart("goodput by load", lines, across, up, HALF),
        ),
        _figure(
            "Latency by load",
            "Of good requests.",
            _keys(latencies),
            line_chart(
                "latency by load", latencies, across, Axis(label="latency (ms)", high=high, format=number), HALF
            ),
        ),
        class_="pair",
    )


# ---- one step ----------------------------------------------------------------------------


def _section(result: StepResult) -> Element:
    return element(
        "section",
        element("h2", label(result)),
        _facts(result),
        _figure(
            "Goodput and offered load",
            "Requests per second, by when they were due; good are those answered within their budget.",
            element(
                "div",
                element("span", element("span", class_="key"), " good", class_="p0"),
                element("span", element("span", class_="key load"), " offered"),
                class_="stages",
            ),
            _load_chart(result),
        ),
        element(
            "div",
            _figure(
                "Outcomes",
                "What became of the requests that were due in each second.",
                element(
                    "div",
                    *(
                        element("span", element("span", class_=f"square o-{_class(name)}"), name)
                        for name in _present(result)
                    ),
                    class_="stages",
                ),
                _outcome_chart(result),
            ),
            _figure("Latency over time", "Of good requests, by when they were due.", *_latency_chart(result)),
            class_="pair",
        ),
        _figure(
            "Latency distribution",
            "How long the good requests took at most, by their part, on a scale of nines: the tail is on the right.",
            _curve(result),
        ),
        *_ends(result),
    )


def _facts(result: StepResult) -> Element:
    total = result.total
    facts = [
        ("measured", f"{number(result.seconds)} s", f"{number(total.submitted)} requests sent"),
        ("offered", f"{number(total.offered_rps)} req/s", ""),
        ("goodput", f"{number(total.goodput_rps)} req/s", f"{percent(total.slo_attainment)} in SLO"),
    ]
    if result.capacity_rps is not None:
        bound = "" if result.bound_ratio is None else f"{percent(result.bound_ratio)} of the fluid bound reached"
        facts.append(("capacity", f"{number(result.capacity_rps)} req/s", bound))
    facts.append(("generator's lag", f"{number(result.lag_ms['p99'])} ms", f"p99; longest {result.lag_ms['max']:.1f}"))
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", f"{value} ", element("small", more)))
            for name, value, more in facts
        ),
        class_="facts",
    )


def _times(result: StepResult) -> list[float]:
    width = result.series.width
    return [(index + 0.5) * width for index in range(len(result.series.bins))]


def _across(result: StepResult) -> Axis:
    series = result.series
    return Axis(label="time (s)", high=max(len(series.bins) * series.width, 1.0), format=number)


def _rates(result: StepResult, value: Callable[[Bin], int]) -> list[float]:
    """Per second; the last bin may have been shorter."""
    return [value(one) / result.series.width for one in result.series.bins]


def _load_chart(result: StepResult) -> Element:
    times = _times(result)
    offered = _rates(result, lambda one: one.offered)
    lines = [
        Line(label="good", style="p0", x=times, y=_rates(result, lambda one: one.outcomes[Outcome.OK])),
        Line(label="offered", style="load", x=times, y=offered, filled=True),
    ]
    marks = []
    high = top_of(offered, 1.0)
    if result.capacity_rps is not None and result.capacity_rps < 2 * high:
        marks.append(Mark(f"capacity {number(result.capacity_rps)}", result.capacity_rps, False))
        high = max(high, 1.08 * result.capacity_rps)
    up = Axis(label="requests per second", high=high, format=number)
    return line_chart("goodput and offered load", lines, _across(result), up, WIDE, marks)


def _count(one: Bin, outcome: str) -> int:
    return one.unsent if outcome == "not sent" else one.outcomes[Outcome(outcome)]


def _present(result: StepResult) -> list[str]:
    return [name for name in _OUTCOMES if any(_count(one, name) for one in result.series.bins)]


def _outcome_chart(result: StepResult) -> Element:
    """Areas on one another: each is drawn from the ground up to its own top, the lowest in front."""
    times = _times(result)
    if len(times) == 1:  # an area needs two points
        times = [0.0, result.series.width]
    tops = [0.0] * len(times)
    lines = []
    for name in _present(result):
        values = _rates(result, partial(_count, outcome=name))
        values = values * 2 if len(values) == 1 else values
        tops = [top + value for top, value in zip(tops, values, strict=True)]
        lines.append(Line(label=f"up to {name}", style=f"o-{_class(name)}", x=times, y=tops, filled=True))
    up = Axis(label="requests per second", high=top_of(tops, 1.0), format=number)
    return line_chart("outcomes", lines, _across(result), up, HALF)


def _keys(lines: Sequence[Line]) -> Element:
    keys = (element("span", element("span", class_="key"), f" {line.label}", class_=line.style) for line in lines)
    return element("div", *keys, class_="stages")


def _latency_chart(result: StepResult) -> list[Element]:
    parts = {"median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
    lines = []
    for index, (name, part) in enumerate(parts.items()):
        found = [one.latency.quantile(part) for one in result.series.bins]
        values = [math.nan if value is None else value / 1e3 for value in found]
        lines.append(Line(label=name, style=f"p{index}", x=_times(result), y=values))
    high = top_of((value for line in lines for value in line.y), 1.0)
    up = Axis(label="latency (ms)", high=high, format=number)
    return [_keys(lines), line_chart("latency over time", lines, _across(result), up, HALF)]


def _curve(result: StepResult) -> Element:
    good = result.total.outcomes["ok"]
    # Of so few requests no more nines can be told.
    nines = min(max(math.log10(good), 1.0), 5.0) if good else 1.0
    told = [(-math.log10(1.0 - part), ms) for part, ms in result.curve]
    told = [(place, ms) for place, ms in told if place <= nines + 1e-9]
    lines = [Line(label="at most", style="p0", x=[place for place, _ in told], y=[ms for _, ms in told])]
    across = Axis(label="part of the good requests", high=nines, format=_nines)
    up = Axis(label="latency (ms)", high=top_of(lines[0].y, 1.0), format=number)
    return line_chart("latency distribution", lines, across, up, WIDE)


def _nines(place: float) -> str:
    """'99.9 %' of 3."""
    return f"{100.0 * (1.0 - 10.0**-place):.{max(math.ceil(place - 1.001), 0)}f} %"


def _ends(result: StepResult) -> list[Element]:
    """What was not good, by stage and reason."""
    ends = result.total.ends
    if not ends and not result.total.unsent:
        return []
    whole = result.total.offered or 1
    heads = [element("th", name, class_="text") for name in ("stage", "outcome")]
    heads += [element("th", "requests"), element("th", "of all"), element("th", "the first of them", class_="text")]
    rows = [
        element(
            "tr",
            element("td", end.stage or "–"),
            element("td", element("span", class_=f"square o-{_class(end.outcome)}"), end.outcome, class_="text"),
            element("td", f"{end.requests:,}"),
            element("td", percent(end.requests / whole)),
            element("td", end.first, class_="text"),
        )
        for end in ends
    ]
    if result.total.unsent:
        cells = ["–", "not sent", f"{result.total.unsent:,}", percent(result.total.unsent / whole)]
        rows.append(element("tr", *(element("td", cell) for cell in cells), element("td", "too many were under way")))
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows))
    return [
        _figure(
            "Drops by stage and reason",
            "Where requests ended that were not good, and what was said of the first.",
            element("div", table, class_="wide"),
        )
    ]


def _words() -> Element:
    words = [item for head, _, _, what in _COLUMNS for item in (element("dt", head), element("dd", what))]
    return element(
        "footer",
        element("details", element("summary", "What the columns mean"), element("dl", *words, class_="words")),
        element("p", "Point at a chart for its values."),
    )
