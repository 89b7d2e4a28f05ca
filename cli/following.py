"""Follows a store's records until something has come true, and tells what it waits for."""

from __future__ import annotations

import time
from collections.abc import Callable

import click
from rich.console import Console
from rich.status import Status

from cli.options import check_duration
from cli.snapshot import Snapshot
from cluster.decoded import Decoded
from cluster.membership import Follower
from cluster.records import Paths
from cluster.store import open_store
from pipelines.duration import format_duration

TURN = 0.25
"""Seconds between two looks, where nothing changes."""

timeout_option = click.option(
    "--timeout",
    default="5m",
    show_default=True,
    callback=check_duration,
    metavar="TIME",
    help="How long to wait at most.",
)


class Told:
    """What is waited for, on stderr: one line that changes on a terminal, a line a change elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status: Status | None = None
        self._said = ""

    def __enter__(self) -> Told:
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def tell(self, waits: str, since: float) -> None:
        """``since``: for how many seconds it has been waited by now."""
        if self._status is not None:
            self._status.update(f"waiting for {since:.0f} s: {waits}")
        elif waits != self._said:
            click.echo(f"waiting: {waits}" if since < 1.0 else f"waiting for {since:.0f} s: {waits}", err=True)
        self._said = waits


def follow(url: str, cluster: str, timeout: float, waits: Callable[[float, Snapshot], str]) -> None:
    """Return as soon as ``waits`` (given the monotonic time and what is seen) says '': it tells what is waited for.

    Raises :class:`click.ClickException` with that text after ``timeout`` seconds.
    """
    paths = Paths(cluster)
    store = open_store(url)
    follower = Follower(store, paths.root)
    decoded = Decoded()
    begun = time.monotonic()
    ends = begun + timeout
    try:
        with Told() as told:
            while True:
                follower.poll(TURN)
                decoded.update(follower.entries)
                now = time.monotonic()
                said = waits(now, Snapshot(paths, decoded))
                if not said:
                    return
                if now > ends:
                    raise click.ClickException(
                        f"not within {format_duration(timeout)}: {said}; it goes on, see `laxity status`"
                    )
                told.tell(said, now - begun)
    finally:
        follower.close()
        store.close()
