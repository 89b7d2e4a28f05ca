"""The engine of one device: what its worker is handed, and what it is not.

A worker decides nothing by itself (Clockwork, OSDI'20, section 4): batches, LOADs and UNLOADs come with windows. What
is accepted is handed to the worker at once, and begins inside its window or not at all
(:class:`~nodes.engine.lanes.Lanes` sees to that beside the device). The next batch is pulled just in time, so early
that its input is there as the running batch ends: at most one batch executes, one waits, and the output of one is
fetched. The device's models and its memory are :mod:`nodes.engine.paging`'s part.

``now`` is in seconds on the agent's monotonic clock. Every method may add actions; the shell takes them with
``take_actions`` and calls ``tick`` at ``next_wake``.
"""

from collections.abc import Sequence

from nodes.engine.actions import Action, Drop, Infer, KillWorker, Refuse, SendPull, StartWorker
from nodes.engine.handed import Handed
from nodes.engine.health import Health
from nodes.engine.lanes import MAX_BATCHES
from nodes.engine.models import READY, Model
from nodes.engine.paging import HOLD_SILENCE, Paging
from nodes.engine.pulls import Pulls


class DeviceEngine:
    """See the module's text."""

    def __init__(self, budget: float = 0.0) -> None:
        """``budget``: megabytes that models may take of the device's memory; 0 where there is room for all."""
        self._actions: list[Action] = []
        self.paging = Paging(budget, self._actions)
        self.models = self.paging.models.wanted
        """What it is to hold, by key."""
        self.handed: dict[int, Handed] = {}
        """The batches that the worker has, by number."""
        self.running: Handed | None = None
        """The one that began last, until it is answered."""
        self.waiting: Handed | None = None
        """The one that has not begun."""
        self.copying: Handed | None = None
        """One that is answered, and whose inputs are still under way: those of others wait for them."""
        self.pulls = Pulls()
        self.health = Health()
        self.worker_up = False
        self.connected = False
        self.late = 0
        """Batches refused because their window had closed."""
        self._starting = False
        self._free_at = 0.0
        """When the worker last ended something."""
        self._copying_until = 0.0
        """From when on ``copying`` is taken to hang."""
        self._killed_for = ""
        self._guilty: set[int] = set()
        """The batches for which it is being killed."""
        self._guilty_models: list[Model] = []
        """The models for whose load it is."""

    def take_actions(self) -> list[Action]:
        """What is to be done, in order."""
        actions = self._actions.copy()
        self._actions.clear()
        return actions

    def next_wake(self) -> float:
        """When ``tick`` has something to do if nothing happens before."""
        wake = 1e18
        if not self.worker_up:
            return self.health.start_at if self.models and not self._starting else wake
        if self._killed_for:
            return wake
        for handed in self.handed.values():
            wake = min(wake, handed.hangs_at(self._free_for(handed)))
        for page in self.paging.pages.values():
            wake = min(wake, page.hangs_at())
        wake = min(wake, self.paging.hold_hangs_at())
        if self.copying is not None:
            wake = min(wake, self._copying_until)
        running = self.running
        if running is not None and self._wants_pull():
            wake = min(wake, self.pulls.time(running.free_at()))
        return wake

    def tick(self, now: float) -> None:
        """Do what is due."""
        if not self.worker_up:
            if self.models and not self._starting and now >= self.health.start_at:
                self._starting = True
                self._actions.append(StartWorker())
            return
        if not self._killed_for:
            self._look_for_hangs(now)
        self._advance(now)

    def drain_time(self) -> float:
        """Seconds that anybody waits for what the worker has, at most."""
        return max([handed.slo for handed in self.handed.values()], default=0.0)

    # ---- the shard -------------------------------------------------------------------------

    def session(self, now: float, connected: bool) -> None:
        """From now on the device works for another shard, or over a new connection to the one it had (or for none):
        pulls are void, and the batch that waits is taken back. The one that runs goes on to its end."""
        self.connected = connected
        self.pulls.open = False
        self._drop_waiting()
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
        self.pulls.answered(now, seq, left_at)
        known = self.models.get(model)
        latest = left_at + closes
        holding = self.paging.holding
        if known is None:
            self._refuse(batch, "unknown_model", f"the model {model} is not this device's")
        elif known.state != READY:
            self._refuse(batch, "not_loaded", f"the model {model} is not in the device's memory: it is {known.state}")
        elif self._killed_for:
            self._refuse(batch, "busy", "the device's worker is being killed")
        elif holding is not None:
            # Loading takes longer than batches wait, and other devices may be free.
            self._refuse(batch, "busy", f"the device is loading the model {holding.key}")
        elif self.waiting is not None:
            self._refuse(batch, "busy", "another batch is waiting for this device already")
        elif len(self.handed) >= MAX_BATCHES:
            self._refuse(batch, "busy", f"the device has {MAX_BATCHES} batches")
        elif now > latest:
            self._refuse(batch, "too_late", f"the window had closed {(now - latest) * 1e3:.1f} ms before it came")
            self._note_late(now)
        else:
            known.batches += 1
            known.used_at = now
            handed = Handed(batch, known, left_at + opens, latest, expected, slo, now)
            self.handed[batch] = handed
            self.waiting = handed
            self._actions.append(Infer(batch, handed.earliest, latest))
        self._advance(now)

    def load(self, now: float, key: str, left_at: float, opens: float, closes: float, expected: float) -> int:
        """The shard wants a model in the device's memory; the window as in :meth:`grant`. The LOAD's number, by which
        it is answered."""
        return self._page(now, key, left_at + opens, left_at + closes, expected, True)

    def unload(self, now: float, key: str, left_at: float, opens: float, closes: float) -> int:
        """The shard wants a model out of the device's memory. The UNLOAD's number."""
        return self._page(now, key, left_at + opens, left_at + closes, 0.0, False)

    def _page(self, now: float, key: str, earliest: float, latest: float, expected: float, loads: bool) -> int:
        if self._killed_for:
            return self.paging.answer("busy", "the device's worker is being killed")
        return self.paging.ask(now, key, earliest, latest, expected, loads)

    # ---- the worker ------------------------------------------------------------------------

    def worker_started(self, now: float) -> None:
        """The worker process is there and takes commands."""
        self._starting = False
        self.worker_up = True
        self._advance(now)

    def started(self, now: float, batch: int, at: float) -> None:
        """A batch's execution began."""
        handed = self.handed.get(batch)
        if handed is None:
            return
        handed.begin(at)
        self.running = handed
        if self.waiting is handed:
            self.waiting = None
        self._advance(now)

    def finished(self, now: float, batch: int, code: str, input_time: float, copying: bool = False) -> bool:
        """A batch ended so, after ``input_time`` seconds for its inputs; whether the worker had it. ``copying``: its
        inputs are still under way, until :meth:`copied_in` says otherwise."""
        handed = self.handed.pop(batch, None)
        if handed is None:
            return False
        handed.model.batches -= 1
        self._free_at = now
        if self.running is handed:
            self.running = None
        if self.waiting is handed:
            self.waiting = None
        if handed.began:
            self.pulls.took_in(input_time)
            self.health.ran()
            handed.model.deaths = 0
        elif code == "too_late":
            self._note_late(now)
        if copying:
            self.copying = handed
            self._copying_until = now + handed.patience()
        self._advance(now)
        return True

    def copied_in(self, now: float, batch: int) -> None:
        """The inputs of a batch that was answered before are not under way any more."""
        copying = self.copying
        if copying is not None and copying.batch == batch:
            self.copying = None
            self._free_at = now
            self._advance(now)

    def acted(self, now: float, number: int, code: str, detail: str) -> bool:
        """A LOAD or an UNLOAD that was handed over ended so; whether the worker had it."""
        page = self.paging.acted(now, number, code)
        if page is None:
            return False
        self._free_at = now
        if not page.loads and code not in ("ok", "too_late"):
            why = f"the model {page.model.key} could not be unloaded, so nobody knows what is free: {detail}"
            self._kill(why, set(), [])
        self._advance(now)
        return True

    def worker_died(self, now: float, why: str, suspects: Sequence[int] = ()) -> str:
        """The worker process ended: what it ran is lost, what it held must be held again. ``suspects`` are the
        batches of which one may have killed it; where that is not known, it is those that had begun. Where it had to
        be killed, it is known of whom: why it really was."""
        guilty = {batch for batch in suspects if batch in self.handed}
        if not guilty:
            guilty = {handed.batch for handed in self.handed.values() if handed.began} or set(self.handed)
        models = self.paging.loading()
        if self._killed_for:
            why, guilty, models = self._killed_for, self._guilty, self._guilty_models
            self._killed_for = ""
        self.worker_up = False
        self._starting = False
        self.health.died(now, of_batches=bool(guilty))
        for handed in self.handed.values():
            handed.model.batches -= 1
            if handed.batch in guilty:
                self._refuse(handed.batch, "worker_died", why)
            else:
                self._refuse(handed.batch, "not_loaded", "the worker died under another batch")
        self.handed.clear()
        self.running = None
        self.waiting = None
        self.copying = None
        self.paging.lose(why, models)
        return why

    # ---- models ----------------------------------------------------------------------------

    def place(self, now: float, memory: dict[str, float]) -> None:
        """Hold exactly these models, by key, with the megabytes that each takes (0 where nobody knows). What is held
        and not among them takes no more batches from now on, and is let go of once all that is missing is held or has
        failed; before that where there is no room for both."""
        waiting = self.waiting
        if waiting is not None and waiting.model.key not in memory:
            self._drop_waiting()
        self.paging.place(memory)
        self._advance(now)

    def held(self, now: float, key: str, profile: list[tuple[int, float]], load_seconds: float, memory: float) -> None:
        """A model is held, resident and warm; ``profile`` has its measured (batch, seconds) pairs, ``load_seconds`` is
        what paging it in takes, ``memory`` the megabytes that it was found to take (0 where that is not known)."""
        self.paging.held(now, key, profile, load_seconds, memory)
        self._advance(now)

    def progress(self, now: float) -> None:
        """Something was heard of the model that is being held."""
        self.paging.heard_at = now

    def hold_failed(self, now: float, key: str, detail: str) -> None:
        """A model could not be held."""
        self.paging.hold_failed(key, detail)
        self._advance(now)

    # ---- inside ----------------------------------------------------------------------------

    def _refuse(self, batch: int, code: str, detail: str) -> None:
        self._actions.append(Refuse(batch, code, detail))

    def _drop_waiting(self) -> None:
        waiting = self.waiting
        if waiting is not None:
            self.waiting = None
            if not self._killed_for:
                self._actions.append(Drop(waiting.batch))

    def _note_late(self, now: float) -> None:
        self.late += 1
        running = self.running
        if running is not None and now >= running.free_at():
            running.overran = True

    def _advance(self, now: float) -> None:
        """Let go of what leaves, hold what is missing, pull the next."""
        if not self.worker_up or self._killed_for:
            return
        self.paging.advance(now, not self.handed and self.copying is None)  # a Hold needs the inputs' thread
        if self._wants_pull():
            running = self.running
            if running is None:
                self._pull(0.0)
            elif now >= self.pulls.time(running.free_at()):
                self._pull(max(running.free_at() - now, 0.0))

    def _wants_pull(self) -> bool:
        if self.pulls.open or not self.connected or self.waiting is not None:
            return False
        paging = self.paging
        if paging.holding is not None or paging.models.queued:
            return False
        if len(self.handed) >= (1 if self.health.careful() else MAX_BATCHES):
            return False
        if self.running is not None and self.running.overran:
            return False
        return bool(paging.models.serving)

    def _pull(self, free_in: float) -> None:
        self._actions.append(SendPull(self.pulls.send(), free_in))

    def _free_for(self, handed: Handed) -> float:
        """Since when nothing keeps a batch from beginning; 1e18 where something does."""
        if self.running is not None or self.copying is not None or self.paging.pages:
            return 1e18
        return max(self._free_at, handed.came, handed.earliest)

    def _look_for_hangs(self, now: float) -> None:
        copying = self.copying
        if copying is not None and now >= self._copying_until:
            took = now - copying.came
            self._kill(
                f"the inputs of the model {copying.model.key} hung: they are not there after {took:.1f} s", set(), []
            )
            return
        for handed in self.handed.values():
            if now >= handed.hangs_at(self._free_for(handed)):
                took, expected = now - (handed.began_at if handed.began else handed.came), handed.expected * 1e3
                why = f"the model {handed.model.key} hung: {took:.1f} s where {expected:.0f} ms were expected"
                self._kill(why, {handed.batch}, [])
                return
        for page in self.paging.pages.values():
            if now >= page.hangs_at():
                why = f"{'loading' if page.loads else 'unloading'} the model {page.model.key} hung"
                self._kill(why, set(), self.paging.first_load())
                return
        holding = self.paging.holding
        if holding is not None and now >= self.paging.hold_hangs_at():
            why = f"holding the model {holding.key} hung: nothing was heard of it for {HOLD_SILENCE:.0f} s"
            self._kill(why, set(), [holding])

    def _kill(self, why: str, guilty: set[int], models: list[Model]) -> None:
        """For these batches, or for these models' loads: the others are not to blame."""
        if not self._killed_for:
            self._killed_for = why
            self._guilty = guilty
            self._guilty_models = models
            self._actions.append(KillWorker())
