"""What is served: pipeline specs, their graphs and latency profiles, and the pipelines that come with the package."""

from pipelines.duration import format_duration, parse_duration
from pipelines.graph import Graph
from pipelines.load import load_spec, parse_spec, shipped_pipelines
from pipelines.models import ModelNotFoundError, resolve_model_file
from pipelines.problems import Problem, SpecError
from pipelines.profile import LatencyProfile
from pipelines.schema import json_schema
from pipelines.spec import REQUEST, Cost, PipelineSpec, Profile, StageSpec
from pipelines.usercode import UserCodeError, load_object
from pipelines.validate import missing_files, validate

__all__ = [
    "REQUEST",
    "Cost",
    "Graph",
    "LatencyProfile",
    "ModelNotFoundError",
    "PipelineSpec",
    "Problem",
    "Profile",
    "SpecError",
    "StageSpec",
    "UserCodeError",
    "format_duration",
    "json_schema",
    "load_object",
    "load_spec",
    "missing_files",
    "parse_duration",
    "parse_spec",
    "resolve_model_file",
    "shipped_pipelines",
    "validate",
]
