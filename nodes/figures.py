"""What an agent counts, as it is handed to the one that speaks HTTP for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from cluster.observe.families import AGENT
from cluster.observe.figures import Figures, Sample
from cluster.observe.trace import TraceRecord
from cluster.records import GpuGauges
from nodes.agent import AgentCounts
from nodes.device import DeviceCounts
from nodes.nvml import MB, GpuReader


class AgentSource:
    """A :class:`~cluster.observe.source.Source`. ``counts`` asks the agent, ``waits_for`` says why it does not serve
    ('': it does)."""

    def __init__(
        self, name: str, counts: Callable[[], AgentCounts], gpus: GpuReader, waits_for: Callable[[], str]
    ) -> None:
        self._name = name
        self._counts = counts
        self._gpus = gpus
        self._waits_for = waits_for
        self._started_at = time.time()

    def figures(self) -> Figures:
        """All families of an agent."""
        counts = self._counts()
        samples: dict[str, list[Sample]] = {family.name: [] for family in AGENT}
        samples["laxity_node_shards"].append(([self._name], counts.shards))
        samples["laxity_node_shard_reconnects"].append(([self._name], counts.reconnects))
        samples["laxity_node_heartbeats"].append(([self._name], counts.heartbeats))
        for device in counts.devices:
            _device(samples, [self._name, str(device.load.number)], device)
        for number, gauges in self._gpus.read().items():
            _gpu(samples, [self._name, str(number)], gauges)
        return Figures("agent", self._name, os.getpid(), self._started_at, self._waits_for(), samples)

    def trace(self, request: str) -> TraceRecord | None:
        """Agents keep none."""
        return None

    def traces(self, after: int, limit: int) -> tuple[int, list[TraceRecord]]:
        """Agents keep none."""
        return after, []


def _device(samples: dict[str, list[Sample]], labels: list[str], counts: DeviceCounts) -> None:
    load = counts.load
    samples["laxity_device_busy_seconds"].append((labels, load.busy))
    samples["laxity_device_models_resident"].append((labels, load.models))
    samples["laxity_device_memory_bytes"].append((labels, load.memory_mb * MB))
    samples["laxity_device_memory_budget_bytes"].append((labels, load.budget_mb * MB))
    for (kind, code), count in counts.actions.items():
        samples["laxity_device_actions"].append(([*labels, kind, code], count))
    samples["laxity_device_worker_deaths"].append((labels, counts.worker_deaths))
    samples["laxity_device_load_seconds"].append((labels, counts.loads))


def _gpu(samples: dict[str, list[Sample]], labels: list[str], gauges: GpuGauges) -> None:
    """What the driver does not say is left out."""
    memory = gauges.memory_used_mb
    for family, value in (
        ("laxity_gpu_utilization_ratio", gauges.utilization),
        ("laxity_gpu_memory_used_bytes", None if memory is None else memory * MB),
        ("laxity_gpu_temperature_celsius", gauges.temperature_c),
        ("laxity_gpu_power_watts", gauges.power_w),
    ):
        if value is not None:
            samples[family].append((labels, value))
