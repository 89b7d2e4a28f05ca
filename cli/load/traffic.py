"""What the next request is: drawn from a mix, or read from a recording."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, compress
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from cli.recording import Recorded, Recording, requests
from laxity.node import PayloadError
from laxity.payload import decode, encode
from simulation.metrics import Floats


class Kind(msgspec.Struct, frozen=True):
    """Requests that are told of together; ``slo`` in seconds (None: the pipeline's), ``weight`` is their part."""

    pipeline: str
    slo: float | None = None
    priority: int = 0
    weight: float = 1.0


class Call(NamedTuple):
    """One request to be sent: of the kind of that number, with a payload of so many bytes."""

    kind: int
    pipeline: str
    payload: Any
    slo: float | None
    priority: int
    nbytes: int


class Traffic(Protocol):
    """Where requests come from."""

    @property
    def kinds(self) -> Sequence[Kind]:
        """What requests there are."""

    def next(self) -> Call:
        """The next request."""


class Mix:
    """Requests of several kinds, each drawn by its weight, with a payload drawn from those of its pipeline."""

    def __init__(self, kinds: Sequence[Kind], payloads: Mapping[str, Sequence[Any]], seed: int) -> None:
        self.kinds: Sequence[Kind] = kinds
        self._random = random.Random(seed)
        self._up_to = list(accumulate(kind.weight for kind in kinds))
        self._calls = [
            [
                Call(number, kind.pipeline, payload, kind.slo, kind.priority, encode(payload).nbytes)
                for payload in payloads[kind.pipeline]
            ]
            for number, kind in enumerate(kinds)
        ]

    def next(self) -> Call:
        draw = self._random.random
        calls = self._calls[0]
        if len(self._calls) > 1:
            calls = self._calls[bisect_right(self._up_to, draw() * self._up_to[-1], hi=len(self._up_to) - 1)]
        return calls[0] if len(calls) == 1 else calls[int(draw() * len(calls))]


class Replay:
    """The requests of a recording that are of ``pipelines`` and within ``window`` (seconds), in order; ``arrivals`` are
    when they came, counted from the window's begin."""

    def __init__(self, recording: Recording, pipelines: Sequence[str], window: tuple[float, float]) -> None:
        begin, end = window
        self._numbers = {name: number for number, name in enumerate(pipelines)}
        wanted = np.array([name in self._numbers for name in recording.names], dtype=bool)
        mask = wanted[recording.which] & (recording.offsets >= begin) & (recording.offsets < end)
        self.arrivals: Floats = recording.offsets[mask] - begin
        counts = np.bincount(recording.which[mask], minlength=len(recording.names))
        weights = dict(zip(recording.names, counts.tolist(), strict=True))
        self.kinds: Sequence[Kind] = [Kind(name, None, 0, float(weights[name])) for name in pipelines]
        self._recorded = compress(requests(recording.file), mask.tolist())

    def next(self) -> Call:
        recorded = next(self._recorded)
        content = recorded.content()
        try:
            payload = decode(content)
        except PayloadError:  # a text that is none: it was not for the shard to notice
            payload = decode(outlined(recorded).content())
        name = recorded.pipeline
        priority = 1 if recorded.priority > 0 else 0
        return Call(self._numbers[name], name, payload, recorded.budget, priority, content.nbytes)


def outlined(recorded: Recorded) -> Recorded:
    """The same without what was in its payload."""
    return msgspec.structs.replace(recorded, parts=None)
