"""Model keys: ``pipeline@version/stage``."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple


class ModelKey(NamedTuple):
    """The parts of a model key; ``version`` and ``stage`` are empty where the text has none."""

    pipeline: str
    version: str
    stage: str


def parse_key(key: str) -> ModelKey:
    """The parts of a model key."""
    head, _, stage = key.rpartition("/")
    pipeline, _, version = head.rpartition("@")
    return ModelKey(pipeline, version, stage)


@lru_cache(maxsize=1 << 14)
def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A sort key under which ``node-10`` comes behind ``node-9``."""
    parts = re.split(r"0*([0-9]+)", name)
    # Of numbers the longer one is larger: as integers they could have more digits than Python reads.
    return tuple((len(part) if number % 2 else 0, part) for number, part in enumerate(parts))
