"""How busy an agent's devices are, and how full: published every few seconds, for people."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

from cluster.membership import Membership
from cluster.publisher import Publisher
from cluster.records import DeviceGauges, NodeGaugesRecord, encode
from cluster.store.base import Store
from nodes.device import DeviceConfig, DeviceLoad
from nodes.nvml import GpuReader

PERIOD = 2.0
"""Seconds between two publications."""
RETRY = 0.5
"""Seconds between two looks whether the agent is registered."""


class Gauges:
    """Gauges from what devices say from time to time."""

    def __init__(self, gpus: GpuReader) -> None:
        self._gpus = gpus
        self._before: dict[int, float] = {}
        self._at = 0.0

    def record(self, now: float, loads: Sequence[DeviceLoad]) -> NodeGaugesRecord:
        """The gauges over the time since the last call (``now`` is monotonic, in seconds)."""
        period = now - self._at if self._before else 0.0
        gpus = self._gpus.read()
        devices = []
        for load in loads:
            busy = load.busy - self._before.get(load.number, load.busy)
            # A batch counts when it ends, also for the time before the last look.
            utilization = min(busy / period, 1.0) if period > 0.0 else 0.0
            devices.append(
                DeviceGauges(
                    device=load.number,
                    utilization=round(utilization, 3),
                    models=load.models,
                    memory_mb=round(load.memory_mb, 1),
                    budget_mb=load.budget_mb,
                    gpu=gpus.get(load.number),
                )
            )
        self._before = {load.number: load.busy for load in loads}
        self._at = now
        return NodeGaugesRecord(at=round(time.time(), 3), period=round(period, 3), devices=devices)


def gpus_among(devices: Sequence[DeviceConfig]) -> dict[int, int]:
    """The driver's index of each NVIDIA GPU, by its number at the agent."""
    matches = ((number, re.fullmatch(r"cuda:(\d+)", device.kind)) for number, device in enumerate(devices))
    return {number: int(match[1]) for number, match in matches if match is not None}


def gauge_publisher(
    loads: Callable[[], list[DeviceLoad]], gauges: Gauges, store: Store, key: str, membership: Membership
) -> Publisher:
    """Puts the gauges under ``key``; ``loads`` asks the agent. (The driver may take its time as well.)"""

    def take() -> bytes:
        now_loads = loads()
        return encode(gauges.record(time.monotonic(), now_loads))

    return Publisher("gauges", take, store, key, membership, period=PERIOD, retry=RETRY)
