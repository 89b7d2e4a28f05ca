"""``etcd://...``: the store for many hosts, an etcd of one member or several.

The calls are etcd's own, over gRPC; from etcd3aio come the messages and stubs, which its own layer adds little to that
a store could use (docs/decisions.md).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

from etcd3aio._protobuf import (
    Compare,
    DeleteRangeRequest,
    LeaseGrantRequest,
    LeaseKeepAliveRequest,
    LeaseRevokeRequest,
    PutRequest,
    RangeRequest,
    RequestOp,
    TxnRequest,
)

from cluster.store.base import (
    Entry,
    LeaseEndedError,
    Listing,
    Operation,
    Prefix,
    Put,
    StoreError,
    Unchanged,
    check_key,
    check_operations,
    check_ttl,
    normalized,
)
from cluster.store.etcd_address import EtcdAddress
from cluster.store.etcd_connection import METADATA, Endpoint, EtcdConnection
from cluster.store.etcd_watch import EtcdWatch, entry_of, range_of

TIMEOUT = 4.0
"""How long a call may take, in seconds: long enough for the members to elect a new leader."""


class EtcdStore:
    """The store's contract over an etcd; see :class:`cluster.store.base.Store`.

    Revisions are etcd's own. A lease lasts for whole seconds (rounded up; at least about two), and may last a second
    longer. A write that fails may have been done all the same; the error says so where that is so. Raises
    :class:`StoreError` where no member answers within ``timeout`` seconds.
    """

    def __init__(self, address: EtcdAddress, timeout: float = TIMEOUT) -> None:
        self._connection = EtcdConnection(address, timeout)
        self._lock = threading.Lock()
        self._watches: set[EtcdWatch] = set()
        try:
            self._connection.find()
        except BaseException:
            self._connection.close()
            raise

    def get(self, key: str) -> Entry | None:
        check_key(key)
        response = self._call("kv", "Range", RangeRequest(key=key.encode()), repeatable=True)
        return entry_of(response.kvs[0]) if response.kvs else None

    def list(self, prefix: Prefix) -> Listing:
        ranges = [RequestOp(request_range=RangeRequest(**range_of(one))) for one in normalized(prefix)]
        response = self._call("kv", "Txn", TxnRequest(success=ranges), repeatable=True)
        entries = [entry_of(kv) for part in response.responses for kv in part.response_range.kvs]
        return Listing(entries, response.header.revision)

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        revision = self.transaction([], [Put(key, value, lease)])
        assert revision is not None
        return revision

    def delete(self, key: str) -> bool:
        check_key(key)
        response = self._call("kv", "DeleteRange", DeleteRangeRequest(key=key.encode()), repeatable=False)
        return bool(response.deleted)

    def transaction(self, conditions: Sequence[Unchanged], operations: Sequence[Operation]) -> int | None:
        check_operations(operations)
        request = TxnRequest(
            compare=[
                Compare(
                    result=Compare.EQUAL,
                    target=Compare.MOD,
                    key=condition.key.encode(),
                    mod_revision=condition.mod_revision,
                )
                for condition in conditions
            ],
            success=[_request(operation) for operation in operations],
        )
        response = self._call("kv", "Txn", request, repeatable=False)
        revision: int = response.header.revision
        return revision if response.succeeded else None

    def watch(self, prefix: Prefix, from_revision: int) -> EtcdWatch:
        watch = EtcdWatch(self._connection, normalized(prefix), from_revision, self._forget)
        with self._lock:
            self._watches.add(watch)
            watch.start()
        return watch

    def grant_lease(self, ttl: float) -> int:
        check_ttl(ttl)
        # A second lease that nobody came to know of ends by itself.
        response = self._call("lease", "LeaseGrant", LeaseGrantRequest(TTL=math.ceil(ttl)), repeatable=True)
        lease: int = response.ID
        return lease

    def keep_alive(self, lease: int) -> bool:
        def send(endpoint: Endpoint, timeout: float) -> bool:
            stream = endpoint.lease.LeaseKeepAlive(
                iter([LeaseKeepAliveRequest(ID=lease)]), timeout=timeout, metadata=METADATA
            )
            try:
                for response in stream:
                    return bool(response.TTL > 0)
            finally:
                stream.cancel()
            raise StoreError(f"the etcd at {endpoint.name} does not say whether the lease goes on; try again")

        return self._connection.call(send, repeatable=True)

    def revoke(self, lease: int) -> None:
        try:
            self._call("lease", "LeaseRevoke", LeaseRevokeRequest(ID=lease), repeatable=True)
        except LeaseEndedError:
            pass

    def close(self) -> None:
        self._connection.close()
        with self._lock:
            watches = list(self._watches)
        for watch in watches:
            watch.close()

    def _call(self, service: str, method: str, request: Any, repeatable: bool) -> Any:
        return self._connection.call(
            lambda endpoint, timeout: getattr(getattr(endpoint, service), method)(
                request, timeout=timeout, metadata=METADATA
            ),
            repeatable,
        )

    def _forget(self, watch: EtcdWatch) -> None:
        with self._lock:
            self._watches.discard(watch)


def _request(operation: Operation) -> Any:
    key = operation.key.encode()
    if isinstance(operation, Put):
        return RequestOp(request_put=PutRequest(key=key, value=bytes(operation.value), lease=operation.lease))
    return RequestOp(request_delete_range=DeleteRangeRequest(key=key))
