"""``laxity profile``: what a pipeline's stages take on this host's devices."""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

from cli.options import check_duration, explain_errors, json_option, near, print_json
from cli.output_file import check_directory, html_option, write_file
from cli.profile_report import render
from cli.profile_tables import print_measured
from cli.progress import StepDisplay
from nodes.device import DeviceConfig
from nodes.discovery import NoSuchDevices, cuda_devices, parse_devices
from nodes.meter import DeviceMeter, MeasureError, StageTimes
from pipelines import PipelineSpec, StageSpec
from pipelines.edit import CannotEdit, profile_block, with_profiles
from pipelines.files import FilesError, needed_paths
from pipelines.fit import LinearFit
from pipelines.load import find_spec, parse_spec, read_text
from pipelines.models import ModelNotFoundError
from pipelines.problems import SpecError
from pipelines.spec import Profile


def _check_batches(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[int]:
    if value is None:
        return []
    try:
        sizes = sorted({int(part) for part in value.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1:
        raise click.BadParameter(f"{value!r} is no list of batch sizes such as 1,2,4,8")
    return sizes


def _check_devices(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[DeviceConfig]:
    """The first device of each type."""
    try:
        devices = parse_devices(value or ("cuda" if cuda_devices() else "cpu"))
    except NoSuchDevices as error:
        raise click.BadParameter(str(error)) from None
    if any(device.kind == "emulated" for device in devices):
        raise click.BadParameter("emulated devices take the time that a profile states: measure on cpu or cuda")
    return list({device.type: device for device in reversed(devices)}.values())[::-1]


@click.command()
@click.argument("name", metavar="SPEC")
@click.option("--stage", "stages", multiple=True, metavar="STAGE", help="Measure this stage only; may be repeated.")
@click.option(
    "--devices",
    callback=_check_devices,
    metavar="cpu|cuda|cpu+cuda",
    help="Where to measure: one device of each type (default: the GPUs, the CPU where there are none).",
)
@click.option(
    "--batches",
    callback=_check_batches,
    metavar="N,N,...",
    help="Batch sizes (default: 1, 2, 4, ... and max_batch, up to the first that takes more than half of the SLO).",
)
@click.option(
    "--repeats", type=click.IntRange(1, 100_000), default=100, show_default=True, help="Runs of each batch size."
)
@click.option(
    "--limit",
    default="5s",
    show_default=True,
    callback=check_duration,
    metavar="TIME",
    help="Begin no more runs of a batch size after so long.",
)
@click.option(
    "--write",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write the SPEC with the measured profiles to this file, which may be SPEC itself.",
)
@html_option
@json_option
@explain_errors
def profile(
    name: str,
    stages: tuple[str, ...],
    devices: list[DeviceConfig],
    batches: list[int],
    repeats: int,
    limit: float,
    write: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Measure what a pipeline's stages take on this host's devices, by batch size.

    Each stage is loaded into a worker process as when it serves, and runs batches of its `sample`; SPEC is a YAML file
    or the name of a shipped pipeline. Latency is counted from the start of a batch's execution until its answers are
    there, and inputs from their coming until they are on the device, which is done while another batch executes.
    αb + β is the line nearest to the medians, off by that part of a measured latency at the most; throughput is what
    batches at the median latency make.

    The profile has each batch size's 99th percentile (of up to 100 runs: the worst), under `by_type` for each type of
    device that was measured, and beside it what holds on all others: what SPEC states of them, or the first one's.
    Planner, emulation and `laxity simulate` read it; it is printed to be pasted, or put into a copy of SPEC (or SPEC
    itself) with --write, where all else stays as it is, comments too. Emulated stages state their profile already.

    Exit status: 0 measured, 1 a stage could not be measured, 2 wrong use, 130 interrupted by Ctrl-C.

    \b
    Examples:
      laxity profile ocr
      laxity profile mine.yaml --write mine.yaml
      laxity profile ocr --stage recognize --batches 1,4,16 --repeats 300 --html recognize.html
      laxity profile classify --devices cpu+cuda --json
      laxity profile ocr --write measured.yaml && laxity simulate measured.yaml --gpus 16 --load 0.8 --duration 60s
    """
    check_directory(write)
    check_directory(html)
    source = find_spec(name)
    text = read_text(source)
    spec = parse_spec(text, file=str(source), root=str(source.resolve().parent))
    if write is not None:
        if write.exists() and not write.samefile(source):
            raise click.UsageError(f"{write} exists already; name a new file, or {source} itself")
        _check_place(spec, write)
    chosen = _chosen(spec, stages, batches)
    measured: list[StageTimes] = []
    failures: list[str] = []
    with StepDisplay() as display:
        for device in devices:
            for stage, sizes in chosen.items():
                where = f"{stage} on {device.type}"
                try:
                    with DeviceMeter(device) as meter:
                        measured.append(
                            meter.measure(
                                spec,
                                stage,
                                sizes=sizes,
                                repeats=repeats,
                                seconds=limit,
                                progress=partial(display.show, where),
                            )
                        )
                except MeasureError as error:
                    failures.append(f"{where}: {error}")
    profiles = {
        stage: measured_profile(spec.stages[stage].profile, [times for times in measured if times.stage == stage])
        for stage in dict.fromkeys(times.stage for times in measured)
    }
    if as_json:
        print_json(_as_json(spec, measured, profiles))
    elif measured:
        print_measured(measured)
    for failure in failures:
        click.echo(f"Error: {failure}", err=True)
    changed = write is not None and write.exists() and read_text(source) != text
    if write is not None and profiles and not changed:
        write_file(write, _with_profiles(text, profiles, spec, write))
        click.echo(f"Wrote {write}", err=True)
    elif profiles and not as_json:
        for stage, found in profiles.items():
            click.echo(f"\n{stage}:\n{profile_block(found)}")
    if changed:
        failures.append(f"{source} was changed while it was measured, and is left as it is; paste the profiles into it")
        click.echo(f"Error: {failures[-1]}", err=True)
    if html is not None and measured:
        write_file(html, render(spec, measured, socket.gethostname(), shlex.join(["laxity", *sys.argv[1:]])))
        click.echo(f"Wrote {html}", err=True)
    sys.exit(1 if failures else 0)


def measured_profile(stated: Profile | None, measured: Sequence[StageTimes]) -> Profile:
    """A stage's profile with what was measured of it on some types of devices. What it states of others stays, and a
    type's memory where nobody could measure it; where nothing is stated of all others, what the first type showed."""
    own: dict[str, Profile] = {}
    for times in measured:
        memory_mb = round(times.memory_mb, 1) or None
        if memory_mb is None and stated is not None:
            memory_mb = stated.on(times.device_type).memory_mb
        own[times.device_type] = Profile(
            latency_ms=_rising({each.batch: each.p99 for each in times.batches}),
            load_ms=round(times.load_seconds * 1e3, 3),
            memory_mb=memory_mb,
        )
    by_type = {**(stated.by_type if stated is not None else {}), **own}
    states_others = stated is not None and (stated.alpha_ms is not None or stated.latency_ms is not None)
    outer = stated if stated is not None and states_others else own[measured[0].device_type]
    return msgspec.structs.replace(outer, by_type=by_type)


def _rising(seconds: Mapping[int, float]) -> dict[int, float]:
    """Milliseconds by batch size, none less than a smaller batch's: that would be noise."""
    rising: dict[int, float] = {}
    highest = 0.001
    for batch, latency in sorted(seconds.items()):
        highest = max(highest, round(latency * 1e3, 3))
        rising[batch] = highest
    return rising


def _chosen(spec: PipelineSpec, stages: Sequence[str], batches: Sequence[int]) -> dict[str, list[int]]:
    """The stages to measure, each with its batch sizes ([]: those that suit it). Tells of those that are left out;
    a :class:`click.UsageError` where one cannot be measured that was asked for, or none can."""
    for stage in stages:
        if stage not in spec.stages:
            raise click.UsageError(f"there is no stage {stage!r}; {near(stage, spec.stages, 'there are')}")
    chosen: dict[str, list[int]] = {}
    for stage in dict.fromkeys(stages) or spec.stages:
        what = spec.stages[stage]
        sizes = [size for size in batches if size <= what.max_batch]
        reason = _unmeasurable(stage, what)
        if not reason and batches and not sizes:
            reason = f"{stage}: its max_batch is {what.max_batch}, which all of --batches exceed"
        if not reason:
            chosen[stage] = sizes
        elif stages:
            raise click.UsageError(reason)
        else:
            click.echo(reason, err=True)
    if not chosen:
        raise click.UsageError(f"no stage of {spec.name} can be measured")
    return chosen


def _unmeasurable(name: str, stage: StageSpec) -> str:
    """Why a stage cannot be measured; '' if it can."""
    if stage.executor == "emulated":
        return f"{name}: it is emulated, and its profile is what the spec states"
    if stage.sample is None:
        return (
            f"{name}: it has no sample to run; add `sample: package.module:function` to it, a function without "
            "arguments that returns one example of the stage's input"
        )
    return ""


def _check_place(spec: PipelineSpec, file: Path) -> None:
    """Refuse a file that would not find what lies beside the spec."""
    if file.resolve().parent == Path(spec.root):
        return
    try:
        needed = needed_paths(spec)
    except (FilesError, ModelNotFoundError) as error:
        raise click.UsageError(f"{file} would not find what the pipeline needs: {error}") from None
    if needed:
        raise click.UsageError(f"{file} would not find {', '.join(needed)}: write into {spec.root}")


def _with_profiles(text: str, profiles: Mapping[str, Profile], spec: PipelineSpec, file: Path) -> str:
    """The text of ``file``: the spec's, with these profiles."""
    try:
        return with_profiles(text, profiles, file=str(file), root=str(file.resolve().parent))
    except CannotEdit as error:
        raise click.ClickException(str(error)) from None
    except SpecError as error:
        raise click.ClickException(f"{file} would not be a valid pipeline:\n{error}") from None


def _as_json(spec: PipelineSpec, measured: Sequence[StageTimes], profiles: Mapping[str, Profile]) -> dict[str, Any]:
    """Times in seconds."""
    return {
        "pipeline": spec.name,
        "measured": [
            {
                "stage": times.stage,
                "device_type": times.device_type,
                "load_s": times.load_seconds,
                "memory_mb": times.memory_mb,
                "fit": _fit_as_json(times.fit()),
                "batches": [
                    {
                        "batch": each.batch,
                        "runs": len(each.latency),
                        "median_s": each.median,
                        "p99_s": each.p99,
                        "worst_s": each.worst,
                        "inputs_s": each.inputs_median,
                        "per_second": each.throughput,
                    }
                    for each in times.batches
                ],
            }
            for times in measured
        ],
        "profiles": {stage: msgspec.to_builtins(found, str_keys=True) for stage, found in profiles.items()},
    }


def _fit_as_json(fit: LinearFit) -> dict[str, float]:
    return {"alpha_s": fit.alpha, "beta_s": fit.beta, "error": fit.error}
