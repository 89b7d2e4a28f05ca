"""With what commands connect to shards: a key, of which ``--key`` or a cluster on this machine tells, or none."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from cli.rundir import RunDirectory
from cluster.keyring import servers
from cluster.keystore import KeyStore
from cluster.records import BrokerRecord, KeyRecord
from cluster.store import open_store
from laxity import Client
from laxity.credentials import Credentials
from laxity.keys import InvalidKey, KeyFile, ServerKey, read_key_file


class ShardAccess(NamedTuple):
    """The ``key`` knows the shards; without one connections are plain, over the network only if ``plain`` says so."""

    key: KeyFile | None = None
    plain: bool = False

    def credentials(self) -> Credentials:
        """For connections of one thread."""
        return Credentials(self.key, self.plain)

    def client(self, url: str, max_pending: int = 10_000) -> Client:
        """A client of the shards at these addresses; a :class:`click.UsageError` for what is no address, or one that
        needs a key."""
        try:
            return Client(url, max_pending=max_pending, key=self.key or "", plain=self.plain)
        except ValueError as error:
            raise click.UsageError(str(error)) from None


def find_access(key: str, plain: bool, cluster: str, store: str | None, shard: str | None = None) -> ShardAccess:
    """What the options say: of the key's shards what the cluster's store says of them, where it is known; with
    ``shard`` (their addresses were given) what the file says. :class:`click.ClickException` for a key that cannot be
    used; StoreError."""
    path = key or (RunDirectory(cluster).found_key(store) if shard is None else None)
    if not path:
        return ShardAccess(None, plain)
    own = read_own(path)
    if shard is None:
        if own.cluster != cluster:
            raise click.ClickException(
                f"{path} is a key of the cluster {own.cluster!r}, and this is {cluster!r}: name that one with "
                "--cluster, or a key of this one with --key (LAXITY_KEY)"
            )
        known = known_servers(cluster, store)
        if known:
            own = msgspec.structs.replace(own, servers=known)
    return ShardAccess(own, plain)


def read_own(path: str | Path) -> KeyFile:
    """The key in a file; a :class:`click.ClickException` where it is none that people use."""
    try:
        own = read_key_file(path)
    except InvalidKey as error:
        raise click.ClickException(str(error)) from error
    if own.role in ("node", "shard"):
        raise click.ClickException(
            f"{path} is the key of a {own.role}; give that of a client or an operator (`laxity keys new NAME --role "
            "operator`)"
        )
    return own


def known_servers(cluster: str, store: str | None) -> list[ServerKey]:
    """The shards and their keys, as the cluster's store has them; [] where nothing runs. StoreError."""
    running = RunDirectory(cluster).running() if store is None else None
    url = store or (running.store if running is not None else "")
    if not url:
        return []
    opened = open_store(url)
    try:
        found = KeyStore(opened, cluster).read()
    finally:
        opened.close()
    return serving_first(found.records, found.brokers)


def serving_first(keys: Mapping[str, KeyRecord], brokers: Mapping[str, BrokerRecord]) -> list[ServerKey]:
    """The shards with the keys that they may have, that with which each serves first."""
    found = []
    for server in servers(keys, brokers, time.time()):
        present = brokers[server.shard].public if server.shard in brokers else ""
        publics = sorted(server.publics, key=lambda good: good != present)
        found.append(ServerKey(server.shard, server.address, publics))
    return found
