"""From the store's records to the routing table that a shard tells."""

from __future__ import annotations

import msgspec

from broker.process import own_key_trouble
from broker.routing import Routing, RoutingFollower
from cluster.records import BrokerRecord, KeyRecord, PublicKey, ServingRecord
from laxity.keys import KeyFile, ServerKey
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


def key(*publics, role="shard", **fields):
    return KeyRecord(role=role, publics=[PublicKey(name, 0.0, until) for name, until in publics], **fields)


def test_a_table_has_the_keys_that_are_good_of_shards_that_serve_with_one():
    brokers = {name: msgspec.structs.replace(broker(name), public="new") for name in "abde"}
    brokers |= {"c": broker("c"), "a": msgspec.structs.replace(broker("a"), public="old")}
    keys = {
        "a": key(("new", None), ("old", 10.0), ("ended", 0.0)),
        "b": key(("new", None), revoked=1.0),
        "c": key(("new", None)),
        "d": key(("new", None), role="node"),
    }
    follower = RoutingFollower()
    table = follower.update({"p": served(a=1.0)}, brokers, 1, keys, 9.0)
    assert table.keys == [["old", "new"], [], [], [], []], "first that with which it serves"
    assert table.servers()[0] == ServerKey("a", "tcp://a", ["old", "new"])
    later = follower.update({"p": served(a=1.0)}, {}, 2, keys, 10.0)
    assert later.keys == [["new"]], "as long as it is known"
    assert not later.says_the_same(follower.update({"p": served(a=1.0)}, {}, 3, {}, 10.0))
    assert follower.update({"p": served(a=1.0)}, {}, 4, {}, 10.0).keys == []


def test_a_shards_part_of_the_requests():
    table = RoutingFollower().update(
        {"p": served(a=1.0, b=3.0), "q": served(b=1.0), "r": served(a=0.0)},
        {"a": broker("a"), "b": broker("b")},
        1,
        {},
        0.0,
    )
    assert table.shares("a") == {"p": 0.25, "q": 0.0}
    assert table.shares("b") == {"p": 0.75, "q": 1.0}


def test_a_shard_is_told_what_is_wrong_with_its_own_key():
    own = KeyFile(cluster="c", name="a", role="shard", public="mine", secret="")
    assert own_key_trouble(own, key(("mine", None)), 5.0) == ""
    for record, told in (
        (None, "the store has no key of a shard 'a'"),
        (key(("mine", None), role="node"), "the store has no key of a shard 'a'"),
        (key(("new", None), ("mine", 5.0)), "nobody comes here until it is started again with its new one"),
        (key(("new", None), ("mine", 6.0)), "start it again, so that it takes the new one"),
    ):
        assert told in own_key_trouble(own, record, 5.0)
