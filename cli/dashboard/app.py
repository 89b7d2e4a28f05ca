"""The dashboard as an ASGI application: the page, the live views it draws, and what may be done from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import click
import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cli.dashboard.session import Sessions, from_page
from cli.dashboard.watching import TooManyWatchers, Watchers
from cli.draining import drain_nodes, resume_nodes
from cluster.records import RecordError
from cluster.store.base import StoreError

STATIC: Final = Path(__file__).with_name("static")
MOST_BODY: Final = 4096
"""Bytes of what is posted."""
_HEADERS: Final = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

_MISLED: Final = PlainTextResponse(
    "This dashboard is served at this host alone: call it localhost or by its IP address. A proxy before it has to ask "
    "for it by the address that it forwards to, in the header Host.\n",
    421,
)


class SignIn(msgspec.Struct, forbid_unknown_fields=True):
    """What POST /api/sign-in takes."""

    token: str


def dashboard_app(store_url: str, cluster: str, *, token: str | None) -> Starlette:
    """The dashboard of a cluster, from its store. With a token people can sign in, drain nodes and take them back;
    without, it only shows. ValueError for a token that is too short."""
    dashboard = _Dashboard(store_url, cluster, Sessions(token, cluster))
    return Starlette(
        routes=[
            Route("/", dashboard.page),
            Mount("/static", StaticFiles(directory=STATIC)),
            Route("/api/view", dashboard.view),
            Route("/api/events", dashboard.events),
            Route("/api/session", dashboard.session),
            Route("/api/sign-in", dashboard.sign_in, methods=["POST"]),
            Route("/api/sign-out", dashboard.sign_out, methods=["POST"]),
            Route("/api/nodes/{name}/drain", dashboard.drain, methods=["POST"]),
            Route("/api/nodes/{name}/resume", dashboard.resume, methods=["POST"]),
        ],
        middleware=[Middleware(_Headers)],
        exception_handlers={_Refused: _refuse},
    )


class _Refused(Exception):
    """What was asked for is not done; the text says why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, _Refused)
    return JSONResponse({"error": str(error)}, error.status)


class _Dashboard:
    def __init__(self, store_url: str, cluster: str, sessions: Sessions) -> None:
        self._store_url = store_url
        self._cluster = cluster
        self._sessions = sessions
        self._watchers = Watchers(store_url, cluster)

    async def page(self, _request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def view(self, _request: Request) -> Response:
        try:
            view = await self._watchers.view()
        except TooManyWatchers:
            raise _too_many() from None
        return Response(msgspec.json.encode(view), media_type="application/json")

    async def events(self, _request: Request) -> Response:
        try:
            return StreamingResponse(self._watchers.events(), media_type="text/event-stream")
        except TooManyWatchers:
            raise _too_many() from None

    # ---- what may be done --------------------------------------------------------------------

    async def session(self, request: Request) -> Response:
        return JSONResponse({"possible": self._sessions.possible, "signed_in": self._sessions.signed_in(request)})

    async def sign_in(self, request: Request) -> Response:
        _check_origin(request)
        if not self._sessions.possible:
            raise _Refused(403, "this dashboard only shows: it was started without --token-file")
        try:
            shown = msgspec.json.decode(await _body(request), type=SignIn)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _Refused(400, f"that is no sign-in: {error}") from None
        response = JSONResponse({"possible": True, "signed_in": True})
        if not self._sessions.sign_in(shown.token, request, response):
            raise _Refused(403, "that is not the token")
        return response

    async def sign_out(self, request: Request) -> Response:
        _check_origin(request)
        response = JSONResponse({"possible": self._sessions.possible, "signed_in": False})
        self._sessions.sign_out(request, response)
        return response

    async def drain(self, request: Request) -> Response:
        return await self._change(
            request, lambda name: drain_nodes(self._store_url, self._cluster, [name], "asked for on the dashboard")
        )

    async def resume(self, request: Request) -> Response:
        return await self._change(request, lambda name: resume_nodes(self._store_url, self._cluster, [name]))

    async def _change(self, request: Request, change: Callable[[str], Any]) -> Response:
        _check_origin(request)
        if not self._sessions.signed_in(request):
            raise _Refused(401, "sign in first")
        try:
            await run_in_threadpool(change, request.path_params["name"])
        except click.ClickException as error:
            raise _Refused(409, error.message) from None
        except RecordError as error:
            raise _Refused(404, str(error)) from None
        except StoreError as error:
            raise _Refused(503, str(error)) from None
        return JSONResponse({})


def _too_many() -> _Refused:
    return _Refused(503, "too many are watching this dashboard; close a few of their pages")


def _check_origin(request: Request) -> None:
    if not from_page(request):
        raise _Refused(403, "this has to come from the dashboard's own page")


async def _body(request: Request) -> bytes:
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > MOST_BODY:
                raise _Refused(413, f"more than {MOST_BODY} bytes were posted")
    except ClientDisconnect:
        raise _Refused(400, "the body is not all there") from None
    return body


def _is_misled(scope: Scope) -> bool:
    """Whether a request for who is to be reached from this host alone is made in another one's name: anybody can have a
    name lead here, and a page of that name could read what only people at this host are to see (DNS rebinding)."""
    server = scope.get("server")
    if server is None or not _is_address(server[0], loopback=True):
        return False
    try:
        host = urlsplit(f"//{Headers(scope=scope).get('host', '')}").hostname or ""
    except ValueError:
        return True
    return not (host in ("", "localhost") or host.endswith(".localhost") or _is_address(host))


def _is_address(host: str, loopback: bool = False) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or not loopback


class _Headers:
    """Puts the headers that keep browsers on guard into every answer; what is live is not kept by anybody. Requests in
    the name of another host are refused."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        def guarded(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-cache" if scope["path"].find("/api/") < 0 else "no-store")
            return send(message)

        if scope["type"] == "http" and _is_misled(scope):
            await _MISLED(scope, receive, guarded)
        else:
            await self._app(scope, receive, guarded)
