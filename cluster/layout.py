"""The agents of one host's cluster: how many, with which devices, and what each device holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from cluster.placement import PlacementError, check_split, deal, dedicate, share, split_gpus
from pipelines.capacity import planned_costs
from pipelines.spec import PipelineSpec

DEVICES_PER_AGENT = 16
"""How many emulated GPUs one agent plays unless told otherwise."""


class AgentLayout(msgspec.Struct, frozen=True):
    """One agent: its name, its devices (as ``laxity node run --devices`` takes them), and the model keys by device."""

    agent: str
    devices: str
    placement: dict[int, list[str]]


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What a person asked for.

    ``emulate`` plays every stage from its profile; otherwise only the stages whose executor is ``emulated``.
    ``gpus`` is the number of emulated GPUs (None: one for each emulated stage), ``split`` how many each emulated
    stage gets, in the order of the specs and their stages, ``agents`` how many agents play them. ``memory_mb`` is what
    models may take of each emulated GPU's memory, or of the host's CPU's (0: as much as they need).
    """

    emulate: bool = False
    gpus: int | None = None
    split: Sequence[int] | None = None
    agents: int | None = None
    memory_mb: int = 0


def lay_out(specs: Sequence[PipelineSpec], wish: Wish, real: str, real_devices: int) -> list[AgentLayout]:
    """The agents that serve ``specs``; ``real`` ('cpu' or 'cuda') says what the host's ``real_devices`` devices are.

    Emulated GPUs are divided over the emulated stages, max-min by cost; stages share them where there are fewer
    GPUs than stages. Every real device holds every other model. Raises :class:`PlacementError`.
    """
    costs, others = _models(specs, wish)
    layouts: list[AgentLayout] = []
    if others:
        layouts.append(
            AgentLayout("agent-0", _real(real, wish), {device: list(others) for device in range(real_devices)})
        )
    if costs:
        layouts += _emulated(_hold(costs, wish), wish, len(layouts))
    elif wish.gpus is not None or wish.split is not None or wish.agents is not None:
        raise PlacementError(
            "no stage is emulated, so there are no GPUs to divide; leave out --gpus, --split and --agents, "
            "or add --executor emulated"
        )
    return layouts


def equip(specs: Sequence[PipelineSpec], wish: Wish, real: str, real_devices: int) -> list[AgentLayout]:
    """The agents alone, for coordinators that place ``specs`` (and others later) themselves: the host's devices where
    a stage needs them or no GPU is emulated, and the emulated GPUs. Raises :class:`PlacementError`."""
    costs, others = _models(specs, wish)
    gpus = wish.gpus if wish.gpus is not None else len(costs)
    layouts: list[AgentLayout] = []
    if others or not gpus:
        layouts.append(AgentLayout("agent-0", _real(real, wish), {device: [] for device in range(real_devices)}))
    if gpus:
        layouts += _emulated([[] for _ in range(gpus)], wish, len(layouts))
    elif wish.agents is not None:
        raise PlacementError("there are no emulated GPUs for --agents to play; say how many with --gpus")
    return layouts


def _real(real: str, wish: Wish) -> str:
    """The host's devices with the memory that is wished for."""
    if not wish.memory_mb:
        return real
    if real != "cpu":
        raise PlacementError("models may take what memory the GPUs of this machine have; leave out --memory")
    return f"{real}:{wish.memory_mb}"


def _models(specs: Sequence[PipelineSpec], wish: Wish) -> tuple[dict[str, float], list[str]]:
    """The planned cost of each model that is emulated, and the other models, by key."""
    costs: dict[str, float] = {}
    others: list[str] = []
    for spec in specs:
        emulated = {name for name, stage in spec.stages.items() if wish.emulate or stage.executor == "emulated"}
        seconds = planned_costs(spec) if emulated else {}
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
    return costs, others


def _emulated(held: Sequence[list[str]], wish: Wish, first: int) -> list[AgentLayout]:
    """The agents, numbered from ``first``, that play the GPUs which hold this."""
    agents = wish.agents if wish.agents is not None else -(-len(held) // DEVICES_PER_AGENT)
    played = f":emulated:{wish.memory_mb}" if wish.memory_mb else ""
    return [
        AgentLayout(f"agent-{first + number}", f"emulated:{len(placement)}{played}", placement)
        for number, placement in enumerate(deal(held, agents))
    ]


def _hold(costs: Mapping[str, float], wish: Wish) -> list[list[str]]:
    if wish.split is not None:
        gpus = wish.gpus if wish.gpus is not None else sum(wish.split)
        return dedicate(check_split(list(costs), wish.split, gpus))
    gpus = wish.gpus if wish.gpus is not None else len(costs)
    return dedicate(split_gpus(costs, gpus)) if gpus >= len(costs) else share(costs, gpus)
