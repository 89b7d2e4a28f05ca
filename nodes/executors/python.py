"""The ``python`` executor: any callable."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from nodes.executors.garbage import settle
from pipelines.usercode import load_object


class PythonModel:
    """A function, or a class that is instantiated with the options.

    It is called with the list of feeds (with ``collate``: with what that returned) and returns one output
    for each.

    A class with the methods ``load`` and ``unload`` is instantiated once, and these are called whenever the model is
    paged in and out. Any other class is instantiated whenever it is paged in, and its instance forgotten when it is
    paged out. ``memory_mb``, a number or a method of the instance, says what it holds of the device's memory.

    Arrays and bytes that it returns, also in lists, tuples and dicts, are copied: it may use its memory anew.
    """

    def __init__(self, reference: str, root: str, options: dict[str, Any]) -> None:
        self._reference = reference
        self._root = root
        self._options = options
        self._loaded: Any = None
        """What the reference names; an instance of it where that pages itself."""
        self._call: Any = None

    def hold(self) -> None:
        loaded = load_object(self._reference, self._root)
        if not inspect.isclass(loaded):
            if self._options:
                raise TypeError(f"options are given to classes; {self._reference} is a {type(loaded).__name__}")
            _check_callable(self._reference, loaded)
        elif hasattr(loaded, "load") and hasattr(loaded, "unload"):
            loaded = loaded(**self._options)
            _check_callable(self._reference, loaded)
        self._loaded = loaded

    def load(self) -> None:
        if inspect.isclass(self._loaded):
            made = self._loaded(**self._options)
            _check_callable(self._reference, made)
            self._call = made
            return
        if self._pages_itself():
            self._loaded.load()
        self._call = self._loaded

    def unload(self) -> None:
        if self._pages_itself():
            self._call = None
            self._loaded.unload()
            return
        left = _reference(self._call)
        self._call = None
        if inspect.isclass(self._loaded) and left() is not None:
            # It refers to itself by some way, and would keep its memory.
            settle(thorough=True)

    def release(self) -> None:
        self._loaded = None

    def memory_mb(self) -> float:
        stated = getattr(self._call, "memory_mb", 0.0)
        return float(stated() if callable(stated) else stated)

    def prepare(self, feed: Any) -> Any:
        return feed

    def upload(self, feeds: Any) -> Any:
        return feeds

    def run(self, uploaded: Any) -> Any:
        assert self._call is not None, "load() comes first"
        outputs = self._call(uploaded)
        # The outputs of one element may themselves be tuples, so a tuple is taken for the list it stands for.
        if isinstance(outputs, tuple):
            outputs = list(outputs)
        if isinstance(outputs, (list, np.ndarray)):
            return _own(outputs)
        raise ValueError(
            f"{self._reference} returned a {type(outputs).__name__}: "
            "return a list (or an array) with one output for each element of the batch"
        )

    def download(self, outputs: Any) -> Any:
        return outputs

    def _pages_itself(self) -> bool:
        return not inspect.isclass(self._loaded) and hasattr(self._loaded, "load") and hasattr(self._loaded, "unload")


def _own(output: Any) -> Any:
    """An output in memory that the model cannot write to: it may use its own anew for the next batch, which executes
    while this one's answers are taken apart."""
    own: Any
    if isinstance(output, np.ndarray) and output.dtype == object and output.ndim:
        own = output.copy()
        own.flat = [_own(each) for each in output.flat]
        return own
    if isinstance(output, (np.ndarray, np.void, bytearray)):
        return output.copy()
    if isinstance(output, memoryview):
        return bytes(output)
    if isinstance(output, tuple):
        own = tuple(_own(each) for each in output)
        return type(output)._make(own) if hasattr(output, "_make") else own
    if isinstance(output, list):
        own = copy.copy(output)
        own[:] = [_own(each) for each in output]
        return own
    if isinstance(output, dict):
        own = copy.copy(output)
        own.update((name, _own(each)) for name, each in output.items())
        return own
    return output


def _reference(model: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(model)
    except TypeError:  # of a class with __slots__
        return lambda: None


def _check_callable(reference: str, model: Any) -> None:
    if not callable(model):
        raise TypeError(f"{reference} cannot be called; name a function, or a class with __call__")
