"""Fixtures that several test modules share."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import zmq

from broker.shell import Shard, ShardConfig, ShardStatus
from cluster.store import open_store
from cluster.store.base import StoreError
from cluster.store.etcd_members import EtcdMembers
from laxity import Client, protocol
from laxity.outcomes import Outcome
from laxity.payload import Payload, Unpacker, decode, encode, pack
from laxity.protocol import Answer, Request, Result
from nodes.agent import Agent, AgentConfig, DeviceState, Work
from nodes.device import DeviceConfig
from pipelines.load import load_spec, parse_spec
from pipelines.spec import PipelineSpec

WAIT_MS = 20_000
"""How long a peer waits for what must come, in milliseconds; a test that runs into it fails."""


@pytest.fixture(autouse=True, scope="session")
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Shards and agents of tests keep files in a directory of their own, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Ctrl-C ends what tests start also where they run in a script's background, where shells have it ignored: what is
    ignored stays so in all that is started."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Incoming:
    """A request as a peer got it."""

    sender: bytes
    request: Request
    payload: Payload

    @property
    def value(self) -> Any:
        return decode(self.payload)


class Peer:
    """A hand-driven shard's frontend (or backend, with that one's ``decode``): a real ROUTER that does what the
    test says and nothing else."""

    def __init__(
        self, address: str = "tcp://127.0.0.1:*", decode: Callable[[bytes], Any] = protocol.decode_from_client
    ) -> None:
        self._decode = decode
        self.passes_over: tuple[type, ...] = (protocol.Heartbeat,)
        """What comes unasked."""
        self._context: zmq.Context[Any] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.set(zmq.LINGER, 1000)
        self._router.set(zmq.ROUTER_MANDATORY, 1)
        self._prepare()
        self._router.bind(address)
        self.url: str = self._router.get(zmq.LAST_ENDPOINT).decode()

    def _prepare(self) -> None:
        """Before the socket is bound."""

    def receive(self, *kinds: type) -> tuple[bytes, Any, list[bytes]]:
        """(sender, message, frames) of the next message of one of the kinds."""
        while True:
            assert self._router.poll(WAIT_MS), f"no {', '.join(kind.__name__ for kind in kinds)} came"
            sender, header, *frames = self._router.recv_multipart()
            message = self._decode(header)
            if type(message) in kinds:
                return sender, message, frames
            assert type(message) in self.passes_over, f"unexpected {message!r}"

    def waits(self, milliseconds: int) -> bool:
        """Whether a message is there, or comes within that long."""
        return bool(self._router.poll(milliseconds))

    def quiet(self, milliseconds: int = 50) -> bool:
        """Whether nothing but heartbeats comes for that long."""
        while self._router.poll(milliseconds):
            header = self._router.recv_multipart()[1]
            if type(protocol.decode_from_client(header)) is not protocol.Heartbeat:
                return False
        return True

    def send(self, to: bytes, message: Any, frames: list[Any] | None = None) -> None:
        self._router.send_multipart([to, protocol.encode(message), *(frames or [])])

    def send_raw(self, to: bytes, *frames: bytes) -> None:
        self._router.send_multipart([to, *frames])

    def welcome(self, **options: Any) -> tuple[bytes, protocol.Hello]:
        """Take HELLO and answer it; (sender, HELLO)."""
        sender, hello, _ = self.receive(protocol.Hello)
        self.welcome_again(sender, **options)
        return sender, hello

    def welcome_again(self, sender: bytes, **options: Any) -> None:
        fields: dict[str, Any] = {"version": 1, "shard": "peer", "heartbeat_us": 5_000_000, **options}
        self.send(sender, protocol.Welcome(**fields))

    def submits(self) -> list[Incoming]:
        """The requests of the next SUBMIT."""
        sender, submit, frames = self.receive(protocol.Submit)
        unpacker = Unpacker(frames)
        found = [Incoming(sender, request, unpacker.take(request.payload)) for request in submit.requests]
        unpacker.finish()
        return found

    def requests(self, count: int) -> list[Incoming]:
        """The next ``count`` requests."""
        found: list[Incoming] = []
        while len(found) < count:
            found += self.submits()
        assert len(found) == count
        return found

    def request(self) -> Incoming:
        """The next request."""
        return self.requests(1)[0]

    def answer(self, incoming: Incoming, value: Any, **fields: Any) -> None:
        """Answer ``ok``."""
        payload = encode(value)
        answer = Answer(incoming.request.id, Outcome.OK, payload.node, **fields)
        self.send(incoming.sender, Result([answer]), pack([payload]))

    def refuse(self, incoming: Incoming, outcome: Outcome, **fields: Any) -> None:
        """Answer anything else."""
        self.send(incoming.sender, Result([Answer(incoming.request.id, outcome, None, **fields)]))

    def echo(self, until: Callable[[], bool]) -> None:
        """Welcome everybody and answer each request with its own payload, until told otherwise."""
        while not until():
            if not self._router.poll(20):
                continue
            sender, header, *frames = self._router.recv_multipart()
            message = protocol.decode_from_client(header)
            if type(message) is protocol.Hello:
                self.welcome_again(sender)
            elif type(message) is protocol.Submit:
                answers = [Answer(request.id, Outcome.OK, request.payload) for request in message.requests]
                with suppress(zmq.ZMQError):  # a client that has left
                    self.send(sender, Result(answers), frames)

    def close(self) -> None:
        self._router.close()
        self._context.term()


@pytest.fixture
def make_peer() -> Iterator[Callable[..., Peer]]:
    """Makes peers, and closes them in the end (closing one twice does no harm)."""
    peers: list[Peer] = []

    def make(*arguments: Any) -> Peer:
        peers.append(Peer(*arguments))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()


@pytest.fixture
def peer(make_peer: Callable[..., Peer]) -> Peer:
    """A peer on a port of the system's choice."""
    return make_peer()


ECHO = """
name: echo
slo: 30s
stages:
  echo: {executor: emulated, profile: {alpha_ms: 0, beta_ms: 0}, max_batch: 1}
output: echo
"""
"""Answers what it gets, at once: a batch that can hold one request waits for no other."""
EMULATED = DeviceConfig("emulated", "emulated")
WAIT = 30.0
"""How long a test waits for what must come, in seconds; a test that runs into it fails."""


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as ``condition`` holds."""
    pause = threading.Event()
    ends = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < ends, f"{what}: not within {WAIT:g} s"
        pause.wait(0.005)


class RunningAgent:
    """An agent in a thread of this process, and what it says about its devices."""

    def __init__(self, config: AgentConfig) -> None:
        self.error: BaseException | None = None
        """What ended it by itself."""
        self.states: list[DeviceState] = []
        self._news = threading.Condition()
        self.agent = Agent(config, self._changed)
        self._thread = threading.Thread(target=self._run, name=f"agent {config.name}")
        self._thread.start()

    def _run(self) -> None:
        try:
            self.agent.run()
        except BaseException as error:
            self.error = error

    def _changed(self, states: list[DeviceState]) -> None:
        with self._news:
            self.states = states
            self._news.notify_all()

    def wait_for(self, condition: Callable[[list[DeviceState]], bool]) -> list[DeviceState]:
        """The devices' states as soon as they fulfil ``condition``."""
        with self._news:
            assert self._news.wait_for(lambda: bool(self.states) and condition(self.states), WAIT), self.states
            return self.states

    def hold(self, *specs: PipelineSpec) -> list[DeviceState]:
        """Have every device hold all models of ``specs`` for shard s0; returns once each is loaded or given up."""
        models = {spec.model_key(stage): (spec, stage) for spec in specs for stage in spec.stages}
        self.agent.place(dict.fromkeys(range(len(self.agent.config.devices)), Work("s0", models)))

        def settled(states: list[DeviceState]) -> bool:
            return all(
                set(state.models) == set(models)
                and all(said == "ready" or said.startswith("failed") for said in state.models.values())
                for state in states
            )

        return self.wait_for(settled)

    def connect(self, backend: str) -> None:
        """Shard s0 is at this address."""
        self.agent.follow({"s0": backend})

    def join(self) -> None:
        """Wait until it has ended."""
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), "the agent does not end"

    def stop(self) -> None:
        self.agent.stop()
        self.join()


class Cluster:
    """A shard in a thread, agents in threads, clients: all of them real, on ports of the system's choice."""

    def __init__(self) -> None:
        self.agents: list[RunningAgent] = []
        self._clients: list[Client] = []
        self._specs: list[PipelineSpec] = []
        self.shard: Shard
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        """What ended the shard's thread by itself."""

    def start(self, **options: Any) -> None:
        """Start a shard (another one, after :meth:`stop_shard`); ``options`` are its configuration's, or its own."""
        own = {name: options.pop(name) for name in ("wall", "handshake", "patience") if name in options}
        self.shard = Shard(ShardConfig(**{"name": "s0", **options}), **own)
        self._thread = threading.Thread(target=self._run, args=(self.shard,), name="shard")
        self._thread.start()
        for spec in self._specs:
            self.shard.apply(spec)

    def _run(self, shard: Shard) -> None:
        try:
            shard.run()
        except BaseException as error:
            self.failure = error

    def stop_shard(self) -> None:
        if self._thread is not None:
            self.shard.stop()
            self._thread.join(WAIT)
            assert not self._thread.is_alive(), "the shard does not end"
            self._thread = None

    def serve(
        self, *specs: PipelineSpec, devices: Sequence[DeviceConfig] = (EMULATED,), **options: Any
    ) -> RunningAgent:
        """Serve pipelines on a new agent's devices, which hold all their models; returns when they are loaded and
        the shard knows the agent. Starts a shard where none runs."""
        if self._thread is None:
            self.start()
        for spec in specs:
            self._specs.append(spec)
            self.shard.apply(spec)
        known = self.status().agents
        agent = self.lone_agent(devices, **options)
        agent.hold(*specs)
        agent.connect(self.shard.backend)
        eventually(lambda: self.status().agents > known, "the shard knows the agent")
        return agent

    def lone_agent(self, devices: Sequence[DeviceConfig] = (EMULATED,), **options: Any) -> RunningAgent:
        """A new agent that holds nothing and works for nobody yet."""
        agent = RunningAgent(AgentConfig(**{"name": f"a{len(self.agents)}", "devices": list(devices), **options}))
        self.agents.append(agent)
        return agent

    def client(self, **options: Any) -> Client:
        """A new client of the shard."""
        self._clients.append(Client(self.shard.frontend, **options))
        return self._clients[-1]

    def status(self) -> ShardStatus:
        assert self.failure is None, f"the shard's thread ended: {self.failure!r}"
        return self.shard.status()

    def eventually(self, condition: Callable[[], bool], what: str) -> None:
        """Return as soon as ``condition`` holds."""
        eventually(condition, what)

    def wait_for(self, condition: Callable[[ShardStatus], bool], what: str) -> ShardStatus:
        """The shard's counters as soon as they fulfil ``condition``."""
        found: list[ShardStatus] = []

        def holds() -> bool:
            found.append(self.status())
            return condition(found[-1])

        eventually(holds, what)
        return found[-1]

    def settle(self, **ended: int) -> ShardStatus:
        """The counters once nothing is in flight. They must add up, and be ``ended`` where that is given: outcomes
        that it does not name are 0."""
        status = self.wait_for(lambda status: status.in_flight == 0, "nothing is in flight")
        assert status.submitted == sum(status.ended.values())
        assert not any(status.queued.values())
        if ended:
            assert {outcome: count for outcome, count in status.ended.items() if count} == ended
        return status

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for agent in self.agents:
            agent.stop()
        self.stop_shard()
        assert self.failure is None, f"the shard's thread ended: {self.failure!r}"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster without shard and agents yet: see :meth:`Cluster.start` and :meth:`Cluster.serve`."""
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def echo() -> PipelineSpec:
    """The pipeline :data:`ECHO`."""
    return parse_spec(ECHO, file="echo.yaml", root="")


@pytest.fixture
def user_pipeline(tmp_path: Path) -> Callable[..., PipelineSpec]:
    """Makes a pipeline ``user`` of one ``python`` stage from the text of its module, which has a function
    ``model``; the other arguments are lines of its file."""

    def make(code: str, *stage: str, slo: str = "20s", name: str = "user") -> PipelineSpec:
        root = tmp_path / name
        root.mkdir()
        (root / f"{name}_code.py").write_text(code)
        lines = [f"name: {name}", f"slo: {slo}", "stages:", "  stage:", "    executor: python"]
        lines += [f"    model: {name}_code:model", *(f"    {line}" for line in stage), "output: stage"]
        file = root / "pipeline.yaml"
        file.write_text("\n".join(lines))
        return load_spec(str(file))

    return make


class RunningEtcd:
    """The members of an etcd with mTLS, as processes that end with this one."""

    def __init__(self, directory: Path, members: int) -> None:
        self.members = EtcdMembers(directory, members)
        self.url = self.members.url
        self._log = (directory / "etcd.log").open("ab")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.start()

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.members.commands()]

    def start(self) -> None:
        """Start the members that do not run, and wait for all of them."""
        for name, arguments in self.members.commands():
            if name not in self._processes:
                self._processes[name] = start_etcd(arguments, self._log)
        self.members.wait_healthy(WAIT)

    def kill(self, *names: str) -> None:
        """End members without giving them a chance to do anything about it."""
        for name in names:
            self._processes[name].kill()
        for name in names:
            self._processes.pop(name).wait()

    def freeze(self, *names: str) -> None:
        for name in names:
            self._processes[name].send_signal(signal.SIGSTOP)

    def release(self, *names: str) -> None:
        for name in names:
            self._processes[name].send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill(*self._processes)
        self.members.close()
        self._log.close()


def start_etcd(arguments: list[str], log: BinaryIO) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *arguments], stdout=log, stderr=log)


def need_etcd() -> None:
    if shutil.which("etcd") is None:
        pytest.skip("there is no etcd here: install Debian's package etcd-server")


@pytest.fixture
def make_etcd(tmp_path: Path) -> Iterator[Callable[[int], RunningEtcd]]:
    """Makes an etcd of so many members, to do with as one likes."""
    need_etcd()
    made: list[RunningEtcd] = []

    def make(members: int) -> RunningEtcd:
        made.append(RunningEtcd(tmp_path / f"etcd{len(made)}", members))
        return made[-1]

    yield make
    for etcd in made:
        etcd.close()


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEtcd]:
    """An etcd of three members that all tests share: leave its members alone, and nothing in it but keys under a
    cluster of your own."""
    need_etcd()
    running = RunningEtcd(tmp_path_factory.mktemp("etcd"), 3)
    yield running
    running.close()


@pytest.fixture(scope="session")
def plain_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an etcd as somebody else may run it: one member, without TLS. All tests share it, too."""
    need_etcd()
    directory = tmp_path_factory.mktemp("plain_etcd")
    with ExitStack() as held:
        client, peer = (held.enter_context(socket.socket()) for _ in range(2))
        for each in (client, peer):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{client.getsockname()[1]}"
        peer_url = f"http://127.0.0.1:{peer.getsockname()[1]}"
        arguments = ["etcd", "--data-dir", str(directory / "data"), "--logger", "zap", "--log-level", "warn"]
        arguments += ["--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", peer_url]
        arguments += ["--initial-advertise-peer-urls", peer_url, "--initial-cluster", f"default={peer_url}"]
        log = held.enter_context((directory / "etcd.log").open("wb"))
        process = start_etcd(arguments, log)
        try:
            address = url.replace("http", "etcd")
            eventually(lambda: _opens(address), f"the etcd in {directory} answers")
            yield address
        finally:
            process.kill()
            process.wait()


def _opens(url: str) -> bool:
    try:
        open_store(url).close()
    except StoreError:
        return False
    return True
