"""Addresses that a process binds, and what others are told of them."""

from __future__ import annotations

import re
import socket

ANYWHERE = ("0.0.0.0", "[::]", "*")
"""Hosts that mean all interfaces."""
_HTTP = re.compile(r"([^\s/:\[\]]+|\[[^\s/\]]+\]):(\d{1,5}|\*)", re.ASCII)


def advertised(address: str, host: str) -> str:
    """What others are told of an address that a socket is bound to: the same, with ``host`` in its place where that is
    given. One that is bound on all interfaces ('tcp://0.0.0.0:7100') and has no ``host`` is told by this one's name."""
    scheme, _, rest = address.partition("://")
    bound, _, port = rest.rpartition(":")
    if scheme == "ipc" or not (host or bound in ANYWHERE):
        return address
    name = host or socket.getfqdn()
    return f"{scheme}://[{name}]:{port}" if ":" in name else f"{scheme}://{name}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """The host (as it is written) and the port of 'HOST:PORT'; the port 0, or *, is any free one. ValueError."""
    match = _HTTP.fullmatch(address)
    port = 0 if match is None or match[2] == "*" else int(match[2])
    if match is None or port > 65535:
        raise ValueError(
            f"{address!r} is no address; write HOST:PORT, with * as PORT for any free one and 0.0.0.0 as HOST for "
            "every interface, or '' for none"
        )
    return match[1], port
