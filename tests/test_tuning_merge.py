"""Reports of several shards as one state, whatever is wrong with some of them."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.records import decode, encode
from cluster.tuning.merge import believed, busiest, merge, sound
from cluster.tuning.report import DropReport, PipelineReport, ReportRecord, StageReport


def stage(model: str = "p@1/a", **fields: Any) -> StageReport:
    plain: dict[str, Any] = {
        "arrived": 0,
        "started": 0,
        "batches": 0,
        "dropped": 0,
        "waiting": 0,
        "devices": 0,
        "queued": 0.0,
        "execution": 0.0,
        "waits": [],
        "latency": {},
    }
    return StageReport(model, **{**plain, **fields})


def report(*stages: StageReport, number: int = 1, period: float = 1.0) -> ReportRecord:
    return ReportRecord(number, period, list(stages), {}, [])


def test_sums_rates_and_weighted_means() -> None:
    one = stage(
        arrived=100, started=90, batches=9, dropped=5, waiting=3, devices=2, queued=0.010, execution=0.1, waits=[1, 2]
    )
    other = stage(
        arrived=20, started=20, batches=2, dropped=0, waiting=1, devices=1, queued=0.120, execution=0.2, waits=[0, 0, 7]
    )
    merged = merge([report(one, period=1.0), report(other, period=2.0)])["p@1"]["a"]
    assert (merged.arrived, merged.started, merged.batches, merged.dropped) == (110.0, 100.0, 10.0, 5.0)
    assert (merged.waiting, merged.devices, merged.waits) == (4, 3, [1, 2, 7])
    assert merged.busy == pytest.approx(9 * 0.1 + 2 * 0.2 / 2)
    assert merged.queued == pytest.approx((90 * 0.010 + 20 * 0.120) / 110)
    assert merged.execution == pytest.approx((9 * 0.1 + 2 * 0.2) / 11)


def test_latencies_are_merged_by_device_type_and_batch() -> None:
    one = stage(latency={"a100": [(1, 0.01), (8, 0.04)]})
    other = stage(latency={"a100": [(8, 0.06)], "t4": [(1, 0.1)]})
    merged = merge([report(one), report(other)])["p@1"]["a"]
    assert merged.latency == {"a100": [(1, 0.01), (8, pytest.approx(0.05))], "t4": [(1, 0.1)]}


def test_versions_stay_apart_and_the_busiest_counts() -> None:
    old, new = stage("p@1/a", arrived=3), stage("p@2/a", arrived=5)
    states = merge([report(old, new), report(stage("q@1/a"))])
    assert set(states) == {"p@1", "p@2", "q@1"}
    assert busiest(states)["p"]["a"].arrived == 5
    assert set(busiest(states)) == {"p", "q"}


def test_stages_keep_their_order() -> None:
    states = merge([report(stage("p@1/z"), stage("p@1/a")), report(stage("p@1/a"))])
    assert list(states["p@1"]) == ["z", "a"]


@pytest.mark.parametrize("period", [0.0, -1.0, math.nan, math.inf])
def test_a_report_about_no_time_is_left_out(period: float) -> None:
    assert merge([report(stage(arrived=1), period=period)]) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "p@1"},
        {"model": "/a"},
        {"model": "p@1/"},
        {"arrived": -1},
        {"devices": -5},
        {"dropped": 10**15},
        {"queued": math.nan},
        {"execution": math.inf},
        {"execution": -0.1},
        {"waits": [1, -1]},
        {"waits": [0] * 1000},
        {"latency": {"t4": [(-1, 0.1)]}},
        {"latency": {"t4": [(1, math.nan)]}},
    ],
)
def test_impossible_figures_are_left_out_alone(wrong: dict[str, Any]) -> None:
    assert not sound(stage(**wrong))
    states = merge([report(stage(**wrong), stage("p@1/b", arrived=7))])
    assert {name: list(stages) for name, stages in states.items()} == {"p@1": ["b"]}


NUMBERS = st.integers(-(10**18), 10**18)
SECONDS = st.floats(allow_nan=True)
OUTCOMES = st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2)


@given(
    st.lists(
        st.builds(
            ReportRecord,
            NUMBERS,
            SECONDS,
            st.lists(
                st.builds(
                    StageReport,
                    st.sampled_from(["p@1/a", "p@1/b", "q", "", "@/", "p/@1/c"]),
                    *[NUMBERS] * 6,
                    SECONDS,
                    SECONDS,
                    st.lists(NUMBERS, max_size=3),
                    st.dictionaries(st.text(max_size=3), st.lists(st.tuples(NUMBERS, SECONDS), max_size=2), max_size=2),
                    st.just({}),
                    st.tuples(SECONDS, SECONDS),
                    SECONDS,
                    st.text(max_size=3),
                ),
                max_size=4,
            ),
            st.just({}),
            st.just([]),
            st.lists(st.builds(PipelineReport, st.text(max_size=3), NUMBERS, OUTCOMES), max_size=2),
            st.lists(st.builds(DropReport, *[st.text(max_size=3)] * 5, SECONDS), max_size=2),
        ),
        max_size=4,
    )
)
def test_whatever_is_reported_what_comes_of_it_is_possible(reports: list[ReportRecord]) -> None:
    kept = [believed("s", report) for report in reports]
    assert [(one.pipelines, one.drops) for one in kept] == [(one.pipelines, one.drops) for one in reports], "for people"
    assert all(sound(stage) for one in kept for stage in one.stages)
    for stages in merge(reports).values():
        for state in stages.values():
            figures = [state.arrived, state.started, state.dropped, state.busy, state.queued, state.execution]
            assert all(math.isfinite(figure) and figure >= 0.0 for figure in figures)


def test_a_report_survives_the_store() -> None:
    sent = report(stage(arrived=3, waits=[0, 1], latency={"t4": [(1, 0.5)]}, slack=(0.01, 0.02), order="hbf"))
    sent.pipelines.append(PipelineReport("p", 3, {"ok": 2, "dropped": 1}, (0.1, 0.2)))
    sent.drops.append(DropReport("c-1", "p", "a", "dropped", "too late by 5 ms", 0.5))
    assert decode(ReportRecord, "/laxity/c/reports/s", encode(sent)) == sent
    with pytest.raises(ValueError, match="cannot be read"):
        decode(ReportRecord, "/laxity/c/reports/s", msgspec.json.encode({"number": 1}))
