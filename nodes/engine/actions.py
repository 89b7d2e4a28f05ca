"""What a device's engine wants done; the shell carries it out."""


class Action:
    """Base of the actions."""


class SendPull(Action):
    """Tell the shard that the device takes a batch, from ``free_in`` seconds on."""

    def __init__(self, seq: int, free_in: float) -> None:
        self.seq = seq
        self.free_in = free_in


class Start(Action):
    """Run a batch now (INFER)."""

    def __init__(self, batch: int) -> None:
        self.batch = batch


class Refuse(Action):
    """Answer a batch that does not run (or whose worker died under it) with ``code``."""

    def __init__(self, batch: int, code: str, detail: str) -> None:
        self.batch = batch
        self.code = code
        self.detail = detail


class StartWorker(Action):
    """Start the device's worker process."""


class KillWorker(Action):
    """Kill the worker process: it does not come back from what it runs."""


class Load(Action):
    """Load a model (LOAD)."""

    def __init__(self, model: str) -> None:
        self.model = model


class Unload(Action):
    """Let go of a model (UNLOAD)."""

    def __init__(self, model: str) -> None:
        self.model = model


class Announce(Action):
    """The models that the device holds have changed: tell the shard."""
