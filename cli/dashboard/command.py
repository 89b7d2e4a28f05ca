"""``laxity dashboard``: the web dashboard of any cluster, from its store."""

from __future__ import annotations

import logging
import signal
import socket
import threading

import click

from cli.http_options import access_options
from cli.options import check_http, cluster_option, explain_errors, find_store, store_option
from cluster.addresses import advertised, split_address
from cluster.observe.sidecar import listen

ENDING = (signal.SIGTERM, signal.SIGINT)


@click.command()
@click.option(
    "--http",
    default="127.0.0.1:*",
    show_default=True,
    callback=check_http,
    metavar="HOST:PORT",
    help="Where it is served; '*' for a free port, 0.0.0.0 as HOST for every interface.",
)
@access_options("see the dashboard, have nodes drained and take them back")
@click.option("--listen-fd", type=int, hidden=True)
@cluster_option
@store_option
@explain_errors
def dashboard(
    http: str, http_token_file: str, http_open: tuple[str, ...], listen_fd: int | None, cluster: str, store: str | None
) -> None:
    """Serve the web dashboard of a cluster until Ctrl-C: what it is offered and answers in time, where requests wait
    and are dropped, what each device does.

    It needs the cluster's store and nothing else, as `laxity status` does. On this host everybody sees it, unless
    tokens are given; beyond this host, only who signs in with one: have a proxy with TLS before it, as tokens and what
    is shown are not encrypted otherwise. `laxity up` starts one by itself.

    \b
    Examples:
      laxity dashboard
      laxity dashboard --http 127.0.0.1:8080 --store etcd://e1:2379,e2:2379
      openssl rand -hex 16 | install -m 600 /dev/stdin token
      laxity dashboard --http 0.0.0.0:8080 --http-token-file token
    """
    from cli.dashboard.app import dashboard_app
    from laxity.bounded_http import serve_http
    from laxity.http_access import HttpAccess
    from laxity.http_tokens import HttpTokens

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if not http and listen_fd is None:
        raise click.UsageError("give --http an address, such as 127.0.0.1:8080")
    store_url = find_store(cluster, store)
    try:
        listener = listen(http) if listen_fd is None else socket.socket(fileno=listen_fd)
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from error
    host, port = listener.getsockname()[:2]
    access = HttpAccess(host, HttpTokens(http_token_file) if http_token_file else None, http_open)
    access.warn("dashboard", f"{host}:{port}")
    app = dashboard_app(store_url, cluster, access)
    # Blocked before there are threads, and waited for: a handler could come while this thread holds any lock.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    # Nothing is lost with whoever watches at the end: they need not be waited for.
    threading.Thread(target=serve_http, args=(app, listener), name="http", daemon=True).start()
    if listen_fd is None:
        url = advertised(f"http://{split_address(http)[0]}:{port}", "")
        click.echo(f"The dashboard of the cluster {cluster!r}: {url}")
        click.echo("Press Ctrl-C to end it.")
    signal.sigwait(ENDING)
