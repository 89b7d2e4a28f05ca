"""``laxity status``: what a cluster consists of, from its store."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table
from rich.text import Text

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
from cluster.records import BrokerRecord, NodeRecord, Paths, PipelineRecord, decode, name_of
from cluster.store import open_store
from cluster.store.base import Entry
from pipelines import format_duration


@click.command()
@cluster_option
@store_option
@json_option
@explain_errors
def status(cluster: str, store: str | None, as_json: bool) -> None:
    """Show a cluster's pipelines, shards, agents, devices and models; exit 1 if nothing runs.

    \b
    Examples:
      laxity status
      laxity status --json
      laxity status --store sqlite:///var/lib/laxity/store.db
    """
    url = find_store(cluster, store)
    opened = open_store(url)
    try:
        entries = opened.list(Paths(cluster).root).entries
    finally:
        opened.close()
    seen = describe(cluster, url, entries)
    if not seen["shards"] and not seen["agents"]:
        raise not_running(cluster)
    if as_json:
        print_json(seen)
    else:
        _print(seen)


def describe(cluster: str, store: str, entries: list[Entry]) -> dict[str, Any]:
    """What the records under a cluster's root say, as plain data."""
    paths = Paths(cluster)
    result: dict[str, Any] = {"cluster": cluster, "store": store, "pipelines": [], "shards": [], "agents": []}
    for entry in entries:
        name = name_of(entry.key)
        if entry.key.startswith(paths.pipelines):
            pipeline = decode(PipelineRecord, entry.key, entry.value)
            result["pipelines"].append(
                {
                    "name": name,
                    "version": pipeline.version,
                    "slo_s": pipeline.spec.slo,
                    "stages": list(pipeline.spec.stages),
                }
            )
        elif entry.key.startswith(paths.brokers):
            shard = decode(BrokerRecord, entry.key, entry.value)
            result["shards"].append(
                {
                    "shard": name,
                    "frontend": shard.frontend,
                    "backend": shard.backend,
                    "host": shard.host,
                    "pid": shard.pid,
                    "requests": shard.counters,
                }
            )
        elif entry.key.startswith(paths.nodes):
            node = decode(NodeRecord, entry.key, entry.value)
            devices = [
                {"device": d.device, "type": d.type, "progress": d.progress, "models": d.models} for d in node.devices
            ]
            result["agents"].append(
                {"agent": name, "host": node.host, "pid": node.pid, "state": node.state, "devices": devices}
            )
    return result


def _print(seen: dict[str, Any]) -> None:
    pipelines = Table("pipeline", "version", "slo", "stages")
    for p in seen["pipelines"]:
        pipelines.add_row(Text(p["name"]), p["version"], format_duration(p["slo_s"]), Text(", ".join(p["stages"])))
    shards = Table("shard", "services connect to", "agents connect to", "host", "process")
    for s in seen["shards"]:
        shards.add_row(Text(s["shard"]), Text(s["frontend"]), Text(s["backend"]), Text(s["host"]), str(s["pid"]))
    agents = Table("agent", "host", "process", "state", "device", "type", "model", "model state")
    for a in seen["agents"]:
        about = (Text(a["agent"]), Text(a["host"]), str(a["pid"]), a["state"])
        rows = [
            (_ranges(devices), Text(kind), Text(model), Text(state))
            for (kind, model, state), devices in _alike(a["devices"]).items()
        ]
        for number, row in enumerate(rows or [("-", Text("-"), Text("-"), Text("-"))]):
            agents.add_row(*(about if number == 0 else ("",) * 4), *row)
    counters = list(dict.fromkeys(name for s in seen["shards"] for name in s["requests"]))
    requests = Table("shard's requests", *(name.replace("_", " ") for name in counters))
    for s in seen["shards"]:
        requests.add_row(Text(s["shard"]), *(f"{s['requests'].get(name, 0):,}" for name in counters))
    click.echo(f"cluster {seen['cluster']}, store {seen['store']}")
    for table in (pipelines, shards, requests, agents):
        print_table(table)


def _alike(devices: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[int]]:
    """The devices' numbers by (type, model, state of the model), so that sixty-four lines become a few."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for device in devices:
        for model, state in (device["models"] or {"-": "-"}).items():
            shown = f"{state} ({device['progress']})" if device["progress"] else state
            alike.setdefault((device["type"], model, shown), []).append(device["device"])
    return alike


def _ranges(numbers: list[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3 and 7."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
