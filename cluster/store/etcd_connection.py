"""Calls to an etcd of several members: which member gets them, when they are repeated, and what their errors mean."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from etcd3aio._protobuf import KVStub, LeaseStub, RangeRequest, WatchStub

from cluster.store.base import CompactedError, LeaseEndedError, StoreAwayError, StoreError
from cluster.store.etcd_address import EtcdAddress, read_tls

ATTEMPT = 1.5
"""How long a member may take to answer what can be asked of another one instead, in seconds."""
PAUSE = 0.1
"""Seconds before another attempt where members answer, but not what was asked (they elect a leader)."""
METADATA = (("hasleader", "true"),)
"""Has a member without a leader refuse, rather than wait for one (or, with a watch, be silent)."""

_OPTIONS: list[tuple[str, int | str]] = [
    # Finds half-open connections in 9 seconds. etcd cuts off who pings more often than every 5 seconds. Of the two
    # timeouts older versions of gRPC know the first alone, newer ones go by the second.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    # How soon a member that was away is tried again. The least back-off is also the time that connecting may take.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", -1),
    # Each store has its own connections, which end with it. None of them leads through a proxy for the web.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]

T = TypeVar("T")


class Endpoint:
    """One member: a channel to it, and etcd's services there."""

    def __init__(self, name: str, channel: grpc.Channel) -> None:
        self.name = name
        self.channel = channel
        self.kv: Any = KVStub(channel)
        self.lease: Any = LeaseStub(channel)
        self.watch: Any = WatchStub(channel)


class EtcdConnection:
    """Thread-safe. A member that answers is kept; one that does not makes place for the next.

    ``timeout`` is how long a call may take in all, in seconds. Raises :class:`StoreError` for files that TLS needs.
    """

    def __init__(self, address: EtcdAddress, timeout: float) -> None:
        self._timeout = timeout
        self._pid = os.getpid()
        self._closed = threading.Event()
        self._endpoints = [Endpoint(*made) for made in _channels(address)]
        # So that many clients do not all have the same member.
        self._current = random.randrange(len(self._endpoints))
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def call(self, send: Callable[[Endpoint, float], T], repeatable: bool) -> T:
        """What ``send`` returns, which is given a member and how many seconds it may take.

        What is not ``repeatable`` is sent once only, unless it is certain that no member took it; the error of one
        whose fate is unknown says so. Raises :class:`StoreError`.
        """
        deadline = time.monotonic() + self._timeout
        refusals = 0
        while True:
            self._check_usable()
            endpoint = self._endpoints[self._current]
            left = max(deadline - time.monotonic(), 0.01)
            try:
                return send(endpoint, min(ATTEMPT, left) if repeatable else left)
            except (grpc.RpcError, ValueError) as error:
                # gRPC has a ValueError for a channel that another thread has just closed.
                self._check_usable()
                if isinstance(error, ValueError):
                    raise
                lasting = explained(error, endpoint.name)
                if lasting is not None:
                    raise lasting from error
                self._turn_from(endpoint)
                refused = _is_refused(error)
                refusals = refusals + 1 if refused else 0
                if refusals == len(self._endpoints) or (
                    time.monotonic() >= deadline and (repeatable or refused or _is_leaderless(error))
                ):
                    raise StoreAwayError(self._unreachable(error, endpoint)) from error
                if not (repeatable or refused or _is_leaderless(error)):
                    raise StoreError(
                        f"the etcd at {endpoint.name} did not answer ({_text(error)}); what was to be written may or "
                        "may not have been; look, or write it again"
                    ) from error
                if not refused:
                    self._closed.wait(PAUSE)

    def find(self) -> Endpoint:
        """A member that serves reads at present; :class:`StoreError` where there is none."""

        def probe(endpoint: Endpoint, timeout: float) -> Endpoint:
            endpoint.kv.Range(RangeRequest(key=b"/", count_only=True), timeout=timeout, metadata=METADATA)
            return endpoint

        return self.call(probe, repeatable=True)

    def close(self) -> None:
        """End what is under way, as broken off."""
        self._closed.set()
        for endpoint in self._endpoints:
            endpoint.channel.close()

    def _check_usable(self) -> None:
        if self.closed:
            raise StoreError("this store has been closed")
        if os.getpid() != self._pid:
            raise StoreError("this store was opened by the parent process; open one in each process")

    def _turn_from(self, endpoint: Endpoint) -> None:
        with self._lock:
            if self._endpoints[self._current] is endpoint:
                self._current = (self._current + 1) % len(self._endpoints)

    def _unreachable(self, error: grpc.RpcError, endpoint: Endpoint) -> str:
        names = ",".join(endpoint.name for endpoint in self._endpoints)
        return f"the etcd at {names} cannot be reached: {_advice(error)} (at {endpoint.name}: {_text(error)})"


def _channels(address: EtcdAddress) -> list[tuple[str, grpc.Channel]]:
    tls = read_tls(address)
    if tls is None:
        return [(name, grpc.insecure_channel(name, _OPTIONS)) for name in address.endpoints]
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
    options = list(_OPTIONS)
    if address.server_name:
        options.append(("grpc.ssl_target_name_override", address.server_name))
    return [(name, grpc.secure_channel(name, credentials, options)) for name in address.endpoints]


_PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}
"""Codes of errors that another attempt, or another member, may not have."""


def explained(error: grpc.RpcError, where: str) -> StoreError | None:
    """The error that a call ends with; None where another attempt may help."""
    code, text = error.code(), error.details() or ""
    if "requested lease not found" in text:
        return LeaseEndedError("the lease has ended; take a new one and write again")
    if "has been compacted" in text:
        return CompactedError("the revision asked for is no longer kept; list again and watch from there")
    if code in _PASSING or "too many requests" in text:
        return None
    for needle, advice in (
        ("database space exceeded", "it is full; compact and defragment it, then disarm its alarm (etcdctl alarm)"),
        ("is too large", "a value or transaction is too large; let it take more with --max-request-bytes"),
        ("larger than max", "a value or transaction is too large; let it take more with --max-request-bytes"),
        ("too many operations", "a transaction has too many operations; let it take more with --max-txn-ops"),
    ):
        if needle in text:
            return StoreError(f"the etcd at {where}: {advice} ({text})")
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return StoreError(
            f"the etcd at {where} does not let us in: grant the user that the client's certificate names what is "
            f"under /laxity/ ({text})"
        )
    return StoreError(f"what answers at {where} is no etcd, or refuses what was asked: {_text(error)}")


def _is_refused(error: grpc.RpcError) -> bool:
    """Whether there was no connection, so that the member cannot have taken the call."""
    text = error.details() or ""
    return error.code() is grpc.StatusCode.UNAVAILABLE and text.startswith(
        ("failed to connect to all addresses", "errors resolving", "DNS resolution failed")
    )


def _is_leaderless(error: grpc.RpcError) -> bool:
    """Whether the member refused the call before it took it, for want of a leader."""
    return bool((error.details() or "") == "etcdserver: no leader")


def _advice(error: grpc.RpcError) -> str:
    text = error.details() or ""
    for needle, advice in (
        ("CERTIFICATE_VERIFY_FAILED", "its certificate was not issued by the CA given as ca=, or for another name"),
        ("Hostname Verification", "its certificate is for another name; give that one as server_name="),
        ("WRONG_VERSION_NUMBER", "it does not speak TLS; leave out ca="),
        ("Endpoint closing", "it does not answer; check that it runs, and is not stopped or cut off"),
        ("andshake", "TLS fails; check ca=, cert= and key=, and whether it speaks TLS at all"),
        ("Connection refused", "nothing listens there; start it, or correct the address"),
        ("resol", "the name is not known; correct the address"),
        ("leader", "too few of its members run to agree; start those that are missing"),
    ):
        if needle in text:
            return advice
    return "it does not answer; check that it runs, the address, and whether it demands TLS and a certificate"


def _text(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}"
