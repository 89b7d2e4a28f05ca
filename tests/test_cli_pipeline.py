import json
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner, Result

from cli.pipeline import pipeline
from pipelines import load_spec

BAD = """\
name: video
slo: 10ms
stages:
  detect: {executor: emulated, profile: {alpha_ms: 20, beta_ms: 0}}
output: detect
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(pipeline, list(arguments))


@pytest.fixture
def bad(tmp_path: Path) -> str:
    file = tmp_path / "video.yaml"
    file.write_text(BAD)
    return str(file)


def test_validate_good_pipelines() -> None:
    result = run("validate", "da", "echo")
    assert result.exit_code == 0
    assert "420ms" in result.stdout
    assert result.stderr == ""


def test_validate_tells_each_problem_on_a_line_of_its_own(bad: str) -> None:
    result = run("validate", "echo", bad, "gone")
    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first.startswith(f"{bad}:2: slo: no request can meet 10ms")
    assert second.startswith("gone: neither a file nor a shipped pipeline")
    assert "yes" in result.stdout


def test_validate_as_json(bad: str) -> None:
    result = run("validate", "echo", bad, "--json")
    assert result.exit_code == 1
    echo, video = json.loads(result.stdout)
    assert echo == {"spec": "echo", "valid": True, "pipeline": "echo", "problems": []}
    assert video["valid"] is False
    (problem,) = video["problems"]
    assert (problem["file"], problem["line"], problem["path"]) == (bad, 2, "slo")
    assert "20ms" in problem["message"]


def test_show() -> None:
    result = run("show", "da")
    assert result.exit_code == 0
    for text in ("420ms", "expression_recognition", "pose_recognition, face_recognition", "12.84ms", "633ms"):
        assert text in result.stdout
    assert "longest path in batches of 1: 23.67ms (person_detection -> face_recognition -> " in result.stdout


def test_show_as_json_has_the_defaults() -> None:
    result = run("show", "echo", "--json")
    shown = json.loads(result.stdout)
    assert shown["version"] == load_spec("echo").version
    assert shown["stages"]["echo"]["inputs"] == ["request"]
    assert shown["stages"]["echo"]["max_queue"] == 10_000
    assert shown["slo"] == 1.0


def test_show_a_bad_file(bad: str) -> None:
    result = run("show", bad)
    assert result.exit_code == 1
    assert "slo: no request can meet" in result.stderr
    assert result.stdout == ""


def test_schema() -> None:
    result = run("schema")
    assert result.exit_code == 0
    jsonschema.Draft202012Validator.check_schema(json.loads(result.stdout))


@pytest.mark.parametrize("arguments", [["validate"], ["show"], ["show", "lv", "tm"], ["nothing"], ["schema", "--yaml"]])
def test_wrong_use(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("command", ["validate", "show", "schema"])
def test_help_has_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"laxity pipeline {command}" in result.stdout
