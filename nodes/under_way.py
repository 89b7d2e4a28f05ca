"""Which batches a worker has in hand, where its agent can read it when the worker has died.

A message would come too late: who dies in the first instruction of a batch has sent nothing of it, and the batch before
it, whose answers were about to leave, would be taken for the culprit.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

INPUT: Final = 0
EXECUTION: Final = 1
OUTPUT: Final = 2
_BYTES: Final = 8
_NONE: Final = -1


class UnderWay:
    """One batch number for each lane, in a small file that both processes map."""

    def __init__(self, file: Path) -> None:
        """Map an existing file: see :meth:`create`."""
        with file.open("r+b") as opened:
            self._memory = mmap.mmap(opened.fileno(), 3 * _BYTES)
        self._numbers = memoryview(self._memory).cast("q")

    @classmethod
    def create(cls, file: Path) -> UnderWay:
        file.write_bytes(_NONE.to_bytes(_BYTES, "little", signed=True) * 3)
        return cls(file)

    def begin(self, lane: int, batch: int) -> None:
        self._numbers[lane] = batch

    def end(self, lane: int) -> None:
        self._numbers[lane] = _NONE

    def suspects(self) -> list[int]:
        """The batches of which one may have killed the process. What a model answered has rarely any part in that: it
        is suspected only where no other batch executed."""
        lanes = (EXECUTION, INPUT) if self._numbers[EXECUTION] != _NONE else (INPUT, OUTPUT)
        return [self._numbers[lane] for lane in lanes if self._numbers[lane] != _NONE]

    def close(self) -> None:
        self._numbers.release()
        self._memory.close()
