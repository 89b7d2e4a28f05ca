"""One simulated GPU, and what happens to it in virtual time: what machine.py is about. Compiled with mypyc."""

from typing import Final

from broker.engine.devices import Batch
from nodes.engine.device import DeviceEngine
from nodes.engine.lanes import Lanes
from nodes.engine.models import READY

FOREVER: Final = 1e17

PULL: Final = 0
GRANT: Final = 1
FINISH: Final = 2
DONE: Final = 3
WAKE: Final = 4
LOSE: Final = 5
RETURN: Final = 6
PREEMPT: Final = 7
LOADED: Final = 8


class Gpu:
    """One simulated device: its engine, the lanes of its worker, what it is to hold (``placed``), and what it is in the
    middle of."""

    def __init__(self, agent: str, number: int, models: dict[str, list[float]], placed: list[str]) -> None:
        self.agent = agent
        self.number = number
        self.models = models
        """Seconds by batch size, by the key of each model that it can hold."""
        self.placed = placed
        self.loads: dict[str, float] = {}
        """Seconds that loading a model takes, by model key; none where it is not said."""
        self.loading = 0
        """Loads under way."""
        self.taken_at = FOREVER
        """Since when it has not been at rest; FOREVER while it is."""
        self.taken = 0.0
        """Seconds that it was not at rest before."""
        self.loads_begun = 0
        self.spent_loading = 0.0
        """How many loads that took time have begun, and the seconds that they take."""
        self.boots = False
        self.engine = DeviceEngine()
        self.lanes = lanes()
        self.epoch = 0
        self.up = False
        self.wake_at = FOREVER
        self.pull_sent = 0.0
        self.pull_came = 0.0
        self.pull_seq = 0
        self.granted: dict[int, Batch] = {}
        self.last_up = 0.0
        """When the last message to the shard arrives; later ones do not overtake it."""
        self.last_down = 0.0

    def allocated(self, now: float) -> float:
        """Seconds up to ``now`` in which it was not at rest: from when it is told to hold something (its host may have
        to boot first) until it holds nothing any more and its last batch has ended."""
        return self.taken + max(now - self.taken_at, 0.0) if self.taken_at < FOREVER else self.taken

    def ready(self) -> list[str]:
        """The keys of the models that it has loaded."""
        return [model.key for model in self.engine.models.values() if model.state == READY] if self.up else []


def lanes() -> Lanes:
    """Those of a simulated GPU: inputs and outputs take no time, and models are loaded while batches run."""
    return Lanes(copies=False, overlap_loads=True)


class Event:
    """Something that happens to one GPU (or agent) at a time to come."""

    def __init__(self, kind: int, gpu: Gpu, epoch: int) -> None:
        self.kind = kind
        self.gpu = gpu
        self.epoch = epoch
        """The life of the GPU's agent that it belongs to."""
        self.batch: Batch | None = None
        self.number = 0
        self.when = 0.0
        self.code = ""
        """How a batch ended, or the key of the model that was loaded."""
        self.free_in = 0.0


class Delays:
    """The network's delays in seconds, as in :class:`simulation.run.Network`."""

    def __init__(self, control: float, per_request: float, response: float, jitter: float) -> None:
        self.control = control
        self.per_request = per_request
        self.response = response
        self.jitter = jitter
