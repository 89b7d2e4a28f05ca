"""The coordinator's parts without a store: who is missing, what is to be written, which machines are told what."""

from __future__ import annotations

import sys

import pytest

from cluster.coordinator.changes import changes, tuning_changes
from cluster.coordinator.presence import Presence
from cluster.coordinator.provider import FIRST_RETRY, Order, Provider, ProviderEngine, ProviderError, parse_command
from cluster.coordinator.view import Records, arrival_rates, view_of
from cluster.decoded import Decoded
from cluster.planner.view import Placed, Plan, Served
from cluster.records import (
    BrokerRecord,
    DevicePlacement,
    DeviceRecord,
    DrainRecord,
    NodeRecord,
    NodeStateRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    ServingRecord,
    TuningRecord,
    encode,
)
from cluster.store.base import Delete, Entry, Put
from cluster.tuning.report import ReportRecord, StageReport
from pipelines.load import parse_spec

PATHS = Paths("c")
TTL = 5.0


def spec_of(name="one", slo="1s"):
    return parse_spec(
        f"{{name: {name}, slo: {slo}, output: a, "
        "stages: {a: {executor: emulated, profile: {alpha_ms: 1, beta_ms: 2}}}}",
        file="x.yaml",
        root="",
    )


def records_of(**records):
    """Records by key, as they would be read from a store."""
    decoded = Decoded()
    decoded.update({key: Entry(key, encode(record), 1, 1) for key, record in records.items()})
    return Records(PATHS, decoded)


def node(*models, state="ready"):
    devices = [DeviceRecord(number, "A100", {model: state}) for number, model in enumerate(models)]
    return NodeRecord(1, "host", "ready", devices)


def view(records, reports=None, now=100.0, nodes=None, shards=None):
    presence = Presence(TTL, 0.0)
    return view_of(now, records, reports or {}, nodes or presence, shards or presence, 1.0)


# ---- presence ---------------------------------------------------------------------------------------


def test_nobody_is_missing_until_one_ttl_has_passed():
    presence = Presence(TTL, 100.0)
    presence.update(104.9, {"a"}, set())
    assert presence.missing(104.9, "a") == 0.0
    presence.update(105.0, {"a"}, set())
    assert 0.0 < presence.missing(105.0, "a") < 1e-6
    assert presence.missing(107.0, "a") == 2.0


def test_who_comes_back_is_no_longer_missing():
    presence = Presence(TTL, 0.0)
    presence.update(10.0, {"a", "b"}, {"b"})
    presence.update(12.0, {"a", "b"}, {"a"})
    assert presence.missing(13.0, "a") == 0.0
    assert presence.missing(13.0, "b") == 1.0


def test_an_outage_of_the_store_makes_nobody_missing():
    presence = Presence(TTL, 0.0)
    presence.update(10.0, {"a"}, set())
    presence.outage_ended(50.0)
    presence.update(54.0, {"a"}, set())
    assert presence.missing(54.0, "a") == 0.0
    presence.update(55.0, {"a"}, set())
    assert presence.missing(56.0, "a") == 1.0


def test_a_machine_that_boots_has_time():
    presence = Presence(TTL, 0.0)
    presence.update(10.0, {"a"}, set())
    presence.expect("a", 300.0)
    assert presence.missing(200.0, "a") < 1e-6
    assert presence.missing(301.0, "a") == 291.0


def test_who_came_and_went_again_is_missing_at_once():
    presence = Presence(TTL, 0.0)
    presence.expect("a", 300.0)
    presence.update(50.0, {"a"}, {"a"})
    presence.update(60.0, {"a"}, set())
    assert presence.missing(65.0, "a") == 5.0


# ---- the view ---------------------------------------------------------------------------------------


def test_a_registered_node_shows_what_it_holds():
    spec = spec_of()
    model = spec.model_key("a")
    record = NodeRecord(1, "h", "ready", [DeviceRecord(0, "A100", {model: "ready", "x": "failed: no"}, "", 80.0)])
    found = view(records_of(**{PATHS.node("n"): record, PATHS.drain("n"): DrainRecord()}))
    device = found.nodes["n"].devices[0]
    assert (device.type, device.memory_mb, device.ready, device.failed) == ("A100", 80.0, {model}, {"x"})
    assert found.nodes["n"].drained
    assert found.nodes["n"].missing == 0.0


def test_a_missing_node_is_known_by_its_state():
    placed = PlacementRecord({0: DevicePlacement("s0", ["m"])})
    records = records_of(
        **{PATHS.state("n"): NodeStateRecord("active", "", [("A100", 80.0)]), PATHS.placement("n"): placed}
    )
    present = view(records).nodes["n"]
    assert (present.missing, present.devices[0].ready) == (0.0, {"m"})  # not settled: taken to be there
    presence = Presence(TTL, 0.0)
    presence.update(10.0, {"n"}, set())
    gone = view(records, now=13.0, nodes=presence).nodes["n"]
    assert (gone.missing, gone.devices[0].ready, gone.devices[0].type) == (3.0, set(), "A100")


def test_a_shard_counts_until_it_has_been_missing_too_long():
    spec = spec_of()
    records = records_of(
        **{
            PATHS.broker("s1"): BrokerRecord("tcp://a:1", "tcp://a:2", 1, "h"),
            PATHS.served("one"): ServingRecord(spec.version, spec, {"s0": 0.5, "s1": 0.5}),
        }
    )
    shards = Presence(TTL, 0.0)
    shards.update(10.0, {"s0", "s1"}, {"s1"})
    assert view(records, now=10.5, shards=shards).shards == ["s0", "s1"]
    assert view(records, now=12.0, shards=shards).shards == ["s1"]


def report(in_flight=None, **arrived):
    stages = [StageReport(m, n, 0, 0, 0, 0, 1, 0.0, 0.0, [], {"A100": [(1, 0.003)]}) for m, n in arrived.items()]
    return ReportRecord(1, 0.5, stages, in_flight or {}, ["n"])


def test_rates_are_summed_over_shards_and_divided_by_the_period():
    assert arrival_rates({"s0": report(a=10, b=3), "s1": report(a=5)}) == {"a": 30.0, "b": 6.0}


def test_a_version_that_a_shard_still_names_is_in_flight_unless_it_is_the_served_one():
    spec = spec_of()
    served = f"one@{spec.version}"
    records = records_of(**{PATHS.served("one"): ServingRecord(spec.version, spec, {"s0": 1.0})})
    found = view(records, {"s0": report({served: 0, "one@old": 0}), "s1": report({served: 4, "one@old": 2})})
    assert found.in_flight == {(served, "s0"): 0, (served, "s1"): 4, ("one@old", "s0"): 1, ("one@old", "s1"): 2}
    assert found.profiles == {}


def test_of_a_shard_that_does_not_report_every_version_is_taken_to_be_in_flight():
    spec = spec_of()
    records = records_of(
        **{
            PATHS.broker("s0"): BrokerRecord("tcp://a:1", "tcp://a:2", 1, "h"),
            PATHS.placement("n"): PlacementRecord({0: DevicePlacement("s0", ["one@old/a"])}),
            PATHS.served("one"): ServingRecord(spec.version, spec, {"s0": 1.0}),
        }
    )
    assert view(records).in_flight == {("one@old", "s0"): 1}


# ---- what is written --------------------------------------------------------------------------------


def plan(placement=None, serving=None, states=None):
    return Plan(placement or {}, serving or {}, states or {}, {}, {}, [], 0.0)


def test_only_what_differs_is_written_devices_before_what_is_served():
    spec = spec_of()
    model = spec.model_key("a")
    records = records_of(
        **{
            PATHS.pipeline("one"): PipelineRecord(spec.version, spec),
            PATHS.node("n"): node(model),
            PATHS.placement("kept"): PlacementRecord({0: DevicePlacement("s0", [model])}),
            PATHS.placement("emptied"): PlacementRecord({0: DevicePlacement("s0", [model])}),
        }
    )
    placed = Placed("s0", frozenset([model]))
    found = changes(
        PATHS,
        records,
        plan({("n", 0): placed, ("kept", 0): placed}, {"one": Served(spec, {"s0": 1.0})}, {"n": ("active", "new")}),
    )
    assert found == [
        Put(PATHS.placement("emptied"), encode(PlacementRecord({}))),
        Put(PATHS.placement("n"), encode(PlacementRecord({0: DevicePlacement("s0", [model])}))),
        Put(PATHS.served("one"), encode(ServingRecord(spec.version, spec, {"s0": 1.0}))),
        Put(PATHS.state("n"), encode(NodeStateRecord("active", "new", [("A100", 0.0)]))),
    ]


def test_what_is_served_no_more_is_taken_away_with_its_tuning():
    spec = spec_of()
    records = records_of(**{PATHS.served("one"): ServingRecord(spec.version, spec, {"s0": 1.0})})
    assert changes(PATHS, records, plan()) == [Delete(PATHS.served("one")), Delete(PATHS.tuned("one"))]


def test_tuning_is_written_when_it_changes_or_is_to_be_renewed():
    before = {"one": TuningRecord(0.1, 5.0, 1.0, {"a": 0.010})}
    alike = {"one": TuningRecord(0.1, 5.05, 1.0, {"a": 0.01005})}
    other = {"one": TuningRecord(0.1, 3.0, 1.0, {"a": 0.010})}
    assert tuning_changes(PATHS, before, alike, renew=False) == []
    assert len(tuning_changes(PATHS, before, alike, renew=True)) == 1
    assert len(tuning_changes(PATHS, before, other, renew=False)) == 1
    assert len(tuning_changes(PATHS, {}, alike, renew=False)) == 1


# ---- machines ---------------------------------------------------------------------------------------


def test_a_machine_is_told_once_and_again_with_growing_pauses():
    engine = ProviderEngine()
    order = Order("a", True)
    assert engine.due(0.0, {"a": True}, {}) == [order]
    assert engine.due(FIRST_RETRY - 1, {"a": True}, {}) == []
    assert engine.due(FIRST_RETRY, {"a": True}, {}) == [order]
    assert engine.due(3 * FIRST_RETRY - 1, {"a": True}, {}) == []
    assert engine.due(3 * FIRST_RETRY, {"a": True}, {}) == [order]
    assert engine.due(900.0, {"a": True}, {"a": True}) == []
    assert engine.due(901.0, {"a": False}, {"a": True}) == [Order("a", False)]


def test_commands_are_run_without_a_shell(tmp_path):
    script = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    done = tmp_path / "done"
    provider = Provider(f"{sys.executable} -c '{script}' {done} 'up {{node}}; rm -rf'", "")
    provider.step(0.0, {"n1": True, "n2": False}, {"n1": False, "n2": True})
    provider.wait()
    assert done.read_text() == "up n1; rm -rf"


@pytest.mark.parametrize(("command", "why"), [("power on", "names no machine"), ("power 'on {node}", "cannot be read")])
def test_a_command_that_cannot_be_meant_is_refused(command, why):
    with pytest.raises(ProviderError, match=why):
        parse_command(command)
