"""The ``onnx`` executor: ONNX Runtime."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from nodes.executors.arrays import as_arrays
from nodes.executors.base import MissingExtra

log = logging.getLogger(__name__)

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
}
_WARNINGS_AND_UP = 3


class _Input:
    """One input of the model: its name, its numpy type, and its shape without the batch axis (None: any)."""

    def __init__(self, declared: Any) -> None:
        self.name: str = declared.name
        if declared.type not in _DTYPES:
            raise ValueError(f"input {declared.name!r} is a {declared.type}; laxity feeds {', '.join(_DTYPES)}")
        self.dtype = np.dtype(_DTYPES[declared.type])
        fixed = [extent if isinstance(extent, int) else None for extent in declared.shape]
        self.batch = fixed[0] if fixed else None
        self.shape = fixed[1:]

    def check(self, array: np.ndarray[Any, Any]) -> None:
        if array.dtype != self.dtype:
            raise ValueError(
                f"input {self.name!r} takes {self.dtype}, not {array.dtype}: "
                f"return array.astype(numpy.{self.dtype.name}) from 'before'"
            )
        fits = len(array.shape) == len(self.shape) and all(
            want is None or want == got for want, got in zip(self.shape, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if extent is None else str(extent) for extent in self.shape)
            raise ValueError(f"input {self.name!r} takes [{wanted}] for one element, not {list(array.shape)}")


class OnnxModel:
    """An ONNX file. Option: ``threads``, how many run one operator (default: OMP_NUM_THREADS, else 1).

    A model with one input takes bare arrays; one with several takes a dict by their names. One output comes
    back as an array, several as a dict by their names.
    """

    def __init__(self, file: Path, device: str, options: dict[str, Any], max_batch: int) -> None:
        unknown = sorted(set(options) - {"threads"})
        if unknown:
            raise ValueError(f"the executor 'onnx' has no option {unknown[0]!r}; it has 'threads'")
        threads = options.get("threads", int(os.environ.get("OMP_NUM_THREADS", "1")))
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"the option 'threads' must be 1 or more, not {threads!r}")
        self._threads = threads
        self._file = file
        self._device = device
        self._max_batch = max_batch
        self._onnxruntime: Any = None
        self._session: Any = None
        self._run_options: Any = None
        self._inputs: dict[str, _Input] = {}
        self._outputs: list[str] = []

    def hold(self) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtra("onnx", "onnxruntime", "onnx") from error
        self._onnxruntime = onnxruntime

    def load(self) -> None:
        onnxruntime = self._onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _WARNINGS_AND_UP
        # A memory plan is kept for every shape that ever came; shapes of pictures and lines do not end.
        options.enable_mem_pattern = False
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._device == "cuda":
            if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                # The default searches exhaustively for the best convolution whenever a shape is new.
                providers.insert(0, ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}))
            else:
                log.warning(
                    "ONNX Runtime has no CUDA provider, %s runs on the CPU: install onnxruntime-gpu",
                    self._file,
                )
        # On a CPU the arena gives back after each run what it grew by. Without an arena a large batch takes twice
        # as long (its pages are faulted in again and again), and one that only grows keeps gigabytes.
        self._run_options = onnxruntime.RunOptions()
        if len(providers) == 1:
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._session = onnxruntime.InferenceSession(str(self._file), options, providers=providers)
        self._inputs = {declared.name: _Input(declared) for declared in self._session.get_inputs()}
        self._outputs = [declared.name for declared in self._session.get_outputs()]
        for declared in self._inputs.values():
            if declared.batch is not None and declared.batch < self._max_batch:
                raise ValueError(
                    f"{self._file.name} takes batches of {declared.batch} only: "
                    f"set max_batch: {declared.batch}, or export it with a dynamic first axis"
                )

    def prepare(self, feed: Any) -> Any:
        arrays = as_arrays(feed)
        for name, array in self._named(arrays).items():
            self._inputs[name].check(array)
        return arrays

    def upload(self, feeds: Any) -> Any:
        return self._named(feeds)

    def run(self, uploaded: Any) -> Any:
        outputs = self._session.run(self._outputs, uploaded, self._run_options)
        return outputs[0] if len(outputs) == 1 else dict(zip(self._outputs, outputs, strict=True))

    def download(self, outputs: Any) -> Any:
        return outputs

    def unload(self) -> None:
        self._session = None

    def release(self) -> None:
        self._inputs = {}

    def memory_mb(self) -> float:
        return 0.0

    def _named(self, feed: Any) -> dict[str, Any]:
        wanted = ", ".join(repr(name) for name in self._inputs)
        if not isinstance(feed, dict):
            if len(self._inputs) != 1:
                raise ValueError(f"the model has the inputs {wanted}: return a dict with these names from 'before'")
            return {next(iter(self._inputs)): feed}
        if feed.keys() != self._inputs.keys():
            got = ", ".join(repr(name) for name in feed) or "none"
            raise ValueError(f"the model has the inputs {wanted}, the feed has {got}: rename them in 'before'")
        return feed
