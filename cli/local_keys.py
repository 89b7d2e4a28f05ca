"""The keys of a cluster on this machine that was started with --secure: new ones each time, gone with it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from cli.rundir import RunDirectory
from cluster.keyring import KeyRefused, Limits, new_record
from cluster.records import KeyRecord, Paths, RecordError, decode, encode
from cluster.store.base import Entry, Store, StoreError
from laxity.keys import KeyFile, Role, ServerKey, new_pair, write_key_file

OPERATOR = "operator"
NOTE = "made by `laxity up --secure`"
"""By this, keys of an earlier run are known in a store that stays."""


class LocalKeys:
    """One key for each shard and agent, and one for people, in files that this user alone can read.

    Makes the files on construction; OSError where they cannot be written. ``records`` is what the store is to know, by
    its key there.
    """

    def __init__(self, directory: RunDirectory, shards: Sequence[str], agents: Sequence[str]) -> None:
        self._directory = directory
        self._paths = Paths(directory.cluster)
        self._roles: dict[str, Role] = {**dict.fromkeys(shards, "shard"), **dict.fromkeys(agents, "node")}
        self.records: dict[str, bytes] = {}
        directory.keys.mkdir(mode=0o700)
        publics = {name: self._make(name, role) for name, role in self._roles.items()}
        self._servers = [ServerKey(shard, "", [publics[shard]]) for shard in shards]
        self._make(OPERATOR, "operator", self._servers)

    def file(self, name: str) -> Path:
        """The key of a shard or an agent."""
        return self._directory.keys / f"{name}.key"

    def check_taken(self, present: Iterable[Entry]) -> None:
        """Raise :class:`~cluster.keyring.KeyRefused` where a store has keys of these names that are somebody else's."""
        for entry in present:
            if entry.key in self.records:
                try:
                    mine = decode(KeyRecord, entry.key, entry.value).note == NOTE
                except RecordError:
                    mine = False
                if not mine:
                    name = entry.key.removeprefix(self._paths.keys)
                    raise KeyRefused(
                        f"the store has a key {name!r}, which this cluster wants to make itself; take another name "
                        "with --cluster, or another store"
                    )

    def tell_addresses(self, frontends: Mapping[str, str]) -> None:
        """Have people's key file know where the shards are. OSError."""
        found = [msgspec.structs.replace(server, address=frontends[server.shard]) for server in self._servers]
        write_key_file(
            self._directory.operator_key, msgspec.structs.replace(self._operator, servers=found), replace=True
        )

    def forget(self, store: Store) -> str:
        """Take the keys out of a store that stays; why that could not be, '' where it could."""
        try:
            for key in self.records:
                store.delete(key)
        except StoreError as error:
            return str(error)
        return ""

    def _make(self, name: str, role: Role, servers: Sequence[ServerKey] = ()) -> str:
        pair = new_pair()
        key = KeyFile(
            cluster=self._directory.cluster,
            name=name,
            role=role,
            public=pair.public,
            secret=pair.secret,
            servers=list(servers),
        )
        write_key_file(self._directory.operator_key if role == "operator" else self.file(name), key)
        if role == "operator":
            self._operator = key
        self.records[self._paths.key(name)] = encode(new_record(role, pair.public, time.time(), Limits(), NOTE))
        return pair.public
