"""The dashboard as an ASGI application: the page, the live views it draws, and what may be done from it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cli.dashboard.session import Sessions, from_page
from cli.dashboard.watching import TooManyWatchers, Watchers
from cli.draining import drain_nodes, resume_nodes
from cluster.records import RecordError
from cluster.store.base import StoreError
from laxity.http_access import CHALLENGE, HttpAccess, Refusal
from laxity.http_guard import refused

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

_TO_SIGN_IN: Final = ("/", "/api/session", "/api/sign-in", "/api/sign-out")
"""What those get as well who have yet to show a token, beside the page's own files."""


class SignIn(msgspec.Struct, forbid_unknown_fields=True):
    """What POST /api/sign-in takes."""

    token: str


def dashboard_app(store_url: str, cluster: str, access: HttpAccess) -> Starlette:
    """The dashboard of a cluster, from its store. Where there are tokens, people can sign in with one, drain nodes and
    take them back; without, it only shows."""
    sessions = Sessions(access.tokens, cluster)
    dashboard = _Dashboard(store_url, cluster, access, sessions)
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
        middleware=[Middleware(_Guarded, access=access, sessions=sessions)],
        exception_handlers={_Refused: _refuse},
    )


class _Refused(Exception):
    """What was asked for is not done; the text says why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, _Refused)
    headers = {"www-authenticate": CHALLENGE} if error.status == 401 else None
    return JSONResponse({"error": str(error)}, error.status, headers)


class _Dashboard:
    def __init__(self, store_url: str, cluster: str, access: HttpAccess, sessions: Sessions) -> None:
        self._access = access
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

    async def events(self, request: Request) -> Response:
        try:
            events = self._watchers.events()
        except TooManyWatchers:
            raise _too_many() from None
        return StreamingResponse(self._while_allowed(request, events), media_type="text/event-stream")

    async def _while_allowed(self, request: Request, events: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
        """The events, until the token that let their reader in lets nobody in any more."""
        async with aclosing(events):
            async for event in events:
                if _refusal(request, self._access, self._sessions) is not None:
                    return
                yield event

    # ---- what may be done --------------------------------------------------------------------

    async def session(self, request: Request) -> Response:
        return self._session(self._sessions.signed_in(request))

    def _session(self, signed_in: bool) -> Response:
        """``possible``: whether anybody can sign in, ``needed``: whether who did not sees nothing."""
        needed = not self._access.is_open("dashboard")
        return JSONResponse({"possible": self._sessions.possible, "needed": needed, "signed_in": signed_in})

    async def sign_in(self, request: Request) -> Response:
        _check_origin(request)
        if not self._sessions.possible:
            raise _Refused(403, "this dashboard only shows: it was started without --http-token-file")
        try:
            shown = msgspec.json.decode(await _body(request), type=SignIn)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _Refused(400, f"that is no sign-in: {error}") from None
        response = self._session(True)
        if not self._sessions.sign_in(shown.token, request, response):
            raise _Refused(403, "that is not the token")
        return response

    async def sign_out(self, request: Request) -> Response:
        _check_origin(request)
        response = self._session(False)
        self._sessions.sign_out(request, response)
        return response

    async def drain(self, request: Request) -> Response:
        return await self._change(
            request, lambda name: drain_nodes(self._store_url, self._cluster, [name], "asked for on the dashboard")
        )

    async def resume(self, request: Request) -> Response:
        return await self._change(request, lambda name: resume_nodes(self._store_url, self._cluster, [name]))

    async def _change(self, request: Request, change: Callable[[str], Any]) -> Response:
        if not self._access.shows_token(request.headers.get("authorization", "")):
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


def _refusal(request: Request, access: HttpAccess, sessions: Sessions) -> Refusal | None:
    """Why who asks gets none of it."""
    refusal = access.misled(request.headers, request.method)
    if refusal is not None or sessions.signed_in(request):
        return refusal
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    if access.tokens is not None and (path in _TO_SIGN_IN or path.startswith("/static/")):
        return None
    peer = "" if request.client is None else request.client.host
    return access.refusal("dashboard", request.headers.get("authorization", ""), peer)


class _Guarded:
    """Lets those in who may see it, and puts the headers that keep browsers on guard into every answer; what is live is
    not kept by anybody."""

    def __init__(self, app: ASGIApp, access: HttpAccess, sessions: Sessions) -> None:
        self._app = app
        self._access = access
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        def guarded(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-cache" if scope["path"].find("/api/") < 0 else "no-store")
            return send(message)

        refusal = _refusal(Request(scope), self._access, self._sessions) if scope["type"] == "http" else None
        if refusal is not None:
            await refused(refusal)(scope, receive, guarded)
        else:
            await self._app(scope, receive, guarded)
