"""A watch on an etcd: one stream with a watcher for each prefix, resumed where it breaks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import grpc
from etcd3aio._protobuf import WatchCreateRequest, WatchRequest
from etcd3aio.kv import prefix_range_end

from cluster.store.base import CompactedError, Entry, Event, StoreError
from cluster.store.etcd_connection import METADATA, PAUSE, Endpoint, EtcdConnection, explained

log = logging.getLogger("laxity.cluster")

BREAKS = 5
"""After how many breaks in a row, without a word from the watchers between them, a watch is given up."""
END = 1.0
"""How long closing waits for the thread, in seconds."""


class EtcdWatch:
    """See :class:`cluster.store.base.Watch`.

    A thread reads the stream. A broken one (also where its member lost the leader or does not answer pings) is made
    anew from the revision after the last one seen, with any member that answers; where none does, the watch is over.
    ``ended`` is called once, at the end.
    """

    def __init__(
        self,
        connection: EtcdConnection,
        prefixes: Sequence[str],
        from_revision: int,
        ended: Callable[[EtcdWatch], None],
    ) -> None:
        self._connection = connection
        self._prefixes = prefixes
        # etcd takes 0 for "from now on".
        self._next = [max(from_revision, 1)] * len(prefixes)
        self._ended = ended
        self._news = threading.Condition()
        self._events: list[Event] = []
        self._error: StoreError | None = None
        self._closed = False
        self._stream: Any = None
        self._thread = threading.Thread(target=self._run, name="etcd watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def get(self, timeout: float | None = None) -> list[Event]:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._news:
            while not (self._events or self._error or self._over):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._news.wait(left)
            if self._over:
                return []
            if self._error is not None and not self._events:
                raise self._error
            events, self._events = self._events, []
            return events

    def close(self) -> None:
        with self._news:
            self._closed = True
            self._news.notify_all()
            if self._stream is not None:
                self._stream.cancel()
        if self._thread is not threading.current_thread():
            # It may be waiting for a member that is frozen; it ends when that call does.
            self._thread.join(END)

    @property
    def _over(self) -> bool:
        return self._closed or self._connection.closed

    def _run(self) -> None:
        error: StoreError | None = None
        try:
            breaks = 0
            while not self._over:
                breaks = 0 if self._follow(self._connection.find()) else breaks + 1
                if breaks == BREAKS:
                    raise StoreError("the etcd answers, but breaks off every watch; look at its log")
                if breaks:
                    time.sleep(PAUSE)
        except StoreError as raised:
            error = raised
        except Exception as raised:
            log.exception("a watch failed")
            error = StoreError(f"a watch failed: {raised!r}; watch again")
        with self._news:
            self._error = error
            self._news.notify_all()
        self._ended(self)

    def _follow(self, endpoint: Endpoint) -> bool:
        """Read one stream until it breaks or the watch is closed; whether the watchers were heard of. Raises
        StoreError where another stream would not do better."""
        requests: SimpleQueue[Any] = SimpleQueue()
        heard = False
        try:
            with self._news:
                if self._over:
                    return heard
                stream = self._stream = endpoint.watch.Watch(iter(requests.get, None), metadata=METADATA)
            for index, prefix in enumerate(self._prefixes):
                create = WatchCreateRequest(**range_of(prefix), start_revision=self._next[index], watch_id=index + 1)
                requests.put(WatchRequest(create_request=create))
            for response in stream:
                if response.canceled:
                    if response.compact_revision:
                        raise CompactedError(
                            "revisions not seen yet are no longer kept; list again and watch from there"
                        )
                    log.info("the etcd at %s ended a watch: %s", endpoint.name, response.cancel_reason)
                    return heard
                heard = True
                self._take(response.watch_id - 1, response.events)
        except grpc.RpcError as error:
            lasting = None if self._over else explained(error, endpoint.name)
            if lasting is not None:
                raise lasting from error
        except ValueError:
            if not self._over:  # gRPC's error for a channel that has been closed
                raise
        finally:
            requests.put(None)
            if self._stream is not None:
                self._stream.cancel()
        return heard

    def _take(self, index: int, received: Sequence[Any]) -> None:
        events = [
            Event(event.kv.key.decode(), None if event.type else entry_of(event.kv), event.kv.mod_revision)
            for event in received
            if event.kv.mod_revision >= self._next[index]
        ]
        if events:
            # A response has all of a revision's events that its watcher is to see.
            self._next[index] = events[-1].revision + 1
            with self._news:
                self._events += events
                self._news.notify_all()


def range_of(prefix: str) -> dict[str, bytes]:
    """The fields of a request that say: all keys with this prefix. An empty one is every key."""
    return {"key": prefix.encode() or b"\0", "range_end": prefix_range_end(prefix)}


def entry_of(kv: Any) -> Entry:
    """The entry that a message of etcd's holds."""
    return Entry(kv.key.decode(), kv.value, kv.create_revision, kv.mod_revision, kv.lease)
