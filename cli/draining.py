"""Having nodes emptied and taken back: what `laxity node drain`, `laxity node resume` and `laxity top` do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click

from cli.options import cluster_argument, near
from cli.snapshot import Snapshot, look
from cluster.records import DrainRecord, Paths, encode
from cluster.store import open_store
from cluster.store.base import Store


def drain_nodes(url: str, cluster: str, names: Sequence[str], why: str = "") -> Snapshot:
    """Write down that somebody wants these nodes empty; what was seen before.

    :class:`click.ClickException` for a node that is not known, and where nobody empties nodes.
    """
    seen = _check(url, cluster, names)
    paths = Paths(cluster)
    _write(url, lambda store: [store.put(paths.drain(name), encode(DrainRecord(why))) for name in names])
    return seen


def resume_nodes(url: str, cluster: str, names: Sequence[str]) -> Snapshot:
    """Take that back; what was seen before, errors as of :func:`drain_nodes`."""
    seen = _check(url, cluster, names)
    paths = Paths(cluster)
    _write(url, lambda store: [store.delete(paths.drain(name)) for name in names])
    return seen


def not_empty(seen: Snapshot, names: Sequence[str]) -> str:
    """Which of the nodes still hold something; '' once all are empty."""
    holding = []
    for name in names:
        record = seen.nodes.get(name)
        held = sum(len(device.models) for device in record.devices) if record is not None else 0
        placement = seen.placements.get(name)
        placed = sum(len(device.models) for device in placement.devices.values()) if placement is not None else 0
        if held or placed or seen.state(name) == "active":
            left = max(held, placed)
            holding.append(f"{name} holds {left} model{'s' if left != 1 else ''}")
    return ", ".join(holding)


def _check(url: str, cluster: str, names: Sequence[str]) -> Snapshot:
    seen = look(url, cluster)
    if seen.fixed:
        raise click.ClickException(
            f"the plan of the cluster {cluster!r} is fixed: it was started without coordinators, which empty nodes; "
            f"start it with `laxity up ... --coordinators 1{cluster_argument(cluster)}`"
        )
    known = seen.known_nodes() | seen.drains.keys()
    for name in names:
        if name not in known:
            raise click.ClickException(f"there is no node {name!r}; {near(name, known, 'there are')}")
    return seen


def _write(url: str, write: Callable[[Store], object]) -> None:
    store = open_store(url)
    try:
        write(store)
    finally:
        store.close()
