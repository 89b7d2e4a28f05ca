"""What :class:`~laxity.Client` and :class:`~laxity.AsyncClient` have in common: the user's side of a transport.

Requests are checked and encoded here, in the caller's thread, so that whatever is wrong with one is raised
where it was made; what passes is handed to the I/O thread.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from laxity import protocol
from laxity.credentials import Credentials, default_key, default_plain
from laxity.keys import KeyFile
from laxity.node import DictNode, ListNode, PayloadError
from laxity.outcomes import Rejected, Unavailable
from laxity.payload import encode
from laxity.protocol import MAX_HEADER, MAX_NAME, Request
from laxity.requests import UNKNOWN_SLO, Pending, above_limit
from laxity.routes import ServedPipeline
from laxity.traceparent import LENGTH, current_traceparent, parse_traceparent
from laxity.transport import Ended, Transport

LONGEST_SLO = 86_400.0 * 365
"""The longest SLO in seconds that is taken for one."""
LEAF_WEIGHT = 2048
"""No request takes more header bytes than this beside the nodes of its lists and dicts."""
JOIN = 5.0
"""How long :meth:`Channel.close` waits for the I/O thread, in seconds."""
_ENDPOINT = re.compile(r"tcp://(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):(\d{1,5})|ipc://\S+")


class Channel:
    """Checks and hands over requests; owns the I/O thread. ``deliver`` is called in that thread."""

    def __init__(
        self,
        url: str,
        max_pending: int,
        deliver: Callable[[list[Ended]], None],
        key: KeyFile | str | Path | None,
        plain: bool | None,
    ) -> None:
        if max_pending < 1:
            raise ValueError(f"max_pending must be 1 or more, not {max_pending}")
        endpoints = parse_url(url)
        credentials = Credentials(default_key() if key is None else key, default_plain() if plain is None else plain)
        for endpoint in endpoints:
            credentials.check(endpoint)
        self.client = secrets.token_hex(16)
        self._transport = Transport(endpoints, self.client, deliver, credentials)
        self._max_pending = max_pending
        self.ids = itertools.count(1)
        """The next request's id."""
        self._names: set[str] = set()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._transport.run, name="laxity-client", daemon=True)
        self._thread.start()

    def submit(
        self,
        id: int,
        sink: Any,
        pipeline: str,
        payload: Any,
        slo: float | None,
        priority: int,
        timings: bool,
        traceparent: str,
    ) -> None:
        """Hand a request over, under the next of :attr:`ids`. What ends it goes to ``deliver`` beside ``sink``.

        Raises :class:`Rejected` for a payload or option that no shard takes, ``TypeError`` for an option of the
        wrong type, and ``RuntimeError`` once the client is closed or in a forked process.
        """
        transport = self._transport
        table = transport.table
        if transport.stopping:
            raise RuntimeError("the client is closed; make a new one")
        if self._process != os.getpid():
            raise RuntimeError("the process was forked after the client was made; make a client in the child")
        if pipeline not in self._names:
            self._check_name(pipeline)
        if slo is not None:
            slo = check_slo(slo)
            longest = table.slos.get(pipeline, LONGEST_SLO)
            if slo > longest + 1e-6:  # the shard counts whole microseconds
                raise Rejected(
                    f"an SLO of {slo:g} s is longer than the pipeline's {longest:g} s: ask for less, or none",
                    request_id=self.request_id(id),
                )
        if priority != 0:
            check_priority(priority)
        if traceparent:
            check_traceparent(traceparent)
        else:
            traceparent = current_traceparent()
        try:
            content = encode(payload)
        except PayloadError as error:
            raise Rejected(str(error), request_id=self.request_id(id)) from None
        if content.nbytes > table.max_payload > 0:
            raise Rejected(above_limit(content.nbytes, table.max_payload), request_id=self.request_id(id))
        node = content.node
        weight = LEAF_WEIGHT
        if type(node) is ListNode or type(node) is DictNode:
            raw = protocol.encode(node)
            weight += len(raw)
            if weight > MAX_HEADER:
                raise Rejected(
                    f"the payload's structure takes {len(raw)} bytes, at most {MAX_HEADER - LEAF_WEIGHT} are allowed; "
                    "send numbers as arrays",
                    request_id=self.request_id(id),
                )
            node = msgspec.Raw(raw)  # type: ignore[assignment]
        if len(table) + len(transport.inbox) >= self._max_pending:
            raise Rejected(
                f"queue full: {self._max_pending} requests of this client are in flight; "
                "wait for some of them, or raise max_pending",
                request_id=self.request_id(id),
            )
        now = time.monotonic()
        known = table.slos.get(pipeline) if slo is None else slo
        transport.inbox.append(
            Pending(
                id,
                Request(id, pipeline, None, node, priority, traceparent, bool(timings)),
                content,
                weight,
                now,
                now + (UNKNOWN_SLO if known is None else known),
                slo is None,
                known is not None,
                sink,
            )
        )
        if transport.sleeping:
            transport.wake()

    def wait_ready(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for a shard; :class:`Unavailable` says why there is none."""
        transport = self._transport
        ready = transport.ready.wait(timeout)
        if transport.stopping:
            raise RuntimeError("the client is closed; make a new one")
        if not ready:
            raise Unavailable(f"no shard could be reached within {timeout:g} s; {transport.trouble}")

    @property
    def is_connected(self) -> bool:
        """Whether a shard is connected."""
        return self._transport.ready.is_set() and not self._transport.stopping

    @property
    def pipelines(self) -> Mapping[str, ServedPipeline]:
        """What is served, by name; {} while no shard is connected."""
        return self._transport.pipelines if self.is_connected else {}

    def cancel(self, id: int) -> None:
        """The caller has ended the request itself: forget it and tell the shard."""
        if self._process == os.getpid():
            self._transport.inbox.append(id)
            if self._transport.sleeping:
                self._transport.wake()

    def request_id(self, id: int) -> str:
        """The name under which shards log a request."""
        return f"{self.client}-{id}"

    def close(self) -> None:
        """Cancel what is in flight and end the I/O thread. Safe to call again, and from a future's callback."""
        if self._process != os.getpid():
            return
        self._transport.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN)

    def _check_name(self, pipeline: str) -> None:
        if not isinstance(pipeline, str):
            raise TypeError(f"the pipeline's name must be a text, not {type(pipeline).__name__} ({pipeline!r})")
        if not 0 < len(pipeline) <= MAX_NAME or not pipeline.isprintable():
            raise Rejected(f"{pipeline!r} is no pipeline's name: 1 to {MAX_NAME} printable characters")
        if len(self._names) < 1000:
            self._names.add(pipeline)


def parse_url(url: str) -> list[str]:
    """The endpoints in a client's url; ``ValueError`` (or ``TypeError``) says what is wrong with it."""
    if not isinstance(url, str):
        raise TypeError(f"the shard's address must be a text such as 'tcp://HOST:PORT', not {url!r}")
    endpoints = [part.strip() for part in url.split(",")]
    for endpoint in endpoints:
        match = _ENDPOINT.fullmatch(endpoint)
        if match is None or (match[2] is not None and not 0 < int(match[2]) < 65536):
            raise ValueError(
                f"{endpoint!r} is no shard's address; write 'tcp://HOST:PORT', or several separated by commas"
            )
    return endpoints


def check_slo(slo: float) -> float:
    """An SLO in seconds; raises for what is none."""
    if isinstance(slo, (str, bytes, bool)):
        raise TypeError(f"the SLO must be a number of seconds, not {slo!r}")
    try:
        seconds = float(slo)
    except (TypeError, ValueError):
        raise TypeError(f"the SLO must be a number of seconds, not {slo!r}") from None
    if not 0.0 < seconds <= LONGEST_SLO:  # also refuses NaN
        raise Rejected(f"the SLO must be a positive, finite number of seconds, not {seconds:g}")
    return seconds


def check_priority(priority: int) -> None:
    """Raises for what is no priority."""
    if not isinstance(priority, int):
        raise TypeError(f"the priority must be 0 or 1 (highest), not {priority!r}")
    if priority != 1:
        raise Rejected(f"the priority must be 0 (default) or 1 (highest), not {priority}")


def check_traceparent(traceparent: str) -> None:
    """Raises for what is no W3C ``traceparent``."""
    if not isinstance(traceparent, str) or len(traceparent) != LENGTH or parse_traceparent(traceparent) is None:
        raise Rejected(f"{traceparent!r} is no traceparent; write '00-<32 hex digits>-<16 hex digits>-01'")
