"""The store's entries as records: each decoded once, when it changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from cluster.records import RecordError, decode, name_of
from cluster.store.base import Entry

log = logging.getLogger("laxity.cluster")

R = TypeVar("R", bound=msgspec.Struct)


class Decoded:
    """Records by the names at the ends of their keys. One that cannot be read is said once, and counts as
    what it was before; without that it is left out."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, msgspec.Struct | None]] = {}
        self._unreadable: set[str] = set()
        self._entries: Mapping[str, Entry] = {}

    def update(self, entries: Mapping[str, Entry]) -> None:
        """``entries`` by key, as they are now."""
        self._entries = entries
        self._known = {key: known for key, known in self._known.items() if key in entries}
        self._unreadable &= entries.keys()

    def under(self, kind: type[R], prefix: str) -> dict[str, R]:
        """The records of a kind under a prefix."""
        return {name_of(key): record for key, record in self.by_key(kind, prefix).items()}

    def by_key(self, kind: type[R], prefix: str) -> dict[str, R]:
        """:meth:`under`, by the whole keys."""
        found: dict[str, R] = {}
        for key, entry in self._entries.items():
            if key.startswith(prefix):
                record = self._record(kind, key, entry)
                if record is not None:
                    found[key] = record
        return found

    def unreadable(self, prefix: str) -> set[str]:
        """The keys under a prefix whose records, as :meth:`by_key` found them last, cannot be read."""
        return {key for key in self._unreadable if key.startswith(prefix)}

    def keys(self, prefix: str) -> set[str]:
        """The keys under a prefix, also of records that cannot be read."""
        return {key for key in self._entries if key.startswith(prefix)}

    def names(self, prefix: str) -> set[str]:
        """The names under a prefix, also of records that cannot be read."""
        return {name_of(key) for key in self.keys(prefix)}

    def _record(self, kind: type[R], key: str, entry: Entry) -> R | None:
        known = self._known.get(key)
        if known is not None and known[0] == entry.mod_revision:
            return known[1]  # type: ignore[return-value]
        record: R | None = known[1] if known is not None else None  # type: ignore[assignment]
        self._unreadable.discard(key)
        try:
            record = decode(kind, key, entry.value)
        except RecordError as error:
            log.error("%s", error)
            self._unreadable.add(key)
        self._known[key] = (entry.mod_revision, record)
        return record
