"""The store: what the processes of a cluster know in common. ``base`` has the contract."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote

from cluster.store.base import Store, StoreError
from cluster.store.memory import MemoryStore
from cluster.store.sqlite import SqliteStore

__all__ = ["open_store", "sqlite_url"]


def open_store(url: str) -> Store:
    """Open ``memory:`` (a new, private one) or ``sqlite:///absolute/path`` (created where it is absent)."""
    if url == "memory:":
        return MemoryStore()
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "sqlite":
        path = Path(unquote(rest))
        if not path.is_absolute() or path == Path(path.anchor):
            raise StoreError(f"the store {url!r} names no absolute path; write sqlite:///path/to/store.db")
        return SqliteStore(path)
    raise StoreError(f"unknown store {url!r}; known are memory: and sqlite:///path/to/store.db")


def sqlite_url(path: Path) -> str:
    """The address of the store in a file."""
    return "sqlite://" + quote(str(path.absolute()))
