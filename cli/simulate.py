"""``laxity simulate``: pipelines on a cluster of GPUs in virtual time."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from cli.options import check_duration, check_split_option, explain_errors, json_option, print_json
from cli.output_file import check_directory, html_option, write_file
from cli.progress import RunsDisplay
from cli.runs import Run, RunDied, execute_all
from cli.scenario import Demand, Hardware, ScenarioError, build_scenario, one_each, parse_loss, parse_policies
from cli.simulate_tables import print_results
from pipelines import PipelineSpec, load_spec, validate
from pipelines.policies import DEFAULT
from pipelines.problems import SpecNotFound
from simulation.arrivals import PROCESSES, TraceError, parse_window, prepare
from simulation.autoscale import Autoscale
from simulation.report import render
from simulation.results import alike, public
from simulation.run import Cluster, Network, Workload


def _windows(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[float, float], ...]:
    try:
        return tuple(parse_window(value) for value in values)
    except TraceError as error:
        raise click.BadParameter(str(error)) from None


def _durations(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[float, ...]:
    return tuple(seconds for seconds in (check_duration(context, parameter, value) for value in values) if seconds)


def _delay(context: click.Context, parameter: click.Parameter, value: str) -> float:
    return 0.0 if value == "0" else check_duration(context, parameter, value) or 0.0


_POSITIVE = click.FloatRange(0, min_open=True)


@click.command()
@click.argument("names", metavar="SPEC...", nargs=-1, required=True)
@click.option("--gpus", type=click.IntRange(1, 100_000), help="GPUs of the cluster (default: those of --split).")
@click.option(
    "--split",
    callback=check_split_option,
    metavar="N,N,...",
    help="GPUs of each stage, in the order of the SPECs and their stages.",
)
@click.option("--pool", is_flag=True, help="Let every GPU serve every stage of every SPEC.")
@click.option(
    "--autoscale", is_flag=True, help="Let the coordinator's planner decide what each GPU holds, and which are at rest."
)
@click.option(
    "--load-time",
    default="1.5s",
    show_default=True,
    callback=check_duration,
    metavar="TIME",
    help="With --autoscale: what loading a model takes where its profile does not say.",
)
@click.option(
    "--boot-time",
    default="0",
    show_default=True,
    callback=_delay,
    metavar="TIME",
    help="With --autoscale: power empty hosts down; they take so long to boot (0: they stay up).",
)
@click.option(
    "--trace",
    "--process",
    "traces",
    multiple=True,
    metavar="FILE|PROCESS",
    help=f"When requests come: a trace file, or one of {PROCESSES} (default: poisson).",
)
@click.option("--as-seconds", is_flag=True, help="Read each row of the traces as one second.")
@click.option(
    "--superpose", multiple=True, type=click.IntRange(1, 1000), metavar="N", help="Lay N shifted copies over it."
)
@click.option(
    "--window",
    "windows",
    multiple=True,
    callback=_windows,
    metavar="BEGIN:END",
    help="Use this part of it, in seconds.",
)
@click.option("--duration", callback=check_duration, metavar="TIME", help="Use the first so much of it, as in 30s.")
@click.option("--load", "loads", multiple=True, type=_POSITIVE, help="Mean rate as a part of the capacity (0.85).")
@click.option("--rate", "rates", multiple=True, type=_POSITIVE, help="Mean rate in requests per second.")
@click.option(
    "--slo",
    "slos",
    multiple=True,
    callback=_durations,
    metavar="TIME",
    help="The SLO in place of the SPEC's, as in 400ms.",
)
@click.option(
    "--policy",
    "policies",
    default=DEFAULT,
    show_default=True,
    metavar="NAME,...",
    help="Policies to compare; 'all': laxity and its peers, 'ablations': pard and its variants.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="What all chance is drawn from.")
@click.option(
    "--jitter",
    type=click.FloatRange(0, 2),
    default=0.0,
    metavar="SIGMA",
    help="Standard deviation of the logarithm of execution times.",
)
@click.option(
    "--stragglers", type=click.FloatRange(0, 1), default=0.0, metavar="PART", help="The part of batches that take long."
)
@click.option(
    "--straggler-factor",
    type=click.FloatRange(1),
    default=5.0,
    show_default=True,
    metavar="FACTOR",
    help="How much longer those take.",
)
@click.option("--gpus-per-agent", type=click.IntRange(1), default=8, show_default=True, help="GPUs of each host.")
@click.option(
    "--lose",
    "losses",
    multiple=True,
    metavar="HOST@T[:BACK]",
    help="Lose a host (from 0) at second T, until second BACK; may be repeated.",
)
@click.option(
    "--network-delay",
    default="0.1ms",
    show_default=True,
    callback=_delay,
    metavar="TIME",
    help="What each message takes, one way.",
)
@click.option(
    "--network-per-request",
    default="0",
    show_default=True,
    callback=_delay,
    metavar="TIME",
    help="What a grant takes more for each of its requests.",
)
@click.option(
    "--network-response",
    default="0.1ms",
    show_default=True,
    callback=_delay,
    metavar="TIME",
    help="What a batch's results take.",
)
@click.option(
    "--network-jitter",
    default="0",
    show_default=True,
    callback=_delay,
    metavar="TIME",
    help="Up to so much more, a message.",
)
@click.option("--jobs", type=click.IntRange(1, 1024), help="Processes to run policies in (default: one a core).")
@html_option
@json_option
@explain_errors
def simulate(
    names: tuple[str, ...],
    gpus: int | None,
    split: list[int] | None,
    pool: bool,
    autoscale: bool,
    load_time: float,
    boot_time: float,
    traces: tuple[str, ...],
    as_seconds: bool,
    superpose: tuple[int, ...],
    windows: tuple[tuple[float, float], ...],
    duration: float | None,
    loads: tuple[float, ...],
    rates: tuple[float, ...],
    slos: tuple[float, ...],
    policies: str,
    seed: int,
    jitter: float,
    stragglers: float,
    straggler_factor: float,
    gpus_per_agent: int,
    losses: tuple[str, ...],
    network_delay: float,
    network_per_request: float,
    network_response: float,
    network_jitter: float,
    jobs: int | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Simulate pipelines on a cluster of GPUs in virtual time, under one policy or several.

    The engines are those that run in production; GPUs take the times of the stages' profiles. A SPEC is a YAML file or
    the name of a shipped pipeline. Several SPECs share one cluster. --trace, --superpose, --window, --load, --rate and
    --slo are given once for all, or once for each SPEC; with a single SPEC, all but --slo may be given more often, and
    make so many runs.

    A trace file is CSV with the columns seconds_offset,requests or arrival_s; it is scaled so that the mean rate over
    the window is --rate, or --load times the capacity: what the bottleneck stage carries in planned batches. Without
    --split or --pool the stages get GPUs such that the least capacity is as high as can be. With several SPECs, --load
    is each one's own: a part of what its own GPUs carry, which are as many as all need for the same rate (with --rate:
    for their rates); with --pool a part of its equal share of what all GPUs carry together. The same seed gives the
    same requests under every policy, and in `laxity load`.

    With --autoscale the planner that coordinators run places models on GPUs and takes them off, each second, by the
    rates that the shard reports; it begins with what the rate of the first second asks for. --gpus is the pool, and
    capacity and bound are what all of it could carry. A GPU counts as allocated from when a load is ordered until it
    holds nothing and its last batch has ended; moves are changes of what a GPU holds.

    The fluid bound is Σ min(offered, capacity) over the seconds. Drops are requests not answered within their SLO, and
    avoidable beyond what the bound leaves; invalid is GPU time that went into them; the floor is the GPU time that the
    good requests take in planned batches.

    Exit status: 0 simulated, 1 failed, 2 wrong use, 130 interrupted by Ctrl-C.

    \b
    Examples:
      laxity simulate lv --gpus 64 --load 0.9 --duration 60s
      laxity simulate lv --gpus 64 --trace trace.csv --window 330:450 --load 0.85 --policy all --html report.html
      laxity simulate lv --gpus 64 --split 40,6,5,7,6 --duration 60s --rate 3000 --policy laxity,pard,nexus --seed 2
      laxity simulate tm --gpus 16 --pool --trace gamma:2 --duration 2m --load 0.5 --load 0.85 --load 0.95 --json
      laxity simulate lv tm --gpus 64 --duration 60s --rate 800 --rate 1500 --policy laxity,pard:lambda=0.15
      laxity simulate lv --gpus 64 --duration 60s --load 0.8 --jitter 0.05 --lose 2@20:40
      laxity simulate lv --gpus 64 --trace trace.csv --load 0.36 --autoscale --html report.html
      laxity simulate lv tm --gpus 64 --trace step:1x30,3x30 --load 0.3 --autoscale --load-time 2s --boot-time 20s
    """
    if gpus is None:
        if split is None:
            raise click.UsageError("say how many GPUs there are: --gpus 64, or --split with those of each stage")
        gpus = sum(split)
    if pool and split is not None:
        raise click.UsageError("with --pool every GPU serves every stage: leave out --split")
    if autoscale and (pool or split is not None):
        raise click.UsageError("with --autoscale the planner decides who holds what: leave out --split and --pool")
    if bool(loads) == bool(rates):
        raise click.UsageError("give either --rate (requests per second) or --load (a part of the capacity)")
    check_directory(html)
    try:
        chosen = list(dict.fromkeys(parse_policies(policies)))
        specs = _specs(names, slos)
        together = _demands(specs, traces, as_seconds, superpose, windows, duration, loads, rates)
        # Fewer GPUs than stages can only be shared, which is what the planner has them do.
        stages = sum(len(spec.stages) for spec in specs)
        hardware = Hardware(gpus=gpus, split=split, pool=pool or (autoscale and gpus < stages))
        scenarios = [build_scenario(demands, hardware, seed) for demands in together]
        faults = [parse_loss(text, -(-gpus // gpus_per_agent)) for text in losses]
    except (SpecNotFound, ValueError) as error:
        raise click.UsageError(str(error)) from None
    network = Network(
        control=network_delay, per_request=network_per_request, response=network_response, jitter=network_jitter
    )
    runs = [
        Run(
            workloads=[
                Workload(spec, policy, arrivals)
                for spec, arrivals in zip(scenario.specs, scenario.arrivals, strict=True)
            ],
            cluster=Cluster(
                held=scenario.held,
                gpus_per_agent=gpus_per_agent,
                jitter=jitter,
                stragglers=stragglers,
                straggler_factor=straggler_factor,
                network=network,
                faults=faults,
                autoscale=Autoscale(load_seconds=load_time, boot=boot_time) if autoscale else None,
            ),
            seconds=scenario.seconds,
            seed=seed,
        )
        for scenario in scenarios
        for policy in chosen
    ]
    try:
        with RunsDisplay([run.workloads[0].policy for run in runs]) as display:
            found = execute_all(runs, jobs if jobs is not None else os.cpu_count() or 1, display.show)
    except RunDied as error:
        raise click.ClickException(str(error)) from None
    results = [
        msgspec.structs.replace(result, trace=trace)
        for number, of_run in enumerate(found)
        for result, trace in zip(of_run, scenarios[number // len(chosen)].traces, strict=True)
    ]
    objectives = {spec.name: spec.slo for spec in specs}
    if as_json:
        print_json([public(result) for result in results])
    else:
        for number, group in enumerate(alike(results)):
            if number:
                click.echo()
            print_results(group, objectives[group[0].pipeline])
    if html is not None:
        write_file(html, render(results, objectives, shlex.join(["laxity", *sys.argv[1:]])))
        click.echo(f"Report: {html}", err=True)


def _specs(names: Sequence[str], slos: Sequence[float]) -> list[PipelineSpec]:
    """The pipelines, with other SLOs where those are given."""
    specs: list[PipelineSpec] = []
    for name, slo in zip(names, one_each(slos, len(names), "--slo", "SPECs", None), strict=True):
        spec = load_spec(name)
        if any(spec.name == other.name for other in specs):
            raise ScenarioError(f"two of the SPECs are named {spec.name!r}; a cluster serves each name once")
        if slo is not None:
            spec = msgspec.structs.replace(spec, slo=slo)
            for problem in validate(spec):
                raise ScenarioError(f"--slo does not suit pipeline {spec.name!r}: {problem.message}; {problem.advice}")
        specs.append(spec)
    return specs


def _demands(
    specs: Sequence[PipelineSpec],
    traces: Sequence[str],
    as_seconds: bool,
    superpose: Sequence[int],
    windows: Sequence[tuple[float, float]],
    duration: float | None,
    loads: Sequence[float],
    rates: Sequence[float],
) -> list[list[Demand]]:
    """What is to be simulated together, run by run: one run of all ``specs``, or, of a single one, as many as an option
    is given times."""
    several = len(specs) > 1
    count = len(specs) if several else max(map(len, (traces, superpose, windows, loads, rates)))
    what = "SPECs" if several else "runs"
    demands = [
        Demand(
            spec=spec,
            source=prepare(trace, as_seconds=as_seconds, superpose=copies, window=window, seconds=duration),
            load=load,
            rate=rate,
        )
        for spec, trace, copies, window, load, rate in zip(
            specs if several else list(specs) * count,
            one_each(traces, count, "--trace", what, "poisson"),
            one_each(superpose, count, "--superpose", what, 1),
            one_each(windows, count, "--window", what, None),
            one_each(loads, count, "--load", what, None),
            one_each(rates, count, "--rate", what, None),
            strict=True,
        )
    ]
    return [demands] if several else [[demand] for demand in demands]
