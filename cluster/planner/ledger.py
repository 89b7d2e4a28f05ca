"""What was reckoned of the devices in a plan, kept until they change: there may be hundreds of models on each."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.planner.fleet import Slot, Unit, UnitId
from cluster.planner.packing import Load, Turns
from cluster.planner.paging import Need, Sharing


class Ledger:
    """Of each device how its units take turns, what room their models need and what work they have. Whoever changes a
    device's units or those that are to leave it has to say so. ``usage``: the part of a device that is planned for."""

    def __init__(self, units: Mapping[UnitId, Unit], usage: float) -> None:
        self._units = units
        self._usage = usage
        self._turns: dict[Slot, Turns] = {}
        self._sharing: dict[Slot, Sharing] = {}
        self._works: dict[Slot, float] = {}

    def load(self, at: UnitId, slot: Slot) -> Load:
        """What a unit runs on a device."""
        return self._units[at].costs[slot.kind], slot.units[at] / self._usage

    def turns(self, slot: Slot) -> Turns:
        """The loads on a device."""
        turns = self._turns.get(slot)
        if turns is None:
            turns = self._turns[slot] = Turns([self.load(at, slot) for at in slot.units])
        return turns

    def sharing(self, slot: Slot) -> Sharing:
        """The models on a device whose memory is known, those that are to leave it as well."""
        sharing = self._sharing.get(slot)
        if sharing is None:
            needs = [(megabytes, float("inf")) for megabytes in slot.held.values()]
            needs += [(self._units[at].memory[slot.kind], float("inf")) for at in slot.leaving if at not in slot.units]
            needs += [need(self._units[at], slot, rate) for at, rate in slot.units.items()]
            sharing = self._sharing[slot] = Sharing(needs, slot.memory)
        return sharing

    def work(self, slot: Slot) -> float:
        """How many devices all that is wanted of its units would take."""
        work = self._works.get(slot)
        if work is None:
            work = self._works[slot] = sum(self._units[at].wanted / self._units[at].best for at in slot.units)
        return work

    def changed(self, slot: Slot) -> None:
        """Its units have changed, or those that are to leave it."""
        for known in (self._turns, self._sharing, self._works):
            known.pop(slot, None)

    def joined(self, unit: Unit, slot: Slot) -> None:
        """A unit that was not there has joined the others."""
        if slot in self._turns:
            self._turns[slot].add(self.load(unit.id, slot))
        if slot in self._sharing:
            self._sharing[slot].add(need(unit, slot, slot.units[unit.id]))
        if slot in self._works:
            self._works[slot] += unit.wanted / unit.best


def need(unit: Unit, slot: Slot, rate: float) -> Need:
    """What ``rate`` elements per second of a unit need of a device: at worst, each finds its model paged out."""
    return unit.memory[slot.kind], rate * unit.costs[slot.kind].page
