"""What a shard tells the leader once a second: per stage, what came, what was run, and how long it waited."""

from __future__ import annotations

import msgspec


class StageReport(msgspec.Struct, array_like=True, frozen=True):
    """One stage (``model``: its key) at one shard over one period. ``arrived``, ``started`` and ``waiting`` are
    elements, ``dropped`` the requests that were dropped or expired here. ``queued`` is the mean queueing delay and
    ``execution`` the mean execution of its batches in seconds; ``waits`` the batch waits (sketch.py)."""

    model: str
    arrived: int
    started: int
    batches: int
    dropped: int
    waiting: int
    devices: int
    queued: float
    execution: float
    waits: list[int]
    latency: dict[str, list[tuple[int, float]]]
    """Measured (batch, seconds) by device type, at few batch sizes."""
    drift: dict[str, float] = {}
    """How many times as long as their profile says batches take, by device type, where that is known."""
    slack: tuple[float, float] = (-1.0, -1.0)
    """Of the batches granted, from grant to the closing of the window: the 10th percentile and the median (-1.0 where
    there were none)."""
    load_factor: float = 0.0
    order: str = ""


class PipelineReport(msgspec.Struct, array_like=True, frozen=True):
    """One pipeline over the period, by name: what came, what ended by outcome, and p50 and p99 of the latency of those
    that ended ok (-1.0 where none did). One of which nobody wanted anything is left out."""

    pipeline: str
    submitted: int
    outcomes: dict[str, int]
    latency: tuple[float, float] = (-1.0, -1.0)


class DropReport(msgspec.Struct, array_like=True, frozen=True):
    """One of the requests that were dropped, expired, failed or unavailable, ``ago`` seconds before the report."""

    request: str
    pipeline: str
    stage: str
    outcome: str
    detail: str
    ago: float


MOST_DROPS = 10
"""In one report: the newest."""
LONGEST_DETAIL = 200
"""Characters of a detail there."""


class ReportRecord(msgspec.Struct, array_like=True, frozen=True):
    """``reports/<shard>``, under the shard's lease. ``number`` counts the reports, ``period`` is in seconds (0 for the
    first), ``stages`` are in topological order within each pipeline, ``in_flight`` has the requests that have not ended
    by 'pipeline@version', ``agents`` those that the shard hears. ``pipelines`` and ``drops`` are for people."""

    number: int
    period: float
    stages: list[StageReport]
    in_flight: dict[str, int]
    agents: list[str]
    pipelines: list[PipelineReport] = []
    drops: list[DropReport] = []
