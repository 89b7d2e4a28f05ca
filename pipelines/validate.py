"""What types alone cannot tell of a spec: references, cycles, models, profiles, the SLO."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import msgspec

from pipelines.convert import nearest
from pipelines.duration import format_duration
from pipelines.files import MAX_PATH, FilesError, matching, wrong_pattern
from pipelines.graph import Graph, stage_parents
from pipelines.models import ModelNotFoundError, code_references, is_address, is_model_file, resolve_model_file
from pipelines.policies import PolicyError, parse_policy
from pipelines.problems import Problem, SpecPath
from pipelines.profile import LatencyProfile
from pipelines.spec import MAX_BUCKETS, REQUEST, Cost, PipelineSpec, Profile, StageSpec, split_reference
from pipelines.usercode import UserCodeError, check_reference

_ADDRESS = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\[\]]+)(:\d{1,5})?/[!-~]*")
"""An http(s) address: without a password, which would lie in the store, and with what is not ASCII escaped."""

_TRITON_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)


def validate(spec: PipelineSpec, bad: Collection[SpecPath] = ()) -> list[Problem]:
    """Everything that is wrong with the spec as such; the file system is not looked at.

    ``bad`` are the fields that hold a stand-in because they could not be read: rules that depend on them are left
    out. With the default, an empty list means that the spec is sound.
    """
    problems = [*_names(spec), *_references(spec, bad)]
    graph_known = not problems and not any(_shapes_graph(path) for path in bad)
    cycles = list(_cycles(spec))
    profiles = [problem for stage in spec.stages for problem in _stage(spec, stage, bad)]
    problems += cycles + profiles
    if ("policy",) not in bad:
        problems += _policy(spec)
    problems += _files(spec)
    if graph_known and not cycles:
        problems += _unreachable(spec)
        if not profiles and not any("slo" in path or "profile" in path for path in bad):
            problems += _slo(spec)
    return problems


def missing_files(spec: PipelineSpec, bad: Collection[SpecPath] = ()) -> list[Problem]:
    """The model files and modules of user code that are not there. Nothing is imported or opened."""
    problems: list[Problem] = []
    for name, stage in spec.stages.items():
        if stage.executor == "emulated":
            continue
        for field, reference in code_references(stage).items():
            path: SpecPath = ("stages", name, field)
            try:
                if reference is not None and path not in bad:
                    check_reference(reference, spec.root)
            except UserCodeError as error:
                problems.append(Problem(path, error.message, error.advice))
        if is_model_file(stage) and not is_address(stage.model or ""):
            try:
                resolve_model_file(spec, name)
            except ModelNotFoundError as error:
                problems.append(Problem(("stages", name, "model"), error.message, error.advice))
    for index, pattern in enumerate(spec.files):
        try:
            if ("files",) not in bad and wrong_pattern(pattern) is None:
                matching(Path(spec.root), pattern)
        except FilesError as error:
            problems.append(Problem(("files", index), error.message, error.advice))
    return problems


def _shapes_graph(path: SpecPath) -> bool:
    return path == ("output",) or (path[:1] == ("stages",) and (len(path) < 3 or path[2] in ("inputs", "map")))


def _names(spec: PipelineSpec) -> Iterator[Problem]:
    if REQUEST in spec.stages:
        yield Problem(("stages", REQUEST), "'request' stands for the request's own payload", "rename the stage")


def _policy(spec: PipelineSpec) -> Iterator[Problem]:
    try:
        parse_policy(spec.policy)
    except PolicyError as error:
        yield Problem(("policy",), str(error), "write for example `policy: laxity`, or leave it out")


def _files(spec: PipelineSpec) -> Iterator[Problem]:
    for index, pattern in enumerate(spec.files):
        wrong = wrong_pattern(pattern)
        if wrong is not None:
            yield Problem(("files", index), *wrong)


def _input_references(spec: PipelineSpec) -> Iterator[tuple[SpecPath, str, StageSpec]]:
    """(path, reference, stage) of every input."""
    for name, stage in spec.stages.items():
        named = enumerate(stage.inputs) if isinstance(stage.inputs, list) else stage.inputs.items()
        for key, reference in named:
            yield ("stages", name, "inputs", key), reference, stage


def _output_references(spec: PipelineSpec) -> Iterator[tuple[SpecPath, str]]:
    if isinstance(spec.output, str):
        yield ("output",), spec.output
    else:
        for name, reference in spec.output.items():
            yield ("output", name), reference


def _references(spec: PipelineSpec, bad: Collection[SpecPath]) -> Iterator[Problem]:
    inputs = [entry for entry in _input_references(spec) if entry[0][:3] not in bad]
    everything = [(path, reference) for path, reference, _ in inputs]
    if ("output",) not in bad:
        everything += _output_references(spec)
        if not spec.outputs():
            yield Problem(("output",), "the output is empty", "refer to one stage at least, as in `output: recognize`")
    for path, reference in everything:
        source, field = split_reference(reference)
        if source not in spec.stages and source != REQUEST:
            near = nearest(source, [*spec.stages, REQUEST])
            known = f"write {near!r}" if near else f"use one of {', '.join([REQUEST, *spec.stages])}"
            yield Problem(path, f"there is no stage {source!r}", known)
        elif field and source in spec.stages and spec.stages[source].map:
            yield Problem(
                path,
                f"{source!r} is a map stage, its answer is a list and has no field {field!r}",
                f"write {source!r}",
            )
    yield from _input_counts(spec, bad)
    yield from _lists_and_fields(everything, [(path, ref) for path, ref, stage in inputs if stage.map])


def _input_counts(spec: PipelineSpec, bad: Collection[SpecPath]) -> Iterator[Problem]:
    for name, stage in spec.stages.items():
        path: SpecPath = ("stages", name, "inputs")
        if path in bad:
            continue
        if not stage.inputs:
            yield Problem(path, "a stage without inputs never runs", "write `inputs: [request]` or name a stage")
        elif stage.map and len(stage.inputs) != 1:
            yield Problem(
                path,
                f"a map stage has one input, the list of its items, and this one has {len(stage.inputs)}",
                "make the items in an earlier stage, and name that stage's field alone",
            )
        elif len(stage.named_inputs()) < len(stage.inputs):
            yield Problem(path, "a reference is listed twice", "list it once, or write a mapping of names")


def _lists_and_fields(everything: list[tuple[SpecPath, str]], mapped: list[tuple[SpecPath, str]]) -> Iterator[Problem]:
    """One answer cannot be a list, for a map stage, and have fields as well."""
    with_fields = {split_reference(reference)[0]: reference for _, reference in everything if "." in reference}
    for path, reference in mapped:
        if reference in with_fields:
            yield Problem(
                path,
                f"a map stage takes {reference!r} as a list, and {with_fields[reference]!r} is a field of it",
                f"put the items into a field, as in '{reference}.items'",
            )


def _cycles(spec: PipelineSpec) -> Iterator[Problem]:
    parents = stage_parents(spec)
    while True:
        try:
            TopologicalSorter(parents).prepare()
            return
        except CycleError as error:
            cycle: list[str] = error.args[1]
        yield Problem(
            ("stages", cycle[-1], "inputs"),
            f"the stages feed one another in a cycle: {' -> '.join(cycle)}",
            "take one of these inputs away",
        )
        parents = {
            name: tuple(parent for parent in before if parent not in cycle)
            for name, before in parents.items()
            if name not in cycle
        }


def _unreachable(spec: PipelineSpec) -> Iterator[Problem]:
    parents = stage_parents(spec)
    used: set[str] = set()
    found = [source for source, _ in spec.outputs().values() if source in spec.stages]
    while found:
        name = found.pop()
        if name not in used:
            used.add(name)
            found.extend(parents[name])
    for name in spec.stages:
        if name not in used:
            yield Problem(
                ("stages", name),
                f"the output does not depend on {name!r}",
                f"refer to it in `output` or in a stage's inputs, or remove it (output: {spec.output!r})",
            )


def _stage(spec: PipelineSpec, name: str, bad: Collection[SpecPath]) -> Iterator[Problem]:
    stage, path = spec.stages[name], ("stages", name)
    if path in bad and stage == StageSpec(executor="emulated"):
        return
    profile_known = not any(known[:3] == (*path, "profile") for known in bad)
    if (*path, "executor") not in bad:
        if stage.executor == "emulated" and stage.profile is None and profile_known:
            yield Problem(
                path,
                "an emulated stage needs a profile",
                "write `profile: {alpha_ms: 1.5, beta_ms: 4}` or `profile: {latency_ms: {1: 5.5, 8: 16}}`",
            )
        if stage.executor != "emulated" and (*path, "model") not in bad:
            yield from _model(stage, path)
    if stage.profile is not None and profile_known:
        for field, message, advice in _profile(stage.profile):
            yield Problem((*path, "profile", *field), message, advice)
    if stage.cost is not None and not any(known[:3] == (*path, "cost") for known in bad):
        inputs = list(stage.named_inputs()) if (*path, "inputs") not in bad else [stage.cost.input]
        for field, message, advice in _cost(stage.cost, inputs):
            yield Problem((*path, "cost", *field), message, advice)


def _cost(cost: Cost, inputs: list[str]) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    """(path inside the cost, message, advice) of everything wrong with it."""
    if not 2 <= len(cost.buckets) <= MAX_BUCKETS:
        message = f"{len(cost.buckets)} buckets; a cost has 2 to {MAX_BUCKETS}"
        yield ("buckets",) if cost.buckets else (), message, "write for instance `buckets: [160, 320, 640]`"
    for index in range(1, len(cost.buckets)):
        before, bound = cost.buckets[index - 1 : index + 1]
        if bound <= before:
            yield ("buckets", index), f"{bound} stands behind {before}", "write the buckets' largest sizes ascending"
    if cost.input and cost.input not in inputs:
        near = nearest(cost.input, inputs)
        advice = f"write {near!r}" if near else f"use one of {', '.join(inputs)}"
        yield ("input",), f"the stage has no input {cost.input!r}", advice
    elif len(inputs) > 1 and not cost.input:
        yield (), f"the stage has {len(inputs)} inputs", f"say which one is meant, as in `input: {inputs[0]}`"


def _model(stage: StageSpec, path: SpecPath) -> Iterator[Problem]:
    example = {
        "python": "'package.module:callable'",
        "onnx": "a file such as detect.onnx, 'package:path' for one in an installed package, or an http(s) address",
        "torch": "'package.module:factory', or a .pt, .pt2, .pth or .ts file or address",
        "triton": "the model's name in the Triton server's repository",
    }[stage.executor]
    if not stage.model:
        yield Problem(path, f"{_article(stage.executor)} stage needs a model", f"write `model:` with {example}")
    elif stage.executor == "triton":
        yield from _triton_model(stage, path)
    elif not is_model_file(stage) and (":" not in stage.model or is_address(stage.model)):
        yield Problem((*path, "model"), f"{stage.model!r} is no model of a {stage.executor} stage", f"write {example}")
    elif is_address(stage.model) and not (_ADDRESS.fullmatch(stage.model) and len(stage.model) <= MAX_PATH):
        yield Problem((*path, "model"), f"{stage.model!r} is no address", "write http://HOST/PATH or https://HOST/PATH")
    elif stage.sha256 is not None and not is_address(stage.model):
        advice = "remove it: the digests of other files are taken when the pipeline is applied"
        yield Problem((*path, "sha256"), "sha256 goes with a model at an address", advice)


def _triton_model(stage: StageSpec, path: SpecPath) -> Iterator[Problem]:
    if not _TRITON_NAME.fullmatch(stage.model or ""):
        advice = "write the name of its folder in the server's model repository"
        yield Problem((*path, "model"), f"{stage.model!r} is no model of a triton stage", advice)
    if stage.sha256 is not None:
        advice = "remove it: the server's own repository says what its models are"
        yield Problem((*path, "sha256"), "sha256 goes with a model at an address", advice)


def _article(executor: str) -> str:
    return f"an {executor}" if executor[0] in "aeo" else f"a {executor}"


def _profile(profile: Profile) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    """(path inside the profile, message, advice) of everything wrong with it."""
    for name, value in (("load_ms", profile.load_ms), ("memory_mb", profile.memory_mb)):
        if value is not None and not math.isfinite(value):
            yield (name,), f"{value} is no number to reckon with", "leave it out where it is not known"
    yield from _latencies(profile)
    for device_type, own in profile.by_type.items():
        if own.by_type:
            yield ("by_type", device_type, "by_type"), "types inside a type", "write each type once, side by side"
        for path, message, advice in _profile(msgspec.structs.replace(own, by_type={})):
            yield ("by_type", device_type, *path), message, advice


def _latencies(profile: Profile) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    both = "write alpha_ms and beta_ms, or latency_ms"
    linear = (profile.alpha_ms, profile.beta_ms)
    if profile.latency_ms is None:
        if None in linear:
            yield (), "a profile has both alpha_ms and beta_ms, or measured latencies", both
        for name, value in zip(("alpha_ms", "beta_ms"), linear, strict=True):
            if value is not None and not math.isfinite(value):
                yield (name,), f"{value} is no latency", "write milliseconds"
        return
    if linear != (None, None):
        yield (), "a profile has either alpha_ms and beta_ms or latency_ms", "remove one of the two"
    if not profile.latency_ms:
        yield ("latency_ms",), "no latencies", "write milliseconds by batch size, as in {1: 5.2, 8: 17.5}"
    before = 0.0
    for batch, latency in sorted(profile.latency_ms.items()):
        if batch < 1:
            yield ("latency_ms", batch), f"a batch of {batch}", "batches start at 1"
        elif not (math.isfinite(latency) and latency > 0):
            yield ("latency_ms", batch), f"{latency:g} ms is no measured latency", "write milliseconds above zero"
        elif latency < before:
            yield (
                ("latency_ms", batch),
                f"a batch of {batch} is faster ({latency:g} ms) than a smaller one ({before:g} ms)",
                f"measure it again, or write {before:g} for both",
            )
        else:
            before = latency


def _slo(spec: PipelineSpec) -> Iterator[Problem]:
    if not (math.isfinite(spec.slo) and spec.slo > 0):
        yield Problem(("slo",), f"{spec.slo} s is no latency objective", "write a duration above zero, such as 400ms")
        return
    alone = {
        name: LatencyProfile.from_spec(stage.profile).latency(1)
        for name, stage in spec.stages.items()
        if stage.profile is not None
    }
    seconds, stages = Graph(spec).longest_path(alone)
    if seconds > spec.slo:
        along = " + ".join(f"{name} {format_duration(alone[name])}" for name in stages if name in alone)
        yield Problem(
            ("slo",),
            f"no request can meet {format_duration(spec.slo)}: in batches of 1 the longest path takes "
            f"{format_duration(seconds)} ({along}), {format_duration(seconds - spec.slo)} too long",
            f"write an slo well above {format_duration(seconds)}, or use faster models",
        )
