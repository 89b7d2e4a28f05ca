"""What the tuner finds right: window by burstiness, λ by what is wasted and what is turned away, admission."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.records import TuningRecord
from cluster.tuning.admission import HEADROOM, LASTS, LEAST, STEP, AdmissionTuner
from cluster.tuning.merge import StageState
from cluster.tuning.quantile import HIGHEST, LOWEST, START, QuantileTuner, chance, early_drops, late_drops
from cluster.tuning.report import ReportRecord, StageReport
from cluster.tuning.sketch import sketch
from cluster.tuning.tuner import FORGOTTEN, HELD, Tuner
from cluster.tuning.window import KNOWN_AFTER, TURNS, WindowTuner
from cluster.tuning.window import START as START_WINDOW

# ---- window ----------------------------------------------------------------------------------------


def window(rates: list[float]) -> WindowTuner:
    tuner = WindowTuner()
    for rate in rates:
        tuner.observe(rate)
    return tuner


def two_rates(variation: float, mean: float = 1e5) -> list[float]:
    """Sixty seconds whose rates stray from their mean by ``variation`` of it; so many that Poisson noise is nothing."""
    return [mean * (1.0 + variation * (1 if second % 2 else -1)) for second in range(60)]


@pytest.mark.parametrize(
    ("variation", "least", "most"), [(0.05, 5.0, 7.0), (0.45, 5.0, 7.0), (0.75, 3.0, 5.0), (0.99, 3.0, 5.0)]
)
def test_the_window_follows_the_variation(variation: float, least: float, most: float) -> None:
    tuner = window(two_rates(variation))
    assert tuner.variation == pytest.approx(variation, rel=0.01)
    assert least <= tuner.seconds <= most


def test_bursts_have_the_shortest_window() -> None:
    """One second in nine is busy: CV 2.8."""
    assert window([9e5 if second % 9 == 0 else 0.0 for second in range(60)]).seconds < 1.0 + TURNS
    assert 1.0 <= window([3e5 if second % 3 == 0 else 0.0 for second in range(60)]).seconds <= 3.0


def test_what_a_slow_steady_stream_varies_by_is_no_burst() -> None:
    rates = np.random.default_rng(1).poisson(2.0, 60).tolist()
    assert np.std(rates) / np.mean(rates) > 0.5
    assert window(rates).seconds >= 5.0


def test_the_window_waits_for_something_to_go_by_and_does_not_turn_to_and_fro() -> None:
    tuner = window([1e5, 0.0] * (KNOWN_AFTER // 2 - 1))
    assert tuner.seconds == START_WINDOW
    tuner = window(two_rates(0.75))
    for variation in (0.76, 0.74, 0.78, 0.72):
        before = tuner.seconds
        for rate in two_rates(variation):
            tuner.observe(rate)
        assert tuner.seconds == before
    assert TURNS > 0.0


@given(st.lists(st.floats(0.0, 1e6), max_size=80))
def test_the_window_stays_within_its_range(rates: list[float]) -> None:
    assert 1.0 <= window(rates).seconds <= 7.0


# ---- λ -----------------------------------------------------------------------------------------------


def state(**fields: Any) -> StageState:
    plain: dict[str, Any] = {
        "arrived": 100.0,
        "started": 100.0,
        "batches": 10.0,
        "dropped": 0.0,
        "waiting": 0,
        "devices": 4,
        "busy": 3.0,
        "queued": 0.0,
        "execution": 0.1,
        "waits": sketch(np.linspace(0.0, 0.1, 200).tolist()),
        "latency": {},
    }
    return StageState(**{**plain, **fields})


def settled(*stages: StageState) -> QuantileTuner:
    tuner = QuantileTuner()
    for _ in range(200):
        tuner.observe(stages)
    return tuner


def test_without_drops_lambda_stays_where_it_starts() -> None:
    assert settled(state(), state(), state()).quantile == START
    assert (
        settled(state(arrived=0.0, started=0.0, busy=0.0), state(arrived=0.0, started=0.0, busy=0.0)).quantile == START
    )


def test_work_that_is_dropped_late_raises_it() -> None:
    assert settled(state(), state(), state(dropped=20.0)).quantile > 0.9 * HIGHEST


def test_turning_away_who_would_have_made_it_lowers_it() -> None:
    assert settled(state(dropped=60.0, arrived=160.0), state(busy=1.0)).quantile < START
    # Without an idle device they would not have.
    full = settled(state(dropped=60.0, arrived=160.0, busy=4.0), state(busy=4.0))
    assert full.early == 0.0


def test_late_drops_by_hand() -> None:
    """Three stages of 30, 20 and 50 ms a request. Dropped at the second: 30 of 100 ms are gone; at the third: 50."""
    stages = [state(busy=3.0), state(busy=2.0, dropped=10.0), state(busy=5.0, dropped=4.0)]
    assert late_drops(stages) == pytest.approx(10 * 0.3 + 4 * 0.5)


def test_early_drops_are_bounded_by_idle_devices() -> None:
    """The tightest stage has 0.4 of 4 devices idle: a ninth more requests than it runs."""
    stages = [state(busy=3.6, dropped=5.0), state(busy=2.0)]
    few = early_drops(stages, 0.1)
    stages[0] = state(busy=3.6, dropped=500.0)
    assert early_drops(stages, 0.1) == pytest.approx(few * (100.0 * 0.4 / 3.6) / 5.0)


def test_the_chance_of_those_turned_away() -> None:
    """Batch waits even over 0 to 1 s behind one stage: F is even below λ, with λ/2 as its mean; behind two stages
    F = x²/2, a mean of λ/3."""
    even = state(execution=1.0, waits=sketch(np.linspace(0.0, 1.0, 20_000).tolist()))
    assert chance([even], 0.2) == pytest.approx(0.1, abs=0.015)
    assert chance([even, even], 0.2) == pytest.approx(0.2 / 3, abs=0.015)
    assert chance([], 0.2) == 0.0
    assert chance([state(execution=0.0)], 0.2) == 0.0


STATES = st.builds(
    state,
    arrived=st.floats(0.0, 1e5),
    started=st.floats(0.0, 1e5),
    batches=st.floats(0.0, 1e4),
    dropped=st.floats(0.0, 1e5),
    devices=st.integers(0, 64),
    busy=st.floats(0.0, 64.0),
    execution=st.floats(0.0, 5.0),
    waits=st.lists(st.integers(0, 1000), max_size=64),
)


@settings(max_examples=50)
@given(st.lists(st.lists(STATES, min_size=3, max_size=3), min_size=1, max_size=12))
def test_whatever_happens_lambda_and_admission_stay_within_their_ranges(seconds: list[list[StageState]]) -> None:
    quantile, admission = QuantileTuner(), AdmissionTuner()
    for stages in seconds:
        quantile.observe(stages)
        admission.observe(dict(zip("abc", stages, strict=True)))
        assert LOWEST <= quantile.quantile <= HIGHEST
        assert LEAST <= admission.admission <= 1.0
        assert (admission.admission < 1.0) <= (admission.limit in ("b", "c"))


# ---- admission ---------------------------------------------------------------------------------------

FULL = state(arrived=1000.0, started=400.0, dropped=500.0, busy=3.95)
"""A stage that can run 400 of 1,000 a second."""


def admitting(
    first: StageState, second: StageState, seconds: int, tuner: AdmissionTuner | None = None
) -> AdmissionTuner:
    tuner = tuner or AdmissionTuner()
    for _ in range(seconds):
        tuner.observe({"first": first, "second": second})
    return tuner


FIRST = state(arrived=1000.0, started=1000.0)


def test_nothing_is_held_back_before_it_has_lasted() -> None:
    assert admitting(FIRST, FULL, LASTS - 1).admission == 1.0
    begun = admitting(FIRST, FULL, LASTS)
    assert begun.admission == pytest.approx(1.0 - STEP)
    assert begun.limit == "second"


def held_back() -> AdmissionTuner:
    """After a minute with 1,000 requests a second and a second stage that can run 400."""
    tuner = AdmissionTuner()
    for _ in range(60):
        comes = 1000.0 * tuner.admission
        full = state(arrived=comes, started=400.0, dropped=comes - 400.0, busy=3.95)
        tuner.observe({"first": FIRST, "second": full})
    return tuner


def test_more_is_let_in_than_the_stage_takes() -> None:
    """What arrives at it falls with what is let in; what it takes does not."""
    tuner = held_back()
    assert tuner.admission == pytest.approx(HEADROOM * 0.4, rel=0.02)
    assert tuner.limit == "second"


@pytest.mark.parametrize(
    "relief",
    [
        {"busy": 3.0},  # a device is idle
        {"dropped": 0.0},
        {"devices": 5, "busy": 4.9},  # it got another one
    ],
)
def test_all_are_let_in_again_at_once(relief: dict[str, Any]) -> None:
    tuner = held_back()
    assert tuner.admission < 0.6
    admitting(FIRST, state(**{"arrived": 1000.0, "started": 400.0, "dropped": 500.0, "busy": 3.95, **relief}), 1, tuner)
    assert tuner.admission == 1.0
    assert tuner.limit == ""


def test_fewer_requests_are_all_let_in_at_once() -> None:
    tuner = held_back()
    draining = state(arrived=520.0, started=400.0, dropped=100.0, busy=3.95)
    admitting(state(arrived=450.0, started=450.0), draining, 1, tuner)
    assert tuner.admission == 1.0


@pytest.mark.parametrize(
    "second",
    [
        state(arrived=1000.0, started=950.0, dropped=50.0, busy=3.95),  # it nearly keeps up: the drop sees to the rest
        state(arrived=1000.0, started=400.0, dropped=600.0, busy=2.0),  # it drops for another reason than devices
        state(arrived=1000.0, started=0.0, dropped=600.0, busy=0.0, devices=0),  # and here nobody is known to come back
    ],
)
def test_what_is_no_lasting_shortage_of_devices_holds_nothing_back(second: StageState) -> None:
    assert admitting(FIRST, second, 30).admission == 1.0


def test_the_first_stage_is_no_reason() -> None:
    tuner = AdmissionTuner()
    for _ in range(30):
        tuner.observe({"first": FULL, "second": state()})
    assert tuner.admission == 1.0


# ---- the whole ---------------------------------------------------------------------------------------


def report(number: int, *stages: tuple[str, int], queued: float = 0.010) -> ReportRecord:
    """A second with so many requests at each model."""
    parts = [StageReport(model, n, n, n // 10, 0, 0, 4, queued, 0.05, [], {}) for model, n in stages]
    return ReportRecord(number, 1.0, parts, {}, [])


def test_a_pipeline_is_tuned_over_all_shards() -> None:
    tuner = Tuner()
    for second in range(20):
        tuner.observe(
            float(second),
            {
                "s0": report(second + 1, ("p@1/a", 300), ("p@1/b", 300), queued=0.010),
                "s1": report(second + 1, ("p@1/a", 100), ("p@1/b", 100), queued=0.050),
            },
        )
    record = tuner.tuning(19.0)["p"]
    assert record == TuningRecord(0.1, record.history, 1.0, {"a": pytest.approx(0.020), "b": pytest.approx(0.020)})
    assert 5.0 <= record.history <= 7.0


def test_a_shard_that_goes_on_saying_the_same_is_gone() -> None:
    tuner = Tuner()
    stale = report(7, ("p@1/a", 100))
    tuner.observe(0.0, {"s0": stale})
    assert "p" in tuner.tuning(0.0)
    for second in range(1, 10):
        tuner.observe(float(second), {"s0": stale})
    assert tuner.tuning(9.0) == {}
    # Its successor under the same name begins anew.
    tuner.observe(10.0, {"s0": report(1, ("p@1/a", 100))})
    assert "p" in tuner.tuning(10.0)


def test_one_shard_being_late_changes_nothing_for_a_while() -> None:
    tuner = Tuner()
    late = report(5, ("p@1/a", 5000))
    for second in range(15):
        now = float(second)
        tuner.observe(
            now,
            {
                "s0": report(second, ("p@1/a", 5000)),
                "s1": late if HELD - 1.0 <= now < HELD else report(second + 100, ("p@1/a", 5000)),
            },
        )
    assert tuner.tuning(14.0)["p"].history > 6.0


def test_without_reports_nothing_is_told_and_at_last_all_is_forgotten() -> None:
    tuner = Tuner()
    tuner.observe(0.0, {"s0": report(1, ("p@1/a", 100))})
    tuner.observe(HELD + 1.0, {})
    assert tuner.tuning(HELD + 1.0) == {}
    tuner.observe(FORGOTTEN + 1.0, {})
    tuner.observe(FORGOTTEN + 2.0, {"s0": report(2, ("p@1/a", 100), queued=0.5)})
    assert tuner.tuning(FORGOTTEN + 2.0)["p"].queued == {"a": 0.5}


def test_of_two_versions_the_one_that_requests_go_to_counts() -> None:
    tuner = Tuner()
    tuner.observe(0.0, {"s0": report(1, ("p@1/a", 3), ("p@2/x", 100))})
    assert set(tuner.tuning(0.0)["p"].queued) == {"x"}
