"""CURVE on sockets: who connects where with which keys, and where connections may do without.

Every TCP connection is encrypted, and both ends know each other's keys, but for loopback addresses and where somebody
asks for plain connections by name.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
from collections.abc import Iterable
from typing import Any, Final

import zmq

from laxity.keys import KeyPair, ServerKey

log = logging.getLogger("laxity")

ROUTING_ID: Final = 16
"""Bytes of the random name under which a peer is known at the other end of a connection. Who knew it could take the
answers that come after the connection breaks; it goes over the wire encrypted, and is another for each socket."""


class PlainRefused(ValueError):
    """A connection would go over the network without encryption; the text says what to do."""


def is_local(address: str) -> bool:
    """Whether an address ('tcp://HOST:PORT', 'ipc://...') cannot be reached from other hosts."""
    scheme, _, rest = address.partition("://")
    if scheme != "tcp":
        return True
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_plain(address: str, plain: bool, what: str, role: str = "", variable: str = "LAXITY_KEY") -> None:
    """Let ``what`` (as in 'services connect to') use an address without keys: on loopback, or if ``plain`` asks for it
    (with a warning). Raises :class:`PlainRefused`, which says of which ``role`` a key has to be ('': that depends), and
    which environment ``variable`` names its file."""
    if is_local(address):
        return
    if not plain:
        of_role = f" NAME --role {role}" if role else ""
        raise PlainRefused(
            f"{what} {address} over the network, which needs a key: make one with `laxity keys new{of_role}` and give "
            f"its file with --key ({variable}); or ask for connections that anybody can read and use, with --plain"
        )
    log.warning("%s %s in plain text: anybody in the network can read and use it", what, address)


def secure_server(socket: zmq.Socket[Any], pair: KeyPair, domain: str) -> None:
    """Have a socket, before it is bound, let in only those whom the ZAP handler lets into ``domain``."""
    socket.set(zmq.CURVE_SERVER, 1)
    socket.set(zmq.CURVE_SECRETKEY, pair.secret.encode())
    socket.set(zmq.ZAP_DOMAIN, domain.encode())
    socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)


def secure_client(socket: zmq.Socket[Any], pair: KeyPair, server: str) -> None:
    """Have a socket, before it is connected, talk only to the owner of the public key ``server``, as that of
    ``pair``."""
    socket.set(zmq.CURVE_SERVERKEY, server.encode())
    socket.set(zmq.CURVE_PUBLICKEY, pair.public.encode())
    socket.set(zmq.CURVE_SECRETKEY, pair.secret.encode())


def name_socket(socket: zmq.Socket[Any]) -> None:
    """Give a DEALER, before it is connected, a name that nobody can guess (see :data:`ROUTING_ID`)."""
    socket.set(zmq.ROUTING_ID, b"\x01" + secrets.token_bytes(ROUTING_ID - 1))  # none that begins with 0 is taken


class ServerKeys:
    """The public keys of shards, as a key file names them and as shards tell of others. A shard that cannot be reached
    with one may have another: :meth:`candidates` are to be tried in turn."""

    def __init__(self, servers: Iterable[ServerKey] = ()) -> None:
        self._by_shard: dict[str, list[str]] = {}
        self._shard_at: dict[str, str] = {}
        for server in servers:
            self.learn(server)

    def learn(self, server: ServerKey) -> None:
        """Somebody who is trusted tells where a shard is, and which keys it has (none: it serves in plain text)."""
        self._by_shard[server.shard] = list(server.publics)
        self._shard_at[server.address] = server.shard

    def of(self, address: str, shard: str = "") -> list[str] | None:
        """The keys of the shard at an address (``shard``: its name, where that is known): [] of one that is known to
        serve in plain text, None of one that nobody has told of."""
        return self._by_shard.get(shard or self._shard_at.get(address, ""))

    def candidates(self, address: str, shard: str = "") -> list[str]:
        """The keys that a shard at an address may have, the likeliest first. Of the one that ``shard`` names these are
        its own, if they are known; else any shard may be there, though what is known of the address comes first."""
        own = self.of(address, shard) or []
        if own and shard:
            return list(own)
        others = [public for publics in self._by_shard.values() for public in publics]
        return list(dict.fromkeys([*own, *others]))
