"""Who may change something: a token is shown once, and a cookie says so from then on."""

from __future__ import annotations

import hmac
import time
from hashlib import sha256
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from laxity.http_tokens import HttpTokens, Token, digest_of

LASTS: Final = 12 * 3600
"""Seconds that a sign-in holds."""
REQUEST_HEADER: Final = "x-laxity-request"
"""A page of another origin cannot send it: its browser asks here first, and is not allowed to."""


class Sessions:
    """``tokens`` None: nobody can sign in. What a cookie says is signed with the token that was shown, so that nothing
    is kept here, and it holds no longer than the token."""

    def __init__(self, tokens: HttpTokens | None, cluster: str) -> None:
        self._tokens = tokens
        self._cookie = f"laxity-{cluster}"
        """Cookies know no ports: several clusters may be watched at one host."""

    @property
    def possible(self) -> bool:
        return self._tokens is not None

    def sign_in(self, token: str, request: Request, response: Response) -> bool:
        """Let the browser in that showed this token, if it is the right one."""
        digest = digest_of(token)
        found = [known for known in self._current() if hmac.compare_digest(known.digest, digest)]
        if not found:
            return False
        ends = str(int(time.time()) + LASTS)
        secure = request.scope["scheme"] == "https"
        value = f"{ends}.{self._signed(ends, found[0])}"
        path = request.scope.get("root_path", "") or "/"
        response.set_cookie(
            self._cookie, value, max_age=LASTS, path=path, httponly=True, samesite="strict", secure=secure
        )
        return True

    def sign_out(self, request: Request, response: Response) -> None:
        response.delete_cookie(self._cookie, path=request.scope.get("root_path", "") or "/")

    def signed_in(self, request: Request) -> bool:
        ends, _, signature = request.cookies.get(self._cookie, "").partition(".")
        shown = signature.encode(errors="surrogateescape")
        signed = [hmac.compare_digest(shown, self._signed(ends, token).encode()) for token in self._current()]
        return any(signed) and int(ends) > time.time()

    def _current(self) -> tuple[Token, ...]:
        return () if self._tokens is None else self._tokens.current()

    def _signed(self, ends: str, token: Token) -> str:
        return hmac.new(token.digest, f"{self._cookie} until {ends}".encode(), sha256).hexdigest()


def from_page(request: Request) -> bool:
    """Whether a request that changes something comes from the dashboard's own page, or from no page at all."""
    return REQUEST_HEADER in request.headers and request.headers.get("sec-fetch-site", "none") in (
        "same-origin",
        "none",
    )
