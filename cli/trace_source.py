"""Traces from the shards that keep them, by their HTTP addresses in the store."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from cluster.observe.trace import TraceRecord
from cluster.observe.trace_json import trace_from_json
from cluster.records import BrokerRecord, Paths, decode
from cluster.store import open_store

PATIENCE: Final = 10.0
"""Seconds that a shard has for its answer; the process that gives it may have to be started."""
MOST_SAID: Final = 4096
"""Bytes that are read of why it has none."""

T = TypeVar("T")


class Unanswered(Exception):
    """A shard that cannot be asked, and why."""


class _Straight(urllib.request.HTTPRedirectHandler):
    """Follows nobody elsewhere: the token is for shards alone."""

    def redirect_request(self, *_: Any) -> None:
        return None


class TraceSource:
    """The shards of a cluster at one moment, who are shown ``token`` ('': none). ``troubles`` says by shard why it
    could not be asked."""

    def __init__(self, http: dict[str, str], token: str = "") -> None:
        self.shards = list(http)
        self.troubles: dict[str, str] = {}
        self._http = http
        # Their addresses are in the store: no proxy leads to them.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Straight())
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def trace(self, request: str) -> TraceRecord | None:
        """The trace of a request, from whichever shard has it."""

        def ask(shard: str) -> TraceRecord | None:
            found = self._get(shard, f"/traces/{quote(request, safe='')}")
            return None if found is None else trace_from_json(found)

        return next((found for found in self._ask_all(ask) if found is not None), None)

    def traces(self, limit: int, outcome: str, pipeline: str) -> list[TraceRecord]:
        """The newest ``limit`` of each shard's, the newest first; ``outcome`` and ``pipeline`` may be ''."""

        def ask(shard: str) -> list[TraceRecord]:
            wanted = {"limit": str(limit), "outcome": outcome, "pipeline": pipeline}
            found = self._get(shard, f"/traces?{urlencode(wanted)}")
            return [] if found is None else [trace_from_json(one) for one in found["traces"]]

        everything = [trace for found in self._ask_all(ask) for trace in found]
        return sorted(everything, key=lambda trace: trace.at + trace.latency, reverse=True)

    def _ask_all(self, ask: Callable[[str], T]) -> list[T]:
        answers: list[T] = []
        with ThreadPoolExecutor(max_workers=16) as pool:
            asked = {shard: pool.submit(ask, shard) for shard in self.shards}
            for shard, future in asked.items():
                try:
                    answers.append(future.result())
                except Unanswered as error:
                    self.troubles[shard] = str(error)
                except (KeyError, TypeError, ValueError, msgspec.MsgspecError):
                    self.troubles[shard] = f"what {self._http[shard]} answers are no traces: is it of another release?"
        return answers

    def _get(self, shard: str, path: str) -> Any:
        """What a shard answers; None where it has no such thing."""
        address = self._http[shard]
        if not address:
            raise Unanswered("it serves no HTTP: start it with --http HOST:PORT")
        try:
            asked = urllib.request.Request(address + path, headers=self._headers)
            with self._opener.open(asked, timeout=PATIENCE) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            if error.code == 401:
                known = "does not know this token" if self._headers else "wants a token"
                raise Unanswered(
                    f"{address} {known}: give a file with one of its --http-token-file (LAXITY_HTTP_TOKEN_FILE)"
                ) from None
            raise Unanswered(f"{address} answers {error.code} {_said(error)}") from None
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise Unanswered(f"{address} cannot be reached from here: {reason}") from None


def _said(error: urllib.error.HTTPError) -> str:
    """Why a shard refuses, as far as it says so."""
    try:
        return str(json.loads(error.read(MOST_SAID))["error"])
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return str(error.reason)


def trace_source(store: str, cluster: str, token: str) -> TraceSource:
    """Of the shards that are in a cluster's store."""
    paths = Paths(cluster)
    opened = open_store(store)
    try:
        entries = opened.list(paths.brokers).entries
    finally:
        opened.close()
    http = {
        entry.key.removeprefix(paths.brokers): decode(BrokerRecord, entry.key, entry.value).http for entry in entries
    }
    return TraceSource(http, token)
