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
    """A model runtime, without what surrounds it."""

    def load(self) -> None:
        """Bring the model into memory. Raises :class:`MissingExtra` where a package is not installed."""
        ...

    def prepare(self, feed: Any) -> Any:
        """One element's feed in the form that can be stacked. ValueError where the model cannot take it."""
        ...

    def run(self, feeds: Any) -> Any:
        """Run one batched feed; what comes back is split by :func:`split`."""
        ...

    def unload(self) -> None:
        """Free the model's memory."""
        ...


Join = Callable[[list[Any]], list[tuple[list[int], Any]]]
"""Groups prepared feeds into batched feeds, each with the indexes of its elements."""


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

    def load(self) -> None:
        self._before = self._user_code(self._spec.before)
        self._collate = self._user_code(self._spec.collate)
        self._after = self._user_code(self._spec.after)
        self._model.load()

    def infer(self, batch: Sequence[Any]) -> list[Any]:
        answers: list[Any] = [None] * len(batch)
        kept: list[Any] = list(batch)
        feeds: list[Any] = []
        indexes: list[int] = []
        for index, value in enumerate(batch):
            try:
                feed, kept[index] = self._feed(value)
            except (Exception, SystemExit) as error:
                answers[index] = ItemError(describe_error(error, f"before {self._spec.before or 'the model'}"))
            else:
                feeds.append(feed)
                indexes.append(index)
        for members, outputs in self._outputs(feeds):
            for member, output in zip(members, outputs, strict=True):
                index = indexes[member]
                answers[index] = self._answer(output, kept[index])
        return answers

    def unload(self) -> None:
        self._model.unload()
        self._before = self._collate = self._after = None

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

    def _outputs(self, feeds: list[Any]) -> list[tuple[list[int], list[Any]]]:
        if not feeds:
            return []
        collate = self._collate
        groups = self._join(feeds) if collate is None else [(list(range(len(feeds))), collate(feeds))]
        return [(members, split(self._model.run(feed), len(members))) for members, feed in groups]

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
