"""The devices (GPUs) that agents offer, and which of them would take a batch now."""

from heapq import heappop, heappush
from typing import Final

from broker.engine.pending import Pending
from broker.engine.predictor import LatencyTable
from broker.engine.request import Task
from broker.engine.residency import Residency
from broker.engine.spans import Run
from broker.engine.stage import Stage

PATIENCE: Final = 2
"""How many batches in a row a device may refuse before it is left out for a while."""
BACK_OFF: Final = 0.05
MOST_BACK_OFF: Final = 2.0
"""For how many seconds it is left out then: BACK_OFF, doubled with each further one up to MOST_BACK_OFF."""


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
        run: Run,
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
        self.run = run
        """What is kept of it for those who ask how its requests went."""


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
        self.memory: Residency | None = None
        """What is where, if it cannot have all its models in its memory at once."""
        self.pulled = False
        self.has_pulled = False
        """Whether it ever has, so that the way to it is known."""
        self.free_at = 0.0
        self.batches: dict[int, Batch] = {}
        self.busy_until = 0.0
        """When what it has been granted should have ended."""
        self.collects_for: Stage | None = None
        """The stage that its next batch is collected for, where the policy collects."""
        self.collected: list[Task] = []
        self.refusals = 0
        """Batches in a row that it refused, or could not run for want of a server behind it."""
        self.out_until = 0.0
        """Until when it gets none therefore."""

    def refuse(self, now: float) -> None:
        """It refused a batch: with others to come it would, as fast as it asks for them, have all there are."""
        self.refusals += 1
        if self.refusals > PATIENCE:
            doubled = min(self.refusals - PATIENCE - 1, 20)
            self.out_until = now + min(BACK_OFF * 2.0**doubled, MOST_BACK_OFF)

    def shared(self) -> bool:
        """Whether several models may want it."""
        return self.group is not None and self.group.shared()


class DeviceGroup:
    """Devices of one type that hold the same models, so that any of them does as well as another."""

    def __init__(self, type: str, tables: dict[str, LatencyTable]) -> None:
        self.type = type
        self.tables = tables
        """The latency table of each model held (of a device that pages them: in its own memory), by model key."""
        self.members: dict[int, Device] = {}
        self.pending = Pending()
        """Stages with an open window that wait for one of these devices."""
        self.demand = 0.0
        """Device seconds a second that its stages' arrivals ask of it."""
        self.longest = 0.0
        """Execution of the longest target batch of its stages."""
        self._free: list[int] = []
        self._in_free: set[int] = set()
        self._coming: list[tuple[float, int]] = []
        """(free at, index); also of devices that have got a batch since."""
        self._busy: list[tuple[float, int]] = []

    def shared(self) -> bool:
        """Whether its devices hold several models."""
        return len(self.tables) > 1

    def add(self, device: Device) -> None:
        device.group = self
        self.members[device.index] = device

    def remove(self, device: Device) -> None:
        del self.members[device.index]
        device.group = None
        device.pulled = False

    def offer(self, device: Device) -> None:
        """The device has pulled."""
        device.pulled = True
        heappush(self._coming, (device.free_at, device.index))

    def best(self, now: float) -> Device | None:
        """Of the devices that have pulled the lowest-numbered that is free at ``now``, so that load consolidates and
        the rest can be released; else the one that is free first."""
        coming = self._coming
        while coming and coming[0][0] <= now:
            _, index = heappop(coming)
            if index not in self._in_free:
                self._in_free.add(index)
                heappush(self._free, index)
        free = self._free
        while free:
            device = self.members.get(free[0])
            if device is not None and device.pulled and device.free_at <= now:
                return device
            self._in_free.discard(heappop(free))
        while coming:
            free_at, index = coming[0]
            device = self.members.get(index)
            if device is not None and device.pulled and device.free_at == free_at:
                return device
            heappop(coming)
        return None

    def take(self, device: Device, busy_until: float) -> None:
        """The device gets a batch: its pull is used up."""
        device.pulled = False
        device.busy_until = busy_until

    # ---- batches collected while their device is busy (PARD) -------------------------------

    def busy(self, device: Device) -> None:
        """The device can have a batch collected for it."""
        heappush(self._busy, (device.busy_until, device.index))

    def first_to_end(self, stage: Stage) -> Device | None:
        """The device that ends first of those for which ``stage`` may still collect."""
        heap = self._busy
        passed: list[tuple[float, int]] = []
        found: Device | None = None
        while heap:
            until, index = heap[0]
            device = self.members.get(index)
            if device is None or device.pulled or device.busy_until != until or not device.batches:
                heappop(heap)
            elif device.collects_for is None or (device.collects_for is stage and len(device.collected) < stage.target):
                found = device
                break
            elif device.collects_for is stage:
                heappop(heap)  # full
            else:
                passed.append(heappop(heap))
        for entry in passed:
            heappush(heap, entry)
        return found
