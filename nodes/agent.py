"""The agent of one host: a clock, the devices' engines, and a connection to each shard that any device works for.

One thread polls the shards' sockets and the workers, and does what the engines say. The store, signals and
so on live in other threads and hand their wishes over with :meth:`Agent.call`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import msgspec
import zmq

from cluster.filecache import DEFAULT_LIMIT
from cluster.telemetry import DEFAULT_LIMIT as TELEMETRY_LIMIT
from cluster.telemetry import ActionTelemetry
from laxity.credentials import Credentials
from laxity.keys import KeyFile, ServerKey, read_own_key
from laxity.loop import Calls, wait
from nodes.device import Device, DeviceConfig, DeviceCounts, DeviceLoad, Models
from nodes.emulated import EmulatedRunner
from nodes.engine.models import HELD, READY, Model
from nodes.measured import Known, Measured
from nodes.runner import WorkerRunner
from nodes.shard_link import LinkCounts, ShardLink, ShardSession

log = logging.getLogger("laxity.node")

STOP_WAIT: Final = 5.0
"""Seconds that a worker has to end by itself when the agent stops."""
MANY: Final = 64
"""From more models than these on a device, changes are told together."""
SHARDS_PAUSE: Final = 0.2
PEOPLE_PAUSE: Final = 0.5
"""Seconds that shards, and people, then wait for the next news."""
DRAIN_GRACE: Final = 1.0
"""Seconds, beside the SLO of what runs, that a stopping agent waits for its last batches and for the shards' word that
they count on it no more."""


class Work(msgspec.Struct, frozen=True):
    """What one device is to do: hold these models, and take batches from this shard ('' for none)."""

    shard: str = ""
    models: Models = {}


Placement = dict[int, Work]
"""By device number."""


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How an agent is set up."""

    name: str
    devices: list[DeviceConfig]
    heartbeat: float = 1.0
    """Seconds between heartbeats until a shard's WELCOME says another number."""
    seed: int = 0
    """Of the emulated devices' jitter."""
    cache: str = ""
    """The directory for the files of pipelines; '' for the user's own (see ``cluster/filecache.py``)."""
    cache_bytes: int = DEFAULT_LIMIT
    """Bytes of files in it at most."""
    telemetry: str = ""
    """The directory for a row of each action (see ``cluster/telemetry.py``); '' for none."""
    telemetry_bytes: int = TELEMETRY_LIMIT
    """Bytes of rows kept there at most."""
    drain_timeout: float = 10.0
    """Seconds that what runs has to end, at most, before an agent that was asked to leaves."""
    key: str = ""
    """The file of the agent's key; '' for none."""
    plain: bool = False
    """Whether shards on other hosts may be connected to without encryption."""


LIVE: Final = frozenset({"heartbeat", "telemetry", "telemetry_bytes", "drain_timeout", "cache_bytes"})
"""What :meth:`Agent.configure` changes while it runs (``cache_bytes``: whoever owns the cache)."""


class DeviceState(msgspec.Struct, frozen=True):
    """A device as people see it: the state of each model ('ready', 'failed: why', ...)."""

    number: int
    type: str
    memory_mb: float
    models: dict[str, str]
    progress: str
    batches: int
    late: int
    worker_restarts: int


class AgentCounts(msgspec.Struct, frozen=True):
    """What has become of an agent until now; ``shards``: those that it is connected to."""

    devices: list[DeviceCounts]
    shards: int
    reconnects: int
    heartbeats: int


class VersionRefused(Exception):
    """No shard is left that this agent can work for: it speaks another version of the protocol, or has a key that lets
    it in no more; trying again is no use."""


class Agent:
    """``run`` serves until ``stop``. Both hooks are called in the agent's thread: ``changed`` with the devices' states
    whenever one of them changed, ``measured`` with a model's key, the type of device and what was found out there
    about a model of which nothing was known, or something that does not hold any more."""

    def __init__(
        self,
        config: AgentConfig,
        changed: Callable[[list[DeviceState]], None],
        measured: Callable[[str, str, Measured], None] = lambda *_: None,
    ) -> None:
        """Raises :class:`~laxity.keys.InvalidKey` where the key's file holds no key of this agent."""
        self.config = config
        if config.key:
            read_own_key(config.key, "node", config.name)
        self._credentials = Credentials(config.key, config.plain)
        self._context: zmq.Context[Any] = zmq.Context()
        self._changed_hook = changed
        self._addresses: dict[str, str] = {}
        """The shards' last known addresses."""
        self._links: dict[str, ShardLink] = {}
        """By shard: those that devices work for, and those that have yet to get an answer."""
        self._owners: dict[int, ShardLink] = {}
        """By device: the shard that it works for."""
        self._link_counts = LinkCounts()
        self._known: Known = {}
        self._untold = False
        """Shards have to be told something."""
        self._tell_at = 0.0
        self._unpublished = False
        """People have to be told something."""
        self._publish_at = 0.0
        self._calls = Calls()
        self._stopping = False
        self._stop_at = 0.0
        self._stop_wait = STOP_WAIT
        self._poller = zmq.Poller()
        self._polled: list[tuple[Any, int]] = []
        self._telemetry = (
            ActionTelemetry(config.telemetry, config.name, config.telemetry_bytes) if config.telemetry else None
        )
        self._devices = [
            Device(
                number,
                device,
                self._runner(number, device),
                self._known,
                self._mark_changed,
                measured,
                self._telemetry,
            )
            for number, device in enumerate(config.devices)
        ]

    def _runner(self, number: int, device: DeviceConfig) -> EmulatedRunner | WorkerRunner:
        if device.kind == "emulated":
            return EmulatedRunner(device.type, device.memory_mb, self.config.seed * 1_000_003 + number)
        return WorkerRunner(self._context, device.kind, device.type, device.threads)

    # ---- from other threads --------------------------------------------------------------------

    def configure(self, config: AgentConfig) -> None:
        """Go on with these settings, of which those in :data:`LIVE` may be others than before. Waits for the agent's
        thread (from another thread only); RuntimeError once that has ended."""
        before = self.config
        rows = self._telemetry
        if (config.telemetry, config.telemetry_bytes) != (before.telemetry, before.telemetry_bytes):
            rows = ActionTelemetry(config.telemetry, config.name, config.telemetry_bytes) if config.telemetry else None
            if rows is not None:
                rows.start()

        def configure() -> ActionTelemetry | None:
            self.config = config
            previous, self._telemetry = self._telemetry, rows
            for device in self._devices:
                device.telemetry = rows
            return previous

        previous = self._calls.ask(configure)
        if previous is not None and previous is not rows:
            previous.stop()

    def call(self, function: Callable[[], None]) -> None:
        """Have ``function`` run in the agent's thread, soon; nothing once :meth:`run` has ended."""
        self._calls.add(function)

    @property
    def key(self) -> KeyFile | None:
        """Its own, as it is by now."""
        return self._credentials.key

    def renew_key(self) -> None:
        """Go on with the key that is in its file by now, over new connections, once all batches that were granted are
        answered. From another thread; raises :class:`~laxity.keys.InvalidKey`."""
        if self.config.key:
            read_own_key(self.config.key, "node", self.config.name)
            self._calls.add(self._renew_key)

    def _renew_key(self) -> bool:
        """Whether the key is another one now."""
        if not self._credentials.refresh():
            return False
        now = time.monotonic()
        for link in self._links.values():
            link.renew(now)
        return True

    def follow(self, shards: Mapping[str, str], keys: Iterable[ServerKey] = ()) -> None:
        """Where shards are (their backends), by name, and the keys of those that have any. One that is not named is
        taken to be where it was: whether it is there, its connection tells."""
        known = list(keys)

        def follow() -> None:
            for server in known:
                self._credentials.learn(server)
            self._addresses.update(shards)
            now = time.monotonic()
            for shard, link in self._links.items():
                if shard in shards:
                    link.connect(now, shards[shard])

        self.call(follow)

    def know(self, known: Known) -> None:
        """This was found out about models by other devices; what is held from now on is not measured again."""
        self.call(lambda: self._known.update(known))

    def place(self, placement: Placement) -> None:
        """Have the devices do this; those that are not named hold nothing and work for nobody."""

        def place() -> None:
            if not self._stopping:
                self._place(time.monotonic(), placement)

        self.call(place)

    def loads(self) -> list[DeviceLoad]:
        """How much the devices have executed until now, and what is resident. Waits for the agent's thread (from
        another thread only); RuntimeError once it has ended, TimeoutError where it does not answer."""
        return self._calls.ask(lambda: [device.load_now() for device in self._devices])

    def counts(self) -> AgentCounts:
        """Everything that is counted. As for :meth:`loads`."""
        return self._calls.ask(self._counts)

    def _counts(self) -> AgentCounts:
        return AgentCounts(
            [device.counts() for device in self._devices],
            sum(link.session is not None for link in self._links.values()),
            self._link_counts.reconnects,
            self._link_counts.heartbeats,
        )

    def stop(self, at_once: bool = False) -> None:
        """Take no more batches, finish those that run (for as long as anybody can wait for them, and ``drain_timeout``
        seconds at most), end the workers and leave :meth:`run`. ``at_once``: without waiting for anything."""

        def stop() -> None:
            now = time.monotonic()
            if not self._stopping:
                self._stopping = True
                longest = max((device.engine.drain_time() for device in self._devices), default=0.0)
                self._stop_at = now + min(longest + DRAIN_GRACE, self.config.drain_timeout)
                self._assign(now, {})
            if at_once:
                self._stop_at = now
                self._stop_wait = 0.0

        self.call(stop)

    # ---- the agent's thread ----------------------------------------------------------------------

    def run(self) -> None:
        """Serve until :meth:`stop`. Raises :class:`VersionRefused`."""
        if self._telemetry is not None:
            self._telemetry.start()
        try:
            self._serve()
        finally:
            self._calls.close()
            for link in self._links.values():
                link.close()
            for device in self._devices:
                device.runner.stop()
            stopped_by = time.monotonic() + self._stop_wait
            for device in self._devices:
                device.runner.close(max(stopped_by - time.monotonic(), 0.0))
            self._context.term()
            if self._telemetry is not None:
                self._telemetry.stop()

    def _serve(self) -> None:
        clock = time.monotonic
        while not self._stopping or (self._links and clock() < self._stop_at):
            self._wait(clock)
            for link in list(self._links.values()):
                link.receive(clock)
                link.keep_alive(clock())
                if link.closed:
                    del self._links[link.shard]
                elif link.refused:
                    self._check_refused(link.refused)
                elif link.locked_out:
                    link.locked_out = False
                    self._renew_key()
            self._calls.run()
            now = clock()
            for device in self._devices:
                if device.runner.waitables() or device.next_wake() <= now:
                    device.step(now)
            self._tell(now)

    def _wait(self, clock: Callable[[], float]) -> None:
        wake = self._stop_at if self._stopping else 1e18
        for link in self._links.values():
            wake = min(wake, link.next_wake())
        for device in self._devices:
            wake = min(wake, device.next_wake())
        if self._untold:
            wake = min(wake, self._tell_at)
        if self._unpublished:
            wake = min(wake, self._publish_at)
        seconds = wake - clock()
        poller = self._poller_now()
        if any(source == self._calls.fd for source, _ in wait(poller, seconds)):
            self._calls.clear_wakeups()

    def _poller_now(self) -> zmq.Poller:
        """What is to be polled at present; made anew only when that changes."""
        wanted: list[tuple[Any, int]] = [(self._calls.fd, zmq.POLLIN)]
        for link in self._links.values():
            if link.socket is not None:
                wanted.append((link.socket, link.events()))
            if link.monitor is not None:
                wanted.append((link.monitor, zmq.POLLIN))
        for device in self._devices:
            wanted += [(waitable, zmq.POLLIN) for waitable in device.runner.waitables()]
        if wanted != self._polled:
            self._polled = wanted
            self._poller = zmq.Poller()
            for waitable, events in wanted:
                self._poller.register(waitable, events)
        return self._poller

    def _check_refused(self, why: str) -> None:
        """Raise where no shard is left to work for; one that refuses must not end the work for the others, nor do all
        of them if it was a key that has a successor."""
        if all(link.refused for link in self._links.values()) and not self._renew_key():
            raise VersionRefused(why)

    # ---- who does what -----------------------------------------------------------------------------

    def _place(self, now: float, placement: Placement) -> None:
        nothing = Work()
        for device in self._devices:
            device.place(now, placement.get(device.number, nothing).models)
        self._assign(now, {number: work.shard for number, work in placement.items() if work.shard})
        self._mark_changed()

    def _assign(self, now: float, shards: dict[int, str]) -> None:
        """Have devices work for these shards, by device number, and the others for none. A shard learns of its devices
        before they pull, and goes on waiting for what they run when they are taken from it."""
        moved: list[Device] = []
        concerned: list[ShardLink] = []
        for device in self._devices:
            shard = shards.get(device.number, "")
            before = self._owners.get(device.number)
            if shard == (before.shard if before is not None else ""):
                continue
            moved.append(device)
            if before is not None:
                del before.devices[device.number]
                del self._owners[device.number]
                concerned.append(before)
            if shard:
                after = self._link(now, shard)
                after.devices[device.number] = device
                self._owners[device.number] = after
                concerned.append(after)
        for link in concerned:
            link.report()
        for device in moved:
            owner = self._owners.get(device.number)
            device.work_for(now, owner.working if owner is not None else None)

    def _link(self, now: float, shard: str) -> ShardLink:
        link = self._links.get(shard)
        if link is None:
            link = ShardLink(
                self._context,
                shard,
                self.config.name,
                self.config.heartbeat,
                self._owes,
                self._link_counts,
                self._credentials,
            )
            self._links[shard] = link
            address = self._addresses.get(shard)
            if address is not None:
                link.connect(now, address)
        return link

    def _owes(self, session: ShardSession) -> bool:
        return any(device.owes(session) for device in self._devices)

    # ---- what is held ------------------------------------------------------------------------------

    def _mark_changed(self) -> None:
        self._untold = self._unpublished = True

    def _tell(self, now: float) -> None:
        """Tell the shards, and people, of what has changed. That lists all models: where they are many, not each time
        that one of them comes or goes."""
        if self._untold and now >= self._tell_at:
            self._untold = False
            self._tell_at = now + SHARDS_PAUSE if self._many() else 0.0
            for link in self._links.values():
                link.report()
        if self._unpublished and now >= self._publish_at:
            self._unpublished = False
            self._publish_at = now + PEOPLE_PAUSE if self._many() else 0.0
            self._changed_hook(self.states())

    def _many(self) -> bool:
        return any(len(device.engine.models) > MANY for device in self._devices)

    def states(self) -> list[DeviceState]:
        """The devices as they are (in the agent's thread)."""
        return [
            DeviceState(
                number=device.number,
                type=device.config.type,
                memory_mb=device.config.memory_mb,
                models={model.key: _shown(model) for model in device.engine.models.values()},
                progress=device.progress,
                batches=device.batches_run,
                late=device.engine.late,
                worker_restarts=device.engine.health.deaths,
            )
            for device in self._devices
        ]


def _shown(model: Model) -> str:
    """A model's state for people: whether a model is resident at the moment is nothing to them."""
    if model.state in (READY, HELD):
        return READY
    return f"{model.state}: {model.detail}" if model.detail else model.state
