"""How busy an agent's devices are, and how full: published every few seconds, for people."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Sequence

from cluster.membership import Membership
from cluster.records import DeviceGauges, NodeGaugesRecord, encode
from cluster.store.base import LeaseEndedError, Store, StoreError
from nodes.device import DeviceConfig, DeviceLoad
from nodes.nvml import GpuReader

log = logging.getLogger("laxity.node")

PERIOD = 5.0
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


class GaugePublisher:
    """Puts the gauges under ``key``, under the lease of the agent's ``membership``; ``loads`` asks the agent.

    In a thread of its own: the store and the driver may take their time, and neither batches nor the lease wait.
    """

    def __init__(
        self, loads: Callable[[], list[DeviceLoad]], gauges: Gauges, store: Store, key: str, membership: Membership
    ) -> None:
        self._loads = loads
        self._gauges = gauges
        self._store = store
        self._key = key
        self._membership = membership
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gauges")
        self._away = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a put that is under way is waited for."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        delay = 0.0
        while not self._stopping.wait(delay):
            lease = self._membership.lease
            if not lease:  # the agent is not registered yet, or no more
                delay = RETRY
                continue
            delay = PERIOD
            try:
                loads = self._loads()
            except (RuntimeError, TimeoutError) as error:
                log.debug("no gauges: %s", error)
                continue
            self._put(encode(self._gauges.record(time.monotonic(), loads)), lease)

    def _put(self, value: bytes, lease: int) -> None:
        try:
            self._store.put(self._key, value, lease)
        except LeaseEndedError:
            pass  # there will be another
        except StoreError as error:
            if not self._away:
                self._away = True
                log.warning("the devices' gauges cannot be written at present: %s", error)
        else:
            if self._away:
                self._away = False
                log.info("the devices' gauges are written again")
