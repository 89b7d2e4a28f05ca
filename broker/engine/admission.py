"""Who is let in: checks on a new request that need no look at the queues."""

from broker.engine.ledger import Ledger
from broker.engine.request import Request
from laxity.outcomes import Outcome


class Refusal:
    """Why a request is not let in."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        self.outcome = outcome
        self.detail = detail


def refusal(now: float, request: Request, budget: float, ledger: Ledger) -> Refusal | None:
    """None where the request, already entered in the ledger, may go on. ``budget`` is in seconds."""
    limits = ledger.limits
    slo = request.pipeline.slo
    if budget <= 0.0:
        return Refusal(Outcome.REJECTED, "no latency budget; ask for an SLO above 0")
    if budget > slo * 1.000001:
        return Refusal(
            Outcome.REJECTED, f"an SLO of {budget:g} s is longer than the pipeline's {slo:g} s: ask for less, or none"
        )
    if request.payload.nbytes > limits.max_payload:
        return Refusal(
            Outcome.REJECTED, f"payload of {request.payload.nbytes} bytes is above the limit of {limits.max_payload}"
        )
    if ledger.in_flight > limits.max_requests:
        return Refusal(
            Outcome.REJECTED,
            f"queue full: {limits.max_requests} requests are in flight at this shard; slow down and try again",
        )
    if request.client.account.in_flight > limits.max_client_requests:
        return Refusal(
            Outcome.REJECTED,
            f"queue full: {limits.max_client_requests} requests of this client are in flight at this shard; wait for "
            "answers",
        )
    if ledger.bytes > limits.max_bytes:
        return Refusal(
            Outcome.REJECTED,
            f"queue full: {limits.max_bytes} bytes are in flight at this shard; slow down and try again",
        )
    if now >= request.deadline:
        return Refusal(Outcome.EXPIRED, "the budget was used up on the way to the shard")
    return None
