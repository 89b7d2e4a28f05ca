"""The small interface behind which every model runtime lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class ItemError:
    """Takes the place of one element's answer when its own ``before`` or ``after`` raised:
    that element fails, the rest of its batch does not."""

    __slots__ = ("detail",)

    def __init__(self, detail: str) -> None:
        self.detail = detail

    def __repr__(self) -> str:
        return f"ItemError({self.detail!r})"


class Executor(Protocol):
    """One model on one device, inside that device's worker process.

    The worker calls ``load`` once, then ``infer`` for one batch at a time from one thread,
    and ``unload`` before it lets go of the model.
    """

    def load(self) -> None:
        """Bring the model into memory. Raises :class:`MissingExtra` where a package is not installed."""
        ...

    def infer(self, batch: Sequence[Any]) -> list[Any]:
        """Run a batch of stage inputs (decoded values) and return one answer, or :class:`ItemError`, each.

        Raises whatever the model raises: then the whole batch failed.
        """
        ...

    def unload(self) -> None:
        """Free the model's memory."""
        ...


class MissingExtra(ImportError):
    """An executor's package is not installed; the message says what to install."""

    def __init__(self, executor: str, package: str, extra: str) -> None:
        super().__init__(f"the executor {executor!r} needs the package {package!r}: pip install 'laxity[{extra}]'")
