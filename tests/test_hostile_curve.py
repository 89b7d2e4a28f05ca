"""Who sits in the network between a peer and a shard with a key gets nowhere: neither with what was recorded and is
sent again, nor by changing what is on its way, nor by pretending that there are no keys."""

from __future__ import annotations

import secrets
import socket
import threading

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

import laxity
from cluster.records import KeyRecord, PublicKey
from laxity import protocol
from laxity.curve import secure_client
from laxity.keys import KeyFile, ServerKey, new_pair, write_key_file
from tests.conftest import WAIT, WAIT_MS, eventually


class Proxy:
    """Passes a connection on to a shard and keeps what goes to it; ``change`` is shown each piece and may change it."""

    def __init__(self, address):
        host, port = address.removeprefix("tcp://").split(":")
        self._shard = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.change = lambda piece: piece
        self.recorded = bytearray()
        """What the first connection sent to the shard."""
        self._sockets = []
        self._threads = []
        self._start(self._accept)

    def _start(self, function, *arguments):
        self._threads.append(threading.Thread(target=function, args=arguments))
        self._threads[-1].start()

    def _accept(self):
        first = True
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            shard = socket.create_connection(self._shard)
            self._sockets += [peer, shard]
            self._start(self._pass, peer, shard, True, first)
            self._start(self._pass, shard, peer, False, False)
            first = False

    def _pass(self, source, to, inwards, record):
        try:
            while piece := source.recv(65536):
                if record:
                    self.recorded += piece
                to.sendall(self.change(piece) if inwards else piece)
        except OSError:
            pass
        for each in (source, to):
            _end(each)

    def close(self):
        for each in (self._listener, *self._sockets):
            _end(each)
        for thread in self._threads:
            thread.join(WAIT)
            assert not thread.is_alive()
        for each in (self._listener, *self._sockets):
            each.close()


def _end(connection):
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


@pytest.fixture
def secured(cluster, echo, tmp_path):
    """A shard with a key that serves ``echo``; (the keys of a client, a client that is served all the while)."""
    key, pair, node = new_pair(), new_pair(), new_pair()

    def file(name, role, own):
        servers = [ServerKey("s0", "tcp://127.0.0.1:1", [key.public])]
        path = tmp_path / f"{name}.key"
        write_key_file(
            path,
            KeyFile(cluster="c", name=name, role=role, public=own.public, secret=own.secret, servers=servers),
        )
        return str(path)

    cluster.start(key=file("s0", "shard", key))
    cluster.shard.apply(echo)
    cluster.shard.admit(
        {
            "x": KeyRecord(role="client", publics=[PublicKey(pair.public, 0.0)]),
            "a0": KeyRecord(role="node", publics=[PublicKey(node.public, 0.0)]),
        }
    )
    agent = cluster.lone_agent(key=file("a0", "node", node))
    agent.hold(echo)
    agent.agent.follow({"s0": cluster.shard.backend}, [ServerKey("s0", cluster.shard.backend, [key.public])])
    client = cluster.client(key=file("x", "client", pair))
    assert client.infer("echo", "before", slo=30.0) == "before"
    yield key, pair, file("x2", "client", pair)
    assert client.infer("echo", "after", slo=30.0) == "after"
    cluster.settle()


@pytest.fixture
def proxy(cluster, secured):
    made = Proxy(cluster.shard.frontend)
    yield made
    made.close()


@pytest.fixture
def dealer():
    """Makes a DEALER with a key, without one, and its monitor."""
    made = []

    def make(address, pair=None, server=""):
        context = zmq.Context()
        each = context.socket(zmq.DEALER)
        each.set(zmq.LINGER, 0)
        each.set(zmq.RECONNECT_IVL, 60_000)
        each.set(zmq.ROUTING_ID, b"\x01" + secrets.token_bytes(15))
        if pair is not None:
            secure_client(each, pair, server)
        monitor = each.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )
        each.connect(address)
        made.append((context, each))
        return each, monitor

    yield make
    for context, each in made:
        each.disable_monitor()
        each.close()
        context.term()


def greets(each):
    each.send(protocol.encode(protocol.Hello(1, "somebody")))
    assert each.poll(WAIT_MS)
    assert isinstance(protocol.decode_to_client(each.recv()), protocol.Welcome)


def ends(monitor):
    """The connection ends without ever having been one."""
    assert monitor.poll(WAIT_MS), "the connection stands"
    return zmq.Event(recv_monitor_message(monitor)["event"])


def test_what_was_recorded_is_nothing_when_it_is_sent_again(cluster, secured, proxy, dealer):
    key, pair, _ = secured
    honest, _ = dealer(proxy.url, pair, key.public)
    greets(honest)
    request = protocol.Request(1, "echo", None, "paid once")
    honest.send(protocol.encode(protocol.Submit(0, [request])))
    assert honest.poll(WAIT_MS)
    assert b"paid once" in honest.recv()
    assert b"paid once" not in proxy.recorded
    before = cluster.status()
    host, port = cluster.shard.frontend.removeprefix("tcp://").split(":")
    for said in (bytes(proxy.recorded), bytes(proxy.recorded[64:]), bytes(proxy.recorded) * 2):
        with socket.create_connection((host, int(port))) as replay:
            replay.sendall(said)
            replay.settimeout(WAIT)
            answered = 0
            while piece := _received(replay):
                answered += len(piece)
            assert answered < 1000  # a greeting, and at most a half of the handshake
    after = cluster.status()
    assert (after.submitted, after.clients) == (before.submitted, before.clients)


def _received(connection):
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""


def test_nothing_is_taken_over_a_connection_on_which_a_bit_was_changed(cluster, secured, proxy, dealer):
    """libzmq reads no further; the peer falls silent and is forgotten."""
    key, pair, file = secured
    honest, _ = dealer(proxy.url, pair, key.public)
    greets(honest)
    before = cluster.status()
    proxy.change = lambda piece: piece[:-3] + bytes([piece[-3] ^ 1]) + piece[-2:]
    passed = len(proxy.recorded)
    for text in ("changed", "behind it"):
        honest.send(protocol.encode(protocol.Submit(0, [protocol.Request(1, "echo", None, text)])))
        eventually(lambda so_far=passed: len(proxy.recorded) > so_far, "it went to the shard")
        proxy.change = lambda piece: piece
        passed = len(proxy.recorded)
    with laxity.Client(cluster.shard.frontend, key=file) as other:
        for number in range(5):
            assert other.infer("echo", number, slo=30.0) == number
    assert cluster.status().submitted == before.submitted + 5
    assert not honest.poll(0)


def test_who_changes_the_handshake_prevents_it(secured, proxy, dealer):
    key, pair, _ = secured
    proxy.change = lambda piece: piece if len(piece) < 100 else piece[:-3] + bytes([piece[-3] ^ 1]) + piece[-2:]
    _, monitor = dealer(proxy.url, pair, key.public)
    assert ends(monitor) is not None


def test_who_pretends_that_there_are_no_keys_is_believed_by_nobody(cluster, secured, dealer, make_peer):
    """A peer without CURVE is not let in, and one in the shard's place that knows no CURVE gets no request."""
    _, _, file = secured
    _, monitor = dealer(cluster.shard.frontend)
    assert ends(monitor) in (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.HANDSHAKE_FAILED_NO_DETAIL)
    between = make_peer()
    with laxity.Client(between.url, key=file) as client, pytest.raises(laxity.Unavailable):
        client.infer("echo", "secret", slo=0.5)
    assert not between.waits(0)


def test_garbage_at_the_ports(cluster, secured):
    greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01CURVE" + bytes(47)
    before = cluster.status()
    held = []
    for address in (cluster.shard.frontend, cluster.shard.backend):
        host, port = address.removeprefix("tcp://").split(":")
        for said in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            greeting[:11],
            greeting,
            greeting + b"\x04\xc8\x05HELLO" + bytes(194),
            greeting + b"\x04\xc8\x05HELLO" + secrets.token_bytes(194),
            greeting + b"\x06" + b"\xff" * 8,
            greeting + b"\x04\x09\x08INITIATE",
            greeting + b"\x00\x05hello",
        ):
            held.append(socket.create_connection((host, int(port))))
            held[-1].sendall(said)
    client = laxity.Client(cluster.shard.frontend, key=secured[2])
    with client:
        assert client.infer("echo", "meanwhile", slo=30.0) == "meanwhile"
    eventually(lambda: cluster.status().clients == before.clients, "only who was there is there")
    for connection in held:
        connection.close()
