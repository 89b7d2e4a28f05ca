"""The devices (GPUs) that agents offer, and which of them would take a batch now."""

from heapq import heappop, heappush

from broker.engine.predictor import LatencyTable
from broker.engine.request import Task
from broker.engine.stage import Stage


class Batch:
    """A batch given to a device. ``closes`` is the latest start, ``expected`` the predicted execution,
    both in seconds; ``next_deadline`` the earliest deadline of its requests that have not ended."""

    def __init__(
        self,
        number: int,
        device: "Device",
        stage: Stage,
        tasks: list[Task],
        granted_at: float,
        device_was_free: bool,
        start: float,
        closes: float,
        expected: float,
        next_deadline: float,
        alone: bool,
    ) -> None:
        self.number = number
        self.device = device
        self.stage = stage
        self.tasks = tasks
        self.granted_at = granted_at
        self.device_was_free = device_was_free
        """Whether nothing else ran there when it was granted."""
        self.start = start
        self.closes = closes
        self.expected = expected
        self.next_deadline = next_deadline
        self.alone = alone
        """Whether its tasks are to be run without others, because a batch that they were in raised or died."""


class Device:
    """One GPU of an agent. ``index`` orders devices over the whole shard: load consolidates on low ones.

    ``pulled`` says that it has asked for a batch and got none yet; it can start one at ``free_at``.
    """

    def __init__(self, index: int, agent: str, number: int, type: str) -> None:
        self.index = index
        self.agent = agent
        self.number = number
        self.type = type
        self.group: DeviceGroup | None = None
        self.pulled = False
        self.free_at = 0.0
        self.batches: dict[int, Batch] = {}

    def shared(self) -> bool:
        """Whether several models may want it."""
        return self.group is not None and len(self.group.tables) > 1


class DeviceGroup:
    """Devices of one type that hold the same models, so that any of them does as well as another."""

    def __init__(self, type: str, tables: dict[str, LatencyTable]) -> None:
        self.type = type
        self.tables = tables
        """The latency table of each model held, by model key."""
        self.members: dict[int, Device] = {}
        self.pending: dict[str, Stage] = {}
        """Stages with an open window that wait for one of these devices, by model key."""
        self._free: list[int] = []

    def add(self, device: Device) -> None:
        device.group = self
        self.members[device.index] = device

    def remove(self, device: Device) -> None:
        del self.members[device.index]
        device.group = None
        device.pulled = False

    def offer(self, device: Device) -> None:
        """The device has pulled."""
        if not device.pulled:
            device.pulled = True
            heappush(self._free, device.index)

    def lowest_free(self) -> Device | None:
        """The lowest-numbered device that has pulled."""
        free = self._free
        while free:
            device = self.members.get(free[0])
            if device is not None and device.pulled:
                return device
            heappop(free)
        return None

    def take(self, device: Device) -> None:
        """The device gets a batch: its pull is used up."""
        device.pulled = False
        if self._free and self._free[0] == device.index:
            heappop(self._free)
