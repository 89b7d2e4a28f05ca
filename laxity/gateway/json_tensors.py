"""Tensors' elements as JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from types import GenericAlias
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from laxity.gateway.errors import Invalid
from laxity.gateway.tensors import DTYPES, Parameters, Tensor, count_of, shaped
from laxity.payload import MAX_DIMENSIONS

_OPENING: Final = re.compile(rb"[\s\[]*")
_ELEMENTS: Final[dict[str, Any]] = {
    "BOOL": bool,
    "BYTES": str,
    "FP32": float,
    "FP64": float,
    "UINT64": Annotated[int, msgspec.Meta(ge=0)],
    **{
        name: Annotated[int, msgspec.Meta(ge=int(np.iinfo(dtype).min), le=int(np.iinfo(dtype).max))]
        for name, dtype in DTYPES.items()
        if "INT" in name and name != "UINT64"
    },
}
"""What an element may be."""


def from_json(name: str, datatype: str, shape: Sequence[int], raw: msgspec.Raw, parameters: Parameters) -> Tensor:
    """A tensor from its elements as a flat JSON array, or as nested ones of its shape. :class:`Invalid` for what does
    not fit datatype or shape, FP16 among it, which JSON has no numbers for."""
    count = count_of(name, datatype, shape)
    if datatype == "FP16":
        raise Invalid(f"input {name!r}: FP16 cannot be sent as JSON; send it as binary data, or FP32")
    opening = _OPENING.match(raw)
    depth = 0 if opening is None else opening[0].count(b"[")
    if depth not in (1, len(shape)) or depth > MAX_DIMENSIONS:
        raise Invalid(f"input {name!r}: 'data' must be a flat array, or nested ones of the shape {list(shape)}")
    try:
        elements = _decoder(datatype, depth).decode(raw)
        if datatype == "BYTES":
            found = np.array(elements, dtype=object)
        elif datatype == "FP32":
            with np.errstate(over="raise"):
                found = np.array(elements, np.float64).astype(np.float32)
        else:
            found = np.array(elements, DTYPES[datatype])
    except (msgspec.MsgspecError, ValueError, OverflowError, FloatingPointError, RecursionError) as error:
        raise Invalid(f"input {name!r}: 'data' is no {datatype}{list(shape)}: {error}") from None
    if found.size != count or (depth > 1 and found.shape != tuple(shape)):
        raise Invalid(f"input {name!r}: 'data' has the shape {list(found.shape)}, which is not {list(shape)}")
    if datatype == "BYTES":
        if not all(isinstance(element, str) for element in found.flat):
            raise Invalid(f"input {name!r}: 'data' has arrays of several lengths; the shape is {list(shape)}")
        return Tensor(name, datatype, list(shape), [element.encode() for element in found.flat], parameters)
    return Tensor(name, datatype, list(shape), shaped(name, found, shape), parameters)


def to_json(tensor: Tensor) -> list[Any]:
    """The elements as a flat JSON array; :class:`Invalid` for those that can only be sent as binary data. What is no
    number (NaN, infinity) becomes null."""
    if tensor.datatype == "FP16":
        raise Invalid(f"output {tensor.name!r} is FP16, which JSON has no numbers for; ask for it as binary data")
    if isinstance(tensor.data, list):
        try:
            return [element.decode() for element in tensor.data]
        except UnicodeDecodeError:
            raise Invalid(
                f"output {tensor.name!r} holds bytes that are no UTF-8 text; ask for it as binary data"
            ) from None
    elements: list[Any] = tensor.data.ravel().tolist()
    return elements


@lru_cache(maxsize=256)
def _decoder(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    kind = _ELEMENTS[datatype]
    for _ in range(depth):
        kind = GenericAlias(list, (kind,))
    return msgspec.json.Decoder(kind)
