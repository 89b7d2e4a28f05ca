"""Processes that are killed, frozen, stopped and started again: every request ends once, and the rest goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import closing

import msgspec
import pytest

from broker.shell import Shard, ShardConfig
from cluster.records import (
    BrokerRecord,
    DevicePlacement,
    DeviceRecord,
    NodeRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    ServingRecord,
    decode,
    encode,
)
from cluster.store import open_store, sqlite_url
from laxity import Client, Unavailable, protocol
from laxity.protocol import Goodbye, Ready
from laxity.version import __version__
from nodes.device import DeviceConfig
from pipelines.load import parse_spec

SLOW = """
name: slow
slo: 30s
stages:
  first: {executor: emulated, profile: {alpha_ms: 20, beta_ms: 0}, max_batch: 1}
  second: {executor: emulated, profile: {alpha_ms: 5, beta_ms: 0}, inputs: [first], max_batch: 1}
output: second
"""
PATHS = Paths("test")


class Processes:
    """The processes of a cluster beside this one, around a store in a file."""

    def __init__(self, directory):
        self.url = sqlite_url(directory / "store.db")
        self.store = open_store(self.url)
        self._log = (directory / "log").open("wb")
        self._running = []
        # What a killed agent cannot clean up lies here; a socket's path must be short.
        self._temporary = tempfile.TemporaryDirectory()

    def apply(self, spec):
        self.store.put(PATHS.pipeline(spec.name), encode(PipelineRecord(spec.version, spec)))
        self.store.put(PATHS.served(spec.name), encode(ServingRecord(spec.version, spec, {"s0": 1.0})))

    def place(self, agent, devices, *specs, shards=("s0",)):
        """Have an agent's devices hold all models, and work for the shards in turn."""
        models = [spec.model_key(stage) for spec in specs for stage in spec.stages]
        placed = {number: DevicePlacement(shards[number % len(shards)], models) for number in range(devices)}
        self.store.put(PATHS.placement(agent), encode(PlacementRecord(placed)))

    def announce(self, shard):
        """Have agents work for a shard of this process."""
        record = BrokerRecord(shard.frontend, shard.backend, os.getpid(), socket.gethostname())
        self.store.put(PATHS.broker(shard.config.name), encode(record))

    def start(self, *arguments, **options):
        """Run ``laxity ARGUMENTS``."""
        command = [sys.executable, "-P", "-m", "cli.main", *arguments, "--store", self.url, "--cluster", "test"]
        environment = os.environ | {"TMPDIR": self._temporary.name}
        process = subprocess.Popen(
            command, env=environment, **{"stdout": self._log, "stderr": subprocess.STDOUT, **options}
        )
        self._running.append(process)
        return process

    def agent(self, name, devices, **options):
        return self.start("node", "run", "--agent", name, "--devices", devices, **options)

    def close(self):
        for process in self._running:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._log.close()
        self.store.close()
        self._temporary.cleanup()


@pytest.fixture
def processes(tmp_path):
    processes = Processes(tmp_path)
    try:
        yield processes
    finally:
        processes.close()


@pytest.fixture
def other_shard():
    """A shard s1, in a thread."""
    shard = Shard(ShardConfig(name="s1", heartbeat=0.3))
    thread = threading.Thread(target=shard.run)
    thread.start()
    yield shard
    shard.stop()
    thread.join()


@pytest.fixture
def slow():
    return parse_spec(SLOW, file="slow.yaml", root="")


def load(cluster, processes, spec, agents):
    """Serve ``spec`` on agents of four emulated devices each; their processes."""
    cluster.shard.apply(spec)
    processes.apply(spec)
    processes.announce(cluster.shard)
    for name in agents:
        processes.place(name, 4, spec)
    started = {name: processes.agent(name, "emulated:4") for name in agents}
    cluster.wait_for(lambda status: status.devices == 4 * len(agents), "the agents are there")
    return started


def outcomes(futures):
    return Counter(str(future.reply(60).outcome) for future in futures)


# ---- agents -----------------------------------------------------------------------------------


def test_an_agent_killed_under_load_and_started_again(cluster, processes, slow):
    cluster.start(heartbeat=0.25)
    started = load(cluster, processes, slow, ["a0", "a1"])
    client = cluster.client()
    answered = []
    futures = [client.submit("slow", number) for number in range(400)]
    for future in futures:
        future.add_done_callback(answered.append)
    cluster.wait_for(lambda status: status.ended["ok"] >= 20, "the first are answered")
    started["a0"].kill()
    status = cluster.wait_for(lambda status: status.agents_lost == 1, "the loss is noticed")
    assert status.in_flight > 0
    processes.agent("a0", "emulated:4")
    cluster.wait_for(lambda status: status.devices == 8, "it is back")
    assert [future.result(60) for future in futures] == list(range(400))
    assert len(answered) == 400
    assert cluster.settle(ok=400).agents == 2


def test_every_agent_killed_twice_leaves_no_request_unanswered(cluster, processes, slow):
    cluster.start(heartbeat=0.25)
    started = load(cluster, processes, slow, ["a0"])
    client = cluster.client()
    futures = [client.submit("slow", number) for number in range(100)]
    for lost in (1, 2):
        done = cluster.status().ended["ok"]
        cluster.wait_for(lambda status, done=done: status.ended["ok"] >= done + 5, "some are answered")
        started["a0"].kill()
        cluster.wait_for(lambda status, lost=lost: status.agents_lost == lost, "the loss is noticed")
        started["a0"] = processes.agent("a0", "emulated:4")
    counted = outcomes(futures)
    assert set(counted) <= {"ok", "unavailable"}
    assert counted.total() == 100
    assert counted["ok"] >= 84  # eight batches at most were with the agent at each loss
    cluster.settle(**counted)


def test_a_worker_dies_with_its_killed_agent(cluster, processes, user_pipeline):
    code = "import os\ndef model(feeds):\n    return [os.getpid()] * len(feeds)\n"
    spec = user_pipeline(code, "max_batch: 1")
    cluster.start()
    cluster.shard.apply(spec)
    processes.apply(spec)
    processes.announce(cluster.shard)
    processes.place("a0", 1, spec)
    agent = processes.agent("a0", "cpu")
    client = cluster.client()
    worker = os.pidfd_open(client.infer("user", 1))
    try:
        agent.kill()
        agent.wait()
        cluster.eventually(lambda: ended(worker), "the worker has ended")
    finally:
        os.close(worker)
    processes.agent("a0", "cpu")
    assert client.infer("user", 2) > 0
    cluster.settle(ok=2)


def ended(pidfd):
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    return False


def test_an_agent_frozen_and_thawed(cluster, processes, slow):
    cluster.start(heartbeat=0.3)
    started = load(cluster, processes, slow, ["a0", "a1"])
    client = cluster.client()
    futures = [client.submit("slow", number) for number in range(200)]
    cluster.wait_for(lambda status: status.ended["ok"] >= 10, "the first are answered")
    started["a0"].send_signal(signal.SIGSTOP)
    cluster.wait_for(lambda status: status.agents_lost == 1, "its silence is noticed")
    assert [future.result(60) for future in futures] == list(range(200))
    cluster.settle(ok=200)

    more = [client.submit("slow", number) for number in range(200)]
    started["a0"].send_signal(signal.SIGCONT)
    cluster.wait_for(lambda status: status.agents == 2, "it is back")
    assert [future.result(60) for future in more] == list(range(200))
    assert [client.infer("slow", number) for number in range(3)] == [0, 1, 2]
    cluster.settle(ok=403)


def test_an_agent_of_two_shards_frozen_and_thawed(cluster, processes, other_shard, slow):
    cluster.start(heartbeat=0.3)
    for shard in (cluster.shard, other_shard):
        shard.apply(slow)
        processes.announce(shard)
    processes.apply(slow)
    for agent in ("a0", "a1"):
        processes.place(agent, 4, slow, shards=("s0", "s1"))
    frozen, _ = processes.agent("a0", "emulated:4"), processes.agent("a1", "emulated:4")

    def both(condition, what):
        cluster.eventually(lambda: all(condition(s.status()) for s in (cluster.shard, other_shard)), what)

    both(lambda status: status.devices == 4, "each has two devices of each agent")
    with Client(other_shard.frontend) as other_client:
        clients = [cluster.client(), other_client]
        futures = [[client.submit("slow", number) for number in range(100)] for client in clients]
        both(lambda status: status.ended["ok"] >= 5, "the first are answered")
        frozen.send_signal(signal.SIGSTOP)
        both(lambda status: status.agents_lost == 1, "its silence is noticed")
        assert [[future.result(60) for future in sent] for sent in futures] == [list(range(100))] * 2
        more = [[client.submit("slow", number) for number in range(50)] for client in clients]
        frozen.send_signal(signal.SIGCONT)
        both(lambda status: status.devices == 4, "it has taken its place again")
        assert [[future.result(60) for future in sent] for sent in more] == [list(range(50))] * 2
        both(lambda status: status.in_flight == 0 and status.ended["ok"] == 150, "all are accounted for")


def test_an_agent_terminated_again_and_again_loses_nothing(cluster, processes, slow):
    cluster.start()
    agent = load(cluster, processes, slow, ["a0"])["a0"]
    client = cluster.client()
    futures = [client.submit("slow", number) for number in range(300)]
    for _ in range(3):  # a request has two attempts
        done = cluster.status().ended["ok"]
        cluster.wait_for(lambda status, done=done: status.ended["ok"] >= done + 5, "some are answered")
        agent.terminate()
        assert agent.wait(30) == 0
        agent = processes.agent("a0", "emulated:4")
    assert [future.result(60) for future in futures] == list(range(300))
    assert cluster.settle(ok=300).agents_lost == 0


def test_an_agent_says_what_its_devices_are(cluster, processes):
    processes.agent("a0", "emulated:1:A100:81920+emulated:1:T4")
    cluster.eventually(lambda: processes.store.get(PATHS.node("a0")) is not None, "it has registered")
    record = decode(NodeRecord, "a0", processes.store.get(PATHS.node("a0")).value)
    assert record.release == __version__
    assert record.devices == [DeviceRecord(0, "A100", memory_mb=81920.0), DeviceRecord(1, "T4")]


def test_an_agent_started_while_the_store_is_away_waits_for_it(cluster, make_etcd, tmp_path):
    etcd = make_etcd(1)
    etcd.kill(*etcd.names)
    command = ["node", "run", "--agent", "a0", "--devices", "emulated:1", "--store", etcd.url, "--cluster", "test"]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "cli.main", *command], stderr=subprocess.PIPE, text=True
    ) as agent:
        try:
            assert any("waiting for the store" in line for line in agent.stderr)
            etcd.start()
            with closing(open_store(etcd.url)) as store:
                cluster.eventually(lambda: store.get(PATHS.node("a0")) is not None, "it has registered")
        finally:
            agent.terminate()
            agent.stderr.read()


def test_an_agent_frozen_for_a_moment_is_not_lost(cluster, processes, slow):
    cluster.start(heartbeat=60.0)
    started = load(cluster, processes, slow, ["a0"])
    client = cluster.client()
    futures = [client.submit("slow", number) for number in range(40)]
    for _ in range(3):
        started["a0"].send_signal(signal.SIGSTOP)
        cluster.status()
        started["a0"].send_signal(signal.SIGCONT)
    assert [future.result(60) for future in futures] == list(range(40))
    assert cluster.settle(ok=40).agents_lost == 0


def test_an_agent_process_refused_by_its_shard_says_why(processes, make_peer, slow):
    backend = make_peer("tcp://127.0.0.1:*", protocol.decode_from_agent)
    record = BrokerRecord("tcp://127.0.0.1:1", backend.url, os.getpid(), "here")
    processes.store.put(PATHS.broker("s0"), encode(record))
    processes.apply(slow)
    processes.place("a0", 1, slow)
    agent = processes.agent("a0", "emulated:1", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    sender, _, _ = backend.receive(Ready)
    backend.send(sender, Goodbye("protocol version 1 is not spoken here: upgrade the agent"))
    _, said = agent.communicate(timeout=30)
    assert agent.returncode == 1
    assert "protocol version 1 is not spoken here: upgrade the agent" in said.splitlines()[-1]


# ---- shards -------------------------------------------------------------------------------------


def test_a_shard_killed_under_load_and_started_again(cluster, processes, slow):
    processes.apply(slow)
    shard = processes.start("broker", "run", "--shard", "s0")

    def address():
        entry = processes.store.get(PATHS.broker("s0"))
        return None if entry is None else decode(BrokerRecord, "s0", entry.value)

    cluster.eventually(lambda: address() is not None, "the shard is there")
    record = address()
    agent = cluster.lone_agent([DeviceConfig("emulated", "emulated")] * 4)
    agent.hold(slow)
    agent.connect(record.backend)
    with Client(record.frontend) as client:
        futures = [client.submit("slow", number) for number in range(200)]
        assert futures[0].result(30) == 0
        shard.kill()
        shard.wait()
        processes.start("broker", "run", "--shard", "s0", "--frontend", record.frontend, "--backend", record.backend)
        assert [future.result(60) for future in futures] == list(range(200))


def test_a_stopped_shard_that_nobody_replaces(cluster, slow):
    cluster.serve(slow)
    client = cluster.client()
    futures = [client.submit("slow", number, slo=3.0) for number in range(30)]
    assert futures[0].result(30) == 0
    cluster.stop_shard()
    counted = outcomes(futures)
    assert set(counted) == {"ok", "expired"}
    assert counted.total() == 30
    with pytest.raises(Unavailable, match="no shard could be reached"):
        client.infer("slow", 1, slo=0.3)


def test_agents_and_services_find_a_shard_that_is_started_again(cluster, slow, echo):
    cluster.start(heartbeat=0.3)
    agent = cluster.serve(echo, slow, devices=[DeviceConfig("emulated", "emulated")] * 2)
    client = cluster.client()
    for _ in range(3):
        futures = [client.submit("slow", number) for number in range(20)]
        assert client.infer("echo", "value") == "value"
        frontend, backend = cluster.shard.frontend, cluster.shard.backend
        cluster.stop_shard()
        cluster.start(heartbeat=0.3, frontend=frontend, backend=backend)
        cluster.wait_for(lambda status: status.agents == 1, "the agent is back")
        assert [future.result(60) for future in futures] == list(range(20))
        assert client.infer("slow", "value") == "value"
        cluster.settle()
    assert agent.error is None
    assert [state.late for state in agent.agent.states()] == [0, 0]


def test_agents_and_services_move_to_another_shard(cluster, slow):
    agent = cluster.serve(slow)
    first = cluster.shard
    with Client(f"{first.frontend},tcp://127.0.0.1:1") as early:
        assert early.infer("slow", 1) == 1
    cluster.stop_shard()
    cluster.start()
    assert cluster.shard.backend != first.backend
    with Client(f"{first.frontend},{cluster.shard.frontend}") as client:
        future = client.submit("slow", 2)
        agent.connect(cluster.shard.backend)
        assert future.result(30) == 2
        agent.agent.follow({})  # a record that vanishes says nothing of the shard
        assert client.infer("slow", 3) == 3
        agent.agent.place({})
        status = cluster.wait_for(lambda status: status.agents == 0, "the agent has left")
        assert status.agents_lost == 0
        agent.hold(slow)
        assert client.infer("slow", 4) == 4
    cluster.settle(ok=3)


def test_an_agent_process_goes_on_for_a_shard_whose_record_vanishes(cluster, processes, other_shard, slow):
    cluster.start()
    load(cluster, processes, slow, ["a0"])
    processes.store.delete(PATHS.broker("s0"))
    other_shard.apply(slow)
    processes.announce(other_shard)
    processes.place("a0", 4, slow, shards=("s0", "s1"))
    cluster.eventually(lambda: other_shard.status().devices == 2, "half of the devices have moved")
    assert cluster.status().devices == 2
    assert cluster.client().infer("slow", 1) == 1
    with Client(other_shard.frontend) as client:
        assert client.infer("slow", 2) == 2
    assert cluster.settle(ok=1).agents_lost == 0


def test_an_agent_process_follows_its_shard_s_record(cluster, processes, slow):
    cluster.start()
    load(cluster, processes, slow, ["a0"])
    assert cluster.client().infer("slow", 1) == 1
    cluster.stop_shard()
    cluster.start()
    cluster.shard.apply(slow)
    processes.announce(cluster.shard)
    assert cluster.client().infer("slow", 2) == 2
    newer = msgspec.structs.replace(slow, slo=20.0)
    processes.apply(newer)
    processes.place("a0", 4, slow, newer)
    cluster.shard.apply(newer)
    assert cluster.client().infer("slow", 3) == 3
    cluster.settle(ok=2)
