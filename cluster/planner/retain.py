"""From the view to units and devices, with what is placed at present."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set

from cluster.planner.demand import StageDemand
from cluster.planner.fleet import Slot, Unit, UnitId
from cluster.planner.keys import natural, parse_key
from cluster.planner.prices import Prices
from cluster.planner.rollout import Rollout
from cluster.planner.view import ClusterView, DeviceId, Placed
from cluster.records import NodeState


class Retainer:
    """Makes fresh units and devices, as often as they are asked for. ``parts`` are each pipeline's shards with the part
    that is planned for each. ``blocked``: the models that could not be loaded lately, by device. ``in_use``: (version,
    shard) that were sent requests lately, or still have some. ``usage``: the part of a device that is planned for.
    ``rest``: whether devices that are not needed are given back."""

    def __init__(
        self,
        view: ClusterView,
        states: Mapping[str, tuple[NodeState, str]],
        rollouts: Mapping[str, Rollout],
        demands: Mapping[str, Mapping[str, StageDemand]],
        parts: Mapping[str, Mapping[str, float]],
        prices: Prices,
        blocked: Mapping[DeviceId, Set[str]],
        in_use: Set[tuple[str, str]],
        usage: float,
        rest: bool,
    ) -> None:
        self._view = view
        self._states = states
        self._rollouts = rollouts
        self._demands = demands
        self._parts = parts
        self._prices = prices
        self._blocked = blocked
        self._in_use = in_use
        self._usage = usage
        self._rest = rest
        self._nodes = sorted(view.nodes, key=natural)
        self._models: dict[str, tuple[tuple[str, str, str] | None, bool]] = {}

    def retain(
        self,
        cut: Mapping[str, float],
        floor: Mapping[str, float],
        vacating: Set[DeviceId],
        spare: float | None = None,
    ) -> tuple[dict[UnitId, Unit], list[Slot]]:
        """Fresh units and devices. ``cut``: the part of its demand that is planned for, by pipeline, where that is not
        all; ``floor``: requests per second that a pipeline wants in any case; ``vacating``: devices to be left;
        ``spare``: so many times of what is kept for is needed, and nothing given back (None: what is needed is)."""
        units: dict[UnitId, Unit] = {}
        apart: dict[UnitId, Unit] = {}
        for name, parts in self._parts.items():
            for stage, version in self._rollouts[name].units():
                for shard, part in parts.items():
                    unit = self._unit(UnitId(name, stage, shard, version), part, cut.get(name), floor.get(name, 0.0))
                    (apart if version else units)[unit.id] = unit
        units.update(apart)  # served first
        if spare is not None:
            for unit in units.values():
                unit.need = max(unit.need, unit.kept or 0.0) * spare
                unit.kept = None
        slots: list[Slot] = []
        for node in self._nodes:
            state, view = self._states[node][0], self._view.nodes[node]
            if state == "lost" or (state == "standby" and (view.missing > 0.0 or view.drained)):
                continue
            for number, device in enumerate(view.devices):
                vacated = (node, number) in vacating
                usable = state in ("active", "standby") and view.missing == 0.0 and not vacated
                slot = Slot((node, number), len(slots), device.type, device.memory_mb, usable, state == "standby")
                slots.append(slot)
                self._fill(slot, units, state == "draining" or vacated)
        for unit in units.values():
            self._trust(unit, cut)
        for unit in apart.values():
            base = units.get(unit.id._replace(version=""))
            if base is not None and base.holders:
                # What is to be replaced does not grow.
                base.need = min(base.need, sum(base.costs[slot.kind].rate for slot in base.holders) * self._usage)
        return units, slots

    def _unit(self, at: UnitId, part: float, cut: float | None, floor: float) -> Unit:
        rollout = self._rollouts[at.pipeline]
        known = self._demands[at.pipeline].get(at.stage)
        spec = rollout.new if rollout.new is not None and (at.version or at.stage not in rollout.base.stages) else None
        costs = self._prices.of(rollout.base if spec is None else spec, at.stage)
        memory = {
            kind: sum(self._prices.memory(key, kind) for key in rollout.keys(at.stage, at.version)) for kind in costs
        }
        wanted = known.now * part if known is not None else 0.0
        kept = known.kept * part if self._rest and known is not None and known.kept is not None else None
        unit = Unit(at, wanted, None if at.version else kept, costs, memory)
        if cut is not None:
            unit.wanted = known.most * part if known is not None else 0.0
            unit.need = unit.wanted * cut
            unit.kept = kept if kept is None else unit.need
        unit.wanted = max(unit.wanted, floor * part)
        return unit

    def _trust(self, unit: Unit, cut: Mapping[str, float]) -> None:
        """While the margin is a guess, what carries the rest was sized by somebody who knew more."""
        known = self._demands[unit.id.pipeline].get(unit.id.stage)
        if known is None or known.least >= known.now or unit.id.pipeline in cut:
            return
        carried = sum(unit.costs[slot.kind].rate for slot in unit.holders) * self._usage
        part = self._parts[unit.id.pipeline][unit.id.shard]
        if carried >= known.least * part:
            unit.need = min(unit.need, carried)

    def _fill(self, slot: Slot, units: Mapping[UnitId, Unit], draining: bool) -> None:
        """What the device has, and what it holds for whom."""
        device = self._view.nodes[slot.device[0]].devices[slot.device[1]]
        slot.warm.update(self._first_of(device.ready))
        slot.failed.update(self._first_of(self._blocked.get(slot.device, ())))
        placed = self._view.placement.get(slot.device)
        if placed is None or placed.shard not in self._view.shards:
            return
        slot.shard = placed.shard
        for key in sorted(placed.models):
            self._keep(slot, placed, key, units, draining, key in device.ready)
        if slot.empty():
            slot.shard = ""

    def _keep(
        self, slot: Slot, placed: Placed, key: str, units: Mapping[UnitId, Unit], draining: bool, ready: bool
    ) -> None:
        model, first = self._model(key)
        unit = None if model is None else units.get(UnitId(model[0], model[1], placed.shard, model[2]))
        if unit is None:
            if (key.rpartition("/")[0], placed.shard) in self._in_use:
                slot.held[key] = self._prices.memory(key, slot.kind)
            return
        if unit.model in slot.failed:
            return
        if ready and first:
            slot.ready.add(unit.id)
        if unit.id in slot.units or unit.id in slot.leaving:
            return
        if draining:
            slot.leaving.add(unit.id)
            unit.leaving.append(slot)
        else:
            slot.units[unit.id] = 0.0
            unit.holders.append(slot)

    def _first_of(self, keys: Iterable[str]) -> Iterator[tuple[str, str, str]]:
        """The units that stand or fall with these models."""
        for key in keys:
            model, first = self._model(key)
            if model is not None and first:
                yield model

    def _model(self, key: str) -> tuple[tuple[str, str, str] | None, bool]:
        """(pipeline, stage, version of the unit) that a model belongs to, and whether it is that unit's first."""
        known = self._models.get(key)
        if known is None:
            known = self._models[key] = self._find(key)
        return known

    def _find(self, key: str) -> tuple[tuple[str, str, str] | None, bool]:
        parsed = parse_key(key)
        rollout = self._rollouts.get(parsed.pipeline)
        version = None if rollout is None else rollout.unit_of(key, parsed.stage)
        if rollout is None or version is None:
            return None, False
        return (parsed.pipeline, parsed.stage, version), key == rollout.keys(parsed.stage, version)[0]
