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


class Stage:
    """One model's queue. ``remaining`` (sub_k) is the predicted work behind this stage and ``reserve`` what the
    window leaves for it, both in seconds; ``target`` is the target batch b*."""

    def __init__(self, key: str, variant: str, max_batch: int, max_queue: int) -> None:
        self.key = key
        self.variant = variant
        self.max_batch = max_batch
        self.max_queue = max_queue
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
        self.opens = NEVER
        self.closes = NEVER
        self.pending = False
        self.dirty = False
        self.timer = NEVER
        self.rate = 0.0
        """Mean arrival rate in elements per second."""
        self.arrivals = 0
        """Elements arrived since ``rate`` was last brought up to date."""

    def measure_rate(self, elapsed: float) -> None:
        """Take the arrivals counted over the last ``elapsed`` seconds into the rate."""
        measured = self.arrivals / elapsed
        self.rate = measured if self.rate == 0.0 else self.rate + SMOOTHING * (measured - self.rate)
        self.arrivals = 0

    def waiting(self) -> int:
        """Elements that wait here."""
        return len(self.queue) + self.alone_count
