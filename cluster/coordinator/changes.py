"""From a plan to what has to be written: only what differs from what lies in the store."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.coordinator.view import Records
from cluster.planner.view import Plan
from cluster.records import (
    DevicePlacement,
    NodeStateRecord,
    Paths,
    PlacementRecord,
    ServingRecord,
    TuningRecord,
    encode,
)
from cluster.store.base import Delete, Operation, Put

SAME = 0.02
"""Tuned values that differ by less than this part of themselves are not written again."""


def changes(paths: Paths, records: Records, plan: Plan) -> list[Operation]:
    """The writes that carry a plan out, in an order in which each prefix of them is sound: devices first, then what is
    served by them, then the nodes' states."""
    return [*_placements(paths, records, plan), *_serving(paths, records, plan), *_states(paths, records, plan)]


def _placements(paths: Paths, records: Records, plan: Plan) -> list[Operation]:
    wanted: dict[str, dict[int, DevicePlacement]] = {}
    for (node, number), placed in sorted(plan.placement.items()):
        if placed.models:
            wanted.setdefault(node, {})[number] = DevicePlacement(placed.shard, sorted(placed.models))
    operations: list[Operation] = []
    for node in sorted(wanted.keys() | records.placements.keys()):
        record = PlacementRecord(wanted.get(node, {}))
        if record == records.placements.get(node, PlacementRecord({})):
            continue
        operations.append(Put(paths.placement(node), encode(record)))
    return operations


def _serving(paths: Paths, records: Records, plan: Plan) -> list[Operation]:
    operations: list[Operation] = []
    for name, served in sorted(plan.serving.items()):
        wanted = records.pipelines.get(name)
        present = records.serving.get(name)
        version = served.spec.version
        if wanted is not None and wanted.version == version:
            files = wanted.files
        elif present is not None and present.version == version:
            files = present.files
        else:
            continue
        record = ServingRecord(version, served.spec, served.shards, files)
        if record != present:
            operations.append(Put(paths.served(name), encode(record)))
    for name in sorted(records.serving.keys() - plan.serving.keys()):
        operations.append(Delete(paths.served(name)))
        operations.append(Delete(paths.tuned(name)))
    return operations


def _states(paths: Paths, records: Records, plan: Plan) -> list[Operation]:
    operations: list[Operation] = []
    for node, (state, why) in sorted(plan.states.items()):
        present = records.states.get(node)
        there = records.nodes.get(node)
        if there is not None:
            devices = [(d.type, d.memory_mb) for d in sorted(there.devices, key=lambda d: d.device)]
        else:
            devices = present.devices if present is not None else []
        record = NodeStateRecord(state, why, devices)
        if record != present:
            operations.append(Put(paths.state(node), encode(record)))
    return operations


def tuning_changes(
    paths: Paths, present: Mapping[str, TuningRecord], wanted: Mapping[str, TuningRecord], renew: bool
) -> list[Operation]:
    """The writes that publish what was tuned; ``renew``: also what is as before, so that shards know that it holds."""
    return [
        Put(paths.tuned(name), encode(record))
        for name, record in sorted(wanted.items())
        if renew or name not in present or _differs(present[name], record)
    ]


def _differs(one: TuningRecord, other: TuningRecord) -> bool:
    if one.queued.keys() != other.queued.keys() or one.limit != other.limit:
        return True
    pairs = [(one.quantile, other.quantile), (one.history, other.history), (one.admission, other.admission)]
    pairs += [(seconds, other.queued[stage]) for stage, seconds in one.queued.items()]
    return any(abs(a - b) > SAME * max(abs(a), abs(b)) + 1e-4 for a, b in pairs)
