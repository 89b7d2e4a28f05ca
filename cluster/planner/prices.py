"""What every model of a cluster costs on each of its device types."""

from __future__ import annotations

from collections.abc import Set

from cluster.planner.costs import Costs, StageCost
from cluster.planner.view import ClusterView
from pipelines.spec import PipelineSpec


class Prices:
    """The costs of all models of a view, wanted or served, on devices of the ``types`` that there are. ``memories``:
    megabytes by (model key, type) as they were known before, for models whose spec is not in the view any more; it is
    brought up to date."""

    def __init__(
        self, view: ClusterView, types: Set[str], costs: Costs, memories: dict[tuple[str, str], float]
    ) -> None:
        self.types = frozenset(types)
        self._tables: dict[int, dict[tuple[str, str], StageCost]] = {}
        self._by_key: dict[tuple[str, str], StageCost] = {}
        for spec in [*view.pipelines.values(), *(served.spec for served in view.serving.values())]:
            table = self._tables[id(spec)] = costs.of(spec, self.types, view.profiles, view.footprints)
            version = costs.version(spec)
            for (stage, kind), cost in table.items():
                key = f"{spec.name}@{version}/{stage}"
                self._by_key[key, kind] = cost
                memories[key, kind] = cost.memory
        placed = {key for what in view.placement.values() for key in what.models}
        for key, kind in [pair for pair in memories if pair not in self._by_key and pair[0] not in placed]:
            del memories[key, kind]
        self._memories = memories

    def of(self, spec: PipelineSpec, stage: str) -> dict[str, StageCost]:
        """By device type."""
        table = self._tables[id(spec)]
        return {kind: table[stage, kind] for kind in self.types}

    def load(self, spec: PipelineSpec) -> float:
        """Seconds to load the spec's slowest model."""
        return max((cost.load for cost in self._tables[id(spec)].values()), default=0.0)

    def memory(self, key: str, kind: str) -> float:
        """Megabytes of a model; 0 where that is not known."""
        return self._memories.get((key, kind), 0.0)

    def loading(self, key: str, kind: str) -> float:
        """Seconds to load a model."""
        cost = self._by_key.get((key, kind))
        return 0.0 if cost is None else cost.load
