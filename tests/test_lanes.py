"""The lanes of one device in virtual time: what is copied, executed and paged when."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nodes.engine.lanes import NEVER, CopyIn, CopyOut, Execute, Lanes, Order, PageIn, PageOut, TooLate

NAMES = {CopyIn: "in", Execute: "execute", CopyOut: "out", PageIn: "load", PageOut: "unload"}


def shown(orders: list[Order]) -> list[tuple[Any, ...]]:
    """Orders as tuples, to compare and to read."""
    found: list[tuple[Any, ...]] = []
    for order in orders:
        if isinstance(order, TooLate):
            found.append(("late", order.number, "batch" if order.is_batch else "action"))
        elif isinstance(order, PageIn | PageOut):
            found.append((NAMES[type(order)], order.action))
        else:
            assert isinstance(order, CopyIn | Execute | CopyOut)
            found.append((NAMES[type(order)], order.batch))
    return found


class Bench:
    """Lanes whose every call is answered with the orders that it gave."""

    def __init__(self, copies: bool = True, overlap_loads: bool = True) -> None:
        self.lanes = Lanes(copies, overlap_loads)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> list[tuple[Any, ...]]:
            getattr(self.lanes, name)(*arguments, **named)
            return shown(self.lanes.take_orders())

        return call


def test_a_batch_goes_in_and_executes_and_comes_out() -> None:
    bench = Bench()
    assert bench.infer(1.0, 7, 1.0, 2.0) == [("in", 7)]
    assert bench.copied_in(1.1, 7) == [("execute", 7)]
    assert bench.executed(1.5, 7) == [("out", 7)]
    assert bench.copied_out(1.6, 7) == []
    assert bench.lanes.next_wake() == NEVER


def test_copies_go_on_while_a_batch_executes() -> None:
    bench = Bench()
    bench.infer(1.0, 7, 1.0, 2.0)
    assert bench.infer(1.0, 8, 1.0, 3.0) == []
    assert bench.infer(1.0, 9, 1.0, 3.0) == []
    assert bench.copied_in(1.1, 7) == [("in", 8), ("execute", 7)]
    assert bench.copied_in(1.2, 8) == [("in", 9)]
    assert bench.executed(1.5, 7) == [("execute", 8), ("out", 7)]
    assert bench.executed(1.6, 8) == []
    assert bench.copied_out(1.7, 7) == [("out", 8)]


def test_without_copies_batches_only_execute() -> None:
    bench = Bench(copies=False)
    assert bench.infer(1.0, 7, 1.0, 2.0) == [("execute", 7)]
    assert bench.infer(1.0, 8, 1.0, 2.0) == []
    assert bench.executed(1.5, 7) == [("execute", 8)]
    assert bench.executed(1.6, 8) == []


def test_the_input_does_not_wait_for_the_window_but_execution_does() -> None:
    bench = Bench()
    assert bench.infer(1.0, 7, 1.5, 2.0) == [("in", 7)]
    assert bench.copied_in(1.1, 7) == []
    assert bench.lanes.next_wake() == 1.5
    assert bench.tick(1.49) == []
    assert bench.tick(1.5) == [("execute", 7)]


def test_what_may_begin_earlier_comes_first() -> None:
    bench = Bench(copies=False)
    bench.infer(1.0, 7, 1.0, 2.0)
    bench.infer(1.0, 8, 1.2, 9.0)
    bench.infer(1.0, 9, 1.1, 9.0)
    bench.infer(1.0, 10, 1.1, 9.0)
    assert bench.executed(1.3, 7) == [("execute", 9)]
    assert bench.executed(1.4, 9) == [("execute", 10)]
    assert bench.executed(1.5, 10) == [("execute", 8)]


def test_a_batch_may_begin_up_to_the_end_of_its_window_and_not_after_it() -> None:
    bench = Bench(copies=False)
    assert bench.infer(2.0, 7, 1.0, 2.0) == [("execute", 7)]
    assert bench.executed(2.0, 7) == []
    assert bench.infer(2.1, 8, 1.0, 2.0) == [("late", 8, "batch")]


def test_a_batch_behind_one_that_overruns_is_refused_as_its_window_closes() -> None:
    bench = Bench(copies=False)
    bench.infer(1.0, 7, 1.0, 2.0)
    bench.infer(1.0, 8, 1.0, 1.5)
    assert bench.lanes.next_wake() == 1.5
    assert bench.tick(1.4) == []
    assert bench.tick(1.5) == [("late", 8, "batch")]
    assert bench.executed(1.6, 7) == []


def test_an_input_that_takes_too_long_refuses_its_batch_and_holds_the_lane_until_it_is_there() -> None:
    bench = Bench()
    bench.infer(1.0, 7, 1.0, 1.5)
    bench.infer(1.0, 8, 1.0, 2.0)
    assert bench.lanes.next_wake() == 1.5
    assert bench.tick(1.5) == [("late", 7, "batch")]
    assert bench.tick(1.6) == []
    assert bench.copied_in(1.7, 7) == [("in", 8)]
    assert bench.copied_in(1.8, 8) == [("execute", 8)]


def test_a_batch_is_refused_while_its_input_waits_for_another_s() -> None:
    bench = Bench()
    bench.infer(1.0, 7, 1.0, 5.0)
    bench.infer(1.0, 8, 1.0, 1.5)
    assert bench.lanes.next_wake() == 1.5
    assert bench.tick(1.5) == [("late", 8, "batch")]
    assert bench.copied_in(2.0, 7) == [("execute", 7)]


def test_a_batch_whose_execution_failed_has_nothing_to_be_copied() -> None:
    bench = Bench()
    bench.infer(1.0, 7, 1.0, 5.0)
    bench.copied_in(1.0, 7)
    assert bench.executed(1.1, 7, failed=True) == []


@pytest.mark.parametrize("copied", [False, True])
def test_a_dropped_batch_is_heard_of_no_more(copied: bool) -> None:
    bench = Bench()
    bench.infer(1.0, 7, 1.5, 2.0)
    if copied:
        bench.copied_in(1.1, 7)
    assert bench.lanes.drop(1.2, 7)
    assert not bench.lanes.drop(1.2, 7)
    if not copied:
        assert bench.copied_in(1.3, 7) == []
    assert bench.lanes.next_wake() == NEVER
    assert bench.infer(1.4, 8, 1.4, 2.0) == [("in", 8)]


def test_a_batch_that_executes_or_has_done_so_is_not_dropped() -> None:
    bench = Bench()
    bench.infer(1.0, 7, 1.0, 2.0)
    bench.copied_in(1.0, 7)
    assert not bench.lanes.drop(1.1, 7)
    assert bench.executed(1.2, 7) == [("out", 7)]
    assert not bench.lanes.drop(1.3, 7)
    assert not bench.lanes.drop(1.3, 99)


# ---- weights --------------------------------------------------------------------------------------


def test_actions_are_carried_out_one_by_one_in_their_order() -> None:
    bench = Bench()
    assert bench.unload(1.0, 1, 1.0, 2.0) == [("unload", 1)]
    assert bench.load(1.0, 2, 1.0, 2.0) == []
    assert bench.unload(1.0, 3, 1.0, 2.0) == []
    assert bench.paged(1.1, 1) == [("load", 2)]
    assert bench.paged(1.2, 2) == [("unload", 3)]
    assert bench.paged(1.3, 3) == []


def test_actions_have_windows_as_well() -> None:
    bench = Bench()
    assert bench.load(1.0, 1, 1.2, 2.0) == []
    assert bench.lanes.next_wake() == 1.2
    assert bench.tick(1.2) == [("load", 1)]
    bench.load(1.2, 2, 1.0, 1.5)
    assert bench.lanes.next_wake() == 1.5
    assert bench.tick(1.5) == [("late", 2, "action")]
    assert bench.paged(1.6, 1) == []


def test_a_model_is_loaded_while_a_batch_executes_where_the_device_can_do_both() -> None:
    bench = Bench(copies=False)
    bench.infer(1.0, 7, 1.0, 2.0)
    assert bench.load(1.0, 1, 1.0, 2.0) == [("load", 1)]
    assert bench.executed(1.1, 7) == []
    assert bench.infer(1.1, 8, 1.1, 2.0) == [("execute", 8)]


def test_loads_and_execution_take_turns_where_the_device_cannot_do_both() -> None:
    bench = Bench(copies=False, overlap_loads=False)
    bench.infer(1.0, 7, 1.0, 9.0)
    assert bench.load(1.1, 1, 1.1, 9.0) == []
    assert bench.infer(1.2, 8, 1.2, 9.0) == []
    assert bench.load(1.3, 2, 1.3, 9.0) == []
    assert bench.executed(1.4, 7) == [("load", 1)]
    assert bench.paged(1.5, 1) == [("execute", 8)]
    assert bench.executed(1.6, 8) == [("load", 2)]


def test_the_end_of_what_was_not_ordered_is_an_error() -> None:
    lanes = Lanes(True, True)
    for ended in (lanes.copied_in, lanes.executed, lanes.copied_out, lanes.paged):
        with pytest.raises(ValueError, match="7"):
            ended(1.0, 7)


# ---- everything, in any order ----------------------------------------------------------------------


class LanesMachine(RuleBasedStateMachine):
    """A device, played by hypothesis, that carries out orders in its own time."""

    @initialize(copies=st.booleans(), overlap=st.booleans())
    def begin(self, copies: bool, overlap: bool) -> None:
        self.copies, self.overlap = copies, overlap
        self.now = 10.0
        self.lanes = Lanes(copies, overlap)
        self.number = 0
        self.window: dict[int, tuple[float, float]] = {}
        self.stage: dict[int, str] = {}
        """Where each batch and action is: 'new', 'in', 'ready', 'execute', 'execute out', 'out'; 'load' and 'unload'
        are actions that have not begun, 'paging' one that has."""
        self.taken: dict[str, int] = {}
        """What each lane is in the middle of."""
        self.asked: list[int] = []
        """Actions, in order."""

    def act(self) -> None:
        for order in self.lanes.take_orders():
            if isinstance(order, TooLate):
                assert self.now >= self.window[order.number][1], "refused before its window closed"
                expected = ("new", "in", "ready") if order.is_batch else ("load", "unload")
                assert self.stage.pop(order.number) in expected
            elif isinstance(order, CopyIn):
                self.take("in", order.batch)
                assert self.stage[order.batch] == "new"
                self.stage[order.batch] = "in"
            elif isinstance(order, Execute):
                self.take("execute", order.batch)
                self.begins(order.batch)
                assert self.stage[order.batch] == ("ready" if self.copies else "new")
                self.stage[order.batch] = "execute"
            elif isinstance(order, CopyOut):
                self.take("out", order.batch)
                assert self.stage[order.batch] == "execute out"
                self.stage[order.batch] = "out"
            else:
                assert isinstance(order, PageIn | PageOut)
                self.take("paging", order.action)
                self.begins(order.action)
                assert self.stage[order.action] == ("load" if isinstance(order, PageIn) else "unload")
                self.stage[order.action] = "paging"
                for earlier in self.asked[: self.asked.index(order.action)]:
                    waits = self.stage.get(earlier) in ("load", "unload")
                    assert not waits or self.window[earlier][0] > self.window[order.action][0], "overtook another"
        assert self.overlap or not {"execute", "paging"} <= self.taken.keys()

    def take(self, lane: str, number: int) -> None:
        assert lane not in self.taken, "one at a time"
        self.taken[lane] = number

    def begins(self, number: int) -> None:
        earliest, latest = self.window[number]
        assert earliest <= self.now <= latest

    def new(self, stage: str, opens: float, closes: float) -> tuple[int, float, float]:
        self.number += 1
        self.window[self.number] = (self.now + opens, self.now + opens + closes)
        self.stage[self.number] = stage
        return self.number, *self.window[self.number]

    @rule(opens=st.sampled_from([-1.0, 0.0, 0.0, 0.5]), closes=st.sampled_from([0.0, 0.1, 0.5, 1.0, 5.0]))
    def infer(self, opens: float, closes: float) -> None:
        self.lanes.infer(self.now, *self.new("new", opens, closes))
        self.act()

    @rule(
        loads=st.booleans(),
        opens=st.sampled_from([-1.0, 0.0, 0.0, 0.5]),
        closes=st.sampled_from([0.0, 0.1, 0.5, 1.0, 5.0]),
    )
    def page(self, loads: bool, opens: float, closes: float) -> None:
        self.asked.append(self.number + 1)
        ask = self.lanes.load if loads else self.lanes.unload
        ask(self.now, *self.new("load" if loads else "unload", opens, closes))
        self.act()

    @precondition(lambda self: self.stage)
    @rule(data=st.data())
    def drop(self, data: Any) -> None:
        number = data.draw(st.sampled_from(sorted(self.stage)))
        dropped = self.lanes.drop(self.now, number)
        assert dropped == (self.stage[number] in ("new", "in", "ready"))
        if dropped:
            del self.stage[number]
        self.act()

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), failed=st.booleans())
    def end(self, data: Any, failed: bool) -> None:
        self.finish(data.draw(st.sampled_from(sorted(self.taken))), failed)

    def finish(self, lane: str, failed: bool) -> None:
        number = self.taken.pop(lane)
        if lane == "in":
            if number in self.stage:
                self.stage[number] = "ready"
            self.lanes.copied_in(self.now, number)
        elif lane == "execute":
            if self.copies and not failed:
                self.stage[number] = "execute out"
            else:
                del self.stage[number]
            self.lanes.executed(self.now, number, failed)
        else:
            del self.stage[number]
            (self.lanes.copied_out if lane == "out" else self.lanes.paged)(self.now, number)
        self.act()

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.1, 0.5, 3.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.lanes.tick(self.now)
        self.act()

    @rule(steps=st.integers(1, 4))
    def tick_when_asked_for(self, steps: int) -> None:
        for _ in range(steps):
            wake = self.lanes.next_wake()
            if wake >= NEVER:
                return
            self.now = max(self.now, wake)
            self.lanes.tick(self.now)
            self.act()
            assert self.lanes.next_wake() > self.now, "asks for what it has just been given"

    @invariant()
    def nothing_waits_without_need(self) -> None:
        if not hasattr(self, "lanes"):
            return
        self.lanes.tick(self.now)
        self.act()
        if "in" not in self.taken:
            assert "new" not in self.stage.values() or not self.copies
        free = "execute" not in self.taken and (self.overlap or "paging" not in self.taken)
        for number, stage in self.stage.items():
            earliest, latest = self.window[number]
            if stage == ("ready" if self.copies else "new"):
                assert earliest > self.now or not free
            if stage in ("new", "in", "ready", "load", "unload"):
                assert self.now < latest, "is told at once that it is too late"

    def teardown(self) -> None:
        """A device that does all that it is told is soon done."""
        if not hasattr(self, "lanes"):
            return
        while self.stage or self.taken:
            if self.taken:
                self.finish(min(self.taken), failed=False)
            else:
                self.tick_when_asked_for(1)
        assert self.lanes.next_wake() == NEVER


LanesMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLanes = LanesMachine.TestCase
