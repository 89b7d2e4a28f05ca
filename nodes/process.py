"""An agent as a process: it registers itself in the store, and follows its placement and the shards there."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.control import Control
from cluster.decoded import Decoded
from cluster.filecache import FileCache, default_directory
from cluster.membership import Follower, Membership
from cluster.observe.sidecar import Sidecar
from cluster.records import (
    BrokerRecord,
    DeviceRecord,
    FileRecord,
    KeyRecord,
    NodeRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    RecordError,
    ServingRecord,
    decode,
    encode,
)
from cluster.sd_notify import ServiceManager
from cluster.serving import serving
from cluster.shard_keys import ShardKeys
from cluster.store import wait_for_store
from cluster.store.base import Entry, Prefix
from laxity.credentials import Credentials
from laxity.curve import is_local
from laxity.keys import InvalidKey, ServerKey, read_own_key
from laxity.version import __version__
from nodes.agent import Agent, AgentConfig, DeviceState, Placement, VersionRefused, Work
from nodes.engine.models import FAILED, READY
from nodes.figures import AgentSource
from nodes.files import ModelFiles
from nodes.gauges import Gauges, gauge_publisher, gpus_among
from nodes.known_profiles import KnownProfiles
from nodes.nvml import GpuReader
from pipelines.spec import PipelineSpec

log = logging.getLogger("laxity.node")

TURN = 0.2
"""Seconds between two looks at the lease, the devices' states and the signals."""


class ClusterView:
    """What an agent reads out of the store: where the shards are, and what its devices are to do."""

    def __init__(self, paths: Paths, agent: str) -> None:
        self._paths = paths
        self._agent = agent
        self._placement = paths.placement(agent)
        self._specs: dict[str, tuple[PipelineSpec, str]] = {}
        """(spec, stage) by model key; versions that are no longer applied stay known while they are placed."""
        self._decoded = Decoded()
        self._keys = ShardKeys("backend")
        self.own_key: KeyRecord | None = None
        """What the store has under the agent's name."""
        self.servers: list[ServerKey] = []
        """What :meth:`shards` found, with their keys; replaced as a whole, so that any thread may look."""
        self.files: dict[str, list[FileRecord]] = {}
        """What the pipeline of each model key needs, as long as that is placed."""

    def prefixes(self) -> Prefix:
        """Of the keys that it is about."""
        paths = self._paths
        return (paths.pipelines, paths.serving, paths.brokers, paths.profiles, paths.keys, self._placement)

    def shards(self, entries: dict[str, Entry]) -> dict[str, str]:
        """Where agents find each shard that has a record, and may be connected to."""
        paths = self._paths
        self._decoded.update(
            {key: entry for key, entry in entries.items() if key.startswith((paths.brokers, paths.keys))}
        )
        brokers = self._decoded.under(BrokerRecord, paths.brokers)
        keys = self._decoded.under(KeyRecord, paths.keys)
        self.own_key = keys.get(self._agent)
        self.servers = self._keys.of(brokers, keys, time.time())
        return {server.shard: server.address for server in self.servers}

    def placement(self, entries: dict[str, Entry]) -> Placement | None:
        """What each device is to do, as far as the pipelines are known; None where nobody can tell, so that what is
        done goes on."""
        for key, entry in entries.items():
            try:
                if key.startswith(self._paths.pipelines):
                    self._learn(decode(PipelineRecord, key, entry.value))
                elif key.startswith(self._paths.serving):
                    self._learn(decode(ServingRecord, key, entry.value))
            except RecordError as error:
                log.error("%s", error)
        if self._placement not in entries:
            return {}
        try:
            record = decode(PlacementRecord, self._placement, entries[self._placement].value)
        except RecordError as error:
            log.error("%s", error)
            return None
        placed = {model for device in record.devices.values() for model in device.models}
        self._specs = {model: known for model, known in self._specs.items() if model in placed}
        self.files = {model: known for model, known in self.files.items() if model in placed}
        return {
            number: Work(device.shard, {model: self._specs[model] for model in device.models if model in self._specs})
            for number, device in record.devices.items()
        }

    def _learn(self, record: PipelineRecord | ServingRecord) -> None:
        for stage in record.spec.stages:
            key = record.spec.model_key(stage)
            self._specs[key] = (record.spec, stage)
            self.files[key] = record.files


def node_record(states: list[DeviceState], withheld: dict[int, dict[str, str]], http: str = "") -> NodeRecord:
    """An agent's record: ``ready`` once each device's models are loaded or given up. ``withheld``: by device, the
    states of models that it does not know of yet. ``http``: where its figures are to be had."""
    models = [{**withheld.get(device.number, {}), **device.models} for device in states]
    settled = all(_settled(state) for held in models for state in held.values())
    return NodeRecord(
        pid=os.getpid(),
        host=socket.gethostname(),
        state="ready" if settled else "loading",
        devices=[
            DeviceRecord(
                device=device.number,
                type=device.type,
                models=held,
                progress=device.progress,
                memory_mb=device.memory_mb,
            )
            for device, held in zip(states, models, strict=True)
        ],
        release=__version__,
        http=http,
    )


def _settled(state: str) -> bool:
    return state == READY or state.startswith(FAILED)


class NodePublisher:
    """Publishes an agent's record when its devices' states change, or those of the models that wait for files."""

    def __init__(self, membership: Membership, http: str) -> None:
        self._membership = membership
        self._http = http
        self._lock = threading.Lock()
        self._states: list[DeviceState] | None = None
        self._withheld: dict[int, dict[str, str]] = {}

    def devices(self, states: list[DeviceState]) -> None:
        with self._lock:
            self._states = states
            self._publish()

    def withheld(self, withheld: dict[int, dict[str, str]]) -> None:
        with self._lock:
            if withheld != self._withheld:
                self._withheld = withheld
                self._publish()

    def waits_for(self) -> str:
        """Why the agent does not serve all that it is to ('': it does), for people."""
        with self._lock:
            if self._states is None:
                return "the agent has only just begun"
            record = node_record(self._states, self._withheld)
        if record.state == "ready":
            return ""
        loading = [model for device in record.devices for model, state in device.models.items() if not _settled(state)]
        return f"{len(loading)} models are not loaded yet, {loading[0]} among them"

    def _publish(self) -> None:
        if self._states is not None:
            self._membership.publish(encode(node_record(self._states, self._withheld, self._http)))


def renew_key(agent: Agent) -> None:
    """Go on with the key that is in the agent's file by now; with the one that there was, if none is."""
    try:
        agent.renew_key()
    except InvalidKey as error:
        log.error("%s; going on with the key that was there before", error)


class Unfit(RuntimeError):
    """No shard lets this agent work, nor will. It ends: while its record stood in the store, devices that cannot serve
    would be counted upon."""


def check_fit(config: AgentConfig, own_key: KeyRecord | None, shards: Sequence[ServerKey]) -> None:
    """Raise :class:`Unfit` for an agent whose key was revoked, or that has none where all ``shards`` want one.
    ``own_key``: the store's record under its name."""
    if config.key and own_key is not None and own_key.revoked:
        raise Unfit(f"the key of agent {config.name!r} was revoked, so that no shard lets it in any more")
    if config.key or not shards or any(_is_open(shard, config.plain) for shard in shards):
        return
    raise Unfit(
        f"agent {config.name!r} has no key, and shard {shards[0].shard} at {shards[0].address} wants one: make it with "
        f"`laxity keys new {config.name} --role node`, and give its file with --key (LAXITY_NODE_KEY)"
    )


def _is_open(shard: ServerKey, plain: bool) -> bool:
    """Whether an agent without a key may work for a shard."""
    return not shard.publics and (plain or is_local(shard.address))


def run_agent_process(
    config: AgentConfig, store_url: str, cluster: str, control: Control[AgentConfig], sidecar: Sidecar
) -> None:
    """Serve until ``control`` says stop; then finish what runs. ``sidecar`` tells of it. Waits for a store that is
    away. Raises StoreError, RecordError or InvalidKey where it cannot begin, :class:`Unfit`, and RuntimeError where the
    agent's thread ended by itself (its shards are of another version, or refuse it)."""
    paths = Paths(cluster)
    key = paths.node(config.name)
    if config.key:
        read_own_key(config.key, "node", config.name, cluster)
    store = wait_for_store(store_url, control.stop)
    if store is None:
        return
    try:
        membership = Membership(store, key)
        publisher = NodePublisher(membership, sidecar.address)
        types = {device.type for device in config.devices if device.kind != "emulated"}
        profiles = KnownProfiles(store, paths, socket.gethostname(), types)
        agent = Agent(config, publisher.devices, profiles.measured)
        cache = FileCache(Path(config.cache) if config.cache else default_directory(), config.cache_bytes)
        emulated = [number for number, device in enumerate(config.devices) if device.kind == "emulated"]
        view = ClusterView(paths, config.name)
        files = ModelFiles(
            cache,
            config.name,
            emulated,
            credentials=lambda: Credentials(agent.key, config.plain, view.servers),
        )
        gpus = GpuReader(gpus_among(config.devices))
        gauges = gauge_publisher(agent.loads, Gauges(gpus), store, paths.gauges(config.name), membership)
        # The driver is asked by two threads, each of which may find it gone.
        scraped = GpuReader(gpus_among(config.devices))
        follower = Follower(store, view.prefixes())
        manager = ServiceManager()
        placed: Placement | None = None
        reloads = 0
        files.start()
        try:
            ended = threading.Event()
            with serving("agent", agent.run, agent.stop, ended, VersionRefused):
                gauges.start()
                sidecar.source = AgentSource(config.name, agent.counts, scraped, publisher.waits_for)
                while not (control.stop.is_set() or ended.is_set()):
                    changed = control.changed()
                    if changed is not None:
                        agent.configure(changed)
                        cache.limit = changed.cache_bytes
                    if control.reloads != reloads:
                        reloads = control.reloads
                        renew_key(agent)
                    if follower.poll(TURN):
                        shards = view.shards(follower.entries)
                        check_fit(config, view.own_key, view.servers)
                        agent.follow(shards, view.servers)
                        agent.know(profiles.news(follower.entries))
                        placement = view.placement(follower.entries)
                        if placement is not None:
                            files.want(placement, view.files, shards.values())
                    available = files.available()
                    if available != placed:
                        agent.place(available)
                        placed = available
                    publisher.withheld(files.withheld())
                    profiles.write()
                    membership.beat(time.monotonic())
                    if membership.registered:
                        manager.ready()
                    agent.call(manager.alive)
                manager.stopping()
                # What runs may take a while to end: whoever places models need not wait for it.
                membership.leave()
                agent.stop()
                while not (ended.wait(TURN) or control.at_once.is_set()):
                    pass
                if not ended.is_set():
                    agent.stop(at_once=True)
        finally:
            gauges.stop()
            gpus.close()
            scraped.close()
            files.stop()
            follower.close()
            membership.leave()
    finally:
        store.close()
