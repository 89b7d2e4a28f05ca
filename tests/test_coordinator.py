"""A leading coordinator around a store in memory, in virtual time; agents and shards are played by their records."""

from __future__ import annotations

import pytest

from cluster.coordinator.figures import CoordinatorCounts
from cluster.coordinator.leader import CoordinatorConfig, Leader
from cluster.coordinator.provider import Provider
from cluster.election import Election, NotLeaderError
from cluster.membership import Follower
from cluster.planner.settings import Settings
from cluster.records import (
    READY,
    BrokerRecord,
    DeviceRecord,
    DrainRecord,
    LeaderRecord,
    NodeRecord,
    NodeStateRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    ProfileRecord,
    ServingRecord,
    TuningRecord,
    decode,
    encode,
)
from cluster.store.memory import MemoryStore
from cluster.tuning.report import ReportRecord, StageReport
from pipelines.load import parse_spec

PATHS = Paths("c")
TURN = 0.5


def spec_of(slo="400ms"):
    return parse_spec(
        f"""
name: two
slo: {slo}
stages:
  a: {{executor: emulated, profile: {{alpha_ms: 2, beta_ms: 4}}}}
  b: {{executor: emulated, profile: {{alpha_ms: 1, beta_ms: 4}}, inputs: [a]}}
output: b
""",
        file="two.yaml",
        root="",
    )


class World:
    """A cluster whose agents do at once what the placement says, and whose shards report the rates that are set."""

    def __init__(self, *, nodes=2, devices=4, shards=("s0",), settings=None):
        self.now = 1000.0
        self.store = MemoryStore(clock=lambda: self.now)
        self.settings = settings or Settings()
        self.devices = devices
        self.nodes = {f"n{number}" for number in range(nodes)}
        self.frozen = set()
        self.silent = set()
        self.forget = 60.0
        self.rates = {}
        self.in_flight = {}
        self._number = 0
        self.shards = set(shards)
        self.leader = self.candidate("c0")

    def candidate(self, name):
        election = Election(self.store, PATHS.leader, encode(LeaderRecord(name, "h", 1)), 5.0)
        return Candidate(self, name, election)

    def apply(self, spec):
        self.store.put(PATHS.pipeline(spec.name), encode(PipelineRecord(spec.version, spec)))

    def records(self, kind, prefix):
        return {
            entry.key.removeprefix(prefix): decode(kind, entry.key, entry.value)
            for entry in self.store.list(prefix).entries
        }

    def placed(self):
        """Model keys by (node, device)."""
        return {
            (node, number): device
            for node, record in self.records(PlacementRecord, PATHS.placements).items()
            for number, device in record.devices.items()
        }

    def serving(self):
        return self.records(ServingRecord, PATHS.serving)

    def states(self):
        return {node: record.state for node, record in self.records(NodeStateRecord, PATHS.states).items()}

    def members(self):
        """What agents and shards write of themselves."""
        placed = self.placed()
        for node in {f"n{n}" for n in range(9)} - self.nodes:
            self.store.delete(PATHS.node(node))
        for node in self.nodes - self.frozen:
            devices = [
                DeviceRecord(d, "A100", dict.fromkeys(placed[node, d].models if (node, d) in placed else [], READY))
                for d in range(self.devices)
            ]
            self.store.put(PATHS.node(node), encode(NodeRecord(1, "h", "ready", devices)))
        for shard in ("s0", "s1", "s2"):
            if shard not in self.shards:
                self.store.delete(PATHS.broker(shard))
                self.store.delete(PATHS.report(shard))
                continue
            self.store.put(PATHS.broker(shard), encode(BrokerRecord("tcp://h:1", "tcp://h:2", 1, "h")))
            if shard in self.silent:
                continue
            self._number += 1
            part = 1 / len(self.shards)
            stages = [StageReport(m, round(r * part), 0, 0, 0, 0, 1, 0.0, 0.0, [], {}) for m, r in self.rates.items()]
            record = ReportRecord(self._number, 1.0, stages, self.in_flight, [])
            self.store.put(PATHS.report(shard), encode(record))

    def run(self, seconds, *candidates):
        end = self.now + seconds
        while self.now < end:
            self.now += TURN
            self.members()
            for candidate in candidates or (self.leader,):
                candidate.turn()


class Candidate:
    """What a coordinator's process does each turn."""

    def __init__(self, world, name, election):
        self.world = world
        self.name = name
        self.election = election
        self.follower = Follower(world.store, PATHS.root)
        self.term = None
        self.number = 0

    def turn(self):
        now = self.world.now
        changed = self.follower.poll(0.0)
        self.election.beat(now)
        if not self.election.is_leader(now):
            self.term = None
            return
        if self.term is None or self.number != self.election.term:
            self.number = self.election.term
            config = CoordinatorConfig(name=self.name, settings=self.world.settings, forget=self.world.forget)
            self.term = Leader(config, PATHS, self.election, Provider("", ""), CoordinatorCounts(), now)
        self.term.step(now, self.follower, changed)


@pytest.fixture
def world():
    return World()


def test_a_pipeline_is_placed_loaded_and_then_served(world):
    spec = spec_of()
    world.apply(spec)
    world.run(10)
    served = world.serving()["two"]
    assert served.version == spec.version
    assert served.shards == {"s0": pytest.approx(1.0)}
    held = {model for device in world.placed().values() for model in device.models}
    assert held == {spec.model_key("a"), spec.model_key("b")}
    assert world.states() == {"n0": "active", "n1": "active"}


def test_nothing_is_written_while_nothing_changes_except_what_is_to_be_renewed(world):
    world.apply(spec_of())
    world.run(60)
    before = {entry.key: entry.mod_revision for entry in world.store.list(PATHS.root).entries}
    world.run(20)
    after = {entry.key: entry.mod_revision for entry in world.store.list(PATHS.root).entries}
    changed = {key for key in after if after[key] != before.get(key)}
    members = (PATHS.nodes, PATHS.brokers, PATHS.reports, PATHS.tuning)
    assert all(key.startswith(members) for key in changed), changed


def test_more_load_gets_more_devices():
    world = World(nodes=4, settings=Settings(rest=True))
    spec = spec_of()
    world.apply(spec)
    world.run(20)
    few = sum(1 for device in world.placed().values() if spec.model_key("a") in device.models)
    world.rates = {spec.model_key("a"): 2000.0, spec.model_key("b"): 2000.0}
    world.run(20)
    assert sum(1 for device in world.placed().values() if spec.model_key("a") in device.models) > few


def test_a_lost_node_is_replaced_after_one_ttl_and_comes_back(world):
    world.settings = Settings(rest=True)
    spec = spec_of()
    world.apply(spec)
    world.run(20)
    victim = next(node for (node, _), device in world.placed().items() if device.models)
    world.nodes.discard(victim)
    world.run(15)
    assert world.states()[victim] == "lost"
    held = {m for (node, _), device in world.placed().items() if node != victim for m in device.models}
    assert held == {spec.model_key("a"), spec.model_key("b")}
    world.nodes.add(victim)
    world.run(10)
    assert world.states()[victim] in ("active", "standby")


def test_a_drained_node_is_emptied_and_used_again_when_resumed():
    world = World(settings=Settings(rest=False))
    spec = spec_of()
    world.apply(spec)
    world.run(20)
    world.store.put(PATHS.drain("n0"), encode(DrainRecord("disk")))
    world.run(10)
    assert not any(device.models for (node, _), device in world.placed().items() if node == "n0")
    assert world.states()["n0"] == "standby"
    world.store.delete(PATHS.drain("n0"))
    world.run(10)
    assert world.states()["n0"] == "active"


def test_a_new_version_is_served_once_it_is_loaded_and_the_old_one_goes_when_it_is_empty(world):
    old, new = spec_of(), spec_of("300ms")
    world.apply(old)
    world.run(15)
    world.in_flight = {f"two@{old.version}": 3}
    world.apply(new)
    world.run(10)
    assert world.serving()["two"].version == new.version
    held = {model for device in world.placed().values() for model in device.models}
    assert {old.model_key("a"), old.model_key("b"), new.model_key("a"), new.model_key("b")} <= held
    world.in_flight = {f"two@{new.version}": 1}
    world.run(10)
    held = {model for device in world.placed().values() for model in device.models}
    assert held == {new.model_key("a"), new.model_key("b")}


def test_a_deleted_pipeline_is_taken_away(world):
    spec = spec_of()
    world.apply(spec)
    world.run(15)
    world.store.delete(PATHS.pipeline("two"))
    world.run(10)
    assert world.serving() == {}
    assert not any(device.models for device in world.placed().values())
    assert world.records(TuningRecord, PATHS.tuning) == {}


def test_what_was_measured_goes_with_the_version_that_it_is_of(world):
    spec, other = spec_of(), spec_of("500ms")
    world.apply(spec)
    world.run(3.0)
    record = ProfileRecord([(1, 0.010)], 0.5, 100.0, "h")
    for version in (spec, other):
        world.store.put(PATHS.profile(version.model_key("a"), "A100"), encode(record))
    world.run(3.0)
    assert list(world.records(ProfileRecord, PATHS.profiles)) == [f"two@{spec.version}~a/A100"]
    world.store.delete(PATHS.pipeline("two"))
    world.run(60.0)
    assert not world.placed()
    assert not world.records(ProfileRecord, PATHS.profiles)


def test_another_leads_within_one_ttl_and_a_second_and_the_old_one_can_write_nothing(world):
    first, second = world.leader, world.candidate("c1")
    world.apply(spec_of())
    world.run(10, first, second)
    assert first.election.is_leader(world.now)
    world.run(6, second)
    assert second.election.is_leader(world.now)
    assert not first.election.is_leader(world.now)
    with pytest.raises(NotLeaderError):
        first.election.transaction(world.now, [], [])


def test_a_new_leader_moves_nothing(world):
    world.apply(spec_of())
    first, second = world.leader, world.candidate("c1")
    world.run(20, first, second)
    before = world.placed()
    world.run(20, second)
    assert second.election.is_leader(world.now)
    assert world.placed() == before


def test_a_lost_shard_loses_its_part():
    world = World(nodes=2, devices=4, shards=("s0", "s1"), settings=Settings(rest=False))
    spec = spec_of()
    world.apply(spec)
    world.run(20)
    assert set(world.serving()["two"].shards) == {"s0", "s1"}
    world.shards = {"s1"}
    world.run(15)
    assert set(world.serving()["two"].shards) == {"s1"}
    assert all(device.shard == "s1" for device in world.placed().values() if device.models)


def test_without_any_shard_everything_stays_loaded_and_served(world):
    world.apply(spec_of())
    world.run(15)
    before, serving = world.placed(), world.serving()
    world.shards = set()
    world.run(30)
    assert world.placed() == before
    assert world.serving() == serving
    world.shards = {"s0"}
    world.run(5)
    assert world.placed() == before


def test_an_outage_makes_nobody_missing_and_a_new_term_begins_anew(world):
    world.apply(spec_of())
    world.run(15)
    before, serving = world.placed(), world.serving()
    term = world.leader.term
    world.now += 60.0  # everything stands still; all leases end
    world.nodes, nodes = set(), world.nodes
    world.shards = set()
    world.run(3)
    assert world.leader.term is not term
    world.nodes, world.shards = nodes, {"s0"}
    world.run(10)
    assert world.placed() == before
    assert world.serving() == serving


def test_a_pipeline_whose_record_cannot_be_read_any_more_stays_served(world):
    world.apply(spec_of())
    world.run(15)
    before = world.placed()
    world.store.put(PATHS.pipeline("two"), b'{"version": "newer"}')
    world.run(10, world.leader)
    assert set(world.serving()) == {"two"}
    another = world.candidate("c1")
    world.run(20, another)  # which never saw the record that could be read
    assert another.term is not None
    assert set(world.serving()) == {"two"}
    assert world.placed() == before


def test_rates_are_not_judged_while_a_shard_is_silent():
    world = World(nodes=4, shards=("s0", "s1"), settings=Settings(rest=True, patience=3.0))
    spec = spec_of()
    model = spec.model_key("a")
    world.apply(spec)
    world.rates = {model: 3000.0, spec.model_key("b"): 3000.0}
    world.run(60)
    before = sum(model in device.models for device in world.placed().values())
    world.silent = {"s1"}
    world.run(20)
    assert sum(model in device.models for device in world.placed().values()) == before


def test_a_node_that_never_comes_back_is_forgotten(world):
    world.apply(spec_of())
    world.run(15)
    world.nodes.discard("n1")
    world.run(20)
    assert world.states()["n1"] == "lost"
    world.run(world.forget)
    assert "n1" not in world.states()
    assert world.store.get(PATHS.placement("n1")) is None


def test_what_cannot_be_read_disturbs_nothing_else(world, caplog):
    world.apply(spec_of())
    world.store.put(PATHS.pipeline("garbage"), b"{")
    world.store.put(PATHS.node("n9"), b"\xff")
    world.run(15)
    assert set(world.serving()) == {"two"}
    assert "garbage" in caplog.text


def test_what_cannot_have_been_measured_is_said_once_and_stops_no_coordinator(world, caplog):
    spec = spec_of()
    model = spec.model_key("a")
    world.apply(spec)
    figures = StageReport(model, 9, 9, 1, 0, 0, 1, 0.0, 0.0, [], {"A100": [(0, 1.0)]})
    good = StageReport(spec.model_key("b"), 9, 9, 1, 0, 0, 1, 0.0, 0.0, [], {"A100": [(1, 1e-3)]})
    world.store.put(PATHS.broker("s9"), encode(BrokerRecord("tcp://h:1", "tcp://h:2", 1, "h")))
    world.store.put(PATHS.report("s9"), encode(ReportRecord(1, 1.0, [figures, good], {}, [])))
    for number, value in enumerate(
        [b'{"profile": [[0, 1]]}', PROFILE % b"-1e6", PROFILE % b"1e308", PROFILE % b"1e400"]
    ):
        world.store.put(PATHS.profile(model, f"kind {number}"), value)
    world.store.put(
        PATHS.profiles + model.replace("/", "~") + "/a b", encode(ProfileRecord([(1, 0.01)], 0.5, 1.0, "h"))
    )
    world.run(10)
    assert set(world.serving()) == {"two"}
    assert world.store.list(PATHS.profiles).entries == []
    assert sum("cannot be true" in line and model in line for line in caplog.messages) == 1
    assert sum("kind%202" in line for line in caplog.messages) == 1


PROFILE = b'{"profile": [[1, 0.01]], "load_seconds": %s, "memory_mb": 1, "measured_at_host": "h"}'


def test_what_was_measured_stays_while_it_is_not_known_what_is_wanted(world):
    spec, newer = spec_of(), spec_of("500ms")
    world.apply(spec)
    world.run(10)
    world.store.put(PATHS.pipeline("two"), b'{"version": "newer"}')
    key = PATHS.profile(newer.model_key("a"), "A100")
    world.store.put(key, encode(ProfileRecord([(1, 0.01)], 0.5, 100.0, "h")))
    world.run(10)
    assert world.store.get(key) is not None
    world.apply(spec)
    world.run(5)
    assert world.store.get(key) is None
