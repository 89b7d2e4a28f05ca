"""``laxity pipeline``: look at pipeline files before they are served."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines import (
    Graph,
    LatencyProfile,
    PipelineSpec,
    Problem,
    SpecError,
    StageSpec,
    format_duration,
    json_schema,
    load_spec,
)

_WIDTH_OF_PIPES = 200
"""Columns of a table that does not go to a terminal: wide enough for `grep` to find whole cells."""


@click.group()
def pipeline() -> None:
    """Check and show pipelines.

    A SPEC is the path of a YAML file or the name of a shipped pipeline (tm, lv, ga, da, echo, ocr).
    """


@pipeline.command()
@click.argument("specs", metavar="SPEC...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array with one object per SPEC.")
def validate(specs: tuple[str, ...], as_json: bool) -> None:
    """Say everything that is wrong with pipeline files; exit 1 if anything is.

    Checked are the fields, references between stages, cycles, model files, modules of user code, latency profiles, and
    whether the SLO can be met at all. No model is loaded and no user code run.

    \b
    Examples:
      laxity pipeline validate ocr.yaml
      laxity pipeline validate tm lv ga da --json
    """
    results = [_checked(name) for name in specs]
    if as_json:
        click.echo(json.dumps([_result_as_json(*result) for result in results], indent=2))
    else:
        table = Table("spec", "valid", "pipeline", "slo", "stages")
        for name, spec, problems in results:
            if spec is None:
                table.add_row(Text(name), "no", "", "", "")
            else:
                row = (name, "yes", spec.name, format_duration(spec.slo), ", ".join(spec.stages))
                table.add_row(*(Text(cell) for cell in row))
            for problem in problems:
                click.echo(str(problem), err=True)
        _print(table)
    if any(spec is None for _, spec, _ in results):
        sys.exit(1)


@pipeline.command()
@click.argument("spec", metavar="SPEC")
@click.option("--json", "as_json", is_flag=True, help="Print the resolved spec as JSON, defaults included.")
def show(spec: str, as_json: bool) -> None:
    """Show a pipeline's stages, in the order in which they run.

    l(b) is the profile's latency for a batch of b; stages without a profile are measured when they are loaded.

    \b
    Examples:
      laxity pipeline show lv
      laxity pipeline show ./ocr.yaml --json
    """
    try:
        loaded = load_spec(spec)
    except SpecError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(_spec_as_json(loaded), indent=2))
    else:
        _show(loaded)


@pipeline.command()
def schema() -> None:
    """Print the JSON Schema of pipeline files (draft 2020-12), for editors.

    \b
    Example, for editors with the YAML language server:
      laxity pipeline schema > pipeline.schema.json
      and as the first line of a file:  # yaml-language-server: $schema=pipeline.schema.json
    """
    click.echo(json.dumps(json_schema(), indent=2))


Result = tuple[str, PipelineSpec | None, list[Problem]]


def _checked(name: str) -> Result:
    try:
        return name, load_spec(name), []
    except SpecError as error:
        return name, None, error.problems


def _result_as_json(name: str, spec: PipelineSpec | None, problems: list[Problem]) -> dict[str, Any]:
    return {
        "spec": name,
        "valid": spec is not None,
        "pipeline": spec.name if spec is not None else None,
        "problems": [
            {
                "file": problem.file,
                "line": problem.line,
                "path": problem.where,
                "message": problem.message,
                "advice": problem.advice,
            }
            for problem in problems
        ],
    }


def _spec_as_json(spec: PipelineSpec) -> dict[str, Any]:
    """The spec with its defaults, which msgspec leaves out where it encodes the struct itself."""
    stages = {}
    for name, stage in spec.stages.items():
        stages[name] = msgspec.to_builtins({field: getattr(stage, field) for field in stage.__struct_fields__})
    fields: dict[str, Any] = {field: getattr(spec, field) for field in spec.__struct_fields__}
    return {**fields, "stages": stages, "version": spec.version}


def _show(spec: PipelineSpec) -> None:
    graph = Graph(spec)
    profiles = {
        name: LatencyProfile.from_spec(stage.profile)
        for name, stage in spec.stages.items()
        if stage.profile is not None
    }
    click.echo(f"{spec.name}  slo {format_duration(spec.slo)}  version {spec.version}")
    if spec.description:
        click.echo(spec.description)
    table = Table("stage", "executor", "model", "inputs", "map", "max batch", "l(1)", "l(max batch)")
    for name in graph.order:
        stage = spec.stages[name]
        table.add_row(*(Text(cell) for cell in _row(name, stage, profiles.get(name))))
    _print(table)
    output = spec.output if isinstance(spec.output, str) else _named(spec.output)
    click.echo(f"output: {output}")
    if profiles:
        seconds, path = graph.longest_path({name: profile.latency(1) for name, profile in profiles.items()})
        unknown = [name for name in path if name not in profiles]
        without = f", without {', '.join(unknown)}" if unknown else ""
        click.echo(f"longest path in batches of 1: {format_duration(seconds)}{without} ({' -> '.join(path)})")


def _row(name: str, stage: StageSpec, profile: LatencyProfile | None) -> tuple[str, ...]:
    inputs = ", ".join(stage.inputs) if isinstance(stage.inputs, list) else _named(stage.inputs)
    items = f"up to {stage.max_items}" if stage.map else ""
    latencies = ("", "")
    if profile is not None:
        latencies = (format_duration(profile.latency(1)), format_duration(profile.latency(stage.max_batch)))
    return (name, stage.executor, stage.model or "", inputs, items, str(stage.max_batch), *latencies)


def _named(references: dict[str, str]) -> str:
    return ", ".join(f"{name}: {reference}" for name, reference in references.items())


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_OF_PIPES
    console.print(table)
