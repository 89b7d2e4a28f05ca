"""What a load is to do, made from what the command line says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from cli.load.ranges import Part, by_pipeline, parse_parts
from cli.load.results import Demand
from cli.load.steps import Step
from cli.load.target import Target, check_slo, find_target
from cli.load.traffic import Kind, Replay, Traffic
from cli.recording import scan
from pipelines import format_duration
from pipelines.duration import parse_duration
from simulation.arrivals import Source
from simulation.metrics import Floats

FASTEST = 50_000.0
"""Requests per second above which no single load generator gets."""
MOST_KINDS = 64


class Asked(NamedTuple):
    """The options of which one says what kind of load it is."""

    rates: Sequence[float] | None
    loads: Sequence[float] | None
    concurrencies: Sequence[int] | None
    replay: Path | None

    @property
    def closed(self) -> bool:
        return self.concurrencies is not None

    def check(self, others: dict[str, Any]) -> None:
        """Refuse what does not go together."""
        if sum(option is not None for option in self) != 1:
            raise click.UsageError(
                "give one of --request-rate-range (requests per second), --load (parts of the capacity), "
                "--concurrency-range (requests at a time) and --replay (a recording)"
            )
        given = {name for name, value in others.items() if value}
        wrong: set[str] = set()
        with_what = ""
        if self.replay is not None:
            wrong = given - {"--speed", "--window"}
            with_what = "--replay, which sends what was recorded"
        else:
            if "--speed" in given:
                raise click.UsageError("--speed goes with --replay only")
            if self.closed:
                wrong = given & {"--trace", "--window", "--as-seconds", "--superpose"}
                with_what = "--concurrency-range, where requests are due when others have ended"
            elif "--trace" not in given:
                wrong = given & {"--window", "--as-seconds", "--superpose"}
                with_what = "a steady rate: give --trace FILE"
        if wrong:
            raise click.UsageError(f"{', '.join(sorted(wrong))} does not go with {with_what}")


class Plan(NamedTuple):
    """What is to be done: ``shares`` are the parts of each pipeline, ``told`` says where the arrivals come from."""

    target: Target
    traffic: Traffic
    steps: list[Step]
    shares: dict[str, float]
    told: str

    def about(self, seed: int, closed: bool) -> list[str]:
        """Lines for people on what is done."""
        gpus = self.target.gpus()
        names = ", ".join(self.shares)
        where = names
        if gpus["gpus"] is not None:
            split = "; ".join(",".join(map(str, counts)) for counts in gpus["split"].values())
            where = f"{names} on {gpus['gpus']} GPUs{f' ({split})' if split else ''}"
        since = "were sent" if closed else "were due"
        length = "" if closed else f", {self.steps[0].seconds:g} s"
        return [f"{where}: {self.told}{length}, seed {seed}; latencies count from when requests {since}"]


def weights(pipelines: Sequence[str]) -> dict[str, float]:
    """{'lv': 3.0, 'tm': 1.0} of lv:3 tm:1."""
    if not pipelines:
        raise click.UsageError("say which pipelines to send requests to, as in `laxity load ocr ...`")
    parts: dict[str, float] = {}
    for text in pipelines:
        try:
            (part,) = parse_parts(text, str)
        except ValueError:
            raise click.UsageError(
                f"{text!r} is none of PIPELINE and PIPELINE:PART with a number above 0, as in lv:3"
            ) from None
        if part.value in parts:
            raise click.UsageError(f"the pipeline {part.value!r} is given twice")
        parts[part.value] = part.weight
    return parts


def kinds_of(parts: dict[str, float], target: Target, slos: Sequence[str], priorities: Sequence[str]) -> list[Kind]:
    """Every pipeline's budgets with its priorities, by --slo and --priority."""
    budgets = by_pipeline(slos, parts, "--slo")
    ranks = by_pipeline(priorities, parts, "--priority")
    kinds = []
    for name, weight in parts.items():
        spec = target.specs.get(name)
        own: list[Part[float | None]] = [Part(None, 1.0)]
        if budgets[name]:
            own = [*_parsed("--slo", ",".join(budgets[name]), parse_duration)]
            for part in own:
                assert part.value is not None
                check_slo(spec, part.value, format_duration(part.value))
        levels = [Part(0, 1.0)]
        if ranks[name]:
            levels = _parsed("--priority", ",".join(ranks[name]), _priority)
        whole = sum(part.weight for part in own) * sum(part.weight for part in levels)
        kinds += [
            Kind(name, budget.value, level.value, weight * budget.weight * level.weight / whole)
            for budget in own
            for level in levels
        ]
    if len(kinds) > MOST_KINDS:
        raise click.UsageError(f"--slo and --priority make {len(kinds)} kinds of requests, more than {MOST_KINDS}")
    return kinds


def _parsed(option: str, text: str, convert: Any) -> list[Part[Any]]:
    try:
        return parse_parts(text, convert)
    except ValueError as error:
        raise click.UsageError(f"{option} {text}: {error}") from None


def _priority(text: str) -> int:
    if text not in ("0", "1"):
        raise ValueError(f"a priority is 0 or 1 (highest), not {text!r}")
    return int(text)


def open_steps(
    source: Source,
    rates: Sequence[float] | None,
    loads: Sequence[float] | None,
    carried: float | None,
    target: Target,
    seed: int,
) -> list[Step]:
    if rates is None:
        assert loads is not None
        if not target.specs:
            raise click.UsageError(
                "--load is a part of the capacity, which is not known with --shard; use --request-rate-range"
            )
        if carried is None:
            raise click.ClickException(
                f"the capacity is not known, as stage {', '.join(target.unprofiled())} has no profile; use "
                "--request-rate-range"
            )
        demands = [Demand(f"load {part:g}", rate=part * carried, load=part) for part in loads]
    else:
        demands = [Demand(f"{rate:,g}/s", rate=rate) for rate in rates]
    return [Step(demand, _arrivals(source, demand.rate or 0.0, seed), source.length) for demand in demands]


def _arrivals(source: Source, rate: float, seed: int) -> Floats:
    if rate > FASTEST:
        raise click.UsageError(f"{rate:,.0f} requests per second are more than the {FASTEST:,.0f} that can be sent")
    arrivals = source.draw(rate, seed)
    if not len(arrivals):
        raise click.UsageError(
            f"no request falls into {source.length:g} s at {rate:g} per second: raise the rate or take longer"
        )
    return arrivals


def replayed(
    file: Path,
    pipelines: Sequence[str],
    speed: float,
    window: tuple[float, float] | None,
    duration: float | None,
    cluster: str,
    store: str | None,
    shard: str | None,
) -> Plan:
    recording = scan(file)
    if not recording.names:
        raise click.ClickException(f"there is no request in {file}")
    for name in pipelines:
        if name not in recording.names:
            raise click.UsageError(f"there is no request for {name!r} in {file}, only for {', '.join(recording.names)}")
    begin, end = window if window is not None else (0.0, recording.seconds)
    if begin >= recording.seconds:
        raise click.UsageError(f"--window begins at {begin:g} s, behind the {recording.seconds:.1f} s of {file}")
    end = min(end, recording.seconds) if duration is None else min(begin + duration, end, recording.seconds)
    if end == recording.seconds:
        end = math.nextafter(end, math.inf)  # a request at its very end is in it
    traffic = Replay(recording, list(pipelines) or recording.names, (begin, end))
    if not len(traffic.arrivals):
        raise click.UsageError(f"no request falls into {begin:g}:{end:g} of {file}")
    if not recording.ended:
        click.echo(f"{file} was not ended properly: it holds what was recorded until then", err=True)
    if recording.lost:
        click.echo(f"{recording.lost:,} requests that came during the recording are not in {file}", err=True)
    target = find_target([kind.pipeline for kind in traffic.kinds], cluster, store, shard)
    whole = sum(kind.weight for kind in traffic.kinds)
    shares = {kind.pipeline: kind.weight / whole for kind in traffic.kinds}
    seconds = max((end - begin) / speed, 1e-3)
    told = f"{file.name}{f' at {speed:g} times its speed' if speed != 1.0 else ''}"
    step = Step(Demand(f"replay{f' x{speed:g}' if speed != 1.0 else ''}"), traffic.arrivals / speed, seconds)
    made_up = "" if recording.payloads else ", payloads made up by their recorded sizes"
    return Plan(target, traffic, [step], shares, f"{told}{made_up}")
