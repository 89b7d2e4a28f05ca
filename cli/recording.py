"""Recordings of traffic: files of MessagePack objects, one behind another (docs/recording.md has their format)."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgpack
import msgspec
import numpy as np

from laxity.node import ArrayNode, BytesNode, DictNode, ListNode, Node, PayloadError, TextNode
from laxity.payload import Payload, part_sizes
from laxity.protocol import MAX_HEADER
from simulation.metrics import Counts, Floats

VERSION: Final = 1
_MARK: Final = "laxity_recording"
_FLUSH_AT: Final = 1024 * 1024
_LARGEST: Final = 1024**3
"""Bytes of one object at most, so that a damaged length takes no more memory than that."""
LONGEST: Final = 1e9
"""Seconds that no recording, and no budget in it, is longer than."""
_END_ROOM: Final = 512
"""Bytes left for the last entry."""

_encode = msgspec.msgpack.Encoder().encode


class RecordingError(Exception):
    """A recording that cannot be written or read; the text says what to do."""


class Recorded(msgspec.Struct, array_like=True, frozen=True):
    """One request: ``offset`` in seconds from the recording's begin, ``budget`` in seconds (None: the pipeline's SLO).
    ``payload`` and ``parts`` are those of :class:`laxity.payload.Payload`; without ``parts`` only its outline is
    known."""

    offset: float
    pipeline: str
    budget: float | None
    priority: int
    payload: Node
    parts: list[bytes] | None

    def content(self) -> Payload:
        """What was sent; where that was not recorded, something of the same structure and size."""
        sizes: list[int] = []
        part_sizes(self.payload, sizes)
        return Payload(self.payload, self._parts(), sum(sizes))

    def _parts(self) -> list[bytes]:
        return list(_made_up(self.payload)) if self.parts is None else self.parts


class Writer:
    """Writes a recording to a new file; whatever goes wrong, the file ends with a whole entry.

    Raises :class:`RecordingError` for a file that cannot be made or written further, and is to be used no more then.
    """

    def __init__(self, file: Path, about: dict[str, Any], max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._file = file
        self.requests = 0
        self.lost = 0
        self.size = 0
        """Bytes in the file and waiting to be written there."""
        self._on_disk = 0
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        try:
            self._to = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            raise RecordingError(f"{file} is there already: choose another name, or remove it") from None
        except OSError as error:
            raise RecordingError(f"{file} cannot be made: {error.strerror}") from error
        self._append({_MARK: VERSION, **about})
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._to)

    def add(self, recorded: Recorded) -> bool:
        """Append a request; False where the file may not become that large."""
        if not self._append(recorded):
            return False
        self.requests += 1
        return True

    def add_lost(self, offset: float, shard: str, lost: int) -> None:
        """Note that so many requests of a shard were not told until now."""
        self.lost += lost
        self._append({"lost": lost, "shard": shard, "offset": offset})

    def end(self, seconds: float) -> None:
        """Write what is left and the last entry."""
        last = {"end": seconds, "requests": self.requests, "lost": self.lost}
        self._append(last, room=0)
        self.flush()

    def _append(self, entry: Any, room: int = _END_ROOM) -> bool:
        raw = _encode(entry)
        if self.size + len(raw) > self._max_bytes - room:
            return False
        self.size += len(raw)
        self._waiting.append(raw)
        self._waiting_bytes += len(raw)
        if self._waiting_bytes >= _FLUSH_AT:
            self.flush()
        return True

    def flush(self) -> None:
        """Hand everything to the system."""
        waiting = b"".join(self._waiting)
        sizes = [len(entry) for entry in self._waiting]
        self._waiting = []
        self._waiting_bytes = 0
        done = 0
        view = memoryview(waiting)
        try:
            while done < len(waiting):
                done += os.write(self._to, view[done:])
        except OSError as error:
            for size in sizes:
                if done < size:
                    break
                self._on_disk += size
                done -= size
            os.ftruncate(self._to, self._on_disk)
            raise RecordingError(
                f"{self._file} cannot be written: {error.strerror}; what was recorded before is in it, as far as "
                f"{self._on_disk:,} bytes go, and can be replayed"
            ) from error
        self._on_disk += done


class Recording(msgspec.Struct, frozen=True):
    """What a look through a recording found."""

    file: Path
    offsets: Floats
    """Seconds from the begin at which requests came, ascending."""
    names: list[str]
    """The pipelines that they are of,"""
    which: Counts
    """and for each request the number of its own among these."""
    seconds: float
    """Its length: until it was ended, or until the last request where it was not."""
    lost: int
    """Requests that came and are not in it."""
    ended: bool
    """False where it was not ended properly: the recorder died, or the disk was full."""
    payloads: bool
    """Whether what is in the payloads was recorded, too."""


def scan(file: Path) -> Recording:
    """Read a recording through. Raises :class:`RecordingError`, with how much of it can be read, where it is
    damaged."""
    offsets = array("d")
    which = array("L")
    names: dict[str, int] = {}
    last: dict[str, Any] | None = None
    lost = 0
    payloads = True
    latest = 0.0
    for entry in _entries(file):
        if isinstance(entry, Recorded):
            latest = max(latest, entry.offset)
            offsets.append(latest)
            which.append(names.setdefault(entry.pipeline, len(names)))
            payloads = payloads and entry.parts is not None
        elif "end" in entry:
            last = entry
        else:
            lost += int(entry.get("lost", 0))
    seconds = latest if last is None else max(float(last["end"]), latest)
    numbers = np.array(which, dtype=np.int64)
    return Recording(file, np.array(offsets), list(names), numbers, seconds, lost, last is not None, payloads)


def requests(file: Path) -> Iterator[Recorded]:
    """The requests of a recording in order, read as they are asked for."""
    return (entry for entry in _entries(file) if isinstance(entry, Recorded))


def _entries(file: Path) -> Iterator[Recorded | dict[str, Any]]:
    """What follows the first entry."""
    try:
        with file.open("rb") as stream:
            yield from _unpacked(file, stream, os.fstat(stream.fileno()).st_size)
    except OSError as error:
        raise RecordingError(f"{file} cannot be read: {error.strerror}") from error


def _unpacked(file: Path, stream: Any, size: int) -> Iterator[Recorded | dict[str, Any]]:
    unpacker = msgpack.Unpacker(
        stream, raw=False, max_buffer_size=_LARGEST, max_array_len=MAX_HEADER, max_map_len=MAX_HEADER
    )
    good = count = 0
    latest = 0.0
    why = ""
    try:
        head = next(unpacker, None)
        if not isinstance(head, dict) or _MARK not in head:
            raise RecordingError(f"{file} is no recording: `laxity record` makes some")
        if head[_MARK] != VERSION:
            raise RecordingError(f"{file} is a recording of version {head[_MARK]!r}, and only {VERSION} is known here")
        good = unpacker.tell()
        for entry in unpacker:
            if isinstance(entry, dict):
                yield _note(entry)
            else:
                recorded = _checked(entry)
                count += 1
                latest = max(latest, recorded.offset)
                yield recorded
            good = unpacker.tell()
    except (msgspec.ValidationError, PayloadError) as error:
        why = f"what follows is no request: {error}"
    except (msgpack.UnpackException, msgpack.BufferFull, ValueError, RecursionError) as error:
        if not good:
            raise RecordingError(f"{file} is no recording: `laxity record` makes some") from error
        why = f"what follows cannot be read: {error or type(error).__name__}"
    if not why and good < size:
        why = "it ends in the middle of an entry"
    if why:
        raise RecordingError(
            f"{file} is damaged behind byte {good:,} of {size:,} ({why}). The {count:,} requests before that, "
            f"{latest:.1f} s, can be read: `truncate -s {good} {file}` keeps those"
        )


def _note(entry: dict[Any, Any]) -> dict[str, Any]:
    """What an entry says beside the requests: how many were lost, or that this is the end."""
    lost, end = entry.get("lost", 0), entry.get("end", 0.0)
    if not (isinstance(lost, int) and lost >= 0 and isinstance(end, int | float) and 0 <= end < LONGEST):
        raise PayloadError("its numbers cannot be")
    return entry


def _checked(entry: Any) -> Recorded:
    recorded = msgspec.convert(entry, Recorded)
    sizes: list[int] = []
    part_sizes(recorded.payload, sizes)
    if sum(sizes) > _LARGEST:
        raise PayloadError(f"its payload is told to have {sum(sizes):,} bytes")
    if recorded.parts is not None and [len(part) for part in recorded.parts] != sizes:
        raise PayloadError("its payload's parts are not of the sizes told")
    if not (0 <= recorded.offset < LONGEST and (recorded.budget is None or 0 < recorded.budget < LONGEST)):
        raise PayloadError("its times cannot be")
    return recorded


def _made_up(node: Node) -> Iterator[bytes]:
    """Parts for a node of which only sizes are known: zeros, and texts of x."""
    if isinstance(node, BytesNode | ArrayNode):
        yield bytes(node.size)
    elif isinstance(node, TextNode):
        yield b"x" * node.size
    elif isinstance(node, ListNode | DictNode):
        for child in node.items.values() if isinstance(node, DictNode) else node.items:
            yield from _made_up(child)
