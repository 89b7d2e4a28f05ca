"""Models whose time depends on the size of their inputs: sizes read off headers, and batches of one bucket each."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.engine.cost import CostKey
from broker.engine.devices import Batch
from broker.engine.fleet import HeldModel
from broker.engine.limits import Limits
from broker.engine.request import Client, Request
from broker.engine.scheduler import Scheduler
from broker.engine.stage import Stage
from broker.plans import build_pipeline
from laxity.outcomes import Outcome
from laxity.payload import decode, encode
from pipelines import SpecError, json_schema, parse_spec
from pipelines.spec import PipelineSpec

SPEC = """
name: p
slo: 1s
stages:
  find: {executor: emulated, profile: {alpha_ms: 1, beta_ms: 5}, inputs: [request], max_batch: 8}
  read:
    executor: emulated
    profile: {alpha_ms: 8, beta_ms: 8}
    inputs: [find.crops]
    map: true
    max_batch: 8
    max_items: 50
    cost: {axis: 1, buckets: [100, 200, 400]}
output: read
"""
PROFILE = [(1, 0.016), (8, 0.072)]


def crop(width: int) -> Any:
    return np.zeros((2, width, 3), np.uint8)


def spec(text: str = SPEC, policy: str = "laxity") -> PipelineSpec:
    return parse_spec(f"{text}policy: '{policy}'\n", file="p.yaml", root="")


class World:
    """A scheduler and its devices in virtual time: each pulls when it is free, and takes as long as it is told."""

    def __init__(self, served: PipelineSpec, devices: int = 1, *, paged: bool = False) -> None:
        self.spec = served
        self.scheduler = Scheduler(Limits(), overhead=0.0002)
        self.scheduler.apply(build_pipeline(served))
        self.client = Client("c")
        self.now = 0.0
        self.batches: list[Batch] = []
        """All that were granted."""
        self.ended: list[Request] = []
        self._ids = itertools.count()
        self._running: list[tuple[float, int, Batch]] = []
        self._acting: list[tuple[float, int]] = []
        for number in range(devices):
            held = [
                HeldModel(served.model_key(name), "", 100, PROFILE, not paged, 10.0, 0.010) for name in served.stages
            ]
            self.scheduler.report("a", number, "gpu", held, 15.0 if paged else 0.0)
            self.scheduler.pull("a", number, 0.0)

    def lane(self, number: int) -> Stage:
        return self.scheduler.stages[self.spec.model_key("read")].lanes[number]

    def submit(self, value: Any) -> Request:
        request = self.scheduler.submit(
            self.now, self.client, next(self._ids), "p", self.now, -1.0, 0, encode(value), False
        )
        assert request is not None
        return request

    def run(self, until: float) -> None:
        while True:
            for batch in self.scheduler.dispatch(self.now):
                self.batches.append(batch)
                begin = max(self.now, batch.device.free_at)
                self._running.append((begin + self._seconds(batch), batch.number, batch))
            for page in self.scheduler.take_pages():
                self._acting.append((self.now + (0.010 if page.load else 0.0), page.action))
            self.ended += self.scheduler.take_ended()
            running = min(self._running, default=None)
            acting = min(self._acting, default=None)
            wake = min(
                self.scheduler.next_wake(),
                running[0] if running is not None else until,
                acting[0] if acting is not None else until,
            )
            if wake >= until:
                self.now = until
                return
            self.now = max(self.now, wake)
            if acting is not None and acting[0] <= self.now:
                self._acting.remove(acting)
                assert self.scheduler.acted(self.now, "a", acting[1], "ok", 0.010, "")
            elif running is not None and running[0] <= self.now:
                self._running.remove(running)
                batch = running[2]
                answers = [self._answer(batch, number) for number in range(len(batch.tasks))]
                assert self.scheduler.done(self.now, "a", batch.number, "ok", self._seconds(batch), answers, {}, "")
                self.scheduler.pull("a", batch.device.number, self.now)

    def _seconds(self, batch: Batch) -> float:
        if batch.stage.model.endswith("/find"):
            return 0.005 + 0.001 * len(batch.tasks)
        widest = max(self._width(batch, number) for number in range(len(batch.tasks)))
        return (0.008 + 0.008 * len(batch.tasks)) * widest / 400

    def _width(self, batch: Batch, number: int) -> int:
        (value,) = batch.tasks[number].inputs
        width: int = decode(value).shape[1]
        return width

    def _answer(self, batch: Batch, number: int) -> Any:
        (value,) = batch.tasks[number].inputs
        found = decode(value)
        return encode({"crops": [crop(width) for width in found]} if isinstance(found, list) else found.shape[1])


# ---- sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "field", "axis", "lane"),
    [
        (crop(1), "", 1, 0),
        (crop(100), "", 1, 0),
        (crop(101), "", 1, 1),
        (crop(400), "", -2, 2),
        (crop(4000), "", 1, 2),
        (crop(1), "", 3, 2),
        (crop(1), "", -4, 2),
        (crop(1), "", None, 2),
        (b"x" * 150, "", None, 1),
        (b"x" * 150, "", 1, 2),
        ("é" * 50, "", None, 0),
        ("é" * 51, "", None, 1),
        ("é" * 40_000, "", None, 2),
        ([1] * 120, "", None, 1),
        ({"picture": crop(120)}, "picture", 1, 1),
        ({"picture": crop(120)}, "text", 1, 2),
        (crop(1), "picture", 1, 2),
        (7, "", None, 2),
        (None, "", None, 2),
    ],
)
def test_the_lane_of_a_value(value: Any, field: str, axis: int | None, lane: int) -> None:
    assert CostKey(0, field, axis, [100, 200, 400]).lane([encode(value)]) == lane


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8, unique=True), st.integers(0, 1200))
def test_larger_inputs_never_go_to_a_lane_for_smaller_ones(bounds: list[int], size: int) -> None:
    bounds.sort()
    key = CostKey(1, "", None, bounds)
    lane = key.lane([encode(1), encode(b"x" * size)])
    assert size <= bounds[lane] or lane == len(bounds) - 1
    assert lane == 0 or size > bounds[lane - 1]


# ---- spec --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        ("{axis: 1}", "0 buckets; a cost has 2 to 8"),
        ("{buckets: [3]}", "1 buckets"),
        ("{buckets: [1, 2, 3, 4, 5, 6, 7, 8, 9]}", "9 buckets"),
        ("{buckets: [1, 3, 3]}", "cost.buckets[2]: 3 stands behind 3; write the buckets' largest sizes ascending"),
        ("{buckets: [1, 3], profiled: 0}", "stages.read.cost.profiled"),
        ("{buckets: [0, 3]}", "stages.read.cost.buckets"),
        ("{buckets: [1, 3], axis: 99}", "stages.read.cost.axis"),
        ("{buckets: [1, 3], axes: 1}", "unknown field 'axes'; write 'axis'"),
        ("{buckets: [1, 3], input: find}", "the stage has no input 'find'; use one of find.crops"),
        ("3", "stages.read.cost"),
    ],
)
def test_a_cost_that_is_none(cost: str, text: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(SPEC.replace("{axis: 1, buckets: [100, 200, 400]}", cost))
    assert text in str(caught.value)


def test_of_several_inputs_one_is_meant() -> None:
    text = SPEC.replace("[find.crops]\n    map: true", "{a: find.crops, b: request}")
    with pytest.raises(SpecError, match="say which one is meant, as in `input: a`"):
        spec(text)
    served = spec(text.replace("axis: 1,", "axis: 1, input: b,"))
    key = build_pipeline(served).stages[1].cost
    assert key is not None
    assert key.lane([encode(crop(400)), encode(crop(1))]) == 0


def test_the_schema_knows_costs() -> None:
    cost = json_schema()["$defs"]["Cost"]
    assert cost["required"] == ["buckets"]
    assert all(field["description"] for field in cost["properties"].values())


# ---- lanes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", ["laxity", "pard", "nexus", "symphony", "clipper++", "naive", "clockwork", "shepherd"]
)
@pytest.mark.parametrize("devices", [1, 3])
def test_batches_are_of_one_bucket_and_items_come_back_in_order(policy: str, devices: int) -> None:
    world = World(spec(policy=policy), devices)
    rng = random.Random(policy)
    requests = []
    for number in range(60):
        widths = [rng.choice([20, 90, 150, 390, 1000]) for _ in range(rng.randrange(4))]
        requests.append((world.submit(widths), widths))
        world.run(until=world.now + rng.random() * 0.04)
        assert number == len(requests) - 1
    world.run(until=world.now + 5.0)
    assert {request for request, _ in requests} == set(world.ended)
    answered = [(request, widths) for request, widths in requests if request.outcome is Outcome.OK]
    assert len(answered) > 30
    for request, widths in answered:
        assert request.answer is not None
        assert decode(request.answer) == widths
    buckets = CostKey(0, "", 1, [100, 200, 400])
    read = [batch for batch in world.batches if batch.stage.model.endswith("/read")]
    for batch in read:
        assert {buckets.lane(task.inputs) for task in batch.tasks} == {batch.stage.whole.lanes.index(batch.stage)}
    assert {batch.stage.key for batch in read} == {lane.key for lane in world.lane(2).lanes}
    assert world.scheduler.ledger.in_flight == 0
    assert world.scheduler.ledger.bytes == 0


def test_each_bucket_has_predictions_of_its_own() -> None:
    world = World(spec())
    world.run(until=0.1)
    group = world.lane(0).groups[0]
    tables = [group.tables[world.lane(number).key] for number in range(3)]
    assert [table.upper(1) for table in tables] == pytest.approx([0.004, 0.008, 0.016])
    assert [table.upper(8) for table in tables] == pytest.approx([0.018, 0.036, 0.072])
    for _ in range(20):
        world.submit([50])
        world.run(until=world.now + 0.1)
    assert tables[0].upper(1) == pytest.approx(0.016 / 8)
    assert tables[2].upper(1) == pytest.approx(0.016)
    assert [number for number in range(3) if world.lane(number).batch_size > 0.0] == [0]
    assert world.lane(0).rate > world.lane(2).rate == 0.0


def test_a_profile_can_be_of_a_size_in_between() -> None:
    world = World(spec(SPEC.replace("400]", "400], profiled: 100")))
    world.run(until=0.1)
    group = world.lane(0).groups[0]
    tables = [group.tables[world.lane(number).key] for number in range(3)]
    assert [table.upper(1) for table in tables] == pytest.approx([0.016, 0.032, 0.064])
    assert [table.upper(8) for table in tables] == pytest.approx([0.072, 0.144, 0.288])
    assert [table.drift() for table in tables] == [0.0] * 3


def test_a_report_is_of_the_whole_stage() -> None:
    world = World(spec())
    for _ in range(20):
        world.submit([50, 350])
        world.run(until=world.now + 0.1)
    report = world.scheduler.take_report(world.now)
    assert [stage.model for stage in report.stages] == list(world.scheduler.stages)
    read = report.stages[1]
    assert (read.arrived, read.started) == (40, 40)
    mean = (0.016 * 50 / 400 + 0.016 * 350 / 400) / 2
    assert read.execution == pytest.approx(mean)
    assert dict(read.latency["gpu"])[1] == pytest.approx(mean)
    assert read.drift["gpu"] == pytest.approx(0.5, abs=0.01), "the small ones take half of what was reckoned"
    assert world.scheduler.take_report(world.now).stages[1].arrived == 0


def test_what_does_not_fit_into_the_queue_is_counted_over_all_lanes() -> None:
    text = SPEC.replace("max_items: 50", "max_items: 50\n    max_queue: 6")
    world = World(spec(text), devices=0)
    one, two = world.submit(0), world.submit(0)
    flow = world.scheduler._flow
    plan = one.pipeline.stages[1]
    widths = [50, 150, 350]
    flow._queue_items(0.0, one, 1, plan, [encode(crop(width)) for width in widths])
    assert [lane.waiting() for lane in plan.stage.lanes] == [1, 1, 1]
    assert plan.stage.all_waiting() == 3
    flow._queue_items(0.0, two, 1, plan, [encode(crop(width)) for width in [50] * 4])
    assert two.outcome is Outcome.REJECTED
    assert "3 of 6 elements wait" in two.detail
    assert plan.stage.all_waiting() == 3


def test_a_map_request_that_cannot_make_it_over_all_its_lanes_is_dropped_as_a_whole() -> None:
    world = World(spec(SPEC.replace("slo: 1s", "slo: 200ms")))
    hopeless = world.submit([390] * 30 + [50])  # 30 wide ones take 0.27 s at the least
    fine = world.submit([390] * 2 + [50] * 2)
    world.run(until=1.0)
    assert hopeless.outcome is Outcome.DROPPED
    assert fine.outcome is Outcome.OK
    assert all(task.request is fine for batch in world.batches[2:] for task in batch.tasks)


def test_lanes_of_a_retired_version_are_forgotten() -> None:
    world = World(spec())
    world.submit([50, 150])
    world.scheduler.apply(build_pipeline(spec(SPEC.replace("1s", "2s"))))
    world.run(until=2.0)
    assert [request.outcome for request in world.ended] == [Outcome.OK]
    assert len(world.scheduler.stages) == 2
    assert world.scheduler.next_wake() > world.now


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.lists(st.sampled_from([30, 180, 390]), max_size=3), st.floats(0.0, 0.1)), max_size=15))
def test_lanes_of_models_that_are_paged(sent: list[tuple[list[int], float]]) -> None:
    """There is room for one of the two models at a time."""
    world = World(spec(), devices=2, paged=True)
    requests = []
    for widths, later in sent:
        requests.append((world.submit(widths), widths))
        world.run(until=world.now + later)
    world.run(until=world.now + 10.0)
    for request, widths in requests:
        assert request.outcome in (Outcome.OK, Outcome.DROPPED, Outcome.EXPIRED)
        if request.outcome is Outcome.OK and request.answer is not None:
            assert decode(request.answer) == widths
    if requests:
        assert requests[0][0].outcome is Outcome.OK
    assert world.scheduler.ledger.in_flight == 0
