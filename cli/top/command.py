"""``laxity top``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import click
import msgspec

from cli.draining import drain_nodes, resume_nodes
from cli.live.follow import live_views
from cli.live.view import LiveView
from cli.options import (
    check_duration,
    cluster_option,
    explain_errors,
    find_store,
    json_option,
    not_running,
    print_json,
    store_option,
)

_WHY = "from laxity top"


@click.command()
@click.option(
    "--interval",
    default="1s",
    show_default=True,
    callback=check_duration,
    metavar="TIME",
    help="How often what is shown is brought up to date.",
)
@click.option("--once", is_flag=True, help="Print one view as plain text (the way where stdout is no terminal).")
@cluster_option
@store_option
@json_option
@explain_errors
def top(interval: float, once: bool, as_json: bool, cluster: str, store: str | None) -> None:
    """Watch a cluster: pipelines, stages, nodes and drops, live; sort, filter, look closer, drain a node.

    It needs the cluster's store alone, and goes on with the last figures while that is away. Keys: ? shows them.

    \b
    Examples:
      laxity top
      laxity top --store etcd://e1:2379,e2:2379 --interval 5s
      laxity top --once | less
      laxity top --json
    """
    url = find_store(cluster, store)
    if once or as_json or not sys.stdout.isatty():
        with closing(live_views(url, cluster, threading.Event())) as views:
            view = next(views)
        if view.stale:
            raise click.ClickException(view.stale)
        _check(view, cluster, store)
        if as_json:
            print_json(msgspec.to_builtins(view))
            return
        from cli.top.plain import print_view

        print_view(view)
        return
    from cli.top.app import Top

    app = Top(partial(_at_intervals, url, store, cluster, interval), StoredNodes(url, cluster))
    app.run()
    sys.exit(app.return_code or 0)


class StoredNodes:
    """Drains and takes back nodes as `laxity node` does."""

    def __init__(self, url: str, cluster: str) -> None:
        self._url = url
        self._cluster = cluster

    def drain(self, name: str) -> None:
        drain_nodes(self._url, self._cluster, [name], _WHY)

    def resume(self, name: str) -> None:
        resume_nodes(self._url, self._cluster, [name])


def _at_intervals(
    url: str, store: str | None, cluster: str, interval: float, stop: threading.Event
) -> Iterator[LiveView]:
    """The views that are to be shown; all of them are made, or there would be gaps in the history."""
    due = 0.0
    with closing(live_views(url, cluster, stop)) as views:
        for number, view in enumerate(views):
            if number == 0:
                _check(view, cluster, store)
            # Half a period early rather than a whole one late: views come about once a second.
            if view.at >= due - 0.5 or view.at < due - 2 * interval:
                due = view.at + interval
                yield view


def _check(view: LiveView, cluster: str, store: str | None) -> None:
    if not (view.stale or view.shards or view.nodes or view.coordinators):
        raise not_running(cluster, store)
