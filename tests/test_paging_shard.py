"""A shard's LOADs and UNLOADs on the wire, and agents that say odd things about their memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import pytest
import zmq

from laxity import protocol
from laxity.protocol import Acted, DeviceReport, Done, Grant, Heartbeat, Load, ModelReport, Pull, Ready, Unload, Welcome
from pipelines.load import parse_spec
from pipelines.spec import PipelineSpec

WAIT_MS = 30_000
Received = TypeVar("Received")


class Node:
    """An agent of one device, played by hand."""

    def __init__(self, address: str, name: str) -> None:
        self.name = name
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.connect(address)

    def send(self, message: protocol.Message) -> None:
        self._socket.send(protocol.encode(message))

    def receive(self, kind: type[Received]) -> Received:
        """The next message, which is of this kind."""
        assert self._socket.poll(WAIT_MS), f"no {kind.__name__} came"
        message = protocol.decode_to_agent(self._socket.recv_multipart()[0])
        assert isinstance(message, kind), message
        return message

    def greet(self, memory: float, *models: ModelReport) -> None:
        self.send(Ready(protocol.VERSION, self.name, [DeviceReport(0, "odd", list(models), memory)]))
        self.receive(Welcome)

    def silent(self) -> None:
        """Nothing has been sent to it up to now."""
        self.send(Heartbeat())
        self.receive(Heartbeat)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.fixture
def specs(cluster: Any) -> list[PipelineSpec]:
    """Three pipelines that the shard serves."""
    cluster.start()
    stage = "{executor: emulated, max_batch: 1, profile: {alpha_ms: 0, beta_ms: 1}}"
    text = f"slo: 30s\nstages:\n  s: {stage}\noutput: s\n"
    specs = [parse_spec(f"name: {name}\n{text}", file=f"{name}.yaml", root="") for name in "abc"]
    for spec in specs:
        cluster.shard.apply(spec)
    return specs


@pytest.fixture
def node(cluster: Any, specs: list[PipelineSpec]) -> Iterator[Node]:
    node = Node(cluster.shard.backend, "odd")
    yield node
    node.close()


def model(spec: PipelineSpec, resident: bool = False, memory: float = 60.0, load_us: int = 8000) -> ModelReport:
    return ModelReport(spec.model_key("s"), "", 100, [(1, 0.001)], resident, memory, load_us)


def test_what_does_not_fit_is_paged(cluster: Any, specs: list[PipelineSpec], node: Node) -> None:
    a, b, _ = specs
    node.greet(100.0, model(a, True), model(b))
    pulled = time.monotonic()
    node.send(Pull(0, 1, 5_000_000, 0))
    node.silent()
    client = cluster.client()
    future = client.submit("b", "x")
    unload = node.receive(Unload)
    load = node.receive(Load)
    waited = (time.monotonic() - pulled) * 1e6
    assert (unload.model, load.model) == (a.model_key("s"), b.model_key("s"))
    assert unload.action != load.action
    for told in (unload, load):
        assert told.pulled_us == 5_000_000
        assert 0 <= told.dwell_us <= waited
        assert told.opens_us == 0
        assert told.closes_us > 0
    assert load.expected_us == 8000
    node.silent()
    node.send(Acted(0, unload.action, "ok", 100))
    node.send(Acted(0, load.action, "ok", 7900))
    # The pull has not been used up by that.
    grant = node.receive(Grant)
    assert (grant.model, grant.seq) == (b.model_key("s"), 1)
    node.send(Done(0, grant.batch, "ok", 0, 1000, ["y"]))
    assert future.result(30) == "y"
    cluster.settle(ok=1)


def test_a_refused_batch_asks_for_its_model(cluster: Any, specs: list[PipelineSpec], node: Node) -> None:
    a, b, _ = specs
    node.greet(100.0, model(a, True), model(b))
    node.send(Pull(0, 1, 0, 0))
    future = cluster.client().submit("a", "x")
    grant = node.receive(Grant)
    node.send(Done(0, grant.batch, "not_loaded", detail="it is not here"))
    node.send(Pull(0, 2, 0, 0))
    load = node.receive(Load)
    assert load.model == a.model_key("s")
    node.send(Acted(0, load.action, "ok"))
    grant = node.receive(Grant)
    node.send(Done(0, grant.batch, "ok", 0, 1000, ["y"]))
    assert future.result(30) == "y"


def test_a_device_that_says_again_what_it_said_first_is_believed(
    cluster: Any, specs: list[PipelineSpec], node: Node
) -> None:
    """Its worker died, and what was loaded since is not there any more."""
    a, b, _ = specs
    node.greet(100.0, model(a, True), model(b))
    node.send(Pull(0, 1, 0, 0))
    client = cluster.client()
    future = client.submit("b", "x")
    for kind in (Unload, Load):
        node.send(Acted(0, node.receive(kind).action, "ok"))
    grant = node.receive(Grant)
    node.send(Done(0, grant.batch, "ok", 0, 1000, ["y"]))
    assert future.result(30) == "y"
    node.greet(100.0, model(a, True), model(b))
    node.send(Pull(0, 2, 0, 0))
    future = client.submit("a", "x")
    grant = node.receive(Grant)
    assert grant.model == a.model_key("s")
    node.send(Done(0, grant.batch, "ok", 0, 1000, ["y"]))
    assert future.result(30) == "y"


def test_an_agent_lost_in_the_middle_of_a_load(cluster: Any, specs: list[PipelineSpec], node: Node) -> None:
    a, b, _ = specs
    node.greet(100.0, model(a, True), model(b))
    node.send(Pull(0, 1, 0, 0))
    future = cluster.client().submit("b", "x")
    node.receive(Unload)
    first = node.receive(Load)
    # It is started again.
    other = Node(cluster.shard.backend, "odd")
    other.greet(100.0, model(a), model(b))
    other.send(Pull(0, 1, 0, 0))
    second = other.receive(Load)
    assert second.action != first.action
    other.send(Acted(0, first.action, "ok"))
    other.silent()
    other.send(Acted(0, second.action, "ok"))
    grant = other.receive(Grant)
    other.send(Done(0, grant.batch, "ok", 0, 1000, ["y"]))
    assert future.result(30) == "y"
    other.close()


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize("load_us", [-(2**63), 2**63 - 1])
def test_memory_and_times_that_cannot_be(cluster: Any, specs: list[PipelineSpec], node: Node, load_us: int) -> None:
    """Whoever says such things harms nobody but itself."""
    a, b, c = specs
    for memory, size in itertools.product([-1.0, NAN, INFINITE, 1e300, 5e-324, 100.0], [-1.0, NAN, INFINITE, 1e300]):
        models = [model(spec, resident, size, load_us) for spec, resident in [(a, True), (b, False), (b, True)]]
        node.greet(memory, *models)
    node.send(Pull(0, 1, 0, 0))
    node.send(Acted(0, 0, "what?", load_us, "x" * 1000))
    node.silent()
    good = Node(cluster.shard.backend, "good")
    good.greet(100.0, model(c))
    good.send(Pull(0, 1, 0, 0))
    future = cluster.client().submit("c", "x")
    load = good.receive(Load)
    node.send(Acted(0, load.action, "ok"))  # not its own
    node.silent()
    good.silent()
    good.send(Acted(0, load.action, "ok", load_us))
    grant = good.receive(Grant)
    good.send(Done(0, grant.batch, "ok", 0, 1000, ["y"]))
    assert future.result(30) == "y"
    assert cluster.status().agents == 2
    good.close()


@pytest.mark.parametrize("code", ["what?", "model_error", "out_of_memory"])
def test_a_load_that_fails_is_tried_again(cluster: Any, specs: list[PipelineSpec], node: Node, code: str) -> None:
    a, b, _ = specs
    node.greet(100.0, model(a), model(b))
    node.send(Pull(0, 1, 0, 0))
    future = cluster.client().submit("b", "x")
    first = node.receive(Load)
    node.send(Acted(0, first.action, code, detail="it does not go"))
    second = node.receive(Load)
    assert second.action != first.action
    node.send(Acted(0, second.action, "ok"))
    grant = node.receive(Grant)
    node.send(Done(0, grant.batch, "ok", 0, 1000, ["y"]))
    assert future.result(30) == "y"
