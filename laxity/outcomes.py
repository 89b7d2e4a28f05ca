"""How a request can end, and the error a caller sees for each way.

Every submitted request ends in exactly one :class:`Outcome`. The SDK returns the
payload for ``ok`` and raises the error named after the outcome for the others.
"""

from concurrent.futures import CancelledError
from enum import StrEnum


class Outcome(StrEnum):
    """The seven ways in which a request ends."""

    OK = "ok"
    DROPPED = "dropped"
    """Predicted to miss its deadline; says at which stage and by how much."""
    EXPIRED = "expired"
    """The deadline passed, in a queue or while the model ran; carries no payload."""
    REJECTED = "rejected"
    """Invalid, unknown pipeline, or queue full; was never run."""
    CANCELLED = "cancelled"
    FAILED = "failed"
    """The model (or the user code around it) raised."""
    UNAVAILABLE = "unavailable"
    """Nobody could run it: no shard reached, or agents were lost twice under it."""


class LaxityError(Exception):
    """Base of every error that the SDK raises.

    ``outcome`` is the request's outcome, ``stage`` where it ended (empty when no stage
    was reached), ``detail`` what happened and what to do, ``short_by`` by how many
    seconds a dropped request was predicted to miss its deadline (0 otherwise), and
    ``request_id`` the identifier under which shards log the request.
    """

    outcome: Outcome = Outcome.FAILED

    def __init__(self, detail: str, *, stage: str = "", short_by: float = 0.0, request_id: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.stage = stage
        self.short_by = short_by
        self.request_id = request_id

    def __str__(self) -> str:
        where = f" at stage {self.stage!r}" if self.stage else ""
        return f"{self.outcome}{where}: {self.detail}"


class Dropped(LaxityError):
    outcome = Outcome.DROPPED


class Expired(LaxityError):
    outcome = Outcome.EXPIRED


class Rejected(LaxityError):
    outcome = Outcome.REJECTED


class Cancelled(LaxityError, CancelledError):
    """Also a :class:`concurrent.futures.CancelledError`, as callers of a future's ``result()`` expect."""

    outcome = Outcome.CANCELLED


class Failed(LaxityError):
    outcome = Outcome.FAILED


class Unavailable(LaxityError):
    outcome = Outcome.UNAVAILABLE


ERRORS: dict[Outcome, type[LaxityError]] = {
    error.outcome: error for error in (Dropped, Expired, Rejected, Cancelled, Failed, Unavailable)
}
"""The error class for every outcome but ``ok``."""
