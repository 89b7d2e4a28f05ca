"""What the planner is told, and what it answers: plain data, without a store.

The coordinator makes the view from the store's records, the simulator from its machines; both carry out the plan.
"""

from __future__ import annotations

import msgspec

from cluster.records import NodeState
from pipelines.spec import PipelineSpec

DeviceId = tuple[str, int]
"""A node (its agent's name) and the device's index there."""


class DeviceView(msgspec.Struct, frozen=True):
    """One device: its type (what profiles are keyed by), its memory (0: not known, taken as enough), the model keys
    that it has loaded and those that it could not load."""

    type: str
    memory_mb: float = 0.0
    ready: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()


class NodeView(msgspec.Struct, frozen=True):
    """One node. ``state`` is what was decided of it before ('active' for one never seen). ``missing`` is for how many
    seconds it has not been there (0 while it is; a node at rest may well be missing). ``drained``: somebody wants it
    empty."""

    state: NodeState
    devices: list[DeviceView]
    missing: float = 0.0
    drained: bool = False


class Placed(msgspec.Struct, frozen=True):
    """What a device is to do: hold ``models`` for ``shard`` (both empty: rest)."""

    shard: str = ""
    models: frozenset[str] = frozenset()


class Served(msgspec.Struct, frozen=True):
    """Which version of a pipeline is served, and by which shards, with each one's part of the requests."""

    spec: PipelineSpec
    shards: dict[str, float]


class Footprint(msgspec.Struct, frozen=True):
    """What was found out about a model on devices of a type: the seconds that bringing it from the host's memory onto
    the device takes (not those of loading it there in the first place), and megabytes (0: not known)."""

    page_seconds: float
    memory_mb: float


class ClusterView(msgspec.Struct, frozen=True):
    """Everything that a plan depends on besides the rates. ``pipelines`` are what people want served, ``serving`` what
    is served at present (another version during an upgrade, also of a pipeline that people deleted), ``placement``
    the present plan. ``profiles``: measured (batch, seconds) by (model key, device type); they count for more than what
    a spec says, but for emulated stages. ``footprints``, by the same, count where a spec says nothing. ``in_flight``:
    requests by ('pipeline@version', shard) that have not ended."""

    nodes: dict[str, NodeView]
    shards: list[str]
    pipelines: dict[str, PipelineSpec]
    serving: dict[str, Served]
    placement: dict[DeviceId, Placed]
    profiles: dict[tuple[str, str], list[tuple[int, float]]] = {}
    footprints: dict[tuple[str, str], Footprint] = {}
    in_flight: dict[tuple[str, str], int] = {}


class Move(msgspec.Struct, frozen=True):
    """A change to one device, for people and for counting: what it gains and loses, and the seconds of the device that
    loading costs."""

    device: DeviceId
    gains: frozenset[str]
    loses: frozenset[str]
    cost: float
    why: str


class Plan(msgspec.Struct, frozen=True):
    """What is to be: the whole placement (devices not named rest), what is served, the nodes' states with the reason,
    for each model key the devices it needs (whole and parts) for the rate that is planned for, and the changes against
    the present. ``again_at``: when the planner wants to be asked again at the latest. ``problems``: what cannot
    be done, by model key (no device can hold it) or pipeline (its new version cannot be served), for people."""

    placement: dict[DeviceId, Placed]
    serving: dict[str, Served]
    states: dict[str, tuple[NodeState, str]]
    needed: dict[str, float]
    planned_rates: dict[str, float]
    moves: list[Move]
    again_at: float
    problems: dict[str, str] = {}
