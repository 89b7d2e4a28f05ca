"""Clients and agents with keys at real shards: who is let in, what the others are told, and keys that are replaced."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

import laxity
from broker.routing import Routing
from broker.shell import Shard, ShardConfig
from cli.gateway import StoreLookup
from cli.main import main
from cli.publish import pipeline_record, publish_files
from cli.taps import TapClient, TapError
from cluster.control import Control
from cluster.observe.sidecar import Beginning, Sidecar
from cluster.records import (
    BrokerRecord,
    DevicePlacement,
    KeyRecord,
    Paths,
    PlacementRecord,
    PublicKey,
    ServingRecord,
    encode,
)
from cluster.shard_keys import ShardKeys
from cluster.store import open_store, sqlite_url
from cluster.store.base import Entry
from laxity.credentials import Credentials
from laxity.files import FileClient, FileNotHere, FileNotYet, TransferError
from laxity.gateway.gateway import Gateway
from laxity.keys import InvalidKey, KeyFile, Role, ServerKey, new_pair, read_key_file, write_key_file
from nodes.agent import Agent, AgentConfig
from nodes.device import DeviceConfig
from nodes.process import ClusterView, Unfit, check_fit, run_agent_process
from pipelines.load import load_spec
from tests.conftest import EMULATED, Cluster, RunningAgent, eventually

REFUSED = "the shard refused this key: it is unknown, revoked or expired there, or of another role"


class Keyring:
    """Keys in files, and the records of them that shards go by."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.records: dict[str, KeyRecord] = {}
        self.servers: list[ServerKey] = []

    def path(self, name: str) -> Path:
        return self._directory / f"{name}.key"

    def make(self, name: str, role: Role) -> str:
        """A new key, in place of another one where there is one; its file's path."""
        pair = new_pair()
        known = [*self.records[name].publics] if name in self.records else []
        self.records[name] = KeyRecord(role=role, publics=[PublicKey(pair.public, time.time()), *known])
        key = KeyFile(
            cluster="local", name=name, role=role, public=pair.public, secret=pair.secret, servers=self.servers
        )
        write_key_file(self.path(name), key, replace=True)
        return str(self.path(name))

    def end(self, name: str) -> None:
        """The newest key alone is good."""
        record = self.records[name]
        self.records[name] = msgspec.structs.replace(record, publics=record.publics[:1])

    def revoke(self, name: str) -> None:
        self.records[name] = msgspec.structs.replace(self.records[name], revoked=time.time())

    def publics(self, name: str) -> list[str]:
        return self.records[name].good(time.time())

    def server(self, name: str, address: str) -> ServerKey:
        return ServerKey(name, address, self.publics(name))


@pytest.fixture
def keys(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path)


class Secured:
    """A shard with a key, and what connects to it."""

    def __init__(self, cluster: Cluster, keys: Keyring, spec) -> None:
        self.cluster = cluster
        self.keys = keys
        self.spec = spec

    def start(self, **options) -> None:
        self.cluster.start(key=str(self.keys.path("s0")), **options)
        self.keys.servers = [self.keys.server("s0", self.cluster.shard.frontend)]
        self.admit()
        self.cluster.shard.apply(self.spec)

    def admit(self) -> None:
        self.cluster.shard.admit(dict(self.keys.records))

    def agent(self, name: str = "n1", **options) -> RunningAgent:
        agent = self.cluster.lone_agent((EMULATED,), name=name, key=str(self.keys.path(name)), **options)
        agent.hold(self.spec)
        self.tell(agent)
        return agent

    def tell(self, agent: RunningAgent) -> None:
        backend = self.cluster.shard.backend
        agent.agent.follow({"s0": backend}, [ServerKey("s0", backend, self.keys.publics("s0")[:1])])

    def has_agents(self, count: int) -> None:
        eventually(lambda: self.cluster.status().agents == count, f"{count} agents are there")


@pytest.fixture
def secured(cluster: Cluster, keys: Keyring, echo) -> Secured:
    keys.make("s0", "shard")
    secured = Secured(cluster, keys, echo)
    secured.start()
    return secured


def refused(url: str, why: str, key: str = "", **options) -> None:
    with laxity.Client(url, key=key, **options) as client:
        with pytest.raises(laxity.Unavailable) as caught:
            client.infer("echo", 1, slo=0.5)
        assert why in str(caught.value)


def test_requests_go_from_clients_to_agents_and_back(secured: Secured) -> None:
    keys, shard = secured.keys, secured.cluster.shard
    for name, role in (("n1", "node"), ("billing", "client"), ("operator", "operator")):
        keys.make(name, role)
    secured.admit()
    secured.agent()
    secured.has_agents(1)
    for name in ("billing", "operator"):
        with laxity.Client(shard.frontend, key=keys.path(name)) as client:
            assert client.infer("echo", {"a": [1, b"2" * 100_000]}) == {"a": [1, b"2" * 100_000]}

    async def ask() -> object:
        async with laxity.AsyncClient(shard.frontend, key=keys.path("billing")) as client:
            return await client.infer("echo", 3)

    assert asyncio.run(ask()) == 3


def test_who_is_not_let_in_is_told_why(secured: Secured, caplog: pytest.LogCaptureFixture) -> None:
    keys, url = secured.keys, secured.cluster.shard.frontend
    billing, gone = keys.make("billing", "client"), keys.make("gone", "client")
    keys.revoke("gone")
    secured.admit()
    stranger = keys.make("stranger", "client")  # of whom the shard does not know
    refused(url, "it wants a key")
    refused(url, REFUSED, stranger)
    refused(url, REFUSED, gone)
    keys.servers = [ServerKey("s0", url, [new_pair().public])]
    refused(url, "it is not the shard that the key file knows", keys.make("stale", "client"))
    with laxity.Client(url, key=billing) as client:
        client.wait_ready(20)
    assert "key 'gone' was revoked" in caplog.text
    assert re.search("it has no key|peers without a key", caplog.text)


def test_a_key_that_is_revoked_ends_the_connection(secured: Secured) -> None:
    keys, url = secured.keys, secured.cluster.shard.frontend
    billing = keys.make("billing", "client")
    secured.admit()
    with laxity.Client(url, key=billing) as client:
        client.wait_ready(20)
        future = client.submit("echo", 1)  # no agent is there
        secured.cluster.wait_for(lambda status: status.in_flight == 1, "it is in flight")
        keys.revoke("billing")
        secured.admit()
        with pytest.raises(laxity.Unavailable, match="key 'billing' was revoked"):
            future.result(20)
        eventually(lambda: not client.is_connected, "the client is cut")
        with pytest.raises(laxity.Unavailable, match="refused this key"):
            client.infer("echo", 1, slo=5.0)


def test_the_end_of_an_old_key_costs_no_request_where_the_file_has_the_new_one(secured: Secured) -> None:
    keys, cluster = secured.keys, secured.cluster
    billing = keys.make("billing", "client")
    secured.admit()
    with laxity.Client(cluster.shard.frontend, key=billing) as client:
        client.wait_ready(20)
        future = client.submit("echo", 1)
        cluster.wait_for(lambda status: status.in_flight == 1, "it is in flight")
        keys.make("billing", "client")
        keys.end("billing")
        keys.make("n1", "node")
        secured.admit()
        secured.agent()
        assert future.result(20) == 1


def test_a_shard_comes_back_with_its_second_key(secured: Secured) -> None:
    """What a rotation is to those who are connected: a shard tells clients of both keys, the store agents of one."""
    keys, cluster = secured.keys, secured.cluster
    keys.make("n1", "node")
    billing = keys.make("billing", "client")
    keys.make("s0", "shard")  # the file; the running shard has the first one
    shard = cluster.shard
    both = [("s0", shard.frontend)], [keys.publics("s0")]
    secured.admit()
    agent = secured.cluster.lone_agent((EMULATED,), name="n1", key=str(keys.path("n1")))
    agent.hold(secured.spec)
    agent.agent.follow({"s0": shard.backend}, [ServerKey("s0", shard.backend, keys.publics("s0")[1:])])
    secured.has_agents(1)
    shard.route(Routing(both[0], [("echo", [(0, 1.0)])], 1, both[1]))
    with laxity.Client(shard.frontend, key=billing) as client:
        assert client.infer("echo", 1) == 1
        cluster.stop_shard()
        future = client.submit("echo", 2)
        secured.start(frontend=shard.frontend, backend=shard.backend)
        keys.end("s0")
        secured.admit()
        secured.tell(agent)
        assert future.result(20) == 2


def test_an_agent_takes_its_new_key_without_losing_what_runs(cluster: Cluster, keys: Keyring, user_pipeline) -> None:
    spec = user_pipeline(SLOW)
    keys.make("s0", "shard")
    secured = Secured(cluster, keys, spec)
    secured.start()
    keys.make("n1", "node")
    billing = keys.make("billing", "client")
    secured.admit()
    agent = cluster.lone_agent([DeviceConfig("cpu", "cpu")], name="n1", key=str(keys.path("n1")))
    agent.hold(spec)
    secured.tell(agent)
    secured.has_agents(1)
    gate = keys.path("gate")
    with laxity.Client(cluster.shard.frontend, key=billing) as client:
        running = client.submit("user", str(gate))
        eventually(lambda: gate.exists(), "it runs")
        before = agent.agent.counts().reconnects
        keys.make("n1", "node")
        secured.admit()
        agent.agent.renew_key()
        waiting = client.submit("user", str(keys.path("other")))
        gate.unlink()
        assert running.result(20) == waiting.result(20) == "done"
        eventually(lambda: agent.agent.counts().reconnects == before + 1, "it has connected anew")
        keys.end("n1")  # the old key is over
        secured.admit()
        assert client.infer("user", str(keys.path("third"))) == "done"
    assert agent.error is None
    cluster.settle(ok=3)


SLOW = """
import pathlib, time
def model(inputs):
    paths = [pathlib.Path(each) for each in inputs]
    if paths[0].name == "gate.key":
        paths[0].touch()
        while paths[0].exists():
            time.sleep(0.005)
    return ["done" for _ in inputs]
"""


def test_an_agent_waits_until_its_key_is_known_and_takes_a_new_one_from_its_file(
    secured: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    keys, cluster = secured.keys, secured.cluster
    keys.make("n1", "node")
    agent = secured.agent()
    eventually(lambda: REFUSED in caplog.text, "it says why")
    secured.admit()
    secured.has_agents(1)
    # Its key ends before it was told of the new one: it looks into its file by itself.
    keys.make("n1", "node")
    keys.end("n1")
    secured.admit()
    eventually(lambda: cluster.status().agents == 1 and agent.agent.counts().reconnects == 1, "it is there again")
    assert agent.error is None


@pytest.mark.parametrize(
    ("publics", "key", "why"),
    [
        (["other"], True, "it has another key than the store tells"),
        ([], True, "serves in plain text, to which no connection is made with a key"),
        (["own"], False, "it wants a key"),
        (None, False, "it wants a key"),
    ],
)
def test_an_agent_that_cannot_connect_says_why(
    publics: list[str] | None, key: bool, why: str, secured: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    keys, backend = secured.keys, secured.cluster.shard.backend
    keys.make("n1", "node")
    secured.admit()
    agent = secured.cluster.lone_agent(name="n1", key=str(keys.path("n1")) if key else "")
    agent.hold(secured.spec)
    known = {"own": keys.publics("s0")[0], "other": new_pair().public}
    servers = [] if publics is None else [ServerKey("s0", backend, [known[each] for each in publics])]
    agent.agent.follow({"s0": backend}, servers)
    eventually(lambda: why in caplog.text, "it says why")
    if key:
        secured.tell(agent)  # as soon as it is told better, it is there
        secured.has_agents(1)


def test_an_agent_does_not_go_over_the_network_without_a_key(cluster: Cluster, echo, caplog) -> None:
    agent = cluster.lone_agent()
    agent.hold(echo)
    agent.connect("tcp://10.255.255.1:9")
    eventually(lambda: "over the network, which needs a key" in caplog.text, "it says why")
    assert agent.agent.counts().shards == 0


def test_an_agents_key_is_its_own(keys: Keyring) -> None:
    keys.make("n1", "node")
    with pytest.raises(InvalidKey, match="is the key of 'n1' with role node: 'n2' needs its own"):
        Agent(AgentConfig(name="n2", devices=[EMULATED], key=str(keys.path("n1"))), lambda _: None)
    client = keys.make("billing", "client")
    with pytest.raises(InvalidKey, match="with role client"):
        Agent(AgentConfig(name="billing", devices=[EMULATED], key=client), lambda _: None)


def test_files_and_recordings_take_the_keys_of_operators(secured: Secured, tmp_path: Path) -> None:
    keys, shard = secured.keys, secured.cluster.shard
    operator, billing, node = keys.make("operator", "operator"), keys.make("billing", "client"), keys.make("n1", "node")
    secured.admit()
    root = tmp_path / "pipeline"
    root.mkdir()
    code = b"def model(inputs): return inputs  # " + b"x" * 3_000_000
    (root / "code.py").write_bytes(code)
    (root / "pipeline.yaml").write_text(PIPELINE)
    record = pipeline_record(load_spec(str(root / "pipeline.yaml")), lambda _: None)
    shard.keep_files(record.files, [])
    with pytest.raises(Exception, match="may not upload files"):
        publish_files(record, [shard.frontend], lambda _: None, Credentials(billing))
    publish_files(record, [shard.frontend], lambda _: None, Credentials(operator))
    largest = max(record.files, key=lambda file: file.size)
    # As agents do, with what the store says of the shard's key.
    agents = Credentials(node, False, [ServerKey("s0", shard.backend, keys.publics("s0"))])
    with FileClient(shard.backend, credentials=agents) as client:
        assert b"".join(client.fetch(largest.digest, largest.size)) == code
    with pytest.raises(TransferError, match="it wants a key"):
        FileClient(shard.backend)
    with TapClient({"s0": shard.frontend}, [], True, Credentials(operator)) as taps:
        while not taps.heard():
            taps.poll(0.1)
    with (
        TapClient({"s0": shard.frontend}, [], True, Credentials(billing)) as taps,
        pytest.raises(TapError, match="may not record requests"),
    ):
        until_it_raises(taps)
    stranger = keys.make("stranger", "operator")
    with (
        TapClient({"s0": shard.frontend}, [], True, Credentials(stranger)) as taps,
        pytest.raises(TapError, match="the shard refused this key"),
    ):
        until_it_raises(taps)
    with TapClient({"s0": shard.frontend}, [], True) as taps:
        eventually(lambda: bool(taps.poll(0.1) or taps.troubles()), "it says what is wrong")
        assert "it wants a key" in taps.troubles()[0]


def test_shards_get_files_from_each_other(secured: Secured, tmp_path: Path) -> None:
    keys, shard = secured.keys, secured.cluster.shard
    keys.make("s1", "shard")
    operator, node = keys.make("operator", "operator"), keys.make("n1", "node")
    secured.admit()
    root = tmp_path / "pipeline"
    root.mkdir()
    (root / "code.py").write_text("def model(inputs): return inputs")
    (root / "pipeline.yaml").write_text(PIPELINE)
    record = pipeline_record(load_spec(str(root / "pipeline.yaml")), lambda _: None)
    shard.keep_files(record.files, [])
    publish_files(record, [shard.frontend], lambda _: None, Credentials(operator))
    late = Shard(ShardConfig(name="s1", key=str(keys.path("s1")), cache=str(tmp_path / "late")))
    thread = threading.Thread(target=late.run)
    thread.start()
    try:
        late.admit(dict(keys.records))
        late.keep_files(record.files, [shard.frontend], [keys.server("s0", shard.frontend)])
        file = record.files[0]
        credentials = Credentials(node, False, [keys.server("s1", late.backend)])

        def has_it() -> bool:
            try:
                with FileClient(late.backend, credentials=credentials) as client:
                    return len(b"".join(client.fetch(file.digest, file.size))) == file.size
            except (FileNotHere, FileNotYet):
                return False

        eventually(has_it, "it has what was uploaded to the other one")
    finally:
        late.stop()
        thread.join()


PIPELINE = """
name: p
slo: 5s
stages:
  a: {executor: python, model: code:model}
output: a
"""


def until_it_raises(taps: TapClient) -> None:
    for _ in range(300):
        taps.poll(0.1)


# ---- what finds shards in the store --------------------------------------------------------------


@pytest.fixture
def stored(secured: Secured, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Writes what the shard says of itself, and all keys, into a store; the store's address."""
    url = sqlite_url(tmp_path / "store.db")
    store = open_store(url)
    paths = Paths("local")

    def write() -> str:
        shard = secured.cluster.shard
        assert shard.key is not None
        broker = BrokerRecord(shard.frontend, shard.backend, 1, "h", public=shard.key.public)
        store.put(paths.broker("s0"), encode(broker))
        for name, record in secured.keys.records.items():
            store.put(paths.key(name), encode(record))
        secured.admit()
        return url

    model = secured.spec.model_key("echo")
    store.put(paths.served("echo"), encode(ServingRecord(secured.spec.version, secured.spec, {"s0": 1.0})))
    store.put(paths.placement("n1"), encode(PlacementRecord({0: DevicePlacement("s0", [model])})))
    yield write
    store.close()


class AgentProcess:
    """What `laxity node run` runs, in a thread."""

    def __init__(self, config: AgentConfig, url: str) -> None:
        self.control: Control[AgentConfig] = Control()
        sidecar = Sidecar("", "", [], Beginning("agent", config.name, ""))
        arguments = (config, url, "local", self.control, sidecar)
        self._thread = threading.Thread(target=run_agent_process, args=arguments)
        self._thread.start()

    def stop(self) -> None:
        self.control.ask_stop()
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def agent_process() -> Iterator[Callable[[AgentConfig, str], AgentProcess]]:
    running: list[AgentProcess] = []

    def start(config: AgentConfig, url: str) -> AgentProcess:
        running.append(AgentProcess(config, url))
        return running[-1]

    yield start
    for process in running:
        process.stop()


def test_an_agent_finds_the_shards_key_in_the_store_and_reads_its_own_again(
    secured: Secured, stored: Callable[[], str], agent_process, caplog: pytest.LogCaptureFixture
) -> None:
    keys, cluster = secured.keys, secured.cluster
    path, billing = keys.make("n1", "node"), keys.make("billing", "client")
    config = AgentConfig(name="n1", devices=[EMULATED], key=path)
    process = agent_process(config, stored())
    secured.has_agents(1)
    with laxity.Client(cluster.shard.frontend, key=billing) as client:
        assert client.infer("echo", 1) == 1
        keys.path("n1").write_text("{")
        process.control.ask_reload()
        eventually(lambda: "is no key file" in caplog.text, "it goes on with what it had")
        assert client.infer("echo", 2) == 2
        keys.make("n1", "node")
        stored()
        caplog.clear()
        caplog.set_level("INFO")
        process.control.ask_reload()
        eventually(lambda: "connected to shard s0" in caplog.text, "it has connected anew")
        keys.end("n1")
        stored()
        assert client.infer("echo", 3) == 3
        # The shard comes back with another key, of which the store tells.
        where = {"frontend": cluster.shard.frontend, "backend": cluster.shard.backend}
        cluster.stop_shard()
        keys.make("s0", "shard")
        secured.start(**where)
        stored()
        secured.has_agents(1)
    with pytest.raises(InvalidKey, match="is a key of cluster 'local'; make one in 'other'"):
        run_agent_process(config, stored(), "other", Control(), Sidecar("", "", [], Beginning("agent", "n1", "")))


def test_an_agent_that_no_shard_lets_work_ends(secured: Secured, stored: Callable[[], str]) -> None:
    keys = secured.keys
    path = keys.make("n1", "node")
    keys.revoke("n1")
    for config, why in (
        (AgentConfig(name="n1", devices=[EMULATED], key=path), "the key of agent 'n1' was revoked"),
        (AgentConfig(name="n2", devices=[EMULATED]), "agent 'n2' has no key, and shard s0 at tcp://"),
        (AgentConfig(name="n2", devices=[EMULATED], plain=True), "`laxity keys new n2 --role node`"),
    ):
        sidecar = Sidecar("", "", [], Beginning("agent", config.name, ""))
        url = stored()
        with pytest.raises(Unfit, match=why):
            run_agent_process(config, url, "local", Control(), sidecar)
        store = open_store(url)
        try:
            assert store.get(Paths("local").node(config.name)) is None
        finally:
            store.close()


@pytest.mark.parametrize(
    ("key", "plain", "shards", "fit"),
    [
        ("", False, [], True),
        ("", False, [ServerKey("a", "tcp://127.0.0.1:1", [])], True),
        ("", False, [ServerKey("a", "tcp://10.0.0.1:1", [])], False),
        ("", True, [ServerKey("a", "tcp://10.0.0.1:1", [])], True),
        ("", False, [ServerKey("a", "tcp://10.0.0.1:1", ["K"]), ServerKey("b", "ipc:///b", [])], True),
        ("n1.key", False, [ServerKey("a", "tcp://10.0.0.1:1", [])], True),
    ],
)
def test_an_agent_without_a_key_needs_a_shard_without_one(
    key: str, plain: bool, shards: list[ServerKey], fit: bool
) -> None:
    config = AgentConfig(name="n1", devices=[EMULATED], key=key, plain=plain)
    with nullcontext() if fit else pytest.raises(Unfit, match="agent 'n1' has no key"):
        check_fit(config, None, shards)


def test_commands_know_the_shards_keys_from_the_store(secured: Secured, stored: Callable[[], str], tmp_path) -> None:
    keys = secured.keys
    keys.servers = []
    operator, node = keys.make("operator", "operator"), keys.make("n1", "node")
    url = stored()
    secured.agent()

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, arguments, env={"LAXITY_KEY": operator, "XDG_RUNTIME_DIR": str(tmp_path)})
        return result.exit_code, result.output

    submit = ("submit", "echo", "--text", "hello")
    status, said = run(*submit, "--store", url)
    assert (status, said.splitlines()[0]) == (0, "hello")
    status, said = run(*submit, "--store", url, "--key", node)
    assert status == 1
    assert "is the key of a node; give that of a client or an operator" in said
    other = keys.path("operator").with_name("other.key")
    write_key_file(other, msgspec.structs.replace(read_key_file(operator), cluster="other"))
    status, said = run(*submit, "--store", url, "--key", str(other))
    assert status == 1
    assert "is a key of the cluster 'other', and this is 'local'" in said
    status, said = run(*submit, "--shard", "tcp://10.0.0.1:7100", "--key", "")
    assert status == 2
    assert "over the network, which needs a key" in said
    status, said = run("record", str(tmp_path / "r.rec"), "--duration", "100ms", "--store", url)
    assert status == 0


def test_a_gateway_finds_the_shards_keys_and_takes_its_new_one(secured: Secured, stored: Callable[[], str]) -> None:
    keys = secured.keys
    keys.servers = []
    path = keys.make("gateway", "client")
    lookup = StoreLookup(stored(), "local")

    async def ready(gateway: Gateway) -> None:
        async with asyncio.timeout(30):
            while gateway.unready:
                await asyncio.sleep(0.01)

    async def serve() -> None:
        gateway = Gateway("", lookup, 10, path)
        await gateway.start()
        try:
            await ready(gateway)
            keys.make("gateway", "client")
            keys.end("gateway")
            stored()
            async with asyncio.timeout(30):
                while not gateway.unready:
                    await asyncio.sleep(0.01)
            await ready(gateway)
        finally:
            await gateway.close()

    asyncio.run(serve())
    with pytest.raises(InvalidKey):
        asyncio.run(Gateway("", lookup, 10, str(keys.path("none"))).start())
    lookup.close()


# ---- what the store says of shards ---------------------------------------------------------------


def test_a_shard_is_connected_to_only_with_a_key_under_its_own_name(caplog: pytest.LogCaptureFixture) -> None:
    good, old, other, gone = (new_pair().public for _ in range(4))
    paths = Paths("local")

    def broker(public: str) -> BrokerRecord:
        return BrokerRecord(frontend="tcp://h:1", backend="tcp://h:2", pid=1, host="h", public=public)

    records = {
        paths.broker("s0"): broker(good),
        paths.broker("s1"): broker(old),
        paths.broker("s2"): broker(""),
        paths.broker("s3"): broker(other),  # one that another shard has
        paths.broker("s4"): broker(gone),
        paths.broker("s5"): broker(new_pair().public),
        paths.key("s0"): KeyRecord(role="shard", publics=[PublicKey(good, 0.0)]),
        paths.key("s1"): KeyRecord(role="shard", publics=[PublicKey(other, 0.0), PublicKey(old, 0.0, 1e12)]),
        paths.key("s4"): KeyRecord(role="shard", publics=[PublicKey(gone, 0.0)], revoked=1.0),
        paths.key("s5"): KeyRecord(role="client", publics=[PublicKey(good, 0.0)]),
    }
    entries = {key: Entry(key, encode(record), 1, 1, 0) for key, record in records.items()}
    view = ClusterView(paths, "n1")
    assert any(paths.key("s0").startswith(prefix) for prefix in view.prefixes())
    for _ in range(2):
        assert view.shards(entries) == dict.fromkeys(("s0", "s1", "s2"), "tcp://h:2")
    assert view.servers == [
        ServerKey("s0", "tcp://h:2", [good]),
        ServerKey("s1", "tcp://h:2", [old]),
        ServerKey("s2", "tcp://h:2", []),
    ]
    assert caplog.text.count("which is not good under its name") == 3
    expired = KeyRecord(role="shard", publics=[PublicKey(good, 0.0, 10.0)])
    known = ShardKeys("frontend")
    assert [server.address for server in known.of({"s0": broker(good)}, {"s0": expired}, 9.0)] == ["tcp://h:1"]
    assert known.of({"s0": broker(good)}, {"s0": expired}, 10.0) == []
