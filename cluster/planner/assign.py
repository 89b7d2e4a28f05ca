"""Units of work to devices, with the least movement from where they are.

Devices that a unit holds stay unless the rest of them carries the load. What lacks is covered by whole devices, and
what remains of each unit shares devices where the loads can take turns. Nothing that serves is taken away before others
that serve can do its work.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

from cluster.planner.fleet import Slot, Unit, UnitId
from cluster.planner.ledger import Ledger, need
from cluster.planner.packing import leave

NEGLIGIBLE = 0.05
"""A deficit below this part of a device is left to the headroom."""
LEAST = 0.01
"""The part of a device that a unit is taken to need when nothing is known of its rate."""
FULL = 0.97
"""A device that is busy for this part of its time is not offered to residues."""
CANDIDATES = 16
"""How many open devices a residue is tried on."""

KEPT_BY_OTHERS = "its other devices carry the load"
LESS = "less load"
MORE = "more load"
CROWDED = "its load no longer fits beside the others'"
NEEDED_MORE = "others need it more"


class Assignment:
    """One attempt to cover the units' needs with the devices. ``slots`` are in order of preference; both they and the
    units are changed. ``headroom`` and ``hysteresis`` are the settings'; ``sparing``: a unit without any device rather
    shares one than take a free one. One that has devices of its own does not: beside those, a share is ill used by the
    shard, and it saves little there."""

    def __init__(
        self, units: Mapping[UnitId, Unit], slots: Sequence[Slot], headroom: float, hysteresis: float, sparing: bool
    ) -> None:
        self._units = units
        self._slots = slots
        self._usage = 1.0 - headroom
        self._hysteresis = hysteresis
        self._sparing = sparing
        self._free: dict[str, list[Slot]] = {}
        """By type, in reverse order: the last is the first to be taken."""
        self._warm: dict[tuple[str, str, str], list[Slot]] = {}
        self._open: dict[str, list[Slot]] = {}
        self._suits: dict[str, float] = {}
        self._donors: list[tuple[float, int, Unit, Slot]] | None = None
        self._ledger = Ledger(units, self._usage)

    def run(self) -> list[Unit]:
        """Assign; the units whose needs are not covered."""
        units = list(self._units.values())
        for unit in units:
            self._leave_shared(unit)
            self._release(unit)
            self._spread(unit)
        self._evict()
        self._collect_free()
        lacking = [unit for unit in units if unit.deficit > 0.0]
        self._weigh_types(lacking)
        for unit in lacking:
            self._whole(unit)
        self._open = self._open_slots()
        residues = [unit for unit in lacking if unit.deficit > 0.0]
        residues.sort(key=lambda unit: (-unit.deficit / unit.best, unit.id))
        short = [unit for unit in residues if not self._residue(unit)]
        for unit in units:
            self._let_go(unit)
        return short

    def fill(self) -> None:
        """Give the free devices of nodes that are not at rest to the units with the least capacity for what they want;
        where nothing is known of that, for the work of a request."""
        heap = [(self._relative(unit), number, unit) for number, unit in enumerate(self._units.values())]
        heapq.heapify(heap)
        while heap:
            _, number, unit = heap[0]
            slot = self._take_free(unit, resting=False)
            if slot is None:
                heapq.heappop(heap)
                continue
            self._hold(unit, slot, 0.0, "nobody needs it more")
            heapq.heapreplace(heap, (self._relative(unit), number, unit))

    def squeeze(self, short: Iterable[Unit]) -> list[Unit]:
        """Give units without any device a place beside others, whatever that does to them; those for whom there is
        none."""
        without = []
        for unit in short:
            if unit.holders:
                continue
            if unit.leaving:
                slot = unit.leaving.pop()
                slot.leaving.discard(unit.id)
                self._ledger.changed(slot)
                self._hold(unit, slot, 0.0, slot.why)
                continue
            there = [slot for slot in self._slots if slot.shard == unit.id.shard and slot.usable and unit.fits(slot)]
            fitting = [slot for slot in there if self.room(unit, slot)] or there
            if fitting:
                slot = min(fitting, key=lambda slot: (self._ledger.work(slot), slot.order))
                self._hold(unit, slot, 0.0, "there is no other")
            else:
                without.append(unit)
        return without

    # ---- capacities ------------------------------------------------------------------------

    def capacity(self, unit: Unit, slot: Slot) -> float:
        """Elements per second of a unit that are given to a whole device at most."""
        return unit.costs[slot.kind].rate * self._usage

    def part(self, unit: Unit, slot: Slot) -> float:
        """What a holder runs of a unit: all it can if it is the unit's own, otherwise what it has been given."""
        return self.capacity(unit, slot) if len(slot.units) == 1 else slot.units[unit.id]

    def busy(self, slot: Slot) -> float:
        """The part of its time that a device works, 1 where its models cannot take turns."""
        work = self._ledger.turns(slot).busy()
        return 1.0 if work is None else work

    def _relative(self, unit: Unit) -> float:
        capacity = sum(self.part(unit, slot) for slot in unit.holders)
        return capacity / unit.wanted if unit.wanted > 0.0 else capacity

    # ---- giving back -----------------------------------------------------------------------

    def _least(self, unit: Unit) -> float | None:
        """What its devices have to carry after one was given back; None: none is."""
        return None if unit.kept is None else max(unit.kept, unit.need) * (1.0 + self._hysteresis)

    def _leave_shared(self, unit: Unit) -> None:
        """Leave shared devices where the unit's own, and of these those that serve, carry everything."""
        least = self._least(unit)
        shared = [slot for slot in unit.holders if len(slot.units) > 1]
        if least is None or not shared:
            return
        own = [slot for slot in unit.holders if len(slot.units) == 1 and unit.id in slot.ready]
        if own and sum(self.capacity(unit, slot) for slot in own) >= least:
            for slot in shared:
                self._drop(unit, slot, KEPT_BY_OTHERS)

    def _release(self, unit: Unit) -> None:
        """Give back the devices above what is kept: those that are not ready first, then the last in order."""
        least = self._least(unit)
        own = [slot for slot in unit.holders if len(slot.units) == 1]
        if least is None or len(unit.holders) < 2 or not own:
            return
        planned = sum(self.capacity(unit, slot) for slot in own)
        ready = sum(self.capacity(unit, slot) for slot in own if unit.id in slot.ready)
        left = len(unit.holders)
        serving = sum(unit.id in slot.ready for slot in unit.holders)
        for slot in sorted(own, key=lambda slot: (unit.id in slot.ready, -slot.order)):
            capacity = self.capacity(unit, slot)
            serves = unit.id in slot.ready
            if left == 1 or planned - capacity < least or (serves and (ready - capacity < least or serving == 1)):
                continue
            self._drop(unit, slot, LESS)
            planned -= capacity
            ready -= capacity if serves else 0.0
            left -= 1
            serving -= serves

    def _drop(self, unit: Unit, slot: Slot, why: str) -> None:
        unit.holders.remove(slot)
        del slot.units[unit.id]
        slot.why = why
        self._ledger.changed(slot)

    def _evict(self) -> None:
        """From devices whose models can no longer take turns, or would be loaded again and again, those with the
        largest loads leave as soon as they are replaced."""
        crowded = [slot for slot in reversed(self._slots) if len(slot.units) > 1]
        while crowded:
            slot = crowded.pop()
            if len(slot.units) < 2:
                continue
            fits = slot.memory <= 0.0 or self._ledger.sharing(slot).fits()
            if fits and self._ledger.turns(slot).busy() is not None:
                continue
            order = sorted(slot.units, key=lambda at: (slot.units[at] / self._units[at].best, at), reverse=True)
            # What one with other devices did here falls to those, which may change what is here.
            spread = (number for number, at in enumerate(order, 1) if len(self._units[at].holders) > 1)
            most = min(next(spread, len(order)), len(order) - 1)
            count = leave([self._ledger.load(at, slot) for at in order], most) if fits else most
            for at in order[:count]:
                unit = self._units[at]
                self._drop(unit, slot, CROWDED)
                slot.leaving.add(at)
                unit.leaving.append(slot)
                self._spread(unit)
                crowded += [slot, *(other for other in unit.holders if len(other.units) > 1)]

    def _spread(self, unit: Unit) -> None:
        """Divide the need over the unit's devices: its own first, the rest evenly over the shared ones."""
        remaining = unit.need
        shared = []
        for slot in unit.holders:
            if len(slot.units) > 1:
                shared.append(slot)
                continue
            part = min(remaining, self.capacity(unit, slot))
            self._give(unit, slot, part)
            remaining -= part
        for number, slot in enumerate(shared):
            part = min(remaining / (len(shared) - number), self.capacity(unit, slot))
            self._give(unit, slot, part)
            remaining -= part
        if unit.holders:
            unit.deficit = remaining if remaining > NEGLIGIBLE * unit.best else 0.0
        else:
            unit.deficit = max(remaining, LEAST * unit.best)

    def _give(self, unit: Unit, slot: Slot, rate: float) -> None:
        if slot.units[unit.id] != rate:
            slot.units[unit.id] = rate
            self._ledger.changed(slot)

    def _let_go(self, unit: Unit) -> None:
        """Give up devices that are to be left once those that stay serve what is needed, or all there is."""
        if not unit.leaving:
            return
        ready = sum(self.part(unit, slot) for slot in unit.holders if unit.id in slot.ready)
        planned = sum(self.part(unit, slot) for slot in unit.holders)
        if any(unit.id in slot.ready for slot in unit.holders) and ready >= min(unit.need, planned) * (1 - NEGLIGIBLE):
            for slot in unit.leaving:
                slot.leaving.discard(unit.id)
                self._ledger.changed(slot)
            unit.leaving.clear()

    # ---- taking on -------------------------------------------------------------------------

    def _collect_free(self) -> None:
        for slot in reversed(self._slots):
            if slot.usable and slot.empty():
                self._free.setdefault(slot.kind, []).append(slot)
                for model in slot.warm:
                    self._warm.setdefault(model, []).append(slot)
        for slots in self._free.values():
            slots.sort(key=lambda slot: (not slot.resting, -slot.order))

    def _weigh_types(self, lacking: Sequence[Unit]) -> None:
        """How good each type is for those that lack devices, so that each gets the type it gains most from compared
        with the others."""
        for kind in self._free:
            gains = [unit.costs[kind].rate / unit.best for unit in lacking if unit.costs[kind].usable]
            self._suits[kind] = sum(gains) / len(gains) if gains else 1.0

    def _take_free(self, unit: Unit, resting: bool = True) -> Slot | None:
        """A free device for a unit: one that has its model loaded; or, of the type that suits it best, the first. Nodes
        at rest come last."""
        warm = self._take_warm(unit)
        if warm is not None:
            return warm
        best: Slot | None = None
        rank = (True, 0.0)
        for kind, slots in self._free.items():
            if not unit.costs[kind].usable:
                continue
            while slots and slots[-1].taken:
                slots.pop()
            found = next((slot for slot in reversed(slots) if not slot.taken and unit.fits(slot)), None)
            if found is None or (found.resting and not resting):
                continue
            suits = (found.resting, -unit.costs[kind].rate / unit.best / self._suits[kind])
            if best is None or suits < rank or (suits == rank and found.order < best.order):
                best, rank = found, suits
        if best is not None:
            best.taken = True
        return best

    def _take_warm(self, unit: Unit) -> Slot | None:
        """A free device that has the unit's model loaded: given back a moment ago, or its shard is gone."""
        warm = self._warm.get(unit.model, [])
        while warm:
            slot = warm.pop()
            if not slot.taken and not slot.resting and unit.fits(slot):
                slot.taken = True
                return slot
        return None

    def _take(self, unit: Unit) -> Slot | None:
        """A device for a unit: a free one, or one that another unit has above its need."""
        slot = self._take_free(unit)
        return slot if slot is not None else self._take_over(unit)

    def _take_over(self, unit: Unit) -> Slot | None:
        """A device of the unit that has most above its need, if what is left to it serves its need."""
        if self._donors is None:
            self._donors = []
            for other in self._units.values():
                self._offer(other)
        put_back = []
        found: Slot | None = None
        while self._donors and found is None:
            entry = heapq.heappop(self._donors)
            _, _, donor, slot = entry
            if len(slot.units) != 1 or donor.id not in slot.units:
                self._offer(donor)  # somebody has joined it there
                continue
            if donor is unit or not unit.fits(slot):
                put_back.append(entry)
                continue
            self._drop(donor, slot, NEEDED_MORE)
            self._spread(donor)
            found = slot
            self._offer(donor)
        for entry in put_back:
            heapq.heappush(self._donors, entry)
        return found

    def _offer(self, unit: Unit) -> None:
        """Offer the unit's last device that it can do without."""
        assert self._donors is not None
        if len(unit.holders) < 2 or unit.deficit > 0.0:
            return
        planned = sum(self.part(unit, slot) for slot in unit.holders)
        serving = [slot for slot in unit.holders if unit.id in slot.ready]
        ready = sum(self.part(unit, slot) for slot in serving)
        for slot in sorted(unit.holders, key=lambda slot: (unit.id in slot.ready, -slot.order)):
            if len(slot.units) > 1 or not slot.usable or slot.held or slot.leaving or slot.taken:
                continue
            capacity = self.capacity(unit, slot)
            serves = unit.id in slot.ready
            enough = planned - capacity >= unit.need
            if enough and (not serves or (ready - capacity >= unit.need and len(serving) > 1)):
                surplus = (planned - capacity) / unit.need if unit.need > 0.0 else planned * 1e9
                heapq.heappush(self._donors, (-surplus, slot.order, unit, slot))
                return

    def _whole(self, unit: Unit) -> None:
        """Cover a deficit with whole devices, down to a residue."""
        while unit.deficit >= unit.best * self._usage * FULL:
            slot = self._take(unit)
            if slot is None:
                return
            self._hold(unit, slot, min(unit.deficit, self.capacity(unit, slot)), MORE)

    def _hold(self, unit: Unit, slot: Slot, rate: float, why: str) -> None:
        slot.shard = unit.id.shard
        slot.taken = True
        slot.units[unit.id] = rate
        slot.why = why
        self._ledger.joined(unit, slot)
        unit.holders.append(slot)
        unit.deficit -= rate
        if unit.deficit <= NEGLIGIBLE * unit.best:
            unit.deficit = 0.0

    def _residue(self, unit: Unit) -> bool:
        """Cover what remains beside others' residues, or with devices of its own; whether that was possible."""
        shares = self._sparing and not unit.holders
        own = self._take_warm(unit) if shares else self._take_free(unit, resting=False)
        if own is not None:
            self._hold(unit, own, min(unit.deficit, self.capacity(unit, own)), MORE)
            if unit.deficit <= 0.0:
                return True
        best: Slot | None = None
        rank = (False, -1.0)
        for slot in self._open.get(unit.id.shard, [])[:CANDIDATES]:
            if unit.id in slot.units or unit.id in slot.leaving or not self.room(unit, slot):
                continue
            busy = self._ledger.turns(slot).busy_with((unit.costs[slot.kind], unit.deficit / self._usage))
            if busy is not None and (unit.model in slot.warm, busy) > rank:
                best, rank = slot, (unit.model in slot.warm, busy)
        if best is not None:
            self._hold(unit, best, unit.deficit, MORE)
            if rank[1] >= FULL:
                self._open[unit.id.shard].remove(best)
            return True
        while unit.deficit > 0.0:
            taken = self._take(unit)
            if taken is None:
                return False
            rate = min(unit.deficit, self.capacity(unit, taken))
            self._hold(unit, taken, rate, MORE)
            if rate < FULL * self.capacity(unit, taken):
                self._open.setdefault(unit.id.shard, []).append(taken)
        return True

    def _open_slots(self) -> dict[str, list[Slot]]:
        """By shard, the devices that have time left, the busiest first."""
        found: dict[str, list[tuple[float, int, Slot]]] = {}
        for slot in self._slots:
            if slot.usable and slot.units:
                busy = self._ledger.turns(slot).busy()
                if busy is not None and busy < FULL:
                    found.setdefault(slot.shard, []).append((-busy, slot.order, slot))
        return {shard: [slot for _, _, slot in sorted(slots)] for shard, slots in found.items()}

    def room(self, unit: Unit, slot: Slot) -> bool:
        """Whether a device can hold the unit's models beside what it holds, the seldom used ones being paged in."""
        if not slot.usable or not unit.fits(slot):
            return False
        return slot.memory <= 0.0 or self._ledger.sharing(slot).fits_with(need(unit, slot, unit.deficit))
