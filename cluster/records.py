"""What lies in the store: which record under which key, as JSON.

Under ``/laxity/<cluster>/`` pipelines and drains are written by people (through the command line), what follows from
them (serving, placement, states, tuning) by the leading coordinator; both stay. Shards and agents write the records of
themselves under a lease, so that a record vanishes with the process it speaks of.
"""

from __future__ import annotations

import math
import re
from typing import Final, Literal, TypeVar
from urllib.parse import quote, unquote

import msgspec

from laxity.keys import Role
from pipelines.files import FileRecord as FileRecord
from pipelines.profile import LatencyProfile
from pipelines.spec import PipelineSpec

QUEUED: Final = "queued"
LOADING: Final = "loading"
READY: Final = "ready"
FAILED: Final = "failed"
"""States of a model on a device; ``failed`` is followed by ``: `` and what went wrong."""

LONGEST: Final = 3600.0
"""Seconds that nothing which is measured takes."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class RecordError(ValueError):
    """A record in the store cannot be read, or a name cannot be part of a key."""


class PipelineRecord(msgspec.Struct, frozen=True):
    """``pipelines/<name>``: what people want to be served under a name; ``version`` is the spec's own."""

    version: str
    spec: PipelineSpec
    files: list[FileRecord] = []


class ServingRecord(msgspec.Struct, frozen=True):
    """``serving/<name>``: what is served under a name at present, and by which shards, with the part (0 to 1) of the
    requests that each is to get. It follows the :class:`PipelineRecord` once enough devices hold the new version."""

    version: str
    spec: PipelineSpec
    shards: dict[str, float]
    files: list[FileRecord] = []


class BrokerRecord(msgspec.Struct, frozen=True):
    """``brokers/<shard>``, under a lease: where services (``frontend``) and agents (``backend``) connect.

    ``counters`` are the shard's own, about a second old: requests submitted and in flight, and how many ended in
    each outcome; submitted = in_flight + the outcomes' sum. ``release`` is the software's version, ``http``
    where metrics, health and traces are to be had ('' where nowhere). ``public`` is the key that it serves with, ''
    where it serves in plain text; it holds only as one of those in the shard's :class:`KeyRecord`.
    """

    frontend: str
    backend: str
    pid: int
    host: str
    counters: dict[str, int] = {}
    release: str = ""
    http: str = ""
    public: str = ""


class DeviceRecord(msgspec.Struct, frozen=True):
    """One device of an agent: ``models`` has a state for each model key (see :func:`failure`), ``progress``
    is a short text for people while models load (``profiling batch 8``). ``memory_mb`` is 0 where it is not known."""

    device: int
    type: str
    models: dict[str, str] = {}
    progress: str = ""
    memory_mb: float = 0.0


class NodeRecord(msgspec.Struct, frozen=True):
    """``nodes/<agent>``, under a lease: an agent, its devices, and how far their models are."""

    pid: int
    host: str
    state: Literal["loading", "ready"]
    devices: list[DeviceRecord] = []
    release: str = ""
    http: str = ""


class GpuGauges(msgspec.Struct, frozen=True):
    """What an NVIDIA GPU's driver says; None for what it does not. ``utilization`` is the part (0 to 1) of the last
    moments in which anything ran on it, whoever's; memory in MB (2**20 bytes), clocks in MHz, °C, watts."""

    utilization: float | None = None
    memory_used_mb: float | None = None
    memory_total_mb: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None


class DeviceGauges(msgspec.Struct, frozen=True):
    """One device, as its agent reckons: the part (0 to 1) of the time in which it executed, the models resident on it
    and what they take; ``memory_mb`` of ``budget_mb`` (0: not known)."""

    device: int
    utilization: float
    models: int
    memory_mb: float
    budget_mb: float
    gpu: GpuGauges | None = None


class NodeGaugesRecord(msgspec.Struct, frozen=True):
    """``metrics/<agent>``, under the agent's lease: its devices over the ``period`` seconds before ``at`` (Unix
    seconds). For people: nobody decides by it, and planners do not watch it."""

    at: float
    period: float
    devices: list[DeviceGauges] = []


class DevicePlacement(msgspec.Struct, frozen=True):
    """What one device is to do: hold the models with these keys (``pipeline@version/stage``) and take its batches from
    this shard ('' while it holds none)."""

    shard: str
    models: list[str]


class PlacementRecord(msgspec.Struct, frozen=True):
    """``placement/<agent>``: what each device is to do, by the device's index; those not named hold nothing."""

    devices: dict[int, DevicePlacement]


NodeState = Literal["active", "draining", "standby", "lost"]
"""``active``: it may hold models; ``draining``: it is being emptied; ``standby``: empty and at rest (powered down where
there is a provider); ``lost``: its lease vanished while it was not at rest."""


class NodeStateRecord(msgspec.Struct, frozen=True):
    """``states/<agent>``: what the leader has decided of a node, and why (for people). ``devices`` are its devices'
    (type, memory_mb), so that a node at rest can be counted on."""

    state: NodeState
    why: str
    devices: list[tuple[str, float]] = []


class DrainRecord(msgspec.Struct, frozen=True):
    """``drains/<agent>``: somebody wants this node empty until the record is taken away."""

    why: str = ""


class LeaderRecord(msgspec.Struct, frozen=True):
    """``leader``, under a lease: the coordinator that leads."""

    coordinator: str
    host: str
    pid: int


class CoordinatorRecord(msgspec.Struct, frozen=True):
    """``coordinators/<name>``, under a lease: a coordinator, leading or not."""

    host: str
    pid: int
    release: str = ""
    http: str = ""


class ProfileRecord(msgspec.Struct, frozen=True):
    """``profiles/<model>/<device type>``: what an agent found out about a model on devices of a type, for those who
    hold it later and for planners. ``profile`` has (batch, seconds); ``load_seconds`` is what bringing it from host
    memory onto the device takes, ``memory_mb`` what it takes there (0: not known). It stays until the leader takes it
    away with the pipeline's version."""

    profile: list[tuple[int, float]]
    load_seconds: float
    memory_mb: float
    measured_at_host: str

    def __post_init__(self) -> None:
        """ValueError for numbers that are no measurement: whoever reads them would reckon with them."""
        if self.profile:
            LatencyProfile(self.profile)
        slowest = max([self.load_seconds, *(seconds for _, seconds in self.profile)])
        if slowest >= LONGEST:
            raise ValueError(f"{slowest} s are no measurement; give less than {LONGEST:.0f} s")
        for name in ("load_seconds", "memory_mb"):
            found = getattr(self, name)
            if not (math.isfinite(found) and found >= 0.0):
                raise ValueError(f"{name} is {found}; give a number of 0 or more")


class TuningRecord(msgspec.Struct, frozen=True):
    """``tuning/<pipeline>``: what the leader found to be right for a pipeline's drop, merged over its shards.

    ``quantile`` is λ and ``history`` the window in seconds over which queueing delays are averaged; ``admission`` the
    part (0 to 1) of the requests that the first stages take in (proactive drop). ``queued`` is each stage's mean
    queueing delay in seconds over all shards, for those shards that have not seen enough themselves. ``limit`` names
    the stage on whose account ``admission`` is below 1.
    """

    quantile: float
    history: float
    admission: float
    queued: dict[str, float] = {}
    limit: str = ""


class PublicKey(msgspec.Struct, frozen=True):
    """A CURVE public key (Z85), since when it is in use, and until when it is good (Unix seconds; None: it stays)."""

    public: str
    since: float
    until: float | None = None


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``keys/<name>``: who is let in. The name is the owner's: of an agent (role ``node``) or a shard its own, which no
    other key can take.

    ``publics`` are the owner's keys, the newest first: after a rotation two for a while. A record that is ``revoked``
    (Unix seconds; 0: it is not) lets nobody in and stays, so that people can see it. Clients may be held to
    ``pipelines`` ([]: all), to a ``rate`` of requests a second and to so many ``in_flight`` (0: no limit) in the
    whole cluster.
    """

    role: Role
    publics: list[PublicKey]
    revoked: float = 0.0
    pipelines: list[str] = []
    rate: float = 0.0
    in_flight: int = 0
    note: str = ""

    def good(self, now: float) -> list[str]:
        """The public keys that are good at ``now`` (Unix seconds)."""
        if self.revoked:
            return []
        return [key.public for key in self.publics if key.until is None or now < key.until]


R = TypeVar("R", bound=msgspec.Struct)


class Paths:
    """The keys of one cluster."""

    __slots__ = (
        "brokers",
        "cluster",
        "coordinators",
        "drains",
        "keys",
        "leader",
        "metrics",
        "nodes",
        "pipelines",
        "placements",
        "profiles",
        "reports",
        "root",
        "serving",
        "states",
        "tuning",
    )

    def __init__(self, cluster: str) -> None:
        self.cluster = _checked(cluster, "cluster")
        self.root = f"/laxity/{cluster}/"
        self.pipelines = self.root + "pipelines/"
        self.brokers = self.root + "brokers/"
        self.nodes = self.root + "nodes/"
        self.placements = self.root + "placement/"
        self.serving = self.root + "serving/"
        self.states = self.root + "states/"
        self.drains = self.root + "drains/"
        self.tuning = self.root + "tuning/"
        self.reports = self.root + "reports/"
        self.profiles = self.root + "profiles/"
        self.coordinators = self.root + "coordinators/"
        self.metrics = self.root + "metrics/"
        self.keys = self.root + "keys/"
        self.leader = self.root + "leader"

    def pipeline(self, name: str) -> str:
        return self.pipelines + _checked(name, "pipeline")

    def broker(self, shard: str) -> str:
        return self.brokers + _checked(shard, "shard")

    def node(self, agent: str) -> str:
        return self.nodes + _checked(agent, "agent")

    def placement(self, agent: str) -> str:
        return self.placements + _checked(agent, "agent")

    def coordinator(self, name: str) -> str:
        return self.coordinators + _checked(name, "coordinator")

    def served(self, pipeline: str) -> str:
        return self.serving + _checked(pipeline, "pipeline")

    def state(self, agent: str) -> str:
        return self.states + _checked(agent, "agent")

    def drain(self, agent: str) -> str:
        return self.drains + _checked(agent, "agent")

    def tuned(self, pipeline: str) -> str:
        return self.tuning + _checked(pipeline, "pipeline")

    def report(self, shard: str) -> str:
        return self.reports + _checked(shard, "shard")

    def profile(self, model: str, device_type: str) -> str:
        return f"{self.profiles}{model.replace('/', '~')}/{quote(device_type, safe='')}"

    def profiled(self, key: str) -> tuple[str, str]:
        """The (model key, device type) of :meth:`profile`."""
        model, _, device_type = key.removeprefix(self.profiles).partition("/")
        return model.replace("~", "/"), unquote(device_type)

    def gauges(self, agent: str) -> str:
        return self.metrics + _checked(agent, "agent")

    def key(self, name: str) -> str:
        return self.keys + _checked(name, "key")

    def decided_by(self) -> tuple[str, ...]:
        """The prefixes of all keys that a coordinator decides by: not the gauges', which change all the time, nor
        those that say who is let in."""
        others = ("cluster", "root", "metrics", "keys")
        return tuple(getattr(self, name) for name in self.__slots__ if name not in others)


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


def encode(record: msgspec.Struct) -> bytes:
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
