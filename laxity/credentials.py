"""With what a process connects to shards: its own key and theirs, or none where connections may be plain."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import zmq

from laxity.curve import ServerKeys, check_plain, name_socket, secure_client
from laxity.keys import InvalidKey, KeyFile, KeyPair, ServerKey, check_key, read_key_file
from laxity.private import stamp

log = logging.getLogger("laxity")

PLAIN: Final = ""
"""Stands among the keys to try for a connection without encryption."""
NOT_READY: Final = 500
"""With this status a shard refuses everybody that has not read yet who is let in; others hold against one."""
KEY_VARIABLE: Final = "LAXITY_KEY"
"""The environment variable that names the key file of clients that are given none."""
PLAIN_VARIABLE: Final = "LAXITY_PLAIN"
"""The one that asks for plain connections, where it is 1."""


class NoWay(ValueError):
    """A shard cannot be connected to with these keys; the text says why and what to do."""


class Credentials:
    """For one thread. With a ``key`` every connection is encrypted, to shards whose keys are known; without one they
    are plain, which is for loopback addresses, and for others only where ``plain`` asks for it. With both, a shard of
    which no key is known may be plain.

    Where ``key`` is a path, the file is read now (:class:`~laxity.keys.InvalidKey`), and again when it has changed by
    the time that a connection is made. ``servers`` are shards that are known from elsewhere.
    """

    def __init__(
        self, key: KeyFile | str | Path | None = None, plain: bool = False, servers: Iterable[ServerKey] = ()
    ) -> None:
        self.plain = plain
        self.key: KeyFile | None = None
        """As it is by now; replaced as a whole, so that any thread may look."""
        self._servers = ServerKeys(servers)
        self._path: Path | None = None
        self._seen: tuple[int, ...] = ()
        self._warned: set[str] = set()
        if isinstance(key, KeyFile):
            self._take(key)
        elif key:
            self._path = Path(key)
            self._seen = stamp(self._path)
            self._take(read_key_file(self._path))

    @property
    def pair(self) -> KeyPair | None:
        return None if self.key is None else self.key.pair

    def refresh(self) -> bool:
        """Take the key in the file if that is another one by now, and say whether it was; one that cannot be read is
        none, and what was known holds."""
        if self._path is None:
            return False
        seen = stamp(self._path)
        if seen == self._seen:
            return False
        self._seen = seen
        before = self.key
        try:
            self._take(read_key_file(self._path))
        except InvalidKey as error:
            log.warning("%s; going on with the key that was there before", error)
            return False
        log.info("the key file %s was read again", self._path)
        return self.key != before

    def learn(self, server: ServerKey) -> None:
        """A shard's keys, from somebody who is trusted to know; none: it is a plain one."""
        try:
            for public in server.publics:
                check_key(public)
        except InvalidKey as error:
            log.warning("shard %s: %s", server.shard, error)
        else:
            self._servers.learn(server)

    def check(self, address: str) -> None:
        """Raise :class:`~laxity.curve.PlainRefused` where a connection there would have to be plain and must not."""
        if self.key is None:
            self._check_plain(address)

    def ways(self, address: str, shard: str = "") -> list[str]:
        """The keys that the shard at an address (``shard``: its name, where that is known) may have, the likeliest
        first, to be tried in turn; :data:`PLAIN` among them means without. Raises :class:`NoWay` or
        :class:`~laxity.curve.PlainRefused`, both of them ValueErrors."""
        known = self._servers.of(address, shard)
        if self.key is None:
            if known:
                raise NoWay("it wants a key: give the file of one with --key (LAXITY_KEY); `laxity keys new` makes it")
            self._check_plain(address)
            return [PLAIN]
        if known != [] and (keys := self._servers.candidates(address, shard)):
            return [*keys, PLAIN] if self.plain and known is None else keys
        if self.plain:
            self._check_plain(address)
            return [PLAIN]
        if known is None:
            raise NoWay(
                "no shard's key is known: bring the key file up to date with `laxity keys servers FILE`, where the "
                "store can be reached"
            )
        raise NoWay(
            "it serves in plain text, to which no connection is made with a key: give the shard one, or ask for --plain"
        )

    def prepare(self, socket: zmq.Socket[Any], way: str) -> None:
        """Set a new DEALER up to be connected in one of the :meth:`ways`."""
        name_socket(socket)
        if way != PLAIN:
            assert self.key is not None
            secure_client(socket, self.key.pair, way)

    def _take(self, key: KeyFile) -> None:
        self.key = key
        for server in key.servers:
            self._servers.learn(server)

    def _check_plain(self, address: str) -> None:
        if address not in self._warned:
            check_plain(address, self.plain, "services and agents connect to")
            self._warned.add(address)


STALE: Final = "it is not the shard that the key file knows (its key was replaced: get a new key file)"


def why_failed(event: int, detail: int, way: str, stale: str = STALE) -> str:
    """What a failed handshake means, from the event that a socket's monitor told and its value: ''
    where the event is none of these. ``way`` is what was tried, ``stale`` tells of a shard that has another key."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and detail == NOT_READY:
        return "the shard has not read from its store yet who is let in"
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "the shard refused this key: it is unknown, revoked or expired there, or of another role"
    mismatch = event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and detail == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
    if mismatch and way != PLAIN:
        return "it serves in plain text, or is no shard; with a key only encrypted connections are made (see --plain)"
    if mismatch:
        return "it wants a key: give the file of one with --key (LAXITY_KEY)"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        return "it does not speak ZeroMQ; is that a shard's port for services?"
    if event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        return ""
    if way != PLAIN:
        return f"{stale}, or serves in plain text"
    return "the handshake failed: it wants a key (--key, LAXITY_KEY), or that is no shard's port for services"


def default_key() -> str:
    """The path of the key file that the environment names; '' for none."""
    return os.environ.get(KEY_VARIABLE, "")


def default_plain() -> bool:
    """Whether the environment asks for plain connections."""
    return os.environ.get(PLAIN_VARIABLE, "").lower() in ("1", "true", "yes", "on")
