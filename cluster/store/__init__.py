"""The store: what the processes of a cluster know in common. ``base`` has the contract."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from urllib.parse import quote, unquote

from cluster.store.base import Store, StoreAwayError, StoreError
from cluster.store.etcd_address import parse_address
from cluster.store.memory import MemoryStore
from cluster.store.sqlite import SqliteStore

__all__ = ["open_store", "sqlite_path", "sqlite_url", "wait_for_store"]

log = logging.getLogger("laxity.store")

PAUSE = 1.0
"""Seconds before a store that is away is tried again."""


def open_store(url: str) -> Store:
    """Open ``memory:`` (a new, private one), ``sqlite:///absolute/path`` (created where it is absent) or
    ``etcd://host:2379,host2:2379?ca=/path&cert=/path&key=/path``. :class:`StoreError` says why it cannot be."""
    if url == "memory:":
        return MemoryStore()
    if url.startswith("etcd://"):
        return _open_etcd(url)
    return SqliteStore(sqlite_path(url))


def wait_for_store(url: str, stop: threading.Event) -> Store | None:
    """The store, as soon as it is there; None where ``stop`` was set before. :class:`StoreError` says why it cannot
    be opened, however long one waits."""
    while not stop.is_set():
        try:
            return open_store(url)
        except StoreAwayError as error:
            log.warning("waiting for the store: %s", error)
            stop.wait(PAUSE)
    return None


def _open_etcd(url: str) -> Store:
    address = parse_address(url)
    # gRPC writes about each connection that fails to stderr; the errors say it, where it matters.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        from cluster.store.etcd import EtcdStore
    except ModuleNotFoundError as error:
        raise StoreError(f"a store on etcd needs more packages ({error}); pip install 'laxity[etcd]'") from error
    return EtcdStore(address)


def sqlite_path(url: str) -> Path:
    """The file that ``sqlite:///absolute/path`` names; :class:`StoreError` for every other address."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme != "sqlite":
        raise StoreError(f"unknown store {url!r}; write sqlite:///path/to/store.db or etcd://host:2379")
    path = Path(unquote(rest))
    if not path.is_absolute() or path == Path(path.anchor):
        raise StoreError(f"the store {url!r} names no absolute path; write sqlite:///path/to/store.db")
    return path


def sqlite_url(path: Path) -> str:
    """The address of the store in a file."""
    return "sqlite://" + quote(str(path.absolute()))
