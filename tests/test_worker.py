"""Real worker processes: what they are told, what they answer, and how they end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
import zmq

from laxity import node, payload
from laxity.payload import Unpacker
from laxity.protocol import Failure
from nodes import worker_protocol as wire
from nodes.worker_process import WorkerProcess
from pipelines.spec import PipelineSpec

CODE = """
import os
import signal
import sys
import time
import weakref

def double(feeds):
    return [feed * 2 for feed in feeds]

def one_short(feeds):
    return feeds[1:]

def poisoned(feeds):
    if 13 in feeds:
        raise RuntimeError("cannot bear 13")
    return feeds

def pairs(feeds):
    return [feed["left.x"] + feed["request"] for feed in feeds]

def positive(value):
    if value < 0:
        raise ValueError("negative")
    return value

def unsendable(output, kept):
    return object() if kept == 13 else output

def at_most_two(feeds):
    if len(feeds) > 2:
        raise MemoryError("no room")
    return feeds

def hang(feeds):
    time.sleep(1000)

def exits(feeds):
    sys.exit(4)

def dies(feeds):
    os._exit(4)

def dies_of_13(feeds):
    if 13 in feeds:
        os._exit(4)
    return feeds

def environment(feeds):
    names = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    return [{name: os.environ[name] for name in names}] * len(feeds)

def gate(name):
    # Tells the test that it is here, and waits for it.
    here = os.path.join(os.path.dirname(__file__), name)
    with open(here + ".inside", "w") as fifo:
        fifo.write("here")
    with open(here + ".go") as fifo:
        fifo.read()

def gate_before(value):
    if value == "before":
        gate("before")
    return value

def gate_model(feeds):
    if "model" in feeds:
        gate("model")
    return feeds

def gate_after(output, kept):
    if kept == "after":
        gate("after")
    return output

def gate_sample():
    gate("sample")
    return "sampled"

def brief(feeds):
    time.sleep(0.0005)
    if "model" in feeds:
        raise RuntimeError("cannot bear it")
    return feeds

def brief_before(value):
    if value == "before":
        raise ValueError("bad")
    return value

def brief_after(output, kept):
    time.sleep(0.0003)
    if kept == "after":
        raise ValueError("bad")
    return output

def greedy(feeds):
    raise MemoryError("no room")

def greedy_numpy(feeds):
    import numpy
    return numpy.zeros(1 << 56)

def greedy_torch(feeds):
    import torch
    return torch.zeros(1 << 60)

class Paged:
    memory_mb = 7.5

    def __init__(self, fails=""):
        self.fails = fails
        self.loads = 0
        self.here = False

    def load(self):
        self.loads += 1
        self.here = True
        if self.fails and self.loads == 3:
            raise MemoryError(self.fails)

    def unload(self):
        self.here = False

    def __call__(self, feeds):
        return [[self.loads, self.here]] * len(feeds)

class Buffer:
    # Answers in its own memory, which it uses anew.
    def __init__(self, wraps):
        import numpy
        self.out = numpy.zeros(4)
        self.one = [self.out]
        self.wraps = wraps

    def __call__(self, feeds):
        self.out[:] = len(feeds[0])
        if feeds == ["model+"]:
            gate("model")
        if self.wraps == "rows":
            return self.out[:1, None]
        return self.one if self.wraps == "kept" else [{"a": (self.out, self.one)}]

def torch_buffer():
    import torch

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("out", torch.zeros(4, 2))

        def forward(self, x):
            self.out[:] = x
            if x[0, 0] == 6:
                gate("model")
            return {"out": self.out[:1]}

    return Module()

def late(output, kept):
    if kept[0] in ("a", 5):
        gate("after")
    return repr(output)

class Captures:
    # Once a batch has run, loading does more than before.
    def __init__(self):
        self.ran = False

    def load(self):
        if self.ran:
            time.sleep(0.1)

    def unload(self):
        pass

    def __call__(self, feeds):
        self.ran = True
        return feeds

class Knot:
    # Refers to itself, pages itself, and cannot run.
    made = []

    def __init__(self):
        self.call = self.__call__
        self.made.append(weakref.ref(self))

    def load(self):
        pass

    def unload(self):
        pass

    def __call__(self, feeds):
        raise RuntimeError("cannot run")

def knots(feeds):
    return [[knot() is not None for knot in Knot.made]] * len(feeds)

def sample():
    return 21

def bad_sample():
    return -1
"""
NEVER = 1e18
M = TypeVar("M")


class Agent:
    """One worker and the waiting for what it says."""

    def __init__(self, process: WorkerProcess, root: Path) -> None:
        self.process = process
        self.root = root
        self.said: list[tuple[wire.FromWorker, list[Any]]] = []
        self.progress: list[str] = []
        self.executing: dict[int, float] = {}
        """When each batch began to execute."""
        self.expect(wire.Started)

    def expect(self, kind: type[M]) -> tuple[M, list[Any]]:
        """The next message that is no Progress and no Executing, which must be a ``kind``; with its frames."""
        while True:
            while self.said:
                message, frames = self.said.pop(0)
                if isinstance(message, wire.Progress):
                    self.progress.append(message.text)
                    continue
                if isinstance(message, wire.Executing):
                    self.executing[message.batch] = message.at
                    continue
                assert isinstance(message, kind), message
                return message, frames
            poller = zmq.Poller()
            poller.register(self.process.socket, zmq.POLLIN)
            poller.register(self.process.sentinel, zmq.POLLIN)
            assert dict(poller.poll(60_000)), "the worker says nothing"
            self.said += self.process.recv()
            assert self.said or self.process.alive(), self.process.exit_description()

    def hold(self, known: Sequence[tuple[int, float]] = (), key: str = "k", **stage: Any) -> None:
        stage = {"executor": "python", **stage}
        spec = {"name": "p", "slo": 1.0, "stages": {"s": stage}, "output": "s", "root": str(self.root)}
        self.process.send_hold(key, msgspec.convert(spec, PipelineSpec), "s", "cpu", known)

    def held(self, known: Sequence[tuple[int, float]] = (), key: str = "k", **stage: Any) -> wire.Held:
        self.hold(known, key, **stage)
        return self.expect(wire.Held)[0]

    def load(self, key: str = "k", earliest: float = 0.0, latest: float = NEVER) -> wire.Acted:
        self.process.send_load(1, key, earliest, latest)
        return self.acted(1)

    def unload(self, key: str = "k", earliest: float = 0.0, latest: float = NEVER) -> wire.Acted:
        self.process.send_unload(2, key, earliest, latest)
        return self.acted(2)

    def acted(self, action: int) -> wire.Acted:
        acted, _ = self.expect(wire.Acted)
        assert acted.action == action
        return acted

    def send(self, *tasks: Any, batch: int = 1, key: str = "k", earliest: float = 0.0, latest: float = NEVER) -> None:
        """Each task a value, or a tuple of values for a stage of several inputs."""
        inputs = [[payload.encode(value) for value in (task if isinstance(task, tuple) else (task,))] for task in tasks]
        nodes = [[each.node for each in task] for task in inputs]
        frames = payload.pack(each for task in inputs for each in task)
        self.process.send_infer(batch, key, earliest, latest, nodes, frames)

    def finished(self, batch: int) -> wire.Finished:
        finished, _ = self.expect(wire.Finished)
        assert finished.batch == batch
        return finished

    def answer(self, batch: int) -> Any:
        """The answer of a batch of one."""
        finished, frames = self.expect(wire.Finished)
        assert (finished.batch, finished.code, finished.failures) == (batch, "ok", [])
        return payload.decode(Unpacker(frames).take(finished.results[0]))

    def infer(self, *tasks: Any, key: str = "k") -> tuple[wire.Finished, list[Any]]:
        """How the batch ended, and the answers decoded."""
        self.send(*tasks, key=key)
        finished, frames = self.expect(wire.Finished)
        unpacker = Unpacker(frames)
        answers = [payload.decode(unpacker.take(node)) for node in finished.results]
        unpacker.finish()
        return finished, answers


class Gates:
    """Where the stage's code waits for the test: see ``gate`` in CODE."""

    def __init__(self, root: Path) -> None:
        self._root = root
        for name in ("before", "model", "after", "sample"):
            os.mkfifo(root / f"{name}.inside")
            os.mkfifo(root / f"{name}.go")

    def entered(self, name: str) -> None:
        """Wait until it waits there."""
        assert (self._root / f"{name}.inside").read_text() == "here"

    def open(self, name: str) -> None:
        (self._root / f"{name}.go").write_text("")


@pytest.fixture
def gates(tmp_path: Path) -> Gates:
    return Gates(tmp_path)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    (tmp_path / "code.py").write_text(CODE)
    with zmq.Context() as context:
        process = WorkerProcess(context, "cpu", threads=1)
        try:
            yield Agent(process, tmp_path)
        finally:
            process.stop()
            process.close(timeout=5)


def test_a_batch_goes_through_with_its_arrays(agent: Agent) -> None:
    agent.held(model="code:double")
    big = np.arange(100_000, dtype=np.float32)
    finished, answers = agent.infer(big, np.ones(2), "ab")
    assert (finished.batch, finished.code, finished.failures) == (1, "ok", [])
    assert finished.execution_us > 0
    np.testing.assert_array_equal(answers[0], big * 2)
    assert answers[1].tolist() == [2, 2]
    assert answers[2] == "abab"


def test_several_inputs_come_as_a_dict_by_name(agent: Agent) -> None:
    agent.held(model="code:pairs", inputs=["left.x", "request"])
    assert agent.infer((1, 2), ("a", "b"))[1] == [3, "ab"]
    agent.send((1,))
    finished, _ = agent.expect(wire.Finished)
    assert finished.code == "bad_input"
    assert "1 inputs for a stage with 2" in finished.detail


def test_profiling_runs_the_sample_at_each_size(agent: Agent) -> None:
    held = agent.held(model="code:double", sample="code:sample", max_batch=6)
    assert [size for size, _ in held.profile] == [1, 2, 4, 6]
    assert all(seconds > 0 for _, seconds in held.profile)
    assert held.seconds > 0
    assert agent.progress == ["loading", *(f"profiling batch {size}" for size in (1, 2, 4, 6))]


def test_without_a_sample_the_profile_is_the_stated_one(agent: Agent) -> None:
    assert agent.held(model="code:double").profile == []
    held = agent.held(model="code:double", max_batch=2, profile={"alpha_ms": 10, "beta_ms": 5})
    assert held.profile == [(1, 0.015), (2, 0.025)]


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"model": "code:nothing"}, "has no 'nothing'"),
        ({"model": "missing:thing"}, "no module 'missing'"),
        ({"executor": "onnx", "model": "missing.onnx"}, "missing.onnx"),
        ({"model": "code:double", "options": {"x": 1}}, "loading k: TypeError: options are given to classes"),
        (
            {"model": "code:double", "before": "code:positive", "sample": "code:bad_sample"},
            "the sample of code:bad_sample fails: before code:positive: ValueError: negative",
        ),
        (
            {"model": "code:at_most_two", "sample": "code:sample"},
            "a batch of 4 of code:sample's samples (max_batch is 32) failed with MemoryError: no room",
        ),
    ],
)
def test_what_cannot_be_loaded_says_why_and_the_worker_goes_on(agent: Agent, stage: dict[str, Any], says: str) -> None:
    agent.hold(**stage)
    failed, _ = agent.expect(wire.LoadFailed)
    assert failed.key == "k"
    assert says in failed.detail
    assert agent.infer(1)[0].code == "unknown_model"
    agent.held(model="code:double")
    assert agent.infer(1)[1] == [2]


def test_an_element_s_own_error_fails_it_alone(agent: Agent) -> None:
    agent.held(model="code:double", before="code:positive", after="code:unsendable")
    finished, answers = agent.infer(1, -1, 13, 2)
    assert finished.code == "ok"
    assert answers == [2, None, None, 4]
    assert [failure.index for failure in finished.failures] == [1, 2]
    assert "ValueError: negative" in finished.failures[0].detail
    assert "the stage's answer cannot be sent: cannot send a builtins.object" in finished.failures[1].detail


def test_an_input_that_is_no_value_fails_alone(agent: Agent) -> None:
    agent.held(model="code:double")
    nodes = [[node.TextNode(2)], [3]]
    agent.process.send_infer(5, "k", 0.0, NEVER, nodes, [b"\xff\xfe"])
    finished, _ = agent.expect(wire.Finished)
    assert (finished.code, finished.results) == ("ok", [None, 6])
    assert finished.failures == [Failure(0, finished.failures[0].detail)]
    assert "not UTF-8" in finished.failures[0].detail


def test_frames_that_do_not_hold_the_parts_fail_the_batch(agent: Agent) -> None:
    agent.held(model="code:double")
    agent.process.send_infer(5, "k", 0.0, NEVER, [[node.BytesNode(9)]], [b"short"])
    finished, _ = agent.expect(wire.Finished)
    assert finished.code == "bad_input"
    assert "PayloadError" in finished.detail
    assert agent.infer(1)[1] == [2]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("code:poisoned", "model of k: RuntimeError: cannot bear 13 (code.py, line"),
        ("code:one_short", "returned 1 outputs for a batch of 2"),
        ("code:exits", "SystemExit: 4"),
    ],
)
def test_a_model_that_raises_fails_its_batch_and_not_the_worker(agent: Agent, model: str, says: str) -> None:
    agent.held(model=model)
    finished, answers = agent.infer(13, 1)
    assert (finished.code, answers, finished.failures) == ("model_error", [], [])
    assert says in finished.detail
    agent.held(model="code:double")
    assert agent.infer(1)[1] == [2]


def test_a_released_model_is_unknown(agent: Agent) -> None:
    agent.held(model="code:double")
    agent.process.send_release("k")
    finished, _ = agent.infer(1)
    assert (finished.code, finished.detail) == ("unknown_model", "k is not loaded in this worker")


def test_three_batches_are_under_way_in_three_lanes(agent: Agent, gates: Gates) -> None:
    agent.held(model="code:gate_model", before="code:gate_before", after="code:gate_after")
    agent.send("after", batch=1)
    gates.entered("after")
    agent.send("model", batch=2)
    gates.entered("model")
    agent.send("before", batch=3)
    gates.entered("before")
    agent.send("too many", batch=4)
    assert agent.finished(4).code == "busy"
    gates.open("before")
    gates.open("model")
    gates.open("after")
    ended = [agent.finished(batch) for batch in (1, 2, 3)]
    assert [each.code for each in ended] == ["ok"] * 3
    assert agent.executing[2] + ended[1].execution_us * 1e-6 <= agent.executing[3] + 1e-6
    assert ended[0].output_us > ended[0].execution_us
    assert ended[2].input_us > 0
    assert agent.infer("next")[1] == ["next"]


@pytest.mark.parametrize(
    ("model", "first", "second"),
    [
        *(
            ({"model": "code:Buffer", "options": {"wraps": wraps}}, "after", "model+")
            for wraps in ("rows", "kept", "deep")
        ),
        ({"executor": "torch", "model": "code:torch_buffer"}, np.full(2, 5.0), np.full(2, 6.0)),
    ],
    ids=["rows", "kept", "deep", "torch"],
)
def test_a_model_may_answer_in_memory_that_it_uses_anew(
    agent: Agent, gates: Gates, model: dict[str, Any], first: Any, second: Any
) -> None:
    if "executor" in model:
        pytest.importorskip("torch", reason="torch is not installed: pip install 'laxity[torch]'")
    agent.held(after="code:late", **model)
    agent.send(first, batch=1)
    gates.entered("after")
    agent.send(second, batch=2)
    gates.entered("model")
    gates.open("after")
    answers = [agent.answer(1)]
    gates.open("model")
    answers.append(agent.answer(2))
    assert ["5." in answers[0], "6." in answers[0]] == [True, False]
    assert ["5." in answers[1], "6." in answers[1]] == [False, True]


def test_nothing_begins_outside_its_window(agent: Agent, gates: Gates) -> None:
    agent.held(model="code:gate_model")
    now = time.monotonic()
    agent.send(1, batch=1, latest=now - 0.001)
    assert agent.finished(1).code == "too_late"
    agent.send(1, batch=2, earliest=now + 0.1)
    assert agent.finished(2).code == "ok"
    assert agent.executing.keys() == {2}
    assert agent.executing[2] >= now + 0.1
    # One that has to wait is told as soon as its window closes, not when the device comes free.
    agent.send("model", batch=3)
    gates.entered("model")
    agent.send(1, batch=4, latest=time.monotonic() + 0.02)
    assert agent.finished(4).code == "too_late"
    assert agent.unload(latest=now).code == "too_late"
    gates.open("model")
    assert agent.finished(3).code == "ok"
    assert agent.load(latest=now).code == "too_late"
    assert agent.infer(1)[1] == [1]


def test_a_batch_is_taken_back_unless_it_executes(agent: Agent, gates: Gates) -> None:
    agent.held(model="code:gate_model", before="code:gate_before")
    agent.send("model", batch=1)
    gates.entered("model")
    agent.send("before", batch=2)
    gates.entered("before")
    for batch in (1, 2, 77):
        agent.process.send_drop(batch)
    cancelled = agent.finished(2)
    assert (cancelled.code, cancelled.copying) == ("cancelled", True)
    gates.open("before")
    assert agent.expect(wire.CopiedIn)[0].batch == 2, "what it left behind is out of the way"
    gates.open("model")
    assert agent.finished(1).code == "ok"
    assert agent.infer("next")[1] == ["next"]
    assert 2 not in agent.executing


def test_a_model_is_paged_out_and_in(agent: Agent) -> None:
    held = agent.held(model="code:Paged")
    assert held.memory_mb == 7.5
    assert held.load_seconds >= 0
    assert agent.infer(0)[1] == [[2, True]]
    assert agent.unload().code == "ok"
    refused, _ = agent.infer(0)
    assert (refused.code, refused.detail) == ("not_loaded", "k is in host memory alone")
    assert agent.unload().code == "ok"
    loaded = agent.load()
    assert loaded.code == "ok"
    assert loaded.took_us >= 0
    assert agent.load().code == "ok"
    assert agent.infer(0)[1] == [[3, True]]
    agent.process.send_release("k")
    assert agent.load().code == "unknown_model"
    assert agent.unload().code == "unknown_model"
    assert agent.infer(0)[0].code == "unknown_model"


def test_the_measured_load_is_that_of_a_model_that_has_run(agent: Agent) -> None:
    for known in ([], [(1, 0.001)]):
        assert agent.held(known, model="code:Captures", sample="code:sample").load_seconds >= 0.1


def test_models_that_could_not_be_held_leave_nothing(agent: Agent) -> None:
    for _ in range(2):
        agent.hold(model="code:Knot", sample="code:sample")
        assert "cannot run" in agent.expect(wire.LoadFailed)[0].detail
    agent.held(model="code:knots")
    assert agent.infer(0)[1] == [[False, False]]


def test_a_load_that_fails_leaves_the_model_in_host_memory(agent: Agent) -> None:
    agent.held(model="code:Paged", options={"fails": "device is full"})
    agent.unload()
    failed = agent.load()
    assert failed.code == "out_of_memory"
    assert "paging k: MemoryError: device is full" in failed.detail
    assert agent.infer(0)[0].code == "not_loaded"
    assert agent.load().code == "ok"
    assert agent.infer(0)[1] == [[4, True]]


def test_a_model_in_use_is_not_paged_out(gates: Gates, agent: Agent) -> None:
    agent.held(model="code:gate_model", after="code:gate_after")
    agent.send("after", batch=1)
    gates.entered("after")
    assert agent.unload().code == "busy"
    agent.process.send_release("k")
    gates.open("after")
    assert agent.finished(1).code == "ok"
    assert agent.infer(1)[0].code == "unknown_model"


@pytest.mark.parametrize("model", ["code:greedy", "code:greedy_numpy", "code:greedy_torch"])
def test_too_little_memory_is_told_apart(agent: Agent, model: str) -> None:
    if model.endswith("torch"):
        pytest.importorskip("torch", reason="torch is not installed: pip install 'laxity[torch]'")
    agent.held(model=model)
    finished, _ = agent.infer(1)
    assert finished.code == "out_of_memory"
    assert finished.detail.startswith("model of k: ")
    agent.hold(model=model, sample="code:sample")
    assert agent.expect(wire.LoadFailed)[0].code == "out_of_memory"


def test_a_known_profile_is_not_measured_again(agent: Agent) -> None:
    known = [(1, 0.001), (2, 0.002), (4, 0.9)]
    assert agent.held(known, model="code:double", sample="code:sample", max_batch=4).profile == known
    assert agent.progress == ["loading", "warming up batch 1", "warming up batch 2"]
    agent.hold(known, model="code:double", before="code:positive", sample="code:bad_sample")
    failed, _ = agent.expect(wire.LoadFailed)
    assert "the sample of code:bad_sample fails" in failed.detail


def test_models_come_and_go_in_order_and_no_batch_beside_them(agent: Agent, gates: Gates) -> None:
    agent.held(model="code:gate_model", key="serving")
    agent.send("model", batch=1, key="serving")
    gates.entered("model")
    agent.hold(model="code:double", sample="code:sample", max_batch=1)
    agent.process.send_release("k")
    agent.hold(model="code:gate_model", sample="code:gate_sample", max_batch=1)
    agent.send(0, batch=2, key="serving")
    assert agent.finished(2).code == "busy"
    gates.open("model")
    assert agent.finished(1).code == "ok"
    assert [size for size, _ in agent.expect(wire.Held)[0].profile] == [1]
    gates.entered("sample")
    agent.send(0, batch=3, key="serving")
    assert agent.finished(3).code == "busy"
    gates.open("sample")
    assert agent.expect(wire.Held)[0].key == "k"
    assert agent.infer("x")[1] == ["x"]
    assert agent.infer("y", key="serving")[1] == ["y"]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_asked_each_batch_and_each_action_ends_once(agent: Agent, seed: int) -> None:
    randomly = random.Random(seed)
    for key in ("a", "b"):
        agent.held(key=key, model="code:brief", before="code:brief_before", after="code:brief_after")
    due: Counter[tuple[str, int]] = Counter()
    ended: Counter[tuple[str, int]] = Counter()
    codes: Counter[str] = Counter()
    closes: dict[int, float] = {}

    def take(message: wire.FromWorker) -> None:
        if isinstance(message, wire.Finished):
            ended["batch", message.batch] += 1
            codes[message.code] += 1
        elif isinstance(message, wire.Acted):
            ended["action", message.action] += 1
            codes[message.code] += 1
            assert message.at <= closes[message.action]
        elif isinstance(message, (wire.Held, wire.LoadFailed)):
            ended["hold", 0] += 1
        elif isinstance(message, wire.Executing):
            assert message.at <= closes[message.batch]

    for number in range(400):
        key = randomly.choice("ab")
        earliest = time.monotonic() + randomly.choice([-1, 0, 0.0005])
        closes[number] = earliest + randomly.choice([0.0001, 0.002, 1])
        kind = randomly.choices(["infer", "drop", "load", "unload", "hold", "release"], [20, 3, 3, 2, 0.5, 0.5])[0]
        if kind == "infer":
            due["batch", number] += 1
            value = randomly.choice([1, 1, 1, "before", "model", "after"])
            agent.send(value, value, batch=number, key=key, earliest=earliest, latest=closes[number])
        elif kind == "drop":
            agent.process.send_drop(number - randomly.randint(1, 3))
        elif kind == "load":
            due["action", number] += 1
            agent.process.send_load(number, key, earliest, closes[number])
        elif kind == "unload":
            due["action", number] += 1
            agent.process.send_unload(number, key, earliest, closes[number])
        else:
            if kind == "release":
                agent.process.send_release(key)
            due["hold", 0] += 1
            agent.hold(key=key, model="code:brief", before="code:brief_before", after="code:brief_after")
        if randomly.random() < 0.7:
            agent.process.socket.poll(2)
        for message, _ in agent.process.recv():
            take(message)
    while ended.total() < due.total():
        assert agent.process.socket.poll(30_000), f"{due - ended} did not end"
        for message, _ in agent.process.recv():
            take(message)
    assert ended == due
    assert codes["ok"], codes
    assert agent.process.alive()


def test_a_worker_that_cannot_go_on_ends(agent: Agent) -> None:
    agent.process.socket.send(b"no message")
    await_end(agent.process)
    assert agent.process.exit_description() == "exited with status 70"


def test_a_lane_that_fails_takes_the_worker_with_it() -> None:
    program = """
from nodes.worker_lanes import Job, LaneThread
lane = LaneThread("execute")
lane.put(Job(lambda: 1 // 0))
lane.call(lambda: None)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 70
    assert "the thread for execute failed" in ended.stderr
    assert "ZeroDivisionError" in ended.stderr


def test_it_ends_when_told_to(agent: Agent) -> None:
    agent.process.stop()
    await_end(agent.process)
    assert agent.process.exit_description() == "exited with status 0"
    agent.process.send_release("k")


def test_a_hanging_model_is_killed(agent: Agent) -> None:
    agent.held(model="code:hang")
    agent.send(1)
    assert agent.process.alive()
    assert agent.process.exit_description() == ""
    agent.process.kill()
    await_end(agent.process)
    assert agent.process.exit_description() == "killed by signal 9 (SIGKILL)"
    assert not any(isinstance(message, wire.Finished) for message, _ in agent.process.recv())


def test_a_worker_that_dies_under_a_batch_wakes_its_owner(agent: Agent) -> None:
    agent.held(model="code:dies")
    agent.send(1)
    await_end(agent.process)
    assert agent.process.exit_description() == "exited with status 4"
    assert agent.process.suspects() == [1]


def test_a_batch_whose_answers_are_fetched_is_not_suspected_of_another_s_crime(agent: Agent, gates: Gates) -> None:
    agent.held(model="code:dies_of_13", before="code:gate_before", after="code:gate_after")
    assert agent.process.suspects() == []
    agent.send("after", batch=5)
    gates.entered("after")
    assert agent.process.suspects() == [5]
    agent.send("before", batch=6)
    gates.entered("before")
    assert agent.process.suspects() == [6, 5]
    gates.open("before")
    agent.send(13, batch=7)
    await_end(agent.process)
    assert agent.process.suspects() == [7]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_whole_groups_is_left_to_the_agent(agent: Agent, number: signal.Signals) -> None:
    os.kill(agent.process.pid, number)
    agent.held(model="code:double")
    assert agent.infer(1)[1] == [2]


def test_nothing_is_sent_before_the_worker_is_there() -> None:
    with zmq.Context() as context:
        process = WorkerProcess(context, "cpu", threads=1)
        try:
            with pytest.raises(RuntimeError, match="wait for its Started"):
                process.send_release("k")
        finally:
            process.kill()
            process.close(timeout=5)


def test_the_environment_says_which_device_and_how_many_threads(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE)
    with zmq.Context() as context:
        process = WorkerProcess(context, "cuda:3", threads=2)
        try:
            agent = Agent(process, tmp_path)
            agent.held(model="code:environment")
            expected = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "2"}
            assert agent.infer(1)[1] == [expected]
        finally:
            process.kill()
            process.close(timeout=5)


def test_the_worker_dies_with_its_agent(tmp_path: Path) -> None:
    program = """
import sys, zmq
from nodes.worker_process import WorkerProcess
process = WorkerProcess(zmq.Context(), "cpu", threads=1)
process.socket.poll(60_000)
process.recv()
assert process.started
print(process.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as agent:
        assert agent.stdout is not None
        worker = os.pidfd_open(int(agent.stdout.readline()))
        agent.kill()
        poller = zmq.Poller()
        poller.register(worker, zmq.POLLIN)
        assert poller.poll(30_000), "the worker outlives its agent"
        os.close(worker)


def await_end(process: WorkerProcess) -> None:
    poller = zmq.Poller()
    poller.register(process.sentinel, zmq.POLLIN)
    assert poller.poll(30_000), "the process does not end"
