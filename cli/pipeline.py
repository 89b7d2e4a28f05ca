"""``laxity pipeline``: pipeline files, and the pipelines of a running cluster."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
import msgspec
from click.core import ParameterSource
from rich.table import Table
from rich.text import Text

from cli.groups import Group
from cli.options import cluster_option, explain_errors, find_store, print_table, store_option
from cli.pipeline_cluster import apply, check_name, delete, list_pipelines
from cli.pipeline_table import describe_pipeline, pipeline_table
from cli.snapshot import look
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


@click.group(cls=Group)
def pipeline() -> None:
    """Check, apply, list, show and delete pipelines.

    A SPEC is the path of a YAML file or the name of a shipped pipeline (tm, lv, ga, da, echo, ocr, classify).
    """


pipeline.add_command(apply)
pipeline.add_command(list_pipelines)
pipeline.add_command(delete)


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
        print_table(table)
    if any(spec is None for _, spec, _ in results):
        sys.exit(1)


@pipeline.command()
@click.argument("name", metavar="SPEC|NAME")
@click.option("--json", "as_json", is_flag=True, help="Print the resolved spec as JSON, defaults included.")
@cluster_option
@store_option
@click.pass_context
@explain_errors
def show(context: click.Context, name: str, as_json: bool, cluster: str, store: str | None) -> None:
    """Show a pipeline's stages, in the order in which they run.

    With --cluster or --store (as a flag) it is what that cluster serves under NAME; otherwise a SPEC: a file or a
    shipped pipeline. l(b) is the profile's latency for a batch of b; stages without a profile are measured when they
    are loaded.

    \b
    Examples:
      laxity pipeline show lv
      laxity pipeline show ./ocr.yaml --json
      laxity pipeline show ocr --cluster local
    """
    flags = (context.get_parameter_source(option) for option in ("cluster", "store"))
    if ParameterSource.COMMANDLINE not in flags:
        loaded = load_spec(name)
        served = None
    else:
        seen = look(find_store(cluster, store), cluster)
        check_name(name, seen, cluster)
        record = seen.serving.get(name) or seen.pipelines[name]
        loaded = record.spec
        served = describe_pipeline(seen, name)
    if as_json:
        shown = _spec_as_json(loaded)
        click.echo(json.dumps(shown if served is None else {**shown, "cluster": served}, indent=2))
        return
    _show(loaded)
    if served is not None:
        print_table(pipeline_table([served]))


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
    print_table(table)
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
