"""The ``python`` executor: any callable."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from pipelines.usercode import load_object


class PythonModel:
    """A function, or a class that is instantiated with the options.

    It is called with the list of feeds (with ``collate``: with what that returned) and returns one output
    for each.
    """

    def __init__(self, reference: str, root: str, options: dict[str, Any]) -> None:
        self._reference = reference
        self._root = root
        self._options = options
        self._call: Callable[[Any], Any] | None = None

    def load(self) -> None:
        loaded = load_object(self._reference, self._root)
        if inspect.isclass(loaded):
            loaded = loaded(**self._options)
        elif self._options:
            raise TypeError(f"options are given to classes; {self._reference} is a {type(loaded).__name__}")
        if not callable(loaded):
            raise TypeError(f"{self._reference} cannot be called; name a function, or a class with __call__")
        self._call = loaded

    def prepare(self, feed: Any) -> Any:
        return feed

    def run(self, feeds: Any) -> Any:
        assert self._call is not None, "load() comes first"
        outputs = self._call(feeds)
        # The outputs of one element may themselves be tuples, so a tuple is taken for the list it stands for.
        if isinstance(outputs, tuple):
            return list(outputs)
        if isinstance(outputs, (list, np.ndarray)):
            return outputs
        raise ValueError(
            f"{self._reference} returned a {type(outputs).__name__}: "
            "return a list (or an array) with one output for each element of the batch"
        )

    def unload(self) -> None:
        self._call = None
