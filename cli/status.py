"""``laxity status``: what a cluster consists of and how it does, from its store."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click
import msgspec
from rich.table import Table
from rich.text import Text

from cli.node import describe_nodes, node_table
from cli.options import (
    cluster_option,
    explain_errors,
    find_store,
    json_option,
    not_running,
    print_json,
    print_table,
    store_option,
)
from cli.pipeline_table import describe_pipelines, pipeline_table
from cli.rollout import missing_services
from cli.snapshot import Snapshot, look
from cli.store_health import MemberHealth, store_health
from cluster.records import LOADING, QUEUED, READY, failure
from pipelines.profile import DRIFTED


@click.command()
@cluster_option
@store_option
@json_option
@explain_errors
def status(cluster: str, store: str | None, as_json: bool) -> None:
    """Show a cluster's store, coordinators, shards, pipelines with their tuning, and nodes; exit 1 if nothing runs.

    A pipeline's λ is the quantile of its batch waits that drops count on, its window the time over which queueing is
    averaged, admission the part of its requests that is let in.

    \b
    Examples:
      laxity status
      laxity status --json
      laxity status --store 'etcd://e1:2379,e2:2379?ca=/etc/laxity/ca.pem&cert=/etc/laxity/me.pem&key=/etc/laxity/me.key'
    """
    url = find_store(cluster, store)
    seen = look(url, cluster)
    if not seen.brokers and not seen.nodes and not seen.coordinators:
        raise not_running(cluster, store)
    described = describe(cluster, url, seen)
    health = store_health(url)
    described["store_health"] = msgspec.to_builtins(health)
    if as_json:
        print_json(described)
    else:
        _print(described, seen, health)


def describe(cluster: str, store: str, seen: Snapshot) -> dict[str, Any]:
    """What the records of a cluster say, as plain data."""
    return {
        "cluster": cluster,
        "store": store,
        "leader": seen.leader.coordinator if seen.leader is not None else None,
        "fixed_plan": seen.fixed,
        "coordinators": [
            {
                "coordinator": name,
                "host": record.host,
                "pid": record.pid,
                "release": record.release,
                "http": record.http,
            }
            for name, record in seen.coordinators.items()
        ],
        "pipelines": describe_pipelines(seen),
        "shards": [
            {
                "shard": name,
                "frontend": record.frontend,
                "backend": record.backend,
                "host": record.host,
                "pid": record.pid,
                "release": record.release,
                "http": record.http,
                "requests": record.counters,
            }
            for name, record in seen.brokers.items()
        ],
        "agents": [
            {
                "agent": name,
                "host": record.host,
                "pid": record.pid,
                "http": record.http,
                "state": record.state,
                "devices": [
                    {"device": d.device, "type": d.type, "progress": d.progress, "models": d.models}
                    for d in record.devices
                ],
            }
            for name, record in seen.nodes.items()
        ],
        "nodes": describe_nodes(seen),
    }


def _print(described: dict[str, Any], seen: Snapshot, health: list[MemberHealth]) -> None:
    click.echo(f"cluster {described['cluster']}, store {described['store']}")
    _print_store(health)
    print_table(_coordinators(described))
    print_table(_shards(described["shards"]))
    print_table(pipeline_table(described["pipelines"]))
    print_table(_models(seen))
    print_table(node_table(described["nodes"]))
    missing = missing_services(seen)
    if missing:
        click.echo(f"{missing[0].upper()}{missing[1:]}.", err=True)


def _print_store(health: list[MemberHealth]) -> None:
    good = [f"{member.ms:.0f} ms" for member in health if member.ms is not None]
    click.echo(f"store: {len(good)} of {len(health)} answer ({', '.join(good)})" if good else "store: none answers")
    for member in health:
        if member.trouble:
            click.echo(f"store: {member.trouble}", err=True)


def _coordinators(described: dict[str, Any]) -> Table:
    table = Table("coordinator", "role", "host", "process", "release", "dashboard")
    for one in described["coordinators"]:
        role = "leader" if one["coordinator"] == described["leader"] else "standing by"
        cells = (one["coordinator"], role, one["host"], str(one["pid"]), one["release"], one["http"])
        table.add_row(*map(Text, cells))
    if not described["coordinators"]:
        table.add_row("none", "the plan is fixed" if described["fixed_plan"] else "-", "", "", "", "")
    return table


def _shards(shards: list[dict[str, Any]]) -> Table:
    counters = list(dict.fromkeys(name for shard in shards for name in shard["requests"]))
    # What never happened would only make the table wide.
    counters = [
        name for number, name in enumerate(counters) if number < 3 or any(s["requests"].get(name) for s in shards)
    ]
    heads = (name.replace("_", " ") for name in counters)
    table = Table("shard", "services connect to", "agents connect to", "host", "process", *heads)
    for shard in shards:
        cells = (shard["shard"], shard["frontend"], shard["backend"], shard["host"], str(shard["pid"]))
        counts = (f"{shard['requests'].get(name, 0):,}" for name in counters)
        table.add_row(*(Text(cell) for cell in cells), *counts)
    return table


def _models(seen: Snapshot) -> Table:
    """One row for each model that any device is to hold or has."""
    table = Table("model", "devices", "ready", "on", "loading", "failed")
    models: dict[str, list[tuple[str, int]]] = {}
    for agent, placement in seen.placements.items():
        for number, device in placement.devices.items():
            for model in device.models:
                models.setdefault(model, []).append((agent, number))
    for agent, node in seen.nodes.items():
        for record in node.devices:
            for model in record.models:
                holders = models.setdefault(model, [])
                if (agent, record.device) not in holders:
                    holders.append((agent, record.device))
    off = {model: text for model in models if (text := _off_profile(seen, model))}
    if off:
        table.add_column("takes what its profile says")
    for model, holders in sorted(models.items()):
        states = [seen.model_state(agent, number, model) for agent, number in holders]
        on = Counter(
            seen.device_type(agent, number)
            for (agent, number), state in zip(holders, states, strict=True)
            if state == READY
        )
        failed = next((f"{why}" for why in map(failure, states) if why is not None), "")
        loading = sum(state in (QUEUED, LOADING, "") for state in states)
        table.add_row(
            Text(model),
            str(len(holders)),
            str(on.total()),
            Text(", ".join(f"{count} {kind}" for kind, count in on.items())),
            str(loading or ""),
            Text(failed),
            *([Text(off.get(model, ""))] if off else []),
        )
    return table


def _off_profile(seen: Snapshot, model: str) -> str:
    """'1.35 times on A100', where a model takes another time than its profile says."""
    drift = seen.drift(model)
    return ", ".join(f"{ratio:.2f} times on {kind}" for kind, ratio in drift.items() if abs(ratio - 1.0) > DRIFTED)
