"""Batch-size buckets captured as CUDA graphs: one launch instead of hundreds, and the same kernels every time.

A graph runs with fixed shapes at fixed addresses. So there is one for each bucket, a batch is padded up to the next
bucket by what the input's memory holds (rows of earlier batches: valid inputs, whose outputs nobody sees), and the
outputs are copied out of the graphs' memory before another graph writes there.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

from nodes.executors.torch_modules import cloned, map_tensors

log = logging.getLogger(__name__)

Mode = Literal["auto"] | bool
"""True: a module that cannot be captured is an error; 'auto': it runs plainly; False: nothing is captured."""


WARM_UPS = 3
"""How often each bucket runs before it is captured: by then scripts are specialised and libraries have chosen."""


def bucket_sizes(max_batch: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24 ... and ``max_batch``: from 2 on, at most a third of a padded batch is padding."""
    sizes = {size for power in range(max_batch.bit_length()) for size in (2**power, 3 * 2**power)}
    return sorted({*(size for size in sizes if size < max_batch), max_batch})


class Recorder(Protocol):
    """Captures work into graphs."""

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Run it once, not captured: libraries set themselves up."""
        ...

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, what ``work`` returned): each replay writes anew to the memory of what was returned. Raises where
        the work cannot be captured."""
        ...


class _Captured(NamedTuple):
    inputs: Any
    replay: Callable[[], None]
    outputs: Any


class BucketGraphs:
    """A module's ``call`` on batches of any size up to ``max_batch``. It is captured with the shapes of the first batch
    that comes, that of the stage's sample, which runs while the model is brought in and before it serves; elements of
    other shapes run plainly.
    """

    def __init__(
        self,
        torch: Any,
        call: Callable[[Any], Any],
        recorder: Recorder,
        max_batch: int,
        mode: Mode,
        name: str,
        new_input: Callable[[tuple[int, ...], Any], Any],
    ) -> None:
        """``new_input`` makes a tensor of zeros of a shape and type on the device; ``name`` is for the log."""
        self._torch = torch
        self._call = call
        self._recorder = recorder
        self._sizes = bucket_sizes(max_batch)
        self._mode = mode
        self._name = name
        self._new_input = new_input
        self._wanted = mode is not False
        self._shapes: Any = None
        self._inputs: Any = None
        self._graphs: dict[int, _Captured] = {}
        self._said: set[str] = set()

    def run(self, feeds: Any) -> Any:
        """The outputs of a batched feed (a tensor, or a dict of tensors), in memory of their own."""
        if self._wanted and self._shapes is None:
            self._shapes = _shapes(feeds)
            self.capture(thorough=True)
        size = _rows(feeds)
        if not self._graphs:
            return cloned(self._torch, self._call(feeds))
        if _shapes(feeds) != self._shapes or size > self._sizes[-1]:
            self._say_once(f"{self._name}: elements unlike the first ones run without a CUDA graph")
            return cloned(self._torch, self._call(feeds))
        graph = self._graphs[self._sizes[bisect.bisect_left(self._sizes, size)]]
        with self._torch.inference_mode():
            for static, tensor in zip(_tensors(graph.inputs), _tensors(feeds), strict=True):
                static[:size].copy_(tensor)
            graph.replay()
            return map_tensors(self._torch, graph.outputs, lambda tensor: tensor[:size].clone())

    def capture(self, thorough: bool) -> None:
        """Capture all buckets, if it is known with which shapes; not ``thorough`` where this was done before and the
        weights have moved since."""
        if not self._wanted or self._shapes is None:
            return
        try:
            self._capture_all(thorough)
        except Exception as error:
            self.forget()
            if not thorough:
                self.capture(thorough=True)
                return
            if self._mode is True:
                raise RuntimeError(f"the module cannot be captured as a CUDA graph (graphs: true): {error}") from error
            self._wanted = False
            self._say_once(f"{self._name} runs without CUDA graphs: {type(error).__name__}: {error}")

    def forget(self) -> None:
        """Let go of the graphs and their inputs; the shapes stay known."""
        self._graphs.clear()
        self._inputs = None

    def input_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors(self._inputs)) if self._inputs is not None else 0

    def _capture_all(self, thorough: bool) -> None:
        largest = self._sizes[-1]
        inputs = {name: self._new_input((largest, *shape), dtype) for name, shape, dtype in self._shapes}
        self._inputs = inputs.get(None, inputs)
        if not thorough:
            self._recorder.warm_up(self._work(self._sizes[0]))
        # The largest first: the smaller ones find its memory, which all of them share.
        for size in reversed(self._sizes):
            work = self._work(size)
            for _ in range(WARM_UPS if thorough else 0):
                self._recorder.warm_up(work)
            replay, outputs = self._recorder.capture(work)
            self._graphs[size] = _Captured(work.feeds, replay, outputs)

    def _work(self, size: int) -> _Work:
        return _Work(self._torch, self._call, _first(self._inputs, size))

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


class _Work:
    """One call of the module; what it returns must be tensors, or a graph would not carry it."""

    def __init__(self, torch: Any, call: Callable[[Any], Any], feeds: Any) -> None:
        self.feeds = feeds
        self._torch = torch
        self._call = call

    def __call__(self) -> Any:
        return map_tensors(self._torch, self._call(self.feeds), lambda tensor: tensor)


def _tensors(feeds: Any) -> list[Any]:
    return [feeds[name] for name in sorted(feeds)] if isinstance(feeds, dict) else [feeds]


def _rows(feeds: Any) -> int:
    return int(_tensors(feeds)[0].shape[0])


def _first(feeds: Any, rows: int) -> Any:
    return {name: tensor[:rows] for name, tensor in feeds.items()} if isinstance(feeds, dict) else feeds[:rows]


def _shapes(feeds: Any) -> list[tuple[str | None, tuple[int, ...], Any]]:
    """(name, shape of one element, type) of each input; the name of a bare tensor is None."""
    if isinstance(feeds, dict):
        return [(name, tuple(feeds[name].shape[1:]), feeds[name].dtype) for name in sorted(feeds)]
    return [(None, tuple(feeds.shape[1:]), feeds.dtype)]
