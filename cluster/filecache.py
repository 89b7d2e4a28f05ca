"""Files by digest in one directory of a host: a bounded cache that shards and agents share.

``files/`` has each file once, named by its SHA-256; ``trees/`` has directories of hard links to them, as a pipeline's
code wants to find them; ``new/`` what is being written; ``held/`` a list for each process of what it needs, locked by
it as long as it lives. A file appears under its name only once it was checked. What nobody holds is removed, least
recently used first, when room is needed; processes agree by a lock on the directory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Final, Self

from pipelines.files import DIGEST, content_of, file_digest

log = logging.getLogger("laxity.cluster")

DEFAULT_LIMIT: Final = 100 * 1024**3
"""Bytes that a cache holds unless told otherwise."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class CacheError(Exception):
    """The cache could not do what was asked; the text says why and what to do."""


class CacheFull(CacheError):
    """There is no room for a file, and nothing that could be removed for it."""


class WrongContent(CacheError):
    """What was written is not the file that its digest names."""


def default_directory() -> Path:
    """``$XDG_CACHE_HOME/laxity``, else ``~/.cache/laxity``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "laxity"


class FileCache:
    """May be used from several threads. Nothing is written before it is needed."""

    def __init__(self, directory: Path, limit: int = DEFAULT_LIMIT) -> None:
        self.directory = directory.absolute()
        self.limit = limit
        """In bytes; may be changed."""
        self._files = self.directory / "files"
        self._trees = self.directory / "trees"
        self._new = self.directory / "new"
        self._held = self.directory / "held"
        self._lock = threading.Lock()
        self._lock_file: IO[bytes] | None = None
        self._own: IO[str] | None = None
        """This process's list in ``held/``."""
        self._checked: dict[str, tuple[int, int, int]] = {}
        """Files that were checked, as they were then: inode, size, time of modification."""

    def close(self) -> None:
        """Hold nothing any more."""
        with self._lock:
            if self._own is not None:
                Path(self._own.name).unlink(missing_ok=True)
                self._own.close()
                self._own = None
            if self._lock_file is not None:
                self._lock_file.close()
                self._lock_file = None

    # ---- reading ----------------------------------------------------------------------------

    def has(self, digest: str, size: int) -> bool:
        """Whether the file is here."""
        try:
            return self._path(digest).stat().st_size == size
        except OSError:
            return False

    def read(self, digest: str, offset: int, length: int) -> tuple[int, bytes] | None:
        """(size, up to ``length`` bytes from ``offset`` on) of a file; None where it is not here."""
        try:
            with self._path(digest).open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                return size, os.pread(stream.fileno(), length, offset) if offset < size else b""
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.error(error) from error

    def _path(self, digest: str) -> Path:
        if not DIGEST.fullmatch(digest):
            raise CacheError(f"{digest!r} is no SHA-256 digest")
        return self._files / digest

    # ---- holding ----------------------------------------------------------------------------

    def hold(self, digests: Collection[str], trees: Collection[str] = ()) -> None:
        """Keep these files (here or yet to come) and trees from being removed, and no others, until told otherwise or
        the process ends."""
        with self.exclusive():
            if self._own is None:
                path = self._held / secrets.token_hex(8)
                self._own = path.open("w+")
                fcntl.flock(self._own, fcntl.LOCK_EX)
            # Another process reads it under the directory's lock only, so never half of it.
            self._own.seek(0)
            self._own.truncate()
            json.dump({"files": sorted(digests), "trees": sorted(trees)}, self._own)
            self._own.flush()
            for digest in digests:
                try:
                    file = self._path(digest)
                    os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))
                except FileNotFoundError:
                    pass

    def check(self, digest: str, size: int, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Whether the file is here and is what its name says. One that is not is removed. It is read once, and again
        where it has changed since."""
        path = self._path(digest)
        try:
            seen = _identity(path)
            if self._checked.get(digest) == seen:
                return True
            if (digest, size) == file_digest(path, stopped):
                self._checked[digest] = seen
                return True
            log.warning("the cached file %s is damaged: removing it", path)
            with self.exclusive():
                if path.exists() and _identity(path) == seen:  # nobody else has replaced it meanwhile
                    path.unlink()
        except FileNotFoundError:
            pass
        except InterruptedError:
            raise CacheError("interrupted") from None
        except OSError as error:
            raise self.error(error) from error
        return False

    @staticmethod
    def tree_of(places: Iterable[tuple[PurePosixPath, str]]) -> str:
        """The name of the tree with these (path, digest), for :meth:`hold`."""
        return content_of((str(place), digest) for place, digest in places)[:32]

    def lay_out(self, places: Sequence[tuple[PurePosixPath, str]]) -> Path:
        """A directory with these files, which have to be here (and held), at their paths. Hold its tree before."""
        tree = self._trees / self.tree_of(places)
        try:
            tree.mkdir(parents=True, exist_ok=True)
            for place, digest in places:
                source, target = self._path(digest), tree / place
                if target.exists() and target.samefile(source):
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                fresh = target.with_name(f".{secrets.token_hex(8)}")
                os.link(source, fresh)
                fresh.replace(target)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise CacheError(
                    f"the file system of {self.directory} makes no hard links ({error.strerror}); "
                    "choose another directory with --cache"
                ) from error
            raise self.error(error) from error
        return tree

    # ---- writing ----------------------------------------------------------------------------

    def add(self, digest: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a file; it is here afterwards, or nothing of it. Raises :class:`CacheFull`, :class:`WrongContent`, and
        what ``chunks`` raises."""
        with self.writer(digest, size) as writer:
            for chunk in chunks:
                writer.write(chunk)
            writer.commit()

    def writer(self, digest: str, size: int) -> CacheWriter:
        """A file to be written piece by piece; its room is reserved at once. Raises :class:`CacheFull`."""
        final = self._path(digest)
        with self.exclusive():
            self._make_room(size)
            path = self._new / f"{digest}.{secrets.token_hex(8)}"
            stream = path.open("wb", buffering=0)
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
                self._allocate(stream, size)
            except BaseException:
                path.unlink(missing_ok=True)
                stream.close()
                raise
        return CacheWriter(self, stream, path, final, size)

    def _allocate(self, stream: IO[bytes], size: int) -> None:
        """Take the room on the disk, so that a full one is found before anything is fetched."""
        while size:
            try:
                os.posix_fallocate(stream.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                if not self._remove_one():
                    raise CacheFull(
                        f"no space left on the disk of {self.directory} for {size} bytes: make room there, or choose "
                        "another directory with --cache"
                    ) from error

    def _make_room(self, size: int) -> None:
        """Remove what nobody needs until ``size`` more bytes are within the limit."""
        while (used := self._used()) + size > self.limit:
            if not self._remove_one():
                raise CacheFull(
                    f"the cache {self.directory} holds {used} of at most {self.limit} bytes, all in use, and {size} "
                    "more are needed: allow it more, or delete pipelines that are not needed"
                )

    def _used(self) -> int:
        return sum(entry.stat().st_size for place in (self._files, self._new) for entry in os.scandir(place))

    def _remove_one(self) -> bool:
        """Remove what was begun and left, the trees that nobody holds, or the file unused for the longest; whether
        there was anything."""
        abandoned = [path for path in self._new.iterdir() if _unlocked(path)]
        files, trees = self._held_by_all()
        # A tree's links would keep the room of the files that are removed.
        idle = [tree for tree in self._trees.iterdir() if tree.name not in trees]
        for path in abandoned:
            path.unlink(missing_ok=True)
        for tree in idle:
            shutil.rmtree(tree, ignore_errors=True)
        unused = [entry for entry in os.scandir(self._files) if entry.name not in files]
        if unused:
            oldest = min(unused, key=lambda entry: entry.stat().st_atime_ns)
            Path(oldest.path).unlink(missing_ok=True)
            log.info("removed %s from the cache to make room", oldest.path)
        return bool(unused or abandoned)

    def _held_by_all(self) -> tuple[set[str], set[str]]:
        files: set[str] = set()
        trees: set[str] = set()
        for path in self._held.iterdir():
            if _unlocked(path):
                path.unlink(missing_ok=True)  # of a process that is gone
                continue
            try:
                held = json.loads(path.read_text() or "{}")
            except ValueError:
                # Half-written, on a full disk: what it holds is not known, so nothing may be removed.
                raise CacheError(f"{path} cannot be read: make room, and start again what wrote it") from None
            files.update(held.get("files", ()))
            trees.update(held.get("trees", ()))
        return files, trees

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The directory to this thread alone, of all processes; OSErrors come out as :class:`CacheError`."""
        with self._lock:
            try:
                if self._lock_file is None:
                    for directory in (self._files, self._trees, self._new, self._held):
                        directory.mkdir(parents=True, exist_ok=True)
                    self._lock_file = (self.directory / "lock").open("wb")
                fcntl.flock(self._lock_file, fcntl.LOCK_EX)
                try:
                    yield
                finally:
                    fcntl.flock(self._lock_file, fcntl.LOCK_UN)
            except OSError as error:
                raise self.error(error) from error

    def error(self, error: OSError) -> CacheError:
        """What the operating system refused, for people."""
        if error.errno in _NO_ROOM:
            return CacheFull(f"no space left on the disk of the cache {self.directory}: make room there")
        return CacheError(
            f"the cache {self.directory} cannot be used: {error.strerror or error}; mend that, or choose another "
            "directory with --cache"
        )


class CacheWriter:
    """A file that is being written. Leaving its ``with`` block without :meth:`commit` removes it."""

    def __init__(self, cache: FileCache, stream: IO[bytes], path: Path, final: Path, size: int) -> None:
        self._cache = cache
        self._stream = stream
        self._path = path
        self._final = final
        self._size = size
        self._digest = hashlib.sha256()
        self.have = 0
        """Bytes written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: bytes | memoryview) -> None:
        """Append. Raises :class:`WrongContent` beyond the file's size."""
        if self.have + len(data) > self._size:
            raise WrongContent(f"more than the {self._size} bytes that the file {self._final.name} has")
        try:
            view = memoryview(data)
            while view:
                view = view[self._stream.write(view) :]
        except OSError as error:
            raise self._cache.error(error) from error
        self._digest.update(data)
        self.have += len(data)

    def commit(self) -> None:
        """Check what was written and put it under its name."""
        found = self._digest.hexdigest()
        if self.have != self._size or found != self._final.name:
            raise WrongContent(
                f"{self.have} bytes with the SHA-256 digest {found} came, where {self._size} bytes with "
                f"{self._final.name} were to come"
            )
        with self._cache.exclusive():
            # Not synchronised to the disk: whoever uses it after a power cut checks it again.
            os.fchmod(self._stream.fileno(), 0o444)
            self._path.replace(self._final)
            self._stream.close()

    def close(self) -> None:
        """Remove what was not committed."""
        if not self._stream.closed:
            with self._cache.exclusive():
                self._path.unlink(missing_ok=True)
                self._stream.close()


def _identity(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _unlocked(path: Path) -> bool:
    """Whether no living process has the file locked."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return False
    return True
