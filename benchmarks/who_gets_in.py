"""Who gets into a cluster that `laxity up --secure` has started: who tried what, what the peer was told, and what the
shard's log said.

All of it is real: the processes, their store, keys that `laxity keys` makes, rotates and revokes; the SDK where it can
do what is tried, DEALERs and plain sockets where it cannot, as it does not cheat.

    python benchmarks/who_gets_in.py
    python benchmarks/who_gets_in.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from cluster.records import BrokerRecord, Paths, decode
from cluster.store import open_store, sqlite_url
from laxity import Client, LaxityError, protocol
from laxity.credentials import Credentials
from laxity.curve import secure_client
from laxity.files import FileClient, TransferError
from laxity.keys import KeyFile, new_pair, read_key_file
from laxity.payload import encode, pack
from laxity.protocol import Goodbye, Heartbeat, Hello, Ready, Request, Result, Submit, Tap

WAIT = 20.0
"""Seconds for what must happen."""
EVENTS = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "handshake failed",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "handshake failed",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "handshake refused",
    zmq.EVENT_DISCONNECTED: "cut",
}


class Row(NamedTuple):
    """One attempt."""

    who: str
    tried: str
    told: str
    log: str


class Dealer:
    """A peer that does what it is told."""

    def __init__(self, address: str, key: KeyFile, server: str, routing_id: bytes | None = None) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RECONNECT_IVL, 60_000)
        self.routing_id = b"\x01" + secrets.token_bytes(15) if routing_id is None else routing_id
        if self.routing_id:
            self.socket.set(zmq.ROUTING_ID, self.routing_id)
        secure_client(self.socket, key.pair, server)
        mask = 0
        for event in EVENTS:
            mask |= int(event)
        self._monitor = self.socket.get_monitor_socket(mask)
        self.socket.connect(address)

    def __enter__(self) -> Dealer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close()
        self._context.term()

    def send(self, message: protocol.Message, *frames: Any) -> Dealer:
        self.socket.send_multipart([protocol.encode(message), *frames])
        return self

    def receive(self) -> Any:
        assert self.socket.poll(int(WAIT * 1000)), "nothing came"
        return protocol.decode_to_client(self.socket.recv_multipart()[0])

    def told(self, beats: bool = False) -> str:
        """What it hears until it is cut; it ``beats`` meanwhile, so that it is not forgotten."""
        heard = []
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        ends = time.monotonic() + WAIT
        while time.monotonic() < ends:
            ready = dict(poller.poll(500))
            if beats and not ready:
                self.send(Heartbeat())
            if self.socket in ready:
                message = self.receive()
                if isinstance(message, Goodbye):
                    heard.append(f"GOODBYE: {message.reason}")
                elif isinstance(message, Result):
                    heard += [f"{answer.outcome.value}: {answer.detail}" for answer in message.answers]
            elif self._monitor in ready:
                return "; ".join([*heard, EVENTS[zmq.Event(recv_monitor_message(self._monitor)["event"])]])
        return "; ".join([*heard, "nothing more"])


class Cluster:
    """A cluster of one shard and one agent, and its people's keys in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("LAXITY_")}
        self._environment["XDG_RUNTIME_DIR"] = str(directory)
        up = json.loads(self.laxity("up", "echo", "--secure", "--detach", "--json"))
        try:
            self._look(up)
        except BaseException:
            self.laxity("down")
            raise

    def _look(self, up: dict[str, Any]) -> None:
        self.address: str = up["addresses"][0]
        self.operator = read_key_file(up["key"])
        self.server = self.operator.servers[0].publics[0]
        run = self.directory / "laxity" / "local"
        self._log = run / "logs" / "shard-0.log"
        with closing(open_store(sqlite_url(run / "store.db"))) as store:
            key = Paths("local").broker("shard-0")
            entry = store.get(key)
            assert entry is not None
            self.backend = decode(BrokerRecord, key, entry.value).backend
        self._read = 0

    def laxity(self, *arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "cli.main", *arguments]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"laxity {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def new(self, name: str, role: str, *limits: str) -> KeyFile:
        """A new key, once the shard lets it in."""
        path = self.directory / f"{name}.key"
        self.laxity("keys", "new", name, "--role", role, "-o", str(path), *limits)
        key = read_key_file(path)
        message, address = (Hello(protocol.VERSION, secrets.token_hex(8)), self.address)
        if role == "node":
            address = self.backend
        ends = time.monotonic() + WAIT
        while time.monotonic() < ends:
            with Dealer(address, key, self.server) as dealer:
                greeting = message if role != "node" else Ready(protocol.VERSION, name, [])
                dealer.send(greeting)
                if dealer.socket.poll(500):
                    dealer.send(Goodbye())
                    self.said(0.0)
                    return key
        raise SystemExit(f"key {name} is not let in")

    def said(self, wait: float = WAIT) -> str:
        """The refusals in the shard's log since the last call, which are waited for."""
        ends = time.monotonic() + wait
        while True:
            text = self._log.read_text()
            lines = [
                line.partition("laxity.broker: ")[2] for line in text[self._read :].splitlines() if "refused" in line
            ]
            if lines or time.monotonic() >= ends:
                self._read = len(text)
                return "; ".join(dict.fromkeys(lines)) or "-"
            time.sleep(0.05)


def submits(cluster: Cluster, key: KeyFile | str) -> str:
    """What the SDK tells of a request."""
    with Client(cluster.address, key=key) as client:
        try:
            return f"answered {client.infer('echo', 'hello', slo=1.0)!r}"
        except (LaxityError, ValueError) as error:
            return f"{type(error).__name__}: {error}"


def attempts(cluster: Cluster) -> Iterator[Row]:
    """One after the other."""
    address, backend, server = cluster.address, cluster.backend, cluster.server

    def row(who: str, tried: str, told: str, wait: float = WAIT) -> Row:
        return Row(who, tried, told, cluster.said(wait))

    billing, other = cluster.new("billing", "client"), cluster.new("other", "client")
    gpu_1, gpu_2 = cluster.new("gpu-1", "node"), cluster.new("gpu-2", "node")
    yield row("a client's key", "a request", submits(cluster, billing), 0.0)

    yield row("no key", "a request", submits(cluster, ""))
    pair = new_pair()
    unknown = KeyFile(
        cluster="local",
        name="nobody",
        role="client",
        public=pair.public,
        secret=pair.secret,
        servers=cluster.operator.servers,
    )
    yield row("unknown key", "a request", submits(cluster, unknown))
    with Dealer(address, billing, new_pair().public) as dealer:
        yield row("a key file with another shard's key", "to connect", dealer.told())
    gone = cluster.new("gone", "client")
    cluster.laxity("keys", "revoke", "gone", "--yes")
    time.sleep(1.0)  # the shard follows the store
    yield row("revoked key", "a request", submits(cluster, gone))
    with Dealer(address, cluster.new("leaving", "client"), server) as dealer:
        dealer.send(Hello(protocol.VERSION, secrets.token_hex(16))).receive()
        cluster.laxity("keys", "revoke", "leaving", "--yes")
        yield row("revoked key", "to stay connected", dealer.told(beats=True))
    rotated = cluster.new("rotated", "client")
    with Dealer(address, rotated, server) as dealer:
        dealer.send(Hello(protocol.VERSION, secrets.token_hex(16))).receive()
        cluster.laxity("keys", "rotate", "rotated", "--overlap", "1s", "-o", str(cluster.directory / "rotated.key"))
        yield row("a key that was replaced", "to stay connected beyond the overlap", dealer.told(beats=True))

    with Dealer(backend, billing, server) as dealer:
        yield row("a client's key", "to connect to the port for agents", dealer.send(Heartbeat()).told())
    with Dealer(address, gpu_1, server) as dealer:
        yield row("a node's key", "to submit requests", dealer.send(Hello(protocol.VERSION, "n")).told())
    try:
        with FileClient(address, credentials=Credentials(billing)) as files:
            list(files.fetch("0" * 64, 1))
        told = "got it"
    except TransferError as error:
        told = str(error)
    yield row("a client's key", "to fetch a pipeline's files", told)
    with Dealer(address, billing, server) as dealer:
        yield row("a client's key", "to record requests", dealer.send(Tap()).told())

    with Dealer(backend, gpu_2, server) as dealer:
        yield row("another node's key", "to be agent gpu-1", dealer.send(Ready(protocol.VERSION, "gpu-1", [])).told())
    name = secrets.token_hex(4)
    with Dealer(address, billing, server) as victim:
        victim.send(Hello(protocol.VERSION, name)).receive()
        with Dealer(address, other, server) as dealer:
            told = dealer.send(Hello(protocol.VERSION, name)).told()
            yield row("another client's key", "to be a service that is connected, by its name", told)
        with Dealer(address, other, server, victim.routing_id) as dealer:
            # The victim beats meanwhile: it must not fall silent.
            dealer.send(Hello(protocol.VERSION, "thief"))
            told = beating(victim, dealer)
            yield row("another client's key", "the same, by its routing id", told)
    with Dealer(address, other, server, b"") as dealer:
        told = dealer.send(Hello(protocol.VERSION, secrets.token_hex(4))).told()
        yield row("a client's key", "to connect with a routing id that can be guessed", told)

    host, _, port = address.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.settimeout(WAIT)
        began = time.monotonic()
        with suppress(ConnectionError):
            while slow.recv(1000):
                pass
        yield row(
            "slow loris", "to hold a connection without a handshake", f"cut after {time.monotonic() - began:.1f} s"
        )
    with socket.create_connection((host, int(port))) as stranger:
        stranger.settimeout(WAIT)
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: shard\r\n\r\n" * 10)
        with suppress(ConnectionError):
            while stranger.recv(1000):
                pass
        yield row("a web browser", "HTTP", "cut")

    limited = cluster.new("limited", "client", "--pipelines", "ocr", "--rate", "2")
    yield row("a key for pipeline ocr", "a request for echo", submits(cluster, limited), 0.0)
    cluster.laxity("keys", "limit", "limited", "--pipelines", "echo")
    time.sleep(1.0)
    with Dealer(address, limited, server) as dealer:
        dealer.send(Hello(protocol.VERSION, secrets.token_hex(16))).receive()
        told = submit_many(dealer, 5)
        yield row("a key with a rate of 2/s", "5 requests at once", told, 0.0)


def beating(victim: Dealer, thief: Dealer) -> str:
    """What the thief is told, while the victim beats."""
    poller = zmq.Poller()
    poller.register(thief._monitor, zmq.POLLIN)
    while not poller.poll(500):
        victim.send(Heartbeat())
    told = thief.told()
    victim.send(Heartbeat())
    while not isinstance(victim.receive(), Heartbeat):
        pass
    return f"nothing; {told}"


def submit_many(dealer: Dealer, count: int) -> str:
    """The outcomes of requests submitted together."""
    value = encode("x")
    requests = [Request(number, "echo", None, value.node) for number in range(count)]
    dealer.send(Submit(0, requests), *pack([value] * count))
    answers: list[protocol.Answer] = []
    while len(answers) < count:
        message = dealer.receive()
        if isinstance(message, Result):
            answers += message.answers
    good = sum(answer.outcome.value == "ok" for answer in answers)
    detail = next(answer.detail for answer in answers if answer.outcome.value == "rejected")
    return f"{good} ok, {count - good} rejected: {detail}"


@contextmanager
def secured(start: Callable[[Path], Cluster]) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as directory:
        cluster = start(Path(directory))
        try:
            yield cluster
        finally:
            cluster.laxity("down")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="a JSON array instead of a table")
    options = parser.parse_args()
    with secured(Cluster) as cluster:
        rows = []
        if not options.json:
            print("| who | tried | what it was told | what the shard's log said |\n|---|---|---|---|")
        for row in attempts(cluster):
            rows.append(row)
            if not options.json:
                print("|", " | ".join(each.replace("|", "\\|") for each in row), "|", flush=True)
        if options.json:
            print(json.dumps([row._asdict() for row in rows], indent=2))


if __name__ == "__main__":
    main()
