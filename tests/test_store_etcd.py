"""The store on etcd, where things go wrong."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from etcd3aio._protobuf import CompactionRequest, KVStub, MaintenanceStub, StatusRequest

from cluster.certificates import make_certificates
from cluster.election import Election, NotLeaderError
from cluster.membership import Follower, Membership
from cluster.store import open_store
from cluster.store.base import CompactedError, Event, Put, Store, StoreError, Watch
from cluster.store.etcd import EtcdStore
from cluster.store.etcd_address import parse_address, read_tls

WAIT = 30.0
"""How long a test waits for what must come, in seconds; a test that runs into it fails."""
HALF_OPEN = 1.0
"""A store's timeout where it is to find that nobody answers, in seconds."""


def eventually(condition: Callable[[], bool], what: str) -> None:
    pause = threading.Event()
    ends = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < ends, f"{what}: not within {WAIT:g} s"
        pause.wait(0.01)


@pytest.fixture
def three(make_etcd: Callable[[int], Any]) -> Any:
    """An etcd of three members."""
    return make_etcd(3)


@pytest.fixture
def plain(plain_etcd: str) -> Iterator[Store]:
    store = open_store(plain_etcd)
    yield store
    store.close()


def channels(url: str) -> list[grpc.Channel]:
    address = parse_address(url)
    tls = read_tls(address)
    if tls is None:
        return [grpc.insecure_channel(endpoint) for endpoint in address.endpoints]
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
    return [grpc.secure_channel(endpoint, credentials) for endpoint in address.endpoints]


def leader_of(etcd: Any) -> str:
    """The name of the member that leads."""
    found: list[str] = []

    def look() -> bool:
        for name, channel in zip(etcd.names, channels(etcd.url), strict=True):
            with channel:
                status = MaintenanceStub(channel).Status(StatusRequest(), timeout=WAIT)
                if status.leader == status.header.member_id:
                    found.append(name)
        return bool(found)

    eventually(look, "a member leads")
    return found[0]


def compact(url: str, revision: int) -> None:
    channel = channels(url)[0]
    with channel:
        KVStub(channel).Compact(CompactionRequest(revision=revision), timeout=WAIT)


def write(store: Store, key: str, value: bytes) -> None:
    """Write, again where the store cannot say whether it did."""

    def done() -> bool:
        try:
            store.put(key, value)
        except StoreError:
            return False
        return True

    eventually(done, f"{key} can be written")


def read_until(watch: Watch, value: bytes) -> list[Event]:
    """The events up to the first one that sets this value."""
    events: list[Event] = []
    while not any(event.entry and event.entry.value == value for event in events):
        got = watch.get(WAIT)
        assert got, f"{events} and no more"
        events += got
    return events


def follow_until(follower: Follower, condition: Callable[[], bool]) -> None:
    def holds() -> bool:
        follower.poll(0.05)
        return condition()

    eventually(holds, "the follower sees it")


def values(follower: Follower) -> dict[str, bytes]:
    return {key: entry.value for key, entry in follower.entries.items()}


# ---- addresses and files -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("etcd://", "no host:port"),
        ("etcd://host", "no host:port"),
        ("etcd://a:1,,b:2", "no host:port"),
        ("etcd://a:1/path", "no host:port"),
        ("etcd://::1:2379", "no host:port"),
        ("etcd://host:", "no port from 1 to 65535"),
        ("etcd://host:70000", "no port from 1 to 65535"),
        ("etcd://host:http", "no port from 1 to 65535"),
        ("etcd://me:secret@host:2379", "names a user"),
        ("etcd://host:2379?ca=/a&token=1", "unknown parameter 'token'"),
        ("etcd://host:2379?ca=/a&ca=/b", "must have one value"),
        ("etcd://host:2379?ca=", "must have one value"),
        ("etcd://host:2379?ca=ca.pem", "no absolute path"),
        ("etcd://host:2379?ca=/a&cert=/b", "half a key pair; add key="),
        ("etcd://host:2379?ca=/a&key=/b", "half a key pair; add cert="),
        ("etcd://host:2379?cert=/a&key=/b", "names no CA"),
        ("etcd://host:2379?server_name=etcd", "names no CA"),
        ("etcd://host:2379?ca=/no/such/file.pem", "file.pem cannot be read: No such file"),
    ],
)
def test_an_address_that_is_wrong_says_how(url: str, says: str) -> None:
    with pytest.raises(StoreError, match=says):
        open_store(url)


def test_an_address_is_written_as_it_is_read() -> None:
    url = "etcd://10.0.0.1:2379,[::1]:2380,name.of.host:1?ca=/a%20b/c%26%3F+.pem&cert=/x&key=/y&server_name=etcd"
    address = parse_address(url)
    assert address.endpoints == ("10.0.0.1:2379", "[::1]:2380", "name.of.host:1")
    assert address.ca == Path("/a b/c&?+.pem")
    assert address.server_name == "etcd"
    assert parse_address(address.url) == address
    assert parse_address("etcd://a:1/").url == "etcd://a:1"


def test_files_that_are_not_what_they_should_be_say_so(tmp_path: Path) -> None:
    good, other = (make_certificates(tmp_path / name, ["127.0.0.1"]) for name in ("good", "other"))
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nothing")
    with pytest.raises(StoreError, match="holds no certificate"):
        open_store(f"etcd://127.0.0.1:1?ca={nonsense}")
    with pytest.raises(StoreError, match="are no certificate and its key"):
        open_store(f"etcd://127.0.0.1:1?ca={good.ca}&cert={good.client_cert}&key={other.client_key}")
    with pytest.raises(StoreError, match="cannot be read: Is a directory"):
        open_store(f"etcd://127.0.0.1:1?ca={good.ca}&cert={tmp_path}&key={good.client_key}")
    good.client_key.chmod(0o640)
    with pytest.raises(StoreError, match=r"can be read by others \(mode 0640\).*chmod 600"):
        open_store(f"etcd://127.0.0.1:1?ca={good.ca}&cert={good.client_cert}&key={good.client_key}")


def test_without_its_packages_it_says_what_to_install() -> None:
    script = (
        "import sys\n"
        "sys.modules['etcd3aio'] = None\n"
        "from cluster.store import open_store\n"
        "try:\n"
        "    open_store('etcd://127.0.0.1:1')\n"
        "except Exception as error:\n"
        "    print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'laxity[etcd]'" in ended.stdout


# ---- opening -----------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never says anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def test_where_nobody_listens_it_says_so(nobody: str) -> None:
    with pytest.raises(StoreError, match=rf"etcd at {nobody},{nobody} cannot be reached: nothing listens there"):
        open_store(f"etcd://{nobody},{nobody}")
    with pytest.raises(StoreError, match="the name is not known"):
        open_store("etcd://no.such.host.invalid:2379")


def test_where_nobody_answers_it_gives_up(silent: str) -> None:
    with pytest.raises(StoreError, match="cannot be reached: it does not answer"):
        EtcdStore(parse_address(f"etcd://{silent}"), timeout=HALF_OPEN)


def test_members_that_are_away_are_passed_over(plain_etcd: str, nobody: str, silent: str) -> None:
    member = parse_address(plain_etcd).endpoints[0]
    for _ in range(4):  # it begins with any of them
        with closing(open_store(f"etcd://{nobody},{silent},{member}")) as store:
            revision = store.put("/here", b"")
            assert [event.revision for event in store.watch("/here", revision).get(WAIT)] == [revision]


def test_wrong_certificates_say_so(etcd: Any, plain_etcd: str, tmp_path: Path) -> None:
    address = parse_address(etcd.url)
    others = make_certificates(tmp_path, ["127.0.0.1"])
    hosts = ",".join(address.endpoints)
    pair = f"cert={address.cert}&key={address.key}"
    wrong = {
        f"etcd://{hosts}?ca={others.ca}&{pair}": "was not issued by the CA given",
        f"etcd://{hosts}?ca={address.ca}&cert={others.client_cert}&key={others.client_key}": "cannot be reached",
        f"etcd://{hosts}?ca={address.ca}": "cannot be reached",
        f"etcd://{hosts}": "whether it demands TLS",
        f"etcd://{hosts}?ca={address.ca}&{pair}&server_name=another.name": "for another name",
        f"{plain_etcd}?ca={address.ca}&{pair}": "whether it speaks TLS at all|does not speak TLS",
    }
    for url, says in wrong.items():
        with pytest.raises(StoreError, match=says):
            open_store(url)
    open_store(f"etcd://{hosts}?ca={address.ca}&{pair}&server_name=localhost").close()


def test_a_child_may_not_use_the_store_of_its_parent(plain_etcd: str) -> None:
    script = (
        "import os, sys\n"
        "from cluster.store import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try:\n"
        "        store.put('/a', b'')\n"
        "    except Exception as error:\n"
        "        print(error, flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, plain_etcd], capture_output=True, text=True, check=True)
    assert "opened by the parent process" in ended.stdout


def test_what_is_too_large_says_what_to_do_and_harms_nothing(plain: Store) -> None:
    with pytest.raises(StoreError, match="--max-request-bytes"):
        plain.put("/big", bytes(3_000_000))
    with pytest.raises(StoreError, match="--max-txn-ops"):
        plain.transaction([], [Put(f"/many/{number}", b"") for number in range(200)])
    assert plain.list("/many/").entries == []
    plain.put("/big", b"small")


def test_members_of_ones_own_take_large_transactions(etcd: Any) -> None:
    with closing(open_store(etcd.url)) as store:
        store.transaction([], [Put(f"/many/{number:04}", bytes(5000)) for number in range(1000)])
        listing = store.list("/many/")
        assert len(listing.entries) == 1000
        watch = store.watch("/many/", listing.revision)
        assert len(watch.get(WAIT)) == 1000


# ---- members that die --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["a follower is killed", "the leader is killed", "the leader is frozen"])
def test_a_watch_loses_and_repeats_nothing_while_members_come_and_go(three: Any, how: str) -> None:
    with closing(open_store(three.url)) as store:
        start = store.list("/").revision + 1
        prefixes = ("/a/", "/b/")
        watches = [store.watch(prefixes, start) for _ in range(4)]
        leader = leader_of(three)
        name = leader if "leader" in how else next(name for name in three.names if name != leader)
        for number in range(40):
            if number == 10 and "killed" in how:
                three.kill(name)
            elif number == 10:
                three.freeze(name)
            write(store, f"{prefixes[number % 2]}{number}", b"%d" % number)
        if "frozen" in how:
            three.release(name)
        three.start()
        for prefix in prefixes:
            write(store, prefix + "end", prefix.encode())
        history = read_until(store.watch("/a/", start), b"/a/") + read_until(store.watch("/b/", start), b"/b/")
        assert {f"/a/{number}" for number in range(0, 40, 2)} < {event.key for event in history}
        for watch in watches:
            events: list[Event] = []
            while len(events) < len(history):
                got = watch.get(WAIT)
                assert got, f"{len(events)} of {len(history)} events"
                events += got
            seen = [[event for event in events if event.key.startswith(prefix)] for prefix in prefixes]
            assert seen[0] + seen[1] == history


def test_no_write_that_was_confirmed_is_lost_with_the_leader(three: Any) -> None:
    with closing(open_store(three.url)) as store:
        confirmed = []
        for number in range(30):
            if number == 10:
                three.kill(leader_of(three))
            with suppress(StoreError):
                store.put(f"/{number}", b"")
                confirmed.append(f"/{number}")
        assert len(confirmed) > 10
        assert set(confirmed) <= {entry.key for entry in store.list("/").entries}


def test_without_a_majority_it_says_so_and_it_goes_on_with_one(three: Any) -> None:
    with closing(EtcdStore(parse_address(three.url), timeout=HALF_OPEN)) as store:
        store.put("/a", b"1")
        three.kill(*three.names[:2])
        for call in (lambda: store.put("/a", b"2"), lambda: store.get("/a"), lambda: store.keep_alive(1)):
            with pytest.raises(StoreError, match="etcd at"):
                call()
        three.start()
        write(store, "/a", b"3")


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_follower_keeps_what_it_knows_through_an_outage_and_catches_up(three: Any, how: str) -> None:
    with closing(open_store(three.url)) as store:
        store.put("/c/stays", b"1")
        store.put("/c/goes", b"1")
        follower = Follower(store, ("/c/", "/d/"))
        follow_until(follower, lambda: len(follower.entries) == 2)
        assert follower.away_since is None
        contact = follower.last_contact
        follow_until(follower, lambda: follower.last_contact > contact)
        if how == "killed":
            three.kill(*three.names)
        else:
            three.freeze(*three.names)
        follow_until(follower, lambda: follower.away_since is not None)
        assert follower.away_since == follower.last_contact
        assert values(follower) == {"/c/stays": b"1", "/c/goes": b"1"}
        if how == "killed":
            three.start()
        else:
            three.release(*three.names)
        with closing(open_store(three.url)) as another:
            write(another, "/d/new", b"2")
            another.delete("/c/goes")
        follow_until(follower, lambda: values(follower) == {"/c/stays": b"1", "/d/new": b"2"})
        assert follower.away_since is None
        follower.close()


def test_closing_waits_for_nobody_who_is_frozen(make_etcd: Callable[[int], Any]) -> None:
    etcd = make_etcd(1)
    store = open_store(etcd.url)
    watch = store.watch("/", 1)
    etcd.freeze(*etcd.names)
    calls = []

    def call() -> None:
        try:
            store.put("/a", b"")
        except StoreError as error:
            calls.append(str(error))

    waiting = [threading.Thread(target=call), threading.Thread(target=lambda: calls.append(str(watch.get())))]
    for thread in waiting:
        thread.start()
    store.close()
    for thread in waiting:
        thread.join(WAIT)
    assert sorted(calls) == ["[]", "this store has been closed"]


# ---- compaction, and connections that carry nothing ------------------------------------------


class Relay:
    """Carries connections to a server, until it is told to hold what they carry, or to break them off."""

    def __init__(self, server: str) -> None:
        host, _, port = server.partition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._flows = threading.Event()
        self._flows.set()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._server)
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def hold(self) -> None:
        self._flows.clear()

    def break_off(self) -> None:
        """End the connections with what they hold; new ones are carried."""
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open.clear()
        self._flows.set()

    def close(self) -> None:
        self._listener.close()
        self.break_off()


@pytest.fixture
def relay(plain_etcd: str) -> Iterator[Relay]:
    made = Relay(parse_address(plain_etcd).endpoints[0])
    yield made
    made.close()


def test_a_revision_that_is_no_longer_kept_is_refused(plain: Store, plain_etcd: str) -> None:
    old = plain.put("/w/a", b"1")
    new = plain.put("/w/a", b"2")
    compact(plain_etcd, new)
    with pytest.raises(CompactedError, match="list again"):
        plain.watch(("/other/", "/w/"), old).get(WAIT)
    assert [event.revision for event in plain.watch("/w/", new).get(WAIT)] == [new]


def test_a_follower_cut_off_while_the_store_is_compacted_lists_again(
    plain: Store, plain_etcd: str, relay: Relay
) -> None:
    for key in ("/f/stays", "/f/goes"):
        plain.put(key, b"1")
    with closing(open_store(f"etcd://{relay.endpoint}")) as store:
        follower = Follower(store, "/f/")
        follow_until(follower, lambda: len(follower.entries) == 2)
        relay.hold()
        plain.delete("/f/goes")
        plain.put("/f/brief", b"")
        plain.delete("/f/brief")
        compact(plain_etcd, plain.put("/f/new", b"2"))
        plain.put("/f/stays", b"3")
        relay.break_off()
        follow_until(follower, lambda: values(follower) == {"/f/stays": b"3", "/f/new": b"2"})
        follower.close()


def test_a_watch_goes_on_where_its_connection_broke(plain: Store, relay: Relay) -> None:
    with closing(open_store(f"etcd://{relay.endpoint}")) as store:
        watch = store.watch("/g/", plain.list("/").revision + 1)
        revisions = []
        for number in range(6):
            revisions.append(plain.put("/g/a", b"%d" % number))
            if number % 2:
                assert [event.revision for event in read_until(watch, b"%d" % number)] == revisions[-2:]
            else:
                relay.break_off()
        watch.close()


def test_a_connection_that_carries_nothing_is_given_up(plain: Store, plain_etcd: str, relay: Relay) -> None:
    direct = parse_address(plain_etcd).endpoints[0]
    with closing(open_store(f"etcd://{relay.endpoint},{direct}")) as store:
        watches = [store.watch("/h/", plain.list("/").revision + 1) for _ in range(4)]
        revision = plain.put("/h/a", b"1")
        for watch in watches:
            assert [event.revision for event in watch.get(WAIT)] == [revision]
        relay.hold()
        revision = plain.put("/h/a", b"2")
        for watch in watches:
            assert [event.revision for event in watch.get(WAIT)] == [revision]
        assert store.get("/h/a") == plain.get("/h/a")


# ---- leases, members, leaders ------------------------------------------------------------------


def test_a_lease_that_nobody_keeps_alive_ends(plain: Store) -> None:
    kept, left = plain.grant_lease(20.0), plain.grant_lease(0.2)
    start = plain.put("/l/left", b"", left)
    plain.put("/l/kept", b"", kept)
    watch = plain.watch("/l/", start + 2)
    events: list[Event] = []

    def ended() -> bool:
        assert plain.keep_alive(kept)
        events.extend(watch.get(0.1))
        return bool(events)

    eventually(ended, "the lease ends")
    assert [(event.key, event.entry) for event in events] == [("/l/left", None)]
    assert not plain.keep_alive(left)
    assert plain.get("/l/kept") is not None


def test_who_starts_again_under_a_name_takes_its_record_over(plain: Store) -> None:
    key = "/laxity/c/nodes/a"
    killed = Membership(plain, key, ttl=1.0)
    killed.publish(b"killed")
    killed.beat(time.monotonic())
    again = Membership(plain, key, ttl=20.0)
    again.publish(b"again")
    again.beat(time.monotonic())
    entry = plain.get(key)
    assert entry is not None
    assert entry.value == b"again"
    lease = plain.grant_lease(1.0)
    plain.put("/m/other", b"", lease)  # it ends after the one of the killed member

    def ended() -> bool:
        again.beat(time.monotonic())
        return plain.get("/m/other") is None

    eventually(ended, "the killed member's lease ends")
    assert plain.get(key) == entry
    again.leave()
    assert plain.get(key) is None


def test_a_member_is_there_again_after_an_outage(make_etcd: Callable[[int], Any]) -> None:
    etcd = make_etcd(1)
    key = "/laxity/c/nodes/a"
    with closing(open_store(etcd.url)) as store:
        member = Membership(store, key, ttl=1.0)
        member.publish(b"here")
        member.beat(time.monotonic())
        etcd.kill(*etcd.names)
        member.beat(time.monotonic() + 10)
        etcd.start()
        eventually(lambda: gone(store, key), "the record is gone")
        member.beat(time.monotonic() + 20)
        entry = store.get(key)
        assert entry is not None
        assert entry.value == b"here"


def gone(store: Store, key: str) -> bool:
    with suppress(StoreError):
        return store.get(key) is None
    return False


def test_another_leads_when_the_leader_is_killed_and_the_old_one_can_write_nothing(etcd: Any) -> None:
    key = "/laxity/election/leader"
    with closing(open_store(etcd.url)) as one, closing(open_store(etcd.url)) as other:
        old, new = Election(one, key, b"old", ttl=2.0), Election(other, key, b"new", ttl=2.0)
        frozen = time.monotonic()
        old.beat(frozen)
        assert old.transaction(frozen, [], [Put("/laxity/election/plan", b"old")]) is not None

        def elected() -> bool:
            new.beat(time.monotonic())
            return new.is_leader(time.monotonic())

        eventually(elected, "another leads")
        assert not old.is_leader(time.monotonic())
        # Released, it goes on with the time that it read before.
        assert old.is_leader(frozen)
        with pytest.raises(NotLeaderError):
            old.transaction(frozen, [], [Put("/laxity/election/plan", b"too late")])
        assert new.transaction(time.monotonic(), [], [Put("/laxity/election/plan", b"new")]) is not None
        new.resign()
        old.beat(time.monotonic())
        assert old.is_leader(time.monotonic())
        old.resign()


def test_a_leader_goes_on_leading_when_the_leading_member_is_killed(three: Any) -> None:
    with closing(open_store(three.url)) as store:
        leader = Election(store, "/laxity/c/leader", b"a", ttl=10.0)
        leader.beat(time.monotonic())
        term = store.get("/laxity/c/leader")
        three.kill(leader_of(three))

        def writes() -> bool:
            leader.beat(time.monotonic())
            try:
                return leader.transaction(time.monotonic(), [], [Put("/plan", b"")]) is not None
            except (StoreError, NotLeaderError):
                return False

        eventually(writes, "the leader writes")
        assert store.get("/laxity/c/leader") == term
