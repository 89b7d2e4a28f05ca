"""Which models can share a device that has no room for all of them at once.

Those that do not fit lie in the host's memory and are paged in when they are asked for (broker/engine/paging.py): right
for the many models that are asked for seldom (Clockwork, OSDI'20, section 6.3), wrong for any that would have to be
loaded again and again.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable
from itertools import accumulate
from typing import Final

PAGING: Final = 0.2
"""The part of its time that a device may spend loading models."""

Need = tuple[float, float]
"""What a model takes of a device: megabytes, and the seconds of loading per second if it were never to stay."""


class Sharing:
    """Models that share ``room`` megabytes of a device, to which others may come.

    They can if all fit; or if those that are cheapest to page are paged, one at a time beside those that stay, at an
    expense of :data:`PAGING` at most. The more are paged, the less they take together.
    """

    __slots__ = ("_largest", "_loading", "_megabytes", "_needs", "_room")

    def __init__(self, needs: Iterable[Need], room: float) -> None:
        self._room = room
        self._needs = sorted(_ranked(need) for need in needs)
        self._reckon()

    def fits(self) -> bool:
        """Whether they can."""
        return self._beside(0.0, bisect_right(self._loading, PAGING) - 1, 0.0)

    def fits_with(self, need: Need) -> bool:
        """Whether they can with another one."""
        megabytes, cost = need
        cheaper = bisect_right(self._needs, _ranked(need))
        if self._loading[cheaper] + cost > PAGING:  # it stays
            return self._beside(megabytes, min(cheaper, bisect_right(self._loading, PAGING) - 1), 0.0)
        return self._beside(0.0, bisect_right(self._loading, PAGING - cost) - 1, megabytes)

    def add(self, need: Need) -> None:
        """Another one comes."""
        insort(self._needs, _ranked(need))
        self._reckon()

    def _beside(self, stays: float, paged: int, page: float) -> bool:
        """Whether ``stays`` megabytes, and pages of up to ``page``, fit where so many of the cheapest are paged."""
        staying = self._megabytes[-1] - self._megabytes[paged] + stays
        return staying + max(self._largest[paged], page) <= self._room

    def _reckon(self) -> None:
        """Of the 0, 1, 2... cheapest: megabytes, what loading them costs, and the largest."""
        self._megabytes = [0.0, *accumulate(megabytes for _, megabytes, _ in self._needs)]
        self._loading = [0.0, *accumulate(cost for _, _, cost in self._needs)]
        self._largest = [0.0, *accumulate((megabytes for _, megabytes, _ in self._needs), max)]


def _ranked(need: Need) -> tuple[float, float, float]:
    megabytes, cost = need
    return cost / megabytes if megabytes > 0.0 else float("inf"), megabytes, cost
