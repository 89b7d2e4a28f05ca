"""What tensors mean as the one value that a pipeline takes and answers; docs/gateway.md tells people."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np

from laxity.gateway.errors import GatewayError, Invalid
from laxity.gateway.tensors import DATATYPES, MOST_ELEMENTS, Parameters, Tensor, too_many

CONTENT_TYPE: Final = "content_type"
"""The parameter that says what the elements of a BYTES tensor are: ``str``, ``json``, or bytes where it is not said."""
FIELDS: Final = "fields"
"""The parameter of a request that makes a single input the only field of a dict."""
OUTPUT: Final = "output"
"""The name of the only output of an answer that is no dict."""


def to_payload(inputs: Sequence[Tensor], parameters: Parameters) -> Any:
    """The value of one input, or a dict of several by their names."""
    commas = sum(
        element.count(b",")
        for tensor in inputs
        if isinstance(tensor.data, list) and tensor.parameters.get(CONTENT_TYPE) == "json"
        for element in tensor.data
    )
    if commas >= MOST_ELEMENTS:  # at least as many as there are values behind the first ones
        raise too_many(commas)
    values = {tensor.name: _value(tensor) for tensor in inputs}
    if len(values) != len(inputs):
        raise Invalid("two inputs have the same name")
    if not values:
        raise Invalid("there are no inputs; a request has one or more")
    if len(values) == 1 and parameters.get(FIELDS) is not True:
        return next(iter(values.values()))
    return values


def from_payload(value: Any) -> list[Tensor]:
    """The tensors of an answer: one for each field of a dict, else a single one."""
    if isinstance(value, dict):
        return [_tensor(name, item) for name, item in value.items()]
    return [_tensor(OUTPUT, value)]


# ---- inputs ---------------------------------------------------------------------------------


def _value(tensor: Tensor) -> Any:
    content = tensor.parameters.get(CONTENT_TYPE)
    if not isinstance(tensor.data, list):
        if content is not None:
            raise Invalid(f"input {tensor.name!r}: {CONTENT_TYPE} is for BYTES, not for {tensor.datatype}")
        return tensor.data
    if content is None:
        elements: list[Any] = list(tensor.data)
    elif content in ("str", "json"):
        elements = [_read(tensor.name, element, content) for element in tensor.data]
    else:
        raise Invalid(f"input {tensor.name!r}: the {CONTENT_TYPE} {content!r} is not supported; known are str and json")
    if len(elements) == 1:
        return elements[0]
    return _nested(elements, tensor.shape)


def _read(name: str, element: bytes, content: str) -> Any:
    try:
        return element.decode() if content == "str" else msgspec.json.decode(element)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        what = "UTF-8 text" if content == "str" else "JSON"
        raise Invalid(f"input {name!r}: an element is no {what}: {error}") from None


def _nested(elements: list[Any], shape: Sequence[int]) -> list[Any]:
    """Flat elements as lists of lists, as the shape says."""
    if len(shape) < 2 or not elements:
        return elements
    for size in reversed(shape[1:]):
        elements = [elements[start : start + size] for start in range(0, len(elements), size)]
    return elements


# ---- outputs --------------------------------------------------------------------------------


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind not in "SU":
        return _numbers(name, value)
    if isinstance(value, np.ndarray):
        kept = _elements(name, value.ravel().tolist())
        kept.shape = list(value.shape)
        return kept
    if isinstance(value, list):
        return _elements(name, value)
    if isinstance(value, bool | float) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return _numbers(name, np.array([value]))
    return _elements(name, [value])


def _numbers(name: str, array: np.ndarray[Any, Any]) -> Tensor:
    dtype = array.dtype.newbyteorder("<")
    datatype = DATATYPES.get(dtype.str)
    if datatype is None:
        raise GatewayError(500, f"output {name!r} is an array of {array.dtype.name}, which the protocol does not have")
    return Tensor(name, datatype, list(array.shape), array.astype(dtype, copy=False))


def _elements(name: str, items: list[Any]) -> Tensor:
    """A list as a BYTES tensor of as many elements: bytes, texts, or JSON where they are anything else."""
    shape = [len(items)]
    if all(isinstance(item, bytes) for item in items):
        return Tensor(name, "BYTES", shape, list(items))
    if all(isinstance(item, str) for item in items):
        return Tensor(name, "BYTES", shape, [item.encode() for item in items], {CONTENT_TYPE: "str"})
    return Tensor(name, "BYTES", shape, [msgspec.json.encode(_plain(item)) for item in items], {CONTENT_TYPE: "json"})


def _plain(value: Any) -> Any:
    """What JSON takes: arrays as lists, bytes in base64."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, complex) else value
