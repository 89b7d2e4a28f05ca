"""Tensors of the Open Inference Protocol: their datatypes, and their elements as binary data."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from laxity.gateway.errors import Invalid
from laxity.payload import MAX_DIMENSIONS

MOST_ALONG_AN_AXIS: Final = 2**31

MOST_ELEMENTS: Final = 2**20
"""Elements of BYTES tensors, and values in JSON, that one request may have: each is handled by itself, and in the
meantime nothing else is done. (Shards do not take many more either.)"""

DTYPES: Final[dict[str, npt.DTypeLike]] = {
    "BOOL": "|b1",
    "UINT8": "|u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "|i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
"""NumPy's dtype of each datatype but BYTES."""
DATATYPES: Final = {np.dtype(dtype).str: name for name, dtype in DTYPES.items()}
"""And the other way round."""
_LENGTH: Final = struct.Struct("<I")

Parameters = dict[str, Any]
Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class Tensor:
    """A named tensor. ``data`` is an array of ``shape``, or for BYTES a flat list of elements."""

    name: str
    datatype: str
    shape: list[int]
    data: Array | list[bytes]
    parameters: Parameters = field(default_factory=dict)


def count_of(name: str, datatype: str, shape: Sequence[int]) -> int:
    """How many elements a tensor has; :class:`Invalid` for what is no datatype or no shape."""
    if datatype not in DTYPES and datatype != "BYTES":
        known = ", ".join([*DTYPES, "BYTES"])
        raise Invalid(f"input {name!r}: the datatype {datatype!r} is not supported; known are {known}")
    if len(shape) > MAX_DIMENSIONS:
        raise Invalid(f"input {name!r}: {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
    for size in shape:
        if not 0 <= size <= MOST_ALONG_AN_AXIS:
            raise Invalid(
                f"input {name!r}: a shape of {list(shape)}; each dimension must be 0 or more, and 2^31 at most"
            )
    return math.prod(shape)


def check_elements(inputs: Sequence[Any]) -> None:
    """:class:`Invalid` where the BYTES tensors of a request, which have a datatype and a shape, have too many elements
    all together."""
    total = sum(count_of(each.name, "BYTES", each.shape) for each in inputs if each.datatype == "BYTES")
    if total > MOST_ELEMENTS:
        raise too_many(total)


def too_many(count: int) -> Invalid:
    return Invalid(
        f"{count} elements of BYTES or values in JSON; at most {MOST_ELEMENTS} are allowed: send numbers as tensors of "
        "them, and bytes as one element"
    )


def from_binary(
    name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview, parameters: Parameters
) -> Tensor:
    """A tensor from its elements as they lie in memory: little-endian, in C order, those of BYTES each behind its
    length in four bytes. Arrays are views of ``raw``. :class:`Invalid` where the size is not what the shape needs."""
    count = count_of(name, datatype, shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, list(shape), _split(name, count, raw), parameters)
    dtype = np.dtype(DTYPES[datatype])
    if len(raw) != count * dtype.itemsize:
        raise Invalid(
            f"input {name!r}: {datatype}{list(shape)} has {count * dtype.itemsize} bytes; {len(raw)} were sent"
        )
    if datatype == "BOOL" and np.any(np.frombuffer(raw, np.uint8) > 1):
        raise Invalid(f"input {name!r}: the bytes of a BOOL tensor must be 0 or 1")
    return Tensor(name, datatype, list(shape), shaped(name, np.frombuffer(raw, dtype), shape), parameters)


def shaped(name: str, array: Array, shape: Sequence[int]) -> Array:
    """The array in a shape that has as many elements."""
    try:
        return array.reshape(shape)
    except ValueError as error:  # an empty one that would be too large if it were not
        raise Invalid(f"input {name!r}: no array has the shape {list(shape)}: {error}") from None


def to_binary(tensor: Tensor) -> bytes:
    """The elements as they lie in memory; see :func:`from_binary`."""
    if isinstance(tensor.data, list):
        return b"".join([part for element in tensor.data for part in (_LENGTH.pack(len(element)), element)])
    return tensor.data.tobytes()


def _split(name: str, count: int, raw: bytes | memoryview) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    while at < len(raw):
        if len(elements) == count:
            raise Invalid(f"input {name!r}: its shape has {count} elements; the binary data has more")
        start = at + _LENGTH.size
        if start > len(raw):
            raise Invalid(f"input {name!r}: the binary data ends within the length of element {len(elements)}")
        at = start + _LENGTH.unpack_from(raw, at)[0]
        if at > len(raw):
            raise Invalid(
                f"input {name!r}: element {len(elements)} is to have {at - start} bytes, but only {len(raw) - start} "
                "are left; each element of BYTES is preceded by its length in four bytes, little-endian"
            )
        elements.append(bytes(raw[start:at]))
    if len(elements) != count:
        raise Invalid(f"input {name!r}: its shape has {count} elements; the binary data has {len(elements)}")
    return elements
