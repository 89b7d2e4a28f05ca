import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import LatencyProfile, Profile

POINTS = st.lists(st.tuples(st.integers(1, 512), st.floats(0, 100)), min_size=1, max_size=12)


def test_linear() -> None:
    profile = LatencyProfile.from_spec(Profile(alpha_ms=1.5, beta_ms=4))
    for batch in (1, 2, 3, 64, 4096):
        assert profile.latency(batch) == pytest.approx((1.5 * batch + 4) / 1000)


def test_zero() -> None:
    assert LatencyProfile.from_spec(Profile(alpha_ms=0, beta_ms=0)).latency(256) == 0.0


def test_a_table_is_interpolated_and_extended() -> None:
    profile = LatencyProfile.from_spec(Profile(latency_ms={8: 20.0, 2: 5.0, 4: 10.0}))
    expected = {1: 5.0, 2: 5.0, 3: 7.5, 4: 10.0, 6: 15.0, 8: 20.0, 12: 30.0}
    assert {batch: profile.latency(batch) * 1000 for batch in expected} == pytest.approx(expected)


def test_one_point_is_extended_in_proportion() -> None:
    profile = LatencyProfile([(4, 0.1)])
    assert [profile.latency(batch) for batch in (1, 4, 8)] == pytest.approx([0.1, 0.1, 0.2])


def test_noise_is_made_monotone() -> None:
    profile = LatencyProfile([(1, 0.5), (2, 0.4), (4, 0.6), (4, 0.3)])
    assert profile.pairs() == [(1, 0.5), (2, 0.5), (4, 0.6)]


@pytest.mark.parametrize("points", [[], [(0, 1.0)], [(-3, 1.0)], [(1, -1.0)], [(1, math.nan)], [(1, math.inf)]])
def test_what_is_no_profile(points: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match="profile"):
        LatencyProfile(points)


@given(POINTS, st.integers(1, 1000), st.integers(0, 1000))
def test_a_larger_batch_is_never_faster(points: list[tuple[int, float]], batch: int, more: int) -> None:
    profile = LatencyProfile(points)
    assert 0 <= profile.latency(batch) <= profile.latency(batch + more) * (1 + 1e-12)


@given(POINTS)
def test_known_points_are_kept_and_pairs_say_all(points: list[tuple[int, float]]) -> None:
    profile = LatencyProfile(points)
    assert LatencyProfile(profile.pairs()) == profile
    for batch, seconds in points:
        assert profile.latency(batch) >= seconds
    for batch, seconds in profile.pairs():
        assert profile.latency(batch) == seconds


def test_a_device_type_has_its_own_profile() -> None:
    fast = Profile(alpha_ms=1, beta_ms=2, load_ms=300)
    profile = Profile(alpha_ms=10, beta_ms=20, load_ms=1500, memory_mb=900, by_type={"fast": fast})
    assert LatencyProfile.from_spec(profile).latency(1) == pytest.approx(0.030)
    assert LatencyProfile.from_spec(profile, "fast").latency(1) == pytest.approx(0.003)
    assert LatencyProfile.from_spec(profile, "another") == LatencyProfile.from_spec(profile)
    assert (profile.on("fast").load_ms, profile.on("fast").memory_mb) == (300, 900)
    assert profile.on("another").load_ms == 1500
