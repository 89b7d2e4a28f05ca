"""The whole path over real sockets: services, a shard, agents, and user code in a worker process."""

from __future__ import annotations

import threading

import msgspec
import numpy as np
import pytest

from laxity import Rejected
from nodes.device import DeviceConfig
from pipelines.load import load_spec

EMULATED = DeviceConfig("emulated", "emulated")
CPU = DeviceConfig("cpu", "cpu")
LETTERS = """
import os

def split(texts):
    return [{"letters": list(text), "whole": text} for text in texts]

def upper(letters):
    return [letter.upper() for letter in letters]

def join(parts):
    return [part["whole"] + ":" + "".join(part["letters"]) for part in parts]

def worker(feeds):
    return [os.getpid()] * len(feeds)
"""
SPELL = """
name: spell
slo: 20s
stages:
  split: {executor: python, model: letters:split, max_batch: 1}
  upper: {executor: python, model: letters:upper, inputs: [split.letters], map: true, max_items: 10, max_batch: 1}
  join:
    executor: python
    model: letters:join
    inputs: {whole: split.whole, letters: upper}
    max_batch: 1
  worker: {executor: python, model: letters:worker, max_batch: 1}
output: {text: join, letters: upper, worker: worker}
"""


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -3,
        0.5,
        "text",
        "",
        "long " * 1000,
        b"",
        b"bytes",
        b"frame" * 400_000,
        [],
        [1, ["two", b"three"]],
        {"name": {"deeper": [None]}},
    ],
    ids=lambda value: f"{type(value).__name__}-{str(value)[:8]}",
)
def test_every_kind_of_value_goes_through(cluster, echo, value):
    cluster.serve(echo)
    assert cluster.client().infer("echo", value) == value


@pytest.mark.parametrize("dtype", ["float32", "uint8", "<U3", "bool"])
def test_arrays_go_through(cluster, echo, dtype):
    cluster.serve(echo)
    client = cluster.client()
    for shape in [(), (0, 3), (7,), (512, 1024)]:
        array = np.ones(shape, dtype)
        answer = client.infer("echo", {"array": array, "name": "a"})
        np.testing.assert_array_equal(answer["array"], array)
        assert (answer["array"].dtype, answer["array"].shape, answer["name"]) == (array.dtype, shape, "a")
    cluster.settle(ok=4)


def test_large_arrays_of_several_requests_keep_apart(cluster, echo):
    cluster.serve(echo)
    client = cluster.client()
    arrays = [np.full(500_000, number, "<f4") for number in range(20)]
    for number, answer in enumerate(client.map("echo", arrays)):
        assert answer.shape == (500_000,)
        assert np.all(answer == number)
    cluster.settle(ok=20)


def test_many_requests_of_several_services_at_once(cluster, echo):
    cluster.serve(echo)
    cluster.serve(echo, devices=[EMULATED] * 3)
    clients = [cluster.client() for _ in range(4)]
    answers = [[] for _ in clients]

    def service(number):
        futures = [clients[number].submit("echo", [number, n]) for n in range(100)]
        answers[number] += [future.result(30) for future in futures]
        answers[number] += clients[number].map("echo", ([number, n] for n in range(100, 200)))

    threads = [threading.Thread(target=service, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[[number, n] for n in range(200)] for number in range(4)]
    assert cluster.settle(ok=800).clients == 4


def test_a_fork_and_a_join(cluster):
    spec = load_spec("da")
    # Batches that are full wait for nothing, so that a slow machine has nearly the whole SLO.
    stages = {name: msgspec.structs.replace(stage, max_batch=4) for name, stage in spec.stages.items()}
    spec = msgspec.structs.replace(spec, slo=5.0, stages=stages)
    cluster.serve(spec, devices=[EMULATED] * 2)
    client = cluster.client()
    futures = [client.submit("da", n, timings=True) for n in range(20)]
    for n, future in enumerate(futures):
        reply = future.reply(30)
        assert reply.unwrap() == n
        assert 0 < reply.remaining < spec.slo
        timings = {timing.stage: timing for timing in reply.timings}
        assert set(timings) == set(spec.stages)
        for timing in timings.values():
            assert timing.queued >= 0
            assert timing.execution > 0
            assert 1 <= timing.batch <= 4
            assert timing.items == 1
        joined = timings["expression_recognition"]
        assert joined.remaining <= min(timings[name].remaining for name in ("pose_recognition", "face_recognition"))
    cluster.settle(ok=20)


def test_user_code_with_a_map_stage_in_worker_processes(cluster, tmp_path):
    (tmp_path / "letters.py").write_text(LETTERS)
    (tmp_path / "spell.yaml").write_text(SPELL)
    agent = cluster.serve(load_spec(str(tmp_path / "spell.yaml")), devices=[CPU] * 2)
    assert [set(state.models.values()) for state in agent.states] == [{"ready"}] * 2
    client = cluster.client()

    futures = {text: client.submit("spell", text, timings=True) for text in ("abc", "", "zebra", "x" * 10)}
    workers = set()
    for text, future in futures.items():
        reply = future.reply(30)
        answer = reply.unwrap()
        assert answer["text"] == f"{text}:{text.upper()}"
        assert answer["letters"] == list(text.upper())
        workers.add(answer["worker"])
        items = {timing.stage: timing.items for timing in reply.timings}
        expected = {"split": 1, "upper": len(text), "join": 1, "worker": 1}
        assert items == {stage: count for stage, count in expected.items() if count}
    assert workers.isdisjoint({None, 0})

    reply = client.submit("spell", "y" * 11).reply(30)
    assert reply.outcome == "failed"
    assert "at most 10" in reply.detail or "max_items of 10" in reply.detail
    cluster.settle(ok=4, failed=1)


def test_an_applied_pipeline_replaces_the_one_that_runs(cluster, echo):
    agent = cluster.serve(echo)
    client = cluster.client()
    assert client.infer("echo", 1) == 1
    newer = msgspec.structs.replace(echo, slo=20.0)
    agent.hold(echo, newer)
    cluster.shard.apply(newer)
    cluster.status()  # answered once the shard has done what it was told before
    assert client.infer("echo", 2) == 2
    with pytest.raises(Rejected, match="longer than the pipeline's 20 s"):
        client.infer("echo", 3, slo=25)
    cluster.shard.delete("echo")
    cluster.status()
    with pytest.raises(Rejected, match="unknown pipeline 'echo'; served here: none"):
        client.infer("echo", 4)
    status = cluster.settle()
    assert status.queued == {}
    assert status.ended["ok"] == 2
    # The SLO is refused by the client itself once it has heard of the new one.
    assert status.ended["rejected"] in (1, 2)
