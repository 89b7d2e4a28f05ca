"""The engine of a shard: every decision about requests, and nothing else.

``now`` is in seconds on any monotonic clock and never goes back. The shell calls ``submit``, ``pull``,
``done``, ... as things happen, then ``dispatch(now)`` once, which returns the batches to grant; ``take_ended()``
gives the requests that ended, each exactly once; ``next_wake()`` is when ``dispatch`` wants to be called again.

``take_pages()`` gives what devices are to load and unload, ``acted`` takes in how that went.

Invariants (tests/test_scheduler_state.py): submitted = ended + in flight; a device has at most three batches, of which
one executes, one waits to and one has its outputs copied (the shard knows only that it pulled); no batch is granted
with a window that has closed, nor to a device that does not have its model in its memory; no device is told to load
more than its memory takes.
"""

from typing import Final

from broker.engine.admission import refusal
from broker.engine.devices import Batch
from broker.engine.dispatcher import Dispatcher
from broker.engine.fleet import Fleet, HeldModel
from broker.engine.flow import Flow
from broker.engine.ledger import Ledger
from broker.engine.limits import Limits
from broker.engine.metrics import Metrics
from broker.engine.paging import Page, Paging
from broker.engine.plan import Pipeline
from broker.engine.policy import WORST_CASE
from broker.engine.report import Report
from broker.engine.request import QUEUED, Client, Request, Task
from broker.engine.stage import Stage
from broker.engine.tuning import Tuning
from broker.engine.upkeep import Upkeep
from laxity.outcomes import Outcome
from laxity.payload import Payload

MAX_ATTEMPTS: Final = 2
"""How often a task is given to a device, where the device is lost or too late, before it ends ``unavailable``, or
``dropped`` if it was too late each time."""


BISECTED: Final = ("model_error", "out_of_memory", "bad_input")
"""How a batch fails that is run again in halves: one input may be the cause, or there are too many."""
NOT_BEGUN: Final = ("unknown_model", "not_loaded", "busy", "cancelled")
"""What was never given to a worker has not been attempted."""
MISSING: Final = ("unknown_model", "not_loaded")


class Scheduler:
    """See the module's text.

    ``first_batch`` numbers the first batch, and the first LOAD or UNLOAD: an agent may still answer one of a shard that
    ran before this one, so shells choose it anew each time. ``overhead`` is a first guess of the seconds that a batch
    takes beside its execution. ``preemption`` says that the shell can stop a running batch (:meth:`take_preempted`).
    With ``spans`` it is kept of every request how its stages went, save of those that end ok and are not sampled. With
    ``metrics`` it is counted what happens (metrics.py).
    """

    def __init__(
        self,
        limits: Limits,
        first_batch: int = 0,
        overhead: float = 0.001,
        preemption: bool = False,
        spans: bool = False,
        metrics: bool = False,
    ) -> None:
        self.ledger = Ledger(limits, spans)
        self.pipelines: dict[str, Pipeline] = {}
        self.stages: dict[str, Stage] = {}
        """By model key, those of retiring pipelines included."""
        self.fleet = Fleet(self.stages)
        self.metrics = Metrics() if metrics else None
        self._paging = Paging(self.ledger, self.fleet, first_batch)
        self._dispatcher = Dispatcher(self.ledger, self.fleet, self._paging, first_batch, overhead, preemption)
        self._upkeep = Upkeep(self.ledger, self.fleet, self._dispatcher, self.metrics)
        self.batches = self._dispatcher.batches
        self._flow = Flow(self.ledger)
        self._retiring: list[Pipeline] = []
        self._tunings: dict[str, Tuning] = {}
        """By pipeline name; another version of a pipeline goes on with them."""
        self._reported_at = -1.0
        self._unknown = Pipeline("", 0.0, [], [])
        """What requests for unknown pipelines belong to."""
        if self.metrics is not None:
            self.metrics.attach(self._unknown)

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
        else:
            pipeline.rated = self._upkeep.periods
        if self.metrics is not None:
            self.metrics.attach(pipeline)
        self.pipelines[pipeline.name] = pipeline
        tuning = self._tunings.get(pipeline.name)
        if tuning is not None:
            tuning.apply(tuning.told_at, pipeline)
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

    def tune(self, now: float, name: str, tuning: Tuning) -> None:
        """Have the pipeline of this name go by ``tuning``, now or when it comes to be served."""
        self._tunings[name] = tuning
        pipeline = self.pipelines.get(name)
        if pipeline is not None:
            tuning.apply(now, pipeline)

    def take_report(self, now: float) -> Report:
        """What there is to tell since the last call."""
        period = now - self._reported_at if self._reported_at >= 0.0 else 0.0
        self._reported_at = now
        return Report(now, period, self.stages, self.serving(), self.metrics)

    def serving(self) -> list[Pipeline]:
        """All pipelines, those included that take no more requests and have some in flight."""
        return [*self.pipelines.values(), *self._retiring]

    def unready(self) -> list[str]:
        """The pipelines with a stage that no device holds, as of the last ``dispatch``."""
        return [
            name for name, pipeline in self.pipelines.items() if not all(plan.stage.devices for plan in pipeline.stages)
        ]

    def report(self, agent: str, number: int, type: str, models: list[HeldModel], memory_mb: float = 0.0) -> None:
        """A device of an agent, new or with another set of models than before; ``memory_mb`` is what they may take of
        its memory (0: there is room for all)."""
        device = self.fleet.devices.get((agent, number))
        if device is not None:
            self._dispatcher.uncollect(device)
        self.fleet.report(agent, number, type, models, memory_mb)

    def withdraw(self, agent: str, number: int) -> None:
        """A device of an agent works for another shard from now on: its pull is void, and what it was granted it has
        yet to answer."""
        device = self.fleet.devices.get((agent, number))
        if device is not None:
            self._dispatcher.uncollect(device)
            self._paging.forget_device(device)
            self.fleet.withdraw(agent, number)

    def pull(self, agent: str, number: int, free_at: float) -> bool:
        """A device would take a batch and can start it at ``free_at``; False for an unknown one."""
        return self.fleet.pull(agent, number, free_at)

    def agent_lost(self, now: float, agent: str, why: str) -> int:
        """An agent is gone: its batches are queued again while budget and attempts last. How many there were."""
        for device in self.fleet.remove(agent):
            self._dispatcher.uncollect(device)
            self._paging.forget_device(device)
        # Also those of devices that were withdrawn.
        lost = [batch for batch in self.batches.values() if batch.device.agent == agent]
        for batch in lost:
            self._close(batch)
            if batch.stage.metrics is not None:
                batch.stage.metrics.ended("agent_lost", 0.0, 0.0)
            self._retry(now, batch, why, False, True, Outcome.UNAVAILABLE)
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
        refused: str = "",
    ) -> Request | None:
        """Take in a request with ``budget`` seconds from ``arrival`` on (negative: the pipeline's SLO). One that is
        ``refused`` (why, for people) ends ``rejected``.

        None where (client, id) is in flight already: a repeat, which gets the first one's answer. A request
        that cannot be served ends at once, like any other, through ``take_ended``.
        """
        ledger = self.ledger
        pipeline = self.pipelines.get(pipeline_name)
        if pipeline is None:
            known = ", ".join(sorted(self.pipelines)) or "none"
            request = Request(client, id, self._unknown, arrival, arrival, priority, payload, False)
            if not ledger.enter(request):
                return None
            unknown = f"unknown pipeline {pipeline_name!r}; served here: {known}"
            ledger.end(now, request, Outcome.REJECTED, "", refused or unknown)
            return request
        if pipeline.asleep:
            self._upkeep.wake(now, pipeline)
        if budget < 0.0:
            budget = pipeline.slo
        request = Request(client, id, pipeline, arrival, arrival + budget, priority, payload, timed)
        if not ledger.enter(request):
            return None
        if refused:
            ledger.end(now, request, Outcome.REJECTED, "", refused)
            return request
        why = refusal(now, request, budget, ledger)
        if why is None:
            self._flow.begin(now, request)
        else:
            ledger.end(now, request, why.outcome, "", why.detail)
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
            for lane in stage.lanes:
                waiting.extend(lane.queue)
                waiting.extend(lane.behind)
                for alone in lane.alone:
                    waiting.extend(alone)
                for device in lane.collecting.values():
                    waiting.extend(device.collected)
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
        input: float = 0.0,
        output: float = 0.0,
    ) -> bool:
        """A granted batch ended; ``results`` has an entry a task where ``code`` is ok. ``input`` and ``output`` are the
        seconds before and after its ``execution``. False for a batch that is not this agent's (a repeat, or one taken
        away from it): it changes nothing."""
        batch = self.batches.get(batch_number)
        if batch is None or batch.device.agent != agent:
            return False
        tasks = batch.tasks
        device = batch.device
        self._close(batch)
        if code in NOT_BEGUN or code == "unavailable":
            self.fleet.refused(now, device)
            if device.out_until > now:
                self._dispatcher.uncollect(device)
        else:
            device.refusals = 0
            device.out_until = 0.0
        if code == "ok" and len(results) != len(tasks):
            code = "model_error"
            detail = f"{len(results)} answers for a batch of {len(tasks)}"
        metrics = batch.stage.metrics
        if metrics is not None:
            metrics.ended(code, execution, batch.expected)
        if code == "ok" or execution > 0.0:
            batch.run.ran(now, execution, input, output, self._dispatcher.response.base)
        if code == "ok":
            group = batch.device.group
            if group is not None and batch.stage.key in group.tables:
                table = group.tables[batch.stage.key]
                if tasks[0].is_probe:
                    table.forget(len(tasks))
                if table.observe(now, len(tasks), execution, output, input):
                    self.ledger.touch(batch.stage)
            self._note_overhead(now, batch, execution, input, output)
            batch.stage.tally.ran(execution)
            if batch.stage.policy.budget == WORST_CASE:
                for task in tasks:
                    batch.stage.waits.took(now - task.queued_at)
            for index, task in enumerate(tasks):
                if task.request.outcome is not None:
                    continue
                if index in failures:
                    self.ledger.end(now, task.request, Outcome.FAILED, task.stage_name(), failures[index])
                else:
                    self._flow.finish_task(now, task, results[index], execution)
        elif code in BISECTED:
            self._bisect(now, batch, detail or code)
        else:
            if code in MISSING:
                self._dispatcher.lose_model(batch.device, batch.stage.model)
            if code == "worker_died" or code == "unavailable":
                batch.stage.trouble = detail
            elif code == "too_late" and batch.device_was_free and not _paged(batch):
                # It took as long as its window was open, at least.
                self._dispatcher.travel.observe(now, len(batch.tasks), batch.closes - batch.granted_at)
            last = Outcome.DROPPED if code == "too_late" else Outcome.UNAVAILABLE
            self._retry(now, batch, detail or code, code == "worker_died", code not in NOT_BEGUN, last)
        return True

    def acted(self, now: float, agent: str, action: int, code: str, seconds: float, detail: str) -> bool:
        """A LOAD or UNLOAD of :meth:`take_pages` ended as ``code`` says; it took ``seconds``. False for one that is not
        this agent's: it changes nothing."""
        return self._paging.acted(now, agent, action, code, seconds, detail)

    def take_pages(self) -> list[Page]:
        """What devices are to be told to load and unload since the last call, in order: after the batches of the last
        ``dispatch``."""
        pages = self._paging.pages
        if pages:
            self._paging.pages = []
        return pages

    def grant_failed(self, batch_number: int) -> None:
        """A grant could not be sent: put its tasks back as if it had never been made."""
        batch = self.batches.get(batch_number)
        if batch is None:
            return
        self._close(batch)
        for task in batch.tasks:
            task.grants -= 1
            task.run = None
        self._requeue(batch, batch.tasks)

    def _close(self, batch: Batch) -> None:
        del self.batches[batch.number]
        batch.device.batches.pop(batch.number, None)

    def _requeue(self, batch: Batch, tasks: list[Task]) -> None:
        """Put those tasks of a batch that are live back to where they were taken from. (One of a map request may have
        ended the others.)"""
        tasks = [task for task in tasks if task.request.outcome is None]
        if not tasks:
            return
        if batch.alone:
            self._run_alone(tasks)
            return
        stage = batch.stage
        for task in tasks:
            task.state = QUEUED
            stage.push(task)
        self.ledger.touch(stage)

    def _run_alone(self, tasks: list[Task]) -> None:
        for task in tasks:
            task.state = QUEUED
        stage = tasks[0].stage
        stage.put_alone(tasks)
        self.ledger.touch(stage)

    def _retry(self, now: float, batch: Batch, why: str, alone: bool, attempted: bool, last: Outcome) -> None:
        """Another attempt for the batch's tasks; ``alone`` after a process died under them: each by itself, so
        that a poisonous input takes nobody along. ``attempted`` says whether this was an attempt; after the last one
        they end as ``last``."""
        again: list[Task] = []
        for task in batch.tasks:
            request = task.request
            if request.outcome is not None:
                continue
            if attempted:
                task.attempts += 1
            if task.attempts >= MAX_ATTEMPTS:
                detail = f"{task.attempts} attempts failed, the last: {why}"
                self.ledger.end(now, request, last, task.stage_name(), detail)
            elif now >= request.deadline:
                self.ledger.expire(now, request, task.number)
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
        ledger = self.ledger
        fleet = self.fleet
        upkeep = self._upkeep
        if ledger.drained:
            self._forget_drained(now)
        if fleet.left_out:
            fleet.let_in(now)
        if fleet.stale:
            fleet.regroup()
            upkeep.next_refresh = 0.0
            self._paging.look()
        if fleet.replans:
            fleet.replans = False
            upkeep.next_refresh = 0.0
        if now >= upkeep.next_refresh:
            upkeep.refresh(now, self.serving())
        if now >= self._paging.next_overdue:
            self._paging.give_up(now)
        self._paging.tell(now)
        if fleet.turned:
            self._touch_turned()
            self._paging.look()
        if now >= self._dispatcher.next_sweep:
            upkeep.sweep(now)
        if fleet.collected:
            for device in fleet.take_collected():
                self._dispatcher.give_collected(now, device)
        grants = self._dispatcher.dispatch(now)
        paging = self._paging
        while paging.due(now):
            paging.choose(now, self._dispatcher.travel.base + self._dispatcher.response.base)
            if fleet.turned:
                self._touch_turned()
            if ledger.touched:
                grants.extend(self._dispatcher.dispatch(now))
        return grants

    def _touch_turned(self) -> None:
        for stage in self.fleet.take_turned():
            self.ledger.touch(stage)

    def next_wake(self) -> float:
        """When ``dispatch`` has something to do again if nothing happens until then."""
        wake = self._dispatcher.next_wake()
        sweep = self._dispatcher.next_sweep
        if sweep < wake:
            wake = sweep
        wake = min(wake, self._paging.next_look, self._paging.next_overdue)
        if self.fleet.left_out:
            wake = min(wake, self.fleet.next_let_in())
        refresh = self._upkeep.next_refresh
        return wake if wake < refresh else refresh

    def take_preempted(self) -> list[Batch]:
        """The batches that are to be stopped since the last call; their tasks wait again already."""
        preempted = self._dispatcher.preempted
        if preempted:
            self._dispatcher.preempted = []
        return preempted

    def _note_overhead(self, now: float, batch: Batch, execution: float, input: float, output: float) -> None:
        """Learn from a batch what it took beside its own work: all of it where its device was free, the way of its
        results alone where it was not. What it waited for a LOAD is neither."""
        if _paged(batch):
            return
        dispatcher = self._dispatcher
        if batch.device_was_free:
            total = now - batch.granted_at - execution - input - output
            if total < dispatcher.response.base:
                # The way back is no longer than there and back. Else it would be believed for as long as it keeps
                # all but a few from being run, which find their devices free.
                dispatcher.response.observe(now, 0, total)
            rose = dispatcher.travel.observe(now, len(batch.tasks), total - dispatcher.response.base)
        else:
            rose = dispatcher.response.observe(now, 0, now - batch.start - execution - output)
        if rose:
            self.ledger.touch(batch.stage)
            self._upkeep.tell_rise()

    def _forget_drained(self, now: float) -> None:
        """Let go of the retired pipelines that have nothing in flight any more."""
        self.ledger.drained = False
        drained = [pipeline for pipeline in self._retiring if pipeline.in_flight == 0]
        self._retiring = [pipeline for pipeline in self._retiring if pipeline.in_flight > 0]
        for pipeline in drained:
            for stage in pipeline.lanes:
                if self.stages.get(stage.key) is stage:
                    del self.stages[stage.key]
                self._dispatcher.forget(now, stage)
            if self.metrics is not None:
                running = self.pipelines.get(pipeline.name)
                self.metrics.forget(pipeline.name, self._retiring if running is None else [running, *self._retiring])
        self.fleet.stale = True


def _paged(batch: Batch) -> bool:
    """Whether its device had a LOAD or an UNLOAD under way since it was granted."""
    memory = batch.device.memory
    return memory is not None and memory.paged_until > batch.granted_at
