"""The plan as it is put together: what lies where, what is served, what changes, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from cluster.planner.fleet import Slot, Unit, UnitId
from cluster.planner.prices import Prices
from cluster.planner.rollout import Readiness, Rollout, serve
from cluster.planner.view import ClusterView, DeviceId, Move, Placed, Plan, Served
from cluster.records import NodeState

PERIOD = 1.0
"""Seconds after which the planner wants to be asked again."""


class Answer:
    """One plan. ``states`` are the nodes', changed while the plan is made; ``blocked``: the models that are not to be
    tried on a device."""

    def __init__(
        self,
        now: float,
        view: ClusterView,
        prices: Prices,
        states: dict[str, tuple[NodeState, str]],
        blocked: Mapping[DeviceId, Set[str]],
    ) -> None:
        self._now = now
        self._view = view
        self._prices = prices
        self._blocked = blocked
        self.states = states
        self.placement: dict[DeviceId, Placed] = {}
        self._serving: dict[str, Served] = {}
        self._needed: dict[str, float] = {}
        self._planned: dict[str, float] = {}
        self._problems: dict[str, str] = {}
        self._whys: dict[DeviceId, str] = {}
        self._kinds: dict[DeviceId, str] = {}

    # ---- what is wrong ---------------------------------------------------------------------

    def lack(self, pipeline: str, planned: float, wanted: float) -> None:
        """Devices lack for what a pipeline wants."""
        digits = 0 if wanted >= 10.0 else 3
        self._problems[pipeline] = f"devices lack: they carry {planned:.{digits}f} of {wanted:.{digits}f} requests/s"

    def stuck(self, rollout: Rollout, unit: Unit) -> None:
        """The new version's models fit neither beside the old ones nor on devices of their own."""
        key = rollout.keys(unit.id.stage, unit.id.version)[0]
        megabytes = max(unit.memory.values())
        self._problems[rollout.name] = (
            f"{key} ({megabytes:.0f} MB) does not fit beside the version that is served, and no other device is free"
        )

    def _unplaced(self, rollout: Rollout, unit: Unit, slots: Iterable[Slot]) -> None:
        key = rollout.keys(unit.id.stage, unit.id.version)[0]
        there = [slot for slot in slots if slot.usable]
        failed = sum(unit.model in slot.failed for slot in there)
        if not there:
            why = "there is no device"
        elif failed == len(there):
            why = f"it could not be loaded on any of {failed} devices"
        elif not any(unit.fits(slot) for slot in there):
            largest = max(slot.memory for slot in there)
            why = f"it takes {min(unit.memory.values()):.0f} MB, and the largest device has {largest:.0f}"
            if not any(unit.costs[slot.kind].usable for slot in there):
                why = "it is too slow for its objective on every device"
            elif failed:
                why += f"; it could not be loaded on {failed} devices"
        else:
            why = "all devices are taken"
        self._problems[key] = why

    # ---- what is to be ---------------------------------------------------------------------

    def keep(self) -> None:
        """Leave everything as it is: no shard is there, or no device. Whoever comes back finds its models loaded."""
        self.placement = {
            device: placed
            for device, placed in self._view.placement.items()
            if placed.models and self.states.get(device[0], ("lost", ""))[0] != "lost"
        }
        self._serving = {name: served for name, served in self._view.serving.items() if name in self._view.pipelines}

    def take(
        self,
        units: Mapping[UnitId, Unit],
        slots: list[Slot],
        rollouts: Mapping[str, Rollout],
        parts: Mapping[str, Mapping[str, float]],
        without: Iterable[Unit],
        usage: float,
    ) -> None:
        """What was assigned. ``without``: units for which there is no device; ``usage``: the part of a device that is
        planned for."""
        for slot in slots:
            self._place(slot, units, rollouts)
        for unit in without:
            self._unplaced(rollouts[unit.id.pipeline], unit, slots)
        readiness = Readiness(self._view, self._blocked)
        for name, rollout in rollouts.items():
            served, why = serve(rollout, list(parts[name]), units, self._view, readiness)
            if served is not None:
                self._serving[name] = served
            if why:
                self._problems[name] = why
        for unit in units.values():
            key = rollouts[unit.id.pipeline].keys(unit.id.stage, unit.id.version)[0]
            self._needed[key] = self._needed.get(key, 0.0) + unit.need / unit.best / usage
            self._planned[key] = self._planned.get(key, 0.0) + unit.need

    def _place(self, slot: Slot, units: Mapping[UnitId, Unit], rollouts: Mapping[str, Rollout]) -> None:
        self._kinds[slot.device] = slot.kind
        if slot.empty():
            self._whys[slot.device] = slot.why
            return
        models = dict(slot.held)
        later: list[str] = []
        for at in sorted({*slot.units, *slot.leaving}):
            first, *more = rollouts[at.pipeline].keys(at.stage, at.version)
            models[first] = self._prices.memory(first, slot.kind)
            later += more if at in slot.units else ()
        for key in later:  # a new version's, beside the old one's
            memory = self._prices.memory(key, slot.kind)
            if key in self._blocked.get(slot.device, ()):
                continue
            if slot.memory <= 0.0 or sum(models.values()) + memory <= slot.memory:
                models[key] = memory
        self._whys[slot.device] = slot.why
        if models:
            self.placement[slot.device] = Placed(slot.shard, frozenset(models))
            if slot.resting:
                self.states[slot.device[0]] = ("active", "")

    def calm(self, units: Mapping[UnitId, Unit]) -> bool:
        """Whether nothing changes, and everything that is placed is ready."""
        return self.placement == self._view.placement and all(
            unit.id in slot.ready for unit in units.values() for slot in unit.holders
        )

    def plan(self) -> Plan:
        """The plan."""
        return Plan(
            placement=self.placement,
            serving=self._serving,
            states=self.states,
            needed=self._needed,
            planned_rates=self._planned,
            moves=self._moves(),
            again_at=self._now + PERIOD,
            problems=self._problems,
        )

    def _moves(self) -> list[Move]:
        moves: list[Move] = []
        for device in dict.fromkeys([*self._view.placement, *self.placement]):
            before = self._view.placement.get(device, Placed())
            after = self.placement.get(device, Placed())
            if before == after:
                continue
            gains, loses = after.models - before.models, before.models - after.models
            kind = self._kinds.get(device, "")
            cost = sum(self._prices.loading(key, kind) for key in gains)
            state, why = self.states.get(device[0], ("lost", "gone"))
            moves.append(Move(device, gains, loses, cost, why if state != "active" else self._why(device, gains)))
        return moves

    def _why(self, device: DeviceId, gains: Set[str]) -> str:
        why = self._whys.get(device, "")
        if why:
            return why
        return "another version is to be served" if gains else "no longer in use"
