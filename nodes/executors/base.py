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

    The worker calls ``hold`` once, then ``load`` and ``unload`` as often as the model is paged in and out, and
    ``release`` before it forgets it. While it is loaded, ``inputs``, ``execute`` and ``outputs`` are called in three
    different threads, always the same ones, each for one batch at a time: of three batches one may be prepared while
    another executes and the answers of a third are fetched. ``load`` and ``unload`` are called in a fourth thread,
    never while a batch of this model is under way. Whatever a method raises fails what it was called for and no more.
    """

    def hold(self) -> None:
        """Bring the model into host memory: files read, code imported. Raises :class:`MissingExtra` where a package is
        not installed."""
        ...

    def load(self) -> None:
        """Bring it from host memory onto the device."""
        ...

    def unload(self) -> None:
        """Free the device's memory; the host's copy stays."""
        ...

    def release(self) -> None:
        """Let go of the host's copy as well."""
        ...

    def memory_mb(self) -> float:
        """What it holds of the device's memory while it is loaded, in MB; 0 where nobody knows."""
        ...

    def inputs(self, batch: Sequence[Any]) -> Any:
        """A batch of stage inputs (decoded values), prepared and copied to the device: what ``execute`` takes."""
        ...

    def execute(self, prepared: Any) -> None:
        """Run the batch, and return when the device has finished it. No other batch executes meanwhile."""
        ...

    def outputs(self, prepared: Any) -> list[Any]:
        """One answer, or :class:`ItemError`, for each element of an executed batch."""
        ...


class MissingExtra(ImportError):
    """An executor's package is not installed; the message says what to install."""

    def __init__(self, executor: str, package: str, extra: str) -> None:
        super().__init__(f"the executor {executor!r} needs the package {package!r}: pip install 'laxity[{extra}]'")


class Unavailable(Exception):
    """The server behind an executor is away: the batch can be tried again, here or elsewhere."""
