"""One action of a device, as its agent keeps it until it has ended."""

from __future__ import annotations

from typing import Protocol

from laxity import protocol
from laxity.payload import Part
from laxity.protocol import Grant, Load, Unload


class Session(Protocol):
    """One shard, for as long as it knows this agent without a break."""

    @property
    def shard(self) -> str:
        """The shard's name."""
        ...

    def send(self, message: protocol.FromAgent, frames: list[Part]) -> bool:
        """Send to the shard without waiting; False where that is not possible (any more)."""
        ...

    def told(self, device: int, model: str, resident: bool) -> None:
        """The shard knows by an ACTED where a model is now."""
        ...


class ActionRecord:
    """A HOLD, LOAD, UNLOAD or INFER: who asked for it, and how it went. Times are seconds on the agent's clock."""

    def __init__(self, kind: str, model: str, came: float, session: Session | None, asked: int) -> None:
        self.kind = kind
        self.model = model
        self.came = came
        self.session = session
        """Who asked for it; None: the agent itself."""
        self.asked = asked
        """Its number at the shard; for what the agent itself asked for, here."""
        self.elements = 0
        """Of a batch."""
        self.earliest = came
        self.latest = came
        self.expected_start = came
        self.expected = 0.0
        """Seconds that it was expected to take."""
        self.started: float | None = None
        """When it began; None where it did not."""
        self.duration = 0.0
        """Seconds; of a batch, those of its execution."""
        self.input = 0.0
        self.output = 0.0
        """Seconds before and after a batch's execution."""
        self.code = ""
        """One of :data:`laxity.protocol.DONE_CODES`, once it has ended."""
        self.detail = ""
        self.memory_mb = 0.0
        """What models take of the device's memory after it."""

    def window(self, message: Grant | Load | Unload) -> float:
        """Take over the window of a message; when that can have left the shard at the earliest."""
        left_at = (message.pulled_us + message.dwell_us) * 1e-6
        self.earliest = left_at + message.opens_us * 1e-6
        self.latest = left_at + message.closes_us * 1e-6
        self.expected_start = max(self.came, self.earliest)
        return left_at
