"""Nodes: what a value is, as it stands in a message's header. Its contents travel beside them, as parts.

A node is msgspec's to decode and check; :mod:`laxity.payload` says what it means.
"""

from __future__ import annotations

from typing import Union

import msgspec


class PayloadError(ValueError):
    """The value cannot be sent, or the bytes received are no value."""


class BytesNode(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=0):
    """``[0, size]``: a byte string of ``size`` bytes in the parts."""

    size: int


class ArrayNode(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=1):
    """``[1, dtype, shape, size]``: a C-ordered array; dtype is numpy's, as in ``"<f4"``."""

    dtype: str
    shape: tuple[int, ...]
    size: int


class ListNode(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """``[2, [node, ...]]``: a list of values."""

    items: list[Node]


class DictNode(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """``[3, {name: node, ...}]``: a dict of values."""

    items: dict[str, Node]


class TextNode(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=4):
    """``[4, size]``: a text of ``size`` UTF-8 bytes in the parts."""

    size: int


Node = Union[None, bool, int, float, str, BytesNode, ArrayNode, ListNode, DictNode, TextNode]  # noqa: UP007
"""What a value is; the plain types stand for themselves."""


def describe(node: Node) -> str:
    """What a person would call the value, for messages."""
    if isinstance(node, ArrayNode):
        return f"an array {node.dtype}{list(node.shape)}"
    names = {BytesNode: "bytes", TextNode: "a text", str: "a text", ListNode: "a list", DictNode: "a dict"}
    return names.get(type(node), "None" if node is None else f"a {type(node).__name__}")
