"""The command line short of a cluster: help, wrong use, doctor, and how answers are shown."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from cli.main import COMMANDS, main
from cli.render import as_json, as_text, text_lines
from cli.restarts import FIRST, LONGEST, SETTLED, Restarts
from cli.rundir import AlreadyRunning, RunDirectory
from cli.submit import _print
from cluster.records import RecordError
from laxity import Outcome, Reply
from nodes.device import DeviceConfig
from nodes.discovery import NoSuchDevices, parse_devices, visible_devices


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def invoke(*arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(main, arguments, input=input)

    return invoke


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found += commands(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


@pytest.mark.parametrize("command", commands(main))
def test_every_command_explains_itself_with_an_example(run: Any, command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"laxity {' '.join(command)}" in result.output


def test_the_list_of_commands_needs_none_of_them() -> None:
    script = (
        "import sys\n"
        "from cli.main import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "loaded = [name for name in sys.modules if name.split('.')[0] in ('zmq', 'numpy', 'rich', 'broker', 'nodes')]\n"
        "assert not loaded, loaded\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for name, (_, text) in COMMANDS.items():
        assert name in ended.stdout
        assert text in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["qqq"], 2, "there is no command 'qqq'; there are up, down,"),
        (["trcae"], 2, "there is no command 'trcae'; did you mean trace"),
        (["node", "drian", "gpu-1"], 2, "there is no command 'drian'; did you mean drain"),
        (["up"], 2, "name at least one pipeline"),
        (["up", "echo", "echo"], 2, "serves each name once"),
        (["up", "echo", "--split", "1,x"], 2, "no list of numbers such as 40,6,5,7,6"),
        (["up", "lv", "--split", "1,2"], 2, "the split has 2 numbers for 5 stages"),
        (["up", "ecko"], 2, "write 'echo'"),
        (["up", "echo", "--cluster", "a/b"], 2, "cannot name a cluster"),
        (["up", "echo", "--gpus", "2", "--agents", "3"], 2, "2 devices cannot be dealt out to 3 agents"),
        (["down"], 1, "no cluster 'local' is running here"),
        (["status", "--cluster", "trial"], 1, "start it with `laxity up ocr --cluster trial`"),
        (["status"], 1, "no cluster 'local' is running here"),
        (["status", "--store", "memory:"], 2, "memory: is one process's alone"),
        (["up", "echo", "--store", "memory:"], 2, "memory: is one process's alone"),
        (["up", "echo", "--store", "banana"], 2, "unknown store 'banana'; write sqlite:///path/to/store.db or etcd://"),
        (["status", "--store", "etcd://h"], 2, "is no host:port"),
        (["status", "--store", "etcd://h:2379?cert=/c"], 2, "half a key pair"),
        (["submit", "echo"], 2, "give either files"),
        (["submit", "echo", "--text", "x"], 1, "no cluster 'local' is running here"),
        (["submit", "echo", "no-such-file"], 2, "does not exist"),
        (["submit", "echo", "--text", "x", "--field", "a=1"], 2, "say which one field holds the file"),
        (["submit", "echo", "--text", "x", "--field", "a=@", "--field", "b=@"], 2, "say which one field"),
        (["submit", "echo", "--text", "x", "--field", "a=@", "--field", "a=1"], 2, "'a' is given twice"),
        (["submit", "echo", "--text", "x", "--field", "a"], 2, "NAME:=JSON"),
        (["submit", "echo", "--text", "x", "--field", "a=@", "--field", "b:=[1"], 2, "'b' is no JSON"),
        (["submit", "echo", "--text", "x", "--slo", "-1s"], 2, "write one such as 400ms, 5s, 1m or 24h"),
        (["submit", "echo", "--text", "x", "--shard", "localhost:80"], 2, "localhost:80"),
        (
            ["node", "run", "--store", "sqlite:///s", "--agent", "a", "--devices", "tpu"],
            2,
            "write cpu, cuda, or emulated:N",
        ),
        (["broker", "run", "--store", "nowhere", "--shard", "s"], 2, "write sqlite:///path/to/store.db"),
        (["broker", "run", "--store", "memory:", "--shard", "s"], 2, "memory: is one process's alone"),
        (["node", "run", "--store", "memory:", "--agent", "a"], 2, "memory: is one process's alone"),
    ],
)
def test_wrong_use_is_told_from_failure(run: Any, arguments: list[str], status: int, says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert says in " ".join(result.output.split())


def test_a_shard_that_is_not_there_leaves_the_request_unavailable(run: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "x").write_bytes(b"x")
    arguments = ["submit", "echo", "--shard", f"tcp://127.0.0.1:{port}", "--slo", "200ms", "--json"]
    result = run(*arguments, str(tmp_path / "x"), "-", input="y")
    assert result.exit_code == 1
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["outcome"] for answer in answers] == ["unavailable", "unavailable"]
    assert all(str(port) in answer["detail"] for answer in answers)
    assert "nobody listens there; trying for 4 s more" in result.stderr


def test_a_run_directory_that_cannot_be_is_told_in_a_line(run: Any, tmp_path: Path) -> None:
    (tmp_path / "laxity").write_text("a file where the run directory should be")
    command = [sys.executable, "-P", "-m", "cli.main", "up", "echo", "--detach"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"Error: cannot create {tmp_path / 'laxity' / 'local'}: ")
    assert "set XDG_RUNTIME_DIR or HOME to a directory that can be written" in line


def test_output_that_cannot_be_written_is_told_in_a_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-P", "-m", "cli.main", "doctor"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "Error: the output cannot be written: No space left on device\n"


def test_ctrl_c_is_told_from_failure(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shard = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-P", "-m", "cli.main", "submit", "echo", "--text", "x", "--shard", shard]
        # A shell's background jobs are started with SIGINT ignored, and so would be what they start.
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert process.stderr is not None
        assert "nobody listens there" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == "Interrupted.\n"
    assert process.returncode == 130


# ---- doctor ---------------------------------------------------------------------------


def test_the_doctor_finds_this_installation_in_order(run: Any) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    findings = {finding["check"]: finding for finding in json.loads(result.stdout)}
    for check in (
        "laxity",
        "zmq",
        "engines",
        "extra ocr",
        "cores",
        "open files",
        "loopback",
        "run directory",
        "clusters",
    ):
        assert findings[check]["state"] in ("ok", "note", "warning"), findings[check]
    # What is not right says what to do.
    assert all(finding["advice"] for finding in findings.values() if finding["state"] in ("warning", "error"))
    assert "loopback" in run("doctor").stdout


def test_the_doctor_says_what_keeps_laxity_from_working(run: Any, tmp_path: Path) -> None:
    (tmp_path / "laxity").write_text("a file where the run directory should be")
    result = run("doctor", "--json")
    assert result.exit_code == 1
    (bad,) = [finding for finding in json.loads(result.stdout) if finding["state"] == "error"]
    assert bad["check"] == "run directory"
    assert "XDG_RUNTIME_DIR" in bad["advice"]


# ---- the parts ---------------------------------------------------------------------------


def test_answers_become_json() -> None:
    value = {"a": np.arange(4, dtype=np.float32).reshape(2, 2), "b": [b"\xff", None, True], "c": np.int64(3)}
    assert json.loads(json.dumps(as_json(value))) == {"a": [[0.0, 1.0], [2.0, 3.0]], "b": ["/w==", None, True], "c": 3}


def test_a_picture_without_text_prints_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    _print("blank.png", Reply(Outcome.OK, {"lines": []}, 1.0, "", "", 0.0, (), "r"), several=False, timings=False)
    assert capsys.readouterr().out == ""


def test_answers_become_text() -> None:
    assert as_text("plain") == "plain"
    assert as_text("grün".encode()) == "grün"
    assert as_text(b"\xff\xfe") == "(2 bytes; see them with --json)"
    assert as_text({"x": [1]}) == '{\n  "x": [\n    1\n  ]\n}'
    assert as_text({"lines": [{"text": "one", "confidence": 0.5}, {"text": "two"}]}) == "one\ntwo"
    assert as_text(np.zeros((2, 3), np.uint8)).startswith("uint8 array of shape [2, 3]\n")
    assert text_lines({"lines": [{"text": "one", "confidence": 0.5}]}) == [("one", 0.5)]
    assert text_lines({"lines": []}) == []
    assert text_lines({"lines": ["one"]}) is None
    assert text_lines(["one"]) is None


def test_restarts_back_off_and_forgive() -> None:
    restarts = Restarts()
    now = 0.0
    delays = []
    for _ in range(10):
        restarts.started(now)
        now += 1.0
        delays.append(restarts.died(now))
        now += delays[-1]
    assert delays[:4] == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST]
    assert delays[-1] == LONGEST
    restarts.started(now)
    assert restarts.died(now + SETTLED) == FIRST
    assert restarts.count == 11


def test_a_cluster_has_one_supervisor(tmp_path: Path) -> None:
    first, second = RunDirectory("c", tmp_path), RunDirectory("c", tmp_path)
    assert first.running() is None
    first.acquire()
    running = second.running()
    assert running is not None
    assert running.store == ""
    first.note_store("sqlite:///x")
    running = second.running()
    assert running is not None
    assert running.store == "sqlite:///x"
    with pytest.raises(AlreadyRunning, match=f"process {running.pid}"):
        second.acquire()
    other = RunDirectory("d", tmp_path)
    other.acquire()
    first.release()
    assert second.running() is None
    second.acquire()
    other.release()
    second.release()
    with pytest.raises(RecordError):
        RunDirectory("../c", tmp_path)


def test_devices_are_named_or_refused() -> None:
    assert parse_devices("cpu")[0].kind == "cpu"
    assert parse_devices("cpu")[0].threads >= 1
    assert parse_devices("cpu:2048")[0].memory_mb == 2048.0
    assert len(parse_devices("emulated:3")) == 3
    a100, t4 = DeviceConfig("emulated", "A100", memory_mb=81920.0), DeviceConfig("emulated", "T4")
    assert parse_devices("emulated:2:A100:81920+emulated:1:T4") == [a100, a100, t4]
    assert [device.kind for device in parse_devices("cpu+emulated:1")] == ["cpu", "emulated"]
    wrong = ["", "gpu", "cpu:", "cpu:2G", "emulated", "emulated:0", "emulated:1025", "emulated:-1", "emulated:3x"]
    for text in [*wrong, "emulated:1:T4:x"]:
        with pytest.raises(NoSuchDevices, match="write cpu, cuda, or emulated:N"):
            parse_devices(text)
    for text in ("cpu+cpu", "cpu:1024+cpu"):
        with pytest.raises(NoSuchDevices, match="names the same devices twice"):
            parse_devices(text)
    with pytest.raises(NoSuchDevices, match="more than 1024 devices"):
        parse_devices("emulated:1024+emulated:1:T4")


def test_gpus_are_read_from_the_drivers_list() -> None:
    listed = "0, GPU-aa, 81920, NVIDIA A100-SXM4-80GB\n1, GPU-bb, [N/A], Tesla T4\n"
    first = DeviceConfig("cuda:0", "A100-SXM4-80GB", memory_mb=81920.0 - 5120.0)
    second = DeviceConfig("cuda:1", "Tesla-T4")
    assert visible_devices(listed, None) == [first, second]
    assert visible_devices(listed, "1") == [second]
    assert visible_devices(listed, "GPU-bb,0") == [second, first]
    assert visible_devices(listed, "") == []
    assert visible_devices("", None) == []
    assert visible_devices("0, GPU-cc, 8192, NVIDIA small\n", None)[0].memory_mb == 7168.0


def test_what_cannot_be_looked_at_or_listened_at_is_told(run: Any, tmp_path: Path) -> None:
    lost = run("top", "--once", "--store", f"sqlite:///{tmp_path}/nowhere/s.db")
    assert lost.exit_code == 1
    assert "nowhere does not exist" in lost.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = run("up", "lv", "--dashboard", address)
    assert refused.exit_code == 1
    assert f"cannot be served at {address} (Address already in use)" in refused.stderr
