"""What reads what others wrote, each with inputs to begin with: whatever bytes it is given, it takes them or refuses
them with its documented error. Anything else that a target raises is a fault.

``run.py`` beside this searches for such bytes by coverage; the tests try those that it found.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import unquote

import msgpack
import msgspec
import zmq
from zmq.utils import z85

from broker.access import Access
from broker.files import files_in_store
from broker.plans import build_pipeline
from broker.refusals import Refusals
from broker.zap import ADDRESS, Zap
from cli.configuration import ConfigurationError, read_configuration
from cli.load.ranges import parse_parts, parse_range
from cli.recording import RecordingError, requests, scan
from cli.scenario import ScenarioError, parse_loss, parse_policies
from cli.services import SERVICES
from cli.telemetry_rows import Tail, Troubles
from cluster import records
from cluster.addresses import split_address
from cluster.coordinator.provider import ProviderError, parse_command
from cluster.observe.exporter import exporter_app
from cluster.observe.figures import Figures
from cluster.observe.trace import TraceRecord
from cluster.planner.keys import natural, parse_key
from cluster.store import sqlite_path
from cluster.store.base import Entry, StoreError
from cluster.store.etcd_address import parse_address
from cluster.telemetry import ACTIONS, REQUESTS, ActionRow, RequestRow
from cluster.telemetry_files import parse_name
from cluster.tuning.merge import believed, merge
from cluster.tuning.report import ReportRecord
from laxity import protocol
from laxity.channel import parse_url
from laxity.curve import is_local
from laxity.gateway.errors import GatewayError
from laxity.gateway.grpc_bodies import InferRequest, read_call
from laxity.gateway.http_bodies import decompress, read_body
from laxity.gateway.options import read_options
from laxity.gateway.values import to_payload
from laxity.http_access import HttpAccess
from laxity.http_tokens import HttpTokens, InvalidTokens, read_tokens
from laxity.keys import InvalidKey, KeyFile, new_pair, read_key_file
from laxity.node import ArrayNode, BytesNode, DictNode, ListNode, PayloadError, TextNode
from laxity.outcomes import Outcome
from laxity.payload import Unpacker, as_dict, as_list, decode, encode, pack
from laxity.traceparent import new_traceparent, parse_traceparent
from nodes import worker_protocol
from nodes.discovery import NoSuchDevices, parse_devices
from pipelines.duration import parse_duration
from pipelines.graph import Graph
from pipelines.load import parse_spec, shipped_pipelines
from pipelines.policies import PolicyError, parse_policy
from pipelines.problems import SpecError
from pipelines.profile import LatencyProfile
from pipelines.spec import PipelineSpec
from simulation.arrivals import TraceError, parse_source, parse_window, read_trace

Form = Literal["msgpack", "json", "text"]
"""What inputs mostly look like, so that they can be changed in ways that leave them nearly valid."""
_SHIPPED: Final = Path(__file__).parents[2] / "pipelines" / "shipped"


@dataclass(frozen=True)
class Target:
    """``run`` is to return, whatever it is given."""

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    form: Form
    tokens: tuple[str, ...] = field(default=())
    """Words that mean something in its inputs."""


def _packed(value: Any) -> bytes:
    return bytes(msgpack.packb(value, unicode_errors="surrogatepass"))


def _unpacked(raw: bytes) -> Any:
    """What an input consists of; None for what is no MessagePack."""
    try:
        return msgpack.unpackb(
            raw, strict_map_key=False, unicode_errors="surrogatepass", max_array_len=4096, max_map_len=4096
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        return None


@contextmanager
def _file(content: bytes, mode: int = 0o600) -> Iterator[Path]:
    """A file with this content, in memory."""
    descriptor = os.memfd_create("input")
    try:
        os.write(descriptor, content)
        os.fchmod(descriptor, mode)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


# ---- the wire -------------------------------------------------------------------------------------------------------

_NODES: Final[list[Any]] = [
    None,
    "text",
    BytesNode(3),
    ListNode([1, 2.5, True, TextNode(2)]),
    DictNode({"image": ArrayNode("<f4", (2, 2), 16), "name": "x", "none": None}),
]
_TIMINGS: Final = [protocol.StageTiming("stage", 1, 2, 3, 4, -5)]
_FILES: Final = "ab" * 32
_MESSAGES: Final[dict[str, list[Any]]] = {
    "from_client": [
        protocol.Hello(1, "name", "software"),
        *(protocol.Submit(1, [protocol.Request(7, "ocr", 5, node, 1, new_traceparent(), True)]) for node in _NODES),
        protocol.Cancel([1, 2]),
        protocol.Heartbeat(5),
        protocol.Goodbye("why", True),
        protocol.Fetch(_FILES, 0, 5),
        protocol.Store(_FILES, 0, 5),
        protocol.Tap(["ocr"], True, 5),
    ],
    "to_client": [
        protocol.Welcome(
            1,
            "s0",
            1_000_000,
            5,
            [("ocr", 5)],
            [("s0", "tcp://127.0.0.1:1")],
            [("ocr", [(0, 0.5)])],
            7,
            ["ocr"],
            [["a" * 40]],
        ),
        *(
            protocol.Result([protocol.Answer(1, Outcome.OK, node, 5, "stage", "detail", 6, _TIMINGS)])
            for node in _NODES
        ),
        protocol.Chunk(_FILES, 0, 5, "detail"),
        protocol.Stored(_FILES, 5, "detail", True),
        protocol.Tapped(1, 2, 3, True, [protocol.TappedRequest(1, "ocr", 2, 0, ListNode([BytesNode(3)]))]),
    ],
    "from_agent": [
        protocol.Ready(
            1,
            "a0",
            [
                protocol.DeviceReport(
                    0, "A100", [protocol.ModelReport("ocr@1/x", "", 100, [(1, 0.1)], True, 2.0, 3)], 5.0
                )
            ],
        ),
        protocol.Pull(0, 1, 2, 3),
        *(protocol.Done(0, 1, "ok", 2, 3, [node], [protocol.Failure(0, "why")], "detail", 4, 5) for node in _NODES),
        protocol.Acted(0, 1, "ok", 2, "detail"),
    ],
    "to_agent": [
        *(protocol.Grant(0, 1, 2, 3, 4, "ocr@1/x", "", 5, 6, 7, [[node]]) for node in _NODES),
        protocol.Load(0, 1, 2, 3, "ocr@1/x", 4, 5, 6),
        protocol.Unload(0, 1, 2, 3, "ocr@1/x", 4, 5),
    ],
    "to_worker": [
        worker_protocol.Hold("ocr@1/x", "x", b"{}", "cpu", [(1, 0.1)]),
        worker_protocol.Load(1, "ocr@1/x", 0.5, 1.5),
        *(worker_protocol.Infer(1, "ocr@1/x", 0.5, 1.5, [[node]]) for node in _NODES),
        worker_protocol.Drop(1),
        worker_protocol.Stop(),
    ],
    "from_worker": [
        worker_protocol.Started(5),
        worker_protocol.Held("ocr@1/x", [(1, 0.1)], 1.0, 2.0, 3.0),
        worker_protocol.LoadFailed("ocr@1/x", "detail"),
        worker_protocol.Acted(1, "ok", 2, "", 3.0),
        *(worker_protocol.Finished(1, "ok", 5, [node], [protocol.Failure(0, "why")]) for node in _NODES),
    ],
}
_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "from_client": protocol.decode_from_client,
    "to_client": protocol.decode_to_client,
    "from_agent": protocol.decode_from_agent,
    "to_agent": protocol.decode_to_agent,
    "to_worker": worker_protocol.decode_to_worker,
    "from_worker": worker_protocol.decode_from_worker,
}
_REFUSALS: Final = (protocol.ProtocolError, PayloadError)


def _message_target(name: str) -> Target:
    """Inputs are ``[header, frame, ...]``, the header in clear; what is no such list is a header by itself."""
    decode_header = _DECODERS[name]
    refusals = (
        _REFUSALS
        if name in ("from_client", "to_client", "from_agent", "to_agent")
        else (*_REFUSALS, msgspec.DecodeError, UnicodeDecodeError, RecursionError)
    )

    def run(raw: bytes) -> None:
        parts = _unpacked(raw)
        header, frames = raw, []
        if isinstance(parts, list) and parts and isinstance(parts[0], list):
            with suppress(ValueError, RecursionError, TypeError):
                header = _packed(parts[0])
            frames = [part for part in parts[1:] if isinstance(part, bytes)]
        try:
            message = decode_header(header)
            again = protocol.encode(message)
            assert protocol.encode(decode_header(again)) == again
            _take_all(message, frames)
        except refusals:
            return

    def seeds() -> list[bytes]:
        frames = [b"abc", b"ab", bytes(16)]
        return [_packed([msgpack.unpackb(protocol.encode(message)), *frames]) for message in _MESSAGES[name]]

    return Target(name, run, seeds, "msgpack", (*protocol.DONE_CODES, *Outcome, "<f4", "|S5", "ocr"))


def _take_all(message: Any, frames: list[bytes]) -> None:
    """The values that a message carries, taken out of its frames and turned around in every way."""
    if isinstance(message, protocol.Grant | worker_protocol.Infer):
        nodes = [node for task in message.tasks for node in task]
    elif isinstance(message, protocol.Done | worker_protocol.Finished):
        nodes = message.results
    elif isinstance(message, protocol.Submit | protocol.Tapped):
        nodes = [request.payload for request in message.requests]
    elif isinstance(message, protocol.Result):
        nodes = [answer.payload for answer in message.answers]
    else:
        return
    unpacker = Unpacker(frames)
    taken = [unpacker.take(node) for node in nodes]
    with suppress(PayloadError):
        unpacker.finish()
    for payload in taken:
        with suppress(PayloadError):
            decode(payload)
        with suppress(PayloadError):
            payload.field("image")
        with suppress(PayloadError):
            for item in payload.items(200):
                decode(item)
    for joined in (as_list(taken), as_dict({str(index): payload for index, payload in enumerate(taken)})):
        again = Unpacker(pack([joined])).take(joined.node)
        assert [bytes(part) for part in again.parts] == [bytes(part) for part in joined.parts]


def _payload_value(raw: bytes) -> None:
    """A value that MessagePack can carry: it comes back as it was, or cannot be sent."""
    value = _unpacked(raw)
    with suppress(PayloadError):
        sent = encode(value)
        frames = pack([sent])
        unpacker = Unpacker(frames)
        found = decode(unpacker.take(sent.node))
        unpacker.finish()
        # Not a number equals nothing; a tuple, such as MessagePack's ExtType, comes back as a list.
        assert found == value or found != found or "nan" in repr(value) or "ExtType" in repr(value)


# ---- files ----------------------------------------------------------------------------------------------------------


def _key_file(raw: bytes) -> None:
    with _file(raw) as path, suppress(InvalidKey):
        read_key_file(path)


def _key_files() -> list[bytes]:
    pair = new_pair()
    key = KeyFile(cluster="local", name="x", role="client", public=pair.public, secret=pair.secret)
    content = json.loads(msgspec.json.encode(key))
    servers = [{"shard": "s0", "address": "tcp://10.0.0.1:7100", "publics": [pair.public]}]
    return [json.dumps(content).encode(), json.dumps({**content, "servers": servers}).encode()]


def _recording(raw: bytes) -> None:
    with _file(raw) as path:
        with suppress(RecordingError):
            found = scan(path)
            assert math.isfinite(found.seconds)
            assert len(found.offsets) == len(found.which)
        with suppress(RecordingError, PayloadError):
            for recorded in requests(path):
                if recorded.parts is not None:
                    decode(recorded.content())


def _recordings() -> list[bytes]:
    head = _packed({"laxity_recording": 1, "cluster": "local"})
    entries = [
        _packed([0.5, "ocr", 0.25, 0, msgpack.unpackb(msgspec.msgpack.encode(node)), parts])
        for node, parts in ((None, []), (ListNode([BytesNode(3)]), [b"abc"]), (_NODES[4], None))
    ]
    lost = _packed({"lost": 3, "shard": "s0", "offset": 0.7})
    end = _packed({"end": 2.0, "requests": 3, "lost": 3})
    return [head + b"".join(entries), head + entries[0] + lost + end, head + end, head]


def _telemetry(raw: bytes) -> None:
    kind = ACTIONS if raw[:1] in (b"a", b"A") else REQUESTS
    troubles = Troubles()
    with _file(raw) as path:
        tail = Tail(path, kind, troubles)
        list(tail.rows())
        tail.end()


def _telemetry_files() -> list[bytes]:
    found = []
    for kind in (ActionRow, RequestRow):
        fields = msgspec.structs.fields(kind)
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([each.name for each in fields])
        writer.writerow(["x,y" if each.type is str else "1" for each in fields])
        writer.writerow(["x" if each.type is str else "-0.5" for each in fields])
        found.append(text.getvalue().encode())
    return found


def _trace_file(raw: bytes) -> None:
    with _file(raw) as path, suppress(TraceError):
        source = read_trace(path)
        source.draw(min(10.0, 1000.0 / source.length), 1)


def _configuration(raw: bytes) -> None:
    with _file(raw) as path, suppress(ConfigurationError):
        read_configuration(path, SERVICES)


_CONFIGURATION: Final = b"""cluster: local
store: sqlite:///x/store.db
log_level: info
broker: {name: s0, frontend: 'tcp://127.0.0.1:*', heartbeat: 500ms, traces: 100}
node: {name: a0, devices: 'emulated:2'}
coordinator: {name: c0}
"""


# ---- pipelines ------------------------------------------------------------------------------------------------------


def _spec(raw: bytes) -> None:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return
    try:
        spec = parse_spec(text, file="pipeline.yaml", root="/nowhere")
    except SpecError as error:
        str(error).encode()
        return
    _use(spec)


def _use(spec: PipelineSpec) -> None:
    encoded = msgspec.json.encode(spec)
    assert msgspec.json.encode(msgspec.json.decode(encoded, type=PipelineSpec)) == encoded
    Graph(spec).longest_path({})
    build_pipeline(spec)


def _specs() -> list[bytes]:
    """The shipped pipelines, those in the documentation, and texts that are known to be nasty."""
    documents = (_SHIPPED.parents[1] / "docs").glob("*.md")
    shown = [block for page in documents for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)]
    laughs = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(9)
    )
    nasty = [
        laughs,
        "[" * 50,
        "a: &a [*a]",
        "slo: 0x" + "f" * 50,
        "x: 1:1:1.0",
        'x: "\\U0010ffff"',
        "!!python/name:os x",
    ]
    return [
        *((_SHIPPED / f"{name}.yaml").read_bytes() for name in shipped_pipelines()),
        *(text.encode() for text in shown + nasty),
    ]


def _profile(raw: bytes) -> None:
    points = _unpacked(raw)
    try:
        profile = LatencyProfile(msgspec.convert(points, list[tuple[int, float]]))
    except ValueError:
        return
    found = [profile.latency(batch) for batch in (1, 2, 7, 100)]
    # Interpolated, it may be off by the last bit.
    assert all(later >= earlier * (1 - 1e-12) for earlier, later in pairwise(found))
    assert LatencyProfile(profile.pairs()) == profile


# ---- the store ------------------------------------------------------------------------------------------------------

_RECORDS: Final[dict[str, type[msgspec.Struct]]] = {
    name: kind
    for name, kind in vars(records).items()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and name.endswith("Record")
} | {"ReportRecord": ReportRecord}


def _record(raw: bytes) -> None:
    """Inputs are the record's name, a line's end, and its JSON."""
    name, _, content = raw.partition(b"\n")
    kind = _RECORDS.get(name.decode(errors="replace"))
    if kind is None:
        return
    try:
        record = records.decode(kind, "/laxity/local/x", content)
    except records.RecordError:
        return
    encoded = records.encode(record)
    assert records.encode(records.decode(kind, "/laxity/local/x", encoded)) == encoded
    if isinstance(record, ReportRecord):
        merge([believed("s0", record)])
    elif isinstance(record, records.KeyRecord):
        record.good(1e9)
    paths = records.Paths("local")
    for prefix in (paths.pipelines, paths.brokers, paths.serving):
        files_in_store({prefix + "x": Entry(prefix + "x", content, 1, 1)}, paths, "s0")


def _record_seeds() -> list[bytes]:
    spec = parse_spec(
        "{name: echo, slo: 1s, stages: {x: {executor: emulated, profile: {alpha_ms: 1, beta_ms: 1}}}, output: x}",
        file="x",
        root="",
    )
    file = records.FileRecord("model.onnx", "ab" * 32, 5)
    examples: list[msgspec.Struct] = [
        records.PipelineRecord("1", spec, [file]),
        records.ServingRecord("1", spec, {"s0": 1.0}, [file]),
        records.BrokerRecord("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", 1, "host", {"ok": 1}),
        records.NodeRecord(1, "host", "ready", [records.DeviceRecord(0, "A100", {"echo@1/x": "ready"})]),
        records.NodeGaugesRecord(1.0, 2.0, [records.DeviceGauges(0, 0.5, 1, 2.0, 3.0, records.GpuGauges(0.5))]),
        records.PlacementRecord({0: records.DevicePlacement("s0", ["echo@1/x"])}),
        records.NodeStateRecord("active", "why", [("A100", 80.0)]),
        records.DrainRecord("why"),
        records.LeaderRecord("c0", "host", 1),
        records.CoordinatorRecord("host", 1),
        records.ProfileRecord([(1, 0.1)], 1.0, 2.0, "host"),
        records.TuningRecord(0.1, 5.0, 1.0, {"x": 0.1}),
        records.KeyRecord(role="client", publics=[records.PublicKey(new_pair().public, 1.0, 2.0)]),
    ]
    named = [(type(example).__name__, records.encode(example)) for example in examples]
    return [name.encode() + b"\n" + content for name, content in named]


# ---- HTTP and gRPC --------------------------------------------------------------------------------------------------


def _gateway_body(raw: bytes) -> None:
    """Inputs are the header that says how much of the body is JSON ('-': none), a line's end, and the body."""
    length, _, body = raw.partition(b"\n")
    with suppress(GatewayError):
        read = read_body(body, None if length == b"-" else length.decode("latin-1"))
        _call_with(read.inputs, read.parameters)
        read_options({}, read.parameters)


def _call_with(inputs: Any, parameters: Any) -> None:
    value = to_payload(inputs, parameters)
    with suppress(PayloadError):
        encode(value)


def _gateway_bodies() -> list[bytes]:
    tensor = {"name": "x", "shape": [2, 2], "datatype": "FP32"}
    binary = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": 16}}]}).encode()
    texts = {"name": "t", "shape": [2], "datatype": "BYTES", "data": ["a", "b"], "parameters": {"content_type": "json"}}
    bodies = [
        {"id": "7", "inputs": [{**tensor, "data": [[1, 2], [3, 4]]}], "outputs": [{"name": "output"}]},
        {"inputs": [{**tensor, "data": [1, 2, 3, 4]}, texts], "parameters": {"timeout": 5, "priority": 1}},
    ]
    return [
        *(b"-\n" + json.dumps(body).encode() for body in bodies),
        str(len(binary)).encode() + b"\n" + binary + bytes(16),
        b"0\nraw",
    ]


def _compressed(raw: bytes) -> None:
    for encoding in ("gzip", "deflate"):
        with suppress(GatewayError):
            assert len(decompress(raw, encoding, 100_000)) <= 100_000


def _grpc_body(raw: bytes) -> None:
    from google.protobuf.message import DecodeError

    request = InferRequest()
    try:
        request.ParseFromString(raw)
    except DecodeError:
        return
    with suppress(GatewayError):
        call = read_call(request, {}, None, 0.0)
        _call_with(call.inputs, call.parameters)


def _grpc_bodies() -> list[bytes]:
    raw = InferRequest(model_name="echo", id="7")
    raw.inputs.add(name="x", datatype="FP32", shape=[2])
    raw.raw_input_contents.append(bytes(8))
    typed = InferRequest(model_name="echo")
    each = typed.inputs.add(name="x", datatype="BYTES", shape=[1])
    each.contents.bytes_contents.append(b"abc")
    each.parameters["content_type"].string_param = "str"
    typed.parameters["priority"].int64_param = 1
    typed.outputs.add(name="y")
    return [raw.SerializeToString(), typed.SerializeToString()]


class _Kept:
    """A process of which one trace is kept."""

    def __init__(self) -> None:
        self.record = TraceRecord(
            *("x-1", "s0", "ocr", "1", "", True, 1.0, 1.0, 1.0, 0.5, "dropped", "x", "detail", False, 0),
            [],
        )

    def figures(self) -> Figures:
        raise RuntimeError("the process is ending")

    def trace(self, request: str) -> TraceRecord | None:
        return self.record if request == self.record.request else None

    def traces(self, after: int, limit: int) -> tuple[int, list[TraceRecord]]:
        return 1, [self.record][:limit]


@lru_cache(1)
def _exporter() -> tuple[Any, str, asyncio.AbstractEventLoop]:
    token = "t" * 32
    with _file(token.encode()) as path:
        tokens = HttpTokens(path)
        tokens.current()
    return exporter_app(_Kept(), HttpAccess("10.0.0.1", tokens, ["metrics"])), token, asyncio.new_event_loop()


def _http(raw: bytes) -> None:
    """Inputs are a request's line and headers, as a server has split them: 'GET path?query' and 'name: value'."""
    first, *rest = raw.split(b"\n")
    method, _, target = first.partition(b" ")
    path, _, query = target.partition(b"?")
    headers = [(name.strip().lower(), value.strip()) for name, colon, value in (each.partition(b":") for each in rest)]
    app, token, loop = _exporter()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "method": method.decode("latin-1"),
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": query,
        "headers": headers,
        "client": ("10.0.0.2", 5),
        "server": ("10.0.0.1", 6),
    }
    told: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        told.append(message)

    loop.run_until_complete(app(scope, receive, send))
    status = told[0]["status"]
    assert status in (200, 307, 400, 401, 403, 404, 405, 421, 503)
    shows = any(name == b"authorization" and token.encode() in value for name, value in headers)
    assert shows or b"x-1" not in b"".join(each.get("body", b"") for each in told) or b"x-1" in raw


def _tokens(raw: bytes) -> None:
    with _file(raw) as path, suppress(InvalidTokens):
        read_tokens(path)


# ---- who is let in --------------------------------------------------------------------------------------------------


@lru_cache(1)
def _zap() -> tuple[Zap, Any, str]:
    """A handler, a socket that asks it as libzmq does, and a key that is good."""
    context: Any = zmq.Context()
    public = new_pair().public
    access = Access()
    access.admit({"x": records.KeyRecord(role="client", publics=[records.PublicKey(public, 0.0)])})
    zap = Zap(context, access, Refusals(), lambda: 1e9)
    asking = context.socket(zmq.DEALER)
    asking.connect(ADDRESS)
    return zap, asking, public


def _handshake(raw: bytes) -> None:
    """Inputs are ``[routing id, mechanism, credential, ...]``: what a peer has a say in."""
    parts = _unpacked(raw)
    if not (isinstance(parts, list) and len(parts) > 1 and all(isinstance(part, bytes) for part in parts)):
        return
    zap, asking, public = _zap()
    asking.send_multipart([b"", b"1.0", b"1", b"frontend", b"127.0.0.1", *parts])
    zap.answer()
    status, _, user = asking.recv_multipart()[3:6]
    assert (status == b"200") == (parts[1:] == [b"CURVE", z85.decode(public)])
    assert bool(user) <= (len(parts) == 3)


# ---- what people write ----------------------------------------------------------------------------------------------


def _split(text: str) -> None:
    host, port = split_address(text)
    assert host
    assert 0 <= port < 65536


_PARSERS: Final[dict[str, tuple[Callable[[str], Any], tuple[type[Exception], ...], str]]] = {
    "duration": (parse_duration, (ValueError,), "1.5s"),
    "range": (parse_range, (ValueError,), "100:200:50"),
    "parts": (lambda text: parse_parts(text, parse_duration), (ValueError,), "100ms:1,300ms:3"),
    "window": (parse_window, (TraceError,), "330:450"),
    "source": (lambda text: parse_source(text) if ":" in text else None, (TraceError,), "step:1x60,3x30"),
    "policy": (parse_policy, (PolicyError,), "pard:lambda=0.15,history=3"),
    "policies": (parse_policies, (PolicyError,), "laxity,pard:lambda=0.1,history=3,all"),
    "loss": (lambda text: parse_loss(text, 4), (ScenarioError,), "2@10:20"),
    "command": (parse_command, (ProviderError,), "ipmitool -H {node}-bmc power on"),
    "devices": (
        lambda text: parse_devices(text) if "cuda" not in text else None,
        (NoSuchDevices,),
        "emulated:8:A100:9+cpu:5",
    ),
    "address": (_split, (ValueError,), "[::1]:80"),
    "url": (parse_url, (ValueError,), "tcp://127.0.0.1:5,tcp://[::1]:6"),
    "etcd": (parse_address, (StoreError,), "etcd://a:1,[::1]:2?ca=/c&cert=/d&key=/e&server_name=x"),
    "sqlite": (sqlite_path, (StoreError,), "sqlite:///x/y%20z.db"),
    "local": (is_local, (), "tcp://[fe80::1%eth0]:5"),
    "traceparent": (parse_traceparent, (), "00-" + "1" * 32 + "-" + "2" * 16 + "-01"),
    "timeout": (lambda text: read_options({"laxity-timeout": text}, {}), (GatewayError,), "250 ms"),
    "trace": (lambda text: read_options({"traceparent": text}, {}), (GatewayError,), "00-x"),
    "telemetry": (parse_name, (), "actions-a0-20260725T101112.123456Z.csv"),
    "model": (lambda text: natural(parse_key(text).pipeline), (), "ocr10@1/x"),
    "gauges": (records.Paths("local").profiled, (), "/laxity/local/profiles/a@1~x/A100%20b"),
}
"""By name: the parser, its documented errors, and an example."""


def _text(raw: bytes) -> None:
    """Inputs are a parser's name, a line's end, and what it is given."""
    name, _, content = raw.partition(b"\n")
    found = _PARSERS.get(name.decode(errors="replace"))
    if found is None:
        return
    parse, errors, _ = found
    with suppress(*errors):
        parse(content.decode(errors="surrogateescape"))


def _texts() -> list[bytes]:
    return [f"{name}\n{example}".encode() for name, (_, _, example) in _PARSERS.items()]


_YAML: Final = (
    "&a ",
    "*a",
    "!!binary ",
    "!!set",
    "<<: ",
    "? ",
    "|\n",
    ">-\n",
    "---\n",
    "...",
    "%YAML 1.1\n",
    "%TAG ! x\n",
)
_YAML_VALUES: Final = (
    *("0x", "0b1", "1:1:1", ":1" * 50, ".inf", ".nan", "1e400", "~", "yes", "2001-01-01", "\\U0011FFFF", "\\ud800"),
    *(
        "slo: ",
        "stages:",
        "inputs: [request]",
        "map: true",
        "max_items: ",
        "executor: emulated",
        "output: ",
        "{}",
        "[]",
    ),
    *("alpha_ms: ", "latency_ms: {1: 2}", "max_batch: ", "policy: laxity", "9" * 30, "9" * 5000, "files: ['../x']"),
)
_TEXT: Final = (
    "::",
    "%00",
    "\0",
    "1e999",
    "-1",
    "nan",
    "inf",
    "9" * 30,
    "9" * 5000,
    "\u0661",
    "tcp://",
    "[::1]",
    "..",
    ",,",
)

TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for target in (
        *(_message_target(name) for name in _MESSAGES),
        Target("payload", _payload_value, lambda: [_packed(["x" * 2000, {"a": b"b" * 9000}, 1.5, None])], "msgpack"),
        Target("profile", _profile, lambda: [_packed([[1, 0.1], [2, 0.2]])], "msgpack"),
        Target("recording", _recording, _recordings, "msgpack", ("laxity_recording", "lost", "end", "offset")),
        Target("key_file", _key_file, _key_files, "json", ("client", "node", "shard", "operator")),
        Target("record", _record, _record_seeds, "json", tuple(_RECORDS)),
        Target("spec", _spec, _specs, "text", _YAML + _YAML_VALUES),
        Target("configuration", _configuration, lambda: [_CONFIGURATION], "text", _YAML + _YAML_VALUES),
        Target("telemetry", _telemetry, _telemetry_files, "text", ('"', ",", "\r\n", *_TEXT)),
        Target(
            "trace_file",
            _trace_file,
            lambda: [b"seconds_offset,requests\n0,5\n60,7\n", b"arrival_s\n0.5\n1.5\n"],
            "text",
            ("1e18", "1e9", "1e-300", *_TEXT),
        ),
        Target("text", _text, _texts, "text", (*_TEXT, *_PARSERS)),
        Target(
            "zap",
            _handshake,
            lambda: [_packed([b"id", b"CURVE", z85.decode(_zap()[2])]), _packed([b"", b"NULL"])],
            "msgpack",
            ("CURVE", "PLAIN", "NULL"),
        ),
        Target(
            "http",
            _http,
            lambda: [
                b"GET /traces?limit=5&outcome=dropped\nauthorization: Bearer " + b"t" * 32,
                b"GET /traces/x-1\nauthorization: Bearer t\nhost: localhost",
                b"GET /v2/health/ready\naccept-encoding: gzip",
                b"GET /metrics\naccept: application/openmetrics-text; version=1.0.0",
            ],
            "text",
            ("/traces", "%2f", "limit=", "9" * 5000, "authorization: Bearer ", "Basic ", "host: ", "//", "..", "[::1"),
        ),
        Target(
            "tokens", _tokens, lambda: [b"ann " + b"t" * 32 + b"\n# x\n" + b"u" * 32], "text", ("#", " ", "\n", "\0")
        ),
        Target("gateway_body", _gateway_body, _gateway_bodies, "json", ("BYTES", "FP16", "INT64", "binary_data_size")),
        Target("gateway_compressed", _compressed, lambda: [gzip.compress(b"x" * 1000)], "text"),
        Target("grpc_body", _grpc_body, _grpc_bodies, "text", ("BYTES", "BOOL", "content_type", "json")),
    )
}
