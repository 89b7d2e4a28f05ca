"""The routing table that a shard tells its services: who serves which pipeline, and where the shards are."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cluster.records import BrokerRecord, ServingRecord


class Routing(msgspec.Struct, frozen=True):
    """A routing table as WELCOME has it (:class:`laxity.protocol.Welcome`), as of a revision of the store."""

    shards: list[tuple[str, str]] = []
    routes: list[tuple[str, list[tuple[int, float]]]] = []
    revision: int = 0

    def says_the_same(self, other: Routing) -> bool:
        """Whether the two differ in their revisions at most."""
        return self.shards == other.shards and self.routes == other.routes


class RoutingFollower:
    """Makes routing tables from records. A shard that serves something keeps the address that it had when its record
    vanishes: whether it lives services find out by themselves, a lease may have ended with the store's health."""

    def __init__(self) -> None:
        self._addresses: dict[str, str] = {}

    def update(
        self, served: Mapping[str, ServingRecord], brokers: Mapping[str, BrokerRecord], revision: int
    ) -> Routing:
        """The table that follows from the records, by name, as of ``revision``. Shards whose address was never known
        are left out; a pipeline that has no others has an empty route."""
        serving = {shard for record in served.values() for shard in record.shards}
        self._addresses = {shard: address for shard, address in self._addresses.items() if shard in serving}
        self._addresses.update({shard: broker.frontend for shard, broker in brokers.items()})
        shards = sorted(self._addresses.items())
        index = {shard: number for number, (shard, _) in enumerate(shards)}
        routes = [
            (name, [(index[shard], weight) for shard, weight in sorted(record.shards.items()) if shard in index])
            for name, record in sorted(served.items())
        ]
        return Routing(shards, routes, revision)
