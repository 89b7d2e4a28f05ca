"""The live feed, in virtual time: from successive looks at a store's records to rates, history, devices and drops."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.live.feed import LiveFeed
from cli.live.reports import SILENT
from cli.live.view import HISTORY, LiveDevice, LivePipeline, LiveView
from cli.snapshot import Snapshot
from cluster.decoded import Decoded
from cluster.records import (
    BrokerRecord,
    CoordinatorRecord,
    DeviceGauges,
    DevicePlacement,
    DeviceRecord,
    DrainRecord,
    LeaderRecord,
    NodeGaugesRecord,
    NodeRecord,
    NodeStateRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    ServingRecord,
    TuningRecord,
    encode,
)
from cluster.store.base import Entry
from cluster.tuning.report import DropReport, PipelineReport, ReportRecord, StageReport
from pipelines import load_spec
from pipelines.spec import PipelineSpec

PATHS = Paths("here")
LV = load_spec("lv")
STAGES = list(LV.stages)
FIRST = STAGES[0]
UNIX = 1_000_000.25


class Looks:
    """A store's entries, and a feed that looks at them once a second."""

    def __init__(self) -> None:
        self.feed = LiveFeed("here", "memory")
        self.now = 50.0
        self.epoch = UNIX
        self._entries: dict[str, Entry] = {}
        self._revision = 0
        self._decoded = Decoded()

    @property
    def unix(self) -> float:
        return self.epoch + self.now

    def put(self, key: str, record: msgspec.Struct | bytes) -> None:
        self._revision += 1
        value = record if isinstance(record, bytes) else encode(record)
        self._entries[key] = Entry(key, value, self._revision, self._revision)

    def gone(self, key: str) -> None:
        del self._entries[key]

    def look(self, after: float = 0.0) -> LiveView:
        self.now += after
        self._decoded.update(self._entries)
        return self.feed.update(self.now, self.unix, Snapshot(PATHS, self._decoded))

    # ---- what the processes write ------------------------------------------------------------

    def lead(self) -> None:
        self.put(PATHS.coordinator("c0"), CoordinatorRecord("h", 1))
        self.put(PATHS.leader, LeaderRecord("c0", "h", 1))

    def shard(self, name: str = "s0", **counters: int) -> None:
        self.put(PATHS.broker(name), BrokerRecord("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", 3, "h", counters))

    def serve(self, spec: PipelineSpec = LV) -> None:
        self.put(PATHS.pipeline(spec.name), PipelineRecord(spec.version, spec))
        self.put(PATHS.served(spec.name), ServingRecord(spec.version, spec, {"s0": 1.0}))

    def node(self, name: str, *devices: dict[str, str]) -> None:
        records = [DeviceRecord(number, "T4", models) for number, models in enumerate(devices)]
        self.put(PATHS.node(name), NodeRecord(4, f"host-{name}", "ready", records))
        placed = {number: DevicePlacement("s0", list(models)) for number, models in enumerate(devices)}
        self.put(PATHS.placement(name), PlacementRecord(placed))

    def gauges(self, name: str, *utilization: float, period: float = 2.0) -> None:
        devices = [DeviceGauges(number, part, 1, 10.0, 100.0) for number, part in enumerate(utilization)]
        self.put(PATHS.gauges(name), NodeGaugesRecord(self.unix, period, devices))

    def report(self, number: int, shard: str = "s0", period: float = 1.0, **more: Any) -> None:
        fields: dict[str, Any] = {"stages": [], "in_flight": {}, "agents": []} | more
        self.put(PATHS.report(shard), ReportRecord(number, period, **fields))


@pytest.fixture
def looks() -> Looks:
    """A cluster with a leader and a shard that serves `lv`, on two nodes of two devices."""
    made = Looks()
    made.lead()
    made.shard(submitted=10, in_flight=3, ok=7)
    made.serve()
    held = {LV.model_key(stage): "ready" for stage in STAGES}
    made.node("n1", held, held)
    made.node("n2", held, {})
    return made


def stage(arrived: int = 0, **more: Any) -> StageReport:
    known = StageReport(LV.model_key(FIRST), arrived, 0, 0, 0, 0, 3, 0.0, 0.0, [], {})
    return msgspec.structs.replace(known, **more)


def lv(view: LiveView) -> LivePipeline:
    (pipeline,) = view.pipelines
    return pipeline


def states(view: LiveView) -> dict[str, list[str]]:
    return {node.name: [device.state for device in node.devices] for node in view.nodes}


# ---- rates -------------------------------------------------------------------------------------


def test_rates_are_over_each_shards_own_period_and_summed(looks: Looks) -> None:
    looks.shard("s1")
    ended = [PipelineReport("lv", 30, {"ok": 20, "dropped": 10}, (0.1, 0.2))]
    looks.report(5, "s0", 0.5, pipelines=ended, in_flight={f"lv@{LV.version}": 3, "lv@older": 2})
    looks.report(9, "s1", 2.0, pipelines=[PipelineReport("lv", 20, {"ok": 20}, (0.2, 0.4))])
    seen = lv(looks.look())
    assert (seen.offered, seen.good) == (70.0, 50.0)
    assert seen.outcomes == {"ok": 50.0, "dropped": 20.0}
    assert seen.latency == (pytest.approx(0.15), pytest.approx(0.3))
    assert seen.in_flight == 5
    assert (seen.slo, seen.version, seen.policy) == (LV.slo, LV.version, LV.policy)


def test_a_stage_has_what_all_shards_say_of_it(looks: Looks) -> None:
    looks.shard("s1")
    common: dict[str, Any] = {"started": 20, "batches": 2, "queued": 0.01, "execution": 0.05}
    looks.report(1, "s0", stages=[stage(40, **common, slack=(0.01, 0.10), load_factor=0.5, order="lbf", waiting=4)])
    looks.report(1, "s1", stages=[stage(20, **common, slack=(0.02, 0.30), load_factor=1.5, order="hbf", dropped=6)])
    first = lv(looks.look()).stages[0]
    assert (first.name, first.arrived, first.started, first.dropped, first.waiting) == (FIRST, 60.0, 40.0, 6.0, 4)
    assert first.batch == 10.0
    assert first.slack == pytest.approx(0.2)
    assert (first.least_slack, first.load_factor, first.order) == (0.01, 1.5, "hbf")
    assert first.devices == 3  # those that hold it ready


def test_a_stage_that_granted_nothing_has_no_slack(looks: Looks) -> None:
    looks.report(1, stages=[stage(5)])
    first = lv(looks.look()).stages[0]
    assert first.slack is None
    assert first.least_slack is None
    assert first.batch == 0.0


def test_a_shard_that_fell_silent_counts_no_more(looks: Looks) -> None:
    looks.report(1, pipelines=[PipelineReport("lv", 30, {"ok": 30})], in_flight={f"lv@{LV.version}": 3})
    assert lv(looks.look()).offered == 30.0
    assert lv(looks.look(SILENT - 0.1)).offered == 30.0
    silent = lv(looks.look(0.1))
    assert (silent.offered, silent.in_flight) == (0.0, 0)
    looks.report(2, pipelines=[PipelineReport("lv", 20, {"ok": 20})])
    assert lv(looks.look(0.5)).offered == 20.0
    looks.gone(PATHS.report("s0"))
    assert lv(looks.look(0.5)).offered == 0.0


def test_what_is_not_seen_while_the_store_is_away_has_not_fallen_silent(looks: Looks) -> None:
    looks.report(1, pipelines=[PipelineReport("lv", 30, {"ok": 30})])
    before = looks.look()
    looks.now += 60.0
    away = looks.feed.away(looks.now, looks.unix, "nobody answers")
    assert away.stale == "nobody answers"
    assert away.pipelines == before.pipelines
    assert away.at == looks.unix
    back = looks.look(0.5)
    assert back.stale == ""
    assert lv(back).offered == 30.0


def test_how_a_pipeline_is_tuned_and_what_it_waits_for(looks: Looks) -> None:
    looks.put(PATHS.tuned("lv"), TuningRecord(0.25, 4.0, 0.75))
    seen = lv(looks.look())
    assert (seen.quantile, seen.window, seen.admission, seen.waits_for) == (0.25, 4.0, 0.75, "")
    looks.node("n1", {LV.model_key(FIRST): "failed: out of memory"})
    looks.gone(PATHS.node("n2"))
    waiting = lv(looks.look(1.0))
    assert "out of memory" in waiting.waits_for
    assert "out of memory" in waiting.stages[0].failed
    assert waiting.stages[0].devices == 0


def test_the_graph_is_told_with_its_edges() -> None:
    looks = Looks()
    looks.serve(load_spec("lv"))
    seen = lv(looks.look())
    spec = load_spec("lv")
    assert {one.name: one.inputs for one in seen.stages} == {
        name: list(dict.fromkeys(source for source, _ in one.sources())) for name, one in spec.stages.items()
    }
    assert seen.outputs == list(dict.fromkeys(source for source, _ in spec.outputs().values()))
    assert seen.stages[0].name == FIRST


# ---- history -----------------------------------------------------------------------------------


def test_history_has_one_point_a_second_and_is_bounded(looks: Looks) -> None:
    for number in range(HISTORY + 20):
        looks.report(number, pipelines=[PipelineReport("lv", number, {"ok": number, "expired": 1})])
        view = looks.look(1.0)
        looks.look()  # twice within a second
    history = lv(view).history
    assert len(history) == HISTORY
    assert [point[0] for point in history] == list(range(int(looks.unix) - HISTORY + 1, int(looks.unix) + 1))
    assert history[-1][1:] == (HISTORY + 19.0, HISTORY + 19.0, 1.0)


def test_a_second_that_was_missed_is_filled_and_a_long_absence_stays_a_gap(looks: Looks) -> None:
    looks.report(1, pipelines=[PipelineReport("lv", 10, {})])
    start = int(looks.look().at)
    seconds = [point[0] - start for point in lv(looks.look(2.0)).history]
    assert seconds == [0, 1, 2]
    seconds = [point[0] - start for point in lv(looks.look(60.0)).history]
    assert seconds == [0, 1, 2, 60, 61, 62]


def test_a_clock_that_is_set_back_begins_a_new_history(looks: Looks) -> None:
    looks.report(1, pipelines=[PipelineReport("lv", 10, {})])
    looks.look()
    looks.epoch -= 900.0
    assert [point[0] for point in lv(looks.look(1.0)).history] == [int(looks.unix)]


def test_a_pipeline_that_nobody_asks_for_has_no_history(looks: Looks) -> None:
    assert lv(looks.look()).history == []
    looks.report(1, pipelines=[PipelineReport("lv", 10, {"ok": 10})])
    assert len(lv(looks.look(1.0)).history) == 1
    looks.report(2)
    for _ in range(HISTORY + 2):
        view = looks.look(1.0)
    assert lv(view).history == []


# ---- drops -------------------------------------------------------------------------------------


def drop(request: str, ago: float = 0.0) -> DropReport:
    return DropReport(request, "lv", FIRST, "dropped", "5 ms too late", ago)


def test_drops_are_merged_with_the_newest_first_and_told_once(looks: Looks) -> None:
    looks.shard("s1")
    looks.report(1, "s0", drops=[drop("a", 0.5), drop("b", 0.1)])
    looks.report(1, "s1", drops=[drop("c", 0.3)])
    seen = looks.look().drops
    assert [one.request for one in seen] == ["b", "c", "a"]
    assert (seen[1].shard, seen[1].stage, seen[1].detail) == ("s1", FIRST, "5 ms too late")
    assert seen[0].at == pytest.approx(looks.unix - 0.1)
    assert [one.request for one in looks.look(1.0).drops] == ["b", "c", "a"]
    looks.report(1, "s0", drops=[drop("a", 0.5)])  # written again as it was
    assert len(looks.look(1.0).drops) == 3
    for number in range(2, 40):
        looks.report(number, drops=[drop(f"{number}-{one}") for one in range(10)])
        view = looks.look(1.0)
    assert len(view.drops) == 100
    assert {one.request.partition("-")[0] for one in view.drops} == {str(number) for number in range(30, 40)}


# ---- nodes and devices -------------------------------------------------------------------------


def test_what_devices_do(looks: Looks) -> None:
    looks.gauges("n1", 0.8, 0.0)
    view = looks.look()
    assert states(view) == {"n1": ["busy", "idle"], "n2": ["idle", "standby"]}
    busy = view.nodes[0].devices[0]
    assert busy == LiveDevice(
        number=0, type="T4", state="busy", utilization=0.8, models=busy.models, shard="s0", memory_mb=10, budget_mb=100
    )
    assert busy.models == [f"lv/{name}" for name in STAGES]
    # Gauges that come no more say nothing of now.
    looks.gauges("n2", 0.5, 0.0)
    assert states(looks.look(8.0)) == {"n1": ["idle", "idle"], "n2": ["busy", "standby"]}


def test_models_that_are_brought_in(looks: Looks) -> None:
    key = LV.model_key(FIRST)
    looks.node("n1", {key: "loading"}, {key: "queued"})
    looks.put(PATHS.placement("n2"), PlacementRecord({1: DevicePlacement("s0", [key])}))
    assert states(looks.look()) == {"n1": ["loading", "loading"], "n2": ["idle", "loading"]}


def test_nodes_that_are_lost_rest_or_are_emptied(looks: Looks) -> None:
    looks.look()
    looks.gone(PATHS.node("n1"))
    view = looks.look(1.0)
    assert states(view)["n1"] == ["lost", "lost"]
    node = view.nodes[0]
    assert (node.state, node.registered, node.host) == ("lost", False, "host-n1")
    assert node.devices[0].type == "T4"
    looks.put(PATHS.drain("n2"), DrainRecord("new memory"))
    view = looks.look(1.0)
    assert states(view)["n2"] == ["draining", "draining"]
    assert (view.nodes[1].drained, view.nodes[1].why) == (True, "new memory")
    looks.put(PATHS.state("n2"), NodeStateRecord("standby", "drained"))
    assert states(looks.look(1.0))["n2"] == ["standby", "standby"]
    # One of which only the leader's note is left.
    looks.put(PATHS.state("n9"), NodeStateRecord("lost", "missing", [("A100", 40_000.0)]))
    (device,) = looks.look(1.0).nodes[-1].devices
    assert (device.type, device.state, device.budget_mb) == ("A100", "lost", 40_000.0)


def test_who_is_there(looks: Looks) -> None:
    view = looks.look()
    assert (view.leader, view.coordinators, view.fixed_plan, view.missing) == ("c0", ["c0"], False, "")
    (shard,) = view.shards
    assert (shard.name, shard.in_flight, shard.ended) == ("s0", 3, {"ok": 7})
    looks.gone(PATHS.broker("s0"))
    assert "laxity broker run" in looks.look(1.0).missing


# ---- nonsense ------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-(2**60), 2**60), st.sampled_from([0, 1, 10**18]))
FLOATS = st.one_of(st.floats(), st.sampled_from([0.0, -1.0, 1e308, math.inf, -math.inf]))
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["lv", FIRST, LV.model_key(FIRST), f"lv@{LV.version}"]))


@settings(max_examples=60, deadline=None)
@given(
    report=st.builds(
        ReportRecord,
        number=NUMBERS,
        period=FLOATS,
        stages=st.lists(
            st.builds(
                StageReport, TEXTS, *[NUMBERS] * 6, FLOATS, FLOATS, st.lists(NUMBERS, max_size=3), st.just({}),
                st.just({}), st.tuples(FLOATS, FLOATS), FLOATS, TEXTS,
            ),
            max_size=2,
        ),
        in_flight=st.dictionaries(TEXTS, NUMBERS, max_size=2),
        agents=st.lists(TEXTS, max_size=2),
        pipelines=st.lists(
            st.builds(PipelineReport, TEXTS, NUMBERS, st.dictionaries(TEXTS, NUMBERS), st.tuples(FLOATS, FLOATS)),
            max_size=3,
        ),
        drops=st.lists(st.builds(DropReport, TEXTS, TEXTS, TEXTS, TEXTS, TEXTS, FLOATS), max_size=12),
    ),
    gauges=st.builds(
        NodeGaugesRecord, FLOATS, FLOATS, st.lists(st.builds(DeviceGauges, NUMBERS, FLOATS, NUMBERS, FLOATS, FLOATS))
    ),
    tuning=st.builds(TuningRecord, FLOATS, FLOATS, FLOATS),
)  # fmt: skip
def test_nonsense_makes_a_view_that_can_be_drawn(
    report: ReportRecord, gauges: NodeGaugesRecord, tuning: TuningRecord
) -> None:
    looks = Looks()
    looks.serve()
    looks.shard()
    looks.node("n1", {LV.model_key(FIRST): "ready"})
    for key, record in (
        (PATHS.report("s0"), report),
        (PATHS.gauges("n1"), gauges),
        (PATHS.tuned("lv"), tuning),
    ):
        looks.put(key, record)
    looks.put(PATHS.report("s1"), b"\xffnothing")
    for _ in range(2):
        text = msgspec.json.encode(looks.look(1.0))
        # No infinity and no NaN: JSON has neither, and they would come back as null.
        back = msgspec.json.decode(text, type=LiveView)
        assert len(back.drops) <= 100
        for pipeline in back.pipelines:
            assert pipeline.offered >= 0.0
            assert len(pipeline.stages) == len(STAGES)


def test_a_spec_that_is_no_graph_is_shown_all_the_same(looks: Looks) -> None:
    record = msgspec.json.decode(encode(PipelineRecord("v", LV)))
    record["spec"]["stages"][FIRST]["inputs"] = [STAGES[-1], "nowhere"]
    record["spec"]["output"] = "neither"
    looks.put(PATHS.pipeline("lv"), msgspec.json.encode(record))
    looks.gone(PATHS.served("lv"))
    seen = lv(looks.look())
    assert {one.name for one in seen.stages} == set(STAGES)
    assert next(one for one in seen.stages if one.name == FIRST).inputs == [STAGES[-1]]
    assert seen.outputs == []
