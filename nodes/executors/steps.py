"""What surrounds every model: before, collate or stack, the model, split, after.

A stage's input becomes a *feed* (``before``), feeds become one batched feed (``collate``, or stacking),
the model answers batched *outputs*, these are split along axis 0, and each becomes the stage's answer
(``after``). An error in ``before`` or ``after`` concerns one element and takes its place as an
:class:`ItemError`; an error in ``collate`` or the model concerns the batch and is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from nodes.executors.base import ItemError
from nodes.executors.errors import describe_error
from pipelines.spec import StageSpec
from pipelines.usercode import load_object


class Model(Protocol):
    """A model runtime, without what surrounds it.

    ``upload``, ``run`` and ``download`` are called in three different threads, each for one batch at a time; where
    model and device share their memory, ``upload`` and ``download`` return what they are given.
    """

    def hold(self) -> None:
        """Bring the model into host memory. Raises :class:`MissingExtra` where a package is not installed."""
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

    def prepare(self, feed: Any) -> Any:
        """One element's feed in the form that can be stacked. ValueError where the model cannot take it."""
        ...

    def upload(self, feeds: Any) -> Any:
        """Copy one batched feed to the device: what ``run`` takes."""
        ...

    def run(self, uploaded: Any) -> Any:
        """Run it, and return when the device has finished: what ``download`` takes, in memory that no later run
        writes to."""
        ...

    def download(self, outputs: Any) -> Any:
        """Copy the outputs back: what is split by :func:`split`."""
        ...


Join = Callable[[list[Any]], list[tuple[list[int], Any]]]
"""Groups prepared feeds into batched feeds, each with the indexes of its elements."""


class _Prepared:
    """A batch on its way through :class:`StageExecutor`."""

    __slots__ = ("answers", "groups", "kept")

    def __init__(self, size: int) -> None:
        self.answers: list[Any] = [None] * size
        """One an element, so far only of those that failed."""
        self.kept: list[Any] = [None] * size
        """What ``after`` gets beside an element's output."""
        self.groups: list[tuple[list[int], Any]] = []
        """(elements, what the model has of them: first uploaded feeds, then outputs)."""


class StageExecutor:
    """A model with its stage's user code around it: an :class:`~nodes.executors.base.Executor`."""

    def __init__(self, spec: StageSpec, root: str, model: Model, join: Join) -> None:
        self._spec = spec
        self._root = root
        self._model = model
        self._join = join
        self._before: Callable[[Any], Any] | None = None
        self._collate: Callable[[list[Any]], Any] | None = None
        self._after: Callable[[Any, Any], Any] | None = None

    def hold(self) -> None:
        self._before = self._user_code(self._spec.before)
        self._collate = self._user_code(self._spec.collate)
        self._after = self._user_code(self._spec.after)
        self._model.hold()

    def load(self) -> None:
        self._model.load()

    def unload(self) -> None:
        self._model.unload()

    def release(self) -> None:
        self._model.release()
        self._before = self._collate = self._after = None

    def memory_mb(self) -> float:
        return self._model.memory_mb()

    def inputs(self, batch: Sequence[Any]) -> _Prepared:
        prepared = _Prepared(len(batch))
        feeds: list[Any] = []
        indexes: list[int] = []
        for index, value in enumerate(batch):
            try:
                feed, prepared.kept[index] = self._feed(value)
            except (Exception, SystemExit) as error:
                what = f"before {self._spec.before or 'the model'}"
                prepared.answers[index] = ItemError(describe_error(error, what))
            else:
                feeds.append(feed)
                indexes.append(index)
        if feeds:
            collate = self._collate
            groups = self._join(feeds) if collate is None else [(list(range(len(feeds))), collate(feeds))]
            prepared.groups = [([indexes[each] for each in group], self._model.upload(feed)) for group, feed in groups]
        return prepared

    def execute(self, prepared: _Prepared) -> None:
        prepared.groups = [(members, self._model.run(uploaded)) for members, uploaded in prepared.groups]

    def outputs(self, prepared: _Prepared) -> list[Any]:
        for members, outputs in prepared.groups:
            columns = split(self._model.download(outputs), len(members))
            for index, output in zip(members, columns, strict=True):
                prepared.answers[index] = self._answer(output, prepared.kept[index])
        return prepared.answers

    def _user_code(self, reference: str | None) -> Callable[..., Any] | None:
        if reference is None:
            return None
        loaded = load_object(reference, self._root)
        if not callable(loaded):
            raise TypeError(f"{reference} is a {type(loaded).__name__}; name a function")
        return loaded  # type: ignore[no-any-return]

    def _feed(self, value: Any) -> tuple[Any, Any]:
        feed, kept = value, value
        if self._before is not None:
            feed = self._before(value)
            if isinstance(feed, tuple):
                if len(feed) != 2:
                    raise ValueError(
                        f"'before' returned a tuple of {len(feed)}; return the feed, or the feed and what to keep"
                    )
                feed, kept = feed
        return (feed if self._collate is not None else self._model.prepare(feed)), kept

    def _answer(self, output: Any, kept: Any) -> Any:
        if self._after is None:
            return output
        try:
            return self._after(output, kept)
        except (Exception, SystemExit) as error:
            return ItemError(describe_error(error, f"after {self._spec.after}"))


def stack(feeds: list[Any]) -> list[tuple[list[int], Any]]:
    """Stack prepared feeds (an array, or a dict of arrays) of equal shapes and types along a new axis 0."""
    groups: dict[Any, list[int]] = {}
    for index, feed in enumerate(feeds):
        groups.setdefault(_shape(feed), []).append(index)
    return [(members, _stacked([feeds[index] for index in members])) for members in groups.values()]


def _shape(feed: Any) -> Any:
    if isinstance(feed, dict):
        return tuple((name, array.shape, array.dtype) for name, array in sorted(feed.items()))
    return feed.shape, feed.dtype


def _stacked(feeds: list[Any]) -> Any:
    if isinstance(feeds[0], dict):
        return {name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]}
    return np.stack(feeds)


def together(feeds: list[Any]) -> list[tuple[list[int], Any]]:
    """The feeds as they are, as one list: what a ``python`` model is called with."""
    return [(list(range(len(feeds))), feeds)]


def split(outputs: Any, batch: int) -> list[Any]:
    """One output for each of ``batch`` elements.

    An array is split along axis 0 and a list by its entries; a dict or tuple of several outputs becomes as
    many dicts or tuples, each output split for itself. ValueError where the count is wrong.
    """
    if isinstance(outputs, dict):
        columns = {name: split(output, batch) for name, output in outputs.items()}
        return [{name: column[index] for name, column in columns.items()} for index in range(batch)]
    if isinstance(outputs, tuple):
        columns_ = [split(output, batch) for output in outputs]
        return [tuple(column[index] for column in columns_) for index in range(batch)]
    if isinstance(outputs, list) or (isinstance(outputs, np.ndarray) and outputs.ndim > 0):
        if len(outputs) != batch:
            raise ValueError(
                f"returned {len(outputs)} outputs for a batch of {batch}: "
                "a model must return one output for each element of its batch, in order"
            )
        return list(outputs)
    raise ValueError(
        f"returned a {type(outputs).__name__} for a batch of {batch}: "
        "return a list, or arrays with one row for each element of the batch"
    )
