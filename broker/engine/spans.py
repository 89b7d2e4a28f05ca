"""What is kept of a request's way through its stages, for its timings and its trace. None of it holds a payload."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.engine.request import Request, Task


class Run:
    """A batch that was granted, without its tasks. Moments are on the shard's clock: its window was open from ``opens``
    and was to close at ``closes``, it was granted at ``granted_at`` and began at ``started`` (-1.0 where it did not, or
    nobody said so). ``blocked`` is how long its stage had lacked a free device by then (B(t)), ``predicted`` the mean
    execution; ``input``, ``execution`` and ``output`` are what the agent measured."""

    def __init__(
        self,
        number: int,
        agent: str,
        device: int,
        size: int,
        opens: float,
        closes: float,
        granted_at: float,
        blocked: float,
        predicted: float,
    ) -> None:
        self.number = number
        self.agent = agent
        self.device = device
        self.size = size
        self.opens = opens
        self.closes = closes
        self.granted_at = granted_at
        self.blocked = blocked
        self.predicted = predicted
        self.started = -1.0
        self.execution = 0.0
        self.input = 0.0
        self.output = 0.0

    def ran(self, now: float, execution: float, input: float, output: float, response: float) -> None:
        """Its results came at ``now``; ``response`` is how long they were on the way. No other host's clock tells when
        it began: that is reckoned back from there."""
        self.execution = execution
        self.input = input
        self.output = output
        started = now - response - output - execution
        self.started = started if started > self.granted_at else self.granted_at


class Estimate:
    """Why a request was dropped: in a batch of ``size`` that would begin at ``start`` and take ``execution`` (the 99th
    percentile), with ``downstream`` behind it, it would miss ``due`` by ``short`` seconds. It was dropped at ``at``."""

    def __init__(self, start: float, due: float, execution: float, size: int, downstream: float) -> None:
        self.at = start
        self.start = start
        self.due = due
        self.execution = execution
        self.size = size
        self.downstream = downstream
        self.short = start + execution + downstream - due


class StageTime:
    """How one stage of a request went, or how far it got. ``items`` of its ``elements`` (1; a map stage's items) have
    ended, the last of them at ``ended_at`` (-1.0: none), with ``remaining`` seconds of the budget left.

    ``execution`` is that of all ``batches`` that had items of it, ``batch`` the size of the largest; ``run`` is the
    last one, ``forced`` how much of the waiting for it was for want of a free device, and ``grants`` how often it (the
    last item) was given to a device.
    """

    def __init__(self, stage: str, elements: int, queued_at: float) -> None:
        self.stage = stage
        self.elements = elements
        self.queued_at = queued_at
        self.ended_at = -1.0
        self.execution = 0.0
        self.batch = 0
        self.items = 0
        self.batches = 0
        self.forced = 0.0
        self.grants = 0
        self.remaining = 0.0
        self.run: Run | None = None

    @property
    def queued(self) -> float:
        """What the stage took beside ``execution``, from its (first item's) arrival to its (last item's) end."""
        queued = self.ended_at - self.queued_at - self.execution
        return queued if queued > 0.0 else 0.0

    def given(self, task: "Task") -> None:
        """Tell of the batch that the task was last in."""
        run = task.run
        self.grants = task.grants
        if run is not None:
            self.run = run
            self.forced = run.blocked - task.blocked


def note_end(now: float, task: "Task", execution: float) -> None:
    """A task was run. A map stage's time goes from its first item's arrival to its last item's end."""
    request = task.request
    time = _time_of(request, task)
    if task.run is not time.run:
        time.batches += 1
        time.execution += execution
        time.given(task)
        size = time.run.size if time.run is not None else 0
        if size > time.batch:
            time.batch = size
    time.ended_at = now
    time.items += 1
    time.remaining = request.deadline - now


def note_unfinished(request: "Request") -> None:
    """The request ends while these tasks of it have not: tell how far they got."""
    task = request.newest
    while task is not None:
        group = task.group
        if group is None or group.time is None:
            _time_of(request, task).given(task)
        task = task.next


def _time_of(request: "Request", task: "Task") -> StageTime:
    group = task.group
    if group is None:
        time = StageTime(task.stage_name(), 1, task.queued_at)
    elif group.time is not None:
        return group.time
    else:
        time = group.time = StageTime(task.stage_name(), len(group.results), task.queued_at)
    if request.timings is None:
        request.timings = [time]
    else:
        request.timings.append(time)
    return time
