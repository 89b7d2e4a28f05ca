"""The pipelines of a cluster for people and for programs: what is wanted, what is served by what, how it is tuned."""

from __future__ import annotations

from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from cli.rollout import waits_for
from cli.snapshot import Snapshot
from cluster.records import READY, PipelineRecord, ServingRecord
from pipelines.duration import format_duration
from pipelines.graph import Graph
from pipelines.spec import REQUEST, PipelineSpec


def describe_pipelines(seen: Snapshot) -> list[dict[str, Any]]:
    """Each pipeline that people want served or that still is, as plain data."""
    return [describe_pipeline(seen, name) for name in sorted(seen.pipelines.keys() | seen.serving.keys())]


def describe_pipeline(seen: Snapshot, name: str) -> dict[str, Any]:
    wanted, serving = seen.pipelines.get(name), seen.serving.get(name)
    shown: PipelineRecord | ServingRecord | None = serving or wanted
    assert shown is not None
    spec = shown.spec
    tuning = seen.tuning.get(name)
    return {
        "name": name,
        "version": wanted.version if wanted is not None else None,
        "served_version": serving.version if serving is not None else None,
        "slo_s": spec.slo,
        "policy": spec.policy,
        "stages": list(Graph(spec).order),
        "shards": dict(serving.shards) if serving is not None else {},
        "gpus": {stage: len(seen.holders(f"{name}@{shown.version}/{stage}")) for stage in Graph(spec).order},
        "ready": {stage: _ready(seen, f"{name}@{shown.version}/{stage}") for stage in Graph(spec).order},
        "drift": {stage: seen.drift(f"{name}@{shown.version}/{stage}") for stage in Graph(spec).order},
        "rate_rps": _rate(seen, spec, shown.version),
        "tuning": msgspec.to_builtins(tuning) if tuning is not None else None,
        "waits": "" if wanted is None else waits_for(seen, wanted.spec),
    }


def _ready(seen: Snapshot, model: str) -> int:
    return sum(seen.model_state(agent, number, model) == READY for agent, number in seen.holders(model))


def _rate(seen: Snapshot, spec: PipelineSpec, version: str) -> float | None:
    """Requests per second over all shards in their last reports, None where there are none: what came to a first
    stage, as each request comes to each of those once."""
    if not seen.reports:
        return None
    first = next(
        (
            name
            for name, stage in spec.stages.items()
            if not stage.map and all(source == REQUEST for source, _ in stage.sources())
        ),
        None,
    )
    if first is None:
        return None
    model = f"{spec.name}@{version}/{first}"
    return sum(
        stage.arrived / report.period
        for report in seen.reports.values()
        for stage in report.stages
        if stage.model == model and report.period > 0
    )


def pipeline_table(pipelines: list[dict[str, Any]]) -> Table:
    """A row for each of what :func:`describe_pipelines` returned."""
    table = Table("pipeline", "wanted", "served", "slo", "policy", "shards", "GPUs", "rate", "λ", "window", "admission")
    for one in pipelines:
        tuning = one["tuning"]
        tuned = ("", "", "")
        if tuning is not None:
            admission = f"{tuning['admission']:.0%}"
            tuned = (f"{tuning['quantile']:.2f}", format_duration(tuning["history"]), admission)
        table.add_row(
            Text(one["name"]),
            one["version"] or "deleted",
            one["served_version"] or "not yet",
            format_duration(one["slo_s"]),
            Text(one["policy"]),
            Text(", ".join(f"{shard} {part:.0%}" for shard, part in one["shards"].items())),
            _gpus(one),
            f"{one['rate_rps']:,.1f}/s" if one["rate_rps"] is not None else "",
            *tuned,
        )
    return table


def _gpus(one: dict[str, Any]) -> Text:
    """``40,6,5`` where all are ready, else ``38/40,6,5``."""
    cells = []
    for stage, count in one["gpus"].items():
        ready = one["ready"][stage]
        cells.append(str(count) if ready == count else f"{ready}/{count}")
    return Text(",".join(cells))
