"""Plain data to a :class:`PipelineSpec`, field by field, so that everything wrong is told at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

import msgspec

from pipelines.duration import parse_duration
from pipelines.fields import COST_FIELDS, PIPELINE_FIELDS, PROFILE_FIELDS, STAGE_FIELDS, Field
from pipelines.problems import Problem, SpecPath
from pipelines.spec import Cost, Name, PipelineSpec, Profile, Reference, StageSpec

_FIELDS: dict[type[msgspec.Struct], dict[str, Field]] = {
    PipelineSpec: PIPELINE_FIELDS,
    StageSpec: STAGE_FIELDS,
    Profile: PROFILE_FIELDS,
    Cost: COST_FIELDS,
}


class Converted:
    """What could be made of the data.

    ``spec`` is None where there are no stages to speak of; otherwise fields that are wrong have a stand-in in it
    and stand in ``bad``, so that the rest can be validated nevertheless.
    """

    def __init__(self) -> None:
        self.spec: PipelineSpec | None = None
        self.problems: list[Problem] = []
        self.bad: set[SpecPath] = set()

    def report(self, path: SpecPath, message: str, advice: str, bad: SpecPath | None = None) -> None:
        """Note a problem; ``bad`` is the field with a stand-in, where that is not the path itself."""
        self.problems.append(Problem(path, message, advice))
        self.bad.add(path if bad is None else bad)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that ``name`` was probably meant to be."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def convert_spec(value: Any) -> Converted:
    """Convert a file's value."""
    result = Converted()
    if value is None:
        result.report((), "the file is empty", "write name, slo, stages and output; see `laxity pipeline schema`")
        return result
    if not isinstance(value, dict):
        advice = "write a mapping of name, slo, stages and output"
        result.report((), f"the file holds {_kind(value)}, not a mapping", advice)
        return result
    value = dict(value)
    for name, is_set in (("root", "is the directory of the file itself"), ("content", "is found out by itself")):
        if name in value:
            result.report((name,), f"{name} {is_set}", "remove it")
            del value[name]
    raw_stages = value.pop("stages", None)
    raw_slo = value.pop("slo", None)
    fields = _fields(result, PipelineSpec, value, (), skip={"stages", "slo", "root", "content"})
    fields["slo"] = _slo(result, raw_slo)
    stages = _stages(result, raw_stages)
    if stages:
        stand_ins = {"name": "unnamed", "output": next(iter(stages))}
        result.spec = PipelineSpec(**{**stand_ins, **fields}, stages=stages)
    return result


def _slo(result: Converted, value: Any) -> float:
    if value is None:
        result.report(("slo",), "slo is missing", _write(PIPELINE_FIELDS["slo"]))
    else:
        try:
            return parse_duration(value)
        except ValueError as error:
            message, _, advice = str(error).partition("; ")
            result.report(("slo",), message, advice)
    return 1.0


def _stages(result: Converted, value: Any) -> dict[str, StageSpec]:
    if not isinstance(value, dict) or not value:
        wrong = "stages is missing" if value is None else "stages is no mapping with one stage at least"
        result.report(("stages",), wrong, _write(PIPELINE_FIELDS["stages"]))
        return {}
    stages: dict[str, StageSpec] = {}
    for name, raw in value.items():
        path: SpecPath = ("stages", name)
        if _problem_with(name, Name) is not None:
            advice = "use lower-case letters, digits, '-' and '_', a letter first"
            result.report(path, f"{name!r} is no name for a stage", advice)
        if isinstance(raw, dict):
            fields = _fields(result, StageSpec, raw, path)
            stages[str(name)] = StageSpec(**{"executor": "emulated", **fields})
        else:
            result.report(path, f"a stage is a mapping, not {_kind(raw)}", _write(PIPELINE_FIELDS["stages"]))
            stages[str(name)] = StageSpec(executor="emulated")
    return stages


def _fields(
    result: Converted,
    kind: type[msgspec.Struct],
    value: Mapping[str | int, Any],
    path: SpecPath,
    skip: Iterable[str] = (),
) -> dict[str, Any]:
    """The good fields of a struct; the others are reported."""
    known = {field.name: field for field in msgspec.structs.fields(kind) if field.name not in skip}
    descriptions = _FIELDS[kind]
    for name in value:
        if name not in known:
            near = nearest(str(name), descriptions)
            advice = f"write {near!r}" if near else f"use one of {', '.join(descriptions)}"
            result.problems.append(Problem((*path, name), f"unknown field {name!r}", advice))
            if near and near not in value:  # or its absence would be told as a second problem
                result.bad.add((*path, near))
    fields: dict[str, Any] = {}
    for name, field in known.items():
        here = (*path, name)
        if name not in value:
            if field.required and here not in result.bad:
                result.report(here, f"{name} is missing", _write(descriptions[name]))
        elif field.type == Profile | None and isinstance(value[name], dict):
            fields[name] = Profile(**_fields(result, Profile, value[name], here))
        elif field.type == Cost | None and isinstance(value[name], dict):
            fields[name] = Cost(**_fields(result, Cost, value[name], here))
        else:
            # A lone output is typed as any text in the struct, see there.
            kind_here = Reference if name == "output" and isinstance(value[name], str) else field.type
            problems = list(_problems(value[name], kind_here, here, descriptions[name]))
            if problems:
                result.problems.extend(problems)
                result.bad.add(here)
            else:
                fields[name] = msgspec.convert(value[name], field.type)
    return fields


def _problems(value: Any, kind: Any, path: SpecPath, field: Field) -> Iterable[Problem]:
    """What keeps ``value`` from being of a field's type: item by item where it is a list or mapping."""
    message = _problem_with(value, kind)
    if message is None:
        return
    told = False
    parts: Iterable[tuple[str | int, Any]] = ()
    inside = " - at `$" in message
    if inside and isinstance(value, dict):
        parts = [(key, {key: item}) for key, item in value.items()]
    elif inside and isinstance(value, list):
        parts = [(index, [item]) for index, item in enumerate(value)]
    for key, part in parts:
        wrong = _problem_with(part, kind)
        if wrong is not None:
            told = True
            shown = part[key] if isinstance(part, dict) else part[0]
            yield Problem((*path, key), _told(shown, wrong), _write(field))
    if not told:
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        near = nearest(value, choices) if isinstance(value, str) else None
        yield Problem(path, _told(value, message), f"write {near!r}" if near else _write(field))


def _problem_with(value: Any, kind: Any) -> str | None:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        return str(error)
    return None


def _told(value: Any, message: str) -> str:
    if "regex" in message or "enum" in message:
        return f"{value!r} does not fit here"
    message = re.sub(r" - at `[^`]*`$", "", message).replace("`", "")
    return message[0].lower() + message[1:]


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "a boolean", dict: "a mapping"}.get(type(value), f"{value!r}")


def _write(field: Field) -> str:
    return f"write for instance `{field.example}` ({field.description.rstrip('.')})"
