"""Stage ``texts``: what is to be compared, as the items of one list."""

from __future__ import annotations

from typing import Any


def gather(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each picture its ``text`` (the lines that were read, joined), and the ``items`` to embed: the text, then the
    ``labels``; none where there is no text."""
    return [_gathered(each["lines"], each["labels"]) for each in inputs]


def _gathered(lines: list[dict[str, Any]], labels: list[str]) -> dict[str, Any]:
    text = " ".join(line["text"] for line in lines).strip()
    return {"text": text, "items": [text, *labels] if text else []}


def sample() -> dict[str, Any]:
    """For profiling: the lines of a short letter and some labels."""
    lines = ("Dear Ms Ferrar,", "the invoice is due in 30 days.", "Yours sincerely")
    return {"lines": [{"text": line, "confidence": 0.9} for line in lines], "labels": ["billing", "sports", "weather"]}
