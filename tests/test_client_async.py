"""The asyncio client against a real ROUTER that the test drives by hand, from threads."""

from __future__ import annotations

import asyncio
import threading

import pytest

import laxity
from laxity import protocol
from laxity.outcomes import Outcome


@pytest.fixture
def echo_url(peer):
    done = threading.Event()
    thread = threading.Thread(target=peer.echo, args=(done.is_set,))
    thread.start()
    yield peer.url
    done.set()
    thread.join()


def test_many_tasks(echo_url):
    async def main():
        async with laxity.AsyncClient(echo_url) as client:
            values = [{"n": n, "b": b"x" * (n * 300)} for n in range(300)]
            assert await asyncio.gather(*(client.infer("p", value) for value in values)) == values

    asyncio.run(main())


def test_map_over_both_kinds_of_iterables(echo_url):
    async def numbers():
        for n in range(50):
            yield n

    async def main():
        async with laxity.AsyncClient(echo_url) as client:
            assert [value async for value in client.map("p", range(50), max_in_flight=7)] == list(range(50))
            assert [value async for value in client.map("p", numbers())] == list(range(50))
            replies = [reply async for reply in client.map("p", [1, 1j, 2], replies=True)]
            assert [reply.outcome for reply in replies] == [Outcome.OK, Outcome.REJECTED, Outcome.OK]
            with pytest.raises(laxity.Rejected, match="complex"):
                [value async for value in client.map("p", [1j, 1])]
            with pytest.raises(ValueError, match="max_in_flight"):
                client.map("p", [], max_in_flight=0)

    asyncio.run(main())


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.OK])
def test_outcomes_are_errors(peer, outcome):
    async def main():
        async with laxity.AsyncClient(peer.url) as client:
            future = client.submit("p", 1)
            await asyncio.to_thread(peer.welcome)
            incoming = await asyncio.to_thread(peer.request)
            peer.refuse(incoming, outcome, stage="s", detail="because")
            with pytest.raises(laxity.outcomes.ERRORS[outcome], match="because") as caught:
                await future
            assert caught.value.request_id == future.request_id
            assert (await future.reply()).stage == "s"

    asyncio.run(main())


def test_a_cancelled_task_cancels_at_the_shard(peer):
    async def main():
        async with laxity.AsyncClient(peer.url) as client:
            task = asyncio.create_task(client.infer("p", 1))
            await asyncio.to_thread(peer.welcome)
            incoming = await asyncio.to_thread(peer.request)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            _, cancel, _ = await asyncio.to_thread(peer.receive, protocol.Cancel)
            assert cancel.ids == [incoming.request.id]
            peer.answer(incoming, "too late")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await client.infer("p", 2)
            incoming = await asyncio.to_thread(peer.request)
            _, cancel, _ = await asyncio.to_thread(peer.receive, protocol.Cancel)
            assert cancel.ids == [incoming.request.id]

    asyncio.run(main())


def test_a_map_that_is_left_cancels_the_rest(peer):
    async def main():
        async with laxity.AsyncClient(peer.url) as client:
            results = client.map("p", range(10), max_in_flight=3)
            first = asyncio.ensure_future(anext(results))
            await asyncio.to_thread(peer.welcome)
            incoming = await asyncio.to_thread(peer.requests, 3)
            peer.answer(incoming[0], "first")
            assert await first == "first"
            await results.aclose()
            cancelled = []
            while len(cancelled) < 2:
                message = (await asyncio.to_thread(peer.receive, protocol.Cancel, protocol.Submit))[1]
                cancelled += message.ids if type(message) is protocol.Cancel else []
            assert cancelled == [2, 3]

    asyncio.run(main())


def test_close_cancels_what_is_in_flight(peer):
    async def main():
        client = laxity.AsyncClient(peer.url)
        future = client.submit("p", 1)
        await client.close()
        with pytest.raises(laxity.Cancelled, match="client was closed"):
            await future
        with pytest.raises(RuntimeError, match="closed"):
            client.submit("p", 1)

    asyncio.run(main())


def test_one_client_one_loop(peer):
    client = laxity.AsyncClient(peer.url)

    async def submit():
        client.submit("p", 1).cancel()

    asyncio.run(submit())
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(submit())
    asyncio.run(client.close())


def test_answers_for_a_closed_loop_are_nobodys(peer):
    client = laxity.AsyncClient(peer.url)

    async def leave_one_behind():
        client.submit("p", 1)

    asyncio.run(leave_one_behind())
    peer.welcome()
    incoming = peer.request()
    peer.answer(incoming, 2)
    peer.send(incoming.sender, protocol.Goodbye("greet again", retry=True))
    peer.welcome()  # so the answer before it was taken in
    asyncio.run(client.close())
    assert peer.receive(protocol.Goodbye)
