"""What is known of models on this agent's types of devices, in the store: read before they are held, so that a second
node of a type starts warm, and written by whoever measured."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping

from cluster.decoded import Decoded
from cluster.records import Paths, ProfileRecord, encode
from cluster.store.base import Entry, Store, StoreError
from nodes.measured import Known, Measured

log = logging.getLogger("laxity.node")


class KnownProfiles:
    """``types`` are the types of the devices that this is about: not of emulated ones, which their pipelines'
    profiles are all there is to know of."""

    def __init__(self, store: Store, paths: Paths, host: str, types: Collection[str]) -> None:
        self._store = store
        self._paths = paths
        self._host = host
        self._types = frozenset(types)
        self._decoded = Decoded()
        self._lock = threading.Lock()
        self._unwritten: dict[tuple[str, str], ProfileRecord] = {}
        self._told: dict[tuple[str, str], ProfileRecord] = {}
        self._away = False

    def measured(self, model: str, device_type: str, measured: Measured) -> None:
        """A device found out something about a model; :meth:`write` puts it into the store. From any thread."""
        if device_type not in self._types:
            return
        try:
            record = ProfileRecord(measured.profile, measured.load_seconds, measured.memory_mb, self._host)
        except ValueError as error:
            log.warning("what was measured of %s on %s is not kept: %s", model, device_type, error)
            return
        with self._lock:
            self._unwritten[model, device_type] = record

    def write(self) -> None:
        """Write what was found out. While the store is away it is kept, and tried again with the next call."""
        with self._lock:
            unwritten = self._unwritten
            self._unwritten = {}
        try:
            for at in list(unwritten):
                self._store.put(self._paths.profile(*at), encode(unwritten[at]))
                del unwritten[at]
        except StoreError as error:
            with self._lock:
                self._unwritten = {**unwritten, **self._unwritten}
            if not self._away:
                self._away = True
                log.warning("what was measured of models cannot be written at present: %s", error)
        else:
            self._away = False

    def news(self, entries: Mapping[str, Entry]) -> Known:
        """What the store says that it did not say before. Records with numbers that no measurement gives are left out
        (see :class:`~cluster.records.ProfileRecord`), and said once."""
        self._decoded.update(entries)
        present = {
            at: record
            for key, record in self._decoded.by_key(ProfileRecord, self._paths.profiles).items()
            if (at := self._paths.profiled(key))[1] in self._types
        }
        news = {at: record for at, record in present.items() if self._told.get(at) is not record}
        self._told = present
        return {at: Measured(record.profile, record.load_seconds, record.memory_mb) for at, record in news.items()}
