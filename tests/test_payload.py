"""Values on the wire: what goes in comes out, and what lies about itself is refused."""

from __future__ import annotations

import itertools
import math
from enum import IntEnum, StrEnum

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from laxity import protocol
from laxity.node import ArrayNode, BytesNode, ListNode, Node, PayloadError, TextNode, describe
from laxity.payload import (
    MAX_DEPTH,
    PACK_BELOW,
    PACK_UP_TO,
    TEXT_INLINE,
    Payload,
    Unpacker,
    as_dict,
    as_list,
    decode,
    encode,
    extent,
    pack,
)

NODES = msgspec.msgpack.Decoder(Node)

dtypes = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    hnp.byte_string_dtypes(min_len=1),
    hnp.unicode_string_dtypes(endianness="<", min_len=1),
)
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
texts = st.text(max_size=30)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | texts
    | st.binary(max_size=40)
    | st.builds(bytes, st.integers(PACK_BELOW - 2, PACK_BELOW + 2))
    | st.builds(lambda n: "é" * n, st.integers(TEXT_INLINE // 2 - 1, TEXT_INLINE // 2 + 1))
    | arrays
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


def travel(payloads: list[Payload]) -> list[Payload]:
    """Over the wire and back: nodes through MessagePack, parts through frames."""
    nodes = [NODES.decode(protocol.encode(payload.node)) for payload in payloads]
    unpacker = Unpacker([bytes(frame) for frame in pack(payloads)])
    arrived = [unpacker.take(node) for node in nodes]
    unpacker.finish()
    return arrived


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        # Bit by bit: NaNs are equal to themselves here, and -0.0 differs from 0.0.
        return (
            isinstance(b, np.ndarray)
            and a.shape == b.shape
            and a.dtype == b.dtype
            and a.tobytes() == np.ascontiguousarray(b).tobytes()
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b


@given(st.lists(values, max_size=4))
@example([b"x" * 64] * 3)
@example([bytes(PACK_UP_TO - 1), b"ab", bytes(PACK_UP_TO)])
def test_values_survive_the_wire(items):
    for value, payload in zip(items, travel([encode(value) for value in items]), strict=True):
        assert same(value, decode(payload))
        assert payload.nbytes == sum(len(part) for part in payload.parts) == extent(payload.node)[1]


@given(st.lists(st.integers(0, 3 * PACK_BELOW), max_size=60))
def test_small_parts_share_frames_and_large_ones_have_their_own(sizes):
    payloads = [encode(bytes([index % 256]) * size) for index, size in enumerate(sizes)]
    frames = pack(payloads)
    assert all(0 < len(frame) <= max(PACK_UP_TO, 3 * PACK_BELOW) for frame in frames)
    assert sum(map(len, frames)) == sum(sizes)
    for first, second in itertools.pairwise(frames):
        if len(first) < PACK_BELOW and len(second) < PACK_BELOW:
            pytest.fail("two small frames follow each other")
    assert [decode(payload) for payload in travel(payloads)] == [decode(payload) for payload in payloads]


@given(st.dictionaries(texts, values, min_size=1, max_size=5))
def test_a_field_is_what_lies_under_the_name(value):
    payload = encode(value)
    for name, item in value.items():
        field = payload.field(name)
        assert same(item, decode(field))
        assert field.nbytes == extent(field.node)[1]


@given(st.lists(values, max_size=6))
def test_items_of_a_list_and_the_list_of_items(value):
    items = encode(value).items()
    assert all(map(same, value, map(decode, items)))
    (joined,) = travel([as_list(items)])
    assert same(value, decode(joined))


@given(hnp.arrays(dtypes, hnp.array_shapes(min_dims=1, min_side=0, max_side=5)))
def test_rows_of_an_array(value):
    (payload,) = travel([encode(value)])
    rows = payload.items()
    expected = [
        value[index, ...] if value.ndim > 1 else value[index : index + 1].reshape(()) for index in range(len(value))
    ]
    assert len(rows) == len(expected)
    assert all(same(row, decode(item)) for row, item in zip(expected, rows, strict=True))
    (joined,) = travel([as_list(rows)])
    assert all(map(same, expected, decode(joined)))


def test_fields_joined_into_a_dict():
    (payload,) = travel([as_dict({"a": encode(b"1" * 9000), "b": encode(2), "c": encode(b"3")})])
    assert decode(payload) == {"a": b"1" * 9000, "b": 2, "c": b"3"}


def test_arrays_come_out_read_only():
    (payload,) = travel([encode(np.arange(3))])
    with pytest.raises(ValueError, match="read-only"):
        decode(payload)[0] = 1


def test_relatives_of_the_plain_types_become_plain():
    class Colour(StrEnum):
        RED = "red"

    class Size(IntEnum):
        TWO = 2

    value = {Colour.RED: Size.TWO, np.str_("n"): [np.float32(1.5), np.int8(3), np.bool_(True)], "t": (1, 2)}
    (payload,) = travel([encode(value)])
    assert same(decode(payload), {"red": 2, "n": [1.5, 3, True], "t": [1, 2]})
    assert same(decode(encode([bytearray(b"a"), memoryview(b"bc")])), [b"a", b"bc"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "cannot send a builtins.object"),
        (1j, "complex"),
        (np.longdouble(1), "longdouble"),
        ({1: 2}, "dict keys must be texts, not int"),
        (2**64, "does not fit in 64 bits"),
        (-(2**63) - 1, "does not fit in 64 bits"),
        ("\ud800", "UTF-8"),
        ({"\ud800": 1}, "UTF-8"),
        (np.array([object()]), "not allowed"),
        (np.array([1], "M8[s]"), "not allowed"),
        (np.zeros(1, [("a", "i4")]), "not allowed"),
        (np.zeros((1,) * 33), "33 dimensions"),
    ],
    ids=repr,
)
def test_what_cannot_be_sent(value, message):
    with pytest.raises(PayloadError, match=message):
        encode([value])


def nested(depth, innermost):
    for _ in range(depth):
        innermost = [innermost]
    return innermost


def test_nesting_is_bounded_on_both_sides():
    assert decode(travel([encode(nested(MAX_DEPTH, b"x"))])[0]) == nested(MAX_DEPTH, b"x")
    with pytest.raises(PayloadError, match="nested"):
        encode(nested(MAX_DEPTH + 1, b"x"))
    node: Node = BytesNode(1)
    for _ in range(MAX_DEPTH + 1):
        node = ListNode([node])
    with pytest.raises(PayloadError, match="nested"):
        Unpacker([b"x"]).take(node)
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(PayloadError, match="nested"):
        encode(endless)


# ---- hostile nodes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (BytesNode(-1), "negative size"),
        (TextNode(-1), "negative size"),
        (BytesNode(5), "crosses its frame's end"),
        (TextNode(2**62), "crosses its frame's end"),
        (ListNode([BytesNode(4), BytesNode(1)]), "message ends"),
        (ArrayNode("<f4", (2,), 4), "needs 8 bytes, not 4"),
        (ArrayNode("<f4", (1,), -4), "needs 4 bytes, not -4"),
        (ArrayNode("<f4", (-1, -1), 4), "negative extent"),
        (ArrayNode("<f4", (-1,), -4), "negative extent"),
        (ArrayNode("<f4", (2**40, 2**40), 4), "too large"),
        (ArrayNode("<f4", (0, 2**40, 2**40), 0), "too large"),
        (ArrayNode("<f4", (0, 10**18, 10**18), 0), "too large"),
        (ArrayNode("<f4", (1,) * 33, 4), "33 dimensions"),
        (ArrayNode("|O", (1,), 8), "not allowed"),
        (ArrayNode("O", (1,), 8), "not allowed"),
        (ArrayNode("object", (1,), 8), "not allowed"),
        (ArrayNode("|V4", (1,), 4), "not allowed"),
        (ArrayNode("<M8[s]", (1,), 8), "not allowed"),
        (ArrayNode("<f4,<f4", (1,), 8), "not allowed"),
        (ArrayNode("(2,3)<f4", (1,), 24), "not allowed"),
        (ArrayNode("{'names': ['a'], 'formats': ['O']}", (1,), 8), "not allowed"),
        (ArrayNode("|S0", (2**60,), 0), "not allowed"),
        (ArrayNode("<U0", (9,), 0), "not allowed"),
        (ArrayNode("|S9999999999", (1,), 4), "not allowed"),
        (ArrayNode("<U999999999", (1,), 4), "unknown array dtype|needs"),
        (ArrayNode("<f3", (1,), 3), "unknown array dtype"),
        (ArrayNode("", (1,), 4), "not allowed"),
        (ArrayNode("\ud800", (1,), 4), "not allowed"),
        (ArrayNode("<f4\n", (1,), 4), "not allowed"),
    ],
    ids=repr,
)
def test_nodes_that_lie_are_refused(node, message):
    with pytest.raises(PayloadError, match=message):
        Unpacker([b"abcd"]).take(node)


def test_a_text_that_is_no_utf8():
    with pytest.raises(PayloadError, match="not UTF-8"):
        decode(Unpacker([b"\xff"]).take(TextNode(1)))


def test_what_is_left_over_is_noticed():
    unpacker = Unpacker([b"ab", b""])
    unpacker.take(BytesNode(1))
    with pytest.raises(PayloadError, match="more payload bytes"):
        unpacker.finish()
    unpacker.take(BytesNode(1))
    unpacker.finish()
    with pytest.raises(PayloadError, match="more payload bytes"):
        Unpacker([b"", b"x"]).finish()


def test_empty_frames_are_passed_over():
    unpacker = Unpacker([b""] * 100_000 + [b"ab"] + [b""] * 10)
    assert [decode(unpacker.take(BytesNode(size))) for size in (0, 1, 0, 1, 0)] == [b"", b"a", b"", b"b", b""]
    unpacker.finish()
    with pytest.raises(PayloadError, match="message ends"):
        Unpacker([b""] * 100_000).take(BytesNode(1))


def test_empty_rows_are_counted_before_they_are_made():
    payload = Unpacker([]).take(ArrayNode("<f4", (2**40, 0), 0))
    with pytest.raises(PayloadError, match=f"{2**40} items; at most 10"):
        payload.items(10)
    assert len(encode(np.zeros((10, 0))).items(10)) == 10
    with pytest.raises(PayloadError, match="3 items; at most 2"):
        encode([1, 2, 3]).items(2)


@pytest.mark.parametrize("value", [None, 1, "text", b"bytes", {"a": 1}, np.float64(1), np.array(1)])
def test_items_of_what_has_none(value):
    with pytest.raises(PayloadError, match="items asked of"):
        encode(value).items()


def test_fields_of_what_has_none():
    with pytest.raises(PayloadError, match="field 'a' asked of a list"):
        encode([1]).field("a")
    with pytest.raises(PayloadError, match="no field 'a'; the value has b, c"):
        encode({"c": 1, "b": 2}).field("a")


def test_descriptions_are_for_people():
    described = [
        describe(encode(value).node) for value in (None, True, 1, 1.5, "x", b"", [], {}, np.zeros((2, 3), "f4"))
    ]
    assert described == [
        "None", "a bool", "a int", "a float", "a text", "bytes", "a list", "a dict", "an array <f4[2, 3]",
    ]  # fmt: skip


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["<f4", "|O", "|b1", "<U3"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=20,
)
lying = st.recursive(
    st.builds(lambda size: [0, size], st.integers(-5, 40))
    | st.builds(lambda size: [4, size], st.integers(-5, 40))
    | st.builds(
        lambda dtype, shape, size: [1, dtype, shape, size],
        st.sampled_from(["<f4", "|u1", "|O", "<U2", ">i8", "|S0"]),
        st.lists(st.integers(-2, 9), max_size=3),
        st.integers(-4, 40),
    )
    | anything,
    lambda inner: (
        st.builds(lambda items: [2, items], st.lists(inner, max_size=4))
        | st.builds(lambda items: [3, items], st.dictionaries(st.text(max_size=4), inner, max_size=3))
    ),
    max_leaves=10,
)


@given(lying, st.lists(st.binary(max_size=40), max_size=5))
def test_whatever_comes_is_a_value_or_a_payload_error(node, frames):
    try:
        decoded = NODES.decode(msgspec.msgpack.encode(node))
    except msgspec.ValidationError:
        return
    try:
        payload = Unpacker(frames).take(decoded)
        value = decode(payload)
    except PayloadError:
        return
    assert same(value, decode(travel([encode(value)])[0]))
    assert payload.nbytes <= sum(map(len, frames))
