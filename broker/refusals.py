"""Who was refused, counted by why, and said in the log; a peer that tries again and again does not fill the disk."""

from __future__ import annotations

import logging
from typing import Final

from broker.access import PORTS, Domain
from laxity.log_lines import worth_a_line

log = logging.getLogger("laxity.broker")

REASONS: Final = (
    "unknown_key",
    "revoked_key",
    "expired_key",
    "role",
    "identity",
    "routing_id",
    "handshake",
    "silent",
    "connections",
    "not_ready",
)
"""Why peers are refused: the key is unknown, revoked, replaced; its role may not do this; it gives itself out for
another; its routing id could be guessed; the handshake failed (no key, that of another shard, no ZeroMQ); it connected
and said nothing; there are too many connections; the shard has not read who may come in."""
MOST: Final = 1000
"""Refusals that are told apart for the log; all beyond them are one for each reason."""


class Refusals:
    """Of one shard."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(REASONS, 0)
        """By reason, for metrics."""
        self._by_peer: dict[tuple[str, str], int] = {}

    def note(self, reason: str, domain: Domain, peer: str, host: str, owner: str, text: str) -> None:
        """Somebody was refused: ``peer`` is its address as far as that is known, ``owner`` that of its key ('': none),
        and ``text`` why, for people. Lines are told apart by that, and by owners or else ``host``s; not by unknown
        keys, of which a stranger can make as many as it likes."""
        self.counts[reason] += 1
        which = (owner or host, reason if reason == "unknown_key" else text)
        if which not in self._by_peer and len(self._by_peer) >= MOST:
            which = ("", reason)
        times = self._by_peer[which] = self._by_peer.get(which, 0) + 1
        if worth_a_line(times):
            again = f" ({times} times by now)" if times > 1 else ""
            log.warning("refused %s at %s: %s%s", peer, PORTS[domain], text, again)
