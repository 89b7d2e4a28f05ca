"""Requests at given times, whatever becomes of those before: open-loop load."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from laxity import Client
from laxity.outcomes import LaxityError, Outcome
from laxity.reply import Reply
from simulation.metrics import Floats

SHOWN_EVERY = 0.25
"""Seconds between two looks at how far it is."""
HEAD_START = 0.05
"""Seconds until time 0 of the arrivals, so that the first ones are not late already."""


class OpenLoop:
    """Sends one payload again and again to a pipeline, and counts how the requests end.

    At most ``in_flight`` requests are under way; those that would be more are not sent, only counted (``unsent``).
    ``outcomes``, ``dropped_at`` (dropped and expired requests by stage), ``latencies`` (seconds from when a request was
    due until its answer came, of the good ones) and ``reasons`` (the first detail of each outcome that is not ``ok``)
    are complete when :meth:`run` has returned; ``lags`` are the seconds by which each request was sent too late.
    """

    def __init__(self, client: Client, pipeline: str, payload: Any, slo: float | None, in_flight: int) -> None:
        self._client = client
        self._pipeline = pipeline
        self._payload = payload
        self._slo = slo
        self._limit = in_flight
        self._changed = threading.Condition()
        self._ended = 0
        self.submitted = 0
        self.unsent = 0
        self.outcomes: Counter[Outcome] = Counter()
        self.dropped_at: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.reasons: dict[Outcome, str] = {}
        self.lags: Floats = np.empty(0)

    @property
    def in_flight(self) -> int:
        return self.submitted - self._ended

    def run(self, arrivals: Floats, show: Callable[[float], None]) -> None:
        """Send at ``arrivals`` (seconds from now, ascending) and wait until every request has ended.

        ``show`` is called some times a second with the seconds since time 0.
        """
        gc.collect()
        gc.freeze()  # a full collection of all that was imported would hold up what is due
        clock = time.monotonic
        start = clock() + HEAD_START
        shown = 0.0
        lags = []
        for arrival in arrivals.tolist():
            due = start + arrival
            while (wait := due - clock()) > 0.0:
                time.sleep(min(wait, SHOWN_EVERY))
                if due - shown > SHOWN_EVERY:
                    shown = clock()
                    show(shown - start)
            lags.append(clock() - due)
            if self.in_flight >= self._limit:
                self.unsent += 1
            else:
                self._send(due)
        self.lags = np.maximum(np.array(lags), 0.0)
        with self._changed:
            while not self._changed.wait_for(lambda: self._ended == self.submitted, SHOWN_EVERY):
                show(clock() - start)

    def _send(self, due: float) -> None:
        self.submitted += 1
        try:
            future = self._client.submit(self._pipeline, self._payload, self._slo)
        except LaxityError as error:
            self._count(due, error.outcome, error.stage, error.detail)
        else:
            future.add_done_callback(partial(self._answered, due))

    def _answered(self, due: float, future: Any) -> None:
        """Called in the client's thread."""
        reply: Reply = future.reply(0)
        self._count(due, reply.outcome, reply.stage, reply.detail)

    def _count(self, due: float, outcome: Outcome, stage: str, detail: str) -> None:
        latency = time.monotonic() - due
        with self._changed:
            self._ended += 1
            self.outcomes[outcome] += 1
            if outcome is Outcome.OK:
                self.latencies.append(latency)
            else:
                self.reasons.setdefault(outcome, detail)
                if stage and outcome in (Outcome.DROPPED, Outcome.EXPIRED):
                    self.dropped_at[stage] += 1
            self._changed.notify()
