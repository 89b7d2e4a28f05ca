"""Shared memory between a worker and a Triton server: tensors lie there and only their places are sent.

A region is a file in /dev/shm that its owner keeps locked (flock) while it lives. Whoever finds one that is not locked
knows that its owner has died, whichever process namespace that was in, and removes it.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nodes.executors.base import Unavailable
from nodes.executors.triton_server import TritonError
from nodes.executors.triton_tensors import Array

log = logging.getLogger(__name__)

PREFIX = "laxity-triton-"
MAX_REGIONS = 8
"""Of one model. More batches are never on their way, unless their elements have many different shapes."""
_SMALLEST = 64 * 1024
_DIRECTORY = Path("/dev/shm")


class Region(Protocol):
    """A piece of memory that a server may be told of."""

    name: str
    size: int

    def known(self, client: Any) -> bool:
        """Whether it is registered with the server."""
        ...

    def register(self, client: Any) -> None: ...
    def unregister(self, client: Any) -> None: ...
    def write(self, offset: int, content: Array) -> None: ...
    def read(self, offset: int, size: int) -> bytes: ...

    def close(self) -> None: ...


class SystemRegion:
    """A region in the host's memory. OSError where there is no room for it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.name = PREFIX + secrets.token_hex(8)
        self._path = _DIRECTORY / self.name
        # It gets its name once it is locked, so that nobody takes it for a dead one's.
        unlocked = _DIRECTORY / ("." + self.name)
        self._file = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            # Reserved, not merely sized: a write beyond what /dev/shm has would kill the process.
            os.posix_fallocate(self._file, 0, size)
            self._map = mmap.mmap(self._file, size)
            os.rename(unlocked, self._path)
        except BaseException:
            os.unlink(unlocked)
            os.close(self._file)
            raise

    def known(self, client: Any) -> bool:
        return self.name in client.get_system_shared_memory_status().regions

    def register(self, client: Any) -> None:
        client.register_system_shared_memory(self.name, "/" + self.name, self.size)

    def unregister(self, client: Any) -> None:
        client.unregister_system_shared_memory(self.name)

    def write(self, offset: int, content: Array) -> None:
        np.ndarray(content.shape, content.dtype, self._map, offset)[...] = content

    def read(self, offset: int, size: int) -> bytes:
        return self._map[offset : offset + size]

    def close(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        self._map.close()
        os.close(self._file)


class CudaRegion:
    """A region in the memory of this worker's GPU (which the server numbers ``device``)."""

    def __init__(self, size: int, device: int) -> None:
        from tritonclient.utils import cuda_shared_memory

        self.size = size
        self.name = PREFIX + secrets.token_hex(8)
        self._device = device
        self._memory = cuda_shared_memory
        self._handle = cuda_shared_memory.create_shared_memory_region(self.name, size, 0)

    def known(self, client: Any) -> bool:
        return self.name in client.get_cuda_shared_memory_status().regions

    def register(self, client: Any) -> None:
        handle = self._memory.get_raw_handle(self._handle)
        client.register_cuda_shared_memory(self.name, handle, self._device, self.size)

    def unregister(self, client: Any) -> None:
        client.unregister_cuda_shared_memory(self.name)

    def write(self, offset: int, content: Array) -> None:
        flat = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        self._memory.set_shared_memory_region(self._handle, [flat], offset)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._memory.get_contents_as_numpy(self._handle, np.uint8, [size], offset))

    def close(self) -> None:
        self._memory.destroy_shared_memory_region(self._handle)


class RegionPool:
    """The regions of one model, each for one batch at a time, from its upload until its outputs are fetched.

    ``make`` makes a region of a size. All are registered with the server that ``client`` talks to. One that is retired
    is removed after ``linger`` seconds, if that server does not use it any more.
    """

    def __init__(self, make: Callable[[int], Region], client: Any, linger: float) -> None:
        self._make = make
        self._client = client
        self._all: list[Region] = []
        self._free: deque[Region] = deque()
        self._linger = linger
        self._retired: deque[tuple[float, Region]] = deque()
        """With the time from which on each is to be removed, the next one first."""
        self._lock = threading.Lock()
        """Held by whoever talks to the server about them."""
        self._exhausted = False

    def take(self, size: int) -> Region | None:
        """A registered region of at least ``size`` bytes; None where there is no room for one more. Whoever takes it
        gives it back, or retires it."""
        with self._lock:
            self._drop_retired()
            return self._take(size)

    def _take(self, size: int) -> Region | None:
        for _ in range(len(self._free)):
            region = self._free.popleft()
            if region.size >= size:
                return region
            self._free.append(region)
        if self._free:  # all too small: a larger one takes the place of one of them
            self._drop(self._free.popleft())
        if len(self._all) >= MAX_REGIONS:
            if not self._exhausted:
                self._exhausted = True
                log.warning(
                    "%d regions of shared memory are in use, %d of them by batches that the Triton server did not "
                    "answer: while there are that many, tensors go over the network",
                    len(self._all),
                    len(self._retired),
                )
            return None
        try:
            region = self._make(max(_SMALLEST, 1 << (size - 1).bit_length()))
        except OSError as error:
            log.warning("no shared memory for %d bytes, tensors go over the network: %s", size, error)
            return None
        self._all.append(region)
        try:
            region.register(self._client)
        except BaseException:
            self._all.remove(region)
            region.close()
            raise
        return region

    def give_back(self, region: Region) -> None:
        """From any thread."""
        self._free.append(region)

    def retire(self, region: Region) -> None:
        """Instead of giving it back: nobody knows whether the server still works on it."""
        self._retired.append((time.monotonic() + self._linger, region))

    def register_all(self) -> None:
        """Tell the server of those that it does not know: all, where it has started anew."""
        with self._lock:
            lost = [region for region in self._all if not region.known(self._client)]
            for region in lost:
                region.register(self._client)
            for entry in list(self._retired):
                if entry[1] in lost:  # that server worked on it which is no more
                    self._retired.remove(entry)
                    self._free.append(entry[1])

    def close(self) -> None:
        """Unregister and remove all of them."""
        with self._lock:
            for region in list(self._all):
                self._drop(region)
            self._free.clear()
            self._retired.clear()

    def _drop_retired(self) -> None:
        now = time.monotonic()
        while self._retired and self._retired[0][0] <= now:
            _, region = self._retired.popleft()
            try:
                region.unregister(self._client)
            except TritonError as error:  # it still works on it
                log.info("the shared memory %s is kept: %s", region.name, error)
                self.retire(region)
                return
            except Unavailable as error:
                log.info("the shared memory %s could not be unregistered: %s", region.name, error)
            self._all.remove(region)
            region.close()

    def _drop(self, region: Region) -> None:
        self._all.remove(region)
        try:
            region.unregister(self._client)
        except Exception as error:  # the server is away, and its mapping with it
            log.info("the shared memory %s could not be unregistered: %s", region.name, error)
        region.close()


def sweep(client: Any) -> None:
    """Remove regions whose owners have died, from /dev/shm and from the server ``client`` talks to (which is known
    to share this /dev/shm)."""
    for path in _abandoned():
        log.info("removing %s, whose owner has died", path)
        with suppress(OSError):
            path.unlink()
    for name in client.get_system_shared_memory_status().regions:
        if name.startswith(PREFIX) and not (_DIRECTORY / name).exists():
            try:
                client.unregister_system_shared_memory(name)
            except TritonError as error:  # a batch of the dead worker's still runs: the next one sweeps it
                log.info("%s", error)


def _abandoned() -> Iterator[Path]:
    for path in _DIRECTORY.glob(PREFIX + "*"):
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        except BlockingIOError:
            pass
        finally:
            os.close(file)
