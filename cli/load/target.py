"""What is loaded: pipelines of a running cluster, and what its GPUs can carry of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import click

from cli.options import find_store, near, not_running
from cli.rollout import waits_for
from cli.snapshot import look
from cluster.records import READY
from pipelines import PipelineSpec
from pipelines.capacity import capacity, pool_capacity, profiles_of
from pipelines.graph import Graph


class Held(NamedTuple):
    """A stage of a pipeline that a GPU holds."""

    pipeline: str
    stage: str


class Target(NamedTuple):
    """The shards' addresses, the pipelines by name (none: only the shards know them), and which of their stages each
    GPU holds that holds any."""

    shards: str
    specs: dict[str, PipelineSpec]
    held: list[list[Held]]

    def stages(self, pipeline: str) -> tuple[str, ...]:
        """In topological order; () where they are not known."""
        return Graph(self.specs[pipeline]).order if pipeline in self.specs else ()

    def shared(self) -> bool:
        """Whether any GPU holds several of the stages."""
        return any(len(stages) > 1 for stages in self.held)

    def gpus(self) -> dict[str, Any]:
        """How many there are, and of each pipeline's stages, in order, where each GPU has but one."""
        if not self.specs:
            return {"gpus": None, "split": {}}
        counts = Counter(stage for stages in self.held for stage in stages)
        split = {name: [counts[Held(name, stage)] for stage in self.stages(name)] for name in self.specs}
        return {"gpus": len(self.held), "split": {} if self.shared() else split}

    def unprofiled(self) -> list[str]:
        """The stages whose profile is not known beforehand."""
        return [
            f"{name}/{stage}"
            for name, spec in self.specs.items()
            for stage, said in spec.stages.items()
            if said.profile is None
        ]

    def capacity(self, shares: Mapping[str, float]) -> float | None:
        """Requests per second, of all pipelines together in these shares, that the GPUs carry in planned batches; where
        stages share some, what all GPUs would carry together. None where it is not known."""
        if not self.specs or self.unprofiled():
            return None
        specs = [self.specs[name] for name in shares]
        if self.shared():
            return pool_capacity(specs, list(shares.values()), len(self.held))
        counts = Counter(stage for stages in self.held for stage in stages)
        return min(
            capacity(spec, {stage: counts[Held(spec.name, stage)] for stage in spec.stages}) / shares[spec.name]
            for spec in specs
        )


def find_target(pipelines: Sequence[str], cluster: str, store: str | None, shards: str | None) -> Target:
    """What a cluster's records say of these pipelines; with ``shards`` they are not looked at."""
    if shards is not None:
        return Target(shards, {}, [])
    seen = look(find_store(cluster, store), cluster)
    if not seen.brokers:
        raise not_running(cluster, store)
    for name in pipelines:
        if name not in seen.serving and name in seen.pipelines:
            why = waits_for(seen, seen.pipelines[name].spec)
            raise click.ClickException(f"the pipeline {name!r} is applied but not served yet: {why}")
        if name not in seen.serving:
            hint = near(name, seen.serving, "it serves")
            raise click.ClickException(f"the cluster {cluster!r} serves no pipeline {name!r}; {hint}")
    specs = {name: seen.serving[name].spec for name in pipelines}
    stages = {spec.model_key(stage): Held(name, stage) for name, spec in specs.items() for stage in spec.stages}
    held = [
        [stages[model] for model, state in device.models.items() if state == READY and model in stages]
        for node in seen.nodes.values()
        for device in node.devices
    ]
    found = {stage for on_one in held for stage in on_one}
    for name, spec in specs.items():
        missing = sorted(stage for stage in spec.stages if Held(name, stage) not in found)
        if missing:
            raise click.ClickException(
                f"no GPU is ready for stage {', '.join(missing)} of {name!r}; see `laxity status`"
            )
    addresses = ",".join(record.frontend for record in seen.brokers.values())
    return Target(addresses, specs, [on_one for on_one in held if on_one])


def check_slo(spec: PipelineSpec | None, slo: float, told: str) -> None:
    """Refuse a latency budget that the pipeline does not grant, and warn of one that nobody could keep."""
    if spec is None:
        return
    if slo > spec.slo + 1e-6:
        raise click.UsageError(f"--slo {told} is longer than the pipeline's {spec.slo:g}s: ask for less")
    least, _ = Graph(spec).longest_path({name: profile.latency(1) for name, profile in profiles_of(spec).items()})
    if slo < least:
        click.echo(
            f"--slo {told} is shorter than the {least * 1e3:.4g}ms that {spec.name} takes at least by its profiles: "
            "next to nothing will be answered in time",
            err=True,
        )
