"""An executor's three steps in one, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nodes.executors.base import Executor


def run_batch(executor: Executor, batch: Sequence[Any]) -> list[Any]:
    """A batch through all three steps, in this thread."""
    prepared = executor.inputs(batch)
    executor.execute(prepared)
    return executor.outputs(prepared)
