"""One agent that works for several shards: devices that move, shards that refuse, and an agent that is stopped."""

from __future__ import annotations

import threading

import pytest
import zmq

from broker.shell import Shard, ShardConfig
from laxity import Client, protocol
from laxity.protocol import Done, Goodbye, Grant, Heartbeat, Pull, Ready, Welcome
from nodes.agent import VersionRefused, Work
from nodes.device import DeviceConfig
from pipelines.load import parse_spec

EMULATED = DeviceConfig("emulated", "emulated")
CPU = DeviceConfig("cpu", "cpu")
HELD_UP = """
import os, time
def model(feeds):
    while not os.path.exists({gate!r}):
        time.sleep(0.005)
    return feeds
"""
QUICK = """
name: quick
slo: 20s
stages:
  first: {executor: emulated, profile: {alpha_ms: 1, beta_ms: 2}, max_batch: 4}
  second: {executor: emulated, profile: {alpha_ms: 1, beta_ms: 1}, inputs: [first], max_batch: 2}
output: second
"""


def work(shard, *specs):
    """What a device is to do that holds all models of ``specs`` for a shard."""
    return Work(shard, {spec.model_key(stage): (spec, stage) for spec in specs for stage in spec.stages})


class HandShard:
    """A shard that is played by hand: it keeps what the agent says until the test asks for it."""

    def __init__(self, make_peer, name):
        self.name = name
        self.peer = make_peer("tcp://127.0.0.1:*", protocol.decode_from_agent)
        self.url = self.peer.url
        self.agent = b""
        self._said = []

    def receive(self, kind):
        """The next message of a kind, and its frames; the others stay for later."""
        for index, (message, frames) in enumerate(self._said):
            if isinstance(message, kind):
                del self._said[index]
                return message, frames
        while True:
            sender, message, frames = self.peer.receive(Ready, Pull, Done, Goodbye, Heartbeat)
            self.agent = sender
            if isinstance(message, kind):
                return message, frames
            self._said.append((message, frames))

    def said(self, kind):
        """The messages of a kind that came before the last one that was taken."""
        return [message for message, _ in self._said if isinstance(message, kind)]

    def ready(self):
        """The devices of the next READY, by number."""
        return {device.device: device for device in self.receive(Ready)[0].devices}

    def welcome(self):
        self.peer.send(self.agent, Welcome(protocol.VERSION, self.name, 60_000_000))

    def greet(self):
        """Let the agent begin; its devices."""
        devices = self.ready()
        self.welcome()
        return devices

    def grant(self, pull, batch, model, value="value"):
        self.peer.send(
            self.agent,
            Grant(pull.device, batch, pull.seq, pull.sent_us, 0, model, "", 0, 20_000_000, 1000, [[value]]),
        )

    def pull(self):
        return self.receive(Pull)[0]

    def done(self):
        return self.receive(Done)[0]


class HandAgent:
    """An agent that is played by hand."""

    def __init__(self, address):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 1000)
        self._socket.connect(address)

    def send(self, message):
        self._socket.send(protocol.encode(message))

    def receive(self, kind):
        """The next message of a kind."""
        while True:
            assert self._socket.poll(20_000), f"no {kind.__name__} came"
            message = protocol.decode_to_agent(self._socket.recv_multipart()[0])
            if isinstance(message, kind):
                return message

    def say(self, message, answer):
        self.send(message)
        return self.receive(answer)

    def close(self):
        self._socket.close()
        self._context.term()


@pytest.fixture
def make_node():
    made = []

    def make(address):
        made.append(HandAgent(address))
        return made[-1]

    yield make
    for node in made:
        node.close()


@pytest.fixture
def hand_shard(make_peer):
    return lambda name: HandShard(make_peer, name)


@pytest.fixture
def gate(tmp_path):
    """A file that lets batches of ``held_up`` end."""
    return tmp_path / "gate"


@pytest.fixture
def held_up(user_pipeline, gate):
    return user_pipeline(HELD_UP.format(gate=str(gate)), "max_batch: 1")


def ready_states(states):
    return all(set(state.models.values()) == {"ready"} for state in states)


# ---- several shards -------------------------------------------------------------------------------


def test_each_shard_sees_its_own_devices(cluster, hand_shard, echo):
    first, second = hand_shard("s0"), hand_shard("s1")
    agent = cluster.lone_agent([EMULATED] * 3)
    agent.agent.place({0: work("s0", echo), 1: work("s1", echo), 2: work("s0", echo)})
    agent.wait_for(ready_states)
    agent.agent.follow({"s0": first.url, "s1": second.url})
    assert set(first.greet()) == {0, 2}
    assert set(second.greet()) == {1}
    assert second.pull().device == 1
    assert {first.pull().device, first.pull().device} == {0, 2}


def test_batches_of_the_same_number_of_different_shards_do_not_mix(cluster, hand_shard, held_up, gate):
    first, second = hand_shard("s0"), hand_shard("s1")
    model = held_up.model_key("stage")
    agent = cluster.lone_agent([CPU])
    agent.agent.place({0: work("s0", held_up)})
    agent.wait_for(ready_states)
    agent.agent.follow({"s0": first.url, "s1": second.url})
    first.greet()
    first.grant(first.pull(), 7, model, "first")
    first.grant(first.pull(), 8, model, "waits")  # pulled once the first one runs

    agent.agent.place({0: work("s1", held_up)})
    assert first.ready() == {}
    refused = first.done()
    assert (refused.batch, refused.code) == (8, "cancelled")
    assert list(second.greet()) == [0]
    second.grant(second.pull(), 7, model, "second")

    gate.touch()
    ended = first.done()
    assert (ended.batch, ended.code, ended.results) == (7, "ok", ["first"])
    ended = second.done()
    assert (ended.batch, ended.code, ended.results) == (7, "ok", ["second"])
    first.welcome()
    assert "leaves" in first.receive(Goodbye)[0].reason


def test_a_shard_is_left_only_once_it_knows_that_nothing_comes_any_more(cluster, hand_shard, echo):
    first, second = hand_shard("s0"), hand_shard("s1")
    agent = cluster.lone_agent()
    agent.hold(echo)
    agent.agent.follow({"s0": first.url, "s1": second.url})
    first.greet()
    pull = first.pull()
    agent.agent.place({0: work("s1", echo)})
    assert first.ready() == {}
    second.greet()
    second.pull()
    # The shard has not read READY yet.
    first.grant(pull, 1, echo.model_key("echo"))
    refused = first.done()
    assert (refused.batch, refused.code) == (1, "cancelled")
    assert "does not work for this shard" in refused.detail
    first.welcome()
    first.receive(Goodbye)


def test_a_device_that_comes_back_before_its_shard_was_left(cluster, hand_shard, echo):
    first, second = hand_shard("s0"), hand_shard("s1")
    agent = cluster.lone_agent()
    agent.hold(echo)
    agent.agent.follow({"s0": first.url, "s1": second.url})
    first.greet()
    before = first.pull()
    agent.agent.place({0: work("s1", echo)})
    assert first.ready() == {}
    agent.hold(echo)
    assert list(first.ready()) == [0]
    pull = first.pull()
    assert pull.seq > before.seq
    first.welcome()
    first.welcome()
    first.grant(pull, 2, echo.model_key("echo"))
    assert first.done().code == "ok"


def test_what_changes_while_the_shard_has_yet_to_answer_is_told_before_anything_is_pulled(cluster, hand_shard, echo):
    shard = hand_shard("s0")
    agent = cluster.lone_agent([EMULATED] * 2)
    agent.agent.place({0: work("s0", echo)})
    agent.wait_for(lambda states: states[0].models == {echo.model_key("echo"): "ready"})
    agent.connect(shard.url)
    assert list(shard.ready()) == [0]
    agent.agent.place({1: work("s0", echo)})
    agent.wait_for(lambda states: states[1].models == {echo.model_key("echo"): "ready"})
    shard.welcome()
    assert shard.pull().device == 1
    (device,) = shard.said(Ready)[-1].devices
    assert (device.device, len(device.models)) == (1, 1)


def test_a_shard_s_new_address_is_followed_and_a_lost_record_is_not(cluster, hand_shard, echo):
    first, second = hand_shard("s0"), hand_shard("s0")
    agent = cluster.lone_agent()
    agent.hold(echo)  # before anybody knows where the shard is
    agent.connect(first.url)
    first.greet()
    pull = first.pull()
    agent.agent.follow({"other": "tcp://127.0.0.1:9"})
    first.grant(pull, 1, echo.model_key("echo"))
    assert first.done().code == "ok"
    agent.connect(second.url)
    assert list(second.greet()) == [0]
    second.pull()


def test_a_shard_that_refuses_does_not_end_the_work_for_the_others(cluster, hand_shard, echo):
    good, newer, upgraded = hand_shard("s0"), hand_shard("s1"), hand_shard("s1")
    agent = cluster.lone_agent([EMULATED] * 2)
    agent.agent.place({0: work("s0", echo), 1: work("s1", echo)})
    agent.wait_for(ready_states)
    agent.agent.follow({"s0": good.url, "s1": newer.url})
    newer.receive(Ready)
    newer.peer.send(newer.agent, Welcome(2, "s1", 1_000_000))
    good.greet()
    good.grant(good.pull(), 1, echo.model_key("echo"))
    assert good.done().code == "ok"
    assert agent.error is None
    agent.agent.follow({"s1": upgraded.url})
    assert list(upgraded.greet()) == [1]
    upgraded.pull()


def test_an_agent_ends_where_all_shards_refuse_it(cluster, hand_shard, echo):
    shards = [hand_shard("s0"), hand_shard("s1")]
    agent = cluster.lone_agent([EMULATED] * 2)
    agent.agent.follow({shard.name: shard.url for shard in shards})
    agent.agent.place({number: work(shard.name, echo) for number, shard in enumerate(shards)})
    for shard in shards:
        shard.receive(Ready)
        shard.peer.send(shard.agent, Goodbye("install a matching agent", retry=False))
    agent.join()
    assert isinstance(agent.error, VersionRefused)
    assert "install a matching agent" in str(agent.error)


def test_the_running_batch_of_a_shard_that_is_gone_is_nobody_s(cluster, hand_shard, held_up, gate):
    first, second = hand_shard("s0"), hand_shard("s1")
    agent = cluster.lone_agent([CPU])
    agent.agent.place({0: work("s0", held_up)})
    agent.wait_for(ready_states)
    agent.agent.follow({"s0": first.url, "s1": second.url})
    first.greet()
    first.grant(first.pull(), 7, held_up.model_key("stage"))
    first.pull()  # it runs
    agent.agent.place({0: work("s1", held_up)})
    assert first.ready() == {}
    second.greet()
    first.peer.send(first.agent, Goodbye("shutting down", retry=True))
    second.grant(second.pull(), 70, held_up.model_key("stage"))
    gate.touch()
    assert second.done().batch == 70


# ---- real shards ----------------------------------------------------------------------------------


class Shards:
    """Two shards in threads."""

    def __init__(self, *specs):
        self.shards = [Shard(ShardConfig(name=f"s{number}")) for number in range(2)]
        self._threads = [threading.Thread(target=shard.run) for shard in self.shards]
        for shard, thread in zip(self.shards, self._threads, strict=True):
            thread.start()
            for spec in specs:
                shard.apply(spec)

    def addresses(self):
        return {shard.config.name: shard.backend for shard in self.shards}

    def close(self):
        for shard in self.shards:
            shard.stop()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def shards():
    made = []

    def make(*specs):
        made.append(Shards(*specs))
        return made[-1]

    yield make
    for each in made:
        each.close()


def await_batches(cluster, agent, shard):
    """Return when the agent has run a few batches more, or the shard has nothing left to run."""

    def run():
        return sum(state.batches for state in agent.agent.states())

    before = run()
    cluster.eventually(lambda: run() >= before + 10 or not shard.status().in_flight, "batches are run")


def test_devices_moved_back_and_forth_under_load_lose_nothing(cluster, shards):
    spec = parse_spec(QUICK, file="quick.yaml", root="")
    both = shards(spec)
    agent = cluster.lone_agent([EMULATED] * 4)
    agent.agent.follow(both.addresses())
    half = {0: work("s0", spec), 1: work("s0", spec), 2: work("s1", spec), 3: work("s1", spec)}
    agent.agent.place(half)
    agent.wait_for(ready_states)
    clients = [Client(shard.frontend) for shard in both.shards]
    try:
        futures = [[client.submit("quick", number) for number in range(600)] for client in clients]
        moves = 0
        while not all(future.done() for sent in futures for future in sent):
            owner = both.shards[moves % 2]
            agent.agent.place(dict.fromkeys(range(4), work(owner.config.name, spec)))
            moves += 1
            await_batches(cluster, agent, owner)
        assert [[future.result(30) for future in sent] for sent in futures] == [list(range(600))] * 2
        assert moves > 4
        for status in map(Shard.status, both.shards):
            assert {outcome: count for outcome, count in status.ended.items() if count} == {"ok": 600}
            assert status.agents_lost == 0
    finally:
        for client in clients:
            client.close()


def test_models_moved_back_and_forth_under_load_lose_nothing(cluster, shards, echo):
    spec = parse_spec(QUICK, file="quick.yaml", root="")
    both = shards(spec)
    agent = cluster.lone_agent([EMULATED] * 2)
    agent.agent.follow(both.addresses())
    first = Work("s0", {spec.model_key("first"): (spec, "first")})
    second = Work("s0", {spec.model_key("second"): (spec, "second")})
    agent.agent.place({0: first, 1: second})
    agent.wait_for(ready_states)
    with Client(both.shards[0].frontend) as client:
        futures = [client.submit("quick", number) for number in range(400)]
        moves = 0
        while not all(future.done() for future in futures):
            moves += 1
            works = (second, first) if moves % 2 else (first, second)
            agent.agent.place(dict(enumerate(works)))
            await_batches(cluster, agent, both.shards[0])
        assert [future.result(30) for future in futures] == list(range(400))
    assert moves > 2


# ---- an agent that is stopped ---------------------------------------------------------------------


def test_a_stopped_agent_finishes_what_runs_and_refuses_what_waits(cluster, hand_shard, held_up, gate):
    shard = hand_shard("s0")
    agent = cluster.lone_agent([CPU])
    agent.hold(held_up)
    agent.connect(shard.url)
    shard.greet()
    shard.grant(shard.pull(), 1, held_up.model_key("stage"))
    pull = shard.pull()
    shard.grant(pull, 2, held_up.model_key("stage"))
    agent.agent.stop()
    assert shard.ready() == {}
    refused = shard.done()
    assert (refused.batch, refused.code) == (2, "cancelled")
    shard.grant(pull, 3, held_up.model_key("stage"))
    assert shard.done().batch == 3
    shard.welcome()
    gate.touch()
    ended = shard.done()
    assert (ended.batch, ended.code) == (1, "ok")
    shard.receive(Goodbye)
    agent.join()


def test_a_stopped_agent_does_not_wait_for_what_nobody_waits_for(cluster, hand_shard, user_pipeline, gate):
    stuck = user_pipeline(HELD_UP.format(gate=str(gate)), "max_batch: 1", slo="100ms")
    shard = hand_shard("s0")
    agent = cluster.lone_agent([CPU])
    agent.hold(stuck)
    agent.connect(shard.url)
    shard.greet()
    shard.grant(shard.pull(), 1, stuck.model_key("stage"))
    shard.pull()
    agent.agent.stop()
    assert shard.ready() == {}
    shard.welcome()
    shard.receive(Goodbye)
    agent.join()


def test_a_stopped_agent_s_requests_are_answered_by_another(cluster, held_up, gate):
    first = cluster.serve(held_up, devices=[CPU])
    client = cluster.client()
    futures = [client.submit("user", number) for number in range(3)]
    stage = held_up.model_key("stage")
    cluster.wait_for(lambda status: status.queued[stage] == 1, "one runs, one waits there")
    second = cluster.serve(held_up, devices=[CPU])
    first.agent.stop()
    cluster.wait_for(lambda status: status.devices == 1, "the shard counts on it no more")
    gate.touch()
    assert [future.result(30) for future in futures] == [0, 1, 2]
    first.join()
    assert cluster.settle(ok=3).agents_lost == 0
    assert second.agent.states()[0].batches == 2


# ---- the shard's side -----------------------------------------------------------------------------


def test_a_device_that_is_withdrawn_gets_nothing_and_may_still_answer(cluster, make_node, echo):
    cluster.start()
    cluster.shard.apply(echo)
    node = make_node(cluster.shard.backend)
    model = protocol.ModelReport(echo.model_key("echo"), "", 100, [(1, 0.001)])
    device = protocol.DeviceReport(0, "odd", [model])
    node.say(Ready(1, "odd", [device]), Welcome)
    node.send(Pull(0, 1, 0, 0))
    client = cluster.client()
    running = client.submit("echo", "running")
    grant = node.receive(Grant)
    node.send(Pull(0, 2, 0, 0))
    node.say(Ready(1, "odd", []), Welcome)
    assert cluster.status().devices == 0
    node.send(Pull(0, 3, 0, 0))
    waiting = client.submit("echo", "waiting")
    cluster.wait_for(lambda status: status.queued[echo.model_key("echo")] == 1, "it is not granted")
    node.send(Done(0, grant.batch, "ok", 0, 1000, ["running"]))
    assert running.result(30) == "running"
    # It comes back: the pull of before is void.
    node.say(Ready(1, "odd", [device]), Welcome)
    assert cluster.status().queued[echo.model_key("echo")] == 1
    node.send(Pull(0, 4, 0, 0))
    grant = node.receive(Grant)
    assert grant.seq == 4
    node.send(Done(0, grant.batch, "ok", 0, 1000, ["waiting"]))
    assert waiting.result(30) == "waiting"


def test_the_batch_of_a_withdrawn_device_is_queued_again_when_its_agent_is_lost(cluster, make_node, echo):
    cluster.start()
    cluster.shard.apply(echo)
    node = make_node(cluster.shard.backend)
    model = protocol.ModelReport(echo.model_key("echo"), "", 100, [(1, 0.001)])
    node.say(Ready(1, "odd", [protocol.DeviceReport(0, "odd", [model])]), Welcome)
    node.send(Pull(0, 1, 0, 0))
    future = cluster.client().submit("echo", "value")
    node.receive(Grant)
    node.say(Ready(1, "odd", []), Welcome)
    node.send(Goodbye("leaving"))
    cluster.wait_for(lambda status: status.agents == 0, "it has left")
    cluster.serve(echo)
    assert future.result(30) == "value"
    assert cluster.settle(ok=1).agents_lost == 0
