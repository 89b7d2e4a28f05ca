"""Which device holds which models: pure functions over counts and costs."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


class PlacementError(ValueError):
    """The GPUs cannot be divided as asked; the text says what to change."""


def split_gpus(costs: Mapping[str, float], gpus: int) -> dict[str, int]:
    """Divide ``gpus`` over stages so that the smallest ``gpus of a stage / its cost`` is as large as can be.

    ``costs`` holds each stage's work in GPU-seconds per request (its latency per element at its target
    batch, times its elements per request). Each stage gets at least one GPU, so there must be as many GPUs
    as stages; what remains goes, one by one, to the stage that limits the throughput, the first in order
    among equals. Greedy is optimal here because a GPU given to any other stage cannot raise the minimum.
    """
    if not costs:
        raise PlacementError("there is no stage to give GPUs to")
    for stage, cost in costs.items():
        if not cost > 0:
            raise PlacementError(f"stage {stage!r} has cost {cost}; a cost must be above 0")
    if gpus < len(costs):
        raise PlacementError(f"{gpus} GPUs cannot be divided over {len(costs)} stages; let stages share them")
    counts = dict.fromkeys(costs, 1)
    heap = [(1 / cost, order, stage) for order, (stage, cost) in enumerate(costs.items())]
    heapq.heapify(heap)
    for _ in range(gpus - len(costs)):
        _, order, stage = heap[0]
        counts[stage] += 1
        heapq.heapreplace(heap, (counts[stage] / costs[stage], order, stage))
    return counts


def check_split(stages: Sequence[str], split: Sequence[int], gpus: int) -> dict[str, int]:
    """An explicit division, ``split`` in the order of ``stages``; :class:`PlacementError` if it does
    not fit."""
    if len(split) != len(stages):
        raise PlacementError(
            f"the split has {len(split)} numbers for {len(stages)} stages; give one for each of {', '.join(stages)}"
        )
    if any(count < 1 for count in split):
        raise PlacementError("every stage of a split needs at least one GPU")
    if sum(split) != gpus:
        raise PlacementError(f"the split adds up to {sum(split)} GPUs, not {gpus}")
    return dict(zip(stages, split, strict=True))


def dedicate(counts: Mapping[str, int]) -> list[list[str]]:
    """What each device holds when ``counts`` devices serve one model each, in order."""
    return [[model] for model, count in counts.items() for _ in range(count)]


def share(costs: Mapping[str, float], gpus: int) -> list[list[str]]:
    """What each of ``gpus`` devices holds when there are fewer devices than models: the most costly model
    first, each to the device with the least work so far."""
    if gpus < 1:
        raise PlacementError("at least one GPU is needed")
    load = [(0.0, device) for device in range(gpus)]
    held: list[list[str]] = [[] for _ in range(gpus)]
    for model in sorted(costs, key=lambda model: -costs[model]):
        work, device = heapq.heappop(load)
        held[device].append(model)
        heapq.heappush(load, (work + costs[model], device))
    return held


def deal(held: Sequence[list[str]], agents: int) -> list[dict[int, list[str]]]:
    """Deal devices out to ``agents`` agents, in order and evenly; each agent counts its own from 0."""
    if not 1 <= agents <= len(held):
        raise PlacementError(f"{len(held)} devices cannot be dealt out to {agents} agents")
    each, extra = divmod(len(held), agents)
    result = []
    start = 0
    for agent in range(agents):
        size = each + (agent < extra)
        result.append(dict(enumerate(held[start : start + size])))
        start += size
    return result
