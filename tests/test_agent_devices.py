"""Devices of an agent that are played: what their type and their memory mean."""

from __future__ import annotations

import pytest

from nodes import worker_protocol as wire
from nodes.agent import Work
from nodes.device import DeviceConfig
from nodes.emulated import EmulatedRunner
from pipelines.load import parse_spec

TYPED = """
name: typed
slo: 10s
stages:
  large:
    executor: emulated
    max_batch: 2
    profile:
      alpha_ms: 10
      beta_ms: 5
      load_ms: 2000
      memory_mb: 600
      by_type: {A100: {alpha_ms: 1, beta_ms: 1, load_ms: 500}}
  huge:
    executor: emulated
    inputs: [large]
    max_batch: 1
    profile: {alpha_ms: 1, beta_ms: 1, memory_mb: 500}
output: huge
"""


@pytest.fixture
def typed():
    return parse_spec(TYPED, file="typed.yaml", root="")


def said(runner, now):
    return [event for event, _ in runner.events(now)]


@pytest.mark.parametrize(
    ("device_type", "seconds", "profile"),
    [("A100", 0.5, [(1, 0.002), (2, 0.003)]), ("T4", 2.0, [(1, 0.015), (2, 0.025)])],
)
def test_loading_and_running_take_what_the_profile_says_for_the_type(typed, device_type, seconds, profile):
    runner = EmulatedRunner(device_type, 0.0, seed=0)
    runner.start()
    assert isinstance(said(runner, 9.0)[0], wire.Started)
    runner.load(10.0, "k", typed, "large")
    assert runner.next_wake() == pytest.approx(10.0 + seconds)
    assert said(runner, 10.0 + seconds - 1e-6) == []
    (loaded,) = said(runner, 10.0 + seconds)
    assert dict(loaded.profile) == pytest.approx(dict(profile))
    runner.infer(20.0, 1, "k", [["a"], ["b"]], [])
    assert runner.next_wake() == pytest.approx(20.0 + profile[1][1])


def test_a_load_that_is_under_way_ends_with_the_worker(typed):
    runner = EmulatedRunner("T4", 0.0, seed=0)
    runner.load(10.0, "k", typed, "large")
    runner.kill()
    assert [type(event).__name__ for event in said(runner, 99.0)] == ["Died"]


def test_a_device_does_not_hold_more_than_its_memory(typed):
    runner = EmulatedRunner("T4", 1000.0, seed=0)
    runner.load(0.0, "large", typed, "large")
    runner.load(0.0, "huge", typed, "huge")
    (failed,) = said(runner, 0.0)
    assert isinstance(failed, wire.LoadFailed)
    assert "huge takes 500 MB" in failed.detail
    assert "of this device's 1000 MB other models hold 600" in failed.detail
    runner.unload("large")
    runner.load(3.0, "huge", typed, "huge")
    assert wire.Held("huge", [(1, 0.002)], 0.0, 0.0, 500.0) in said(runner, 3.0)


def test_models_change_places_where_there_is_room_for_one_of_them(cluster, typed):
    agent = cluster.lone_agent([DeviceConfig("emulated", "A100", memory_mb=1000.0)] * 2)
    large, huge = ({typed.model_key(stage): (typed, stage)} for stage in ("large", "huge"))
    agent.agent.place({0: Work("s0", large), 1: Work("s0", large | huge)})
    states = agent.wait_for(lambda states: any("failed" in said for said in states[1].models.values()))
    assert "takes 500 MB" in states[1].models[typed.model_key("huge")]
    agent.agent.place({0: Work("s0", huge), 1: Work("s0", huge)})
    agent.wait_for(lambda states: [state.models for state in states] == [{typed.model_key("huge"): "ready"}] * 2)
