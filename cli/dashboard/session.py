"""Who may change something: a token is shown once, and a cookie says so from then on."""

from __future__ import annotations

import hmac
import time
from hashlib import sha256
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from cli.dashboard.token import LEAST_TOKEN

LASTS: Final = 12 * 3600
"""Seconds that a sign-in holds."""
REQUEST_HEADER: Final = "x-laxity-request"
"""A page of another origin cannot send it: its browser asks here first, and is not allowed to."""


class Sessions:
    """``token`` None: nobody can sign in. What a cookie says is signed with the token, so that nothing is kept here."""

    def __init__(self, token: str | None, cluster: str) -> None:
        if token is not None and len(token) < LEAST_TOKEN:
            raise ValueError(f"the token has {len(token)} characters; it needs {LEAST_TOKEN} or more")
        self._token = token
        self._cookie = f"laxity-{cluster}"
        """Cookies know no ports: several clusters may be watched at one host."""

    @property
    def possible(self) -> bool:
        return self._token is not None

    def sign_in(self, token: str, request: Request, response: Response) -> bool:
        """Let the browser in that showed this token, if it is the right one."""
        if self._token is None or not _equal(token, self._token):
            return False
        ends = str(int(time.time()) + LASTS)
        secure = request.scope["scheme"] == "https"
        value = f"{ends}.{self._signed(ends)}"
        path = request.scope.get("root_path", "") or "/"
        response.set_cookie(
            self._cookie, value, max_age=LASTS, path=path, httponly=True, samesite="strict", secure=secure
        )
        return True

    def sign_out(self, request: Request, response: Response) -> None:
        response.delete_cookie(self._cookie, path=request.scope.get("root_path", "") or "/")

    def signed_in(self, request: Request) -> bool:
        ends, _, signature = request.cookies.get(self._cookie, "").partition(".")
        if self._token is None or not _equal(signature, self._signed(ends)):
            return False
        return int(ends) > time.time()

    def _signed(self, ends: str) -> str:
        assert self._token is not None
        return hmac.new(self._token.encode(), f"{self._cookie} until {ends}".encode(), sha256).hexdigest()


def from_page(request: Request) -> bool:
    """Whether a request that changes something comes from the dashboard's own page, or from no page at all."""
    return REQUEST_HEADER in request.headers and request.headers.get("sec-fetch-site", "none") in (
        "same-origin",
        "none",
    )


def _equal(one: str, other: str) -> bool:
    """Whether two texts are the same, in a time that does not tell how nearly they are."""
    return hmac.compare_digest(sha256(one.encode()).digest(), sha256(other.encode()).digest())
