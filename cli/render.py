"""Answers for people and for programs."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from laxity.reply import Reply, Timing
from pipelines import format_duration


def as_json(value: Any) -> Any:
    """A pipeline's value as JSON has it: arrays as nested lists, bytes as base64 text."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return value


def reply_as_json(reply: Reply) -> dict[str, Any]:
    """How a request ended; times in seconds."""
    return {
        "outcome": str(reply.outcome),
        "output": as_json(reply.value),
        "remaining_s": reply.remaining,
        "stage": reply.stage,
        "detail": reply.detail,
        "short_by_s": reply.short_by,
        "request_id": reply.request_id,
        "timings": [
            {
                "stage": timing.stage,
                "queued_s": timing.queued,
                "execution_s": timing.execution,
                "batch": timing.batch,
                "items": timing.items,
                "remaining_s": timing.remaining,
            }
            for timing in reply.timings
        ],
    }


def as_text(value: Any) -> str:
    """A pipeline's value for people: lines of text where it has some, otherwise readable JSON."""
    lines = text_lines(value)
    if lines is not None:
        return "\n".join(text for text, _ in lines)
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return f"({len(value)} bytes; see them with --json)"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {list(value.shape)}\n{value}"
    return json.dumps(as_json(value), indent=2, ensure_ascii=False)


def text_lines(value: Any) -> list[tuple[str, float]] | None:
    """(text, confidence) of each line that a value like the one of ``ocr`` holds; None for other values."""
    lines = value.get("lines") if isinstance(value, dict) else None
    if not isinstance(lines, list):
        return None
    found = []
    for line in lines:
        if not (isinstance(line, dict) and isinstance(line.get("text"), str)):
            return None
        found.append((line["text"], float(line.get("confidence", 1.0))))
    return found


def timing_cells(timing: Timing) -> tuple[str, ...]:
    """A row of the table whose head is :data:`TIMING_HEAD`."""
    return (
        timing.stage,
        format_duration(timing.queued),
        format_duration(timing.execution),
        str(timing.batch),
        str(timing.items),
        format_duration(timing.remaining),
    )


TIMING_HEAD = ("stage", "queued", "execution", "batch", "items", "budget left")
