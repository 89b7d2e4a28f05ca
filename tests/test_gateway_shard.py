"""What the gateway asks of a shard, and what it makes of its answers: the shard is driven by hand."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc", reason="pip install 'tritonclient[grpc]'")

import grpc
from conftest import WAIT, Peer, eventually
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cli.gateway import StoreLookup
from cluster.records import BrokerRecord, Paths, encode
from cluster.store import open_store, sqlite_url
from laxity.gateway.catalog import Lookup
from laxity.gateway.grpc_messages import message
from laxity.gateway.server import Bound, GatewayConfig, run_gateway
from laxity.outcomes import Outcome
from laxity.protocol import Cancel

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODY = {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["hello"]}]}
Answer = tuple[int, Any, Any]


class Running:
    """A gateway in a thread of this process, and somebody who asks it from another one."""

    def __init__(self, connect: str = "", lookup: Lookup | None = None) -> None:
        self.stop = threading.Event()
        self._bound: Future[Bound] = Future()
        config = GatewayConfig(http="127.0.0.1:*", grpc="127.0.0.1:*", connect=connect)
        self._thread = threading.Thread(target=self._run, args=(config, lookup))
        self._thread.start()
        self.at = self._bound.result(WAIT)
        self._callers = ThreadPoolExecutor(4)
        self._channel = grpc.insecure_channel(self.at.grpc)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def _run(self, config: GatewayConfig, lookup: Lookup | None) -> None:
        try:
            run_gateway(config, lookup, self.stop, self.stop, self._bound.set_result)
        except BaseException as error:
            self._bound.set_exception(error)

    def get(self, path: str) -> int:
        with closing(http.client.HTTPConnection(self.at.http, timeout=WAIT)) as connection:
            connection.request("GET", path)
            return connection.getresponse().status

    def over_http(self, body: Any = BODY, **headers: str) -> Future[Answer]:
        def ask() -> Answer:
            with closing(http.client.HTTPConnection(self.at.http, timeout=WAIT)) as connection:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                connection.request("POST", "/v2/models/p/infer", json.dumps(body), named)
                response = connection.getresponse()
                return response.status, json.loads(response.read()), response.headers

        return self._callers.submit(ask)

    def over_grpc(self, timeout: float | None = None, parameters: Any = None, **metadata: str) -> Future[Answer]:
        request = service_pb2.ModelInferRequest(model_name="p", raw_input_contents=[b"\5\0\0\0hello"])
        request.inputs.add(name="x", datatype="BYTES", shape=[1])
        for name, value in (parameters or {}).items():
            request.parameters[name].int64_param = value
        named = [(name.replace("_", "-"), value) for name, value in metadata.items()]

        def ask() -> Answer:
            try:
                answer, call = self._stub.ModelInfer.with_call(request, timeout=timeout, metadata=named)
            except grpc.RpcError as error:
                return error.code().name, error.details(), dict(error.trailing_metadata())
            return "OK", answer, dict(call.trailing_metadata())

        return self._callers.submit(ask)

    def close(self) -> None:
        self._channel.close()
        self._callers.shutdown()
        self.stop.set()
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), "the gateway does not end"


@pytest.fixture
def make_gateway() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def make(**options: Any) -> Running:
        made.append(Running(**options))
        return made[-1]

    yield make
    for gateway in made:
        gateway.close()


@pytest.fixture
def gateway(make_gateway: Callable[..., Running], peer: Peer) -> Running:
    """One that is connected to a shard, which serves ``p`` with an SLO of 5 s."""
    gateway = make_gateway(connect=peer.url)
    assert gateway.get("/v2/health/live") == 200
    assert gateway.get("/v2/health/ready") == 503
    assert gateway.over_http().result(WAIT)[0] == 503, "nothing is known of any pipeline"
    peer.welcome(pipelines=[("p", 5_000_000)])
    eventually(lambda: gateway.get("/v2/models/p/ready") == 200, "it is ready")
    return gateway


def test_what_a_request_says_beside_its_tensors(gateway: Running, peer: Peer) -> None:
    answer = gateway.over_http(traceparent=TRACEPARENT, laxity_priority="1", laxity_timeout="2s")
    incoming = peer.request()
    assert incoming.value == b"hello"
    assert (incoming.request.traceparent, incoming.request.priority) == (TRACEPARENT, 1)
    assert 1_000_000 < incoming.request.budget_us <= 2_000_000
    peer.answer(incoming, "hi")
    status, told, headers = answer.result(WAIT)
    assert status == 200
    assert told["outputs"] == [
        {"name": "output", "datatype": "BYTES", "shape": [1], "parameters": {"content_type": "str"}, "data": ["hi"]}
    ]
    assert headers["laxity-request-id"].endswith(f"-{incoming.request.id}")

    # Of several time-outs the shortest holds, and none can be longer than the pipeline's SLO.
    gateway.over_http({**BODY, "parameters": {"timeout": 3_000_000, "priority": 7}}, laxity_timeout="60s")
    incoming = peer.request()
    assert 2_000_000 < incoming.request.budget_us <= 3_000_000
    assert incoming.request.priority == 0
    peer.answer(incoming, None)
    gateway.over_http(laxity_timeout="1m")
    incoming = peer.request()
    assert incoming.request.budget_us is None
    peer.answer(incoming, None)

    answer = gateway.over_grpc(4.0, {"priority": 1}, traceparent=TRACEPARENT)
    incoming = peer.request()
    assert incoming.value == b"hello"
    assert (incoming.request.traceparent, incoming.request.priority) == (TRACEPARENT, 1)
    assert 1_000_000 < incoming.request.budget_us <= 4_100_000  # gRPC rounds on the wire
    peer.answer(incoming, b"hi")
    code, told, metadata = answer.result(WAIT)
    assert (code, told.raw_output_contents) == ("OK", [b"\2\0\0\0hi"])
    assert metadata["laxity-request-id"] == told.parameters["laxity-request-id"].string_param
    assert metadata["laxity-request-id"].endswith(f"-{incoming.request.id}")


@pytest.mark.parametrize(
    ("outcome", "detail", "status", "code"),
    [
        (Outcome.DROPPED, "it would be late", 504, "DEADLINE_EXCEEDED"),
        (Outcome.EXPIRED, "it is late", 504, "DEADLINE_EXCEEDED"),
        (Outcome.REJECTED, "queue full: 10 wait", 429, "RESOURCE_EXHAUSTED"),
        (Outcome.REJECTED, "unknown pipeline 'p'; served here: q", 404, "NOT_FOUND"),
        (Outcome.REJECTED, "not like this", 400, "INVALID_ARGUMENT"),
        (Outcome.CANCELLED, "by somebody", 499, "CANCELLED"),
        (Outcome.FAILED, "it broke", 500, "INTERNAL"),
        (Outcome.UNAVAILABLE, "nobody is left", 503, "UNAVAILABLE"),
    ],
)
def test_every_outcome_has_its_codes(
    gateway: Running, peer: Peer, outcome: Outcome, detail: str, status: int, code: str
) -> None:
    found = gateway.over_http()
    peer.refuse(peer.request(), outcome, stage="s", detail=detail, short_us=12_500)
    got, told, headers = found.result(WAIT)
    assert (got, told["outcome"], told["stage"]) == (status, outcome, "s")
    assert told["error"] == f"{outcome} at stage 's': {detail}"
    assert told.get("short_ms") == (12.5 if outcome is Outcome.DROPPED else None)
    assert ("retry-after" in headers) == (status in (429, 503))
    found = gateway.over_grpc()
    peer.refuse(peer.request(), outcome, stage="s", detail=detail, short_us=12_500)
    got, told, metadata = found.result(WAIT)
    assert (got, told) == (code, f"{outcome} at stage 's': {detail}")
    assert (metadata["laxity-outcome"], metadata["laxity-stage"]) == (outcome, "s")
    assert metadata["laxity-request-id"]


def test_a_time_out_holds_also_where_no_slo_is_known(make_gateway: Callable[..., Running], peer: Peer) -> None:
    gateway = make_gateway(connect=peer.url)
    shards = {"shards": [("peer", peer.url), ("other", "tcp://127.0.0.1:1")], "routes": [("p", [(1, 1.0)])]}
    peer.welcome(**shards)
    eventually(lambda: gateway.get("/v2/models/p/ready") == 200, "it is ready")
    status, told, _ = gateway.over_http(laxity_timeout="100ms").result(WAIT)
    assert (status, told["outcome"]) == (504, "expired")


def test_what_is_under_way_when_it_may_not_take_any_longer(gateway: Running, peer: Peer) -> None:
    over_http, over_grpc = gateway.over_http(), gateway.over_grpc()
    requests = peer.requests(2)
    gateway.stop.set()  # which is "at once", too, here
    status, told, _ = over_http.result(WAIT)
    assert (status, told["outcome"]) == (503, "unavailable")
    assert over_grpc.result(WAIT)[0] == "UNAVAILABLE"
    assert sorted(peer.receive(Cancel)[1].ids) == sorted(each.request.id for each in requests)


def test_an_answer_that_the_protocol_has_no_datatype_for(gateway: Running, peer: Peer) -> None:
    import numpy as np

    found = gateway.over_http()
    peer.answer(peer.request(), np.zeros(2, complex))
    status, told, _ = found.result(WAIT)
    assert (status, told["error"]) == (
        500,
        "output 'output' is an array of complex128, which the protocol does not have",
    )


def test_shards_are_found_in_the_store_and_found_again(
    make_gateway: Callable[..., Running], make_peer: Callable[..., Peer], tmp_path: Path
) -> None:
    url = sqlite_url(tmp_path / "store.db")
    lookup = StoreLookup(url, "test")
    gateway = make_gateway(lookup=lookup)
    assert gateway.get("/v2/health/ready") == 503
    store = open_store(url)
    for _ in range(2):  # the second one is elsewhere
        peer = make_peer()
        record = BrokerRecord(frontend=peer.url, backend="tcp://127.0.0.1:1", pid=1, host="h")
        store.put(Paths("test").broker("s0"), encode(record))
        peer.welcome(pipelines=[("p", 5_000_000)])
        eventually(lambda: gateway.get("/v2/models/p/ready") == 200, "it is ready")
        answer = gateway.over_http()
        peer.answer(peer.request(), b"hi")
        assert answer.result(WAIT)[0] == 200
        peer.close()
        eventually(lambda: gateway.get("/v2/health/ready") == 503, "it is not ready any more")
    store.close()
    gateway.stop.set()


def test_messages_are_those_of_the_published_service() -> None:
    """Whatever we have has the same name, number and type as with tritonclient, which has more."""
    checked = 0

    def compare(ours: Any, theirs: Any) -> None:
        nonlocal checked
        for field in ours.fields:
            other = theirs.fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated)
            assert (field.containing_oneof is None) == (other.containing_oneof is None)
            checked += 1
        for inner in ours.nested_types:
            compare(inner, theirs.nested_types_by_name[inner.name])

    ours = message("ServerLiveRequest").DESCRIPTOR.file
    assert ours.package == "inference"
    pool = service_pb2.DESCRIPTOR.pool
    for name, descriptor in ours.message_types_by_name.items():
        compare(descriptor, pool.FindMessageTypeByName(f"inference.{name}"))
    assert checked > 70
    for name, value in ours.enum_types_by_name["DataType"].values_by_name.items():
        assert pool.FindEnumTypeByName("inference.DataType").values_by_name[name].number == value.number
