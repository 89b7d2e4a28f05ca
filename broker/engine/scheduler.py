"""The engine of a shard: every decision about requests, and nothing else.

``now`` is in seconds on any monotonic clock and never goes back. The shell calls ``submit``, ``pull``,
``done``, ... as things happen, then ``dispatch(now)`` once, which returns the batches to grant; ``take_ended()``
gives the requests that ended, each exactly once; ``next_wake()`` is when ``dispatch`` wants to be called again.

Invariants (tests/test_scheduler_state.py): submitted = ended + in flight; a device holds at most two batches, one of
them running; no batch is granted with a window that has closed.
"""

from collections import deque
from typing import Final

from broker.engine.budget_queue import BudgetQueue
from broker.engine.devices import Batch, Device, DeviceGroup
from broker.engine.forming import form
from broker.engine.plan import FROM_REQUEST, Pipeline
from broker.engine.planner import replan
from broker.engine.predictor import LatencyTable
from broker.engine.request import GRANTED, QUEUED, Client, MapGroup, Request, StageTime, Task
from broker.engine.stage import NEVER, Stage
from broker.engine.window import closes_at, opens_at
from laxity.outcomes import Outcome
from laxity.payload import Payload, PayloadError, as_dict, as_list

MAX_ATTEMPTS: Final = 2
"""How often a task is given to a device, where the device is lost or too late, before it ends ``unavailable``."""
SWEEP: Final = 0.005
"""The least time between two looks for requests whose deadline passed while a batch of theirs runs."""
REFRESH: Final = 1.0
"""How often rates, predictions and windows' reserves are brought up to date, in seconds."""


class Limits:
    """Bounds of a shard: bytes of payloads held, bytes of one request's payload, requests in flight."""

    def __init__(
        self,
        max_bytes: int = 4 * 1024**3,
        max_payload: int = 64 * 1024**2,
        max_requests: int = 200_000,
    ) -> None:
        self.max_bytes = max_bytes
        self.max_payload = max_payload
        self.max_requests = max_requests


class HeldModel:
    """A model that a device holds, as its agent reports it."""

    def __init__(self, key: str, variant: str, share: int, profile: list[tuple[int, float]]) -> None:
        self.key = key
        self.variant = variant
        self.share = share
        self.profile = profile


class Scheduler:
    """See the module's text.

    ``first_batch`` numbers the first batch: an agent may still answer one of a shard that ran before this one, so
    shells choose it anew each time. ``delay`` is how long a grant takes to reach its device, in seconds.
    """

    def __init__(self, limits: Limits, first_batch: int = 0, delay: float = 0.001) -> None:
        self.limits = limits
        self.delay = delay
        self.pipelines: dict[str, Pipeline] = {}
        self.retiring: list[Pipeline] = []
        self.stages: dict[str, Stage] = {}
        self.devices: dict[tuple[str, int], Device] = {}
        self.groups: dict[tuple[str, str], DeviceGroup] = {}
        self.tables: dict[tuple[str, str, int, str], LatencyTable] = {}
        self.batches: dict[int, Batch] = {}
        self.submitted = 0
        self.in_flight = 0
        self.bytes = 0
        self.ended_by: dict[str, int] = {outcome.value: 0 for outcome in Outcome}
        self._ended: list[Request] = []
        self._dirty: list[Stage] = []
        self._free_groups: dict[int, DeviceGroup] = {}
        self._batch_number = first_batch
        self._device_index = 0
        self._next_sweep = NEVER
        self._next_refresh = 0.0
        self._rated_at = -1.0
        self._timers: list[Stage] = []

    # ---- pipelines -------------------------------------------------------------------

    def apply(self, pipeline: Pipeline) -> None:
        """Serve a pipeline; a running one of that name takes no more requests and finishes what it has."""
        old = self.pipelines.get(pipeline.name)
        if old is not None:
            self._retire(old)
        self.pipelines[pipeline.name] = pipeline
        for stage_plan in pipeline.stages:
            stage = stage_plan.stage
            self.stages[stage.key] = stage
        self._regroup()

    def delete(self, name: str) -> bool:
        """Take no more requests for a pipeline; those in flight finish. Whether there was one."""
        pipeline = self.pipelines.pop(name, None)
        if pipeline is None:
            return False
        self._retire(pipeline)
        return True

    def _retire(self, pipeline: Pipeline) -> None:
        pipeline.retired = True
        self.retiring.append(pipeline)
        self._forget_retired()

    def _forget_retired(self) -> None:
        done = [pipeline for pipeline in self.retiring if pipeline.in_flight == 0]
        if not done:
            return
        self.retiring = [pipeline for pipeline in self.retiring if pipeline.in_flight > 0]
        for pipeline in done:
            for stage_plan in pipeline.stages:
                if self.stages.get(stage_plan.stage.key) is stage_plan.stage:
                    del self.stages[stage_plan.stage.key]
        self._regroup()

    # ---- devices ---------------------------------------------------------------------

    def report(self, now: float, agent: str, number: int, type: str, models: list[HeldModel]) -> None:
        """A device of an agent, new or with another set of models than before."""
        device = self.devices.get((agent, number))
        if device is None:
            device = Device(self._device_index, agent, number, type)
            self._device_index += 1
            self.devices[(agent, number)] = device
        free_at = device.free_at
        pulled = device.pulled
        if device.group is not None:
            device.group.remove(device)
        device.type = type
        names: list[str] = []
        tables: dict[str, LatencyTable] = {}
        for model in sorted(models, key=_model_key):
            names.append(f"{model.key}|{model.variant}|{model.share}")
            slot = (model.key, model.variant, model.share, type)
            table = self.tables.get(slot)
            stage = self.stages.get(model.key)
            if table is None:
                max_batch = stage.max_batch if stage is not None else max([b for b, _ in model.profile], default=1)
                table = LatencyTable(max_batch, model.profile)
                self.tables[slot] = table
            tables[model.key] = table
        group_key = (type, ",".join(names))
        group = self.groups.get(group_key)
        if group is None:
            group = DeviceGroup(type, tables)
            self.groups[group_key] = group
        group.add(device)
        self._regroup()
        if pulled:
            self.pull(now, agent, number, free_at)

    def pull(self, now: float, agent: str, number: int, free_at: float) -> bool:
        """A device would take a batch and can start it at ``free_at``. False for an unknown device."""
        device = self.devices.get((agent, number))
        if device is None or device.group is None:
            return False
        device.free_at = free_at
        if len(device.batches) < 2:
            device.group.offer(device)
            self._free_groups[id(device.group)] = device.group
        return True

    def agent_lost(self, now: float, agent: str, why: str) -> int:
        """An agent is gone: its batches are queued again while budget and attempts last. The batches lost."""
        lost = 0
        for slot in [slot for slot in self.devices if slot[0] == agent]:
            device = self.devices.pop(slot)
            if device.group is not None:
                device.group.remove(device)
            for batch in list(device.batches.values()):
                lost += 1
                self._close_batch(batch)
                self._retry(now, batch, why, False)
        self._regroup()
        return lost

    def _regroup(self) -> None:
        """Bring the stages' device groups in line after pipelines or devices changed (rare)."""
        self.groups = {key: group for key, group in self.groups.items() if group.members}
        for stage in self.stages.values():
            stage.groups = []
            stage.devices = 0
            stage.table = None
        for group in self.groups.values():
            group.stages = []
            group.pending = {}
            for model in group.tables:
                stage_ = self.stages.get(model)
                if stage_ is not None:
                    group.stages.append(stage_)
                    stage_.groups.append(group)
                    stage_.devices += len(group.members)
        live: dict[tuple[str, str, int, str], LatencyTable] = {}
        kept = {id(table) for group in self.groups.values() for table in group.tables.values()}
        for slot, table in self.tables.items():
            if id(table) in kept or slot[0] in self.stages:
                live[slot] = table
        self.tables = live
        for stage in self.stages.values():
            stage.pending = False
            self._touch(stage)
        self._next_refresh = 0.0

    # ---- requests --------------------------------------------------------------------

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
        pipeline = self.pipelines.get(pipeline_name)
        if pipeline is None:
            known = ", ".join(sorted(self.pipelines)) or "none"
            request = Request(client, id, NO_PIPELINE, arrival, arrival, priority, payload, False)
            self._enter(request)
            self._end(
                now,
                request,
                Outcome.REJECTED,
                "",
                f"unknown pipeline {pipeline_name!r}; served here: {known}",
            )
            return request
        if budget < 0.0:
            budget = pipeline.slo
        request = Request(client, id, pipeline, arrival, arrival + budget, priority, payload, timed)
        self._enter(request)
        limits = self.limits
        if budget == 0.0:
            self._end(now, request, Outcome.REJECTED, "", "no latency budget; ask for an SLO above 0")
        elif budget > pipeline.slo * 1.000001:
            self._end(
                now,
                request,
                Outcome.REJECTED,
                "",
                f"an SLO of {budget:g} s is longer than the pipeline's {pipeline.slo:g} s: ask for less",
            )
        elif payload.nbytes > limits.max_payload:
            self._end(
                now,
                request,
                Outcome.REJECTED,
                "",
                f"payload of {payload.nbytes} bytes is above the limit of {limits.max_payload}",
            )
        elif self.in_flight > limits.max_requests:
            self._end(
                now,
                request,
                Outcome.REJECTED,
                "",
                f"queue full: {limits.max_requests} requests are in flight at this shard; slow down and try again",
            )
        elif self.bytes > limits.max_bytes:
            self._end(
                now,
                request,
                Outcome.REJECTED,
                "",
                f"queue full: {limits.max_bytes} bytes are in flight at this shard; slow down and try again",
            )
        elif now >= request.deadline:
            self._end(now, request, Outcome.EXPIRED, "", "the budget was used up on the way to the shard")
        else:
            stages = len(pipeline.stages)
            request.values = [None] * stages
            request.waiting = list(pipeline.parent_counts)
            for number in pipeline.roots:
                if request.outcome is None:
                    self._enqueue(now, request, number)
        return request

    def _enter(self, request: Request) -> None:
        request.client.requests[request.id] = request
        request.pipeline.in_flight += 1
        self.submitted += 1
        self.in_flight += 1
        self.bytes += request.nbytes

    def cancel(self, now: float, client: Client, id: int) -> bool:
        """End a request ``cancelled``; False where it is not in flight."""
        request = client.requests.get(id)
        if request is None:
            return False
        self._end(now, request, Outcome.CANCELLED, "", "cancelled by the client")
        return True

    def client_lost(self, now: float, client: Client) -> int:
        """The client is gone for good: nobody wants its requests. How many there were."""
        requests = list(client.requests.values())
        for request in requests:
            self._end(now, request, Outcome.CANCELLED, "", "the client is gone")
        return len(requests)

    def shut_down(self, now: float, why: str) -> None:
        """End everything in flight ``unavailable``."""
        for pipeline in [*self.pipelines.values(), *self.retiring]:
            for stage_plan in pipeline.stages:
                for task in list(stage_plan.stage.queue):
                    self._end(now, task.request, Outcome.UNAVAILABLE, stage_plan.name, why)
                for batch in list(stage_plan.stage.alone):
                    for task in batch:
                        self._end(now, task.request, Outcome.UNAVAILABLE, stage_plan.name, why)
        for granted in list(self.batches.values()):
            for task in granted.tasks:
                self._end(now, task.request, Outcome.UNAVAILABLE, _stage_name(task), why)

    def take_ended(self) -> list[Request]:
        """The requests that ended since the last call."""
        ended = self._ended
        if ended:
            self._ended = []
        return ended

    def _end(self, now: float, request: Request, outcome: Outcome, stage: str, detail: str) -> None:
        if request.outcome is not None:
            return
        request.outcome = outcome
        request.end_stage = stage
        request.detail = detail
        request.ended_at = now
        tasks = request.tasks
        if tasks:
            for task in tasks:
                if task.state == QUEUED:
                    self._unqueue(task)
            request.tasks = []
        del request.client.requests[request.id]
        pipeline = request.pipeline
        pipeline.in_flight -= 1
        self.in_flight -= 1
        self.bytes -= request.nbytes
        self.ended_by[outcome] += 1
        self._ended.append(request)
        if pipeline.retired and pipeline.in_flight == 0:
            self._forget_retired()

    def _unqueue(self, task: Task) -> None:
        stage = task.stage
        if not stage.queue.remove(task):
            for batch in stage.alone:
                if task in batch:
                    batch.remove(task)
                    stage.alone_count -= 1
                    break
        self._touch(stage)

    # ---- the graph -------------------------------------------------------------------

    def _enqueue(self, now: float, request: Request, number: int) -> None:
        """All inputs of a stage are there: queue the request (or its items) for it."""
        plan = request.pipeline.stages[number]
        stage = plan.stage
        inputs: list[Payload] = []
        try:
            for source, field in plan.sources:
                value = request.payload if source == FROM_REQUEST else request.values[source]
                assert value is not None
                inputs.append(value.field(field) if field else value)
            items = inputs[0].items() if plan.is_map else []
        except PayloadError as error:
            source = plan.sources[len(inputs)][0] if len(inputs) < len(plan.sources) else plan.sources[0][0]
            blame = plan.name if source == FROM_REQUEST else request.pipeline.stages[source].name
            outcome = Outcome.REJECTED if source == FROM_REQUEST else Outcome.FAILED
            self._end(now, request, outcome, blame, f"no input for stage {plan.name!r}: {error}")
            return
        count = len(items) if plan.is_map else 1
        if count > plan.max_items:
            self._end(
                now,
                request,
                Outcome.FAILED,
                plan.name,
                f"{count} items exceed the stage's max_items of {plan.max_items}",
            )
            return
        if stage.waiting() + count > stage.max_queue:
            self._end(
                now,
                request,
                Outcome.REJECTED,
                plan.name,
                f"queue full: {stage.waiting()} of {stage.max_queue} elements wait at stage {plan.name!r}",
            )
            return
        if not plan.is_map:
            task = Task(request, stage, number, -1, None, inputs, now)
            request.tasks.append(task)
            stage.queue.push(task)
        elif count == 0:
            self._finish_stage(now, request, number, as_list([]))
            return
        else:
            group = MapGroup(count)
            for index in range(count):
                task = Task(request, stage, number, index, group, [items[index]], now)
                request.tasks.append(task)
                stage.queue.push(task)
        stage.arrivals += count
        if not stage.dirty:
            stage.dirty = True
            self._dirty.append(stage)

    def _finish_task(self, now: float, task: Task, answer: Payload, batch: Batch, execution: float) -> None:
        request = task.request
        group = task.group
        request.forget(task)
        if request.timings is not None:
            self._time(now, task, batch, execution)
        if group is None:
            self._finish_stage(now, request, task.number, answer)
            return
        group.results[task.item] = answer
        group.left -= 1
        if group.left == 0:
            results: list[Payload] = []
            for result in group.results:
                assert result is not None
                results.append(result)
            self._finish_stage(now, request, task.number, as_list(results))

    def _time(self, now: float, task: Task, batch: Batch, execution: float) -> None:
        """Note how the stage went; for a map stage from the first item's wait to the last item's end."""
        request = task.request
        assert request.timings is not None
        queued = batch.start - task.queued_at
        if queued < 0.0:
            queued = 0.0
        group = task.group
        time = group.time if group is not None else None
        if time is None:
            time = StageTime(_stage_name(task), queued, execution, len(batch.tasks), 1, request.deadline - now)
            request.timings.append(time)
            if group is not None:
                group.time = time
        else:
            time.queued = min(time.queued, queued)
            time.execution += execution / len(batch.tasks)
            time.batch = max(time.batch, len(batch.tasks))
            time.items += 1
            time.remaining = request.deadline - now

    def _finish_stage(self, now: float, request: Request, number: int, value: Payload) -> None:
        request.values[number] = value
        request.nbytes += value.nbytes
        self.bytes += value.nbytes
        request.left -= 1
        pipeline = request.pipeline
        if request.left == 0:
            self._answer(now, request)
            return
        if self.bytes > self.limits.max_bytes:
            self._end(
                now,
                request,
                Outcome.REJECTED,
                pipeline.stages[number].name,
                f"queue full: its answer of {value.nbytes} bytes does not fit into the shard's {self.limits.max_bytes}",
            )
            return
        for child in pipeline.stages[number].children:
            request.waiting[child] -= 1
            if request.waiting[child] == 0 and request.outcome is None:
                self._enqueue(now, request, child)

    def _answer(self, now: float, request: Request) -> None:
        pipeline = request.pipeline
        last = pipeline.stages[-1].name
        if now > request.deadline:
            self._expire(now, request, last)
            return
        fields: dict[str, Payload] = {}
        try:
            for name, source, field in pipeline.outputs:
                value = request.payload if source == FROM_REQUEST else request.values[source]
                assert value is not None
                fields[name] = value.field(field) if field else value
        except PayloadError as error:
            self._end(now, request, Outcome.FAILED, last, f"no output: {error}")
            return
        request.answer = fields[""] if "" in fields else as_dict(fields)
        self._end(now, request, Outcome.OK, "", "")

    def _expire(self, now: float, request: Request, stage: str) -> None:
        late = (now - request.deadline) * 1e3
        self._end(now, request, Outcome.EXPIRED, stage, f"the deadline passed {late:.1f} ms ago")

    # ---- batches ---------------------------------------------------------------------

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
        """A granted batch ended; ``results`` has an entry a task where ``code`` is ok. False for an unknown batch
        (a repeat, or one taken away from a lost agent): it changes nothing."""
        batch = self.batches.get(batch_number)
        if batch is None or batch.device.agent != agent:
            return False
        tasks = batch.tasks
        self._close_batch(batch)
        if code == "ok" and len(results) != len(tasks):
            code = "model_error"
            detail = f"{len(results)} answers for a batch of {len(tasks)}"
        if code == "ok":
            group = batch.device.group
            if group is not None:
                table = group.tables.get(batch.stage.key)
                if table is not None:
                    table.observe(now, len(tasks), execution)
            for index, task in enumerate(tasks):
                request = task.request
                if request.outcome is not None:
                    continue
                if index in failures:
                    self._end(now, request, Outcome.FAILED, _stage_name(task), failures[index])
                else:
                    self._finish_task(now, task, results[index], batch, execution)
        elif code == "model_error":
            self._bisect(now, batch, detail)
        else:
            self._retry(now, batch, detail or code, code == "worker_died")
        return True

    def grant_failed(self, now: float, batch_number: int) -> None:
        """A grant could not be sent: put its tasks back as if it had never been made."""
        batch = self.batches.get(batch_number)
        if batch is None:
            return
        self._close_batch(batch)
        for task in batch.tasks:
            if task.request.outcome is None:
                self._requeue(task)

    def _close_batch(self, batch: Batch) -> None:
        del self.batches[batch.number]
        batch.device.batches.pop(batch.number, None)

    def _requeue(self, task: Task) -> None:
        task.state = QUEUED
        task.stage.queue.push(task)
        self._touch(task.stage)

    def _retry(self, now: float, batch: Batch, why: str, alone: bool) -> None:
        """Another attempt for the batch's tasks; ``alone`` after a process died under them: each by itself, so
        that a poisonous input takes nobody along."""
        for task in batch.tasks:
            request = task.request
            if request.outcome is not None:
                continue
            task.attempts += 1
            if task.attempts >= MAX_ATTEMPTS:
                self._end(
                    now,
                    request,
                    Outcome.UNAVAILABLE,
                    _stage_name(task),
                    f"{task.attempts} attempts failed, the last: {why}",
                )
            elif now >= request.deadline:
                self._expire(now, request, _stage_name(task))
            elif alone:
                self._run_alone([task])
            else:
                self._requeue(task)

    def _bisect(self, now: float, batch: Batch, why: str) -> None:
        """A batch that raised is run again in halves, so that a poisonous input fails alone."""
        live = [task for task in batch.tasks if task.request.outcome is None]
        if len(batch.tasks) == 1:
            for task in live:
                self._end(now, task.request, Outcome.FAILED, _stage_name(task), why)
            return
        half = len(live) // 2
        for part in (live[:half], live[half:]):
            if part:
                self._run_alone(part)

    def _run_alone(self, tasks: list[Task]) -> None:
        stage = tasks[0].stage
        for task in tasks:
            task.state = QUEUED
        stage.alone.append(tasks)
        stage.alone_count += len(tasks)
        self._touch(stage)

    # ---- dispatch --------------------------------------------------------------------

    def dispatch(self, now: float) -> list[Batch]:
        """Everything that is due at ``now``; the batches to grant."""
        grants: list[Batch] = []
        if now >= self._next_refresh:
            self._refresh(now)
        if now >= self._next_sweep:
            self._sweep(now)
        for stage in self._timers:
            if stage.timer <= now:
                self._touch(stage)
        while self._dirty or self._free_groups:
            dirty = self._dirty
            self._dirty = []
            for stage in dirty:
                stage.dirty = False
                self._consider(now, stage, grants)
            groups = self._free_groups
            self._free_groups = {}
            for group in groups.values():
                while group.pending:
                    if group.lowest_free() is None:
                        break
                    stage = _first_to_close(group.pending)
                    self._leave_pending(stage)
                    self._consider(now, stage, grants)
                    if stage.pending:
                        break
        return grants

    def next_wake(self) -> float:
        """When ``dispatch`` has something to do again if nothing happens until then."""
        wake = self._next_sweep if self._next_sweep < self._next_refresh else self._next_refresh
        for stage in self._timers:
            if stage.timer < wake:
                wake = stage.timer
        return wake

    def _touch(self, stage: Stage) -> None:
        if not stage.dirty:
            stage.dirty = True
            self._dirty.append(stage)

    def _consider(self, now: float, stage: Stage, grants: list[Batch]) -> None:
        """Look at a stage anew: prune, open its window or set its timer, grant while it is open."""
        while True:
            self._prune(now, stage)
            if not stage.waiting():
                self._leave_pending(stage)
                self._set_timer(stage, NEVER)
                return
            if not stage.devices:
                self._leave_pending(stage)
                self._set_timer(stage, stage.queue.lowest().key if len(stage.queue) else stage.alone[0][0].key)
                return
            self._update_window(now, stage)
            if stage.opens > now:
                self._leave_pending(stage)
                self._set_timer(stage, stage.opens)
                return
            device = _lowest_free_of(stage)
            if device is None:
                if not stage.pending:
                    stage.pending = True
                    for group in stage.groups:
                        group.pending[stage.key] = stage
                self._set_timer(stage, self._hopeless_at(stage))
                return
            self._grant(now, stage, device, grants)

    def _prune(self, now: float, stage: Stage) -> None:
        """End what waits here and can no longer make it, not even alone."""
        queue: BudgetQueue = stage.queue
        table = stage.table
        least = table.upper(1) + stage.remaining if table is not None else 0.0
        while len(queue):
            task = queue.lowest()
            request = task.request
            if now >= task.key:
                if stage.devices:
                    self._expire(now, request, _stage_name(task))
                else:
                    self._end(
                        now,
                        request,
                        Outcome.UNAVAILABLE,
                        _stage_name(task),
                        f"no agent holds the model of stage {_stage_name(task)!r}",
                    )
            elif stage.devices and now + least > task.key and not (task.group is not None and task.group.admitted):
                self._drop(now, task, now + least - task.key)
            else:
                break
        alone: deque[list[Task]] = stage.alone
        if alone:
            for batch in list(alone):
                for task in list(batch):
                    if now >= task.key:
                        self._expire(now, task.request, _stage_name(task))
            while alone and not alone[0]:
                alone.popleft()

    def _drop(self, now: float, task: Task, short: float) -> None:
        task.request.short_by = short
        name = _stage_name(task)
        self._end(
            now,
            task.request,
            Outcome.DROPPED,
            name,
            f"predicted to miss its deadline by {short * 1e3:.1f} ms at stage {name!r}",
        )

    def _hopeless_at(self, stage: Stage) -> float:
        """When the most urgent waiting task can no longer make it."""
        wake = NEVER
        if len(stage.queue):
            task = stage.queue.lowest()
            wake = task.key
            table = stage.table
            if table is not None and not (task.group is not None and task.group.admitted):
                wake -= table.upper(1) + stage.remaining
        if stage.alone:
            for batch in stage.alone:
                for task in batch:
                    if task.key < wake:
                        wake = task.key
        return wake

    def _update_window(self, now: float, stage: Stage) -> None:
        table = stage.table
        queue = stage.queue
        waiting = len(queue)
        if stage.alone or table is None or not waiting:
            stage.opens = now
            stage.closes = now
            return
        earliest = queue.lowest().key
        size = waiting if waiting < stage.target else stage.target
        if waiting >= stage.target:
            stage.opens = now
        else:
            stage.opens = opens_at(table, size, earliest, stage.reserve, self.delay)
        stage.closes = closes_at(table, size, earliest, stage.remaining)

    def _grant(self, now: float, stage: Stage, device: Device, grants: list[Batch]) -> None:
        group = device.group
        assert group is not None
        table = group.tables[stage.key]
        start = now + self.delay
        if device.free_at > start:
            start = device.free_at
        if stage.alone:
            tasks = [task for task in stage.alone.popleft() if task.request.outcome is None]
            stage.alone_count -= len(tasks)
            if not tasks:
                return
            earliest = min([task.key for task in tasks])
            closes = earliest
        else:
            formed = form(stage.queue, table, start, stage.remaining, stage.target, stage.max_batch, stage.devices)
            for index, task in enumerate(formed.dropped):
                self._drop(now, task, formed.short[index])
            tasks = [task for task in formed.batch if task.request.outcome is None]
            if not tasks:
                return
            earliest = tasks[0].key
            for task in tasks:
                if task.key < earliest:
                    earliest = task.key
            closes = closes_at(table, len(tasks), earliest, stage.remaining)
            if closes < start:  # items of an admitted map stage run on, whatever is predicted
                closes = earliest
        number = self._batch_number
        self._batch_number = number + 1
        batch = Batch(number, device, stage, tasks, now, start, closes, table.mean(len(tasks)), earliest)
        for task in tasks:
            task.state = GRANTED
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
                            self._expire(now, request, _stage_name(task))
                        elif request.deadline < nearest:
                            nearest = request.deadline
                batch.next_deadline = nearest
            if batch.next_deadline < next_sweep:
                next_sweep = batch.next_deadline
        self._next_sweep = next_sweep if next_sweep > now + SWEEP else now + SWEEP
        if next_sweep >= NEVER:
            self._next_sweep = NEVER

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
        for table in self.tables.values():
            table.expire(now)
        for pipeline in [*self.pipelines.values(), *self.retiring]:
            replan(pipeline)
        for stage in self.stages.values():
            if stage.waiting():
                self._touch(stage)


def _model_key(model: HeldModel) -> str:
    return model.key


def _stage_name(task: Task) -> str:
    return task.request.pipeline.stages[task.number].name


def _lowest_free_of(stage: Stage) -> Device | None:
    best: Device | None = None
    for group in stage.groups:
        device = group.lowest_free()
        if device is not None and (best is None or device.index < best.index):
            best = device
    return best


def _first_to_close(pending: dict[str, Stage]) -> Stage:
    first: Stage | None = None
    for stage in pending.values():
        if first is None or stage.closes < first.closes:
            first = stage
    assert first is not None
    return first


NO_PIPELINE: Final = Pipeline("", 0.0, [], [])
"""What requests for unknown pipelines belong to."""
