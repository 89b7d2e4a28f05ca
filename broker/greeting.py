"""What a shard checks of a greeting (HELLO, READY) before it talks to the peer."""

from __future__ import annotations

from laxity import protocol
from laxity.protocol import Goodbye


def refusal(version: int, name: str, kind: str) -> Goodbye | None:
    """The GOODBYE for a greeting that cannot be accepted; None for a good one. ``kind`` is 'client' or 'agent'."""
    if version != protocol.VERSION:
        return Goodbye(
            reason=f"protocol version {version} is not spoken here; this shard speaks version {protocol.VERSION}: "
            f"install a matching {kind}",
            retry=False,
        )
    if not 1 <= len(name) <= protocol.MAX_NAME:
        return Goodbye(reason=f"{kind} names have 1 to {protocol.MAX_NAME} characters", retry=False)
    if not name.isprintable():
        return Goodbye(reason=f"{kind} names are of printable characters", retry=False)
    return None
