"""The keys of a cluster in its store. Two people may change them at once: what one does is never lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from cluster.keyring import KeyRefused, owner_of, state
from cluster.records import BrokerRecord, KeyRecord, NodeRecord, Paths, RecordError, decode, encode, name_of
from cluster.store import open_store
from cluster.store.base import Entry, Put, Store, StoreError, Unchanged

R = TypeVar("R", bound=msgspec.Struct)
TRIES = 20
"""How often a record that others keep changing is read again."""


class Unsettled(StoreError):
    """The store did not answer a change, which it may have made or not."""


class Keys(msgspec.Struct, frozen=True):
    """All keys at one moment, with the shards and agents that run. ``damaged`` are the names of records that cannot be
    read, with why."""

    records: dict[str, KeyRecord]
    damaged: dict[str, str]
    brokers: dict[str, BrokerRecord]
    nodes: dict[str, NodeRecord]


class KeyStore:
    """Reads and changes them. Raises StoreError, and :class:`Unsettled` where a change may have been made."""

    def __init__(self, store: Store, cluster: str) -> None:
        self._store = store
        self._paths = Paths(cluster)

    def read(self) -> Keys:
        """All there are."""
        entries = self._store.list((self._paths.keys, self._paths.brokers, self._paths.nodes)).entries
        damaged: dict[str, str] = {}
        return Keys(
            _decoded(KeyRecord, self._paths.keys, entries, damaged),
            damaged,
            _decoded(BrokerRecord, self._paths.brokers, entries, {}),
            _decoded(NodeRecord, self._paths.nodes, entries, {}),
        )

    def pipelines(self) -> set[str]:
        """The names of the applied pipelines."""
        return {name_of(entry.key) for entry in self._store.list(self._paths.pipelines).entries}

    def add(self, name: str, record: KeyRecord, now: float) -> None:
        """Let somebody in under a name that nobody has, or whose owner was revoked. Raises :class:`KeyRefused`."""
        key = self._paths.key(name)
        entry = self._store.get(key)
        if entry is not None:
            _check_free(name, decode(KeyRecord, key, entry.value), now)
        if not self._write(key, record, entry):
            raise KeyRefused(f"somebody else has just made a key {name!r}; see `laxity keys show {name}`")

    def change(self, name: str, decide: Callable[[KeyRecord], KeyRecord]) -> KeyRecord:
        """Have a record be what ``decide`` says of what it is, asked again where somebody else was faster. Raises
        :class:`KeyRefused`, also what ``decide`` does."""
        key = self._paths.key(name)
        for _ in range(TRIES):
            entry = self._store.get(key)
            if entry is None:
                raise KeyRefused(f"there is no key {name!r} any more")
            present = decode(KeyRecord, key, entry.value)
            wanted = decide(present)
            if wanted == present or self._write(key, wanted, entry):
                return wanted
        raise StoreError(f"the key {name!r} is changed by others all the time; try again")

    def _write(self, key: str, record: KeyRecord, entry: Entry | None) -> bool:
        """Whether the record could be written in place of ``entry``."""
        value = encode(record)
        try:
            unchanged = Unchanged(key, entry.mod_revision if entry is not None else 0)
            return self._store.transaction([unchanged], [Put(key, value)]) is not None
        except StoreError as error:
            return self._find_out(key, value, error)

    def _find_out(self, key: str, value: bytes, error: StoreError) -> bool:
        """Whether a change was made that the store did not acknowledge; raises ``error`` where it was not."""
        try:
            found = self._store.get(key)
        except StoreError:
            name = name_of(key)
            raise Unsettled(
                f"{error}; the change may have been made or not: see `laxity keys show {name}` when it answers"
            ) from error
        if found is not None and found.value == value:
            return True
        raise error


def look_at_keys(url: str, cluster: str) -> Keys:
    """What a store says of a cluster's keys now."""
    store = open_store(url)
    try:
        return KeyStore(store, cluster).read()
    finally:
        store.close()


def check_unused(public: str, keys: Mapping[str, KeyRecord]) -> None:
    """Raise :class:`KeyRefused` for a public key that somebody has or had."""
    owner = owner_of(public, keys)
    if owner is not None:
        raise KeyRefused(f"this public key is that of {owner!r} already; every owner needs one of its own")


def check_free(name: str, keys: Keys, now: float) -> None:
    """Raise :class:`KeyRefused` for a name that somebody has, unless that one was revoked."""
    if name in keys.records:
        _check_free(name, keys.records[name], now)
    if name in keys.damaged:
        raise RecordError(keys.damaged[name])


def _check_free(name: str, record: KeyRecord, now: float) -> None:
    if not record.revoked:
        raise KeyRefused(
            f"there is a key {name!r} already ({record.role}, {state(record, now)}): take another name, or give that "
            f"one a new pair with `laxity keys rotate {name}`, or revoke it first"
        )


def _decoded(kind: type[R], prefix: str, entries: list[Entry], damaged: dict[str, str]) -> dict[str, R]:
    found: dict[str, R] = {}
    for entry in entries:
        if entry.key.startswith(prefix):
            try:
                found[name_of(entry.key)] = decode(kind, entry.key, entry.value)
            except RecordError as error:
                damaged[name_of(entry.key)] = str(error)
    return found
