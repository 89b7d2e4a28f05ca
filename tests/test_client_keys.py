"""Clients and shards that know each other by keys: real CURVE handshakes, with a peer that decides who is let in."""

from __future__ import annotations

import threading

import msgspec
import pytest
import zmq

import laxity
from laxity import protocol
from laxity.credentials import PLAIN, Credentials, NoWay
from laxity.curve import PlainRefused, ServerKeys, is_local, secure_server
from laxity.files import FileClient, TransferError
from laxity.keys import InvalidKey, KeyFile, KeyPair, Role, ServerKey, new_pair, read_own_key, write_key_file
from tests.conftest import Peer

REFUSED = "the shard refused this key: it is unknown, revoked or expired there, or of another role"


class Door:
    """Answers the handshakes of a context with one status after the other, the last one for ever."""

    def __init__(self, context, *statuses: bytes) -> None:
        self.users: list[bytes] = []
        self._statuses = list(statuses)
        self._socket = context.socket(zmq.REP)
        self._socket.bind("inproc://zeromq.zap.01")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._socket as socket:
            while not self._stop.is_set():
                if socket.poll(20):
                    version, request, *_, key = socket.recv_multipart()
                    self.users.append(key)
                    status = self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]
                    socket.send_multipart([version, request, status, b"", b"user", b""])

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class SecurePeer(Peer):
    """A peer with a key, or several instances of one at the same address, one after the other."""

    def __init__(self, pair: KeyPair, address: str = "tcp://127.0.0.1:*", statuses: tuple[bytes, ...] = (b"200",)):
        self._pair = pair
        self._statuses = statuses
        super().__init__(address)

    def _prepare(self) -> None:
        self.door = Door(self._context, *self._statuses)
        secure_server(self._router, self._pair, "frontend")

    def close(self) -> None:
        self.door.close()
        super().close()


@pytest.fixture
def make_secure():
    peers: list[SecurePeer] = []

    def make(*arguments, **options) -> SecurePeer:
        peers.append(SecurePeer(*arguments, **options))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


def key_file(*servers: ServerKey, role: Role = "client", name: str = "billing") -> KeyFile:
    pair = new_pair()
    return KeyFile(cluster="local", name=name, role=role, public=pair.public, secret=pair.secret, servers=list(servers))


def trouble(client: laxity.Client) -> str:
    with pytest.raises(laxity.Unavailable) as caught:
        client.infer("echo", 1, slo=0.3)
    return str(caught.value)


def welcome(peer: Peer, name: str, *shards: ServerKey, **options):
    told = {"shards": [(s.shard, s.address) for s in shards], "keys": [s.publics for s in shards]}
    return peer.welcome(shard=name, **told, **options)


# ---- clients -------------------------------------------------------------------------------------


def test_a_request_goes_through_an_encrypted_connection_and_the_shard_sees_the_key(make_secure):
    pair = new_pair()
    peer = make_secure(pair)
    key = key_file(ServerKey("s0", peer.url, [pair.public]))
    with laxity.Client(peer.url, key=key) as client:
        sender, _ = peer.welcome(shard="s0")
        future = client.submit("echo", "secret")
        request = peer.request()
        assert request.value == "secret"
        peer.answer(request, "answer")
        assert future.result(20) == "answer"
    assert zmq.utils.z85.encode(peer.door.users[0]).decode() == key.public
    assert len(sender) == 16


def test_plain_connections_have_names_that_nobody_can_guess_as_well(make_peer):
    peer = make_peer()
    with laxity.Client(peer.url, key="") as client:
        first, _ = peer.welcome()
        peer.send(first, protocol.Goodbye("again", retry=False))
        second, _ = peer.welcome()
        client.wait_ready(20)
    assert len(first) == len(second) == 16
    assert first != second


def test_the_keys_of_a_shard_at_an_unknown_address_are_tried_in_turn(make_secure):
    """As for a name that leads to any of them; and while a key is replaced."""
    pairs = [new_pair() for _ in range(4)]
    peer = make_secure(pairs[3])
    known = [
        ServerKey("s0", "tcp://10.0.0.1:7100", [pairs[0].public]),
        ServerKey("s1", "", [pairs[1].public, pairs[2].public, pairs[3].public]),
    ]
    with laxity.Client(peer.url, key=key_file(*known)) as client:
        peer.welcome(shard="s1")
        client.wait_ready(20)


def test_a_shard_tells_of_the_others_keys(make_secure):
    pairs = [new_pair(), new_pair()]
    home, other = make_secure(pairs[0]), make_secure(pairs[1])
    servers = [ServerKey("s0", home.url, [pairs[0].public]), ServerKey("s1", other.url, [pairs[1].public])]
    with laxity.Client(home.url, key=key_file(servers[0])) as client:
        table = {"revision": 1, "routes": [("p", [(1, 1.0)])], "pipelines": [("p", 30_000_000)]}
        welcome(home, "s0", *servers, **table)
        future = client.submit("p", 1)
        welcome(other, "s1", *servers, **table)
        other.answer(other.request(), 2)
        assert future.result(20) == 2


def test_a_shard_that_is_known_to_be_plain_is_not_connected_to_with_a_key(make_secure, make_peer):
    pair = new_pair()
    home, plain = make_secure(pair), make_peer()
    servers = [ServerKey("s0", home.url, [pair.public]), ServerKey("s1", plain.url, [])]
    table = {"revision": 1, "routes": [("p", [(1, 1.0)])], "pipelines": [("p", 30_000_000)]}
    with laxity.Client(home.url, key=key_file(servers[0]), plain=False) as client:
        welcome(home, "s0", *servers, **table)
        client.wait_ready(20)
        with pytest.raises(laxity.Unavailable, match="serves in plain text, to which no connection is made with a key"):
            client.infer("p", 1, slo=0.3)
        assert plain.quiet()
    home.passes_over += (protocol.Goodbye,)
    with laxity.Client(home.url, key=key_file(servers[0]), plain=True) as client:
        welcome(home, "s0", *servers, **table)
        future = client.submit("p", 1)
        welcome(plain, "s1", *servers, **table)
        plain.answer(plain.request(), 2)
        assert future.result(20) == 2


def test_a_shard_with_another_key_than_the_file_knows(make_secure):
    peer = make_secure(new_pair())
    key = key_file(ServerKey("s0", peer.url, [new_pair().public]))
    with laxity.Client(peer.url, key=key) as client:
        said = trouble(client)
    assert "it is not the shard that the key file knows (its key was replaced: get a new key file)" in said
    assert not peer.door.users  # it proved nothing to a stranger


def test_a_key_that_the_shard_does_not_let_in_ends_requests_at_once_and_may_be_let_in_later(make_secure):
    pair = new_pair()
    peer = make_secure(pair, statuses=(b"400", b"200"))
    with laxity.Client(peer.url, key=key_file(ServerKey("s0", peer.url, [pair.public]))) as client:
        with pytest.raises(laxity.Unavailable) as caught:
            client.infer("echo", 1, slo=60.0)  # it is not waited for so long
        assert REFUSED in str(caught.value)
        peer.welcome(shard="s0")
        client.wait_ready(20)


def test_a_shard_that_does_not_know_yet_who_is_let_in_is_waited_for(make_secure):
    pair = new_pair()
    peer = make_secure(pair, statuses=(b"500", b"500", b"200"))
    with laxity.Client(peer.url, key=key_file(ServerKey("s0", peer.url, [pair.public]))) as client:
        future = client.submit("echo", 1, slo=60.0)
        peer.welcome(shard="s0")
        peer.answer(peer.request(), 2)
        assert future.result(20) == 2


def test_a_client_without_a_key_is_told_that_the_shard_wants_one(make_secure):
    peer = make_secure(new_pair())
    with laxity.Client(peer.url, key="") as client:
        assert "it wants a key" in trouble(client)
        with pytest.raises(laxity.Unavailable, match="it wants a key"):
            client.wait_ready(0.2)


def test_a_client_with_a_key_takes_no_plain_shard(make_peer):
    peer = make_peer()
    key = key_file(ServerKey("s0", peer.url, [new_pair().public]))
    with laxity.Client(peer.url, key=key) as client, pytest.raises(laxity.Unavailable, match="serves in plain text"):
        client.infer("echo", 1, slo=60.0)
    elsewhere = key_file(ServerKey("s0", "tcp://10.0.0.1:7100", [new_pair().public]))
    with laxity.Client(peer.url, key=elsewhere, plain=True) as client:  # of this address no key is known
        peer.welcome()
        client.wait_ready(20)


def test_a_key_that_knows_no_shard(make_peer):
    peer = make_peer()
    with laxity.Client(peer.url, key=key_file()) as client:
        assert "no shard's key is known" in trouble(client)


@pytest.mark.parametrize("url", ["tcp://10.0.0.7:7100", "tcp://127.0.0.1:7100,tcp://shard.example:7100"])
def test_an_address_of_another_host_needs_a_key_or_to_be_asked_for(url, monkeypatch):
    monkeypatch.delenv("LAXITY_KEY", raising=False)
    with pytest.raises(ValueError, match="over the network, which needs a key: make one with `laxity keys new`"):
        laxity.Client(url)
    with pytest.raises(PlainRefused):
        laxity.AsyncClient(url)
    laxity.Client(url, plain=True).close()
    monkeypatch.setenv("LAXITY_PLAIN", "1")
    laxity.Client(url).close()
    laxity.Client(url, key=key_file()).close()


def test_an_address_that_a_shard_tells_of_needs_a_key_as_well(make_peer):
    peer = make_peer()
    with laxity.Client(peer.url, key="") as client:
        peer.welcome(
            shard="s0",
            shards=[("s0", peer.url), ("s1", "tcp://10.255.255.1:9")],
            routes=[("p", [(1, 1.0)])],
            revision=1,
            pipelines=[("p", 30_000_000)],
        )
        with pytest.raises(laxity.Unavailable, match=r"10\.255\.255\.1:9 over the network, which needs a key"):
            client.infer("p", 1, slo=0.3)


def test_the_environment_names_the_key_and_an_empty_one_is_none(make_secure, make_peer, tmp_path, monkeypatch):
    pair = new_pair()
    peer, plain = make_secure(pair), make_peer()
    path = tmp_path / "billing.key"
    write_key_file(path, key_file(ServerKey("s0", peer.url, [pair.public])))
    monkeypatch.setenv("LAXITY_KEY", str(path))
    with laxity.Client(peer.url) as client:
        peer.welcome(shard="s0")
        client.wait_ready(20)
    with laxity.Client(plain.url, key="") as client:
        plain.welcome()
        client.wait_ready(20)
    path.chmod(0o644)
    with pytest.raises(InvalidKey, match="can be read by others"):
        laxity.Client(peer.url)
    with pytest.raises(InvalidKey, match="cannot be read"):
        laxity.Client(peer.url, key=tmp_path / "none.key")


def test_a_key_file_that_was_replaced_is_read_again_when_a_connection_is_made(make_secure, tmp_path):
    """The shard comes back with its second key, of which the new file knows; the client runs on."""
    old, new = new_pair(), new_pair()
    first = make_secure(old)
    path = tmp_path / "billing.key"
    before = key_file(ServerKey("s0", first.url, [old.public]))
    write_key_file(path, before)
    with laxity.Client(first.url, key=str(path)) as client:
        first.welcome(shard="s0")
        client.wait_ready(20)
        first.close()
        second = make_secure(new, first.url)
        future = client.submit("echo", 1, slo=60.0)
        mine = new_pair()
        after = msgspec.structs.replace(
            before,
            public=mine.public,
            secret=mine.secret,
            servers=[ServerKey("s0", first.url, [new.public, old.public])],
        )
        write_key_file(path, after, replace=True)
        second.welcome(shard="s0")
        second.answer(second.request(), 2)
        assert future.result(20) == 2
        assert zmq.utils.z85.encode(second.door.users[-1]).decode() == mine.public


def test_a_shard_that_takes_its_second_key_is_found_by_what_it_had_told(make_secure):
    old, new = new_pair(), new_pair()
    first = make_secure(old)
    known = ServerKey("s0", first.url, [old.public])
    with laxity.Client(first.url, key=key_file(known)) as client:
        welcome(first, "s0", ServerKey("s0", first.url, [new.public, old.public]))
        client.wait_ready(20)
        first.close()
        second = make_secure(new, first.url)
        future = client.submit("echo", 1, slo=60.0)
        second.welcome(shard="s0")
        second.answer(second.request(), 2)
        assert future.result(20) == 2


# ---- files ---------------------------------------------------------------------------------------


def test_files_go_through_encrypted_connections(make_secure):
    wrong, pair = new_pair(), new_pair()
    peer = make_secure(pair)
    key = key_file(ServerKey("s0", "tcp://10.0.0.1:7100", [wrong.public]), ServerKey("s1", "", [pair.public]))
    with FileClient(peer.url, credentials=Credentials(key)) as client:
        chunks = client.fetch("0" * 64, 5)
        thread = threading.Thread(target=lambda: _give(peer))
        thread.start()
        assert b"".join(chunks) == b"hello"
        thread.join()


def _give(peer: Peer) -> None:
    sender, fetch, _ = peer.receive(protocol.Fetch)
    peer.send(sender, protocol.Chunk(fetch.digest, 0, 5), [b"hello"])


def test_files_do_not_come_from_strangers_nor_go_to_them(make_secure, make_peer):
    pair = new_pair()
    refusing, plain = make_secure(pair, statuses=(b"400",)), make_peer()
    key = key_file(ServerKey("s0", refusing.url, [pair.public]), ServerKey("s1", plain.url, [new_pair().public]))
    with pytest.raises(TransferError, match="the shard refused this key"):
        FileClient(refusing.url, credentials=Credentials(key))
    with pytest.raises(TransferError, match="serves in plain text"):
        FileClient(plain.url, credentials=Credentials(key))
    with pytest.raises(TransferError, match="it wants a key"):
        FileClient(refusing.url)
    with pytest.raises(TransferError, match="over the network, which needs a key"):
        FileClient("tcp://10.0.0.1:7100")
    stale = key_file(ServerKey("s0", refusing.url, [new_pair().public]))
    with pytest.raises(TransferError, match="it is not the shard that the key file knows"):
        FileClient(refusing.url, credentials=Credentials(stale))


# ---- which keys ----------------------------------------------------------------------------------


def test_which_keys_are_tried_at_an_address():
    servers = ServerKeys([ServerKey("s0", "tcp://a:1", ["0", "1"]), ServerKey("s1", "tcp://b:1", ["2"])])
    assert servers.candidates("tcp://a:1", "s0") == ["0", "1"]
    assert servers.candidates("tcp://b:1") == ["2", "0", "1"]  # whoever is there now
    assert servers.candidates("tcp://c:1") == ["0", "1", "2"]
    assert servers.candidates("tcp://c:1", "s1") == ["2"]
    assert servers.of("tcp://c:1") is None
    servers.learn(ServerKey("s1", "tcp://b:1", []))
    assert servers.of("tcp://b:1") == []


def test_what_is_no_key_is_not_learnt(caplog):
    good = new_pair().public
    credentials = Credentials(key_file(ServerKey("s0", "tcp://a:1", [good])))
    credentials.learn(ServerKey("s0", "tcp://a:1", ["nonsense"]))
    assert credentials.ways("tcp://a:1") == [good]
    assert "'nonsense' is no key" in caplog.text


def test_without_a_key_connections_are_plain_where_that_may_be(caplog):
    without = Credentials()
    assert without.ways("tcp://127.0.0.1:1") == without.ways("ipc:///tmp/x") == [PLAIN]
    with pytest.raises(PlainRefused):
        without.ways("tcp://10.0.0.1:1")
    asked = Credentials(plain=True)
    for _ in range(3):
        assert asked.ways("tcp://10.0.0.1:1") == [PLAIN]
    assert caplog.text.count("in plain text: anybody in the network can read and use it") == 1
    without.learn(ServerKey("s0", "tcp://127.0.0.1:1", [new_pair().public]))
    with pytest.raises(NoWay, match="it wants a key"):
        without.ways("tcp://127.0.0.1:1")


def test_a_key_file_that_is_damaged_meanwhile_changes_nothing(tmp_path, caplog):
    path = tmp_path / "k.key"
    key = key_file(ServerKey("s0", "tcp://a:1", [new_pair().public]))
    write_key_file(path, key)
    credentials = Credentials(path)
    path.write_text("{")
    credentials.refresh()
    credentials.refresh()
    assert caplog.text.count("is no key file") == 1
    assert credentials.pair == key.pair
    write_key_file(path, other := key_file(), replace=True)
    credentials.refresh()
    assert credentials.pair == other.pair
    path.unlink()
    credentials.refresh()
    assert credentials.pair == other.pair


def test_the_key_of_a_service_is_its_own(tmp_path):
    path = tmp_path / "k.key"
    write_key_file(path, key_file(role="node", name="n1"))
    assert read_own_key(path, "node", "n1").name == "n1"
    with pytest.raises(InvalidKey, match=r"is the key of 'n1' with role node: 'n2' needs its own; .* n2 --role node"):
        read_own_key(path, "node", "n2")
    with pytest.raises(InvalidKey, match="--role shard"):
        read_own_key(path, "shard", "n1")


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://localhost:1", True),
        ("ipc:///tmp/x", True),
        ("tcp://127.0.0.1.example:1", False),
        ("tcp://0.0.0.0:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://*:1", False),
    ],
)
def test_which_addresses_cannot_be_reached_from_elsewhere(address, local):
    assert is_local(address) is local
