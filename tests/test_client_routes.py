"""The client among several shards: peers that the test drives by hand, then real shards."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

import laxity
from broker.routing import Routing
from laxity import protocol
from laxity.outcomes import Outcome
from laxity.protocol import Answer, Result
from nodes.device import DeviceConfig

NOBODY = "tcp://127.0.0.1:1"


def table(peers, revision=1, addresses=None, **routes):
    """A WELCOME's options that say who serves what: ``p={"a": 1.0}``; ``peers`` by name."""
    places = {name: peer.url for name, peer in peers.items()} | (addresses or {})
    names = list(places)
    return {
        "shards": list(places.items()),
        "routes": [(pipeline, [(names.index(n), w) for n, w in route.items()]) for pipeline, route in routes.items()],
        "revision": revision,
    }


@pytest.fixture
def two(make_peer):
    return {"a": make_peer(), "b": make_peer()}


@pytest.fixture
def client(two):
    """A client that was given the address of shard a alone."""
    with laxity.Client(two["a"].url) as client:
        yield client


def meet(client, two, **options):
    """Have the client meet a, hear of b there, and meet b; the two connections' routing ids at the peers."""
    a, b = two["a"], two["b"]
    routes = options or table(two, p={"a": 1.0, "b": 1.0}, to_a={"a": 1.0}, to_b={"b": 1.0})
    at_a, _ = a.welcome(shard="a", **routes)
    future = client.submit("to_b", "hello")
    at_b, _ = b.welcome(shard="b", **routes)
    b.answer(b.request(), None)
    future.result(20)
    return at_a, at_b


# ---- who gets what ------------------------------------------------------------------------------


def test_requests_are_spread_by_weight_and_follow_its_change(client, two):
    a, b = two["a"], two["b"]
    at_a, _ = meet(client, two, **table(two, p={"a": 0.25, "b": 0.75}, to_b={"b": 1.0}))
    futures = [client.submit("p", number) for number in range(8)]
    at = a.requests(2), b.requests(6)
    a.welcome_again(at_a, shard="a", **table(two, revision=2, p={"a": 1.0, "b": 1.0}, to_b={"b": 1.0}))
    for peer, incoming in zip((a, b), at, strict=True):
        for one in incoming:
            peer.answer(one, one.value)
    assert [future.result(20) for future in futures] == list(range(8))
    more = [client.submit("p", number) for number in range(8)]
    for peer in (a, b):
        for one in peer.requests(4):
            peer.answer(one, one.value)
    assert [future.result(20) for future in more] == list(range(8))


def test_a_shard_is_connected_to_once_a_pipeline_needs_it(client, two):
    a, b = two["a"], two["b"]
    a.welcome(shard="a", **table(two, p={"a": 1.0}, q={"b": 1.0}))
    future = client.submit("p", 1)
    a.answer(a.request(), 1)
    assert future.result(20) == 1
    assert b.quiet()
    future = client.submit("q", 2)
    b.welcome(shard="b")
    b.answer(b.request(), 2)
    assert future.result(20) == 2
    assert a.quiet()


def test_until_the_others_are_connected_one_shard_gets_everything(client, two):
    two["a"].welcome(shard="a", **table(two, p={"a": 1.0, "b": 9.0}))
    futures = [client.submit("p", number) for number in range(10)]
    assert len(two["a"].requests(10)) == len(futures)


def test_a_shard_that_is_not_in_the_table_any_more_is_left_when_it_has_answered(client, two):
    a, b = two["a"], two["b"]
    at_a, _ = meet(client, two)
    kept, answered = client.submit("to_b", 1), client.submit("to_a", 2)
    incoming = b.request()
    a.welcome_again(at_a, shard="a", **table({"a": a}, revision=2, p={"a": 1.0}))
    a.answer(a.request(), None)
    answered.result(20)
    assert client.submit("p", 1).request_id
    a.request()
    assert b.quiet()
    b.answer(incoming, "kept")
    assert kept.result(20) == "kept"
    b.receive(protocol.Goodbye)


def test_of_two_tables_the_newer_one_holds(client, two):
    a, b = two["a"], two["b"]
    a.welcome(shard="a", **table(two, revision=5, p={"a": 1.0, "b": 1.0}, to_b={"b": 1.0}))
    future = client.submit("to_b", 1)
    b.welcome(shard="b", **table(two, revision=4, p={"b": 1.0}))
    b.answer(b.request(), 1)
    future.result(20)
    for number in range(4):
        client.submit("p", number)
    assert (len(a.requests(2)), len(b.requests(2))) == (2, 2)


def test_a_pipeline_that_nobody_serves(client, two):
    two["a"].welcome(shard="a", **table(two, p={}))
    with pytest.raises(laxity.Unavailable, match="no shard serves 'p' at present"):
        client.infer("p", 1, slo=1.0)


def test_the_asyncio_client_spreads_too(two):
    async def main():
        async with laxity.AsyncClient(two["a"].url) as client:
            await asyncio.to_thread(two["a"].welcome, shard="a", **table(two, p={"a": 1.0, "b": 1.0}, q={"b": 1.0}))
            future = client.submit("q", 1)
            await asyncio.to_thread(two["b"].welcome, shard="b")
            two["b"].answer(await asyncio.to_thread(two["b"].request), 1)
            assert await future == 1
            futures = [client.submit("p", number) for number in range(4)]
            for peer in two.values():
                for incoming in await asyncio.to_thread(peer.requests, 2):
                    peer.answer(incoming, incoming.value)
            assert await asyncio.gather(*futures) == list(range(4))

    asyncio.run(main())


# ---- one request, one shard ------------------------------------------------------------------------


def test_a_request_is_cancelled_where_it_is(client, two):
    meet(client, two)
    future = client.submit("to_b", 1)
    request = two["b"].request().request
    assert future.cancel()
    assert two["b"].receive(protocol.Cancel)[1].ids == [request.id]
    assert two["a"].quiet()


def test_what_another_shard_says_of_a_request_is_ignored(client, two):
    _, at_b = meet(client, two)
    future = client.submit("to_a", 1)
    incoming = two["a"].request()
    two["b"].send(at_b, Result([Answer(incoming.request.id, Outcome.FAILED, None)]))
    other = client.submit("to_b", 1)
    two["b"].answer(two["b"].request(), 1)
    assert other.result(20) == 1
    assert not future.done()
    two["a"].answer(incoming, "mine")
    assert future.result(20) == "mine"


@pytest.mark.parametrize("silent", [False, True])
def test_a_lost_shards_requests_go_to_another_one(client, two, make_peer, silent):
    a, b = two["a"], two["b"]
    _, at_b = meet(client, two)
    if silent:
        b.welcome_again(at_b, shard="b", heartbeat_us=30_000)
    futures = [client.submit("p", number, slo=60) for number in range(6)]
    here, there = a.requests(3), b.requests(3)
    if not silent:
        b.close()
    again = a.requests(3)
    assert [one.request.id for one in again] == [one.request.id for one in there]
    assert all(one.request.budget_us < 60_000_000 for one in again)
    late = client.submit("p", 6)
    for one in [*here, *again, a.request()]:
        a.answer(one, one.value)
    assert [future.result(20) for future in futures] == list(range(6))
    assert late.result(20) == 6
    if not silent:
        b = make_peer(b.url)
    # It is back, and has them still: they are not wanted there any more.
    at_b, _ = b.welcome(shard="b")
    assert b.receive(protocol.Cancel)[1].ids == [one.request.id for one in there]
    future = client.submit("to_b", "again")
    b.answer(b.request(), "again")
    assert future.result(20) == "again"


def test_what_is_cancelled_at_a_shard_that_came_back_goes_on_elsewhere(client, two, make_peer):
    a, b = two["a"], two["b"]
    meet(client, two)
    future = client.submit("p", 1), client.submit("p", 2)
    here, there = a.request(), b.request()
    b.close()
    again = a.request()
    b = make_peer(b.url)
    at_b, _ = b.welcome(shard="b")
    assert b.receive(protocol.Cancel)[1].ids == [again.request.id] == [there.request.id]
    b.send(at_b, Result([Answer(again.request.id, Outcome.CANCELLED, None)]))
    other = client.submit("to_b", 3)
    b.answer(b.request(), 3)
    assert other.result(20) == 3
    for one in (here, again):
        a.answer(one, "fine")
    assert [one.result(20) for one in future] == ["fine", "fine"]


def test_a_pipelines_only_shard_is_waited_for(client, two, make_peer):
    a, b = two["a"], two["b"]
    meet(client, two)
    futures = [client.submit("to_b", 1)]
    first = b.request()
    b.close()
    futures.append(client.submit("to_b", 2))
    assert a.quiet()
    b = make_peer(b.url)
    b.welcome(shard="b")
    incoming = b.requests(2)
    assert incoming[0].request.id == first.request.id
    for one in incoming:
        b.answer(one, one.value)
    assert [future.result(20) for future in futures] == [1, 2]


def test_the_given_shard_is_not_needed_once_others_are_known(client, two, make_peer):
    a, b = two["a"], two["b"]
    meet(client, two)
    a.close()
    futures = [client.submit("p", number) for number in range(4)]
    for one in b.requests(4):
        b.answer(one, one.value)
    assert [future.result(20) for future in futures] == list(range(4))
    a = make_peer(a.url)
    # What it may still have had from before it was lost is called back.
    a.passes_over = (*a.passes_over, protocol.Cancel)
    a.welcome(shard="a")
    future = client.submit("to_a", 1)
    a.answer(a.request(), 1)
    assert future.result(20) == 1
    assert a.quiet()


def test_close_says_goodbye_to_every_shard(client, two):
    meet(client, two)
    futures = [client.submit("p", number) for number in range(2)]
    incoming = {name: peer.request() for name, peer in two.items()}
    client.close()
    assert all(isinstance(future.exception(20), laxity.Cancelled) for future in futures)
    for name, peer in two.items():
        assert peer.receive(protocol.Cancel)[1].ids == [incoming[name].request.id]
        peer.receive(protocol.Goodbye)


# ---- addresses -----------------------------------------------------------------------------------


def test_addresses_out_of_reach_do_not_matter_where_a_given_one_serves(client, two):
    a = two["a"]
    a.welcome(shard="a", **table(two, addresses={"a": NOBODY, "b": NOBODY}, p={"a": 1.0, "b": 9.0}))
    futures = [client.submit("p", number) for number in range(10)]
    for one in a.requests(10):
        a.answer(one, one.value)
    assert [future.result(20) for future in futures] == list(range(10))


def test_another_given_address_leads_to_a_shard_that_the_tables_address_does_not(two):
    a, b = two["a"], two["b"]
    with laxity.Client(f"{a.url},{b.url}") as client:
        a.welcome(shard="a", **table(two, addresses={"a": NOBODY, "b": NOBODY}, p={"b": 1.0}))
        future = client.submit("p", 1)
        b.welcome(shard="b")
        b.answer(b.request(), 1)
        assert future.result(20) == 1


def test_the_shard_at_a_given_address_is_found_again_there(client, two, make_peer):
    a = two["a"]
    for _ in range(3):
        a.welcome(shard="a", **table(two, addresses={"a": NOBODY}, p={"a": 1.0}))
        future = client.submit("p", 1)
        a.answer(a.request(), 1)
        assert future.result(20) == 1
        a.close()
        a = make_peer(a.url)


@pytest.mark.parametrize("address", ["nonsense", "tcp://no host:1", ""])
def test_what_is_no_address_is_no_harm(client, two, address):
    a = two["a"]
    a.welcome(shard="a", **table(two, addresses={"b": address}, p={"a": 1.0, "b": 1.0}, q={"b": 1.0}))
    with pytest.raises(laxity.Unavailable, match=r"that is no address to connect to|over the network"):
        client.infer("q", 1, slo=1.0)
    future = client.submit("p", 1)
    a.answer(a.request(), 1)
    assert future.result(20) == 1


def test_unreachable_shards_are_named(client, two):
    two["a"].welcome(shard="a", **table(two, addresses={"b": NOBODY}, p={"b": 1.0}))
    with pytest.raises(laxity.Unavailable, match=r"no shard could be reached .* tcp://127.0.0.1:1: nobody listens"):
        client.infer("p", 1, slo=1.0)


def test_a_second_connection_to_a_shard_is_given_up(client, two):
    """The table knows shard a by another name as well: it would take the second connection for the first one's
    successor, and answer there."""
    a = two["a"]
    alias = a.url.replace("127.0.0.1", "localhost")
    at_a, _ = a.welcome(shard="a", **table(two, addresses={"b": alias}, p={"a": 1.0, "b": 1.0}))
    future = client.submit("p", 1)
    incoming = a.request()
    second, _ = a.welcome(shard="a")
    assert second != at_a
    greeted, _ = a.welcome(shard="a", **table(two, addresses={"b": alias}, p={"a": 1.0, "b": 1.0}))
    assert greeted == at_a
    again = a.request()
    assert (again.sender, again.request.id) == (at_a, incoming.request.id)
    a.answer(again, 1)
    assert future.result(20) == 1
    assert a.quiet(1500)  # the alias is known now, and not tried again


def test_a_shard_that_is_another_than_the_table_says_gets_nothing(client, two):
    a, b = two["a"], two["b"]
    a.welcome(shard="a", **table(two, q={"b": 1.0}))
    future = client.submit("q", 1)
    for _ in range(2):
        b.welcome(shard="c")
    b.welcome(shard="b")
    b.answer(b.request(), 1)
    assert future.result(20) == 1


# ---- real shards -----------------------------------------------------------------------------------


class Pair:
    """Two clusters of one shard each, whose shards tell of each other."""

    def __init__(self, first, second, spec, devices):
        self.clusters = {"s0": first, "s1": second}
        self.spec = spec
        self.revision = 0
        for name, cluster in self.clusters.items():
            cluster.start(name=name, heartbeat=0.25)
            cluster.serve(spec, devices=devices)

    def route(self, **weights):
        self.revision += 1
        shards = [(name, cluster.shard.frontend) for name, cluster in self.clusters.items()]
        routes = [(self.spec.name, [(index, weights[name]) for index, name in enumerate(self.clusters)])]
        for cluster in self.clusters.values():
            cluster.shard.route(Routing(shards, routes, self.revision))

    def counts(self):
        return Counter({name: cluster.status().submitted for name, cluster in self.clusters.items()})


@pytest.fixture
def pair(cluster, echo):
    second = type(cluster)()
    try:
        yield Pair(cluster, second, echo, [DeviceConfig("emulated", "emulated")] * 2)
    finally:
        second.close()


def spread(client, pair, requests):
    """How many of so many requests each shard gets; all are answered."""
    before = pair.counts()
    futures = [client.submit("echo", number) for number in range(requests)]
    assert [future.result(30) for future in futures] == list(range(requests))
    return {name: count - before[name] for name, count in pair.counts().items()}


def test_real_shards_share_by_weight(pair):
    first = pair.clusters["s0"]
    pair.route(s0=0.25, s1=0.75)
    client = first.client()
    first.eventually(lambda: spread(client, pair, 40) == {"s0": 10, "s1": 30}, "both get their part")
    pair.route(s0=1.0, s1=0.0)
    first.eventually(lambda: spread(client, pair, 40) == {"s0": 40, "s1": 0}, "the change is followed")
    pair.route(s0=1.0, s1=1.0)
    first.eventually(lambda: spread(client, pair, 40) == {"s0": 20, "s1": 20}, "it comes back")
    for cluster in pair.clusters.values():
        status = cluster.settle()
        assert status.submitted == status.ended["ok"]


def test_a_real_shard_that_stops_loses_nothing(pair):
    first, second = pair.clusters.values()
    pair.route(s0=1.0, s1=1.0)
    client = first.client()
    first.eventually(lambda: spread(client, pair, 10) == {"s0": 5, "s1": 5}, "both get their part")
    address, backend = second.shard.frontend, second.shard.backend
    futures = [client.submit("echo", number) for number in range(1000)]
    second.stop_shard()
    futures += [client.submit("echo", number) for number in range(1000, 1100)]
    assert [future.result(30) for future in futures] == list(range(1100))
    second.start(name="s1", frontend=address, backend=backend)
    pair.route(s0=1.0, s1=1.0)
    second.wait_for(lambda status: status.agents == 1, "its agent is back")
    first.eventually(lambda: spread(client, pair, 10) == {"s0": 5, "s1": 5}, "it is used again")
    assert first.settle().undeliverable == 0
