"""Telemetry read again: rows, what is wrong with files, and what rows say together."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from cli.main import main
from cli.quantiles import ERROR, Quantiles
from cli.telemetry_rows import KINDS, Files, Filter
from cli.telemetry_summary import BUCKETS, Summary, Timeline
from cluster.telemetry import ActionRow, ActionTelemetry, RequestRow, RequestTelemetry


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["telemetry", *arguments])


def action(**fields: Any) -> ActionRow:
    values: dict[str, Any] = {
        "at": 1000.0,
        "agent": "a",
        "device": 0,
        "kind": "INFER",
        "model": "p@1/s",
        "action": 1,
        "batch": 1,
        "expected_start_us": 100,
        "expected_us": 1000,
        "earliest_us": 0,
        "latest_us": 5000,
        "start_us": 100,
        "duration_us": 1000,
        "input_us": 0,
        "output_us": 0,
        "code": "ok",
        "memory_mb": 0.0,
    }
    return ActionRow(**values | fields)


def request(**fields: Any) -> RequestRow:
    values: dict[str, Any] = {
        "at": 1000.0,
        "shard": "s",
        "client": "c",
        "id": 1,
        "pipeline": "p",
        "slo_us": 100_000,
        "budget_us": 100_000,
        "latency_us": 50_000,
        "outcome": "ok",
        "met": 1,
        "cold": 0,
    }
    return RequestRow(**values | fields)


def summary(rows: list[ActionRow | RequestRow]) -> dict[str, Any]:
    found = Summary()
    for row in rows:
        found.add(row)
    return found.described()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What an agent and a shard left there."""
    written = tmp_path / "telemetry"
    actions, requests = ActionTelemetry(str(written), "agent-0"), RequestTelemetry(str(written), "shard-0")
    at = time.monotonic()
    for number in range(10):
        start = -1 if number == 9 else 50
        code = "too_late" if number == 9 else "ok"
        detail = 'said "no", and\nmore'
        actions.ended(
            at + number, 1, "INFER", "ocr@1/detect", number, 4, "shard-0", 40, 2000, 0, 90, start, 2100, 5, 6, code,
            12.5, detail,
        )  # fmt: skip
        pipeline, outcome = "ocr" if number else "lv", "dropped" if number == 9 else "ok"
        met = int(number < 9)
        requests.ended(at + number, "c", 2**63 + number, pipeline, 10**5, 10**5, 4000, outcome, met, "", 0, "")
    for telemetry in (actions, requests):
        telemetry.start()
        telemetry.stop()
    return written


def json_rows(*arguments: str) -> list[dict[str, Any]]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_rows_are_read_as_they_were_written(directory: Path) -> None:
    rows = json_rows(str(directory), "actions")
    assert [row["action"] for row in rows] == list(range(10))
    assert rows[0] | {"at": 0} == {
        "at": 0,
        "agent": "agent-0",
        "device": 1,
        "kind": "INFER",
        "model": "ocr@1/detect",
        "action": 0,
        "batch": 4,
        "shard": "shard-0",
        "expected_start_us": 40,
        "expected_us": 2000,
        "earliest_us": 0,
        "latest_us": 90,
        "start_us": 50,
        "duration_us": 2100,
        "input_us": 5,
        "output_us": 6,
        "code": "ok",
        "memory_mb": 12.5,
        "detail": 'said "no", and more',
        "lost": 0,
    }
    assert rows[9]["start_us"] is None
    assert json_rows(str(directory), "requests")[3]["id"] == 2**63 + 3


def test_rows_are_chosen_by_model_pipeline_outcome_time_and_number(directory: Path) -> None:
    place = str(directory)
    assert len(json_rows(place, "actions", "--model", "detect")) == 10
    assert json_rows(place, "actions", "--model", "recognize") == []
    assert len(json_rows(place, "actions", "--outcome", "too_late")) == 1
    assert len(json_rows(place, "requests", "--pipeline", "ocr")) == 9
    assert [row["id"] - 2**63 for row in json_rows(place, "requests", "--pipeline", "ocr", "--limit", "2")] == [8, 9]
    assert len(json_rows(place, "requests", "--since", "60m")) == 10
    assert json_rows(place, "requests", "--since", "2100-01-01T00:00") == []
    found = json.loads(run(place, "--pipeline", "lv", "--json").stdout)
    assert [one["pipeline"] for one in found["requests"]] == [None, "lv"]
    assert found["actions"] == []


def test_rows_and_their_summary_are_shown_as_tables(directory: Path) -> None:
    lines = run(str(directory), "actions").stdout.splitlines()
    assert len(lines) == 11
    assert lines[0].split()[:4] == ["time", "device", "kind", "model"]
    assert "agent-0/1" in lines[1]
    assert "too_late" in lines[10]
    shown = run(str(directory)).stdout
    assert "ok 9, too_late 1" in shown
    assert "dropped 1" in shown
    assert "12.5" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "there is no nowhere"),
        ((".", "--follow"), "--follow is for rows"),
        ((".", "summary", "--limit", "3"), "--limit is for rows"),
        ((".", "--since", "soon"), "neither a duration such as 5m nor a time"),
        ((), "Missing argument"),
    ],
)
def test_wrong_use_is_told(arguments: tuple[str, ...], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.output


def test_a_directory_without_rows_says_how_to_get_some(tmp_path: Path) -> None:
    result = run(str(tmp_path))
    assert result.exit_code == 1
    assert "laxity up ... --telemetry DIR" in result.output


def test_what_cannot_be_read_is_counted_and_the_rest_is_shown(directory: Path) -> None:
    (path,) = directory.glob("requests-*")
    whole = path.read_bytes().splitlines(keepends=True)
    broken = [
        b"nonsense\n",
        b"\n",
        b"\xff\xfe\0\n",
        whole[2].replace(b"4000", b"soon"),
        whole[2][:-4] + b'"open\n',
        whole[2][:20],
    ]
    path.write_bytes(b"".join([*whole, *broken]))
    (directory / "requests-other-20260101T000000.000000Z.csv").write_text("a,b\n1,2\n")
    (directory / "requests-empty-20260101T000000.000000Z.csv").write_text("")
    (directory / "notes.txt").write_text("not ours")
    found = json.loads(run(str(directory), "--json").stdout)
    assert found["requests"][0]["count"] == 10
    assert (found["malformed_lines"], found["unfinished_files"]) == (5, 1)
    assert [Path(name).name for name in found["unknown_files"]] == ["requests-other-20260101T000000.000000Z.csv"]
    result = run(str(directory), "requests")
    assert len(result.stdout.splitlines()) == 11
    assert "5 lines could not be read, the first at" in result.stderr
    assert f"{path.name}:12: 1 fields, the head has" in result.stderr


def test_files_of_several_processes_and_runs_are_merged_by_time(tmp_path: Path) -> None:
    for number, who in enumerate(("b", "a", "a")):
        telemetry = RequestTelemetry(str(tmp_path), who)
        for step in range(3):
            telemetry.ended(100.0 + step + number / 10, "c", 10 * step + number, "p", 1, 1, 1, "ok", 1, "", 0, "")
        telemetry.start()
        telemetry.stop()
    files = Files([tmp_path], KINDS)
    assert len(list(tmp_path.iterdir())) == 3
    merged = [row.id for row in files.rows_by_time() if isinstance(row, RequestRow)]
    assert sorted(merged) == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    of_b = [number for number in merged if number % 10 == 0]
    assert of_b == [0, 10, 20]
    assert list(files.rows()) == []


def test_added_rows_and_files_are_followed(tmp_path: Path) -> None:
    def write(first: int) -> None:
        telemetry = RequestTelemetry(str(tmp_path), "s")
        for number in range(first, first + 3):
            telemetry.ended(100.0 + number, "c", number, "p", 1, 1, 1, "ok", 1, "", 0, "")
        telemetry.start()
        telemetry.stop()

    def ids(rows: Iterator[Any], count: int) -> list[int]:
        return [next(rows).id for _ in range(count)]

    write(0)
    files = Files([tmp_path], ["requests"])
    assert ids(files.rows(), 3) == [0, 1, 2]
    (path,) = tmp_path.iterdir()
    line = path.read_bytes().splitlines(keepends=True)[-1].replace(b",2,", b",7,")
    with path.open("ab") as file:
        file.write(line[:10])
    assert list(files.rows()) == []
    with path.open("ab") as file:
        file.write(line[10:])
    write(10)
    followed = files.follow()
    assert ids(followed, 4) == [7, 10, 11, 12]
    path.unlink()
    write(20)
    assert ids(followed, 3) == [20, 21, 22]
    files.end()
    assert files.troubles.unfinished == 0


def test_predictions_are_told_over_and_under_and_late_starts_are_found() -> None:
    rows: list[ActionRow | RequestRow] = [action(duration_us=900, expected_us=1000) for _ in range(3)]
    rows += [
        action(duration_us=1200),
        action(start_us=5001),
        action(start_us=5000),
        action(code="too_late", start_us=None),
    ]
    total, model = summary(rows)["actions"]
    assert (total["model"], model["model"]) == (None, "p@1/s")
    for found in (total, model):
        assert found["codes"] == {"ok": 6, "too_late": 1}
        assert (found["late_starts"], found["latest_start"]) == (1, 1)
        assert found["over"]["part"] == 0.5
        assert found["over"]["p50"] == pytest.approx(100, rel=2 * ERROR)
        assert found["under"]["p99"] == pytest.approx(200, rel=2 * ERROR)


def test_executions_are_compared_with_their_own_batch_size_and_model() -> None:
    rows: list[ActionRow | RequestRow] = [
        action(model=f"p@1/{stage}", batch=batch, duration_us=1000 * batch * (1 + stage)) for batch in (1, 16)
        for stage in range(3) for _ in range(50)
    ]  # fmt: skip
    rows.append(action(model="p@1/0", duration_us=3000))
    total, *_ = summary(rows)["actions"]
    assert total["p99_over_median"] == pytest.approx(1.0, abs=3 * ERROR)
    assert total["p9999_over_median"] == pytest.approx(3.0, rel=3 * ERROR)


def test_a_batch_that_follows_its_models_load_is_a_miss() -> None:
    def of(model: str, kind: str = "INFER", device: int = 0) -> ActionRow:
        return action(model=model, kind=kind, device=device)

    rows: list[ActionRow | RequestRow] = [
        of("a"), of("a"), of("b", "LOAD"), of("a"), of("b", device=1), of("b"), of("b"), of("b", "UNLOAD"),
    ]  # fmt: skip
    found = {(one["kind"], one["model"]): one["hit_part"] for one in summary(rows)["actions"]}
    assert found["INFER", "a"] == 1.0
    assert found["INFER", "b"] == pytest.approx(2 / 3, abs=1e-5)
    assert found["INFER", None] == pytest.approx(5 / 6, abs=1e-5)
    assert found["LOAD", "b"] is None


def test_outcomes_goodput_and_cold_starts_are_told_by_pipeline() -> None:
    rows: list[ActionRow | RequestRow] = [request(at=1000.0 + number / 10) for number in range(101)]
    rows += [request(pipeline="q", outcome="dropped", met=0, latency_us=1), request(cold=1, latency_us=90_000)]
    total, first, second = summary(rows)["requests"]
    assert (total["count"], first["count"], second["count"]) == (103, 102, 1)
    assert (first["cold"], first["outcomes"]) == (1, {"ok": 102})
    assert first["goodput_rps"] == pytest.approx(10.2)
    assert first["cold_latency"]["p50"] == pytest.approx(90_000, rel=2 * ERROR)
    assert (second["met_part"], second["latency"]["p50"]) == (0.0, None)


def test_the_highest_memory_is_known_over_any_time() -> None:
    timeline = Timeline()
    for second in range(100_000):
        timeline.add(1e9 + second, 7.0 if second == 5000 else 1.0)
    points = list(timeline.points())
    assert BUCKETS / 2 <= len(points) <= BUCKETS
    assert (timeline.most, timeline.at) == (7.0, 1e9 + 5000)
    assert [value for _, value in points].count(7.0) == 1


def test_rows_that_were_lost_are_added_up() -> None:
    assert summary([request(lost=3), action(lost=4), request()])["lost_rows"] == 7


def test_a_filter_takes_everything_unless_told() -> None:
    assert Filter().takes(action())
    assert Filter().takes(request())
    assert not Filter(since=1000.5).takes(request())


@given(st.lists(st.floats(0.0, 1e12), min_size=1, max_size=200), st.floats(0.0, 1.0))
def test_quantiles_are_within_their_error(values: list[float], part: float) -> None:
    quantiles = Quantiles()
    for value in values:
        quantiles.add(value)
    true = sorted(values)[max(math.ceil(part * len(values)), 1) - 1]
    found = quantiles.quantile(part)
    assert found is not None
    assert abs(found - true) <= (1.0 if true < 1.0 else true * ERROR * 1.01)


def test_quantiles_take_others_in_and_stay_small() -> None:
    random_values = random.Random(1)
    one, other = Quantiles(), Quantiles()
    for _ in range(50_000):
        one.add(random_values.lognormvariate(8.0, 2.0))
        other.add(0.0)
    one.merge(other)
    assert (one.count, one.quantile(0.49)) == (100_000, 0.0)
    assert one.quantile(0.75) == pytest.approx(math.exp(8.0), rel=0.05)
    assert len(one._bins) < 20_000
