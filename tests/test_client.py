"""The blocking client against a real ROUTER that the test drives by hand."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import laxity
from laxity import protocol
from laxity.node import BytesNode
from laxity.outcomes import ERRORS, Outcome
from laxity.protocol import Answer, Result, StageTiming
from laxity.requests import UNKNOWN_SLO


@pytest.fixture
def client(peer):
    with laxity.Client(peer.url) as client:
        yield client


@pytest.fixture
def echoing(peer):
    """A client whose peer answers each request with its own payload."""
    done = threading.Event()
    thread = threading.Thread(target=peer.echo, args=(done.is_set,))
    thread.start()
    with laxity.Client(peer.url) as client:
        yield client
    done.set()
    thread.join()


# ---- values and options -----------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, True, 7, 1.5, "text", "ü" * 5000, b"", b"x" * 64, b"x" * 300_000, [], [1, [b"a", "b"]], {"a": {"b": 1}}],
    ids=lambda value: repr(value)[:20],
)
def test_infer_returns_what_the_pipeline_answers(echoing, value):
    assert echoing.infer("p", value) == value


def test_arrays_arrive_as_they_were_sent(echoing):
    small = np.arange(12, dtype="<i2").reshape(3, 4)[:, ::2]
    large = np.random.default_rng(1).random((300, 200), dtype=np.float32)
    answer = echoing.infer("p", {"small": small, "large": large, "empty": np.zeros((0, 3))})
    assert answer["small"].dtype == small.dtype
    np.testing.assert_array_equal(answer["small"], small)
    np.testing.assert_array_equal(answer["large"], large)
    assert answer["empty"].shape == (0, 3)


def test_options_travel(client, peer):
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    future = client.submit("ocr", b"x", slo=2, priority=1, timings=True, traceparent=traceparent)
    _, hello = peer.welcome()
    incoming = peer.request()
    request = incoming.request
    assert hello.version == 1
    assert future.request_id == f"{hello.client}-{request.id}"
    assert (request.pipeline, request.priority, request.timings) == ("ocr", 1, True)
    assert request.traceparent == traceparent
    assert 0 < request.budget_us <= 2_000_000
    assert incoming.value == b"x"


def test_without_an_slo_the_budget_is_the_shards_affair(client, peer):
    peer.welcome(pipelines=[("p", 3_000_000)])
    client.submit("p", b"")
    assert peer.request().request.budget_us is None


def test_requests_that_wait_share_messages(client, peer):
    futures = [client.submit("p", index) for index in range(600)]
    sizes = []
    peer.welcome()
    while sum(sizes) < 600:
        batch = peer.submits()
        sizes.append(len(batch))
        for incoming in batch:
            peer.answer(incoming, incoming.value)
    assert max(sizes) == protocol.MAX_SHARED
    assert len(sizes) == 3
    assert [future.result() for future in futures] == list(range(600))


def test_large_payloads_do_not_share(client, peer):
    for _ in range(3):
        client.submit("p", bytes(700_000))
    peer.welcome()
    assert [len(peer.submits()) for _ in range(3)] == [1, 1, 1]


# ---- outcomes -----------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.OK])
def test_each_outcome_raises_its_error(client, peer, outcome):
    peer.welcome()
    future = client.submit("p", b"x")
    peer.refuse(peer.request(), outcome, stage="detect", detail="because", short_us=12_000)
    with pytest.raises(ERRORS[outcome], match="because") as caught:
        future.result()
    assert isinstance(caught.value, laxity.LaxityError)
    assert caught.value.outcome is outcome
    assert caught.value.request_id == future.request_id
    assert future.reply().outcome is outcome
    assert future.reply().detail == "because"
    if outcome is not Outcome.CANCELLED:
        assert (caught.value.stage, caught.value.short_by) == ("detect", 0.012)


def test_infer_raises_the_same_errors(client, peer):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(client.infer, "p", b"x")
        peer.welcome()
        peer.refuse(peer.request(), Outcome.DROPPED, stage="s", detail="late", short_us=5000)
        with pytest.raises(laxity.Dropped) as caught:
            blocked.result()
    assert str(caught.value) == "dropped at stage 's': late"
    assert caught.value.short_by == 0.005
    assert caught.value.request_id.endswith("-1")


def test_a_reply_tells_the_stages_times(client, peer):
    peer.welcome()
    future = client.submit("p", b"x", timings=True)
    timing = StageTiming("detect", 1000, 20_000, 4, 1, 300_000)
    peer.answer(peer.request(), "value", remaining_us=250_000, timings=[timing])
    reply = future.reply(10)
    assert reply.ok
    assert reply.unwrap() == reply.value == "value"
    assert reply.detail == ""
    assert reply.remaining == 0.25
    assert reply.timings == (laxity.Timing("detect", 0.001, 0.02, 4, 1, 0.3),)


def test_second_and_unknown_answers_are_ignored(client, peer):
    peer.welcome()
    future = client.submit("p", b"x")
    incoming = peer.request()
    peer.answer(incoming, 1)
    assert future.result() == 1
    peer.refuse(incoming, Outcome.FAILED)
    peer.send(incoming.sender, Result([Answer(999, Outcome.OK, 5)]))
    after = client.submit("p", b"y")
    peer.answer(peer.request(), 2)
    assert after.result() == 2
    assert future.result() == 1


def test_an_answer_whose_payload_is_missing_fails_its_request_alone(client, peer):
    peer.welcome()
    futures = [client.submit("p", n) for n in range(3)]
    first, second, third = peer.requests(3)
    answers = [
        Answer(first.request.id, Outcome.OK, "fine"),
        Answer(second.request.id, Outcome.OK, BytesNode(10)),
        Answer(third.request.id, Outcome.OK, BytesNode(1)),
    ]
    peer.send(first.sender, Result(answers), [b"abc"])
    assert futures[0].result() == "fine"
    for future in futures[1:]:
        with pytest.raises(laxity.Failed, match="cannot be read"):
            future.result()


# ---- what is refused on the spot ------------------------------------------------------------


@pytest.mark.parametrize("slo", [0, -1, float("nan"), float("inf"), 1e12, np.float32(-1)])
def test_an_slo_out_of_range_is_rejected_at_once(client, slo):
    with pytest.raises(laxity.Rejected, match="positive, finite number of seconds"):
        client.submit("p", b"x", slo=slo)


@pytest.mark.parametrize("slo", ["1s", b"1", True, [1], object()])
def test_an_slo_that_is_no_number_is_a_type_error(client, slo):
    with pytest.raises(TypeError, match="number of seconds"):
        client.submit("p", b"x", slo=slo)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"priority": 2}, laxity.Rejected),
        ({"priority": "high"}, TypeError),
        ({"traceparent": "x"}, laxity.Rejected),
        ({"traceparent": 1}, laxity.Rejected),
    ],
)
def test_options_out_of_range(client, options, error):
    with pytest.raises(error):
        client.submit("p", b"x", **options)


@pytest.mark.parametrize(
    ("name", "error"),
    [("", laxity.Rejected), ("x" * 201, laxity.Rejected), ("\ud800", laxity.Rejected), (b"p", TypeError)],
)
def test_what_is_no_pipelines_name(client, name, error):
    with pytest.raises(error, match="name"):
        client.submit(name, b"x")


def test_a_value_that_cannot_be_sent(client):
    with pytest.raises(laxity.Rejected, match=r"cannot send a builtins\.complex") as caught:
        client.submit("p", {"a": [1j]})
    assert caught.value.request_id


def test_a_structure_above_the_headers_limit(client):
    with pytest.raises(laxity.Rejected, match="send numbers as arrays"):
        client.submit("p", [1000] * 2_000_000)


def test_the_payload_limit_of_welcome_holds_before_and_after(client, peer):
    early = client.submit("p", bytes(101))
    fits = client.submit("p", bytes(100))
    peer.welcome(max_payload=100)
    assert peer.request().request.id == 2
    with pytest.raises(laxity.Rejected, match="101 bytes; the shard takes 100 at most"):
        early.result()
    with pytest.raises(laxity.Rejected, match="102 bytes; the shard takes 100 at most"):
        client.submit("p", bytes(102))
    fits.cancel()


def test_more_than_max_pending_is_rejected(peer):
    with laxity.Client(peer.url, max_pending=3) as client:
        futures = [client.submit("p", n) for n in range(3)]
        with pytest.raises(laxity.Rejected, match="queue full: 3 requests"):
            client.submit("p", 3)
        peer.welcome()
        for incoming in peer.requests(3):
            peer.answer(incoming, incoming.value)
        assert [future.result() for future in futures] == [0, 1, 2]
        assert client.submit("p", 4).cancel()


@pytest.mark.parametrize(
    "url", ["", "localhost:7300", "tcp://localhost", "tcp://localhost:0", "tcp://h:70000", "http://h:1", "tcp://h:1,,"]
)
def test_what_is_no_url(url):
    with pytest.raises(ValueError, match="tcp://HOST:PORT"):
        laxity.Client(url)


def test_max_pending_must_be_positive():
    with pytest.raises(ValueError, match="max_pending"):
        laxity.Client("tcp://127.0.0.1:1", max_pending=0)


# ---- deadlines ------------------------------------------------------------------------------


def test_a_request_that_is_never_answered_expires(client, peer):
    peer.welcome(heartbeat_us=50_000)
    future = client.submit("p", b"x", slo=0.05)
    peer.request()
    with pytest.raises(laxity.Expired, match="without an answer") as caught:
        future.result(20)
    assert caught.value.request_id == future.request_id
    assert future.reply().remaining < 0


def test_the_pipelines_slo_bounds_a_request_without_one(client, peer):
    future = client.submit("p", b"x")
    peer.welcome(pipelines=[("p", 50_000)])
    with pytest.raises(laxity.Expired):
        future.result(UNKNOWN_SLO / 2)


def test_without_a_shard_a_request_ends_unavailable(peer):
    peer.close()
    with laxity.Client(peer.url) as client, pytest.raises(laxity.Unavailable, match="nobody listens there"):
        client.infer("p", b"x", slo=1.0)


def test_waiting_for_a_result_can_time_out(client):
    future = client.submit("p", b"x")
    with pytest.raises(TimeoutError):
        future.result(0.01)
    assert not future.done()


# ---- cancelling -----------------------------------------------------------------------------


def test_cancel_reaches_the_shard_and_the_waiters(client, peer):
    peer.welcome()
    future = client.submit("p", b"x")
    incoming = peer.request()
    assert future.cancel()
    assert future.cancel()
    assert future.cancelled()
    assert peer.receive(protocol.Cancel)[1].ids == [incoming.request.id]
    done, _ = concurrent.futures.wait([future], timeout=10)
    assert done == {future}
    with pytest.raises(laxity.Cancelled, match="by the caller") as caught:
        future.result()
    assert isinstance(caught.value, concurrent.futures.CancelledError)
    assert isinstance(future.exception(), laxity.Cancelled)
    assert future.reply().outcome is Outcome.CANCELLED
    peer.refuse(incoming, Outcome.CANCELLED)
    other = client.submit("p", b"y")
    peer.answer(peer.request(), 1)
    assert other.result() == 1
    assert not other.cancel()


def test_what_is_cancelled_before_it_was_sent_is_never_sent(client, peer):
    first = client.submit("p", 1)
    second = client.submit("p", 2)
    assert first.cancel()
    peer.welcome()
    assert peer.request().request.id == 2
    second.cancel()
    assert peer.receive(protocol.Cancel)[1].ids == [2]


def test_of_many_threads_that_cancel_and_an_answer_one_wins(client, peer):
    sender, _ = peer.welcome()
    for _ in range(50):
        calls = []
        future = client.submit("p", b"x")
        future.add_done_callback(calls.append)
        message = None
        while not isinstance(message, protocol.Submit):
            # A CANCEL comes only where the answer was not faster.
            message = peer.receive(protocol.Submit, protocol.Cancel)[1]
        threads = [threading.Thread(target=future.cancel) for _ in range(4)]
        for thread in threads[:2]:
            thread.start()
        peer.send(sender, Result([Answer(message.requests[0].id, Outcome.OK, 1)]))
        for thread in threads[2:]:
            thread.start()
        for thread in threads:
            thread.join()
        assert calls == [future]
        assert future.done()
        assert future.reply().outcome is (Outcome.CANCELLED if future.cancelled() else Outcome.OK)


def test_ctrl_c_while_waiting_cancels(client, peer):
    def interrupt():
        peer.welcome()
        peer.request()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # A shell's background jobs are started with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            client.infer("p", b"x")
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert peer.receive(protocol.Cancel)[1].ids == [1]


# ---- map --------------------------------------------------------------------------------------


def test_map_keeps_the_order_and_the_bound(client, peer):
    results = client.map("p", itertools.count(), max_in_flight=4)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        taken = pool.submit(lambda: [next(results) for _ in range(3)])
        peer.welcome()
        first = peer.requests(4)
        assert peer.quiet()
        for incoming in reversed(first):
            peer.answer(incoming, incoming.value * 10)
        assert taken.result() == [0, 10, 20]
    seen = [incoming.request.id for incoming in peer.requests(2)]
    results.close()
    cancelled = []
    while len(cancelled) < 2:
        cancelled += peer.receive(protocol.Cancel)[1].ids
    assert sorted(cancelled) == seen == [5, 6]


def test_map_stops_at_the_first_error_and_cancels_the_rest(client, peer):
    def answer():
        peer.welcome()
        first, _second, third = peer.requests(3)
        peer.refuse(first, Outcome.FAILED, detail="no")
        return third.request.id

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        third = pool.submit(answer)
        with pytest.raises(laxity.Failed, match="no"):
            list(client.map("p", [1, 2, 3]))
    cancelled = []
    while len(cancelled) < 2:
        cancelled += peer.receive(protocol.Cancel)[1].ids
    assert third.result() in cancelled


def test_map_with_replies_goes_on_whatever_the_outcome(client, peer):
    def answer():
        peer.welcome()
        first, second = peer.requests(2)
        assert first.request.timings
        peer.answer(second, "second")
        peer.refuse(first, Outcome.DROPPED, short_us=1000)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answered = pool.submit(answer)
        replies = list(client.map("p", [1, 1j, 3], replies=True))
        answered.result()
    assert [reply.outcome for reply in replies] == [Outcome.DROPPED, Outcome.REJECTED, Outcome.OK]
    assert replies[0].short_by == 0.001
    assert "complex" in replies[1].detail
    assert replies[2].value == "second"


def test_map_with_nothing_in_flight_is_refused_at_once(client):
    with pytest.raises(ValueError, match="max_in_flight"):
        client.map("p", [1], max_in_flight=0)


# ---- threads, futures, the end ----------------------------------------------------------------


def test_many_threads_share_a_client(echoing):
    def work(thread):
        return [echoing.infer("p", {"who": thread, "n": n, "b": bytes([thread]) * 64}) for n in range(100)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for thread, answers in enumerate(pool.map(work, range(8))):
            assert answers == [{"who": thread, "n": n, "b": bytes([thread]) * 64} for n in range(100)]


def test_futures_work_with_the_standard_library(echoing):
    futures = [echoing.submit("p", n) for n in range(20)]
    assert sorted(future.result() for future in concurrent.futures.as_completed(futures, 20)) == list(range(20))

    async def wrapped():
        return await asyncio.wrap_future(echoing.submit("p", "wrapped"))

    assert asyncio.run(wrapped()) == "wrapped"


def test_close_cancels_what_is_in_flight(peer):
    client = laxity.Client(peer.url)
    unsent = client.submit("p", 0)
    peer.welcome()
    assert peer.request().request.id == 1
    sent = client.submit("p", 1)
    peer.request()
    client.close()
    for future in (unsent, sent):
        with pytest.raises(laxity.Cancelled, match="client was closed"):
            future.result()
    assert peer.receive(protocol.Cancel)[1].ids == [1, 2]
    assert peer.receive(protocol.Goodbye)
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.submit("p", 2)


def test_close_from_a_callback(client, peer):
    peer.welcome()
    closed = threading.Event()
    future = client.submit("p", 1)
    future.add_done_callback(lambda _: (client.close(), closed.set()))
    peer.answer(peer.request(), 1)
    assert closed.wait(20)
    assert peer.receive(protocol.Goodbye)


def test_nothing_is_lost_in_the_moment_of_closing(peer):
    """Requests submitted while another thread closes either raise or end."""
    for _ in range(20):
        client = laxity.Client(peer.url)
        futures = []

        def submit(client=client, futures=futures):
            try:
                while True:
                    futures.append(client.submit("p", 1))
            except (RuntimeError, laxity.Rejected):
                pass

        thread = threading.Thread(target=submit)
        thread.start()
        client.close()
        thread.join()
        assert all(isinstance(future.exception(20), laxity.Cancelled) for future in futures)


def client_threads():
    return [thread for thread in threading.enumerate() if thread.name == "laxity-client"]


def test_a_forgotten_client_ends_its_thread(peer):
    before = set(client_threads())
    client = laxity.Client(peer.url)
    (thread,) = set(client_threads()) - before
    future = client.submit("p", 1)
    del client
    gc.collect()
    peer.welcome()
    peer.answer(peer.request(), "kept open by its future")
    assert future.result() == "kept open by its future"
    del future
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_a_process_that_forgets_to_close_ends_all_the_same(peer):
    code = f"""
        import laxity
        client = laxity.Client({peer.url!r})
        future = client.submit("p", 1)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_a_forked_child_is_told(client):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            client.submit("p", 1)
        except RuntimeError as error:
            status = 0 if "forked" in str(error) else 2
        client.close()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- readiness ---------------------------------------------------------------------------


def test_a_client_is_ready_once_a_shard_has_welcomed_it(client, peer):
    with pytest.raises(laxity.Unavailable, match=r"no shard could be reached within 0\.05 s"):
        client.wait_ready(0.05)
    peer.welcome(pipelines=[("p", 3_000_000)])
    client.wait_ready(30)
    with pytest.raises(laxity.Rejected, match=r"an SLO of 100 s is longer than the pipeline's 3 s: ask for less"):
        client.submit("p", b"", slo=100)
    client.submit("p", b"", slo=3)
    assert peer.request().request.budget_us <= 3_000_000
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.wait_ready(30)


def test_a_client_of_asyncio_waits_for_a_shard_too(peer):
    async def main():
        async with laxity.AsyncClient(peer.url) as client:
            with pytest.raises(laxity.Unavailable):
                await client.wait_ready(0.05)
            peer.welcome()
            await client.wait_ready(30)

    asyncio.run(main())


@pytest.mark.parametrize(("host", "named"), [("127.0.0.1", False), ("localhost", True)])
def test_only_a_name_may_not_resolve(host, named):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://{host}:{free.getsockname()[1]}"
        with laxity.Client(url) as client, pytest.raises(laxity.Unavailable) as caught:
            client.infer("p", b"", slo=1.0)
    assert "nobody listens there" in caught.value.detail
    assert ("the name does not resolve" in caught.value.detail) == named


def test_an_address_is_a_text():
    with pytest.raises(TypeError, match="must be a text such as 'tcp://HOST:PORT', not None"):
        laxity.Client(None)
