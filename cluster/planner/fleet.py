"""What the planner works on: devices with what is to lie on them, and units of work that need devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cluster.planner.costs import StageCost
from cluster.planner.view import DeviceId


class UnitId(NamedTuple):
    """One stage of a pipeline at one shard. ``version`` is '' for whatever version is served; a version to come has
    units of its own where its models do not fit beside those that are served."""

    pipeline: str
    stage: str
    shard: str
    version: str = ""


class Slot:
    """One device. ``usable``: it may take models on; otherwise it keeps what it has. ``resting``: its node is at rest
    and would have to be woken. ``units`` are those it works for, with the elements per second that it is to run of
    each."""

    __slots__ = (
        "device",
        "failed",
        "held",
        "kind",
        "leaving",
        "memory",
        "order",
        "ready",
        "resting",
        "shard",
        "taken",
        "units",
        "usable",
        "warm",
        "why",
    )

    def __init__(self, device: DeviceId, order: int, kind: str, memory: float, usable: bool, resting: bool) -> None:
        self.device = device
        self.order = order
        self.kind = kind
        self.memory = memory
        self.usable = usable
        self.resting = resting
        self.shard = ""
        self.units: dict[UnitId, float] = {}
        self.leaving: set[UnitId] = set()
        """Those that it works for until somebody else does."""
        self.held: dict[str, float] = {}
        """Models that have to stay for requests in flight, with their megabytes."""
        self.warm: set[tuple[str, str, str]] = set()
        """(pipeline, stage, version of the unit) whose model is loaded, whatever it is to hold."""
        self.ready: set[UnitId] = set()
        self.failed: set[tuple[str, str, str]] = set()
        """(pipeline, stage, version of the unit) whose model could not be loaded."""
        self.taken = False
        """It was taken for a unit in this plan."""
        self.why = ""

    def empty(self) -> bool:
        """Whether it holds nothing and is bound to no shard."""
        return not self.units and not self.held and not self.leaving


class Unit:
    """Work that needs devices: ``need`` elements per second now; devices that are there stay for ``kept`` (None: all of
    them). ``wanted`` is what would be needed if there were devices enough. ``costs`` and ``memory`` (megabytes, of all
    its models) are by device type."""

    __slots__ = ("best", "costs", "deficit", "holders", "id", "kept", "leaving", "memory", "need", "wanted")

    def __init__(
        self,
        id: UnitId,
        need: float,
        kept: float | None,
        costs: Mapping[str, StageCost],
        memory: Mapping[str, float],
    ) -> None:
        self.id = id
        self.need = need
        self.wanted = need
        self.kept = kept
        self.costs = costs
        self.memory = memory
        self.best = max((cost.rate for cost in costs.values() if cost.usable), default=1.0)
        """Elements per second on the fastest type."""
        self.holders: list[Slot] = []
        self.leaving: list[Slot] = []
        self.deficit = 0.0

    @property
    def model(self) -> tuple[str, str, str]:
        """(pipeline, stage, version): what it is wherever it runs."""
        return (self.id.pipeline, self.id.stage, self.id.version)

    def fits(self, slot: Slot) -> bool:
        """Whether the device, empty, could run it: by its type and memory, and because it did not fail there."""
        if not self.costs[slot.kind].usable or self.model in slot.failed:
            return False
        return slot.memory <= 0.0 or self.memory[slot.kind] <= slot.memory
