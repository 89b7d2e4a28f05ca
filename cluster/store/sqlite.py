"""``sqlite:///path``: the embedded store: one host, several processes, durable.

Every write is one SQLite transaction in WAL mode with full synchronisation, so what a call returned
survives a crash and a power cut. Leases run on the host's monotonic clock, which all its processes share
and which stands still while the host is suspended (as their keep-alives do); they end at a reboot. Whoever
touches the store next ends the leases that are due. Watches poll the revision, at :data:`POLL`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.store.base import (
    HISTORY,
    CompactedError,
    Delete,
    Entry,
    Event,
    LeaseEndedError,
    Listing,
    Operation,
    Prefix,
    Put,
    StoreError,
    Unchanged,
    check_key,
    check_operations,
    check_ttl,
    normalized,
)

POLL = 0.03
"""How often a waiting watch looks for other processes' writes, in seconds."""
BUSY = 10.0
"""How long a call waits for other processes' writes, in seconds."""
FORMAT = 1
"""``user_version`` of the file."""

_SCHEMA = """
CREATE TABLE state (
    id INTEGER PRIMARY KEY CHECK (id = 1), revision INTEGER NOT NULL, compacted INTEGER NOT NULL);
INSERT INTO state VALUES (1, 0, 0);
CREATE TABLE leases (
    id INTEGER PRIMARY KEY AUTOINCREMENT, ttl REAL NOT NULL, expires REAL NOT NULL, boot TEXT NOT NULL);
CREATE TABLE entries (
    key TEXT PRIMARY KEY, value BLOB NOT NULL,
    create_revision INTEGER NOT NULL, mod_revision INTEGER NOT NULL, lease INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX entries_by_lease ON entries (lease) WHERE lease != 0;
CREATE TABLE history (
    id INTEGER PRIMARY KEY, revision INTEGER NOT NULL, key TEXT NOT NULL, value BLOB,
    create_revision INTEGER NOT NULL, lease INTEGER NOT NULL);
CREATE INDEX history_by_revision ON history (revision);
"""


def boot_id() -> str:
    """What tells one boot of this host from the next: the monotonic clock starts again with it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class SqliteStore:
    """The store's contract over one SQLite file; see :class:`cluster.store.base.Store`.

    ``history`` is how many revisions a watch may lie behind, ``clock`` (seconds, monotonic, the same in all
    processes) and ``boot`` end leases.
    """

    def __init__(
        self,
        path: str | Path,
        history: int = HISTORY,
        clock: Callable[[], float] = time.monotonic,
        boot: str | None = None,
        busy: float = BUSY,
    ) -> None:
        self._path = Path(path)
        self._history = history
        self._clock = clock
        self._boot = boot if boot is not None else boot_id()
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        if not self._path.parent.is_dir():
            raise StoreError(f"the store's directory {self._path.parent} does not exist; create it first")
        with self._explained():
            self._db = sqlite3.connect(
                self._path, timeout=busy, isolation_level=None, check_same_thread=False, cached_statements=64
            )
            try:
                self._prepare(busy)
            except BaseException:
                self._db.close()
                raise
            self._file = self._identity()

    def _prepare(self, busy: float) -> None:
        # The switch to WAL does not always wait for other openers, whatever the busy timeout says.
        deadline = time.monotonic() + busy
        while True:
            try:
                (mode,) = self._db.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if mode != "wal":
            raise StoreError(
                f"{self._path} cannot be shared between processes where it lies (journal mode {mode!r}); "
                "put the store on a local disk"
            )
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("BEGIN IMMEDIATE")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            if self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise StoreError(f"{self._path} is another program's database; name another path")
            for statement in _SCHEMA.split(";\n"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {FORMAT}")
        elif version != FORMAT:
            raise StoreError(
                f"{self._path} has format {version}, this version of laxity reads {FORMAT}; "
                "use the version that wrote it, or remove the file to start afresh"
            )
        self._db.execute("COMMIT")

    def get(self, key: str) -> Entry | None:
        check_key(key)
        with self._reading() as db:
            row = db.execute(
                "SELECT key, value, create_revision, mod_revision, lease FROM entries WHERE key = ?", (key,)
            ).fetchone()
            return Entry(*row) if row else None

    def list(self, prefix: Prefix) -> Listing:
        with self._reading() as db:
            entries = [
                Entry(*row)
                for one in normalized(prefix)
                for row in db.execute(
                    "SELECT key, value, create_revision, mod_revision, lease FROM entries"
                    " WHERE key >= ?1 AND substr(key, 1, length(?1)) = ?1 ORDER BY key",
                    (one,),
                ).fetchall()
            ]
            return Listing(entries, _revision(db))

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        revision = self.transaction([], [Put(key, value, lease)])
        assert revision is not None
        return revision

    def delete(self, key: str) -> bool:
        check_key(key)
        with self._writing() as db:
            return self._apply(db, [Delete(key)])

    def transaction(self, conditions: Sequence[Unchanged], operations: Sequence[Operation]) -> int | None:
        check_operations(operations)
        with self._writing() as db:
            for condition in conditions:
                row = db.execute("SELECT mod_revision FROM entries WHERE key = ?", (condition.key,)).fetchone()
                if (row[0] if row else 0) != condition.mod_revision:
                    return None
            for operation in operations:
                if (
                    isinstance(operation, Put)
                    and operation.lease
                    and not db.execute("SELECT 1 FROM leases WHERE id = ?", (operation.lease,)).fetchone()
                ):
                    raise LeaseEndedError(f"lease {operation.lease} has ended; take a new one and write again")
            self._apply(db, operations)
            return _revision(db)

    def watch(self, prefix: Prefix, from_revision: int) -> SqliteWatch:
        return SqliteWatch(self, prefix, from_revision)

    def grant_lease(self, ttl: float) -> int:
        check_ttl(ttl)
        with self._writing() as db:
            cursor = db.execute(
                "INSERT INTO leases (ttl, expires, boot) VALUES (?, ?, ?)",
                (ttl, self._clock() + ttl, self._boot),
            )
            assert cursor.lastrowid is not None
            return cursor.lastrowid

    def keep_alive(self, lease: int) -> bool:
        with self._writing() as db:
            cursor = db.execute("UPDATE leases SET expires = ? + ttl WHERE id = ?", (self._clock(), lease))
            return cursor.rowcount == 1

    def revoke(self, lease: int) -> None:
        with self._writing() as db:
            self._end(db, lease)

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._db.close()
                self._changed.notify_all()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into StoreErrors that say what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(_explanation(error, self._path)) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A write transaction, in which the leases that are due have ended."""
        with self._lock, self._explained():
            self._check_usable()
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._reap(self._db)
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # Some errors (a full disk) have rolled back already.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._changed.notify_all()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A consistent view, in which the leases that are due have ended."""
        with self._lock, self._explained():
            self._check_usable()
            if self._due():
                with self._writing():
                    pass
            self._db.execute("BEGIN")
            try:
                yield self._db
            finally:
                if self._db.in_transaction:
                    self._db.execute("COMMIT")

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreError("this store has been closed")
        if os.getpid() != self._pid:
            raise StoreError("this store was opened by the parent process; open one in each process")
        # SQLite itself does not notice in WAL mode, and would go on writing what nobody reads.
        if self._identity() != self._file:
            raise StoreError(f"the store {self._path} was moved or removed while it was open; start what uses it again")

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _due(self) -> bool:
        row = self._db.execute(
            "SELECT 1 FROM leases WHERE expires <= ? OR boot != ? LIMIT 1", (self._clock(), self._boot)
        ).fetchone()
        return row is not None

    def _reap(self, db: sqlite3.Connection) -> None:
        due = db.execute(
            "SELECT id FROM leases WHERE expires <= ? OR boot != ? ORDER BY id", (self._clock(), self._boot)
        ).fetchall()
        for (lease,) in due:
            self._end(db, lease)

    def _end(self, db: sqlite3.Connection, lease: int) -> None:
        db.execute("DELETE FROM leases WHERE id = ?", (lease,))
        keys = db.execute("SELECT key FROM entries WHERE lease = ? AND lease != 0 ORDER BY key", (lease,)).fetchall()
        self._apply(db, [Delete(key) for (key,) in keys])

    def _apply(self, db: sqlite3.Connection, operations: Sequence[Operation]) -> bool:
        """Do the operations as one revision; whether anything changed."""
        revision = _revision(db) + 1
        changed = False
        for operation in operations:
            key = operation.key
            row = db.execute("SELECT create_revision FROM entries WHERE key = ?", (key,)).fetchone()
            if isinstance(operation, Put):
                created = row[0] if row else revision
                value = bytes(operation.value)
                db.execute(
                    "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)",
                    (key, value, created, revision, operation.lease),
                )
                change: tuple[int, str, bytes | None, int, int] = (revision, key, value, created, operation.lease)
            elif row:
                db.execute("DELETE FROM entries WHERE key = ?", (key,))
                change = (revision, key, None, 0, 0)
            else:
                continue
            db.execute(
                "INSERT INTO history (revision, key, value, create_revision, lease) VALUES (?, ?, ?, ?, ?)",
                change,
            )
            changed = True
        if changed:
            compacted = max(0, revision - self._history)
            db.execute("UPDATE state SET revision = ?, compacted = max(compacted, ?)", (revision, compacted))
            db.execute("DELETE FROM history WHERE revision <= ?", (compacted,))
        return changed


class SqliteWatch:
    """See :class:`cluster.store.base.Watch`."""

    def __init__(self, store: SqliteStore, prefix: Prefix, from_revision: int) -> None:
        self._store = store
        self._prefixes = normalized(prefix)
        self._next = from_revision
        self._closed = False

    def get(self, timeout: float | None = None) -> list[Event]:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._store._changed:
            while not (self._store._closed or self._closed):
                events = self._take()
                wait = POLL if deadline is None else min(POLL, deadline - time.monotonic())
                if events or wait <= 0:
                    return events
                self._store._changed.wait(wait)
            return []

    def _take(self) -> list[Event]:
        start = self._next
        with self._store._reading() as db:
            revision, compacted = db.execute("SELECT revision, compacted FROM state").fetchone()
            if start <= compacted:
                raise CompactedError(f"revision {start} is no longer kept; list again and watch from there")
            self._next = max(start, revision + 1)
            if start > revision:
                return []
            rows = db.execute(
                "SELECT revision, key, value, create_revision, lease FROM history"
                f" WHERE revision >= ?1 AND ({_under(self._prefixes)}) ORDER BY id",
                (start, *self._prefixes),
            ).fetchall()
        return [
            Event(key, None if value is None else Entry(key, value, created, changed, lease), changed)
            for changed, key, value, created, lease in rows
        ]

    def close(self) -> None:
        with self._store._changed:
            self._closed = True
            self._store._changed.notify_all()


def _under(prefixes: Sequence[str]) -> str:
    """A condition on ``key``: under one of the prefixes, which are the parameters from the second on."""
    return " OR ".join(f"substr(key, 1, length(?{i})) = ?{i}" for i, _ in enumerate(prefixes, 2)) or "FALSE"


def _revision(db: sqlite3.Connection) -> int:
    revision: int = db.execute("SELECT revision FROM state").fetchone()[0]
    return revision


_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full; make room and try again (what was stored before is intact)",
    sqlite3.SQLITE_BUSY: "another process has held it for too long; try again, and look for a hung process",
    sqlite3.SQLITE_READONLY: "it may not be written; check the permissions of the file and its directory",
    sqlite3.SQLITE_PERM: "it may not be opened; check the permissions of the file and its directory",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; it must be a file in a directory that may be written",
    sqlite3.SQLITE_NOTADB: "it is no store; name another path, or remove the file to start afresh",
    sqlite3.SQLITE_CORRUPT: "it is damaged; end the processes that use it and remove it to start afresh",
    sqlite3.SQLITE_IOERR: "the disk failed to read or write it; check the disk, and that it is a local one",
}


def _explanation(error: sqlite3.Error, path: Path) -> str:
    # The low byte is the primary code, the rest tells its kinds apart.
    advice = _ADVICE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, "an unexpected error")
    return f"the store {path}: {advice} ({error})"
