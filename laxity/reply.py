"""What a caller can learn about a request that has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from laxity.outcomes import ERRORS, LaxityError, Outcome
from laxity.protocol import Answer


@dataclass(frozen=True, slots=True)
class Timing:
    """How one stage of a request went. Times in seconds.

    ``queued`` and ``execution`` are the waiting and the run of its batch, ``batch`` the batch's size, ``items``
    how many items a map stage ran for this request (1 for other stages), and ``remaining`` what was left of
    the latency budget when the stage ended.
    """

    stage: str
    queued: float
    execution: float
    batch: int
    items: int
    remaining: float


@dataclass(frozen=True, slots=True)
class Reply:
    """How a request ended.

    ``value`` is the pipeline's answer where ``outcome`` is ``ok`` and None otherwise. ``remaining`` is what was
    left of the latency budget in seconds (negative: late by). ``stage`` is where a request that is not ``ok``
    ended, ``detail`` why, and ``short_by`` by how many seconds a dropped one was predicted to miss its
    deadline. ``timings`` has one entry a stage where the request asked for them. Shards log the request under
    ``request_id``.
    """

    outcome: Outcome
    value: Any
    remaining: float
    stage: str
    detail: str
    short_by: float
    timings: tuple[Timing, ...]
    request_id: str

    @property
    def ok(self) -> bool:
        """Whether the request was answered in time."""
        return self.outcome is Outcome.OK

    def unwrap(self) -> Any:
        """The value; raises the error named after the outcome where there is none."""
        if self.outcome is Outcome.OK:
            return self.value
        raise self.error()

    def error(self) -> LaxityError:
        """The error of an outcome that is not ``ok``."""
        return ERRORS[self.outcome](self.detail, stage=self.stage, short_by=self.short_by, request_id=self.request_id)


def reply_of(answer: Answer, value: Any, request_id: str) -> Reply:
    """The :class:`Reply` that an answer's header and decoded payload make."""
    unexplained = "" if answer.outcome is Outcome.OK else f"the shard gave no reason for {answer.outcome}"
    return Reply(
        outcome=answer.outcome,
        value=value,
        remaining=answer.remaining_us / 1e6,
        stage=answer.stage,
        detail=answer.detail or unexplained,
        short_by=answer.short_us / 1e6,
        timings=tuple(
            Timing(t.stage, t.queued_us / 1e6, t.execution_us / 1e6, t.batch, t.items, t.remaining_us / 1e6)
            for t in answer.timings
        ),
        request_id=request_id,
    )
