"""Gauges of devices. There is no GPU here: the driver's library is played, and only that."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from cli.device_gauges import gauge_columns
from cli.snapshot import snapshot
from cluster.membership import Follower, Membership
from cluster.records import DeviceGauges, GpuGauges, NodeGaugesRecord, Paths, decode, encode
from cluster.store.base import StoreError
from cluster.store.memory import MemoryStore
from nodes.device import DeviceConfig, DeviceLoad
from nodes.gauges import Gauges, gauge_publisher, gpus_among
from nodes.nvml import GpuReader

WAIT = 20.0


class NVMLError(Exception):
    """As the library raises it."""


class Nvml:
    """A driver with two GPUs, of which the second one does not tell its power."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self) -> None:
        self.up = True
        self.lost: set[int] = set()
        self.sessions = 0

    def nvmlInit(self) -> None:
        if not self.up:
            raise NVMLError("Driver Not Loaded")
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1
        if not self.up:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if not self.up or index in self.lost:
            raise NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=87, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=3 * 2**30, total=(80 + handle) * 2**30)

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        return {1: 1980, 2: 2619}[clock]

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 60 + handle

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle == 1:
            raise NVMLError("Not Supported")
        return 310_500


def test_the_driver_tells_each_gpu_by_its_own_index() -> None:
    devices = [DeviceConfig("cpu", "cpu"), DeviceConfig("cuda:1", "H100"), DeviceConfig("cuda:0", "H100")]
    assert gpus_among(devices) == {1: 1, 2: 0}
    reader = GpuReader(gpus_among(devices), Nvml)
    found = reader.read()
    assert found == {
        1: GpuGauges(0.87, 3072.0, 81 * 1024.0, 1980.0, 2619.0, 61.0, None),
        2: GpuGauges(0.87, 3072.0, 80 * 1024.0, 1980.0, 2619.0, 60.0, 310.5),
    }
    reader.close()


def test_a_library_that_is_not_installed_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def missing() -> Any:
        asked.append(1)
        raise ModuleNotFoundError("No module named 'pynvml'")

    reader = GpuReader({0: 0}, missing)
    assert [reader.read(), reader.read()] == [{}, {}]
    assert len(asked) == 1
    assert [record.getMessage().endswith("pip install 'laxity[gpu]'") for record in caplog.records] == [True]


def test_hosts_without_gpus_do_not_ask_for_the_library() -> None:
    def load() -> Any:
        raise AssertionError

    assert GpuReader({}, load).read() == {}


def test_a_driver_that_fails_is_told_once_and_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "laxity.node")
    nvml = Nvml()
    nvml.up = False
    reader = GpuReader({0: 0, 1: 1}, lambda: nvml)
    assert [reader.read(), reader.read()] == [{}, {}]
    assert len(caplog.records) == 1
    nvml.up = True
    assert reader.read().keys() == {0, 1}
    nvml.lost.add(1)
    assert [reader.read().keys(), reader.read().keys()] == [{0}, {0}]
    nvml.lost.clear()
    assert reader.read().keys() == {0, 1}
    nvml.up = False
    assert reader.read() == {}
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO", "WARNING", "INFO", "WARNING"]
    reader.close()
    assert nvml.sessions == 0


def test_utilization_is_what_was_executed_since_the_last_look() -> None:
    gauges = Gauges(GpuReader({1: 0}, Nvml))

    def look(now: float, *busy: float) -> list[float]:
        loads = [DeviceLoad(number, seconds, 2, 100.04, 500.0) for number, seconds in enumerate(busy)]
        record = gauges.record(now, loads)
        assert [device.gpu is not None for device in record.devices] == [False, True]
        assert record.devices[0] == DeviceGauges(0, record.devices[0].utilization, 2, 100.0, 500.0)
        return [device.utilization for device in record.devices]

    assert look(100.0, 7.0, 0.0) == [0.0, 0.0]
    assert look(105.0, 9.0, 0.0) == [0.4, 0.0]
    assert look(110.0, 9.0, 30.0) == [0.0, 1.0]


def test_gauges_lie_under_the_lease_of_the_agent() -> None:
    store, paths = MemoryStore(), Paths("c")
    membership = Membership(store, paths.node("a"))
    membership.publish(b"{}")
    loads = [DeviceLoad(0, 1.0, 1, 10.0, 0.0)]
    publisher = gauge_publisher(lambda: loads, Gauges(GpuReader({})), store, paths.gauges("a"), membership)
    publisher.start()
    try:
        assert store.get(paths.gauges("a")) is None
        membership.beat(0.0)
        ends = time.monotonic() + WAIT
        while store.get(paths.gauges("a")) is None:
            assert time.monotonic() < ends
            time.sleep(0.02)
    finally:
        publisher.stop()
    entry = store.get(paths.gauges("a"))
    assert entry is not None
    assert entry.lease == membership.lease
    assert decode(NodeGaugesRecord, entry.key, entry.value).devices == [DeviceGauges(0, 0.0, 1, 10.0, 0.0)]
    membership.leave()
    assert store.get(paths.gauges("a")) is None


def test_a_store_that_is_away_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Away(MemoryStore):
        def put(self, key: str, value: bytes, lease: int = 0) -> int:
            raise StoreError("it cannot be reached")

    store = Away()
    membership = Membership(store, "/laxity/c/nodes/a")
    publisher = gauge_publisher(list, Gauges(GpuReader({})), store, "/laxity/c/metrics/a", membership)
    publisher._put(b"1", 1)
    publisher._put(b"2", 1)
    assert len(caplog.records) == 1


def test_who_decides_watches_every_record_but_the_gauges() -> None:
    paths = Paths("c")
    watched = paths.decided_by()
    keys = [
        paths.pipeline("p"), paths.broker("s"), paths.node("a"), paths.placement("a"), paths.coordinator("x"),
        paths.served("p"), paths.state("a"), paths.drain("a"), paths.tuned("p"), paths.report("s"), paths.leader,
    ]  # fmt: skip
    assert all(key.startswith(watched) for key in keys)
    assert not paths.gauges("a").startswith(watched)
    store = MemoryStore()
    follower = Follower(store, watched)
    assert follower.poll(0.0)
    store.put(paths.gauges("a"), b"{}")
    assert not follower.poll(0.0)
    store.put(paths.node("a"), b"{}")
    assert follower.poll(0.0)
    follower.close()


def test_nodes_are_listed_with_the_gauges_that_are_known() -> None:
    store, paths = MemoryStore(), Paths("c")
    gpu = GpuGauges(0.9, 3000.0, 80_000.0, 1980.0, None, 61.0, 300.0)
    hot = msgspec.structs.replace(gpu, temperature_c=75.0, sm_clock_mhz=1200.0)
    devices = [DeviceGauges(0, 0.5, 2, 1200.0, 0.0, gpu), DeviceGauges(1, 0.7, 1, 0.0, 0.0, hot)]
    store.put(paths.gauges("a"), encode(NodeGaugesRecord(1.0, 5.0, devices)))
    seen = snapshot(paths, store.list(paths.root).entries)
    node = {"gauges": msgspec.to_builtins(seen.gauges["a"])}
    bare: dict[str, Any] = {"gauges": None}

    def shown(full: bool, *nodes: dict[str, Any]) -> dict[str, list[str]]:
        return {head: [cell(one) for one in nodes] for head, cell in gauge_columns(list(nodes), full)}

    assert shown(False, node, bare) == {"busy": ["60 %", ""], "memory MB": ["1,200", ""]}
    assert shown(True, bare) == {}
    assert shown(True, node) == {
        "busy": ["60 %"],
        "memory MB": ["1,200"],
        "GPU busy": ["90 %"],
        "GPU memory MB": ["6,000 of 160,000"],
        "clocks MHz": ["1,200"],
        "°C": ["75"],
        "W": ["600"],
    }
