"""Whether a cluster's store answers, and how fast: each member of it where it has several."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import msgspec

from cluster.store import open_store
from cluster.store.base import Store, StoreError
from cluster.store.etcd_address import EtcdAddress, parse_address

PATIENCE = 1.5
"""Seconds that a member has to answer."""


class MemberHealth(msgspec.Struct, frozen=True):
    """One member: how many milliseconds opening and reading took, or why it could not be."""

    member: str
    ms: float | None
    trouble: str


def store_health(url: str) -> list[MemberHealth]:
    """All members' health, in the order of the address."""
    if not url.startswith("etcd://"):
        return [_try(url, lambda: open_store(url))]
    address = parse_address(url)
    return [_try(endpoint, partial(_open_member, address, endpoint)) for endpoint in address.endpoints]


def _open_member(address: EtcdAddress, endpoint: str) -> Store:
    from cluster.store.etcd import EtcdStore

    return EtcdStore(msgspec.structs.replace(address, endpoints=(endpoint,)), timeout=PATIENCE)


def _try(member: str, connect: Callable[[], Store]) -> MemberHealth:
    begin = time.perf_counter()
    try:
        store = connect()
        try:
            store.get("/laxity/health")
        finally:
            store.close()
    except StoreError as error:
        return MemberHealth(member, None, str(error))
    return MemberHealth(member, (time.perf_counter() - begin) * 1e3, "")
