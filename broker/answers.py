"""Requests as they come over the wire, and how they end there."""

from __future__ import annotations

from broker.engine.request import Request as EngineRequest
from laxity import protocol
from laxity.outcomes import Outcome
from laxity.protocol import Answer, Request, StageTiming


def out_of_range(request: Request) -> str:
    """What is wrong with a request's own fields; '' if nothing is."""
    if not -(2**31) <= request.priority < 2**31 or not 0 <= request.id < 2**64:
        return "id or priority out of range"
    if len(request.pipeline) > protocol.MAX_NAME:
        return f"pipeline names have up to {protocol.MAX_NAME} characters"
    return ""


def answer_to(request: EngineRequest) -> Answer:
    """What the service is told of a request that has ended."""
    remaining = int((request.deadline - request.ended_at) * 1e6)
    outcome = request.outcome
    assert outcome is not None
    if outcome is Outcome.OK and not request.timed:
        assert request.answer is not None
        return Answer(request.id, outcome, request.answer.node, remaining)
    timings = [
        StageTiming(
            time.stage,
            round(time.queued * 1e6),
            round(time.execution * 1e6),
            time.batch,
            time.items,
            round(time.remaining * 1e6),
        )
        for time in request.timings or ()
        if request.timed and time.items
    ]
    node = request.answer.node if request.answer is not None else None
    return Answer(
        request.id,
        outcome,
        node,
        remaining,
        request.end_stage,
        request.detail,
        round(request.short_by * 1e6),
        timings,
    )
