"""The models of one device as they come and go: held for the first time, paged in and out, let go of.

The device's memory is reckoned in the order in which LOADs and UNLOADs are accepted, which is the order in which the
worker carries them out, one by one. A LOAD that needs the room of an UNLOAD before it may begin no later than that one:
where the UNLOAD came too late, the LOAD does as well. So what is resident and being loaded never exceeds the budget.
"""

from typing import Final

from nodes.engine.actions import Action, Announce, Answer, Hold, Load, Release, Unload
from nodes.engine.handed import Page
from nodes.engine.models import FAILED, HELD, LOADING, NOT_PAGED, PAGED_IN, PAGED_OUT, QUEUED, READY, Model, Models

MAX_LOAD_DEATHS: Final = 3
"""A model under whose load the worker died this often is given up."""
HOLD_SILENCE: Final = 600.0
"""A model hangs of which nothing is heard for so many seconds while it is being held. One step of that (reading files,
compiling, a batch to warm up) may well take minutes, and none of the models held so far serves meanwhile."""
OWN_WINDOW: Final = 60.0
"""Seconds in which an UNLOAD that no shard asked for must begin."""


class Paging:
    """Part of :class:`~nodes.engine.device.DeviceEngine`, whose list of actions it adds to."""

    def __init__(self, budget: float, actions: list[Action]) -> None:
        self.models = Models(budget)
        self.pages: dict[int, Page] = {}
        """The LOADs and UNLOADs that the worker has, by number, in their order."""
        self.holding: Model | None = None
        """What is being held for the first time."""
        self.heard_at = 0.0
        """When something was last heard of it."""
        self._letting_go = False
        """What leaves goes now, and does not wait for what is to come."""
        self._earliest = 0.0
        """When the last one of ``pages`` may begin."""
        self._last = 0
        self._actions = actions

    def advance(self, now: float, idle: bool) -> None:
        """Let go of what leaves, and hold what is missing. ``idle``: the worker is up and has no batch."""
        if self.models.leaving and (self._letting_go or not self._awaits_hold()):
            self._let_go(now)
        if idle and self.models.queued and self.holding is None:
            self._hold_next(now)

    # ---- what the shard asks for -----------------------------------------------------------

    def ask(self, now: float, key: str, earliest: float, latest: float, expected: float, loads: bool) -> int:
        """Hand a LOAD or an UNLOAD to the worker, or answer it; its number."""
        if loads:
            code, detail = self._load_refusal(now, key, latest)
        else:
            code, detail = self._unload_refusal(now, key, latest)
        model = self.models.wanted.get(key)
        if code or model is None:
            return self.answer(code, detail)
        return self._hand_over(model, earliest, latest, expected, loads, True)

    def answer(self, code: str, detail: str) -> int:
        """Answer a LOAD or an UNLOAD that is not handed over; its number."""
        self._last += 1
        self._actions.append(Answer(self._last, code, detail))
        return self._last

    def _load_refusal(self, now: float, key: str, latest: float) -> tuple[str, str]:
        models = self.models
        model = models.wanted.get(key)
        if model is not None and model.state == READY:
            return "ok", ""
        code, detail = self._refusal(now, key, model, latest)
        if code or model is None or models.fits(models.claimed() + model.memory):
            return code, detail
        taken = f"{models.claimed():g} of {models.budget:g} MB are taken"
        return "busy", f"{taken}, and {key} needs {model.memory:g} MB"

    def _unload_refusal(self, now: float, key: str, latest: float) -> tuple[str, str]:
        model = self.models.wanted.get(key)
        if model is not None and model.state == HELD and model.paging == NOT_PAGED:
            return "ok", ""
        if model is not None and model.batches > 0:
            return "busy", f"the model {key} is in use"
        return self._refusal(now, key, model, latest)

    def _refusal(self, now: float, key: str, model: Model | None, latest: float) -> tuple[str, str]:
        """Why a model can be neither loaded nor unloaded; ('', '') where it can."""
        if model is None:
            return "unknown_model", f"the model {key} is not this device's"
        if self.holding is not None or self.models.queued:
            return "busy", "the device's models are yet to be loaded for the first time"
        if model.state == FAILED:
            return "unknown_model", f"the model {key} could not be loaded: {model.detail}"
        if model.paging != NOT_PAGED:
            return "busy", f"the model {key} is being loaded or unloaded"
        if now > latest:
            return "too_late", f"the window had closed {(now - latest) * 1e3:.1f} ms before it came"
        return "", ""

    def _hand_over(
        self, model: Model, earliest: float, latest: float, expected: float, loads: bool, asked: bool
    ) -> int:
        """A LOAD or an UNLOAD does not overtake those before it, and a LOAD that needs their room begins no later than
        they may."""
        models = self.models
        if self.pages:
            earliest = max(earliest, self._earliest)
        self._earliest = earliest
        if loads and not models.fits(models.present() + model.memory):
            for before in self.pages.values():
                if not before.loads:
                    latest = min(latest, before.latest)
        self._last += 1
        number = self._last
        self.pages[number] = Page(number, model, loads, latest, expected, asked)
        models.set(model, HELD, PAGED_IN if loads else PAGED_OUT)
        if loads:
            self._actions.append(Load(number, model.key, earliest, latest))
        else:
            self._actions.append(Unload(number, model.key, earliest, latest))
        return number

    def acted(self, now: float, number: int, code: str) -> Page | None:
        """A LOAD or an UNLOAD ended so: which one it was, where the worker had it."""
        page = self.pages.pop(number, None)
        if page is None:
            return None
        model = page.model
        model.used_at = now
        resident = code == "ok" if page.loads else code == "too_late"
        self.models.set(model, READY if resident else HELD, NOT_PAGED)
        if resident and page.loads:
            model.deaths = 0
        return page

    def taken(self) -> float:
        """Megabytes of the device's memory that are taken now, at most: of the LOADs only the first one can have begun,
        and that only if there was room. (An UNLOAD that came too late is heard of before the LOAD that counted on it,
        and came too late as well.)"""
        there = self.models.present()
        begun = 0.0
        first = True
        for page in self.pages.values():
            if page.loads:
                there -= page.model.memory
                if first:
                    begun = page.model.memory
            first = False
        return there + begun if self.models.fits(there + begun) else there

    # ---- what is to be held ----------------------------------------------------------------

    def place(self, memory: dict[str, float]) -> None:
        """Hold exactly these models, by key, with the megabytes that each takes (0 where nobody knows)."""
        models = self.models
        wanted = models.wanted
        gone = [model for key, model in wanted.items() if key not in memory]
        changed = bool(gone)
        for model in gone:
            del wanted[model.key]
            if model.state in (READY, HELD):
                models.leaving[model.key] = model
            models.file(model)
        if gone:
            for model in wanted.values():
                if model.state == FAILED:
                    models.set(model, QUEUED, NOT_PAGED)  # room may have been what it lacked
        for key, needed in memory.items():
            known = wanted.get(key)
            if known is None:
                known = self._still_there(key)
                if known is None:
                    models.add(key, needed)
                    continue
                changed = changed or known.state != LOADING
                wanted[key] = known
                models.file(known)
            if key not in models.on_device:
                known.memory = needed
        if not models.all_fit():
            self._letting_go = True
        if changed:
            self._actions.append(Announce())

    def held(self, now: float, key: str, profile: list[tuple[int, float]], load_seconds: float, memory: float) -> None:
        """A model is held and resident."""
        model = self._end_hold(key)
        if model is None:
            return
        models = self.models
        model.profile = profile
        model.load_seconds = load_seconds
        model.used_at = now
        model.detail = ""
        if memory > 0.0:
            model.memory = memory
        models.set(model, READY, NOT_PAGED)
        if key not in models.wanted:
            models.leaving[key] = model
            self._letting_go = True
        elif models.fits(model.memory):
            self._actions.append(Announce())
        else:
            self._replace_too_large(model)
        if not models.fits(models.claimed()):
            self._make_room(now, 0.0)  # it takes more than was thought

    def hold_failed(self, key: str, detail: str) -> None:
        """A model could not be held. It is tried again once what is to go has made room, and then not until it is
        placed anew or another model is taken away."""
        model = self._end_hold(key)
        if model is None:
            return
        if self.models.leaving:
            self._letting_go = True
            self.models.set(model, QUEUED, NOT_PAGED)
        else:
            self._give_up(model, detail)

    def hold_hangs_at(self) -> float:
        """From when on what is being held is taken to hang; 1e18 where nothing is."""
        return self.heard_at + HOLD_SILENCE if self.holding is not None else 1e18

    def first_load(self) -> list[Model]:
        """The model of the LOAD that is under way, if one is: the first of ``pages``."""
        for page in self.pages.values():
            return [page.model] if page.loads else []
        return []

    def loading(self) -> list[Model]:
        """Those under whose load the worker may have died."""
        return self.first_load() + ([self.holding] if self.holding is not None else [])

    def lose(self, why: str, guilty: list[Model]) -> None:
        """The worker died, of loading these models: nothing is held any more, and all is to be held again."""
        models = self.models
        self.holding = None
        for model in guilty:
            self._died_loading(model, why)
        for page in self.pages.values():
            if page.asked:
                self._actions.append(Answer(page.number, "worker_died", why))
        self.pages.clear()
        self._letting_go = False
        models.leaving.clear()
        models.on_device.clear()
        for model in models.wanted.values():
            if model.state != FAILED:
                models.set(model, QUEUED, NOT_PAGED)
        self._actions.append(Announce())

    # ---- inside ----------------------------------------------------------------------------

    def _still_there(self, key: str) -> Model | None:
        """A model that was not wanted, but is not gone."""
        holding = self.holding
        if holding is not None and holding.key == key:
            return holding
        return self.models.leaving.pop(key, None)

    def _end_hold(self, key: str) -> Model | None:
        holding = self.holding
        if holding is None or holding.key != key:
            return None
        self.holding = None
        return holding

    def _died_loading(self, model: Model, why: str) -> None:
        model.deaths += 1
        model.detail = f"the worker died while it loaded: {why}"
        self.models.set(model, FAILED if model.deaths >= MAX_LOAD_DEATHS else QUEUED, NOT_PAGED)

    def _give_up(self, model: Model, detail: str) -> None:
        model.detail = detail
        self.models.set(model, FAILED, NOT_PAGED)
        self._actions.append(Announce())

    def _give_up_too_large(self, model: Model) -> None:
        budget = self.models.budget
        self._give_up(
            model,
            f"{model.key} takes {model.memory:g} MB, and this device has {budget:g} MB for models; place it on a "
            "larger one, or mend memory_mb in its profile",
        )

    def _replace_too_large(self, model: Model) -> None:
        """Let go of a resident model that was found to take more than the budget, and remember that it did."""
        self.models.leaving[model.key] = model
        self._letting_go = True
        self.models.add(model.key, model.memory)
        self._give_up_too_large(self.models.wanted[model.key])

    def _awaits_hold(self) -> bool:
        holding = self.holding
        return bool(self.models.queued) or (holding is not None and holding.key in self.models.wanted)

    def _let_go(self, now: float) -> None:
        """Unload what leaves, and release it once it is off the device."""
        leaving = self.models.leaving
        for model in list(leaving.values()):
            if model.batches > 0 or model.paging != NOT_PAGED:
                continue
            if model.state == READY:
                self._unload(now, model)
            else:
                del leaving[model.key]
                self._actions.append(Release(model.key))
        if not leaving:
            self._letting_go = False

    def _hold_next(self, now: float) -> None:
        """Hold the next model that is queued, once there is room for it."""
        for model in list(self.models.queued.values()):
            if self.models.fits(model.memory):
                if self._make_room(now, model.memory):
                    self.holding = model
                    self.heard_at = now
                    self.models.set(model, LOADING, NOT_PAGED)
                    self._actions.append(Hold(model.key))
                return
            self._give_up_too_large(model)

    def _make_room(self, now: float, needed: float) -> bool:
        """Whether so many megabytes are free; if not, they soon are."""
        models = self.models
        while not models.fits(models.claimed() + needed):
            model = models.least_used()
            if model is None:
                return False
            self._unload(now, model)
            if model.key not in models.leaving:
                self._actions.append(Announce())
        return models.fits(models.present() + needed)

    def _unload(self, now: float, model: Model) -> None:
        self._hand_over(model, now, now + OWN_WINDOW, 0.0, False, False)
