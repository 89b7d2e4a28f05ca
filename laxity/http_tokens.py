"""Tokens for HTTP and gRPC: those that a file names, and who showed one.

A line of the file is ``token`` or ``name token``; empty ones, and those that begin with #, say nothing. It is read
again when it changes. While it cannot be read, nobody is let in. What is kept of a token is its digest alone.
"""

from __future__ import annotations

import hmac
import logging
import re
import threading
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from laxity.private import NotPrivate, read_private, stamp

log = logging.getLogger("laxity.http")

LEAST: Final = 16
"""Characters of a token: it can be tried as often as one likes."""
LARGEST: Final = 64 * 1024
"""Bytes of a file of tokens at most."""
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII)
"""What can be shown in a header (RFC 6750)."""


class InvalidTokens(ValueError):
    """A file of tokens cannot be used; the text says why and what to do, and has no token in it."""


@dataclass(frozen=True)
class Token:
    """One that lets people in. ``name`` is '' where the file gives it none, ``digest`` is SHA-256's."""

    name: str
    digest: bytes


def read_tokens(path: str | Path) -> list[str]:
    """The tokens that a file names, in its order; raises :class:`InvalidTokens` where there is none."""
    return [token for _, token in _read(path)]


class HttpTokens:
    """The tokens of a file, as it is by now. For any thread."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._tokens: tuple[Token, ...] = ()

    def current(self) -> tuple[Token, ...]:
        """Those that let people in now."""
        with self._lock:
            seen = stamp(self._path)
            if seen != self._seen:
                self._seen = seen
                try:
                    self._tokens = tuple(Token(name, digest_of(token)) for name, token in _read(self._path))
                except InvalidTokens as error:
                    self._tokens = ()
                    log.error("nobody is let in by a token: %s", error)
            return self._tokens

    def shown(self, token: str) -> bool:
        """Whether this is one of them, in a time that does not tell how nearly."""
        digest = digest_of(token)
        found = False
        for known in self.current():
            found |= hmac.compare_digest(known.digest, digest)
        return found


def digest_of(token: str) -> bytes:
    return sha256(token.encode(errors="surrogateescape")).digest()


def _read(path: str | Path) -> list[tuple[str, str]]:
    try:
        text = read_private(path, LARGEST, "write other tokens").decode()
    except NotPrivate as error:
        raise InvalidTokens(str(error)) from error
    except OSError as error:
        raise InvalidTokens(f"the file of tokens {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise InvalidTokens(f"{path} is no text") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        *names, token = words
        if len(names) > 1:
            raise InvalidTokens(f"{path}, line {number}: write a token, or a name and a token")
        if len(token) < LEAST or not _TOKEN.fullmatch(token):
            raise InvalidTokens(
                f"{path}, line {number}: a token has {LEAST} characters or more, letters, digits and -._~+/ alone; "
                "`openssl rand -hex 16` makes one"
            )
        found.append((" ".join(names), token))
    if not found:
        raise InvalidTokens(f"there is no token in {path}; `openssl rand -hex 16` makes one")
    return found
