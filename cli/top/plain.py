"""One view as plain text: for pipes, and where there is no terminal."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table
from rich.text import Text

from cli.live.view import LiveView
from cli.options import print_table
from cli.top.cells import plain
from cli.top.listing import Listing
from cli.top.listings import DROPS, NODES, PIPELINES, STAGES
from cli.top.totals import cluster_line, figures_line, time_of, trouble_line

_WIDTH = 24
"""Of bars and sparklines."""


def print_view(view: LiveView) -> None:
    """All of it: the head, then pipelines, stages, nodes and drops in their natural order."""
    click.echo(f"{plain(cluster_line(view))}  {time_of(view)}")
    click.echo(plain(figures_line(view)))
    trouble = trouble_line(view)
    if trouble:
        click.echo(trouble)
    for listing in (PIPELINES, STAGES, NODES, DROPS):
        _print(listing, view)


def _print(listing: Listing[Any], view: LiveView) -> None:
    rows = listing.rows(view)
    click.echo(f"\n{listing.name}")
    if not rows:
        click.echo(listing.nothing)
        return
    table = Table(box=None, pad_edge=False)
    for column in listing.columns:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=not column.fills)
    for row in rows:
        table.add_row(*(Text(plain(column.cell(row, max(column.most, _WIDTH))).rstrip()) for column in listing.columns))
    print_table(table)
