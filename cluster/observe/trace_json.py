"""Traces as JSON, with the fields' names."""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.observe.trace import Estimate, StageSpan, TraceRecord


def trace_to_json(trace: TraceRecord) -> dict[str, Any]:
    """A trace as an object of JSON."""
    found = msgspec.structs.asdict(trace)
    found["spans"] = [msgspec.structs.asdict(span) for span in trace.spans]
    found["estimate"] = None if trace.estimate is None else msgspec.structs.asdict(trace.estimate)
    return found


def trace_from_json(found: dict[str, Any]) -> TraceRecord:
    """The trace that :func:`trace_to_json` made this of. KeyError, TypeError or msgspec.ValidationError for another
    thing."""
    estimate = found["estimate"]
    values = {
        **found,
        "spans": [_array(StageSpan, span) for span in found["spans"]],
        "estimate": None if estimate is None else _array(Estimate, estimate),
    }
    return msgspec.convert(_array(TraceRecord, values), TraceRecord)


def _array(kind: type[msgspec.Struct], values: dict[str, Any]) -> list[Any]:
    return [values[name] for name in kind.__struct_fields__]
