"""The models of one device, and the accounting of its memory."""

from typing import Final

QUEUED: Final = "queued"
"""To be held."""
LOADING: Final = "loading"
"""Being held for the first time."""
READY: Final = "ready"
"""Resident: in the device's memory."""
HELD: Final = "held"
"""In the host's memory, to be paged in."""
FAILED: Final = "failed"

NOT_PAGED: Final = 0
PAGED_IN: Final = 1
PAGED_OUT: Final = 2

SLACK: Final = 1e-6
"""Megabytes by which sums may seem to be above the budget: they are of floats."""


class Model:
    """A model of a device; ``state`` is one of queued, loading, ready, held and failed."""

    def __init__(self, key: str, memory: float) -> None:
        self.key = key
        self.memory = memory
        """Megabytes that it takes of the device's memory, while it is there; 0 where nobody knows."""
        self.state = QUEUED
        self.paging = NOT_PAGED
        """Whether a LOAD or an UNLOAD of it is under way; it is ``held`` all the while."""
        self.detail = ""
        self.profile: list[tuple[int, float]] = []
        self.load_seconds = 0.0
        self.deaths = 0
        """How often the worker died while it loaded this."""
        self.batches = 0
        """Those of it that the worker has."""
        self.used_at = 0.0
        """When a batch of it last came, or it got onto the device."""


class Models:
    """What a device is to hold, what it holds, and how much of its memory that takes.

    The worker carries out LOADs and UNLOADs one by one, in the order in which they were accepted. So there are two
    sums: ``claimed`` is what will be taken once all that was accepted has been carried out, ``present`` what is taken
    at most until then.
    """

    def __init__(self, budget: float) -> None:
        """``budget``: megabytes; 0 for a device that has room for everything."""
        self.budget = budget
        self.wanted: dict[str, Model] = {}
        """What it is to hold, by key."""
        self.leaving: dict[str, Model] = {}
        """What it still holds and is to let go of."""
        self.queued: dict[str, Model] = {}
        """Those of ``wanted`` that are queued, in their order."""
        self.serving: dict[str, Model] = {}
        """Those of ``wanted`` that are ready or held."""
        self.on_device: dict[str, Model] = {}
        """All that have a part of the device's memory, or are about to."""

    def add(self, key: str, memory: float) -> None:
        """Something new is to be held."""
        model = Model(key, memory)
        self.wanted[key] = model
        self.file(model)

    def set(self, model: Model, state: str, paging: int) -> None:
        """This is what became of a model."""
        model.state = state
        model.paging = paging
        self.file(model)

    def file(self, model: Model) -> None:
        """Put a model where it belongs by its state, and by whether it is wanted."""
        wanted = self.wanted.get(model.key) is model
        state = model.state
        _keep(self.queued, model, wanted and state == QUEUED)
        _keep(self.serving, model, wanted and state in (READY, HELD))
        _keep(self.on_device, model, state in (READY, LOADING) or model.paging != NOT_PAGED)

    def claimed(self) -> float:
        """Megabytes that are taken once everything accepted has been carried out."""
        return sum([model.memory for model in self.on_device.values() if model.paging != PAGED_OUT], 0.0)

    def present(self) -> float:
        """Megabytes that are taken until then, at most."""
        return sum([model.memory for model in self.on_device.values()], 0.0)

    def fits(self, taken: float) -> bool:
        """Whether so many megabytes are within the budget."""
        return self.budget <= 0.0 or taken <= self.budget + SLACK

    def all_fit(self) -> bool:
        """Whether there is room for what is to be held and for what is to go at once."""
        if self.budget <= 0.0:
            return True
        coming = sum([model.memory for model in self.wanted.values()], 0.0)
        going = [model.memory for key, model in self.on_device.items() if self.wanted.get(key) is not model]
        return self.fits(coming + sum(going, 0.0))

    def least_used(self) -> Model | None:
        """The resident model without a batch that was used least recently; those that are to go first."""
        found: Model | None = None
        for model in self.on_device.values():
            if model.state != READY or model.batches > 0:
                continue
            if model.key in self.leaving:
                return model
            if found is None or model.used_at < found.used_at:
                found = model
        return found


def _keep(there: dict[str, Model], model: Model, belongs: bool) -> None:
    if belongs:
        there[model.key] = model
    elif there.get(model.key) is model:
        del there[model.key]
