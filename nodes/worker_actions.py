"""What a worker does for its agent: the models of one device, and the batches and actions under way on it.

The agent's messages come in on the main thread (:mod:`nodes.worker`). What is done when is decided by
:class:`nodes.engine.lanes.Lanes`, under one lock; each lane has a thread that carries it out. The thread that ends an
execution asks for the next one itself: between two executions lies no other thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from laxity import payload
from laxity.node import Node
from laxity.payload import Part
from laxity.protocol import Failure
from nodes import worker_protocol as wire
from nodes.engine.lanes import MAX_BATCHES, CopyIn, CopyOut, Execute, Lanes, Order, PageIn, PageOut, TooLate
from nodes.executors.base import Unavailable
from nodes.executors.errors import describe_error, error_code
from nodes.under_way import EXECUTION, INPUT, OUTPUT, UnderWay
from nodes.worker_lanes import Job, LaneThread
from nodes.worker_models import HeldModel, ModelHolder, Work

log = logging.getLogger(__name__)

_Failure = tuple[str, str]
"""(code, detail)"""


class Outbox(Protocol):
    """Messages to the agent, from any thread."""

    def put(self, message: wire.FromWorker, frames: Sequence[Part] = ()) -> None: ...

    def wake(self) -> None:
        """Have the main thread ask for :meth:`Actions.next_wake` again."""
        ...


class _Batch:
    """A batch under way. Whoever takes it out of ``Actions._batches`` says how it ended."""

    __slots__ = (
        "copying",
        "execution_us",
        "frames",
        "input_us",
        "latest",
        "model",
        "number",
        "output_us",
        "tasks",
        "work",
    )

    def __init__(self, message: wire.Infer, model: HeldModel, frames: Sequence[Part]) -> None:
        self.number = message.batch
        self.latest = message.latest
        self.tasks = message.tasks
        self.frames = frames
        self.model = model
        self.work: Any = None
        self.copying = False
        """Whether the input lane has it."""
        self.input_us = 0
        self.execution_us = 0
        self.output_us = 0

    def ended(
        self, code: str, detail: str = "", results: Sequence[Node] = (), failures: Sequence[Failure] = ()
    ) -> wire.Finished:
        return wire.Finished(
            self.number,
            code,
            self.execution_us,
            list(results),
            list(failures),
            detail,
            self.input_us,
            self.output_us,
            self.copying,
        )


class Actions:
    """``device`` is 'cpu' or 'cuda'. Call ``handle`` and ``tick`` from one thread."""

    def __init__(self, device: str, outbox: Outbox, under_way: UnderWay) -> None:
        self._outbox = outbox
        self._under_way = under_way
        self._holder = ModelHolder(device, self._run, outbox.put)
        self._lock = threading.Lock()
        """Around all that follows."""
        # Where the model runs on the host's cores, loading another one would take them from it.
        self._lanes = Lanes(copies=True, overlap_loads=device == "cuda")
        self._models: dict[str, HeldModel] = {}
        self._batches: dict[int, _Batch] = {}
        self._pages: dict[int, wire.Load | wire.Unload] = {}
        self._changes: deque[wire.Hold | wire.Release] = deque()
        """Models that come and go, in the agent's order; the first one may be under way."""
        self._changing = False
        self._change = 0
        """The number in the weights lane of the last one that began: negative, for the agent's are not."""
        self._leaving: HeldModel | None = None
        """What the change that is under way lets go of."""
        self._closing = False
        self._polling_until = 0.0
        """When the main thread will call ``tick`` by itself."""
        self._input = LaneThread("input")
        self._execution = LaneThread("execute")
        self._output = LaneThread("output")
        self._weights = LaneThread("weights")

    # ---- the main thread -------------------------------------------------------------------

    def handle(
        self,
        message: wire.Hold | wire.Release | wire.Load | wire.Unload | wire.Infer | wire.Drop,
        frames: Sequence[Part],
    ) -> None:
        now = time.monotonic()
        with self._lock:
            if isinstance(message, wire.Infer):
                self._infer(now, message, frames)
            elif isinstance(message, wire.Load):
                self._pages[message.action] = message
                self._lanes.load(now, message.action, message.earliest, message.latest)
            elif isinstance(message, wire.Unload):
                self._pages[message.action] = message
                self._lanes.unload(now, message.action, message.earliest, message.latest)
            elif isinstance(message, wire.Drop):
                if self._lanes.drop(now, message.batch):
                    self._outbox.put(self._taken(message.batch).ended("cancelled"))
            else:
                self._changes.append(message)
            self._dispatch(now, None)

    def tick(self) -> None:
        with self._lock:
            now = time.monotonic()
            self._lanes.tick(now)
            self._dispatch(now, None)

    def next_wake(self) -> float:
        """When ``tick`` is due, on the monotonic clock."""
        with self._lock:
            self._polling_until = self._lanes.next_wake()
            return self._polling_until

    def close(self) -> None:
        """End the threads after what they are doing, and let go of all models."""
        with self._lock:
            self._closing = True
        # The weights first: holding a model takes the other threads.
        for thread in (self._weights, self._input, self._execution, self._output):
            thread.end()
        for model in self._models.values():
            model.release()

    def _infer(self, now: float, message: wire.Infer, frames: Sequence[Part]) -> None:
        key = message.key
        model = self._models.get(key)
        if model is None:
            code, detail = "unknown_model", f"{key} is not loaded in this worker"
        elif not model.loaded:
            code, detail = "not_loaded", f"{key} is in host memory alone"
        elif len(self._batches) >= MAX_BATCHES:
            code, detail = "busy", f"{MAX_BATCHES} batches are under way"
        elif any(isinstance(change, wire.Hold) for change in self._changes):
            code, detail = "busy", "a model is being brought in"
        else:
            model.users += 1
            self._batches[message.batch] = _Batch(message, model, frames)
            self._lanes.infer(now, message.batch, message.earliest, message.latest)
            return
        self._outbox.put(wire.Finished(message.batch, code, 0, detail=detail))

    # ---- under the lock --------------------------------------------------------------------

    def _dispatch(self, now: float, mine: LaneThread | None) -> Job | None:
        """Hand the orders to their threads; the one for the calling thread is returned instead."""
        own: Job | None = None
        if self._closing:
            return own
        self._begin_change(now)
        orders = self._lanes.take_orders()
        while orders:
            for order in orders:
                if isinstance(order, TooLate):
                    self._too_late(order)
                    continue
                thread, job = self._job(order)
                if thread is mine:
                    own = job
                else:
                    thread.put(job)
            self._begin_change(now)
            orders = self._lanes.take_orders()
        if self._lanes.next_wake() < self._polling_until:
            self._outbox.wake()
        return own

    def _job(self, order: Order) -> tuple[LaneThread, Job]:
        if isinstance(order, Execute):
            return self._execution, Job(partial(self._execute, self._batches[order.batch]))
        if isinstance(order, CopyIn):
            batch = self._batches[order.batch]
            batch.copying = True
            return self._input, Job(partial(self._copy_in, batch))
        if isinstance(order, CopyOut):
            return self._output, Job(partial(self._copy_out, self._batches[order.batch]))
        assert isinstance(order, (PageIn, PageOut))
        if order.action >= 0:
            return self._weights, Job(partial(self._page, self._pages[order.action]))
        change = self._changes[0]
        if isinstance(change, wire.Hold):
            return self._weights, Job(partial(self._hold, order.action, change))
        return self._weights, Job(partial(self._release, order.action))

    def _begin_change(self, now: float) -> None:
        """Put the first of the changes into the weights lane once nothing is in its way."""
        if not self._changes or self._changing:
            return
        change = self._changes[0]
        if isinstance(change, wire.Release):
            model = self._models.get(change.key)
            in_use = model is not None and model.users > 0
        else:
            in_use = bool(self._batches)
        if in_use:
            return
        self._changing = True
        self._leaving = self._models.pop(change.key, None)
        self._change -= 1
        self._lanes.load(now, self._change, now, float("inf"))

    def _changed(self, now: float, number: int) -> Job | None:
        self._changes.popleft()
        self._changing = False
        self._lanes.paged(now, number)
        return self._dispatch(now, self._weights)

    def _too_late(self, order: TooLate) -> None:
        if order.is_batch:
            self._outbox.put(self._taken(order.number).ended("too_late"))
        else:
            del self._pages[order.number]
            self._outbox.put(wire.Acted(order.number, "too_late", 0))

    def _taken(self, number: int) -> _Batch:
        batch = self._batches.pop(number)
        batch.model.users -= 1
        return batch

    # ---- the lanes' threads ----------------------------------------------------------------

    def _copy_in(self, batch: _Batch) -> Job | None:
        begun = time.perf_counter_ns()
        failure: _Failure | None = None
        self._under_way.begin(INPUT, batch.number)
        try:
            batch.work = batch.model.inputs(batch.model.decode(batch.tasks, batch.frames))
        except BaseException as error:
            failure = self._failure(batch, error)
        self._under_way.end(INPUT)
        batch.frames = ()
        batch.input_us = _us_since(begun)
        with self._lock:
            now = time.monotonic()
            batch.copying = False
            answered = batch.number not in self._batches
            if answered:
                failure = None
                self._outbox.put(wire.CopiedIn(batch.number))
            elif failure is not None:
                self._lanes.drop(now, batch.number)
                self._taken(batch.number)
            self._lanes.copied_in(now, batch.number)
            following = self._dispatch(now, self._input)
        if failure is not None:
            self._outbox.put(batch.ended(*failure))
        return following

    def _execute(self, batch: _Batch) -> Job | None:
        at = time.monotonic()
        failure: _Failure | None = None
        # Asked again here: between the order and this thread's turn lies whatever else held the interpreter.
        if at > batch.latest:
            failure = "too_late", ""
        else:
            self._under_way.begin(EXECUTION, batch.number)
            self._outbox.put(wire.Executing(batch.number, at))
            begun = time.perf_counter_ns()
            try:
                batch.model.execute(batch.work)
                batch.execution_us = _us_since(begun)
            except BaseException as error:
                batch.execution_us = _us_since(begun)
                failure = self._failure(batch, error)
            self._under_way.end(EXECUTION)
        with self._lock:
            now = time.monotonic()
            if failure is not None:
                self._taken(batch.number)
            self._lanes.executed(now, batch.number, failure is not None)
            following = self._dispatch(now, self._execution)
        if failure is not None:
            self._outbox.put(batch.ended(*failure))
        return following

    def _copy_out(self, batch: _Batch) -> Job | None:
        begun = time.perf_counter_ns()
        failure: _Failure | None = None
        nodes: list[Node] = []
        parts: list[Part] = []
        failures: list[Failure] = []
        self._under_way.begin(OUTPUT, batch.number)
        try:
            nodes, payloads, failures = batch.model.outputs(batch.work)
            parts = payload.pack(payloads)
        except BaseException as error:
            failure = self._failure(batch, error)
        self._under_way.end(OUTPUT)
        batch.output_us = _us_since(begun)
        with self._lock:
            now = time.monotonic()
            self._taken(batch.number)
            self._lanes.copied_out(now, batch.number)
            following = self._dispatch(now, self._output)
        if failure is not None:
            self._outbox.put(batch.ended(*failure))
        else:
            self._outbox.put(batch.ended("ok", "", nodes, failures), parts)
        return following

    def _failure(self, batch: _Batch, error: BaseException) -> _Failure:
        # The error itself is not kept: by way of its frames it holds what the batch had in memory.
        # Of a server that is away its executor tells once.
        if not isinstance(error, Unavailable):
            log.warning("a batch of %d of %s failed", len(batch.tasks), batch.model.key, exc_info=error)
        return error_code(error), describe_error(error, f"model of {batch.model.key}")

    def _page(self, message: wire.Load | wire.Unload) -> Job | None:
        loads = isinstance(message, wire.Load)
        detail = ""
        with self._lock:
            at = time.monotonic()
            model = self._models.get(message.key)
            code = self._page_code(at, message, model)
            begins = code == "ok"
            moving = model if begins and model is not None and model.loaded != loads else None
            if moving is not None:
                moving.loaded = False  # while it moves, whichever way
        begun = time.perf_counter_ns()
        if moving is not None:
            try:
                if loads:
                    moving.load()
                else:
                    moving.executor.unload()
            except BaseException as error:
                log.warning("paging %s failed", message.key, exc_info=error)
                code, detail = error_code(error), describe_error(error, f"paging {message.key}")
        took = _us_since(begun)
        with self._lock:
            now = time.monotonic()
            if moving is not None:
                moving.loaded = loads and code == "ok"
            del self._pages[message.action]
            self._lanes.paged(now, message.action)
            following = self._dispatch(now, self._weights)
        self._outbox.put(wire.Acted(message.action, code, took, detail, at if begins else 0.0))
        return following

    def _page_code(self, now: float, message: wire.Load | wire.Unload, model: HeldModel | None) -> str:
        if now > message.latest:
            return "too_late"
        if model is None:
            return "unknown_model"
        if isinstance(message, wire.Unload) and model.users:
            return "busy"
        return "ok"

    def _hold(self, number: int, message: wire.Hold) -> Job | None:
        self._let_go()
        model, answer = self._holder.hold(message)
        with self._lock:
            if model is not None:
                self._models[message.key] = model
            following = self._changed(time.monotonic(), number)
        self._outbox.put(answer)
        return following

    def _release(self, number: int) -> Job | None:
        self._let_go()
        with self._lock:
            return self._changed(time.monotonic(), number)

    def _let_go(self) -> None:
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            self._holder.release(leaving)

    def _run(self, model: HeldModel, values: list[Any]) -> tuple[float, list[Failure]]:
        """See :data:`nodes.worker_models.Run`: each step in the thread that will do it when the model serves."""
        work: Work = self._input.call(partial(model.inputs, values))

        def execute() -> float:
            begun = time.perf_counter()
            model.execute(work)
            return begun

        def outputs() -> tuple[float, list[Failure]]:
            failures = model.outputs(work)[2]
            return time.perf_counter(), failures

        begun = self._execution.call(execute)
        ended, failures = self._output.call(outputs)
        return ended - begun, failures


def _us_since(begun_ns: int) -> int:
    return (time.perf_counter_ns() - begun_ns) // 1000
