"""Follows a cluster's store, and makes of it a live view each second."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator

from cli.live.feed import LiveFeed
from cli.live.view import LiveView
from cli.snapshot import Snapshot
from cluster.decoded import Decoded
from cluster.membership import Follower
from cluster.records import Paths
from cluster.store import open_store
from cluster.store.base import Store, StoreError

PERIOD = 1.0
"""Seconds between two views."""
TURN = 0.1
"""Seconds within which the end is noticed."""

log = logging.getLogger("laxity.live")


def live_views(url: str, cluster: str, stop: threading.Event) -> Generator[LiveView, None, None]:
    """A view each second until ``stop`` is set; the first at once. While the store is away, the last view with
    ``stale`` saying so. RecordError for a name that no cluster can have."""
    paths = Paths(cluster)
    feed = LiveFeed(cluster, shown_address(url))
    opened = time.monotonic()
    store: Store | None = None
    while store is None:
        try:
            store = open_store(url)
        except StoreError as error:
            away = time.monotonic() - opened
            since = f", for {away:.0f} s" if away >= PERIOD else ""
            why = f"the store cannot be reached{since}: {error}"
            yield feed.away(time.monotonic(), time.time(), why)
            if stop.wait(PERIOD):
                return
    try:
        yield from _follow(store, paths, feed, stop)
    finally:
        store.close()


def _follow(store: Store, paths: Paths, feed: LiveFeed, stop: threading.Event) -> Generator[LiveView, None, None]:
    follower = Follower(store, paths.root)
    decoded = Decoded()
    due = time.monotonic()
    try:
        while not stop.is_set():
            follower.poll(min(TURN, max(due - time.monotonic(), 0.0)))
            now = time.monotonic()
            if now < due:
                continue
            due = max(due + PERIOD, now)
            if follower.away_since is None:
                decoded.update(follower.entries)
                yield feed.update(now, time.time(), Snapshot(paths, decoded))
            else:
                silent = now - follower.away_since
                yield feed.away(now, time.time(), f"the store has not answered for {silent:.0f} s: {follower.trouble}")
    finally:
        follower.close()


def shown_address(url: str) -> str:
    """A store's address for people: without what follows '?', which names the files of certificates and keys."""
    return url.partition("?")[0]
