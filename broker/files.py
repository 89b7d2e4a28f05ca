"""A shard's file side: it answers FETCH, takes STORE, and gets what it lacks from the other shards.

All reading and writing happens in threads of its own, so that no disk holds up a grant: one answers peers, one at a
time and in order; the other fetches. What a shard keeps are the files that the pipelines in the store name, so nobody
can fill its disk with others.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from broker.endpoint import Endpoint, Unsent
from cluster.filecache import CacheError, CacheWriter, FileCache, WrongContent
from cluster.records import BrokerRecord, FileRecord, Paths, PipelineRecord, RecordError, ServingRecord, decode
from cluster.store.base import Entry
from laxity import protocol
from laxity.credentials import Credentials
from laxity.files import FileClient, FileNotHere, FileNotYet, TransferError
from laxity.keys import KeyFile, ServerKey
from laxity.log_lines import worth_a_line
from laxity.payload import Part
from laxity.protocol import MAX_CHUNK, NOT_HERE, NOT_YET, Chunk, Fetch, Store, Stored
from pipelines.files import DIGEST, FilesError, check_files
from pipelines.models import is_address

log = logging.getLogger("laxity.broker")

MAX_WAITING: Final = 512
"""Messages about files that wait for the disk at most."""
MAX_OF_PEER: Final = 8
"""Chunks of one peer that wait for the disk, or for the peer to read them, at most."""
MAX_UPLOADS: Final = 8
"""Files that are being uploaded at the same time at most."""
IDLE: Final = 60.0
"""Seconds after which an upload that does not go on is given up."""
BACK_OFF: Final = (0.5, 30.0)
"""The first and the longest pause in seconds before the other shards are asked again for what is missing."""


class _Upload:
    def __init__(self, writer: CacheWriter, now: float) -> None:
        self.writer = writer
        self.touched_at = now


class ShardFiles:
    """``call`` has a function run in the shard's thread; :meth:`fetch` and :meth:`store` are called there, the others
    from any thread. ``start`` before, ``stop`` in the end. With the shard's ``key``, or in ``plain`` text, files come
    from other shards."""

    def __init__(
        self, cache: FileCache, call: Callable[[Callable[[], None]], None], key: KeyFile | None, plain: bool
    ) -> None:
        self._cache = cache
        self._call = call
        self._key = key
        self._plain = plain
        self._named: Mapping[str, FileRecord] = {}
        """By digest: what the pipelines in the store need. Replaced as a whole."""
        self._others: Sequence[str] = ()
        self._servers: Sequence[ServerKey] = ()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: Counter[bytes] = Counter()
        """By peer, in the shard's thread: messages that wait for the disk."""
        self._unsent: dict[bytes, Unsent] = {}
        """By peer, in the shard's thread: chunks that have not left."""
        self._uploads: dict[str, _Upload] = {}
        self.malformed = 0
        self._stopping = threading.Event()
        self._news = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name="files"),
            threading.Thread(target=self._fetch_missing, name="files of other shards"),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads; what is under way is given up."""
        self._stopping.set()
        self._news.set()
        self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for upload in self._uploads.values():
            upload.writer.close()
        self._cache.close()

    def keep(self, files: Sequence[FileRecord], others: Sequence[str], servers: Sequence[ServerKey] = ()) -> None:
        """Keep these files, getting those that are not here from the shards at ``others`` (frontends), whose keys
        ``servers`` have."""
        self._servers = servers
        named = {file.digest: file for file in files}
        if named != self._named or list(others) != list(self._others):
            self._named, self._others = named, others
            self._news.set()

    # ---- the shard's thread -------------------------------------------------------------------

    def fetch(self, endpoint: Endpoint, sender: bytes, fetch: Fetch) -> None:
        """Answer with CHUNK, soon."""
        wrong = _out_of_range(fetch.digest, fetch.offset) or ("" if 0 < fetch.length <= MAX_CHUNK else "no such length")
        if wrong:
            self._malformed(wrong)
            self._chunk(endpoint, sender, fetch, NOT_HERE, b"", wrong)
        elif not self._room(sender):
            self._chunk(endpoint, sender, fetch, NOT_YET, b"", "the shard is busy with files")
        else:
            self._add(sender, lambda: self._read(endpoint, sender, fetch))

    def store(self, endpoint: Endpoint, sender: bytes, store: Store, frames: list[Part]) -> None:
        """Take in a piece of a file; answer with STORED, soon."""
        wrong = _out_of_range(store.digest, store.offset)
        if not wrong and (len(frames) != 1 or len(frames[0]) > MAX_CHUNK):
            wrong = f"STORE has one frame of up to {MAX_CHUNK} bytes"
        if wrong:
            self._malformed(wrong)
            self._say(endpoint, sender, Stored(store.digest[:64], 0, wrong))
        elif not self._room(sender):
            self._say(endpoint, sender, Stored(store.digest, 0, "the shard is busy with files", retry=True))
        else:
            self._add(sender, lambda: self._write(endpoint, sender, store, frames[0]))

    def _room(self, sender: bytes) -> bool:
        if sum(self._waiting.values()) >= MAX_WAITING:
            return False
        for peer in [peer for peer, unsent in self._unsent.items() if not unsent.bytes()]:
            del self._unsent[peer]
        unsent = self._unsent.get(sender)
        left = unsent.bytes() if unsent is not None else 0
        return self._waiting[sender] * MAX_CHUNK + left < MAX_OF_PEER * MAX_CHUNK

    def _add(self, sender: bytes, job: Callable[[], None]) -> None:
        self._waiting[sender] += 1
        self._jobs.put(job)

    def _done(self, sender: bytes) -> None:
        self._waiting[sender] -= 1
        if not self._waiting[sender]:
            del self._waiting[sender]

    def _chunk(self, endpoint: Endpoint, sender: bytes, fetch: Fetch, total: int, data: bytes, detail: str) -> None:
        unsent = self._unsent.setdefault(sender, Unsent())
        chunk = Chunk(fetch.digest[:64], fetch.offset, total, detail)
        endpoint.send(sender, protocol.encode(chunk), [data], unsent)

    def _say(self, endpoint: Endpoint, sender: bytes, stored: Stored) -> None:
        endpoint.send(sender, protocol.encode(stored), [])

    def _malformed(self, wrong: str) -> None:
        self.malformed += 1
        if worth_a_line(self.malformed):
            log.warning("malformed message about a file (%d by now): %s", self.malformed, wrong)

    # ---- the thread that answers ----------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                # Whatever it is must not end the thread: the other files need it.
                log.exception("a file could not be read or written")

    def _read(self, endpoint: Endpoint, sender: bytes, fetch: Fetch) -> None:
        total, data, detail = NOT_HERE, b"", "no pipeline that is applied needs this file"
        try:
            self._give_up_idle(time.monotonic())
            found = self._cache.read(fetch.digest, fetch.offset, fetch.length)
            if found is not None:
                total, data = found
                detail = ""
            elif fetch.digest in self._uploads:
                file, have = self._named.get(fetch.digest), self._uploads[fetch.digest].writer.have
                total, detail = NOT_YET, f"being uploaded{f', {have * 100 // file.size} %' if file is not None else ''}"
            elif fetch.digest in self._named:
                detail = f"{self._named[fetch.digest].path} was not uploaded (yet)"
        except CacheError as error:
            detail = str(error)

        def answer() -> None:
            self._done(sender)
            self._chunk(endpoint, sender, fetch, total, data, detail)

        self._call(answer)

    def _write(self, endpoint: Endpoint, sender: bytes, store: Store, data: Part) -> None:
        try:
            stored = self._stored(store, data, time.monotonic())
        except CacheError as error:
            stored = Stored(store.digest, 0, str(error), retry=True)

        def answer() -> None:
            self._done(sender)
            self._say(endpoint, sender, stored)

        self._call(answer)

    def _stored(self, store: Store, data: Part, now: float) -> Stored:
        self._give_up_idle(now)
        digest = store.digest
        file = self._named.get(digest)
        if file is None:
            return Stored(
                digest, 0, "no pipeline that is applied needs this file; apply the pipeline first", retry=True
            )
        if store.total != file.size:
            return Stored(digest, 0, f"{store.total} bytes, where the pipeline's record says {file.size}")
        if self._cache.has(digest, file.size):
            return Stored(digest, file.size)
        try:
            upload = self._uploads.get(digest)
            if upload is None:
                if len(self._uploads) >= MAX_UPLOADS:
                    return Stored(digest, 0, f"{MAX_UPLOADS} other files are being uploaded", retry=True)
                upload = self._uploads[digest] = _Upload(self._cache.writer(digest, file.size), now)
            upload.touched_at = now
            writer = upload.writer
            if store.offset == writer.have:
                writer.write(memoryview(data))
                if writer.have == file.size:
                    del self._uploads[digest]
                    with writer:
                        writer.commit()
                    log.info("%s was uploaded (%d bytes)", file.path, file.size)
            return Stored(digest, writer.have)
        except CacheError as error:
            upload = self._uploads.pop(digest, None)
            if upload is not None:
                upload.writer.close()
            changed = "; did the file change while it was uploaded? apply the pipeline again"
            return Stored(digest, 0, f"{error}{changed if isinstance(error, WrongContent) else ''}")

    def _give_up_idle(self, now: float) -> None:
        for digest in [digest for digest, upload in self._uploads.items() if now > upload.touched_at + IDLE]:
            self._uploads.pop(digest).writer.close()

    # ---- the thread that fetches -----------------------------------------------------------------

    def _fetch_missing(self) -> None:
        """Hold what is named, and get what is missing, again and again until there is nothing."""
        pause, longest = BACK_OFF
        missing = False
        while not self._stopping.is_set():
            news = self._news.wait(pause if missing else None)
            self._news.clear()
            pause = BACK_OFF[0] if news else min(pause * 2, longest)
            try:
                missing = self._fetch_all(news)
            except Exception as error:
                if not self._stopping.is_set():
                    log.error("the files of pipelines cannot be kept: %s", error)
                missing = True

    def _fetch_all(self, news: bool) -> bool:
        """Whether anything is missing still. What is here is checked where there is ``news``."""
        named, others = self._named, self._others
        if news and (named or self._cache.directory.exists()):
            self._cache.hold(named.keys())
        missing = []
        for file in named.values():
            if self._stopping.is_set():
                return False
            size = file.size
            here = self._cache.check(file.digest, size, self._stopped) if news else self._cache.has(file.digest, size)
            if not here:
                missing.append(file)
        for address in others:
            if missing:
                missing = self._fetch_from(address, missing)
        return bool(missing)

    def _fetch_from(self, address: str, files: list[FileRecord]) -> list[FileRecord]:
        """Those of the files that the shard did not give."""
        try:
            credentials = Credentials(self._key, self._plain, self._servers)
            with FileClient(address, self._stopped, credentials) as client:
                for file in files:
                    if self._cache.has(file.digest, file.size):  # it was uploaded meanwhile
                        continue
                    try:
                        self._cache.add(file.digest, file.size, client.fetch(file.digest, file.size))
                        log.info("got %s from the shard at %s", file.path, address)
                    except (FileNotHere, FileNotYet) as error:
                        log.debug("%s", error)
                    except WrongContent as error:
                        log.warning("%s from the shard at %s: %s", file.path, address, error)
        except TransferError as error:
            log.debug("%s", error)
        return [file for file in files if not self._cache.has(file.digest, file.size)]

    def _stopped(self) -> bool:
        return self._stopping.is_set()


def _out_of_range(digest: str, offset: int) -> str:
    if not DIGEST.fullmatch(digest):
        return "no SHA-256 digest of 64 hexadecimal digits"
    return "" if 0 <= offset < 2**63 else "no such offset"


def files_in_store(entries: Mapping[str, Entry], paths: Paths, shard: str) -> tuple[list[FileRecord], list[str]]:
    """What :meth:`ShardFiles.keep` takes, from the store's records of pipelines, of what is served, and of shards."""
    files: dict[str, FileRecord] = {}
    others: list[str] = []
    for key, entry in entries.items():
        try:
            if key.startswith(paths.brokers) and key != paths.broker(shard):
                others.append(decode(BrokerRecord, key, entry.value).frontend)
                continue
            if key.startswith(paths.pipelines):
                named = decode(PipelineRecord, key, entry.value).files
            elif key.startswith(paths.serving):
                named = decode(ServingRecord, key, entry.value).files
            else:
                continue
            check_files(named)
            # Those at addresses everybody fetches from there.
            files.update({file.digest: file for file in named if not is_address(file.path)})
        except (RecordError, FilesError) as error:
            log.error("%s: %s", key, error)
    return list(files.values()), sorted(others)
