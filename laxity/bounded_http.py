"""HTTP that no client can hold up for others: bounded in connections, and in what an unfinished one may take.

For those who serve some; `import laxity` does not import it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_WITHIN: Final = 10.0
"""Seconds in which a request's line and headers have to be there, from the connection or their first byte; and between
two parts of its body."""
CHECK: Final = 5.0
"""Seconds between two looks at a connection; one that has taken nothing of its answer in between is closed."""
KEEP_ALIVE: Final = 75
"""Seconds that a connection may be idle between two requests: more than Prometheus' usual interval."""
MOST_HEAD: Final = 16 * 1024
"""Bytes of a request's line and headers."""


class BoundedProtocol(H11Protocol):
    """One connection."""

    most_connections = 128
    """With one more, the one that has waited longest without a request under way is closed."""
    _timer: asyncio.TimerHandle
    _waits_since = 0.0
    """When the connection, or the first byte of its next request, came."""
    _heard_at = 0.0
    """When anything came."""
    _unsent = 0
    """Bytes of answers not yet taken at the last look."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waits_since = self.loop.time()
        self._timer = self.loop.call_later(CHECK, self._check)
        if len(self.connections) > self.most_connections:
            others = [each for each in self.connections if isinstance(each, BoundedProtocol) and each.waits()]
            min(others, key=lambda each: each._waits_since, default=self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self.loop.time()
        if self.waits() and not self._has_begun():
            self._waits_since = self._heard_at
        super().data_received(data)

    def waits(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _has_begun(self) -> bool:
        """Whether a part of the next request is there (of the first one, as soon as somebody connects)."""
        return self.cycle is None or bool(self.conn.trailing_data[0]) or self.conn.their_state is not h11.IDLE

    def _check(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        unread = unsent > 0 and unsent == self._unsent
        latest = self.loop.time() - REQUEST_WITHIN
        late = self.waits() and self._has_begun() and self._waits_since < latest
        body = self.conn.their_state is h11.SEND_BODY and not self.flow.read_paused and self._heard_at < latest
        if unread or late or body:
            self.transport.abort()
            return
        self._unsent = unsent
        self._timer = self.loop.call_later(CHECK, self._check)


class HttpServer(uvicorn.Server):
    """Serves an application with such connections, without a log of requests. Signals are left to whoever runs it."""

    def __init__(self, app: ASGIApp, protocol: type[BoundedProtocol] = BoundedProtocol) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # clients' mistakes are no news
        settings: dict[str, Any] = {"loop": "asyncio", "ws": "none", "lifespan": "off", "interface": "asgi3"}
        config = uvicorn.Config(
            app,
            http=protocol,
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=MOST_HEAD,
            **settings,
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve_http(app: ASGIApp, listener: socket.socket) -> None:
    """Serve on a socket that is bound already, for ever."""
    HttpServer(app).run(sockets=[listener])
