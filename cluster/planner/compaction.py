"""Fewer devices and fewer nodes for the same work, so that the others can rest.

Now and then, when nothing else moves, it is tried on paper to do without a node (the last one that holds anything) or
without a device that has little to do. Where the rest would carry everything, and more than is kept for, the device is
vacated: like one that is drained, it is left as soon as others serve in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.planner.fleet import Slot
from cluster.planner.view import ClusterView, DeviceId

EVERY = 10.0
"""Seconds between two trials."""
LONGEST = 320.0
"""After a trial that succeeded the next ones wait twice as long, up to this: where load goes up and down, what was
vacated is soon taken again, and each time requests are lost. What was not vacated for four times as long as they wait
is no such place any more."""
SPARE = 1.1
"""So many times of what is kept for has to fit."""
IDLE = 0.6
"""A device that is busy for less than this part of its time may be done without."""

Trial = Callable[[frozenset[DeviceId]], Sequence[Slot] | None]
"""The devices as they would be without these ones; None if they do not suffice."""


class Compaction:
    """Remembers which devices are being vacated; ``vacating`` is what a plan has to heed."""

    def __init__(self) -> None:
        self.vacating: frozenset[DeviceId] = frozenset()
        self._next = 0.0
        self._pause = EVERY
        self._vacated_at = float("-inf")
        self._tried: set[DeviceId] = set()

    def begin(self, view: ClusterView) -> None:
        """What has been vacated, or is there no more, is done."""
        self.vacating = frozenset(device for device in self.vacating if device in view.placement)

    def give_up(self) -> None:
        """The devices are needed after all."""
        self.vacating = frozenset()

    def step(self, now: float, slots: Sequence[Slot], busy: Callable[[Slot], float], trial: Trial) -> None:
        """Nothing moves: try whether something can be vacated. ``busy``: the part of its time that a device works."""
        if now < self._next or self.vacating:
            return
        if now > self._vacated_at + 4.0 * self._pause:
            self._pause = EVERY
        self._next = now + EVERY
        if now < self._vacated_at + self._pause:
            return
        used = [slot for slot in slots if slot.units]
        candidate = self._node(slots, used)
        if not candidate:
            device = self._device(used, busy)
            candidate = frozenset() if device is None else frozenset([device])
        if not candidate:
            return
        after = trial(candidate)
        if after is None:
            return
        left = [slot for slot in after if slot.units]
        nodes = {slot.device[0] for slot in used}
        moved = {slot.device[0] for slot in left}
        fewer_nodes = moved < nodes
        fewer_devices = len(left) < len(used) and moved <= nodes
        if fewer_devices or fewer_nodes:
            self.vacating = candidate
            self._vacated_at = now
            self._pause = min(2.0 * self._pause, LONGEST)
            self._tried.clear()

    def _node(self, slots: Sequence[Slot], used: Sequence[Slot]) -> frozenset[DeviceId]:
        """The devices in use of the last node, if so many are free on other nodes that are in use."""
        nodes = list(dict.fromkeys(slot.device[0] for slot in used))
        if len(nodes) < 2:
            return frozenset()
        last = nodes[-1]
        free = sum(slot.empty() and slot.usable for slot in slots if slot.device[0] in nodes[:-1])
        devices = frozenset(slot.device for slot in used if slot.device[0] == last)
        return devices if free >= len(devices) else frozenset()

    def _device(self, used: Sequence[Slot], busy: Callable[[Slot], float]) -> DeviceId | None:
        """The least busy device that was not tried lately."""
        idle = {slot.device: work for slot in used if (work := busy(slot)) < IDLE}
        if not idle.keys() - self._tried:
            self._tried.clear()
        left = [device for device in idle if device not in self._tried]
        if not left:
            return None
        device = min(left, key=lambda device: idle[device])
        self._tried.add(device)
        return device
