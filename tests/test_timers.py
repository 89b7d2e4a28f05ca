"""When stages are looked at: by hand, and against a model that keeps a moment for each."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.engine.stage import NEVER, Stage
from broker.engine.timers import Timers


def make_stages(count: int) -> list[Stage]:
    return [Stage(f"p@1/s{number}", "", 8, 1000) for number in range(count)]


def test_nothing_is_set() -> None:
    timers = Timers()
    assert timers.due(1e9) == []
    assert timers.next() == NEVER


def test_stages_come_in_the_order_of_their_moments() -> None:
    a, b, c = make_stages(3)
    timers = Timers()
    for stage, when in ((a, 3.0), (b, 1.0), (c, 2.0)):
        timers.set(stage, when)
    assert timers.next() == 1.0
    assert timers.due(0.999) == []
    assert timers.due(2.0) == [b, c]
    assert timers.next() == 3.0
    assert timers.due(3.0) == [a]
    assert timers.due(9.0) == []
    assert timers.next() == NEVER


def test_stages_of_one_moment_come_in_the_order_of_their_setting() -> None:
    stages = make_stages(9)
    timers = Timers()
    for stage in stages[::-1]:
        timers.set(stage, 7.0)
    for stage in (*stages[3:], *stages[:3]):
        timers.set(stage, NEVER)
        timers.set(stage, 1.0)
    assert timers.due(1.0) == [*stages[3:], *stages[:3]]


def test_who_was_due_has_no_timer_any_more() -> None:
    (stage,) = make_stages(1)
    timers = Timers()
    timers.set(stage, 1.0)
    assert timers.due(1.0) == [stage]
    assert stage.timer == NEVER


def test_an_earlier_moment_takes_the_place_of_a_later_one() -> None:
    (stage,) = make_stages(1)
    timers = Timers()
    timers.set(stage, 5.0)
    timers.set(stage, 2.0)
    assert timers.next() == 2.0
    assert timers.due(2.0) == [stage]
    assert timers.due(5.0) == []
    assert timers.next() == NEVER


def test_a_later_moment_takes_the_place_of_an_earlier_one() -> None:
    (stage,) = make_stages(1)
    timers = Timers()
    timers.set(stage, 2.0)
    timers.set(stage, 5.0)
    assert stage.timer == timers.next() == 5.0
    assert timers.due(2.0) == []
    assert timers.next() == 5.0
    assert timers.due(5.0) == [stage]


def test_never_takes_the_timer_away() -> None:
    (stage,) = make_stages(1)
    timers = Timers()
    timers.set(stage, 2.0)
    timers.set(stage, NEVER)
    assert timers.due(9.0) == []
    assert timers.next() == NEVER


def test_to_and_fro() -> None:
    (stage,) = make_stages(1)
    timers = Timers()
    for when in (4.0, 2.0, NEVER, 3.0, 1.0, 6.0, 5.0):
        timers.set(stage, when)
    assert timers.due(4.999) == []
    assert timers.next() == 5.0
    assert timers.due(5.0) == [stage]
    assert timers.due(99.0) == []


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.one_of(st.just(NEVER), st.integers(0, 30).map(float)), st.integers(0, 3)),
        max_size=80,
    )
)
def test_as_if_a_moment_were_kept_for_each(steps: list[tuple[int, float, int]]) -> None:
    """Set a stage's timer so much from now on; then let some time pass, or none."""
    stages = make_stages(5)
    timers = Timers()
    moments = dict.fromkeys(stages, NEVER)
    now = 0.0
    for number, ahead, passes in steps:
        stage = stages[number]
        moments[stage] = min(now + ahead, NEVER)
        timers.set(stage, moments[stage])
        assert timers.next() == min(moments.values())
        now += passes
        due = timers.due(now)
        assert len(due) == len(set(due))
        assert [moments[each] for each in due] == sorted(moments[each] for each in due)
        assert set(due) == {each for each, moment in moments.items() if moment <= now}
        for each in due:
            moments[each] = NEVER
        assert timers.next() > now
        assert {each: each.timer for each in stages} == moments
