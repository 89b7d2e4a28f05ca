"""Telemetry's files on disk: rows of one kind by one process, in files of bounded size and number.

``actions-gpu-7-20260725T101112.123456Z.csv`` has what the agent gpu-7 did from that moment (UTC) on. A file is full at
its part of the limit; the oldest of the same kind and process makes room for the next.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

FILES: Final = 8
"""Files of one kind that a process keeps."""
_STAMP = r"\d{8}T\d{6}\.\d{6}Z"
_NAME = re.compile(rf"([a-z]+)-(.+)-({_STAMP})\.csv")


def parse_name(name: str) -> tuple[str, str, str] | None:
    """(kind, who, when) of a telemetry file's name; None for other files. ``when`` sorts by time."""
    match = _NAME.fullmatch(name)
    return (match[1], match[2], match[3]) if match else None


class RotatingFiles:
    """``limit`` is in bytes, for all files of this kind by this process together; ``header`` begins each of them."""

    def __init__(self, directory: Path, kind: str, who: str, header: bytes, limit: int) -> None:
        self._directory = directory
        self._kind = kind
        self._who = who
        self._header = header
        self._most = max(limit // FILES, len(header) + 1)
        self._path: Path | None = None
        """Of the newest file, which is open or was."""
        self._file: int | None = None
        self._size = 0
        """Of its complete lines, in bytes."""

    def write(self, lines: bytes) -> None:
        """Append complete lines. OSError where that fails: then none of them is there, as far as can be helped, and
        the next call tries anew."""
        try:
            file = self._file
            full = self._size > len(self._header) and self._size + len(lines) > self._most
            if file is not None and (full or not os.fstat(file).st_nlink):
                # Full, or somebody deleted it: what is written there would be lost without an error.
                self.close()
                self._path = None
            if self._file is None:
                self._file = self._open()
            self._append(self._file, lines)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _append(self, file: int, lines: bytes) -> None:
        written = 0
        try:
            while written < len(lines):
                written += os.write(file, lines[written:])
        except OSError:
            if written:
                os.ftruncate(file, self._size)
            raise
        self._size += written

    def _open(self) -> int:
        """The newest file again after an error, or a new one."""
        if self._path is not None:
            try:
                file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            except FileNotFoundError:
                pass
            else:
                os.ftruncate(file, self._size)
                return file
        self._directory.mkdir(parents=True, exist_ok=True)
        self._make_room()
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        path = self._directory / f"{self._kind}-{self._who}-{stamp}.csv"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._size = 0
        try:
            self._append(file, self._header)
        except OSError:
            os.close(file)
            path.unlink()
            raise
        self._path = path
        return file

    def _make_room(self) -> None:
        """Delete the oldest files, so that there is room for one more."""
        mine = (self._kind, self._who)
        found = []
        for path in self._directory.iterdir():
            name = parse_name(path.name)
            if name is not None and name[:2] == mine:
                found.append((name[2], path))
        for _, path in sorted(found)[: len(found) - (FILES - 1)] if len(found) >= FILES else []:
            path.unlink(missing_ok=True)
