"""The planner: from what is known of a cluster, and the rates, to what each device is to hold for which shard.

An engine: without I/O, the time comes in with each call. It remembers rates and since when something has been so,
nothing that it has decided: what was decided comes back in the view, so that another planner can go on from there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

from cluster.planner.answer import Answer
from cluster.planner.assign import Assignment
from cluster.planner.compaction import SPARE, Compaction
from cluster.planner.costs import Costs
from cluster.planner.demand import Demand, StageDemand
from cluster.planner.fleet import Slot, Unit, UnitId
from cluster.planner.lifecycle import Lifecycle
from cluster.planner.memory import Memory
from cluster.planner.prices import Prices
from cluster.planner.retain import Retainer
from cluster.planner.rollout import Rollout, convert
from cluster.planner.scarcity import floor_level, water_level
from cluster.planner.settings import Settings
from cluster.planner.sharding import Wish, choose, divide
from cluster.planner.view import ClusterView, DeviceId, Plan

CUTS = 8
"""How often what is planned for is lowered further, by :data:`CUT`, until it fits."""
CUT = 0.94


class Planner:
    """See the module's text."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._demand = Demand(settings)
        self._costs = Costs(settings.load_seconds)
        self._lifecycle = Lifecycle(settings)
        self._memory = Memory(settings)
        self._compaction = Compaction()

    def observe(self, now: float, rates: Mapping[str, float]) -> None:
        """Take the elements per second that arrived over the last second, by model key; to be called once a second.
        What is not named was not measured (which is not the same as 0)."""
        self._demand.observe(rates)

    def plan(self, now: float, view: ClusterView) -> Plan:
        """What is to be, given what is."""
        self._costs.keep([*view.pipelines.values(), *(served.spec for served in view.serving.values())])
        states = self._lifecycle.before(view)
        types = {
            device.type for name, node in view.nodes.items() if states[name][0] != "lost" for device in node.devices
        }
        prices = Prices(view, types, self._costs, self._memory.memories)
        self._demand.know({name: (spec, prices.load(spec)) for name, spec in view.pipelines.items()})
        self._memory.note(now, view, self._costs)
        answer = Answer(now, view, prices, states, self._memory.blocked(now))
        if prices.types and view.shards:
            self._plan(now, view, prices, answer)
        else:
            answer.keep()
        busy = {node for node, _ in answer.placement} | {
            node for (node, _), what in view.placement.items() if what.models
        }
        self._lifecycle.after(now, view, states, busy)
        return answer.plan()

    def _plan(self, now: float, view: ClusterView, prices: Prices, answer: Answer) -> None:
        rollouts = {
            name: Rollout(name, spec, view.serving.get(name), self._costs) for name, spec in view.pipelines.items()
        }
        for rollout in rollouts.values():
            rollout.apart = _apart(rollout, view, prices)
        demands = {name: self._demand.of(name, rollout.stages()) for name, rollout in rollouts.items()}
        requests = {name: self._demand.requests(name) for name in rollouts}
        work = {name: self._work(rollout, demands[name], requests[name], prices) for name, rollout in rollouts.items()}
        devices = sum(
            len(node.devices)
            for name, node in view.nodes.items()
            if answer.states[name][0] == "active" and node.missing == 0.0
        )
        floors: dict[str, float] = {}
        if not self._settings.rest and rollouts:
            floor = floor_level(requests, {name: sum(of.values()) for name, of in work.items()}, devices)
            floors = dict.fromkeys(rollouts, floor)
        parts = self._parts(now, view, rollouts, demands, requests, work, floors, devices)
        retainer = Retainer(
            view,
            answer.states,
            rollouts,
            demands,
            parts,
            prices,
            self._memory.blocked(now),
            self._memory.in_use(now, view, self._costs),
            1.0 - self._settings.headroom,
            self._settings.rest,
        )
        self._compaction.begin(view)
        units, slots, assignment, short = self._attempt(retainer, {}, floors)
        if short and self._compaction.vacating:
            self._compaction.give_up()
            units, slots, assignment, short = self._attempt(retainer, {}, floors)
        cut: dict[str, float] = {}
        if short:
            usage = 1.0 - self._settings.headroom
            self._lifecycle.wake(view, answer.states, sum(unit.deficit / unit.best for unit in short) / usage)
            total = {name: sum(of.values()) for name, of in work.items()}
            usable = sum(slot.usable for slot in slots)
            level = water_level(requests, total, usable)
            for _ in range(CUTS if level > 0.0 else 0):
                cut = {name: min(1.0, level / rate) if rate > 0.0 else 1.0 for name, rate in requests.items()}
                units, slots, assignment, short = self._attempt(retainer, cut, floors)
                if not short:
                    break
                level *= CUT
        if cut or not self._settings.rest:
            assignment.fill()
        without = assignment.squeeze(short)
        for unit in without:
            if len(parts[unit.id.pipeline]) > 1:
                self._memory.avoid(now, unit.id.pipeline, unit.id.shard)
        for unit in units.values():
            base = units.get(unit.id._replace(version=""))
            if unit.id.version and base is not None and not convert(unit, base):
                answer.stuck(rollouts[unit.id.pipeline], unit)
        for name, part in cut.items():
            if part < 1.0:
                answer.lack(name, requests[name] * part, requests[name])
        answer.take(units, slots, rollouts, parts, without, 1.0 - self._settings.headroom)
        if self._settings.rest and not cut and answer.calm(units) and all(u.kept is not None for u in units.values()):
            self._compaction.step(now, slots, assignment.busy, partial(self._trial, retainer))

    def _trial(self, retainer: Retainer, without: frozenset[DeviceId]) -> list[Slot] | None:
        units, slots = retainer.retain({}, {}, without, SPARE)
        short = Assignment(units, slots, self._settings.headroom, self._settings.hysteresis, sparing=True).run()
        return None if short else slots

    def _attempt(
        self, retainer: Retainer, cut: Mapping[str, float], floors: Mapping[str, float]
    ) -> tuple[dict[UnitId, Unit], list[Slot], Assignment, list[Unit]]:
        units, slots = retainer.retain(cut, floors, self._compaction.vacating)
        settings = self._settings
        assignment = Assignment(units, slots, settings.headroom, settings.hysteresis, settings.rest)
        short = [unit for unit in assignment.run() if not unit.id.version]
        return units, slots, assignment, short

    def _work(
        self, rollout: Rollout, demands: Mapping[str, StageDemand], requests: float, prices: Prices
    ) -> dict[str, float]:
        """By stage of the served version, the devices that it takes per request per second, on average over types."""
        usage = 1.0 - self._settings.headroom
        work: dict[str, float] = {}
        for stage in rollout.base.stages:
            rates = [cost.rate for cost in prices.of(rollout.base, stage).values() if cost.usable]
            known = demands.get(stage)
            each = known.most / requests if known is not None and requests > 0.0 else 1.0
            work[stage] = each * len(rates) / sum(rates) / usage
        return work

    def _parts(
        self,
        now: float,
        view: ClusterView,
        rollouts: Mapping[str, Rollout],
        demands: Mapping[str, Mapping[str, StageDemand]],
        requests: Mapping[str, float],
        work: Mapping[str, Mapping[str, float]],
        floors: Mapping[str, float],
        devices: int,
    ) -> dict[str, dict[str, float]]:
        """The shards of each pipeline, with the part that is planned for each."""
        placed: dict[str, dict[str, float]] = {}
        for what in view.placement.values():
            for pipeline in {key.partition("@")[0] for key in what.models}:
                of = placed.setdefault(pipeline, {})
                of[what.shard] = of.get(what.shard, 0.0) + 1.0
        allowed = _allowed(view, placed, rollouts, devices)
        load: dict[str, float] = {}
        parts: dict[str, dict[str, float]] = {}
        for name in rollouts:
            before = self._memory.parts(name)
            served = view.serving.get(name)
            shards = self._memory.shards(name, allowed)
            present = _only(before, shards) or _only(served.shards if served is not None else {}, shards)
            rate = max(_certain(requests[name], demands[name]), floors.get(name, 0.0))
            visits = sum(_certain(demand.most, demands[name]) for demand in demands[name].values())
            settled = bool(demands[name]) and all(demand.kept is not None for demand in demands[name].values())
            wish = Wish(visits, [rate * each for each in work[name].values()], settled)
            present = present or _only(placed.get(name, {}), shards)
            division = divide(wish, before, present, load, shards, self._settings)
            parts[name] = self._memory.divide(now, name, division.parts, division.urgent)
            for shard, part in parts[name].items():
                load[shard] = load.get(shard, 0.0) + max(visits, 1.0) * part
        return parts


def _only(weights: Mapping[str, float], shards: Collection[str]) -> dict[str, float]:
    return {shard: weight for shard, weight in weights.items() if weight > 0.0 and shard in shards}


def _certain(rate: float, demands: Mapping[str, StageDemand]) -> float:
    """The part of a rate that is not a guess."""
    return rate * min((demand.least / demand.now for demand in demands.values() if demand.now > 0.0), default=1.0)


def _apart(rollout: Rollout, view: ClusterView, prices: Prices) -> bool:
    """Whether the new version's models do not fit beside the old ones where those are."""
    if rollout.new is None:
        return False
    for (node, number), placed in view.placement.items():
        there = view.nodes.get(node)
        if there is None or number >= len(there.devices) or there.devices[number].memory_mb <= 0.0:
            continue
        device = there.devices[number]
        models = set(placed.models)
        for stage in rollout.stages():
            base, new = rollout.base_key(stage), rollout.new_key(stage)
            if base in models or new in models:
                models.update(key for key in (base, new) if key is not None)
        ours = any(key.startswith(f"{rollout.name}@") for key in models)
        if ours and sum(prices.memory(key, device.type) for key in models) > device.memory_mb:
            return True
    return False


def _allowed(
    view: ClusterView, placed: Mapping[str, Mapping[str, float]], rollouts: Mapping[str, Rollout], devices: int
) -> list[str]:
    """The shards that pipelines may be given to: all, unless there are so few devices that pipelines have to share
    them, for which they have to be at one shard."""
    stages = [len(rollout.base.stages) for rollout in rollouts.values()]
    if devices >= sum(stages):
        return view.shards
    held = {shard: sum(of.get(shard, 0.0) for of in placed.values()) for shard in view.shards}
    return choose(max(1, devices // max(stages)), held, {}, view.shards)
