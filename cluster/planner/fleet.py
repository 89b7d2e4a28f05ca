"""What the planner works on: devices with what is to lie on them, and units of work that need devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cluster.planner.costs import StageCost
from cluster.planner.view import DeviceId


class UnitId(NamedTuple):
    """One stage of a pipeline at one shard, whatever the pipeline's version."""

    pipeline: str
    stage: str
    shard: str


class Slot:
    """One device. ``usable``: it may take models on; otherwise it may only keep what it has until that is replaced.
    ``units`` are those that it works for, with the elements per second that it has to run for each."""

    __slots__ = (
        "failed",
        "held",
        "id",
        "kind",
        "leaving",
        "memory",
        "order",
        "ready",
        "shard",
        "units",
        "usable",
        "why",
    )

    def __init__(self, id: DeviceId, order: int, kind: str, memory: float, usable: bool) -> None:
        self.id = id
        self.order = order
        self.kind = kind
        self.memory = memory
        self.usable = usable
        self.shard = ""
        self.units: dict[UnitId, float] = {}
        self.leaving: set[UnitId] = set()
        """Those that it works for until somebody else does."""
        self.held: dict[str, float] = {}
        """Models that have to stay for requests in flight, with their memory."""
        self.ready: set[UnitId] = set()
        self.failed: set[UnitId] = set()
        self.why = ""

    def empty(self) -> bool:
        """Whether it holds nothing and is bound to no shard."""
        return not self.units and not self.held and not self.leaving


class Unit:
    """Work that needs devices: ``need`` elements per second now, ``kept`` (at least that) for which devices that are
    there stay; None: all of them stay. ``wanted`` is what would be needed if there were devices enough. ``costs`` are
    by device type."""

    __slots__ = ("costs", "deficit", "holders", "id", "kept", "leaving", "need", "wanted")

    def __init__(self, id: UnitId, need: float, kept: float | None, costs: Mapping[str, StageCost]) -> None:
        self.id = id
        self.need = need
        self.wanted = need
        self.kept = kept
        self.costs = costs
        self.holders: list[Slot] = []
        self.leaving: list[Slot] = []
        self.deficit = 0.0

    def fits(self, slot: Slot) -> bool:
        """Whether the slot's type can run it, it did not fail there, and the slot's memory holds it as well."""
        cost = self.costs[slot.kind]
        if not cost.usable or self.id in slot.failed:
            return False
        return slot.memory <= 0.0 or cost.memory <= 0.0 or cost.memory <= slot.memory
