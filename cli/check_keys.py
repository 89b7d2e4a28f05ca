"""What ``laxity doctor`` looks at of keys: their files, what the store says of them, and who serves without any."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from cli.finding import Finding
from cli.key_table import moment
from cluster.keyring import good, newest
from cluster.keystore import Keys
from cluster.records import KeyRecord
from cluster.store import sqlite_path
from cluster.store.etcd_address import parse_address
from laxity.curve import is_local
from laxity.keys import InvalidKey, KeyFile, read_key_file

AHEAD = 60.0
"""Seconds by which the clocks of those who make keys may differ."""
_ROLES = {"broker.key": ("shard",), "node.key": ("node",), "gateway.key": ("client", "operator")}
_CLIENTS = ("client", "operator")


def check_key_files(files: Mapping[Path, str], cluster: str, keys: Keys | None, now: float) -> Iterator[Finding]:
    """Key files, with what names each: an option such as ``broker.key``, a variable, or ''. ``keys`` are None where
    the store cannot be asked."""
    for path, option in files.items():
        shown = f"{option} {path}".strip()
        try:
            key = read_key_file(path)
        except InvalidKey as error:
            yield Finding("keys", "error", f"{option} {error}".strip(), "see to the file: nobody can use it")
            continue
        roles = _ROLES.get(option, _CLIENTS if option else (key.role,))
        if key.cluster != cluster:
            advice = "name the file that was made for this one, or the other cluster"
            yield Finding("keys", "error", f"{shown} is for the cluster {key.cluster!r}, not {cluster!r}", advice)
        elif key.role not in roles:
            advice = f"make one with `laxity keys new NAME --role {roles[0]}`"
            yield Finding("keys", "error", f"{shown} is a key of role {key.role}, not {' or '.join(roles)}", advice)
        elif keys is not None:
            yield _standing(shown, key, keys, now)
        else:
            yield Finding("keys", "ok", f"{shown}: {key.name!r} ({key.role}), readable by its owner only")


def _standing(shown: str, key: KeyFile, keys: Keys, now: float) -> Finding:
    """What the store says of a key that lies in a file."""
    named = f"{shown}: {key.name!r}"
    record = keys.records.get(key.name)
    if key.name in keys.damaged:
        return Finding("keys", "error", f"{named}: {keys.damaged[key.name]}", "see the lines about the store")
    if record is None:
        advice = f"register it: `laxity keys new {key.name} --role {key.role} --public '{key.public}'`"
        return Finding("keys", "error", f"{named} is unknown to the store, so nobody lets it in", advice)
    if record.revoked:
        advice = f"remove the file; `laxity keys new {key.name} --role {key.role}` makes another key"
        return Finding("keys", "error", f"{named} was revoked {moment(record.revoked)} UTC", advice)
    if record.role != key.role:
        advice = f"have one made with `laxity keys rotate {key.name}`"
        return Finding("keys", "error", f"{named} is a key of role {record.role} in the store", advice)
    known = next((public for public in record.publics if public.public == key.public), None)
    again = f"put the newest one there, or make another with `laxity keys rotate {key.name} -o FILE`"
    if known is None:
        return Finding("keys", "error", f"{named} has other keys in the store than this one", again)
    if not good(known, now):
        return Finding("keys", "error", f"{named} was replaced, and has ended", again)
    if known.until is not None:
        return Finding("keys", "warning", f"{named} was replaced, and ends {moment(known.until)} UTC", again)
    return Finding("keys", "ok", f"{named} ({key.role}) is good")


def check_keys(keys: Keys, store: str, now: float) -> Iterator[Finding]:
    """What the store says of keys, and of shards and agents with and without."""
    for why in keys.damaged.values():
        yield Finding("keys", "error", why, "delete the record, and make the key anew")
    owners: dict[str, list[str]] = defaultdict(list)
    for name, record in keys.records.items():
        for public in {public.public for public in record.publics}:
            owners[public].append(name)
        if any(public.since > now + AHEAD for public in record.publics):
            advice = "set the clocks (NTP): by them the end of replaced keys is judged"
            yield Finding("keys", "warning", f"{name!r} begins later than now, by this host's clock", advice)
    for names in owners.values():
        if len(names) > 1:
            advice = "give all but one of them another: `laxity keys rotate NAME --overlap 0s`"
            yield Finding("keys", "error", f"{', '.join(map(repr, names))} have the same public key", advice)
    shards = {name: record for name, record in keys.records.items() if record.role == "shard"}
    for name, broker in sorted(keys.brokers.items()):
        yield from _shard(name, broker.public, [broker.frontend, broker.backend], shards.get(name), now)
    if any(broker.public for broker in keys.brokers.values()):
        for name in sorted(keys.nodes.keys() - keys.records.keys()):
            advice = f"`laxity keys new {name} --role node -o FILE` on its host, and --key FILE"
            yield Finding("keys", "warning", f"the agent {name!r} has no key: shards with keys let it not in", advice)
    if keys.records:
        yield from _store(store, len(keys.records))


def _shard(name: str, public: str, addresses: list[str], record: KeyRecord | None, now: float) -> Iterator[Finding]:
    if not public:
        open_to_all = [address for address in addresses if not is_local(address)]
        if open_to_all:
            advice = f"give it a key: `laxity keys new {name} --role shard -o FILE`; then the others theirs"
            found = f"the shard {name!r} serves in plain text at {', '.join(open_to_all)}: anybody can read and use it"
            yield Finding("keys", "warning", found, advice)
    elif record is None:
        advice = f"`laxity keys new {name} --role shard --public '{public}'`"
        yield Finding("keys", "error", f"the shard {name!r} has a key that is not registered: agents keep away", advice)
    elif public not in record.good(now):
        advice = "restart it with the newest key"
        yield Finding("keys", "error", f"the key of the shard {name!r} is no good any more: agents keep away", advice)
    elif public != newest(record):
        until = next((moment(key.until) for key in record.publics if key.public == public and key.until), "")
        found = f"the shard {name!r} has a key that was replaced" + (f", and ends {until} UTC" if until else "")
        yield Finding("keys", "warning", found, "restart it with the newest key before")


def _store(store: str, count: int) -> Iterator[Finding]:
    """Who can write to the store makes keys."""
    if store.startswith("etcd://"):
        address = parse_address(store)
        far = [endpoint for endpoint in address.endpoints if not is_local(f"tcp://{endpoint}")]
        if far and address.cert is None:
            advice = "give etcd certificates, and name ca=, cert= and key= in the store's address"
            found = f"whoever reaches {', '.join(far)} can make keys: etcd asks for no certificate"
            yield Finding("keys", "warning", found, advice)
            return
    else:
        file = sqlite_path(store)
        if file.exists() and file.stat().st_mode & 0o022 and file.parent.stat().st_mode & 0o011:
            advice = f"`chmod go-w {file}`"
            yield Finding("keys", "warning", f"others can write to {file}, and so make keys", advice)
            return
    yield Finding("keys", "ok", f"{count} owners are registered" if count > 1 else "1 owner is registered")
