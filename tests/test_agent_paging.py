"""An agent whose devices page models, as a shard that is played by hand sees it."""

from __future__ import annotations

import pytest

from laxity import protocol
from laxity.protocol import Acted, Done, Goodbye, Grant, Heartbeat, Load, Pull, Ready, Unload, Welcome
from nodes.agent import MANY, Work
from nodes.device import DeviceConfig
from pipelines.load import parse_spec

WINDOW_US = 20_000_000


def pipeline(executor, stages, memory_mb, root=""):
    """A pipeline of so many stages, each of which takes so much memory."""
    profile = f"{{alpha_ms: 1, beta_ms: 1, load_ms: 1, memory_mb: {memory_mb}}}"
    names = [f"s{number}" for number in range(stages)]
    lines = [f"  {name}: {{executor: {executor}, profile: {profile}}}" for name in names]
    output = ", ".join(f"{name}: {name}" for name in names)
    text = "\n".join(["name: many", "slo: 20s", "stages:", *lines, f"output: {{{output}}}"])
    return parse_spec(text, file="many.yaml", root=root)


def emulated(stages, memory_mb=100):
    return pipeline("emulated", stages, memory_mb)


class PagingShard:
    """It keeps what the agent says until the test asks for it."""

    def __init__(self, make_peer):
        self.peer = make_peer("tcp://127.0.0.1:*", protocol.decode_from_agent)
        self.agent = b""
        self.readies = []
        self._said = []
        self._last = 0
        self._pull = None

    def receive(self, kind):
        while True:
            for index, (message, frames) in enumerate(self._said):
                if isinstance(message, kind):
                    del self._said[index]
                    return message, frames
            self.agent, message, frames = self.peer.receive(Ready, Pull, Done, Acted, Goodbye, Heartbeat)
            if isinstance(message, Ready):
                self.readies.append(message)
            self._said.append((message, frames))

    def greet(self, models):
        """Welcome the agent, and wait until it has held so many models."""
        ready = self.receive(Ready)[0]
        self.peer.send(self.agent, Welcome(protocol.VERSION, "s0", 60_000_000))
        while len(ready.devices[0].models) < models:
            ready = self.receive(Ready)[0]
        self.pull()
        return ready.devices[0]

    def pull(self):
        self._pull = self.receive(Pull)[0]

    def act(self, kind, model):
        """LOAD or UNLOAD a model; how that ended."""
        self._last += 1
        expected = (1000,) if kind is Load else ()
        self.peer.send(self.agent, kind(0, self._last, self._pull.sent_us, 0, model, 0, WINDOW_US, *expected))
        acted = self.receive(Acted)[0]
        assert (acted.device, acted.action) == (0, self._last)
        return acted.code

    def run(self, model):
        """Have a batch of one run; its DONE."""
        self._last += 1
        pull = self._pull
        self.peer.send(
            self.agent, Grant(0, self._last, pull.seq, pull.sent_us, 0, model, "", 0, WINDOW_US, 1000, [["value"]])
        )
        done = self.receive(Done)[0]
        assert done.batch == self._last
        self.pull()
        return done


@pytest.fixture
def shard(make_peer):
    return PagingShard(make_peer)


def begin(cluster, shard, device, spec):
    """An agent that is to hold all of ``spec`` on ``device``; what it says of that once it has."""
    agent = cluster.lone_agent([device])
    models = {spec.model_key(stage): (spec, stage) for stage in spec.stages}
    agent.agent.place({0: Work("s0", models)})
    agent.connect(shard.peer.url)
    return agent, shard.greet(len(models))


def test_models_beyond_the_budget_are_held_and_paged_as_the_shard_says(cluster, shard):
    spec = emulated(5)
    first, second, *_, last = (spec.model_key(stage) for stage in spec.stages)
    agent, report = begin(cluster, shard, DeviceConfig("emulated", "emulated", memory_mb=250.0), spec)
    assert report.memory_mb == 250.0
    assert {(model.memory_mb, model.load_us) for model in report.models} == {(100.0, 1000)}
    assert sum(model.resident for model in report.models) <= 2
    agent.wait_for(lambda states: set(states[0].models.values()) == {"ready"})

    assert shard.act(Load, first) == "busy"
    assert shard.run(first).code == "not_loaded"
    assert shard.act(Unload, last) == "ok"
    told = len(shard.readies)
    assert shard.act(Load, first) == "ok"
    done = shard.run(first)
    assert (done.code, done.results) == ("ok", ["value"])
    assert shard.run(last).code == "not_loaded"
    assert shard.act(Load, second) == "busy"
    assert shard.act(Load, "nobody") == "unknown_model"
    assert len(shard.readies) == told, "READY does not repeat what ACTED has told"


def test_what_another_shard_asked_for_is_told_by_ready(cluster, shard, make_peer):
    spec = emulated(2)
    first, second = (spec.model_key(stage) for stage in spec.stages)
    agent, _ = begin(cluster, shard, DeviceConfig("emulated", "emulated", memory_mb=100.0), spec)
    assert shard.act(Unload, second) == "ok"
    assert shard.act(Load, first) == "ok"
    other = PagingShard(make_peer)
    agent.agent.follow({"s1": other.peer.url})
    agent.agent.place({0: Work("s1", {spec.model_key(stage): (spec, stage) for stage in spec.stages})})
    report = other.greet(2)
    assert {model.model: model.resident for model in report.models} == {first: True, second: False}
    assert other.act(Unload, first) == "ok"


def test_many_models_are_told_of_together(cluster, shard):
    spec = emulated(3 * MANY, memory_mb=1)
    _, report = begin(cluster, shard, DeviceConfig("emulated", "emulated", memory_mb=50.0), spec)
    assert len(report.models) == 3 * MANY
    assert len(shard.readies) < MANY, "not one for each"


def test_a_worker_process_pages_real_models(cluster, shard, user_pipeline):
    code = user_pipeline("def model(feeds):\n    return feeds\n", "max_batch: 1")
    pair = pipeline("python, model: user_code:model", 2, 60, code.root)
    a, b = (pair.model_key(name) for name in pair.stages)
    _, report = begin(cluster, shard, DeviceConfig("cpu", "cpu", memory_mb=100.0), pair)
    resident = {model.model for model in report.models if model.resident}
    assert resident == {b}
    assert shard.act(Load, a) == "busy"
    assert shard.act(Unload, b) == "ok"
    assert shard.act(Load, a) == "ok"
    done = shard.run(a)
    assert (done.code, done.results) == ("ok", ["value"])
    assert shard.run(b).code == "not_loaded"
