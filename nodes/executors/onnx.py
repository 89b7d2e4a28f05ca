"""The ``onnx`` executor: ONNX Runtime."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np
from msgspec import Meta

from nodes.executors import onnx_sessions as sessions
from nodes.executors.arrays import as_arrays
from nodes.executors.base import MissingExtra
from nodes.executors.options import device_threads, read_options

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


class OnnxOptions(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's ``options``."""

    threads: Annotated[int, Meta(ge=1)] | None = None
    """How many threads run one operator: by default the device's share of the host."""


class OnnxModel:
    """An ONNX file.

    A model with one input takes bare arrays; one with several takes a dict by their names. One output comes
    back as an array, several as a dict by their names.

    Held, it is the optimised model; loaded, a session of that, whose arena is that of all sessions of
    the worker.
    """

    def __init__(self, file: Path, device: str, options: dict[str, Any], max_batch: int) -> None:
        self._threads = read_options("onnx", options, OnnxOptions).threads or device_threads()
        self._file = file
        self._cuda = device == "cuda"
        self._max_batch = max_batch
        self._ort: Any = None
        self._model: sessions.HeldModel | None = None
        self._inputs: dict[str, _Input] = {}
        self._outputs: list[str] = []
        self._session: _Session | None = None

    def hold(self) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtra("onnx", "onnxruntime", "onnx") from error
        self._ort = onnxruntime
        if self._cuda and not sessions.cuda_available(onnxruntime):
            log.warning("ONNX Runtime has no CUDA provider, %s runs on the CPU: install onnxruntime-gpu", self._file)
            self._cuda = False
        session, self._model = sessions.hold_model(onnxruntime, self._file, self._cuda)
        self._inputs = {declared.name: _Input(declared) for declared in session.get_inputs()}
        self._outputs = [declared.name for declared in session.get_outputs()]
        for declared in self._inputs.values():
            if declared.batch is not None and declared.batch < self._max_batch:
                raise ValueError(
                    f"{self._file.name} takes batches of {declared.batch} only: "
                    f"set max_batch: {declared.batch}, or export it with a dynamic first axis"
                )

    def load(self) -> None:
        assert self._model is not None, "hold() comes first"
        session = sessions.new_session(self._ort, self._model, self._threads, self._cuda)
        options = sessions.run_options(self._ort, self._cuda)
        if self._cuda:
            self._session = BoundSession(self._ort, session, options, self._outputs, "cuda")
        else:
            self._session = _HostSession(session, options, self._outputs)

    def unload(self) -> None:
        self._session = None

    def release(self) -> None:
        self._model = None

    def memory_mb(self) -> float:
        """Of the weights. The arena, which all sessions share, is not counted."""
        assert self._model is not None, "hold() comes first"
        return (len(self._model.graph) + len(self._model.weights)) / 2**20

    def prepare(self, feed: Any) -> Any:
        arrays = as_arrays(feed)
        for name, array in self._named(arrays).items():
            self._inputs[name].check(array)
        return arrays

    def upload(self, feeds: Any) -> Any:
        assert self._session is not None, "load() comes first"
        return self._session.upload(self._named(feeds))

    def run(self, uploaded: Any) -> Any:
        assert self._session is not None, "load() comes first"
        return self._session.run(uploaded)

    def download(self, outputs: Any) -> Any:
        assert self._session is not None, "load() comes first"
        arrays = self._session.download(outputs)
        return arrays[0] if len(arrays) == 1 else dict(zip(self._outputs, arrays, strict=True))

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


class _Session(Protocol):
    """A session of ONNX Runtime: arrays by name in, arrays in the order of the outputs out."""

    def upload(self, feeds: dict[str, np.ndarray[Any, Any]]) -> Any: ...

    def run(self, uploaded: Any) -> Any: ...

    def download(self, outputs: Any) -> list[np.ndarray[Any, Any]]: ...


class _HostSession:
    """The model runs where the arrays are."""

    def __init__(self, session: Any, options: Any, outputs: list[str]) -> None:
        self._session = session
        self._options = options
        self._outputs = outputs

    def upload(self, feeds: dict[str, np.ndarray[Any, Any]]) -> Any:
        return feeds

    def run(self, uploaded: Any) -> Any:
        return self._session.run(self._outputs, uploaded, self._options)

    def download(self, outputs: Any) -> list[np.ndarray[Any, Any]]:
        return outputs  # type: ignore[no-any-return]


class BoundSession:
    """Inputs and outputs are bound to memory of ``device`` ('cuda'): they are copied before and after a run, and not
    in it. The copies go by CUDA's default stream, the session runs in a stream of its own."""

    def __init__(self, ort: Any, session: Any, options: Any, outputs: list[str], device: str) -> None:
        self._ort = ort
        self._session = session
        self._options = options
        self._outputs = outputs
        self._device = device

    def upload(self, feeds: dict[str, np.ndarray[Any, Any]]) -> Any:
        new = self._ort.OrtValue.ortvalue_from_numpy
        return {name: new(np.ascontiguousarray(feed), self._device, 0) for name, feed in feeds.items()}

    def run(self, uploaded: Any) -> Any:
        binding = self._session.io_binding()
        for name, value in uploaded.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._device, 0)
        self._session.run_with_iobinding(binding, self._options)
        binding.synchronize_outputs()
        return binding.get_outputs()

    def download(self, outputs: Any) -> list[np.ndarray[Any, Any]]:
        return [value.numpy() for value in outputs]
