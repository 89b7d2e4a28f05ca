"""Predicted execution: profile, latest measurements, expiry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.engine.predictor import APART, EXPIRES, FEWEST, GAIN, KEPT, LatencyTable


def linear(alpha: float, beta: float, max_batch: int = 8) -> LatencyTable:
    return LatencyTable(max_batch, [(1, alpha + beta), (max_batch, alpha * max_batch + beta)])


def test_the_profile_holds_before_the_first_measurement() -> None:
    table = linear(0.010, 0.005)
    assert [table.upper(batch) for batch in (1, 2, 8)] == pytest.approx([0.015, 0.025, 0.085])
    assert table.mean(4) == pytest.approx(0.045)


def test_batches_above_the_largest_count_as_the_largest() -> None:
    table = linear(0.010, 0.005)
    assert table.upper(9) == table.upper(8)
    assert table.mean(100) == table.mean(8)


def test_the_bound_is_the_worst_of_the_latest_and_the_mean_their_mean() -> None:
    table = linear(0.010, 0.005)
    for number in range(KEPT):
        table.observe(float(number) / 100, 2, 0.030 + number / 1000)
    assert table.upper(2) == pytest.approx(0.039)
    assert table.mean(2) == pytest.approx(0.0345)
    for _ in range(KEPT):
        table.observe(0.2, 2, 0.020)
    assert table.upper(2) == pytest.approx(0.020)
    assert table.mean(2) == pytest.approx(0.020)


def test_observe_says_whether_a_bound_changed() -> None:
    table = linear(0.010, 0.005)
    assert table.observe(0.0, 1, 0.030)
    assert not table.observe(0.1, 1, 0.020)
    assert not table.observe(0.2, 9, 1.0)
    assert not table.observe(0.2, 0, 1.0)


def test_measurements_of_one_size_scale_the_others() -> None:
    table = linear(0.010, 0.0)
    table.observe(0.0, 2, 0.040)  # twice what the profile says
    assert table.upper(1) == table.mean(1) == pytest.approx(0.020)
    assert table.upper(4) == pytest.approx(0.080)
    assert table.mean(4) == pytest.approx(0.080)


def test_a_size_is_scaled_by_the_nearest_measured_one() -> None:
    table = linear(0.010, 0.0, 16)
    for seconds in (0.030, 0.050):
        table.observe(0.0, 2, seconds)
    for seconds in (0.200, 0.280):
        table.observe(0.0, 16, seconds)
    assert [table.mean(size) for size in (1, 4, 12)] == pytest.approx([0.020, 0.080, 0.180])
    # The bounds: of what lies above, and the mean of what lies below a measured size.
    assert [table.upper(size) for size in (1, 4, 12)] == pytest.approx([0.020, 0.100, 0.180])


def test_one_measurement_far_above_the_others_is_left_out_until_there_is_another() -> None:
    table = linear(0.010, 0.0)
    for seconds in (0.010, 0.011, 0.030):
        table.observe(0.0, 1, seconds)
    assert table.upper(1) == pytest.approx(0.011)
    assert table.mean(1) == pytest.approx(0.0105)
    table.observe(0.0, 1, 0.030)
    assert table.upper(1) == pytest.approx(0.030)
    assert table.mean(1) == pytest.approx(0.081 / 4)


def test_a_larger_batch_is_never_predicted_to_be_faster() -> None:
    table = linear(0.010, 0.005)
    table.observe(0.0, 3, 0.035)
    table.observe(0.0, 4, 0.001)
    assert table.upper(4) == table.upper(3) == pytest.approx(0.035)
    assert table.mean(4) == pytest.approx(0.001)


def test_an_outlier_is_forgotten_after_a_while() -> None:
    table = linear(0.010, 0.005)
    table.observe(0.0, 1, 60.0)
    assert table.upper(8) >= 60.0
    table.expire(EXPIRES - 0.001)
    assert table.upper(1) == 60.0
    table.expire(EXPIRES)
    assert table.upper(1) == pytest.approx(0.015)
    assert table.mean(1) == pytest.approx(0.015)
    assert table.upper(8) == pytest.approx(0.085)


def test_what_is_left_after_expiry_counts() -> None:
    table = linear(0.010, 0.005)
    table.observe(0.0, 1, 0.100)
    table.observe(5.0, 1, 0.020)
    table.expire(EXPIRES + 1.0)
    assert table.upper(1) == pytest.approx(0.020)
    assert table.mean(1) == pytest.approx(0.020)


def test_nothing_is_assumed_of_a_model_without_profile() -> None:
    table = LatencyTable(32, [])
    assert table.upper(1) == table.upper(32) == table.mean(7) == 0.0


def test_without_profile_larger_batches_are_nearly_in_proportion_to_what_was_measured() -> None:
    table = LatencyTable(32, [])
    table.observe(0.0, 1, 0.050)
    assert table.upper(1) == pytest.approx(0.050)
    assert table.upper(2) == pytest.approx(0.050 * 2 * GAIN)
    assert table.upper(32) == pytest.approx(0.050 * 32 * GAIN)
    table.observe(0.0, 4, 0.060)
    assert table.upper(2) == pytest.approx(0.050 * 2 * GAIN)
    assert table.upper(4) >= table.upper(3)
    assert table.upper(8) == pytest.approx(table.upper(4) * 2 * GAIN)


def test_a_profile_of_zero_is_a_profile() -> None:
    table = LatencyTable(4, [(1, 0.0), (4, 0.0)])
    table.observe(0.0, 1, 0.001)
    assert [table.upper(batch) for batch in range(1, 5)] == [0.001] * 4


def test_a_table_can_be_extended_to_larger_batches() -> None:
    table = LatencyTable(2, [(1, 0.015), (2, 0.025)])
    table.observe(0.0, 1, 0.030)
    table.extend(8)
    assert table.max_batch == 8
    assert table.upper(8) == pytest.approx(0.085 * 2)
    table.extend(4)
    assert table.max_batch == 8


def test_execution_is_told_apart_from_what_comes_before_and_after_it() -> None:
    table = linear(0.010, 0.0)
    assert (table.busy(2), table.input(2)) == (table.mean(2), 0.0)
    table.observe(0.0, 2, 0.040, 0.004, 0.003)
    assert table.upper(2) == table.mean(2) == pytest.approx(0.044)
    assert table.busy(2) == pytest.approx(0.040)
    assert table.busy(4) == pytest.approx(0.080)  # outputs grow with the batch
    assert table.input(2) == pytest.approx(0.003)
    assert table.measured() == [(2, pytest.approx(0.044))]


def test_inputs_are_foreseen_by_their_slope() -> None:
    table = linear(0.010, 0.0, 32)
    for number in range(400):
        batch = (1, 8, 32)[number % 3]
        table.observe(number / 100, batch, 0.010 * batch, 0.0, 0.001 + 0.0005 * batch)
    assert table.input(16) == pytest.approx(0.009, rel=0.05)


def test_one_slow_input_is_left_out_and_another_counts_until_it_is_old() -> None:
    table = linear(0.010, 0.0)
    for number in range(KEPT):
        table.observe(number / 100, 1, 0.010, 0.0, 0.001)
    table.observe(0.2, 1, 0.010, 0.0, 3.0)
    assert table.input(1) == pytest.approx(0.001)
    table.observe(0.3, 1, 0.010, 0.0, 3.0)
    assert table.input(1) == pytest.approx(3.0)
    table.expire(0.3 + EXPIRES)
    assert table.input(1) == 0.0


def test_a_probe_tells_anew_what_inputs_take() -> None:
    table = linear(0.010, 0.0)
    table.observe(0.0, 1, 0.010, 0.0, 3.0)
    table.forget(1)
    table.observe(1.0, 1, 0.010, 0.0, 0.001)
    assert table.input(1) == pytest.approx(0.001)


def test_a_larger_batch_may_have_a_longer_input() -> None:
    """The second of them says that it is no outlier."""
    table = linear(0.010, 0.0)
    for number in range(4):
        table.observe(number / 100, 1, 0.010, 0.0, 0.001)
    for number in range(2):
        table.observe(1.0 + number, 8, 0.010, 0.0, 0.008)
    assert table.input(8) == pytest.approx(0.008)
    assert table.input(1) == pytest.approx(0.001)


def test_outputs_are_kept_where_a_table_is_extended() -> None:
    table = LatencyTable(2, [(1, 0.010), (2, 0.020)])
    table.observe(0.0, 2, 0.020, 0.010)
    table.extend(4)
    assert table.busy(2) == pytest.approx(0.020)
    assert table.busy(4) == pytest.approx(0.040)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0.0, 2.0), st.floats(0.0, 3.0)), max_size=40),
    st.sampled_from([[], [(1, 0.0)], [(1, 0.010)], [(1, 0.010), (4, 0.020), (16, 0.5)]]),
)
def test_bounds_are_monotone_and_cover_what_was_seen(
    seen: list[tuple[int, float, float]], profile: list[tuple[int, float]]
) -> None:
    table = LatencyTable(12, profile)
    now = 0.0
    latest: dict[int, list[tuple[float, float]]] = {}
    for batch, seconds, later in seen:
        now += later
        table.expire(now)
        table.observe(now, batch, seconds)
        latest[batch] = [*latest.get(batch, []), (now, seconds)][-KEPT:]
        bounds = [table.upper(size) for size in range(1, 13)]
        assert bounds == sorted(bounds)
        for size, samples in latest.items():
            left = sorted(took for at, took in samples if at + EXPIRES > now)
            if len(left) >= FEWEST and left[-1] > APART * left[-2]:
                left.pop()
            assert not left or left[-1] <= table.upper(size) + 1e-12
