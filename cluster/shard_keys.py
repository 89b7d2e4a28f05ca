"""Where shards are and which key each of them is to have, for agents and other shards."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

from cluster.records import BrokerRecord, KeyRecord
from laxity.keys import ServerKey

log = logging.getLogger("laxity.cluster")


class ShardKeys:
    """Tells whom to connect to: a shard with a key only while that is one of those under its name in the store, as
    anybody could write another one into a record of itself."""

    def __init__(self, side: Literal["frontend", "backend"]) -> None:
        self._side = side
        self._told: set[tuple[str, str]] = set()

    def of(self, brokers: Mapping[str, BrokerRecord], keys: Mapping[str, KeyRecord], now: float) -> list[ServerKey]:
        """The shards with their one key, [] of those that serve in plain text, as of ``now`` (Unix seconds). Of those
        that are left out it is logged why, once."""
        found: list[ServerKey] = []
        doubtful: set[tuple[str, str]] = set()
        for name, broker in sorted(brokers.items()):
            address = getattr(broker, self._side)
            record = keys.get(name)
            if not broker.public:
                found.append(ServerKey(name, address, []))
            elif record is not None and record.role == "shard" and broker.public in record.good(now):
                found.append(ServerKey(name, address, [broker.public]))
            else:
                doubtful.add((name, broker.public))
        for name, public in sorted(doubtful - self._told):
            log.error(
                "shard %s serves with the key %s, which is not good under its name (unknown, revoked or expired; see "
                "`laxity keys list`): it is not connected to",
                name,
                public,
                extra={"shard": name},
            )
        self._told = doubtful
        return found
