"""Which shard gets which devices where the plan is written once, and which agents there are where it is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.fixed_plan import divide
from cluster.layout import AgentLayout, Wish, equip, lay_out
from cluster.placement import PlacementError
from pipelines import load_spec

SPECS = {name: load_spec(name) for name in ("tm", "lv", "echo")}


def held(layouts: list[AgentLayout]) -> dict[tuple[str, int], list[str]]:
    return {(layout.agent, number): models for layout in layouts for number, models in layout.placement.items()}


@given(
    names=st.lists(st.sampled_from(sorted(SPECS)), min_size=1, unique=True),
    gpus=st.integers(1, 40),
    agents=st.integers(1, 4),
    shards=st.integers(1, 5),
)
def test_each_shard_of_a_pipeline_has_all_of_its_stages(names: list[str], gpus: int, agents: int, shards: int) -> None:
    specs = [SPECS[name] for name in names]
    layouts = lay_out(specs, Wish(gpus=gpus, agents=min(agents, gpus)), "cpu", 1)
    known = [f"shard-{number}" for number in range(shards)]
    plan = divide(layouts, known)
    placed = {
        (agent, number): device for agent, devices in plan.placement.items() for number, device in devices.items()
    }
    # Every device that holds something works for one shard, and holds what it was to hold.
    assert {device: sorted(models) for device, models in held(layouts).items() if models} == {
        device: sorted(placement.models) for device, placement in placed.items()
    }
    for spec in specs:
        parts = plan.parts[spec.name]
        assert sum(parts.values()) == pytest.approx(1.0)
        models = {spec.model_key(stage) for stage in spec.stages}
        for shard in known:
            there = {model for device in placed.values() if device.shard == shard for model in device.models}
            assert (models <= there) == (shard in parts)
            # Nothing lies at a shard that cannot serve it.
            assert shard in parts or not models & there


def test_devices_are_divided_evenly_and_parts_follow_the_scarcest_stage() -> None:
    lv = SPECS["lv"]
    layouts = lay_out([lv], Wish(split=[8, 3, 2, 2, 2]), "cpu", 1)
    plan = divide(layouts, ["a", "b"])
    counts = {
        shard: [
            sum(
                device.shard == shard and lv.model_key(stage) in device.models
                for devices in plan.placement.values()
                for device in devices.values()
            )
            for stage in lv.stages
        ]
        for shard in ("a", "b")
    }
    assert counts == {"a": [4, 2, 1, 1, 1], "b": [4, 1, 1, 1, 1]}
    assert plan.parts["lv"] == {"a": pytest.approx(0.6), "b": pytest.approx(0.4)}


def test_pipelines_apart_are_spread_over_the_shards() -> None:
    layouts = lay_out([SPECS["tm"], SPECS["echo"]], Wish(split=[1, 1, 1, 1]), "cpu", 1)
    plan = divide(layouts, ["a", "b"])
    assert plan.parts == {"tm": {"a": 1.0}, "echo": {"b": 1.0}}


def test_agents_for_coordinators_hold_nothing_yet() -> None:
    layouts = equip([SPECS["lv"]], Wish(gpus=20), "cuda", 2)
    assert [layout.devices for layout in layouts] == ["emulated:10", "emulated:10"]
    assert not any(held(layouts).values())
    # One for each emulated stage where no number is given; the host's own devices where a stage needs them.
    assert [layout.devices for layout in equip([SPECS["lv"]], Wish(), "cuda", 2)] == ["emulated:5"]
    assert [layout.devices for layout in equip([load_spec("ocr")], Wish(gpus=3), "cuda", 2)] == ["cuda", "emulated:3"]
    # Pipelines may come later.
    assert [layout.devices for layout in equip([], Wish(), "cpu", 1)] == ["cpu"]
    assert [layout.devices for layout in equip([], Wish(gpus=3, agents=3), "cpu", 1)] == ["emulated:1"] * 3
    with pytest.raises(PlacementError, match="say how many with --gpus"):
        equip([], Wish(agents=2), "cpu", 1)
