"""Who gets the next device: order, fairness under overload, and laziness against a model that looks at everybody."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.engine.pending import Pending
from broker.engine.plan import Pipeline, StagePlan
from broker.engine.stage import Stage


def make_stages(name: str, count: int) -> list[Stage]:
    """The stages of a chain; their windows close at 0."""
    plans = [
        StagePlan(f"s{number}", Stage(f"{name}@1/s{number}", "", 8, 1000), [(number - 1, "")], False, 1)
        for number in range(count)
    ]
    Pipeline(name, 1.0, plans, [("", count - 1, "")])
    for plan in plans:
        plan.stage.closes = 0.0
    return [plan.stage for plan in plans]


def add(pending: Pending, stage: Stage, closes: float) -> None:
    stage.closes = closes
    pending.add(stage)


def drain(pending: Pending) -> list[Stage]:
    order = []
    while len(pending):
        order.append(pending.first())
        pending.discard(order[-1])
    return order


def test_nobody_waits() -> None:
    pending = Pending()
    assert len(pending) == 0
    with pytest.raises(IndexError):
        pending.first()


def test_the_window_that_closes_first_goes_first() -> None:
    (p,), (q,), (r,) = (make_stages(name, 1) for name in "pqr")
    pending = Pending()
    for stage, closes in ((p, 0.3), (q, 0.1), (r, 0.2)):
        add(pending, stage, closes)
    assert len(pending) == 3
    assert drain(pending) == [q, r, p]


def test_the_first_stays_until_it_is_discarded() -> None:
    (p,), (q,) = make_stages("p", 1), make_stages("q", 1)
    pending = Pending()
    add(pending, p, 0.1)
    add(pending, q, 0.2)
    assert pending.first() is pending.first() is p
    assert len(pending) == 2
    pending.discard(p)
    pending.discard(p)
    assert len(pending) == 1
    assert pending.first() is q


def test_of_a_pipeline_the_stage_furthest_on_goes_first() -> None:
    """The pipeline's place is that of its window that closes first: q stands between p's two."""
    p0, _, p2 = make_stages("p", 3)
    (q,) = make_stages("q", 1)
    pending = Pending()
    add(pending, p0, 0.1)
    add(pending, q, 0.2)
    add(pending, p2, 0.3)
    assert drain(pending) == [p2, p0, q]


def test_a_window_that_closes_earlier_than_before_goes_first() -> None:
    (p,), (q,) = make_stages("p", 1), make_stages("q", 1)
    pending = Pending()
    add(pending, p, 0.1)
    add(pending, q, 0.2)
    add(pending, q, 0.05)
    assert len(pending) == 2
    assert drain(pending) == [q, p]


def test_a_window_that_closes_later_than_before_goes_last() -> None:
    """Whether it was told or not."""
    for told in (False, True):
        (p,), (q,) = make_stages("p", 1), make_stages("q", 1)
        pending = Pending()
        add(pending, p, 0.1)
        add(pending, q, 0.2)
        p.closes = 0.3
        if told:
            pending.add(p)
        assert drain(pending) == [q, p]


def test_who_left_and_comes_again_has_its_new_place() -> None:
    (p,), (q,) = make_stages("p", 1), make_stages("q", 1)
    for again in (0.3, 0.05):
        pending = Pending()
        add(pending, p, 0.1)
        add(pending, q, 0.2)
        pending.discard(p)
        add(pending, p, again)
        assert drain(pending) == ([q, p] if again > 0.2 else [p, q])


# ---- overload ------------------------------------------------------------------------------------


def test_under_overload_the_pipeline_that_has_had_less_goes_first() -> None:
    """q's window closes much later."""
    (p,), (q,) = make_stages("p", 1), make_stages("q", 1)
    pending = Pending()
    pending.overloaded = True
    add(pending, p, 0.1)
    add(pending, q, 9.0)
    pending.charge("p@1", 0.020)
    pending.charge("q@1", 0.010)
    assert pending.first() is q
    pending.charge("q@1", 0.015)
    assert pending.first() is p


def test_two_pipelines_share_a_device_by_time_and_not_by_batches() -> None:
    """p's batches take three times as long."""
    (p,), (q,) = make_stages("p", 1), make_stages("q", 1)
    pending = Pending()
    pending.overloaded = True
    add(pending, p, 0.1)
    add(pending, q, 0.1)
    had = {"p@1": 0, "q@1": 0}
    for _ in range(400):
        stage = pending.first()
        pending.discard(stage)
        had[stage.pipeline] += 1
        pending.charge(stage.pipeline, 0.003 if stage is p else 0.001)
        pending.add(stage)
    assert had == {"p@1": 100, "q@1": 300}


def test_under_overload_too_the_stage_furthest_on_goes_first() -> None:
    p0, p1 = make_stages("p", 2)
    (q,) = make_stages("q", 1)
    pending = Pending()
    pending.overloaded = True
    pending.charge("q@1", 0.001)
    for stage in (p0, q, p1):
        add(pending, stage, 0.1)
    assert drain(pending) == [p1, p0, q]


def test_what_was_used_long_ago_counts_for_less() -> None:
    """p: 80 ms, halved three times: less than q's 15."""
    (p,), (q,) = make_stages("p", 1), make_stages("q", 1)
    pending = Pending()
    pending.overloaded = True
    add(pending, p, 0.1)
    add(pending, q, 0.1)
    pending.charge("p@1", 0.080)
    for _ in range(3):
        pending.fade()
    pending.charge("q@1", 0.015)
    assert pending.first() is p


def test_the_order_follows_when_overload_begins_and_ends() -> None:
    (p,), (q,) = make_stages("p", 1), make_stages("q", 1)
    pending = Pending()
    add(pending, p, 0.1)
    add(pending, q, 0.2)
    pending.charge("p@1", 0.5)
    assert pending.first() is p
    pending.overloaded = True
    pending.fade()
    assert pending.first() is q
    pending.overloaded = False
    pending.fade()
    assert pending.first() is p


# ---- against a model -----------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 5), st.integers(0, 9)),
        st.tuples(st.just("later"), st.integers(0, 5), st.integers(0, 5)),
        st.tuples(st.just("discard"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("serve"), st.just(0), st.integers(0, 9)),
        st.tuples(st.just("charge"), st.integers(0, 5), st.integers(1, 9)),
        st.tuples(st.just("fade"), st.integers(0, 1), st.just(0)),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(STEPS)
def test_as_if_everybody_were_looked_at_each_time(steps: list[tuple[str, int, int]]) -> None:
    stages = [*make_stages("p", 3), *make_stages("q", 2), *make_stages("r", 1)]
    pending = Pending()
    waiting: set[Stage] = set()
    usage = {"p@1": 0.0, "q@1": 0.0, "r@1": 0.0}

    def place(stage: Stage) -> float:
        return usage[stage.pipeline] if pending.overloaded else stage.closes

    for step, number, amount in steps:
        stage = stages[number]
        if step == "add":
            add(pending, stage, float(amount))
            waiting.add(stage)
        elif step == "later":
            stage.closes += amount
        elif step == "discard":
            pending.discard(stage)
            waiting.discard(stage)
        elif step == "charge":
            pending.charge(stage.pipeline, float(amount))
            usage[stage.pipeline] += amount
        elif step == "fade":
            pending.overloaded = bool(number)
            pending.fade()
            usage = {name: used * 0.5 if used > 1e-3 else 0.0 for name, used in usage.items()}
        assert len(pending) == len(waiting)
        if not waiting:
            continue
        first = pending.first()
        assert first in waiting
        assert min(map(place, (each for each in waiting if each.pipeline == first.pipeline))) == min(
            map(place, waiting)
        )
        assert first.depth == max(each.depth for each in waiting if each.pipeline == first.pipeline)
        if step == "serve":
            pending.discard(first)
            waiting.discard(first)
            pending.charge(first.pipeline, float(amount))
            usage[first.pipeline] += amount
