"""Peers that speak the protocol and lie to a shard: whatever they say, honest ones beside them are served, and what the
shard counts adds up."""

from __future__ import annotations

import random
import socket
import threading

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from strangers import Stranger, request, submit

from laxity import protocol
from laxity.payload import ArrayNode, BytesNode, DictNode, ListNode, TextNode
from laxity.protocol import (
    Acted,
    Cancel,
    DeviceReport,
    Done,
    Failure,
    Fetch,
    Goodbye,
    Grant,
    Heartbeat,
    Hello,
    ModelReport,
    Pull,
    Ready,
    Store,
    Tap,
    Tapped,
    Welcome,
)
from pipelines.load import parse_spec
from tests.conftest import ECHO, Cluster

LIES = """
name: lies
slo: 30s
stages:
  first: {executor: emulated, profile: {alpha_ms: 1, beta_ms: 1}, max_batch: 4}
  each: {executor: emulated, profile: {alpha_ms: 1, beta_ms: 1}, max_batch: 4, map: true, max_items: 5, inputs: [first]}
output: each
"""
HUGE = 2**63 - 1
odd_numbers = st.sampled_from([0, 1, 2, 5, -1, -(2**62), 2**31, 2**53, HUGE])
odd_floats = st.sampled_from([0.0, 0.001, 1.0, -1.0, 1e300, float("inf"), float("-inf"), float("nan")])
odd_texts = st.sampled_from(["", "x", "x" * 500, "\0", "\n{}", "é", "../../x"])
nodes = st.sampled_from(
    [
        None,
        True,
        7,
        "text",
        ListNode([]),
        ListNode([1, 2, 3]),
        ListNode([None] * 6),
        DictNode({"a": 1}),
        BytesNode(3),
        BytesNode(-3),
        BytesNode(2**40),
        TextNode(3),
        ArrayNode("<f4", (2, 0), 0),
        ArrayNode("<f4", (2**40, 0), 0),
        ArrayNode("|u1", (3,), 3),
        ArrayNode("|O", (1,), 8),
    ]
)


@pytest.fixture
def strangers(cluster):
    """Makes peers of either side, greeted where they are given a name."""
    made = []

    def make(side, name="", **options):
        address, decode = (
            (cluster.shard.frontend, protocol.decode_to_client)
            if side == "service"
            else (cluster.shard.backend, protocol.decode_to_agent)
        )
        made.append(Stranger(address, decode, **options))
        if name:
            made[-1].send(Hello(1, name) if side == "service" else Ready(1, name, []))
            made[-1].receive(Welcome)
        return made[-1]

    yield make
    for stranger in made:
        stranger.close()


@pytest.fixture
def honest(cluster, echo):
    """A service that is there all the while; in the end all its requests went well, and the shard's figures add up."""
    cluster.serve(echo)
    client = cluster.client()
    ends = threading.Event()
    served = []

    def work():
        while not ends.is_set():
            served.append(client.infer("echo", len(served), slo=30.0) == len(served))

    thread = threading.Thread(target=work)
    thread.start()
    yield client
    ends.set()
    thread.join()
    client.infer("echo", "after")
    assert all(served)
    assert served
    status = cluster.status()
    assert status.submitted == sum(status.ended.values()) + status.in_flight
    assert cluster.agents[0].error is None


# ---- any sequence of lies ------------------------------------------------------------------------------------------


class Liars(RuleBasedStateMachine):
    """Two services and two agents that send what is nearly right, in any order, beside an honest service and agent."""

    def __init__(self):
        super().__init__()
        self.cluster = Cluster()
        self.peers = []
        self.granted = [(0, 5)]
        """(agent, batch) of what liars were granted. No bundle: what comes, hypothesis cannot repeat."""

    @initialize()
    def begin(self):
        self.cluster.serve(parse_spec(ECHO, file="echo.yaml", root=""))
        self.spec = parse_spec(LIES, file="lies.yaml", root="")
        self.cluster.shard.apply(self.spec)
        self.honest = self.cluster.client()
        shard = self.cluster.shard
        self.services = [Stranger(shard.frontend, protocol.decode_to_client) for _ in range(2)]
        self.agents = [Stranger(shard.backend, protocol.decode_to_agent) for _ in range(2)]
        self.peers = [*self.services, *self.agents]
        self.sent = [Heartbeat()]
        for index, service in enumerate(self.services):
            service.send(Hello(1, f"c{index}"))
        for index, agent in enumerate(self.agents):
            agent.send(Ready(1, f"l{index}", [self.device(0)]))

    def device(self, number, memory=0.0, profile=((1, 0.001),), resident=True):
        models = [
            ModelReport(self.spec.model_key(stage), "", 100, list(profile), resident, 10.0, 1000)
            for stage in self.spec.stages
        ]
        return DeviceReport(number, "odd", models, memory)

    def told(self, peer):
        """What a peer was told until everything that it had said was looked at."""
        peer.send(Heartbeat())
        found = []
        while True:
            assert peer.socket.poll(20_000), "the shard does not answer"
            message = peer._decode(peer.socket.recv_multipart()[0])
            found.append(message)
            if isinstance(message, Heartbeat) or (isinstance(message, Goodbye) and "say" in message.reason):
                return found

    @rule(
        which=st.integers(0, 1),
        ids=st.lists(st.integers(0, 5), min_size=1, max_size=4),
        pipeline=st.sampled_from(["lies", "lies", "lies", "echo", "nothing", "", "x" * 300]),
        budget=st.one_of(st.none(), st.just(5_000_000), odd_numbers),
        priority=st.sampled_from([0, 1, -1, 2**40]),
        node=nodes,
        stamp=odd_numbers,
        frame=st.sampled_from([b"", b"abc", b"abcd"]),
    )
    def submits(self, which, ids, pipeline, budget, priority, node, stamp, frame):
        requests = [request(number, node, pipeline, budget, priority=priority) for number in ids]
        self.sent.append(protocol.Submit(stamp, requests))
        self.services[which].send(self.sent[-1], frame)

    @rule(which=st.integers(0, 1), index=st.integers(0, 10))
    def replays(self, which, index):
        self.services[which].send(self.sent[-1 - index % len(self.sent)], b"abc")

    @rule(which=st.integers(0, 1), ids=st.lists(st.one_of(st.integers(0, 5), odd_numbers), max_size=5))
    def cancels(self, which, ids):
        self.services[which].send(Cancel(ids))

    @rule(which=st.integers(0, 1), name=st.sampled_from(["c0", "c1", "new"]), leaves=st.booleans())
    def greets(self, which, name, leaves):
        if leaves:
            self.services[which].send(Goodbye("bye"))
        self.services[which].send(Hello(1, name))

    @rule(
        which=st.integers(0, 1),
        name=st.sampled_from(["l0", "l1"]),
        numbers=st.lists(st.one_of(st.integers(0, 2), odd_numbers), max_size=3),
        memory=st.one_of(st.just(100.0), odd_floats),
        profile=st.lists(st.tuples(odd_numbers, odd_floats), max_size=3),
        resident=st.booleans(),
    )
    def is_ready(self, which, name, numbers, memory, profile, resident):
        devices = [self.device(number, memory, profile, resident) for number in numbers]
        self.agents[which].send(Ready(1, name, devices))

    @rule(
        which=st.integers(0, 1),
        device=st.one_of(st.just(0), odd_numbers),
        seq=st.integers(0, 30),
        free=odd_numbers,
    )
    def pulls(self, which, device, seq, free):
        agent = self.agents[which]
        agent.send(Pull(device, seq, free, free))
        self.granted += [(which, each.batch) for each in self.told(agent) if isinstance(each, Grant)]

    @rule(
        index=st.integers(0, 3),
        other=st.booleans(),
        device=st.one_of(st.just(0), odd_numbers),
        code=st.sampled_from([*protocol.DONE_CODES, "ok", "ok", "ok", "what"]),
        results=st.lists(nodes, max_size=5),
        failures=st.lists(st.builds(Failure, odd_numbers, odd_texts), max_size=2),
        took=odd_numbers,
    )
    def is_done(self, index, other, device, code, results, failures, took):
        which, number = self.granted[-1 - index % len(self.granted)]
        done = Done(device, number, code, took, took, results, failures, "detail", took, took)
        self.agents[which ^ other].send(done, b"abc")

    @rule(which=st.integers(0, 1), device=odd_numbers, action=odd_numbers, code=st.sampled_from(protocol.DONE_CODES))
    def has_acted(self, which, device, action, code):
        self.agents[which].send(Acted(device, action, code, action, "detail"))

    @rule(which=st.integers(0, 3), message=st.sampled_from([Fetch, Store]), digest=odd_texts, number=odd_numbers)
    def asks_for_files(self, which, message, digest, number):
        if which < 2 or message is Fetch:
            self.peers[which].send(message(digest, number, number), b"abc")

    @rule(which=st.integers(0, 1), pipelines=st.lists(odd_texts, max_size=2), taken=odd_numbers, payloads=st.booleans())
    def taps(self, which, pipelines, taken, payloads):
        self.services[which].send(Tap(pipelines, payloads, taken))

    @rule(which=st.integers(0, 3), index=st.integers(0, 10), seed=st.integers(0, 1000))
    def stutters(self, which, index, seed):
        """The bytes of a message, some of them others."""
        chance = random.Random(seed)
        header = bytearray(protocol.encode(self.sent[-1 - index % len(self.sent)]))
        header[chance.randrange(len(header))] = chance.randrange(256)
        self.peers[which].socket.send_multipart([bytes(header), b"abc"])

    @invariant()
    def adds_up(self):
        if self.peers:
            status = self.cluster.status()
            assert status.submitted == sum(status.ended.values()) + status.in_flight
            assert status.in_flight >= 0
            assert all(count >= 0 for count in status.queued.values())

    def teardown(self):
        try:
            if self.peers:
                for peer in self.peers:
                    self.told(peer)
                assert self.honest.infer("echo", "after", slo=30.0) == "after"
                for peer in self.peers:
                    peer.send(Goodbye("bye"))
                    peer.close()
                assert self.honest.infer("echo", "alone", slo=30.0) == "alone"
                self.cluster.settle()
        finally:
            self.cluster.close()


TestLiars = Liars.TestCase
TestLiars.settings = settings(
    max_examples=5, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


# ---- much of it ----------------------------------------------------------------------------------------------------


def test_a_structure_without_content_counts_by_the_memory_that_it_takes(cluster, strangers, echo):
    """Millions of empty lists have no bytes; held for nothing, a few messages would fill the memory."""
    cluster.start(max_payload=1_000_000)
    cluster.shard.apply(msgspec.structs.replace(echo, name="waiting"))
    liar = strangers("service", "liar")
    liar.send(submit(request(1, ListNode([ListNode([])] * 20_000), "waiting")))
    answer = liar.answers(1)[1]
    assert answer.outcome == "rejected"
    assert "above the limit" in answer.detail


def test_empty_structures_fill_the_shard_as_bytes_do(cluster, strangers, echo):
    cluster.start(max_bytes=4_000_000)
    cluster.shard.apply(echo)
    liar = strangers("service", "liar")
    for number in range(4):
        liar.send(submit(request(number, ListNode([ListNode([]) for _ in range(9_000)]))))
    answer = liar.receive(protocol.Result).answers[0]
    assert answer.id == 3
    assert "bytes are in flight" in answer.detail
    liar.send(Goodbye("bye"))
    liar.send(Hello(1, "liar"))
    liar.receive(Welcome)
    cluster.settle(rejected=1, cancelled=3)


def test_an_agent_of_thousands_of_devices_and_odd_names(cluster, honest, strangers):
    liar = strangers("agent")
    odd = ["", "x" * 10_000, "\0", "echo@1/echo/..", "é" * 100]
    models = [ModelReport(name[:50], name[:50], -5, [(n, 0.1) for n in range(5)]) for name in odd]
    refused = strangers("agent")
    refused.send(Ready(1, "liar \n\x1b[31m", []))
    assert "printable" in refused.receive(Goodbye).reason
    liar.send(Ready(1, "liar", [DeviceReport(n, odd[n % 5][:50], models) for n in range(2000)]))
    liar.receive(Welcome)
    assert cluster.status().devices == 2001
    liar.send(Ready(1, "liar", []))
    liar.receive(Welcome)
    assert cluster.status().devices == 1


def test_a_flood_of_pulls(cluster, honest, strangers):
    liar = strangers("agent", SNDHWM=0)
    liar.send(Ready(1, "liar", [DeviceReport(0, "odd", [ModelReport("other@1/x", "", 100, [(1, 0.1)])])]))
    liar.receive(Welcome)
    for number in range(20_000):
        liar.send(Pull(0, number, number, -number))
        liar.send(Acted(0, number, "ok"))
    liar.send(Heartbeat())
    liar.receive(Heartbeat)


def test_a_flood_of_requests_beyond_what_one_client_may_have(cluster, echo, strangers):
    cluster.start(max_client_requests=100)
    cluster.serve(echo)
    cluster.shard.apply(msgspec.structs.replace(echo, name="waiting"))
    liar = strangers("service", "liar")
    for first in range(0, 1000, 250):
        liar.send(submit(*(request(first + n, n, "waiting") for n in range(250))))
    answers = liar.answers(900)
    assert {str(answer.outcome) for answer in answers.values()} == {"rejected"}
    assert "of this client are in flight" in answers[999].detail
    assert cluster.client().infer("echo", "beside", slo=30.0) == "beside"
    liar.send(Cancel(list(range(100))))
    assert {str(answer.outcome) for answer in liar.answers(100).values()} == {"cancelled"}
    cluster.settle(ok=1, rejected=900, cancelled=100)


def test_a_flood_of_taps(cluster, honest, strangers):
    """Some are told of what comes, the others that they are too many; none can make the shard hold things for it."""
    taps = [strangers("service") for _ in range(12)]
    for tap in taps:
        for taken in (0, 2**62, -(2**62)):
            tap.send(Tap([], True, taken))
    heard = [tap.receive((Tapped, Goodbye)) for tap in taps]
    assert sum(isinstance(each, Tapped) for each in heard) == 4
    assert {each.retry for each in heard if isinstance(each, Goodbye)} == {False}


def test_nobody_cancels_the_requests_of_another(cluster, echo, strangers):
    cluster.start()
    cluster.shard.apply(echo)
    honest = strangers("service", "honest")
    honest.send(submit(request(1, "x"), request(2, "y")))
    cluster.wait_for(lambda status: status.in_flight == 2, "they are there")
    liar = strangers("service", "liar")
    liar.send(Cancel([1, 2]))
    liar.send(submit(request(1, "mine")))
    liar.send(Goodbye("bye"))
    cluster.wait_for(lambda status: status.submitted == 3 and status.in_flight == 2, "the liar's has gone")
    cluster.serve(echo)
    assert {str(answer.outcome) for answer in honest.answers(2).values()} == {"ok"}
    cluster.settle(ok=2, cancelled=1)


def test_a_cancel_of_millions_is_not_looked_at(cluster, honest, strangers):
    liar = strangers("service", "liar")
    liar.send(Cancel(list(range(100)) * 2000))
    assert "200000 requests in one CANCEL" in liar.receive(Goodbye).reason


def test_a_request_that_is_sent_again_after_its_end_is_another_one(cluster, honest, strangers):
    """Before its end it is a repeat, which gets one answer. After it a shard knows nothing of it any more."""
    liar = strangers("service", "liar")
    for _ in range(3):
        liar.send(submit(request(1, "value")))
        assert liar.answers(1)[1].outcome == "ok"


# ---- slow ones -----------------------------------------------------------------------------------------------------


def test_those_who_say_nothing_or_half_of_something(cluster, honest):
    greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(48)
    ready = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
    held = []
    try:
        for address in (cluster.shard.frontend, cluster.shard.backend):
            host, port = address.removeprefix("tcp://").split(":")
            for said in (b"", greeting[:5], greeting, greeting + ready[:9], greeting + ready):
                for behind in (
                    b"",
                    b"\x02\xff\xff\xff\xff\xff\xff\xff\xff",
                    b"\x03\0\0\0\0\0\xff\xff\xff",
                    b"\x01\x05ab",
                ):
                    held.append(socket.create_connection((host, int(port))))
                    held[-1].sendall(said + behind)
        client = cluster.client()
        assert client.infer("echo", "meanwhile", slo=30.0) == "meanwhile"
    finally:
        for connection in held:
            connection.close()
