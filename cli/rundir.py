"""Where a local cluster keeps its store, its keys, its logs and the lock that says that it runs."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path

import msgspec

from cluster.records import Paths, RecordError
from cluster.store import sqlite_url

TAKING = 2.0
"""How long to try for the lock, in seconds, while no supervisor is seen to hold it."""


class Running(msgspec.Struct, frozen=True):
    """What the lock file says while its cluster runs: the supervisor's pid and the store's address ('' until there is
    one)."""

    pid: int
    store: str


class AlreadyRunning(Exception):
    """Another supervisor holds the cluster's lock."""


class Unwritable(Exception):
    """The run directory cannot be made; the text says what to do."""


def base_directory() -> Path:
    """Where the run directories of all of this user's clusters lie: ``$XDG_RUNTIME_DIR/laxity``, or
    ``~/.local/state/laxity`` where there is no such directory."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and Path(runtime).is_dir() and os.access(runtime, os.W_OK):
        return Path(runtime) / "laxity"
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state else Path.home() / ".local" / "state") / "laxity"


class RunDirectory:
    """One cluster's files. The lock is the kernel's, so it ends with its holder however that ends."""

    def __init__(self, cluster: str, base: Path | None = None) -> None:
        Paths(cluster)  # refuses what cannot be a name, and so any path out of the base
        self.cluster = cluster
        self.path = (base_directory() if base is None else base) / cluster
        self.logs = self.path / "logs"
        self.etcd = self.path / "etcd"
        """Where the members of an etcd of its own keep their data."""
        self.keys = self.path / "keys"
        """Where the key files of a cluster lie that was started with --secure."""
        self.operator_key = self.keys / "operator.key"
        """The one for people, and for what they run here."""
        self._lock_file = self.path / "up.lock"
        self._held: int | None = None

    @property
    def default_store(self) -> str:
        """The address of the embedded store."""
        return sqlite_url(self.path / "store.db")

    def acquire(self) -> None:
        """Take the lock; :class:`AlreadyRunning` where a supervisor has it, :class:`Unwritable` where there can be no
        such directory."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.logs.mkdir(exist_ok=True)
            descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unwritable(
                f"cannot create {self.path}: {error.strerror}; "
                "set XDG_RUNTIME_DIR or HOME to a directory that can be written"
            ) from error
        deadline = time.monotonic() + TAKING
        while not _lock(descriptor, fcntl.LOCK_EX):
            running = self.running()
            # Somebody may be looking this very moment, which takes a lock as well.
            if running is None and time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            os.close(descriptor)
            process = f" (process {running.pid})" if running else ""
            raise AlreadyRunning(
                f"the cluster {self.cluster!r} is already up{process}; end it with `laxity down --cluster "
                f"{self.cluster}`, or start another one with --cluster NAME"
            )
        self._held = descriptor
        self.note_store("")

    def note_store(self, store: str) -> None:
        """Say, as the holder of the lock, where the cluster's store is."""
        assert self._held is not None
        os.ftruncate(self._held, 0)
        os.pwrite(self._held, msgspec.json.encode(Running(os.getpid(), store)), 0)

    def remove_stores(self) -> None:
        """Remove the stores of the cluster's own; nobody may have them open."""
        for suffix in ("", "-wal", "-shm"):
            (self.path / f"store.db{suffix}").unlink(missing_ok=True)
        shutil.rmtree(self.etcd, ignore_errors=True)

    def remove_keys(self) -> None:
        """Remove the key files."""
        shutil.rmtree(self.keys, ignore_errors=True)

    def release(self) -> None:
        """Give the lock back. The file stays: removing it would let two supervisors hold one lock each."""
        if self._held is not None:
            os.ftruncate(self._held, 0)
            os.close(self._held)
            self._held = None

    def running(self) -> Running | None:
        """The supervisor that holds the lock now, if one does."""
        try:
            descriptor = os.open(self._lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if _lock(descriptor, fcntl.LOCK_SH):
                return None
            return msgspec.json.decode(os.pread(descriptor, 4096, 0), type=Running)
        except msgspec.DecodeError:
            return None  # taken this very moment, and not written yet
        finally:
            os.close(descriptor)

    def found_key(self, store: str | None) -> Path | None:
        """The key for people, where a cluster runs here that has keys and ``store`` is its own (None: not said)."""
        running = self.running()
        mine = running is not None and store in (None, running.store)
        return self.operator_key if mine and self.operator_key.exists() else None

    def wait_ended(self, timeout: float) -> bool:
        """Wait for the supervisor to end; whether it did within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while self.running() is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


def _lock(descriptor: int, kind: int) -> bool:
    """Take a lock of this kind without waiting; whether it could be had."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def running_clusters() -> list[str]:
    """The names of this user's clusters that are running."""
    return [directory.cluster for directory in _directories() if directory.running() is not None]


def left_behind_clusters() -> list[str]:
    """Those that do not run but whose own store still lies there: their supervisor was killed."""
    return [
        directory.cluster
        for directory in _directories()
        if directory.running() is None and ((directory.path / "store.db").exists() or directory.etcd.exists())
    ]


def _directories() -> list[RunDirectory]:
    base = base_directory()
    found = []
    for path in sorted(base.iterdir()) if base.is_dir() else []:
        try:
            found.append(RunDirectory(path.name))
        except RecordError:
            continue  # nothing of ours
    return found
