"""What a device's engine wants done; the shell carries it out."""


class Action:
    """Base of the actions."""


class SendPull(Action):
    """Tell the shard that the device takes a batch, from ``free_in`` seconds on."""

    def __init__(self, seq: int, free_in: float) -> None:
        self.seq = seq
        self.free_in = free_in


class Infer(Action):
    """Hand a batch to the worker, to be executed within this window (INFER)."""

    def __init__(self, batch: int, earliest: float, latest: float) -> None:
        self.batch = batch
        self.earliest = earliest
        self.latest = latest


class Drop(Action):
    """Take back a batch that was handed over, if it does not execute yet."""

    def __init__(self, batch: int) -> None:
        self.batch = batch


class Refuse(Action):
    """Answer a batch that was not handed over (or whose worker died under it) with ``code``."""

    def __init__(self, batch: int, code: str, detail: str) -> None:
        self.batch = batch
        self.code = code
        self.detail = detail


class Load(Action):
    """Hand a LOAD to the worker, to begin within this window."""

    def __init__(self, number: int, model: str, earliest: float, latest: float) -> None:
        self.number = number
        self.model = model
        self.earliest = earliest
        self.latest = latest


class Unload(Action):
    """Hand an UNLOAD to the worker, to begin within this window. It may be one that no shard asked for."""

    def __init__(self, number: int, model: str, earliest: float, latest: float) -> None:
        self.number = number
        self.model = model
        self.earliest = earliest
        self.latest = latest


class Answer(Action):
    """Answer a LOAD or an UNLOAD that was not handed over (or whose worker died under it) with ``code``; ``ok`` where
    the model is already where it is to be."""

    def __init__(self, number: int, code: str, detail: str) -> None:
        self.number = number
        self.code = code
        self.detail = detail


class StartWorker(Action):
    """Start the device's worker process."""


class KillWorker(Action):
    """Kill the worker process: it does not come back from what it runs."""


class Hold(Action):
    """Bring a model into the worker for the first time, onto the device as well."""

    def __init__(self, model: str) -> None:
        self.model = model


class Release(Action):
    """Let go of a model altogether. It is off the device already."""

    def __init__(self, model: str) -> None:
        self.model = model


class Announce(Action):
    """The models that the device holds have changed, and not as a shard asked: tell the shard."""
