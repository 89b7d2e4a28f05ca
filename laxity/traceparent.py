"""The W3C trace context's ``traceparent``: the header by which a request belongs to a trace of its caller's.

``00-<trace, 32 hex digits>-<span, 16>-<flags, 2>``; the last bit of the flags says that the caller records the trace.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any, Final, NamedTuple

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
LENGTH: Final = 55
"""Characters of version 00; later versions may put more behind them, after another '-'."""
SAMPLED: Final = 1


class TraceParent(NamedTuple):
    """``trace`` and ``span`` in hexadecimal digits: the caller's trace, and its span that asked for the request."""

    trace: str
    span: str
    sampled: bool

    def __str__(self) -> str:
        return f"00-{self.trace}-{self.span}-{int(self.sampled):02x}"


def parse_traceparent(text: str) -> TraceParent | None:
    """None for what is none: that is to be ignored, says the specification."""
    match = _TRACEPARENT.match(text)
    if match is None:
        return None
    version, trace, span, flags = match.groups()
    if version == "ff" or not trace.strip("0") or not span.strip("0"):
        return None
    if len(text) > LENGTH and (version == "00" or text[LENGTH] != "-"):
        return None
    return TraceParent(trace, span, bool(int(flags, 16) & SAMPLED))


def new_traceparent() -> str:
    """A trace of its own that is to be recorded."""
    return str(TraceParent(os.urandom(16).hex(), os.urandom(8).hex(), True))


def current_traceparent() -> str:
    """That of the caller's current OpenTelemetry span; '' where there is none, or the process does not use
    OpenTelemetry. It is not imported for this."""
    tracing: Any = sys.modules.get("opentelemetry.trace")
    if tracing is None:
        return ""
    context = tracing.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    return str(TraceParent(f"{context.trace_id:032x}", f"{context.span_id:016x}", bool(context.trace_flags & SAMPLED)))
