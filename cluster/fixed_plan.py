"""Which shard gets which devices, where the plan is fixed: pure functions over a layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from cluster.layout import AgentLayout
from cluster.records import DevicePlacement

Device = tuple[str, int, list[str]]
"""An agent, a device's number there, and the model keys that it holds."""


class ShardedLayout(msgspec.Struct, frozen=True):
    """What each device (by agent and number) holds for which shard, and by pipeline the part of its requests that each
    of its shards is to get."""

    placement: dict[str, dict[int, DevicePlacement]]
    parts: dict[str, dict[str, float]]


def divide(layouts: Sequence[AgentLayout], shards: Sequence[str]) -> ShardedLayout:
    """Divide the devices that hold something over ``shards``, evenly for each stage.

    A pipeline is served by as many shards as it has devices for each of its stages, at least by one: a shard needs
    all stages, and a device works for one shard. Pipelines that share devices are served by the same shards. A
    shard's part of a pipeline's requests is that of its scarcest stage.
    """
    placement: dict[str, dict[int, DevicePlacement]] = {}
    parts: dict[str, dict[str, float]] = {}
    load = dict.fromkeys(shards, 0)
    for devices in _together(layouts):
        alike: dict[tuple[str, ...], list[Device]] = {}
        for device in devices:
            alike.setdefault(tuple(sorted(device[2])), []).append(device)
        count = min(len(shards), *(len(group) for group in alike.values()))
        chosen = sorted(sorted(shards, key=lambda shard: load[shard])[:count])
        held: dict[str, Counter[str]] = {}
        for group in alike.values():
            for number, (agent, device_number, models) in enumerate(group):
                shard = chosen[number % count]
                load[shard] += 1
                placement.setdefault(agent, {})[device_number] = DevicePlacement(shard, models)
                for model in models:
                    held.setdefault(model, Counter())[shard] += 1
        for pipeline in {_pipeline(model) for model in held}:
            stages = [counts for model, counts in held.items() if _pipeline(model) == pipeline]
            scarcest = {shard: min(counts[shard] / counts.total() for counts in stages) for shard in chosen}
            parts[pipeline] = {shard: part / sum(scarcest.values()) for shard, part in scarcest.items()}
    return ShardedLayout(placement, parts)


def _together(layouts: Sequence[AgentLayout]) -> list[list[Device]]:
    """The devices in groups; pipelines of different groups share no device."""
    groups: list[tuple[set[str], list[Device]]] = []
    for layout in layouts:
        for number, models in sorted(layout.placement.items()):
            if not models:
                continue
            pipelines = {_pipeline(model) for model in models}
            devices: list[Device] = [(layout.agent, number, models)]
            apart = []
            for group in groups:
                if group[0] & pipelines:
                    pipelines |= group[0]
                    devices = group[1] + devices
                else:
                    apart.append(group)
            groups = [*apart, (pipelines, devices)]
    return [devices for _, devices in groups]


def _pipeline(model: str) -> str:
    """The pipeline that a model key speaks of."""
    return model.partition("@")[0]
