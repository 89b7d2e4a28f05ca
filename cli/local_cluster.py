"""A cluster on this machine: its store, one shard, its agents, from start to end."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import Self

import msgspec

from cli.children import Child, Children
from cli.rundir import RunDirectory
from cluster.layout import AgentLayout
from cluster.membership import Follower
from cluster.records import (
    READY,
    BrokerRecord,
    DevicePlacement,
    NodeRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    ServingRecord,
    decode,
    encode,
    failure,
)
from cluster.store import open_store
from cluster.store.base import Delete, Entry, Operation, Put, Store
from pipelines.spec import PipelineSpec

SHARD = "shard-0"
TURN = 0.2
"""Seconds between two looks at the children and the signals."""


class ClusterError(Exception):
    """The cluster could not be started; the text says why and what to do."""


class Interrupted(Exception):
    """Somebody asked for the end while the cluster was still starting."""


class ModelLoading(msgspec.Struct, frozen=True):
    """How far one model is: on how many of its devices it is ready, and what is being done, for people."""

    model: str
    ready: int
    devices: int
    doing: str
    failed: str | None


class Loading(msgspec.Struct, frozen=True):
    """How far a starting cluster is; ``frontend`` is the shard's address, '' until it has registered."""

    frontend: str
    models: list[ModelLoading]

    @property
    def done(self) -> bool:
        return bool(self.frontend) and all(model.ready == model.devices for model in self.models)


class LocalCluster:
    """Use it as a context manager: however it is left, every process it started has ended.

    ``say`` takes lines for people about processes that died and were started again. ``interrupted`` is asked
    several times a second; once it says True, waiting ends.
    """

    def __init__(
        self,
        directory: RunDirectory,
        store_url: str | None,
        interrupted: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._embedded = store_url is None
        self._store_url = directory.default_store if store_url is None else store_url
        self._interrupted = interrupted
        self._paths = Paths(directory.cluster)
        self._children = Children(say)
        self._shard: Child | None = None
        self._store: Store | None = None
        self._follower: Follower | None = None
        self._expected: dict[str, list[tuple[str, int]]] = {}
        """By model key: the (agent, device) that are to hold it."""

    def __enter__(self) -> Self:
        self._directory.acquire(self._store_url)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._children.end()
        finally:
            if self._follower is not None:
                self._follower.close()
            if self._store is not None:
                self._store.close()
            if self._embedded:
                self._directory.remove_store()
            self._directory.release()

    def start(self, specs: Sequence[PipelineSpec], layouts: Sequence[AgentLayout], port: int) -> None:
        """Write what is to be served and start all processes; ``port`` is the services' (0: any free one)."""
        check_port(port)
        if self._embedded:
            self._directory.remove_store()
        self._store = open_store(self._store_url)
        self._write(self._store, specs, layouts)
        for layout in layouts:
            for device, models in layout.placement.items():
                for model in models:
                    self._expected.setdefault(model, []).append((layout.agent, device))
        self._shard = self._start_shard(f"tcp://127.0.0.1:{port or '*'}", "tcp://127.0.0.1:*")
        for layout in layouts:
            self._start(layout.agent, "node", "run", "--agent", layout.agent, "--devices", layout.devices)
        self._follower = Follower(self._store, self._paths.root)

    def wait_ready(self, show: Callable[[Loading], None]) -> str:
        """Wait until every model is ready, ``show`` being told how far it is; the address for services.

        Raises :class:`ClusterError` for a model that cannot be loaded, :class:`~cli.children.ChildDied`, and
        :class:`Interrupted`.
        """
        assert self._follower is not None
        while not self._interrupted():
            self._children.check_alive()
            self._follower.poll(TURN)
            loading = self._loading(self._follower.entries)
            show(loading)
            for model in loading.models:
                if model.failed is not None:
                    raise ClusterError(f"{model.model} could not be loaded: {model.failed}")
            if loading.done:
                self._pin_addresses(self._follower.entries)
                return loading.frontend
        raise Interrupted

    def serve(self) -> None:
        """Start again what dies, until interrupted."""
        assert self._follower is not None
        while not self._interrupted():
            self._children.revive()
            self._follower.poll(TURN)

    def _write(self, store: Store, specs: Sequence[PipelineSpec], layouts: Sequence[AgentLayout]) -> None:
        """Pipelines and placements, in place of those of an earlier run."""
        present = store.list(self._paths.root).entries
        for entry in present:
            if entry.key.startswith((self._paths.brokers, self._paths.nodes)):
                raise ClusterError(
                    f"the store {self._store_url} already has a running cluster {self._directory.cluster!r} "
                    f"({entry.key}); end that one first, or take another name with --cluster"
                )
        wanted: dict[str, bytes] = {
            self._paths.pipeline(spec.name): encode(PipelineRecord(spec.version, spec)) for spec in specs
        }
        for spec in specs:
            wanted[self._paths.served(spec.name)] = encode(ServingRecord(spec.version, spec, {SHARD: 1.0}))
        for layout in layouts:
            placed = {device: DevicePlacement(SHARD, models) for device, models in layout.placement.items()}
            wanted[self._paths.placement(layout.agent)] = encode(PlacementRecord(placed))
        operations: list[Operation] = [Delete(entry.key) for entry in present if entry.key not in wanted]
        operations += [Put(key, value) for key, value in wanted.items()]
        store.transaction([], operations)

    def _start_shard(self, frontend: str, backend: str) -> Child:
        return self._start("shard", "broker", "run", "--shard", SHARD, "--frontend", frontend, "--backend", backend)

    def _start(self, name: str, *command: str) -> Child:
        arguments = [*command, "--store", self._store_url, "--cluster", self._directory.cluster]
        return self._children.add(Child(name, arguments, self._directory.logs / f"{name}.log", os.environ))

    def _pin_addresses(self, entries: dict[str, Entry]) -> None:
        """A shard that is started again must be where services and agents look for it."""
        assert self._shard is not None
        key = self._paths.broker(SHARD)
        record = decode(BrokerRecord, key, entries[key].value)
        arguments = self._shard.arguments
        arguments[arguments.index("--frontend") + 1] = record.frontend
        arguments[arguments.index("--backend") + 1] = record.backend

    def _loading(self, entries: dict[str, Entry]) -> Loading:
        key = self._paths.broker(SHARD)
        frontend = decode(BrokerRecord, key, entries[key].value).frontend if key in entries else ""
        nodes: dict[str, NodeRecord] = {}
        for model in self._expected.values():
            for agent, _ in model:
                key = self._paths.node(agent)
                if agent not in nodes and key in entries:
                    nodes[agent] = decode(NodeRecord, key, entries[key].value)
        return Loading(frontend, [_model_loading(*expected, nodes) for expected in self._expected.items()])


def _model_loading(model: str, places: list[tuple[str, int]], nodes: dict[str, NodeRecord]) -> ModelLoading:
    ready = 0
    doing = ""
    failed = None
    for agent, number in places:
        if agent not in nodes:
            doing = doing or f"waiting for {agent}"
            continue
        device = next((device for device in nodes[agent].devices if device.device == number), None)
        state = device.models.get(model, "") if device is not None else ""
        ready += state == READY
        failed = failed or failure(state)
        if device is not None and state not in (READY, ""):
            doing = device.progress or state
    return ModelLoading(model, ready, len(places), doing, failed)


def check_port(port: int) -> None:
    """Raise :class:`ClusterError` where ``port`` cannot be bound on the loopback (0 always can)."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                why = "is in use by another process; end that one, choose another port, or leave out --port for any"
            else:
                why = f"cannot be used ({error.strerror}); choose one above 1023"
            raise ClusterError(f"port {port} {why}") from error
