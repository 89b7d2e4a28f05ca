"""What workers write, in their agent's log: what libraries and the stages' own code print or log, line by line, with
the model that was at work."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from typing import IO, Any, Final

log = logging.getLogger("laxity.worker")

MARK: Final = "\x1e"
"""Begins a line that says more than its text: its level, and who wrote it."""
LONGEST: Final = 16_384
"""Characters of a line; what is longer becomes several."""
MOST_BYTES: Final = 16 * LONGEST
"""Of a line as it is handed over: JSON takes up to twelve for a character."""

_at_work = threading.local()


def note_work(model: str) -> None:
    """What this thread writes from now on is a model's."""
    _at_work.model = model


# ---- in the worker --------------------------------------------------------------------------------


class _Lines(io.TextIOBase):
    """A text stream that hands over whole lines, each thread's own, with the model that the thread works on."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, descriptor: int, level: int) -> None:
        self.buffer = io.FileIO(descriptor, "wb", closefd=False)
        """For who writes bytes."""
        self._descriptor = descriptor
        self._level = level
        self._begun = threading.local()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._begun, "text", "") + text).split("\n")
        if len(rest) > LONGEST:
            whole = (len(rest) - 1) // LONGEST * LONGEST
            lines.append(rest[:whole])
            rest = rest[whole:]
        self._begun.text = rest
        for line in lines:
            _say(self._descriptor, self._level, line)
        return len(text)


class _Handler(logging.Handler):
    """Hands over a log's lines with their levels."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _say(self._descriptor, record.levelno, self.format(record), record.name)
        except Exception:
            self.handleError(record)


def speak_in_lines() -> None:
    """Have everything that this process prints and logs come to its agent line by line. What its libraries write past
    Python comes as it is."""
    descriptor = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
    sys.stdout = _Lines(descriptor, logging.INFO)
    sys.stderr = _Lines(descriptor, logging.WARNING)
    root = logging.getLogger()
    root.handlers = [_Handler(descriptor)]
    root.setLevel(logging.WARNING)


def _say(descriptor: int, level: int, text: str, logger: str = "") -> None:
    for line in text.split("\n"):
        for begin in range(0, max(len(line), 1), LONGEST):
            part = line[begin : begin + LONGEST]
            said = {"level": level, "logger": logger, "model": getattr(_at_work, "model", ""), "text": part}
            os.write(descriptor, f"{MARK}{json.dumps(said)}\n".encode())


# ---- in the agent ---------------------------------------------------------------------------------


def log_output(output: IO[bytes], pid: int, device: str) -> None:
    """Log what a worker writes, in a thread that ends with it. Nothing of it is waited for."""
    threading.Thread(target=_log_lines, args=(output, pid, device), name=f"output of {pid}", daemon=True).start()


def _log_lines(output: IO[bytes], pid: int, device: str) -> None:
    with output:
        while line := output.readline(MOST_BYTES):
            text = line.decode(errors="replace").rstrip("\n")
            if text:
                _log_line(text, pid, device)


def _log_line(text: str, pid: int, device: str) -> None:
    level, model, logger = logging.WARNING, "", ""
    if text.startswith(MARK):
        try:
            said: dict[str, Any] = json.loads(text[1:])
            level, model = int(said["level"]), str(said["model"])
            text, logger = str(said["text"]), str(said["logger"])
        except (ValueError, KeyError, TypeError):
            pass  # torn by what another one wrote in between
    pipeline, _, stage = model.partition("/")
    extra: dict[str, Any] = {"device": device}
    if model:
        extra |= {"model": model, "stage": stage, "pipeline": pipeline.partition("@")[0]}
    who = f"worker {pid} on {device}" + (f", {model}" if model else "") + (f", {logger}" if logger else "")
    log.log(level, "%s: %s", who, text, extra=extra)
