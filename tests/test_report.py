"""The report of simulated runs: a file that stands alone, is well formed, and names what was run."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulation.markup import element, page
from simulation.plots import Axis, Line, Shape, binned, line_chart, number, percent, ticks, top_of
from simulation.report import render
from simulation.results import Latency, RunResult, Series, StageSeries, alike

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "input", "br", "link", "img", "hr"}


def result(
    policy: str, seconds: int = 20, stages: tuple[str, ...] = ("detect", "read"), **changes: object
) -> RunResult:
    offered = [100 + second % 7 for second in range(seconds)]
    good = [90] * seconds
    submitted = sum(offered)
    made = RunResult(
        policy=policy,
        pipeline="video",
        trace="poisson 0:20",
        seed=1,
        gpus=2 * len(stages),
        split=[2] * len(stages),
        seconds=float(seconds),
        capacity_rps=95.0,
        offered_rps=submitted / max(seconds, 1),
        submitted=submitted,
        outcomes={"ok": sum(good), "dropped": submitted - sum(good)},
        goodput_rps=90.0,
        bound_rps=95.0,
        bound_ratio=90 / 95,
        drop_rate=0.1,
        avoidable_drop_rate=0.05,
        invalid_rate=0.02,
        gpu_seconds_busy=30.0,
        gpu_seconds_allocated=80.0,
        gpu_seconds_floor=25.0,
        mean_batch=4.5,
        mean_batch_by_stage=dict.fromkeys(stages, 4.5),
        latency_ms=Latency(40.0, 90.0, 95.0),
        drops_by_stage=dict.fromkeys(stages, 50),
        latencies_ms=[0] * 40 + [sum(good)],
        series=Series(
            offered=offered,
            good=good,
            bound=[min(count, 95.0) for count in offered],
            stages=[
                StageSeries(
                    name, [1] * seconds, [5.0] * seconds, [0.0, *[4.0] * (seconds - 1)][:seconds], [1.5] * seconds
                )
                for name in stages
            ],
        ),
        wall_seconds=1.0,
        stage_visits=2 * submitted,
    )
    return msgspec.structs.replace(made, **changes)


class Balance(HTMLParser):
    """Fails where end tags do not match; collects texts, attributes and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def checked(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    for name, value in parser.attributes:
        assert not {"nan", "inf"} & set(re.split(r"[\s,ML]", value)), (name, value)
    return parser


def svgs(html: str) -> list[ElementTree.Element]:
    """The charts, parsed as XML."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg xmlns.*?</svg>(?=</figure>|</div>)", html, re.S)]


def test_it_names_what_was_run_and_shows_every_chart() -> None:
    html = render([result("laxity"), result("pard:lambda=0.2")], {"video": 0.1}, "laxity simulate video")
    texts = checked(html).texts
    for text in ("laxity", "pard:lambda=0.2", "detect", "read", "laxity simulate video", "Drops by stage", "95 req/s"):
        assert any(text in found for found in texts), text
    # Load, latency, use and drops, and three of each stage.
    assert len(svgs(html)) == 4 + 3 * 2
    curves = [node.get("class") for node in svgs(html)[0].iter(f"{SVG}path")]
    assert sorted(map(str, curves)) == ["area load", "curve bound", "curve p0", "curve p1"]


def test_it_needs_nothing_from_elsewhere() -> None:
    html = render([result("laxity")], {"video": 0.1})
    attributes = checked(html).attributes
    assert not [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
    assert not re.search(r"<script|<link|@import|url\(|javascript:|https?://(?!www\.w3\.org/2000/svg)", html)


def test_whatever_a_text_holds_it_stays_text() -> None:
    evil = '<script>alert("1")</script>&amp;'
    html = render([result(evil, stages=(evil, "b"), pipeline=evil, trace=evil)], {evil: 0.1}, f"laxity simulate {evil}")
    parser = checked(html)
    assert "script" not in parser.tags
    assert sum(evil in text for text in parser.texts) > 10


@pytest.mark.parametrize("seconds", [0, 1, 2])
def test_short_runs(seconds: int) -> None:
    checked(render([result("laxity", seconds), result("pard", seconds)], {"video": 0.1}))


def test_a_run_without_a_good_request() -> None:
    none = result(
        "naive",
        latencies_ms=[],
        latency_ms=Latency(0.0, 0.0, 0.0),
        gpu_seconds_floor=0.0,
        gpu_seconds_allocated=0.0,
        capacity_rps=0.0,
        submitted=0,
        drop_rate=0.0,
        drops_by_stage={"detect": 0, "read": 0},
    )
    assert "–" in checked(render([none], {"video": 0.1})).texts


def test_pipelines_and_loads_have_sections_of_their_own_and_a_policy_one_colour() -> None:
    runs = [result("a"), result("b"), result("b", pipeline="other"), result("b", 30)]
    assert [[run.policy for run in group] for group in alike(runs)] == [["a", "b"], ["b"], ["b"]]
    html = render(runs, {"video": 0.1, "other": 0.2})
    assert html.count("<section>") == 3
    first_charts = [svgs(section)[0] for section in html.split("<section>")[1:]]
    assert ["p1" in ElementTree.tostring(chart, encoding="unicode") for chart in first_charts] == [True] * 3
    assert "p0" not in ElementTree.tostring(first_charts[1], encoding="unicode")


def test_the_best_of_a_column_is_marked() -> None:
    html = render([result("a", goodput_rps=1234.0), result("b", goodput_rps=99.0)], {"video": 0.1})
    assert '<td class="best">1,234</td>' in html
    assert "<td>99</td>" in html
    assert 'class="best"' not in render([result("a")], {"video": 0.1})


def test_gpus_in_a_pool() -> None:
    html = render([result("laxity", split=[], gpus=4)], {"video": 0.1})
    assert "each serves every stage" in html
    checked(html)


def test_gpus_that_were_scaled_are_plotted_beside_those_that_the_load_takes() -> None:
    run = result("laxity", scaler="planner", moves=7, moves_per_hour=1260.0, gpus=9)
    series = msgspec.structs.replace(run.series, allocated=[4.0] * 20)
    html = render([msgspec.structs.replace(run, series=series)], {"video": 0.1})
    texts = checked(html).texts
    assert any("1,260 moves an hour" in text for text in texts)
    assert "scaled by the planner" in texts
    (chart,) = [svg for svg in svgs(html) if svg.get("aria-label") == "allocated GPUs"]
    assert sorted(str(node.get("class")) for node in chart.iter(f"{SVG}path")) == ["area load", "curve p0"]
    assert "all 9" in "".join(chart.itertext())


def test_gpus_beside_those_of_other_pipelines() -> None:
    texts = checked(render([result("laxity", gpus=9)], {"video": 0.1})).texts
    assert "2 + 2, of 9" in texts


def test_long_series_are_binned() -> None:
    html = render([result("laxity", 5000)], {"video": 0.1})
    (curve,) = [node for node in svgs(html)[0].iter(f"{SVG}path") if node.get("class") == "curve p0"]
    assert curve.get("d", "").count("L") < 600
    assert len(html) < 400_000


@given(st.lists(st.floats(0, 1e6) | st.just(math.nan), max_size=300), st.integers(1, 50))
def test_binning_keeps_the_whole_mean_and_order(values: list[float], most: int) -> None:
    x, y = binned(values, 10.0, most)
    assert len(x) == len(y) <= most
    assert x == sorted(x)
    assert all(0 < place < 10 for place in x)
    known = [value for value in values if not math.isnan(value)]
    for value in y:
        assert math.isnan(value) or min(known) - 1e-6 <= value <= max(known) + 1e-6


def test_bins_are_means_of_whole_values_without_gaps() -> None:
    assert binned([1.0, 3.0, math.nan, 5.0, 7.0], 5.0, 3) == ([1.0, 3.0, 4.5], [2.0, 5.0, 7.0])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 10))
def test_ticks_are_round_and_inside(low: float, width: float, count: int) -> None:
    high = low + width
    found = ticks(low, high, count)
    assert len(found) <= count + 1
    assert all(low - 1e-6 * width <= value <= high + 1e-6 * width for value in found)


def test_ticks() -> None:
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(0, 31, 4) == [0, 10, 20, 30]
    assert ticks(5, 5, 4) == [5]


def test_numbers() -> None:
    assert [number(value) for value in (0, 1.234, 12.34, 123.4, 12345.6)] == ["0", "1.23", "12.3", "123", "12,346"]
    assert percent(0.1234) == "12.3 %"
    assert top_of([math.nan], 3.0) == 3.0


def test_a_gap_divides_a_curve_and_what_lies_outside_is_cut_off() -> None:
    line = Line(label="a", style="p0", x=[0, 1, 2, 3, 4], y=[1, 2, math.nan, 900, 1])
    axis = Axis(label="s", high=4.0, format=number)
    chart = line_chart("t", [line], axis, Axis(label="v", high=10.0, format=number), Shape(300, 200, 4))
    paths = list(chart.iter("path"))
    assert len(paths) == 2
    (inner,) = [node for node in chart.iter("svg") if node.get("class") == "plot"]
    assert inner.get("overflow") == "hidden"
    assert all(path in list(inner) for path in paths)
    titles = ["".join(node.itertext()) for node in chart.iter("title")]
    assert titles[0] == "s: 0 to 1\na: 1"


def test_markup_joins_texts_and_elements_in_order() -> None:
    html = page("a & b", "p {}", element("p", "one ", element("b", "two"), " three", class_="x"))
    assert '<p class="x">one <b>two</b> three</p>' in html
    assert "<title>a &amp; b</title>" in html
    assert html.startswith('<!doctype html>\n<html lang="en">')
