"""``laxity observe``: the process that speaks HTTP for a shard, an agent or a coordinator, which starts it."""

from __future__ import annotations

import os
import signal
import socket

import click

from cluster.logs import configure_logs

NICE = 5
"""Where processors are scarce, requests go before what is told of them."""


@click.command(hidden=True)
@click.option("--process", required=True, help="What it speaks for.")
@click.option("--name", required=True, help="Which one of those.")
@click.option("--link-fd", type=int, required=True, help="The socket to ask it over.")
@click.option("--listen-fd", type=int, help="The socket to serve at.")
@click.option("--log-format", default="text", help="As that one logs.")
@click.option("--otlp", help="Where traces are sent.")
@click.option("--dashboard", type=(str, str), help="The store and the cluster whose dashboard is served at /.")
@click.option("--http-token-file", default="", help="Who shows a token of it may ask for everything.")
@click.option("--http-open", default="", help="What everybody may ask for.")
def observe(
    process: str,
    name: str,
    link_fd: int,
    listen_fd: int | None,
    log_format: str,
    otlp: str | None,
    dashboard: tuple[str, str] | None,
    http_token_file: str,
    http_open: str,
) -> None:
    """Serve what is to be seen of the process that started this one, until that ends."""
    from cluster.observe.exporter import exporter_app
    from cluster.observe.link import RemoteSource
    from laxity.bounded_http import serve_http
    from laxity.http_access import HttpAccess
    from laxity.http_tokens import HttpTokens

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it decides
    os.nice(NICE)
    configure_logs(log_format, "warning", process, name)
    source = RemoteSource(socket.socket(fileno=link_fd))
    if otlp:
        from cluster.observe.otlp import TraceExport

        TraceExport(source.traces, otlp).start()
    if listen_fd is None:
        source.wait()
        return
    listener = socket.socket(fileno=listen_fd)
    tokens = HttpTokens(http_token_file) if http_token_file else None
    access = HttpAccess(listener.getsockname()[0], tokens, http_open.split(","))
    home = None
    if dashboard is not None:
        from cli.dashboard.app import dashboard_app

        home = dashboard_app(*dashboard, access)
    serve_http(exporter_app(source, access, home), listener)
