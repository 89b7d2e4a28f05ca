"""A client of two shard processes, one of which is killed or frozen under load: everything submitted is accounted for,
and nothing is lost whose budget lasts."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter

import pytest

from cluster.records import BrokerRecord, Paths, ServingRecord, decode, encode
from cluster.store import open_store, sqlite_url
from laxity import Client, Outcome
from nodes.device import DeviceConfig
from pipelines.load import parse_spec

PATHS = Paths("test")
SHARDS = ["s0", "s1"]
SPEC = """
name: slow
slo: 60s
stages:
  only: {executor: emulated, profile: {alpha_ms: 5, beta_ms: 0}, max_batch: 1}
output: only
"""


class Shards:
    """The two shards, each with an agent of this process that serves it alone."""

    def __init__(self, cluster, directory, spec):
        self.url = sqlite_url(directory / "store.db")
        self.store = open_store(self.url)
        self._log = (directory / "log").open("wb")
        self._cluster = cluster
        self._records = {}
        self.processes = {}
        self.serve(spec, s0=1.0, s1=1.0)
        for name in SHARDS:
            self.start(name)
            agent = cluster.lone_agent([DeviceConfig("emulated", "emulated")] * 4, name=f"agent-{name}")
            agent.hold(spec)
            agent.connect(self._records[name].backend)

    def serve(self, spec, **weights):
        self.store.put(PATHS.served(spec.name), encode(ServingRecord(spec.version, spec, weights)))

    def start(self, name):
        """Start a shard; again at the addresses that it had."""
        command = [sys.executable, "-P", "-m", "cli.main", "broker", "run", "--shard", name, "--heartbeat", "200ms"]
        before = self._records.get(name)
        if before is not None:
            command += ["--frontend", before.frontend, "--backend", before.backend]
        command += ["--store", self.url, "--cluster", "test"]
        self.processes[name] = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        pid = self.processes[name].pid
        self._cluster.eventually(lambda: self.record(name) and self.record(name).pid == pid, "it is registered")
        self._records[name] = self.record(name)

    def record(self, name):
        entry = self.store.get(PATHS.broker(name))
        return None if entry is None else decode(BrokerRecord, name, entry.value)

    def frontend(self, name):
        return self._records[name].frontend

    def submitted(self, name):
        """How many requests it has got; about a second old."""
        return self.record(name).counters["submitted"]

    def settle(self, asked):
        """Wait until the shards' records tell of all the requests that there were."""
        self._cluster.eventually(lambda: sum(map(self.submitted, SHARDS)) == asked, "the records are up to date")

    def close(self):
        for process in self.processes.values():
            process.kill()
            process.wait()
        self._log.close()
        self.store.close()


@pytest.fixture
def slow():
    return parse_spec(SPEC, file="slow.yaml", root="")


@pytest.fixture
def shards(cluster, tmp_path, slow):
    shards = Shards(cluster, tmp_path, slow)
    try:
        yield shards
    finally:
        shards.close()


@pytest.fixture
def client(cluster, shards):
    """A client that uses both."""
    with Client(shards.frontend("s0")) as client:

        def both():
            assert client.infer("slow", 0) == 0
            return all(shards.submitted(name) for name in SHARDS)

        cluster.eventually(both, "both are used")
        yield client


def load(client, count, answered):
    futures = [client.submit("slow", number) for number in range(count)]
    for future in futures:
        future.add_done_callback(answered.append)
    return futures


@pytest.mark.parametrize(
    ("blow", "victim"),
    [
        (signal.SIGKILL, "s0"),
        (signal.SIGKILL, "s1"),
        (signal.SIGSTOP, "s0"),
        (signal.SIGSTOP, "s1"),
        (signal.SIGTERM, "s0"),
    ],
)
def test_a_shard_lost_under_load(cluster, shards, client, victim, blow):
    answered = []
    futures = load(client, 600, answered)
    assert futures[0].result(60) == 0
    process = shards.processes[victim]
    process.send_signal(blow)
    futures += load(client, 100, answered)
    assert Counter(future.reply(60).outcome for future in futures) == {Outcome.OK: 700}
    assert [future.result() for future in futures] == [*range(600), *range(100)]
    assert len(answered) == 700
    if blow == signal.SIGSTOP:
        process.send_signal(signal.SIGCONT)
    else:
        process.wait(30)
        shards.start(victim)
    before = shards.submitted(victim)

    def used():
        assert [client.infer("slow", number) for number in range(8)] == list(range(8))
        return shards.submitted(victim) >= before + 4

    cluster.eventually(used, "it is used again")


def test_budgets_that_do_not_last_end_once_and_in_time(cluster, shards, client):
    answered = []
    shards.processes["s1"].send_signal(signal.SIGSTOP)
    futures = [client.submit("slow", number, slo=0.3) for number in range(100)]
    for future in futures:
        future.add_done_callback(answered.append)
    counted = Counter(future.reply(60).outcome for future in futures)
    assert counted.total() == len(answered) == 100
    assert counted.keys() <= {Outcome.OK, Outcome.EXPIRED, Outcome.DROPPED}
    assert counted[Outcome.OK] >= 25
    shards.processes["s1"].send_signal(signal.SIGCONT)


def test_weights_in_the_store_are_followed(cluster, shards, slow):
    asked = 0

    def is_spread(client, s0, s1):
        nonlocal asked
        shards.settle(asked)
        before = [shards.submitted(name) for name in SHARDS]
        assert list(client.map("slow", range(12))) == list(range(12))
        asked += 12
        shards.settle(asked)
        return [shards.submitted(name) - count for name, count in zip(SHARDS, before, strict=True)] == [s0, s1]

    with Client(shards.frontend("s1")) as client:
        cluster.eventually(lambda: is_spread(client, 6, 6), "both are used")
        shards.serve(slow, s0=0.25, s1=0.75)
        cluster.eventually(lambda: is_spread(client, 3, 9), "the weights are followed")
        shards.serve(slow, s0=1.0)
        cluster.eventually(lambda: is_spread(client, 12, 0), "the other one is left")
