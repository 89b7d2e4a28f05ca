"""What a request says beside its tensors: how long it may take, how important it is, and the trace it belongs to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from laxity.channel import check_traceparent
from laxity.gateway.errors import Invalid
from laxity.gateway.tensors import Parameters
from laxity.outcomes import Rejected

TIMEOUT: Final = "laxity-timeout"
PRIORITY: Final = "laxity-priority"
TRACEPARENT: Final = "traceparent"
"""Names of HTTP headers, and of gRPC metadata."""

_TIME: Final = re.compile(r"(\d{1,12}(?:\.\d{1,9})?) ?(us|ms|s|m)", re.ASCII)
_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_UNSUPPORTED: Final = {
    "sequence_id": "requests of a sequence; requests of a pipeline know nothing of one another",
    "shared_memory_region": "shared memory; send the data in the request",
    "classification": "the classification extension; have the pipeline answer the classes",
}


@dataclass(frozen=True, slots=True)
class Options:
    """``timeout`` in seconds is what the client allows for all of it; infinity where it does not say."""

    timeout: float
    priority: int
    traceparent: str


def read_options(headers: Mapping[str, str], parameters: Parameters, remaining: float | None = None) -> Options:
    """The options of a request from its headers (with names in lower case), its parameters, and what the transport's
    own deadline leaves it in seconds. Of several time-outs the shortest holds. :class:`Invalid` for what makes no
    sense."""
    refuse_unsupported(parameters)
    timeout = math.inf if remaining is None else remaining
    if (text := headers.get(TIMEOUT)) is not None:
        timeout = min(timeout, _seconds(text))
    if (microseconds := _number(parameters, "timeout")) > 0:
        timeout = min(timeout, microseconds / 1e6)
    priority = _number(parameters, "priority")
    if (text := headers.get(PRIORITY)) is not None:
        if text not in ("0", "1"):
            raise Invalid(f"the header {PRIORITY} must be 0 or 1 (highest), not {text!r}")
        priority = int(text)
    traceparent = headers.get(TRACEPARENT, "")
    try:
        check_traceparent(traceparent)
    except Rejected:
        traceparent = ""  # to be ignored, says the standard
    return Options(timeout, 1 if priority == 1 else 0, traceparent)


def refuse_unsupported(parameters: Parameters) -> None:
    """:class:`Invalid` for a parameter of an extension that there is not here."""
    for name, what in _UNSUPPORTED.items():
        if parameters.get(name) not in (None, 0, ""):
            raise Invalid(f"the parameter {name!r} is not supported: {what}")


def _seconds(text: str) -> float:
    match = _TIME.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if seconds <= 0.0:
        raise Invalid(f"the header {TIMEOUT} must be a time above zero such as 250ms, 1.5s or 800us, not {text!r}")
    return seconds


def _number(parameters: Parameters, name: str) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise Invalid(f"the parameter {name!r} must be a whole number, 0 or more, of 64 bits at most")
    return value
