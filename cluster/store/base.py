"""The store's contract: small, and the same for memory, SQLite and etcd.

Keys are texts such as ``/laxity/demo/pipelines/ocr``; values are bytes. Every write gets the next
*revision* of the whole store. All calls block and are thread-safe; :class:`StoreError` is raised when
the store cannot be reached or written (a full disk, a locked file), with what to do in its text. Over a network, and
then its text says so, a write that failed may have been done all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

HISTORY = 2000
"""How many past revisions a store keeps for watches unless told otherwise."""


class StoreError(Exception):
    """The store did not do what was asked; the text says why and what to do."""


class Entry(msgspec.Struct, frozen=True):
    """A key's state: ``create_revision`` when it came to be, ``mod_revision`` when it was last written."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


class Listing(msgspec.Struct, frozen=True):
    """The entries under one prefix or several as of ``revision``, ordered by key."""

    entries: list[Entry]
    revision: int


class Put(msgspec.Struct, frozen=True):
    """Write a key; with ``lease`` it vanishes when that lease does."""

    key: str
    value: bytes
    lease: int = 0


class Delete(msgspec.Struct, frozen=True):
    """Remove a key; removing one that is not there is no error."""

    key: str


Operation = Put | Delete

Prefix = str | tuple[str, ...]
"""One prefix of keys, or several, as ``str.startswith`` takes them: a key under any of them is meant."""


class Unchanged(msgspec.Struct, frozen=True):
    """Holds iff the key's ``mod_revision`` is this one (0: the key does not exist)."""

    key: str
    mod_revision: int


class Event(msgspec.Struct, frozen=True):
    """One change seen by a watch: ``entry`` is the new state, or None where the key was deleted (or its
    lease ended)."""

    key: str
    entry: Entry | None
    revision: int


class StoreAwayError(StoreError):
    """Nobody answers at present; later somebody may."""


class LeaseEndedError(StoreError):
    """The lease named in a put has ended (or never was): take a new one and write again."""


class CompactedError(StoreError):
    """The revision asked for is no longer kept: list again and watch from there."""


def check_operations(operations: Sequence[Operation]) -> None:
    """ValueError where a transaction names a key twice or something that is no key."""
    seen = set()
    for operation in operations:
        check_key(operation.key)
        if operation.key in seen:
            raise ValueError(f"the key {operation.key!r} stands twice in one transaction")
        seen.add(operation.key)


def check_key(key: str) -> None:
    """ValueError where ``key`` is no key: keys start with '/' and are valid Unicode without NUL."""
    if not key.startswith("/") or "\0" in key:
        raise ValueError(f"{key!r} is no key: keys start with '/' and hold no NUL")
    key.encode()


def normalized(prefix: Prefix) -> tuple[str, ...]:
    """The prefixes in order, without those that another one covers: no key is under two of them."""
    prefixes = (prefix,) if isinstance(prefix, str) else prefix
    found: list[str] = []
    for candidate in sorted(set(prefixes)):
        # In order, what covers a prefix comes before it, and nothing but what it covers too comes between.
        if not found or not candidate.startswith(found[-1]):
            found.append(candidate)
    return tuple(found)


def check_ttl(ttl: float) -> None:
    """ValueError where ``ttl`` is no duration in seconds."""
    if not 0 < ttl < float("inf"):
        raise ValueError(f"a lease's ttl must be above 0 seconds and finite, not {ttl}")


class Watch(Protocol):
    """The changes under one prefix or several, in order, each once.

    In order: by revision for each key. What one transaction did to several keys may come in several parts, and what
    was done later under another prefix before it.
    """

    def get(self, timeout: float | None = None) -> list[Event]:
        """The next changes; waits until there is one, [] after ``timeout`` seconds without any (or once
        closed). From a store on other machines changes arrive a little after they were made.

        Raises :class:`CompactedError` or :class:`StoreError`; then the watch is over.
        """
        ...

    def close(self) -> None: ...


class Store(Protocol):
    """See the module's text."""

    def get(self, key: str) -> Entry | None: ...

    def list(self, prefix: Prefix) -> Listing:
        """The entries under ``prefix``, all as of one revision."""
        ...

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write one key; the new revision."""
        ...

    def delete(self, key: str) -> bool:
        """Remove one key; whether it was there."""
        ...

    def transaction(self, conditions: Sequence[Unchanged], operations: Sequence[Operation]) -> int | None:
        """Do all operations as one revision if all conditions hold; the revision, or None if one did not.

        The operations must be on different keys. Where they change nothing (deletes of absent keys, no
        operations) there is no new revision, and the store's present one is returned.
        """
        ...

    def watch(self, prefix: Prefix, from_revision: int) -> Watch:
        """The changes under ``prefix`` with a revision of ``from_revision`` or later (list at R, then watch
        from R+1)."""
        ...

    def grant_lease(self, ttl: float) -> int:
        """A new lease that ends ``ttl`` seconds after its last keep-alive (no sooner; later where the store has a
        coarser clock); its (positive) number."""
        ...

    def keep_alive(self, lease: int) -> bool:
        """Prolong a lease; False where it has already ended (then its keys are gone)."""
        ...

    def revoke(self, lease: int) -> None:
        """End a lease now, and with it its keys."""
        ...

    def close(self) -> None: ...
