"""The engine of a shard: every decision about requests, and nothing else.

``now`` is in seconds on any monotonic clock and never goes back. The shell calls ``submit``, ``pull``,
``done``, ... as things happen, then ``dispatch(now)`` once, which returns the batches to grant; ``take_ended()``
gives the requests that ended, each exactly once; ``next_wake()`` is when ``dispatch`` wants to be called again.

Invariants (tests/test_scheduler_state.py): submitted = ended + in flight; a device holds at most two batches, one of
them running; no batch is granted with a window that has closed.
"""

from typing import Final

from broker.engine.admission import refusal
from broker.engine.devices import Batch, Device
from broker.engine.fleet import Fleet, HeldModel, lowest_free, next_to_serve
from broker.engine.flow import Flow
from broker.engine.forming import form
from broker.engine.ledger import Ledger
from broker.engine.limits import Limits
from broker.engine.overhead import Overhead
from broker.engine.plan import Pipeline
from broker.engine.planner import replan
from broker.engine.request import GRANTED, QUEUED, Client, Request, Task
from broker.engine.stage import NEVER, Stage
from broker.engine.window import closes_at, opens_at, patience_ends
from laxity.outcomes import Outcome
from laxity.payload import Payload

MAX_ATTEMPTS: Final = 2
"""How often a task is given to a device, where the device is lost or too late, before it ends ``unavailable``."""
SWEEP: Final = 0.005
"""The least time between two looks for requests whose deadline passed while a batch of theirs runs."""
REFRESH: Final = 1.0
"""How often rates, predictions and windows' reserves are brought up to date, in seconds."""
TICK: Final = 1e-6
"""Seconds by which moments that were computed in two ways may differ."""
PROBE: Final = 1.0
"""Seconds after which a stage that drops everything runs one request in spite of its predictions: one outlier, or a
profile from a bad moment, must not close it for ever."""


class Scheduler:
    """See the module's text.

    ``first_batch`` numbers the first batch: an agent may still answer one of a shard that ran before this one, so
    shells choose it anew each time. ``overhead`` is a first guess of the seconds that a batch takes beside its
    execution.
    """

    def __init__(self, limits: Limits, first_batch: int = 0, overhead: float = 0.001) -> None:
        self.ledger = Ledger(limits)
        self.fleet = Fleet()
        self.overhead = Overhead(overhead)
        self.pipelines: dict[str, Pipeline] = {}
        self.stages: dict[str, Stage] = {}
        """By model key, those of retiring pipelines included."""
        self.batches: dict[int, Batch] = {}
        self._flow = Flow(self.ledger)
        self._retiring: list[Pipeline] = []
        self._batch_number = first_batch
        self._next_sweep = NEVER
        self._next_refresh = 0.0
        self._rated_at = -1.0
        self._timers: list[Stage] = []

    # ---- pipelines and devices ---------------------------------------------------------

    def apply(self, pipeline: Pipeline) -> None:
        """Serve a pipeline; a running one of that name takes no more requests and finishes what it has. A version
        that still runs, or has yet to finish, goes on as it is: stages are known by their model's key."""
        running = self.pipelines.get(pipeline.name)
        if running is not None and running.same_version(pipeline):
            return
        self.delete(pipeline.name)
        for retiring in self._retiring:
            if retiring.same_version(pipeline):
                self._retiring.remove(retiring)
                retiring.retired = False
                pipeline = retiring
                break
        self.pipelines[pipeline.name] = pipeline
        for plan in pipeline.stages:
            self.stages[plan.stage.key] = plan.stage
        self.fleet.stale = True

    def delete(self, name: str) -> bool:
        """Take no more requests for a pipeline; those in flight finish. Whether there was one."""
        pipeline = self.pipelines.pop(name, None)
        if pipeline is None:
            return False
        pipeline.retired = True
        self._retiring.append(pipeline)
        self.ledger.drained = True
        return True

    def report(self, agent: str, number: int, type: str, models: list[HeldModel]) -> None:
        """A device of an agent, new or with another set of models than before."""
        self.fleet.report(agent, number, type, models)

    def pull(self, agent: str, number: int, free_at: float) -> bool:
        """A device would take a batch and can start it at ``free_at``; False for an unknown one."""
        return self.fleet.pull(agent, number, free_at)

    def agent_lost(self, now: float, agent: str, why: str) -> int:
        """An agent is gone: its batches are queued again while budget and attempts last. How many there were."""
        lost = self.fleet.remove(agent)
        for batch in lost:
            del self.batches[batch.number]
            self._retry(now, batch, why, False, True)
        return len(lost)

    # ---- requests ------------------------------------------------------------------------

    def submit(
        self,
        now: float,
        client: Client,
        id: int,
        pipeline_name: str,
        arrival: float,
        budget: float,
        priority: int,
        payload: Payload,
        timed: bool,
    ) -> Request | None:
        """Take in a request with ``budget`` seconds from ``arrival`` on (negative: the pipeline's SLO).

        None where (client, id) is in flight already: a repeat, which gets the first one's answer. A request
        that cannot be served ends at once, like any other, through ``take_ended``.
        """
        if id in client.requests:
            return None
        ledger = self.ledger
        pipeline = self.pipelines.get(pipeline_name)
        if pipeline is None:
            known = ", ".join(sorted(self.pipelines)) or "none"
            request = Request(client, id, NO_PIPELINE, arrival, arrival, priority, payload, False)
            ledger.enter(request)
            ledger.end(now, request, Outcome.REJECTED, "", f"unknown pipeline {pipeline_name!r}; served here: {known}")
            return request
        if budget < 0.0:
            budget = pipeline.slo
        request = Request(client, id, pipeline, arrival, arrival + budget, priority, payload, timed)
        ledger.enter(request)
        refused = refusal(now, request, budget, ledger)
        if refused is None:
            self._flow.begin(now, request)
        else:
            ledger.end(now, request, refused.outcome, "", refused.detail)
        return request

    def cancel(self, now: float, client: Client, id: int) -> bool:
        """End a request ``cancelled``; False where it is not in flight."""
        request = client.requests.get(id)
        if request is None:
            return False
        self.ledger.end(now, request, Outcome.CANCELLED, "", "cancelled by the client")
        return True

    def client_lost(self, now: float, client: Client) -> int:
        """The client is gone for good: nobody wants its requests. How many there were."""
        requests = list(client.requests.values())
        for request in requests:
            self.ledger.end(now, request, Outcome.CANCELLED, "", "the client is gone")
        return len(requests)

    def shut_down(self, now: float, why: str) -> None:
        """End everything in flight ``unavailable``."""
        waiting: list[Task] = []
        for stage in self.stages.values():
            waiting.extend(stage.queue)
            for alone in stage.alone:
                waiting.extend(alone)
        for batch in self.batches.values():
            waiting.extend(batch.tasks)
        for task in waiting:
            self.ledger.end(now, task.request, Outcome.UNAVAILABLE, task.stage_name(), why)

    def take_ended(self) -> list[Request]:
        """The requests that ended since the last call."""
        return self.ledger.take_ended()

    # ---- batches ---------------------------------------------------------------------------

    def done(
        self,
        now: float,
        agent: str,
        batch_number: int,
        code: str,
        execution: float,
        results: list[Payload],
        failures: dict[int, str],
        detail: str,
    ) -> bool:
        """A granted batch ended; ``results`` has an entry a task where ``code`` is ok. False for a batch that is not
        this agent's (a repeat, or one taken away from it): it changes nothing."""
        batch = self.batches.get(batch_number)
        if batch is None or batch.device.agent != agent:
            return False
        tasks = batch.tasks
        self._close(batch)
        if code == "ok" and len(results) != len(tasks):
            code = "model_error"
            detail = f"{len(results)} answers for a batch of {len(tasks)}"
        if code == "ok":
            group = batch.device.group
            if group is not None and batch.stage.key in group.tables:
                table = group.tables[batch.stage.key]
                if tasks[0].is_probe:
                    table.forget(len(tasks))
                if table.observe(now, len(tasks), execution):
                    self.ledger.touch(batch.stage)
            if batch.device_was_free and self.overhead.observe(now - batch.granted_at - execution):
                for stage in self._timers:
                    self.ledger.touch(stage)
            for index, task in enumerate(tasks):
                if task.request.outcome is not None:
                    continue
                if index in failures:
                    self.ledger.end(now, task.request, Outcome.FAILED, task.stage_name(), failures[index])
                else:
                    self._flow.finish_task(now, task, results[index], batch, execution)
        elif code == "model_error":
            self._bisect(now, batch, detail)
        else:
            # What was never given to a worker has not been attempted.
            if code == "worker_died":
                batch.stage.trouble = detail
            self._retry(now, batch, detail or code, code == "worker_died", code != "unknown_model")
        return True

    def grant_failed(self, batch_number: int) -> None:
        """A grant could not be sent: put its tasks back as if it had never been made."""
        batch = self.batches.get(batch_number)
        if batch is None:
            return
        self._close(batch)
        self._requeue(batch, [task for task in batch.tasks if task.request.outcome is None])

    def _close(self, batch: Batch) -> None:
        del self.batches[batch.number]
        batch.device.batches.pop(batch.number, None)

    def _requeue(self, batch: Batch, tasks: list[Task]) -> None:
        """Put live tasks of a batch back to where they were taken from."""
        if not tasks:
            return
        if batch.alone:
            self._run_alone(tasks)
            return
        stage = batch.stage
        for task in tasks:
            task.state = QUEUED
            stage.queue.push(task)
        self.ledger.touch(stage)

    def _run_alone(self, tasks: list[Task]) -> None:
        for task in tasks:
            task.state = QUEUED
        stage = tasks[0].stage
        stage.put_alone(tasks)
        self.ledger.touch(stage)

    def _retry(self, now: float, batch: Batch, why: str, alone: bool, attempted: bool) -> None:
        """Another attempt for the batch's tasks; ``alone`` after a process died under them: each by itself, so
        that a poisonous input takes nobody along. ``attempted`` says whether this was an attempt."""
        again: list[Task] = []
        for task in batch.tasks:
            request = task.request
            if request.outcome is not None:
                continue
            if attempted:
                task.attempts += 1
            if task.attempts >= MAX_ATTEMPTS:
                detail = f"{task.attempts} attempts failed, the last: {why}"
                self.ledger.end(now, request, Outcome.UNAVAILABLE, task.stage_name(), detail)
            elif now >= request.deadline:
                self.ledger.expire(now, request, task.stage_name())
            elif alone:
                self._run_alone([task])
            else:
                again.append(task)
        self._requeue(batch, again)

    def _bisect(self, now: float, batch: Batch, why: str) -> None:
        """A batch that raised is run again in halves, so that a poisonous input fails alone."""
        live = [task for task in batch.tasks if task.request.outcome is None]
        if len(batch.tasks) == 1:
            for task in live:
                self.ledger.end(now, task.request, Outcome.FAILED, task.stage_name(), why)
            return
        half = len(live) // 2
        for part in (live[:half], live[half:]):
            if part:
                self._run_alone(part)

    # ---- dispatch --------------------------------------------------------------------------

    def dispatch(self, now: float) -> list[Batch]:
        """Everything that is due at ``now``; the batches to grant."""
        grants: list[Batch] = []
        ledger = self.ledger
        fleet = self.fleet
        if ledger.drained:
            self._forget_drained()
        if fleet.stale:
            fleet.regroup(self.stages)
            self._next_refresh = 0.0
        if now >= self._next_refresh:
            self._refresh(now)
        if now >= self._next_sweep:
            self._sweep(now)
        for stage in self._timers:
            if stage.timer <= now:
                ledger.touch(stage)
        while ledger.touched or fleet.offered:
            touched = ledger.touched
            ledger.touched = []
            for stage in touched:
                stage.dirty = False
                self._consider(now, stage, grants, False)
            offered = fleet.offered
            fleet.offered = {}
            for group in offered.values():
                while group.pending and group.lowest_free() is not None:
                    stage = next_to_serve(group.pending)
                    self._leave_pending(stage)
                    self._consider(now, stage, grants, True)
        return grants

    def next_wake(self) -> float:
        """When ``dispatch`` has something to do again if nothing happens until then."""
        wake = self._next_sweep if self._next_sweep < self._next_refresh else self._next_refresh
        for stage in self._timers:
            if stage.timer < wake:
                wake = stage.timer
        return wake

    def _consider(self, now: float, stage: Stage, grants: list[Batch], first: bool) -> None:
        """Look at a stage anew: prune, open its window or set its timer, grant while it is open. Devices that hold
        other models too go to the stage that comes ``first``, once all have been looked at."""
        while True:
            self._prune(now, stage)
            if not stage.waiting():
                self._leave_pending(stage)
                self._set_timer(stage, NEVER)
                return
            if not stage.devices:
                self._leave_pending(stage)
                self._set_timer(stage, stage.hopeless_at() + TICK)
                return
            _update_window(now, stage, self.overhead.seconds)
            if stage.opens > now:
                self._leave_pending(stage)
                self._set_timer(stage, stage.opens)
                return
            device = lowest_free(stage.groups)
            contested = device is not None and not first and device.shared()
            if device is None or contested:
                if not stage.pending:
                    stage.pending = True
                    for group in stage.groups:
                        group.pending[stage.key] = stage
                self._set_timer(stage, stage.hopeless_at() + TICK)
                if device is not None:
                    self.fleet.offer_again(device)
                return
            self._grant(now, stage, device, grants)
            first = False

    def _prune(self, now: float, stage: Stage) -> None:
        """End what waits here and can no longer make it, not even alone."""
        queue = stage.queue
        table = stage.table
        least = table.upper(1) + stage.remaining if table is not None else 0.0
        while len(queue):
            task = queue.lowest()
            if now >= task.key:
                self._end_waiting(now, task)
            elif stage.devices and now >= stage.probe_at and now + self.overhead.seconds + least > task.key:
                stage.probe_at = NEVER
                task.is_probe = True
            elif stage.devices and now + least > task.key and not task.settled():
                self._drop(now, task, now + least - task.key)
            else:
                break
        if stage.alone:
            for batch in list(stage.alone):
                for task in list(batch):
                    if now >= task.key:
                        self._end_waiting(now, task)
            while stage.alone and not stage.alone[0]:
                stage.alone.popleft()

    def _drop(self, now: float, task: Task, short: float) -> None:
        if task.stage.probe_at >= NEVER:
            task.stage.probe_at = now + PROBE
        self.ledger.drop(now, task, short)

    def _end_waiting(self, now: float, task: Task) -> None:
        """The deadline passed in the queue: nobody's fault, unless there was nobody to run it."""
        name = task.stage_name()
        if task.stage.devices:
            self.ledger.expire(now, task.request, name)
        else:
            trouble = f" (the last one: {task.stage.trouble})" if task.stage.trouble else ""
            detail = f"no agent holds the model of stage {name!r} at present{trouble}: see laxity status"
            self.ledger.end(now, task.request, Outcome.UNAVAILABLE, name, detail)

    def _grant(self, now: float, stage: Stage, device: Device, grants: list[Batch]) -> None:
        group = device.group
        assert group is not None
        table = group.tables[stage.key]
        start = now + self.overhead.seconds
        device_was_free = device.free_at <= now and not device.batches
        if device.free_at > start:
            start = device.free_at
        alone = bool(stage.alone)
        if alone:
            tasks = stage.take_alone()
        else:
            formed = form(stage.queue, table, start, stage.remaining, stage.target, stage.ceiling, stage.devices)
            for index, task in enumerate(formed.dropped):
                self._drop(now, task, formed.short[index])
            tasks = formed.batch
        if not tasks:
            return
        earliest = tasks[0].key
        for task in tasks:
            task.state = GRANTED
            if task.key < earliest:
                earliest = task.key
        closes = closes_at(table, len(tasks), earliest, stage.remaining)
        if closes < start:
            # By rounding only; or a settled map request, or the second try of one: run while there is any budget.
            closes = start if closes > start - TICK else earliest
        number = self._batch_number
        self._batch_number = number + 1
        batch = Batch(
            number, device, stage, tasks, now, device_was_free, start, closes, table.mean(len(tasks)), earliest, alone
        )
        stage.granted(len(tasks))
        stage.probe_at = NEVER
        group.take(device)
        device.batches[number] = batch
        self.batches[number] = batch
        if earliest < self._next_sweep:
            self._next_sweep = earliest
        grants.append(batch)

    def _leave_pending(self, stage: Stage) -> None:
        if stage.pending:
            stage.pending = False
            for group in stage.groups:
                group.pending.pop(stage.key, None)

    def _set_timer(self, stage: Stage, when: float) -> None:
        if stage.timer >= NEVER:
            if when < NEVER:
                self._timers.append(stage)
        elif when >= NEVER:
            self._timers.remove(stage)
        stage.timer = when

    # ---- now and then ------------------------------------------------------------------------

    def _sweep(self, now: float) -> None:
        """End the requests whose deadline passed while a batch of theirs runs."""
        next_sweep = NEVER
        for batch in self.batches.values():
            if batch.next_deadline <= now:
                nearest = NEVER
                for task in batch.tasks:
                    request = task.request
                    if request.outcome is None:
                        if request.deadline <= now:
                            self.ledger.expire(now, request, task.stage_name())
                        elif request.deadline < nearest:
                            nearest = request.deadline
                batch.next_deadline = nearest
            if batch.next_deadline < next_sweep:
                next_sweep = batch.next_deadline
        self._next_sweep = NEVER if next_sweep >= NEVER else max(next_sweep, now + SWEEP)

    def _refresh(self, now: float) -> None:
        """Bring rates, predictions, targets and reserves up to date."""
        self._next_refresh = now + REFRESH
        elapsed = now - self._rated_at
        if self._rated_at < 0.0:
            self._rated_at = now
        elif elapsed >= REFRESH:
            self._rated_at = now
            for stage in self.stages.values():
                stage.measure_rate(elapsed)
        for table in self.fleet.tables.values():
            table.expire(now)
        for pipeline in [*self.pipelines.values(), *self._retiring]:
            replan(pipeline)
        for stage in self.stages.values():
            if stage.waiting():
                self.ledger.touch(stage)

    def _forget_drained(self) -> None:
        """Let go of the retired pipelines that have nothing in flight any more."""
        self.ledger.drained = False
        for pipeline in self._retiring:
            if pipeline.in_flight == 0:
                for plan in pipeline.stages:
                    stage = plan.stage
                    if self.stages.get(stage.key) is stage:
                        del self.stages[stage.key]
                    self._leave_pending(stage)
                    self._set_timer(stage, NEVER)
        self._retiring = [pipeline for pipeline in self._retiring if pipeline.in_flight > 0]
        self.fleet.stale = True


def _update_window(now: float, stage: Stage, delay: float) -> None:
    table = stage.table
    waiting = len(stage.queue)
    if stage.alone or table is None or not waiting:
        stage.opens = now
        stage.closes = now
        return
    earliest = stage.queue.lowest().key
    if waiting >= stage.target:
        stage.opens = now
        waiting = stage.target
    else:
        stage.opens = opens_at(table, waiting, earliest, stage.reserve, delay)
        if stage.rate > 0.0:
            stage.opens = min(stage.opens, patience_ends(stage.queue.lowest().queued_at, stage.target, stage.rate))
    stage.closes = closes_at(table, waiting, earliest, stage.remaining)


NO_PIPELINE: Final = Pipeline("", 0.0, [], [])
"""What requests for unknown pipelines belong to."""
