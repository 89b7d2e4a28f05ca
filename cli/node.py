"""``laxity node``: which nodes there are, and how somebody has one emptied."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click
import msgspec
from rich.table import Table
from rich.text import Text

from cli.device_gauges import gauge_columns
from cli.draining import drain_nodes, not_empty, resume_nodes
from cli.following import follow, timeout_option
from cli.options import (
    cluster_option,
    explain_errors,
    find_store,
    json_option,
    print_json,
    print_table,
    store_option,
)
from cli.rollout import missing_services
from cli.services import node
from cli.snapshot import Snapshot, look
from cluster.records import READY

__all__ = ["node"]

_STYLE = {"active": "green", "draining": "yellow", "standby": "cyan", "lost": "bold red"}


@node.command("list")
@cluster_option
@store_option
@json_option
@explain_errors
def list_nodes(cluster: str, store: str | None, as_json: bool) -> None:
    """Show the nodes: what was decided of each and why, its devices and its models.

    busy is the part of the time in which the devices executed (their mean), memory what their resident models take; of
    GPUs clocks (of multiprocessors / memory) are the lowest, temperature the highest, power the sum.

    active: it may hold models; draining: it is being emptied; standby: empty and at rest; lost: it vanished. Models are
    counted as ready of all that it is to hold.

    \b
    Examples:
      laxity node list
      laxity node list --store etcd://e1:2379,e2:2379 --json
    """
    nodes = describe_nodes(look(find_store(cluster, store), cluster))
    if as_json:
        print_json(nodes)
        return
    print_table(node_table(nodes, full=True))
    if not nodes:
        click.echo("No node is registered; start one with `laxity node run`.", err=True)


@node.command()
@click.argument("names", metavar="NODE...", nargs=-1, required=True)
@click.option("--why", default="", metavar="TEXT", help="For what; `laxity node list` shows it.")
@click.option("--wait", is_flag=True, help="Return once they are empty.")
@timeout_option
@cluster_option
@store_option
@explain_errors
def drain(names: Sequence[str], why: str, wait: bool, timeout: float, cluster: str, store: str | None) -> None:
    """Have nodes emptied, and kept so until `laxity node resume`.

    What they hold is loaded elsewhere first, and what they run is finished: no request is lost by it. With --wait the
    exit status is 0 once they are empty, 1 where they are not within --timeout, 130 after Ctrl-C; draining goes on.

    \b
    Examples:
      laxity node drain gpu-host-1 --why 'new memory' --wait
      laxity node drain gpu-host-1 gpu-host-2
    """
    url = find_store(cluster, store)
    seen = drain_nodes(url, cluster, names, why)
    missing = missing_services(seen) if seen.leader is None else ""
    if missing:
        click.echo(f"Noted; {missing}.", err=True)
    if wait:
        try:
            follow(url, cluster, timeout, lambda _, seen: not_empty(seen, names))
        except KeyboardInterrupt:
            back = f"`laxity node resume {' '.join(names)}` takes them back"
            click.echo(f"Not waited for any longer: draining goes on, see `laxity node list`; {back}.", err=True)
            sys.exit(130)
    for name in names:
        click.echo(f"{name} is {'empty' if wait else 'being emptied'}; `laxity node resume {name}` takes it back")


@node.command()
@click.argument("names", metavar="NODE...", nargs=-1, required=True)
@cluster_option
@store_option
@explain_errors
def resume(names: Sequence[str], cluster: str, store: str | None) -> None:
    """Let nodes that were drained hold models again.

    \b
    Example:
      laxity node resume gpu-host-1 gpu-host-2
    """
    seen = resume_nodes(find_store(cluster, store), cluster, names)
    for name in names:
        click.echo(f"{name} may hold models again" if name in seen.drains else f"{name} was not drained")


def describe_nodes(seen: Snapshot) -> list[dict[str, Any]]:
    """What is known of each node, as plain data."""
    described = []
    for name in sorted(seen.known_nodes() | seen.drains.keys()):
        record = seen.nodes.get(name)
        state = seen.states.get(name)
        drain = seen.drains.get(name)
        types = (
            [device.type for device in record.devices]
            if record
            else [kind for kind, _ in state.devices]
            if state
            else []
        )
        placement = seen.placements.get(name)
        models: dict[str, dict[str, int]] = {}
        for number, placed in placement.devices.items() if placement else ():
            for model in placed.models:
                counts = models.setdefault(model, {"ready": 0, "devices": 0})
                counts["devices"] += 1
                counts["ready"] += seen.model_state(name, number, model) == READY
        described.append(
            {
                "node": name,
                "state": seen.state(name),
                "why": state.why if state is not None else "",
                "registered": record is not None,
                "drained": drain is not None,
                "drained_why": drain.why if drain is not None else "",
                "host": record.host if record is not None else "",
                "pid": record.pid if record is not None else None,
                "release": record.release if record is not None else "",
                "http": record.http if record is not None else "",
                "devices": dict(Counter(types)),
                "models": models,
                "gauges": msgspec.to_builtins(seen.gauges[name]) if name in seen.gauges else None,
            }
        )
    return described


def node_table(nodes: list[dict[str, Any]], full: bool = False) -> Table:
    """The nodes; ``full``: with what is known of their GPUs' clocks, temperatures and power."""
    gauges = gauge_columns(nodes, full)
    table = Table("node", "state", "why", "host", "devices", *(head for head, _ in gauges), "models", "release")
    for one in nodes:
        why = f"{one['why']} ({one['drained_why']})" if one["drained_why"] else one["why"]
        state = Text(one["state"], style=_STYLE[one["state"]])
        if not one["registered"]:
            state.append(" (not here)")
        devices = ", ".join(f"{count} {kind}" for kind, count in one["devices"].items())
        table.add_row(
            Text(one["node"]),
            state,
            Text(why),
            Text(one["host"]),
            devices,
            *(cell(one) for _, cell in gauges),
            Text(_models(one["models"])),
            one["release"],
        )
    return table


def _models(models: dict[str, dict[str, int]]) -> str:
    """``lv 12/16, tm 4/4``: how many are ready of all that a node is to hold, by pipeline."""
    ready: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for model, counts in models.items():
        pipeline = model.partition("@")[0]
        ready[pipeline] += counts["ready"]
        wanted[pipeline] += counts["devices"]
    return ", ".join(f"{pipeline} {ready[pipeline]}/{wanted[pipeline]}" for pipeline in sorted(wanted)) or "-"
