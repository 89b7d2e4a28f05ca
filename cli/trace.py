"""``laxity trace``: what became of a request, stage by stage."""

from __future__ import annotations

import sys
import time

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.http_options import token_option
from cli.options import (
    cluster_option,
    explain_errors,
    find_store,
    json_option,
    not_running,
    print_json,
    print_table,
    store_option,
)
from cli.trace_source import TraceSource, trace_source
from cli.waterfall import STYLE, Waterfall, ms
from cluster.observe.trace import TraceRecord
from cluster.observe.trace_json import trace_to_json
from laxity.outcomes import Outcome

MOST = 1000
"""Traces that a shard gives at once."""
SAMPLED = (Outcome.OK, Outcome.REJECTED, Outcome.CANCELLED)
"""Requests that end so leave a trace only where they were sampled."""


@click.command()
@click.argument("request", metavar="[REQUEST_ID]", required=False)
@click.option("--outcome", type=click.Choice([outcome.value for outcome in Outcome]), help="List those that ended so.")
@click.option("--pipeline", metavar="NAME", help="List those of this pipeline.")
@click.option(
    "--limit", type=click.IntRange(1, MOST), default=20, show_default=True, metavar="N", help="List so many at most."
)
@click.option("--slowest", is_flag=True, help=f"List those that took longest, of each shard's newest {MOST}.")
@token_option
@cluster_option
@store_option
@json_option
@explain_errors
def trace(
    request: str | None,
    outcome: str | None,
    pipeline: str | None,
    limit: int,
    slowest: bool,
    http_token: str,
    cluster: str,
    store: str | None,
    as_json: bool,
) -> None:
    """Show where a request's time went, and why it was dropped; or list the newest traces.

    A request's id is in the client's errors and replies (`request_id`) and in what `laxity submit --trace` prints.
    Shards keep the traces of all requests that were dropped, expired, failed or unavailable, and of those that were
    sampled: by their traceparent, else by --trace-sample of `laxity broker run`. The newest --traces are kept.

    \b
    Examples:
      laxity trace
      laxity trace --outcome dropped --pipeline ocr
      laxity trace --slowest --limit 5
      laxity trace 0b0f2d6f8c2a4f0c9b0e3f5d7a1c2e4f-17
      laxity trace 0b0f2d6f8c2a4f0c9b0e3f5d7a1c2e4f-17 --json
    """
    if request is not None and (outcome or pipeline or slowest):
        raise click.UsageError("--outcome, --pipeline and --slowest choose what is listed: leave out REQUEST_ID")
    source = trace_source(find_store(cluster, store), cluster, http_token)
    if not source.shards:
        raise not_running(cluster, store)
    if request is not None:
        _show(source, request, as_json)
    else:
        _list(source, outcome or "", pipeline or "", limit, slowest, as_json)


def _show(source: TraceSource, request: str, as_json: bool) -> None:
    found = source.trace(request)
    if found is None:
        unasked = "".join(f"; shard {shard} could not be asked: {why}" for shard, why in source.troubles.items())
        raise click.ClickException(
            f"no trace of {request!r} is kept: there was no such request, or it ended well and was not sampled (see "
            f"--trace-sample and --trace of `laxity submit`), or newer ones have taken its place{unasked}"
        )
    if as_json:
        print_json(trace_to_json(found))
    else:
        Console(highlight=False).print(Waterfall(found))


def _list(source: TraceSource, outcome: str, pipeline: str, limit: int, slowest: bool, as_json: bool) -> None:
    found = source.traces(MOST if slowest else limit, outcome, pipeline)
    if slowest:
        found.sort(key=lambda trace: trace.latency, reverse=True)
    found = found[:limit]
    for shard, why in source.troubles.items():
        click.echo(f"shard {shard} could not be asked: {why}", err=True)
    if as_json:
        print_json([trace_to_json(one) for one in found])
    elif found:
        print_table(_table(found))
    else:
        click.echo(_nothing(outcome, pipeline), err=True)
    if len(source.troubles) == len(source.shards):
        sys.exit(1)


def _nothing(outcome: str, pipeline: str) -> str:
    """What is said where there is nothing to list."""
    of = f" of pipeline {pipeline!r}" if pipeline else ""
    if not outcome:
        return f"no request{of} left a trace yet: of those that end well, only sampled ones do"
    sampled = "; those that end so leave one only where they were sampled" if outcome in SAMPLED else ""
    return f"among the traces that are kept, no request{of} ended {outcome!r}{sampled}"


def _table(found: list[TraceRecord]) -> Table:
    table = Table("request", "ago", "pipeline", "outcome", "stage", "took", box=None, pad_edge=False)
    for name in ("ago", "took"):
        next(column for column in table.columns if column.header == name).justify = "right"
    table.columns[0].no_wrap = True
    now = time.time()
    for one in found:
        table.add_row(
            Text(one.request),
            _ago(now - one.at - one.latency),
            Text(one.pipeline),
            Text(one.outcome, STYLE.get(one.outcome, "")),
            Text(one.stage),
            ms(one.latency),
        )
    return table


def _ago(seconds: float) -> str:
    seconds = max(seconds, 0.0)
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
