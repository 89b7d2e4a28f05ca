"""A shard that speaks the protocol and lies: the agent answers or passes over what it says, goes on working for it, and
for an honest shard beside it all the while."""

from __future__ import annotations

import threading

import pytest

from laxity import protocol
from laxity.payload import ArrayNode, BytesNode, ListNode, TextNode
from laxity.protocol import Acted, Done, Goodbye, Grant, Load, Pull, Ready, Unload, Welcome
from nodes.agent import Work
from tests.conftest import EMULATED

HUGE = 2**63 - 1
ODD = (0, -1, 2**31, 2**53, HUGE, -(2**63))


@pytest.fixture
def liar(cluster, echo, make_peer):
    """The backend of a lying shard, for which the second device of an agent works. The first works for an honest shard,
    whose requests all go well."""
    cluster.start()
    cluster.shard.apply(echo)
    peer = make_peer("tcp://127.0.0.1:*", protocol.decode_from_agent)
    agent = cluster.lone_agent([EMULATED, EMULATED])
    models = {echo.model_key("echo"): (echo, "echo")}
    agent.agent.place({0: Work("s0", models), 1: Work("liar", models)})
    agent.wait_for(lambda states: all(set(state.models.values()) == {"ready"} for state in states))
    agent.agent.follow({"s0": cluster.shard.backend, "liar": peer.url})
    client = cluster.client()
    ends = threading.Event()
    served = []

    def work():
        while not ends.is_set():
            served.append(client.infer("echo", len(served), slo=30.0) == len(served))

    thread = threading.Thread(target=work)
    thread.start()
    yield peer
    ends.set()
    thread.join()
    assert client.infer("echo", "after", slo=30.0) == "after"
    assert all(served)
    assert agent.error is None
    cluster.settle(ok=len(served) + 1)


def greeted(peer):
    sender, _, _ = peer.receive(Ready)
    peer.send(sender, Welcome(1, "liar", 60_000_000))
    _, pull, _ = peer.receive(Pull)
    assert pull.device == 1
    return sender, pull


def grant(pull, batch, tasks=(("value",),), model="", **fields):
    fields = {
        "seq": pull.seq,
        "pulled_us": pull.sent_us,
        "dwell_us": 0,
        "opens_us": 0,
        "closes_us": 20_000_000,
    } | fields
    return Grant(
        **{"device": 1, "batch": batch, "model": model, "variant": "", "expected_us": 0, **fields},
        tasks=[list(task) for task in tasks],
    )


def works(peer, sender, model):
    """The agent still takes a batch and carries it out."""
    batch = 123_456_789
    peer.send(sender, Goodbye("again", retry=True))
    while True:
        _, message, _ = peer.receive(Ready, Pull, Done, Acted)
        if isinstance(message, Ready):
            peer.send(sender, Welcome(1, "liar", 60_000_000))
        elif isinstance(message, Pull):
            peer.send(sender, grant(message, batch, model=model))
        elif isinstance(message, Done) and message.batch == batch:
            assert (message.code, message.results) == ("ok", ["value"])
            return


def answers(peer, count, kind=Done):
    """The codes of the next ``count`` answers, by batch or action."""
    found = {}
    while len(found) < count:
        _, message, _ = peer.receive(Done, Acted, Pull, Ready)
        if isinstance(message, kind):
            found[message.batch if kind is Done else message.action] = message.code
    return found


def test_batches_at_impossible_times(liar, echo):
    model = echo.model_key("echo")
    sender, pull = greeted(liar)
    lies = [
        grant(pull, 10 * at + which, model=model, **{name: value})
        for at, name in enumerate(("seq", "pulled_us", "dwell_us", "opens_us", "closes_us", "expected_us"), 1)
        for which, value in enumerate(ODD)
    ]
    for each in lies:
        liar.send(sender, each)
    works(liar, sender, model)


def test_batches_of_what_the_device_has_not(liar, echo):
    model = echo.model_key("echo")
    sender, pull = greeted(liar)
    liar.send(sender, grant(pull, 1, model="other@1/x"))
    liar.send(sender, grant(pull, 2, model="\0" * 100_000))
    liar.send(sender, grant(pull, 3, model=model, device=0))  # works for another shard
    liar.send(sender, grant(pull, 4, model=model, device=HUGE))
    liar.send(sender, grant(pull, 5, model=model, device=-1))
    found = answers(liar, 5)
    assert "ok" not in found.values()
    works(liar, sender, model)


@pytest.mark.parametrize(
    ("tasks", "frames"),
    [
        ([], []),
        ([[]], []),
        ([["one", "two"]], []),
        ([[BytesNode(5)]], [b"123"]),
        ([[BytesNode(-5)]], []),
        ([[BytesNode(HUGE)]], [b"x"]),
        ([[ArrayNode("|O", (1,), 8)]], [bytes(8)]),
        ([[ArrayNode("<f4", (2**40, 0), 0)]], []),
        ([[TextNode(2)]], [b"\xff\xff"]),
        ([["value"]], [b"more"] * 100),
        ([["value"]] * 5000, []),
        ([[ListNode([None] * 100_000)]], []),
    ],
    ids=range(12),
)
def test_batches_of_what_is_no_input(liar, echo, tasks, frames):
    model = echo.model_key("echo")
    sender, pull = greeted(liar)
    liar.send(sender, grant(pull, 1, tasks, model), frames)
    works(liar, sender, model)


def test_nodes_that_nest_deeply(liar, echo):
    model = echo.model_key("echo")
    sender, pull = greeted(liar)
    header = protocol.encode(grant(pull, 1, [["value"]], model))
    at = header.rindex(b"\xa5value")
    for depth in (33, 200, 450, 900, 5000, 100_000):
        liar.send_raw(sender, header[:at] + b"\x92\x02\x91" * depth + b"\xc0" + header[at + 6 :])
    works(liar, sender, model)


def test_the_same_batch_again_and_again(liar, echo):
    model = echo.model_key("echo")
    sender, pull = greeted(liar)
    for _ in range(50):
        liar.send(sender, grant(pull, 1, model=model))
    works(liar, sender, model)


def test_pages_of_what_there_is_not(liar, echo):
    model = echo.model_key("echo")
    sender, _ = greeted(liar)
    action = 0
    for device in (1, 0, -1, HUGE):
        for name in ("", "other@1/x", "\0" * 1000):
            for value in ODD:
                action += 1
                liar.send(sender, Load(device, action, value, value, name, value, value, value))
                action += 1
                liar.send(sender, Unload(device, action, value, value, name, value, value))
    found = answers(liar, action, Acted)
    assert "ok" not in found.values()
    works(liar, sender, model)


def test_greetings_without_end(liar, echo):
    model = echo.model_key("echo")
    sender, _ = greeted(liar)
    for heartbeat in (*ODD, 1):
        liar.send(
            sender, Welcome(1, "x" * 1000, heartbeat, heartbeat, [("a", heartbeat)], [("a", "b")], revision=heartbeat)
        )
    for _ in range(100):
        liar.send(sender, Welcome(1, "liar", 60_000_000))
    works(liar, sender, model)


def test_messages_for_others(liar, echo):
    model = echo.model_key("echo")
    sender, _ = greeted(liar)
    for message in (
        protocol.Result([protocol.Answer(1, protocol.Outcome.OK, "x")]),
        protocol.Hello(1, "x"),
        protocol.Chunk("ab" * 32, 0, 5),
        Pull(0, 1, 2, 3),
        Done(0, 1, "ok"),
    ):
        liar.send(sender, message, [b"abc"])
    liar.send_raw(sender, b"")
    liar.send_raw(sender, b"", b"", b"")
    works(liar, sender, model)
