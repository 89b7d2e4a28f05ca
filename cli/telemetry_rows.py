"""Reads telemetry's files, those of a running cluster too: row by row, whatever their size."""

from __future__ import annotations

import csv
import heapq
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import msgspec

from cluster.telemetry import ACTIONS, REQUESTS, ActionRow, RequestRow
from cluster.telemetry_files import parse_name

AnyRow = ActionRow | RequestRow
KINDS: dict[str, type[ActionRow] | type[RequestRow]] = {ACTIONS: ActionRow, REQUESTS: RequestRow}
LOOK = 0.5
"""Seconds between two looks for new rows."""


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows are wanted; '' and 0 mean all. ``model`` is a part of an action's model, ``outcome`` a request's
    outcome or an action's code, ``since`` in Unix seconds."""

    model: str = ""
    pipeline: str = ""
    outcome: str = ""
    since: float = 0.0

    def takes(self, row: AnyRow) -> bool:
        if isinstance(row, ActionRow):
            pipeline, end = row.model.partition("@")[0], row.code
            if self.model not in row.model:
                return False
        else:
            pipeline, end = row.pipeline, row.outcome
        return (
            row.at >= self.since
            and (not self.pipeline or pipeline == self.pipeline)
            and (not self.outcome or end == self.outcome)
        )


class Troubles:
    """What could not be read, counted."""

    def __init__(self) -> None:
        self.malformed = 0
        """Lines that are no rows."""
        self.unfinished = 0
        """Files whose last line has no end: what wrote them was killed, or is just writing."""
        self.strange: list[str] = []
        """Files that do not begin with a head."""
        self.first = ""
        """Where the first malformed line stands, and what is wrong with it."""

    def note(self, path: Path, number: int, why: str) -> None:
        self.malformed += 1
        if not self.first:
            self.first = f"{path}:{number}: {why}"


class Tail:
    """One file, read as far as it is written: each call of :meth:`rows` goes on where the last one ended."""

    def __init__(self, path: Path, kind: str, troubles: Troubles) -> None:
        self._path = path
        self._kind = KINDS[kind]
        self._troubles = troubles
        self._offset = 0
        self._line = 0
        self._head: list[str] | None = None
        self._strange = False
        self._rest = b""

    def rows(self) -> Iterator[AnyRow]:
        """The complete rows that were added; none where the file is gone."""
        if self._strange:
            return
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                self._rest = line
                if not line.endswith(b"\n"):
                    return
                self._rest = b""
                self._offset += len(line)
                self._line += 1
                row = self._parse(line)
                if row is not None:
                    yield row
                if self._strange:
                    return

    def end(self) -> None:
        """No more is to be read: note a line that was begun."""
        if self._rest:
            self._troubles.unfinished += 1

    def _parse(self, line: bytes) -> AnyRow | None:
        try:
            text = line.decode().rstrip("\r\n")
            fields = next(csv.reader([text])) if '"' in text else text.split(",")
            if self._head is None:
                self._head = fields
                self._strange = not _required(self._kind) <= set(fields)
                if self._strange:
                    self._troubles.strange.append(str(self._path))
                return None
            if len(fields) != len(self._head):
                raise ValueError(f"{len(fields)} fields, the head has {len(self._head)}")
            found = {name: field for name, field in zip(self._head, fields, strict=True) if field}
            for name in _texts(self._kind) - found.keys():
                found[name] = ""
            return msgspec.convert(found, self._kind, strict=False)
        except (ValueError, csv.Error, StopIteration) as error:
            self._troubles.note(self._path, self._line, str(error) or "empty")
            return None


class Files:
    """The telemetry files in directories (or files named one by one)."""

    def __init__(self, places: Sequence[Path], kinds: Iterable[str]) -> None:
        self._places = places
        self._kinds = set(kinds)
        self._tails: dict[Path, Tail] = {}
        self.troubles = Troubles()

    def found(self) -> dict[tuple[str, str], list[Path]]:
        """The files there are, by (kind, process), the oldest first."""
        files: dict[tuple[str, str], list[tuple[str, Path]]] = {}
        for place in self._places:
            for path in [place] if place.is_file() else _listed(place):
                name = parse_name(path.name)
                if name is not None and name[0] in self._kinds:
                    files.setdefault(name[:2], []).append((name[2], path))
        return {key: [path for _, path in sorted(files[key])] for key in sorted(files)}

    def rows(self) -> Iterator[AnyRow]:
        """All rows that were added since the last call: a process after the other, in the order in which they ended."""
        for (kind, _), paths in self.found().items():
            yield from self._of(kind, paths)

    def rows_by_time(self) -> Iterator[AnyRow]:
        """The same rows, those of the processes merged by time."""
        streams = [self._of(kind, paths) for (kind, _), paths in self.found().items()]
        return heapq.merge(*streams, key=lambda row: row.at)

    def follow(self) -> Iterator[AnyRow]:
        """The rows that are added from now on, without end."""
        while True:
            time.sleep(LOOK)
            yield from self.rows_by_time()

    def end(self) -> None:
        """No more is to be read."""
        for tail in self._tails.values():
            tail.end()

    def _of(self, kind: str, paths: list[Path]) -> Iterator[AnyRow]:
        for path in paths:
            tail = self._tails.get(path)
            if tail is None:
                tail = self._tails[path] = Tail(path, kind, self.troubles)
            yield from tail.rows()


def _listed(place: Path) -> list[Path]:
    try:
        return list(place.iterdir())
    except FileNotFoundError:
        return []


@cache
def _required(kind: type[msgspec.Struct]) -> set[str]:
    return {field.name for field in msgspec.structs.fields(kind) if field.required}


@cache
def _texts(kind: type[msgspec.Struct]) -> set[str]:
    """The columns that may well be an empty text."""
    return {field.name for field in msgspec.structs.fields(kind) if field.type is str and field.required}
