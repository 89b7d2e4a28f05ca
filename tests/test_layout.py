"""Which agents a cluster on one host gets."""

import pytest

from cluster.layout import Wish, equip, lay_out
from cluster.placement import PlacementError
from pipelines import load_spec
from pipelines.capacity import planned_costs
from pipelines.spec import PipelineSpec, Profile, StageSpec

LV = load_spec("lv")
ECHO = load_spec("echo")


def real_pipeline(**profile: Profile) -> PipelineSpec:
    stages = {
        name: StageSpec(executor="python", model="pkg.mod:call", profile=profile.get(name)) for name in ("a", "b")
    }
    return PipelineSpec(name="real", slo=1.0, stages=stages, output="b")


def test_64_gpus_are_divided_by_cost() -> None:
    layouts = lay_out([LV], Wish(gpus=64), "cpu", 1)
    assert [layout.agent for layout in layouts] == ["agent-0", "agent-1", "agent-2", "agent-3"]
    assert {layout.devices for layout in layouts} == {"emulated:16"}
    held = [models for layout in layouts for _, models in sorted(layout.placement.items())]
    counts = [held.count([LV.model_key(stage)]) for stage in LV.stages]
    assert sum(counts) == 64
    costs = list(planned_costs(LV).values())
    # Detection is by far the slowest stage and gets by far the most.
    assert counts[0] > 32
    assert max(range(5), key=lambda k: counts[k]) == max(range(5), key=lambda k: costs[k])


def test_an_explicit_split_needs_no_gpus() -> None:
    layouts = lay_out([LV], Wish(split=[4, 1, 1, 1, 1], agents=2), "cpu", 1)
    assert [layout.devices for layout in layouts] == ["emulated:4", "emulated:4"]
    assert layouts[0].placement == {device: [LV.model_key("person_detection")] for device in range(4)}
    with pytest.raises(PlacementError, match="adds up to 8 GPUs, not 9"):
        lay_out([LV], Wish(split=[4, 1, 1, 1, 1], gpus=9), "cpu", 1)


def test_fewer_gpus_than_stages_are_shared() -> None:
    (layout,) = lay_out([LV, ECHO], Wish(gpus=2), "cpu", 1)
    models = [model for models in layout.placement.values() for model in models]
    assert sorted(models) == sorted([LV.model_key(stage) for stage in LV.stages] + [ECHO.model_key("echo")])


def test_real_stages_lie_on_every_real_device_beside_emulated_ones() -> None:
    spec = real_pipeline()
    keys = [spec.model_key("a"), spec.model_key("b")]
    real, emulated = lay_out([spec, ECHO], Wish(), "cuda", 2)
    assert (real.devices, real.placement) == ("cuda", {0: keys, 1: keys})
    assert (emulated.devices, emulated.placement) == ("emulated:1", {0: [ECHO.model_key("echo")]})


def test_emulation_needs_profiles() -> None:
    with pytest.raises(PlacementError, match="stage 'a' of pipeline 'real' has no profile"):
        lay_out([real_pipeline()], Wish(emulate=True), "cpu", 1)
    profile = Profile(alpha_ms=1.0, beta_ms=1.0)
    (layout,) = lay_out([real_pipeline(a=profile, b=profile)], Wish(emulate=True, gpus=4), "cpu", 1)
    assert layout.devices == "emulated:4"


def test_models_may_be_given_less_memory_than_there_is() -> None:
    real, emulated = lay_out([real_pipeline(), ECHO], Wish(memory_mb=512), "cpu", 1)
    assert (real.devices, emulated.devices) == ("cpu:512", "emulated:1:emulated:512")
    assert equip([real_pipeline()], Wish(memory_mb=512), "cpu", 1)[0].devices == "cpu:512"
    with pytest.raises(PlacementError, match="leave out --memory"):
        lay_out([real_pipeline()], Wish(memory_mb=512), "cuda", 1)


@pytest.mark.parametrize("wish", [Wish(gpus=2), Wish(split=[1, 1]), Wish(agents=1)])
def test_gpus_without_anything_emulated_are_refused(wish: Wish) -> None:
    with pytest.raises(PlacementError, match="no stage is emulated"):
        lay_out([real_pipeline()], wish, "cpu", 1)


def test_more_agents_than_devices_are_refused() -> None:
    with pytest.raises(PlacementError, match="2 devices cannot be dealt out to 3 agents"):
        lay_out([LV], Wish(gpus=2, agents=3), "cpu", 1)


def test_costs_take_the_best_batch_that_leaves_time() -> None:
    stage = StageSpec(executor="emulated", profile=Profile(alpha_ms=1.0, beta_ms=9.0), max_batch=64)
    spec = PipelineSpec(name="one", slo=0.1, stages={"a": stage}, output="a")
    # 2 * (b + 9) ms <= 100 ms: b = 41, 50 ms.
    assert planned_costs(spec)["a"] == pytest.approx(0.050 / 41)
    assert planned_costs(ECHO)["echo"] > 0
