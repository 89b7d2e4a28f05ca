"""Headers: what is sent is understood, and everything else is a ProtocolError and nothing worse."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from laxity import protocol as p
from laxity.node import ArrayNode, BytesNode, DictNode, ListNode, TextNode
from laxity.outcomes import Outcome

DECODERS = {
    "from_client": p.decode_from_client,
    "to_client": p.decode_to_client,
    "from_agent": p.decode_from_agent,
    "to_agent": p.decode_to_agent,
}
NODE = DictNode({"a": ListNode([BytesNode(3), TextNode(2000), None, 1.5]), "b": ArrayNode("<f4", (2, 2), 16)})
MESSAGES = {
    "from_client": [
        p.Hello(1, "c" * 32, "test"),
        p.Submit(123, [p.Request(1, "ocr", None, NODE), p.Request(2, "ocr", 5, True, 1, "00-x", True)]),
        p.Cancel([1, 2, 2**63]),
        p.Heartbeat(5),
        p.Goodbye("bye", True),
    ],
    "to_client": [
        p.Welcome(1, "s1", 1_000_000, 2**26, [("ocr", 5_000_000)]),
        p.Welcome(1, "s1", 1_000_000, 0, [], [("s1", "tcp://h:1"), ("s2", "")], [("ocr", [(1, 0.5), (0, 2.0)])], 7),
        p.Result(
            [
                p.Answer(1, Outcome.OK, NODE, 5, timings=[p.StageTiming("detect", 1, 2, 3, 4, -5)]),
                p.Answer(2, Outcome.DROPPED, None, -7, "detect", "late", 7),
            ]
        ),
        p.Heartbeat(),
        p.Goodbye(),
    ],
    "from_agent": [
        p.Ready(1, "host", [p.DeviceReport(0, "cpu", [p.ModelReport("ocr@1/detect", "", 100, [(1, 0.2)])])]),
        p.Pull(0, 7, 99, 1000),
        p.Done(0, 5, "ok", 1, 2, [NODE, None], [p.Failure(1, "raised")]),
        p.Ready(1, "host", [p.DeviceReport(0, "T4", [p.ModelReport("a@1/b", "", 100, [], False, 95.5, 8300)], 4096.0)]),
        p.Done(0, 5, "too_late"),
        p.Done(0, 6, "out_of_memory", 1, 2, detail="CUDA out of memory", input_us=3, output_us=4),
        p.Acted(0, 3, "ok", 8300),
        p.Acted(0, 4, "busy", detail="the model runs"),
        p.Heartbeat(1),
        p.Goodbye("drained"),
    ],
    "to_agent": [
        p.Welcome(1, "s1", 1_000_000),
        p.Grant(0, 5, 7, 99, 12, "ocr@1/detect", "", 0, 5000, 900, [[NODE, None]]),
        p.Load(0, 3, 99, 12, "ocr@1/detect", 0, 5000, 8300),
        p.Unload(0, 4, 99, 12, "ocr@1/detect", 0, 5000),
        p.Heartbeat(),
        p.Goodbye("going", True),
    ],
}
CASES = [(side, message) for side, messages in MESSAGES.items() for message in messages]


@pytest.mark.parametrize(
    ("side", "message"), CASES, ids=lambda case: case if isinstance(case, str) else type(case).__name__
)
def test_messages_survive_the_wire(side, message):
    assert DECODERS[side](p.encode(message)) == message


@pytest.mark.parametrize(
    ("side", "message"), CASES, ids=lambda case: case if isinstance(case, str) else type(case).__name__
)
def test_every_truncation_is_a_protocol_error(side, message):
    header = p.encode(message)
    for end in range(len(header)):
        with pytest.raises(p.ProtocolError):
            DECODERS[side](header[:end])


@given(st.sampled_from(sorted(DECODERS)), st.binary(max_size=200))
@example("from_client", b"\x91" * 100_000)
@example("to_client", b"\x92\x07" + b"\x91" * 100_000)
@example("from_client", b"\xdd\xff\xff\xff\xff")
@example("from_client", b"\xdf\xff\xff\xff\xff")
@example("from_client", b"\x92\x05\xd9\x02\xff\xff")
def test_garbage_is_a_protocol_error(side, header):
    try:
        message = DECODERS[side](header)
    except p.ProtocolError:
        return
    assert isinstance(message, p.Message)


@given(st.sampled_from(CASES), st.data())
def test_flipped_bits_are_a_message_or_a_protocol_error(case, data):
    side, message = case
    header = bytearray(p.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    try:
        understood = DECODERS[side](bytes(header))
    except p.ProtocolError:
        return
    assert isinstance(understood, p.Message)


@pytest.mark.parametrize(
    ("side", "message"), CASES, ids=lambda case: case if isinstance(case, str) else type(case).__name__
)
def test_fields_of_later_versions_at_the_end_are_ignored(side, message):
    fields = msgspec.msgpack.decode(p.encode(message))
    assert DECODERS[side](msgspec.msgpack.encode([*fields, "new", {"more": 1}])) == message


def test_fields_at_the_end_with_a_default_may_be_left_out():
    assert p.decode_from_client(msgspec.msgpack.encode([4])) == p.Heartbeat(0)
    assert p.decode_from_client(msgspec.msgpack.encode([1, 1, "me"])) == p.Hello(1, "me")
    submit = [2, 0, [[1, "ocr", None, [0, 5]]]]
    assert p.decode_from_client(msgspec.msgpack.encode(submit)).requests == [p.Request(1, "ocr", None, BytesNode(5))]


@pytest.mark.parametrize(
    "header",
    [
        [7, []],
        [99],
        [],
        {},
        None,
        "HELLO",
        [1, "1", "me"],
        [1, 1],
        [1, 1, None],
        [2, 0, [[1, "p", 1.5, None]]],
        [2, 0, [["1", "p", None, None]]],
        [2, 0, [[1, "p", None, [9, 1]]]],
        [2, 0, [[1, "p", None, [0, "x"]]]],
        [2, 0, [[1, "p", None, b"raw"]]],
        [2, 0, [[1, "p", None, [3, {1: None}]]]],
        [2, 0, None],
        [3, [None]],
        [3, [2**64 - 1, -1, 1.5]],
    ],
    ids=repr,
)
def test_what_is_no_message_of_a_client(header):
    with pytest.raises(p.ProtocolError):
        p.decode_from_client(msgspec.msgpack.encode(header))


def test_outcomes_are_those_of_the_protocol():
    with pytest.raises(p.ProtocolError):
        p.decode_to_client(msgspec.msgpack.encode([7, [[1, "lost", None]]]))


def test_headers_are_bounded():
    with pytest.raises(p.ProtocolError, match="at most"):
        p.decode_from_client(p.encode(p.Goodbye("x" * p.MAX_HEADER)))


def test_each_kind_has_a_number_of_its_own():
    kinds = [kind for kind in vars(p).values() if isinstance(kind, type) and issubclass(kind, p.Message)]
    tags = [kind.__struct_config__.tag for kind in kinds if kind is not p.Message]
    assert len(tags) == len(set(tags)) == 20
