"""``laxity observe``: the process that speaks HTTP for a shard, an agent or a coordinator, which starts it."""

from __future__ import annotations

import logging
import signal
import socket

import click


@click.command(hidden=True)
@click.option("--link-fd", type=int, required=True, help="The socket to ask the process over.")
@click.option("--listen-fd", type=int, help="The socket to serve at.")
@click.option("--otlp", default="", help="Where traces are sent.")
@click.option("--dashboard", type=(str, str), help="The store and the cluster whose dashboard is served at /.")
def observe(link_fd: int, listen_fd: int | None, otlp: str, dashboard: tuple[str, str] | None) -> None:
    """Serve what is to be seen of the process that started this one, until that ends."""
    from cluster.observe.exporter import exporter_app
    from cluster.observe.link import RemoteSource
    from laxity.bounded_http import serve_http

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it decides
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    source = RemoteSource(socket.socket(fileno=link_fd))
    if otlp:
        from cluster.observe.otlp import TraceExport

        TraceExport(source.traces, otlp).start()
    if listen_fd is None:
        source.wait()
    else:
        home = None
        if dashboard is not None:
            from cli.dashboard.app import dashboard_app

            home = dashboard_app(*dashboard, token=None)
        serve_http(exporter_app(source, home), socket.socket(fileno=listen_fd))
