"""What becomes of keys: new ones, limits, rotation with overlap, revocation. Records in, records out.

Times are Unix seconds of the host where somebody decides. Shards judge by their own clocks, so what must hold at once,
whatever clocks say, is written without a time: a revoked key, or one that ended with a rotation without overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec

from cluster.records import BrokerRecord, KeyRecord, PublicKey
from laxity.keys import Role, ServerKey

ENDED = 0.0
"""``until`` of a key that ended at once."""
State = Literal["good", "rotating", "ended", "revoked"]
"""Of an owner's keys: ``rotating`` while an old one is good beside the newest, ``ended`` once none is."""


class KeyRefused(Exception):
    """What somebody wants of a key cannot be; the text says why and what to do."""


class Limits(msgspec.Struct, frozen=True):
    """What a client is held to; None leaves a limit as it is. [] and 0 are no limit."""

    pipelines: list[str] | None = None
    rate: float | None = None
    in_flight: int | None = None

    @property
    def empty(self) -> bool:
        return self == Limits()


def new_record(role: Role, public: str, now: float, limits: Limits, note: str = "") -> KeyRecord:
    """The record of a new key. Raises :class:`KeyRefused`."""
    record = KeyRecord(role=role, publics=[PublicKey(public, now)], note=note)
    return record if limits.empty else limited(record, "", limits)


def limited(record: KeyRecord, name: str, limits: Limits) -> KeyRecord:
    """The record with other limits. Raises :class:`KeyRefused`: only clients have any."""
    if record.role != "client":
        named = f"{name!r} is" if name else "this is to be"
        raise KeyRefused(f"limits are for clients, and {named} a key of role {record.role}; leave them out")
    _check_not_revoked(record, name)
    pipelines = record.pipelines if limits.pipelines is None else sorted(set(limits.pipelines))
    rate = record.rate if limits.rate is None else limits.rate
    in_flight = record.in_flight if limits.in_flight is None else limits.in_flight
    if not (math.isfinite(rate) and rate >= 0.0):
        raise KeyRefused(f"a rate of {rate} requests a second is none; give a number above 0, or 0 for no limit")
    if in_flight < 0:
        raise KeyRefused(f"{in_flight} requests in flight are no limit; give a number above 0, or 0 for no limit")
    return msgspec.structs.replace(record, pipelines=pipelines, rate=rate, in_flight=in_flight)


def rotated(record: KeyRecord, name: str, public: str, now: float, overlap: float, replaced: str) -> KeyRecord:
    """The record with a new key; the others are good for ``overlap`` seconds more, or end at once if that is 0.

    ``replaced`` is the newest key so far, as whoever rotates knows it: if somebody else has put another one there
    meanwhile (:class:`KeyRefused`), one of the two would end unused.
    """
    _check_not_revoked(record, name)
    if newest(record) != replaced:
        raise KeyRefused(f"somebody else has just given {name!r} another key; see `laxity keys show {name}`")
    if any(key.public == public for key in record.publics):
        raise KeyRefused(f"{name!r} has this very key already; make another one")
    ends = now + overlap if overlap else ENDED
    old = [
        key if key.until is not None and key.until <= ends else msgspec.structs.replace(key, until=ends)
        for key in record.publics
        if good(key, now)
    ]
    return msgspec.structs.replace(record, publics=[PublicKey(public, now), *old])


def revoked(record: KeyRecord, now: float) -> KeyRecord:
    """The record of a key that lets nobody in any more; one that was revoked before stays as it is."""
    return record if record.revoked else msgspec.structs.replace(record, revoked=now)


def newest(record: KeyRecord) -> str:
    """The key that its owner should use; '' where there is none."""
    return record.publics[0].public if record.publics else ""


def good(key: PublicKey, now: float) -> bool:
    """Whether it lets anybody in at ``now``, unless its owner was revoked."""
    return key.until is None or now < key.until


def state(record: KeyRecord, now: float) -> State:
    """How an owner's keys are at ``now``."""
    if record.revoked:
        return "revoked"
    count = len(record.good(now))
    return "ended" if not count else "good" if count == 1 else "rotating"


def owner_of(public: str, keys: Mapping[str, KeyRecord]) -> str | None:
    """Whose key this is, or was."""
    return next((name for name, record in keys.items() if any(public == key.public for key in record.publics)), None)


def servers(keys: Mapping[str, KeyRecord], brokers: Mapping[str, BrokerRecord], now: float) -> list[ServerKey]:
    """What the key file of a client is to know of the shards: all that have keys, the address '' of those that are not
    running."""
    found = []
    for name, record in sorted(keys.items()):
        publics = record.good(now) if record.role == "shard" else []
        if publics:
            found.append(ServerKey(name, brokers[name].frontend if name in brokers else "", publics))
    return found


def _check_not_revoked(record: KeyRecord, name: str) -> None:
    if record.revoked:
        raise KeyRefused(f"{name!r} was revoked and stays so; `laxity keys new {name} --role ROLE` makes it anew")
