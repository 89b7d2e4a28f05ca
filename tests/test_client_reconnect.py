"""The client and shards that come, go, fall silent and refuse."""

from __future__ import annotations

import socket
import threading

import pytest

import laxity
from laxity import protocol


@pytest.fixture
def two(make_peer):
    """Two peers and a client that knows both."""
    first, second = make_peer(), make_peer()
    with laxity.Client(f"{first.url}, {second.url}") as client:
        yield first, second, client


def test_after_a_reconnection_requests_are_submitted_again(make_peer):
    peer = make_peer()
    with laxity.Client(peer.url) as client:
        _, hello = peer.welcome()
        answered, left = client.submit("p", 1, slo=60), client.submit("p", b"x" * 100_000, slo=60)
        before = peer.requests(2)
        peer.answer(before[0], "answered")
        assert answered.result() == "answered"
        peer.close()
        peer = make_peer(peer.url)
        _, hello_again = peer.welcome()
        assert hello_again.client == hello.client
        again = peer.request()
        assert again.request.id == before[1].request.id
        assert again.request.budget_us < before[1].request.budget_us
        assert again.value == b"x" * 100_000
        peer.answer(again, "at last")
        assert left.result() == "at last"


def test_the_next_shard_takes_over_from_one_that_is_gone(two):
    first, second, client = two
    first.welcome()
    future = client.submit("p", 1)
    request = first.request().request
    first.close()
    second.welcome()
    again = second.request()
    assert again.request.id == request.id
    second.answer(again, 2)
    assert future.result() == 2


def test_the_next_shard_takes_over_from_one_that_was_never_there(make_peer):
    gone, there = make_peer(), make_peer()
    gone.close()
    with laxity.Client(f"{gone.url},{there.url}") as client:
        future = client.submit("p", 1)
        there.welcome()
        there.answer(there.request(), 2)
        assert future.result() == 2


def test_a_silent_shard_is_left(two):
    first, second, client = two
    first.welcome(heartbeat_us=30_000)
    future = client.submit("p", 1)
    first.request()
    second.welcome()
    second.answer(second.request(), 2)
    assert future.result() == 2


def test_the_client_asks_for_signs_of_life_also_while_it_sends(make_peer):
    """Requests go out, no answer is due: only HEARTBEATs and their answers show that the shard lives."""
    peer = make_peer()
    with laxity.Client(peer.url) as client:
        sender, _ = peer.welcome(heartbeat_us=60_000)
        heartbeats = 0
        while heartbeats < 8:
            future = client.submit("p", 1)
            while not future.cancelled():
                _, message, _ = peer.receive(protocol.Submit, protocol.Heartbeat, protocol.Cancel)
                if type(message) is protocol.Heartbeat:
                    heartbeats += 1
                    peer.send(sender, protocol.Heartbeat())
                elif type(message) is protocol.Submit:
                    future.cancel()
        last = client.submit("p", 2)
        while type(message) is not protocol.Submit or message.requests[0].payload != 2:
            _, message, _ = peer.receive(protocol.Submit, protocol.Heartbeat, protocol.Cancel)
        peer.send(sender, protocol.Result([protocol.Answer(message.requests[0].id, laxity.Outcome.OK, 3)]))
        assert last.result() == 3


def test_a_shard_that_does_not_know_the_client_is_greeted_again(make_peer):
    peer = make_peer()
    with laxity.Client(peer.url) as client:
        sender, hello = peer.welcome()
        future = client.submit("p", 1)
        request = peer.request().request
        for _ in range(3):
            peer.send(sender, protocol.Goodbye("unknown peer", retry=True))
        same_sender, same_hello = peer.welcome()
        assert (same_sender, same_hello) == (sender, hello)
        again = peer.request()
        assert again.request.id == request.id
        peer.answer(again, 2)
        assert future.result() == 2
        assert peer.quiet()


@pytest.mark.parametrize("greeted", [False, True])
def test_a_refusal_ends_requests_with_its_reason(make_peer, greeted):
    peer = make_peer()
    with laxity.Client(peer.url) as client:
        future = client.submit("p", 1)
        if greeted:
            sender, _ = peer.welcome()
            peer.request()
        else:
            sender, _, _ = peer.receive(protocol.Hello)
        peer.send(sender, protocol.Goodbye("no protocol version 1 here"))
        with pytest.raises(laxity.Unavailable, match="no protocol version 1 here"):
            future.result(20)
        later = client.submit("p", 2)
        peer.welcome()
        peer.answer(peer.request(), 3)
        assert later.result(20) == 3


def test_one_refusal_of_two_is_none(two):
    first, second, client = two
    future = client.submit("p", 1)
    sender, _, _ = first.receive(protocol.Hello)
    first.send(sender, protocol.Goodbye("go away"))
    second.welcome()
    second.answer(second.request(), 2)
    assert future.result() == 2


def test_a_shard_of_another_protocol_version(make_peer):
    peer = make_peer()
    with laxity.Client(peer.url) as client:
        future = client.submit("p", 1)
        peer.welcome(version=2)
        with pytest.raises(laxity.Unavailable, match="protocol version 2, this client 1"):
            future.result(20)


@pytest.mark.parametrize("garbage", [b"", b"\xc1", b"\x93\x07", protocol.encode([99, 1]), b"\x92\x07\xa1x"])
def test_a_peer_that_answers_hello_with_garbage_is_refused(make_peer, garbage):
    peer = make_peer()
    with laxity.Client(peer.url) as client:
        future = client.submit("p", 1)
        sender, _, _ = peer.receive(protocol.Hello)
        peer.send_raw(sender, garbage, b"more")
        with pytest.raises(laxity.Unavailable, match="not a header of protocol version 1"):
            future.result(20)


def test_garbage_amid_a_session_costs_a_reconnection_only(make_peer):
    peer = make_peer()
    with laxity.Client(peer.url) as client:
        sender, _ = peer.welcome()
        future = client.submit("p", 1)
        peer.request()
        peer.send_raw(sender, protocol.encode([7, [[1, "no outcome", None]]]))
        peer.welcome()
        peer.answer(peer.request(), 2)
        assert future.result() == 2


def test_a_server_that_speaks_no_zeromq():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        with laxity.Client(f"tcp://127.0.0.1:{port}") as client, pytest.raises(laxity.Unavailable) as caught:
            client.infer("p", 1, slo=1.0)
        assert str(port) in caught.value.detail
        thread.join()


def test_what_is_cancelled_while_no_shard_is_there_stays_so(make_peer):
    peer = make_peer()
    with laxity.Client(peer.url) as client:
        peer.welcome()
        cancelled, kept = client.submit("p", 1), client.submit("p", 2)
        peer.requests(2)
        peer.close()
        assert cancelled.cancel()
        peer = make_peer(peer.url)
        peer.welcome()
        message = peer.receive(protocol.Submit, protocol.Cancel)[1]
        if isinstance(message, protocol.Cancel):  # not if it went out to the connection that was breaking
            assert message.ids == [1]
            message = peer.receive(protocol.Submit)[1]
        assert [request.id for request in message.requests] == [2]
        kept.cancel()


def test_answers_sent_just_before_the_shard_closes_are_not_lost(make_peer):
    peer = make_peer()
    with laxity.Client(peer.url) as client:
        for number in range(20):
            peer.welcome()
            futures = [client.submit("p", n) for n in range(50)]
            for incoming in peer.requests(50):
                peer.answer(incoming, (number, incoming.value))
            peer.close()
            assert [future.result() for future in futures] == [[number, n] for n in range(50)]
            peer = make_peer(peer.url)
