"""CURVE keys: pairs, and the files that hold them.

A key file is JSON with the owner's name and role, the pair, and the public keys of the shards that it was made for. It
can be read by its owner only: one that others can read is refused, as it is a secret no more.
"""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path
from typing import Final, Literal

import msgspec
import zmq
from zmq.utils import z85

from laxity.private import NotPrivate, read_private

Role = Literal["client", "node", "shard", "operator"]
"""What the owner of a key may do: ``client`` submits requests, ``node`` is an agent, ``shard`` is a shard, ``operator``
does what people do who run the cluster: submit, record, upload files."""
KEY_LENGTH: Final = 40
"""Characters of a key in Z85, as keys are written everywhere."""
LARGEST: Final = 1024 * 1024
"""Bytes of a key file at most."""


class InvalidKey(ValueError):
    """A key or a key file cannot be used; the text says why and what to do."""


class KeyPair(msgspec.Struct, frozen=True):
    """A public key and its secret, in Z85."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r})"  # the secret must not get into logs


class ServerKey(msgspec.Struct, frozen=True):
    """A shard, where services reach it, and the public keys that it may have: while one is replaced, two."""

    shard: str
    address: str
    publics: list[str]


class KeyFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a key file holds. ``servers`` are the shards known when it was made; shards tell of others."""

    cluster: str
    name: str
    role: Role
    public: str
    secret: str
    servers: list[ServerKey] = []

    @property
    def pair(self) -> KeyPair:
        return KeyPair(self.public, self.secret)

    def __repr__(self) -> str:
        return f"KeyFile(name={self.name!r}, role={self.role!r}, public={self.public!r})"


def new_pair() -> KeyPair:
    """A new pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def check_key(key: str, what: str = "key") -> str:
    """``key`` if it is one; raises :class:`InvalidKey`."""
    try:
        good = len(key) == KEY_LENGTH and len(z85.decode(key)) == 32
    except (ValueError, KeyError, struct.error):  # the last: five characters that say more than 32 bits
        good = False
    if not good:
        raise InvalidKey(f"{key[:60]!r} is no {what}: {KEY_LENGTH} characters of Z85, as `laxity keys list` shows them")
    return key


def read_key_file(path: str | Path) -> KeyFile:
    """The key in a file; raises :class:`InvalidKey` where there is none, others can read it, or it is damaged."""
    try:
        text = read_private(path, LARGEST, "replace the key with `laxity keys rotate`")
    except NotPrivate as error:
        raise InvalidKey(str(error)) from error
    except OSError as error:
        raise InvalidKey(
            f"the key file {path} cannot be read: {error.strerror}; name another one (--key, LAXITY_KEY), or make it "
            "with `laxity keys new`"
        ) from error
    try:
        key = msgspec.json.decode(text, type=KeyFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidKey(f"{path} is no key file ({error}); `laxity keys new` writes one") from error
    check_key(key.public)
    check_key(key.secret, "secret key")
    for server in key.servers:
        for public in server.publics:
            check_key(public)
    if zmq.curve_public(key.secret.encode()).decode() != key.public:
        raise InvalidKey(f"the two keys in {path} do not belong together; have it replaced with `laxity keys rotate`")
    return key


def read_own_key(path: str | Path, role: Role, name: str, cluster: str = "") -> KeyFile:
    """The key of the shard or agent of this name, of this cluster or any (''); raises :class:`InvalidKey`, also where
    it is somebody else's."""
    key = read_key_file(path)
    if (key.role, key.name) != (role, name):
        raise InvalidKey(
            f"{path} is the key of {key.name!r} with role {key.role}: {name!r} needs its own; make it with "
            f"`laxity keys new {name} --role {role}`"
        )
    if cluster and key.cluster != cluster:
        raise InvalidKey(f"{path} is a key of cluster {key.cluster!r}; make one in {cluster!r}")
    return key


def write_key_file(path: str | Path, key: KeyFile, *, replace: bool = False) -> None:
    """Write a key where only the owner can read it. FileExistsError unless ``replace``; OSError."""
    path = Path(path)
    content = msgspec.json.format(msgspec.json.encode(key), indent=2) + b"\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
