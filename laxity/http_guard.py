"""Applications for those only who may ask.

For those who serve HTTP; `import laxity` does not import it."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from laxity.http_access import Group, HttpAccess, Refusal


def refused(refusal: Refusal) -> Response:
    """The answer to who may not ask."""
    return JSONResponse({"error": refusal.why}, refusal.status, headers=refusal.headers)


class Guard:
    """An application for those only who may ask. ``group_of`` tells the group of a path; None: the application sees to
    it itself."""

    def __init__(self, app: ASGIApp, access: HttpAccess, group_of: Callable[[str], Group | None]) -> None:
        self._app = app
        self._access = access
        self._group_of = group_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        group = self._group_of(scope["path"]) if scope["type"] == "http" else None
        if group is not None:
            headers = Headers(scope=scope)
            refusal = self._access.misled(headers, scope["method"])
            if refusal is None:
                peer = (scope.get("client") or ("",))[0]
                refusal = self._access.refusal(group, headers.get("authorization", ""), peer)
            if refusal is not None:
                await refused(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)
