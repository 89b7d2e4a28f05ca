"""The control plane of a simulated cluster: each second it measures, asks a scaler, and has the GPUs follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from cluster.coordinator.presence import BARELY, Presence
from cluster.planner.settings import Settings
from cluster.planner.view import ClusterView, DeviceId, DeviceView, NodeView, Placed, Plan, Served
from cluster.records import NodeState
from pipelines.capacity import planned_costs
from pipelines.spec import PipelineSpec
from simulation.gpu import Gpu
from simulation.machine import Machine
from simulation.record import Record
from simulation.scalers import Measured, PlannerScaler, Reactive, ReactiveScaler, Scaler

SHARD = "shard-0"
DEVICE_TYPE = "emulated"


class Autoscale(msgspec.Struct, frozen=True, kw_only=True):
    """How a run's GPUs are scaled: by the planner with these settings, or by the reference scaler."""

    scaler: Settings | Reactive = Settings()
    load_seconds: float = 1.5
    """What loading a model takes where its profile does not say; in place of the planner's setting of that name."""
    boot: float = 0.0
    """Seconds until a host that was put to rest is there again; 0: hosts are not powered down."""

    @property
    def name(self) -> str:
        return "reactive" if isinstance(self.scaler, Reactive) else "planner"


class Autoscaler:
    """See the module's text. ``moves`` counts changes of what a GPU is to hold, after the first placement;
    ``allocated`` has the GPU-seconds that were taken, second by second."""

    def __init__(self, wish: Autoscale, specs: Sequence[PipelineSpec], machine: Machine, record: Record) -> None:
        self._specs = specs
        self._keys = [{name: spec.model_key(name) for name in spec.stages} for spec in specs]
        self._machine = machine
        self._record = record
        self._boot = wish.boot
        self._loads = _load_times(specs, wish.load_seconds)
        self._scaler = _scaler(wish, specs)
        self._hosts: dict[str, list[Gpu]] = {}
        for gpu in machine.gpus:
            self._hosts.setdefault(gpu.agent, []).append(gpu)
        self._presence = Presence(0.0, 0.0)
        self._states: dict[str, NodeState] = dict.fromkeys(self._hosts, "active")
        self._placement: dict[DeviceId, Placed] = {}
        self._serving: dict[str, Served] = {}
        self._before = 0.0
        self.name = wish.name
        self.moves = 0
        self.allocated: list[float] = []

    def begin(self, rates: Sequence[float]) -> None:
        """Place for these requests per second of each pipeline, as if that had been measured all the time: what is
        placed is loaded already."""
        each = {key: rate for keys, rate in zip(self._keys, rates, strict=True) for key in keys.values()}
        plan = self._scaler.decide(0.0, Measured(each, {}), self._view(0.0, {}))
        for device, placed in plan.placement.items():
            self._machine.place(0.0, *device, sorted(placed.models), {})
        self._adopt(plan)
        self._machine.scheduler.take_report(0.0)

    def step(self, now: float, end: float) -> None:
        """Another second has passed; the run's arrivals end at ``end``."""
        taken = sum([gpu.allocated(min(now, end)) for gpu in self._machine.gpus])
        self.allocated.append(taken - self._before)
        self._before = taken
        report = self._machine.scheduler.take_report(now)
        rates = {stage.model: stage.arrived / report.period for stage in report.stages if report.period > 0.0}
        measured = Measured(rates, self._busy(int(now) - 1))
        plan = self._scaler.decide(now, measured, self._view(now, report.in_flight))
        for node, (state, _) in plan.states.items():
            self._power(now, node, state)
        for gpu in self._machine.gpus:
            device = (gpu.agent, gpu.number)
            placed = plan.placement.get(device, Placed())
            if placed.models != self._placement.get(device, Placed()).models:
                self._machine.place(now, *device, sorted(placed.models), self._loads)
                self.moves += 1
        self._adopt(plan)

    def _adopt(self, plan: Plan) -> None:
        self._placement = plan.placement
        self._serving = plan.serving

    def _power(self, now: float, node: str, state: NodeState) -> None:
        before, self._states[node] = self._states[node], state
        if self._boot > 0.0 and state != before:
            if state == "standby":
                self._machine.power_down(now, node)
            elif before == "standby":
                self._presence.expect(node, now + self._boot + 1.0)
                self._machine.power_up(now, node, self._boot)

    def _busy(self, second: int) -> dict[str, float]:
        return {
            keys[name]: stage.busy[second]
            for keys, pipeline in zip(self._keys, self._record.pipelines, strict=True)
            for name, stage in pipeline.stages.items()
        }

    def _view(self, now: float, in_flight: Mapping[str, int]) -> ClusterView:
        self._presence.update(now, self._hosts, [name for name, gpus in self._hosts.items() if gpus[0].up])
        return ClusterView(
            nodes={name: self._node(now, name, gpus) for name, gpus in self._hosts.items()},
            shards=[SHARD],
            pipelines={spec.name: spec for spec in self._specs},
            serving=self._serving,
            placement=self._placement,
            in_flight={(version, SHARD): count for version, count in in_flight.items()},
        )

    def _node(self, now: float, name: str, gpus: Sequence[Gpu]) -> NodeView:
        missing = self._presence.missing(now, name)
        state = self._states[name]
        devices = [DeviceView(DEVICE_TYPE, ready=frozenset(gpu.ready())) for gpu in gpus]
        return NodeView(state, devices, min(missing, BARELY) if state == "standby" else missing)


def _scaler(wish: Autoscale, specs: Sequence[PipelineSpec]) -> Scaler:
    if isinstance(wish.scaler, Settings):
        return PlannerScaler(msgspec.structs.replace(wish.scaler, load_seconds=wish.load_seconds))
    costs = {spec.model_key(name): cost for spec in specs for name, cost in planned_costs(spec).items()}
    return ReactiveScaler(wish.scaler, costs, SHARD)


def _load_times(specs: Sequence[PipelineSpec], otherwise: float) -> dict[str, float]:
    """Seconds by model key."""
    times = {}
    for spec in specs:
        for name, stage in spec.stages.items():
            said = stage.profile.on(DEVICE_TYPE).load_ms if stage.profile is not None else None
            times[spec.model_key(name)] = otherwise if said is None else said / 1e3
    return times
