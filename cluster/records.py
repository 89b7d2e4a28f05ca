"""What lies in the store: which record under which key, as JSON.

Under ``/laxity/<cluster>/`` pipelines and placements are written by people (through the command
line) and stay; shards and agents write the records of themselves under a lease, so that a record
vanishes with the process it speaks of.
"""

from __future__ import annotations

import re
from typing import Final, Literal, TypeVar

import msgspec

from pipelines.spec import PipelineSpec

QUEUED: Final = "queued"
LOADING: Final = "loading"
READY: Final = "ready"
FAILED: Final = "failed"
"""States of a model on a device; ``failed`` is followed by ``: `` and what went wrong."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class RecordError(ValueError):
    """A record in the store cannot be read, or a name cannot be part of a key."""


class PipelineRecord(msgspec.Struct, frozen=True):
    """``pipelines/<name>``: what is served under a name; ``version`` is the spec's own."""

    version: str
    spec: PipelineSpec


class BrokerRecord(msgspec.Struct, frozen=True):
    """``brokers/<shard>``, under a lease: where services (``frontend``) and agents (``backend``) connect.

    ``counters`` are the shard's own, about a second old: requests submitted and in flight, and how many ended in
    each outcome; submitted = in_flight + the outcomes' sum.
    """

    frontend: str
    backend: str
    pid: int
    host: str
    counters: dict[str, int] = {}


class DeviceRecord(msgspec.Struct, frozen=True):
    """One device of an agent: ``models`` has a state for each model key (see :func:`failure`), ``progress``
    is a short text for people while models load (``profiling batch 8``)."""

    device: int
    type: str
    models: dict[str, str] = {}
    progress: str = ""


class NodeRecord(msgspec.Struct, frozen=True):
    """``nodes/<agent>``, under a lease: an agent, its devices, and how far their models are."""

    pid: int
    host: str
    state: Literal["loading", "ready"]
    devices: list[DeviceRecord] = []


class PlacementRecord(msgspec.Struct, frozen=True):
    """``placement/<agent>``: the model keys (``pipeline@version/stage``) that each device is to hold,
    by the device's index."""

    devices: dict[int, list[str]]


R = TypeVar("R", PipelineRecord, BrokerRecord, NodeRecord, PlacementRecord)


class Paths:
    """The keys of one cluster."""

    __slots__ = ("brokers", "cluster", "nodes", "pipelines", "placements", "root")

    def __init__(self, cluster: str) -> None:
        self.cluster = _checked(cluster, "cluster")
        self.root = f"/laxity/{cluster}/"
        self.pipelines = self.root + "pipelines/"
        self.brokers = self.root + "brokers/"
        self.nodes = self.root + "nodes/"
        self.placements = self.root + "placement/"

    def pipeline(self, name: str) -> str:
        return self.pipelines + _checked(name, "pipeline")

    def broker(self, shard: str) -> str:
        return self.brokers + _checked(shard, "shard")

    def node(self, agent: str) -> str:
        return self.nodes + _checked(agent, "agent")

    def placement(self, agent: str) -> str:
        return self.placements + _checked(agent, "agent")


def name_of(key: str) -> str:
    """The last part of a key: the pipeline, shard or agent it speaks of."""
    return key.rpartition("/")[2]


def _checked(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise RecordError(
            f"{name!r} cannot name a {what}: use up to 63 letters, digits, '-', '_' and '.', "
            "the first a letter or a digit"
        )
    return name


def encode(record: PipelineRecord | BrokerRecord | NodeRecord | PlacementRecord) -> bytes:
    """A record's bytes in the store."""
    return msgspec.json.encode(record)


def decode(kind: type[R], key: str, value: bytes) -> R:
    """The record that ``value`` holds; :class:`RecordError` names the key where it holds none."""
    try:
        return msgspec.json.decode(value, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordError(
            f"the record at {key} cannot be read ({error}); was it written by another version of laxity?"
        ) from error


def failure(state: str) -> str | None:
    """What went wrong with a model in this state; None unless it failed."""
    kind, _, detail = state.partition(": ")
    return (detail or "no reason given") if kind == FAILED else None
