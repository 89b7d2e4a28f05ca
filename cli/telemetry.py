"""``laxity telemetry``: the rows that shards and agents write of requests and actions, and what they say together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import click
import msgspec

from cli.options import explain_errors, json_option, print_json, print_table
from cli.telemetry_rows import KINDS, AnyRow, Files, Filter, Troubles
from cli.telemetry_summary import Summary
from cli.telemetry_tables import head_line, row_line, summary_tables
from pipelines.duration import parse_duration

SUMMARY = "summary"
VIEWS = (*KINDS, SUMMARY)


def _check_since(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float:
    """A duration before now, or a time, as Unix seconds."""
    if value is None:
        return 0.0
    try:
        return time.time() - parse_duration(value)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(value).timestamp()
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither a duration such as 5m nor a time such as 2026-07-25T14:30"
        ) from None


@click.command()
@click.argument("places", metavar="DIR... [actions|requests|summary]", nargs=-1, required=True)
@click.option("--model", default="", metavar="TEXT", help="Only actions on models whose key contains this.")
@click.option("--pipeline", default="", metavar="NAME", help="Only what belongs to this pipeline.")
@click.option("--outcome", default="", metavar="NAME", help="Only requests with this outcome, actions with this code.")
@click.option(
    "--since",
    callback=_check_since,
    metavar="TIME",
    help="Only what came since then: 5m ago, or a time such as 2026-07-25T14:30.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the last N rows.")
@click.option("-f", "--follow", is_flag=True, help="Go on with the rows that are added, until Ctrl-C.")
@json_option
@explain_errors
def telemetry(
    places: tuple[str, ...],
    model: str,
    pipeline: str,
    outcome: str,
    since: float,
    limit: int | None,
    follow: bool,
    as_json: bool,
) -> None:
    """Read what shards and agents that were started with --telemetry DIR write there, also while they run.

    summary (the default) takes rows together: how long actions took and were predicted to take, starts after their
    window (there must be none), memory, and the requests' outcomes and latencies. actions and requests print rows, with
    --json one object a line. The files are CSV, which other tools read as well.

    \b
    Examples:
      laxity telemetry ./telemetry
      laxity telemetry ./telemetry summary --json --since 10m
      laxity telemetry ./telemetry actions --model ocr --outcome too_late
      laxity telemetry host-*/telemetry requests --follow --limit 20
    """
    view = SUMMARY
    if places[-1] in VIEWS and len(places) > 1:
        *named, view = places
        places = tuple(named)
    if view == SUMMARY and (follow or limit is not None):
        option = "--follow" if follow else "--limit"
        raise click.UsageError(f"{option} is for rows: name them, as in `laxity telemetry {places[0]} requests`")
    paths = [Path(place) for place in places]
    for path in paths:
        if not path.exists():
            raise click.UsageError(f"there is no {path}; name the directory that --telemetry was given")
    wanted = Filter(model=model, pipeline=pipeline, outcome=outcome, since=since)
    files = Files(paths, KINDS if view == SUMMARY else [view])
    if not files.found() and not follow:
        raise click.ClickException(
            f"no telemetry of {'any kind' if view == SUMMARY else view} in {', '.join(places)}; start a cluster with "
            "`laxity up ... --telemetry DIR`, and send it requests"
        )
    if view == SUMMARY:
        _summarize(files, wanted, as_json)
    else:
        _print_rows(files, view, wanted, limit, follow, as_json)


def _summarize(files: Files, wanted: Filter, as_json: bool) -> None:
    summary = Summary()
    for row in files.rows():
        if wanted.takes(row):
            summary.add(row)
    files.end()
    described = summary.described()
    troubles = files.troubles
    described["malformed_lines"] = troubles.malformed
    described["unfinished_files"] = troubles.unfinished
    described["unknown_files"] = troubles.strange
    if as_json:
        print_json(described)
        return
    for table in summary_tables(described):
        print_table(table)
    if summary.lost:
        click.echo(f"{summary.lost:,} rows were lost: their processes could not write them in time.", err=True)
    _tell(troubles)


def _print_rows(files: Files, kind: str, wanted: Filter, limit: int | None, follow: bool, as_json: bool) -> None:
    rows: Iterable[AnyRow] = (row for row in files.rows_by_time() if wanted.takes(row))
    if not as_json:
        click.echo(head_line(kind))
    _echo(rows if limit is None else deque(rows, limit), as_json)
    if follow:
        _echo((row for row in files.follow() if wanted.takes(row)), as_json)
    files.end()
    _tell(files.troubles)


def _echo(rows: Iterable[AnyRow], as_json: bool) -> None:
    for row in rows:
        click.echo(msgspec.json.encode(row).decode() if as_json else row_line(row))


def _tell(troubles: Troubles) -> None:
    """What could not be read, on stderr."""
    if troubles.malformed:
        click.echo(f"{troubles.malformed:,} lines could not be read, the first at {troubles.first}", err=True)
    if troubles.unfinished:
        click.echo(
            f"{troubles.unfinished} files end within a line: their process was killed, or is writing just now.",
            err=True,
        )
    for path in troubles.strange:
        click.echo(f"{path} is no telemetry of this release: its first line names other columns.", err=True)
