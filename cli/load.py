"""``laxity load``: requests at a rate, from a trace or a process, and what became of them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cli.load_report import figures, print_figures, warn
from cli.open_loop import OpenLoop
from cli.options import (
    check_duration,
    cluster_option,
    explain_errors,
    find_store,
    json_option,
    near,
    not_running,
    print_json,
    shard_option,
    slo_option,
    store_option,
)
from cli.rollout import waits_for
from cli.snapshot import look
from cli.submit import connect
from cluster.records import READY
from laxity import Client
from laxity.outcomes import Outcome
from pipelines import PipelineSpec, format_duration
from pipelines.capacity import capacity, pool_capacity
from pipelines.graph import Graph
from simulation.arrivals import PROCESSES, Source, TraceError, parse_window, prepare
from simulation.metrics import Floats

FASTEST = 50_000.0
"""Requests per second above which no single load generator gets."""


def _window(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        return parse_window(value)
    except TraceError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.argument("pipeline", metavar="PIPELINE")
@click.option(
    "--trace",
    "--process",
    "trace",
    default="poisson",
    show_default=True,
    metavar="FILE|PROCESS",
    help=f"When requests come: a trace file, or one of {PROCESSES}.",
)
@click.option("--as-seconds", is_flag=True, help="Read each row of the trace as one second.")
@click.option("--superpose", type=click.IntRange(1, 1000), default=1, metavar="N", help="Lay N shifted copies over it.")
@click.option("--window", callback=_window, metavar="BEGIN:END", help="Use this part of it, in seconds.")
@click.option("--duration", callback=check_duration, metavar="TIME", help="Use the first so much of it, as in 30s.")
@click.option(
    "--load",
    "relative",
    type=click.FloatRange(0, min_open=True),
    help="Mean rate as a part of the capacity (0.85).",
)
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Mean rate in requests per second.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="What arrivals are drawn from.")
@slo_option
@click.option(
    "--payload-bytes",
    type=click.IntRange(0, 64 * 1024 * 1024),
    default=16,
    show_default=True,
    metavar="N",
    help="Size of each request's payload.",
)
@click.option(
    "--in-flight",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    metavar="N",
    help="How many requests may be under way at once; more are not sent.",
)
@shard_option
@cluster_option
@store_option
@json_option
@explain_errors
def load(
    pipeline: str,
    trace: str,
    as_seconds: bool,
    superpose: int,
    window: tuple[float, float] | None,
    duration: float | None,
    relative: float | None,
    rate: float | None,
    seed: int,
    slo: float | None,
    payload_bytes: int,
    in_flight: int,
    shard: str | None,
    cluster: str,
    store: str | None,
    as_json: bool,
) -> None:
    """Send requests to a running cluster as a trace or a process has them, and tell how they ended.

    Requests are sent when they are due, whatever became of those before (open loop). A trace file is CSV with the
    columns seconds_offset,requests or arrival_s; it is scaled so that the mean rate over the window is --rate, or
    --load times the capacity: what the bottleneck stage carries in planned batches on the GPUs that hold it now. The
    same seed gives the same arrivals, here and in `laxity simulate`. What GPUs hold is in the cluster's store: with
    --shard nothing is known of them, so that only --rate can be used and there is no bound.

    Beside goodput and drops it tells the fluid bound, Σ min(offered, capacity) over the seconds, and by how much
    requests were sent later than due (lag): a generator that lags measures itself.

    Exit status: 0 if any request ended `ok`, 1 if none did, 2 wrong use, 130 interrupted by Ctrl-C.

    \b
    Examples:
      laxity load tm --rate 100 --duration 10s
      laxity load lv --trace trace.csv --window 330:450 --load 0.85
      laxity load lv --trace gamma:2 --duration 60s --load 0.9 --json
      laxity load lv --rate 500 --duration 1m --store etcd://e1:2379,e2:2379
      laxity load lv --rate 500 --duration 1m --shard tcp://10.0.0.7:7100,tcp://10.0.0.8:7100
    """
    if (relative is None) == (rate is None):
        raise click.UsageError("give either --rate (requests per second) or --load (a part of the capacity)")
    try:
        source = prepare(trace, as_seconds=as_seconds, superpose=superpose, window=window, seconds=duration)
    except TraceError as error:
        raise click.UsageError(str(error)) from None
    target = _known_target(pipeline, cluster, store) if shard is None else _Target(shard, None, [])
    spec = target.spec
    if slo is not None and spec is not None and slo > spec.slo:
        raise click.UsageError(
            f"--slo {format_duration(slo)} is longer than the pipeline's {format_duration(spec.slo)}: ask for less"
        )
    carried = _capacity(spec, target.held) if spec is not None else None
    if relative is not None:
        rate = _rate(relative, carried, spec)
    assert rate is not None
    arrivals = _arrivals(source, rate, seed)
    with _client(target.shards, in_flight) as client:
        missing = connect(client)
        if missing is not None:
            raise click.ClickException(missing.detail)
        loop = OpenLoop(client, pipeline, b"x" * payload_bytes, slo, in_flight)
        with _Bar(loop, source.length) as bar:
            loop.run(arrivals, bar.show)
    if spec is not None and carried is not None and _known_target(pipeline, cluster, store).held != target.held:
        click.echo("the GPUs that hold it changed meanwhile: no bound can be told", err=True)
        carried = None
    found = {
        "pipeline": pipeline,
        "trace": source.name,
        "seed": seed,
        **_gpus(spec, target.held),
        "seconds": source.length,
        **figures(loop, Graph(spec).order if spec is not None else (), arrivals, source.length, carried),
    }
    if as_json:
        print_json(found)
    else:
        print_figures(found)
    warn(loop, found)
    if not loop.outcomes[Outcome.OK]:
        sys.exit(1)


class _Target(NamedTuple):
    """What the load is for: the shards' addresses, the pipeline (None: only the shards know it), and which of its
    stages each GPU holds that holds any."""

    shards: str
    spec: PipelineSpec | None
    held: list[list[str]]


def _known_target(pipeline: str, cluster: str, store: str | None) -> _Target:
    """What a cluster's records say of a pipeline."""
    seen = look(find_store(cluster, store), cluster)
    if not seen.brokers:
        raise not_running(cluster)
    if pipeline not in seen.serving:
        if pipeline in seen.pipelines:
            why = waits_for(seen, seen.pipelines[pipeline].spec)
            raise click.ClickException(f"the pipeline {pipeline!r} is applied but not served yet: {why}")
        hint = near(pipeline, seen.serving, "it serves")
        raise click.ClickException(f"the cluster {cluster!r} serves no pipeline {pipeline!r}; {hint}")
    spec = seen.serving[pipeline].spec
    stages = {spec.model_key(stage): stage for stage in spec.stages}
    held = [
        [stages[model] for model, state in device.models.items() if state == READY and model in stages]
        for node in seen.nodes.values()
        for device in node.devices
    ]
    missing = set(spec.stages) - {stage for stages_held in held for stage in stages_held}
    if missing:
        raise click.ClickException(
            f"no GPU is ready for stage {', '.join(sorted(missing))} of {pipeline!r}; see `laxity status`"
        )
    shards = ",".join(record.frontend for record in seen.brokers.values())
    return _Target(shards, spec, [stages_held for stages_held in held if stages_held])


def _client(shards: str, in_flight: int) -> Client:
    try:
        return Client(shards, max_pending=in_flight)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _shared(held: Sequence[Sequence[str]]) -> bool:
    return any(len(stages) > 1 for stages in held)


def _capacity(spec: PipelineSpec, held: Sequence[Sequence[str]]) -> float | None:
    """Requests per second that the GPUs carry; where stages share some, what all GPUs would carry together. None for
    a pipeline with a stage whose profile is not known beforehand."""
    if any(stage.profile is None for stage in spec.stages.values()):
        return None
    if _shared(held):
        return pool_capacity([spec], [1.0], len(held))
    return capacity(spec, Counter(stage for stages in held for stage in stages))


def _gpus(spec: PipelineSpec | None, held: Sequence[Sequence[str]]) -> dict[str, Any]:
    if spec is None:
        return {"gpus": None, "split": []}
    counts = Counter(stage for stages in held for stage in stages)
    return {"gpus": len(held), "split": [] if _shared(held) else [counts[stage] for stage in Graph(spec).order]}


def _rate(relative: float, carried: float | None, spec: PipelineSpec | None) -> float:
    if spec is None:
        raise click.UsageError("--load is a part of the capacity, which is not known with --shard; use --rate")
    if carried is None:
        unknown = ", ".join(name for name, stage in spec.stages.items() if stage.profile is None)
        raise click.ClickException(
            f"the capacity of {spec.name!r} is not known, as stage {unknown} has no profile; use --rate"
        )
    return relative * carried


def _arrivals(source: Source, rate: float, seed: int) -> Floats:
    if rate > FASTEST:
        raise click.UsageError(f"{rate:,.0f} requests per second are more than the {FASTEST:,.0f} that can be sent")
    try:
        arrivals = source.draw(rate, seed)
    except TraceError as error:
        raise click.UsageError(str(error)) from None
    if not len(arrivals):
        raise click.UsageError(
            f"no request falls into {source.length:g} s at {rate:g} per second: raise the rate or take longer"
        )
    return arrivals


class _Bar:
    """How far it is, on stderr where that is a terminal."""

    def __init__(self, loop: OpenLoop, seconds: float) -> None:
        console = Console(stderr=True)
        self._loop = loop
        self._progress = Progress(
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=seconds)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, elapsed: float) -> None:
        loop = self._loop
        what = f"{loop.submitted:,} sent, {loop.in_flight:,} in flight, {loop.outcomes[Outcome.OK]:,} ok"
        self._progress.update(self._task, completed=elapsed, description=what)
