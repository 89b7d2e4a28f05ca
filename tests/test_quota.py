"""What the owner of a key may ask for, in virtual time."""

from __future__ import annotations

from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from broker.engine.quota import Quota


def quota(pipelines=(), rate=0.0, in_flight=0):
    made = Quota("billing")
    made.limit(0.0, list(pipelines), rate, in_flight)
    return made


def test_without_limits_everything_is_taken():
    made = quota()
    assert not made.is_limited
    assert all(made.refusal(0.0, "any", 0.001) == "" for _ in range(1000))


def test_only_the_pipelines_that_are_named():
    made = quota(["ocr"])
    assert made.is_limited
    assert made.refusal(0.0, "ocr", 1.0) == ""
    assert made.refusal(0.0, "other", 1.0) == "key 'billing' may not use pipeline 'other'"


def test_a_second_of_the_rate_may_be_saved_up():
    made = quota(rate=10.0)
    taken = [made.refusal(100.0, "p", 1.0) for _ in range(12)]
    assert taken[:10] == [""] * 10
    assert taken[10] == "key 'billing' may submit 10 requests a second; slow down and try again"
    assert made.refusal(100.1, "p", 1.0) == ""
    assert made.refusal(100.1, "p", 1.0) != ""


def test_a_limit_that_is_changed_holds_at_once():
    made = quota(rate=1000.0)
    made.limit(0.0, [], 2.0, 0)
    assert [made.refusal(0.0, "p", 1.0) == "" for _ in range(3)] == [True, True, False]
    made.limit(0.0, ["q"], 0.0, 0)
    assert made.refusal(0.0, "q", 1.0) == ""
    made.limit(0.0, [], 0.0, 0)
    assert not made.is_limited


def test_in_flight_by_shares():
    made = quota(in_flight=10)
    made.account.in_flight = 4
    assert made.refusal(0.0, "half here", 0.5) == ""
    made.account.in_flight = 5
    assert made.refusal(0.0, "half here", 0.5) == (
        "key 'billing' has 5 requests in flight at this shard, and may have 10 in the cluster; wait for answers"
    )
    assert made.refusal(0.0, "only here", 1.0) == ""
    made.account.in_flight = 0
    for share in (0.0, 1e-9, 0.01):
        assert made.refusal(0.0, "hardly here", share) == "", "one at a time is always let through"


@given(
    rate=st.floats(0.1, 1000.0),
    share=st.floats(0.001, 1.0),
    gaps=st.lists(st.floats(0.0, 0.5), min_size=1, max_size=200),
)
def test_a_shard_lets_through_its_share_and_a_burst_and_no_more(rate, share, gaps):
    made = quota(rate=rate)
    now, taken = 0.0, 0
    for gap in gaps:
        now += gap
        taken += made.refusal(now, "p", share) == ""
    most = max(rate, 1.0)
    cost = min(1.0 / share, most)
    assert taken <= (most + rate * now) / cost + 1e-6
    assert taken >= 1


@given(
    rate=st.floats(0.5, 200.0),
    weights=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6),
    seconds=st.integers(1, 5),
)
def test_shards_together_let_through_the_rate(rate, weights, seconds):
    """As many requests at each as its weight says, far beyond the rate: what is let through in all is the rate, a burst
    of a second, and the one a second that each shard lets through at least."""
    shares = [weight / sum(weights) for weight in weights]
    shards = [quota(rate=rate) for _ in shares]
    taken = 0
    for step in range(seconds * 20):
        now = step / 20
        for shard, share in zip(shards, shares, strict=True):
            taken += sum(shard.refusal(now, "p", share) == "" for _ in range(ceil(rate * share / 10) + 1))
    assert taken <= rate * (seconds + 1) + len(shards) * (seconds + 1) + 1e-6
    assert taken >= min(rate, 1.0) * (seconds - 1) * 0.9
