"""The planner in a cluster of its own: devices load what a plan says, nodes and shards come and go."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planner.planner import Planner
from cluster.planner.settings import Settings
from cluster.planner.view import ClusterView, DeviceId, DeviceView, NodeView, Placed, Plan, Served
from pipelines.spec import PipelineSpec, Profile, StageSpec

LOAD = 2
"""Seconds that a device takes to load a model."""


def pipeline(name: str, *alphas: float, slo: float = 0.4, memory: float | None = None, note: str = "") -> PipelineSpec:
    """A chain of stages s0, s1, ... of ``alpha`` ms an element and 4 ms a batch."""
    stages = {}
    for number, alpha in enumerate(alphas):
        profile = Profile(alpha_ms=alpha, beta_ms=4, load_ms=LOAD * 1e3, memory_mb=memory)
        inputs = [f"s{number - 1}"] if number else ["request"]
        stages[f"s{number}"] = StageSpec(executor="emulated", profile=profile, inputs=inputs)
    return PipelineSpec(name=name, slo=slo, stages=stages, output=f"s{len(alphas) - 1}", description=note)


class Keys:
    """Model keys, reckoned once for each spec."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[PipelineSpec, dict[str, str]]] = {}

    def of(self, spec: PipelineSpec) -> dict[str, str]:
        """By stage."""
        if id(spec) not in self._known:
            self._known[id(spec)] = (spec, {stage: spec.model_key(stage) for stage in spec.stages})
        return self._known[id(spec)][1]


class Node:
    """A host: whether it is there, and its devices' type and memory."""

    def __init__(self, devices: int, memory: float, kind: str) -> None:
        self.devices = [(kind, memory)] * devices
        self.state = "active"
        self.up = True
        self.gone_at = 0.0
        self.drained = False
        self.expected = False
        """It is at rest, or on its way."""


class Cluster:
    """What a coordinator sees and does, in virtual time; every plan is checked."""

    def __init__(
        self,
        *,
        nodes: int = 2,
        devices: int = 4,
        shards: Iterable[str] = ("s",),
        memory: float = 0.0,
        kinds: Iterable[str] = ("gpu",),
        setup: Settings | None = None,
    ) -> None:
        kinds = list(kinds)
        self.settings = setup or Settings()
        self.planner = Planner(self.settings)
        self.now = 1000.0
        self.nodes = {f"n{n}": Node(devices, memory, kinds[n % len(kinds)]) for n in range(nodes)}
        self.shards = list(shards)
        self.pipelines: dict[str, PipelineSpec] = {}
        self.rates: dict[str, float] = {}
        self.serving: dict[str, Served] = {}
        self.placement: dict[DeviceId, Placed] = {}
        self.loaded: dict[DeviceId, dict[str, float]] = {}
        """When each model is ready."""
        self.failing: set[str] = set()
        self.in_flight: dict[str, int] = {}
        self.moves: list[int] = []
        self.keys = Keys()
        self.plan = self.step()

    def apply(self, *specs: PipelineSpec) -> None:
        self.pipelines.update({spec.name: spec for spec in specs})

    def lose(self, node: str) -> None:
        self.nodes[node].up = False
        self.nodes[node].gone_at = self.now
        for device in [device for device in self.loaded if device[0] == node]:
            del self.loaded[device]

    def find(self, node: str) -> None:
        self.nodes[node].up = True

    def ready(self, device: DeviceId) -> frozenset[str]:
        there = self.loaded.get(device, {})
        return frozenset(key for key, at in there.items() if at <= self.now and key not in self.failing)

    def view(self) -> ClusterView:
        nodes = {}
        for name, node in self.nodes.items():
            devices = [
                DeviceView(
                    kind,
                    memory,
                    self.ready((name, number)) if node.up else frozenset(),
                    frozenset(
                        key
                        for key, at in self.loaded.get((name, number), {}).items()
                        if key in self.failing and at <= self.now
                    ),
                )
                for number, (kind, memory) in enumerate(node.devices)
            ]
            missing = 0.0 if node.up else 1e-9 if node.expected else max(self.now - node.gone_at, 1e-9)
            nodes[name] = NodeView(node.state, devices, missing, node.drained)
        return ClusterView(
            nodes=nodes,
            shards=list(self.shards),
            pipelines=dict(self.pipelines),
            serving=self.serving,
            placement=self.placement,
            in_flight={(version, shard): n for version, n in self.in_flight.items() for shard in self.shards},
        )

    def served_whole(self) -> set[tuple[str, str, str]]:
        """(pipeline, stage, shard) of what is served and has a device that is ready."""
        found = set()
        for name, served in self.serving.items():
            for stage in served.spec.stages:
                for shard, weight in served.shards.items():
                    key = self.keys.of(served.spec)[stage]
                    for device, placed in self.placement.items():
                        if weight > 0 and placed.shard == shard and key in placed.models and key in self.ready(device):
                            found.add((name, stage, shard))
        return found

    def step(self) -> Plan:
        """Measure, plan, and carry it out; a second passes."""
        self.now += 1.0
        measured = {
            self.keys.of(served.spec)[stage]: self.rates[name]
            for name, served in self.serving.items()
            if name in self.rates
            for stage in served.spec.stages
        }
        if measured:
            self.planner.observe(self.now, measured)
        before = {(name, stage, shard) for name, stage, shard in self.served_whole() if shard in self.shards}
        plan = self.planner.plan(self.now, self.view())
        self.plan = plan
        self.check(plan)
        self.moves.append(len(plan.moves))
        self.placement, self.serving = plan.placement, plan.serving
        for name, (state, _) in plan.states.items():
            self.nodes[name].state = state
        for name, node in self.nodes.items():
            for number in range(len(node.devices)):
                there = self.loaded.get((name, number), {})
                models = plan.placement.get((name, number), Placed()).models if node.up else frozenset[str]()
                self.loaded[name, number] = {key: there.get(key, self.now + LOAD) for key in models}
        kept = {what for what in before if what[0] in self.serving and what[2] in self.serving[what[0]].shards}
        same = {name for name, served in self.serving.items() if served.spec == self.pipelines.get(name)}
        assert {what for what in kept if what[0] in same} <= self.served_whole(), (
            "a stage that served has no device any more"
        )
        return plan

    def run(self, seconds: int) -> Plan:
        for _ in range(seconds):
            self.step()
        return self.plan

    def check(self, plan: Plan) -> None:
        specs = [*self.pipelines.values(), *(served.spec for served in self.serving.values())]
        memory = {
            self.keys.of(spec)[s]: stage.profile.memory_mb or 0.0 for spec in specs for s, stage in spec.stages.items()
        }
        for (name, number), placed in plan.placement.items():
            assert plan.states[name][0] in ("active", "draining")
            assert placed.shard in self.shards
            assert placed.models
            room = self.nodes[name].devices[number][1]
            if room:
                assert max(memory.get(key, 0.0) for key in placed.models) <= room
        for served in plan.serving.values():
            assert set(served.shards) <= set(self.shards)
            if served.shards:
                assert sum(served.shards.values()) == pytest.approx(1.0, abs=0.01)
        assert plan.again_at > self.now
        for move in plan.moves:
            assert move.why
            assert move.cost >= 0.0

    def devices(self, spec: PipelineSpec, stage: str = "s0", shard: str | None = None) -> list[DeviceId]:
        """The devices that hold a stage."""
        return sorted(
            device
            for device, placed in self.placement.items()
            if self.keys.of(spec)[stage] in placed.models and shard in (None, placed.shard)
        )

    def missing(self) -> set[str]:
        """Stages of wanted pipelines that no device holds."""
        held = {key for placed in self.placement.values() for key in placed.models}
        return {key for spec in self.pipelines.values() for key in self.keys.of(spec).values()} - held


# ---- demand ---------------------------------------------------------------------------------


def test_a_new_pipeline_is_served_once_all_its_stages_are_ready() -> None:
    cluster = Cluster()
    spec = pipeline("p", 2.0, 1.0)
    cluster.apply(spec)
    cluster.step()
    assert not cluster.missing()
    assert cluster.serving == {}
    cluster.run(LOAD)
    assert cluster.serving == {"p": Served(spec, {"s": 1.0})}
    assert cluster.run(5).moves == []


def test_devices_follow_the_rate_up_at_once_and_down_with_patience() -> None:
    cluster = Cluster(nodes=4, setup=Settings(patience=20.0))
    spec = pipeline("p", 4.0, 1.0)
    cluster.apply(spec)
    cluster.run(5)
    cluster.rates["p"] = 100.0
    cluster.run(60)
    few = len(cluster.devices(spec))
    cluster.rates["p"] = 1000.0
    cluster.step()
    cluster.step()
    many = len(cluster.devices(spec))
    assert many >= 4 > few
    cluster.run(10)
    cluster.rates["p"] = 100.0
    cluster.run(3)
    assert len(cluster.devices(spec)) >= 4
    cluster.run(200)
    assert len(cluster.devices(spec)) == few


def test_a_steady_rate_moves_nothing() -> None:
    cluster = Cluster(nodes=4)
    cluster.apply(pipeline("p", 4.0, 1.0), pipeline("q", 1.0))
    cluster.rates = {"p": 500.0, "q": 300.0}
    cluster.run(180)
    assert sum(cluster.moves[-120:]) == 0


def test_stages_with_little_to_do_share_a_device() -> None:
    cluster = Cluster()
    spec = pipeline("p", 1.0, 1.0, 1.0)
    cluster.apply(spec)
    cluster.rates["p"] = 20.0
    cluster.run(10)
    assert len(cluster.placement) == 1


def test_a_new_planner_moves_nothing() -> None:
    cluster = Cluster(nodes=4, shards=("a", "b"))
    cluster.apply(pipeline("p", 4.0, 1.0))
    cluster.rates["p"] = 700.0
    cluster.run(100)
    cluster.planner = Planner(cluster.settings)
    cluster.moves.clear()
    cluster.run(30)
    assert sum(cluster.moves) == 0


def test_before_anything_is_measured_what_is_placed_stays() -> None:
    cluster = Cluster(nodes=4)
    cluster.apply(pipeline("p", 4.0, 1.0))
    cluster.rates["p"] = 700.0
    cluster.run(60)
    cluster.planner = Planner(cluster.settings)
    cluster.rates.clear()
    cluster.moves.clear()
    cluster.run(60)
    assert sum(cluster.moves) == 0


def test_a_map_stage_is_planned_for_its_items() -> None:
    stages = {
        "s0": StageSpec(executor="emulated", profile=Profile(alpha_ms=1, beta_ms=1)),
        "each": StageSpec(executor="emulated", profile=Profile(alpha_ms=1, beta_ms=1), inputs=["s0.items"], map=True),
    }
    spec = PipelineSpec(name="m", slo=0.4, stages=stages, output="each")
    planner = Planner(Settings())
    nodes = {"n": NodeView("active", [DeviceView("gpu") for _ in range(40)])}
    view = ClusterView(nodes=nodes, shards=["s"], pipelines={"m": spec}, serving={}, placement={})
    for second in range(20):
        planner.observe(second, {spec.model_key("s0"): 100.0, spec.model_key("each"): 1000.0})
        plan = planner.plan(second, view)
    # The requests double; the items cannot yet, for want of devices.
    planner.observe(20, {spec.model_key("s0"): 200.0, spec.model_key("each"): 1000.0})
    planner.observe(21, {spec.model_key("s0"): 200.0, spec.model_key("each"): 1000.0})
    grown = planner.plan(21, view)
    assert grown.planned_rates[spec.model_key("each")] > 1.5 * plan.planned_rates[spec.model_key("each")]


# ---- too few devices -------------------------------------------------------------------------


def test_devices_that_lack_are_shared_fairly_by_goodput() -> None:
    cluster = Cluster(nodes=2, devices=6)
    big, small = pipeline("big", 8.0), pipeline("small", 8.0)
    cluster.apply(big, small)
    cluster.rates = {"big": 5000.0, "small": 100.0}
    plan = cluster.run(100)
    assert plan.planned_rates[small.model_key("s0")] >= 100.0
    assert "devices lack" in plan.problems["big"]
    assert "small" not in plan.problems
    assert len(cluster.placement) == 12
    assert len(cluster.devices(big)) >= 9
    assert sum(cluster.moves[-60:]) == 0


def test_more_stages_than_devices() -> None:
    cluster = Cluster(nodes=1, devices=2, shards=("a", "b", "c"))
    cluster.apply(*(pipeline(f"p{n}", 3.0, 3.0) for n in range(6)))
    cluster.rates = {f"p{n}": 300.0 for n in range(6)}
    cluster.run(40)
    assert not cluster.missing()
    assert set(cluster.serving) == {f"p{n}" for n in range(6)}
    assert sum(cluster.moves[-20:]) == 0


def test_a_stage_that_fits_nowhere_is_told() -> None:
    cluster = Cluster(memory=500.0)
    spec = pipeline("p", 1.0, memory=900.0)
    cluster.apply(spec, pipeline("q", 1.0, memory=100.0))
    plan = cluster.run(5)
    assert "900 MB" in plan.problems[spec.model_key("s0")]
    assert set(cluster.serving) == {"q"}


def test_many_seldom_used_models_share_a_device_that_has_no_room_for_all() -> None:
    cluster = Cluster(nodes=1, devices=4, memory=1000.0)
    cluster.apply(*(pipeline(f"p{n}", 1.0, memory=100.0) for n in range(60)))
    cluster.rates = {f"p{n}": 0.001 for n in range(60)}
    plan = cluster.run(120)
    assert not cluster.missing()
    assert not plan.problems
    assert max(len(placed.models) for placed in plan.placement.values()) > 10
    assert sum(cluster.moves[-20:]) == 0


def test_models_in_demand_are_not_put_where_they_would_be_paged() -> None:
    cluster = Cluster(nodes=4, devices=1, memory=250.0)
    cluster.apply(*(pipeline(f"p{n}", 1.0, memory=100.0) for n in range(6)))
    cluster.rates = {f"p{n}": 40.0 for n in range(6)}
    plan = cluster.run(60)
    assert not cluster.missing()
    assert all(len(placed.models) <= 2 for placed in plan.placement.values())
    assert sum(cluster.moves[-20:]) == 0


def test_where_there_is_no_room_for_models_in_demand_they_are_paged_all_the_same() -> None:
    cluster = Cluster(nodes=1, devices=1, memory=250.0)
    cluster.apply(*(pipeline(f"p{n}", 1.0, memory=100.0) for n in range(6)))
    cluster.rates = {f"p{n}": 40.0 for n in range(6)}
    cluster.run(60)
    assert not cluster.missing()
    assert set(cluster.serving) == {f"p{n}" for n in range(6)}
    assert sum(cluster.moves[-20:]) == 0


def _calls(models: int) -> int:
    """Function calls that a plan takes for so many models that are too much for one device."""
    cluster = Cluster(nodes=1, devices=1, memory=10.0 * models)
    cluster.apply(*(pipeline(f"p{n}", 1.0, memory=100.0) for n in range(models)))
    cluster.rates = {f"p{n}": 150.0 / (n + 1) for n in range(models)}
    cluster.run(4)
    cluster.planner.observe(
        cluster.now, {cluster.keys.of(cluster.pipelines[n])["s0"]: r for n, r in cluster.rates.items()}
    )
    view = cluster.view()
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        cluster.planner.plan(cluster.now, view)
    finally:
        sys.setprofile(before)
    return calls


def test_a_plan_takes_about_as_much_longer_as_there_are_more_models_on_a_device() -> None:
    assert _calls(160) < 6 * _calls(40)


def test_a_model_that_failed_is_tried_elsewhere() -> None:
    cluster = Cluster(setup=Settings(retry=1000.0))
    spec = pipeline("p", 1.0)
    key = spec.model_key("s0")
    cluster.apply(spec)
    cluster.step()
    (first,) = cluster.devices(spec)
    cluster.failing.add(key)
    cluster.run(LOAD + 1)
    (second,) = cluster.devices(spec)
    assert second != first
    cluster.run(8 * (LOAD + 2))
    assert "could not be loaded on any" in cluster.plan.problems[key]


# ---- versions --------------------------------------------------------------------------------


def test_a_new_version_is_loaded_beside_the_old_one_and_then_served() -> None:
    cluster = Cluster(nodes=4, shards=("a", "b"), memory=1000.0)
    old, new = pipeline("p", 4.0, 1.0, memory=300.0), pipeline("p", 4.0, 1.0, memory=300.0, note="new")
    cluster.apply(old)
    cluster.rates["p"] = 600.0
    cluster.run(60)
    count = len(cluster.placement)
    cluster.in_flight = {f"p@{old.version}": 7}
    cluster.apply(new)
    cluster.step()
    assert cluster.serving["p"].spec == old
    assert len(cluster.placement) == count
    cluster.run(LOAD + 1)
    assert cluster.serving["p"].spec == new
    cluster.run(20)
    assert cluster.devices(old)
    cluster.in_flight = {}
    cluster.run(2)
    assert not cluster.devices(old)
    assert len(cluster.placement) == count


def test_a_new_version_that_does_not_fit_beside_takes_devices_over_part_by_part() -> None:
    cluster = Cluster(nodes=1, devices=6, memory=400.0)
    old, new = pipeline("p", 4.0, 4.0, memory=300.0), pipeline("p", 4.0, 4.0, memory=300.0, note="new")
    cluster.apply(old)
    cluster.rates["p"] = 3000.0
    cluster.run(60)
    assert len(cluster.devices(old)) == 3
    cluster.in_flight = {f"p@{old.version}": 7}
    cluster.apply(new)
    cluster.step()
    assert cluster.devices(new)
    assert cluster.devices(old)
    cluster.run(3 * LOAD)
    assert cluster.serving["p"].spec == new
    cluster.in_flight = {}
    cluster.run(10)
    assert not cluster.devices(old)
    assert len(cluster.devices(new)) == 3


def test_a_new_version_that_fits_nowhere_is_told_and_the_old_one_served() -> None:
    cluster = Cluster(nodes=1, devices=1, memory=400.0)
    old, new = pipeline("p", 4.0, memory=300.0), pipeline("p", 4.0, memory=300.0, note="new")
    cluster.apply(old)
    cluster.run(10)
    cluster.apply(new)
    plan = cluster.run(10)
    assert cluster.serving["p"].spec == old
    assert "does not fit beside" in plan.problems["p"]


def test_a_new_version_that_fails_leaves_the_old_one() -> None:
    cluster = Cluster()
    old, new = pipeline("p", 4.0, 1.0), pipeline("p", 4.0, 1.0, note="new")
    cluster.apply(old)
    cluster.run(10)
    cluster.failing.add(new.model_key("s1"))
    cluster.apply(new)
    plan = cluster.run(10)
    assert cluster.serving["p"].spec == old
    assert "could not be loaded" in plan.problems["p"]


def test_a_new_version_may_have_other_stages() -> None:
    cluster = Cluster()
    old, new = pipeline("p", 4.0), pipeline("p", 4.0, 2.0, 1.0)
    cluster.apply(old)
    cluster.run(10)
    cluster.apply(new)
    cluster.run(10)
    assert cluster.serving["p"].spec == new
    assert not cluster.missing()


def test_a_deleted_pipeline_finishes_what_is_in_flight() -> None:
    cluster = Cluster()
    spec = pipeline("p", 4.0)
    cluster.apply(spec)
    cluster.run(10)
    cluster.in_flight = {f"p@{spec.version}": 3}
    cluster.pipelines.clear()
    cluster.step()
    assert cluster.serving == {}
    cluster.run(10)
    assert cluster.devices(spec)
    cluster.in_flight = {}
    cluster.run(2)
    assert cluster.placement == {}


# ---- shards ----------------------------------------------------------------------------------


def test_a_pipeline_is_spread_over_replicas_where_it_has_the_devices() -> None:
    cluster = Cluster(nodes=4, shards=("a", "b", "c"))
    spec, small = pipeline("p", 8.0, 8.0), pipeline("q", 1.0)
    cluster.apply(spec, small)
    cluster.rates = {"p": 600.0, "q": 5.0}
    cluster.run(30)
    assert len(cluster.serving["p"].shards) == 2
    assert len(cluster.serving["q"].shards) == 1
    for shard in cluster.serving["p"].shards:
        assert cluster.devices(spec, "s0", shard)
        assert cluster.devices(spec, "s1", shard)


def test_a_hot_pipeline_is_split_over_more_shards() -> None:
    cluster = Cluster(nodes=8, shards=("a", "b", "c", "d"), setup=Settings(shard_rate=1000.0))
    cluster.apply(pipeline("p", 4.0))
    cluster.rates["p"] = 2500.0
    cluster.run(60)
    weights = cluster.serving["p"].shards
    assert len(weights) >= 3
    assert max(weights.values()) < 0.5


def test_a_lost_shard_loses_its_part_at_once_and_its_devices_load_nothing() -> None:
    cluster = Cluster(nodes=4, shards=("a", "b"))
    spec = pipeline("p", 4.0, 3.0)
    cluster.apply(spec)
    cluster.rates["p"] = 700.0
    cluster.run(60)
    assert len(cluster.serving["p"].shards) == 2
    cluster.shards.remove("a")
    plan = cluster.step()
    assert cluster.serving["p"].shards == {"b": 1.0}
    assert sum(move.cost for move in plan.moves) == 0.0
    cluster.run(5)
    cluster.shards.append("a")
    cluster.moves.clear()
    cluster.run(10)
    assert set(cluster.serving["p"].shards) == {"a", "b"}
    assert sum(cluster.moves) <= len(cluster.placement)


# ---- nodes -----------------------------------------------------------------------------------


def test_a_lost_node_is_replaced_and_used_again_when_it_is_back() -> None:
    cluster = Cluster(nodes=3, setup=Settings(rest=False))
    spec = pipeline("p", 4.0)
    cluster.apply(spec)
    cluster.rates["p"] = 700.0
    cluster.run(60)
    cluster.lose("n0")
    cluster.step()
    assert any(node == "n0" for node, _ in cluster.placement)
    cluster.run(2)
    assert cluster.plan.states["n0"] == ("lost", "missing")
    assert not any(node == "n0" for node, _ in cluster.placement)
    cluster.find("n0")
    cluster.step()
    assert cluster.plan.states["n0"][0] == "active"
    assert any(node == "n0" for node, _ in cluster.placement)


def test_a_drained_node_is_replaced_before_it_is_emptied() -> None:
    cluster = Cluster(nodes=3)
    spec = pipeline("p", 4.0, 4.0)
    cluster.apply(spec)
    cluster.rates["p"] = 600.0
    cluster.run(60)
    there = [device for device in cluster.placement if device[0] == "n0"]
    assert there
    cluster.nodes["n0"].drained = True
    cluster.step()
    assert cluster.plan.states["n0"][0] == "draining"
    assert [device for device in cluster.placement if device[0] == "n0"] == there
    cluster.run(LOAD + 2)
    assert not any(node == "n0" for node, _ in cluster.placement)
    assert cluster.plan.states["n0"][0] == "standby"
    cluster.nodes["n0"].drained = False
    cluster.step()
    assert cluster.plan.states["n0"][0] == "active"


def test_empty_nodes_rest_and_are_woken_when_devices_lack() -> None:
    cluster = Cluster(nodes=3)
    spec = pipeline("p", 4.0)
    cluster.apply(spec)
    cluster.rates["p"] = 100.0
    cluster.run(60)
    assert [cluster.plan.states[name][0] for name in ("n0", "n1", "n2")] == ["active", "standby", "standby"]
    cluster.lose("n1")  # powered down
    cluster.nodes["n1"].expected = True
    cluster.rates["p"] = 2500.0
    cluster.run(5)
    assert cluster.plan.states["n2"][0] == "active"
    assert cluster.plan.states["n1"][0] == "active"
    assert not any(node == "n1" for node, _ in cluster.placement)


def test_nodes_that_are_nearly_empty_are_emptied_to_rest() -> None:
    cluster = Cluster(nodes=3)
    one, other = pipeline("one", 4.0), pipeline("other", 4.0)
    cluster.apply(one, other)
    cluster.rates = {"one": 500.0, "other": 500.0}
    cluster.run(60)
    cluster.rates = {"one": 30.0, "other": 30.0}
    cluster.run(400)
    assert [cluster.plan.states[name][0] for name in ("n0", "n1", "n2")] == ["active", "standby", "standby"]


def test_stages_that_came_to_have_little_to_do_come_together() -> None:
    cluster = Cluster(nodes=1, devices=8)
    cluster.apply(*(pipeline(f"p{n}", 4.0) for n in range(4)))
    cluster.rates = {f"p{n}": 200.0 for n in range(4)}
    cluster.run(40)
    assert len(cluster.placement) >= 4
    cluster.rates = {f"p{n}": 10.0 for n in range(4)}
    cluster.run(400)
    assert len(cluster.placement) == 1
    cluster.moves.clear()
    cluster.run(60)
    assert sum(cluster.moves) == 0


def test_types_go_where_they_are_worth_most() -> None:
    cluster = Cluster(nodes=2, devices=4, kinds=("fast", "slow"))
    heavy = Profile(alpha_ms=1, beta_ms=1, by_type={"slow": Profile(alpha_ms=10, beta_ms=1)})
    light = Profile(alpha_ms=1, beta_ms=1, by_type={"slow": Profile(alpha_ms=1.5, beta_ms=1)})
    specs = [
        PipelineSpec(name=name, slo=0.4, output="s0", stages={"s0": StageSpec(executor="emulated", profile=profile)})
        for name, profile in (("light", light), ("heavy", heavy))
    ]
    cluster.apply(*specs)
    cluster.step()
    cluster.rates = {"light": 1200.0, "heavy": 1200.0}
    cluster.run(30)
    assert {node for node, _ in cluster.devices(specs[1])} == {"n0"}
    assert "n1" in {node for node, _ in cluster.devices(specs[0])}


# ---- whatever happens ------------------------------------------------------------------------

EVENTS = st.one_of(
    st.tuples(st.just("rate"), st.integers(0, 3), st.sampled_from([0.0, 5.0, 80.0, 400.0, 1500.0])),
    st.tuples(st.just("lose"), st.integers(0, 2), st.just(0.0)),
    st.tuples(st.just("find"), st.integers(0, 2), st.just(0.0)),
    st.tuples(st.just("drain"), st.integers(0, 2), st.just(0.0)),
    st.tuples(st.just("resume"), st.integers(0, 2), st.just(0.0)),
    st.tuples(st.just("upgrade"), st.integers(0, 3), st.sampled_from([0.5, 2.0, 6.0])),
    st.tuples(st.just("delete"), st.integers(0, 3), st.just(0.0)),
    st.tuples(st.just("shard"), st.integers(0, 2), st.just(0.0)),
    st.tuples(st.just("fail"), st.integers(0, 3), st.just(0.0)),
    st.tuples(st.just("leader"), st.just(0), st.just(0.0)),
    st.tuples(st.just("wait"), st.integers(1, 12), st.just(0.0)),
)


@settings(max_examples=60, deadline=None, report_multiple_bugs=False)
@given(
    st.lists(EVENTS, max_size=14),
    st.integers(1, 4),
    st.sampled_from([0.0, 350.0, 1000.0]),
    st.booleans(),
    st.sampled_from([("gpu",), ("gpu", "other")]),
)
def test_whatever_happens(
    events: list[tuple[str, int, float]], devices: int, memory: float, rest: bool, kinds: tuple[str, ...]
) -> None:
    cluster = Cluster(
        nodes=3,
        devices=devices,
        shards=("a", "b", "c"),
        memory=memory,
        kinds=kinds,
        setup=Settings(rest=rest, patience=8.0, memory=30.0, retry=5.0),
    )
    shards = list(cluster.shards)
    for number in range(2):
        cluster.apply(pipeline(f"p{number}", 3.0, *[1.0] * number, memory=100.0))
    cluster.run(4)
    for what, which, value in events:
        name, node = f"p{which}", f"n{which}"
        if what == "rate":
            cluster.rates[name] = value
        elif what == "lose":
            cluster.lose(node)
        elif what == "find":
            cluster.find(node)
        elif what == "drain":
            cluster.nodes[node].drained = True
        elif what == "resume":
            cluster.nodes[node].drained = False
        elif what == "upgrade":
            cluster.apply(pipeline(name, value, *[1.0] * which, memory=100.0))
        elif what == "delete":
            cluster.pipelines.pop(name, None)
        elif what == "shard":
            alive = set(cluster.shards) ^ {shards[which]}
            cluster.shards = [shard for shard in shards if shard in alive or len(alive) == 0]
        elif what == "fail" and name in cluster.pipelines:
            cluster.failing.add(cluster.keys.of(cluster.pipelines[name])["s0"])
        elif what == "leader":
            cluster.planner = Planner(cluster.settings)
        cluster.run(which if what == "wait" else 1)
    for node in cluster.nodes.values():
        node.up, node.drained = True, False
    cluster.shards = shards
    cluster.failing.clear()
    cluster.run(100)
    cluster.moves.clear()
    cluster.run(20)
    assert sum(cluster.moves) == 0, "the plan never settles"
    if memory == 0.0 or devices * 3 * (memory // 100) >= 20:
        assert not cluster.missing()
        assert {name: served.spec for name, served in cluster.serving.items()} == cluster.pipelines
    again = cluster.planner.plan(cluster.now, cluster.view())
    assert (again.placement, again.serving, again.moves) == (cluster.placement, cluster.serving, [])
    same = msgspec.json.encode(cluster.plan.states) == msgspec.json.encode(again.states)
    assert same
