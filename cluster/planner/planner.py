"""The planner: from what is known of a cluster, and the rates, to what each device is to hold for which shard.

An engine: without I/O, the time comes in with each call. It remembers rates and since when something has been so,
nothing that it has decided: what was decided comes back in the view, so that another planner can go on from there.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.planner.assign import Assignment
from cluster.planner.costs import Costs, StageCost
from cluster.planner.demand import Demand, StageDemand
from cluster.planner.fleet import Slot, Unit, UnitId
from cluster.planner.keys import natural, parse_key
from cluster.planner.lifecycle import Lifecycle
from cluster.planner.rollout import Rollout, serve
from cluster.planner.settings import Settings
from cluster.planner.sharding import choose, shards_wanted
from cluster.planner.view import ClusterView, DeviceId, Move, Placed, Plan, Served
from pipelines.spec import PipelineSpec

PERIOD = 1.0
"""Seconds after which the planner wants to be asked again while something is under way."""


class Planner:
    """See the module's text."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._demand = Demand(settings)
        self._costs = Costs(settings.load_seconds)
        self._lifecycle = Lifecycle(settings)
        self._last_served: dict[tuple[str, str], float] = {}
        """When a version ('pipeline@version') was last served by a shard."""

    def observe(self, now: float, rates: Mapping[str, float]) -> None:
        """Take the elements per second that arrived over the last second, by model key; to be called once a second."""
        self._demand.observe(rates)

    def plan(self, now: float, view: ClusterView) -> Plan:
        """What is to be, given what is."""
        specs = [*view.pipelines.values(), *(served.spec for served in view.serving.values())]
        self._costs.keep(specs)
        types = frozenset(device.type for node in view.nodes.values() for device in node.devices)
        known: dict[str, tuple[PipelineSpec, float]] = {}
        for name, spec in view.pipelines.items():
            table = self._costs.of(spec, types, view.profiles)
            known[name] = (spec, max((cost.load for cost in table.values()), default=0.0))
        self._demand.know(known)
        self._note_served(now, view)
        return _Pass(self._settings, now, view, self._demand, self._costs, self._lifecycle, self._last_served).plan()

    def _note_served(self, now: float, view: ClusterView) -> None:
        served = {
            (f"{name}@{self._costs.version(served.spec)}", shard)
            for name, served in view.serving.items()
            for shard, weight in served.shards.items()
            if weight > 0.0
        }
        placed = {(key.rpartition("/")[0], what.shard) for what in view.placement.values() for key in what.models}
        for pair in placed:
            self._last_served.setdefault(pair, now)
        for pair in served:
            self._last_served[pair] = now
        self._last_served = {pair: at for pair, at in self._last_served.items() if pair in served or pair in placed}


class _Pass:
    """The making of one plan."""

    def __init__(
        self,
        settings: Settings,
        now: float,
        view: ClusterView,
        demand: Demand,
        costs: Costs,
        lifecycle: Lifecycle,
        last_served: Mapping[tuple[str, str], float],
    ) -> None:
        self._settings = settings
        self._now = now
        self._view = view
        self._demand = demand
        self._costs = costs
        self._lifecycle = lifecycle
        self._last_served = last_served
        self._states = lifecycle.before(view)
        self._nodes = sorted(view.nodes, key=natural)
        self._types = frozenset(device.type for node in view.nodes.values() for device in node.devices)
        self._rollouts = {
            name: Rollout(name, spec, view.serving.get(name), costs) for name, spec in view.pipelines.items()
        }
        self._demands: dict[str, dict[str, StageDemand]] = {
            name: demand.of(name, self._rollouts[name].stages()) for name in view.pipelines
        }
        self._stage_costs: dict[tuple[str, str], dict[str, StageCost]] = {}
        for name, rollout in self._rollouts.items():
            for stage in rollout.stages():
                table = costs.of(rollout.spec_of(stage), self._types, view.profiles)
                self._stage_costs[name, stage] = {kind: table[stage, kind] for kind in self._types}
        self._problems: dict[str, str] = {}

    def plan(self) -> Plan:
        shards = {name: self._shards_of(name) for name in self._rollouts} if self._types else {}
        units, slots, short = self._assign(shards)
        if short:
            lacking = sum(unit.deficit / max(cost.rate for cost in unit.costs.values()) for unit in short)
            if self._lifecycle.wake(self._view, self._states, lacking):
                units, slots, short = self._assign(shards)
        if short:
            units, slots, short = self._assign(shards, scarce=True)
        if short:
            units, slots, short = self._assign(shards, scarce=True, level=self._level(units, slots))
            self._squeeze(short, slots)
        return self._result(units, slots, shards)

    # ---- what is needed --------------------------------------------------------------------

    def _shards_of(self, name: str) -> dict[str, float]:
        """The shards that are to serve a pipeline, with the part of the work that is planned for each."""
        if not self._view.shards:
            return {}
        served = self._view.serving.get(name)
        present = served.shards if served is not None else {}
        visits = sum(demand.now for demand in self._demands[name].values())
        devices: dict[str, int] = {}
        for placed in self._view.placement.values():
            for key in placed.models:
                parsed = parse_key(key)
                if parsed.pipeline == name:
                    devices[parsed.stage] = devices.get(parsed.stage, 0) + 1
        fewest = min((devices.get(stage, 0) for stage in self._rollouts[name].base.stages), default=0)
        count = shards_wanted(
            visits, fewest, self._settings.shard_rate, self._settings.replicas, len(self._view.shards)
        )
        count = max(count, min(len([shard for shard in present if shard in self._view.shards]), max(fewest, 1)))
        chosen = choose(count, present, {}, self._view.shards)
        return dict.fromkeys(chosen, 1.0 / len(chosen))

    def _retain(self, shards: Mapping[str, Mapping[str, float]]) -> tuple[dict[UnitId, Unit], list[Slot]]:
        """Fresh units and devices, with what is placed at present."""
        units: dict[UnitId, Unit] = {}
        for name, parts in shards.items():
            for stage in self._rollouts[name].stages():
                known = self._demands[name].get(stage)
                for shard, part in parts.items():
                    at = UnitId(name, stage, shard)
                    need = known.now * part if known is not None else 0.0
                    kept = known.kept * part if known is not None and known.kept is not None else None
                    units[at] = Unit(at, need, kept, self._stage_costs[name, stage])
        slots: list[Slot] = []
        for node in self._nodes:
            state = self._states[node][0]
            view = self._view.nodes[node]
            if state in ("lost", "standby"):
                continue
            for number, device in enumerate(view.devices):
                slot = Slot((node, number), len(slots), device.type, device.memory_mb, False)
                slot.usable = state == "active" and view.missing == 0.0
                slots.append(slot)
                placed = self._view.placement.get(slot.id)
                if placed is not None and placed.shard in self._view.shards:
                    self._retain_on(slot, placed, units)
        return units, slots

    def _retain_on(self, slot: Slot, placed: Placed, units: Mapping[UnitId, Unit]) -> None:
        slot.shard = placed.shard
        device = self._view.nodes[slot.id[0]].devices[slot.id[1]]
        stays = self._states[slot.id[0]][0] == "active"
        for key in sorted(placed.models):
            parsed = parse_key(key)
            version = f"{parsed.pipeline}@{parsed.version}"
            at = UnitId(parsed.pipeline, parsed.stage, placed.shard)
            rollout = self._rollouts.get(parsed.pipeline)
            if rollout is not None and at in units and key in rollout.keys(parsed.stage):
                unit = units[at]
                first = rollout.keys(parsed.stage)[0]
                if first in device.failed:
                    slot.failed.add(at)
                    continue
                if first in device.ready:
                    slot.ready.add(at)
                if at in slot.units or at in slot.leaving:
                    continue
                if stays:
                    slot.units[at] = 0.0
                    unit.holders.append(slot)
                else:
                    slot.leaving.add(at)
                    unit.leaving.append(slot)
            elif self._in_use(version, parsed.pipeline, placed.shard):
                slot.held[key] = 0.0
        if slot.empty():
            slot.shard = ""

    def _in_use(self, version: str, pipeline: str, shard: str) -> bool:
        """Whether models that are not needed any more still have requests to finish at a shard."""
        if self._now < self._last_served.get((version, shard), -1e18) + self._settings.settle:
            return True
        served = self._view.serving.get(pipeline)
        if served is not None and version == f"{pipeline}@{self._costs.version(served.spec)}":
            return False  # what is in flight is at the shards that serve it
        return self._view.in_flight.get(version, 0) > 0

    # ---- covering it -----------------------------------------------------------------------

    def _assign(
        self, shards: Mapping[str, Mapping[str, float]], scarce: bool = False, level: float | None = None
    ) -> tuple[dict[UnitId, Unit], list[Slot], list[Unit]]:
        units, slots = self._retain(shards)
        if level is not None:
            for unit in units.values():
                unit.need *= self._cut(unit.id.pipeline, level)
        short = Assignment(units, slots, self._settings.headroom, self._settings.hysteresis, scarce).run()
        return units, slots, short

    def _goodput(self, name: str) -> float:
        """Requests per second that are planned for."""
        return self._demand.requests(name)

    def _cut(self, name: str, level: float) -> float:
        goodput = self._goodput(name)
        return min(1.0, level / goodput) if goodput > 0.0 else 1.0

    def _level(self, units: Mapping[UnitId, Unit], slots: list[Slot]) -> float:
        """The goodput, the same for all pipelines that want more, at which the devices suffice."""
        available = sum(slot.usable for slot in slots)
        low, high = 0.0, max((self._goodput(name) for name in self._rollouts), default=0.0)
        for _ in range(40):
            middle = (low + high) / 2
            whole, rest = 0, 0.0
            for unit in units.values():
                rates = [cost.rate for cost in unit.costs.values()]
                devices = unit.wanted * self._cut(unit.id.pipeline, middle) * len(rates) / sum(rates)
                devices /= 1.0 - self._settings.headroom
                whole += int(devices)
                rest += devices - int(devices)
            if whole + rest / 0.8 <= available:
                low = middle
            else:
                high = middle
        return low

    def _squeeze(self, short: list[Unit], slots: list[Slot]) -> None:
        """Give those who have no device at all a place beside others, whatever that does to them."""
        for unit in short:
            if unit.holders:
                continue
            fitting = [slot for slot in slots if slot.usable and slot.shard in ("", unit.id.shard) and unit.fits(slot)]
            if fitting:
                slot = min(fitting, key=lambda slot: (len(slot.units), slot.order))
                slot.shard = unit.id.shard
                slot.units[unit.id] = 0.0
                unit.holders.append(slot)
            else:
                self._problems[self._rollouts[unit.id.pipeline].keys(unit.id.stage)[0]] = "no device can hold it"

    # ---- the answer ------------------------------------------------------------------------

    def _result(self, units: dict[UnitId, Unit], slots: list[Slot], shards: Mapping[str, Mapping[str, float]]) -> Plan:
        placement: dict[DeviceId, Placed] = {}
        for slot in slots:
            models = set(slot.held)
            for at in {*slot.units, *slot.leaving}:
                models.update(self._rollouts[at.pipeline].keys(at.stage))
            if models:
                placement[slot.id] = Placed(slot.shard, frozenset(models))
        serving: dict[str, Served] = {}
        for name, rollout in self._rollouts.items():
            answer, why = serve(rollout, shards.get(name, {}), units, self._view) if shards else (rollout.served, "")
            if answer is not None:
                serving[name] = answer
            if why and "cannot" in why:
                self._problems[name] = why
        moves = self._moves(placement, slots)
        busy = {node for node, _ in placement} | {
            node for (node, _), placed in self._view.placement.items() if placed.models
        }
        self._lifecycle.after(self._now, self._view, self._states, busy)
        needed: dict[str, float] = {}
        planned: dict[str, float] = {}
        for unit in units.values():
            key = self._rollouts[unit.id.pipeline].keys(unit.id.stage)[-1]
            needed[key] = needed.get(key, 0.0) + unit.need / max(cost.rate for cost in unit.costs.values())
            planned[key] = planned.get(key, 0.0) + unit.need
        return Plan(
            placement=placement,
            serving=serving,
            states=self._states,
            needed=needed,
            planned_rates=planned,
            moves=moves,
            again_at=self._now + PERIOD,
            problems=self._problems,
        )

    def _moves(self, placement: Mapping[DeviceId, Placed], slots: list[Slot]) -> list[Move]:
        whys = {slot.id: slot.why for slot in slots}
        kinds = {slot.id: slot.kind for slot in slots}
        moves: list[Move] = []
        for device in dict.fromkeys([*self._view.placement, *placement]):
            before = self._view.placement.get(device, Placed())
            after = placement.get(device, Placed())
            if before == after:
                continue
            gains, loses = after.models - before.models, before.models - after.models
            cost = 0.0
            for key in gains:
                parsed = parse_key(key)
                cost += self._stage_costs[parsed.pipeline, parsed.stage][kinds[device]].load
            state, why = self._states.get(device[0], ("lost", "unknown"))
            why = why if state != "active" else whys.get(device, "")
            moves.append(Move(device, gains, loses, cost, why or "less load"))
        return moves
