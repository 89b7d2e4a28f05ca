"""``laxity down``: the end of a cluster that ``up`` started."""

from __future__ import annotations

import os
import signal

import click

from cli.children import GRACE, SHARD_GRACE
from cli.options import cluster_option, explain_errors, not_running
from cli.rundir import RunDirectory

PATIENCE = SHARD_GRACE + GRACE + 7.0
"""Seconds that the supervisor has to end its processes and itself."""


@click.command()
@cluster_option
@explain_errors
def down(cluster: str) -> None:
    """End a cluster that `laxity up` started here, and every process of it.

    \b
    Examples:
      laxity down
      laxity down --cluster mine
    """
    directory = RunDirectory(cluster)
    running = directory.running()
    if running is None:
        raise not_running(cluster, to_start=False)
    os.kill(running.pid, signal.SIGTERM)
    if not directory.wait_ended(PATIENCE):
        # Its children are told by the kernel when it goes.
        os.kill(running.pid, signal.SIGKILL)
        if not directory.wait_ended(PATIENCE):
            raise click.ClickException(f"process {running.pid} does not end; look at it with `ps {running.pid}`")
        click.echo(f"The supervisor (process {running.pid}) hung and was killed.", err=True)
    click.echo(f"The cluster {cluster!r} has ended.")
