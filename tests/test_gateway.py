"""The gateway, by the clients that it is for: tritonclient's, over HTTP and gRPC, blocking and not."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import queue
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.http", reason="pip install 'tritonclient[http]'")
pytest.importorskip("tritonclient.grpc", reason="pip install 'tritonclient[grpc]'")

import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from click.testing import CliRunner
from conftest import EMULATED, Cluster, eventually
from gateway_process import GatewayProcess
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from cli.gateway import model_of
from cli.main import main
from cluster.records import Paths, ServingRecord, encode
from cluster.store import open_store, sqlite_url
from laxity.gateway.grpc_service import MOST_IN_STREAM
from laxity.gateway.server import CannotServe, GatewayConfig, run_gateway
from nodes.device import DeviceConfig
from pipelines.load import load_spec, parse_spec

ECHO = """
name: echo
slo: 30s
stages:
  echo: {executor: emulated, profile: {alpha_ms: 0, beta_ms: 0}, max_batch: 1}
output: echo
"""
SLOW = """
name: slow
slo: 40s
stages:
  think: {executor: emulated, profile: {alpha_ms: 0, beta_ms: 7000}, max_batch: 1}
output: think
"""
HELD_BY_NOBODY = """
name: waiting
slo: 50s
stages:
  only: {executor: emulated, profile: {alpha_ms: 0, beta_ms: 0}, max_batch: 1, max_queue: 2}
output: only
"""
TOOL = """
name: tool
slo: 20s
stages:
  work: {executor: python, model: tool_code:work, inputs: [request.task], max_batch: 1}
output: {boxes: work.boxes, lines: work.lines, half: work.half, count: work.count, title: work.title, raw: work.raw}
"""
TOOL_CODE = """
import numpy as np

def work(tasks):
    (task,) = tasks
    if task == "raise":
        raise RuntimeError("it does not want to")
    return [{
        "boxes": np.arange(6, dtype=np.float32).reshape(3, 2),
        "lines": [{"text": "Grüße", "at": np.zeros(2, np.int64)}, {"text": task, "at": None}],
        "half": np.ones(2, np.float16),
        "count": 3,
        "title": "Titel",
        "raw": b"\\xff\\x00",
    }]
"""


class Served:
    """The gateway, the cluster behind it, and a client of each kind."""

    def __init__(self, gateway: GatewayProcess, cluster: Cluster, version: str) -> None:
        self.gateway = gateway
        self.cluster = cluster
        self.version = version
        """Of the pipeline ``tool``."""
        self.http = triton_http.InferenceServerClient(gateway.http, concurrency=4)
        self.grpc = triton_grpc.InferenceServerClient(gateway.grpc)

    def close(self) -> None:
        self.http.close()
        self.grpc.close()

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
        return post(self.gateway.http, path, body, **headers)


def post(at: str, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
    """The status, the JSON and the headers of the answer to a request without any client's help."""
    with closing(http.client.HTTPConnection(at, timeout=30)) as connection:
        connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("gateway")
    (directory / "tool_code.py").write_text(TOOL_CODE)
    (directory / "tool.yaml").write_text(TOOL)
    tool = load_spec(str(directory / "tool.yaml"))
    echo, slow, waiting = (parse_spec(text, file="x.yaml", root="") for text in (ECHO, SLOW, HELD_BY_NOBODY))
    store = open_store(sqlite_url(directory / "store.db"))
    store.put(Paths("test").served("tool"), encode(ServingRecord(tool.version, tool, {"s0": 1.0})))
    store.close()
    cluster = Cluster()
    try:
        cluster.serve(echo)
        cluster.serve(slow)  # on a device of its own: its batches go on after those who wanted them are gone
        cluster.serve(tool, devices=[DeviceConfig("cpu", "cpu")])
        cluster.shard.apply(waiting)
        found = [
            "--connect",
            cluster.shard.frontend,
            "--store",
            sqlite_url(directory / "store.db"),
            "--cluster",
            "test",
        ]
        with GatewayProcess(directory / "log", *found) as gateway:
            served = Served(gateway, cluster, tool.version)
            eventually(lambda: served.http.is_model_ready("tool"), "the gateway knows the pipeline to be ready")
            yield served
            served.close()
            assert gateway.stop() == 0
            assert "Traceback" not in gateway.log.read_text()
    finally:
        cluster.close()


def http_inputs(binary: bool = True, **arrays: np.ndarray[Any, Any]) -> list[Any]:
    return [_filled(triton_http, name, array, binary_data=binary) for name, array in arrays.items()]


def grpc_inputs(**arrays: np.ndarray[Any, Any]) -> list[Any]:
    return [_filled(triton_grpc, name, array) for name, array in arrays.items()]


def _filled(module: Any, name: str, array: np.ndarray[Any, Any], **options: Any) -> Any:
    made = module.InferInput(name, list(array.shape), triton_http.np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array, **options)
    return made


def elements(*items: bytes) -> np.ndarray[Any, Any]:
    return np.array(items, dtype=object)


def text(words: str) -> list[Any]:
    """Inputs of ``tool`` over HTTP."""
    made = _filled(triton_http, "task", elements(words.encode()), binary_data=False)
    made._parameters["content_type"] = "str"
    return [made]


# ---- what there is ----------------------------------------------------------------------------


def test_health_and_metadata_over_http(served: Served) -> None:
    client = served.http
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["name"] == "laxity"
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.is_model_ready("echo")
    assert client.is_model_ready("tool", served.version)
    assert not client.is_model_ready("tool", "another")
    assert not client.is_model_ready("waiting")
    assert not client.is_model_ready("unheard-of")
    told = client.get_model_metadata("tool", served.version)
    assert told["versions"] == [served.version]
    assert [each["name"] for each in told["inputs"]] == ["task"]
    assert [each["name"] for each in told["outputs"]] == ["boxes", "lines", "half", "count", "title", "raw"]
    config = client.get_model_config("tool")
    assert (config["name"], config["max_batch_size"], config["input"][0]["name"]) == ("tool", 0, "task")
    index = {each["name"]: (each["version"], each["state"]) for each in client.get_model_repository_index()}
    assert index == {
        "echo": ("1", "READY"),
        "slow": ("1", "READY"),
        "tool": (served.version, "READY"),
        "waiting": ("1", "UNAVAILABLE"),
    }


def test_health_and_metadata_over_grpc(served: Served) -> None:
    client = served.grpc
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata().name == "laxity"
    assert client.is_model_ready("echo", "1")
    assert not client.is_model_ready("waiting")
    told = client.get_model_metadata("tool", served.version, as_json=True)
    assert told["inputs"] == [{"name": "task", "datatype": "BYTES", "shape": ["-1"]}]
    config = client.get_model_config("echo").config
    assert (config.name, config.platform, config.backend) == ("echo", "laxity", "laxity")
    assert (config.input[0].data_type, list(config.output[0].dims)) == (13, [-1])
    states = {each.name: each.state for each in client.get_model_repository_index().models}
    assert states == {"echo": "READY", "slow": "READY", "tool": "READY", "waiting": "UNAVAILABLE"}
    with pytest.raises(InferenceServerException, match=r"NOT_FOUND.*unknown pipeline 'unheard-of'; served here: echo"):
        client.get_model_metadata("unheard-of")


def test_extensions_that_there_are_not_are_refused_with_what_there_is_instead(served: Served) -> None:
    for call in (
        lambda: served.http.load_model("echo"),
        lambda: served.http.register_system_shared_memory("region", "/key", 8),
        lambda: served.http.update_trace_settings("echo", {}),
        lambda: served.http.get_inference_statistics(),
    ):
        with pytest.raises(InferenceServerException, match=r"\[400\] Laxity's gateway does not support"):
            call()
    with pytest.raises(InferenceServerException, match=r"UNIMPLEMENTED.*`laxity pipeline apply`"):
        served.grpc.load_model("echo")
    with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
        served.grpc.get_cuda_shared_memory_status()
    assert served.post("/v3", b"")[0] == 404


def test_metrics_count_by_pipeline_and_status(served: Served) -> None:
    served.http.infer("echo", http_inputs(x=np.zeros(1, np.float32)))
    with pytest.raises(InferenceServerException):
        served.http.infer("made-up", http_inputs(x=np.zeros(1, np.float32)))
    with closing(http.client.HTTPConnection(served.gateway.http, timeout=30)) as connection:
        connection.request("GET", "/metrics")
        told = connection.getresponse().read().decode()
    assert 'laxity_gateway_requests_total{pipeline="echo",protocol="http",status="200"}' in told
    assert 'laxity_gateway_requests_total{pipeline="",protocol="http",status="404"}' in told
    assert "made-up" not in told
    assert 'laxity_gateway_request_duration_seconds_count{pipeline="echo",protocol="http"}' in told


# ---- tensors ----------------------------------------------------------------------------------

ARRAYS = {
    dtype.__name__: np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    for dtype in (
        *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
        *(np.float16, np.float32, np.float64),
    )
} | {"bool": np.array([[True], [False]]), "empty": np.zeros((0, 3), np.float32), "scalar": np.array([2.5])}


def test_arrays_of_all_datatypes_come_back_as_they_were(served: Served) -> None:
    for binary in (True, False):
        arrays = {name: array for name, array in ARRAYS.items() if binary or array.dtype != np.float16}
        wanted = [triton_http.InferRequestedOutput(name, binary_data=binary) for name in arrays]
        found = served.http.infer("echo", http_inputs(binary, **arrays), outputs=wanted, request_id="seven")
        assert found.get_response()["id"] == "seven"
        for name, array in arrays.items():
            back = found.as_numpy(name)
            assert (back.dtype, back.shape, back.tolist()) == (array.dtype, array.shape, array.tolist())
    over_grpc = served.grpc.infer("echo", grpc_inputs(**ARRAYS), request_id="eight")
    assert over_grpc.get_response().id == "eight"
    for name, array in ARRAYS.items():
        back = over_grpc.as_numpy(name)
        assert (back.dtype, back.shape, back.tolist()) == (array.dtype, array.shape, array.tolist())


def test_bytes_come_back_as_they_were(served: Served) -> None:
    for items in ([b"one"], [b"\xff\x00", b"", b"3"], [b""]):
        (output,) = served.http.infer("echo", http_inputs(x=elements(*items))).get_response()["outputs"]
        assert output["name"] == "output"
        assert served.http.infer("echo", http_inputs(x=elements(*items))).as_numpy("output").tolist() == items
        assert served.grpc.infer("echo", grpc_inputs(x=elements(*items))).as_numpy("output").tolist() == items


def test_the_answers_fields_are_outputs(served: Served) -> None:
    inputs = [*text("Ende")]
    found = served.http.infer("tool", inputs, parameters={"fields": True})
    assert found.as_numpy("boxes").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert found.as_numpy("half").dtype == np.float16
    assert found.as_numpy("count").tolist() == [3]
    assert found.as_numpy("title").tolist() == [b"Titel"]
    assert found.as_numpy("raw").tolist() == [b"\xff\x00"]
    assert [json.loads(line) for line in found.as_numpy("lines")] == [
        {"text": "Grüße", "at": [0, 0]},
        {"text": "Ende", "at": None},
    ]
    assert found.get_output("lines")["parameters"]["content_type"] == "json"
    assert found.get_output("title")["parameters"]["content_type"] == "str"
    assert found.get_response()["model_version"] == served.version
    some = served.http.infer(
        "tool",
        inputs,
        parameters={"fields": True},
        outputs=[triton_http.InferRequestedOutput(name, binary_data=False) for name in ("count", "boxes")],
    ).get_response()["outputs"]
    assert [output["name"] for output in some] == ["count", "boxes"]
    assert some[1]["data"] == [0, 1, 2, 3, 4, 5]
    for name, why in (
        ("none", "has no output 'none'; its outputs are boxes, lines"),
        ("half", "is FP16.*as binary data"),
        ("raw", "no UTF-8 text; ask for it as binary data"),
    ):
        with pytest.raises(InferenceServerException, match=rf"\[400\].*{why}"):
            served.http.infer(
                "tool",
                inputs,
                parameters={"fields": True},
                outputs=[triton_http.InferRequestedOutput(name, binary_data=False)],
            )
    with pytest.raises(InferenceServerException, match=r"\[400\].*has no output 'y'; its outputs are output"):
        served.http.infer(
            "echo", http_inputs(x=np.zeros(1)), outputs=[triton_http.InferRequestedOutput("y", binary_data=False)]
        )


def test_compressed_requests_and_answers(served: Served) -> None:
    array = np.zeros(5000, np.int32)
    for algorithm in ("gzip", "deflate"):
        found = served.http.infer(
            "echo",
            http_inputs(x=array),
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        assert found.as_numpy("output").tolist() == array.tolist()
        assert found._result["model_name"] == "echo"


def test_a_whole_body_may_be_the_only_element(served: Served) -> None:
    path = "/v2/models/echo/infer"
    status, answer, headers = served.post(path, b"just this", Inference_Header_Content_Length="0")
    assert (status, answer["outputs"][0]["data"]) == (200, ["just this"])
    assert answer["parameters"]["laxity-request-id"] == headers["laxity-request-id"]


def test_contents_that_are_typed_and_not_raw(served: Served) -> None:
    request = service_pb2.ModelInferRequest(model_name="echo")
    for name, datatype, field, values in (
        ("a", "BOOL", "bool_contents", [True, False]),
        ("b", "INT8", "int_contents", [-128, 127]),
        ("c", "INT64", "int64_contents", [-(2**63), 2**63 - 1]),
        ("d", "UINT16", "uint_contents", [0, 65535]),
        ("e", "UINT64", "uint64_contents", [0, 2**64 - 1]),
        ("f", "FP32", "fp32_contents", [0.5, 1.5]),
        ("g", "FP64", "fp64_contents", [0.5, 1e300]),
        ("h", "BYTES", "bytes_contents", [b"x", b"\xff"]),
    ):
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[2])
        getattr(tensor.contents, field).extend(values)
    stub = served.grpc._client_stub
    found = triton_grpc.InferResult(stub.ModelInfer(request))
    for tensor in request.inputs:
        (values,) = (values for _, values in tensor.contents.ListFields())
        assert found.as_numpy(tensor.name).tolist() == list(values)


# ---- in parallel ---------------------------------------------------------------------------------


def test_requests_at_once_over_http(served: Served) -> None:
    waiting = [served.http.async_infer("echo", http_inputs(x=np.array([n]))) for n in range(20)]
    assert [each.get_result().as_numpy("output").tolist() for each in waiting] == [[n] for n in range(20)]


def test_asyncio_clients(served: Served) -> None:
    async def run() -> None:
        async with triton_http_aio.InferenceServerClient(served.gateway.http) as client:
            assert await client.is_server_ready()
            many = [client.infer("echo", http_inputs(x=np.full(1000, n))) for n in range(10)]
            assert [int(found.as_numpy("output")[0]) for found in await asyncio.gather(*many)] == list(range(10))
        async with triton_grpc_aio.InferenceServerClient(served.gateway.grpc) as rpc:
            assert await rpc.is_model_ready("echo")
            many = [rpc.infer("echo", grpc_inputs(x=np.array([n]))) for n in range(10)]
            assert [int(found.as_numpy("output")[0]) for found in await asyncio.gather(*many)] == list(range(10))

    asyncio.run(run())


def test_a_stream_answers_each_request_in_order_also_those_that_fail(served: Served) -> None:
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    served.grpc.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(5):
        model = "unheard-of" if number == 2 else "echo"
        served.grpc.async_stream_infer(model, grpc_inputs(x=np.array([number])), request_id=str(number))
    served.grpc.async_stream_infer(
        "echo", grpc_inputs(x=np.array([5])), request_id="5", enable_empty_final_response=True
    )
    got = [answers.get(timeout=30) for _ in range(6)]
    served.grpc.stop_stream()
    assert "unknown pipeline 'unheard-of'" in got[2][1].message()
    for number in (0, 1, 3, 4, 5):
        result, error = got[number]
        assert error is None
        assert result.get_response().id == str(number)
        assert result.as_numpy("output").tolist() == [number]
        assert result.get_response().parameters["triton_final_response"].bool_param


def test_a_stream_that_is_cancelled_leaves_nothing_under_way(served: Served) -> None:
    def under_way() -> str:
        with closing(http.client.HTTPConnection(served.gateway.http, timeout=30)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            found = re.search(r"^laxity_gateway_requests_in_flight (\S+)$", text, re.M)
            assert found is not None
            return found[1]

    answers: queue.Queue[Any] = queue.Queue()
    served.grpc.start_stream(lambda result, error: answers.put((result, error)))
    for _ in range(2 * MOST_IN_STREAM):
        served.grpc.async_stream_infer("slow", grpc_inputs(x=np.zeros(1)))
    eventually(lambda: float(under_way()) > MOST_IN_STREAM, "as many as may be are under way")
    served.grpc.stop_stream(cancel_requests=True)
    eventually(lambda: float(under_way()) == 0.0, "all of them are cancelled")


# ---- how requests end -----------------------------------------------------------------------------


def http_error(served: Served, model: str, inputs: list[Any], **options: Any) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as raised:
        served.http.infer(model, inputs, **options)
    return raised.value


def test_a_request_that_would_be_late_is_dropped_at_once(served: Served) -> None:
    array = np.zeros(1)
    for options in ({"timeout": 200_000}, {"headers": {"Laxity-Timeout": "200ms"}}):
        error = http_error(served, "slow", http_inputs(x=array), **options)
        assert error.status() == "504"
        assert "dropped at stage 'think'" in error.message()
    with pytest.raises(InferenceServerException, match=r"DEADLINE_EXCEEDED.*dropped at stage 'think'"):
        served.grpc.infer("slow", grpc_inputs(x=array), timeout=200_000)
    body = json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "INT8", "data": [1]}]}).encode()
    status, told, headers = served.post("/v2/models/slow/infer", body, laxity_timeout="200ms")
    assert (status, told["outcome"], told["stage"]) == (504, "dropped", "think")
    assert 6_000 < told["short_ms"] < 7_000
    assert headers["laxity-outcome"] == "dropped"
    assert told["request_id"] == headers["laxity-request-id"] != ""


def test_the_deadline_of_an_rpc_is_the_requests(served: Served) -> None:
    before = served.cluster.status().ended.get("dropped", 0)
    with pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
        served.grpc.infer("slow", grpc_inputs(x=np.zeros(1)), client_timeout=3.0)
    served.cluster.wait_for(lambda status: status.ended.get("dropped", 0) > before, "it was dropped by the shard")


def test_a_longer_deadline_than_the_pipelines_is_the_pipelines(served: Served) -> None:
    found = served.http.infer("echo", http_inputs(x=np.array([1])), headers={"Laxity-Timeout": "60m"})
    assert found.as_numpy("output").tolist() == [1]
    assert served.grpc.infer("echo", grpc_inputs(x=np.array([1])), client_timeout=500.0).as_numpy("output")[0] == 1


def test_what_a_model_raises_is_an_internal_error(served: Served) -> None:
    error = http_error(served, "tool", text("raise"), parameters={"fields": True})
    assert error.status() == "500"
    assert "failed at stage 'work'" in error.message()
    assert "it does not want to" in error.message()


def test_what_the_pipeline_does_not_take_is_the_clients_fault(served: Served) -> None:
    error = http_error(served, "tool", http_inputs(x=elements(b"no field")))
    assert error.status() == "400"
    assert "field 'task' asked of bytes" in error.message()
    with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*field 'task' asked of bytes"):
        served.grpc.infer("tool", grpc_inputs(x=elements(b"no field")))
    assert http_error(served, "unheard-of", http_inputs(x=np.zeros(1))).status() == "404"
    assert http_error(served, "tool", text("x"), model_version="another").status() == "404"


def test_a_full_queue_and_clients_that_go_away(served: Served) -> None:
    cluster = served.cluster
    before = cluster.status().ended.get("cancelled", 0)
    body = json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "INT8", "data": [1]}]}).encode()
    head = f"POST /v2/models/waiting/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    host, _, port = served.gateway.http.partition(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head + body)
        over_grpc = served.grpc.async_infer("waiting", grpc_inputs(x=np.zeros(1)), lambda result, error: None)
        cluster.wait_for(lambda status: sum(status.queued.values()) == 2, "both wait for the stage")
        status, told, headers = served.post("/v2/models/waiting/infer", body)
        assert (status, told["outcome"], headers["retry-after"]) == (429, "rejected", "1")
        assert told["error"].startswith("rejected at stage 'only': queue full")
        with pytest.raises(InferenceServerException, match=r"RESOURCE_EXHAUSTED.*queue full"):
            served.grpc.infer("waiting", grpc_inputs(x=np.zeros(1)))
        over_grpc.cancel()
    cluster.wait_for(lambda status: status.ended.get("cancelled", 0) == before + 2, "both are cancelled at the shard")


# ---- what is wrong with requests ----------------------------------------------------------------------

INPUT = {"name": "x", "shape": [2], "datatype": "INT32", "data": [1, 2]}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no inference request"),
        (b"{", "no inference request"),
        (b"[" * 100_000, "no inference request"),
        (b'{"inputs": []}', "there are no inputs"),
        (b'{"inputs": 3}', "no inference request: Expected `array`"),
        ({"inputs": [{**INPUT, "shape": [-1]}]}, "each dimension must be 0 or more"),
        ({"inputs": [{**INPUT, "shape": [2**62, 2**62]}]}, "each dimension must be 0 or more"),
        ({"inputs": [{**INPUT, "shape": [2**30, 2**30]}]}, "has the shape"),
        ({"inputs": [{**INPUT, "shape": [1] * 40}]}, "40 dimensions"),
        ({"inputs": [{**INPUT, "shape": [3]}]}, "has the shape [2], which is not [3]"),
        ({"inputs": [{**INPUT, "datatype": "INT33"}]}, "the datatype 'INT33' is not supported"),
        ({"inputs": [{**INPUT, "datatype": "BF16"}]}, "the datatype 'BF16' is not supported"),
        ({"inputs": [{**INPUT, "datatype": "FP16"}]}, "FP16 cannot be sent as JSON"),
        ({"inputs": [{**INPUT, "data": [1, 2.5]}]}, "Expected `int`, got `float`"),
        ({"inputs": [{**INPUT, "data": [1, 2**40]}]}, "Expected `int` <="),
        ({"inputs": [{**INPUT, "data": [1, True]}]}, "Expected `int`, got `bool`"),
        ({"inputs": [{**INPUT, "data": "12"}]}, "must be a flat array"),
        ({"inputs": [{**INPUT, "data": [[1], [2, 3]]}]}, "must be a flat array"),
        ({"inputs": [{**INPUT, "shape": [2, 2], "data": [[1], [2, 3]]}]}, "is no INT32[2, 2]"),
        (b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [NaN]}]}', "no inference request"),
        ({"inputs": [{**INPUT, "datatype": "FP32", "data": [1e300, 0]}]}, "is no FP32[2]"),
        ({"inputs": [{"name": "x", "shape": [2], "datatype": "INT32"}]}, "has neither 'data' nor"),
        ({"inputs": [{**INPUT, "parameters": {"binary_data_size": 8}}]}, "has both 'data' and"),
        ({"inputs": [INPUT, INPUT]}, "two inputs have the same name"),
        ({"inputs": [{**INPUT, "parameters": {"content_type": "str"}}]}, "content_type is for BYTES"),
        ({"inputs": [{**INPUT, "parameters": {"shared_memory_region": "x"}}]}, "shared memory"),
        ({"inputs": [INPUT], "parameters": {"sequence_id": 3}}, "requests of a sequence"),
        ({"inputs": [INPUT], "parameters": {"timeout": -3}}, "'timeout' must be a whole number"),
        ({"inputs": [INPUT], "parameters": {"priority": "high"}}, "'priority' must be a whole number"),
        ({"inputs": [INPUT], "parameters": {"timeout": 10**400}}, "'timeout' must be a whole number"),
        ({"inputs": [{**INPUT, "datatype": "BYTES", "shape": [2**20 + 1], "data": []}]}, "at most 1048576 are allowed"),
        ({"inputs": [INPUT], "outputs": [{"name": "output", "parameters": {"classification": 3}}]}, "classification"),
    ],
    ids=range(32),
)
def test_bodies_that_are_no_requests(served: Served, body: Any, says: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, told, _ = served.post("/v2/models/echo/infer", raw)
    assert status == 400
    assert says in told["error"]


@pytest.mark.parametrize(
    ("size", "binary", "length", "says"),
    [
        (8, b"1234567", None, "binary_data_size is 8, but 7 bytes are left"),
        (7, b"1234567", None, "INT32[2] has 8 bytes; 7 were sent"),
        (8, b"123456789", None, "1 bytes of the body belong to no input"),
        (-1, b"12345678", None, "binary_data_size is -1"),
        ("8", b"12345678", None, "binary_data_size is '8'"),
        (8, b"12345678", "9999", "must be a number of bytes of the body"),
        (8, b"12345678", "9" * 5000, "must be a number of bytes of the body"),
        (8, b"12345678", "-1", "must be a number of bytes of the body"),
        (8, b"12345678", "3", "no inference request"),
    ],
    ids=range(9),
)
def test_binary_data_that_does_not_fit(served: Served, size: Any, binary: bytes, length: str | None, says: str) -> None:
    head = {"inputs": [{"name": "x", "shape": [2], "datatype": "INT32", "parameters": {"binary_data_size": size}}]}
    encoded = json.dumps(head).encode()
    status, told, _ = served.post(
        "/v2/models/echo/infer", encoded + binary, Inference_Header_Content_Length=length or str(len(encoded))
    )
    assert status == 400
    assert says in told["error"]


def test_headers_that_make_no_sense(served: Served) -> None:
    body = json.dumps({"inputs": [INPUT]}).encode()
    path = "/v2/models/echo/infer"
    assert served.post(path, body, laxity_timeout="soon")[0] == 400
    assert served.post(path, body, laxity_timeout="0s")[0] == 400
    assert served.post(path, body, laxity_priority="2")[0] == 400
    assert served.post(path, body, content_encoding="br")[0] == 415
    assert served.post("/v2/nothing", body, host="[")[0] == 421
    assert served.post(path, b"no gzip", content_encoding="gzip")[0] == 400
    assert served.post(path, gzip.compress(body)[:-3], content_encoding="gzip")[0] == 400
    assert served.post(path, body, traceparent="of no standard")[0] == 200
    assert served.post(path, gzip.compress(bytes(70 * 1024**2), 1), content_encoding="gzip")[0] == 413


def test_many_values_are_refused_before_each_is_looked_at(served: Served) -> None:
    path = "/v2/models/echo/infer"
    values = b"[" + b"1," * 2**20 + b"1]"
    tensor = {"name": "x", "shape": [1], "datatype": "BYTES"}
    for content, shape in ((b"\0" * 4 * (2**20 + 1), [2**20 + 1]), (len(values).to_bytes(4, "little") + values, [1])):
        parameters = {"binary_data_size": len(content), "content_type": "json"}
        head = json.dumps({"inputs": [{**tensor, "shape": shape, "parameters": parameters}]}).encode()
        status, told, _ = served.post(path, head + content, Inference_Header_Content_Length=str(len(head)))
        assert (status, "at most 1048576 are allowed" in told["error"]) == (400, True)
    with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*at most 1048576 are allowed"):
        served.grpc.infer("echo", [triton_grpc.InferInput("x", [2**20 + 1], "BYTES")])
    status, told, _ = served.post("/v2/repository/index", b" " * 5000)
    assert (status, "larger than the 4096 bytes" in told["error"]) == (413, True)


def test_messages_that_are_no_requests(served: Served) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(served.grpc._channel)

    def refused(**fields: Any) -> str:
        request = service_pb2.ModelInferRequest(model_name="echo", **fields)
        with pytest.raises(Exception, match="INVALID_ARGUMENT") as raised:
            stub.ModelInfer(request)
        return str(raised.value)

    tensor = service_pb2.ModelInferRequest.InferInputTensor
    contents = service_pb2.InferTensorContents
    assert "there are no inputs" in refused()
    assert "raw_input_contents has 1 entries for 0 inputs" in refused(raw_input_contents=[b"x"])
    for fields, says in (
        ({"datatype": "FP16"}, "can only be sent in raw_input_contents"),
        ({"datatype": "INT8", "contents": contents(int_contents=[300, 0])}, "300"),
        ({"datatype": "INT8", "contents": contents(int64_contents=[3, 0])}, "INT8 belongs into int_contents"),
        ({"datatype": "INT8", "contents": contents(int_contents=[3])}, "its shape has 2 elements; int_contents has 1"),
    ):
        assert says in refused(inputs=[tensor(name="x", shape=[2], **fields)])
    call = served.grpc._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT[\s\S]*is no ModelInferRequest"):
        call(b"\xff\xff\xff")


# ---- the process -------------------------------------------------------------------------------------


def test_bounds_and_a_stop_in_order(tmp_path: Path) -> None:
    cluster = Cluster()
    try:
        waiting = parse_spec(HELD_BY_NOBODY, file="x.yaml", root="")
        cluster.start()
        cluster.shard.apply(waiting)
        options = ["--max-concurrency", "1", "--max-body", "4KiB", "--body-timeout", "500ms"]
        with GatewayProcess(tmp_path / "log", "--connect", cluster.shard.frontend, *options) as gateway:
            path = "/v2/models/waiting/infer"
            body = json.dumps({"inputs": [INPUT]}).encode()
            with closing(http.client.HTTPConnection(gateway.http, timeout=30)) as probe:

                def ready() -> int:
                    probe.request("GET", "/v2/health/ready")
                    response = probe.getresponse()
                    response.read()
                    return response.status

                eventually(lambda: ready() == 200, "it is ready")
                assert post(gateway.http, path, bytes(5000))[0] == 413
                with closing(http.client.HTTPConnection(gateway.http, timeout=30)) as slow:
                    slow.putrequest("POST", path)
                    slow.putheader("Content-Length", "10")
                    slow.endheaders(b"{")
                    assert slow.getresponse().status == 408
                with closing(http.client.HTTPConnection(gateway.http, timeout=30)) as first:
                    first.request("POST", path, body)
                    cluster.wait_for(lambda status: status.in_flight == 1, "the first request is under way")
                    status, told, headers = post(gateway.http, path, body)
                    assert (status, headers["retry-after"]) == (503, "1")
                    assert "the gateway is full: 1 requests are under way" in told["error"]
                    with triton_grpc.InferenceServerClient(gateway.grpc) as rpc:
                        with pytest.raises(InferenceServerException, match=r"RESOURCE_EXHAUSTED.*the gateway is full"):
                            rpc.infer("waiting", grpc_inputs(x=np.zeros(1)))
                        assert ready() == 200
                        gateway.ask_stop()
                        eventually(lambda: ready() == 503, "it is not ready any more")
                        with pytest.raises(InferenceServerException, match=r"UNAVAILABLE.*is being stopped"):
                            rpc.infer("waiting", grpc_inputs(x=np.zeros(1)))
                        assert post(gateway.http, path, body)[0] == 503
                    cluster.serve(waiting, devices=[EMULATED])
                    answer = first.getresponse()
                    assert answer.status == 200
                    assert json.loads(answer.read())["outputs"][0]["data"] == [1, 2]
            assert gateway.process.wait(30) == 0
    finally:
        cluster.close()


def test_what_cannot_be_served_is_told() -> None:
    never = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        at = f"127.0.0.1:{taken.getsockname()[1]}"
        for options, says in (
            ({"http": at, "grpc": ""}, f"HTTP cannot be served at {at}: Address already in use; choose another --http"),
            ({"http": "", "grpc": at}, f"gRPC cannot be served at {at}; choose another --grpc"),
            ({"http": "127.0.0.1:*", "grpc": "127.0.0.1:*", "connect": "nowhere"}, "'nowhere' is no shard's address"),
        ):
            config = GatewayConfig(**{"connect": "tcp://127.0.0.1:1", **options})
            with pytest.raises((CannotServe, ValueError), match=re.escape(says)):
                run_gateway(config, None, never, never, lambda _: pytest.fail("it serves"))
    none = CliRunner().invoke(main, ["gateway", "run", "--http", "", "--grpc", ""])
    assert (none.exit_code, none.stderr.splitlines()[-1]) == (2, "Error: give --http or --grpc an address")


def test_import_laxity_imports_no_gateway() -> None:
    code = "import sys, laxity; sys.exit(any(m in sys.modules for m in ('laxity.gateway', 'starlette', 'grpc')))"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_metadata_of_shipped_pipelines() -> None:
    assert model_of(load_spec("ocr"), "v").inputs == ("request",)
    assert model_of(load_spec("ocr"), "v").outputs == ("boxes", "lines")
    assert (model_of(load_spec("echo"), "v").outputs, model_of(load_spec("echo"), "v").fixed) == (("output",), False)
