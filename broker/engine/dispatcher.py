"""From queues to grants: windows, matching, and the batches that are given to devices."""

from typing import Final

from broker.engine.budget_queue import BudgetQueue
from broker.engine.devices import Batch, Device
from broker.engine.fleet import Fleet, best_device
from broker.engine.ledger import Ledger
from broker.engine.overhead import Overhead
from broker.engine.paging import Paging
from broker.engine.policy import FORCED
from broker.engine.predictor import LatencyTable
from broker.engine.request import GRANTED, QUEUED, Task
from broker.engine.residency import HELD, RESIDENT, UNLOADING
from broker.engine.spans import Estimate, Run
from broker.engine.stage import NEVER, Stage
from broker.engine.timers import Timers
from broker.engine.window import closes_at
from laxity.outcomes import Outcome

TICK: Final = 1e-6
"""Seconds by which moments that were computed in two ways may differ."""
PROBE: Final = 1.0
"""Seconds after which a stage that drops everything runs one request in spite of its predictions: one outlier, or a
profile from a bad moment, must not close it for ever."""
PREEMPTION: Final = 3.03
"""How many times as large as a running batch another must be to take its place (Shepherd, NSDI'23)."""
RESPONSE: Final = 0.0003
"""Seconds that a batch's results take back, before any were measured."""


class Dispatcher:
    """Looks at stages whose queues changed or whose timers ran out, and grants what is due. ``travel`` and ``response``
    are how long a batch takes to its device, and its results back."""

    def __init__(
        self, ledger: Ledger, fleet: Fleet, paging: Paging, first_batch: int, overhead: float, preemption: bool
    ) -> None:
        self.batches: dict[int, Batch] = {}
        self.preempted: list[Batch] = []
        """Batches taken off their devices since this was last emptied; the shell has them stopped there."""
        self.travel = Overhead(overhead)
        self.response = Overhead(RESPONSE)
        self.next_sweep = NEVER
        """When the deadline of a request in a granted batch, or in one that is being collected, passes next."""
        self._ledger = ledger
        self._fleet = fleet
        self._paging = paging
        self._batch_number = first_batch
        self._preemption = preemption
        self._timers = Timers()
        self._grants: list[Batch] = []

    def dispatch(self, now: float) -> list[Batch]:
        """Everything that is due at ``now``; the batches to grant."""
        ledger = self._ledger
        fleet = self._fleet
        for stage in self._timers.due(now):
            ledger.touch(stage)
        while ledger.touched or fleet.offered:
            touched = ledger.touched
            ledger.touched = []
            for stage in touched:
                stage.dirty = False
                self._consider(now, stage, False)
            offered = fleet.offered
            fleet.offered = {}
            for group in offered.values():
                while len(group.pending):
                    device = group.best(now)
                    if device is None:
                        break
                    stage = group.pending.first()
                    self.leave_pending(now, stage)
                    self._consider(now, stage, True)
        grants = self._grants
        self._grants = []
        return grants

    def next_wake(self) -> float:
        """When :meth:`dispatch` has something to do if nothing happens until then."""
        return self._timers.next()

    def forget(self, now: float, stage: Stage) -> None:
        """A stage is served no more."""
        self.leave_pending(now, stage)
        self._timers.set(stage, NEVER)
        self._paging.forget(stage)

    def leave_pending(self, now: float, stage: Stage) -> None:
        stage.unblock(now)
        if stage.pending:
            stage.pending = False
            for group in stage.groups:
                group.pending.discard(stage)

    # ---- one stage -------------------------------------------------------------------------

    def _consider(self, now: float, stage: Stage, first: bool) -> None:
        """Look at a stage anew: prune, open its window or set its timer, grant while it is open. Devices that hold
        other models too go to the stage that comes ``first``, once all have been looked at."""
        while True:
            self._prune(now, stage)
            if stage.idle():
                self.leave_pending(now, stage)
                self._timers.set(stage, NEVER)
                return
            if not stage.groups or not stage.devices:
                self.leave_pending(now, stage)
                if stage.devices:
                    stage.block(now)
                    self._paging.want(now, stage)
                self._timers.set(stage, stage.hopeless_at() + TICK)
                return
            table = stage.table
            if stage.alone or table is None:
                stage.opens = stage.closes = now
            else:
                stage.policy.window.update(now, stage, table, self._travel(stage, table))
            if stage.opens > now:
                self.leave_pending(now, stage)
                wake = stage.opens
                if len(stage.behind):
                    # Those behind the plan may be lost before it opens.
                    wake = min(wake, stage.hopeless_at() + TICK)
                self._timers.set(stage, wake)
                return
            device = best_device(stage, now)
            contested = device is not None and not first and device.shared()
            if device is None or contested:
                if not contested and stage.policy.collects and not stage.alone and self._collect(now, stage):
                    continue
                stage.pending = True
                for group in stage.groups:
                    group.pending.add(stage)
                stage.block(now)
                if stage.paged:
                    self._paging.want(now, stage)
                self._timers.set(stage, stage.hopeless_at() + TICK)
                if device is not None:
                    self._fleet.offer_again(device)
                elif self._preemption and stage.policy.preempts:
                    self._preempt(now, stage)
                return
            self._grant(now, stage, device)
            first = False

    def _prune(self, now: float, stage: Stage) -> None:
        """End what waits here and can no longer make it, not even alone."""
        if not stage.policy.runs_late or not stage.devices or stage.cold():
            self._prune_queue(now, stage, stage.queue)
            if len(stage.behind):
                self._prune_queue(now, stage, stage.behind)
        if stage.alone:
            for batch in list(stage.alone):
                for task in list(batch):
                    if now >= task.request.deadline:
                        self._end_waiting(now, task)
            while stage.alone and not stage.alone[0]:
                stage.alone.popleft()

    def _prune_queue(self, now: float, stage: Stage, queue: BudgetQueue) -> None:
        table = stage.table
        least = table.input(1) + table.upper(1) + stage.remaining if table is not None else 0.0
        cold = stage.cold()
        if cold:
            least += stage.ready_at(now) - now
        while len(queue):
            task = queue.lowest()
            if now + self.travel.base + least < task.due:
                break  # it makes it, and its deadline is not before that
            if cold:
                task.request.cold = True
            if now >= task.request.deadline:
                self._end_waiting(now, task)
            elif not stage.devices or not stage.policy.prunes:
                break
            elif now >= stage.probe_at and now + self.travel.base + least > task.due:
                stage.probe_at = NEVER
                task.is_probe = True
            elif now + least > task.due and not task.settled():
                self._drop(now, task, _alone(now, task, table))
            else:
                break

    def _drop(self, now: float, task: Task, estimate: Estimate) -> None:
        stage = task.stage
        # Who is dropped for want of a load says nothing of the predictions, unless it had no hope when it came.
        if stage.probe_at >= NEVER and (not stage.cold() or task.queued_at + estimate.short >= now):
            stage.probe_at = now + PROBE
        self._paging.miss(stage)
        self._ledger.drop(now, task, estimate)

    def _end_waiting(self, now: float, task: Task) -> None:
        """The deadline passed in the queue: nobody's fault, unless there was nobody to run it."""
        if task.stage.devices:
            self._paging.miss(task.stage)
            self._ledger.expire(now, task.request, task.number)
        else:
            name = task.stage_name()
            trouble = f" (the last one: {task.stage.trouble})" if task.stage.trouble else ""
            detail = f"no agent holds the model of stage {name!r} at present{trouble}: see laxity status"
            self._ledger.end(now, task.request, Outcome.UNAVAILABLE, name, detail)

    def _travel(self, stage: Stage, table: LatencyTable) -> float:
        """How long the batch that the stage's queue would make takes to its device, and its inputs there."""
        waiting = len(stage.queue)
        size = waiting if waiting < stage.ceiling else stage.ceiling
        return self.travel.seconds(size) + table.input(size)

    # ---- grants ----------------------------------------------------------------------------

    def _grant(self, now: float, stage: Stage, device: Device) -> None:
        group = device.group
        assert group is not None
        table = group.tables[stage.key]
        start = now + self._travel(stage, table)
        device_was_free = device.free_at <= now and not device.batches
        if device.free_at > start:
            start = device.free_at
        alone = bool(stage.alone)
        tasks = stage.take_alone() if alone else self._form(now, stage, table, start)
        if tasks:
            self._give(now, stage, device, tasks, start, device_was_free, alone)

    def _form(self, now: float, stage: Stage, table: LatencyTable, start: float) -> list[Task]:
        """Form a batch; those that cannot make it are dropped."""
        formed = stage.policy.form.form(stage, table, start)
        for index, task in enumerate(formed.dropped):
            self._drop(now, task, formed.estimates[index])
        return [task for task in formed.batch if task.request.outcome is None] if formed.dropped else formed.batch

    def _give(
        self,
        now: float,
        stage: Stage,
        device: Device,
        tasks: list[Task],
        start: float,
        device_was_free: bool,
        alone: bool,
    ) -> None:
        group = device.group
        assert group is not None
        table = group.tables[stage.key]
        size = len(tasks)
        earliest = tasks[0].due
        deadline = tasks[0].request.deadline
        for task in tasks:
            if task.due < earliest:
                earliest = task.due
            if task.request.deadline < deadline:
                deadline = task.request.deadline
        if deadline <= now and not stage.policy.runs_late:
            # Collected or settled ones: nobody dropped them in time.
            for task in tasks:
                if task.request.deadline <= now:
                    self._end_waiting(now, task)
            tasks = [task for task in tasks if task.request.outcome is None]
            if tasks:
                self._give(now, stage, device, tasks, start, device_was_free, alone)
            return
        if stage.policy.runs_late:
            closes = deadline = NEVER
        elif stage.policy.collects:
            closes = deadline  # it was decided upon when they were collected
        else:
            closes = closes_at(table, size, earliest, stage.remaining)
            if closes < start:
                # By rounding only; or a settled map request, or the second try of one: run while there is any budget.
                closes = start if closes > start - TICK else deadline
            # The agent counts from the earliest moment at which the grant can have left: a pull's way too early.
            closes += self.travel.base
        expected = table.busy(size)
        number = self._batch_number
        self._batch_number = number + 1
        opened = stage.opens if stage.opens < now else now
        run = Run(number, device.agent, device.number, size, opened, closes, now, stage.blocked_for(now), expected)
        for task in tasks:
            task.state = GRANTED
            task.run = run
            task.grants += 1
        batch = Batch(number, device, stage, tasks, now, device_was_free, start, closes, expected, deadline, alone, run)
        self._note_waits(now, stage, tasks, start)
        if stage.metrics is not None:
            stage.metrics.granted(now, stage, tasks, start, closes)
        stage.granted(size)
        stage.probe_at = NEVER
        group.take(device, start + expected)
        if device.memory is not None:
            device.memory.use(now, stage.model)
        group.pending.charge(stage.pipeline, expected)
        device.batches[number] = batch
        self.batches[number] = batch
        if deadline < self.next_sweep:
            self.next_sweep = deadline
        self._grants.append(batch)
        if stage.policy.collects:
            group.busy(device)
            self._ledger.touch(stage)

    def _note_waits(self, now: float, stage: Stage, tasks: list[Task], start: float) -> None:
        waits = stage.waits
        total = 0.0
        if stage.policy.foresees == FORCED:
            blocked = stage.blocked_for(now)
            for task in tasks:
                total += blocked - task.blocked
            waits.note_queued(total, len(tasks))
        elif stage.policy.collects:
            for task in tasks:
                taken = task.taken_at if task.taken_at > task.queued_at else now
                waits.note(taken - task.queued_at, start - taken)
        else:
            for task in tasks:
                total += now - task.queued_at
            waits.note_queued(total, len(tasks))

    # ---- batches collected while their device is busy (PARD) -------------------------------

    def _collect(self, now: float, stage: Stage) -> bool:
        """Put waiting requests into the next batch of the device that ends first; False where all are full."""
        for group in stage.groups:
            device = group.first_to_end(stage)
            if device is None:
                continue
            device.collects_for = stage
            stage.collecting[device.index] = device
            stage.collected = len(device.collected)
            until = device.busy_until if device.busy_until > now else now
            tasks = self._form(now, stage, group.tables[stage.key], until)
            stage.collected = 0
            for task in tasks:
                task.taken_at = now
                if task.request.deadline < self.next_sweep:
                    self.next_sweep = task.request.deadline
            device.collected.extend(tasks)
            return True
        return False

    def give_collected(self, now: float, device: Device) -> None:
        """The device has pulled: the batch that was collected for it is full now."""
        stage = device.collects_for
        tasks = device.collected
        if stage is None or not device.pulled:
            return
        self.stop_collecting(device)
        if tasks:
            group = device.group
            assert group is not None
            start = now + self.travel.seconds(len(tasks)) + group.tables[stage.key].input(len(tasks))
            if device.free_at > start:
                start = device.free_at
            self._give(now, stage, device, tasks, start, False, False)

    def stop_collecting(self, device: Device) -> None:
        """Leave what was collected for a device to the caller."""
        stage = device.collects_for
        if stage is not None:
            device.collects_for = None
            device.collected = []
            stage.collecting.pop(device.index, None)

    def lose_model(self, device: Device, key: str) -> None:
        """A device that pages its models says that it does not have this one in its memory."""
        memory = device.memory
        model = memory.models.get(key) if memory is not None else None
        if model is None or device.group is None:
            return
        if model.state == UNLOADING:
            model.state = HELD
            self._paging.touch(model)
        elif model.state == RESIDENT:
            if device.collects_for is not None and device.collects_for.model == key:
                self.uncollect(device)
            self._fleet.lose(model, HELD)

    def uncollect(self, device: Device) -> None:
        """The device is gone, or holds the model no more: those collected for it wait again."""
        stage = device.collects_for
        if stage is not None:
            tasks = device.collected
            self.stop_collecting(device)
            for task in tasks:
                task.state = QUEUED
                stage.push(task)
            self._ledger.touch(stage)

    # ---- pre-emption (Shepherd) --------------------------------------------------------------

    def _preempt(self, now: float, stage: Stage) -> None:
        """Stop the smallest batch that runs for this stage, where the one that waits is much larger."""
        table = stage.table
        if table is None or not len(stage.queue):
            return
        start = now + self._travel(stage, table)
        earliest = stage.queue.lowest().due
        most = len(stage.queue) if len(stage.queue) < stage.target else stage.target
        size = 0
        while size < most and earliest >= start + table.upper(size + 1) + stage.remaining:
            size += 1
        smallest: Batch | None = None
        for group in stage.groups:
            for device in group.members.values():
                for batch in device.batches.values():
                    if batch.stage is stage and (smallest is None or len(batch.tasks) < len(smallest.tasks)):
                        smallest = batch
        if smallest is None or size < PREEMPTION * len(smallest.tasks):
            return
        device = smallest.device
        if device.pulled or len(device.batches) > 1:
            return
        del self.batches[smallest.number]
        del device.batches[smallest.number]
        self.preempted.append(smallest)
        for task in smallest.tasks:
            if task.request.outcome is None:
                task.state = QUEUED
                stage.push(task)


def _alone(now: float, task: Task, table: LatencyTable | None) -> Estimate:
    """What a task that waits must expect if it is run alone and at once, or as soon as its model can be loaded."""
    stage = task.stage
    start = stage.ready_at(now) if stage.cold() else now
    if table is None:
        return Estimate(start, task.due, 0.0, 1, 0.0)
    return Estimate(start + table.input(1), task.due, table.upper(1), 1, stage.remaining)
