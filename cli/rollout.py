"""How far pipelines are on their way to be served, and what they wait for, as a store's records tell it."""

from __future__ import annotations

from collections import Counter

import msgspec

from cli.snapshot import Snapshot
from cluster.records import READY, NodeState, failure
from pipelines.spec import PipelineSpec

PATIENCE = 15.0
"""Seconds that a model which failed on some device has to become ready on another one."""


class ModelLoading(msgspec.Struct, frozen=True):
    """How far one model is: on how many of its devices it is ready, what is being done, and what went wrong, for
    people."""

    model: str
    ready: int
    devices: int
    doing: str
    failed: str | None


def models_loading(seen: Snapshot, spec: PipelineSpec) -> list[ModelLoading]:
    """How far each stage's model is, in the stages' order."""
    return [_model_loading(seen, spec.model_key(stage)) for stage in spec.stages]


def _model_loading(seen: Snapshot, model: str) -> ModelLoading:
    ready = 0
    doing = ""
    holders = seen.holders(model)
    for agent, number in holders:
        if agent not in seen.nodes:
            doing = doing or f"waiting for {agent}"
            continue
        state = seen.model_state(agent, number, model)
        ready += state == READY
        if state not in (READY, "") and failure(state) is None:
            progress = next((device.progress for device in seen.nodes[agent].devices if device.device == number), "")
            doing = progress or state
    return ModelLoading(model, ready, len(holders), doing, _failed(seen, model))


def _failed(seen: Snapshot, model: str) -> str | None:
    """Where and why a model could not be loaded, if that happened anywhere."""
    for agent, node in seen.nodes.items():
        for device in node.devices:
            why = failure(device.models.get(model, ""))
            if why is not None:
                return f"on {agent}, device {device.device}: {why}"
    return None


def is_served(seen: Snapshot, spec: PipelineSpec) -> bool:
    """Whether this very version is what requests get."""
    return spec.name in seen.serving and seen.serving[spec.name].version == spec.version


def waits_for(seen: Snapshot, spec: PipelineSpec) -> str:
    """What keeps a pipeline from being served, and what to do; '' where nothing does."""
    missing = missing_services(seen)
    if missing:
        return missing
    states = Counter(seen.state(node) for node in seen.nodes)
    if not states["active"] and not states["standby"]:
        return f"no node is active ({_counted(states)}); see `laxity node list`"
    loading = {stage: _model_loading(seen, spec.model_key(stage)) for stage in spec.stages}
    failed = [f"{model.model} failed {model.failed}" for model in loading.values() if model.failed and not model.ready]
    if failed:
        return failed[0]
    unplaced = [stage for stage, model in loading.items() if not model.devices]
    if unplaced:
        return f"no device was given to stage {', '.join(unplaced)} yet; see the leader's log if that lasts"
    waiting = [stage for stage, model in loading.items() if not model.ready]
    if waiting:
        return f"stage {', '.join(waiting)} is being loaded"
    return "" if is_served(seen, spec) else "the leader has not put it into service yet"


def missing_services(seen: Snapshot) -> str:
    """Which kind of process a cluster lacks to serve a pipeline that is applied now, and how to start one."""
    if not seen.brokers:
        return "no shard is registered; start one with `laxity broker run`"
    if seen.leader is None and not seen.fixed:
        standing = ", ".join(seen.coordinators)
        if standing:
            return f"no coordinator leads yet ({standing} will in a moment)"
        return "no coordinator is running; start one with `laxity coordinator run`"
    if not seen.nodes:
        return "no node is registered; start one with `laxity node run`"
    return ""


def _counted(states: Counter[NodeState]) -> str:
    return ", ".join(f"{count} {state}" for state, count in states.items())


class Failures:
    """Which models cannot be loaded for good: those that failed and were ready nowhere within :data:`PATIENCE`."""

    def __init__(self) -> None:
        self._failed: dict[str, tuple[float, ModelLoading]] = {}
        """Since when, and how it failed last."""

    def lasting(self, now: float, models: list[ModelLoading]) -> ModelLoading | None:
        """The first of those, if there is one; ``now`` is monotonic, in seconds. One that no device is to hold any more
        has nothing left to wait for."""
        for model in models:
            if model.ready:
                self._failed.pop(model.model, None)
                continue
            since, last = self._failed.get(model.model, (now, model))
            if model.failed is not None:
                last = model
                self._failed[model.model] = (since, model)
            if last.failed is not None and now >= since + PATIENCE and (model.failed is not None or not model.devices):
                return last
        return None
