"""``laxity profile``, with real workers and models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from cli.main import main
from nodes.meter import BatchTimes, StageTimes
from pipelines.fit import fit_line
from pipelines.load import load_spec

CODE = """
import pathlib
import time

def double(feeds):
    time.sleep(0.002 + 0.001 * len(feeds))
    return [2 * feed["left"] + feed["right"] for feed in feeds]

def pair():
    return {"left": 1, "right": 2}

def text():
    return "a text"

def edits():
    file = pathlib.Path(__file__).parent / "mine.yaml"
    file.write_text(file.read_text() + "# one thing more\\n")
    return pair()

def fail(feeds):
    raise ValueError("this model is broken")

def wrong():
    raise LookupError("no sample today")
"""
SPEC = """# what is served
name: mine
slo: 2s
stages:
  first:  # makes numbers
    executor: python
    model: measured_code:double
    sample: measured_code:pair
    inputs: {left: request, right: request}
    max_batch: 4
  second:
    executor: emulated
    inputs: [first]
    profile: {alpha_ms: 1, beta_ms: 1}
output: second
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], str]:
    (tmp_path / "measured_code.py").write_text(CODE)

    def made(text: str) -> str:
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        return str(file)

    return made


def profile(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["profile", *arguments, "--devices", "cpu", "--repeats", "3"])


def test_a_pipeline_is_measured_written_and_simulated(make: Callable[[str], str], tmp_path: Path) -> None:
    file = make(SPEC)
    report = tmp_path / "report.html"
    result = profile(file, "--write", file, "--html", str(report))
    assert result.exit_code == 0, result.output
    assert "second: it is emulated" in result.stderr
    assert "first on cpu: batch 4" in result.stderr
    assert "most per second" in result.stdout
    # The file is the same with a profile more.
    text = Path(file).read_text()
    assert [line for line in SPEC.splitlines() if line not in text.splitlines()] == []
    stage = load_spec(file).stages["first"]
    assert stage.profile is not None
    latencies = stage.profile.latency_ms
    assert latencies is not None
    assert list(latencies) == [1, 2, 4]
    # Each batch sleeps for 2 ms and 1 ms an element.
    assert all(ms >= 2 + size for size, ms in latencies.items())
    assert stage.profile.by_type["cpu"].latency_ms == latencies
    assert stage.profile.load_ms is not None
    assert load_spec(file).stages["second"].profile == load_spec(make(SPEC)).stages["second"].profile
    assert "first" in report.read_text()
    Path(file).write_text(text)
    simulated = CliRunner().invoke(
        main, ["simulate", file, "--gpus", "2", "--load", "0.5", "--duration", "2s", "--json"]
    )
    assert simulated.exit_code == 0, simulated.output
    (run,) = json.loads(simulated.stdout)
    assert run["goodput_rps"] > 0


def test_json_has_every_size_and_the_profile(make: Callable[[str], str]) -> None:
    result = profile(make(SPEC), "--batches", "2,1,2,64", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (times,) = found["measured"]
    assert [each["batch"] for each in times["batches"]] == [1, 2]
    assert all(each["runs"] == 3 and each["median_s"] <= each["p99_s"] <= each["worst_s"] for each in times["batches"])
    assert set(found["profiles"]["first"]["latency_ms"]) == {"1", "2"}


def test_without_a_file_to_write_the_profile_is_printed(make: Callable[[str], str]) -> None:
    result = profile(make(SPEC), "--stage", "first", "--batches", "1")
    assert result.exit_code == 0, result.output
    assert "first:\nprofile:\n  latency_ms: {1:" in result.stdout


def broken(**fields: str) -> str:
    """SPEC with other fields in its first stage."""
    text = SPEC
    for field, value in fields.items():
        old = next(line for line in text.splitlines() if line.startswith(f"    {field}:"))
        text = text.replace(f"{old}\n", f"    {field}: {value}\n" if value else "", 1)
    return text


@pytest.mark.parametrize(
    ("text", "arguments", "status", "says"),
    [
        (broken(sample=""), [], 2, "add `sample: package.module:function`"),
        (broken(sample="measured_code:text"), [], 1, "must return a dict with 'left', 'right'"),
        (broken(sample="measured_code:wrong"), [], 1, "LookupError: no sample today"),
        (broken(model="measured_code:fail"), [], 1, "this model is broken"),
        (broken(model="measured_code:missing"), [], 1, "has no 'missing'"),
        (SPEC, ["--stage", "second"], 2, "it is emulated, and its profile is what the spec states"),
        (SPEC, ["--stage", "fist"], 2, "did you mean 'first'?"),
        (SPEC, ["--batches", "8"], 2, "its max_batch is 4"),
        (SPEC, ["--batches", "1,x"], 2, "no list of batch sizes"),
        (SPEC, ["--write", "nowhere/mine.yaml"], 2, "no directory"),
    ],
)
def test_what_cannot_be_measured_says_why(
    make: Callable[[str], str], text: str, arguments: list[str], status: int, says: str
) -> None:
    result = profile(make(text), *arguments)
    assert result.exit_code == status, result.output
    assert says in " ".join(result.output.split())


def test_a_file_elsewhere_that_would_miss_its_code_is_not_written(make: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    elsewhere = tmp_path / "other" / "mine.yaml"
    result = profile(make(SPEC), "--batches", "1", "--write", str(elsewhere))
    assert result.exit_code == 2
    assert "would not find measured_code.py" in result.stderr
    assert not elsewhere.exists()


def test_emulated_devices_are_refused(make: Callable[[str], str]) -> None:
    result = CliRunner().invoke(main, ["profile", make(SPEC), "--devices", "emulated:2"])
    assert result.exit_code == 2
    assert "measure on cpu or cuda" in result.output


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ([(1, 3.0), (2, 5.0), (4, 9.0)], (2.0, 1.0, 0.0)),
        ([(4, 2.0)], (0.5, 0.0, 0.0)),
        ([(1, 1.0), (2, 2.0), (3, 4.5)], (1.75, -1.0, 0.25)),
    ],
)
def test_the_line_is_the_nearest(points: list[tuple[int, float]], line: tuple[float, float, float]) -> None:
    fit = fit_line(points)
    assert (fit.alpha, fit.beta, fit.error) == pytest.approx(line)


def test_percentiles() -> None:
    times = BatchTimes(4, [value / 1000 for value in range(200, 0, -1)], [0.0] * 200)
    assert (times.median, times.p99, times.worst) == pytest.approx((0.1005, 0.198, 0.2))
    assert times.throughput == pytest.approx(4 / 0.1005)
    assert BatchTimes(1, [0.3, 0.1], [0.0] * 2).p99 == 0.3


def test_profiles_keep_what_other_types_take_and_only_rise() -> None:
    from cli.profile import measured_profile
    from pipelines.spec import Profile

    def times(device_type: str, latencies: dict[int, float], memory_mb: float) -> StageTimes:
        batches = [BatchTimes(size, [seconds], [0.0]) for size, seconds in latencies.items()]
        return StageTimes("first", device_type, 0.5, memory_mb, batches)

    stated = Profile(alpha_ms=1, beta_ms=2, memory_mb=70, by_type={"T4": Profile(alpha_ms=3, beta_ms=4)})
    found = measured_profile(stated, [times("A100", {1: 0.004, 2: 0.003, 4: 0.006}, 300), times("cpu", {1: 0.2}, 0)])
    own: dict[str, Any] = {"A100": ({1: 4.0, 2: 4.0, 4: 6.0}, 300), "cpu": ({1: 200.0}, 70)}
    for device_type, (latency_ms, memory_mb) in own.items():
        assert found.by_type[device_type] == Profile(latency_ms=latency_ms, load_ms=500, memory_mb=memory_mb)
    assert stated.by_type["T4"] == found.by_type["T4"]
    assert msgspec.structs.replace(found, by_type=stated.by_type) == stated
    found = measured_profile(None, [times("A100", {1: 0.004, 2: 0.003, 4: 0.006}, 300)])
    assert (found.latency_ms, found.memory_mb) == own["A100"]


def test_a_file_that_is_edited_meanwhile_is_left_as_it_is(make: Callable[[str], str]) -> None:
    file = make(SPEC.replace("measured_code:pair", "measured_code:edits"))
    result = profile(file, "--batches", "1", "--write", file)
    assert result.exit_code == 1
    assert "was changed while it was measured" in result.stderr
    assert "latency_ms" in result.stdout
    assert "# one thing more" in Path(file).read_text()
    assert "latency_ms" not in Path(file).read_text()


def test_no_other_file_is_overwritten(make: Callable[[str], str], tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("precious")
    result = profile(make(SPEC), "--write", str(other))
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert other.read_text() == "precious"


def test_a_written_file_keeps_its_mode(make: Callable[[str], str]) -> None:
    file = Path(make(SPEC))
    file.chmod(0o640)
    assert profile(str(file), "--batches", "1", "--write", str(file)).exit_code == 0
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in file.parent.iterdir() if path.name.startswith(".")) == []
