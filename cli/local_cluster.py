"""A cluster on this machine: its store, coordinators, shards and agents, from start to end."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec

from cli.children import LOG_BYTES, SHARD_GRACE, Child, Children, laxity, rotate
from cli.local_dashboard import LocalDashboard
from cli.local_keys import LocalKeys
from cli.local_setup import Loading, Setup
from cli.publish import files_at_addresses
from cli.rollout import Failures, is_served, models_loading, waits_for
from cli.rundir import RunDirectory
from cli.snapshot import Snapshot
from cluster.decoded import Decoded
from cluster.fixed_plan import divide
from cluster.keyring import KeyRefused
from cluster.membership import Follower
from cluster.records import Paths, PipelineRecord, PlacementRecord, ServingRecord, encode
from cluster.store import open_store
from cluster.store.base import Delete, Operation, Put, Store, StoreError
from cluster.store.etcd_members import EtcdMembers

TURN = 0.2
"""Seconds between two looks at the children and the signals."""
PASSED_ON = ("LAXITY_TRITON_URL", "LAXITY_LOG_FORMAT", "LAXITY_LOG_LEVEL")
"""What children take from the environment as well."""
LOGS = 1.0
"""Seconds between two looks at the size of the logs."""
ETCD_PATIENCE = 60.0
"""Seconds that the members of an etcd have to find one another."""
SPREAD = 10.0
"""Seconds that coordinators have to give out what GPUs are left, once everything is served."""
WRITES = 100
"""Operations in one transaction (etcd takes 128 unless told otherwise)."""


class ClusterError(Exception):
    """The cluster could not be started; the text says why and what to do."""


class Interrupted(Exception):
    """Somebody asked for the end while the cluster was still starting."""


class LocalCluster:
    """Use it as a context manager: however it is left, every process it started has ended.

    ``store_url`` is that of a store that is there already and stays; None for one of the cluster's own. ``say`` takes
    lines for people about processes that died and were started again. ``interrupted`` is asked several times a second;
    once it says True, waiting ends. Once ``hurried`` does, what is in flight is waited for no longer at the end.
    """

    def __init__(
        self,
        directory: RunDirectory,
        store_url: str | None,
        interrupted: Callable[[], bool],
        say: Callable[[str], None],
        hurried: Callable[[], bool] = lambda: False,
    ) -> None:
        self._directory = directory
        self._hurried = hurried
        self._own = store_url is None
        self._store_url = directory.default_store if store_url is None else store_url
        self._interrupted = interrupted
        self._paths = Paths(directory.cluster)
        self._say = say
        self._stores = Children(say)
        """What keeps the store: ends last, so that the others can take their records away."""
        self._children = Children(say)
        self._shards: dict[str, Child] = {}
        self._ending_first: list[Child] = []
        self._etcd: EtcdMembers | None = None
        self.dashboard: LocalDashboard | None = None
        """Once this was started, where there is to be one."""
        self._dashboard_started = False
        self._keys: LocalKeys | None = None
        self._written = False
        """Whether the store has what is this cluster's."""
        self._store: Store | None = None
        self._follower: Follower | None = None
        self._decoded = Decoded()
        self._setup = Setup(specs=[], layouts=[])

    def __enter__(self) -> Self:
        self._directory.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            # What is in flight needs the agents; nobody is to give them anything else to do meanwhile.
            self._children.end(SHARD_GRACE, self._ending_first, self._hurried)
            self._children.end(hurried=self._hurried)
            self._forget_shards()
        finally:
            if self._follower is not None:
                self._follower.close()
            if self._store is not None:
                self._store.close()
            self._stores.end(grace=0.0)  # they would hand over their leadership at length; their data goes anyway
            if self._etcd is not None:
                self._etcd.close()
            if self.dashboard is not None:
                self.dashboard.close()
            if self._own:
                self._directory.remove_stores()
            self._directory.remove_keys()
            self._directory.release()

    def start(self, setup: Setup, show: Callable[[Loading], None]) -> None:
        """Write what is to be served and start all processes, ``show`` being told how far it is.

        Raises :class:`ClusterError`, :class:`~cli.children.ChildDied`, StoreError and :class:`Interrupted`.
        """
        self._setup = setup
        for number in range(setup.shards):
            check_port(setup.port and setup.port + number)
        if setup.dashboard:
            try:
                self.dashboard = LocalDashboard(self._directory, setup.dashboard)
            except OSError as error:
                raise ClusterError(str(error)) from error
        if self._own:
            self._directory.remove_stores()
        self._directory.remove_keys()
        if setup.secure:
            try:
                agents = [layout.agent for layout in setup.layouts]
                self._keys = LocalKeys(self._directory, self._shard_names(), agents)
            except OSError as error:
                raise ClusterError(f"keys cannot be written: {error.strerror} ({error.filename})") from error
        if setup.etcd_members:
            self._start_etcd(setup.etcd_members, show)
        self._directory.note_store(self._store_url)
        self._store = open_store(self._store_url)
        self._write(self._store)
        for number in range(setup.coordinators):
            name = f"coordinator-{number}"
            rest = "--rest" if setup.rest else "--no-rest"
            self._ending_first.append(self._start(name, "coordinator", "run", "--name", name, rest))
        telemetry = ("--telemetry", setup.telemetry) if setup.telemetry else ()
        for number, shard in enumerate(self._shard_names()):
            frontend = f"tcp://127.0.0.1:{setup.port + number if setup.port else '*'}"
            addresses = ("--frontend", frontend, "--backend", "tcp://127.0.0.1:*")
            of_shard = (*addresses, *telemetry, *self._key_of(shard))
            self._shards[shard] = self._start(shard, "broker", "run", "--shard", shard, *of_shard)
            self._ending_first.append(self._shards[shard])
        for layout in setup.layouts:
            of_agent = ("--devices", layout.devices, *telemetry, *self._key_of(layout.agent))
            self._start(layout.agent, "node", "run", "--agent", layout.agent, *of_agent)
        self._follower = Follower(self._store, self._paths.root)

    def wait_ready(self, show: Callable[[Loading], None]) -> list[str]:
        """Wait until every pipeline is served and every model ready, ``show`` being told how far it is; the addresses
        for services.

        Raises :class:`ClusterError` for a model that cannot be loaded, :class:`~cli.children.ChildDied`, and
        :class:`Interrupted`.
        """
        assert self._follower is not None
        failures = Failures()
        spread_by = float("inf")
        while True:
            self._check()
            self._follower.poll(TURN)
            now = time.monotonic()
            seen = self._seen()
            loading = self._loading(seen)
            complete = loading.done
            idle = self._idle(seen) if complete else 0
            if idle:
                spread_by = min(spread_by, now + SPREAD)
                loading = msgspec.structs.replace(loading, waits=f"{idle} devices are to hold models as well")
            show(loading)
            if self._setup.coordinators:
                failed = failures.lasting(now, loading.models)
            else:
                failed = next((model for model in loading.models if model.failed is not None), None)
            if failed is not None:
                logs = f"The agents' logs: {self._directory.logs}"
                raise ClusterError(f"{failed.model} could not be loaded {failed.failed}\n{logs}")
            if loading.done or (complete and now > spread_by):
                self._pin_addresses(seen)
                return loading.frontends

    def serve(self) -> None:
        """Start again what dies, until interrupted."""
        logs_at = time.monotonic()
        while not self._interrupted():
            self._stores.revive()
            self._children.revive()
            if time.monotonic() >= logs_at:
                logs_at = time.monotonic() + LOGS
                self._stores.rotate_logs()
                self._children.rotate_logs()
                rotate(self._log("up"), LOG_BYTES)
            self._rest()

    def _rest(self) -> None:
        """A turn's time, or less where somebody asks for the dashboard for the first time."""
        if self.dashboard is None or self._dashboard_started:
            time.sleep(TURN)
        elif self.dashboard.asked_for(TURN):
            self._dashboard_started = True
            command = self.dashboard.command(self._store_url, self._directory.cluster)
            log = self._log("dashboard")
            self._children.add(Child("dashboard", command, log, _environment(), self.dashboard.inherited))

    # ---- starting --------------------------------------------------------------------------

    def _start_etcd(self, members: int, show: Callable[[Loading], None]) -> None:
        self._etcd = EtcdMembers(self._directory.etcd, members)
        self._store_url = self._etcd.url
        for name, command in self._etcd.commands():
            self._stores.add(Child(name, command, self._log(name), os.environ))
        ends = time.monotonic() + ETCD_PATIENCE
        while True:
            show(Loading({"etcd": f"{members} members are starting"}))
            self._check()
            try:
                self._etcd.wait_healthy(TURN)
                return
            except StoreError as error:
                if time.monotonic() > ends:
                    raise ClusterError(f"{error}\nIts log and the others': {self._directory.logs}") from error

    def _forget_shards(self) -> None:
        """Take away what says that the shards may be back in a moment, where the store stays: the next `up` would take
        them for running. And the keys, whose files go."""
        if self._own or self._store is None or not self._written:
            return
        if self._keys is not None:
            why = self._keys.forget(self._store)
            if why:
                self._say(f"this cluster's keys could not be taken out of the store ({why}); nobody has their secrets")
        try:
            for shard in self._shards:
                self._store.delete(self._paths.broker(shard))
        except StoreError as error:
            self._say(f"the shards' records could not be taken away ({error}); they vanish within seconds")

    def _shard_names(self) -> list[str]:
        return [f"shard-{number}" for number in range(self._setup.shards)]

    def _write(self, store: Store) -> None:
        """What is to be served, in place of what an earlier run left; without coordinators the whole plan as well."""
        present = store.list(self._paths.root).entries
        alive = (self._paths.brokers, self._paths.nodes, self._paths.coordinators, self._paths.leader)
        for entry in present:
            if entry.key.startswith(alive):
                raise ClusterError(
                    f"the store {self._store_url} already has a running cluster {self._directory.cluster!r} "
                    f"({entry.key}); end that one first, or take another name with --cluster"
                )
        if self._keys is not None:
            try:
                self._keys.check_taken(present)
            except KeyRefused as error:
                raise ClusterError(str(error)) from error
        files = {spec.name: files_at_addresses(spec, self._say) for spec in self._setup.specs}
        wanted: dict[str, bytes] = {
            self._paths.pipeline(spec.name): encode(PipelineRecord(spec.version, spec, files[spec.name]))
            for spec in self._setup.specs
        }
        if not self._setup.coordinators:
            plan = divide(self._setup.layouts, self._shard_names())
            for spec in self._setup.specs:
                serving = ServingRecord(spec.version, spec, plan.parts[spec.name], files[spec.name])
                wanted[self._paths.served(spec.name)] = encode(serving)
            for agent, devices in plan.placement.items():
                wanted[self._paths.placement(agent)] = encode(PlacementRecord(devices))
        if self._keys is not None:
            wanted |= self._keys.records
        gone = [
            entry.key for entry in present if entry.key not in wanted and not entry.key.startswith(self._paths.keys)
        ]
        operations: list[Operation] = [Delete(key) for key in gone]  # keys are people's, and stay
        operations += [Put(key, value) for key, value in wanted.items()]
        for first in range(0, len(operations), WRITES):
            store.transaction([], operations[first : first + WRITES])
        self._written = True

    def _start(self, name: str, *command: str) -> Child:
        arguments = [*command, "--store", self._store_url, "--cluster", self._directory.cluster]
        return self._children.add(Child(name, laxity(*arguments), self._log(name), _environment()))

    def _key_of(self, name: str) -> tuple[str, ...]:
        return ("--key", str(self._keys.file(name))) if self._keys is not None else ()

    def _log(self, name: str) -> Path:
        return self._directory.logs / f"{name}.log"

    # ---- waiting ---------------------------------------------------------------------------

    def _check(self) -> None:
        if self._interrupted():
            raise Interrupted
        self._stores.check_alive()
        self._children.check_alive()

    def _seen(self) -> Snapshot:
        assert self._follower is not None
        self._decoded.update(self._follower.entries)
        return Snapshot(self._paths, self._decoded)

    def _loading(self, seen: Snapshot) -> Loading:
        setup = self._setup
        parts: dict[str, str] = {}
        if setup.etcd_members:
            parts["etcd"] = f"{setup.etcd_members} members are ready"
        if setup.coordinators:
            parts["coordinators"] = f"{seen.leader.coordinator} leads" if seen.leader else "waiting for one to lead"
        frontends = []
        for shard in self._shard_names():
            registered = seen.brokers.get(shard)
            parts[shard] = f"services at {registered.frontend}" if registered else "starting"
            frontends += [registered.frontend] if registered else []
        missing = [layout.agent for layout in setup.layouts if layout.agent not in seen.nodes]
        parts["agents"] = f"waiting for {', '.join(missing)}" if missing else f"{len(setup.layouts)} are here"
        models = [model for spec in setup.specs for model in models_loading(seen, spec)]
        waits = ""
        led = seen.leader is not None or not setup.coordinators
        complete = len(frontends) == setup.shards and not missing and led
        unserved = [spec for spec in setup.specs if not is_served(seen, spec)]
        if unserved and complete and setup.coordinators:
            waits = f"{unserved[0].name}: {waits_for(seen, unserved[0])}"
        return Loading(parts, models, waits, frontends if complete else [], not unserved)

    def _idle(self, seen: Snapshot) -> int:
        """How many devices hold nothing that coordinators are to have hold something."""
        if not self._setup.coordinators or self._setup.rest or not self._setup.specs:
            return 0
        devices = sum(len(node.devices) for node in seen.nodes.values())
        placed = sum(bool(held.models) for record in seen.placements.values() for held in record.devices.values())
        return devices - placed

    def _pin_addresses(self, seen: Snapshot) -> None:
        """A shard that is started again must be where services and agents look for it."""
        for shard, child in self._shards.items():
            record = seen.brokers[shard]
            child.command[child.command.index("--frontend") + 1] = record.frontend
            child.command[child.command.index("--backend") + 1] = record.backend
        if self._keys is not None:
            try:
                self._keys.tell_addresses({shard: seen.brokers[shard].frontend for shard in self._shards})
            except OSError as error:
                raise ClusterError(f"keys cannot be written: {error.strerror} ({error.filename})") from error


def _environment() -> dict[str, str]:
    """What children are started in: their options are given to them, whatever a person has set for other clusters.
    Where models find their server is no option of theirs, and how they log is the same in every cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LAXITY_") or name in PASSED_ON}


def check_port(port: int) -> None:
    """Raise :class:`ClusterError` where ``port`` cannot be bound on the loopback (0 always can)."""
    if port > 65535:
        raise ClusterError(f"port {port} is too high: with several shards, --port and those after it are taken")
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
