"""How often the same thing is said in a log."""

from __future__ import annotations


def worth_a_line(count: int) -> bool:
    """Whether the ``count``-th of the same is logged: the 1st, 2nd, 4th, 8th ..., so that a peer that does nothing
    else does not fill the disk."""
    return count & (count - 1) == 0
