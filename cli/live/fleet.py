"""A cluster's nodes and devices at one moment: what each is doing, and what is free."""

from __future__ import annotations

import math

from cli.live.view import DeviceState, LiveDevice, LiveNode
from cli.snapshot import Snapshot
from cluster.planner.keys import natural, parse_key
from cluster.records import (
    LOADING,
    QUEUED,
    READY,
    DeviceGauges,
    DevicePlacement,
    DeviceRecord,
    NodeGaugesRecord,
    NodeRecord,
)

BUSY = 0.01
"""A device that executed for a larger part of the last moments than this is busy."""
MISSED = 3.0
"""Periods, without new gauges, after which the last ones count no more."""
MOST_MB = 1e9
MOST_DEVICES = 1024
"""Of one node: no host has more, whatever a record says."""


class Fleet:
    """Remembers what nodes were like, for those that are lost, and when their gauges came. Times are monotonic
    seconds."""

    def __init__(self) -> None:
        self._known: dict[str, NodeRecord] = {}
        self._gauges: dict[str, tuple[NodeGaugesRecord, float]] = {}

    def nodes(self, now: float, seen: Snapshot) -> list[LiveNode]:
        """Every node that is there or has been, in the order of people's names for them."""
        names = seen.known_nodes() | seen.drains.keys()
        self._known = {name: record for name, record in (self._known | seen.nodes).items() if name in names}
        self._note_gauges(now, seen)
        return [self._node(now, name, seen) for name in sorted(names, key=natural)]

    def forgive(self, now: float) -> None:
        """No gauges could be seen of late: their silence counts from now on."""
        self._gauges = {name: (record, now) for name, (record, _) in self._gauges.items()}

    def _note_gauges(self, now: float, seen: Snapshot) -> None:
        noted: dict[str, tuple[NodeGaugesRecord, float]] = {}
        for name, record in seen.gauges.items():
            before = self._gauges.get(name)
            noted[name] = before if before is not None and before[0] is record else (record, now)
        self._gauges = noted

    def _fresh(self, now: float, name: str) -> dict[int, DeviceGauges]:
        record, at = self._gauges.get(name, (None, 0.0))
        if record is None or not 0.0 < record.period < 3600.0 or now >= at + MISSED * record.period + 1.0:
            return {}
        return {gauges.device: gauges for gauges in record.devices}

    def _node(self, now: float, name: str, seen: Snapshot) -> LiveNode:
        decided = seen.states.get(name)
        state, why = (decided.state, decided.why) if decided is not None else ("active", "")
        registered = name in seen.nodes
        drain = seen.drains.get(name)
        if state == "active" and not registered:
            state, why = "lost", why or "its agent is gone: its lease has ended"
        elif state == "active" and drain is not None and not seen.fixed:
            state, why = "draining", drain.why or "somebody wants it empty"
        elif drain is not None and drain.why:
            why = f"{why} ({drain.why})"
        record = self._known.get(name)
        node = LiveNode(
            name=name,
            host=record.host if record is not None else "",
            state=state,
            why=why,
            drained=drain is not None,
            registered=registered,
        )
        gauges = self._fresh(now, name) if registered else {}
        placement = seen.placements.get(name)
        placed = placement.devices if placement is not None else {}
        devices = {device.device: device for device in record.devices} if record is not None else {}
        if not devices:
            types = decided.devices if decided is not None else []
            devices = {number: DeviceRecord(number, kind, {}, "", mb) for number, (kind, mb) in enumerate(types)}
            devices |= {number: DeviceRecord(number, "") for number in placed if number not in devices}
        for number in sorted(devices)[:MOST_DEVICES]:
            node.devices.append(_device(node, devices[number], placed.get(number), gauges.get(number)))
        return node


def _device(
    node: LiveNode, device: DeviceRecord, placed: DevicePlacement | None, gauges: DeviceGauges | None
) -> LiveDevice:
    wanted = placed.models if placed is not None else []
    held = device.models if node.registered else {}
    utilization = _within(gauges.utilization, 1.0) if gauges is not None else 0.0
    return LiveDevice(
        number=device.device,
        type=device.type,
        state=_state(node, held, wanted, utilization),
        utilization=utilization,
        models=list(dict.fromkeys(short(model) for model in (*wanted, *held))),
        shard=placed.shard if placed is not None else "",
        memory_mb=_within(gauges.memory_mb, MOST_MB) if gauges is not None else 0.0,
        budget_mb=_within(gauges.budget_mb if gauges is not None else device.memory_mb, MOST_MB),
    )


def _state(node: LiveNode, held: dict[str, str], wanted: list[str], utilization: float) -> DeviceState:
    if node.state != "active":
        # A node at rest whose agent is there: its devices hold nothing. One that is being emptied may still work.
        return node.state
    ready = any(how == READY for how in held.values())
    if ready and utilization > BUSY:
        return "busy"
    if any(how in (QUEUED, LOADING) for how in held.values()) or any(model not in held for model in wanted):
        return "loading"
    return "idle" if held or wanted else "standby"


def _within(value: float, most: float) -> float:
    return min(max(value, 0.0), most) if math.isfinite(value) else 0.0


def short(model: str) -> str:
    """'pipeline/stage' of the key 'pipeline@version/stage'."""
    key = parse_key(model)
    return f"{key.pipeline}/{key.stage}"
