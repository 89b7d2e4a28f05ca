"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import zmq

from laxity import protocol
from laxity.outcomes import Outcome
from laxity.payload import Payload, Unpacker, decode, encode, pack
from laxity.protocol import Answer, Request, Result

WAIT_MS = 20_000
"""How long a peer waits for what must come, in milliseconds; a test that runs into it fails."""


@dataclass
class Incoming:
    """A request as a peer got it."""

    sender: bytes
    request: Request
    payload: Payload

    @property
    def value(self) -> Any:
        return decode(self.payload)


class Peer:
    """A hand-driven shard's frontend: a real ROUTER that does what the test says and nothing else."""

    def __init__(self, address: str = "tcp://127.0.0.1:*") -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.set(zmq.LINGER, 1000)
        self._router.set(zmq.ROUTER_MANDATORY, 1)
        self._router.bind(address)
        self.url: str = self._router.get(zmq.LAST_ENDPOINT).decode()

    def receive(self, *kinds: type) -> tuple[bytes, Any, list[bytes]]:
        """(sender, message, frames) of the next message of one of the kinds (heartbeats are passed over)."""
        while True:
            assert self._router.poll(WAIT_MS), f"no {', '.join(kind.__name__ for kind in kinds)} came"
            sender, header, *frames = self._router.recv_multipart()
            message = protocol.decode_from_client(header)
            if type(message) in kinds:
                return sender, message, frames
            assert type(message) is protocol.Heartbeat, f"unexpected {message!r}"

    def quiet(self, milliseconds: int = 50) -> bool:
        """Whether nothing but heartbeats comes for that long."""
        while self._router.poll(milliseconds):
            header = self._router.recv_multipart()[1]
            if type(protocol.decode_from_client(header)) is not protocol.Heartbeat:
                return False
        return True

    def send(self, to: bytes, message: Any, frames: list[Any] | None = None) -> None:
        self._router.send_multipart([to, protocol.encode(message), *(frames or [])])

    def send_raw(self, to: bytes, *frames: bytes) -> None:
        self._router.send_multipart([to, *frames])

    def welcome(self, **options: Any) -> tuple[bytes, protocol.Hello]:
        """Take HELLO and answer it; (sender, HELLO)."""
        sender, hello, _ = self.receive(protocol.Hello)
        self.welcome_again(sender, **options)
        return sender, hello

    def welcome_again(self, sender: bytes, **options: Any) -> None:
        fields: dict[str, Any] = {"version": 1, "shard": "peer", "heartbeat_us": 5_000_000, **options}
        self.send(sender, protocol.Welcome(**fields))

    def submits(self) -> list[Incoming]:
        """The requests of the next SUBMIT."""
        sender, submit, frames = self.receive(protocol.Submit)
        unpacker = Unpacker(frames)
        found = [Incoming(sender, request, unpacker.take(request.payload)) for request in submit.requests]
        unpacker.finish()
        return found

    def requests(self, count: int) -> list[Incoming]:
        """The next ``count`` requests."""
        found: list[Incoming] = []
        while len(found) < count:
            found += self.submits()
        assert len(found) == count
        return found

    def request(self) -> Incoming:
        """The next request."""
        return self.requests(1)[0]

    def answer(self, incoming: Incoming, value: Any, **fields: Any) -> None:
        """Answer ``ok``."""
        payload = encode(value)
        answer = Answer(incoming.request.id, Outcome.OK, payload.node, **fields)
        self.send(incoming.sender, Result([answer]), pack([payload]))

    def refuse(self, incoming: Incoming, outcome: Outcome, **fields: Any) -> None:
        """Answer anything else."""
        self.send(incoming.sender, Result([Answer(incoming.request.id, outcome, None, **fields)]))

    def echo(self, until: Callable[[], bool]) -> None:
        """Welcome everybody and answer each request with its own payload, until told otherwise."""
        while not until():
            if not self._router.poll(20):
                continue
            sender, header, *frames = self._router.recv_multipart()
            message = protocol.decode_from_client(header)
            if type(message) is protocol.Hello:
                self.welcome_again(sender)
            elif type(message) is protocol.Submit:
                answers = [Answer(request.id, Outcome.OK, request.payload) for request in message.requests]
                self.send(sender, Result(answers), frames)

    def close(self) -> None:
        self._router.close()
        self._context.term()


@pytest.fixture
def make_peer() -> Iterator[Callable[..., Peer]]:
    """Makes peers, and closes them in the end (closing one twice does no harm)."""
    peers: list[Peer] = []

    def make(address: str = "tcp://127.0.0.1:*") -> Peer:
        peers.append(Peer(address))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture
def peer(make_peer: Callable[..., Peer]) -> Peer:
    """A peer on a port of the system's choice."""
    return make_peer()
