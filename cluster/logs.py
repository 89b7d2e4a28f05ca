"""How the processes of a cluster log: lines for people or JSON for programs, with the ids of what a line speaks of.

Whoever logs gives ``extra=`` with some of :data:`FIELDS`. In JSON they are keys of their own; as text the ids among
them, which messages leave out, follow the message. Both may be changed while a process runs.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Any, Final, Literal, get_args

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]
FORMATS: Final[Sequence[str]] = get_args(Format)
LEVELS: Final[Sequence[str]] = get_args(Level)

IDS: Final = ("request", "requests", "batch", "action")
"""Fields that messages leave out: `request` is 'client:number', `batch` and `action` are numbers at a device."""
FIELDS: Final = ("shard", "agent", "device", "client", "pipeline", "stage", "model", "coordinator", *IDS)
"""What a line may speak of."""


class JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, logger, process and name, message, and the fields there are."""

    def __init__(self, process: str, name: str) -> None:
        super().__init__()
        self._process = process
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": rfc3339(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "name": self._name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        line.update(fields_of(record))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Time, level, logger and message, as people read them; the ids behind it in brackets. What peers say gets into
    messages: it can neither begin a line that looks like another one, nor steer a terminal."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        ids = [f"{name} {_plain(value)}" for name, value in fields_of(record).items() if name in IDS]
        return shown(f"{text} [{', '.join(ids)}]" if ids else text)


def configure_logs(format: str, level: str, process: str, name: str) -> None:
    """Have this process log to stderr like this from now on: ``process`` is what it is ('shard'), ``name`` which one.
    May be called again."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
    for handler in root.handlers:
        handler.setFormatter(JsonFormatter(process, name) if format == "json" else TextFormatter())
    root.setLevel(level.upper())


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of :data:`FIELDS` that a line has."""
    values = record.__dict__
    return {name: values[name] for name in FIELDS if name in values}


def shown(text: str) -> str:
    """A text as a terminal may be given it: later lines are indented, control characters told by their codes."""
    if text.isprintable():
        return text
    lines = ["".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line) for line in text.split("\n")]
    return "\n    ".join(lines)


def rfc3339(seconds: float) -> str:
    """A Unix time as in 2031-04-05T06:07:08.123Z."""
    whole = int(seconds)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((seconds - whole) * 1000):03d}Z"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
