"""What became of one request, stage by stage: what `laxity trace` prints and OTLP exports.

A shard keeps the newest traces in its memory: of the requests that were sampled, and of all that were dropped, expired,
failed or unavailable. Times are seconds from the request's arrival at the shard, which ``at`` places on the host's
clock; no clock of another host comes into it.
"""

from __future__ import annotations

import msgspec


class StageSpan(msgspec.Struct, array_like=True, frozen=True):
    """One stage of a request. It came at ``queued``, its batch's window opened at ``opens`` and was to close at
    ``closes``, it was ``granted`` to ``device`` ('agent/number'), began execution at ``started`` and ended at ``ended``
    (-1.0 for what did not happen); when it began is reckoned back from its results. ``execution``, ``input`` and
    ``output`` are the agent's own measurements; ``forced`` is how much of the waiting was for want of a free device. Of
    a map stage with several batches the last one's, with all ``items``; ``batches`` says how many those were.
    ``attempts`` is how often it was granted."""

    stage: str
    queued: float
    opens: float
    closes: float
    granted: float
    started: float
    ended: float
    execution: float
    input: float
    output: float
    forced: float
    device: str
    batch: int
    """The number of the batch (the last one's): what agents log and telemetry has under ``action``."""
    size: int
    items: int
    batches: int
    attempts: int
    predicted: float
    """Mean execution that was predicted for the batch."""
    remaining: float
    """Latency budget left when it ended."""


class Estimate(msgspec.Struct, array_like=True, frozen=True):
    """Why a request was dropped: at ``at`` (seconds from arrival), with ``remaining`` seconds of budget left (where the
    policy splits the budget: until it had to be through with this stage), it would have had to wait ``wait`` for a
    device, take ``execution`` (the 99th percentile, in a batch of ``size``) at ``stage``, and ``downstream`` behind it:
    ``short`` more than it had."""

    stage: str
    at: float
    remaining: float
    wait: float
    execution: float
    size: int
    downstream: float
    short: float


class TraceRecord(msgspec.Struct, array_like=True, frozen=True):
    """One request. ``request`` is the id that clients know ('client-number'), ``at`` its arrival in Unix seconds,
    ``sampled`` whether it was chosen (else it is here because of its outcome), ``traceparent`` what the client sent."""

    request: str
    shard: str
    pipeline: str
    version: str
    traceparent: str
    sampled: bool
    at: float
    slo: float
    budget: float
    latency: float
    outcome: str
    stage: str
    detail: str
    cold: bool
    priority: int
    spans: list[StageSpan]
    estimate: Estimate | None = None
