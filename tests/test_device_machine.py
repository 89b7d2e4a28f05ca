"""A device's engine and its worker's lanes together, in any order of events: shards, a worker that dies, and messages
between the two that take their time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nodes.engine import actions as act
from nodes.engine.device import DeviceEngine
from nodes.engine.lanes import MAX_BATCHES, NEVER, CopyIn, CopyOut, Execute, Lanes, PageIn, PageOut, TooLate
from nodes.engine.models import FAILED, HELD, LOADING, READY

SLO = 0.5
MODELS = {"m": 40.0, "n": 40.0, "o": 40.0, "p": 70.0}
"""Megabytes."""


class Worker:
    """A process that has been started; ``say`` gets what it says, to be delivered later."""

    def __init__(self, copies: bool, overlap: bool, budget: float, say: Callable[[Callable[[], None]], None]) -> None:
        self.copies = copies
        self.lanes = Lanes(copies, overlap)
        self.budget = budget
        self.say = say
        self.up = False
        self.holding = ""
        self.held: set[str] = set()
        self.resident: set[str] = set()
        self.loading: set[str] = set()
        """In the device's memory, but not ready."""
        self.batches: dict[int, tuple[str, float]] = {}
        """(model, latest) of those under way."""
        self.pages: dict[int, tuple[str, float]] = {}
        self.taken: dict[str, int] = {}
        """What each lane is in the middle of."""

    def check_memory(self) -> None:
        taken = sum(MODELS[key] for key in self.resident | self.loading)
        assert not self.budget or taken <= self.budget, "above the budget"


class DeviceMachine(RuleBasedStateMachine):
    """The worker does what real ones do in its own time: it reads its commands, ends what it began and says so, or
    dies."""

    @initialize(
        placed=st.sets(st.sampled_from(sorted(MODELS)), min_size=1),
        budget=st.sampled_from([0.0, 100.0, 100.0, 160.0]),
        copies=st.booleans(),
        overlap=st.booleans(),
    )
    def begin(self, placed: set[str], budget: float, copies: bool, overlap: bool) -> None:
        self.now = 100.0
        self.engine = DeviceEngine(budget)
        self.budget, self.copies, self.overlap = budget, copies, overlap
        self.worker: Worker | None = None
        self.dying = False
        self.inbox: deque[Callable[[], None]] = deque()
        """Commands that the worker has not read."""
        self.outbox: deque[Callable[[], None]] = deque()
        """What it has said and the engine has not heard."""
        self.last = 0
        self.open: dict[int, str] = {}
        """Batches that are to be answered."""
        self.latest: dict[int, float] = {}
        self.asked: dict[int, float] = {}
        """LOADs and UNLOADs that are to be answered, and when they must begin."""
        self.answered: list[int] = []
        """Those that the engine answered just now."""
        self.loads: set[int] = set()
        """Which of them are LOADs."""
        self.seq = 0
        self.owed = False
        """A pull is unanswered."""
        self.connected = False
        self.place(placed)
        self.session(True)
        self.tick(0.0)
        self.calm()

    # ---- what the engine wants -------------------------------------------------------------

    def obey(self) -> None:
        actions = self.engine.take_actions()
        while actions:
            for action in actions:
                self._do(action)
            actions = self.engine.take_actions()

    def _do(self, action: act.Action) -> None:
        if isinstance(action, act.SendPull):
            assert self.connected
            assert not self.owed
            assert action.seq == self.seq + 1
            assert action.free_in >= 0.0
            self.seq, self.owed = action.seq, True
        elif isinstance(action, act.Refuse):
            assert action.detail
            del self.open[action.batch]
        elif isinstance(action, act.Answer):
            assert action.code == "ok" or action.detail
            self.answered.append(action.number)
        elif isinstance(action, act.StartWorker):
            assert self.worker is None
            self.inbox.clear()
            self.worker = Worker(self.copies, self.overlap, self.budget, self.outbox.append)
        elif isinstance(action, act.KillWorker):
            assert self.worker is not None
            assert not self.dying
            self.dying = True
        elif not isinstance(action, act.Announce):
            self.inbox.append(lambda: self._command(action))

    def _command(self, action: act.Action) -> None:
        """The worker reads a command."""
        worker = self.worker
        assert worker is not None
        if isinstance(action, act.Infer):
            model = self.open[action.batch]
            assert model in worker.resident
            assert len(worker.batches) < MAX_BATCHES
            assert action.latest == self.latest[action.batch]
            worker.batches[action.batch] = (model, action.latest)
            worker.lanes.infer(self.now, action.batch, action.earliest, action.latest)
        elif isinstance(action, act.Drop):
            if worker.lanes.drop(self.now, action.batch):
                self._ends(action.batch, "cancelled")
        elif isinstance(action, act.Load):
            assert action.model in worker.held
            worker.pages[action.number] = (action.model, action.latest)
            worker.lanes.load(self.now, action.number, action.earliest, action.latest)
        elif isinstance(action, act.Unload):
            worker.pages[action.number] = (action.model, action.latest)
            worker.lanes.unload(self.now, action.number, action.earliest, action.latest)
        elif isinstance(action, act.Hold):
            assert not worker.holding
            assert not worker.batches
            assert "in" not in worker.taken, "it would wait for inputs that nobody needs any more"
            worker.holding = action.model
            worker.loading.add(action.model)
        elif isinstance(action, act.Release):
            assert action.model not in worker.resident | worker.loading
            worker.held.remove(action.model)
        worker.check_memory()
        self._orders()

    # ---- what the worker does ----------------------------------------------------------------

    def _orders(self) -> None:
        worker = self.worker
        assert worker is not None
        for order in worker.lanes.take_orders():
            if isinstance(order, TooLate):
                if order.is_batch:
                    self._ends(order.number, "too_late")
                else:
                    self._acts(order.number, "too_late")
            elif isinstance(order, Execute):
                model, latest = worker.batches[order.batch]
                assert model in worker.resident
                assert self.now <= latest
                assert "execute" not in worker.taken
                worker.taken["execute"] = order.batch
                self.outbox.append(self._hears(self.engine.started, order.batch, self.now))
            elif isinstance(order, PageIn | PageOut):
                model, latest = worker.pages[order.action]
                assert self.now <= latest
                assert order.action not in self.asked or self.now <= self.asked[order.action]
                worker.taken["page"] = order.action
                if isinstance(order, PageIn):
                    assert model in worker.held - worker.resident
                    worker.loading.add(model)
                else:
                    assert model in worker.resident
                    assert all(used != model for used, _ in worker.batches.values()), "in use"
                    worker.resident.remove(model)
                    worker.loading.add(model)
            else:
                assert isinstance(order, CopyIn | CopyOut)
                worker.taken["in" if isinstance(order, CopyIn) else "out"] = order.batch
        worker.check_memory()

    def _hears(self, method: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
        return lambda: method(self.now, *arguments)

    def _ends(self, batch: int, code: str) -> None:
        """The worker says how a batch ended."""
        assert self.worker is not None
        del self.worker.batches[batch]
        copying = self.worker.taken.get("in") == batch

        def hear() -> None:
            assert self.engine.finished(self.now, batch, code, 0.001, copying)
            del self.open[batch]
            assert not self.engine.finished(self.now, batch, code, 0.001)

        self.outbox.append(hear)

    def _acts(self, number: int, code: str) -> None:
        assert self.worker is not None
        del self.worker.pages[number]

        def hear() -> None:
            assert self.engine.acted(self.now, number, code, "why")
            self.asked.pop(number, None)
            assert not self.engine.acted(self.now, number, code, "why")

        self.outbox.append(hear)

    def _end(self, lane: str, well: bool) -> None:
        worker = self.worker
        assert worker is not None
        number = worker.taken.pop(lane)
        if lane == "in":
            if number not in worker.batches:
                self.outbox.append(self._hears(self.engine.copied_in, number))
            elif not well and worker.lanes.drop(self.now, number):
                self._ends(number, "bad_input")
            worker.lanes.copied_in(self.now, number)
        elif lane == "execute":
            worker.lanes.executed(self.now, number, failed=not well)
            if not well or not self.copies:
                self._ends(number, "ok" if well else "model_error")
        elif lane == "out":
            worker.lanes.copied_out(self.now, number)
            self._ends(number, "ok" if well else "model_error")
        else:
            model, _ = worker.pages[number]
            worker.loading.remove(model)
            loads = number in self.loads
            if loads and well:
                worker.resident.add(model)
            worker.lanes.paged(self.now, number)
            self._acts(number, "ok" if well or not loads else "out_of_memory")
        self._orders()

    @precondition(lambda self: self.worker is not None and (not self.worker.up or self.worker.holding))
    @rule(well=st.sampled_from([True, True, True, False]))
    def come_up_or_hold(self, well: bool) -> None:
        worker = self.worker
        assert worker is not None
        if not worker.up:
            worker.up = True
            self.outbox.append(self._hears(self.engine.worker_started))
            return
        key, worker.holding = worker.holding, ""
        worker.loading.remove(key)
        if well:
            worker.held.add(key)
            worker.resident.add(key)
            self.outbox.append(self._hears(self.engine.held, key, [(1, 0.01)], 0.01, 0.0))
        else:
            self.outbox.append(self._hears(self.engine.hold_failed, key, "no"))

    @precondition(lambda self: self.worker is not None and self.worker.up and self.inbox)
    @rule(commands=st.integers(1, 3))
    def read(self, commands: int) -> None:
        for _ in range(min(commands, len(self.inbox))):
            self.inbox.popleft()()

    @precondition(lambda self: self.outbox)
    @rule(messages=st.integers(1, 3))
    def hear(self, messages: int) -> None:
        for _ in range(min(messages, len(self.outbox))):
            self.outbox.popleft()()
            self.obey()

    @precondition(lambda self: self.worker is not None and self.worker.taken)
    @rule(data=st.data(), well=st.sampled_from([True, True, True, False]))
    def end(self, data: Any, well: bool) -> None:
        assert self.worker is not None
        self._end(data.draw(st.sampled_from(sorted(self.worker.taken))), well)

    @precondition(lambda self: self.worker is not None)
    @rule(sure=st.sampled_from([True, False, False, False]))
    def die(self, sure: bool) -> None:
        if not sure and not self.dying:
            return
        while self.outbox:  # what it said before it died counts
            self.outbox.popleft()()
            self.obey()
        self.worker = None
        self.inbox.clear()
        self.dying = False
        self.engine.worker_died(self.now, "signal 11")
        self.obey()
        self.check_answers()
        assert not self.open, "all are answered"
        assert not self.asked

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
    @rule(model=st.sampled_from(sorted(MODELS)))
    def grant_unasked(self, model: str) -> None:
        """An old pull's."""
        self._grant(self.seq - 1, model, 0.0, 0.0, 1.0, 0.1)

    def _grant(self, seq: int, model: str, age: float, opens: float, closes: float, expected: float) -> None:
        self.last += 1
        self.open[self.last] = model
        left_at = self.now - age
        self.latest[self.last] = left_at + closes
        self.engine.grant(self.now, self.last, seq, model, left_at, opens, closes, expected, SLO)
        self.obey()

    @precondition(lambda self: self.connected)
    @rule(
        loads=st.booleans(),
        model=st.sampled_from([*MODELS, "stranger"]),
        age=st.sampled_from([0.0, 0.0, 0.001, 0.5]),
        opens=st.sampled_from([0.0, 0.0, 0.05]),
        closes=st.sampled_from([0.01, 0.1, 1.0, 60.0]),
    )
    def page(self, loads: bool, model: str, age: float, opens: float, closes: float) -> None:
        left_at = self.now - age
        if loads:
            number = self.engine.load(self.now, model, left_at, opens, closes, 0.01)
            self.loads.add(number)
        else:
            number = self.engine.unload(self.now, model, left_at, opens, closes)
        assert number not in self.asked
        self.asked[number] = left_at + closes
        self.obey()
        self.check_answers()

    @precondition(lambda self: self.connected and self.engine.paging.models.on_device and self.budget)
    @rule(
        data=st.data(),
        opens=st.tuples(st.sampled_from([0.0, 0.0, 0.05]), st.sampled_from([0.0, 0.0, 0.05])),
        closes=st.tuples(st.sampled_from([0.01, 0.1, 60.0]), st.sampled_from([0.01, 0.1, 60.0])),
    )
    def swap(self, data: Any, opens: tuple[float, float], closes: tuple[float, float]) -> None:
        """Load a model into the room of another."""
        models = self.engine.models
        going = sorted(key for key, model in models.items() if model.state == READY)
        coming = sorted(key for key, model in models.items() if model.state == HELD)
        if going and coming:
            self.page(False, data.draw(st.sampled_from(going)), 0.0, opens[0], closes[0])
            self.page(True, data.draw(st.sampled_from(coming)), 0.0, opens[1], closes[1])

    @rule(connected=st.sampled_from([True, True, False]))
    def session(self, connected: bool) -> None:
        """The device works for another shard, or its own is another one."""
        self.connected = connected
        self.owed = False
        self.engine.session(self.now, connected)
        self.obey()

    @rule(placed=st.sets(st.sampled_from(sorted(MODELS))))
    def place(self, placed: set[str]) -> None:
        self.engine.place(self.now, {key: MODELS[key] for key in sorted(placed)})
        self.obey()
        assert set(self.engine.models) == placed

    # ---- time ----------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.05, 0.3, 2.0, 40.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self._tick()

    def _tick(self) -> None:
        if self.worker is not None:
            self.worker.lanes.tick(self.now)
            self._orders()
        self.engine.tick(self.now)
        self.obey()

    @rule(steps=st.integers(1, 4))
    def tick_when_asked_for(self, steps: int) -> None:
        for _ in range(steps):
            wake = self.engine.next_wake()
            if self.worker is not None:
                wake = min(wake, self.worker.lanes.next_wake())
            if wake >= NEVER:
                return
            self.now = max(self.now, wake)
            self._tick()
            assert self.engine.next_wake() > self.now, "asks for what it has just been given"

    # ---- what always holds ----------------------------------------------------------------

    def check_answers(self) -> None:
        for number in self.answered:
            del self.asked[number]
        self.answered.clear()

    @invariant()
    def every_action_is_somewhere(self) -> None:
        self.check_answers()
        engine = self.engine
        assert set(self.open) == set(engine.handed)
        assert set(self.asked) == {page.number for page in engine.paging.pages.values() if page.asked}
        assert len(engine.handed) <= MAX_BATCHES

    @invariant()
    def the_books_are_right(self) -> None:
        models = self.engine.paging.models
        # An UNLOAD that came too late is heard of before the LOAD that came too late with it.
        assert (models.fits(models.claimed()) and models.fits(models.present())) or self.engine.paging.pages
        assert models.fits(self.engine.paging.taken())
        for key, model in models.wanted.items():
            assert (key in models.queued) == (model.state == "queued")
            assert (key in models.serving) == (model.state in (READY, HELD))
        assert set(models.on_device) >= {key for key, model in models.wanted.items() if model.state in (READY, LOADING)}
        for model in models.on_device.values():
            assert model.batches == sum(handed.model is model for handed in self.engine.handed.values())

    def calm(self) -> None:
        """All that is under way ends well."""
        for _ in range(400):
            worker = self.worker
            if self.dying:
                self.die(True)
            elif self.outbox:
                self.hear(1)
            elif worker is not None and (not worker.up or worker.holding):
                self.come_up_or_hold(True)
            elif worker is not None and self.inbox:
                self.read(1)
            elif worker is not None and worker.taken:
                self._end(min(worker.taken), True)
            elif worker is None or self.open or self.engine.paging.pages:
                if not self.engine.models and worker is None:
                    return
                self.tick_when_asked_for(1)
            else:
                return
            self.check_answers()
        raise AssertionError("it never comes to rest")

    def teardown(self) -> None:
        """In the hands of a good worker and a shard, a device pulls again, and owes nobody an answer."""
        if not hasattr(self, "engine"):
            return
        self.place({"m", "n", "o"})
        if not self.connected:
            self.session(True)
        self.calm()
        assert not self.open
        assert not self.asked
        states = [model.state for model in self.engine.models.values()]
        assert self.owed or states.count(FAILED) == 3
        worker = self.worker
        assert worker is not None
        assert not worker.loading
        for key, model in self.engine.models.items():
            assert (model.state == READY) == (key in worker.resident)
            assert (model.state in (READY, HELD)) == (key in worker.held)
        assert worker.held <= set(self.engine.models), "nothing is held for nothing"


DeviceMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestDevice = DeviceMachine.TestCase
