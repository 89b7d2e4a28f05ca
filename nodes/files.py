"""An agent's side of files: a model is given to its device once the files that it needs are on this host.

A thread looks for them in the cache, where the spec was written (that may be this host), and at their address or at
the shards, and lays them out in a directory of their own. What is not there yet is withheld from the placement, with a
state that says why.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

import msgspec

from cluster.download import DownloadError, download
from cluster.filecache import CacheError, FileCache, WrongContent
from cluster.records import FAILED, QUEUED, FileRecord
from laxity.credentials import Credentials
from laxity.files import FileClient, FileNotHere, FileNotYet, TransferError
from nodes.agent import Placement, Work
from pipelines.files import FilesError, check_files, files_of_stage, place_of, with_files_at
from pipelines.models import is_address
from pipelines.spec import PipelineSpec

log = logging.getLogger("laxity.node")

ATTEMPTS: Final = 6
"""How often it is tried to get a model's files before the model counts as failed; it is tried on all the same."""
BACK_OFF: Final = (0.5, 30.0)
"""The first and the longest pause in seconds between attempts."""
BLOCK: Final = 1024 * 1024
"""Bytes that are copied at a time."""
LOOK_AGAIN: Final = 1.0
"""Seconds until a shard is asked again for a file that is being uploaded to it."""
NEVER: Final = 1e9
"""A pause in seconds, and a time, that does not come."""


class _NotYet(Exception):
    """A file is on its way to a shard."""


class _Dropped(Exception):
    """The model is not wanted any more, or the agent ends."""


class _FetchError(Exception):
    """A file is not to be had; the text says why and what to do."""


class _Job:
    """A model whose files are looked for."""

    def __init__(self, key: str, spec: PipelineSpec, stage: str, files: Sequence[FileRecord]) -> None:
        self.key = key
        self.spec = spec
        self.stage = stage
        self.files = files
        self.attempts = 0
        self.due_at = 0.0
        self.state: str = QUEUED
        self.provided: PipelineSpec | None = None
        """The spec as it is loaded on this host, once all files are here."""


class ModelFiles:
    """Tell it with :meth:`want` what is placed, and place what :meth:`available` says. ``emulated`` are the devices
    that need no files. ``start`` before, ``stop`` in the end."""

    def __init__(
        self,
        cache: FileCache,
        agent: str,
        emulated: Collection[int],
        back_off: tuple[float, float] = BACK_OFF,
        credentials: Callable[[], Credentials] = Credentials,
    ) -> None:
        """``credentials`` makes those for connecting to shards, as they are by now."""
        self._cache = cache
        self._back_off = back_off
        self._emulated = emulated
        self._credentials = credentials
        self._first = zlib.crc32(agent.encode())
        """Which shard is asked first; agents that start together begin at different ones."""
        self._news = threading.Condition()
        # What follows is shared by the threads, under the condition's lock.
        self._placement: Placement = {}
        self._jobs: dict[str, _Job] = {}
        self._shards: list[str] = []
        self._stopping = False
        # This is the thread's own.
        self._held: dict[str, tuple[set[str], str]] = {}
        """By model key: the digests and the tree that its device may be using."""
        self._thread = threading.Thread(target=self._run, name="model files")

    # ---- the process's thread -------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join()
        self._cache.close()

    def want(self, placement: Placement, files: Mapping[str, Sequence[FileRecord]], shards: Collection[str]) -> None:
        """What is placed, the files of each model's pipeline by model key, and where shards are (their backends)."""
        with self._news:
            jobs: dict[str, _Job] = {}
            for number, work in placement.items():
                for key, (spec, stage) in work.models.items():
                    if number not in self._emulated and files.get(key):
                        jobs[key] = self._jobs.get(key) or _Job(key, spec, stage, files[key])
            if sorted(shards) != self._shards:
                self._shards = sorted(shards)
                for job in jobs.values():
                    job.due_at = 0.0
            self._placement = placement
            self._jobs = jobs
            self._news.notify()

    def available(self) -> Placement:
        """What can be placed: the models whose files are here, with specs that lead there."""
        with self._news:
            found: Placement = {}
            for number, work in self._placement.items():
                models = dict(work.models)
                for key, job in self._withheld_or_moved(number, work).items():
                    if job.provided is not None:
                        models[key] = (job.provided, job.stage)
                    else:
                        del models[key]
                found[number] = msgspec.structs.replace(work, models=models)
            return found

    def withheld(self) -> dict[int, dict[str, str]]:
        """By device: the states of the models that are placed there and not available."""
        with self._news:
            return {
                number: {
                    key: job.state for key, job in self._withheld_or_moved(number, work).items() if job.provided is None
                }
                for number, work in self._placement.items()
            }

    def _withheld_or_moved(self, number: int, work: Work) -> dict[str, _Job]:
        if number in self._emulated:
            return {}
        return {key: self._jobs[key] for key in work.models if key in self._jobs}

    # ---- the thread that fetches -----------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._news:
                job = self._next_job()
                while job is None and not self._stopping and self._held.keys() <= self._jobs.keys():
                    due_at = min((job.due_at for job in self._jobs.values() if job.provided is None), default=NEVER)
                    self._news.wait(min(max(due_at - time.monotonic(), 0.0), threading.TIMEOUT_MAX))
                    job = self._next_job()
                if self._stopping:
                    return
            try:
                self._let_go()
                if job is not None:
                    self._provide(job)
            except Exception:
                # Whatever it is must not end the thread: the other models need it.
                log.exception("the files of a model cannot be provided")

    def _next_job(self) -> _Job | None:
        """The model to see to now, None where there is none at present."""
        waiting = [job for job in self._jobs.values() if job.provided is None]
        job = min(waiting, key=lambda job: job.due_at, default=None)
        return job if job is not None and job.due_at <= time.monotonic() else None

    def _provide(self, job: _Job) -> None:
        first, longest = self._back_off
        pause = min(first * 2.0 ** min(job.attempts, 20), longest)
        job.due_at = time.monotonic() + longest
        try:
            provided = self._provided(job)
        except _Dropped:
            return
        except _NotYet as error:
            self._told(job, f"{QUEUED}: {error}", LOOK_AGAIN)
        except FilesError as error:
            log.error("%s: %s", job.key, error, extra={"model": job.key})
            self._told(job, f"{FAILED}: {error}", NEVER)
        except (_FetchError, CacheError, DownloadError, OSError) as error:
            job.attempts += 1
            if job.attempts == ATTEMPTS:
                log.error("%s: %s", job.key, error, extra={"model": job.key})
            again = f"{QUEUED}: {error} (trying again)"
            self._told(job, again if job.attempts < ATTEMPTS else f"{FAILED}: {error}", pause)
        else:
            with self._news:
                job.provided = provided
                log.info("the files of %s are here, in %s", job.key, provided.root, extra={"model": job.key})

    def _told(self, job: _Job, state: str, pause: float) -> None:
        with self._news:
            job.state = state
            job.due_at = time.monotonic() + pause

    def _provided(self, job: _Job) -> PipelineSpec:
        """The spec as it is loaded on this host, once all files are here."""
        check_files(job.files)
        files = files_of_stage(job.spec, job.stage, job.files)
        # A spec whose files are not listed is used where it lies: it was brought up on this very host.
        root = "" if job.spec.content else job.spec.root
        places = [(place_of(file), file.digest) for file in files]
        self._held[job.key] = ({file.digest for file in files}, FileCache.tree_of(places))
        self._hold()
        with _Shards(self._addresses(), lambda: self._dropped(job), self._credentials()) as shards:
            for file in files:
                # Damaged ones are found by this; it reads each once only.
                if not self._cache.check(file.digest, file.size, lambda: self._dropped(job)):
                    self._fetch(job, file, shards)
        tree = self._cache.lay_out(places)
        return with_files_at(job.spec, root or str(tree), tree, files)

    def _fetch(self, job: _Job, file: FileRecord, shards: _Shards) -> None:
        if is_address(file.path):
            try:
                self._cache.add(file.digest, file.size, self._counted(job, file, download(file.path)))
            except WrongContent as error:
                raise _FetchError(f"{file.path} has changed: {error}; apply the pipeline again") from error
            return
        if self._copied(job, file):
            return
        troubles: list[str] = []
        not_yet = ""
        for shard in shards.clients(troubles):
            try:
                chunks = shard.fetch(file.digest, file.size)
                self._cache.add(file.digest, file.size, self._counted(job, file, chunks))
                return
            except FileNotYet as error:
                not_yet = str(error)
            except (FileNotHere, WrongContent) as error:
                troubles.append(str(error))
            except TransferError as error:
                troubles.append(str(error))
                shards.leave(shard)
        if self._dropped(job):
            raise _Dropped
        if not_yet:
            raise _NotYet(f"fetching {file.path}: {not_yet}")
        raise _FetchError(
            f"{file.path} is not to be had from any shard ({'; '.join(troubles) or 'there is none'}); "
            "apply the pipeline again"
        )

    def _copied(self, job: _Job, file: FileRecord) -> bool:
        """Whether the file lies where the spec was written, on this host. It is copied: there it may change, and a
        worker that has loaded one version's code from a directory would not load another's from the same."""
        path = Path(job.spec.root) / file.path
        try:
            if not job.spec.root or not path.is_file() or path.stat().st_size != file.size:
                return False
            with path.open("rb") as stream:
                self._cache.add(file.digest, file.size, self._counted(job, file, iter(lambda: stream.read(BLOCK), b"")))
        except (OSError, WrongContent):
            return False
        return True

    def _counted(self, job: _Job, file: FileRecord, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The chunks, with the model's state telling how far they are."""
        got = 0
        name = place_of(file).name
        for chunk in chunks:
            if self._dropped(job):
                raise _Dropped
            yield chunk
            got += len(chunk)
            with self._news:
                job.state = f"{QUEUED}: fetching {name} {min(got * 100 // max(file.size, 1), 100)} %"

    def _dropped(self, job: _Job) -> bool:
        return self._stopping or self._jobs.get(job.key) is not job

    def _addresses(self) -> list[str]:
        with self._news:
            start = self._first % max(len(self._shards), 1)
            return self._shards[start:] + self._shards[:start]

    def _let_go(self) -> None:
        """Hold no longer what no model needs any more."""
        with self._news:
            gone = self._held.keys() - self._jobs.keys()
        if gone:
            for key in gone:
                del self._held[key]
            self._hold()

    def _hold(self) -> None:
        held = self._held.values()
        self._cache.hold(set().union(*(digests for digests, _ in held)), {tree for _, tree in held})


class _Shards:
    """Connections to shards, made when they are needed; with one that failed no more is tried."""

    def __init__(self, addresses: Sequence[str], stopped: Callable[[], bool], credentials: Credentials) -> None:
        self._clients: dict[str, FileClient | None] = dict.fromkeys(addresses)
        self._stopped = stopped
        self._credentials = credentials

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients.values():
            if client is not None:
                client.close()

    def clients(self, troubles: list[str]) -> Iterator[FileClient]:
        """One after the other; ``troubles`` gets why one cannot be reached."""
        for address, client in list(self._clients.items()):
            if client is None:
                try:
                    client = self._clients[address] = FileClient(address, self._stopped, self._credentials)
                except TransferError as error:
                    troubles.append(str(error))
                    del self._clients[address]
                    continue
            yield client

    def leave(self, client: FileClient) -> None:
        """Talk to this shard no more."""
        del self._clients[client.address]
        client.close()
