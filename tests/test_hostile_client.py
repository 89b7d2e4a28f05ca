"""A shard that speaks the protocol and lies to services: the client ends each request once, believes nothing that
cannot be, and goes on."""

from __future__ import annotations

import msgspec
import pytest

import laxity
from laxity import protocol
from laxity.outcomes import Outcome
from laxity.payload import ArrayNode, BytesNode, DictNode, ListNode, TextNode, Unpacker
from laxity.protocol import Answer, Chunk, Goodbye, Heartbeat, Hello, Result, StageTiming, Stored, Tapped
from tests.conftest import Incoming

HUGE = 2**63 - 1


@pytest.fixture
def greeted(peer):
    """A client of a shard by hand, and who it is there; it is served in the end."""
    with laxity.Client(peer.url) as client:
        sender, _ = peer.welcome()
        yield client, sender
        future = client.submit("echo", "after")
        incoming = next_request(peer)
        peer.answer(incoming, incoming.value)
        assert future.result(20) == "after"


def next_request(peer):
    """The next request that is not one submitted again; whoever greets is welcomed."""
    while True:
        sender, message, frames = peer.receive(protocol.Submit, Hello, Goodbye)
        if isinstance(message, Hello):
            peer.welcome_again(sender)
        elif isinstance(message, protocol.Submit):
            unpacker = Unpacker(frames)
            found = [Incoming(sender, each, unpacker.take(each.payload)) for each in message.requests]
            for each in found:
                if each.value == "after":
                    return each


ABSURD = [
    {"heartbeat_us": 0},
    {"heartbeat_us": -1},
    {"heartbeat_us": HUGE},
    {"max_payload": -1},
    {"max_payload": HUGE},
    {"pipelines": [("echo", -1), ("echo", HUGE), ("", 0), ("x" * 10_000, 1)]},
    {"pipelines": [(f"p{n}", 1_000_000) for n in range(20_000)]},
    {"shards": [("peer", ""), ("peer", "nonsense"), ("", "tcp://"), ("x", "tcp://127.0.0.1:99999")]},
    {"shards": [("a", "tcp://127.0.0.1:1"), ("a", "udp://x")], "routes": [("echo", [(0, 1.0), (1, 1.0), (2, 1.0)])]},
    {"shards": [("a", "tcp://a b:1")], "routes": [("echo", [(0, 1.0), (-1, 1.0)])]},
    {"shards": [("peer", "x" * 100_000)], "routes": [("echo", [(0, float("inf")), (0, float("nan")), (0, -1.0)])]},
    {"shards": [("a", "\0"), ("b", "tcp://\0:1")], "routes": [("echo", [(0, 1e308), (1, 1e308)])]},
    {"routes": [("echo", [(HUGE, 1.0), (-HUGE, 1.0)])], "revision": HUGE},
    {"routes": [("echo", [])], "revision": -HUGE},
    {"unready": ["echo", "", "x" * 10_000]},
    {"keys": [["x"], [], ["y" * 40] * 1000]},
    {"shards": [("peer", "tcp://127.0.0.1:1")], "keys": []},
    {"shards": [("peer", "tcp://127.0.0.1:1")], "keys": [["\0" * 40, "é" * 40, "a" * 1_000_000]]},
    {"shard": "", "revision": 2},
    {"shard": "another" * 1000},
]


@pytest.mark.parametrize("absurd", ABSURD, ids=range(len(ABSURD)))
def test_what_a_welcome_cannot_say(peer, absurd):
    with laxity.Client(peer.url) as client:
        peer.welcome(**absurd)
        assert isinstance(client.pipelines, dict)
        future = client.submit("echo", "x", slo=0.2)
    error = future.exception(20)
    assert isinstance(error, laxity.LaxityError)


ANSWERS = [
    Answer(2**40, Outcome.OK, "nobody asked"),
    Answer(-1, Outcome.OK, "nobody asked"),
    Answer(HUGE, Outcome.FAILED, None),
]


def test_answers_that_nobody_asked_for(peer, greeted):
    _, sender = greeted
    for answer in ANSWERS:
        peer.send(sender, Result([answer] * 200))
    peer.send(sender, Result([]))


def test_answers_that_come_twice(peer, greeted):
    client, sender = greeted
    future = client.submit("echo", "value")
    incoming = peer.request()
    answer = Answer(incoming.request.id, Outcome.OK, "first")
    others = [
        msgspec.structs.replace(answer, payload="second"),
        Answer(answer.id, Outcome.FAILED, None, detail="third"),
    ]
    peer.send(sender, Result([answer, *others]))
    peer.send(sender, Result([answer]))
    assert future.result(20) == "first"


@pytest.mark.parametrize(
    ("node", "frames"),
    [
        (BytesNode(5), []),
        (BytesNode(5), [b"123"]),
        (BytesNode(-1), []),
        (BytesNode(HUGE), [b"x"]),
        (ArrayNode("|O", (1,), 8), [bytes(8)]),
        (ArrayNode("<f4", (-1, 2**62), 4), [bytes(4)]),
        (ArrayNode("<f4", (2**40, 2**40, 0), 0), []),
        (ListNode([TextNode(2), TextNode(HUGE)]), [b"ab"]),
        (TextNode(2), [b"\xff\xff"]),
        (DictNode({"": BytesNode(1)}), []),
        ("fine", [b"more"] * 10),
    ],
    ids=range(11),
)
def test_answers_whose_payload_is_none(peer, greeted, node, frames):
    client, sender = greeted
    future = client.submit("echo", "value", slo=0.5)
    incoming = peer.request()
    peer.send(sender, Result([Answer(incoming.request.id, Outcome.OK, node)]), frames)
    error = future.exception(20)
    assert error is None or isinstance(error, laxity.LaxityError)


def test_answers_with_impossible_figures(peer, greeted):
    client, _ = greeted
    figures = [0, -1, HUGE, -(2**63)]
    futures = [client.submit("echo", "value", timings=True) for _ in figures]
    for figure, incoming in zip(figures, peer.requests(len(figures)), strict=True):
        timing = StageTiming("x" * 10_000, figure, figure, figure, figure, figure)
        peer.answer(incoming, "v", remaining_us=figure, short_us=figure, timings=[timing] * 50)
    for future in futures:
        assert future.reply(20).value == "v"


def test_messages_for_others(peer, greeted):
    _, sender = greeted
    for message in (
        Chunk("ab" * 32, -1, HUGE, "x" * 10_000),
        Stored("", HUGE),
        Tapped(0, 0, HUGE, True, [protocol.TappedRequest(0, "x", None, 0, BytesNode(HUGE))]),
        *[Heartbeat(HUGE)] * 500,
    ):
        peer.send(sender, message, [b"abc"])


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\xdd\xff\xff\xff\xff", bytes(5_000_000), b"\x92\x07" + b"\x91" * 5000])
def test_what_is_no_message(peer, greeted, raw):
    _, sender = greeted
    peer.send_raw(sender, raw, b"abc")
    peer.passes_over = (Heartbeat, Goodbye)
    peer.welcome()  # it connects anew


def test_goodbyes_without_end(peer, greeted):
    _, sender = greeted
    for _ in range(20):
        peer.send(sender, Goodbye("x" * 10_000, retry=True))
