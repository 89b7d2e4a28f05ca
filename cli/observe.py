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
def observe(link_fd: int, listen_fd: int | None, otlp: str) -> None:
    """Serve what is to be seen of the process that started this one, until that ends."""
    from cluster.observe.exporter import exporter_app
    from cluster.observe.link import RemoteSource
    from laxity.bounded_http import serve_http

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it decides
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    source = RemoteSource(socket.socket(fileno=link_fd))
    if listen_fd is None:
        source.wait()
    else:
        serve_http(exporter_app(source), socket.socket(fileno=listen_fd))
