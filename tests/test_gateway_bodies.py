"""Bodies of requests, tensors and values of the gateway, whatever they hold."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from laxity.gateway.errors import GatewayError, Invalid
from laxity.gateway.gateway import Answer, RequestedOutput
from laxity.gateway.http_bodies import Body, compress, decompress, read_body, write_body
from laxity.gateway.json_tensors import from_json, to_json
from laxity.gateway.options import read_options
from laxity.gateway.tensors import DTYPES, Tensor, from_binary, to_binary
from laxity.gateway.values import from_payload, to_payload

NUMBERS = arrays.arrays(
    st.sampled_from([np.dtype(dtype) for dtype in DTYPES.values()]),
    arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def datatype_of(array: np.ndarray[Any, Any]) -> str:
    return next(name for name, dtype in DTYPES.items() if array.dtype == dtype)


@given(NUMBERS)
def test_numbers_survive_as_binary_data(array: np.ndarray[Any, Any]) -> None:
    raw = to_binary(Tensor("x", datatype_of(array), list(array.shape), array))
    back = from_binary("x", datatype_of(array), array.shape, raw, {}).data
    np.testing.assert_array_equal(back, array)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)


@given(NUMBERS.filter(lambda array: array.dtype != np.float16 and np.all(np.isfinite(array))), st.booleans())
def test_numbers_survive_as_json_flat_and_nested(array: np.ndarray[Any, Any], nested: bool) -> None:
    elements = array.tolist() if nested else to_json(Tensor("x", datatype_of(array), list(array.shape), array))
    if nested and 0 in array.shape[:-1]:
        return  # then the nested form has not all of the shape
    raw = msgspec.Raw(msgspec.json.encode(elements))
    back = from_json("x", datatype_of(array), array.shape, raw, {}).data
    np.testing.assert_array_equal(back, array)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)


@given(st.lists(st.binary()))
def test_elements_of_bytes_survive(items: list[bytes]) -> None:
    tensor = Tensor("x", "BYTES", [len(items)], items)
    assert from_binary("x", "BYTES", [len(items)], to_binary(tensor), {}).data == items


@given(st.lists(TEXTS))
def test_elements_of_text_survive_as_json(items: list[str]) -> None:
    (tensor,) = from_payload(items)
    assert from_json("x", "BYTES", [len(items)], msgspec.Raw(msgspec.json.encode(to_json(tensor))), {}).data == [
        item.encode() for item in items
    ]


# ---- anything at all ---------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
INPUTS = st.fixed_dictionaries(
    {"name": TEXTS, "shape": st.lists(st.integers(-1, 4), max_size=3), "datatype": st.sampled_from([*DTYPES, "BYTES"])},
    optional={
        "data": st.lists(st.integers(-300, 300) | st.floats() | TEXTS | st.booleans(), max_size=6) | JSON,
        "parameters": st.fixed_dictionaries(
            {},
            optional={
                "binary_data_size": st.integers(-1, 30) | JSON,
                "content_type": st.sampled_from(["str", "json"]) | JSON,
            },
        ),
    },
)
REQUESTS = st.fixed_dictionaries(
    {"inputs": st.lists(INPUTS, max_size=3)}, optional={"id": TEXTS, "parameters": JSON, "outputs": JSON}
)


@given(st.binary() | st.builds(lambda value: json.dumps(value).encode(), JSON | REQUESTS), st.none() | TEXTS)
@example(b'{"inputs": ' + b"[" * 5000, None)
@example(b"{" + b'"a":{' * 5000, None)
def test_a_body_is_read_or_refused(body: bytes, header_length: str | None) -> None:
    read_or_refuse(body, header_length)


@given(REQUESTS, st.binary(max_size=60))
def test_a_body_with_binary_data_is_read_or_refused(request: Any, binary: bytes) -> None:
    head = json.dumps(request).encode()
    read_or_refuse(head + binary, str(len(head)))


def read_or_refuse(body: bytes, header_length: str | None) -> None:
    """Anything but a refusal with a reason would be an internal error."""
    refused: GatewayError | None = None
    try:
        read = read_body(body, header_length)
        read_options({}, read.parameters)
        to_payload(read.inputs, read.parameters)
    except GatewayError as error:
        refused = error
    if refused is not None:
        assert refused.status in (400, 413)
        assert str(refused)


# ---- values --------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats()
    | TEXTS
    | st.binary()
    | arrays.arrays(st.sampled_from([np.int8, np.float16, np.float64, ">i4", "S3", "U2"]), arrays.array_shapes()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


@given(VALUES)
def test_every_answer_can_be_told_as_binary_data(value: Any) -> None:
    tensors = from_payload(value)
    answer = Answer("p", "1", "", "c-1", tensors)
    body, length = write_body(answer, Body("", {"binary_data_output": True}, [], []))
    head = json.loads(body if length is None else body[:length])
    at = len(body) if length is None else length
    assert [output["name"] for output in head["outputs"]] == (list(value) if isinstance(value, dict) else ["output"])
    for output in head["outputs"]:
        size = output["parameters"]["binary_data_size"]
        from_binary("x", output["datatype"], output["shape"], body[at : at + size], {})
        at += size
    assert at == len(body)


def test_what_inputs_mean() -> None:
    def meaning(shape: list[int], items: list[bytes], content: str | None = None, **parameters: Any) -> Any:
        own = {} if content is None else {"content_type": content}
        return to_payload([Tensor("x", "BYTES", shape, items, own)], parameters)

    assert meaning([1], [b"a"]) == b"a"
    assert meaning([], [b"a"]) == b"a"
    assert meaning([1, 1], [b"a"]) == b"a"
    assert meaning([2], [b"a", b"b"]) == [b"a", b"b"]
    assert meaning([2, 2], [b"a", b"b", b"c", b"d"]) == [[b"a", b"b"], [b"c", b"d"]]
    assert meaning([0], []) == []
    assert meaning([1], [b"a"], "str") == "a"
    assert meaning([2], [b"a", b"b"], "str") == ["a", "b"]
    assert meaning([1], [b'{"a": [1, null]}'], "json") == {"a": [1, None]}
    assert meaning([1], [b'["one"]'], "json") == ["one"]
    assert meaning([1], [b"a"], fields=True) == {"x": b"a"}
    for content, says in (("str", "no UTF-8 text"), ("json", "no JSON"), ("np", "'np' is not supported")):
        with pytest.raises(Invalid, match=says):
            meaning([1], [b"\xff"], content)
    number = Tensor("y", "FP32", [1], np.ones(1, np.float32))
    both = to_payload([Tensor("x", "BYTES", [1], [b"a"], {"content_type": "str"}), number], {})
    assert (list(both), both["x"], both["y"].tolist()) == (["x", "y"], "a", [1])


def test_what_answers_become() -> None:
    def told(value: Any) -> tuple[str, list[int], Any, Any]:
        (tensor,) = from_payload(value)
        data = tensor.data if isinstance(tensor.data, list) else tensor.data.tolist()
        return tensor.datatype, tensor.shape, data, tensor.parameters.get("content_type")

    assert told(np.array([[1, 2]], ">i2")) == ("INT16", [1, 2], [[1, 2]], None)
    assert told(np.array(3.5)) == ("FP64", [], 3.5, None)
    assert told(True) == ("BOOL", [1], [True], None)
    assert told(7) == ("INT64", [1], [7], None)
    assert told(0.5) == ("FP64", [1], [0.5], None)
    assert told(2**64 - 1) == ("BYTES", [1], [b"18446744073709551615"], "json")
    assert told(b"x") == ("BYTES", [1], [b"x"], None)
    assert told("x") == ("BYTES", [1], [b"x"], "str")
    assert told(["x", "y"]) == ("BYTES", [2], [b"x", b"y"], "str")
    assert told([b"x", "y"]) == ("BYTES", [2], [b'"eA=="', b'"y"'], "json")
    assert told([{"a": np.arange(2)}, None]) == ("BYTES", [2], [b'{"a":[0,1]}', b"null"], "json")
    assert told([]) == ("BYTES", [0], [], None)
    assert told(None) == ("BYTES", [1], [b"null"], "json")
    assert told(np.array([["ab", "c"]])) == ("BYTES", [1, 2], [b"ab", b"c"], "str")
    assert from_payload({}) == []
    assert [tensor.name for tensor in from_payload({"a": {"b": 1}, "c": 2})] == ["a", "c"]


def test_which_outputs_are_binary() -> None:
    answer = Answer("p", "1", "seven", "c-1", from_payload({"a": 1, "b": 2, "c": float("nan")}))
    outputs = [RequestedOutput("a", {"binary_data": True}), RequestedOutput("b"), RequestedOutput("c")]
    body, length = write_body(answer, Body("seven", {}, [], outputs))
    head = json.loads(body[:length])
    assert (head["id"], head["parameters"]) == ("seven", {"laxity-request-id": "c-1"})
    assert [output.get("data") for output in head["outputs"]] == [None, [2], [None]]
    assert body[length:] == (1).to_bytes(8, "little")


def test_bodies_are_compressed_and_decompressed_within_bounds() -> None:
    assert decompress(*compress(b"x" * 100, "deflate, br"), 100) == b"x" * 100
    for accepted, encoding in (("gzip", "gzip"), ("br", ""), ("", ""), ("gzip;q=0, deflate;q=0.5", "deflate")):
        assert compress(b"x", accepted)[1] == encoding
    bomb, encoding = compress(bytes(10_000_000), "gzip")
    with pytest.raises(GatewayError, match="larger than the 1000 bytes"):
        decompress(bomb, encoding, 1000)
    with pytest.raises(Invalid, match="it ends too early, or something follows"):
        decompress(bomb + b"more", encoding, 10_000_000)
