"""Why a request gets no answer, as HTTP and gRPC status codes."""

from __future__ import annotations

from typing import Any, Final

from laxity.outcomes import Outcome
from laxity.reply import Reply

RETRY_AFTER: Final = 1
"""Seconds to wait before trying again, where that may help."""
MOST_SAID: Final = 1000
"""Characters of a message: what clients sent is part of some, and gRPC has it in a header."""

GRPC_CODES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""The names of gRPC's codes, by HTTP's; :class:`Overloaded` has another one."""

_STATUS: Final = {
    Outcome.DROPPED: 504,
    Outcome.EXPIRED: 504,
    Outcome.REJECTED: 400,
    Outcome.CANCELLED: 499,
    Outcome.FAILED: 500,
    Outcome.UNAVAILABLE: 503,
}
_REJECTED: Final = (("queue full", 429), ("unknown pipeline", 404))
"""How shards and clients begin to say why they reject a request, and what status that is; anything else is 400."""


class GatewayError(Exception):
    """The request gets no answer. ``status`` is HTTP's, ``fields`` is told beside the message: ``outcome``, ``stage``
    (where the request ended), ``short_ms`` (by how much a dropped one was predicted to miss its deadline) and
    ``request_id`` (under which shards log it), as far as there are any."""

    def __init__(self, status: int, message: str, **fields: Any) -> None:
        message = message if len(message) <= MOST_SAID else f"{message[:MOST_SAID]}..."
        super().__init__(message)
        self.status = status
        self.message = message
        self.fields = fields

    @property
    def grpc_code(self) -> str:
        """The name of the gRPC status code."""
        return GRPC_CODES[self.status]

    @property
    def headers(self) -> dict[str, str]:
        """What HTTP's headers and gRPC's trailing metadata tell."""
        told = {f"laxity-{name.replace('_', '-')}": str(value) for name, value in self.fields.items()}
        if self.status in (429, 503):
            told["retry-after"] = str(RETRY_AFTER)
        return told


class Invalid(GatewayError):
    """The request cannot be understood, or asks for what there is not."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


class Overloaded(GatewayError):
    """The gateway has as many requests as it takes: another one may have room."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            503, f"the gateway is full: {limit} requests are under way (--max-concurrency); slow down and try again"
        )

    @property
    def grpc_code(self) -> str:
        return "RESOURCE_EXHAUSTED"


def error_of(reply: Reply) -> GatewayError:
    """The error of a request that ended otherwise than ``ok``."""
    status = _STATUS[reply.outcome]
    if reply.outcome is Outcome.REJECTED:
        status = next((code for words, code in _REJECTED if reply.detail.startswith(words)), status)
    fields: dict[str, Any] = {"outcome": str(reply.outcome)}
    if reply.stage:
        fields["stage"] = reply.stage
    if reply.outcome is Outcome.DROPPED:
        fields["short_ms"] = round(reply.short_by * 1e3, 3)
    if reply.request_id:
        fields["request_id"] = reply.request_id
    return GatewayError(status, str(reply.error()), **fields)
