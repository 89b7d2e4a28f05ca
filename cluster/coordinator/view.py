"""From the store's records to what the planner is told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from cluster.coordinator.presence import BARELY, Presence
from cluster.decoded import Decoded
from cluster.planner.view import ClusterView, DeviceId, DeviceView, Footprint, NodeView, Placed, Served
from cluster.records import (
    READY,
    BrokerRecord,
    DrainRecord,
    NodeRecord,
    NodeStateRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    ProfileRecord,
    ServingRecord,
    failure,
    name_of,
)
from cluster.tuning.report import ReportRecord
from pipelines.profile import LatencyProfile


class Records:
    """All records of a cluster at one moment, by name."""

    def __init__(self, paths: Paths, decoded: Decoded) -> None:
        self.pipelines = decoded.under(PipelineRecord, paths.pipelines)
        self.serving = decoded.under(ServingRecord, paths.serving)
        for name in decoded.names(paths.pipelines) - self.pipelines.keys():
            served = self.serving.get(name)
            if served is not None:  # what is wanted cannot be read, which does not mean that nothing is
                self.pipelines[name] = PipelineRecord(served.version, served.spec, served.files)
        self.brokers = decoded.under(BrokerRecord, paths.brokers)
        self.nodes = decoded.under(NodeRecord, paths.nodes)
        self.placements = decoded.under(PlacementRecord, paths.placements)
        self.states = decoded.under(NodeStateRecord, paths.states)
        self.drains = decoded.under(DrainRecord, paths.drains)
        self.profiles: dict[tuple[str, str], ProfileRecord] = {}
        """By (model key, device type)."""
        self._profiles: dict[str, tuple[str, str]] = {}
        for key, profile in decoded.by_key(ProfileRecord, paths.profiles).items():
            at = paths.profiled(key)
            if paths.profile(*at) == key:  # not somebody else's, who would never find it
                self.profiles[at] = profile
                self._profiles[key] = at
        self._profile_keys = decoded.keys(paths.profiles)
        self._unreadable_profiles = decoded.unreadable(paths.profiles)
        unknown = decoded.unreadable(paths.pipelines) | decoded.unreadable(paths.serving)
        self._unknown = {name_of(key) for key in unknown}
        """Pipelines of which it is not known which version is wanted or served."""

    def stale_profiles(self) -> list[str]:
        """The keys of what was measured of versions that nobody wants, serves or holds any more, and of what cannot be
        read or found."""
        versions = self.versions()
        stale = []
        for key in sorted(self._profile_keys):
            at = self._profiles.get(key)
            if at is None or key in self._unreadable_profiles:
                stale.append(key)
                continue
            version = at[0].rpartition("/")[0]
            if version not in versions and version.partition("@")[0] not in self._unknown:
                stale.append(key)
        return stale

    def versions(self) -> set[str]:
        """Every 'pipeline@version' that is wanted, served or placed."""
        found = {f"{name}@{record.version}" for name, record in self.pipelines.items()}
        found.update(f"{name}@{record.version}" for name, record in self.serving.items())
        for placement in self.placements.values():
            for device in placement.devices.values():
                found.update(model.rpartition("/")[0] for model in device.models)
        return found

    def known_nodes(self) -> set[str]:
        """Every node that is there or has been."""
        return self.nodes.keys() | self.states.keys() | self.placements.keys()

    def known_shards(self) -> set[str]:
        """Every shard that is there or has something to do."""
        shards = set(self.brokers)
        for serving in self.serving.values():
            shards.update(serving.shards)
        return shards


def heard(reports: Mapping[str, ReportRecord]) -> set[str]:
    """The agents that any shard hears: they are alive, whatever their leases say."""
    return {agent for report in reports.values() for agent in report.agents}


def view_of(
    now: float,
    records: Records,
    reports: Mapping[str, ReportRecord],
    nodes: Presence,
    shards: Presence,
    patience: float,
) -> ClusterView:
    """The planner's view. ``patience``: seconds for which a shard that is missing still counts."""
    present = sorted(name for name in records.known_shards() if shards.missing(now, name) <= patience)
    return ClusterView(
        nodes={name: _node(now, name, records, nodes) for name in sorted(records.known_nodes())},
        shards=present,
        pipelines={name: record.spec for name, record in records.pipelines.items()},
        serving={name: Served(record.spec, dict(record.shards)) for name, record in records.serving.items()},
        placement=_placement(records),
        profiles=_profiles(records, reports),
        footprints={at: Footprint(record.load_seconds, record.memory_mb) for at, record in records.profiles.items()},
        in_flight=_in_flight(records, reports, present),
    )


def _node(now: float, name: str, records: Records, presence: Presence) -> NodeView:
    record = records.nodes.get(name)
    state = records.states.get(name)
    before = state.state if state is not None else "active"
    drained = name in records.drains
    if record is not None:
        devices = [
            DeviceView(
                device.type,
                device.memory_mb,
                frozenset(model for model, how in device.models.items() if how == READY),
                frozenset(model for model, how in device.models.items() if failure(how) is not None),
            )
            for device in sorted(record.devices, key=lambda device: device.device)
        ]
        return NodeView(before, devices, 0.0, drained)
    missing = presence.missing(now, name)
    placement = records.placements.get(name)
    devices = []
    for number, (kind, memory) in enumerate(state.devices if state is not None else []):
        placed = placement.devices.get(number) if placement is not None else None
        # Not known to be gone: taken to hold what it was to hold.
        ready = frozenset(placed.models) if placed is not None and missing == 0.0 else frozenset[str]()
        devices.append(DeviceView(kind, memory, ready))
    return NodeView(before, devices, BARELY if before == "standby" else missing, drained)


def _placement(records: Records) -> dict[DeviceId, Placed]:
    return {
        (node, number): Placed(device.shard, frozenset(device.models))
        for node, placement in records.placements.items()
        for number, device in placement.devices.items()
        if device.models
    }


def _profiles(records: Records, reports: Mapping[str, ReportRecord]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """What agents measured some time ago, corrected by what shards did of late."""
    profiles = {at: record.profile for at, record in records.profiles.items() if record.profile}
    for report in reports.values():
        for stage in report.stages:
            for kind, measured in stage.latency.items():
                if measured:
                    record = records.profiles.get((stage.model, kind))
                    profiles[stage.model, kind] = _corrected(record.profile if record is not None else [], measured)
    return profiles


def _corrected(before: list[tuple[int, float]], measured: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """What was measured of late; at other sizes what was before, times the ratio at the nearest size of both."""
    if not before:
        return measured
    profile = LatencyProfile(before)
    ratios = {batch: seconds / known for batch, seconds in measured if (known := profile.latency(batch)) > 0.0}
    points = dict(measured)
    for batch, seconds in before:
        if batch not in points:
            nearest = min(ratios, key=lambda size: abs(math.log(size / batch)), default=None)
            points[batch] = seconds * (ratios[nearest] if nearest is not None else 1.0)
    return sorted(points.items())


def _in_flight(
    records: Records, reports: Mapping[str, ReportRecord], present: Iterable[str]
) -> dict[tuple[str, str], int]:
    """Requests by ('pipeline@version', shard). A version that a shard still names has at least one, unless it is the
    one that is served: the shard may not have heard yet that another is, and let in another request. So has every
    version at a shard of which nothing is known at present."""
    served = {f"{name}@{record.version}" for name, record in records.serving.items()}
    counts: dict[tuple[str, str], int] = {}
    for shard, report in reports.items():
        for version, count in report.in_flight.items():
            counts[version, shard] = count if version in served else max(count, 1)
    unknown = set(present) - reports.keys()
    for placement in records.placements.values():
        for device in placement.devices.values():
            for version in {model.rpartition("/")[0] for model in device.models} if device.shard in unknown else ():
                counts[version, device.shard] = 1
    return counts


def arrival_rates(reports: Mapping[str, ReportRecord]) -> dict[str, float]:
    """Elements per second by model key, over all shards."""
    rates: dict[str, float] = {}
    for report in reports.values():
        for stage in report.stages:
            rate = stage.arrived / report.period if report.period > 0.0 else 0.0
            rates[stage.model] = rates.get(stage.model, 0.0) + rate
    return rates
