"""What ``laxity load`` tells: figures for programs, a table and warnings for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import msgspec
import numpy as np
from rich.table import Table
from rich.text import Text

from cli.open_loop import OpenLoop
from cli.options import print_table
from laxity.outcomes import Outcome
from simulation.metrics import Floats, fluid_bound, latency, rates

TOLERATED_LAG_MS = 3.0


def figures(
    loop: OpenLoop, stages: Sequence[str], arrivals: Floats, seconds: float, carried: float | None
) -> dict[str, Any]:
    """What came out; the names are those of :class:`simulation.results.RunResult`. Requests that were not sent count
    as offered, and as not good. ``stages`` are in order; those that are not known appear where they dropped."""
    good = loop.outcomes[Outcome.OK]
    bound = float(len(arrivals)) if carried is None else float(fluid_bound(arrivals, seconds, carried)[1].sum())
    found = rates(len(arrivals), good, bound, seconds)._asdict()
    if carried is None:
        found |= dict.fromkeys(("bound_rps", "bound_ratio", "avoidable_drop_rate"))
    p99, most = np.percentile(loop.lags, (99.0, 100.0)) * 1e3
    return {
        "capacity_rps": carried,
        "submitted": loop.submitted,
        "unsent": loop.unsent,
        "outcomes": {str(outcome): loop.outcomes[outcome] for outcome in Outcome},
        **found,
        "latency_ms": msgspec.to_builtins(latency(np.array(loop.latencies))),
        "drops_by_stage": {
            stage: loop.dropped_at[stage] for stage in (*stages, *sorted(loop.dropped_at.keys() - set(stages)))
        },
        "lag_ms": {"p99": float(p99), "max": float(most)},
    }


def print_figures(found: dict[str, Any]) -> None:
    capacity_rps, bound_rps = found["capacity_rps"], found["bound_rps"]
    table = Table("pipeline", found["pipeline"])
    table.add_row("trace", Text(f"{found['trace']}, {found['seconds']:g} s, seed {found['seed']}"))
    if found["gpus"] is not None:
        split = f" ({','.join(map(str, found['split']))})" if found["split"] else ""
        table.add_row("GPUs", f"{found['gpus']}{split}")
    if capacity_rps is not None:
        load = found["offered_rps"] / capacity_rps
        table.add_row("offered", f"{found['offered_rps']:,.1f}/s, load {load:.2f} of {capacity_rps:,.1f}/s")
    else:
        table.add_row("offered", f"{found['offered_rps']:,.1f}/s")
    table.add_row("goodput", f"{found['goodput_rps']:,.1f}/s")
    if bound_rps is not None:
        table.add_row("fluid bound", f"{bound_rps:,.1f}/s, of which {found['bound_ratio']:.1%} were reached")
    avoidable = "" if bound_rps is None else f", avoidable {found['avoidable_drop_rate']:.2%}"
    table.add_row("not good", f"{found['drop_rate']:.2%}{avoidable}")
    ended = (f"{count:,} {outcome}" for outcome, count in found["outcomes"].items() if count)
    table.add_row("requests", ", ".join(ended))
    at = ", ".join(f"{count:,} at {stage}" for stage, count in found["drops_by_stage"].items() if count)
    table.add_row("dropped or expired", Text(at or "none"))
    if found["outcomes"]["ok"]:
        times = found["latency_ms"]
        table.add_row("latency", f"p50 {times['p50']:.1f} ms, p99 {times['p99']:.1f} ms, p99.9 {times['p999']:.1f} ms")
    lag = found["lag_ms"]
    table.add_row("generator's lag", f"p99 {lag['p99']:.1f} ms, longest {lag['max']:.1f} ms")
    print_table(table)


def warn(loop: OpenLoop, found: dict[str, Any]) -> None:
    """On stderr: what people must know before they believe the figures."""
    for outcome, reason in loop.reasons.items():
        if outcome not in (Outcome.DROPPED, Outcome.EXPIRED):
            click.echo(f"{loop.outcomes[outcome]:,} {outcome}; the first: {reason}", err=True)
    if loop.unsent:
        click.echo(
            f"{loop.unsent:,} requests were not sent, as --in-flight others were under way: raise that, or lower the "
            "load",
            err=True,
        )
    lag = found["lag_ms"]["p99"]
    if lag > TOLERATED_LAG_MS:
        click.echo(
            f"the generator lagged ({lag:.1f} ms at p99): the figures are of a load that came later than drawn; give "
            "it more CPU, or lower the rate",
            err=True,
        )
