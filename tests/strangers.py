"""Peers that say what they like, for the tests of what must not harm others."""

from __future__ import annotations

import time

import zmq

from laxity import protocol
from laxity.protocol import Request, Result, Submit

WAIT_MS = 20_000


class Stranger:
    """A DEALER that sends what it is told, byte for byte."""

    def __init__(self, address, decode, **options):
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        for name, value in options.items():
            self.socket.set(getattr(zmq, name), value)
        self.socket.connect(address)
        self._decode = decode

    def send(self, message, *frames):
        self.socket.send_multipart([protocol.encode(message), *frames])

    def receive(self, kind):
        """The next message of a kind."""
        while True:
            assert self.socket.poll(WAIT_MS), f"no {kind.__name__} came"
            message = self._decode(self.socket.recv_multipart()[0])
            if isinstance(message, kind):
                return message

    def answers(self, count):
        """The next ``count`` answers by request."""
        found = []
        while len(found) < count:
            found += self.receive(Result).answers
        by_id = {answer.id: answer for answer in found}
        assert len(by_id) == len(found) == count, "a request was answered twice"
        return by_id

    def close(self):
        self.socket.close()
        self._context.term()


def request(id, node=None, pipeline="echo", budget_us=None, **options):
    return Request(id, pipeline, budget_us, node, **options)


def submit(*requests):
    return Submit(time.monotonic_ns() // 1000, list(requests))
