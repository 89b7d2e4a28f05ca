"""The JSON Schema of pipeline files, for editors and for checks in other languages."""

from __future__ import annotations

from typing import Any

import msgspec

from pipelines.duration import DURATION_PATTERN
from pipelines.fields import COST_FIELDS, PIPELINE_FIELDS, PROFILE_FIELDS, STAGE_FIELDS
from pipelines.spec import MAX_BUCKETS, REQUEST, PipelineSpec


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what a pipeline file holds. What refers from one place of the file to another
    (stages, files, the SLO against the profile) is for ``laxity pipeline validate``."""
    (_, components) = msgspec.json.schema_components([PipelineSpec])
    definitions: dict[str, Any] = components
    pipeline = definitions.pop("PipelineSpec")
    stage, profile, cost = definitions["StageSpec"], definitions["Profile"], definitions["Cost"]
    del pipeline["properties"]["root"], pipeline["properties"]["content"]  # are set when it is read and applied
    pipeline["properties"]["slo"] = {
        "anyOf": [{"type": "string", "pattern": DURATION_PATTERN}, {"type": "number", "exclusiveMinimum": 0}]
    }
    lone, named = pipeline["properties"]["output"]["anyOf"]
    lone.update(named["additionalProperties"])
    stages = pipeline["properties"]["stages"]
    stages["minProperties"] = 1
    stages["propertyNames"]["not"] = {"const": REQUEST}
    stage["properties"]["inputs"]["default"] = [REQUEST]
    _require_by_executor(stage)
    profile["oneOf"] = [{"required": ["alpha_ms", "beta_ms"]}, {"required": ["latency_ms"]}]
    cost["required"] = ["buckets"]
    cost["properties"]["buckets"].update(minItems=2, maxItems=MAX_BUCKETS, uniqueItems=True)
    described = ((pipeline, PIPELINE_FIELDS), (stage, STAGE_FIELDS), (profile, PROFILE_FIELDS), (cost, COST_FIELDS))
    for definition, fields in described:
        definition["description"] = " ".join(definition["description"].split())
        for name, field in fields.items():
            definition["properties"][name]["description"] = field.description
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **pipeline, "$defs": definitions}


def _require_by_executor(stage: dict[str, Any]) -> None:
    stage["if"] = {"properties": {"executor": {"const": "emulated"}}}
    stage["then"] = {"required": ["profile"]}
    stage["else"] = {"required": ["model"]}
