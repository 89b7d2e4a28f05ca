"""Which shards serve a pipeline, and how its work is divided over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cluster.planner.keys import natural


def shards_wanted(visits: float, fewest_devices: float, shard_rate: float, replicas: int, shards: int) -> int:
    """How many shards a pipeline is spread over: as many as its ``visits`` (stage visits per second) take, and at least
    ``replicas`` where each of its stages has that many devices (``fewest_devices``, of the stage with the fewest)."""
    busy = math.ceil(visits / shard_rate) if shard_rate > 0.0 else 1
    spread = min(replicas, int(fewest_devices + 0.05))
    return max(1, min(shards, max(busy, spread)))


def choose(wanted: int, present: Mapping[str, float], load: Mapping[str, float], shards: Sequence[str]) -> list[str]:
    """``wanted`` of the ``shards``: those that have the most of the pipeline at ``present`` stay, then come those with
    the least ``load`` (stage visits per second)."""
    order = sorted(shards, key=lambda shard: (-present.get(shard, 0.0), load.get(shard, 0.0), natural(shard)))
    return sorted(order[:wanted], key=natural)
