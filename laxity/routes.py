"""Which shard gets a request: the routing table that shards tell, and the choice among those that are connected.

An engine without sockets or clocks. Shards are known by their names; the shell reports which ones are connected and
what they say (their WELCOMEs), and asks for each pipeline's :meth:`rotation <Router.rotation>`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from laxity.link import heartbeat_of
from laxity.protocol import Welcome

BEGINNINGS: Final = 100
"""How many turns of a rotation a client may begin at."""


class ServedPipeline(msgspec.Struct, frozen=True):
    """What a client knows of a pipeline that the cluster serves."""

    slo: float | None
    """Its SLO in seconds; None while no shard that serves it is connected."""
    ready: bool
    """Whether devices hold all its stages, as far as is known; requests to one that is not ready wait for that."""


class RoutingTable(msgspec.Struct, frozen=True):
    """The cluster's shards, ``{name: address}``, and who serves what, ``{pipeline: {shard: weight}}``."""

    revision: int
    shards: dict[str, str]
    routes: dict[str, dict[str, float]]


def table_of(welcome: Welcome) -> RoutingTable:
    """The table in a WELCOME. What makes no sense in it (an index to nowhere, a negative weight) is left out."""
    shards = welcome.shards
    return RoutingTable(
        welcome.revision,
        dict(shards),
        {
            pipeline: {
                shards[index][0]: weight if 0.0 < weight < float("inf") else 0.0
                for index, weight in route
                if 0 <= index < len(shards)
            }
            for pipeline, route in welcome.routes
        },
    )


class Rotation:
    """Smooth weighted round robin: each shard gets its part of the turns, as evenly spaced as can be. ``phase`` (0 to
    1) says where to begin, so that many clients of few requests do not all begin with the same shard."""

    def __init__(self, weights: Iterable[tuple[str, float]], phase: float) -> None:
        self._weights = list(weights)
        self._total = sum([weight for _, weight in self._weights])
        self.only = self._weights[0][0] if len(self._weights) == 1 else None
        """The only shard, where there is but one: then nobody has to ask whose turn it is."""
        self._credit = [0.0] * len(self._weights)
        for _ in range(int(phase * BEGINNINGS)):
            self.next()

    def next(self) -> str:
        """Whose turn it is."""
        credit = self._credit
        best = 0
        for index, (_, weight) in enumerate(self._weights):
            credit[index] += weight
            if credit[index] > credit[best]:
                best = index
        credit[best] -= self._total
        return self._weights[best][0]


class Router:
    """The routing table, and the shards that are connected. ``phase`` (0 to 1) is the client's own."""

    def __init__(self, phase: float) -> None:
        self.table = RoutingTable(0, {}, {})
        self.changes = 0
        """Grows when a rotation or :attr:`wanted` may have become another."""
        self._phase = phase
        self._open: dict[str, Welcome] = {}
        self._tables: dict[str, RoutingTable] = {}
        self._rotations: dict[str, Rotation | None] = {}
        self._used: set[str] = set()

    # ---- what happened ------------------------------------------------------------------

    def welcome(self, welcome: Welcome) -> None:
        """A shard is connected, or has news."""
        shard = welcome.shard
        self._open[shard] = welcome
        self._tables.pop(shard, None)  # the last to speak is the last in order
        self._tables[shard] = table_of(welcome)
        self._changed()

    def lost(self, shard: str) -> None:
        """A shard is connected no more."""
        if self._open.pop(shard, None) is not None:
            del self._tables[shard]
            self._changed()

    def _changed(self) -> None:
        if self._tables:  # else the last table stays: it says where to look for shards
            self.table = max(reversed(self._tables.values()), key=lambda table: table.revision)
        self._rotations.clear()
        self.changes += 1

    # ---- what follows --------------------------------------------------------------------

    def rotation(self, pipeline: str) -> Rotation | None:
        """Says which shard each of the pipeline's requests goes to, until something changes; None while no shard that
        serves it is connected. The pipeline is in use from now on."""
        try:
            return self._rotations[pipeline]
        except KeyError:
            rotation = self._rotations[pipeline] = self._make_rotation(pipeline)
        if pipeline not in self._used:
            self._used.add(pipeline)
            self.changes += 1
        return rotation

    def _make_rotation(self, pipeline: str) -> Rotation | None:
        route = self.table.routes.get(pipeline)
        # A shard that has not heard yet that it is to serve a pipeline would reject its requests.
        serving = [
            shard for shard, welcome in self._open.items() if any(name == pipeline for name, _ in welcome.pipelines)
        ]
        if route is None:
            shard = next(iter(serving or self._open), None)
            return None if shard is None else Rotation([(shard, 1.0)], self._phase)
        weighted = [(shard, weight) for shard, weight in route.items() if weight > 0.0 and shard in self._open]
        ready = [shard for shard in serving if pipeline not in self._open[shard].unready]
        weights = (
            [(shard, weight) for shard, weight in weighted if shard in ready]
            or [(shard, weight) for shard, weight in weighted if shard in serving]
            or weighted
            or [(shard, 1.0) for shard in route if shard in self._open]
        )
        return Rotation(weights, self._phase) if weights else None

    def serving(self, pipeline: str) -> list[str]:
        """The shards that are to get a pipeline's requests; [] where the table does not name any."""
        route = self.table.routes.get(pipeline, {})
        return [shard for shard, weight in route.items() if weight > 0.0] or list(route)

    @property
    def wanted(self) -> dict[str, str]:
        """The shards, and their addresses, that requests made so far are to be spread over."""
        names = {shard for pipeline in self._used for shard in self.serving(pipeline)}
        return {shard: address for shard, address in self.table.shards.items() if shard in names}

    @property
    def heartbeat(self) -> float:
        """The longest heartbeat interval of the connected shards in seconds."""
        return max([heartbeat_of(welcome) for welcome in self._open.values()], default=1.0)

    @property
    def max_payload(self) -> int:
        """The payload in bytes that every connected shard takes; 0 where none has told a limit."""
        return min([welcome.max_payload for welcome in self._open.values() if welcome.max_payload > 0], default=0)

    @property
    def slos(self) -> dict[str, int]:
        """The SLOs in µs of all pipelines that connected shards serve."""
        return {name: slo_us for welcome in self._open.values() for name, slo_us in welcome.pipelines}

    @property
    def pipelines(self) -> dict[str, ServedPipeline]:
        """All pipelines that connected shards serve, or know others to serve."""
        found = {name: ServedPipeline(None, bool(route)) for name, route in self.table.routes.items()}
        served = [(set(welcome.unready), welcome.pipelines) for welcome in self._open.values()]
        ready = {name for unready, pipelines in served for name, _ in pipelines if name not in unready}
        for name, slo_us in self.slos.items():
            found[name] = ServedPipeline(slo_us / 1e6 if slo_us > 0 else None, name in ready)
        return found
