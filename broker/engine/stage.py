"""A stage at a shard: its queue, its schedulable window, and what is known of its model."""

from collections import deque
from typing import TYPE_CHECKING, Final

from broker.engine.budget_queue import BudgetQueue
from broker.engine.policy import END_TO_END, FCFS, LAXITY, Policy
from broker.engine.predictor import LatencyTable
from broker.engine.report import Tally
from broker.engine.request import Request, Task
from broker.engine.waits import Waits

if TYPE_CHECKING:
    from broker.engine.devices import Device, DeviceGroup
    from broker.engine.metrics import StageMetrics
    from broker.engine.residency import PagedModel

NEVER: Final = 1e18
SMOOTHING: Final = 0.5
"""Weight of the newest measurement in a stage's arrival rate."""
SMOOTHING_BATCH: Final = 0.1
"""Weight of the newest batch in a stage's mean batch size."""
MOST_DEBT: Final = 10.0
"""How many more than its part are let in ahead of time at most, for being urgent."""


class Stage:
    """One model's queue, or one of several *lanes* of it: of a model whose time depends on the size of its inputs
    (cost.py) each lane has the inputs of some sizes, a window and predictions of its own, and batches are of one lane.
    ``remaining`` (sub_k) is the predicted work behind this stage and ``reserve`` what the
    window leaves for it, both in seconds; ``target`` is the target batch b*."""

    def __init__(self, key: str, variant: str, max_batch: int, max_queue: int) -> None:
        self.key = key
        """Its model's, with '#' and its number behind it for all lanes but the last."""
        self.model = key
        self.lanes: list[Stage] = [self]
        """All of its model, those of the smallest inputs first; itself is the last one where there are several, and
        stands for all where it is the model that counts."""
        self.whole: Stage = self
        """The last of them."""
        self.part = 1.0
        """What its inputs' largest size is of that of the last."""
        self.scale = 1.0
        """How many times as long as its profile says a model takes for the largest inputs."""
        self.variant = variant
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.pipeline = ""
        """The pipeline that it belongs to, and its version."""
        self.depth = 0
        """Its number there, in topological order."""
        self.slo = NEVER
        """Its pipeline's, in seconds."""
        self.policy = LAXITY
        self.order = LAXITY.new_order()
        self.waits = Waits(LAXITY.history)
        self.by_deadline = True
        """Whether the queue is kept by deadlines; else by arrival."""
        self.due_share = 1.0
        """The part of the SLO by which it must have finished a request, where the SLO is split."""
        self.queue = BudgetQueue()
        self.behind = BudgetQueue()
        """Those that fell behind the plan (form_planned.py)."""
        self.collecting: dict[int, Device] = {}
        """Devices for which a batch of this stage is being collected, by index."""
        self.collected = 0
        """How many elements the batch has so far that is being formed."""
        self.admits = 1.0
        """The part of the arrivals that is let in (overload control)."""
        self.limit = ""
        """The stage on whose account it is less than all, where it was told so (tuning.py)."""
        self.tally = Tally()
        self.metrics: StageMetrics | None = None
        """Of all lanes and versions; None where nothing is counted."""
        self._credit = 0.0
        self._blocked = 0.0
        self._blocked_since = NEVER
        self.alone: deque[list[Task]] = deque()
        """Batches to be run as they are, ahead of the queue: the halves of one that raised."""
        self.alone_count = 0
        self.groups: list[DeviceGroup] = []
        """Who has its model in a device's memory."""
        self.paged: list[PagedModel] = []
        """Its model at devices that cannot have all their models in their memory at once."""
        self.missed = 0.0
        """Device seconds of the requests of all lanes that ended unserved since its model was last loaded, while no
        device had it."""
        self.devices = 0
        """How many have its model in their memory; 1 if none has and one could load it."""
        self.table: LatencyTable | None = None
        """The slowest device type's predictions: windows open early enough for any of them."""
        self.remaining = 0.0
        self.reserve = 0.0
        self.margin = 0.0
        """The part of ``reserve`` that may be used up by what nobody foresees: windows open so much earlier than they
        need."""
        self.target = 1
        self.ceiling = 1
        """The target batch under full load: no batch is larger, however many wait."""
        self.trouble = ""
        """Why it was last not served: how a worker died under one of its batches, what a server behind it said, or why
        its model could not be loaded (empty again once it was); for messages."""
        self.opens = NEVER
        self.closes = NEVER
        self.behind_turn = False
        """Whether those go next who are behind the plan (form_planned.py)."""
        self.pending = False
        self.dirty = False
        self.timer = NEVER
        self.timer_at = 0
        self.timer_number = 0
        """Its place among the timers, and the number of its setting."""
        self.rate = 0.0
        """Mean arrival rate in elements per second."""
        self.arrived = 0.0
        """The rate of the last period alone."""
        self.probe_at = NEVER
        """From when on a request is run although it is predicted to miss; set by the first drop after a grant."""
        self.batch_size = 0.0
        """Moving mean of the sizes of its batches; 0 before the first."""
        self.arrivals = 0
        """Elements arrived since ``rate`` was last brought up to date."""

    def split(self, parts: list[float], scale: float) -> None:
        """Have a lane for each of ``parts``, ascending, of which this one is the last and takes ``scale`` times what
        the profile says."""
        self.scale = scale
        self.lanes = []
        for number, part in enumerate(parts[:-1]):
            lane = Stage(f"{self.key}#{number}", self.variant, self.max_batch, self.max_queue)
            lane.model = self.key
            lane.whole = self
            lane.part = part
            self.lanes.append(lane)
        self.lanes.append(self)

    def adopt(self, policy: Policy) -> None:
        """Schedule by this policy from now on; nothing may wait here yet."""
        self.policy = policy
        self.order = policy.new_order()
        self.waits = Waits(policy.history)
        self.by_deadline = policy.order != FCFS

    def due(self, request: Request) -> float:
        """By when a request that comes here now must have passed this stage."""
        if self.policy.budget == END_TO_END:
            return request.deadline
        due = request.arrival + request.pipeline.slo * self.due_share
        return due if due < request.deadline else request.deadline

    # ---- who waits -------------------------------------------------------------------------

    def push(self, task: Task) -> None:
        """Queue a task."""
        self.queue.push(task)

    def idle(self) -> bool:
        """Whether nobody waits here to be put into a batch."""
        return not len(self.queue) and not len(self.behind) and not self.alone

    def lets_in(self, urgent: bool) -> bool:
        """Overload control: whether the next arrival is let in (evenly thinned). An ``urgent`` one always is, at the
        others' expense."""
        if self.admits >= 1.0:
            return True
        self._credit += self.admits
        if self._credit >= 1.0 or urgent:
            self._credit -= 1.0
            if self._credit < -MOST_DEBT:
                self._credit = -MOST_DEBT
            return True
        return False

    def take_out(self, task: Task) -> None:
        """Take a waiting task away."""
        if self.queue.remove(task) or self.behind.remove(task):
            return
        for batch in self.alone:
            if task in batch:
                batch.remove(task)
                self.alone_count -= 1
                return
        for device in self.collecting.values():
            if task in device.collected:
                device.collected.remove(task)
                return

    # ---- forced waiting --------------------------------------------------------------------

    def block(self, now: float) -> None:
        """Its window is open and no device is free: from now on whoever waits has to."""
        if self._blocked_since >= NEVER:
            self._blocked_since = now

    def unblock(self, now: float) -> None:
        """It got a device, or wants none."""
        if self._blocked_since < NEVER:
            self._blocked += now - self._blocked_since
            self._blocked_since = NEVER

    def blocked_for(self, now: float) -> float:
        """B(t): for how long it has lacked a free device by now; a request's forced waiting is the difference between
        its grant and its arrival. Waiting that a deferral chose is not in it."""
        if self._blocked_since < NEVER:
            return self._blocked + now - self._blocked_since
        return self._blocked

    def put_alone(self, tasks: list[Task]) -> None:
        """Have these tasks run as one batch, without others and ahead of the queue."""
        self.alone.append(tasks)
        self.alone_count += len(tasks)

    def take_alone(self) -> list[Task]:
        """The next batch of :meth:`put_alone`; empty if all of it has ended meanwhile."""
        tasks = self.alone.popleft()
        self.alone_count -= len(tasks)
        return tasks

    def cold(self) -> bool:
        """Whether a device could load its model, and none has it now."""
        return not self.groups and bool(self.paged)

    def note_cold(self) -> None:
        """Its model was loaded: those that wait here waited for that."""
        for queue in (self.queue, self.behind):
            for task in queue:
                task.request.cold = True
        for batch in self.alone:
            for task in batch:
                task.request.cold = True

    def ready_at(self, now: float) -> float:
        """When the first device can have its model, where none has it now and its loading begins now at the latest."""
        ready = NEVER
        for model in self.paged:
            at = model.ready_at(now)
            if at < ready:
                ready = at
        return ready

    def _latest_wish(self, start: float) -> float:
        """Until when it can be hoped for that a device has its model by ``start``."""
        if not self.cold():
            return start
        latest = 0.0
        for model in self.paged:
            when = model.latest_wish(start)
            if when > latest:
                latest = when
        return latest

    def hopeless_at(self) -> float:
        """When the most urgent waiting task can no longer make it, not even alone."""
        wake = NEVER
        for queue in (self.queue, self.behind):
            if len(queue):
                task = queue.lowest()
                when = NEVER
                if not self.devices or (self.policy.runs_late and self.cold()):
                    when = task.request.deadline
                elif not self.policy.runs_late:
                    when = task.request.deadline
                    if self.policy.prunes and self.table is not None and not task.settled():
                        when = self._latest_wish(task.due - self.table.upper(1) - self.remaining - self.table.input(1))
                if when < wake:
                    wake = when
        for batch in self.alone:
            for task in batch:
                if task.request.deadline < wake:
                    wake = task.request.deadline
        return wake

    def shares(self) -> bool:
        """Whether other stages are served by devices of its own."""
        return any(group.shared() for group in self.groups)

    def held_up_by(self) -> float:
        """For how long a device that it shares with other stages may be taken by one of those; 0 where it shares
        none."""
        longest = 0.0
        for group in self.groups:
            if group.shared() and group.longest > longest:
                longest = group.longest
        return longest

    def granted(self, size: int) -> None:
        """A batch of this size was granted."""
        self.tally.batches += 1
        self.tally.started += size
        self.batch_size += SMOOTHING_BATCH * (size - self.batch_size) if self.batch_size else size

    def typical_batch(self) -> int:
        """The batch size that requests on their way here should expect."""
        return round(self.batch_size) if self.batch_size >= 1.0 else self.target

    def measure_rate(self, elapsed: float) -> None:
        """Take the arrivals counted over the last ``elapsed`` seconds into the rate."""
        self.waits.end_period()
        measured = self.arrivals / elapsed
        self.arrived = measured
        self.tally.arrived += self.arrivals
        self.rate = measured if self.rate == 0.0 else self.rate + SMOOTHING * (measured - self.rate)
        self.arrivals = 0

    def catch_up(self, periods: int, load: float) -> None:
        """So many periods ended of late in which nothing arrived; ``load`` is what its devices have to do now."""
        for _ in range(min(periods, int(self.waits.history) + 1)):
            self.waits.end_period()
        self.order.catch_up(periods, load)
        self.rate *= (1.0 - SMOOTHING) ** periods
        self.arrived = 0.0

    def all_idle(self) -> bool:
        """Whether nobody waits in any lane."""
        return all(lane.idle() for lane in self.lanes)

    def all_waiting(self) -> int:
        """Elements that wait in all lanes."""
        count = 0
        for lane in self.lanes:
            count += lane.waiting()
        return count

    def waiting(self) -> int:
        """Elements that wait here."""
        count = len(self.queue) + len(self.behind) + self.alone_count
        if self.collecting:
            for device in self.collecting.values():
                count += len(device.collected)
        return count
