"""`laxity load` against real clusters, and the open loop behind it against a shard that is driven by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cli.load import _capacity
from cli.load_report import figures
from cli.open_loop import OpenLoop
from laxity import Client
from laxity.outcomes import Outcome
from pipelines import load_spec
from pipelines.capacity import capacity, pool_capacity
from simulation.arrivals import prepare

COMMAND = [sys.executable, "-P", "-m", "cli.main"]
Laxity = Callable[..., "subprocess.CompletedProcess[str]"]


def runner(runtime: Path) -> Laxity:
    """Runs `laxity` with a run directory of its own."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"XDG_RUNTIME_DIR": str(runtime)}
        return subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def laxity(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laxity]:
    """A running cluster: `tm` on four emulated GPUs (two for its first stage) and `echo` on one."""
    run = runner(tmp_path_factory.mktemp("runtime"))
    up = run("up", "tm", "echo", "--split", "2,1,1,1", "--detach")
    assert up.returncode == 0, up.stderr
    yield run
    run("down")


def loaded(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_what_is_drawn_is_sent(laxity: Laxity) -> None:
    result = laxity("load", "tm", "--rate", "40", "--duration", "2s", "--seed", "7", "--json")
    assert result.returncode == 0, result.stderr
    found = loaded(result)
    drawn = len(prepare("poisson", seconds=2.0).draw(40.0, 7))
    assert found["submitted"] == sum(found["outcomes"].values()) == drawn
    assert found["offered_rps"] == drawn / 2.0
    assert found["goodput_rps"] == found["outcomes"]["ok"] / 2.0 > 0
    assert found["drop_rate"] == pytest.approx(1 - found["outcomes"]["ok"] / drawn)
    assert (found["pipeline"], found["seed"], found["seconds"], found["unsent"]) == ("tm", 7, 2.0, 0)
    assert found["trace"].startswith("poisson")
    assert (found["gpus"], found["split"]) == (4, [2, 1, 1])
    stages = ["object_detection", "face_recognition", "text_recognition"]
    assert found["capacity_rps"] == capacity(load_spec("tm"), dict(zip(stages, [2, 1, 1], strict=True)))
    assert list(found["drops_by_stage"]) == stages
    assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p99"] <= found["latency_ms"]["p999"]
    assert 0 <= found["lag_ms"]["p99"] <= found["lag_ms"]["max"]


def test_a_trace_at_a_load_for_people(laxity: Laxity, tmp_path: Path) -> None:
    trace = tmp_path / "bursty.csv"
    trace.write_text("seconds_offset,requests\n0,10\n60,30\n120,20\n")
    arguments = ("--trace", str(trace), "--as-seconds", "--superpose", "2", "--window", "1:3", "--load", "0.25")
    result = laxity("load", "tm", *arguments)
    assert result.returncode == 0, result.stderr
    assert "bursty as seconds x2 1:3, 2 s, seed 1" in result.stdout
    assert "4 (2,1,1)" in result.stdout
    assert "fluid bound" in result.stdout
    found = loaded(laxity("load", "tm", *arguments, "--json"))
    source = prepare(str(trace), as_seconds=True, superpose=2, window=(1.0, 3.0))
    assert found["submitted"] == len(source.draw(0.25 * found["capacity_rps"], 1))


def test_what_would_be_too_many_at_once_is_not_sent(laxity: Laxity) -> None:
    result = laxity("load", "tm", "--rate", "300", "--duration", "1s", "--in-flight", "1", "--json")
    found = loaded(result)
    drawn = len(prepare("poisson", seconds=1.0).draw(300.0, 1))
    assert found["unsent"] > 0  # one request takes three stages, longer than the gaps
    assert found["submitted"] + found["unsent"] == drawn
    assert found["offered_rps"] == drawn
    assert found["drop_rate"] == pytest.approx(1 - found["outcomes"]["ok"] / drawn)
    assert f"{found['unsent']:,} requests were not sent, as --in-flight others were under way" in result.stderr


def test_an_slo_that_nobody_can_keep(laxity: Laxity) -> None:
    result = laxity("load", "tm", "--rate", "50", "--duration", "1s", "--slo", "5ms", "--json")
    assert result.returncode == 1
    found = loaded(result)
    assert found["outcomes"]["ok"] == 0
    assert found["drop_rate"] == 1.0
    assert found["latency_ms"] == {"p50": 0.0, "p99": 0.0, "p999": 0.0}


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["nope", "--rate", "5", "--duration", "1s"], 1, "serves no pipeline 'nope'; it serves echo, tm"),
        (["tmm", "--rate", "5", "--duration", "1s"], 1, "did you mean 'tm'?"),
        (["tm", "--duration", "1s"], 2, "give either --rate (requests per second) or --load"),
        (["tm", "--rate", "5", "--load", "1", "--duration", "1s"], 2, "give either --rate"),
        (["tm", "--rate", "5"], 2, "poisson has no end: say how many seconds of it"),
        (["tm", "--rate", "0", "--duration", "1s"], 2, "not in the range x>0"),
        (["tm", "--rate", "1e9", "--duration", "1s"], 2, "more than the 50,000 that can be sent"),
        (["tm", "--load", "1e6", "--duration", "1s"], 2, "more than the 50,000 that can be sent"),
        (["tm", "--rate", "0.001", "--duration", "1s"], 2, "no request falls into 1 s"),
        (["tm", "--rate", "nan", "--duration", "1s"], 2, "must be above 0"),
        (["tm", "--rate", "5", "--duration", "never"], 2, "is no duration above zero"),
        (["tm", "--rate", "5", "--window", "9"], 2, "a window is BEGIN:END in seconds"),
        (["tm", "--rate", "5", "--duration", "1s", "--slo", "9s"], 2, "--slo 9s is longer than the pipeline's 400ms"),
        (["tm", "--rate", "5", "--trace", "gone.csv"], 2, "there is no trace file 'gone.csv'; a process is one of"),
        (["tm", "--rate", "5", "--trace", "gamma:-1", "--duration", "1s"], 2, "from 0.05 to 20, not '-1'"),
        (["tm", "--rate", "5", "--superpose", "2", "--duration", "1s"], 2, "only traces can be superposed"),
    ],
)
def test_wrong_use(laxity: Laxity, arguments: list[str], code: int, reason: str) -> None:
    result = laxity("load", *arguments)
    assert result.returncode == code, result.stderr
    assert reason in result.stderr
    assert not result.stdout


def test_a_bad_trace_is_named_with_its_line(laxity: Laxity, tmp_path: Path) -> None:
    trace = tmp_path / "bad.csv"
    trace.write_text("seconds_offset,requests\n0,10\n1,-4\n")
    result = laxity("load", "tm", "--rate", "5", "--trace", str(trace))
    assert result.returncode == 2
    assert "bad.csv:3: requests must be a number of 0 or more, not '-4'" in result.stderr


def test_shards_are_enough(laxity: Laxity) -> None:
    shards = ",".join(shard["frontend"] for shard in loaded(laxity("status", "--json"))["shards"])
    result = laxity("load", "tm", "--rate", "30", "--duration", "1s", "--shard", shards, "--json")
    assert result.returncode == 0, result.stderr
    found = loaded(result)
    assert found["outcomes"]["ok"] > 0
    assert found["gpus"] is found["capacity_rps"] is found["bound_rps"] is None
    assert laxity("load", "tm", "--rate", "30", "--duration", "1s", "--shard", shards).returncode == 0
    relative = laxity("load", "tm", "--load", "0.5", "--duration", "1s", "--shard", shards)
    assert relative.returncode == 2
    assert "not known with --shard; use --rate" in relative.stderr


def test_no_cluster(tmp_path: Path) -> None:
    result = runner(tmp_path)("load", "tm", "--rate", "5", "--duration", "1s")
    assert result.returncode == 1
    assert "no cluster 'local' is running here" in result.stderr


def test_capacity_by_what_gpus_hold() -> None:
    tm = load_spec("tm")
    first, second, third = tm.stages
    assert _capacity(tm, [[first], [second], [first], [third]]) == capacity(tm, {first: 2, second: 1, third: 1})
    assert _capacity(tm, [[first, second, third]] * 3) == pool_capacity([tm], [1.0], 3)
    measured = msgspec.structs.replace(
        tm, stages=tm.stages | {third: msgspec.structs.replace(tm.stages[third], profile=None)}
    )
    assert _capacity(measured, [[first], [second], [third]]) is None


def test_requests_are_sent_whatever_the_answers_do(peer: Any) -> None:
    """The shard answers nothing before it has every request; then each kind of end is counted."""
    arrivals = np.arange(6) * 0.005
    with Client(peer.url) as client:
        loop = OpenLoop(client, "echo", b"x", 1.0, in_flight=100)
        sender = threading.Thread(target=loop.run, args=(arrivals, lambda _: None))
        sender.start()
        peer.welcome()
        incoming = peer.requests(6)
        assert loop.in_flight == 6
        peer.refuse(incoming[0], Outcome.DROPPED, stage="echo")
        peer.refuse(incoming[1], Outcome.EXPIRED, stage="echo")
        peer.refuse(incoming[2], Outcome.REJECTED, detail="queue full")
        peer.refuse(incoming[3], Outcome.REJECTED, detail="another reason")
        for one in incoming[4:]:
            peer.answer(one, b"x")
        sender.join(30)
        assert not sender.is_alive()
    assert loop.outcomes == {Outcome.OK: 2, Outcome.DROPPED: 1, Outcome.EXPIRED: 1, Outcome.REJECTED: 2}
    assert loop.reasons[Outcome.REJECTED] == "queue full"
    assert (loop.submitted, loop.unsent, loop.in_flight) == (6, 0, 0)
    assert len(loop.lags) == 6
    assert len(loop.latencies) == 2
    found = figures(loop, ["echo"], arrivals, 1.0, 4.0)
    assert found["drops_by_stage"] == {"echo": 2}
    assert (found["goodput_rps"], found["bound_rps"]) == (2.0, 4.0)
    assert (found["drop_rate"], found["avoidable_drop_rate"]) == pytest.approx((4 / 6, 2 / 6))
    unknown = figures(loop, [], arrivals, 1.0, None)
    assert unknown["capacity_rps"] is unknown["bound_rps"] is unknown["bound_ratio"] is None
    assert unknown["goodput_rps"] == 2.0
    assert unknown["drops_by_stage"] == {"echo": 2}


def test_what_the_client_refuses_is_counted(peer: Any) -> None:
    with Client(peer.url) as client:
        peer.welcome(max_payload=4)
        client.wait_ready()
        loop = OpenLoop(client, "echo", b"more than four", None, in_flight=100)
        loop.run(np.array([0.0, 0.001]), lambda _: None)
    assert loop.outcomes == {Outcome.REJECTED: 2}
    assert "the shard takes 4 at most" in loop.reasons[Outcome.REJECTED]
    assert loop.in_flight == 0
