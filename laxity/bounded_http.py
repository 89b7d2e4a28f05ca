"""HTTP that no client can hold up for others: bounded in connections, and in what an unfinished one may take.

For those who serve some; `import laxity` does not import it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Final

import h11
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

KEEP_ALIVE: Final = 75
"""Seconds that a connection may be idle between two requests: more than Prometheus' usual interval."""
MOST_HEAD: Final = 16 * 1024
"""Bytes of a request's line and headers."""
MOST_HEADERS: Final = 100


@dataclass(frozen=True)
class Limits:
    """What a connection may take. Times are in seconds."""

    connections: int = 128
    """With one more, the one that has waited longest without a request under way is closed."""
    head_within: float = 10.0
    """In which a request's line and headers have to be there, from the connection or their first byte; and between two
    parts of its body."""
    body_within: float = 30.0
    """In which all of its body has to be there."""
    check: float = 5.0
    """Between two looks at a connection; one that has taken nothing of its answer in between is closed."""


class BoundedProtocol(H11Protocol):
    """One connection."""

    _timer: asyncio.TimerHandle
    _waits_since = 0.0
    """When the connection, or the first byte of its next request, came."""
    _heard_at = 0.0
    """When anything came."""
    _body_since: float | None = None
    """When the first part of the body came that is not all there."""
    _unsent = 0
    """Bytes of answers not yet taken at the last look."""

    def __init__(self, limits: Limits, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = limits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waits_since = self.loop.time()
        self._timer = self.loop.call_later(self._limits.check, self._check)
        if len(self.connections) > self._limits.connections:
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
        if self.conn.their_state is not h11.SEND_BODY:
            self._body_since = None
        elif self._body_since is None:
            self._body_since = self._heard_at

    def waits(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _has_begun(self) -> bool:
        """Whether a part of the next request is there (of the first one, as soon as somebody connects)."""
        return self.cycle is None or bool(self.conn.trailing_data[0]) or self.conn.their_state is not h11.IDLE

    def _check(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        unread = unsent > 0 and unsent == self._unsent
        now = self.loop.time()
        latest = now - self._limits.head_within
        late = self.waits() and self._has_begun() and self._waits_since < latest
        body = False
        if self._body_since is not None and not self.flow.read_paused:
            body = self._heard_at < latest or self._body_since < now - self._limits.body_within
        if unread or late or body:
            self.transport.abort()
            return
        self._unsent = unsent
        self._timer = self.loop.call_later(self._limits.check, self._check)


class HttpServer(uvicorn.Server):
    """Serves an application with such connections, without a log of requests. Signals are left to whoever runs it."""

    def __init__(self, app: ASGIApp, limits: Limits | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # clients' mistakes are no news
        settings: dict[str, Any] = {"loop": "asyncio", "ws": "none", "lifespan": "off", "interface": "asgi3"}
        settings["http"] = partial(BoundedProtocol, limits or Limits())
        config = uvicorn.Config(
            _BoundedHead(app),
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


class _BoundedHead:
    """An application for requests with small heads: what comes in one piece is larger now and then than what is waited
    for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(map(len, chain(*headers)))
            if size > MOST_HEAD or len(headers) > MOST_HEADERS:
                why = f"at most {MOST_HEADERS} headers are taken here, and {MOST_HEAD} bytes of them and the address"
                await JSONResponse({"error": why}, 431, headers={"connection": "close"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


def serve_http(app: ASGIApp, listener: socket.socket) -> None:
    """Serve on a socket that is bound already, for ever."""
    HttpServer(app).run(sockets=[listener])
