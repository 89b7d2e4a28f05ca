"""What lies in the store, and under which key."""

import pytest

from cluster.records import (
    BrokerRecord,
    DevicePlacement,
    DeviceRecord,
    NodeRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    RecordError,
    decode,
    encode,
    failure,
    name_of,
)
from pipelines.spec import PipelineSpec, Profile, StageSpec

SPEC = PipelineSpec(
    name="two",
    slo=0.4,
    stages={
        "first": StageSpec(executor="emulated", profile=Profile(alpha_ms=1.0, beta_ms=2.0)),
        "second": StageSpec(executor="emulated", inputs=["first"], profile=Profile(latency_ms={1: 3.0, 8: 9.5})),
    },
    output="second",
)


def test_every_record_survives_the_store() -> None:
    pipeline = PipelineRecord(SPEC.version, SPEC)
    again = decode(PipelineRecord, "k", encode(pipeline))
    assert again == pipeline
    assert again.spec.version == SPEC.version
    broker = BrokerRecord("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", 7, "host")
    assert decode(BrokerRecord, "k", encode(broker)) == broker
    node = NodeRecord(7, "host", "loading", [DeviceRecord(0, "cpu", {"two@1/first": "queued"}, "batch 8")])
    assert decode(NodeRecord, "k", encode(node)) == node
    placement = PlacementRecord({0: DevicePlacement("shard-0", ["two@1/first"]), 3: DevicePlacement("", [])})
    assert decode(PlacementRecord, "k", encode(placement)) == placement


@pytest.mark.parametrize("value", [b"", b"\xff", b"{}", b'{"devices": {"x": []}}', b"[1]"])
def test_a_broken_record_is_named(value: bytes) -> None:
    with pytest.raises(RecordError, match="the record at /laxity/c/placement/a cannot be read"):
        decode(PlacementRecord, "/laxity/c/placement/a", value)


def test_keys() -> None:
    paths = Paths("demo")
    assert paths.pipeline("ocr") == "/laxity/demo/pipelines/ocr"
    assert paths.broker("s0") == "/laxity/demo/brokers/s0"
    assert paths.node("a-1") == "/laxity/demo/nodes/a-1"
    assert paths.placement("a-1") == "/laxity/demo/placement/a-1"
    assert paths.node("a-1").startswith(paths.nodes)
    assert name_of(paths.node("a-1")) == "a-1"


@pytest.mark.parametrize("name", ["", "a/b", "../x", " ", "a\n", "x" * 64, "-a"])
def test_a_name_that_would_leave_its_place_is_refused(name: str) -> None:
    with pytest.raises(RecordError, match="cannot name a"):
        Paths(name)
    with pytest.raises(RecordError, match="cannot name a"):
        Paths("demo").node(name)


def test_a_failed_model_says_why() -> None:
    assert failure("failed: no such file: m.onnx") == "no such file: m.onnx"
    assert failure("failed") == "no reason given"
    assert failure("ready") is None
