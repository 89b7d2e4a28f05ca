"""Files that hold secrets: read only where nobody but their owner can."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class NotPrivate(ValueError):
    """A file cannot be used as a secret's; the text says why and what to do."""


def read_private(path: str | Path, most: int, replace: str) -> bytes:
    """What a file of ``most`` bytes at most says. ``replace`` tells people how to get another secret (as in 'replace
    the key'). Raises :class:`NotPrivate` where it is no file, others can read it, or it is too large; OSError."""
    with open(path, "rb", opener=_open) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise NotPrivate(f"{path} is no file")
        if found.st_mode & 0o077:
            raise NotPrivate(
                f"{path} can be read by others (mode {stat.S_IMODE(found.st_mode):04o}), so it is secret no more: "
                f"{replace}, or, if nobody was there, chmod 600 {path}"
            )
        text = file.read(most + 1)
    if len(text) > most:
        raise NotPrivate(f"{path} has more than {most} bytes")
    return text


def stamp(path: str | Path) -> tuple[int, ...]:
    """Becomes another when the file does, or whether and by whom it can be read."""
    try:
        found = os.stat(path)
    except OSError as error:
        return (error.errno or 0,)
    return found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe is not waited for, but refused
