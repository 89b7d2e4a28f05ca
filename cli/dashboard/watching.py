"""Live views for everybody who watches: one follower of the store, while anybody does."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator
from functools import cached_property
from typing import Final

import msgspec

from cli.live.follow import PERIOD, live_views
from cli.live.view import LiveView

log = logging.getLogger("laxity.dashboard")

MOST_WATCHERS: Final = 64
LINGER: Final = 60.0
"""Seconds for which the store is followed on once nobody watches, so that a page that is loaded again has history."""
RECENT: Final = 10
"""Seconds of history in what a watcher gets that saw the views before."""


class TooManyWatchers(Exception):
    """One more would be too many."""


class _Encoded:
    """The ``number``-th view as events of a stream, each made once for all who get it."""

    def __init__(self, number: int, view: LiveView) -> None:
        self.number = number
        self.view = view

    @cached_property
    def full(self) -> bytes:
        return _event(b"full", self.view)

    @cached_property
    def next(self) -> bytes:
        """For who knows the history but for the last seconds."""
        shorter = [msgspec.structs.replace(p, history=p.history[-RECENT:]) for p in self.view.pipelines]
        return _event(b"next", msgspec.structs.replace(self.view, pipelines=shorter))


def _event(name: bytes, view: LiveView) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, msgspec.json.encode(view))


class Watchers:
    """All who watch one cluster. For one event loop; the store is followed in a thread, from the first one's coming
    until ``linger`` seconds after the last one's going."""

    def __init__(self, store_url: str, cluster: str, linger: float = LINGER) -> None:
        self._linger = linger
        self._url = store_url
        self._cluster = cluster
        self._count = 0
        self._latest: _Encoded | None = None
        self._news = asyncio.Event()
        self._stop: threading.Event | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def view(self) -> LiveView:
        """The view of this second. :class:`TooManyWatchers`."""
        self._check()
        self._come()
        try:
            return (await self._after(0)).view
        finally:
            self._go()

    def events(self) -> AsyncGenerator[bytes]:
        """The views as server-sent events: ``full`` ones, and ``next`` ones with a short history. Who is slow to take
        one misses those that come meanwhile. :class:`TooManyWatchers`."""
        self._check()
        return self._events()

    async def _events(self) -> AsyncGenerator[bytes]:
        self._come()
        try:
            yield b"retry: 1000\n\n"
            number = 0
            while True:
                latest = await self._after(number)
                follows = number and latest.number < number + RECENT
                number = latest.number
                yield latest.next if follows else latest.full
        finally:
            self._go()

    async def _after(self, number: int) -> _Encoded:
        while self._latest is None or self._latest.number <= number:
            await self._news.wait()
        return self._latest

    # ---- the follower ------------------------------------------------------------------------

    def _check(self) -> None:
        if self._count >= MOST_WATCHERS:
            raise TooManyWatchers

    def _come(self) -> None:
        self._count += 1
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._stop is None:
            self._stop = threading.Event()
            arguments = (asyncio.get_running_loop(), self._stop)
            threading.Thread(target=self._follow, args=arguments, name="live views", daemon=True).start()

    def _go(self) -> None:
        self._count -= 1
        if not self._count:
            self._idle = asyncio.get_running_loop().call_later(self._linger, self._rest)

    def _rest(self) -> None:
        assert self._stop is not None
        self._stop.set()
        self._stop = self._latest = None

    def _follow(self, loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                for view in live_views(self._url, self._cluster, stop):
                    loop.call_soon_threadsafe(self._publish, stop, view)
            except RuntimeError:
                if loop.is_closed():
                    return
                raise
            except Exception:
                # Whatever it was: who watches is to see what there is again.
                log.exception("following the store failed")
                stop.wait(PERIOD)

    def _publish(self, stop: threading.Event, view: LiveView) -> None:
        if stop is not self._stop:
            return  # of a follower that is ending
        self._latest = _Encoded(self._latest.number + 1 if self._latest is not None else 1, view)
        self._news.set()
        self._news.clear()
