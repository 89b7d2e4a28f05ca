"""What a coordinator counts, as it is handed to the one that speaks HTTP for it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import get_args

from cluster.election import Election
from cluster.observe.families import COORDINATOR, SECONDS
from cluster.observe.figures import Figures, Sample
from cluster.observe.histogram import Histogram
from cluster.observe.trace import TraceRecord
from cluster.planner.view import Plan
from cluster.records import NodeState


class CoordinatorCounts:
    """Over all its terms. Read by another thread as it stands."""

    def __init__(self) -> None:
        self.moves = 0
        self.plans = Histogram(SECONDS)
        self.nodes: dict[str, int] = {}
        """By state; empty while another one leads."""
        self.allocated: dict[str, int] = {}
        """Devices by pipeline, likewise; one with models of several counts for each."""

    def planned(self, plan: Plan, seconds: float) -> None:
        """A plan was made, which took so long."""
        self.plans.observe(seconds)
        self.nodes = dict.fromkeys(get_args(NodeState), 0) | Counter(state for state, _ in plan.states.values())
        allocated = dict.fromkeys(plan.serving, 0)
        for placed in plan.placement.values():
            for pipeline in {model.partition("@")[0] for model in placed.models}:
                allocated[pipeline] = allocated.get(pipeline, 0) + 1
        self.allocated = allocated

    def leads_no_more(self) -> None:
        """What it saw as the leader is no longer so."""
        self.nodes = {}
        self.allocated = {}


class CoordinatorSource:
    """A :class:`~cluster.observe.source.Source`. ``away`` tells whether the store is."""

    def __init__(self, name: str, counts: CoordinatorCounts, election: Election, away: Callable[[], bool]) -> None:
        self._name = name
        self._counts = counts
        self._election = election
        self._away = away
        self._started_at = time.time()

    def figures(self) -> Figures:
        """All families of a coordinator."""
        counts = self._counts
        away = self._away()
        mine = [self._name]
        samples: dict[str, list[Sample]] = {family.name: [] for family in COORDINATOR}
        samples["laxity_coordinator_leader"].append((mine, int(self._election.is_leader(time.monotonic()))))
        samples["laxity_coordinator_store_up"].append((mine, int(not away)))
        samples["laxity_coordinator_moves"].append((mine, counts.moves))
        samples["laxity_coordinator_plan_seconds"].append((mine, counts.plans.figures()))
        samples["laxity_nodes"] += [([self._name, state], count) for state, count in counts.nodes.items()]
        samples["laxity_devices_allocated"] += [([self._name, name], count) for name, count in counts.allocated.items()]
        ready = "the store does not answer" if away else ""
        return Figures("coordinator", self._name, os.getpid(), self._started_at, ready, samples)

    def trace(self, request: str) -> TraceRecord | None:
        """Coordinators keep none."""
        return None

    def traces(self, after: int, limit: int) -> tuple[int, list[TraceRecord]]:
        """Coordinators keep none."""
        return after, []
