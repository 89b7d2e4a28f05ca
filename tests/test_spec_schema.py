"""The JSON Schema accepts what the loader accepts, as far as a schema can tell."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import pipelines
from pipelines import json_schema
from pipelines.fields import PIPELINE_FIELDS, PROFILE_FIELDS, STAGE_FIELDS

SHIPPED = sorted((Path(pipelines.__file__).parent / "shipped").glob("*.yaml"))


def is_valid(value: object) -> bool:
    return bool(jsonschema.Draft202012Validator(json_schema()).is_valid(value))


def good() -> dict[str, Any]:
    stage = {"executor": "emulated", "profile": {"alpha_ms": 1, "beta_ms": 2}, "inputs": ["request.image"]}
    return {"name": "video", "slo": "400ms", "stages": {"detect": stage}, "output": "detect.boxes"}


def test_it_is_a_schema_and_describes_every_field() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "$id" not in schema
    for fields, definition in (
        (PIPELINE_FIELDS, schema),
        (STAGE_FIELDS, schema["$defs"]["StageSpec"]),
        (PROFILE_FIELDS, schema["$defs"]["Profile"]),
    ):
        assert set(definition["properties"]) == set(fields)
        assert all(definition["properties"][name]["description"] == fields[name].description for name in fields)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_pipelines_are_valid(file: Path) -> None:
    assert is_valid(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"slo": 5},
        {"slo": 1.5},
        {"slo": "1m"},
        {"output": {"boxes": "detect.boxes"}},
        {"description": "text"},
        {"stages": {"a": {"executor": "onnx", "model": "a.onnx", "inputs": {"x": "request"}, "map": True}}},
        {"stages": {"a": {"executor": "triton", "model": "resnet", "options": {"url": "gpu-7:8001"}}}},
    ],
)
def test_good_values(change: dict[str, Any]) -> None:
    assert is_valid({**good(), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"slo": "soon"},
        {"slo": 0},
        {"slo": True},
        {"name": "Video"},
        {"nam": "x"},
        {"root": "/tmp"},
        {"output": "Detect!"},
        {"output": 3},
        {"stages": {}},
        {"stages": {"request": good()["stages"]["detect"]}},
        {"stages": {"A": good()["stages"]["detect"]}},
        {"stages": {"a": {"executor": "emulated"}}},
        {"stages": {"a": {"executor": "onnx"}}},
        {"stages": {"a": {"executor": "gpu", "model": "a"}}},
        {"stages": {"a": {"executor": "python", "model": "a:b", "before": "no colon"}}},
        {"stages": {"a": {"executor": "python", "model": "a:b", "max_batch": 0}}},
        {"stages": {"a": {"executor": "python", "model": "a:b", "inputs": "request"}}},
        {"stages": {"a": {"executor": "emulated", "profile": {"alpha_ms": 1}}}},
        {"stages": {"a": {"executor": "emulated", "profile": {"latency_ms": {"1": -3}}}}},
        {"stages": {"a": {"executor": "emulated", "profile": {"alpha_ms": 1, "beta_ms": 1, "latency_ms": {"1": 3}}}}},
    ],
)
def test_bad_values(change: dict[str, Any]) -> None:
    assert not is_valid({**good(), **change})


@pytest.mark.parametrize("missing", ["name", "slo", "stages", "output"])
def test_required_fields(missing: str) -> None:
    value = good()
    del value[missing]
    assert not is_valid(value)
