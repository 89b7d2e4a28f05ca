"""The routing table that a shard tells its services: who serves which pipeline, and where the shards are."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cluster.records import BrokerRecord, KeyRecord, ServingRecord
from laxity.keys import ServerKey


class Routing(msgspec.Struct, frozen=True):
    """A routing table as WELCOME has it (:class:`laxity.protocol.Welcome`), as of a revision of the store."""

    shards: list[tuple[str, str]] = []
    routes: list[tuple[str, list[tuple[int, float]]]] = []
    revision: int = 0
    keys: list[list[str]] = []

    def says_the_same(self, other: Routing) -> bool:
        """Whether the two differ in their revisions at most."""
        return (self.shards, self.routes, self.keys) == (other.shards, other.routes, other.keys)

    def shares(self, shard: str) -> dict[str, float]:
        """The part (0 to 1) of the requests for each pipeline that a shard gets."""
        found: dict[str, float] = {}
        for pipeline, route in self.routes:
            all_weights = sum(weight for _, weight in route)
            if all_weights > 0.0:
                own = sum(weight for index, weight in route if self.shards[index][0] == shard)
                found[pipeline] = own / all_weights
        return found

    def servers(self) -> list[ServerKey]:
        """The shards with their addresses and keys; none where no shard has any."""
        return [ServerKey(name, address, keys) for (name, address), keys in zip(self.shards, self.keys, strict=False)]


class RoutingFollower:
    """Makes routing tables from records. A shard that serves something keeps the address that it had when its record
    vanishes: whether it lives services find out by themselves, a lease may have ended with the store's health."""

    def __init__(self) -> None:
        self._addresses: dict[str, str] = {}
        self._publics: dict[str, str] = {}
        """The key that each shard served with last; '' where that was none."""

    def update(
        self,
        served: Mapping[str, ServingRecord],
        brokers: Mapping[str, BrokerRecord],
        revision: int,
        records: Mapping[str, KeyRecord],
        now: float,
    ) -> Routing:
        """The table that follows from the records, by name, as of ``revision``, with the shards' keys as ``records``
        have them and as they are good at ``now`` (Unix seconds). Shards whose address was never known are left out; a
        pipeline that has no others has an empty route."""
        serving = {shard for record in served.values() for shard in record.shards}
        self._addresses = {shard: address for shard, address in self._addresses.items() if shard in serving}
        self._addresses.update({shard: broker.frontend for shard, broker in brokers.items()})
        self._publics = {shard: public for shard, public in self._publics.items() if shard in self._addresses}
        self._publics.update({shard: broker.public for shard, broker in brokers.items()})
        shards = sorted(self._addresses.items())
        index = {shard: number for number, (shard, _) in enumerate(shards)}
        routes = [
            (name, [(index[shard], weight) for shard, weight in sorted(record.shards.items()) if shard in index])
            for name, record in sorted(served.items())
        ]
        keys = [self._keys(shard, records, now) for shard, _ in shards]
        return Routing(shards, routes, revision, keys if any(keys) else [])

    def _keys(self, shard: str, records: Mapping[str, KeyRecord], now: float) -> list[str]:
        """The keys that a shard may have, first that which it serves with; none where it serves in plain text."""
        record, public = records.get(shard), self._publics[shard]
        if record is None or record.role != "shard" or not public:
            return []
        return sorted(record.good(now), key=lambda good: good != public)
