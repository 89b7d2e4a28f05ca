"""Services are told which pipelines a shard has no devices for."""

from __future__ import annotations

import pytest
import zmq

from laxity import protocol
from laxity.protocol import VERSION, Hello, Welcome


@pytest.fixture
def listen():
    """Says HELLO to a shard; waits for a WELCOME with the unready pipelines that are given."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.set(zmq.LINGER, 0)

    def until(unready, address=""):
        if address:
            dealer.connect(address)
            dealer.send(protocol.encode(Hello(VERSION, "listener")))
        while True:
            assert dealer.poll(20_000), f"no WELCOME with unready = {unready} came"
            message = protocol.decode_to_client(dealer.recv())
            if isinstance(message, Welcome) and message.unready == unready:
                return

    yield until
    dealer.close()
    context.term()


def test_a_pipeline_is_unready_until_devices_hold_all_its_stages_and_again_when_they_are_gone(cluster, echo, listen):
    cluster.start()
    cluster.shard.apply(echo)
    cluster.status()
    listen(["echo"], cluster.shard.frontend)
    agent = cluster.serve(echo)
    listen([])
    agent.stop()
    listen(["echo"])
