"""What ``laxity load`` tells people: a table of steps and pipelines, and what they must know before they believe it."""

from __future__ import annotations

from collections.abc import Sequence

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.load.results import Figures, StepResult
from cli.options import print_table
from laxity.outcomes import Outcome
from pipelines import format_duration

TOLERATED_LAG_MS = 3.0
_NARROW = 118
"""Columns of a terminal below which some latencies are left out."""
_FEW = ("p50", "p99", "max")
_ALL = ("p50", "p90", "p95", "p99", "p999", "max")
_HEADS = {"p999": "p99.9"}


def print_results(about: Sequence[str], results: Sequence[StepResult]) -> None:
    """``about`` are lines on what was done."""
    for line in about:
        click.echo(line)
    console = Console()
    shown = _FEW if console.is_terminal and console.width < _NARROW else _ALL
    table = Table("load", "requests", "offered/s", "good/s", "in SLO", "not good")
    for name in shown:
        table.add_column(f"{_HEADS.get(name, name)} ms", justify="right")
    for result in results:
        for number, (name, figures) in enumerate(_rows(result)):
            table.add_row(
                Text("" if number else label(result)),
                Text(name),
                f"{figures.offered_rps:,.1f}",
                f"{figures.goodput_rps:,.1f}",
                f"{figures.slo_attainment:.2%}",
                Text(_not_good(figures)),
                *(f"{figures.latency_ms[name]:,.1f}" if figures.outcomes["ok"] else "–" for name in shown),
            )
    print_table(table)
    for result in results:
        told = _told(result)
        if told:
            click.echo(f"{label(result)}: {told}")


def label(result: StepResult) -> str:
    """What a step is called."""
    return result.demand.label + (", interrupted" if result.interrupted else "")


def kind_name(figures: Figures) -> str:
    """The pipeline, and what sets these requests apart from its others."""
    slo = "" if figures.slo is None else f" within {format_duration(figures.slo)}"
    return f"{figures.pipeline}{slo}{f', priority {figures.priority}' if figures.priority else ''}"


def _rows(result: StepResult) -> list[tuple[str, Figures]]:
    found = [(figures.pipeline, figures) for figures in result.pipelines]
    if len(found) > 1:
        found = [("all", result.total), *found]
    return found + [(kind_name(figures), figures) for figures in result.kinds]


def _not_good(figures: Figures) -> str:
    counts = {name: count for name, count in figures.outcomes.items() if name != Outcome.OK}
    counts["not sent"] = figures.unsent
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "none"


def _told(result: StepResult) -> str:
    said = []
    total = result.total
    if result.bound_rps is not None and result.capacity_rps is not None:
        load = total.offered_rps / result.capacity_rps
        said.append(
            f"load {load:.2f} of {result.capacity_rps:,.1f}/s; fluid bound {result.bound_rps:,.1f}/s, of which "
            f"{result.bound_ratio:.1%} were reached"
        )
    drops = ", ".join(f"{count:,} at {stage}" for stage, count in total.drops_by_stage.items() if count)
    if drops:
        said.append(f"dropped or expired {drops}")
    lag = result.lag_ms
    said.append(f"generator's lag p99 {lag['p99']:.1f} ms, longest {lag['max']:.1f} ms")
    return "; ".join(said)


def warn(results: Sequence[StepResult]) -> None:
    """On stderr: what people must know before they believe the figures."""
    for result in results:
        where = f"{label(result)}: " if len(results) > 1 else ""
        for end in result.total.ends:
            if end.outcome not in (Outcome.DROPPED, Outcome.EXPIRED):
                at = f" at {end.stage}" if end.stage else ""
                click.echo(f"{where}{end.requests:,} {end.outcome}{at}; the first: {end.first}", err=True)
        if result.total.unsent:
            click.echo(
                f"{where}{result.total.unsent:,} requests were not sent, as --in-flight others (or 1 GiB of payloads) "
                "were under way: raise that, or lower the load",
                err=True,
            )
        if result.steady is False and not result.interrupted:
            click.echo(
                f"{where}goodput and latency did not become steady within --max-trials intervals; the figures are of "
                "the last three: take more or longer ones, or --duration",
                err=True,
            )
        lag = result.lag_ms["p99"]
        if lag > TOLERATED_LAG_MS:
            click.echo(
                f"{where}the generator itself was late ({lag:.1f} ms at p99): the figures are this machine's as much "
                "as the cluster's; give it more CPU, run it elsewhere, or lower the load",
                err=True,
            )
