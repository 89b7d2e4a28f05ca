"""``laxity dashboard``: the web dashboard of any cluster, from its store."""

from __future__ import annotations

import logging
import signal
import socket
import threading

import click

from cli.dashboard.token import read_token
from cli.options import check_http, cluster_option, explain_errors, find_store, store_option
from cluster.addresses import advertised, split_address
from cluster.observe.sidecar import listen


@click.command()
@click.option(
    "--http",
    default="127.0.0.1:*",
    show_default=True,
    callback=check_http,
    metavar="HOST:PORT",
    help="Where it is served; '*' for a free port, 0.0.0.0 as HOST for every interface.",
)
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Who shows what this file says may have nodes drained (default: nobody may; it only shows).",
)
@click.option("--listen-fd", type=int, hidden=True)
@cluster_option
@store_option
@explain_errors
def dashboard(http: str, token_file: str | None, listen_fd: int | None, cluster: str, store: str | None) -> None:
    """Serve the web dashboard of a cluster until Ctrl-C: what it is offered and answers in time, where requests wait
    and are dropped, what each device does.

    It needs the cluster's store and nothing else, as `laxity status` does. Everybody who reaches its address sees it;
    beyond this host, have a proxy with TLS before it. `laxity up` starts one by itself.

    \b
    Examples:
      laxity dashboard
      laxity dashboard --http 127.0.0.1:8080 --store etcd://e1:2379,e2:2379
      openssl rand -hex 16 > token && laxity dashboard --http 0.0.0.0:8080 --token-file token
    """
    from cli.dashboard.app import dashboard_app
    from laxity.bounded_http import serve_http

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if not http and listen_fd is None:
        raise click.UsageError("give --http an address, such as 127.0.0.1:8080")
    try:
        token = read_token(token_file) if token_file is not None else None
        app = dashboard_app(find_store(cluster, store), cluster, token=token)
        listener = listen(http) if listen_fd is None else socket.socket(fileno=listen_fd)
    except (ValueError, OSError) as error:
        raise click.ClickException(getattr(error, "strerror", None) or str(error)) from error
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # Nothing is lost with whoever watches at the end: they need not be waited for.
    threading.Thread(target=serve_http, args=(app, listener), name="http", daemon=True).start()
    if listen_fd is None:
        url = advertised(f"http://{split_address(http)[0]}:{listener.getsockname()[1]}", "")
        click.echo(f"The dashboard of the cluster {cluster!r}: {url}")
        click.echo("Press Ctrl-C to end it.")
    stop.wait()
