"""What a cluster's store says at one moment, as the commands that look at clusters read it."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.coordinator.view import Records
from cluster.decoded import Decoded
from cluster.records import CoordinatorRecord, LeaderRecord, NodeGaugesRecord, NodeState, Paths, TuningRecord
from cluster.store import open_store
from cluster.store.base import Entry
from cluster.tuning.report import ReportRecord


class Snapshot(Records):
    """The records of a cluster by name; those that cannot be read are left out."""

    def __init__(self, paths: Paths, decoded: Decoded) -> None:
        super().__init__(paths, decoded)
        self.tuning = decoded.under(TuningRecord, paths.tuning)
        self.reports = decoded.under(ReportRecord, paths.reports)
        self.coordinators = decoded.under(CoordinatorRecord, paths.coordinators)
        self.gauges = decoded.under(NodeGaugesRecord, paths.metrics)
        self.leader = next(iter(decoded.under(LeaderRecord, paths.leader).values()), None)

    @property
    def fixed(self) -> bool:
        """Whether the plan was written once, by `laxity up`, and no coordinator has ever looked after it."""
        return bool(self.placements) and not self.states and not self.coordinators and self.leader is None

    def state(self, node: str) -> NodeState:
        """What was decided of a node; where nothing was, it is active."""
        record = self.states.get(node)
        return "active" if record is None else record.state

    def holders(self, model: str) -> list[tuple[str, int]]:
        """The devices (agent, number) that are to hold a model."""
        return [
            (agent, number)
            for agent, placement in self.placements.items()
            for number, device in placement.devices.items()
            if model in device.models
        ]

    def model_state(self, agent: str, number: int, model: str) -> str:
        """How far a device is with a model, '' where it has not begun."""
        node = self.nodes.get(agent)
        devices = [] if node is None else node.devices
        return next((device.models.get(model, "") for device in devices if device.device == number), "")

    def drift(self, model: str) -> dict[str, float]:
        """How many times as long as its profile says a model takes, by device type: at the shard where it is the
        furthest off. Nothing of types on which too little was measured of late."""
        found: dict[str, float] = {}
        for report in self.reports.values():
            for stage in report.stages:
                for kind, ratio in stage.drift.items() if stage.model == model else ():
                    if abs(ratio - 1.0) >= abs(found.get(kind, 1.0) - 1.0):
                        found[kind] = ratio
        return found

    def device_type(self, agent: str, number: int) -> str:
        """What kind of device that is, '' where it is not here."""
        node = self.nodes.get(agent)
        devices = [] if node is None else node.devices
        return next((device.type for device in devices if device.device == number), "")


def snapshot(paths: Paths, entries: Iterable[Entry]) -> Snapshot:
    """What these entries say."""
    decoded = Decoded()
    decoded.update({entry.key: entry for entry in entries})
    return Snapshot(paths, decoded)


def look(url: str, cluster: str) -> Snapshot:
    """What a store says of a cluster now."""
    paths = Paths(cluster)
    store = open_store(url)
    try:
        return snapshot(paths, store.list(paths.root).entries)
    finally:
        store.close()
