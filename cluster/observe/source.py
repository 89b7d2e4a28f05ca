"""What a process answers to the one that speaks HTTP for it."""

from __future__ import annotations

from typing import Protocol

from cluster.observe.figures import Figures
from cluster.observe.trace import TraceRecord


class Source(Protocol):
    """Called in a thread of its own, never in the one that serves. What it reads there may change meanwhile: counters
    are read as they stand, without stopping anybody. RuntimeError or TimeoutError once the process is ending."""

    def figures(self) -> Figures:
        """Everything that is counted, now."""

    def trace(self, request: str) -> TraceRecord | None:
        """The trace of a request, where it was kept."""

    def traces(self, after: int, limit: int) -> tuple[int, list[TraceRecord]]:
        """The oldest of those that were kept after the ``after``-th, at most ``limit``; and the number of the last
        one. What is no longer there is skipped. A negative ``after`` counts from the end, so that (-n, n) gives the
        newest n. At most 1,000 are given at a time."""
