"""A stage at a shard: its queue, its schedulable window, and what is known of its model."""

from collections import deque
from typing import TYPE_CHECKING, Final

from broker.engine.budget_queue import BudgetQueue
from broker.engine.predictor import LatencyTable
from broker.engine.request import Task

if TYPE_CHECKING:
    from broker.engine.devices import DeviceGroup

NEVER: Final = 1e18
SMOOTHING: Final = 0.5
"""Weight of the newest measurement in a stage's arrival rate."""
SMOOTHING_BATCH: Final = 0.1
"""Weight of the newest batch in a stage's mean batch size."""


class Stage:
    """One model's queue. ``remaining`` (sub_k) is the predicted work behind this stage and ``reserve`` what the
    window leaves for it, both in seconds; ``target`` is the target batch b*."""

    def __init__(self, key: str, variant: str, max_batch: int, max_queue: int) -> None:
        self.key = key
        self.variant = variant
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.pipeline = ""
        """The pipeline that it belongs to, and its version."""
        self.depth = 0
        """Its number there, in topological order."""
        self.queue = BudgetQueue()
        self.alone: deque[list[Task]] = deque()
        """Batches to be run as they are, ahead of the queue: the halves of one that raised."""
        self.alone_count = 0
        self.groups: list[DeviceGroup] = []
        self.devices = 0
        self.table: LatencyTable | None = None
        """The slowest device type's predictions: windows open early enough for any of them."""
        self.remaining = 0.0
        self.reserve = 0.0
        self.budget = 0.0
        """The stage's share of the SLO."""
        self.target = 1
        self.ceiling = 1
        """The target batch under full load: no batch is larger, however many wait."""
        self.trouble = ""
        """How a worker last died under one of its batches; for messages."""
        self.opens = NEVER
        self.closes = NEVER
        self.pending = False
        self.dirty = False
        self.timer = NEVER
        self.rate = 0.0
        """Mean arrival rate in elements per second."""
        self.probe_at = NEVER
        """From when on a request is run although it is predicted to miss; set by the first drop after a grant."""
        self.batch_size = 0.0
        """Moving mean of the sizes of its batches; 0 before the first."""
        self.arrivals = 0
        """Elements arrived since ``rate`` was last brought up to date."""

    def take_out(self, task: Task) -> None:
        """Take a waiting task away."""
        if self.queue.remove(task):
            return
        for batch in self.alone:
            if task in batch:
                batch.remove(task)
                self.alone_count -= 1
                return

    def put_alone(self, tasks: list[Task]) -> None:
        """Have these tasks run as one batch, without others and ahead of the queue."""
        self.alone.append(tasks)
        self.alone_count += len(tasks)

    def take_alone(self) -> list[Task]:
        """The next batch of :meth:`put_alone`; empty if all of it has ended meanwhile."""
        tasks = self.alone.popleft()
        self.alone_count -= len(tasks)
        return tasks

    def hopeless_at(self) -> float:
        """When the most urgent waiting task can no longer make it, not even alone."""
        wake = NEVER
        if len(self.queue):
            task = self.queue.lowest()
            wake = task.key
            if self.table is not None and self.devices and not task.settled():
                wake -= self.table.upper(1) + self.remaining
        for batch in self.alone:
            for task in batch:
                if task.key < wake:
                    wake = task.key
        return wake

    def granted(self, size: int) -> None:
        """A batch of this size was granted."""
        self.batch_size += SMOOTHING_BATCH * (size - self.batch_size) if self.batch_size else size

    def typical_batch(self) -> int:
        """The batch size that requests on their way here should expect."""
        return round(self.batch_size) if self.batch_size >= 1.0 else self.target

    def measure_rate(self, elapsed: float) -> None:
        """Take the arrivals counted over the last ``elapsed`` seconds into the rate."""
        measured = self.arrivals / elapsed
        self.rate = measured if self.rate == 0.0 else self.rate + SMOOTHING * (measured - self.rate)
        self.arrivals = 0

    def waiting(self) -> int:
        """Elements that wait here."""
        return len(self.queue) + self.alone_count
