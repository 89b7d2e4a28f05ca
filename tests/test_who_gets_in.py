"""Who gets into a shard with a key, over real CURVE sockets: each refusal, and what the log says of it."""

from __future__ import annotations

import re
import secrets
import socket
import time
from contextlib import suppress

import msgspec
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from broker.access import Access
from broker.clients import Clients
from broker.connections import PATIENCE, Connections
from broker.endpoint import HANDSHAKE, Endpoint
from broker.engine.limits import Limits
from broker.engine.scheduler import Scheduler
from broker.files import ShardFiles
from broker.gate import Gate
from broker.refusals import Refusals
from broker.routing import Routing
from broker.shell import Shard, ShardConfig
from broker.zap import Zap
from cluster.filecache import FileCache
from cluster.records import KeyRecord, PublicKey
from laxity import protocol
from laxity.curve import PlainRefused, secure_client
from laxity.keys import InvalidKey, KeyFile, new_pair, write_key_file
from laxity.outcomes import Outcome
from laxity.protocol import (
    Chunk,
    Fetch,
    Goodbye,
    Heartbeat,
    Hello,
    Ready,
    Request,
    Result,
    Store,
    Stored,
    Submit,
    Tap,
    Tapped,
    Welcome,
)
from tests.conftest import WAIT_MS, eventually

DIGEST = "0" * 64
PEER = r"127\.0\.0\.1:\d+"
GONE = rf"({PEER}|a peer that has gone)"
"""Whose connection ended before it could be asked where it came from."""
EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
)


class Dealer:
    """A DEALER with a key (or none), and what becomes of its connection."""

    def __init__(self, address, server="", pair=None, routing_id=None):
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RECONNECT_IVL, 60_000)
        self.routing_id = b"\x01" + secrets.token_bytes(15) if routing_id is None else routing_id
        if self.routing_id:
            self.socket.set(zmq.ROUTING_ID, self.routing_id)
        if pair is not None:
            secure_client(self.socket, pair, server)
        self._monitor = self.socket.get_monitor_socket(EVENTS)
        self.socket.connect(address)

    def event(self):
        """What becomes of the connection next."""
        assert self._monitor.poll(WAIT_MS), "nothing became of the connection"
        return zmq.Event(recv_monitor_message(self._monitor)["event"])

    def is_cut(self):
        while self.event() is not zmq.Event.DISCONNECTED:
            pass

    def send(self, message, *frames):
        self.socket.send_multipart([protocol.encode(message), *frames])

    def receive(self, kind):
        assert self.socket.poll(WAIT_MS), f"no {kind.__name__} came"
        message = protocol.decode_to_client(self.socket.recv_multipart()[0])
        assert isinstance(message, kind), message
        return message

    def ask(self, message, kind, *frames):
        self.send(message, *frames)
        return self.receive(kind)

    def greet(self, name):
        return self.ask(Hello(protocol.VERSION, name), Welcome)

    def close(self):
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()
        self._context.term()


class World:
    """A shard with a key, whose wall clock stands still unless a test turns it; owners of keys, and their peers."""

    def __init__(self, cluster, directory):
        self._cluster = cluster
        self._directory = directory
        self._dealers = []
        self.records = {}
        self.pairs = {}
        self.now = 1000.0
        self.key = new_pair()

    def start(self, handshake=HANDSHAKE, patience=PATIENCE, **options):
        file = KeyFile(cluster="c", name="s0", role="shard", public=self.key.public, secret=self.key.secret)
        path = self._directory / "s0.key"
        write_key_file(path, file)
        options = {"key": str(path), **options}
        self._cluster.start(wall=lambda: self.now, handshake=handshake, patience=patience, **options)
        self.shard = self._cluster.shard

    def owner(self, name, role, **fields):
        """Let somebody in."""
        pair = self.pairs[name] = new_pair()
        self.records[name] = KeyRecord(role=role, publics=[PublicKey(pair.public, 0.0)], **fields)
        return pair

    def change(self, name, **fields):
        self.records[name] = msgspec.structs.replace(self.records[name], **fields)
        self.admit()

    def admit(self):
        self.shard.admit(dict(self.records))

    def dealer(self, who="", port="frontend", server=None, pair=None, routing_id=None):
        """A peer with somebody's key; '' for none."""
        pair = self.pairs[who] if who else pair
        address = self.shard.frontend if port == "frontend" else self.shard.backend
        made = Dealer(address, server or self.key.public, pair, routing_id)
        self._dealers.append(made)
        return made

    def forget(self, dealer):
        """It was closed."""
        self._dealers.remove(dealer)

    def close(self):
        for dealer in self._dealers:
            dealer.close()


@pytest.fixture
def world(cluster, tmp_path):
    made = World(cluster, tmp_path)
    yield made
    made.close()


@pytest.fixture
def said(caplog):
    """Waits for a line of the log."""

    def wait(pattern):
        eventually(lambda: any(re.fullmatch(pattern, each) for each in caplog.messages), f"{pattern} in the log")

    return wait


# ---- handshakes ----------------------------------------------------------------------------------


def test_nobody_gets_in_before_the_directory_was_read(world, said):
    world.owner("billing", "client")
    world.start()
    assert world.dealer("billing").event() is zmq.Event.HANDSHAKE_FAILED_AUTH
    said(r"refused 127\.0\.0\.1 at the port for services: the shard has not read yet who may come in: try again")
    world.admit()
    assert world.dealer("billing").greet("c").shard == "s0"
    assert world.shard.refusals.counts["not_ready"] == 1


def test_strangers_are_refused_at_the_door(world, said):
    world.owner("billing", "client")
    world.owner("gpu-1", "node")
    world.owner("gone", "client", revoked=1.0)
    world.start()
    world.admit()

    # It depends on who is the first to break off.
    assert world.dealer().event() in (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.HANDSHAKE_FAILED_NO_DETAIL)
    said(rf"refused {GONE} at the port for services: (it has no key|it broke off .*, as peers without a key do)")

    unknown = new_pair()
    assert world.dealer(pair=unknown).event() is zmq.Event.HANDSHAKE_FAILED_AUTH
    said(rf"refused 127\.0\.0\.1 at the port for services: the key {re.escape(unknown.public)} is unknown")

    assert world.dealer("gone").event() is zmq.Event.HANDSHAKE_FAILED_AUTH
    said(r"refused 127\.0\.0\.1 at the port for services: key 'gone' was revoked")

    assert world.dealer("billing", "backend").event() is zmq.Event.HANDSHAKE_FAILED_AUTH
    said(r"refused 127\.0\.0\.1 at the port for agents: key 'billing' is of role client, which does not come to .*")

    other_shard = world.dealer("billing", server=new_pair().public)
    assert other_shard.event() is zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    said(rf"refused {GONE} at the port for services: it has another public key of this shard, .*")

    counts = world.shard.refusals.counts
    assert {reason: count for reason, count in counts.items() if count} == {
        "unknown_key": 1,
        "revoked_key": 1,
        "role": 1,
        "handshake": 2,
    }
    figures = world.shard.source.figures().samples["laxity_refused"]
    assert (["s0", "handshake"], 2) in figures
    assert (["s0", "silent"], 0) in figures
    assert world.dealer("billing").greet("c").shard == "s0", "and those who may still get in"


def test_what_is_no_zeromq_is_noticed(world, said):
    world.start()
    host, port = world.shard.frontend.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.settimeout(WAIT_MS / 1000)
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 20)
        with suppress(ConnectionResetError):
            while stranger.recv(1000):
                pass
    said(rf"refused {GONE} at the port for services: it left without a message, or does not speak ZeroMQ's .*")


def test_who_was_told_to_go_and_goes_is_not_taken_for_a_stranger(world, said):
    world.owner("billing", "client")
    world.start()
    world.admit()
    dealer = world.dealer("billing")
    assert "may not record" in dealer.ask(Tap(), Goodbye).reason
    dealer.close()
    world.forget(dealer)
    host, port = world.shard.frontend.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))):
        pass
    said(rf"refused {GONE} at the port for services: it broke off the handshake, as peers without a key do")
    counts = world.shard.refusals.counts
    assert (counts["role"], counts["handshake"]) == (1, 1)


def test_who_is_slow_is_cut(world, said):
    world.owner("billing", "client")
    world.start(handshake=0.2, patience=0.6)
    world.admit()
    host, port = world.shard.frontend.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.settimeout(WAIT_MS / 1000)
        while slow.recv(1000):  # the shard's greeting, and then the end
            pass
    said(rf"refused {PEER} at the port for services: it did not finish the handshake in time")
    silent = world.dealer("billing")
    assert silent.event() is zmq.Event.HANDSHAKE_SUCCEEDED
    silent.is_cut()
    said(rf"refused {PEER} at the port for services: it is connected and says nothing")


def test_where_there_are_too_many_the_oldest_silent_one_goes(world, said):
    for name in "abc":
        world.owner(name, "client")
    world.start(max_connections=2)
    world.admit()
    a, b = world.dealer("a"), world.dealer("b")
    a.greet("a")
    assert b.event() is zmq.Event.HANDSHAKE_SUCCEEDED
    world.dealer("c").greet("c")
    b.is_cut()
    said(rf"refused {PEER} at the port for services: more than 2 connections \(--max-connections\)")
    late = world.dealer("b")
    late.is_cut()
    assert a.ask(Heartbeat(), Heartbeat) == Heartbeat(), "who has greeted stays"


def test_plain_ports_have_these_limits_too(cluster, said):
    cluster.start(max_connections=1, patience=0.3)
    first = Dealer(cluster.shard.frontend)
    first.greet("first")
    second = Dealer(cluster.shard.frontend)
    second.is_cut()
    said(rf"refused {PEER} at the port for services: more than 1 connections .*")
    silent = Dealer(cluster.shard.backend)
    silent.is_cut()
    said(rf"refused {PEER} at the port for agents: it is connected and says nothing")
    name = first.ask(Hello(protocol.VERSION, "no\x1b[2Jname"), Goodbye)
    assert name.reason == "client names are of printable characters"
    for each in (first, second, silent):
        each.close()


# ---- what each role may do -----------------------------------------------------------------------


def test_each_role_may_do_its_own_things_only(world, said):
    world.owner("billing", "client")
    world.owner("gpu-1", "node")
    world.owner("s1", "shard")
    world.owner("ops", "operator")
    world.start()
    world.admit()
    asks = {
        "submit requests": (Hello(protocol.VERSION, "c"), Welcome),
        "fetch files": (Fetch(DIGEST, 0, 1), Chunk),
        "upload files": (Store(DIGEST, 0, 1), Stored),
        "record requests": (Tap(), Tapped),
    }
    may = {
        "billing": {"submit requests"},
        "gpu-1": {"fetch files"},
        "s1": {"fetch files"},
        "ops": set(asks),
    }
    for who, tasks in may.items():
        role = world.records[who].role
        for task, (message, answer) in asks.items():
            dealer = world.dealer(who)
            if isinstance(message, Hello):
                message = Hello(protocol.VERSION, f"instance of {who}")
            frames = [b""] if isinstance(message, Store) else []
            if task in tasks:
                dealer.ask(message, answer, *frames)
                continue
            refused = dealer.ask(message, Goodbye, *frames)
            assert not refused.retry
            why = f"key {who!r} is of role {role}, which may not {task}"
            assert refused.reason == why
            if task == "submit requests":
                dealer.is_cut()
                said(rf"refused {PEER} at the port for services: {re.escape(why)}")


# ---- identity ------------------------------------------------------------------------------------


def test_an_agents_name_is_that_of_its_key(world, said):
    world.owner("gpu-1", "node")
    world.owner("gpu-2", "node")
    world.start()
    world.admit()
    agent = world.dealer("gpu-1", "backend")
    agent.ask(Ready(protocol.VERSION, "gpu-1", []), Welcome)
    thief = world.dealer("gpu-2", "backend")
    refused = thief.ask(Ready(protocol.VERSION, "gpu-1", []), Goodbye)
    assert not refused.retry
    thief.is_cut()
    said(rf"refused {PEER} at the port for agents: it says that it is agent gpu-1, and has the key of 'gpu-2'")
    assert agent.ask(Heartbeat(), Heartbeat) == Heartbeat()
    assert world.shard.report()[1] == ["gpu-1"]


def test_a_services_name_belongs_to_the_key_that_came_with_it(world, said):
    world.owner("billing", "client")
    world.owner("other", "client")
    world.start()
    world.admit()
    victim = world.dealer("billing")
    victim.greet("instance 1")
    thief = world.dealer("other")
    assert thief.ask(Hello(protocol.VERSION, "instance 1"), Goodbye).reason == "a service of another key has this name"
    thief.is_cut()
    said(rf"refused {PEER} at the port for services: service instance 1 has the key of 'billing', and not this one")
    assert victim.ask(Heartbeat(), Heartbeat) == Heartbeat()


def test_a_routing_id_that_could_be_guessed_is_refused(world, said):
    world.owner("billing", "client")
    world.start()
    world.admit()
    for routing_id in (b"", b"fifteen bytes.."):
        refused = world.dealer("billing", routing_id=routing_id).ask(Hello(protocol.VERSION, "c"), Goodbye)
        assert not refused.retry
    said(rf"refused {PEER} at the port for services: its routing id has 5 bytes; set one of 16 random bytes or more")


def test_who_has_the_routing_id_of_another_is_not_heard(world, said):
    world.owner("billing", "client")
    world.owner("other", "client")
    world.start(patience=0.5)
    world.admit()
    victim = world.dealer("billing")
    victim.greet("instance 1")
    thief = world.dealer("other", routing_id=victim.routing_id)
    thief.send(Hello(protocol.VERSION, "thief"))
    thief.is_cut()
    said(rf"refused {PEER} at the port for services: it is connected and says nothing")
    assert victim.ask(Heartbeat(), Heartbeat) == Heartbeat()
    # Once the victim has gone its routing id is nobody's, and what was meant for it goes to nobody.
    victim.close()
    world._dealers.remove(victim)
    eventually(lambda: len(world.shard._front.connections) == 0, "the victim has gone")
    heir = world.dealer("other", routing_id=victim.routing_id)
    assert heir.ask(Heartbeat(), Goodbye).reason == "unknown peer: say HELLO first"


def test_each_message_is_compared_with_the_greeting(world, tmp_path, caplog):
    """Whatever libzmq and the shard make of the order in which connections end and come: by hand, a shard's side that
    has not noticed yet that a service has gone whose routing id another one takes."""
    victim_pair, thief_pair = world.owner("billing", "client"), world.owner("other", "client")
    context, access, refusals = zmq.Context(), Access(), Refusals()
    access.admit(world.records)
    zap = Zap(context, access, refusals, lambda: 0.0)
    endpoint = Endpoint(context, "tcp://127.0.0.1:*", 1 << 20, world.key, "frontend")
    connections = Connections(10)
    gate = Gate(endpoint, "frontend", access, refusals, connections, lambda: 0.0)
    files = ShardFiles(FileCache(tmp_path / "cache", 1 << 20), lambda function: function(), None, False)
    clients = Clients(endpoint, gate, Scheduler(Limits()), files, "s0", 1.0, None, None)
    dealers = []

    def serve_until(condition):
        def turn():
            zap.answer()
            clients.take(time.monotonic, 100)
            return condition()

        eventually(turn, "the shard's side has done it")

    try:
        victim = Dealer(endpoint.address, world.key.public, victim_pair)
        dealers.append(victim)
        victim.send(Hello(protocol.VERSION, "instance 1"))
        serve_until(lambda: len(clients) == 1)
        victim.close()
        dealers.remove(victim)
        # ROUTER lets nobody take a routing id until it has let go of the one who had it.
        eventually(lambda: clients.take(time.monotonic, 1) or endpoint.monitor.poll(0), "libzmq knows that it has gone")
        thief = Dealer(endpoint.address, world.key.public, thief_pair, victim.routing_id)
        dealers.append(thief)
        thief.send(Submit(0, [Request(1, "echo", None, None)]))
        thief.send(Heartbeat())
        serve_until(lambda: refusals.counts["identity"] == 2)
        assert thief.receive(Goodbye).reason == "this routing id is another peer's"
        assert "it uses the routing id of service instance 1, whose key is that of 'billing'" in caplog.text
        assert clients._scheduler.ledger.submitted == 0
    finally:
        for dealer in dealers:
            dealer.close()
        endpoint.close()
        zap.close()
        context.term()


# ---- revocation and rotation ---------------------------------------------------------------------


def test_a_key_that_is_revoked_ends_what_its_owner_has_at_once(world, cluster, echo, said):
    world.owner("billing", "client")
    world.owner("other", "client")
    world.owner("gpu-1", "node")
    world.owner("ops", "operator")
    world.start()
    world.admit()
    world.shard.apply(echo)
    service, other, agent = world.dealer("billing"), world.dealer("other"), world.dealer("gpu-1", "backend")
    service.greet("instance 1")
    other.greet("instance 2")
    agent.ask(Ready(protocol.VERSION, "gpu-1", []), Welcome)
    tap = world.dealer("ops")
    tap.ask(Tap(), Tapped)
    service.send(Submit(0, [Request(1, "echo", None, None)]))
    cluster.wait_for(lambda status: status.in_flight == 1, "the request waits")
    for name in ("billing", "gpu-1", "ops"):
        world.change(name, revoked=1.0)
    for each, name in ((service, "billing"), (agent, "gpu-1")):
        farewell = each.receive(Goodbye)
        assert (farewell.reason, farewell.retry) == (f"key {name!r} was revoked", False)
    for each in (service, agent, tap):
        each.is_cut()
    for name, port in (("billing", "services"), ("ops", "services"), ("gpu-1", "agents")):
        said(rf"refused {PEER} at the port for {port}: key '{name}' was revoked")
    cluster.settle(cancelled=1)
    assert other.ask(Heartbeat(), Heartbeat) == Heartbeat()
    status = cluster.status()
    assert (status.clients, status.agents) == (1, 0)
    assert world.dealer("billing").event() is zmq.Event.HANDSHAKE_FAILED_AUTH


def test_the_end_of_an_old_key_cuts_those_who_still_have_it(world, said):
    old = world.owner("billing", "client")
    world.start()
    world.admit()
    late = world.dealer(pair=old)
    late.greet("late")
    moving = world.dealer(pair=old)
    moving.greet("moving")
    new = new_pair()
    world.change("billing", publics=[PublicKey(new.public, 1000.0), PublicKey(old.public, 0.0, 2000.0)])
    assert late.ask(Heartbeat(), Heartbeat) == Heartbeat(), "both are good for a while"
    moved = world.dealer(pair=new)
    moved.greet("moving")  # the owner is the same: it may go on under its name
    world.now = 2000.0
    assert late.receive(Goodbye).reason.startswith("key 'billing' comes with a pair that was replaced")
    late.is_cut()
    moving.is_cut()
    said(rf"refused {PEER} at the port for services: key 'billing' comes with a pair that was replaced, and good .*")
    assert moved.ask(Heartbeat(), Heartbeat) == Heartbeat()
    assert world.dealer(pair=old).event() is zmq.Event.HANDSHAKE_FAILED_AUTH


# ---- limits of a key -----------------------------------------------------------------------------


def outcomes(dealer, count):
    """The next ``count`` answers by request."""
    found = []
    while len(found) < count:
        found += dealer.receive(Result).answers
    return {answer.id: (answer.outcome, answer.detail) for answer in found}


def test_a_key_is_held_to_its_limits(world, cluster, echo):
    world.owner("billing", "client", pipelines=["echo"], in_flight=2)
    world.owner("fast", "client", rate=3.0)
    world.start()
    world.admit()
    world.shard.apply(echo)
    billing, fast = world.dealer("billing"), world.dealer("fast")
    billing.greet("b1")
    second = world.dealer("billing")
    second.greet("b2")
    billing.send(Submit(0, [Request(1, "other", None, None)]))
    assert outcomes(billing, 1)[1] == (Outcome.REJECTED, "key 'billing' may not use pipeline 'other'")

    # No agent is there: what is taken in waits.
    billing.send(Submit(0, [Request(2, "echo", None, None)]))
    second.send(Submit(0, [Request(2, "echo", None, None)]))
    cluster.wait_for(lambda status: status.in_flight == 2, "both wait")
    billing.send(Submit(0, [Request(2, "echo", None, None), Request(3, "echo", None, None)]))
    too_many = "key 'billing' has 2 requests in flight at this shard, and may have 2 in the cluster; wait for answers"
    assert outcomes(billing, 1) == {3: (Outcome.REJECTED, too_many)}, "a repeat is none more"
    world.change("billing", in_flight=3)
    billing.send(Submit(0, [Request(4, "echo", None, None)]))
    cluster.wait_for(lambda status: status.in_flight == 3, "the new limit holds")

    fast.greet("f")
    fast.send(Submit(0, [Request(number, "echo", None, None) for number in range(4)]))
    slow_down = "key 'fast' may submit 3 requests a second; slow down and try again"
    assert outcomes(fast, 1) == {3: (Outcome.REJECTED, slow_down)}

    # A shard that gets a tenth of the pipeline's requests lets a tenth through, and one at a time at least.
    table = Routing([("s0", "tcp://a:1"), ("s1", "tcp://b:1")], [("echo", [(0, 0.1), (1, 0.9)])], 1)
    world.shard.route(table)
    assert billing.receive(Welcome).routes == table.routes
    billing.send(Submit(0, [Request(5, "echo", None, None)]))
    assert outcomes(billing, 1)[5][0] is Outcome.REJECTED
    world.change("billing", revoked=1.0)
    world.change("fast", revoked=1.0)
    cluster.settle(rejected=4, cancelled=6)


def test_a_client_has_so_many_requests_in_flight_at_most(cluster, echo):
    cluster.start(max_client_requests=2)
    cluster.shard.apply(echo)
    one, other = Dealer(cluster.shard.frontend), Dealer(cluster.shard.frontend)
    one.greet("one")
    other.greet("other")
    one.send(Submit(0, [Request(number, "echo", None, None) for number in range(3)]))
    full = "queue full: 2 requests of this client are in flight at this shard; wait for answers"
    assert outcomes(one, 1) == {2: (Outcome.REJECTED, full)}
    other.send(Submit(0, [Request(1, "echo", None, None)]))
    cluster.wait_for(lambda status: status.in_flight == 3, "another client's is taken in")
    for each in (one, other):
        each.close()


# ---- the shard itself ----------------------------------------------------------------------------


def test_a_shard_in_the_network_needs_a_key_or_to_be_asked_for_plain(caplog):
    for port, whose in (("frontend", "services"), ("backend", "agents")):
        with pytest.raises(PlainRefused, match=rf"{whose} connect to tcp://0.*--role shard.*LAXITY_BROKER_KEY"):
            Shard(ShardConfig(name="s0", **{port: "tcp://0.0.0.0:*"}))
    assert not caplog.messages


def test_a_shard_has_its_own_key(tmp_path):
    pair = new_pair()
    for name, role in (("s1", "shard"), ("s0", "client")):
        path = tmp_path / f"{name}-{role}"
        write_key_file(path, KeyFile(cluster="c", name=name, role=role, public=pair.public, secret=pair.secret))
        with pytest.raises(InvalidKey, match="'s0' needs its own"):
            Shard(ShardConfig(name="s0", key=str(path)))
