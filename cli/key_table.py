"""What `laxity keys` shows of keys."""

from __future__ import annotations

import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from cluster.keyring import good, newest, state
from cluster.keystore import Keys
from cluster.logs import shown as printable
from cluster.records import KeyRecord, PublicKey

_STYLE = {"good": "green", "rotating": "cyan", "ended": "yellow", "revoked": "red", "damaged": "bold red"}


def describe_key(name: str, record: KeyRecord, keys: Keys, now: float) -> dict[str, Any]:
    """One key as plain data; times in Unix seconds. ``running`` is null for those of whom the store does not know."""
    broker = keys.brokers.get(name) if record.role == "shard" else None
    known = {"shard": set(keys.brokers), "node": set(keys.nodes)}.get(record.role)
    return {
        "name": name,
        "role": record.role,
        "state": state(record, now),
        "keys": [
            {
                "public": key.public,
                "since": key.since,
                "until": key.until,
                "good": good(key, now) and not record.revoked,
            }
            for key in record.publics
        ],
        "revoked": record.revoked or None,
        "pipelines": record.pipelines,
        "rate": record.rate or None,
        "in_flight": record.in_flight or None,
        "note": record.note,
        "running": None if known is None else name in known,
        "serves_with": None if broker is None else broker.public,
    }


def key_table(keys: Keys, now: float) -> Table:
    """A row for each owner, and one more for each further key that is good."""
    table = Table("name", "role", "state", "public key", "since (UTC)", "until (UTC)", "limits", "runs", "note")
    for name, record in sorted(keys.records.items()):
        shown = state(record, now)
        publics = [key for key in record.publics if good(key, now)] or record.publics[:1]
        for number, key in enumerate(publics or [PublicKey("", 0.0)]):
            first = number == 0
            table.add_row(
                Text(printable(name) if first else ""),
                Text(record.role if first else ""),
                Text(shown, style=_STYLE[shown]) if first else Text("old", style="dim"),
                Text(printable(key.public)),
                Text(moment(key.since)),
                Text(moment(record.revoked) if record.revoked else ends(key)),
                Text(limits(record) if first else ""),
                Text(runs(name, record, keys) if first else ""),
                Text(printable(record.note) if first else ""),
            )
    for name in sorted(keys.damaged):
        table.add_row(Text(printable(name)), "", Text("damaged", style=_STYLE["damaged"]), "", "", "", "", "", "")
    return table


def details(name: str, record: KeyRecord, keys: Keys, now: float) -> list[str]:
    """Lines about one key; what others wrote into the store is escaped."""
    lines = [f"{name}: {record.role}, {state(record, now)}"]
    if record.revoked:
        lines.append(f"  revoked {moment(record.revoked)} UTC")
    for key in record.publics:
        until = f", until {ends(key)} UTC" if key.until else ", ended at once" if key.until is not None else ""
        over = "" if good(key, now) else " (over)"
        lines.append(f"  {printable(key.public)} since {moment(key.since)} UTC{until}{over}")
    if record.role == "client":
        lines.append(f"  limits: {limits(record)}")
    running = runs(name, record, keys)
    lines += [f"  {running}"] if running else []
    return [*lines, f"  {printable(record.note)}"] if record.note else lines


def limits(record: KeyRecord) -> str:
    """What a client is held to; '' of others."""
    if record.role != "client":
        return ""
    found = [printable(", ".join(record.pipelines))] if record.pipelines else []
    found += [f"{record.rate:g} requests/s"] if record.rate else []
    found += [f"{record.in_flight} in flight"] if record.in_flight else []
    return "; ".join(found) or "none"


def runs(name: str, record: KeyRecord, keys: Keys) -> str:
    """Whether the shard or agent that the key belongs to runs, and how a shard serves; '' of others."""
    if record.role == "node":
        return "running" if name in keys.nodes else "not running"
    if record.role != "shard":
        return ""
    if name not in keys.brokers:
        return "not running"
    public = keys.brokers[name].public
    if not public:
        return "serves in plain text"
    if public == newest(record):
        return "serves with it"
    old = any(public == key.public for key in record.publics)
    return "serves with the old key" if old else "serves with a key that is not registered"


def ends(key: PublicKey) -> str:
    """When a key ends, '' where it stays."""
    if key.until is None:
        return ""
    return moment(key.until) if key.until else "ended at once"


def moment(seconds: float) -> str:
    """A Unix time in UTC, '' for none."""
    if not seconds:
        return ""
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g}"
