"""The agents of one host's cluster: how many, with which devices, and what each device holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from cluster.placement import PlacementError, check_split, deal, dedicate, share, split_gpus
from pipelines.graph import Graph
from pipelines.profile import LatencyProfile
from pipelines.spec import PipelineSpec

DEVICES_PER_AGENT = 16
"""How many emulated GPUs one agent plays unless told otherwise."""


class AgentLayout(msgspec.Struct, frozen=True):
    """One agent: its name, its devices (``cpu``, ``cuda`` or ``emulated:N``), and the model keys by device."""

    agent: str
    devices: str
    placement: dict[int, list[str]]


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What a person asked for.

    ``emulate`` plays every stage from its profile; otherwise only the stages whose executor is ``emulated``.
    ``gpus`` is the number of emulated GPUs (None: one for each emulated stage), ``split`` how many each emulated
    stage gets, in the order of the specs and their stages, ``agents`` how many agents play them.
    """

    emulate: bool = False
    gpus: int | None = None
    split: Sequence[int] | None = None
    agents: int | None = None


def lay_out(specs: Sequence[PipelineSpec], wish: Wish, real: str, real_devices: int) -> list[AgentLayout]:
    """The agents that serve ``specs``; ``real`` ('cpu' or 'cuda') says what the host's ``real_devices`` devices are.

    Emulated GPUs are divided over the emulated stages, max-min by cost; stages share them where there are fewer
    GPUs than stages. Every real device holds every other model. Raises :class:`PlacementError`.
    """
    costs: dict[str, float] = {}
    others: list[str] = []
    for spec in specs:
        emulated = {name for name, stage in spec.stages.items() if wish.emulate or stage.executor == "emulated"}
        seconds = stage_costs(spec) if emulated else {}
        for name in spec.stages:
            key = spec.model_key(name)
            if name not in emulated:
                others.append(key)
            elif name in seconds:
                costs[key] = seconds[name]
            else:
                raise PlacementError(
                    f"stage {name!r} of pipeline {spec.name!r} has no profile, so it cannot be emulated; "
                    "give it one, or leave out --executor emulated"
                )
    layouts: list[AgentLayout] = []
    if others:
        layouts.append(AgentLayout("agent-0", real, {device: list(others) for device in range(real_devices)}))
    if costs:
        held = _hold(costs, wish)
        agents = wish.agents if wish.agents is not None else -(-len(held) // DEVICES_PER_AGENT)
        for placement in deal(held, agents):
            layouts.append(AgentLayout(f"agent-{len(layouts)}", f"emulated:{len(placement)}", placement))
    elif wish.gpus is not None or wish.split is not None or wish.agents is not None:
        raise PlacementError(
            "no stage is emulated, so there are no GPUs to divide; leave out --gpus, --split and --agents, "
            "or add --executor emulated"
        )
    return layouts


def _hold(costs: Mapping[str, float], wish: Wish) -> list[list[str]]:
    if wish.split is not None:
        gpus = wish.gpus if wish.gpus is not None else sum(wish.split)
        return dedicate(check_split(list(costs), wish.split, gpus))
    gpus = wish.gpus if wish.gpus is not None else len(costs)
    return dedicate(split_gpus(costs, gpus)) if gpus >= len(costs) else share(costs, gpus)


def stage_costs(spec: PipelineSpec) -> dict[str, float]:
    """GPU-seconds per element of each stage that has a profile, at the batch that uses the GPU best.

    That batch must leave time: with one GPU an element waits for up to one batch before its own, so twice the
    batch's latency has to fit the stage's part of the SLO, its part of the longest path through it in batches of 1.
    """
    profiles = {
        name: LatencyProfile.from_spec(stage.profile)
        for name, stage in spec.stages.items()
        if stage.profile is not None
    }
    graph = Graph(spec)
    alone = {name: profile.latency(1) for name, profile in profiles.items()}
    after = graph.longest_after(alone)
    until: dict[str, float] = {}
    for name in graph.order:
        until[name] = alone.get(name, 0.0) + max((until[parent] for parent in graph.parents[name]), default=0.0)
    costs = {}
    for name, profile in profiles.items():
        path = until[name] + after[name]
        part = spec.slo * alone[name] / path if path > 0 else spec.slo
        feasible = [b for b in range(1, spec.stages[name].max_batch + 1) if 2 * profile.latency(b) <= part]
        # A stage of zero latency still takes a GPU; a small cost keeps the division defined.
        costs[name] = max(1e-6, min(profile.latency(b) / b for b in feasible or [1]))
    return costs
