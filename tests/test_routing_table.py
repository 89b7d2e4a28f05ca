"""From the store's records to the routing table that a shard tells."""

from __future__ import annotations

from broker.routing import Routing, RoutingFollower
from cluster.records import BrokerRecord, ServingRecord
from pipelines.spec import PipelineSpec, StageSpec


def served(**shards):
    spec = PipelineSpec(name="p", slo=1.0, stages={"s": StageSpec(executor="emulated")}, output="s")
    return ServingRecord(spec.version, spec, shards)


def broker(address):
    return BrokerRecord(f"tcp://{address}", "tcp://backend", 1, "host")


def test_a_table_names_shards_and_their_weights():
    table = RoutingFollower().update(
        {"q": served(b=1.0), "p": served(b=0.75, a=0.25)},
        {"b": broker("b"), "a": broker("a"), "c": broker("c")},
        7,
        {},
        0.0,
    )
    assert table == Routing(
        [("a", "tcp://a"), ("b", "tcp://b"), ("c", "tcp://c")], [("p", [(0, 0.25), (1, 0.75)]), ("q", [(1, 1.0)])], 7
    )


def test_shards_that_never_registered_are_left_out():
    table = RoutingFollower().update({"p": served(a=0.5, b=0.5), "q": served(b=1.0)}, {"a": broker("a")}, 1, {}, 0.0)
    assert table == Routing([("a", "tcp://a")], [("p", [(0, 0.5)]), ("q", [])], 1)


def test_a_shard_whose_lease_ended_is_known_by_its_last_address_while_it_serves():
    follower = RoutingFollower()
    both = {"a": broker("a"), "b": broker("b")}
    before = follower.update({"p": served(a=0.5, b=0.5)}, both, 1, {}, 0.0)
    assert follower.update({"p": served(a=0.5, b=0.5)}, {"a": both["a"]}, 2, {}, 0.0).says_the_same(before)
    moved = follower.update({"p": served(a=0.5, b=0.5)}, {"a": both["a"], "b": broker("elsewhere")}, 3, {}, 0.0)
    assert moved.shards == [("a", "tcp://a"), ("b", "tcp://elsewhere")]
    assert not moved.says_the_same(before)
    assert follower.update({"p": served(a=1.0)}, {"a": both["a"]}, 4, {}, 0.0).shards == [("a", "tcp://a")]
    # It serves again, but whether it is still there nobody knows.
    assert follower.update({"p": served(a=0.5, b=0.5)}, {"a": both["a"]}, 5, {}, 0.0).routes == [("p", [(0, 0.5)])]
