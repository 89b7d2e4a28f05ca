"""`laxity load` against a real cluster, and its port against a shard that is driven by hand."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from cli.load.generator import Generator
from cli.load.payloads import payloads
from cli.load.port import ClientPort
from cli.load.tally import StepTally
from cli.load.target import Held, Target
from cli.load.traffic import Kind, Mix
from cli.main import main
from laxity import Client
from laxity.outcomes import Outcome
from pipelines import load_spec
from pipelines.capacity import capacity, pool_capacity
from simulation.arrivals import prepare

COMMAND = [sys.executable, "-P", "-m", "cli.main"]
Laxity = Callable[..., Result]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run directory of a cluster: `tm` on four emulated GPUs (two for its first stage) and `echo` on one."""
    runtime = tmp_path_factory.mktemp("runtime")
    environment = os.environ | {"XDG_RUNTIME_DIR": str(runtime)}

    def run(*arguments: str) -> None:
        done = subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("up", "tm", "echo", "--split", "2,1,1,1", "--detach")
    yield runtime
    run("down")


@pytest.fixture
def laxity(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Laxity:
    """Runs `laxity`, in this process, for that cluster."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    return lambda *arguments: CliRunner().invoke(main, [*arguments])


def loaded(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def only_step(result: Result) -> dict[str, Any]:
    (step,) = loaded(result)["steps"]
    assert isinstance(step, dict)
    return step


def test_what_is_drawn_is_sent(laxity: Laxity) -> None:
    poisson = ("--request-distribution", "poisson")
    result = laxity(
        "load", "tm", "--request-rate-range", "40:60:20", *poisson, "--duration", "1s", "--seed", "7", "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = loaded(result)
    assert (found["seed"], found["percentile"], found["latency_from"]) == (7, 99.0, "due")
    assert (found["gpus"], found["split"]) == (4, {"tm": [2, 1, 1]})
    assert found["arrivals"].startswith("poisson")
    stages = ["object_detection", "face_recognition", "text_recognition"]
    for rate, step in zip((40.0, 60.0), found["steps"], strict=True):
        drawn = len(prepare("poisson", seconds=1.0).draw(rate, 7))
        assert step["submitted"] == step["offered"] == sum(step["outcomes"].values()) == drawn
        assert (step["rate"], step["seconds"], step["unsent"]) == (rate, 1.0, 0)
        assert step["offered_rps"] == drawn
        assert step["goodput_rps"] == step["outcomes"]["ok"] > 0
        assert step["drop_rate"] == pytest.approx(1 - step["outcomes"]["ok"] / drawn)
        assert step["capacity_rps"] == capacity(load_spec("tm"), dict(zip(stages, [2, 1, 1], strict=True)))
        assert list(step["drops_by_stage"]) == stages
        latency = step["latency_ms"]
        assert 0 < latency["p50"] <= latency["p99"] == latency["judged"] <= latency["p999"] <= latency["max"]
        assert 0 <= step["lag_ms"]["p99"] <= step["lag_ms"]["max"]


def test_a_trace_at_a_load_for_people(laxity: Laxity, tmp_path: Path) -> None:
    trace = tmp_path / "bursty.csv"
    trace.write_text("seconds_offset,requests\n0,10\n60,30\n120,20\n")
    arguments = ("--trace", str(trace), "--as-seconds", "--superpose", "2", "--window", "1:3", "--load", "0.25")
    page = tmp_path / "load.html"
    result = laxity("load", "tm", *arguments, "--html", str(page))
    assert result.exit_code == 0, result.stderr
    assert "bursty as seconds x2 1:3, 2 s, seed 1" in result.stdout
    assert "4 GPUs (2,1,1)" in result.stdout
    assert "fluid bound" in result.stdout
    drawn = prepare(str(trace), as_seconds=True, superpose=2, window=(1.0, 3.0))
    carried = capacity(load_spec("tm"), dict(zip(load_spec("tm").stages, [2, 1, 1], strict=True)))
    assert f"{len(drawn.draw(0.25 * carried, 1)):,} requests sent" in page.read_text()


def test_a_mix_of_pipelines_budgets_and_priorities(laxity: Laxity, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text('{"data": ["text", {"picture": {"b64": "aGVsbG8="}}]}')
    mix = ("--slo", "tm=200ms:1,300ms:1", "--priority", "0:0.5,1:0.5", "--input-data", f"echo={data}")
    result = laxity("load", "tm:1", "echo:3", "--request-rate-range", "100", *mix, "--duration", "1s", "--json")
    assert result.exit_code == 0, result.stderr
    assert loaded(result)["pipelines"] == {"tm": 0.25, "echo": 0.75}
    step = only_step(result)
    by_name = {part["pipeline"]: part for part in step["pipelines"]}
    assert by_name["tm"]["offered"] + by_name["echo"]["offered"] == step["offered"] == 100
    assert by_name["echo"]["offered"] > by_name["tm"]["offered"] > 0
    assert {(kind["pipeline"], kind["slo"], kind["priority"]) for kind in step["kinds"]} == {
        ("tm", 0.2, 0),
        ("tm", 0.2, 1),
        ("tm", 0.3, 0),
        ("tm", 0.3, 1),
        ("echo", None, 0),
        ("echo", None, 1),
    }


def test_a_closed_loop_until_it_is_steady(laxity: Laxity) -> None:
    arguments = ("--measurement-interval", "200", "--stability-percentage", "90", "--warmup-request-count", "5")
    result = laxity("load", "echo", "--concurrency-range", "3", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert loaded(result)["latency_from"] == "sent"
    step = only_step(result)
    assert (step["concurrency"], step["steady"], step["bound_rps"]) == (3, True, None)
    assert step["seconds"] == pytest.approx(0.6)
    assert step["outcomes"]["ok"] > 3


def test_what_would_be_too_many_at_once_is_not_sent(laxity: Laxity) -> None:
    result = laxity("load", "tm", "--request-rate-range", "300", "--duration", "1s", "--in-flight", "1", "--json")
    step = only_step(result)
    assert step["unsent"] > 0  # one request takes three stages, longer than the gaps
    assert step["submitted"] + step["unsent"] == step["offered"] == 300
    assert step["drop_rate"] == pytest.approx(1 - step["outcomes"]["ok"] / 300)
    assert f"{step['unsent']:,} requests were not sent, as --in-flight others" in result.stderr


def test_an_slo_that_nobody_can_keep(laxity: Laxity) -> None:
    result = laxity("load", "tm", "--request-rate-range", "50", "--duration", "1s", "--slo", "5ms", "--json")
    assert result.exit_code == 1
    step = only_step(result)
    assert step["outcomes"]["ok"] == 0
    assert step["drop_rate"] == 1.0
    assert set(step["latency_ms"].values()) == {0.0}
    assert "--slo 5ms is shorter than the" in result.stderr


def test_failing_under(laxity: Laxity) -> None:
    arguments = ("load", "tm", "--request-rate-range", "20", "--duration", "1s", "--slo", "5ms:1,400ms:1")
    failed = laxity(*arguments, "--fail-under", "99")
    assert failed.exit_code == 1
    assert "in SLO, below --fail-under 99 %" in failed.stderr
    assert laxity(*arguments, "--fail-under", "1").exit_code == 0


RATE = ("--request-rate-range", "5")


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["nope", *RATE, "--duration", "1s"], 1, "serves no pipeline 'nope'; it serves echo, tm"),
        (["tmm", *RATE, "--duration", "1s"], 1, "did you mean 'tm'?"),
        ([*RATE], 2, "say which pipelines to send requests to"),
        (["tm", "tm:2", *RATE], 2, "'tm' is given twice"),
        (["tm:0", *RATE], 2, "'tm:0' is none of PIPELINE and PIPELINE:PART"),
        (["tm", "--duration", "1s"], 2, "give one of --request-rate-range (requests per second), --load"),
        (["tm", *RATE, "--load", "1", "--duration", "1s"], 2, "give one of --request-rate-range"),
        (["tm", "--request-rate-range", "0"], 2, "numbers above 0, not '0'"),
        (["tm", "--request-rate-range", "9:1"], 2, "ends below its start"),
        (["tm", "--request-rate-range", "1:9999"], 2, "9,999 steps, more than 100"),
        (["tm", "--concurrency-range", "1:2:0.5"], 2, "must be of whole numbers"),
        (["tm", "--concurrency-range", "20", "--in-flight", "10"], 2, "goes to 20, more than --in-flight 10"),
        (["tm", "--request-rate-range", "1e9", "--duration", "1s"], 2, "more than the 50,000 that can be sent"),
        (["tm", "--load", "1e6", "--duration", "1s"], 2, "more than the 50,000 that can be sent"),
        (["tm", "--request-rate-range", "0.001", "--duration", "1s"], 2, "no request falls into 1 s"),
        (["tm", *RATE, "--duration", "never"], 2, "is no duration above zero"),
        (["tm", *RATE, "--measurement-interval", "0"], 2, "is no duration above zero"),
        (["tm", *RATE, "--window", "9"], 2, "a window is BEGIN:END in seconds"),
        (["tm", *RATE, "--window", "1:2"], 2, "--window does not go with a steady rate: give --trace FILE"),
        (["tm", "--concurrency-range", "1", "--trace", "x"], 2, "--trace does not go with --concurrency-range"),
        (["tm", *RATE, "--speed", "2"], 2, "--speed goes with --replay only"),
        (["tm", *RATE, "--duration", "1s", "--slo", "9s"], 2, "--slo 9s is longer than the pipeline's 0.4s"),
        (["tm", *RATE, "--slo", "1ms:x"], 2, "must be a number above 0"),
        (["tm", *RATE, "--slo", "lv=1ms"], 2, "there is no pipeline 'lv' among those to be loaded"),
        (["tm", *RATE, "--priority", "2"], 2, "a priority is 0 or 1 (highest), not '2'"),
        (["tm", *RATE, "--trace", "gone.csv"], 2, "there is no trace file 'gone.csv'"),
        (["tm", *RATE, "--trace", "poisson"], 2, "write --request-distribution poisson"),
        (["tm", *RATE, "--request-distribution", "x"], 2, "'x' is none of constant, poisson and gamma:CV"),
        (["tm", *RATE, "--request-distribution", "gamma:-1"], 2, "from 0.05 to 20, not '-1'"),
        (["tm", *RATE, "--superpose", "2"], 2, "--superpose does not go with a steady rate"),
        (["tm", *RATE, "--input-data", "gone.png"], 2, "there is no such file"),
        (["tm", *RATE, "--input-data", "samples"], 2, "there are no samples for 'tm', only for ocr and classify"),
        (["tm", *RATE, "--html", "/nowhere/x.html"], 2, "there is no directory '/nowhere'"),
        (["--replay", "gone.rec"], 1, "gone.rec cannot be read: No such file or directory"),
        (["tm", "--replay", "gone.rec", "--slo", "1s"], 2, "--slo does not go with --replay"),
    ],
)
def test_wrong_use(laxity: Laxity, arguments: list[str], code: int, reason: str) -> None:
    result = laxity("load", *arguments)
    assert result.exit_code == code, result.output
    assert reason in " ".join(result.stderr.split())
    assert not result.stdout


def test_a_bad_trace_is_named_with_its_line(laxity: Laxity, tmp_path: Path) -> None:
    trace = tmp_path / "bad.csv"
    trace.write_text("seconds_offset,requests\n0,10\n1,-4\n")
    result = laxity("load", "tm", *RATE, "--trace", str(trace))
    assert result.exit_code == 2
    assert "bad.csv:3: requests must be a number of 0 or more, not '-4'" in result.stderr


def test_shards_are_enough(laxity: Laxity) -> None:
    shards = ",".join(shard["frontend"] for shard in loaded(laxity("status", "--json"))["shards"])
    arguments = ("load", "tm", "--duration", "1s", "--shard", shards)
    result = laxity(*arguments, "--request-rate-range", "30", "--json")
    assert result.exit_code == 0, result.stderr
    step = only_step(result)
    assert step["outcomes"]["ok"] > 0
    assert loaded(result)["gpus"] is step["capacity_rps"] is step["bound_rps"] is None
    relative = laxity(*arguments, "--load", "0.5")
    assert relative.exit_code == 2
    assert "not known with --shard; use --request-rate-range" in " ".join(relative.stderr.split())


def test_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    result = CliRunner().invoke(main, ["load", "tm", *RATE])
    assert result.exit_code == 1
    assert "no cluster 'local' is running here" in result.stderr


def test_ctrl_c_tells_what_was_measured_until_then(runtime: Path, tmp_path: Path) -> None:
    """Pressed once the terminal shows how it goes."""
    here, there = pty.openpty()
    found = tmp_path / "found.json"
    with found.open("wb") as output:
        command = [*COMMAND, "load", "echo", "--request-rate-range", "50", "--duration", "600s", "--json"]
        environment = os.environ | {"XDG_RUNTIME_DIR": str(runtime), "TERM": "xterm", "COLUMNS": "300"}
        process = subprocess.Popen(command, stdin=there, stdout=output, stderr=there, env=environment)
    os.close(there)
    shown = b""
    while b"in flight" not in shown:
        shown += os.read(here, 65536)
    process.send_signal(signal.SIGINT)
    try:
        while os.read(here, 65536):
            pass
    except OSError:
        pass  # the other side is closed
    assert process.wait(30) == 130
    os.close(here)
    assert b"/s offered" in shown
    (step,) = json.loads(found.read_text())["steps"]
    assert step["interrupted"]
    assert step["submitted"] == step["outcomes"]["ok"] > 0
    assert step["seconds"] < 600


def test_capacity_by_what_gpus_hold() -> None:
    tm = load_spec("tm")
    stages = [Held("tm", stage) for stage in tm.stages]
    first, second, third = stages

    def carried(spec: Any, held: list[list[Held]]) -> float | None:
        return Target("", {"tm": spec}, held).capacity({"tm": 1.0})

    own = dict(zip(tm.stages, (2, 1, 1), strict=True))
    assert carried(tm, [[first], [second], [first], [third]]) == capacity(tm, own)
    assert carried(tm, [stages] * 3) == pool_capacity([tm], [1.0], 3)
    measured = msgspec.structs.replace(
        tm, stages=tm.stages | {third.stage: msgspec.structs.replace(tm.stages[third.stage], profile=None)}
    )
    assert carried(measured, [[first], [second], [third]]) is None
    lv = load_spec("lv")
    both = Target("", {"tm": tm, "lv": lv}, [[one] for one in (*stages, *(Held("lv", stage) for stage in lv.stages))])
    alone = {spec.name: capacity(spec, dict.fromkeys(spec.stages, 1)) for spec in (tm, lv)}
    assert both.capacity({"tm": 0.25, "lv": 0.75}) == min(alone["tm"] / 0.25, alone["lv"] / 0.75)


def test_payloads(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    (tmp_path / "c.json").write_text('{"data": [7, {"x": [{"b64": "aGk="}]}]}')
    assert payloads("tm", [str(tmp_path)], None, 1) == ["a text", b"\0\1", 7, {"x": [b"hi"]}]
    assert payloads("tm", ["zero"], 5, 1) == [bytes(5)]
    (random,) = payloads("tm", [], 100, 1)
    assert len(random) == 100
    assert payloads("tm", ["random"], 100, 1) == [random] != payloads("tm", ["random"], 100, 2)
    for name in ("ocr", "classify"):
        pytest.importorskip("PIL")
        assert all(value.startswith(b"\x89PNG") for value in payloads(name, [], None, 1))
    assert payloads("ocr", [], 5, 1) != payloads("ocr", [], None, 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"data": 5}', '{"data": []}', '{"data": [{"b64": "é"}]}'])
def test_payloads_that_are_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(Exception, match=r"bad.json holds no payloads: "):
        payloads("tm", [str(file)], None, 1)


def run_against(peer: Any, count: int, payload: Any, act: Callable[[StepTally, Generator], None]) -> StepTally:
    """Send requests to a shard that ``act`` drives by hand."""
    tally = StepTally(1)
    with Client(peer.url) as client:
        generator = Generator(ClientPort(client), Mix([Kind("echo")], {"echo": [payload]}, 1), 100)
        arrivals = prepare("constant", seconds=0.03).draw(count / 0.03, 1)
        sender = threading.Thread(target=generator.open_loop, args=(arrivals, tally, lambda _: False))
        sender.start()
        act(tally, generator)
        sender.join(30)
        assert not sender.is_alive()
        assert generator.in_flight == 0
    return tally


def test_requests_are_sent_whatever_the_answers_do(peer: Any) -> None:
    """The shard answers nothing before it has every request; then each kind of end is counted."""

    def act(tally: StepTally, generator: Generator) -> None:
        peer.welcome()
        incoming = peer.requests(6)
        assert generator.in_flight == 6
        peer.refuse(incoming[0], Outcome.DROPPED, stage="echo")
        peer.refuse(incoming[1], Outcome.EXPIRED, stage="echo")
        peer.refuse(incoming[2], Outcome.REJECTED, detail="queue full")
        peer.refuse(incoming[3], Outcome.REJECTED, detail="another reason")
        for one in incoming[4:]:
            peer.answer(one, b"x")

    tally = run_against(peer, 6, b"x", act)
    (whole,) = tally.of_intervals()
    outcomes = Counter({outcome: count for outcome, count in whole.outcomes.items() if count})
    assert outcomes == {Outcome.OK: 2, Outcome.DROPPED: 1, Outcome.EXPIRED: 1, Outcome.REJECTED: 2}
    assert whole.ends["", Outcome.REJECTED].detail == "queue full"
    assert whole.ends["echo", Outcome.DROPPED].count == whole.ends["echo", Outcome.EXPIRED].count == 1
    assert (tally.submitted, whole.unsent, whole.latency.count, tally.lag.count) == (6, 0, 2, 6)


def test_what_the_client_refuses_is_counted(peer: Any) -> None:
    with Client(peer.url) as client:
        peer.welcome(max_payload=4)
        client.wait_ready()
        tally = StepTally(1)
        generator = Generator(ClientPort(client), Mix([Kind("echo")], {"echo": [b"more than four"]}, 1), 100)
        generator.open_loop(prepare("constant", seconds=0.01).draw(200.0, 1), tally, lambda _: False)
    (whole,) = tally.of_intervals()
    assert whole.outcomes[Outcome.REJECTED] == tally.submitted == 2
    assert "the shard takes 4 at most" in whole.ends["", Outcome.REJECTED].detail
