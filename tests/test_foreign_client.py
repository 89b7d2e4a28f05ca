"""A client and an agent made from docs/protocol.md alone (pyzmq and msgpack, nothing of ours), against a real shard."""

from __future__ import annotations

import struct
import threading
import time
import uuid

import msgpack
import pytest
import zmq

from broker.routing import Routing
from broker.shell import Shard, ShardConfig
from pipelines.spec import PipelineSpec, StageSpec

HELLO, SUBMIT, CANCEL, HEARTBEAT, GOODBYE, WELCOME, RESULT = range(1, 8)
READY, PULL, DONE, GRANT = range(10, 14)


class Foreigner:
    """A DEALER that speaks the protocol by hand."""

    def __init__(self, address):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def send(self, header, *frames):
        self.socket.send_multipart([msgpack.packb(header), *frames])

    def receive(self, kind=None):
        """(header, payload frames) of the next message, of the next one of a kind if one is given."""
        while True:
            assert self.socket.poll(20_000), f"no message of kind {kind} came"
            header, *frames = self.socket.recv_multipart()
            header = msgpack.unpackb(header, strict_map_key=False)
            if kind in (None, header[0]):
                return header, b"".join(frames)

    def close(self):
        self.socket.close()
        self.context.term()


def now_us():
    return time.monotonic_ns() // 1000


def spec(name, max_batch):
    """A pipeline of one stage, whose batches leave as soon as ``max_batch`` requests are there."""
    stage = StageSpec(executor="python", model="somewhere.else:model", max_batch=max_batch)
    return PipelineSpec(name=name, slo=30.0, stages={"model": stage}, output="model")


SINGLE = spec("single", 1)
PAIR = spec("pair", 2)


@pytest.fixture
def shard():
    shard = Shard(ShardConfig(name="shard-1", heartbeat=5.0, max_payload=1_000_000))
    shard.apply(SINGLE)
    shard.apply(PAIR)
    thread = threading.Thread(target=shard.run)
    thread.start()
    shard.status()  # the pipelines are there once it answers
    yield shard
    shard.stop()
    thread.join()


@pytest.fixture
def foreign(shard):
    """Makes foreigners at an address, and closes them in the end."""
    made = []

    def make(address):
        made.append(Foreigner(address))
        return made[-1]

    yield make
    for foreigner in made:
        foreigner.close()


@pytest.fixture
def service(shard, foreign):
    service = foreign(shard.frontend)
    service.send([HELLO, 1, uuid.uuid4().hex, "a foreign client"])
    header, _ = service.receive()
    assert header[:3] == [WELCOME, 1, "shard-1"]
    assert header[3] == 5_000_000
    assert header[4] == 1_000_000
    assert header[5] == [["single", 30_000_000], ["pair", 30_000_000]]
    return service


@pytest.fixture
def agent(shard, foreign):
    agent = foreign(shard.backend)
    models = [[spec.model_key("model"), "", 100, [[1, 0.001], [2, 0.0015]]] for spec in (SINGLE, PAIR)]
    agent.send([READY, 1, "foreign-agent", [[0, "abacus", models]]])
    header, _ = agent.receive()
    assert header[:2] == [WELCOME, 1]
    return agent


def pull(agent, seq, spec=SINGLE):
    agent.send([PULL, 0, seq, now_us(), 0])
    grant, parts = agent.receive(GRANT)
    _, device, batch, got_seq, pulled_us, dwell_us, model, variant, opens_us, closes_us, expected_us, tasks = grant
    assert (device, got_seq, model, variant) == (0, seq, spec.model_key("model"), "")
    assert dwell_us >= 0
    assert opens_us <= closes_us
    assert now_us() < pulled_us + dwell_us + closes_us
    assert expected_us >= 0
    return batch, [node for (node,) in tasks], parts


def test_requests_share_messages_and_come_back_as_asked(service, agent):
    image = struct.pack("<2f", 1.0, -2.0)
    picture = [3, {"size": 3, "image": [1, "<f4", [2, 1], 8]}]
    requests = [[1, "pair", 20_000_000, [0, 5], 0, "", True], [2, "pair", None, picture]]
    service.send([SUBMIT, now_us(), requests], b"hello" + image)
    batch, tasks, parts = pull(agent, 1, PAIR)
    first = tasks.index([0, 5])
    assert tasks[1 - first] == picture
    assert parts == (image + b"hello" if first else b"hello" + image)
    results = [[0, 5], [2, ["text", None, 1.5]]]
    agent.send([DONE, 0, batch, "ok", 10, 900, results[::-1] if first else results], b"HELLO")
    answers = {}
    rest = b""
    while len(answers) < 2:
        header, frames = service.receive(RESULT)
        rest += frames
        answers |= {answer[0]: answer for answer in header[1]}
    assert rest == b"HELLO"
    assert answers[1][1:3] == ["ok", [0, 5]]
    assert 0 < answers[1][3] < 20_000_000
    ((stage, queued_us, execution_us, batch_size, items, remaining_us),) = answers[1][7]
    assert (stage, execution_us, batch_size, items) == ("model", 900, 2, 1)
    assert queued_us >= 0
    assert 0 < remaining_us < 20_000_000
    assert answers[2][1:3] == ["ok", [2, ["text", None, 1.5]]]


def test_parts_may_lie_in_frames_of_their_own(service, agent):
    service.send([SUBMIT, now_us(), [[1, "single", None, [2, [[0, 2], [0, 0], [4, 3]]]]]], b"ab", b"cde")
    batch, tasks, parts = pull(agent, 1)
    assert tasks == [[2, [[0, 2], [0, 0], [4, 3]]]]
    assert parts == b"abcde"
    agent.send([DONE, 0, batch, "ok", 0, 900, [None]])
    header, _ = service.receive(RESULT)
    assert header[1][0][:3] == [1, "ok", None]


def outcome(service):
    (answer,) = service.receive(RESULT)[0][1]
    return answer[0], answer[1], answer[5]


def test_what_the_shard_rejects(service):
    service.send([SUBMIT, now_us(), [[1, "nowhere", None, None]]])
    assert outcome(service)[:2] == (1, "rejected")
    service.send([SUBMIT, now_us(), [[2, "single", 0, None]]])
    assert outcome(service)[:2] == (2, "rejected")
    service.send([SUBMIT, now_us(), [[3, "single", 40_000_000, None]]])
    assert outcome(service)[:2] == (3, "rejected")
    service.send([SUBMIT, now_us(), [[4, "single", None, [0, 1_000_001]]]], bytes(1_000_001))
    assert outcome(service)[:2] == (4, "rejected")
    service.send([SUBMIT, now_us(), [[5, "single", None, [0, 10]]]], b"short")
    assert outcome(service)[:2] == (5, "rejected")
    service.send([SUBMIT, now_us(), [[6, "single", None, [1, "|O", [1], 8]]]], bytes(8))
    assert outcome(service)[:2] == (6, "rejected")


def test_a_repeat_is_answered_once_and_a_cancelled_request_as_such(service):
    service.send([SUBMIT, now_us(), [[1, "single", None, None]]])
    service.send([SUBMIT, now_us(), [[1, "single", None, None], [2, "single", None, None]]])
    service.send([CANCEL, [1, 2, 77]])
    answers = {}
    while len(answers) < 2:
        for answer in service.receive(RESULT)[0][1]:
            assert answer[0] not in answers
            answers[answer[0]] = answer[1]
    assert answers == {1: "cancelled", 2: "cancelled"}
    service.send([HEARTBEAT, now_us()])
    assert service.receive()[0][0] == HEARTBEAT


def test_an_input_that_fails_and_a_model_that_raises(service, agent):
    service.send([SUBMIT, now_us(), [[1, "single", None, None]]])
    batch, tasks, _ = pull(agent, 1)
    assert tasks == [None]
    agent.send([DONE, 0, batch, "ok", 0, 900, [None], [[0, "ValueError: no picture"]]])
    assert outcome(service) == (1, "failed", "ValueError: no picture")
    service.send([SUBMIT, now_us(), [[2, "single", None, None]]])
    batch, _, _ = pull(agent, 2)
    agent.send([DONE, 0, batch, "model_error", 0, 900, [], [], "RuntimeError: boom"])
    assert outcome(service) == (2, "failed", "RuntimeError: boom")


def test_strangers_are_told_to_greet(shard, foreign):
    service = foreign(shard.frontend)
    service.send([SUBMIT, now_us(), [[1, "single", None, None]]])
    (kind, reason, retry), _ = service.receive()
    assert (kind, retry) == (GOODBYE, True)
    assert "HELLO" in reason
    agent = foreign(shard.backend)
    agent.send([PULL, 0, 1, now_us(), 0])
    (kind, reason, retry), _ = agent.receive()
    assert (kind, retry) == (GOODBYE, True)
    assert "READY" in reason


def test_another_version_is_refused_with_a_reason(shard, foreign):
    service = foreign(shard.frontend)
    service.send([HELLO, 2, "somebody"])
    (kind, reason, retry), _ = service.receive()
    assert (kind, retry) == (GOODBYE, False)
    assert "version" in reason
    agent = foreign(shard.backend)
    agent.send([READY, 2, "somebody", []])
    (kind, _, retry), _ = agent.receive()
    assert (kind, retry) == (GOODBYE, False)


def test_the_shard_says_when_its_pipelines_change(shard, service):
    shard.delete("single")
    assert service.receive(WELCOME)[0][5] == [["pair", 30_000_000]]
    shard.apply(SINGLE)
    assert ["single", 30_000_000] in service.receive(WELCOME)[0][5]


def test_the_shard_says_who_else_serves_what_and_a_service_may_ignore_it(shard, service, agent):
    others = Routing(
        [("shard-1", shard.frontend), ("shard-2", "tcp://127.0.0.1:1")], [("single", [(0, 1.0), (1, 3.0)])], 5
    )
    shard.route(others)
    while not (header := service.receive(WELCOME)[0])[6]:
        pass  # that of the agent's coming
    assert header[1:3] == [1, "shard-1"]
    assert header[6] == [["shard-1", shard.frontend], ["shard-2", "tcp://127.0.0.1:1"]]
    assert header[7:9] == [[["single", [[0, 1.0], [1, 3.0]]]], 5]
    shard.route(Routing(others.shards, others.routes, 6))  # no news
    service.send([SUBMIT, now_us(), [[1, "single", None, [0, 5]]]], b"hello")
    batch, _, _ = pull(agent, 1)
    agent.send([DONE, 0, batch, "ok", 0, 900, [True]])
    header, _ = service.receive()
    assert header[0] == RESULT
    assert header[1][0][:3] == [1, "ok", True]


def test_a_service_is_told_when_the_shard_leaves(foreign):
    shard = Shard(ShardConfig(name="shard-2"))
    thread = threading.Thread(target=shard.run)
    thread.start()
    service = foreign(shard.frontend)
    service.send([HELLO, 1, "somebody"])
    service.receive(WELCOME)
    shard.stop()
    (_, reason, retry), _ = service.receive(GOODBYE)
    assert retry is True
    assert "shutting down" in reason
    thread.join()
