"""The client against a real shard and an emulated node."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import laxity
from laxity.outcomes import Outcome


def test_answers_and_their_times(cluster, echo):
    cluster.serve(echo)
    client = cluster.client()
    image = np.arange(40_000, dtype="<f4").reshape(200, 200)
    np.testing.assert_array_equal(client.infer("echo", image, slo=10), image)
    reply = client.submit("echo", {"a": 1}, timings=True).reply()
    assert reply.unwrap() == {"a": 1}
    assert 0 < reply.remaining < echo.slo
    assert [timing.stage for timing in reply.timings] == ["echo"]
    assert list(client.map("echo", range(300), max_in_flight=100)) == list(range(300))
    cluster.settle(ok=302)


def test_the_asyncio_client(cluster, echo):
    cluster.serve(echo)

    async def main():
        async with laxity.AsyncClient(cluster.shard.frontend) as client:
            return await asyncio.gather(*(client.infer("echo", n) for n in range(200)))

    assert asyncio.run(main()) == list(range(200))
    cluster.settle(ok=200)


def test_what_a_shard_rejects(cluster, echo):
    cluster.start(max_payload=1_000_000)
    cluster.shard.apply(echo)
    client = cluster.client()
    with pytest.raises(laxity.Rejected, match="unknown pipeline 'nowhere'"):
        client.infer("nowhere", 1)
    with pytest.raises(laxity.Rejected, match="longer than the pipeline's"):
        client.infer("echo", 1, slo=echo.slo + 1)
    with pytest.raises(laxity.Rejected, match="1000001 bytes; the shard takes 1000000 at most"):
        client.infer("echo", bytes(1_000_001))


def test_a_cancelled_request_leaves_the_shard(cluster, echo):
    cluster.start()
    cluster.shard.apply(echo)
    client = cluster.client()
    future = client.submit("echo", 1)
    cluster.wait_for(lambda status: status.in_flight == 1, "the request is at the shard")
    assert future.cancel()
    cluster.settle(cancelled=1)


def test_a_closed_client_leaves_nothing_behind(cluster, echo):
    cluster.start()
    cluster.shard.apply(echo)
    client = cluster.client()
    client.submit("echo", 1)
    cluster.wait_for(lambda status: status.in_flight == 1, "the request is at the shard")
    client.close()
    cluster.settle(cancelled=1)
    cluster.wait_for(lambda status: status.clients == 0, "the client is forgotten")


def test_requests_go_to_a_shard_that_is_started_again(cluster, echo):
    cluster.serve(echo)
    address = cluster.shard.frontend
    client = cluster.client()
    assert client.infer("echo", 1) == 1
    cluster.agents.pop().stop()
    cluster.stop_shard()
    future = client.submit("echo", 2)
    cluster.start(frontend=address)
    cluster.serve()
    cluster.agents[0].hold(echo)
    assert future.reply(30).unwrap() == 2


def test_a_wait_of_many_heartbeats_is_no_reason_to_leave_a_shard(cluster, echo):
    cluster.start(heartbeat=0.05)
    cluster.shard.apply(echo)
    future = cluster.client().submit("echo", 1, slo=1.5)
    assert future.reply(30).outcome is not Outcome.OK
    assert cluster.status().submitted == 1
