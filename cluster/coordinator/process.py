"""A coordinator as a process: any number of them run, one leads. The data plane goes on without any."""

from __future__ import annotations

import logging
import os
import socket
import time

from cluster.control import Control
from cluster.coordinator.figures import CoordinatorCounts, CoordinatorSource
from cluster.coordinator.heartbeat import Heartbeat
from cluster.coordinator.leader import CoordinatorConfig, Leader
from cluster.coordinator.provider import Provider
from cluster.election import Election, NotLeaderError
from cluster.membership import Follower, Membership
from cluster.observe.sidecar import Sidecar
from cluster.records import CoordinatorRecord, LeaderRecord, Paths, encode
from cluster.sd_notify import ServiceManager
from cluster.store import wait_for_store
from cluster.store.base import StoreError
from laxity.version import __version__

log = logging.getLogger("laxity.coordinator")

TURN = 0.2
"""Seconds between two looks at the lease, the records and the signals."""


def run_coordinator_process(
    config: CoordinatorConfig, store_url: str, cluster: str, control: Control[CoordinatorConfig], sidecar: Sidecar
) -> None:
    """Stand for leadership, and lead while elected, until ``control`` says stop; ``sidecar`` tells of it.

    Raises StoreError or RecordError where it cannot begin, and
    :class:`~cluster.coordinator.provider.ProviderError` for a command that cannot be run.
    """
    provider = Provider(config.provider_up, config.provider_down)
    store = wait_for_store(store_url, control.stop)
    if store is None:
        return
    try:
        paths = Paths(cluster)
        host, pid = socket.gethostname(), os.getpid()
        membership = Membership(store, paths.coordinator(config.name), config.ttl)
        membership.publish(encode(CoordinatorRecord(host, pid, __version__, sidecar.address)))
        election = Election(store, paths.leader, encode(LeaderRecord(config.name, host, pid)), config.ttl)
        follower = Follower(store, paths.decided_by())
        heartbeat = Heartbeat(membership, election, TURN)
        counts = CoordinatorCounts()
        manager = ServiceManager()
        leader: Leader | None = None
        away = False
        fields = {"coordinator": config.name}
        heartbeat.start()
        sidecar.source = CoordinatorSource(config.name, counts, election, lambda: follower.away_since is not None)
        try:
            while not control.stop.is_set():
                changed_config = control.changed()
                if changed_config is not None:
                    config = changed_config
                    if leader is not None:
                        leader.configure(config)
                changed = follower.poll(TURN)
                heartbeat.turn()
                if membership.registered:
                    manager.ready()
                manager.alive()
                now = time.monotonic()
                if not election.is_leader(now):
                    if leader is not None:
                        log.warning("%s leads no more", config.name, extra=fields)
                        leader = None
                        counts.leads_no_more()
                    continue
                if leader is None or leader.term != election.term:
                    log.info("%s leads", config.name, extra=fields)
                    leader = Leader(config, paths, election, provider, counts, now)
                if follower.away_since is not None:
                    away = True
                    continue
                if away:
                    away = False
                    leader.outage_ended(now)
                try:
                    leader.step(now, follower, changed)
                except NotLeaderError:
                    log.warning("%s was not leader any more when it wrote", config.name, extra=fields)
                    leader = None
                    counts.leads_no_more()
                except StoreError as error:
                    log.warning("the plan cannot be written at present: %s", error)
        finally:
            manager.stopping()
            follower.close()
            heartbeat.stop()
            election.resign()
            membership.leave()
    finally:
        store.close()
