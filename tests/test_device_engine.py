"""The engine of one device in virtual time: pulls, windows, workers that hang or die, models that come and go."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nodes.engine.actions import Action, Announce, KillWorker, Load, Refuse, SendPull, Start, StartWorker, Unload
from nodes.engine.device import (
    BACK_OFF,
    FAILED,
    HANG_FACTOR,
    HANG_GRACE,
    LEAD,
    LOADING,
    MAX_BACK_OFF,
    MAX_LOAD_DEATHS,
    MAX_TRIP,
    QUEUED,
    READY,
    DeviceEngine,
)

OTHERS = {StartWorker: "start worker", KillWorker: "kill worker", Announce: "announce"}


def shown(actions: list[Action]) -> list[tuple[Any, ...]]:
    """Actions as tuples, to compare and to read."""
    found: list[tuple[Any, ...]] = []
    for action in actions:
        if isinstance(action, SendPull):
            found.append(("pull", action.seq, pytest.approx(action.free_in)))
        elif isinstance(action, Start):
            found.append(("start", action.batch))
        elif isinstance(action, Refuse):
            found.append(("refuse", action.batch, action.code))
        elif isinstance(action, Load):
            found.append(("load", action.model))
        elif isinstance(action, Unload):
            found.append(("unload", action.model))
        else:
            found.append((OTHERS[type(action)],))
    return found


SLO = 0.5


class World:
    """A device engine, moved by hand."""

    def __init__(self, *models: str) -> None:
        """Up, connected and holding ``models`` at 0."""
        self.engine = DeviceEngine()
        if models:
            self.engine.place(0.0, list(models))
            self.engine.tick(0.0)
            self.engine.worker_started(0.0)
            for model in models:
                self.engine.loaded(0.0, model, [(1, 0.1)])
            self.engine.session(0.0, True)
            self.detail = ""
            assert self.actions()[-1] == ("pull", 1, 0.0)

    def actions(self) -> list[tuple[Any, ...]]:
        actions = self.engine.take_actions()
        for action in actions:
            if isinstance(action, Refuse):
                self.detail = action.detail
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

    def tick(self, now: float) -> list[tuple[Any, ...]]:
        self.engine.tick(now)
        return self.actions()

    def finish(self, now: float, batch: int, known: bool = True) -> list[tuple[Any, ...]]:
        assert self.engine.finished(now, batch) == known
        return self.actions()


# ---- the way up -------------------------------------------------------------------------------


def test_a_device_without_models_does_nothing() -> None:
    world = World()
    world.engine.session(0.0, True)
    assert world.tick(1.0) == []
    assert world.engine.next_wake() == 1e18


def test_the_worker_is_started_then_models_are_loaded_one_by_one_and_then_it_pulls() -> None:
    world = World()
    engine = world.engine
    engine.session(0.0, True)
    engine.place(1.0, ["m", "n"])
    assert engine.next_wake() <= 1.0
    assert world.tick(1.0) == [("start worker",)]
    assert world.tick(1.1) == []
    engine.worker_started(2.0)
    assert world.actions() == [("load", "m")]
    assert engine.models["m"].state == LOADING
    engine.loaded(3.0, "m", [(1, 0.1)])
    assert world.actions() == [("announce",), ("load", "n")]
    engine.loaded(4.0, "n", [])
    assert world.actions() == [("announce",), ("pull", 1, 0.0)]
    assert engine.models["m"].profile == [(1, 0.1)]
    assert engine.next_wake() == 1e18


def test_nothing_is_pulled_before_there_is_a_shard() -> None:
    world = World()
    engine = world.engine
    engine.place(0.0, ["m"])
    engine.tick(0.0)
    engine.worker_started(0.0)
    engine.loaded(0.0, "m", [])
    assert ("pull", 1, 0.0) not in world.actions()
    engine.session(1.0, True)
    assert world.actions() == [("pull", 1, 0.0)]


# ---- pulls --------------------------------------------------------------------------------------


def test_the_next_pull_goes_just_before_the_running_batch_ends() -> None:
    world = World("m")
    assert world.grant(1.0, 7) == [("start", 7)]
    pull_at = 1.0 + 0.1 - LEAD
    assert world.engine.next_wake() == pytest.approx(pull_at)
    assert world.tick(pull_at - 1e-6) == []
    assert world.tick(pull_at + 1e-9) == [("pull", 2, LEAD)]
    assert world.engine.next_wake() == pytest.approx(1.0 + max(HANG_FACTOR * 0.1, SLO) + HANG_GRACE)


def test_the_round_trip_makes_the_pull_earlier() -> None:
    world = World("m")
    world.grant(1.0, 7, left_at=0.95)
    assert world.engine.round_trip == pytest.approx(0.05)
    assert world.engine.next_wake() == pytest.approx(1.0 + 0.1 - LEAD - 0.05)


def test_a_grant_that_lay_for_long_does_not_move_the_round_trip_far() -> None:
    world = World("m")
    world.grant(60.0, 7, left_at=1.0, closes=100.0)
    assert world.engine.round_trip == MAX_TRIP


def test_a_batch_that_ends_early_is_followed_by_a_pull_at_once() -> None:
    world = World("m")
    world.grant(1.0, 7)
    assert world.finish(1.02, 7) == [("pull", 2, 0.0)]


def test_there_is_one_pull_at_a_time() -> None:
    world = World("m")
    assert world.tick(1.0) == []
    world.grant(1.0, 7)
    assert world.tick(1.2) == [("pull", 2, 0.0)]
    assert world.tick(1.3) == []
    assert world.finish(1.4, 7) == []


def test_the_next_batch_waits_and_starts_as_the_device_gets_free() -> None:
    world = World("m")
    world.grant(1.0, 7)
    world.tick(1.099)
    assert world.grant(1.0995, 8, seq=2) == []
    assert world.finish(1.1, 7) == [("start", 8)]
    assert world.tick(1.15) == []
    assert world.finish(1.2, 8) == [("pull", 3, 0.0)]


def test_a_second_waiting_batch_is_refused() -> None:
    world = World("m")
    world.grant(1.0, 7)
    world.grant(1.0, 8)
    assert world.grant(1.0, 9) == [("refuse", 9, "too_late")]
    assert world.finish(1.05, 7) == [("start", 8)]


# ---- windows ------------------------------------------------------------------------------------


def test_a_batch_is_not_started_before_its_window_opens() -> None:
    world = World("m")
    assert world.grant(1.0, 7, opens=0.2) == []
    assert world.engine.next_wake() == pytest.approx(1.2)
    assert world.tick(1.19) == []
    assert world.tick(1.2) == [("start", 7)]


def test_a_batch_is_started_up_to_the_end_of_its_window() -> None:
    world = World("m")
    assert world.grant(1.5, 7, left_at=1.0, closes=0.5)[0] == ("start", 7)


def test_a_grant_that_lay_in_a_frozen_socket_is_as_old_as_it_is() -> None:
    world = World("m")
    assert world.grant(5.0, 7, left_at=1.0, closes=0.5) == [("refuse", 7, "too_late"), ("pull", 2, 0.0)]
    assert "3500.0 ms before the batch came" in world.detail
    assert world.engine.late == 1


def test_a_batch_behind_one_that_overruns_is_refused_as_soon_as_its_window_closes() -> None:
    world = World("m")
    world.grant(1.0, 7)
    world.tick(1.099)
    assert world.grant(1.0995, 8, seq=2, closes=0.1) == []
    assert world.engine.next_wake() == pytest.approx(1.1995)
    assert world.tick(1.19) == []
    assert world.tick(1.1996) == [("refuse", 8, "too_late")]
    # No other is pulled until the device is free: it would be refused as well.
    assert world.tick(1.5) == []
    assert world.finish(1.6, 7) == [("pull", 3, 0.0)]


def test_a_batch_that_comes_during_a_load_is_refused_at_once() -> None:
    world = World("m")
    world.engine.place(0.5, ["m", "n"])
    assert world.actions() == [("load", "n")]
    assert world.grant(1.0, 7) == [("refuse", 7, "unknown_model")]
    assert "loading the model n" in world.detail
    assert world.tick(2.0) == []
    world.engine.loaded(9.0, "n", [])
    assert world.actions() == [("announce",), ("pull", 2, 0.0)]


# ---- models -------------------------------------------------------------------------------------


def test_a_batch_for_a_model_that_is_not_there() -> None:
    world = World("m")
    assert world.grant(1.0, 7, model="n") == [("refuse", 7, "unknown_model"), ("pull", 2, 0.0)]


def test_placement_loads_what_is_missing_and_then_lets_go_of_the_rest() -> None:
    world = World("m", "n")
    world.engine.place(1.0, ["n", "o"])
    assert world.actions() == [("announce",), ("load", "o")]
    assert set(world.engine.models) == {"n", "o"}
    assert world.grant(1.1, 7) == [("refuse", 7, "unknown_model")]
    world.engine.loaded(2.0, "o", [])
    assert world.actions() == [("announce",), ("unload", "m"), ("pull", 2, 0.0)]


def test_models_are_let_go_of_once_the_last_new_one_is_there() -> None:
    world = World("m")
    world.engine.place(1.0, ["n", "o"])
    world.engine.loaded(2.0, "n", [])
    assert world.actions() == [("announce",), ("load", "n"), ("announce",), ("load", "o")]
    world.engine.loaded(3.0, "o", [])
    assert world.actions() == [("announce",), ("unload", "m")]


def test_a_device_without_room_for_both_unloads_first() -> None:
    world = World("m")
    world.grant(1.0, 7)
    world.engine.place(1.01, ["n"], unload_first=True)
    assert world.actions() == [("unload", "m"), ("announce",)]
    assert world.finish(1.1, 7) == [("load", "n")]


def test_what_cannot_be_loaded_is_tried_again_once_there_is_more_room() -> None:
    world = World("m")
    world.engine.place(1.0, ["n"])
    world.engine.load_failed(2.0, "n", "out of memory")
    assert world.actions() == [("announce",), ("load", "n"), ("unload", "m"), ("load", "n")]
    world.engine.load_failed(3.0, "n", "no such file")
    assert world.actions() == [("announce",)]
    assert world.engine.models["n"].detail == "no such file"


def test_a_model_that_is_placed_again_before_it_has_gone_need_not_be_loaded() -> None:
    world = World("m")
    world.engine.place(1.0, ["n"])
    world.engine.place(2.0, ["m", "n"])
    assert world.actions() == [("announce",), ("load", "n"), ("announce",)]
    assert world.engine.models["m"].state == READY
    world.engine.loaded(3.0, "n", [])
    assert world.actions() == [("announce",)]
    assert world.grant(3.1, 7) == [("start", 7)]


def test_a_load_waits_until_the_running_batch_and_the_waiting_one_are_done() -> None:
    world = World("m")
    world.grant(1.0, 7)
    world.tick(1.099)
    world.grant(1.0995, 8, seq=2)
    world.engine.place(1.0996, ["m", "n"])
    assert world.actions() == []
    assert world.finish(1.1, 7) == [("start", 8)]
    assert world.finish(1.2, 8) == [("load", "n")]


def test_a_waiting_batch_whose_model_is_taken_away_is_refused() -> None:
    world = World("m", "n")
    world.grant(1.0, 7)
    world.grant(1.0, 8, model="n")
    world.engine.place(1.01, ["m"])
    assert world.actions() == [("refuse", 8, "unknown_model"), ("announce",), ("unload", "n")]
    assert world.finish(1.1, 7) == [("pull", 2, 0.0)]


def test_a_model_that_cannot_be_loaded_is_given_up_until_it_is_placed_anew() -> None:
    world = World("m")
    engine = world.engine
    engine.place(1.0, ["m", "n"])
    engine.load_failed(2.0, "n", "no such file")
    assert world.actions() == [("load", "n"), ("announce",)]
    assert (engine.models["n"].state, engine.models["n"].detail) == (FAILED, "no such file")
    engine.place(3.0, ["m", "n"])
    assert world.actions() == []
    engine.place(4.0, ["m"])
    engine.place(5.0, ["m", "n"])
    assert world.actions() == [("announce",), ("load", "n")]


def test_a_model_that_failed_is_tried_again_when_another_is_taken_away() -> None:
    world = World("m")
    world.engine.place(1.0, ["m", "n"])
    world.engine.load_failed(2.0, "n", "out of memory")
    world.engine.place(3.0, ["n"])
    assert world.actions() == [("load", "n"), ("announce",), ("announce",), ("load", "n")]
    world.engine.load_failed(4.0, "n", "out of memory")
    assert world.actions() == [("unload", "m"), ("load", "n")]


def test_a_device_whose_models_all_failed_does_not_pull() -> None:
    world = World()
    engine = world.engine
    engine.session(0.0, True)
    engine.place(0.0, ["m"])
    engine.tick(0.0)
    engine.worker_started(0.0)
    engine.load_failed(1.0, "m", "no")
    assert world.actions() == [("start worker",), ("load", "m"), ("announce",)]


def test_a_model_taken_away_while_it_loads_is_let_go_of_afterwards() -> None:
    world = World("m")
    world.engine.place(1.0, ["m", "n"])
    world.engine.place(2.0, ["m"])
    assert world.actions() == [("load", "n"), ("announce",)]
    world.engine.loaded(3.0, "n", [])
    assert world.actions() == [("unload", "n")]


def test_a_model_taken_away_and_placed_again_while_it_loads_is_loaded_once() -> None:
    world = World("m")
    world.engine.place(1.0, ["m", "n"])
    world.engine.place(2.0, ["m"])
    world.engine.place(2.5, ["m", "n"])
    world.engine.loaded(3.0, "n", [])
    assert world.actions() == [("load", "n"), ("announce",), ("announce",)]
    assert world.engine.models["n"].state == READY


# ---- workers that hang or die --------------------------------------------------------------------


def test_a_batch_that_hangs_has_its_worker_killed_and_is_answered() -> None:
    world = World("m")
    world.grant(1.0, 7)
    world.tick(1.1)
    hang_at = 1.0 + max(HANG_FACTOR * 0.1, SLO) + HANG_GRACE
    assert world.tick(hang_at - 1e-6) == []
    assert world.tick(hang_at) == [("kill worker",)]
    assert world.tick(hang_at + 1.0) == []
    assert world.engine.next_wake() == 1e18
    world.engine.worker_died(hang_at + 1.0, "signal 9")
    assert world.actions() == [("refuse", 7, "worker_died"), ("announce",)]
    assert "hung" in world.detail


def test_nothing_is_started_on_a_worker_that_is_being_killed() -> None:
    world = World("m")
    world.grant(1.0, 7)
    world.tick(1.1)
    world.tick(10.0)
    assert world.grant(10.0, 8, seq=2) == []
    assert world.finish(10.0, 7) == []
    assert world.engine.next_wake() == pytest.approx(10.5)
    world.engine.worker_died(10.1, "signal 9")
    assert world.actions() == [("refuse", 8, "unknown_model"), ("announce",)]


def test_after_a_death_the_worker_is_started_again_and_loads_and_pulls() -> None:
    world = World("m")
    engine = world.engine
    world.grant(1.0, 7)
    engine.worker_died(1.05, "signal 11")
    assert world.actions() == [("refuse", 7, "worker_died"), ("announce",)]
    assert world.detail == "signal 11"
    assert engine.models["m"].state == QUEUED
    assert engine.next_wake() == pytest.approx(1.05 + BACK_OFF)
    assert world.tick(1.05 + BACK_OFF - 1e-6) == []
    assert world.tick(1.05 + BACK_OFF) == [("start worker",)]
    engine.worker_started(2.0)
    engine.loaded(3.0, "m", [])
    assert world.actions() == [("load", "m"), ("announce",), ("pull", 2, 0.0)]
    assert engine.restarts == 1


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
        engine.loaded(now, "m", [])
    assert pauses == pytest.approx([min(BACK_OFF * 2**number, MAX_BACK_OFF) for number in range(10)])
    world.actions()
    world.grant(now, 1)
    world.finish(now, 1)
    engine.worker_died(now, "signal 11")
    assert engine.next_wake() - now == pytest.approx(BACK_OFF)


def test_a_grant_that_comes_after_the_death_is_answered() -> None:
    world = World("m")
    world.engine.worker_died(1.0, "signal 11")
    world.actions()
    assert world.grant(1.01, 7) == [("refuse", 7, "unknown_model")]


def test_a_model_that_kills_its_worker_while_it_loads_is_given_up() -> None:
    world = World("m")
    engine = world.engine
    engine.place(1.0, ["m", "n"])
    now = 1.0
    for _ in range(MAX_LOAD_DEATHS):
        assert engine.models["n"].state == LOADING
        engine.worker_died(now, "out of memory")
        now = engine.next_wake()
        engine.tick(now)
        engine.worker_started(now)
        engine.loaded(now, "m", [])
    assert engine.models["n"].state == FAILED
    assert "out of memory" in engine.models["n"].detail
    assert engine.models["m"].state == READY
    world.actions()
    assert world.grant(now, 7) == [("start", 7)]  # its first pull still holds
    assert world.finish(now, 7) == [("pull", 2, 0.0)]


# ---- shards that come and go ---------------------------------------------------------------------


def test_a_lost_session_refuses_what_waits_and_finishes_what_runs() -> None:
    world = World("m")
    world.grant(1.0, 7)
    world.grant(1.0, 8)
    world.engine.session(1.01, False)
    assert world.actions() == [("refuse", 8, "unknown_model")]
    assert world.finish(1.1, 7) == []
    assert world.engine.waiting is None
    world.engine.session(2.0, True)
    assert world.actions() == [("pull", 2, 0.0)]


def test_another_session_is_pulled_from_behind_what_runs_for_the_one_before() -> None:
    world = World("m")
    world.grant(1.0, 7, expected=1.0)
    world.tick(2.0 - LEAD + 1e-9)
    world.grant(1.9985, 8, seq=2)
    world.engine.session(1.999, True)
    assert world.actions() == [("refuse", 8, "unknown_model"), ("pull", 3, pytest.approx(0.001))]
    assert world.grant(1.9995, 70, seq=3) == []
    assert world.finish(2.0, 7) == [("start", 70)]
    assert world.finish(2.1, 70) == [("pull", 4, 0.0)]


def test_the_end_of_a_batch_that_does_not_run_is_nothing() -> None:
    world = World("m")
    assert world.finish(1.0, 99, known=False) == []
    world.grant(1.0, 7)
    assert world.finish(1.0, 99, known=False) == []
    assert world.engine.running is not None


# ---- everything, in any order --------------------------------------------------------------------

MODELS = ["m", "n", "o"]


class DeviceMachine(RuleBasedStateMachine):
    """Shards and a worker, played by hypothesis. The worker does what real ones do: it is started, killed and told
    things by actions only, and answers in its own time or dies."""

    @initialize(placed=st.sets(st.sampled_from(MODELS), min_size=1))
    def begin(self, placed: set[str]) -> None:
        self.now = 100.0
        self.engine = DeviceEngine()
        self.worker = "none"
        """none, starting, up or dying."""
        self.loading = ""
        self.held: set[str] = set()
        """What the worker has loaded."""
        self.just_loaded = ""
        self.room_is_short = False
        """It may let go of a model before what is to come is there."""
        self.batch = 0
        """What the worker runs."""
        self.last_batch = 0
        self.latest: dict[int, float] = {}
        self.open: set[int] = set()
        """Granted and not answered."""
        self.wants: dict[int, str] = {}
        """The model of each batch."""
        self.seq = 0
        self.owed = False
        """A pull is unanswered."""
        self.connected = False
        self.place(placed)
        self.session(True)
        self.tick(0.0)
        self.bring_up()

    def bring_up(self) -> None:
        while self.worker == "starting" or self.loading:
            self.worker_speaks("good")

    def act(self) -> None:
        engine = self.engine
        actions = engine.take_actions()
        while actions:
            for action in actions:
                self._do(action)
            actions = engine.take_actions()

    def _do(self, action: Action) -> None:
        if isinstance(action, SendPull):
            assert self.connected
            assert not self.owed
            assert action.seq == self.seq + 1
            assert action.free_in >= 0.0
            assert self.worker == "up"
            assert not self.loading
            assert self.held
            self.seq, self.owed = action.seq, True
        elif isinstance(action, Start):
            assert self.worker == "up"
            assert not self.batch, "one batch at a time"
            assert not self.loading
            assert action.batch in self.open
            assert self.wants[action.batch] in self.held
            assert self.wants[action.batch] in self.engine.models, "nothing is started of what is to go"
            assert self.now <= self.latest[action.batch], "nothing is started late"
            self.batch = action.batch
        elif isinstance(action, Refuse):
            assert action.batch in self.open, "answered twice, or not granted"
            assert action.batch != self.batch
            assert action.detail
            self.open.discard(action.batch)
        elif isinstance(action, StartWorker):
            assert self.worker == "none"
            self.worker = "starting"
        elif isinstance(action, KillWorker):
            assert self.worker == "up"
            self.worker = "dying"
        elif isinstance(action, Load):
            assert self.worker == "up"
            assert not self.loading
            assert not self.batch
            assert action.model not in self.held
            self.loading = action.model
        elif isinstance(action, Unload):
            assert self.worker in ("up", "dying")
            assert action.model in self.held
            assert action.model not in self.engine.models
            assert self.room_is_short or action.model == self.just_loaded or not self.awaits_load()
            self.held.discard(action.model)

    def awaits_load(self) -> bool:
        return any(model.state in (QUEUED, LOADING) for model in self.engine.models.values())

    # ---- the shards ----------------------------------------------------------------------

    @precondition(lambda self: self.owed)
    @rule(
        model=st.sampled_from([*MODELS, "m", "stranger"]),
        age=st.sampled_from([0.0, 0.001, 0.001, 0.5, 30.0]),
        opens=st.sampled_from([0.0, 0.0, 0.05]),
        closes=st.sampled_from([0.001, 0.1, 1.0, 60.0]),
        expected=st.sampled_from([0.0, 0.01, 0.2]),
    )
    def grant(self, model: str, age: float, opens: float, closes: float, expected: float) -> None:
        self.owed = False
        self._grant(self.seq, model, age, opens, closes, expected)

    @precondition(lambda self: self.connected)
    @rule(model=st.sampled_from(MODELS))
    def grant_unasked(self, model: str) -> None:
        """An old pull's."""
        self._grant(self.seq - 1, model, 0.0, 0.0, 1.0, 0.1)

    def _grant(self, seq: int, model: str, age: float, opens: float, closes: float, expected: float) -> None:
        self.last_batch += 1
        self.latest[self.last_batch] = self.now - age + closes
        self.open.add(self.last_batch)
        self.wants[self.last_batch] = model
        self.engine.grant(self.now, self.last_batch, seq, model, self.now - age, opens, closes, expected, SLO)
        self.act()

    @rule(connected=st.sampled_from([True, True, False]))
    def session(self, connected: bool) -> None:
        """The device works for another shard, or its own is another one."""
        self.connected = connected
        self.owed = False
        self.engine.session(self.now, connected)
        self.act()
        assert self.open <= {self.batch}, "what has not started is left to others"

    # ---- the worker ----------------------------------------------------------------------

    @precondition(lambda self: self.worker != "none")
    @rule(how=st.sampled_from(["good", "good", "good", "bad", "dies"]))
    def worker_speaks(self, how: str) -> None:
        if how == "dies":
            self._die()
        elif self.worker == "starting":
            self.worker = "up"
            self.engine.worker_started(self.now)
        elif self.batch:
            batch, self.batch = self.batch, 0
            assert self.engine.finished(self.now, batch)
            self.open.remove(batch)
            assert not self.engine.finished(self.now, batch)
        elif self.loading:
            model, self.loading = self.loading, ""
            if how == "good":
                self.held.add(model)
                self.just_loaded = model
                self.engine.loaded(self.now, model, [(1, 0.01)])
            else:
                self.room_is_short = True
                self.engine.load_failed(self.now, model, "no")
        self.act()
        self.room_is_short, self.just_loaded = False, ""

    def _die(self) -> None:
        self.worker, self.loading = "none", ""
        self.held.clear()
        self.batch = 0
        self.engine.worker_died(self.now, "signal 11")

    @rule(placed=st.sets(st.sampled_from(MODELS)), unload_first=st.sampled_from([False, False, True]))
    def place(self, placed: set[str], unload_first: bool = False) -> None:
        self.room_is_short = unload_first
        self.engine.place(self.now, sorted(placed), unload_first)
        self.act()
        self.room_is_short = False
        assert set(self.engine.models) == placed

    # ---- time ----------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.05, 0.3, 2.0, 40.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.engine.tick(self.now)
        self.act()

    @rule(steps=st.integers(1, 4))
    def tick_when_asked_for(self, steps: int) -> None:
        for _ in range(steps):
            wake = self.engine.next_wake()
            if wake >= 1e18:
                return
            self.now = max(self.now, wake)
            self.engine.tick(self.now)
            self.act()
            assert self.engine.next_wake() > self.now, "asks for what it has just been given"

    # ---- what always holds ----------------------------------------------------------------

    @invariant()
    def at_most_one_runs_and_one_waits(self) -> None:
        engine = self.engine
        running = engine.running.batch if engine.running is not None else 0
        waiting = engine.waiting.batch if engine.waiting is not None else 0
        assert running == self.batch
        assert self.open == {running, waiting} - {0}
        if waiting:
            assert self.worker in ("up", "dying")

    @invariant()
    def states_are_true(self) -> None:
        for key, model in self.engine.models.items():
            assert (model.state == READY) == (key in self.held)
            assert model.state != LOADING or self.loading == key
        assert self.engine.worker_up == (self.worker in ("up", "dying"))
        assert self.held <= set(self.engine.models) | set(self.engine.leaving)
        assert set(self.engine.leaving) == self.held - set(self.engine.models)
        if self.worker == "up":
            assert not self.engine.leaving or self.awaits_load(), "nothing is held for nothing"

    def teardown(self) -> None:
        """In the hands of a good worker and a shard, a device pulls again, and owes nobody an answer."""
        if not hasattr(self, "engine"):
            return
        self.place({"m", "n"})
        if not self.connected:
            self.session(True)
        for _ in range(40):
            if self.worker == "dying":
                self._die()
                self.act()
            elif self.worker == "starting" or self.batch or self.loading:
                self.worker_speaks("good")
            elif self.worker == "none" or self.engine.waiting is not None:
                self.tick_when_asked_for(1)
        assert not self.open
        failed = [key for key, model in self.engine.models.items() if model.state == FAILED]
        assert self.owed or len(failed) == 2


DeviceMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestDevice = DeviceMachine.TestCase
