"""A cluster at one moment, with rates: what `laxity top` and the dashboard draw. Plain data; ``feed.py`` makes it."""

from __future__ import annotations

from typing import Literal

import msgspec

HISTORY = 300
"""Seconds of history that a view carries."""

DeviceState = Literal["busy", "idle", "loading", "standby", "draining", "lost"]


class LiveStage(msgspec.Struct, kw_only=True):
    """One stage over all shards. Rates are per second over the last period; times in seconds. ``inputs`` are the names
    of the stages before it, or 'request'."""

    name: str
    inputs: list[str]
    map: bool = False
    devices: int = 0
    arrived: float = 0.0
    started: float = 0.0
    batches: float = 0.0
    batch: float = 0.0
    """Mean batch size."""
    dropped: float = 0.0
    """Dropped or expired here."""
    waiting: int = 0
    queued: float = 0.0
    execution: float = 0.0
    slack: float | None = None
    """Median of (window's closing less grant): how much room there was. None where nothing was granted."""
    least_slack: float | None = None
    """Its 10th percentile."""
    load_factor: float = 0.0
    order: str = ""
    failed: str = ""
    """Why its model could not be loaded somewhere."""


class LivePipeline(msgspec.Struct, kw_only=True):
    """``history`` has (Unix second, offered, good, dropped) per second, the oldest first, up to :data:`HISTORY`."""

    name: str
    version: str
    slo: float
    offered: float = 0.0
    good: float = 0.0
    outcomes: dict[str, float] = {}
    """Ended per second, by outcome."""
    in_flight: int = 0
    latency: tuple[float, float] | None = None
    """p50 and p99 of those that ended ok in the last period."""
    quantile: float | None = None
    window: float | None = None
    admission: float | None = None
    policy: str = ""
    waits_for: str = ""
    """Why it is not served yet; '' where it is."""
    stages: list[LiveStage] = []
    """In topological order."""
    outputs: list[str] = []
    """The stages whose answers are the pipeline's."""
    history: list[tuple[int, float, float, float]] = []


class LiveDevice(msgspec.Struct, kw_only=True):
    number: int
    type: str
    state: DeviceState
    utilization: float = 0.0
    models: list[str] = []
    """'pipeline/stage', without versions."""
    shard: str = ""
    memory_mb: float = 0.0
    budget_mb: float = 0.0


class LiveNode(msgspec.Struct, kw_only=True):
    name: str
    host: str
    state: Literal["active", "draining", "standby", "lost"]
    why: str
    drained: bool
    """Whether somebody asked for it to be drained."""
    registered: bool
    devices: list[LiveDevice] = []


class LiveShard(msgspec.Struct, kw_only=True):
    name: str
    host: str
    frontend: str
    in_flight: int = 0
    submitted: float = 0.0
    ended: dict[str, int] = {}


class LiveDrop(msgspec.Struct, kw_only=True):
    """A request that was dropped, expired, failed or unavailable lately; ``at`` in Unix seconds. Its trace:
    `laxity trace REQUEST`."""

    at: float
    request: str
    pipeline: str
    stage: str
    outcome: str
    detail: str
    shard: str


class LiveView(msgspec.Struct, kw_only=True):
    """``stale`` is '' while the store answers, else since when and why it does not: the rest is what it said last."""

    at: float
    cluster: str
    store: str
    stale: str = ""
    leader: str = ""
    coordinators: list[str] = []
    fixed_plan: bool = False
    pipelines: list[LivePipeline] = []
    nodes: list[LiveNode] = []
    shards: list[LiveShard] = []
    drops: list[LiveDrop] = []
    """The newest first, at most 100."""
    missing: str = ""
    """What the cluster lacks (no shard, no node, ...), for people."""
