"""Units of work to devices, with the least movement from where they are.

Devices that a unit holds stay unless the rest of them carries the load; what lacks is covered by whole devices, and
what remains of each unit shares devices where the loads can take turns. Nothing that still serves is taken away before
others that serve can do its work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.planner.fleet import Slot, Unit, UnitId
from cluster.planner.packing import Load, occupancy

NEGLIGIBLE = 0.01
"""A deficit below this part of a device is left to the headroom."""
FULL = 0.97
"""A device that is busy for this part of its time is not offered to residues."""
CANDIDATES = 16
"""How many open devices a residue is tried on."""


class Assignment:
    """One attempt to cover the units' needs with the devices. ``slots`` are in order of preference; both they and the
    units are changed. ``scarce``: needs have been cut to what there is, so that devices above them go at once."""

    def __init__(
        self, units: Mapping[UnitId, Unit], slots: Sequence[Slot], headroom: float, hysteresis: float, scarce: bool
    ) -> None:
        self._units = units
        self._slots = slots
        self._usage = 1.0 - headroom
        self._hysteresis = hysteresis
        self._scarce = scarce
        self._free: list[Slot] = []
        self._open: dict[str, list[Slot]] = {}

    def run(self) -> list[Unit]:
        """Assign; the units whose needs are not covered."""
        for unit in self._units.values():
            self._settle_shared(unit)
        for unit in self._units.values():
            self._release(unit)
        self._evict()
        self._free = [slot for slot in self._slots if slot.usable and slot.empty()]
        for unit in self._units.values():
            self._spread(unit)
        lacking = [unit for unit in self._units.values() if unit.deficit > 0.0]
        for unit in lacking:
            self._whole(unit)
        self._open = self._open_slots()
        residues = [unit for unit in lacking if unit.deficit > 0.0]
        residues.sort(key=lambda unit: (-unit.deficit / self._best(unit), unit.id))
        short = [unit for unit in residues if not self._residue(unit)]
        for unit in self._units.values():
            self._let_go(unit)
        return short

    # ---- capacities ------------------------------------------------------------------------

    def capacity(self, unit: Unit, slot: Slot) -> float:
        """Elements per second that a whole device is given of a unit at most."""
        return unit.costs[slot.kind].rate * self._usage

    def _best(self, unit: Unit) -> float:
        return max(cost.rate for cost in unit.costs.values()) * self._usage

    def _dedicated(self, unit: Unit) -> list[Slot]:
        return [slot for slot in unit.holders if len(slot.units) == 1]

    def _loads(self, slot: Slot) -> list[Load]:
        return [(self._units[at].costs[slot.kind], rate / self._usage) for at, rate in slot.units.items()]

    # ---- giving back -----------------------------------------------------------------------

    def _settle_shared(self, unit: Unit) -> None:
        """Leave shared devices where the unit's own carry everything."""
        shared = [slot for slot in unit.holders if len(slot.units) > 1]
        own = self._dedicated(unit)
        if shared and own and self._enough(unit, own):
            for slot in shared:
                self._drop(unit, slot, "its other devices carry the load")

    def _release(self, unit: Unit) -> None:
        """Give back the devices above what is kept: those that are not ready first, then the last in order."""
        own = self._dedicated(unit)
        for slot in sorted(own, key=lambda slot: (unit.id in slot.ready, -slot.order)):
            rest = [other for other in unit.holders if other is not slot]
            if rest and self._enough(unit, rest, serving=unit.id in slot.ready):
                self._drop(unit, slot, "less load")

    def _enough(self, unit: Unit, slots: Sequence[Slot], serving: bool = True) -> bool:
        """Whether these devices carry what is kept, and, where one that serves is to go, those of them that serve."""
        kept = unit.need if self._scarce else unit.kept
        if kept is None:
            return False
        least = max(kept, unit.need) * (1.0 + self._hysteresis)
        planned = sum(self._part(unit, slot) for slot in slots)
        if planned < least:
            return False
        return not serving or sum(self._part(unit, slot) for slot in slots if unit.id in slot.ready) >= least

    def _part(self, unit: Unit, slot: Slot) -> float:
        """What a holder can run of a unit: all it can if it is the unit's own, otherwise what it has been given."""
        return self.capacity(unit, slot) if len(slot.units) == 1 else slot.units[unit.id]

    def _drop(self, unit: Unit, slot: Slot, why: str) -> None:
        unit.holders.remove(slot)
        del slot.units[unit.id]
        slot.why = why

    def _evict(self) -> None:
        """From devices whose models can no longer take turns, the one with the largest load leaves as soon as it is
        replaced."""
        for unit in self._units.values():
            self._spread(unit)
        for slot in self._slots:
            while len(slot.units) > 1 and occupancy(self._loads(slot)) is None:
                if self._scarce:
                    break
                largest = max(slot.units, key=lambda at: (slot.units[at] / self._best(self._units[at]), at))
                unit = self._units[largest]
                self._drop(unit, slot, "its load no longer fits beside the others'")
                slot.leaving.add(largest)
                unit.leaving.append(slot)

    def _spread(self, unit: Unit) -> None:
        """Divide the need over the unit's devices: its own first, the rest evenly over the shared ones."""
        remaining = unit.need
        shared = []
        for slot in unit.holders:
            if len(slot.units) > 1:
                shared.append(slot)
                continue
            slot.units[unit.id] = min(remaining, self.capacity(unit, slot))
            remaining -= slot.units[unit.id]
        for number, slot in enumerate(shared):
            part = min(remaining / (len(shared) - number), self.capacity(unit, slot))
            slot.units[unit.id] = part
            remaining -= part
        least = NEGLIGIBLE * self._best(unit)
        if not unit.holders:
            unit.deficit = max(remaining, least * 1e-3)
        else:
            unit.deficit = remaining if remaining > least else 0.0

    # ---- taking on -------------------------------------------------------------------------

    def _whole(self, unit: Unit) -> None:
        """Cover a deficit with whole devices, down to a residue."""
        while unit.deficit > 0.0:
            slot = self._take(unit)
            if slot is None:
                return
            capacity = self.capacity(unit, slot)
            if unit.deficit < capacity * FULL:
                return
            self._free.remove(slot)
            self._hold(unit, slot, min(unit.deficit, capacity))

    def _take(self, unit: Unit) -> Slot | None:
        """The free device that suits the unit best: of the type on which it gains most over others, the first."""
        best: Slot | None = None
        suits = 0.0
        seen: set[str] = set()
        for slot in self._free:
            if slot.kind in seen or not unit.fits(slot):
                continue
            seen.add(slot.kind)
            gain = unit.costs[slot.kind].rate / self._best(unit)
            if best is None or gain > suits * 1.001:
                best, suits = slot, gain
        return best

    def _hold(self, unit: Unit, slot: Slot, rate: float) -> None:
        slot.shard = unit.id.shard
        slot.units[unit.id] = rate
        unit.holders.append(slot)
        unit.deficit -= rate
        if unit.deficit <= NEGLIGIBLE * self.capacity(unit, slot):
            unit.deficit = 0.0

    def _residue(self, unit: Unit) -> bool:
        """Cover what remains beside others' residues, or with a device of its own; whether that was possible."""
        best: Slot | None = None
        fullest = -1.0
        for slot in self._open.get(unit.id.shard, [])[:CANDIDATES]:
            if unit.id in slot.units or unit.id in slot.leaving or not self.room(unit, slot):
                continue
            load = (unit.costs[slot.kind], unit.deficit / self._usage)
            busy = occupancy([*self._loads(slot), load])
            if busy is not None and busy > fullest:
                best, fullest = slot, busy
        if best is None:
            best = self._take(unit)
            if best is None:
                return False
            self._free.remove(best)
            self._open.setdefault(unit.id.shard, []).append(best)
        self._hold(unit, best, min(unit.deficit, self.capacity(unit, best)))
        unit.deficit = 0.0
        best.why = "more load" if unit.holders[:-1] else "it is to be served"
        if fullest >= FULL:
            self._open[unit.id.shard].remove(best)
        return True

    def _open_slots(self) -> dict[str, list[Slot]]:
        """By shard, the devices that have time left."""
        found: dict[str, list[tuple[float, int, Slot]]] = {}
        for slot in self._slots:
            if slot.usable and slot.units:
                busy = occupancy(self._loads(slot))
                if busy is not None and busy < FULL:
                    found.setdefault(slot.shard, []).append((-busy, slot.order, slot))
        return {shard: [slot for _, _, slot in sorted(slots)] for shard, slots in found.items()}

    def room(self, unit: Unit, slot: Slot) -> bool:
        """Whether a device can hold the unit's model beside what it holds."""
        if not slot.usable or not unit.fits(slot):
            return False
        if slot.memory <= 0.0:
            return True
        used = sum(slot.held.values())
        used += sum(self._units[at].costs[slot.kind].memory for at in {*slot.units, *slot.leaving})
        return used + unit.costs[slot.kind].memory <= slot.memory

    def _let_go(self, unit: Unit) -> None:
        """Give up devices that are to be left once those that stay serve what is needed."""
        if not unit.leaving:
            return
        stay = [slot for slot in unit.holders if unit.id in slot.ready]
        ready = sum(self._part(unit, slot) for slot in stay)
        planned = sum(self._part(unit, slot) for slot in unit.holders)
        if stay and ready >= min(unit.need, planned) * (1.0 - NEGLIGIBLE):
            for slot in unit.leaving:
                slot.leaving.discard(unit.id)
            unit.leaving.clear()
