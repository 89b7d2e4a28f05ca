"""What is measured of models: kept in the store, used by those who hold them later, mended where it does not hold."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.control import Control
from cluster.coordinator.presence import Presence
from cluster.coordinator.view import Records, view_of
from cluster.decoded import Decoded
from cluster.observe.sidecar import Beginning, Sidecar
from cluster.planner.costs import Costs
from cluster.records import (
    READY,
    DevicePlacement,
    NodeRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    ProfileRecord,
    ServingRecord,
    decode,
    encode,
)
from cluster.store import open_store, sqlite_url
from cluster.store.base import Entry, Store
from cluster.tuning.report import ReportRecord, StageReport
from nodes.agent import AgentConfig
from nodes.device import DeviceConfig
from nodes.known_profiles import KnownProfiles
from nodes.measured import Measured
from nodes.process import run_agent_process
from nodes.remeasure import BATCHES, PAUSE, Remeasure
from pipelines import PipelineSpec, Profile, StageSpec, load_spec

PATHS = Paths("test")
MEASURED = Measured([(1, 0.010), (8, 0.080)], 0.5, 120.0)
MODEL = "p@1/s"


def entry(key: str, record: msgspec.Struct, revision: int = 1) -> Entry:
    return Entry(key, encode(record), revision, revision)


# ---- records -----------------------------------------------------------------------------


@pytest.mark.parametrize("device_type", ["cpu", "NVIDIA H100 80GB HBM3", "odd/type~%2F"])
def test_the_key_of_a_profile_says_what_it_is_of(device_type: str) -> None:
    key = PATHS.profile("ocr@0a1b/detect", device_type)
    assert key.startswith("/laxity/test/profiles/ocr@0a1b~detect/")
    assert key.count("/") == 5
    assert PATHS.profiled(key) == ("ocr@0a1b/detect", device_type)


def spec_of(**stages: StageSpec) -> PipelineSpec:
    return PipelineSpec(name="p", slo=1.0, stages=stages, output=next(iter(stages)))


def test_planners_go_by_what_was_measured_where_a_spec_does_not_say() -> None:
    spec = spec_of(
        s=StageSpec(executor="python", model="m:f"),
        t=StageSpec(executor="python", model="m:f", profile=Profile(alpha_ms=1, beta_ms=0, load_ms=7, memory_mb=9)),
    )
    found = ProfileRecord([(1, 0.010), (8, 0.020)], 0.25, 300.0, "h")
    records = [
        entry(PATHS.pipeline("p"), PipelineRecord(spec.version, spec)),
        entry(PATHS.profile(spec.model_key("s"), "T4"), found),
        entry(PATHS.profile(spec.model_key("t"), "T4"), found),
        entry(PATHS.profile("gone@1/s", "T4"), msgspec.structs.replace(found, profile=[])),
    ]
    decoded = Decoded()
    decoded.update({record.key: record for record in records})
    presence = Presence(5.0, 0.0)
    stage = StageReport(spec.model_key("t"), 0, 0, 0, 0, 0, 0, 0.0, 0.0, [], {"T4": [(1, 0.5)]})
    reports = {"s0": ReportRecord(1, 1.0, [stage], {}, [])}
    view = view_of(0.0, Records(PATHS, decoded), reports, presence, presence, 0.0)
    assert view.profiles == {
        (spec.model_key("s"), "T4"): found.profile,
        (spec.model_key("t"), "T4"): [(1, 0.5), (8, pytest.approx(1.0))],  # all takes 50 times as long
    }
    costs = Costs(2.0).of(spec, frozenset({"T4", "A100"}), view.profiles, view.footprints)
    assert (costs["s", "T4"].load, costs["s", "T4"].page, costs["s", "T4"].memory) == (2.0, 0.25, 300.0)
    assert costs["t", "T4"].page == 0.007
    assert (costs["s", "A100"].load, costs["s", "A100"].memory) == (2.0, 0.0)
    assert (costs["t", "T4"].load, costs["t", "T4"].memory) == (0.007, 9.0)
    assert costs["s", "T4"].latency(8) == pytest.approx(0.020)
    assert costs["t", "T4"].latency(1) == pytest.approx(0.5)


# ---- in the store ------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(sqlite_url(tmp_path / "store.db"))
    yield opened
    opened.close()


def entries(store: Store) -> dict[str, Entry]:
    return {found.key: found for found in store.list(PATHS.root).entries}


def test_what_one_agent_measured_another_one_knows(store: Store) -> None:
    one = KnownProfiles(store, PATHS, "host-1", {"cpu"})
    other = KnownProfiles(store, PATHS, "host-2", {"cpu", "T4"})
    one.measured(MODEL, "cpu", MEASURED)
    one.measured(MODEL, "emulated", MEASURED)
    assert other.news(entries(store)) == {}
    one.write()
    assert list(entries(store)) == [PATHS.profile(MODEL, "cpu")]
    assert other.news(entries(store)) == {(MODEL, "cpu"): MEASURED}
    assert other.news(entries(store)) == {}, "told once"
    slower = msgspec.structs.replace(MEASURED, profile=[(1, 0.020)])
    other.measured(MODEL, "cpu", slower)
    other.write()
    assert one.news(entries(store)) == {(MODEL, "cpu"): slower}
    (record,) = entries(store).values()
    assert decode(ProfileRecord, record.key, record.value).measured_at_host == "host-2"
    assert KnownProfiles(store, PATHS, "host-3", {"T4"}).news(entries(store)) == {}


def test_what_cannot_be_written_is_written_later(tmp_path: Path, store: Store) -> None:
    away = open_store(sqlite_url(tmp_path / "store.db"))
    away.close()
    profiles = KnownProfiles(away, PATHS, "h", {"cpu"})
    profiles.measured(MODEL, "cpu", MEASURED)
    profiles.write()
    profiles._store = store
    profiles.write()
    assert list(entries(store)) == [PATHS.profile(MODEL, "cpu")]


BAD_RECORDS = [
    '{"profile": [[0, 0.1]], "load_seconds": 0.1, "memory_mb": 1.0, "measured_at_host": "h"}',
    '{"profile": [[1, -0.1]], "load_seconds": 0.1, "memory_mb": 1.0, "measured_at_host": "h"}',
    '{"profile": [[1, null]], "load_seconds": 0.1, "memory_mb": 1.0, "measured_at_host": "h"}',
    '{"profile": [[1, 0.1]], "load_seconds": -0.1, "memory_mb": 1.0, "measured_at_host": "h"}',
    '{"profile": [[1, 0.1]], "load_seconds": 0.1, "memory_mb": -1.0, "measured_at_host": "h"}',
]


@pytest.mark.parametrize("value", BAD_RECORDS)
def test_a_record_without_sense_is_left_out_and_said_once(
    store: Store, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = PATHS.profile(MODEL, "cpu")
    found = {key: Entry(key, value.encode(), 1, 1)}
    profiles = KnownProfiles(store, PATHS, "h", {"cpu"})
    assert profiles.news(found) == {}
    assert profiles.news(found) == {}
    assert [key in record.message for record in caplog.records] == [True]
    decoded = Decoded()
    decoded.update(found)
    presence = Presence(5.0, 0.0)
    view = view_of(0.0, Records(PATHS, decoded), {}, presence, presence, 0.0)
    assert (view.profiles, view.footprints) == ({}, {})
    good = {key: Entry(key, encode(ProfileRecord([(1, 0.1)], 0.1, 1.0, "h")), 1, 2)}
    assert profiles.news(good) == {(MODEL, "cpu"): Measured([(1, 0.1)], 0.1, 1.0)}


@pytest.mark.parametrize(
    "measured",
    [Measured([(1, 0.1)], 0.5, float("nan")), Measured([(1, float("inf"))], 0.5, 1.0), Measured([(0, 0.1)], 0.5, 1.0)],
)
def test_a_measurement_without_sense_is_not_written(store: Store, measured: Measured) -> None:
    """A model states its own memory, which may be anything."""
    profiles = KnownProfiles(store, PATHS, "h", {"cpu"})
    profiles.measured(MODEL, "cpu", measured)
    profiles.measured("q@1/s", "cpu", MEASURED)
    profiles.write()
    assert list(entries(store)) == [PATHS.profile("q@1/s", "cpu")]


# ---- while they serve --------------------------------------------------------------------


def test_a_profile_is_mended_where_batch_after_batch_takes_another_time() -> None:
    meter = Remeasure()
    for number in range(BATCHES - 1):
        assert meter.note(float(number), MODEL, 1 + number % 8, 0.013 * (1 + number % 8), MEASURED) is None
    mended = meter.note(60.0, MODEL, 4, 0.052, MEASURED)
    assert mended is not None
    assert mended.profile == [(1, pytest.approx(0.013)), (8, pytest.approx(0.104))]
    assert (mended.load_seconds, mended.memory_mb) == (0.5, 120.0)
    for number in range(2 * BATCHES):
        assert meter.note(61.0 + number, MODEL, 1, 0.013, mended) is None
    # Another host finds it otherwise: not to and fro all the time.
    told = [meter.note(170.0 + number, MODEL, 1, 0.013, MEASURED) for number in range(2 * BATCHES)]
    assert not any(told)
    assert meter.note(60.0 + PAUSE, MODEL, 1, 0.013, MEASURED) is not None


@pytest.mark.parametrize("ratios", [[1.19], [0.81], [1.0, 1.0, 5.0], [0.5, 1.5]])
def test_a_profile_that_holds_in_the_middle_stays(ratios: list[float]) -> None:
    meter = Remeasure()
    for number in range(4 * BATCHES + 1):
        assert meter.note(float(number), MODEL, 2, 0.020 * ratios[number % len(ratios)], MEASURED) is None


def test_without_a_profile_there_is_nothing_to_mend() -> None:
    meter = Remeasure()
    for nothing in (Measured([], 0.0, 0.0), Measured([(1, 0.0)], 0.0, 0.0)):
        for number in range(2 * BATCHES):
            assert meter.note(float(number), MODEL, 1, 0.020, nothing) is None


# ---- agents ------------------------------------------------------------------------------


CODE = """
import os
def model(batch):
    with open(os.path.join(os.path.dirname(__file__), f"{os.getpid()}.ran"), "a") as file:
        file.write(f"{len(batch)} ")
    return batch
def sample():
    return "x"
"""
SPEC = """
name: counted
slo: 5s
stages: {s: {executor: python, model: "counted:model", sample: "counted:sample", max_batch: 4}}
output: s
"""


class RunningAgent:
    """An agent as its process runs it, with one CPU device, in a thread."""

    def __init__(self, url: str, name: str, cache: Path) -> None:
        config = AgentConfig(name=name, devices=[DeviceConfig("cpu", "cpu")], cache=str(cache))
        self._control: Control[AgentConfig] = Control()
        sidecar = Sidecar("", "", [], Beginning("agent", name, ""))
        self._thread = threading.Thread(target=run_agent_process, args=(config, url, "test", self._control, sidecar))
        self._thread.start()

    def close(self) -> None:
        self._control.ask_stop()
        self._thread.join()


def test_a_second_node_of_a_type_measures_nothing(tmp_path: Path, store: Store, cluster: Any) -> None:
    (tmp_path / "counted.py").write_text(CODE)
    (tmp_path / "counted.yaml").write_text(SPEC)
    spec = load_spec(tmp_path / "counted.yaml")
    model = spec.model_key("s")
    url = sqlite_url(tmp_path / "store.db")
    store.put(PATHS.pipeline("counted"), encode(PipelineRecord(spec.version, spec)))
    store.put(PATHS.served("counted"), encode(ServingRecord(spec.version, spec, {"s0": 1.0})))

    def ran() -> dict[str, list[int]]:
        return {path.name: [int(size) for size in path.read_text().split()] for path in tmp_path.glob("*.ran")}

    def holds(agent: str) -> bool:
        found = store.get(PATHS.node(agent))
        if found is None:
            return False
        (device,) = decode(NodeRecord, found.key, found.value).devices
        return device.models.get(model) == READY

    for agent in ("a0", "a1"):
        store.put(PATHS.placement(agent), encode(PlacementRecord({0: DevicePlacement("s0", [model])})))
    first = RunningAgent(url, "a0", tmp_path / "cache")
    try:
        cluster.eventually(
            lambda: store.get(PATHS.profile(model, "cpu")) is not None, "the first one's profile is in the store"
        )
        before = ran()
        assert [sorted(set(sizes)) for sizes in before.values()] == [[1, 2, 4]]
        found = store.get(PATHS.profile(model, "cpu"))
        assert found is not None
        assert [size for size, _ in decode(ProfileRecord, found.key, found.value).profile] == [1, 2, 4]
        second = RunningAgent(url, "a1", tmp_path / "cache")
        try:
            cluster.eventually(lambda: holds("a1"), "the second one holds the model")
        finally:
            second.close()
        # One before loading is timed, and those that warm it up.
        assert [sizes for name, sizes in ran().items() if name not in before] == [[1, 1, 4]], "it only warms up"
    finally:
        first.close()
