"""Which shards serve a pipeline, and which part of its work is planned for each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from cluster.planner.keys import natural
from cluster.planner.settings import Settings

STICKY = 1.5
"""A pipeline stays with as many shards as it has where this many times its devices would justify them: a need that
wavers around a whole device must not move half of the devices to and fro."""
ROUND = 0.01
"""Parts of a device that do not count."""


class Wish(NamedTuple):
    """What a pipeline needs of shards: ``visits`` (stage visits per second), ``devices`` by stage. ``settled``: enough
    is known to give shards up."""

    visits: float
    devices: Collection[float]
    settled: bool


class Division(NamedTuple):
    """The part of a pipeline that is planned for each shard. ``urgent``: the one before will not do."""

    parts: dict[str, float]
    urgent: bool


def divide(
    wish: Wish,
    before: Mapping[str, float],
    present: Mapping[str, float],
    load: Mapping[str, float],
    shards: Sequence[str],
    settings: Settings,
) -> Division:
    """Divide a pipeline over ``shards``: over as many as its rate takes, and over ``replicas`` where every stage has as
    many devices; evenly, or as even as one stage's devices can be dealt out, whichever takes the fewest devices.

    ``before`` is how it was divided, if that is known; ``present`` how much of it each of the shards has: those with
    most of it stay, then come those with the least ``load``.
    """
    count = _count(wish, settings)
    if count < len(before) <= _count(wish._replace(devices=[STICKY * need for need in wish.devices]), settings):
        count = len(before)
    if not wish.settled:
        count = max(count, len(present))
    chosen = choose(min(count, len(shards)), present, load, shards)
    if not before and set(present) == set(chosen):
        total = sum(present.values())
        before = {shard: weight / total for shard, weight in present.items()}
    most = max(settings.shard_rate / max(wish.visits, 1e-9), 1.0 / len(chosen)) + 1e-9
    order = sorted(chosen, key=lambda shard: (-present.get(shard, 0.0), natural(shard)))
    candidates = [_dealt(chosen, len(chosen))]
    for dealt in sorted({_whole(need) for need in wish.devices}):
        if dealt > len(chosen) and dealt % len(chosen):
            candidates.append(_dealt(order, dealt))
    best = min((parts for parts in candidates if max(parts.values()) <= most), key=lambda parts: _taken(parts, wish))
    gone = not before.keys() <= set(shards)
    urgent = not before or gone or not set(chosen) <= before.keys() or max(before.values()) > most
    if not urgent and set(before) == set(chosen) and _taken(best, wish) >= _taken(before, wish):
        return Division(dict(before), False)
    return Division(best, urgent)


def choose(count: int, present: Mapping[str, float], load: Mapping[str, float], shards: Sequence[str]) -> list[str]:
    """``count`` of the ``shards``: those that have most at ``present``, then those with the least ``load``."""
    order = sorted(shards, key=lambda shard: (-present.get(shard, 0.0), load.get(shard, 0.0), natural(shard)))
    return sorted(order[:count], key=natural)


def _count(wish: Wish, settings: Settings) -> int:
    fewest = min((_whole(need) for need in wish.devices), default=1)
    return max(1, math.ceil(wish.visits / settings.shard_rate), min(settings.replicas, fewest))


def _taken(parts: Mapping[str, float], wish: Wish) -> int:
    """How many whole devices it takes if each stage's are divided like this."""
    return sum(_whole(part * need) for part in parts.values() for need in wish.devices)


def _dealt(shards: Sequence[str], count: int) -> dict[str, float]:
    """``count`` things dealt out, as parts."""
    each, more = divmod(count, len(shards))
    return {shard: (each + (number < more)) / count for number, shard in enumerate(shards)}


def _whole(need: float) -> int:
    return max(1, math.ceil(need - ROUND))
