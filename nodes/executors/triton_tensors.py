"""The tensors of a Triton model: what its configuration says of each, and arrays in that form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_DTYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}


class Tensor:
    """An input or an output as the model's configuration declares it.

    ``dims`` is the shape of one element (-1: any extent). In Laxity a BF16 tensor is a float32 one, rounded on its way
    in; the elements of BYTES tensors are bytes, also given as str (then UTF-8), and come back as lists of bytes.
    """

    def __init__(self, name: str, data_type: str, dims: list[int], optional: bool = False) -> None:
        self.name = name
        self.data_type = "BYTES" if data_type == "STRING" else data_type
        """In the protocol's terms: ``FP32``, ``BYTES``."""
        self.dims = dims
        self.optional = optional
        self._outer = np.dtype({"BF16": "float32", "BYTES": "object"}.get(self.data_type) or _DTYPES[self.data_type])

    def element(self, value: Any) -> Array:
        """One element's value as an array; ValueError says why the model cannot take it."""
        array = self._checked(value)
        if self.data_type == "BYTES" and array.ndim == 0 and all(extent in (1, -1) for extent in self.dims):
            array = array.reshape([1] * len(self.dims))
        if not self._fits(array.shape):
            wanted = ", ".join("any" if extent < 0 else str(extent) for extent in self.dims)
            raise ValueError(f"input {self.name!r} takes [{wanted}] for one element, not {list(array.shape)}")
        return array

    def batch(self, value: Any) -> Array:
        """A batch's values, stacked along axis 0, as an array in the model's own type; ValueError as above."""
        array = self._checked(value)
        if array.ndim == 0 or not self._fits(array.shape[1:]):
            wanted = ", ".join(["batch", *("any" if extent < 0 else str(extent) for extent in self.dims)])
            raise ValueError(f"input {self.name!r} takes [{wanted}], not {list(array.shape)}")
        return np.ascontiguousarray(array, self._inner())

    def answer(self, array: Array) -> Any:
        """A batch's output as Laxity hands it on."""
        if self.data_type == "BYTES":
            return array.tolist()
        return array.astype(np.float32) if self.data_type == "BF16" else array

    def bytes_each(self) -> int | None:
        """What one element takes; None where that is not known beforehand."""
        if self.data_type == "BYTES" or any(extent < 0 for extent in self.dims):
            return None
        return self.bytes_of(self.dims)

    def bytes_of(self, shape: list[int]) -> int:
        """What an array of ``shape`` takes."""
        return math.prod(shape) * (2 if self.data_type == "BF16" else self._outer.itemsize)

    def from_bytes(self, content: bytes, shape: list[int]) -> Array:
        """The array that lies there."""
        return np.frombuffer(content, self._inner()).reshape(shape)

    def _inner(self) -> np.dtype[Any]:
        if self.data_type != "BF16":
            return self._outer
        from ml_dtypes import bfloat16

        inner: np.dtype[Any] = np.dtype(bfloat16)
        return inner

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.dims) and all(
            want in (-1, got) for want, got in zip(self.dims, shape, strict=True)
        )

    def _checked(self, value: Any) -> Array:
        if self.data_type == "BYTES":
            return self._texts(value)
        if value is None or isinstance(value, (bytes, str, dict)):
            raise ValueError(f"input {self.name!r} takes an array of {self._outer}, not a {type(value).__name__}")
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"input {self.name!r} is no array: {error}") from error
        if array.dtype != self._outer:
            raise ValueError(
                f"input {self.name!r} takes {self._outer}, not {array.dtype}: "
                f"return array.astype(numpy.{self._outer.name}) from 'before'"
            )
        return array

    def _texts(self, value: Any) -> Array:
        array = np.asarray(value, dtype=object)
        flat = [entry.encode() if isinstance(entry, str) else entry for entry in array.ravel().tolist()]
        for entry in flat:
            if not isinstance(entry, (bytes, bytearray, memoryview)):
                raise ValueError(f"input {self.name!r} takes bytes or str, not {type(entry).__name__}")
        texts = np.empty(len(flat), dtype=object)
        texts[:] = [bytes(entry) for entry in flat]
        return texts.reshape(array.shape)


class Signature:
    """What a Triton model takes and gives, from its configuration (``model_config.proto``'s ModelConfig).

    ValueError where Laxity cannot drive such a model: the message says what to change.
    """

    def __init__(self, config: Any, outputs: list[str] | None, max_batch: int) -> None:
        from tritonclient.grpc.model_config_pb2 import DataType

        def tensor(declared: Any, optional: bool = False) -> Tensor:
            data_type = DataType.Name(declared.data_type).removeprefix("TYPE_")
            if data_type not in _DTYPES and data_type not in ("BF16", "STRING"):
                raise ValueError(f"tensor {declared.name!r} of {config.name!r} is of the type {data_type}")
            return Tensor(declared.name, data_type, list(declared.dims), optional)

        self.inputs = {each.name: tensor(each, each.optional) for each in config.input}
        declared_outputs = {each.name: tensor(each) for each in config.output}
        for name in outputs or ():
            if name not in declared_outputs:
                raise ValueError(f"{config.name!r} has no output {name!r}; it has {_listed(declared_outputs)}")
        self.outputs = [declared_outputs[name] for name in outputs or declared_outputs]
        self.batched = True
        """Whether tensors have a batch axis in front; otherwise the model takes one element at a time."""
        if config.model_transaction_policy.decoupled:
            raise ValueError(f"{config.name!r} is decoupled (any number of responses a request); Laxity needs one")
        if config.HasField("sequence_batching"):
            raise ValueError(f"{config.name!r} keeps state over sequences of requests, which Laxity would tear apart")
        if config.max_batch_size == 0:
            everything = [*self.inputs.values(), *self.outputs]
            self.batched = all(each.dims[:1] == [-1] for each in everything)
            if self.batched:
                for each in everything:
                    del each.dims[0]
            elif max_batch > 1:
                raise ValueError(
                    f"{config.name!r} takes no batches (max_batch_size: 0): set max_batch: 1, or let it batch"
                )
        elif config.max_batch_size < max_batch:
            raise ValueError(
                f"{config.name!r} takes batches of up to {config.max_batch_size}: set max_batch: "
                f"{config.max_batch_size}, or a larger max_batch_size in its config.pbtxt"
            )

    def element(self, feed: Any) -> dict[str, Array]:
        """One element's feed by the inputs' names."""
        return {name: self.inputs[name].element(value) for name, value in self._named(feed).items()}

    def batch(self, feed: Any) -> dict[str, Array]:
        """A batched feed by the inputs' names, in the model's own types."""
        arrays = {name: self.inputs[name].batch(value) for name, value in self._named(feed).items()}
        sizes = {name: len(array) for name, array in arrays.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the inputs are of different batches: {sizes}")
        return arrays

    def _named(self, feed: Any) -> dict[str, Any]:
        required = [name for name, each in self.inputs.items() if not each.optional]
        if not isinstance(feed, dict):
            if len(self.inputs) != 1 and len(required) != 1:
                raise ValueError(
                    f"the model has the inputs {_listed(self.inputs)}: return a dict with these names from 'before'"
                )
            return {(required or list(self.inputs))[0]: feed}
        if not feed.keys() <= self.inputs.keys() or not feed.keys() >= set(required):
            inputs, got = _listed(self.inputs), _listed(feed)
            raise ValueError(f"the model has the inputs {inputs}, the feed has {got}: rename them in 'before'")
        return feed


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "none"
