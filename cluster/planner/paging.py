"""Which models can share a device that has no room for all of them at once.

Those that do not fit lie in the host's memory and are paged in when they are asked for (broker/engine/paging.py): right
for the many models that are asked for seldom (Clockwork, OSDI'20, section 6.3), wrong for any that would have to be
loaded again and again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

PAGING: Final = 0.2
"""The part of its time that a device may spend loading models."""

Need = tuple[float, float]
"""What a model takes of a device: megabytes, and the seconds of loading per second if it were never to stay."""


def share(needs: Iterable[Need], room: float) -> bool:
    """Whether models can share ``room`` megabytes: all fit; or those that are cheapest to page are paged, one at a time
    beside those that stay, at an expense of :data:`PAGING` at most."""
    cheapest = sorted(needs, key=lambda need: need[1] / need[0] if need[0] > 0.0 else float("inf"))
    stays = sum(megabytes for megabytes, _ in cheapest)
    largest = loading = 0.0
    for megabytes, cost in cheapest:
        if stays + largest <= room:
            return True
        stays -= megabytes
        loading += cost
        largest = max(largest, megabytes)
        if loading > PAGING:
            return False
    return stays + largest <= room
