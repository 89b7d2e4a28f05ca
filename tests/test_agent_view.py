"""What an agent reads out of the store's records."""

from __future__ import annotations

import msgspec

from cluster.records import (
    BrokerRecord,
    DevicePlacement,
    FileRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    ServingRecord,
    encode,
)
from cluster.store.base import Entry
from nodes.agent import DeviceState, Work
from nodes.process import ClusterView, node_record

PATHS = Paths("test")


def entries(**records):
    """Entries by key; the names are those of :class:`Paths`' methods, the values (name, record)."""
    found = {}
    for method, (name, record) in records.items():
        key = getattr(PATHS, method)(name)
        found[key] = Entry(key, record if isinstance(record, bytes) else encode(record), 1, 1)
    return found


def test_devices_work_for_their_own_shards_on_every_version_that_is_known(echo):
    newer = msgspec.structs.replace(echo, slo=20.0)
    old, new = echo.model_key("echo"), newer.model_key("echo")
    view = ClusterView(PATHS, "a0")
    files = [FileRecord("model.onnx", "0" * 64, 1)]
    placed = PlacementRecord({0: DevicePlacement("s0", [old, new]), 2: DevicePlacement("s1", [new, "unknown@1/x"])})
    seen = entries(
        served=("echo", ServingRecord(echo.version, echo, {"s0": 1.0})),
        pipeline=("echo", PipelineRecord(newer.version, newer, files)),
        placement=("a0", placed),
    )
    expected = {
        0: Work("s0", {old: (echo, "echo"), new: (newer, "echo")}),
        2: Work("s1", {new: (newer, "echo")}),
    }
    assert view.placement(seen) == expected
    assert view.files == {old: [], new: files}
    # Gone from both, the old version is known for as long as it is placed.
    seen |= entries(served=("echo", ServingRecord(newer.version, newer, {"s0": 1.0})))
    assert view.placement(seen) == expected
    view.placement(seen | entries(placement=("a0", PlacementRecord({}))))
    assert view.placement(seen)[0] == Work("s0", {new: (newer, "echo")})


def test_others_placements_are_no_concern(echo):
    view = ClusterView(PATHS, "a1")
    placed = PlacementRecord({0: DevicePlacement("s0", [echo.model_key("echo")])})
    seen = entries(served=("echo", ServingRecord(echo.version, echo, {})), placement=("a10", placed))
    assert view.placement(seen) == {}
    assert all(PATHS.placement("a0").startswith(prefix) is False for prefix in view.prefixes())


def test_a_placement_that_cannot_be_read_changes_nothing(echo, caplog):
    view = ClusterView(PATHS, "a0")
    assert view.placement(entries(placement=("a0", b"{"))) is None
    assert "cannot be read" in caplog.text


def test_shards_are_found_by_their_records(caplog):
    view = ClusterView(PATHS, "a0")
    seen = entries(broker=("s0", BrokerRecord("tcp://h:1", "tcp://h:2", 1, "h")))
    seen |= entries(broker=("s1", b"garbage"))
    assert view.shards(seen) == {"s0": "tcp://h:2"}
    assert "cannot be read" in caplog.text


def test_an_agent_is_ready_once_each_model_is_loaded_or_given_up():
    def state(**models):
        return [DeviceState(0, "A100", 10.0, models, "", 0, 0, 0)]

    assert node_record(state(), {}).state == "ready"
    assert node_record(state(a="ready", b="failed: why"), {}).state == "ready"
    assert node_record(state(a="ready", b="loading"), {}).state == "loading"
    record = node_record(state(a="ready"), {0: {"b": "queued: fetching"}})
    assert record.state == "loading"
    assert record.devices[0].models == {"a": "ready", "b": "queued: fetching"}
