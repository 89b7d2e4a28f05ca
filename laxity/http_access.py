"""Who may ask a process for what, over HTTP and gRPC.

What can be asked for belongs to a *group*. Some groups are open to everybody. The others are for those who show a
token; without any tokens, for those on the same host, where the address can be reached from no other one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final, Literal
from urllib.parse import urlsplit

from laxity.curve import is_local
from laxity.http_tokens import HttpTokens
from laxity.log_lines import worth_a_line

log = logging.getLogger("laxity.http")

Group = Literal["metrics", "health", "traces", "dashboard", "inference"]
OPENABLE: Final = ("metrics", "health", "traces", "dashboard")
"""Groups that can be opened to everybody by name. Inference cannot: it takes devices' time from others."""
OPEN: Final = ("metrics", "health")
"""Those that are open unless somebody says otherwise."""
CHALLENGE: Final = 'Bearer realm="laxity"'
_SAFE: Final = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class Refusal:
    """The answer to who may not ask. ``status`` is HTTP's."""

    status: int
    why: str
    headers: dict[str, str] = field(default_factory=dict)


class HttpAccess:
    """At one address. ``host`` is what the socket is bound to; ``tokens`` None: there are none."""

    def __init__(self, host: str, tokens: HttpTokens | None, open_groups: Collection[str] = OPEN) -> None:
        self.local = is_local(f"tcp://{host}:0")
        self.tokens = tokens
        self._open = frozenset(open_groups)
        self._wrong = 0

    def shows_token(self, authorization: str) -> bool:
        """Whether a header Authorization shows one of the tokens."""
        scheme, _, token = authorization.partition(" ")
        return self.tokens is not None and scheme.lower() == "bearer" and self.tokens.shown(token.strip())

    def is_open(self, group: Group) -> bool:
        """Whether who shows no token may ask."""
        return group in self._open or (self.tokens is None and self.local)

    def refusal(self, group: Group, authorization: str, peer: str = "") -> Refusal | None:
        """Why who shows this may not ask for what is in a group; None: it may. ``peer`` is who asks, for the log."""
        if self.is_open(group) or self.shows_token(authorization):
            return None
        if self.tokens is None:
            return Refusal(
                403,
                f"{group}: refused, as other hosts reach this address and no token protects it; start this service "
                f"with --http-token-file FILE{_opening(group)}",
            )
        if authorization:
            self._wrong += 1
            if worth_a_line(self._wrong):
                log.warning("%s shows a token that is not known; %d did by now", peer or "somebody", self._wrong)
            invalid = {"www-authenticate": f'{CHALLENGE}, error="invalid_token"'}
            return Refusal(401, "that is no token that is known here", invalid)
        return Refusal(
            401,
            f"{group}: show a token that is in this service's --http-token-file, in the header `Authorization: Bearer "
            "TOKEN`",
            {"www-authenticate": CHALLENGE},
        )

    def misled(self, headers: Mapping[str, str], method: str) -> Refusal | None:
        """Why a request that shows no token may come from a browser that was led here by a page from elsewhere; None
        where it does not look like that.

        Anybody can have a name lead to this host, and a page of that name could then read what only people at this host
        are to see (DNS rebinding). gRPC needs no such check: browsers cannot speak it."""
        if not self.local or self.shows_token(headers.get("authorization", "")):
            return None
        if not _names_this_host(headers.get("host", "")):
            return Refusal(
                421,
                "This is served at this host alone: call it localhost or by its IP address. A proxy before it has to "
                "ask for it by the address that it forwards to, in the header Host, or to show a token.",
            )
        if method not in _SAFE and headers.get("sec-fetch-site", "none") == "cross-site":
            return Refusal(403, "this comes from a page of another site, which may not ask for it")
        return None

    def warn(self, group: Group, address: str) -> None:
        """Tell, as the service starts, that nobody can ask for a group."""
        if self.tokens is None and not self.is_open(group):
            log.warning(
                "other hosts reach %s: %s is refused to everybody there until a token protects it: give "
                "--http-token-file FILE%s",
                address,
                group,
                _opening(group),
            )


def _opening(group: Group) -> str:
    """The other way, where there is one."""
    return f", or name {group} in --http-open" if group in OPENABLE else ""


def _names_this_host(host: str) -> bool:
    """Whether a header Host is nothing that a name from elsewhere could have led to."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in ("", "localhost") or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
