"""An agent as a process: it registers itself in the store, and follows the placement and the shards there."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time

from cluster.membership import Follower, Membership
from cluster.records import (
    BrokerRecord,
    DeviceRecord,
    NodeRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    RecordError,
    decode,
    encode,
)
from cluster.serving import serving
from cluster.store import open_store
from cluster.store.base import Entry
from nodes.agent import Agent, AgentConfig, DeviceState, Placement
from nodes.engine.device import FAILED, READY
from pipelines.spec import PipelineSpec

log = logging.getLogger("laxity.node")

TURN = 0.2
"""Seconds between two looks at the lease, the devices' states and the signals."""


class ClusterView:
    """What an agent reads out of the store: which shard it works for and what its devices are to hold."""

    def __init__(self, paths: Paths, agent: str) -> None:
        self._paths = paths
        self._agent = agent
        self._specs: dict[str, tuple[PipelineSpec, str]] = {}
        """(spec, stage) by model key; versions that are no longer applied stay known while they are placed."""

    def backend(self, entries: dict[str, Entry]) -> str:
        """Where the shard is that this agent works for; '' while there is none."""
        for key in sorted(entries):
            if key.startswith(self._paths.brokers):
                try:
                    return decode(BrokerRecord, key, entries[key].value).backend
                except RecordError as error:
                    log.error("%s", error)
        return ""

    def placement(self, entries: dict[str, Entry]) -> Placement:
        """The models of each device, as far as their pipelines are known."""
        for key, entry in entries.items():
            if key.startswith(self._paths.pipelines):
                try:
                    spec = decode(PipelineRecord, key, entry.value).spec
                except RecordError as error:
                    log.error("%s", error)
                    continue
                for stage in spec.stages:
                    self._specs[spec.model_key(stage)] = (spec, stage)
        key = self._paths.placement(self._agent)
        if key not in entries:
            return {}
        try:
            record = decode(PlacementRecord, key, entries[key].value)
        except RecordError as error:
            log.error("%s", error)
            return {}
        placed = {model for device in record.devices.values() for model in device.models}
        self._specs = {model: known for model, known in self._specs.items() if model in placed}
        return {
            number: {model: self._specs[model] for model in device.models if model in self._specs}
            for number, device in record.devices.items()
        }


def node_record(states: list[DeviceState]) -> NodeRecord:
    """An agent's record: ``ready`` once each device's models are loaded or given up."""
    settled = all(state == READY or state.startswith(FAILED) for device in states for state in device.models.values())
    return NodeRecord(
        pid=os.getpid(),
        host=socket.gethostname(),
        state="ready" if settled else "loading",
        devices=[
            DeviceRecord(device=device.number, type=device.type, models=device.models, progress=device.progress)
            for device in states
        ],
    )


def run_agent_process(config: AgentConfig, store_url: str, cluster: str, stop: threading.Event) -> None:
    """Serve until ``stop`` is set. Raises StoreError or RecordError where it cannot begin, and RuntimeError where
    the agent's thread ended by itself (a shard of another version)."""
    store = open_store(store_url)
    try:
        paths = Paths(cluster)
        membership = Membership(store, paths.node(config.name))
        follower = Follower(store, paths.root)
        agent = Agent(config, lambda states: membership.publish(encode(node_record(states))))
        view = ClusterView(paths, config.name)
        placed: Placement | None = None
        try:
            with serving("agent", agent.run, agent.stop, stop):
                while not stop.is_set():
                    if follower.poll(TURN):
                        agent.connect(view.backend(follower.entries))
                        placement = view.placement(follower.entries)
                        if placement != placed:
                            agent.place(placement)
                            placed = placement
                    membership.beat(time.monotonic())
        finally:
            follower.close()
            membership.leave()
    finally:
        store.close()
