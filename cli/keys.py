"""``laxity keys``: who is let into a cluster, and with which keys."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import msgspec

from cli.groups import Group
from cli.key_options import check_note, check_overlap, file_option, limit_options, public_option
from cli.key_output import key_path, replaced, rewrite, written
from cli.key_table import describe_key, details, key_table, limits, moment
from cli.options import (
    cluster_argument,
    cluster_option,
    explain_errors,
    find_store,
    json_option,
    near,
    print_json,
    print_table,
    store_option,
)
from cluster.keyring import KeyRefused, Limits, limited, new_record, newest, revoked, rotated, servers
from cluster.keystore import Keys, KeyStore, check_free, check_unused
from cluster.logs import shown as printable
from cluster.records import KeyRecord, Paths, RecordError
from cluster.store import open_store
from laxity.keys import KeyFile, Role, new_pair, read_key_file

F = TypeVar("F", bound=Callable[..., Any])
_USES = {
    "client": "LAXITY_KEY={file}, or laxity.Client(..., key={file!r})",
    "operator": "LAXITY_KEY={file}, or --key {file}",
    "node": "laxity node run --agent {name} --key {file} ...",
    "shard": "laxity broker run --shard {name} --key {file} ...",
}
_REVOKED = {
    "client": "what it sends is refused, and its connections are cut",
    "operator": "what it sends is refused, and its connections are cut; who reaches the store can still do all there",
    "node": "shards cut the agent off and queue its batches again, and its process ends",
    "shard": "agents, other shards and services leave it, and its process ends",
}


def _store_options(function: F) -> F:
    return cluster_option(store_option(explain_errors(function)))


@contextmanager
def _opened(cluster: str, store: str | None) -> Iterator[KeyStore]:
    opened = open_store(find_store(cluster, store))
    try:
        yield KeyStore(opened, cluster)
    finally:
        opened.close()


@click.group(cls=Group)
def keys() -> None:
    """Who is let into a cluster: make, list, limit, rotate and revoke keys.

    Keys lie in the cluster's store, so whoever may write there can make some. docs/keys.md goes through it all.

    \b
    Examples:
      laxity keys new shard-0 --role shard -o /etc/laxity/shard-0.key
      laxity keys new billing --role client --pipelines ocr --rate 50
      laxity keys list
      laxity keys rotate billing --overlap 24h
      laxity keys revoke billing
    """


@keys.command()
@click.argument("name", metavar="NAME")
@click.option("--role", required=True, type=click.Choice(get_args(Role)), help="What its owner may do.")
@file_option
@limit_options
@public_option
@click.option("--note", default="", callback=check_note, metavar="TEXT", help="For people: whose it is, what for.")
@json_option
@_store_options
def new(
    name: str,
    role: Role,
    output: str | None,
    pipelines: list[str] | None,
    rate: float | None,
    in_flight: int | None,
    public: str | None,
    note: str,
    as_json: bool,
    cluster: str,
    store: str | None,
) -> None:
    """Make a key, or register the public half of one that was made elsewhere.

    A client submits requests; an operator does as well, records traffic and uploads files. The key of a node or a shard
    has the name that the agent or the shard has. A name is one owner's; that of a revoked key can be taken again.

    \b
    Examples:
      laxity keys new shard-0 --role shard -o /etc/laxity/shard-0.key
      laxity keys new gpu-7 --role node -o /etc/laxity/gpu-7.key --store etcd://e1:2379
      laxity keys new billing --role client --pipelines ocr,classify --rate 50 --in-flight 20
      laxity keys new mobile --role client --public 'rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7'
    """
    path = _output(name, output, public)
    given = Limits(pipelines, rate, in_flight)
    with _opened(cluster, store) as opened:
        now = time.time()
        found = opened.read()
        check_free(name, found, now)
        if public is not None:
            check_unused(public, found.records)
        pair = new_pair()
        record = new_record(role, public or pair.public, now, given, note)
        if path is None:
            opened.add(name, record, now)
        else:
            key = _key_file(cluster, name, role, pair.public, pair.secret, found, now)
            with written(path, key):
                opened.add(name, record, now)
        _warn_unknown(opened, record)
        found.records[name] = record
    _tell_made(name, record, path, found, now, as_json, cluster)


@keys.command()
@click.argument("name", metavar="NAME")
@click.option(
    "--overlap",
    default="24h",
    show_default=True,
    callback=check_overlap,
    metavar="TIME",
    help="How long the old key is good beside the new one; 0s ends it at once.",
)
@file_option
@public_option
@json_option
@_store_options
def rotate(
    name: str,
    overlap: float,
    output: str | None,
    public: str | None,
    as_json: bool,
    cluster: str,
    store: str | None,
) -> None:
    """Give an owner a new key; the old one is good for a while yet.

    The new key is written in place of the owner's old one where that is what the file has. Services of the SDK and the
    agents read theirs again when they connect; shards want a restart, which costs no request while there are others.

    \b
    Examples:
      laxity keys rotate billing
      laxity keys rotate shard-0 -o /etc/laxity/shard-0.key
      laxity keys rotate billing --overlap 0s
    """
    path = _output(name, output, public)
    with _opened(cluster, store) as opened:
        now = time.time()
        found = opened.read()
        record = _find(name, found)
        if public is not None:
            check_unused(public, found.records)
        pair = new_pair()
        new_public, known = public or pair.public, newest(record)

        def decide(present: KeyRecord) -> KeyRecord:
            return rotated(present, name, new_public, now, overlap, known)

        if path is None:
            record = opened.change(name, decide)
        else:
            decide(record)  # what is refused is refused before a file is written
            key = _key_file(cluster, name, record.role, pair.public, pair.secret, found, now)
            with replaced(path, key):
                record = opened.change(name, decide)
        found.records[name] = record
    _tell_made(name, record, path, found, now, as_json, cluster)
    if not as_json:
        click.echo(f"The old key is good until {moment(now + overlap)} UTC." if overlap else "The old key has ended.")
        if record.role == "shard":
            click.echo(
                f"Restart the shard with {path or 'the new key'}. Clients that know other shards learn of it from "
                "them; for the others: laxity keys servers FILE"
            )


@keys.command()
@click.argument("name", metavar="NAME")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@_store_options
def revoke(name: str, yes: bool, as_json: bool, cluster: str, store: str | None) -> None:
    """Let the owner of a key in no more, and cut who is connected with it.

    Shards hear of it from the store within moments, without a restart; one that cannot reach the store, once it can.
    The name stays in the list.

    \b
    Examples:
      laxity keys revoke billing
      laxity keys revoke gpu-7 --yes
      laxity keys revoke gpu-7 --yes --json
    """
    with _opened(cluster, store) as opened:
        found = opened.read()
        record = _find(name, found)
        before = record.revoked
        if not (before or yes):
            click.echo(f"{name!r} ({record.role}): {_REVOKED[record.role]}.", err=as_json)
            click.confirm("Revoke it? This cannot be taken back", abort=True, err=as_json)
        if not before:
            record = opened.change(name, lambda present: revoked(present, time.time()))
    if as_json:
        print_json(describe_key(name, record, found, time.time()))
    elif before:
        click.echo(f"{name!r} was revoked already, at {moment(before)} UTC.")
        return
    else:
        click.echo(f"{name!r} is revoked: {_REVOKED[record.role]}.")
    if record.role == "shard":
        click.echo(
            "Clients whose key files name its key trust it until they are told: laxity keys servers FILE", err=True
        )


@keys.command()
@click.argument("name", metavar="NAME")
@limit_options
@json_option
@_store_options
def limit(
    name: str,
    pipelines: list[str] | None,
    rate: float | None,
    in_flight: int | None,
    as_json: bool,
    cluster: str,
    store: str | None,
) -> None:
    """Change what a client is held to; what is not named stays.

    \b
    Examples:
      laxity keys limit billing --rate 100
      laxity keys limit billing --pipelines '' --in-flight 0
    """
    given = Limits(pipelines, rate, in_flight)
    if given.empty:
        raise click.UsageError("say what is to change: --pipelines, --rate or --in-flight")
    with _opened(cluster, store) as opened:
        found = opened.read()
        _find(name, found)
        record = opened.change(name, lambda present: limited(present, name, given))
        _warn_unknown(opened, record)
    if as_json:
        print_json(describe_key(name, record, found, time.time()))
    else:
        click.echo(f"{name!r} is held to: {limits(record)}.")


@keys.command("list")
@json_option
@_store_options
def list_keys(as_json: bool, cluster: str, store: str | None) -> None:
    """List all keys: whose they are, since and until when they are good, and what clients are held to.

    \b
    Examples:
      laxity keys list
      laxity keys list --json
    """
    with _opened(cluster, store) as opened:
        found = opened.read()
    now = time.time()
    if as_json:
        print_json([describe_key(name, record, found, now) for name, record in sorted(found.records.items())])
    elif found.records or found.damaged:
        print_table(key_table(found, now))
    else:
        click.echo(f"There are no keys yet; the first ones: laxity keys new --help{cluster_argument(cluster)}")
    for why in found.damaged.values():
        click.echo(printable(why), err=True)


@keys.command()
@click.argument("name", metavar="NAME")
@json_option
@_store_options
def show(name: str, as_json: bool, cluster: str, store: str | None) -> None:
    """Show one key, with those that it had before.

    \b
    Examples:
      laxity keys show billing
    """
    with _opened(cluster, store) as opened:
        found = opened.read()
    record, now = _find(name, found), time.time()
    if as_json:
        print_json(describe_key(name, record, found, now))
    else:
        for line in details(name, record, found, now):
            click.echo(line)


@keys.command("servers")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@json_option
@_store_options
def update_servers(files: tuple[str, ...], as_json: bool, cluster: str, store: str | None) -> None:
    """Write the shards that the store knows, and their keys, into clients' key files anew.

    For clients that were made before the shards, or that know none but shards whose keys were replaced. One that runs
    reads its file again by itself.

    \b
    Examples:
      laxity keys servers billing.key
    """
    own = {file: read_key_file(file) for file in files}
    for file, key in own.items():
        if key.cluster != cluster:
            raise click.ClickException(f"{file} is for the cluster {key.cluster!r}; name it with --cluster")
        if key.role not in ("client", "operator"):
            raise click.ClickException(
                f"{file} is a {key.role}'s, who finds shards in the store; there is nothing to do"
            )
    with _opened(cluster, store) as opened:
        found = opened.read()
    known = servers(found.records, found.brokers, time.time())
    if not known:
        raise click.ClickException("no shard has a key yet; make one with `laxity keys new NAME --role shard`")
    for file, key in own.items():
        rewrite(Path(file), msgspec.structs.replace(key, servers=known))
        if not as_json:
            click.echo(f"{file}: {', '.join(server.shard for server in known)}")
    if as_json:
        print_json([{"file": file, "servers": msgspec.to_builtins(known)} for file in own])


# ---- what commands share -----------------------------------------------------------------------


def _output(name: str, output: str | None, public: str | None) -> Path | None:
    """The file to write; None where only a public key is registered."""
    Paths("local").key(name)
    if public is None:
        return key_path(output, name)
    if output is not None:
        raise click.UsageError(
            "with --public the secret half lies elsewhere, so there is nothing to write; leave out -o"
        )
    return None


def _find(name: str, found: Keys) -> KeyRecord:
    if name in found.damaged:
        raise RecordError(found.damaged[name])
    if name not in found.records:
        raise KeyRefused(f"there is no key {name!r}; {near(name, found.records, 'there are')}")
    return found.records[name]


def _key_file(cluster: str, name: str, role: Role, public: str, secret: str, found: Keys, now: float) -> KeyFile:
    known = servers(found.records, found.brokers, now) if role in ("client", "operator") else []
    return KeyFile(cluster=cluster, name=name, role=role, public=public, secret=secret, servers=known)


def _tell_made(
    name: str, record: KeyRecord, path: Path | None, found: Keys, now: float, as_json: bool, cluster: str
) -> None:
    file = None if path is None else str(path.absolute())
    if as_json:
        print_json({**describe_key(name, record, found, now), "file": file})
    elif path is None:
        click.echo(f"The public key of {name!r} ({record.role}) is registered.")
    else:
        click.echo(f"The key of {name!r} ({record.role}) is in {path}. Whoever has the file is {name!r}.")
        use = _USES[record.role].format(name=name, file=shlex.quote(str(path)))
        click.echo(f"  {use}")
    lonely = record.role in ("client", "operator") and not servers(found.records, found.brokers, now)
    if lonely and path is not None:
        click.echo(
            "No shard has a key yet: once they have, write them into the file with `laxity keys servers "
            f"{shlex.quote(str(path))}{cluster_argument(cluster)}`.",
            err=True,
        )


def _warn_unknown(opened: KeyStore, record: KeyRecord) -> None:
    """Tell of pipelines that are not there: they may come later, or be misspelt."""
    if record.pipelines:
        known = opened.pipelines()
        for name in record.pipelines:
            if name not in known:
                click.echo(f"there is no pipeline {name!r} yet; {near(name, known, 'there are')}", err=True)
