"""Models that fail in every way, in real worker processes: who is answered what, and that nobody else is disturbed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest

from laxity import Rejected
from nodes.device import DeviceConfig
from pipelines.load import load_spec

CPU = DeviceConfig("cpu", "cpu", 1)
GATED = """
import os
import time

HERE = os.path.dirname(__file__)


def gate():
    # Tells the test that this batch runs, and waits for it.
    with open(os.path.join(HERE, "inside"), "w") as fifo:
        fifo.write(str(os.getpid()))
    with open(os.path.join(HERE, "go")) as fifo:
        fifo.read()


def model(feeds):
    if "hold" in feeds:
        gate()
    if "hold once" in feeds:
        try:
            open(os.path.join(HERE, "held"), "x").close()
        except FileExistsError:
            pass  # its answer was lost, and it runs again
        else:
            gate()
    if "die" in feeds:
        os._exit(9)
    if "raise" in feeds:
        raise RuntimeError("cannot bear it")
    if "hang" in feeds:
        time.sleep(1000)
    if "short" in feeds:
        return feeds[1:]
    return [object() if feed == "object" else feed for feed in feeds]
"""


class Gate:
    """Where a model waits for the test."""

    def __init__(self, root: Path) -> None:
        self._inside = root / "inside"
        self._go = root / "go"
        os.mkfifo(self._inside)
        os.mkfifo(self._go)

    def entered(self) -> int:
        """Wait until a batch waits there; its worker's process."""
        return int(self._inside.read_text())

    def open(self) -> None:
        """Let it go on."""
        self._go.write_text("")


class Served:
    """A cluster with the gated model on a worker process, and a bystander's pipeline on an emulated device."""

    def __init__(self, cluster, echo, spec, root):
        self.cluster = cluster
        self.spec = spec
        cluster.serve(echo)
        self.agent = cluster.serve(spec, devices=[CPU])
        self.gate = Gate(root)
        self.client = cluster.client()
        self.bystander = cluster.client()
        assert self.bystander.infer("echo", "before") == "before"

    def gather(self, values):
        """Submit requests while a batch runs, so that they share batches; their replies."""
        held = self.client.submit("user", "hold once")
        self.gate.entered()
        futures = [self.client.submit("user", value) for value in values]
        self.cluster.wait_for(lambda status: status.in_flight == 1 + len(values), "all are at the shard")
        self.gate.open()
        assert held.result(30) == "hold once"
        return [future.reply(30) for future in futures]

    def check(self, **ended):
        """Nobody else was disturbed, and the counters add up to ``ended`` beside the bystander's two requests."""
        assert self.bystander.infer("echo", "after") == "after"
        return self.cluster.settle(**{**ended, "ok": ended.get("ok", 0) + 2})


@pytest.fixture
def serve(cluster, echo, user_pipeline, tmp_path):
    def make(*stage, slo="30s", code=GATED):
        return Served(cluster, echo, user_pipeline(code, *stage, slo=slo), tmp_path / "user")

    return make


@pytest.mark.parametrize(
    ("poison", "says"),
    [("raise", "RuntimeError: cannot bear it"), ("short", "returned 0 outputs"), ("object", "cannot be sent")],
)
def test_one_poisonous_input_fails_alone(serve, poison, says):
    served = serve("max_batch: 8")
    values = [f"value {n}" for n in range(17)]
    values[11] = poison
    replies = served.gather(values)
    for value, reply in zip(values, replies, strict=True):
        if value == poison:
            assert (reply.outcome, reply.stage) == ("failed", "stage")
            assert says in reply.detail
        else:
            assert reply.unwrap() == value
    served.check(ok=17, failed=1)
    assert served.agent.states[0].worker_restarts == 0


def test_a_model_that_always_raises_fails_everybody(serve):
    served = serve("max_batch: 8")
    replies = served.gather(["raise"] * 12)
    assert {reply.outcome for reply in replies} == {"failed"}
    served.check(ok=1, failed=12)


def test_one_input_that_kills_the_worker_ends_alone(serve):
    served = serve("max_batch: 9")
    values = [f"value {n}" for n in range(9)]
    values[4] = "die"
    replies = served.gather(values)
    for value, reply in zip(values, replies, strict=True):
        if value == "die":
            assert reply.outcome == "unavailable"
            assert "2 attempts failed" in reply.detail
            assert "exited with status 9" in reply.detail
        else:
            assert reply.unwrap() == value
    served.check(ok=9, unavailable=1)
    assert served.agent.states[0].worker_restarts == 2


def test_a_worker_killed_amid_a_batch_is_started_again(serve):
    served = serve("max_batch: 4")
    held = served.client.submit("user", "hold")
    pid = served.gate.entered()
    others = [served.client.submit("user", n) for n in range(6)]
    served.cluster.wait_for(lambda status: status.in_flight == 7, "all are at the shard")
    os.kill(pid, signal.SIGKILL)
    assert served.bystander.infer("echo", "meanwhile") == "meanwhile"
    assert served.gate.entered() != pid
    served.gate.open()
    assert held.result(30) == "hold"
    assert [other.result(30) for other in others] == list(range(6))
    served.check(ok=8)
    assert served.agent.wait_for(lambda states: states[0].worker_restarts == 1)[0].models == {
        served.spec.model_key("stage"): "ready"
    }


def test_a_model_that_hangs_lets_its_requests_expire_and_is_killed(serve):
    served = serve("max_batch: 4", slo="2s")
    hanging = served.client.submit("user", "hang")
    reply = hanging.reply(30)
    assert reply.outcome == "expired"
    assert -1.5 < reply.remaining <= 0
    assert served.bystander.infer("echo", "meanwhile") == "meanwhile"
    served.agent.wait_for(lambda states: states[0].worker_restarts == 1)
    served.agent.wait_for(lambda states: set(states[0].models.values()) == {"ready"})
    assert served.client.infer("user", "again") == "again"
    served.check(ok=2, expired=1)


def test_a_model_that_answers_after_the_deadline_answers_nobody(serve):
    served = serve("max_batch: 1", slo="500ms")
    held = served.client.submit("user", "hold")
    served.gate.entered()
    reply = held.reply(30)
    assert (reply.outcome, reply.value, reply.timings) == ("expired", None, ())
    served.gate.open()
    served.cluster.eventually(lambda: served.agent.agent.states()[0].batches == 1, "the late batch has ended")
    served.check(expired=1)


def test_a_batch_too_large_for_a_header_runs_in_parts(serve):
    served = serve("max_batch: 8")
    texts = ["x" * 1000] * 1400  # all of this stands in the header, which takes two of these and not three
    for reply in served.gather([texts] * 8):
        assert reply.unwrap() == texts
    served.check(ok=9)


def test_an_answer_too_large_for_a_header_fails(serve):
    code = "def model(feeds):\n    return [['x' * 1000] * feed for feed in feeds]\n"
    served = serve("max_batch: 4", code=code)
    futures = [served.client.submit("user", count) for count in (3, 5000, 5, 7)]
    replies = [future.reply(60) for future in futures]
    assert [str(reply.outcome) for reply in replies] == ["ok", "failed", "ok", "ok"]
    assert "use arrays for numbers" in replies[1].detail
    served.check(ok=3, failed=1)
    assert served.agent.error is None


def test_a_missing_extra_is_named(cluster, echo, tmp_path, monkeypatch):
    package = tmp_path / "path" / "onnxruntime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ModuleNotFoundError('not here', name='onnxruntime')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    (tmp_path / "model.onnx").write_bytes(b"no model")
    (tmp_path / "p.yaml").write_text(
        "name: p\nslo: 300ms\nstages:\n  s: {executor: onnx, model: model.onnx}\noutput: s\n"
    )
    spec = load_spec(str(tmp_path / "p.yaml"))
    cluster.serve(echo)
    agent = cluster.serve(spec, devices=[CPU])
    (state,) = agent.states[0].models.values()
    assert state.startswith("failed: ")
    assert "pip install 'laxity[onnx]'" in state
    client = cluster.client()
    reply = client.submit("p", b"").reply(30)
    assert reply.outcome == "unavailable"
    assert "no agent holds the model" in reply.detail
    assert client.infer("echo", 1) == 1
    cluster.settle(ok=1, unavailable=1)


def test_a_model_that_dies_while_it_loads_is_given_up(cluster, echo, user_pipeline):
    code = "import os\ndef model(feeds):\n    return feeds\ndef sample():\n    os._exit(3)\n"
    spec = user_pipeline(code, "sample: user_code:sample", slo="300ms")
    good = user_pipeline("def model(feeds):\n    return feeds\n", "max_batch: 1", name="good")
    agent = cluster.serve(spec, good, devices=[CPU])
    states = agent.states[0].models
    assert states[good.model_key("stage")] == "ready"
    assert states[spec.model_key("stage")].startswith("failed: the worker died while it loaded")
    client = cluster.client()
    assert client.infer("good", 1) == 1
    assert client.submit("user", 1).reply(30).outcome == "unavailable"
    cluster.settle(ok=1, unavailable=1)


def test_an_old_version_s_requests_end_there(cluster, user_pipeline, tmp_path):
    old = user_pipeline(GATED, "max_batch: 1")
    agent = cluster.serve(old, devices=[CPU])
    gate = Gate(tmp_path / "user")
    client = cluster.client()
    held = client.submit("user", "hold")
    gate.entered()
    new = msgspec.structs.replace(old, slo=10.0)
    cluster.shard.apply(new)
    cluster.status()  # answered once the shard has done what it was told before
    # By the shard, or by the client itself once it has heard of the new SLO.
    with pytest.raises(Rejected, match="longer than the pipeline's"):
        client.infer("user", "too long", slo=15)
    gate.open()
    assert held.result(30) == "hold"
    agent.hold(new)
    assert client.infer("user", "new") == "new"
    assert cluster.settle().ended["ok"] == 2
