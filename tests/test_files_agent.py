"""An agent gets what a pipeline needs from where it lies, over HTTP and from shards, before the model is loaded."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper, save

from broker.shell import Shard, ShardConfig
from cli.publish import PublishError, pipeline_record, publish_files
from cluster.filecache import CacheFull, FileCache
from cluster.records import (
    BrokerRecord,
    DevicePlacement,
    FileRecord,
    NodeRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    ServingRecord,
    decode,
    encode,
)
from cluster.store import open_store, sqlite_url
from laxity import Client, protocol
from laxity.files import FileClient
from laxity.protocol import MAX_CHUNK, Chunk, Fetch
from nodes.agent import Work
from nodes.files import ModelFiles
from pipelines import load_spec

CODE = "import helpers\ndef model(feeds):\n    return [feed * helpers.FACTOR for feed in feeds]\n"
SPEC = """
name: p
slo: 20s
stages:
  first: {executor: python, model: 'steps:model'}
  second: {executor: onnx, model: second.onnx, inputs: [first]}
output: second
files: [data.bin]
"""
DATA = random.Random(2).randbytes(2 * MAX_CHUNK)


def write_pipeline(root: Path) -> Any:
    """A pipeline that makes six of one: a python stage triples, an onnx stage doubles."""
    root.mkdir(exist_ok=True)
    (root / "steps.py").write_text(CODE)
    (root / "helpers.py").write_text("FACTOR = 3\n")
    (root / "data.bin").write_bytes(DATA)
    shape = ["n", 1]
    x, y = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(model, str(root / "second.onnx"))
    (root / "p.yaml").write_text(SPEC)
    return load_spec(str(root / "p.yaml"))


def quiet(_: str) -> None: ...


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def record(root: Path) -> PipelineRecord:
    return pipeline_record(write_pipeline(root), quiet)


class Agent:
    """What an agent's process does with the files of its models, without the models."""

    def __init__(self, directory: Path, limit: int = 10**9, name: str = "a0") -> None:
        self.cache = FileCache(directory, limit)
        self.files = ModelFiles(self.cache, name, [7], back_off=(0.001, 0.02))
        self.files.start()

    def want(self, record: PipelineRecord, stages: list[str], shards: list[str], device: int = 0) -> None:
        models = {record.spec.model_key(stage): (record.spec, stage) for stage in stages}
        self.files.want({device: Work("s0", models)}, dict.fromkeys(models, record.files), shards)

    def given(self, record: PipelineRecord, stage: str) -> Any:
        """The spec with which the stage is placed; None while it is withheld."""
        found = self.files.available()[0].models.get(record.spec.model_key(stage))
        return None if found is None else found[0]

    def state(self, record: PipelineRecord, stage: str) -> str:
        return self.files.withheld()[0].get(record.spec.model_key(stage), "")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path / "agent")
    yield agent
    agent.files.stop()


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Shard]:
    shard = Shard(ShardConfig(name="s0", cache=str(tmp_path / "shard")))
    thread = threading.Thread(target=shard.run)
    thread.start()
    yield shard
    shard.stop()
    thread.join()


def publish(shard: Shard, record: PipelineRecord) -> None:
    shard.keep_files(record.files, [])
    publish_files(record, [shard.frontend], quiet)


def given(cluster, agent, record, stage):
    cluster.eventually(lambda: agent.given(record, stage) is not None, f"the files of {stage} are here")
    return agent.given(record, stage)


def failed(cluster, agent, record, stage):
    cluster.eventually(lambda: agent.state(record, stage).startswith("failed: "), f"{stage} has failed")
    return agent.state(record, stage)


# ---- where they lie, and from shards ---------------------------------------------------------------


def check_given(agent, record, spec):
    """That all the first stage needs is there, and lies in the cache."""
    root = Path(spec.root)
    assert root.is_relative_to(agent.cache.directory)
    assert (root / "steps.py").read_text() == CODE
    assert (root / "helpers.py").read_text() == "FACTOR = 3\n"
    assert (root / "data.bin").read_bytes() == DATA
    assert msgspec.structs.replace(spec, root=record.spec.root) == record.spec
    assert not (root / "second.onnx").exists()  # the other stage's


def test_files_that_lie_where_the_spec_was_written_are_copied(cluster, agent, record, root):
    agent.want(record, ["first"], [])
    check_given(agent, record, given(cluster, agent, record, "first"))
    (root / "helpers.py").write_text("FACTOR = 4\n")
    check_given(agent, record, agent.given(record, "first"))
    assert agent.files.withheld() == {0: {}}


@pytest.mark.parametrize("change", ["gone", "longer", "same size", "directory", "everything"])
def test_what_does_not_lie_there_comes_from_a_shard(cluster, agent, shard, record, root, change):
    publish(shard, record)
    changed = root / "helpers.py"
    changed.unlink()
    if change == "everything":
        shutil.rmtree(root)
    elif change == "directory":
        changed.mkdir()
    elif change != "gone":
        changed.write_text("FACTOR = 3\n# \n" if change == "longer" else "FACTOR = 4\n")
    agent.want(record, ["first"], [shard.backend])
    check_given(agent, record, given(cluster, agent, record, "first"))


def test_each_file_is_fetched_once(cluster, agent, record, root, peer):
    contents = {file.digest: (root / file.path).read_bytes() for file in record.files}
    shutil.rmtree(root)
    asked = []
    done = threading.Event()

    def serve():
        while not done.is_set():
            if peer.waits(20):
                sender, fetch, _ = peer.receive(Fetch)
                asked.append((fetch.digest, fetch.offset))
                content = contents[fetch.digest]
                piece = content[fetch.offset : fetch.offset + fetch.length]
                peer.send(sender, Chunk(fetch.digest, fetch.offset, len(content)), [piece])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        agent.want(record, ["first", "second"], [peer.url])
        given(cluster, agent, record, "first")
        given(cluster, agent, record, "second")
    finally:
        done.set()
        thread.join()
    assert len(asked) == len(set(asked))
    assert {digest for digest, _ in asked} == contents.keys()


def test_the_next_shard_is_asked_when_one_dies_in_the_middle(cluster, tmp_path, shard, record, root, make_peer):
    publish(shard, record)
    shutil.rmtree(root)
    peer = make_peer()
    shards = [peer.url, shard.backend]
    # By its name an agent begins with one or the other.
    name = next(name for name in "abcdefgh" if sorted(shards)[zlib.crc32(name.encode()) % 2] == peer.url)
    data = next(file for file in record.files if file.path == "data.bin")

    def serve():
        sender, fetch, _ = peer.receive(Fetch)
        assert fetch.digest == data.digest
        peer.send(sender, Chunk(data.digest, 0, data.size), [DATA[:MAX_CHUNK]])
        peer.close()

    thread = threading.Thread(target=serve)
    thread.start()
    agent = Agent(tmp_path / "agent", name=name)
    try:
        agent.want(record, ["first"], shards)
        spec = given(cluster, agent, record, "first")
        assert (Path(spec.root) / "data.bin").read_bytes() == DATA
        assert list((agent.cache.directory / "new").iterdir()) == []
    finally:
        agent.files.stop()
        thread.join()


def test_a_file_that_no_shard_has_fails_the_model_until_it_comes(cluster, agent, shard, record, root):
    shard.keep_files(record.files, [])
    hidden = root.rename(root.parent / "hidden")
    agent.want(record, ["first"], [shard.backend])
    why = failed(cluster, agent, record, "first")
    assert "data.bin is not to be had from any shard" in why
    assert "was not uploaded (yet)" in why
    assert why.endswith("apply the pipeline again")
    moved = msgspec.structs.replace(record, spec=msgspec.structs.replace(record.spec, root=str(hidden)))
    publish_files(moved, [shard.frontend], quiet)
    given(cluster, agent, record, "first")


def test_no_shard_at_all(cluster, agent, record, root):
    shutil.rmtree(root)
    agent.want(record, ["first"], [])
    assert "(there is none); apply" in failed(cluster, agent, record, "first")
    agent.want(record, ["first"], ["nonsense"])
    cluster.eventually(lambda: "no shard's address" in agent.state(record, "first"), "the other reason is told")


def test_what_is_being_uploaded_is_waited_for(cluster, agent, shard, record, root):
    shard.keep_files(record.files, [])
    hidden = root.rename(root.parent / "hidden")
    data = next(file for file in record.files if file.path == "data.bin")
    with FileClient(shard.frontend) as client:
        client._send(protocol.Store(data.digest, 0, data.size), DATA[:MAX_CHUNK])
        client._answer(protocol.Stored, data.digest, None)
        agent.want(record, ["first"], [shard.backend])
        cluster.eventually(
            lambda: agent.state(record, "first").endswith("being uploaded, 50 %"), "the upload's progress is told"
        )
        assert agent.state(record, "first").startswith("queued: fetching data.bin: ")
    moved = msgspec.structs.replace(record, spec=msgspec.structs.replace(record.spec, root=str(hidden)))
    publish_files(moved, [shard.frontend], quiet)
    given(cluster, agent, record, "first")


def test_the_progress_is_told(cluster, agent, record, root, peer):
    shutil.rmtree(root)
    data = next(file for file in record.files if file.path == "data.bin")
    agent.want(record, ["first"], [peer.url])
    sender, first, _ = peer.receive(Fetch)
    assert first.digest == data.digest
    peer.send(sender, Chunk(data.digest, 0, data.size), [DATA[:MAX_CHUNK]])
    cluster.eventually(lambda: agent.state(record, "first") == "queued: fetching data.bin 50 %", "the half is told")
    agent.files.want({}, {}, [])  # nobody waits for it any more
    assert agent.files.available() == {}


@pytest.mark.parametrize(
    "file",
    [
        FileRecord("../outside", "0" * 64, 1),
        FileRecord("/etc/passwd", "0" * 64, 1),
        FileRecord("a", "nonsense", 1),
        FileRecord("a", "0" * 64, 2**62),
    ],
)
def test_a_record_that_leads_elsewhere_fails_the_model(cluster, agent, record, file):
    bad = msgspec.structs.replace(record, files=[*record.files, file])
    agent.want(bad, ["first"], [])
    assert "apply the pipeline again" in failed(cluster, agent, bad, "first")
    assert not agent.cache.directory.exists()


def test_a_huge_claim_is_refused_before_anything_is_fetched(cluster, tmp_path, shard, record, root):
    publish(shard, record)
    shutil.rmtree(root)
    agent = Agent(tmp_path / "small", limit=MAX_CHUNK)
    try:
        agent.want(record, ["first"], [shard.backend])
        why = failed(cluster, agent, record, "first")
        assert "0 of at most 1048576 bytes, all in use, and 2097152 more are needed" in why
        assert list((tmp_path / "small" / "new").iterdir()) == []
    finally:
        agent.files.stop()


def test_what_is_in_use_stays_and_what_is_not_makes_room(cluster, tmp_path, shard, record, root):
    publish(shard, record)
    shutil.rmtree(root)
    agent = Agent(tmp_path / "tight", limit=2 * MAX_CHUNK + 10_000)
    try:
        agent.want(record, ["first"], [shard.backend])
        tree = Path(given(cluster, agent, record, "first").root)
        other = b"x" * 20_000
        digest = hashlib.sha256(other).hexdigest()
        with pytest.raises(CacheFull):
            agent.cache.add(digest, len(other), [other])
        assert (tree / "data.bin").read_bytes() == DATA
        agent.files.want({}, {}, [])

        def fits() -> bool:
            try:
                agent.cache.add(digest, len(other), [other])
            except CacheFull:
                return False
            return True

        cluster.eventually(fits, "there is room")
        assert not tree.exists()
    finally:
        agent.files.stop()


def test_a_damaged_file_is_fetched_again(cluster, tmp_path, shard, record, root):
    publish(shard, record)
    shutil.rmtree(root)
    for damaged in (False, True):
        agent = Agent(tmp_path / "again")
        try:
            agent.want(record, ["first"], [shard.backend])
            helpers = Path(given(cluster, agent, record, "first").root) / "helpers.py"
            assert helpers.read_text() == "FACTOR = 3\n"
        finally:
            agent.files.stop()
        if not damaged:
            helpers.chmod(0o600)
            helpers.write_text("FACTOR = 9\n")


def test_emulated_devices_and_pipelines_without_files_need_nothing(agent, record, root):
    shutil.rmtree(root)
    models = {record.spec.model_key("first"): (record.spec, "first")}
    agent.files.want({7: Work("s0", models)}, dict.fromkeys(models, record.files), [])
    assert agent.files.available() == {7: Work("s0", models)}
    agent.files.want({0: Work("s0", models)}, {key: [] for key in models}, [])
    assert agent.files.available() == {0: Work("s0", models)}
    assert agent.files.withheld() == {0: {}}


# ---- over HTTP --------------------------------------------------------------------------------------


class Web:
    """A real HTTP server; ``pages`` by path: (status, headers, body)."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[str] = []
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append(self.path)
                status, headers, body = web.pages.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                try:
                    self.wfile.write(body)
                except OSError:
                    pass  # it had heard enough

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    web = Web()
    yield web
    web.close()


def at(root: Path, address: str, *fields: str) -> Any:
    """A pipeline whose model is at an address."""
    root.mkdir(exist_ok=True)
    stage = f"{{executor: onnx, model: '{address}'{''.join(fields)}}}"
    (root / "w.yaml").write_text(f"name: w\nslo: 20s\nstages: {{a: {stage}}}\noutput: a\n")
    return load_spec(str(root / "w.yaml"))


@pytest.mark.parametrize("headers", [{}, {"Content-Length": ""}])
@pytest.mark.parametrize("digested", [False, True])
def test_a_model_at_an_address_is_fetched_from_there(cluster, agent, web, root, headers, digested):
    digest = hashlib.sha256(DATA).hexdigest()
    web.pages["/m.onnx?v=1"] = (302, {"Location": "/real"}, b"")
    web.pages["/real"] = (200, headers, DATA)
    address = f"{web.url}/m.onnx?v=1"
    record = pipeline_record(at(root, address, f", sha256: {digest}" if digested else ""), quiet)
    assert record.files == [FileRecord(address, digest, len(DATA))]
    agent.want(record, ["a"], [])
    spec = given(cluster, agent, record, "a")
    model = Path(spec.stages["a"].model)
    assert model.read_bytes() == DATA
    assert model.suffix == ".onnx"
    assert record.spec.stages["a"].model == address


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ((200, {}, DATA[::-1]), "has changed: .* apply the pipeline again"),
        ((200, {}, DATA + b"x"), "has changed: .* apply the pipeline again"),
        ((200, {"Content-Length": str(2 * len(DATA))}, DATA), "broke off after 2097152 of 4194304 bytes"),
        ((200, {"Content-Length": ""}, DATA[:-1]), "has changed"),
        ((500, {}, b""), "answers 500"),
        ((302, {"Location": "file:///etc/passwd"}, b""), "answers 302"),
        ((302, {"Location": "/m.onnx"}, b""), "answers 302"),
    ],
)
def test_what_an_address_may_do_wrong_until_it_is_right(cluster, agent, web, root, page, why):
    web.pages["/m.onnx"] = (200, {}, DATA)
    record = pipeline_record(at(root, f"{web.url}/m.onnx"), quiet)
    web.pages["/m.onnx"] = page
    agent.want(record, ["a"], [])
    assert re.search(why, failed(cluster, agent, record, "a"))
    assert list((agent.cache.directory / "new").iterdir()) == []
    web.pages["/m.onnx"] = (200, {}, DATA)
    given(cluster, agent, record, "a")


def test_an_address_without_a_good_file_cannot_be_published(web, root, unused_port):
    web.pages["/m.onnx"] = (200, {"Content-Length": ""}, DATA)
    with pytest.raises(PublishError, match=r"has the SHA-256 digest [0-9a-f]{64}, and the spec says a{64}; correct"):
        pipeline_record(at(root, f"{web.url}/m.onnx", f", sha256: {'a' * 64}"), quiet)
    with pytest.raises(PublishError, match="answers 404"):
        pipeline_record(at(root, f"{web.url}/other.onnx"), quiet)
    with pytest.raises(PublishError, match=r"cannot be reached: .*refused"):
        pipeline_record(at(root, f"http://127.0.0.1:{unused_port}/m.onnx"), quiet)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


# ---- the whole, as processes --------------------------------------------------------------------------


PATHS = Paths("test")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts ``laxity ARGUMENTS`` as on a host of its own: with a cache of its own."""
    running = []
    log = (tmp_path / "log").open("wb")

    def start(host: str, *arguments: str) -> None:
        command = [sys.executable, "-P", "-m", "cli.main", *arguments]
        command += ["--store", sqlite_url(tmp_path / "store.db"), "--cluster", "test"]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / host)}
        running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))

    yield start
    for process in running:
        process.terminate()
    for process in running:
        assert process.wait(30) == 0, (tmp_path / "log").read_text()
    log.close()


def test_an_agent_on_another_host_serves_what_was_published(cluster, tmp_path, start, record, root):
    store = open_store(sqlite_url(tmp_path / "store.db"))
    try:
        spec = record.spec
        store.put(PATHS.pipeline("p"), encode(record))
        store.put(PATHS.served("p"), encode(ServingRecord(record.version, spec, {"s0": 1.0}, record.files)))
        keys = [spec.model_key(stage) for stage in spec.stages]
        store.put(PATHS.placement("a0"), encode(PlacementRecord({0: DevicePlacement("s0", keys)})))

        def found(key, kind):
            entry = store.get(key)
            return None if entry is None else decode(kind, key, entry.value)

        start("shard", "broker", "run", "--shard", "s0")
        cluster.eventually(lambda: found(PATHS.broker("s0"), BrokerRecord), "the shard has registered")
        frontend = found(PATHS.broker("s0"), BrokerRecord).frontend
        publish_files(record, [frontend], quiet)
        shutil.rmtree(root)
        start("agent", "node", "run", "--agent", "a0", "--devices", "cpu")
        start("other", "broker", "run", "--shard", "s1")

        def states():
            node = found(PATHS.node("a0"), NodeRecord)
            return node.devices[0].models if node is not None else {}

        cluster.eventually(lambda: states() == dict.fromkeys(keys, "ready"), "the models are ready")
        with Client(frontend) as client:
            answer = client.infer("p", np.ones(1, np.float32))
        assert answer.tolist() == [6.0]
        digests = {file.digest for file in record.files}
        for host in ("agent", "shard", "other"):
            files = tmp_path / host / "laxity" / "files"
            cluster.eventually(
                lambda files=files: files.is_dir() and digests <= set(os.listdir(files)), f"{host} has the files"
            )
    finally:
        store.close()


def laxity(tmp_path: Path, *arguments: str) -> str:
    """What ``laxity ARGUMENTS`` prints, with directories of its own."""
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-P", "-m", "cli.main", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def answer_of(tmp_path: Path, pipeline: str) -> list[float]:
    shards = json.loads(laxity(tmp_path, "status", "--json"))["shards"]
    with Client(shards[0]["frontend"]) as client:
        answer: list[float] = client.infer(pipeline, np.ones(1, np.float32)).tolist()
        return answer


def test_a_cluster_on_one_machine_copies_nothing_but_what_lies_at_addresses(tmp_path, web, root):
    write_pipeline(root)
    web.pages["/m.onnx"] = (200, {}, (root / "second.onnx").read_bytes())
    at(root, f"{web.url}/m.onnx")
    laxity(tmp_path, "up", str(root / "p.yaml"), str(root / "w.yaml"), "--detach")
    try:
        assert answer_of(tmp_path, "p") == [6.0]
        assert answer_of(tmp_path, "w") == [2.0]
        kept = os.listdir(tmp_path / "cache" / "laxity" / "files")
        assert kept == [hashlib.sha256((root / "second.onnx").read_bytes()).hexdigest()]
    finally:
        laxity(tmp_path, "down")


def test_a_changed_file_is_a_new_version_when_it_is_applied(tmp_path, root):
    write_pipeline(root)
    laxity(tmp_path, "up", "--coordinators", "1", "--detach")
    try:
        laxity(tmp_path, "pipeline", "apply", str(root / "p.yaml"))
        assert answer_of(tmp_path, "p") == [6.0]
        (root / "helpers.py").write_text("FACTOR = 5\n")
        assert "is served" in laxity(tmp_path, "pipeline", "apply", str(root / "p.yaml"))
        assert answer_of(tmp_path, "p") == [10.0]
    finally:
        laxity(tmp_path, "down")
