"""Who decides what simulated GPUs hold: the control plane's own planner, and a reference to compare it with."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from cluster.placement import split_gpus
from cluster.planner.planner import Planner
from cluster.planner.settings import Settings
from cluster.planner.view import ClusterView, DeviceId, Placed, Plan


class Measured(msgspec.Struct, frozen=True):
    """The last second, by model key: elements that arrived, and GPU-seconds that batches ran (counted as they end)."""

    rates: dict[str, float]
    busy: dict[str, float]


class Scaler(Protocol):
    """Decides once a second."""

    def decide(self, now: float, measured: Measured, view: ClusterView) -> Plan:
        """What is to be."""


class Reactive(msgspec.Struct, frozen=True, kw_only=True):
    """A scaler on utilisation, as Kubernetes' horizontal autoscaler: every ``interval`` seconds each stage is given
    ceil(GPUs × utilisation / ``target``) GPUs, unless that is within ``tolerance`` of what it has; it keeps the most
    that it was to be given within the last ``patience`` seconds."""

    interval: float = 15.0
    target: float = 0.7
    patience: float = 300.0
    tolerance: float = 0.1


class PlannerScaler:
    """The planner, asked as the coordinator asks it."""

    def __init__(self, settings: Settings) -> None:
        self._planner = Planner(settings)

    def decide(self, now: float, measured: Measured, view: ClusterView) -> Plan:
        self._planner.observe(now, measured.rates)
        return self._planner.plan(now, view)


class ReactiveScaler:
    """See :class:`Reactive`. Each GPU holds one model. The first decision goes by ``costs``, GPU-seconds an element by
    model key: as many GPUs as are used to the ``target`` by the rates."""

    def __init__(self, settings: Reactive, costs: Mapping[str, float], shard: str) -> None:
        self._settings = settings
        self._costs = costs
        self._shard = shard
        self._next = -math.inf
        self._busy = dict.fromkeys(costs, 0.0)
        self._there = dict.fromkeys(costs, 0.0)
        """GPU-seconds since the last evaluation: run, and offered by those that had loaded the model."""
        self._asked: dict[str, deque[tuple[float, int]]] = {key: deque() for key in costs}

    def decide(self, now: float, measured: Measured, view: ClusterView) -> Plan:
        settings = self._settings
        there = {
            key: sum(key in device.ready for node in view.nodes.values() for device in node.devices)
            for key in self._costs
        }
        for key in self._costs:
            self._busy[key] += measured.busy.get(key, 0.0)
            self._there[key] += there[key]
        placement = dict(view.placement)
        if now >= self._next:
            wanted: dict[str, int] = {}
            for key, cost in self._costs.items():
                has = sum(key in placed.models for placed in placement.values())
                if has == 0:
                    desired = math.ceil(measured.rates.get(key, 0.0) * cost / settings.target)
                else:
                    ratio = self._busy[key] / max(self._there[key], 1e-9) / settings.target
                    desired = math.ceil(there[key] * ratio - 1e-9)
                    if abs(ratio - 1.0) <= settings.tolerance and there[key] == has:
                        desired = has
                wanted[key] = self._steady(now, key, max(desired, 1))
            self._next = now + settings.interval
            self._busy = dict.fromkeys(self._costs, 0.0)
            self._there = dict.fromkeys(self._costs, 0.0)
            placement = self._assign(placement, wanted, _devices(view))
        return Plan(
            placement=placement,
            serving=view.serving,
            states={},
            needed={},
            planned_rates=measured.rates,
            moves=[],
            again_at=self._next,
        )

    def _steady(self, now: float, key: str, desired: int) -> int:
        """The most that was desired within the patience."""
        asked = self._asked[key]
        asked.append((now, desired))
        while asked[0][0] < now - self._settings.patience:
            asked.popleft()
        return max(count for _, count in asked)

    def _assign(
        self, placement: dict[DeviceId, Placed], wanted: dict[str, int], devices: Sequence[DeviceId]
    ) -> dict[DeviceId, Placed]:
        """Who has too many gives back its last ones, who has too few gets those at rest."""
        if sum(wanted.values()) > len(devices):
            wanted = split_gpus(wanted, len(devices))
        holds = {device: next(iter(placement[device].models)) for device in devices if device in placement}
        for key, count in wanted.items():
            for device in [device for device, held in holds.items() if held == key][count:]:
                del holds[device]
        resting = [device for device in devices if device not in holds]
        for key, count in wanted.items():
            for _ in range(count - sum(held == key for held in holds.values())):
                holds[resting.pop(0)] = key
        return {device: Placed(self._shard, frozenset({key})) for device, key in holds.items()}


def _devices(view: ClusterView) -> list[DeviceId]:
    return [
        (name, number)
        for name, node in view.nodes.items()
        if node.missing == 0.0
        for number in range(len(node.devices))
    ]
