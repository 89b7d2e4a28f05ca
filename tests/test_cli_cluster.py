"""`laxity up`, `down`, `status` and `submit` as people use them: real processes, from start to end."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.records import BrokerRecord, LeaderRecord, NodeRecord, Paths, decode
from cluster.store import open_store, sqlite_url

COMMAND = [sys.executable, "-P", "-m", "cli.main"]


class Shell:
    """Runs `laxity` with a run directory of its own."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self.environment = os.environ | {"XDG_RUNTIME_DIR": str(runtime)}

    def __call__(self, *arguments: str, send: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments], env=self.environment, input=send or "", capture_output=True, text=True
        )

    def status(self, *arguments: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self("status", "--json", *arguments).stdout)
        return result

    def pids(self, *arguments: str) -> list[int]:
        seen = self.status(*arguments)
        return [process["pid"] for process in seen["shards"] + seen["agents"]]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    for name in ("local", "other"):
        made("down", "--cluster", name)


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_gone(pids: list[int]) -> None:
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with os.fdopen(descriptor) as ended:
            assert select.select([ended], [], [], 30)[0], f"process {pid} goes on"


def submit(shell: Shell, pipeline: str, *arguments: str, send: str | None = None) -> subprocess.CompletedProcess[str]:
    """The answer to a request; it is sent again where it was late: while other tests run, the machine may take longer
    than the objective of a shipped pipeline."""
    for _ in range(4):
        answer = shell("submit", pipeline, *arguments, send=send)
        if not re.search("dropped|expired", answer.stderr + answer.stdout):
            break
    return answer


def test_a_detached_cluster_from_start_to_end(shell: Shell, tmp_path: Path) -> None:
    up = shell("up", "echo", "lv", "--gpus", "8", "--agents", "2", "--detach")
    assert up.returncode == 0, up.stderr
    assert "laxity submit echo --text hello" in up.stdout
    assert "laxity down" in up.stdout
    seen = shell.status()
    assert [pipeline["name"] for pipeline in seen["pipelines"]] == ["echo", "lv"]
    assert len(seen["shards"]) == 1
    devices = [device for agent in seen["agents"] for device in agent["devices"]]
    assert len(seen["agents"]) == 2
    assert len(devices) == 8
    assert {state for device in devices for state in device["models"].values()} == {"ready"}
    address = seen["shards"][0]["frontend"]
    assert address in up.stdout
    assert "person_detection" in shell("status").stdout

    # One text, and what comes back.
    answer = submit(shell, "echo", "--text", "grüße")
    assert (answer.returncode, answer.stdout) == (0, "grüße\n")
    # Several files at once, bytes as base64.
    (tmp_path / "a").write_bytes(b"\xff\x00a")
    (tmp_path / "b").write_bytes(b"bb")
    files = submit(shell, "echo", str(tmp_path / "a"), str(tmp_path / "b"), "--json", "--shard", address)
    assert files.returncode == 0, files.stderr
    first, second = (json.loads(line) for line in files.stdout.splitlines())
    assert first["file"] == str(tmp_path / "a")
    assert first["outcome"] == second["outcome"] == "ok"
    assert base64.b64decode(first["output"]) == b"\xff\x00a"
    assert base64.b64decode(second["output"]) == b"bb"
    assert 0 < first["remaining_s"] < 1
    assert [timing["stage"] for timing in first["timings"]] == ["echo"]
    # Standard input, and the stages' times.
    piped = submit(shell, "lv", "-", "--timings", send="from a pipe")
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.startswith("from a pipe\n")
    assert "pose_recognition" in piped.stdout
    # One field of several.
    fields = ("--field", "text=@", "--field", "labels:=[1, null]", "--field", "note=a=b")
    several = submit(shell, "echo", "--text", "x", *fields, "--json")
    assert json.loads(several.stdout)["output"] == {"text": "x", "labels": [1, None], "note": "a=b"}
    # One that is not served, and one that cannot be in time.
    unknown = shell("submit", "nope", "--text", "x")
    assert unknown.returncode == 1
    assert "unknown pipeline 'nope'" in unknown.stderr
    late = shell("submit", "lv", "--text", "x", "--slo", "20ms", "--json")
    assert late.returncode == 1
    assert json.loads(late.stdout)["outcome"] in ("dropped", "expired")
    long = shell("submit", "lv", "--text", "x", "--slo", "100s")
    assert long.returncode == 1
    assert "an SLO of 100 s is longer than the pipeline's" in long.stderr

    again = shell("up", "echo")
    assert again.returncode == 1
    assert "already up" in again.stderr
    assert "laxity down --cluster local" in again.stderr
    pids = shell.pids()
    assert shell("down").returncode == 0
    assert all(gone(pid) for pid in pids)
    for command in (["status"], ["submit", "echo", "--text", "x"], ["down"]):
        nothing = shell(*command)
        assert nothing.returncode == 1
        assert "no cluster 'local' is running here" in nothing.stderr
        assert ("start it with `laxity up ocr`" in nothing.stderr) == (command != ["down"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_foreground_cluster_ends_everything_on_a_signal(shell: Shell, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*COMMAND, "up", "echo", "--cluster", "other"],
        env=shell.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "Press Ctrl-C" not in process.stdout.readline():
        assert process.poll() is None
    pids = shell.pids("--cluster", "other")
    assert len(pids) == 2
    # What runs under another name is named where it is looked for.
    assert "running are: other" in shell("status").stderr
    process.send_signal(number)
    process.communicate()
    assert process.returncode == 0
    assert all(gone(pid) for pid in pids)
    assert not (shell.runtime / "laxity" / "other" / "store.db").exists()


def test_a_signal_while_starting_ends_everything(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "class Model:\n"
        "    def __init__(self):\n"
        "        open(os.path.dirname(__file__) + '/pid', 'w').write(str(os.getpid()))\n"
        "        time.sleep(3600)\n"
        "    def __call__(self, items): return items\n"
    )
    spec = pipeline_file(tmp_path, "slow:Model")
    process = subprocess.Popen([*COMMAND, "up", str(spec)], env=shell.environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "loading" not in process.stderr.readline():
        assert process.poll() is None
    pids = shell.pids()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "interrupted while starting" in errors
    assert all(gone(pid) for pid in pids)
    if (tmp_path / "pid").exists():
        wait_gone([int((tmp_path / "pid").read_text())])


def pipeline_file(directory: Path, model: str) -> Path:
    file = directory / "mine.yaml"
    stage = f"{{executor: python, model: '{model}', inputs: [request]}}"
    file.write_text(f"name: mine\nslo: 5s\nstages:\n  only: {stage}\noutput: only\n")
    return file


def test_a_model_that_cannot_be_loaded_ends_the_cluster(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "def model():\n    raise RuntimeError('the weights are gone')\nMODEL = model()\n"
    )
    spec = pipeline_file(tmp_path, "broken:MODEL")
    for detach in ([], ["--detach"]):
        up = shell("up", str(spec), *detach)
        assert up.returncode == 1, up.stdout
        assert "/only could not be loaded" in up.stderr
        assert "the weights are gone" in up.stderr
        assert shell("status").returncode == 1


def test_the_pipeline_in_the_readme_works(shell: Shell, tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (yaml,) = re.findall(r"```yaml\n(name: mine\n.*?)```", readme, re.DOTALL)
    (code,) = re.findall(r"```python\n(def split.*?)```", readme, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(yaml)
    (tmp_path / "mycode.py").write_text(code)
    assert shell("pipeline", "validate", str(tmp_path / "mine.yaml")).returncode == 0
    up = shell("up", str(tmp_path / "mine.yaml"), "-d")
    assert up.returncode == 0, up.stderr
    answer = submit(shell, "mine", "--text", "as you like", "--json")
    assert answer.returncode == 0, answer.stdout
    assert json.loads(answer.stdout)["output"] == {"words": ["as", "you", "like"], "scores": [2, 3, 4]}


def test_what_dies_is_started_again_where_it_was(shell: Shell) -> None:
    assert shell("up", "echo", "-d").returncode == 0
    before = shell.status()
    store = open_store(before["store"])
    paths = Paths("local")
    shard, agent = before["shards"][0], before["agents"][0]
    watch = store.watch(paths.root, store.list(paths.root).revision + 1)
    os.kill(shard["pid"], signal.SIGKILL)
    os.kill(agent["pid"], signal.SIGKILL)
    found: dict[str, Any] = {}
    while len(found) < 2:
        for event in watch.get(timeout=60):
            if event.entry is None:
                continue
            if event.key.startswith(paths.brokers):
                found["shard"] = decode(BrokerRecord, event.key, event.entry.value)
            elif event.key.startswith(paths.nodes):
                record = decode(NodeRecord, event.key, event.entry.value)
                if record.pid != agent["pid"] and any("ready" in d.models.values() for d in record.devices):
                    found["agent"] = record
    watch.close()
    store.close()
    assert found["shard"].pid != shard["pid"]
    assert (found["shard"].frontend, found["shard"].backend) == (shard["frontend"], shard["backend"])
    assert submit(shell, "echo", "--text", "still there").stdout == "still there\n"
    log = (shell.runtime / "laxity" / "local" / "logs" / "up.log").read_text()
    assert "shard-0 ended (signal SIGKILL); it is started again in 0.5 s" in log
    assert "agent-0 is running again" in log


def test_nothing_outlives_a_supervisor_that_is_killed(shell: Shell) -> None:
    assert shell("up", "echo", "-d").returncode == 0
    supervisor = json.loads((shell.runtime / "laxity" / "local" / "up.lock").read_text())["pid"]
    pids = shell.pids()
    os.kill(supervisor, signal.SIGKILL)
    wait_gone([supervisor, *pids])
    assert shell("status").returncode == 1
    assert "was ended by force" in shell("doctor").stdout
    # The next one begins afresh.
    assert shell("up", "lv", "-d").returncode == 0
    assert [pipeline["name"] for pipeline in shell.status()["pipelines"]] == ["lv"]


def test_a_port_in_use_is_named(shell: Shell) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        up = shell("up", "echo", "--port", str(port))
    assert up.returncode == 1
    assert f"port {port} is in use by another process; end that one, choose another port" in up.stderr
    assert shell("up", "echo", "--port", str(port), "-d").returncode == 0
    assert shell.status()["shards"][0]["frontend"] == f"tcp://127.0.0.1:{port}"


def test_a_store_elsewhere_is_kept_and_shared_by_one_cluster_a_name(shell: Shell, tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "elsewhere.db")
    assert shell("up", "echo", "-d", "--store", url).returncode == 0
    assert shell("status", "--store", url).returncode == 0
    # Another user's supervisor would have a run directory of its own, and so no lock in common.
    (tmp_path / "theirs").mkdir()
    second = Shell(tmp_path / "theirs")("up", "echo", "--store", url)
    assert second.returncode == 1
    assert "already has a running cluster 'local'" in second.stderr
    assert shell("down").returncode == 0
    nothing = shell("status", "--store", url)
    assert nothing.returncode == 1
    store = open_store(url)
    assert [entry.key for entry in store.list("/laxity/local/pipelines/").entries] == ["/laxity/local/pipelines/echo"]
    store.close()


def test_a_service_that_cannot_begin_says_why(tmp_path: Path, shell: Shell) -> None:
    url = sqlite_url(tmp_path / "store.db")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        shard = shell("broker", "run", "--store", url, "--shard", "s", "--frontend", address)
    assert shard.returncode == 1
    assert address in shard.stderr
    assert "in use" in shard.stderr
    node = shell("node", "run", "--store", "nowhere:", "--agent", "a")
    assert node.returncode == 2
    assert "unknown store" in node.stderr


# ---- with coordinators ------------------------------------------------------------------


def test_pipelines_are_applied_upgraded_and_deleted_while_a_cluster_runs(shell: Shell, tmp_path: Path) -> None:
    up = shell("up", "--coordinators", "1", "--detach")
    assert up.returncode == 0, up.stderr
    assert "coordinators: coordinator-0 leads" in up.stderr
    assert "laxity pipeline apply ocr" in up.stdout
    # The code beside the file goes to the agents with it; changed code is a new version.
    file = pipeline_file(tmp_path, "answers:model")
    versions = set()
    for answer in ("one", "two"):
        (tmp_path / "answers.py").write_text(f"def model(items):\n    return [{answer!r}] * len(items)\n")
        applied = shell("pipeline", "apply", str(file))
        assert applied.returncode == 0, applied.stderr
        assert submit(shell, "mine", "--text", "x").stdout == f"{answer}\n"
        (pipeline,) = shell.status()["pipelines"]
        assert pipeline["version"] == pipeline["served_version"]
        versions.add(pipeline["version"])
    assert len(versions) == 2
    deleted = shell("pipeline", "delete", "mine", "--yes")
    assert deleted.returncode == 0, deleted.stderr
    assert shell.status()["pipelines"] == []
    refused = shell("submit", "mine", "--text", "x")
    assert refused.returncode == 1
    assert "unknown pipeline 'mine'" in refused.stderr


@pytest.mark.skipif(shutil.which("etcd") is None, reason="there is no etcd here: install Debian's etcd-server")
def test_a_cluster_on_an_etcd_of_its_own(shell: Shell) -> None:
    up = shell("up", "lv", "--gpus", "8", "--agents", "2", "--store", "etcd", "--detach")
    assert up.returncode == 0, up.stderr
    assert "etcd: 3 members are ready" in up.stderr
    seen = shell.status()
    assert len(seen["store_health"]) == 3
    assert not any(member["trouble"] for member in seen["store_health"])
    assert [len(seen[what]) for what in ("coordinators", "shards", "agents")] == [2, 2, 2]
    assert sum(sum(node["devices"].values()) for node in seen["nodes"]) == 8
    store = ("--store", seen["store"])
    assert submit(shell, "lv", "--text", "here", *store).stdout == "here\n"

    # A member of etcd and the leader die; another coordinator leads, and all come back.
    supervisor = json.loads((shell.runtime / "laxity" / "local" / "up.lock").read_text())["pid"]
    started = children(supervisor)
    members = [pid for pid, command in started.items() if command[0].endswith("etcd")]
    assert len(members) == 3
    os.kill(members[0], signal.SIGKILL)
    leader = next(one["pid"] for one in seen["coordinators"] if one["coordinator"] == seen["leader"])
    opened = open_store(seen["store"])
    key = Paths("local").leader
    watch = opened.watch(key, opened.list(key).revision + 1)
    os.kill(leader, signal.SIGKILL)
    assert submit(shell, "lv", "--text", "still here").stdout == "still here\n"
    elected: list[int] = []
    while not elected:
        events = watch.get(timeout=60)
        assert events, "nobody else leads"
        records = [decode(LeaderRecord, event.key, event.entry.value) for event in events if event.entry is not None]
        elected = [record.pid for record in records if record.pid != leader]
    watch.close()
    opened.close()
    wait_until(lambda: not any(member["trouble"] for member in shell.status()["store_health"]), "etcd is whole again")

    drained = shell("node", "drain", "agent-1", "--why", "a test", "--wait", *store)
    assert drained.returncode == 0, drained.stderr
    nodes = {node["node"]: node for node in shell.status()["nodes"]}
    assert nodes["agent-1"]["models"] == {}
    assert sum(counts["ready"] for counts in nodes["agent-0"]["models"].values()) >= 5
    assert submit(shell, "lv", "--text", "moved").stdout == "moved\n"
    load = shell("load", "lv", "--request-rate-range", "20", "--duration", "1s", "--json", *store)
    assert json.loads(load.stdout)["steps"][0]["outcomes"]["ok"] > 0, load.stderr
    assert shell("node", "resume", "agent-1").returncode == 0

    pids = [*children(supervisor), supervisor]
    assert len(pids) == 3 + 2 + 2 + 2 + 1
    assert shell("down").returncode == 0
    wait_gone(pids)
    assert not (shell.runtime / "laxity" / "local" / "etcd").exists()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look again and again, each time with a command, until something is so."""
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends, f"{what}: not within 60 s"


def children(parent: int) -> dict[int, list[str]]:
    """The command lines of a process's children."""
    found = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return found


def test_an_etcd_that_does_not_start_is_told_with_its_log(shell: Shell, tmp_path: Path) -> None:
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "etcd").write_text("#!/bin/sh\necho no disk for the data >&2\nexit 3\n")
    (broken / "etcd").chmod(0o755)
    shell.environment["PATH"] = f"{broken}:{shell.environment['PATH']}"
    up = shell("up", "lv", "--gpus", "5", "--store", "etcd", "--etcd-members", "1")
    assert up.returncode == 1
    assert "etcd0 ended (exit status 3):\nno disk for the data\nIts log: " in up.stderr
    assert str(shell.runtime / "laxity" / "local" / "logs" / "etcd0.log") in up.stderr
    assert not (shell.runtime / "laxity" / "local" / "etcd").exists()
