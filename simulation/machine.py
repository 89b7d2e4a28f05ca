"""The virtual-time loop: one shard's engine, the engines of all its devices, and the messages between them.

Nothing here decides anything about requests: :class:`~broker.engine.scheduler.Scheduler`,
:class:`~nodes.engine.device.DeviceEngine` and :class:`~nodes.engine.lanes.Lanes` do, as in production. This module
moves their messages with the network's delays and lets GPUs take the time of their profiles. What a GPU holds can be
changed between two calls of :meth:`Machine.run`. Compiled with mypyc, like the engines.
"""

from heapq import heappop, heappush
from random import Random

from broker.engine.devices import Batch
from broker.engine.fleet import HeldModel
from broker.engine.limits import Limits
from broker.engine.plan import Pipeline
from broker.engine.request import Client
from broker.engine.scheduler import Scheduler
from laxity.payload import Payload
from nodes.engine.actions import (
    Action,
    Announce,
    Drop,
    Hold,
    Infer,
    KillWorker,
    Refuse,
    SendPull,
    StartWorker,
    Unload,
)
from nodes.engine.device import DeviceEngine
from nodes.engine.lanes import Execute, Order, PageOut, TooLate
from nodes.engine.models import READY
from simulation.gpu import (
    DONE,
    FINISH,
    FOREVER,
    GRANT,
    LOADED,
    LOSE,
    PREEMPT,
    PULL,
    RETURN,
    WAKE,
    Delays,
    Event,
    Gpu,
    lanes,
)
from simulation.record import Record


class Machine:
    """A cluster in virtual time. ``answers`` has what each stage answers, by model key."""

    def __init__(
        self,
        pipelines: list[Pipeline],
        gpus: list[Gpu],
        answers: dict[str, Payload],
        delays: Delays,
        jitter: float,
        stragglers: float,
        straggler_factor: float,
        seed: int,
        record: Record,
    ) -> None:
        self.scheduler = Scheduler(Limits(1 << 60, 1 << 60, 1 << 60), preemption=True)
        self._pipelines = pipelines
        self._slos = {plan.stage.key: pipeline.slo for pipeline in pipelines for plan in pipeline.stages}
        self.gpus = gpus
        self._by_device = {(gpu.agent, gpu.number): gpu for gpu in gpus}
        self._answers = answers
        self._delays = delays
        self._jitter = jitter
        self._stragglers = stragglers
        self._straggler_factor = straggler_factor
        self._random = Random(seed)
        self._record = record
        self._events: list[tuple[float, int, Event]] = []
        self._number = 0
        self._now = 0.0
        for pipeline in pipelines:
            self.scheduler.apply(pipeline)
        for gpu in gpus:
            self._start(gpu)

    def lose(self, agent: str, at: float, back: float) -> None:
        """The agent's host dies at ``at`` and is back at ``back``."""
        for gpu in self.gpus:
            if gpu.agent == agent:
                self._push(at, Event(LOSE, gpu, 0))
                if back < FOREVER:
                    self._push(back, Event(RETURN, gpu, 0))

    def place(self, now: float, agent: str, number: int, keys: list[str], loads: dict[str, float]) -> None:
        """From ``now`` on (not before where :meth:`run` stopped), a GPU is to hold exactly these models; without any it
        comes to rest. ``loads`` has the seconds that loading takes, by model key (none where it is not said). A GPU
        whose host is lost does so when it is back."""
        gpu = self._by_device[(agent, number)]
        gpu.placed = keys
        gpu.loads = loads
        self._now = now
        if keys and gpu.taken_at >= FOREVER and (gpu.up or gpu.boots):
            gpu.taken_at = now
        if gpu.up:
            gpu.engine.place(now, dict.fromkeys(keys, 0.0))
            gpu.engine.tick(now)
            self._act(now, gpu)
            self._dispatch(now)

    def power_down(self, now: float, agent: str) -> None:
        """The agent's host goes to rest."""
        self._now = now
        for gpu in self.gpus:
            if gpu.agent == agent:
                self._lose(now, gpu)
        self._dispatch(now)

    def power_up(self, now: float, agent: str, boot: float) -> None:
        """The agent's host, which is at rest, is there again after ``boot`` seconds."""
        for gpu in self.gpus:
            if gpu.agent == agent and not gpu.up and not gpu.boots:
                gpu.boots = True
                self._push(now + boot, Event(RETURN, gpu, 0))

    def run(self, times: list[float], workloads: list[int], payload: Payload, until: float) -> float:
        """Submit request i to pipeline ``workloads[i]`` at ``times[i]`` (ascending), for the times before ``until``.
        Where it is at then: call again with a later ``until``; infinity runs to the end of all requests."""
        scheduler = self.scheduler
        record = self._record
        clients = [Client(pipeline.name) for pipeline in self._pipelines]
        names = [pipeline.name for pipeline in self._pipelines]
        events = self._events
        count = len(times)
        at = record.submitted
        while True:
            now = times[at] if at < count else FOREVER
            arrives = True
            wake = scheduler.next_wake()
            if events and events[0][0] < now:
                now = events[0][0]
                arrives = False
            if wake < now:
                if at >= count and scheduler.ledger.in_flight == 0:
                    break
                now = wake if wake > self._now else self._now
                if now >= until:
                    break
                self._now = now
                self._dispatch(now)
                continue
            if now >= until or now >= FOREVER:
                break
            self._now = now
            if arrives:
                which = workloads[at]
                scheduler.submit(now, clients[which], at, names[which], now, -1.0, 0, payload, False)
                record.arrive(which)
                at += 1
            else:
                _, _, event = heappop(events)
                if not self._happen(now, event):
                    continue
            self._dispatch(now)
            if at >= count and scheduler.ledger.in_flight == 0:
                break
        return self._now

    # ---- the shard ---------------------------------------------------------------------------

    def _dispatch(self, now: float) -> None:
        scheduler = self.scheduler
        delays = self._delays
        for batch in scheduler.dispatch(now):
            device = batch.device
            gpu = self._by_device[(device.agent, device.number)]
            self._record.grant(now, batch)
            gpu.granted[batch.number] = batch
            event = Event(GRANT, gpu, gpu.epoch)
            event.batch = batch
            event.when = gpu.pull_sent + (now - gpu.pull_came)
            event.number = gpu.pull_seq
            arrives = now + delays.control + delays.per_request * len(batch.tasks) + self._wobble()
            if arrives < gpu.last_down:
                arrives = gpu.last_down
            gpu.last_down = arrives
            self._push(arrives, event)
        for batch in scheduler.take_preempted():
            gpu = self._by_device[(batch.device.agent, batch.device.number)]
            event = Event(PREEMPT, gpu, gpu.epoch)
            event.batch = batch
            # Not before its grant.
            self._push(max(now + delays.control, gpu.last_down), event)
        ended = scheduler.take_ended()
        if ended:
            self._record.end(ended)

    # ---- what happens --------------------------------------------------------------------------

    def _happen(self, now: float, event: Event) -> bool:
        """Carry out an event; whether the shard has to look at it."""
        gpu = event.gpu
        kind = event.kind
        if kind == LOSE:
            return self._lose(now, gpu)
        if kind == RETURN:
            if not gpu.up:
                self._start(gpu)
            return True
        if event.epoch != gpu.epoch:
            return False
        engine = gpu.engine
        if kind == PULL:
            gpu.pull_sent = event.when
            gpu.pull_came = now
            gpu.pull_seq = event.number
            self.scheduler.pull(gpu.agent, gpu.number, now + event.free_in)
            return True
        if kind == DONE:
            batch = event.batch
            assert batch is not None
            results: list[Payload] = []
            if event.code == "ok":
                results = [self._answers[batch.stage.model]] * len(batch.tasks)
            self.scheduler.done(now, gpu.agent, batch.number, event.code, event.when, results, {}, event.code)
            return True
        if kind == GRANT:
            batch = event.batch
            assert batch is not None
            closes = event.when + (batch.closes - batch.granted_at)
            engine.grant(
                now, batch.number, event.number, batch.stage.model, event.when, 0.0, closes - event.when,
                batch.expected, self._slos[batch.stage.model],
            )  # fmt: skip
        elif kind == PREEMPT:
            batch = event.batch
            assert batch is not None
            if batch.number in gpu.granted:
                del gpu.granted[batch.number]
                self._record.lost(now, batch)
                if not gpu.lanes.drop(now, batch.number):
                    gpu.lanes.executed(now, batch.number)
                engine.finished(now, batch.number, "cancelled", 0.0)
        elif kind == FINISH:
            batch = event.batch
            assert batch is not None
            if batch.number not in gpu.granted:
                return False  # stopped before its end
            self._record.ran(now, batch, event.when)
            del gpu.granted[batch.number]
            gpu.lanes.executed(now, batch.number)
            engine.finished(now, batch.number, "ok", 0.0)
            self._done(now, gpu, batch, "ok", event.when, self._delays.response)
        elif kind == LOADED:
            gpu.loading -= 1
            self._loaded(now, gpu, event.code)
            self._act(now, gpu)
            return True
        elif now < gpu.wake_at:
            return False
        else:
            gpu.wake_at = FOREVER
            gpu.lanes.tick(now)
            engine.tick(now)
        self._act(now, gpu)
        return False

    def _act(self, now: float, gpu: Gpu) -> None:
        """Do what the device's engine wants done."""
        engine = gpu.engine
        orders = gpu.lanes.take_orders()
        todo = engine.take_actions()
        while orders or todo:
            for order in orders:
                self._carry_out(now, gpu, order)
            for action in todo:
                self._do(now, gpu, action)
            orders = gpu.lanes.take_orders()
            todo = engine.take_actions()
        if not gpu.placed and not engine.handed and gpu.loading == 0:
            self._release(now, gpu)
        wake = min(engine.next_wake(), gpu.lanes.next_wake())
        if wake < gpu.wake_at:
            gpu.wake_at = wake
            self._push(wake if wake > now else now, Event(WAKE, gpu, gpu.epoch))

    def _do(self, now: float, gpu: Gpu, action: Action) -> None:
        engine = gpu.engine
        if isinstance(action, Infer):
            gpu.lanes.infer(now, action.batch, action.earliest, action.latest)
        elif isinstance(action, SendPull):
            event = Event(PULL, gpu, gpu.epoch)
            event.when = now
            event.number = action.seq
            event.free_in = action.free_in
            self._send_up(now, gpu, event, self._delays.control)
        elif isinstance(action, Refuse):
            refused = gpu.granted.pop(action.batch)
            self._done(now, gpu, refused, action.code, 0.0, self._delays.control)
        elif isinstance(action, StartWorker):
            engine.worker_started(now)
        elif isinstance(action, KillWorker):
            hung = engine.running
            if hung is not None and hung.batch in gpu.granted:
                self._record.lost(now, gpu.granted[hung.batch])
            gpu.lanes = lanes()
            engine.worker_died(now, "the batch hung")
        elif isinstance(action, Drop):
            if gpu.lanes.drop(now, action.batch):
                self._ended(now, gpu, action.batch, "cancelled")
        elif isinstance(action, Unload):
            gpu.lanes.unload(now, action.number, action.earliest, action.latest)
        elif isinstance(action, Hold):
            seconds = gpu.loads.get(action.model, 0.0)
            if seconds > 0.0:
                gpu.loading += 1
                gpu.loads_begun += 1
                gpu.spent_loading += seconds
                event = Event(LOADED, gpu, gpu.epoch)
                event.code = action.model
                self._push(now + seconds, event)
            else:
                self._loaded(now, gpu, action.model)
        elif isinstance(action, Announce):
            held = [
                HeldModel(model.key, "", 100, model.profile) for model in engine.models.values() if model.state == READY
            ]
            self.scheduler.report(gpu.agent, gpu.number, "emulated", held)

    def _carry_out(self, now: float, gpu: Gpu, order: Order) -> None:
        """Do what a GPU's lanes say."""
        if isinstance(order, Execute):
            batch = gpu.granted[order.batch]
            seconds = gpu.models[batch.stage.model][len(batch.tasks)]
            if self._jitter > 0.0:
                seconds *= self._random.lognormvariate(0.0, self._jitter)
            if self._stragglers > 0.0 and self._random.random() < self._stragglers:
                seconds *= self._straggler_factor
            event = Event(FINISH, gpu, gpu.epoch)
            event.batch = batch
            event.when = seconds
            self._push(now + seconds, event)
            gpu.engine.started(now, order.batch, now)
        elif isinstance(order, TooLate):
            self._ended(now, gpu, order.number, "too_late")
        elif isinstance(order, PageOut):
            gpu.lanes.paged(now, order.action)
            gpu.engine.acted(now, order.action, "ok", "")

    def _ended(self, now: float, gpu: Gpu, number: int, code: str) -> None:
        """A batch was not run."""
        batch = gpu.granted.pop(number)
        gpu.engine.finished(now, number, code, 0.0)
        self._done(now, gpu, batch, code, 0.0, self._delays.control)

    def _loaded(self, now: float, gpu: Gpu, key: str) -> None:
        profile = [(b, s) for b, s in enumerate(gpu.models[key]) if b > 0]
        gpu.engine.held(now, key, profile, gpu.loads.get(key, 0.0), 0.0)

    def _release(self, now: float, gpu: Gpu) -> None:
        """From now on it is at rest."""
        gpu.taken = gpu.allocated(now)
        gpu.taken_at = FOREVER

    def _done(self, now: float, gpu: Gpu, batch: Batch, code: str, seconds: float, delay: float) -> None:
        event = Event(DONE, gpu, gpu.epoch)
        event.batch = batch
        event.code = code
        event.when = seconds
        self._send_up(now, gpu, event, delay)

    def _send_up(self, now: float, gpu: Gpu, event: Event, delay: float) -> None:
        arrives = now + delay + self._wobble()
        if arrives < gpu.last_up:
            arrives = gpu.last_up
        gpu.last_up = arrives
        self._push(arrives, event)

    def _wobble(self) -> float:
        jitter = self._delays.jitter
        return jitter * self._random.random() if jitter > 0.0 else 0.0

    def _push(self, when: float, event: Event) -> None:
        self._number += 1
        heappush(self._events, (when, self._number, event))

    # ---- hosts come and go -----------------------------------------------------------------------

    def _start(self, gpu: Gpu) -> None:
        now = self._now
        gpu.engine = DeviceEngine()
        gpu.lanes = lanes()
        gpu.up = True
        gpu.boots = False
        gpu.wake_at = FOREVER
        if gpu.placed and gpu.taken_at >= FOREVER:
            gpu.taken_at = now
        gpu.engine.place(now, dict.fromkeys(gpu.placed, 0.0))
        gpu.engine.session(now, True)
        gpu.engine.tick(now)
        self._act(now, gpu)

    def _lose(self, now: float, gpu: Gpu) -> bool:
        if not gpu.up:
            return False
        gpu.up = False
        gpu.epoch += 1
        gpu.loading = 0
        self._release(now, gpu)
        for batch in gpu.granted.values():
            self._record.lost(now, batch)
        gpu.granted.clear()
        self.scheduler.agent_lost(now, gpu.agent, "the host was lost")
        return True
