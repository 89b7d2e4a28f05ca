"""Nodes: active, draining, at rest, lost, and back."""

from __future__ import annotations

from collections.abc import Set

from cluster.planner.keys import natural
from cluster.planner.settings import Settings
from cluster.planner.view import ClusterView, NodeView
from cluster.records import NodeState

BOOTS = "woken: devices lack"


class Lifecycle:
    """Remembers since when nodes have been empty. Times are monotonic seconds."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._empty_since: dict[str, float] = {}

    def before(self, view: ClusterView) -> dict[str, tuple[NodeState, str]]:
        """The nodes' states as far as they follow from the nodes alone."""
        return {name: self._before(node) for name, node in view.nodes.items()}

    def _before(self, node: NodeView) -> tuple[NodeState, str]:
        if node.missing > self._settings.loss_patience and node.state != "standby":
            if node.drained and node.state == "draining":
                return "standby", "drained and gone"
            return "lost", f"missing for more than {self._settings.loss_patience:g} s"
        if node.drained:
            return ("standby", "drained") if node.state == "standby" else ("draining", "somebody wants it empty")
        if node.state == "lost":
            return ("active", "it is back") if node.missing == 0.0 else ("lost", "missing")
        if node.state == "standby":
            return "standby", "not needed"
        return "active", "resumed" if node.state == "draining" else ""

    def wake(self, view: ClusterView, states: dict[str, tuple[NodeState, str]], lacking: float) -> bool:
        """Wake nodes at rest until their devices and those of nodes on their way cover ``lacking`` devices; whether any
        of those is there already, so that it can be used at once."""
        coming = sum(
            len(view.nodes[name].devices)
            for name, (state, _) in states.items()
            if state == "active" and view.nodes[name].missing > 0.0 and not view.nodes[name].drained
        )
        lacking -= coming
        there = False
        resting = [n for n, (state, _) in states.items() if state == "standby" and not view.nodes[n].drained]
        for name in sorted(resting, key=lambda name: (view.nodes[name].missing > 0.0, natural(name))):
            if lacking <= 0.0:
                break
            states[name] = ("active", BOOTS)
            self._empty_since.pop(name, None)
            lacking -= len(view.nodes[name].devices)
            there = there or view.nodes[name].missing == 0.0
        return there

    def after(self, now: float, view: ClusterView, states: dict[str, tuple[NodeState, str]], busy: Set[str]) -> None:
        """Put nodes to rest that have been empty for long enough; ``busy`` are those that hold something."""
        for name, (state, _) in states.items():
            if name in busy or state in ("standby", "lost") or view.nodes[name].missing > 0.0:
                self._empty_since.pop(name, None)
                continue
            since = self._empty_since.setdefault(name, now)
            if state == "draining":
                states[name] = ("standby", "drained")
            elif self._settings.rest and now >= since + self._settings.node_patience:
                states[name] = ("standby", f"empty for {self._settings.node_patience:g} s")
        self._empty_since = {name: since for name, since in self._empty_since.items() if name in view.nodes}
