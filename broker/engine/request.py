"""A request on its way through its pipeline, and the tasks it is made of."""

from typing import TYPE_CHECKING, Final

from broker.engine.spans import Estimate, Run, StageTime
from laxity.outcomes import Outcome
from laxity.payload import Payload

if TYPE_CHECKING:
    from broker.engine.plan import Pipeline
    from broker.engine.stage import Stage

QUEUED: Final = 0
GRANTED: Final = 1
ENDED: Final = 2


# Shared by the many requests that have one stage only, and never changed.
NO_VALUES: Final[list[Payload | None]] = []
NOTHING_WAITS: Final[list[int]] = []
NO_MORE: Final[list[Payload]] = []
NO_SPREAD: Final[list[tuple["Stage", int]]] = []


class Account:
    """What one owner has in flight, over all its instances."""

    def __init__(self) -> None:
        self.in_flight = 0


class Client:
    """One service instance and what it has in flight; (client, id) is the key of a request. ``account`` is its owner's,
    where several instances have the same one."""

    def __init__(self, name: str, account: Account | None = None) -> None:
        self.name = name
        self.account = account if account is not None else Account()
        self.requests: dict[int, Request] = {}


class MapGroup:
    """The items of one request at a map stage: admitted together, joined again in order."""

    def __init__(self, items: int) -> None:
        self.results: list[Payload | None] = [None] * items
        self.left = items
        self.admitted = False
        self.time: StageTime | None = None
        self.spread: list[tuple[Stage, int]] = NO_SPREAD
        """How many of them there are in each lane, where there are lanes."""


class Task:
    """One element of work for a stage: a request there, or one of its items (map stages)."""

    def __init__(
        self,
        request: "Request",
        stage: "Stage",
        number: int,
        item: int,
        group: MapGroup | None,
        input: Payload,
        queued_at: float,
        more: list[Payload] = NO_MORE,
    ) -> None:
        self.request = request
        self.stage = stage
        self.number = number
        """The stage's number in the request's pipeline."""
        self.item = item
        self.group = group
        self._input = input
        self._more = more
        self.due = stage.due(request)
        """By when this stage must have finished it, the work behind the stage not counted."""
        self.key = self.due if stage.by_deadline else queued_at
        """Where it stands in the queue."""
        self.queued_at = queued_at
        self.blocked = stage.blocked_for(queued_at)
        """For how long the stage had lacked a free device when it came."""
        self.taken_at = 0.0
        """When it left the queue for a batch."""
        self.attempts = 0
        self.grants = 0
        """How often it was given to a device."""
        self.run: Run | None = None
        """The batch that it was last in."""
        self.is_probe = False
        self.state = QUEUED
        self.previous: Task | None = None
        self.next: Task | None = request.newest
        """Its neighbours among the request's live tasks."""
        if self.next is not None:
            self.next.previous = self
        request.newest = self

    @property
    def inputs(self) -> list[Payload]:
        """What its model is given."""
        return [self._input, *self._more]

    def stage_name(self) -> str:
        """The stage's name in the request's pipeline."""
        return self.request.pipeline.stages[self.number].name

    def settled(self) -> bool:
        """Whether it is not dropped for a prediction any more: a probe, or an item of a request whose first item was
        already taken (a map stage is all or nothing)."""
        return self.is_probe or (self.group is not None and self.group.admitted)


class Request:
    """A request in flight. It ends exactly once: ``outcome`` is None until then.

    ``arrival`` and ``deadline`` are in seconds on the shard's monotonic clock. After the end, ``answer`` is
    the payload of an ``ok`` one, ``end_stage`` and ``detail`` say where and why another ended, and
    ``short_by`` by how many seconds a dropped one was predicted to miss.
    """

    def __init__(
        self,
        client: Client,
        id: int,
        pipeline: "Pipeline",
        arrival: float,
        deadline: float,
        priority: int,
        payload: Payload,
        timed: bool,
    ) -> None:
        self.client = client
        self.id = id
        self.pipeline = pipeline
        self.arrival = arrival
        self.deadline = deadline
        self.priority = priority
        self.payload = payload
        self.nbytes = payload.nbytes
        self.values: list[Payload | None] = NO_VALUES
        """The stages' answers so far, by number."""
        self.waiting: list[int] = NOTHING_WAITS
        """How many of its inputs each stage still lacks, by number."""
        self.left = len(pipeline.stages)
        self.newest: Task | None = None
        """The first of its live tasks, which are linked: most requests have one at a time."""
        self.timed = timed
        """Whether its client wants to know how long the stages took."""
        self.sampled = False
        """Whether its trace is kept whatever becomes of it."""
        self.traceparent = ""
        """The client's W3C trace context."""
        self.timings: list[StageTime] | None = [] if timed else None
        """How its stages went: of all of them where it is timed or sampled; else of those before where it ended."""
        self.outcome: Outcome | None = None
        self.answer: Payload | None = None
        self.end_stage = ""
        self.detail = ""
        self.short_by = 0.0
        self.estimate: Estimate | None = None
        """Why it was dropped, if for a prediction."""
        self.cold = False
        """Whether it waited for a model to be loaded."""
        self.ended_at = 0.0

    @property
    def tasks(self) -> list[Task]:
        """Its live tasks, the oldest first."""
        tasks: list[Task] = []
        task = self.newest
        while task is not None:
            tasks.append(task)
            task = task.next
        tasks.reverse()
        return tasks

    def forget(self, task: Task) -> None:
        """Take a finished task out of the live ones."""
        task.state = ENDED
        previous = task.previous
        following = task.next
        if previous is None:
            self.newest = following
        else:
            previous.next = following
            task.previous = None
        if following is not None:
            following.previous = previous
            task.next = None
