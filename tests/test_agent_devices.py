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


def hold(runner, now, spec, *stages):
    """Hold these stages, each known by its name; what the runner said."""
    for stage in stages:
        runner.hold(now, stage, spec, stage, [])
    return said(runner, now + 10.0)


def infer(runner, now, batch, key, size=1, latest=1e9, frames=()):
    runner.infer(now, batch, key, now, latest, [[f"input {index}"] for index in range(size)], list(frames))


@pytest.mark.parametrize(
    ("device_type", "seconds", "profile"),
    [("A100", 0.5, [(1, 0.002), (2, 0.003)]), ("T4", 2.0, [(1, 0.015), (2, 0.025)])],
)
def test_loading_and_running_take_what_the_profile_says_for_the_type(typed, device_type, seconds, profile):
    runner = EmulatedRunner(device_type, 0.0, seed=0)
    runner.start()
    assert isinstance(said(runner, 9.0)[0], wire.Started)
    runner.hold(10.0, "k", typed, "large", [])
    assert runner.next_wake() == pytest.approx(10.0 + seconds)
    assert said(runner, 10.0 + seconds - 1e-6) == []
    (held,) = said(runner, 10.0 + seconds)
    assert dict(held.profile) == pytest.approx(dict(profile))
    assert (held.load_seconds, held.memory_mb) == (seconds, 600.0)
    infer(runner, 20.0, 1, "k", size=2)
    assert said(runner, 20.0) == [wire.Executing(1, 20.0)]
    assert runner.next_wake() == pytest.approx(20.0 + profile[1][1])
    (finished,) = said(runner, 21.0)
    assert (finished.code, finished.execution_us) == ("ok", round(profile[1][1] * 1e6))


def test_a_load_that_is_under_way_ends_with_the_worker(typed):
    runner = EmulatedRunner("T4", 0.0, seed=0)
    runner.hold(10.0, "k", typed, "large", [])
    runner.kill()
    assert [type(event).__name__ for event in said(runner, 99.0)] == ["Died"]


def test_a_device_does_not_hold_more_than_its_memory(typed):
    runner = EmulatedRunner("T4", 1000.0, seed=0)
    _held, failed = sorted(hold(runner, 0.0, typed, "large", "huge"), key=lambda event: type(event).__name__)
    assert isinstance(failed, wire.LoadFailed)
    assert failed.code == "out_of_memory"
    assert "huge takes 500 MB" in failed.detail
    assert "of this device's 1000 MB other models hold 600" in failed.detail
    runner.release("large")
    assert hold(runner, 13.0, typed, "huge") == [wire.Held("huge", [(1, 0.002)], 0.0, 0.0, 500.0)]


def acted(runner, now):
    return [(event.action, event.code, event.took_us) for event in said(runner, now)]


def test_models_are_paged_one_after_the_other(typed):
    runner = EmulatedRunner("A100", 1000.0, seed=0)
    hold(runner, 0.0, typed, "large")
    runner.unload(20.0, 1, "large", 20.0, 21.0)
    assert acted(runner, 20.0) == [(1, "ok", 0)]
    hold(runner, 20.0, typed, "huge")
    runner.load(40.0, 2, "large", 40.0, 41.0)
    assert acted(runner, 40.5) == [(2, "out_of_memory", 0)]
    runner.unload(41.0, 3, "huge", 41.0, 42.0)
    runner.load(41.0, 4, "large", 41.0, 42.0)
    runner.unload(41.0, 5, "large", 41.0, 41.2)
    assert acted(runner, 41.1) == [(3, "ok", 0)]
    assert acted(runner, 50.0) == [(5, "too_late", 0), (4, "ok", 500_000)]
    infer(runner, 60.0, 1, "large")
    infer(runner, 60.0, 2, "huge")
    events = said(runner, 61.0)
    assert [(event.batch, event.code) for event in events if isinstance(event, wire.Finished)] == [
        (1, "ok"),
        (2, "not_loaded"),
    ]


def test_a_batch_begins_as_the_one_before_ends_however_late_the_agent_looks(typed):
    runner = EmulatedRunner("A100", 0.0, seed=0)
    hold(runner, 0.0, typed, "large")
    infer(runner, 20.0, 1, "large")
    infer(runner, 20.0, 2, "large")
    infer(runner, 20.0, 3, "large", latest=20.003)
    assert [(type(event).__name__, event.batch) for event in said(runner, 25.0)] == [
        ("Executing", 1),
        ("Finished", 1),
        ("Executing", 2),
        ("Finished", 3),
        ("Finished", 2),
    ]
    infer(runner, 30.0, 4, "large")
    infer(runner, 30.0, 5, "large")
    runner.drop(30.0, 5)
    runner.drop(30.0, 4)
    events = [event for event in said(runner, 31.0) if isinstance(event, wire.Finished)]
    assert [(event.batch, event.code) for event in events] == [(5, "cancelled"), (4, "ok")]


def test_a_batch_may_take_more_memory_than_there_is():
    spec = parse_spec(
        """
name: hungry
slo: 10s
stages:
  s:
    executor: emulated
    max_batch: 8
    profile: {alpha_ms: 1, beta_ms: 1, memory_mb: 500}
    options: {memory_mb_per_item: 100}
output: s
""",
        file="hungry.yaml",
        root="",
    )
    runner = EmulatedRunner("T4", 1000.0, seed=0)
    hold(runner, 0.0, spec, "s")
    infer(runner, 20.0, 1, "s", size=5)
    infer(runner, 20.0, 2, "s", size=6)
    ended = [event for event in said(runner, 21.0) if isinstance(event, wire.Finished)]
    assert [(event.batch, event.code) for event in ended] == [(1, "ok"), (2, "out_of_memory")]


def test_models_change_places_where_there_is_room_for_one_of_them(cluster, typed):
    agent = cluster.lone_agent([DeviceConfig("emulated", "A100", memory_mb=1000.0)])
    large, huge = ({typed.model_key(stage): (typed, stage)} for stage in ("large", "huge"))
    agent.agent.place({0: Work("s0", large)})
    agent.wait_for(lambda states: states[0].models == {typed.model_key("large"): "ready"})
    agent.agent.place({0: Work("s0", huge)})
    agent.wait_for(lambda states: states[0].models == {typed.model_key("huge"): "ready"})


def test_a_model_that_is_larger_than_its_device_is_given_up(cluster, typed):
    agent = cluster.lone_agent([DeviceConfig("emulated", "A100", memory_mb=550.0)])
    (states,) = agent.hold(typed)
    assert states.models[typed.model_key("huge")] == "ready"
    assert "takes 600 MB, and this device has 550 MB" in states.models[typed.model_key("large")]


@pytest.mark.parametrize(
    "options",
    [
        "{items: [1]}",
        "{items: -1}",
        "{items: 100001}",
        "{jitter: [0.1]}",
        "{jitter: -0.1}",
        "{jitter: .inf}",
        "{jitter: .nan}",
        "{jitter: 1000}",
        "{memory_mb_per_item: -1}",
        "{memory_mb_per_item: .inf}",
        "{jitters: 0.1}",
    ],
)
def test_options_that_mean_nothing_fail_their_model_and_not_the_agent(cluster, options):
    """A model that can be emulated beside it is, so the agent goes on."""
    stage = f"executor: emulated, profile: {{alpha_ms: 1, beta_ms: 1}}, options: {options}"
    text = "name: p\nslo: 100ms\noutput: good\nstages:\n  bad: {%s}\n  good: {%s, inputs: [bad]}\n"
    spec = parse_spec(text % (stage, stage.partition(", options")[0]), file="p.yaml", root="")
    agent = cluster.lone_agent([DeviceConfig("emulated", "T4")])
    bad, good = spec.model_key("bad"), spec.model_key("good")
    agent.agent.place({0: Work("s0", {bad: (spec, "bad"), good: (spec, "good")})})
    agent.wait_for(lambda states: states[0].models.get(good) == "ready")
    states = agent.wait_for(lambda states: states[0].models[bad].startswith("failed: "))
    assert "option" in states[0].models[bad]


def test_the_options_of_another_executor_are_not_the_emulations():
    spec = parse_spec(
        """
name: p
slo: 1s
output: s
stages:
  s: {executor: triton, model: m, profile: {alpha_ms: 1, beta_ms: 1}, options: {items: "of its own"}}
""",
        file="p.yaml",
        root="",
    )
    runner = EmulatedRunner("T4", 0.0, seed=0)
    assert [type(event) for event in hold(runner, 0.0, spec, "s")] == [wire.Held]


MEETING = """
import pathlib, time

HERE = pathlib.Path(__file__).parent

class Meets:
    # Once the agent stops, waits for the other worker to be told so as well.
    def __init__(self, name):
        self.name = name

    def load(self):
        pass

    def unload(self):
        if not (HERE / "stopping").exists():
            return
        (HERE / f"{self.name}.here").touch()
        while len(list(HERE.glob("*.here"))) < 2:
            time.sleep(0.01)
        (HERE / f"{self.name}.met").touch()

    def __call__(self, feeds):
        return feeds
"""


def test_the_workers_of_an_agent_that_stops_end_beside_one_another(cluster, tmp_path):
    (tmp_path / "meeting.py").write_text(MEETING)
    stage = 'executor: python, model: "meeting:Meets", profile: {alpha_ms: 1, beta_ms: 1}, options: {name: %s}'
    text = "name: p\nslo: 1s\noutput: b\nstages:\n  a: {%s}\n  b: {%s, inputs: [a]}\n"
    spec = parse_spec(text % (stage % "a", stage % "b"), file="p.yaml", root=str(tmp_path))
    agent = cluster.lone_agent([DeviceConfig("cpu", "cpu"), DeviceConfig("cpu", "cpu")])
    keys = [spec.model_key(stage) for stage in "ab"]
    agent.agent.place({number: Work("s0", {keys[number]: (spec, "ab"[number])}) for number in range(2)})
    agent.wait_for(lambda states: all(states[n].models.get(keys[n], "") == "ready" for n in range(2)))
    (tmp_path / "stopping").touch()
    agent.stop()
    assert agent.error is None
    assert sorted(path.name for path in tmp_path.glob("*.met")) == ["a.met", "b.met"]
