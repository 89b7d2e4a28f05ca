"""A shard as a process: it registers itself in the store and serves the pipelines that it finds there."""

from __future__ import annotations

import gc
import logging
import os
import resource
import socket
import threading
import time

from broker.files import files_in_store
from broker.reporting import reporter
from broker.routing import RoutingFollower
from broker.shell import Shard, ShardConfig
from cluster.addresses import advertised
from cluster.control import Control
from cluster.decoded import Decoded
from cluster.membership import Follower, Membership
from cluster.observe.sidecar import Sidecar
from cluster.records import BrokerRecord, KeyRecord, Paths, ServingRecord, TuningRecord, encode
from cluster.sd_notify import ServiceManager
from cluster.serving import serving
from cluster.store import wait_for_store
from laxity.keys import KeyFile, read_own_key
from laxity.version import __version__
from pipelines.policies import PolicyError

log = logging.getLogger("laxity.broker")

TURN = 0.2
"""Seconds between two looks at the lease, the counters and the signals."""
RESTART = 2.0
"""Seconds that a shard which left in good order may be away before its devices are given to others: started again it
finds what it had."""
OTHER_FILES = 500
"""Files that a shard may have open beside its connections."""
COUNTERS = 1.0
"""Seconds between two publications of the counters."""


class PipelineFollower:
    """Applies to a shard what changes among the pipelines in the store."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._served: dict[str, str] = {}
        """Version by pipeline name."""

    def update(self, served: dict[str, ServingRecord]) -> None:
        """``served``: the records of what is served, by name."""
        for name, record in served.items():
            if self._served.get(name) == record.version:
                continue
            self._served[name] = record.version
            try:
                self._shard.apply(record.spec)
            except PolicyError as error:
                # Another release may have written it; what runs goes on.
                log.error(
                    "pipeline %s version %s cannot be served here: %s",
                    name,
                    record.version,
                    error,
                    extra={"pipeline": name},
                )
            else:
                log.info("serving pipeline %s version %s", name, record.version, extra={"pipeline": name})
        for name in [name for name in self._served if name not in served]:
            self._shard.delete(name)
            del self._served[name]
            log.info("no longer serving pipeline %s", name, extra={"pipeline": name})


class TuningFollower:
    """Tells a shard what the leader found to be right for the pipelines, each time it is written: also what is written
    again as it was, which says that it still holds."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._told: dict[str, TuningRecord] = {}

    def update(self, tuning: dict[str, TuningRecord]) -> None:
        """``tuning``: the records by pipeline name, each the same object until it is written again."""
        for name, record in tuning.items():
            if self._told.get(name) is not record:
                self._shard.tune(name, record)
        self._told = dict(tuning)


class OwnKeyRevoked(RuntimeError):
    """This shard is to be one no more. It ends: while its record stood in the store, devices and requests would be
    given to it that do not come."""


class KeyFollower:
    """Tells a shard whose keys are in the store, and the log what is wrong with the shard's own."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._admitted: dict[str, KeyRecord] | None = None
        self._said = ""

    def update(self, records: dict[str, KeyRecord], now: float) -> None:
        """``records``: all of them, by name; ``now`` in Unix seconds. Raises :class:`OwnKeyRevoked`."""
        if records != self._admitted:
            self._admitted = records
            self._shard.admit(records)
        key = self._shard.key
        if key is not None and key.name in records and records[key.name].revoked:
            raise OwnKeyRevoked(f"the key of shard {key.name!r} was revoked, so that nobody comes here any more")
        wrong = own_key_trouble(key, records.get(key.name), now) if key is not None else ""
        if wrong and wrong != self._said:
            log.warning("%s", wrong)
        self._said = wrong


def own_key_trouble(key: KeyFile, record: KeyRecord | None, now: float) -> str:
    """Why peers will not come to a shard with this key, or soon will not, as its record in the store stands; ''."""
    if record is None or record.role != "shard":
        return f"the store has no key of a shard {key.name!r}: nobody comes here who looks for one there"
    if key.public not in record.good(now):
        return (
            f"the key of shard {key.name!r} was replaced: nobody comes here until it is started again with its new one"
        )
    if key.public != record.publics[0].public:
        return f"the key of shard {key.name!r} was replaced: start it again, so that it takes the new one"
    return ""


def spare_collector() -> None:
    """Have Python look for reference cycles seldom: requests in flight are many, long-lived for its taste, and make
    none, yet with tens of thousands of them each full collection would hold up every grant for tens of ms."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def make_room(connections: int) -> None:
    """Have this process hold so many connections of services, and of agents, if the system lets it."""
    needed = 2 * connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    may = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < may:
        resource.setrlimit(resource.RLIMIT_NOFILE, (may, hard))
    if may < needed:
        log.warning(
            "%d open files are allowed, too few for %d connections of services and as many of agents: raise the limit "
            "(LimitNOFILE, ulimit -n) or lower --max-connections",
            may,
            connections,
        )


def run_shard_process(
    config: ShardConfig, store_url: str, cluster: str, control: Control[ShardConfig], sidecar: Sidecar
) -> None:
    """Serve until ``control`` says stop, then drain, as the only business of this process, which ``sidecar`` tells of.

    Raises StoreError, RecordError, AddressInUse, OSError or ValueError (a key that it cannot have, or none where it
    needs one) where it cannot begin, and RuntimeError where the shard's thread ended by itself or its key was revoked.
    """
    spare_collector()
    store = wait_for_store(store_url, control.stop)
    if store is None:
        return
    try:
        paths = Paths(cluster)
        membership = Membership(store, paths.broker(config.name))
        follower = Follower(store, (paths.serving, paths.pipelines, paths.brokers, paths.tuning, paths.keys))
        make_room(config.max_connections)
        if config.key:
            read_own_key(config.key, "shard", config.name, cluster)
        shard = Shard(config)
        sidecar.source = shard.source
        pipelines = PipelineFollower(shard)
        tuning = TuningFollower(shard)
        keys = KeyFollower(shard)
        reports = reporter(shard.report, store, paths.report(config.name), membership)
        routing = RoutingFollower()
        decoded = Decoded()
        manager = ServiceManager()
        log.info("shard %s: services at %s, agents at %s", config.name, shard.frontend, shard.backend)
        try:
            ended = threading.Event()
            with serving("shard", shard.run, shard.stop, ended):
                reports.start()
                counted_at = float("-inf")
                while not ended.is_set():
                    if control.stop.is_set():
                        # What is in flight ends meanwhile; routes and records are followed on.
                        manager.stopping()
                        shard.drain()
                        if ended.wait(TURN) or control.at_once.is_set():
                            break
                    changed = control.changed()
                    if changed is not None and not control.stop.is_set():  # a thread that leaves may not answer
                        shard.configure(changed)
                    if follower.poll(0.0 if shard.draining else TURN):
                        entries = follower.entries
                        decoded.update(entries)
                        served = decoded.under(ServingRecord, paths.serving)
                        # In this order: who is told that this shard serves a pipeline must find it here.
                        pipelines.update(served)
                        tuning.update(decoded.under(TuningRecord, paths.tuning))
                        records, unix = decoded.under(KeyRecord, paths.keys), time.time()
                        keys.update(records, unix)
                        brokers = decoded.under(BrokerRecord, paths.brokers)
                        table = routing.update(served, brokers, follower.revision, records, unix)
                        shard.route(table)
                        shard.keep_files(*files_in_store(entries, paths, config.name), table.servers())
                    now = time.monotonic()
                    if now >= counted_at + COUNTERS and not control.stop.is_set():
                        counted_at = now
                        membership.publish(encode(_record(shard, sidecar.address)))
                        manager.alive()  # the shard's thread has answered
                    membership.beat(now)
                    if membership.registered:
                        manager.ready()
        finally:
            reports.stop()
            follower.close()
            membership.leave(RESTART)
    finally:
        store.close()


def _record(shard: Shard, http: str) -> BrokerRecord:
    status = shard.status()
    host = shard.config.advertise
    return BrokerRecord(
        frontend=advertised(shard.frontend, host),
        backend=advertised(shard.backend, host),
        pid=os.getpid(),
        host=socket.gethostname(),
        counters={"submitted": status.submitted, "in_flight": status.in_flight, **status.ended},
        release=__version__,
        http=http,
        public=shard.key.public if shard.key is not None else "",
    )
