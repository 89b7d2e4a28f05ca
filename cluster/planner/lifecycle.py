"""Nodes: active, draining, at rest, lost, and back."""

from __future__ import annotations

from collections.abc import Set

from cluster.planner.keys import natural
from cluster.planner.settings import Settings
from cluster.planner.view import ClusterView, NodeView
from cluster.records import NodeState

States = dict[str, tuple[NodeState, str]]
"""Each node's state, and why."""

ACTIVE: tuple[NodeState, str] = ("active", "")
DRAINING: tuple[NodeState, str] = ("draining", "somebody wants it empty")
DRAINED: tuple[NodeState, str] = ("standby", "drained: somebody wants it empty")
NOT_NEEDED: tuple[NodeState, str] = ("standby", "not needed")
LOST: tuple[NodeState, str] = ("lost", "missing")


class Lifecycle:
    """Remembers since when nodes have been empty, and who was drained. Times are monotonic seconds."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._empty_since: dict[str, float] = {}
        self._drained: set[str] = set()

    def before(self, view: ClusterView) -> States:
        """The nodes' states as far as they follow from the nodes alone."""
        holding = {node for (node, _), placed in view.placement.items() if placed.models}
        states = {name: self._before(node, name in holding, name in self._drained) for name, node in view.nodes.items()}
        self._drained = {name for name, node in view.nodes.items() if node.drained}
        return states

    def _before(self, node: NodeView, holding: bool, was_drained: bool) -> tuple[NodeState, str]:
        at_rest = node.state == "standby" and not holding
        if node.missing > self._settings.loss_patience and not at_rest:
            return DRAINED if node.drained else LOST
        if node.state == "lost" and node.missing > 0.0:
            return LOST
        if node.drained:
            return DRAINED if at_rest else DRAINING
        return NOT_NEEDED if at_rest and self._settings.rest and not was_drained else ACTIVE

    def wake(self, view: ClusterView, states: States, lacking: float) -> None:
        """Wake nodes that are at rest and away until their devices, and those of nodes on their way, cover ``lacking``
        devices."""
        away = [name for name, node in view.nodes.items() if node.missing > 0.0 and not node.drained]
        lacking -= sum(len(view.nodes[name].devices) for name in away if states[name][0] == "active")
        for name in sorted((name for name in away if states[name][0] == "standby"), key=natural):
            if lacking <= 0.0:
                return
            states[name] = ACTIVE
            lacking -= len(view.nodes[name].devices)

    def after(self, now: float, view: ClusterView, states: States, busy: Set[str]) -> None:
        """Put nodes to rest that have been empty for long enough; ``busy`` are those that hold something, or are to."""
        empty: dict[str, float] = {}
        for name, (state, _) in states.items():
            if name in busy or state in ("standby", "lost") or view.nodes[name].missing > 0.0:
                continue
            empty[name] = self._empty_since.get(name, now)
            if state == "draining":
                states[name] = DRAINED
            elif self._settings.rest and now >= empty[name] + self._settings.node_patience:
                states[name] = NOT_NEEDED
        self._empty_since = empty
