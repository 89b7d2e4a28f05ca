"""The engine of one device in virtual time: pulls, windows, workers that hang or die."""

from __future__ import annotations

from typing import Any

import pytest

from nodes.engine import actions as act
from nodes.engine.device import DeviceEngine
from nodes.engine.handed import HANG_FACTOR, HANG_GRACE, LOAD_GRACE
from nodes.engine.health import BACK_OFF, CAREFUL, MAX_BACK_OFF
from nodes.engine.lanes import MAX_BATCHES
from nodes.engine.models import FAILED, HELD, LOADING, QUEUED, READY
from nodes.engine.paging import HOLD_SILENCE, MAX_LOAD_DEATHS
from nodes.engine.pulls import LEAD, MAX_TRIP, WEIGHT

OTHERS = {act.StartWorker: "start worker", act.KillWorker: "kill worker", act.Announce: "announce"}
SLO = 0.5


def shown(actions: list[act.Action]) -> list[tuple[Any, ...]]:
    """Actions as tuples, to compare and to read."""
    found: list[tuple[Any, ...]] = []
    for action in actions:
        if isinstance(action, act.SendPull):
            found.append(("pull", action.seq, pytest.approx(action.free_in)))
        elif isinstance(action, act.Infer | act.Drop):
            found.append((type(action).__name__.lower(), action.batch))
        elif isinstance(action, act.Refuse):
            found.append(("refuse", action.batch, action.code))
        elif isinstance(action, act.Hold | act.Release):
            found.append((type(action).__name__.lower(), action.model))
        elif isinstance(action, act.Load | act.Unload):
            found.append((type(action).__name__.lower(), action.number, action.model))
        elif isinstance(action, act.Answer):
            found.append(("answer", action.number, action.code))
        else:
            found.append((OTHERS[type(action)],))
    return found


class World:
    """A device engine, moved by hand."""

    def __init__(self, *models: str, budget: float = 0.0, memory: float = 0.0) -> None:
        """Up, connected and holding ``models``, each of which takes ``memory``, at 0."""
        self.engine = DeviceEngine(budget)
        self.detail = ""
        self.window = (0.0, 0.0)
        """Of the last thing that was handed over."""
        self.memory = memory
        if models:
            self.place(0.0, *models)
            self.engine.tick(0.0)
            self.engine.worker_started(0.0)
            self.settle(0.0)
            self.engine.session(0.0, True)
            assert self.actions()[-1] == ("pull", 1, 0.0)

    def place(self, now: float, *models: str) -> list[tuple[Any, ...]]:
        self.engine.place(now, dict.fromkeys(models, self.memory))
        return self.actions()

    def settle(self, now: float) -> None:
        """Hold, load and unload all that the engine wants."""
        todo = self.engine.take_actions()
        while todo:
            for action in todo:
                if isinstance(action, act.Hold):
                    self.engine.held(now, action.model, [(1, 0.1)], 0.01, 0.0)
                elif isinstance(action, act.Load | act.Unload):
                    self.engine.acted(now, action.number, "ok", "")
            todo = self.engine.take_actions()
        while self.engine.paging.holding is not None:
            self.engine.held(now, self.engine.paging.holding.key, [(1, 0.1)], 0.01, 0.0)
            self.settle(now)

    def actions(self) -> list[tuple[Any, ...]]:
        actions = self.engine.take_actions()
        for action in actions:
            if isinstance(action, act.Refuse | act.Answer):
                self.detail = action.detail
            elif isinstance(action, act.Infer | act.Load | act.Unload):
                self.window = (action.earliest, action.latest)
        return shown(actions)

    def grant(
        self,
        now: float,
        batch: int,
        *,
        seq: int = 1,
        model: str = "m",
        left_at: float | None = None,
        opens: float = 0.0,
        closes: float = 0.5,
        expected: float = 0.1,
    ) -> list[tuple[Any, ...]]:
        self.engine.grant(now, batch, seq, model, now if left_at is None else left_at, opens, closes, expected, SLO)
        return self.actions()

    def begin(self, now: float, batch: int, at: float | None = None) -> list[tuple[Any, ...]]:
        self.engine.started(now, batch, now if at is None else at)
        return self.actions()

    def run(self, now: float, batch: int, **grant: Any) -> None:
        """Grant a batch that begins at once."""
        assert self.grant(now, batch, **grant) == [("infer", batch)]
        self.begin(now, batch)

    def tick(self, now: float) -> list[tuple[Any, ...]]:
        self.engine.tick(now)
        return self.actions()

    def finish(
        self,
        now: float,
        batch: int,
        code: str = "ok",
        known: bool = True,
        input_time: float = 0.0,
        copying: bool = False,
    ) -> list[tuple[Any, ...]]:
        assert self.engine.finished(now, batch, code, input_time, copying) == known
        return self.actions()

    def load(self, now: float, model: str, closes: float = 0.5, expected: float = 0.01) -> list[tuple[Any, ...]]:
        self.engine.load(now, model, now, 0.0, closes, expected)
        return self.actions()

    def unload(self, now: float, model: str, closes: float = 0.5) -> list[tuple[Any, ...]]:
        self.engine.unload(now, model, now, 0.0, closes)
        return self.actions()

    def acted(self, now: float, number: int, code: str = "ok") -> list[tuple[Any, ...]]:
        assert self.engine.acted(now, number, code, "why")
        return self.actions()

    def state(self, model: str) -> str:
        return self.engine.models[model].state


# ---- the way up -------------------------------------------------------------------------------


def test_a_device_without_models_does_nothing() -> None:
    world = World()
    world.engine.session(0.0, True)
    assert world.tick(1.0) == []
    assert world.engine.next_wake() == 1e18


def test_the_worker_is_started_then_models_are_held_one_by_one_and_then_it_pulls() -> None:
    world = World()
    engine = world.engine
    engine.session(0.0, True)
    world.place(1.0, "m", "n")
    assert engine.next_wake() <= 1.0
    assert world.tick(1.0) == [("start worker",)]
    assert world.tick(1.1) == []
    engine.worker_started(2.0)
    assert world.actions() == [("hold", "m")]
    assert world.state("m") == LOADING
    engine.held(3.0, "m", [(1, 0.1)], 0.5, 7.0)
    assert world.actions() == [("announce",), ("hold", "n")]
    engine.held(4.0, "n", [], 0.0, 0.0)
    assert world.actions() == [("announce",), ("pull", 1, 0.0)]
    model = engine.models["m"]
    assert (model.profile, model.load_seconds, model.memory) == ([(1, 0.1)], 0.5, 7.0)
    assert engine.next_wake() == 1e18


def test_nothing_is_pulled_before_there_is_a_shard() -> None:
    world = World()
    engine = world.engine
    world.place(0.0, "m")
    engine.tick(0.0)
    engine.worker_started(0.0)
    engine.held(0.0, "m", [], 0.0, 0.0)
    assert ("pull", 1, 0.0) not in world.actions()
    engine.session(1.0, True)
    assert world.actions() == [("pull", 1, 0.0)]


# ---- pulls --------------------------------------------------------------------------------------


def test_the_next_pull_goes_just_before_the_running_batch_ends() -> None:
    world = World("m")
    world.run(1.0, 7)
    pull_at = 1.0 + 0.1 - LEAD
    assert world.engine.next_wake() == pytest.approx(pull_at)
    assert world.tick(pull_at - 1e-6) == []
    assert world.tick(pull_at + 1e-9) == [("pull", 2, LEAD)]
    assert world.engine.next_wake() == pytest.approx(1.0 + max(HANG_FACTOR * 0.1, SLO) + HANG_GRACE)


def test_the_running_batch_counts_from_when_it_really_began() -> None:
    world = World("m")
    world.grant(1.0, 7)
    assert world.begin(1.05, 7, at=1.02) == []
    assert world.engine.next_wake() == pytest.approx(1.02 + 0.1 - LEAD)


def test_the_round_trip_makes_the_pull_earlier() -> None:
    world = World("m")
    world.run(1.0, 7, left_at=0.95)
    assert world.engine.pulls.round_trip == pytest.approx(0.05)
    assert world.engine.next_wake() == pytest.approx(1.0 + 0.1 - LEAD - 0.05)


def test_the_inputs_time_makes_the_pull_earlier() -> None:
    world = World("m")
    world.run(1.0, 7)
    assert world.finish(1.1, 7, input_time=0.05) == [("pull", 2, 0.0)]
    world.run(2.0, 8, seq=2)
    assert world.engine.next_wake() == pytest.approx(2.0 + 0.1 - LEAD - WEIGHT * 0.05)


def test_a_grant_that_lay_for_long_does_not_move_the_round_trip_far() -> None:
    world = World("m")
    world.grant(60.0, 7, left_at=1.0, closes=100.0)
    assert world.engine.pulls.round_trip == MAX_TRIP


def test_a_batch_that_ends_early_is_followed_by_a_pull_at_once() -> None:
    world = World("m")
    world.run(1.0, 7)
    assert world.finish(1.02, 7) == [("pull", 2, 0.0)]


def test_there_is_one_pull_at_a_time() -> None:
    world = World("m")
    assert world.tick(1.0) == []
    world.run(1.0, 7)
    assert world.tick(1.2) == [("pull", 2, 0.0)]
    assert world.tick(1.3) == []
    assert world.finish(1.4, 7) == []


def test_the_next_batch_is_handed_over_while_one_runs() -> None:
    world = World("m")
    world.run(1.0, 7)
    world.tick(1.099)
    assert world.grant(1.0995, 8, seq=2) == [("infer", 8)]
    assert world.tick(1.0999) == []
    assert world.begin(1.1, 8) == []
    assert world.finish(1.101, 7) == []
    assert world.finish(1.2, 8) == [("pull", 3, 0.0)]


def test_a_second_waiting_batch_is_refused() -> None:
    world = World("m")
    world.run(1.0, 7)
    world.grant(1.0, 8)
    assert world.grant(1.0, 9) == [("refuse", 9, "busy")]


def test_a_worker_has_three_batches_at_most() -> None:
    world = World("m")
    for number in range(MAX_BATCHES):
        world.run(1.0 + number * 0.001, number, seq=number + 1, expected=0.0)
    assert world.tick(1.1) == [], "the outputs of two are still being fetched"
    assert world.grant(1.1, 99) == [("refuse", 99, "busy")]
    assert world.finish(1.2, 0) == [("pull", 4, 0.0)]


# ---- windows ------------------------------------------------------------------------------------


def test_a_batch_is_handed_over_at_once_with_its_window() -> None:
    world = World("m")
    assert world.grant(1.0, 7, left_at=0.9, opens=0.2, closes=0.7) == [("infer", 7)]
    assert world.window == pytest.approx((1.1, 1.6))


def test_a_grant_that_lay_in_a_frozen_socket_is_as_old_as_it_is() -> None:
    world = World("m")
    assert world.grant(5.0, 7, left_at=1.0, closes=0.5) == [("refuse", 7, "too_late"), ("pull", 2, 0.0)]
    assert "3500.0 ms before it came" in world.detail
    assert world.engine.late == 1


def test_no_other_is_pulled_behind_a_batch_that_overruns() -> None:
    world = World("m")
    world.run(1.0, 7)
    world.tick(1.099)
    world.grant(1.0995, 8, seq=2, closes=0.1)
    assert world.finish(1.1995, 8, "too_late") == []
    assert world.engine.late == 1
    assert world.tick(1.5) == [], "it would be refused as well"
    assert world.finish(1.6, 7) == [("pull", 3, 0.0)]


def test_a_batch_that_comes_during_a_hold_is_refused_at_once() -> None:
    world = World("m")
    assert world.place(0.5, "m", "n") == [("hold", "n")]
    assert world.grant(1.0, 7) == [("refuse", 7, "busy")]
    assert "loading the model n" in world.detail
    assert world.tick(2.0) == []
    world.engine.held(9.0, "n", [], 0.0, 0.0)
    assert world.actions() == [("announce",), ("pull", 2, 0.0)]


# ---- models -------------------------------------------------------------------------------------


def test_a_batch_for_a_model_that_is_not_there() -> None:
    world = World("m")
    assert world.grant(1.0, 7, model="n") == [("refuse", 7, "unknown_model"), ("pull", 2, 0.0)]


def test_placement_holds_what_is_missing_and_then_lets_go_of_the_rest() -> None:
    world = World("m", "n")
    assert world.place(1.0, "n", "o") == [("announce",), ("hold", "o")]
    assert set(world.engine.models) == {"n", "o"}
    assert world.grant(1.1, 7) == [("refuse", 7, "unknown_model")]
    world.engine.held(2.0, "o", [], 0.0, 0.0)
    assert world.actions() == [("announce",), ("unload", 1, "m"), ("pull", 2, 0.0)]
    assert world.acted(2.1, 1) == [("release", "m")]


def test_models_are_let_go_of_once_the_last_new_one_is_there() -> None:
    world = World("m")
    assert world.place(1.0, "n", "o") == [("announce",), ("hold", "n")]
    world.engine.held(2.0, "n", [], 0.0, 0.0)
    assert world.actions() == [("announce",), ("hold", "o")]
    world.engine.held(3.0, "o", [], 0.0, 0.0)
    assert world.actions() == [("announce",), ("unload", 1, "m")]


def test_a_device_without_room_for_both_unloads_first() -> None:
    world = World("m", budget=100.0, memory=60.0)
    world.run(1.0, 7)
    assert world.place(1.01, "n") == [("announce",)]
    assert world.finish(1.1, 7) == [("unload", 1, "m")]
    assert world.acted(1.2, 1) == [("release", "m"), ("hold", "n")]


def test_what_cannot_be_held_is_tried_again_once_there_is_more_room() -> None:
    world = World("m")
    assert world.place(1.0, "n") == [("announce",), ("hold", "n")]
    world.engine.hold_failed(2.0, "n", "out of memory")
    assert world.actions() == [("unload", 1, "m"), ("hold", "n")]
    assert world.acted(2.1, 1) == [("release", "m")]
    world.engine.hold_failed(3.0, "n", "no such file")
    assert world.actions() == [("announce",)]
    assert world.engine.models["n"].detail == "no such file"


def test_a_model_that_is_placed_again_before_it_has_gone_need_not_be_held_anew() -> None:
    world = World("m")
    assert world.place(1.0, "n") == [("announce",), ("hold", "n")]
    assert world.place(2.0, "m", "n") == [("announce",)]
    assert world.state("m") == READY
    world.engine.held(3.0, "n", [], 0.0, 0.0)
    assert world.actions() == [("announce",)]
    assert world.grant(3.1, 7) == [("infer", 7)]


def test_a_hold_waits_until_the_worker_has_no_batch() -> None:
    world = World("m")
    world.run(1.0, 7)
    world.tick(1.099)
    world.grant(1.0995, 8, seq=2)
    assert world.place(1.0996, "m", "n") == []
    world.begin(1.1, 8)
    assert world.finish(1.1, 7) == []
    assert world.finish(1.2, 8) == [("hold", "n")]


def test_a_waiting_batch_whose_model_is_taken_away_is_taken_back() -> None:
    world = World("m", "n")
    world.run(1.0, 7)
    world.grant(1.0, 8, model="n")
    assert world.place(1.01, "m") == [("drop", 8), ("announce",)]
    assert world.finish(1.02, 8, "cancelled") == [("unload", 1, "n")]
    assert world.acted(1.03, 1) == [("release", "n")]
    assert world.finish(1.1, 7) == [("pull", 2, 0.0)]


def test_a_model_that_cannot_be_held_is_given_up_until_it_is_placed_anew() -> None:
    world = World("m")
    engine = world.engine
    assert world.place(1.0, "m", "n") == [("hold", "n")]
    engine.hold_failed(2.0, "n", "no such file")
    assert world.actions() == [("announce",)]
    assert (world.state("n"), engine.models["n"].detail) == (FAILED, "no such file")
    assert world.place(3.0, "m", "n") == []
    assert world.place(4.0, "m") == [("announce",)]
    assert world.place(5.0, "m", "n") == [("hold", "n")]


def test_a_model_that_failed_is_tried_again_when_another_is_taken_away() -> None:
    world = World("m")
    world.place(1.0, "m", "n")
    world.engine.hold_failed(2.0, "n", "out of memory")
    assert world.place(3.0, "n") == [("announce",), ("announce",), ("hold", "n")]
    world.engine.hold_failed(4.0, "n", "out of memory")
    assert world.actions() == [("unload", 1, "m"), ("hold", "n")]


def test_a_device_whose_models_all_failed_does_not_pull() -> None:
    world = World()
    engine = world.engine
    engine.session(0.0, True)
    world.place(0.0, "m")
    engine.tick(0.0)
    engine.worker_started(0.0)
    engine.hold_failed(1.0, "m", "no")
    assert world.actions() == [("start worker",), ("hold", "m"), ("announce",)]


def test_a_model_taken_away_while_it_is_being_held_is_let_go_of_afterwards() -> None:
    world = World("m")
    world.place(1.0, "m", "n")
    assert world.place(2.0, "m") == [("announce",)]
    world.engine.held(3.0, "n", [], 0.0, 0.0)
    assert world.actions() == [("unload", 1, "n")]
    assert world.acted(3.1, 1) == [("release", "n")]


def test_a_model_taken_away_and_placed_again_while_it_is_being_held_is_held_once() -> None:
    world = World("m")
    assert world.place(1.0, "m", "n") == [("hold", "n")]
    assert world.place(2.0, "m") == [("announce",)]
    assert world.place(2.5, "m", "n") == []
    world.engine.held(3.0, "n", [], 0.0, 0.0)
    assert world.actions() == [("announce",)]
    assert world.state("n") == READY


# ---- paging --------------------------------------------------------------------------------------


def paged(*models: str) -> World:
    """Holds ``models``, of which each takes 40 of 100 MB: the last two are resident."""
    world = World(*models, budget=100.0, memory=40.0)
    assert [model for model in models if world.state(model) == READY] == list(models[-2:])
    return world


def test_models_that_do_not_all_fit_are_held_one_after_the_other() -> None:
    world = World(budget=100.0, memory=40.0)
    engine = world.engine
    world.place(0.0, "m", "n", "o")
    engine.tick(0.0)
    engine.worker_started(0.0)
    assert world.actions() == [("start worker",), ("hold", "m")]
    engine.held(1.0, "m", [], 0.0, 0.0)
    assert world.actions() == [("announce",), ("hold", "n")]
    engine.held(2.0, "n", [], 0.0, 0.0)
    assert world.actions() == [("announce",), ("unload", 1, "m"), ("announce",)]
    assert world.acted(2.1, 1) == [("hold", "o")]
    engine.held(3.0, "o", [], 0.0, 0.0)
    engine.session(3.0, True)
    assert world.actions() == [("announce",), ("pull", 1, 0.0)]
    assert [world.state(model) for model in "mno"] == [HELD, READY, READY]


def test_room_for_a_new_model_is_made_by_unloading_the_least_recently_used() -> None:
    world = paged("m", "n", "o")
    world.run(1.0, 7, model="n")
    world.finish(1.1, 7)
    assert world.place(2.0, "m", "n", "o", "p") == [("unload", 2, "o"), ("announce",)]
    assert world.acted(2.1, 2) == [("hold", "p")]


def test_a_model_larger_than_the_budget_is_given_up() -> None:
    world = paged("m", "n", "o")
    world.engine.place(1.0, {"m": 40.0, "n": 40.0, "o": 40.0, "big": 101.0})
    assert world.actions() == [("announce",)]
    assert (world.state("big"), "has 100 MB" in world.engine.models["big"].detail) == (FAILED, True)
    assert world.load(2.0, "big") == [("answer", 2, "unknown_model")]


def test_a_model_that_is_found_to_be_larger_than_the_budget_is_let_go_of() -> None:
    world = World("m", budget=100.0, memory=40.0)
    world.engine.place(1.0, {"m": 40.0, "n": 0.0})
    world.engine.held(2.0, "n", [], 0.0, 101.0)
    assert world.actions() == [("hold", "n"), ("announce",), ("unload", 1, "n")]
    assert world.acted(2.1, 1) == [("release", "n")]
    assert (world.state("m"), world.state("n")) == (READY, FAILED)


def test_a_model_that_takes_more_than_was_thought_makes_room_for_itself() -> None:
    world = World("m", budget=100.0, memory=40.0)
    world.engine.place(1.0, {"m": 40.0, "n": 10.0})
    world.engine.held(2.0, "n", [], 0.0, 80.0)
    assert world.actions() == [("hold", "n"), ("announce",), ("unload", 1, "m"), ("announce",)]
    assert (world.state("m"), world.state("n")) == (HELD, READY)


def test_loads_and_unloads_are_handed_over_at_once() -> None:
    world = paged("m", "n", "o")
    assert world.unload(1.0, "n") == [("unload", 2, "n")]
    assert world.window == pytest.approx((1.0, 1.5))
    assert world.load(1.0, "m") == [("load", 3, "m")]
    assert (world.state("m"), world.state("n")) == (HELD, HELD)
    assert world.acted(1.1, 2) == []
    assert world.acted(1.2, 3) == [], "ACTED tells"
    assert (world.state("m"), world.state("n")) == (READY, HELD)
    assert world.grant(1.3, 7, model="m") == [("infer", 7)]


def test_a_load_without_room_is_refused() -> None:
    world = paged("m", "n", "o")
    assert world.load(1.0, "m") == [("answer", 2, "busy")]
    assert "80 of 100 MB are taken" in world.detail
    world.unload(1.0, "n")
    assert world.load(1.0, "m") == [("load", 4, "m")]
    assert world.unload(1.0, "o") == [("unload", 5, "o")]
    assert world.load(1.0, "n") == [("answer", 6, "busy")], "it is on its way out"


def test_a_load_that_needs_an_unload_s_room_may_begin_no_later() -> None:
    world = paged("m", "n", "o")
    world.unload(1.0, "n", closes=0.2)
    world.load(1.0, "m", closes=0.5)
    assert world.window == pytest.approx((1.0, 1.2))
    assert world.acted(1.2, 2, "too_late") == []
    assert world.acted(1.2, 3, "too_late") == []
    assert (world.state("m"), world.state("n")) == (HELD, READY)
    assert world.engine.paging.models.present() == 80.0


def test_a_load_does_not_overtake_what_was_asked_for_before() -> None:
    world = paged("m", "n", "o")
    world.engine.unload(1.0, "n", 1.0, 0.3, 0.5)
    assert world.load(1.0, "m") == [("unload", 2, "n"), ("load", 3, "m")]
    assert world.window == pytest.approx((1.3, 1.5))


def test_a_model_in_use_is_not_unloaded() -> None:
    world = paged("m", "n", "o")
    world.run(1.0, 7, model="n")
    assert world.unload(1.0, "n") == [("answer", 2, "busy")]
    world.finish(1.1, 7)
    assert world.unload(1.1, "n") == [("unload", 3, "n")]


def test_a_batch_of_a_model_that_is_not_resident_is_refused() -> None:
    world = paged("m", "n", "o")
    assert world.grant(1.0, 7, model="m")[0] == ("refuse", 7, "not_loaded")
    world.unload(1.0, "n")
    assert world.grant(1.0, 8, model="n")[0] == ("refuse", 8, "not_loaded")
    world.load(1.0, "m")
    assert world.grant(1.0, 9, model="m")[0] == ("refuse", 9, "not_loaded")


def test_what_is_where_it_is_to_be_is_answered_at_once() -> None:
    world = paged("m", "n", "o")
    assert world.load(1.0, "n") == [("answer", 2, "ok")]
    assert world.unload(1.0, "m") == [("answer", 3, "ok")]


@pytest.mark.parametrize(("model", "code"), [("stranger", "unknown_model"), ("m", "too_late")])
def test_pages_that_cannot_be(model: str, code: str) -> None:
    world = paged("m", "n", "o")
    world.engine.load(9.0, model, 1.0, 0.0, 0.5, 0.01)
    assert world.actions() == [("answer", 2, code)]


def test_a_model_that_is_loading_is_not_loaded_twice() -> None:
    world = World("m", budget=100.0, memory=40.0)
    world.unload(1.0, "m")
    world.acted(1.0, 1)
    assert world.load(1.0, "m") == [("load", 2, "m")]
    assert world.load(1.0, "m") == [("answer", 3, "busy")]
    assert world.unload(1.0, "m") == [("answer", 4, "busy")]


def test_a_load_that_fails_leaves_the_model_held() -> None:
    world = World("m", budget=100.0, memory=40.0)
    world.unload(1.0, "m")
    world.acted(1.0, 1)
    world.load(1.0, "m")
    assert world.acted(1.1, 2, "out_of_memory") == []
    assert world.state("m") == HELD
    assert world.engine.paging.models.claimed() == 0.0


def test_an_unload_that_fails_costs_the_worker() -> None:
    world = World("m", budget=100.0, memory=40.0)
    world.unload(1.0, "m")
    assert world.acted(1.1, 1, "model_error") == [("kill worker",)]
    assert world.load(1.1, "m") == [("answer", 2, "busy")]
    assert (
        world.engine.worker_died(1.2, "signal 9")
        == "the model m could not be unloaded, so nobody knows what is free: why"
    )


def test_a_model_taken_away_while_it_is_loaded_goes_afterwards() -> None:
    world = paged("m", "n", "o")
    world.unload(1.0, "n")
    world.acted(1.0, 2)
    world.load(1.0, "m")
    assert world.place(1.1, "n", "o") == [("announce",)]
    assert world.acted(1.2, 3) == [("unload", 4, "m")]
    assert world.acted(1.3, 4) == [("release", "m")]


# ---- workers that hang or die --------------------------------------------------------------------


def test_a_batch_that_hangs_has_its_worker_killed_and_is_answered() -> None:
    world = World("m")
    world.run(1.0, 7)
    world.tick(1.1)
    hang_at = 1.0 + max(HANG_FACTOR * 0.1, SLO) + HANG_GRACE
    assert world.tick(hang_at - 1e-6) == []
    assert world.tick(hang_at) == [("kill worker",)]
    assert world.tick(hang_at + 1.0) == []
    assert world.engine.next_wake() == 1e18
    world.engine.worker_died(hang_at + 1.0, "signal 9")
    assert world.actions() == [("refuse", 7, "worker_died"), ("announce",)]
    assert "hung" in world.detail


def test_a_batch_that_never_begins_hangs() -> None:
    world = World("m")
    world.grant(1.0, 7, opens=0.5, closes=1e9)
    hang_at = 1.5 + max(HANG_FACTOR * 0.1, SLO) + HANG_GRACE
    assert world.engine.next_wake() == pytest.approx(hang_at)
    assert world.tick(hang_at - 1e-6) == []
    assert world.tick(hang_at + 1e-6) == [("kill worker",)]


PATIENCE = max(HANG_FACTOR * 0.1, SLO) + HANG_GRACE


def test_inputs_that_are_under_way_long_after_their_batch_was_answered_hang() -> None:
    world = World("m")
    world.grant(1.0, 7)
    assert world.finish(1.5, 7, "too_late", copying=True) == [("pull", 2, 0.0)]
    assert world.grant(1.6, 8, seq=2) == [("infer", 8)]
    world.finish(2.1, 8, "too_late")
    hang_at = 1.5 + PATIENCE
    assert world.engine.next_wake() == pytest.approx(hang_at)
    assert world.tick(hang_at - 1e-6) == []
    world.grant(hang_at - 1e-6, 9, seq=3)
    assert world.tick(hang_at) == [("kill worker",)]
    assert "inputs of the model m hung" in world.engine.worker_died(hang_at, "signal 9", [9])
    assert world.actions() == [("refuse", 9, "not_loaded"), ("announce",)]


def test_inputs_that_are_slow_do_not_hang() -> None:
    """Each one takes longer than its batch's window, and comes to its end."""
    world = World("m")
    now = 1.0
    for number in range(20):
        assert ("infer", number) in world.grant(now, number, seq=number + 1, closes=0.3)
        assert ("kill worker",) not in world.finish(now + 0.3, number, "too_late", copying=True)
        now += 0.4
        assert ("kill worker",) not in world.tick(now)
        world.engine.copied_in(now, number)
    assert world.tick(now + 100.0) == []
    world.engine.copied_in(now, 77)


def test_a_batch_that_waits_for_another_ones_inputs_does_not_hang() -> None:
    world = World("m")
    world.grant(1.0, 7, expected=10.0)
    world.finish(1.5, 7, "too_late", copying=True)
    world.grant(1.6, 8, seq=2, closes=1e9)
    assert world.tick(1.6 + 2 * PATIENCE) == []
    world.engine.copied_in(20.0, 7)
    assert world.engine.next_wake() == pytest.approx(20.0 + PATIENCE)
    assert world.tick(20.0 + PATIENCE + 1e-6) == [("kill worker",)]


def test_nothing_is_held_behind_inputs_that_are_under_way() -> None:
    for ends in (True, False):
        world = World("m")
        world.grant(1.0, 7)
        world.finish(1.5, 7, "too_late", copying=True)
        assert world.place(1.6, "m", "n") == []
        assert world.tick(1.7) == []
        if ends:
            world.engine.copied_in(1.8, 7)
            assert world.actions() == [("hold", "n")]
        else:
            assert world.tick(1.5 + PATIENCE) == [("kill worker",)]


def test_a_hold_of_which_nothing_is_heard_hangs() -> None:
    world = World("m")
    engine = world.engine
    world.place(1.0, "m", "n")
    now = 1.0
    for _ in range(MAX_LOAD_DEATHS):
        assert world.state("n") == LOADING
        engine.progress(now + HOLD_SILENCE - 1.0)
        hang_at = now + 2 * HOLD_SILENCE - 1.0
        assert engine.next_wake() == pytest.approx(hang_at)
        assert world.tick(hang_at - 1e-3) == []
        assert world.tick(hang_at + 1e-3) == [("kill worker",)]
        assert "holding the model n hung" in engine.worker_died(hang_at + 1.0, "signal 9")
        now = engine.next_wake()
        engine.tick(now)
        engine.worker_started(now)
        engine.held(now, "m", [], 0.0, 0.0)
        world.actions()
    assert world.state("n") == FAILED
    assert "hung" in engine.models["n"].detail
    assert world.state("m") == READY


def test_what_a_worker_is_not_killed_for_is_not_to_blame() -> None:
    """A LOAD hangs while an innocent batch runs; then a batch while an innocent LOAD is under way."""
    world = World("m", "n", budget=100.0, memory=40.0)
    world.unload(1.0, "n")
    world.acted(1.0, 1)
    world.load(1.0, "n", closes=0.1, expected=0.0)
    hang_at = 1.1 + LOAD_GRACE
    world.run(hang_at - 0.1, 7)
    assert world.tick(hang_at + 1e-6) == [("kill worker",)]
    world.engine.worker_died(hang_at, "signal 9", [7])
    assert world.actions() == [("refuse", 7, "not_loaded"), ("answer", 2, "worker_died"), ("announce",)]
    assert [world.engine.models[key].deaths for key in "mn"] == [0, 1]
    assert not world.engine.health.careful()

    world = World("m", "n", budget=100.0, memory=40.0)
    world.unload(1.0, "n")
    world.acted(1.0, 1)
    world.run(1.0, 7, closes=100.0)
    world.grant(1.0, 8, closes=100.0)
    world.load(1.0, "n", closes=100.0)
    assert world.tick(1.0 + PATIENCE) == [("kill worker",)]
    world.engine.worker_died(4.0, "signal 9", [7, 8])
    assert world.actions() == [
        ("refuse", 7, "worker_died"),
        ("refuse", 8, "not_loaded"),
        ("answer", 2, "worker_died"),
        ("announce",),
    ]
    assert [world.engine.models[key].deaths for key in "mn"] == [0, 0]


def test_batches_that_are_late_behind_others_tell_nothing() -> None:
    world = World("m")
    now = 1.0
    for number in range(0, 20, 2):
        world.run(now, number, seq=world.engine.pulls.seq)
        world.grant(now, number + 1, closes=1.0)
        assert ("kill worker",) not in world.finish(now + 1.0, number + 1, "too_late")
        world.finish(now + 1.0, number)
        now += 2.0


def test_a_load_that_hangs_has_its_worker_killed() -> None:
    world = World("m", budget=100.0, memory=40.0)
    world.unload(1.0, "m")
    world.acted(1.0, 1)
    world.load(1.0, "m", closes=0.5, expected=0.2)
    hang_at = 1.5 + HANG_FACTOR * 0.2 + LOAD_GRACE
    assert world.engine.next_wake() == pytest.approx(hang_at)
    assert world.tick(hang_at - 1e-6) == []
    assert world.tick(hang_at + 1e-6) == [("kill worker",)]
    assert world.engine.worker_died(hang_at + 1.0, "signal 9") == "loading the model m hung"
    assert world.actions() == [("answer", 2, "worker_died"), ("announce",)]


def test_nothing_is_handed_to_a_worker_that_is_being_killed() -> None:
    world = World("m")
    world.run(1.0, 7)
    world.tick(1.1)
    world.tick(10.0)
    assert world.grant(10.0, 8, seq=2) == [("refuse", 8, "busy")]
    assert world.finish(10.0, 7) == []
    assert world.place(10.0, "m", "n") == []
    assert world.engine.next_wake() == 1e18
    world.engine.worker_died(10.1, "signal 9")
    assert world.actions() == [("announce",)]


def test_after_a_death_the_worker_is_started_again_and_holds_and_pulls() -> None:
    world = World("m")
    engine = world.engine
    world.run(1.0, 7)
    engine.worker_died(1.05, "signal 11")
    assert world.actions() == [("refuse", 7, "worker_died"), ("announce",)]
    assert world.detail == "signal 11"
    assert world.state("m") == QUEUED
    assert engine.next_wake() == pytest.approx(1.05 + BACK_OFF)
    assert world.tick(1.05 + BACK_OFF - 1e-6) == []
    assert world.tick(1.05 + BACK_OFF) == [("start worker",)]
    engine.worker_started(2.0)
    engine.held(3.0, "m", [], 0.0, 0.0)
    assert world.actions() == [("hold", "m"), ("announce",), ("pull", 2, 0.0)]
    assert engine.health.deaths == 1


def test_the_worker_died_of_what_had_begun() -> None:
    world = World("m")
    world.run(1.0, 7)
    world.grant(1.0, 8)
    world.engine.worker_died(1.05, "signal 11")
    assert world.actions() == [("refuse", 7, "worker_died"), ("refuse", 8, "not_loaded"), ("announce",)]


def test_or_of_whom_the_worker_had_in_hand_where_that_is_known() -> None:
    world = World("m")
    world.run(1.0, 7)
    world.grant(1.0, 8)
    world.engine.worker_died(1.05, "signal 11", [8])
    assert world.actions() == [("refuse", 7, "not_loaded"), ("refuse", 8, "worker_died"), ("announce",)]
    again = World("m")
    again.run(1.0, 7)
    again.engine.worker_died(1.05, "signal 11", [6])
    assert again.actions() == [("refuse", 7, "worker_died"), ("announce",)]


def test_or_of_an_input_where_nothing_had_begun() -> None:
    world = World("m")
    world.grant(1.0, 7)
    world.engine.worker_died(1.05, "signal 11")
    assert world.actions() == [("refuse", 7, "worker_died"), ("announce",)]


def test_after_a_death_batches_are_handed_over_one_by_one_for_a_while() -> None:
    world = World("m")
    engine = world.engine
    world.run(1.0, 0)
    engine.worker_died(1.05, "signal 11")
    engine.tick(2.0)
    engine.worker_started(2.0)
    engine.held(2.0, "m", [], 0.0, 0.0)
    assert world.actions()[-1] == ("pull", 2, 0.0)
    for number in range(CAREFUL):
        now = 3.0 + number
        world.run(now, number + 1, seq=number + 2)
        assert world.tick(now + 0.1) == [], "none behind it"
        assert world.finish(now + 0.1, number + 1) == [("pull", number + 3, 0.0)]
    world.run(99.0, 99, seq=CAREFUL + 2)
    assert world.tick(99.1) == [("pull", CAREFUL + 3, 0.0)]


def test_deaths_in_a_row_back_off_and_a_finished_batch_ends_the_row() -> None:
    world = World("m")
    engine = world.engine
    now, pauses = 1.0, []
    for _ in range(10):
        engine.worker_died(now, "signal 11")
        pauses.append(engine.next_wake() - now)
        now = engine.next_wake()
        engine.tick(now)
        engine.worker_started(now)
        engine.held(now, "m", [], 0.0, 0.0)
    assert pauses == pytest.approx([min(BACK_OFF * 2**number, MAX_BACK_OFF) for number in range(10)])
    world.actions()
    world.run(now, 1)
    world.finish(now, 1)
    engine.worker_died(now, "signal 11")
    assert engine.next_wake() - now == pytest.approx(BACK_OFF)


def test_a_grant_that_comes_after_the_death_is_answered() -> None:
    world = World("m")
    world.engine.worker_died(1.0, "signal 11")
    world.actions()
    assert world.grant(1.01, 7) == [("refuse", 7, "not_loaded")]
    assert world.load(1.01, "m") == [("answer", 1, "busy")]


def test_a_death_ends_every_load_and_unload() -> None:
    world = paged("m", "n", "o")
    world.unload(1.0, "n")
    world.load(1.0, "m")
    world.engine.worker_died(1.1, "signal 11")
    assert world.actions() == [("answer", 2, "worker_died"), ("answer", 3, "worker_died"), ("announce",)]
    assert {world.state(model) for model in "mno"} == {QUEUED}
    assert world.engine.paging.models.present() == 0.0
    assert not world.engine.acted(1.2, 3, "ok", "")


def test_a_model_that_kills_its_worker_while_it_is_being_held_is_given_up() -> None:
    world = World("m")
    engine = world.engine
    world.place(1.0, "m", "n")
    now = 1.0
    for _ in range(MAX_LOAD_DEATHS):
        assert world.state("n") == LOADING
        engine.worker_died(now, "out of memory")
        now = engine.next_wake()
        engine.tick(now)
        engine.worker_started(now)
        engine.held(now, "m", [], 0.0, 0.0)
    assert world.state("n") == FAILED
    assert "out of memory" in engine.models["n"].detail
    assert world.state("m") == READY
    world.actions()
    assert world.grant(now, 7) == [("infer", 7)]  # its first pull still holds


def test_a_model_that_kills_its_worker_while_it_is_loaded_is_given_up() -> None:
    world = World("m", "n", budget=100.0, memory=40.0)
    engine = world.engine
    now = 1.0
    for _ in range(MAX_LOAD_DEATHS):
        engine.unload(now, "m", now, 0.0, 1.0)
        world.settle(now)
        engine.load(now, "m", now, 0.0, 1.0, 0.01)
        engine.worker_died(now, "signal 11")
        now = engine.next_wake()
        engine.tick(now)
        world.actions()
        engine.worker_started(now)
        world.settle(now)
    assert (world.state("m"), world.state("n")) == (FAILED, READY)


# ---- shards that come and go ---------------------------------------------------------------------


def test_a_lost_session_takes_back_what_waits_and_finishes_what_runs() -> None:
    world = World("m")
    world.run(1.0, 7)
    world.grant(1.0, 8)
    world.engine.session(1.01, False)
    assert world.actions() == [("drop", 8)]
    assert world.finish(1.02, 8, "cancelled") == []
    assert world.finish(1.1, 7) == []
    world.engine.session(2.0, True)
    assert world.actions() == [("pull", 2, 0.0)]


def test_another_session_is_pulled_from_behind_what_runs_for_the_one_before() -> None:
    world = World("m")
    world.run(1.0, 7, expected=1.0)
    world.tick(2.0 - LEAD + 1e-9)
    world.grant(1.9985, 8, seq=2)
    world.engine.session(1.999, True)
    assert world.actions() == [("drop", 8), ("pull", 3, pytest.approx(0.001))]
    assert world.grant(1.9995, 70, seq=3) == [("infer", 70)]
    assert world.finish(1.9996, 8, "cancelled") == []
    assert world.finish(2.0, 7) == []
    world.begin(2.0, 70)
    assert world.finish(2.1, 70) == [("pull", 4, 0.0)]


def test_a_batch_that_had_begun_before_it_could_be_taken_back_goes_on() -> None:
    world = World("m")
    world.grant(1.0, 7)
    world.engine.session(1.01, False)
    assert world.actions() == [("drop", 7)]
    world.begin(1.02, 7, at=1.009)
    assert world.engine.running is not None
    assert world.finish(1.1, 7) == []
    assert not world.engine.handed


def test_the_end_of_a_batch_that_the_worker_does_not_have_is_nothing() -> None:
    world = World("m")
    assert world.finish(1.0, 99, known=False) == []
    world.run(1.0, 7)
    assert world.finish(1.0, 99, known=False) == []
    assert world.engine.running is not None


def test_an_agent_that_stops_waits_for_what_the_worker_has() -> None:
    world = World("m")
    assert world.engine.drain_time() == 0.0
    world.run(1.0, 7)
    assert world.engine.drain_time() == SLO
