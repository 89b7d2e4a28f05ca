"""What the owner of a key may ask for: which pipelines, how often, how much at a time. An engine.

Limits hold for the cluster, requests come to many shards. Shards do not talk to one another about them: each holds the
owner to its *share*, the part (0 to 1) of a pipeline's requests that the routing table sends to it.
"""

from math import ceil
from typing import Final

from broker.engine.request import Account

BURST: Final = 1.0
"""Seconds of its rate that an owner may save up."""


class Quota:
    """One owner's, over all its connections to this shard. ``account`` is what it has in flight here."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.account = Account()
        self.is_limited = False
        self._pipelines: set[str] = set()
        self._rate = 0.0
        self._in_flight = 0
        self._most = 0.0
        self._tokens = 0.0
        self._filled_at = 0.0

    def limit(self, now: float, pipelines: list[str], rate: float, in_flight: int) -> None:
        """Hold it to these from now on ([] and 0: no limit). What it has saved up stays, within the new limit."""
        self._pipelines = set(pipelines)
        self._in_flight = in_flight
        most = max(rate * BURST, 1.0)
        if rate <= 0.0 or self._rate <= 0.0:
            self._tokens, self._filled_at = most, now
        self._rate, self._most = rate, most
        self._tokens = min(self._tokens, most)
        self.is_limited = bool(pipelines) or rate > 0.0 or in_flight > 0

    def refusal(self, now: float, pipeline: str, share: float) -> str:
        """Why a request for ``pipeline`` that comes at ``now`` (monotonic) is not taken; '' where it is, which uses up
        its part of the rate.

        One of a pipeline of which this shard gets the part ``share`` counts for 1/share of them, as so many go to other
        shards meanwhile. One at a time is always let through, and one a second (or as the rate says, below that).
        """
        if self._pipelines and pipeline not in self._pipelines:
            return f"key {self.owner!r} may not use pipeline {pipeline[:200]!r}"
        part = share if 0.0 < share < 1.0 else 1.0 if share >= 1.0 else 0.0
        if self._in_flight > 0 and self.account.in_flight >= max(ceil(self._in_flight * part - 1e-9), 1):
            return (
                f"key {self.owner!r} has {self.account.in_flight} requests in flight at this shard, and may have "
                f"{self._in_flight} in the cluster; wait for answers"
            )
        if self._rate > 0.0:
            if now > self._filled_at:
                self._tokens = min(self._tokens + (now - self._filled_at) * self._rate, self._most)
                self._filled_at = now
            cost = min(1.0 / part, self._most) if part > 0.0 else self._most
            if self._tokens < cost * (1.0 - 1e-9):
                return f"key {self.owner!r} may submit {self._rate:g} requests a second; slow down and try again"
            self._tokens = max(self._tokens - cost, 0.0)
        return ""
