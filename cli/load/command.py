"""``laxity load``: requests to a running cluster, at rates, from traces or recordings, and what became of them."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from cli.load.generator import Generator
from cli.load.page import render
from cli.load.payloads import payloads
from cli.load.plan import Asked, Plan, kinds_of, open_steps, replayed, weights
from cli.load.port import ClientPort, interruptible
from cli.load.progress import Progress
from cli.load.ranges import by_pipeline, check_range, check_whole_range
from cli.load.results import Demand, StepResult, public, step_result
from cli.load.steps import Done, Steadiness, Step, run_step, run_steps
from cli.load.tables import print_results, warn
from cli.load.target import find_target
from cli.load.traffic import Mix
from cli.options import (
    check_duration,
    cluster_option,
    explain_errors,
    json_option,
    key_options,
    print_json,
    shard_option,
    store_option,
)
from cli.output_file import check_directory, html_option, write_file
from cli.recording import RecordingError
from cli.shard_access import find_access
from cli.submit import connect
from cluster.records import RecordError
from cluster.store.base import StoreError
from pipelines.duration import parse_duration
from simulation.arrivals import TraceError, parse_window, prepare


def _check_window(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        return parse_window(value)
    except TraceError as error:
        raise click.BadParameter(str(error)) from None


def _check_interval(_context: click.Context, _parameter: click.Parameter, value: str) -> float:
    """Milliseconds, as perf_analyzer counts, or a time with its unit."""
    try:
        return parse_duration(f"{value}ms" if value.isdecimal() else value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _check_distribution(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if value not in ("constant", "poisson") and not value.startswith("gamma:"):
        raise click.BadParameter(f"{value!r} is none of constant, poisson and gamma:CV (as in gamma:2)")
    return value


@click.command()
@click.argument("pipelines", metavar="[PIPELINE[:PART]]...", nargs=-1)
@click.option(
    "--request-rate-range",
    "rates",
    callback=check_range,
    metavar="START[:END[:STEP]]",
    help="Open loop: requests per second, one step after another.",
)
@click.option(
    "--load",
    "loads",
    callback=check_range,
    metavar="START[:END[:STEP]]",
    help="Open loop: the same as parts of the capacity (0.85).",
)
@click.option(
    "--concurrency-range",
    "concurrencies",
    callback=check_whole_range,
    metavar="START[:END[:STEP]]",
    help="Closed loop: so many requests under way at all times.",
)
@click.option(
    "--replay", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Open loop: a recording."
)
@click.option("--speed", type=click.FloatRange(0.01, 100.0), help="How many times as fast to replay it.  [default: 1]")
@click.option(
    "--request-distribution",
    "distribution",
    callback=_check_distribution,
    default="constant",
    show_default=True,
    metavar="NAME",
    help="The gaps between requests: constant, poisson, or gamma:CV with their coefficient of variation.",
)
@click.option("--trace", metavar="FILE", help="Let the rate vary as in a trace (CSV), or step:RATExSECONDS,...")
@click.option("--as-seconds", is_flag=True, help="Read each row of the trace as one second.")
@click.option("--superpose", type=click.IntRange(1, 1000), default=1, metavar="N", help="Lay N shifted copies over it.")
@click.option("--window", callback=_check_window, metavar="BEGIN:END", help="Use this part of it, in seconds.")
@click.option(
    "--duration",
    callback=check_duration,
    metavar="TIME",
    help="Measure each step once, for so long, as in 30s; of a trace or recording, use the first so much.",
)
@click.option(
    "--measurement-interval",
    "interval",
    callback=_check_interval,
    default="5s",
    show_default=True,
    metavar="TIME",
    help="Without --duration: measure intervals of this (5s, or 5000 for milliseconds) until they agree.",
)
@click.option(
    "--max-trials", type=click.IntRange(3, 50), default=10, show_default=True, help="So many intervals at most."
)
@click.option(
    "--stability-percentage",
    type=click.FloatRange(0, 100, min_open=True),
    default=10.0,
    show_default=True,
    help="How far goodput and latency of three intervals may be from their means.",
)
@click.option(
    "--percentile",
    type=click.FloatRange(0, 100, min_open=True),
    default=99.0,
    show_default=True,
    help="The latency that intervals and --latency-threshold are judged by.",
)
@click.option(
    "--latency-threshold",
    type=click.FloatRange(0, min_open=True),
    metavar="MS",
    help="Go through no more steps after one whose latency is above this.",
)
@click.option(
    "--warmup-request-count",
    "warmup",
    type=click.IntRange(0, 1_000_000),
    default=0,
    show_default=True,
    metavar="N",
    help="Requests before each step, at its load, that are not counted.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="What all draws are made from.")
@click.option(
    "--slo",
    "slos",
    multiple=True,
    metavar="[PIPELINE=]TIME[:PART],...",
    help="Latency budgets and their parts, as in 100ms:1,300ms:3 (default: the SLO). May be repeated.",
)
@click.option(
    "--priority",
    "priorities",
    multiple=True,
    metavar="[PIPELINE=]0|1[:PART],...",
    help="Priorities and their parts, as in 0:0.9,1:0.1 (default: 0). May be repeated.",
)
@click.option(
    "--input-data",
    "inputs",
    multiple=True,
    metavar="[PIPELINE=]FILE|DIR|random|zero|samples",
    help="What is sent, one drawn for each request. May be repeated (default: shipped samples, else random).",
)
@click.option(
    "--payload-bytes",
    type=click.IntRange(0, 64 * 1024 * 1024),
    metavar="N",
    help="Size of random and zero payloads.  [default: 16]",
)
@click.option(
    "--in-flight",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    metavar="N",
    help="How many requests may be under way at once; more are not sent.",
)
@click.option(
    "--fail-under",
    type=click.FloatRange(0, 100),
    metavar="PERCENT",
    help="Exit with 1 if less of any step's requests were answered in time.",
)
@shard_option
@key_options()
@cluster_option
@store_option
@json_option
@html_option
@explain_errors
def load(
    pipelines: tuple[str, ...],
    rates: list[float] | None,
    loads: list[float] | None,
    concurrencies: list[int] | None,
    replay: Path | None,
    speed: float | None,
    distribution: str,
    trace: str | None,
    as_seconds: bool,
    superpose: int,
    window: tuple[float, float] | None,
    duration: float | None,
    interval: float,
    max_trials: int,
    stability_percentage: float,
    percentile: float,
    latency_threshold: float | None,
    warmup: int,
    seed: int,
    slos: tuple[str, ...],
    priorities: tuple[str, ...],
    inputs: tuple[str, ...],
    payload_bytes: int | None,
    in_flight: int,
    fail_under: float | None,
    shard: str | None,
    key: str,
    plain: bool,
    cluster: str,
    store: str | None,
    as_json: bool,
    html: Path | None,
) -> None:
    """Send requests to a running cluster, and tell how they ended and how long they took.

    Open loop (--request-rate-range, --load, --replay): each request is sent when it is due, whatever became of those
    before, and its latency counts from then, not from when a late generator came to it. Closed loop
    (--concurrency-range): the next is sent when one has ended, and its latency counts from when it was sent. Flags
    are named as perf_analyzer's, and mean the same.

    Each step is measured for --duration, or else in intervals until three in a row agree. Several pipelines get parts
    of the requests (lv:3 tm:1). --load is a part of what the bottleneck stage carries in planned batches on the GPUs
    that hold it now. A trace is scaled to the rate asked for; the same seed gives the same arrivals, here and in
    `laxity simulate`. docs/load.md tells more.

    Exit status: 0 good; 1 if no request ended `ok`, or too few for --fail-under; 2 wrong use; 130 ended by Ctrl-C,
    after telling what was measured until then.

    \b
    Examples:
      laxity load tm --request-rate-range 100 --duration 10s
      laxity load lv --request-rate-range 100:500:100 --request-distribution poisson --html load.html
      laxity load ocr --concurrency-range 1:8 --measurement-interval 2s
      laxity load lv --trace trace.csv --window 330:450 --load 0.85
      laxity load lv:3 tm:1 --load 0.9 --duration 1m --slo lv=200ms:1,400ms:1 --priority 0:0.9,1:0.1
      laxity load ocr --request-rate-range 5 --input-data scans/ --duration 1m --fail-under 99
      laxity load --replay traffic.rec --speed 2
    """
    asked = Asked(rates, loads, concurrencies, replay)
    asked.check(
        {"--speed": speed, "--slo": slos, "--priority": priorities, "--input-data": inputs, "--trace": trace}
        | {"--window": window, "--warmup-request-count": warmup, "--as-seconds": as_seconds}
        | {"--superpose": superpose > 1}
    )
    if trace is not None and (trace in ("constant", "poisson") or trace.startswith("gamma:")):
        raise click.UsageError(f"{trace!r} is no trace: write --request-distribution {trace} and --duration")
    check_directory(html)
    steadiness = None
    if duration is None and trace is None and replay is None:
        steadiness = Steadiness(interval, max_trials, stability_percentage)
    try:
        plan: Plan
        if replay is not None:
            plan = replayed(replay, pipelines, speed or 1.0, window, duration, cluster, store, shard)
        else:
            parts = weights(pipelines)
            target = find_target(list(parts), cluster, store, shard)
            kinds = kinds_of(parts, target, slos, priorities)
            given = by_pipeline(inputs, parts, "--input-data")
            choice = {name: payloads(name, given[name], payload_bytes, seed) for name in parts}
            whole = sum(parts.values())
            shares = {name: part / whole for name, part in parts.items()}
            if concurrencies is not None:
                most = math.inf if steadiness is None else interval * max_trials
                seconds = duration if duration is not None else most
                steps = [Step(Demand(f"concurrency {n}", concurrency=n), None, seconds) for n in concurrencies]
                told = "closed loop"
            else:
                source = prepare(
                    trace or distribution,
                    as_seconds=as_seconds,
                    superpose=superpose,
                    window=window,
                    seconds=interval * max_trials if steadiness is not None else duration,
                )
                steps = open_steps(source, rates, loads, target.capacity(shares), target, seed)
                told = source.name
            plan = Plan(target, Mix(kinds, choice, seed), steps, shares, told)
    except TraceError as error:
        raise click.UsageError(str(error)) from None
    except RecordingError as error:
        raise click.ClickException(str(error)) from error
    largest = max((step.demand.concurrency or 0 for step in plan.steps), default=0)
    if largest > in_flight:
        raise click.UsageError(f"--concurrency-range goes to {largest:,}, more than --in-flight {in_flight:,}")

    access = find_access(key, plain, cluster, store, shard)
    with access.client(plan.target.shards, in_flight) as client:
        missing = connect(client)
        if missing is not None:
            raise click.ClickException(missing.detail)
        generator = Generator(ClientPort(client), plan.traffic, in_flight)
        with interruptible() as stopped, Progress(len(plan.steps)) as progress:

            def run(step: Step) -> Done:
                progress.begin(step.demand.label)
                return run_step(
                    generator,
                    step,
                    len(plan.traffic.kinds),
                    percentile,
                    steadiness,
                    warmup,
                    stopped,
                    lambda elapsed, tally: progress.show(elapsed, tally, generator),
                )

            done = run_steps(plan.steps, run, percentile, latency_threshold, stopped)
            interrupted = stopped()
    if not done:
        sys.exit(130)
    results = _results(done, plan, percentile, cluster, store)
    about = plan.about(seed, asked.closed)
    if html is not None:
        names = ", ".join(plan.shares)
        write_file(html, render(results, names, about, shlex.join(["laxity", *sys.argv[1:]])))
    if as_json:
        latency_from = "sent" if asked.closed else "due"
        steps_told = [public(result) for result in results]
        head = {"pipelines": plan.shares, "arrivals": plan.told, "seed": seed, **plan.target.gpus()}
        print_json({**head, "percentile": percentile, "latency_from": latency_from, "steps": steps_told})
    else:
        print_results(about, results)
    warn(results)
    if latency_threshold is not None and len(done) < len(plan.steps) and not interrupted:
        click.echo(f"no more steps: the latency is above --latency-threshold {latency_threshold:g} ms", err=True)
    good = any(result.total.outcomes["ok"] for result in results)
    for result in results:
        attained = 100.0 * result.total.slo_attainment
        if fail_under is not None and attained < fail_under:
            click.echo(f"{result.demand.label}: {attained:.2f} % in SLO, below --fail-under {fail_under:g} %", err=True)
            good = False
    if interrupted:
        sys.exit(130)
    if not good:
        sys.exit(1)


def _results(done: Sequence[Done], plan: Plan, percentile: float, cluster: str, store: str | None) -> list[StepResult]:
    target = plan.target
    carried = None if any(share == 0 for share in plan.shares.values()) else target.capacity(plan.shares)
    if carried is not None and _held_now(list(plan.shares), cluster, store) != target.held:
        click.echo("the GPUs that hold the pipelines changed meanwhile: no bound can be told", err=True)
        carried = None
    stages = {name: target.stages(name) for name in plan.shares}
    return [
        step_result(
            one.step.demand,
            plan.traffic.kinds,
            one.tally,
            one.measured,
            percentile,
            stages,
            one.step.arrivals,
            carried,
        )
        for one in done
    ]


def _held_now(pipelines: Sequence[str], cluster: str, store: str | None) -> object:
    try:
        return find_target(pipelines, cluster, store, None).held
    except (click.ClickException, StoreError, RecordError):
        return None  # what was measured is told all the same
