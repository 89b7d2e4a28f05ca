"""Values on the wire: what a request, a stage's input and an answer carry.

A value is ``None``, a bool, an int, a float, text, bytes, a numpy array, or a list or
dict (with text keys) of values. On the wire it is split in two:

- a *node*, a small tree inside the MessagePack header that says what the value is, and
- *parts*, the contents of bytes, arrays and long texts, which travel as separate frames.

``Payload`` holds both, without looking into the parts, so that a shard can pick a field,
split a list into items and join items again without copying or understanding a tensor.
Nothing is ever unpickled: arrays of Python objects are refused on both sides.

Parts lie in the frames in the order in which a depth-first walk of the node meets them.
One frame holds one or more *whole* parts, one behind another; a part never crosses
frames. Small parts are packed together (a frame costs more than a copy of a few KB).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from laxity.node import ArrayNode, BytesNode, DictNode, ListNode, Node, PayloadError, TextNode, describe

PACK_BELOW = 8192
"""Parts smaller than this many bytes share frames; larger ones get a frame of their own."""
PACK_UP_TO = 65536
"""How many bytes of small parts share one frame at most."""
TEXT_INLINE = 1024
"""Texts of up to this many UTF-8 bytes stay inside the node."""
MAX_DEPTH = 32
"""How deeply lists and dicts may nest."""
MAX_DIMENSIONS = 32
"""How many dimensions an array may have."""
FREE_STRUCTURE = 65536
"""Bytes of memory up to which a received value's structure counts nothing. A list of empty lists takes forty times as
much in memory as on the wire, and must not be had for nothing."""
_OF_VALUE = 32
_OF_TEXT = 64
_OF_CONTAINER = 128
_OF_PART = 192
_DTYPE = re.compile(r"[<>|][biufcSU][1-9][0-9]{0,8}")


Part = Any
"""Bytes, a memoryview of bytes or a ``zmq.Frame``: what has a length and the buffer protocol."""


class Payload:
    """A value as it travels: its node and the parts it refers to, in order. ``nbytes`` is the size of these, and of a
    received value's structure where that is large."""

    __slots__ = ("nbytes", "node", "parts")

    def __init__(self, node: Node, parts: list[Part], nbytes: int) -> None:
        self.node = node
        self.parts = parts
        self.nbytes = nbytes

    def __repr__(self) -> str:
        return f"Payload({self.node!r}, {len(self.parts)} parts, {self.nbytes} bytes)"

    def field(self, name: str) -> Payload:
        """The value under ``name`` of a dict; :class:`PayloadError` where there is none."""
        node = self.node
        if type(node) is not DictNode:
            raise PayloadError(f"field {name!r} asked of {describe(node)}; return a dict with that key")
        if name not in node.items:
            raise PayloadError(f"no field {name!r}; the value has {', '.join(sorted(node.items)) or 'none'}")
        start = 0
        for key, child in node.items.items():
            count, size = extent(child)
            if key == name:
                return Payload(child, self.parts[start : start + count], size)
            start += count
        raise AssertionError("unreachable")

    def items(self, most: int | None = None) -> list[Payload]:
        """The items of a list, or the rows of an array along its first axis.

        Give ``most`` where the value is not trusted: rows may be empty, so that a header of a few bytes
        can claim billions of them. :class:`PayloadError` where there are more.
        """
        node = self.node
        count = self._count()
        if most is not None and count > most:
            raise PayloadError(f"{count} items; at most {most} are allowed")
        if type(node) is ListNode:
            result = []
            start = 0
            for child in node.items:
                count, size = extent(child)
                result.append(Payload(child, self.parts[start : start + count], size))
                start += count
            return result
        if type(node) is ArrayNode and node.shape:
            rows = node.shape[0]
            each = node.size // rows if rows else 0
            row = ArrayNode(node.dtype, node.shape[1:], each)
            view = memoryview(self.parts[0]).cast("B") if rows else memoryview(b"")
            return [Payload(row, [view[i * each : (i + 1) * each]], each) for i in range(rows)]
        raise PayloadError(f"items asked of {describe(node)}; return a list or an array of one row an item")

    def _count(self) -> int:
        node = self.node
        if type(node) is ListNode:
            return len(node.items)
        return node.shape[0] if type(node) is ArrayNode and node.shape else 0


def as_list(items: Sequence[Payload]) -> Payload:
    """Join payloads into one list value."""
    parts: list[Part] = []
    nbytes = 0
    for item in items:
        parts += item.parts
        nbytes += item.nbytes
    return Payload(ListNode([item.node for item in items]), parts, nbytes)


def as_dict(fields: dict[str, Payload]) -> Payload:
    """Join named payloads into one dict value."""
    parts: list[Part] = []
    nbytes = 0
    for item in fields.values():
        parts += item.parts
        nbytes += item.nbytes
    return Payload(DictNode({name: item.node for name, item in fields.items()}), parts, nbytes)


def extent(node: Node) -> tuple[int, int]:
    """(number of parts, total bytes in them) that a node refers to."""
    kind = type(node)
    if kind is BytesNode or kind is ArrayNode or kind is TextNode:
        return 1, node.size  # type: ignore[union-attr]
    if kind is ListNode:
        children: Any = node.items  # type: ignore[union-attr]
    elif kind is DictNode:
        children = node.items.values()  # type: ignore[union-attr]
    else:
        return 0, 0
    count = size = 0
    for child in children:
        c, s = extent(child)
        count += c
        size += s
    return count, size


def part_sizes(node: Node, into: list[int], depth: int = 0) -> int:
    """Append the byte size of each part of ``node`` to ``into``, checking what it claims; about how many bytes of
    memory the node takes by itself."""
    kind = type(node)
    structure = _OF_TEXT if kind is str else _OF_VALUE
    if kind is BytesNode or kind is TextNode:
        size: int = node.size  # type: ignore[union-attr]
        if size < 0:
            raise PayloadError(f"negative size {size}")
        into.append(size)
        structure = _OF_PART
    elif kind is ArrayNode:
        _check_array(node)  # type: ignore[arg-type]
        into.append(node.size)  # type: ignore[union-attr]
        structure = _OF_PART
    elif kind is ListNode or kind is DictNode:
        if depth >= MAX_DEPTH:
            raise PayloadError(f"nested more than {MAX_DEPTH} deep")
        structure = _OF_CONTAINER
        items: Any = node.items  # type: ignore[union-attr]
        for child in items.values() if kind is DictNode else items:
            structure += part_sizes(child, into, depth + 1)
    return structure


@lru_cache(maxsize=256)
def _dtype(text: str) -> np.dtype[Any]:
    """The dtype that ``text`` names, if arrays of it may travel: plain numbers, bools, fixed-width text."""
    if _DTYPE.fullmatch(text) is None:
        raise PayloadError(f"array dtype {text!r} is not allowed; use numbers, bools or fixed-width text")
    try:
        return np.dtype(text)
    except (TypeError, ValueError) as error:
        raise PayloadError(f"unknown array dtype {text!r}") from error


def _check_array(node: ArrayNode) -> np.dtype[Any]:
    dtype = _dtype(node.dtype)
    shape = node.shape
    if len(shape) > MAX_DIMENSIONS:
        raise PayloadError(f"an array of {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
    count = 1
    bound = dtype.itemsize
    for extent_ in shape:
        if extent_ < 0:
            raise PayloadError(f"negative extent in shape {list(shape)}")
        count *= extent_
        # An empty array may name any other extents; numpy refuses those whose product overflows.
        bound *= extent_ or 1
    if bound >= 2**63:
        raise PayloadError(f"an array of shape {list(shape)} is too large")
    if count * dtype.itemsize != node.size:
        raise PayloadError(f"{describe(node)} needs {count * dtype.itemsize} bytes, not {node.size}")
    return dtype


def encode(value: Any) -> Payload:
    """Turn a Python value into a payload; :class:`PayloadError` names what cannot be sent."""
    if type(value) is bytes:
        return Payload(BytesNode(len(value)), [value], len(value))
    parts: list[Part] = []
    node = _encode(value, parts, 0)
    return Payload(node, parts, sum(len(part) for part in parts))


def _encode(value: Any, parts: list[Part], depth: int) -> Node:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        raw = _utf8(value)
        if len(raw) <= TEXT_INLINE:
            return str.__str__(value)
        parts.append(raw)
        return TextNode(len(raw))
    if isinstance(value, (bytes, bytearray, memoryview)):
        flat = value if isinstance(value, bytes) else bytes(value)
        parts.append(flat)
        return BytesNode(len(flat))
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise PayloadError(f"the integer {value} does not fit in 64 bits; send it as text")
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return _encode(value.item(), parts, depth)
    if isinstance(value, np.ndarray):
        return _encode_array(value, parts)
    if depth >= MAX_DEPTH:
        raise PayloadError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise PayloadError(f"dict keys must be texts, not {type(key).__name__} ({key!r})")
            _utf8(key)
        return DictNode({str.__str__(key): _encode(item, parts, depth + 1) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return ListNode([_encode(item, parts, depth + 1) for item in value])
    raise PayloadError(
        f"cannot send a {type(value).__module__}.{type(value).__qualname__}; "
        "send None, bool, int, float, text, bytes, a numpy array, or a list or dict of these"
    )


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PayloadError(f"a text has no UTF-8 form ({error.reason}); send it as bytes") from error


def _encode_array(value: npt.NDArray[Any], parts: list[Part]) -> Node:
    dtype = value.dtype.str
    _dtype(dtype)
    if value.ndim > MAX_DIMENSIONS:
        raise PayloadError(f"an array of {value.ndim} dimensions; at most {MAX_DIMENSIONS} are allowed")
    flat = np.ascontiguousarray(value).reshape(-1)
    view = flat.view(np.uint8).data if flat.size else memoryview(b"")
    parts.append(view)
    return ArrayNode(dtype, value.shape, len(view))


def decode(payload: Payload) -> Any:
    """Turn a payload back into a Python value. Arrays are read-only views of the parts."""
    return _decode(payload.node, iter(payload.parts))


def _decode(node: Node, parts: Iterator[Part]) -> Any:
    kind = type(node)
    if kind is BytesNode:
        return bytes(next(parts))
    if kind is ArrayNode:
        dtype = _check_array(node)  # type: ignore[arg-type]
        array = np.frombuffer(memoryview(next(parts)), dtype=dtype).reshape(node.shape)  # type: ignore[union-attr]
        array.flags.writeable = False
        return array
    if kind is ListNode:
        return [_decode(child, parts) for child in node.items]  # type: ignore[union-attr]
    if kind is DictNode:
        return {key: _decode(child, parts) for key, child in node.items.items()}  # type: ignore[union-attr]
    if kind is TextNode:
        try:
            return bytes(next(parts)).decode()
        except UnicodeDecodeError as error:
            raise PayloadError(f"a text is not UTF-8: {error}") from error
    return node


def pack(payloads: Iterable[Payload]) -> list[Part]:
    """The frames that carry the parts of ``payloads``, small parts packed together."""
    frames: list[Part] = []
    small: list[Part] = []
    packed = 0
    for payload in payloads:
        for part in payload.parts:
            size = len(part)
            if size == 0:
                continue
            if small and (size >= PACK_BELOW or packed + size > PACK_UP_TO):
                frames.append(small[0] if len(small) == 1 else b"".join(small))
                small = []
                packed = 0
            if size >= PACK_BELOW:
                frames.append(part)
            else:
                small.append(part)
                packed += size
    if small:
        frames.append(small[0] if len(small) == 1 else b"".join(small))
    return frames


class Unpacker:
    """Takes the parts of one message's nodes out of its frames, in order."""

    __slots__ = ("_frame", "_frames", "_index", "_offset", "_size")

    def __init__(self, frames: Sequence[Part]) -> None:
        self._frames = frames
        self._index = 0
        self._frame: Part = b""
        self._offset = 0
        self._size = 0

    def take(self, node: Node) -> Payload:
        """The payload of ``node``; :class:`PayloadError` where the frames do not hold its parts."""
        if type(node) is BytesNode:
            size = node.size
            if size > 0:
                return Payload(node, [self._part(size)], size)
        sizes: list[int] = []
        structure = part_sizes(node, sizes)
        if structure <= FREE_STRUCTURE:
            structure = 0
        return Payload(node, [self._part(size) for size in sizes], sum(sizes) + structure)

    def _part(self, size: int) -> Part:
        offset = self._offset
        end = offset + size
        if end <= self._size:  # the common case, and an empty part anywhere
            self._offset = end
            frame = self._frame
            if size == self._size:
                return frame
            return frame[offset:end] if type(frame) is bytes else memoryview(frame)[offset:end]
        if offset != self._size:
            raise PayloadError(f"a part of {size} bytes crosses its frame's end ({self._size - offset} bytes left)")
        self._next_frame(size)
        return self._part(size)

    def _next_frame(self, size: int) -> None:
        """Go on to the next frame that is not empty."""
        frames = self._frames
        index = self._index
        while index < len(frames):
            self._frame = frames[index]
            self._size = len(self._frame)
            index += 1
            if self._size:
                self._index = index
                self._offset = 0
                return
        raise PayloadError(f"the message ends where a part of {size} bytes should begin")

    def finish(self) -> None:
        """Check that nothing is left over."""
        if self._offset == self._size and self._index == len(self._frames):
            return
        if self._offset != self._size or any(len(frame) for frame in self._frames[self._index :]):
            raise PayloadError("the message has more payload bytes than its header speaks of")
