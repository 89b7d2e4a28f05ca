"""The engine of one device: which batch runs when, and which must not run any more.

A worker decides nothing by itself (Clockwork, OSDI'20, section 4): a batch comes with a window, is started inside it or
refused, one at a time. The next batch is pulled just in time: the pull is sent so early that its grant
arrives as the running batch ends; at most one batch runs and one waits.

``now`` is in seconds on the agent's monotonic clock. Every method may add actions; the shell takes them with
``take_actions`` and calls ``tick`` at ``next_wake``.
"""

from typing import Final

from nodes.engine.actions import Action, Announce, KillWorker, Load, Refuse, SendPull, Start, StartWorker, Unload

LEAD: Final = 0.002
"""Seconds, beside the measured round trip, by which a pull goes ahead of the running batch's end."""
MAX_TRIP: Final = 0.1
"""Seconds that a round trip is taken to be at most: a grant that lay in a frozen socket says nothing of the next."""
HANG_FACTOR: Final = 10.0
HANG_GRACE: Final = 1.0
"""A batch hangs that runs HANG_GRACE seconds longer than its pipeline's SLO and than HANG_FACTOR times what was
expected: nobody waits for it any more. Its worker is killed."""
BACK_OFF: Final = 0.25
MAX_BACK_OFF: Final = 30.0
"""A worker that dies is started again after BACK_OFF seconds, doubled each time up to MAX_BACK_OFF."""
MAX_LOAD_DEATHS: Final = 3
"""A model under whose load the worker died this often is given up."""

QUEUED: Final = "queued"
LOADING: Final = "loading"
READY: Final = "ready"
FAILED: Final = "failed"


class Grant:
    """A batch for this device, to be started no earlier than ``earliest`` and no later than ``latest``."""

    def __init__(
        self, batch: int, model: str, earliest: float, latest: float, expected: float, slo: float, came: float
    ) -> None:
        self.batch = batch
        self.model = model
        self.earliest = earliest
        self.latest = latest
        self.expected = expected
        self.came = came
        self.started = 0.0
        self.overran = False
        """It runs so long that the next batch had to be refused."""
        self.slo = slo

    def hangs_at(self) -> float:
        """From when on it is taken to hang, once started."""
        return self.started + max(HANG_FACTOR * self.expected, self.slo) + HANG_GRACE


class Model:
    """A model that the device should hold; ``state`` is one of queued, loading, ready and failed."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.state = QUEUED
        self.detail = ""
        self.profile: list[tuple[int, float]] = []
        self.deaths = 0


class DeviceEngine:
    """See the module's text."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        """What it is to hold, by key."""
        self.leaving: dict[str, Model] = {}
        """What it still holds, without running it, until what is to come has been loaded."""
        self.running: Grant | None = None
        self.waiting: Grant | None = None
        self.worker_up = False
        self.connected = False
        self.round_trip = 0.0
        """Seconds between a pull and its grant, less what the shard held it for; a moving mean."""
        self.restarts = 0
        self.late = 0
        """Batches refused because their window had closed."""
        self._starting = False
        self._pulled = False
        self._seq = 0
        self._loading: Model | None = None
        self._deaths = 0
        self._start_at = 0.0
        self._killed_for = ""
        self._actions: list[Action] = []

    def take_actions(self) -> list[Action]:
        """What is to be done, in order."""
        actions = self._actions
        if actions:
            self._actions = []
        return actions

    def next_wake(self) -> float:
        """When ``tick`` has something to do if nothing happens before."""
        wake = 1e18
        if not self.worker_up and not self._starting and self.models:
            wake = self._start_at
        running = self.running
        if running is not None and not self._killed_for:
            wake = min(wake, running.hangs_at())
            if self._wants_pull():
                wake = min(wake, self._pull_time(running))
        waiting = self.waiting
        if waiting is not None:
            wake = min(wake, waiting.latest if self._busy() else waiting.earliest)
        return wake

    def tick(self, now: float) -> None:
        """Do what is due."""
        if not self.worker_up and not self._starting and self.models and now >= self._start_at:
            self._starting = True
            self._actions.append(StartWorker())
        running = self.running
        if running is not None and not self._killed_for and now >= running.hangs_at():
            ran, expected = now - running.started, running.expected * 1e3
            self._killed_for = f"the model {running.model} hung: {ran:.1f} s where {expected:.0f} ms were expected"
            self._actions.append(KillWorker())
        self._advance(now)

    # ---- the shard -------------------------------------------------------------------------

    def session(self, now: float, connected: bool) -> None:
        """From now on the device works for another shard, or over a new connection to the one it had (or for none):
        pulls are void, and the batch that waits is refused. The one that runs goes on to its end."""
        self.connected = connected
        self._pulled = False
        self._refuse_waiting("the device works for this shard no more")
        self._advance(now)

    def grant(
        self,
        now: float,
        batch: int,
        seq: int,
        model: str,
        left_at: float,
        opens: float,
        closes: float,
        expected: float,
        slo: float,
    ) -> None:
        """A batch came. ``left_at`` is the earliest moment at which it can have left the shard on this clock (the
        pull's stamp and how long it dwelt there); the window counts from there, so that a grant that lay in a
        frozen socket is as old as it is."""
        if seq == self._seq:
            self._pulled = False
            trip = min(now - left_at, MAX_TRIP)
            self.round_trip += 0.2 * (trip - self.round_trip) if self.round_trip else trip
        grant = Grant(batch, model, left_at + opens, left_at + closes, expected, slo, now)
        known = self.models.get(model)
        if known is None or known.state != READY:
            self._refuse(batch, "unknown_model", f"the model {model} is not loaded on this device")
        elif self._loading is not None:
            # Loading takes longer than batches wait, and other devices may be free.
            self._refuse(batch, "unknown_model", f"the device is loading the model {self._loading.key}")
        elif self.waiting is not None:
            self._refuse(batch, "too_late", "another batch is waiting for this device already")
        else:
            self.waiting = grant
        self._advance(now)

    # ---- the worker ------------------------------------------------------------------------

    def worker_started(self, now: float) -> None:
        """The worker process is there and takes commands."""
        self._starting = False
        self.worker_up = True
        self._advance(now)

    def finished(self, now: float, batch: int) -> bool:
        """A batch's run ended, well or not; whether it was this device's."""
        running = self.running
        if running is None or running.batch != batch:
            return False
        self.running = None
        self._deaths = 0
        self._advance(now)
        return True

    def worker_died(self, now: float, why: str) -> str:
        """The worker process ended: what it ran is lost, what it held must be loaded again. Why it really was, where
        it had to be killed."""
        if self._killed_for:
            why = self._killed_for
            self._killed_for = ""
        self.worker_up = False
        self._starting = False
        self.restarts += 1
        self._deaths += 1
        self._start_at = now + min(BACK_OFF * 2.0 ** min(self._deaths - 1, 20), MAX_BACK_OFF)
        running = self.running
        self.running = None
        if running is not None:
            self._refuse(running.batch, "worker_died", why)
        self._refuse_waiting("the worker died before the batch could start")
        self.leaving.clear()
        loading = self._loading
        self._loading = None
        if loading is not None:
            loading.deaths += 1
            loading.detail = f"the worker died while it loaded: {why}"
            loading.state = FAILED if loading.deaths >= MAX_LOAD_DEATHS else QUEUED
        for model in self.models.values():
            if model.state == READY:
                model.state = QUEUED
        self._actions.append(Announce())
        return why

    # ---- models ----------------------------------------------------------------------------

    def place(self, now: float, keys: list[str], unload_first: bool = False) -> None:
        """Hold exactly these models. What is held and not among them takes no more batches from now on, and is let go
        of once all that is missing has been loaded or has failed; before that with ``unload_first``, for a device
        that has no room for both."""
        wanted = set(keys)
        waiting = self.waiting
        if waiting is not None and waiting.model not in wanted:
            self._refuse_waiting(f"the model {waiting.model} was taken off this device")
        gone = [key for key in self.models if key not in wanted]
        changed = bool(gone)
        for key in gone:
            model = self.models.pop(key)
            if model.state == READY:
                self.leaving[key] = model
        if gone:
            for model in self.models.values():
                if model.state == FAILED:
                    model.state = QUEUED  # room may have been what it lacked
        for key in keys:
            if key in self.leaving:
                changed = True
                self.models[key] = self.leaving.pop(key)
            elif key not in self.models:
                self.models[key] = Model(key)
        if unload_first:
            self._unload_leaving()
        if changed:
            self._actions.append(Announce())
        self._advance(now)

    def loaded(self, now: float, key: str, profile: list[tuple[int, float]]) -> None:
        """A model is loaded and warm; ``profile`` has its measured (batch, seconds) pairs."""
        model = self._end_load(key)
        if model is not None:
            model.state = READY
            model.profile = profile
            model.detail = ""
            model.deaths = 0
            self._actions.append(Announce())
        elif self.worker_up and key not in self.models:
            self._actions.append(Unload(key))
        self._advance(now)

    def load_failed(self, now: float, key: str, detail: str) -> None:
        """A model could not be loaded. It is tried again once what is to go has made room, and then not until it is
        placed anew or another model is taken away."""
        model = self._end_load(key)
        if model is not None:
            if self.leaving:
                self._unload_leaving()
                model.state = QUEUED
            else:
                model.state = FAILED
                model.detail = detail
                self._actions.append(Announce())
        self._advance(now)

    def _end_load(self, key: str) -> Model | None:
        loading = self._loading
        if loading is not None and loading.key == key:
            self._loading = None
        return self.models.get(key)

    # ---- inside ----------------------------------------------------------------------------

    def _refuse(self, batch: int, code: str, detail: str) -> None:
        if code == "too_late":
            self.late += 1
        self._actions.append(Refuse(batch, code, detail))

    def _refuse_waiting(self, why: str) -> None:
        waiting = self.waiting
        if waiting is not None:
            self.waiting = None
            self._refuse(waiting.batch, "unknown_model", why)

    def _unload_leaving(self) -> None:
        for key in self.leaving:
            self._actions.append(Unload(key))
        self.leaving.clear()

    def _advance(self, now: float) -> None:
        """Load what is missing, start what waits, pull the next."""
        if not self.worker_up:
            return
        if self.leaving and not self._awaits_load():
            self._unload_leaving()
        waiting = self.waiting
        if waiting is not None:
            busy = self._busy()
            if now > waiting.latest or (busy and now == waiting.latest):
                self.waiting = None
                self._refuse(waiting.batch, "too_late", self._why_late(now, waiting))
                running = self.running
                if running is not None and now >= running.started + running.expected:
                    running.overran = True
            elif not busy and now >= waiting.earliest:
                self.waiting = None
                waiting.started = now
                self.running = waiting
                self._actions.append(Start(waiting.batch))
        if self.waiting is None and not self._busy():
            for model in self.models.values():
                if model.state == QUEUED:
                    model.state = LOADING
                    self._loading = model
                    self._actions.append(Load(model.key))
                    break
        if self._wants_pull():
            running = self.running
            if running is None:
                self._pull(0.0)
            elif now >= self._pull_time(running):
                self._pull(max(running.started + running.expected - now, 0.0))

    def _awaits_load(self) -> bool:
        return any(model.state == QUEUED or model.state == LOADING for model in self.models.values())

    def _busy(self) -> bool:
        """Whether no batch can be started now."""
        return self.running is not None or self._loading is not None or self._killed_for != ""

    def _why_late(self, now: float, waiting: Grant) -> str:
        if now > waiting.came:
            return "the window closed before the device was free"
        return f"the window had closed {(now - waiting.latest) * 1e3:.1f} ms before the batch came"

    def _wants_pull(self) -> bool:
        if self._pulled or not self.connected or not self.worker_up or self.waiting is not None:
            return False
        if self._killed_for or self._loading is not None:
            return False
        if self.running is not None and self.running.overran:
            return False
        ready = False
        for model in self.models.values():
            if model.state == QUEUED:
                return False
            if model.state == READY:
                ready = True
        return ready

    def _pull_time(self, running: Grant) -> float:
        return running.started + running.expected - LEAD - self.round_trip

    def _pull(self, free_in: float) -> None:
        self._pulled = True
        self._seq += 1
        self._actions.append(SendPull(self._seq, free_in))
