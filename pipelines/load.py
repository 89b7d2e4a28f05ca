"""Reads pipeline files."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from pipelines.convert import convert_spec, nearest
from pipelines.problems import Problem, SpecError, SpecNotFound
from pipelines.spec import PipelineSpec
from pipelines.validate import missing_files, validate
from pipelines.yamlfile import read_yaml

MAX_BYTES = 1024 * 1024
"""The largest file that is read; a pipeline of a hundred stages takes some tens of KB."""
_SHIPPED = Path(__file__).parent / "shipped"


def shipped_pipelines() -> list[str]:
    """The names of the pipelines that come with the package."""
    return sorted(file.stem for file in _SHIPPED.glob("*.yaml"))


def load_spec(path_or_name: str) -> PipelineSpec:
    """The validated spec of a YAML file, or of a shipped pipeline by its name (see :func:`find_spec`). Raises
    :class:`SpecError` with everything that is wrong, :class:`SpecNotFound` where there is no such file."""
    file = find_spec(path_or_name)
    return parse_spec(read_text(file), file=str(file), root=str(file.resolve().parent))


def find_spec(path_or_name: str) -> Path:
    """The YAML file that is meant. A shipped pipeline's name goes before a file of that name: write './ocr' for the
    file. Raises :class:`SpecNotFound`."""
    if path_or_name in shipped_pipelines():
        return _SHIPPED / f"{path_or_name}.yaml"
    file = Path(path_or_name)
    try:
        there = file.exists()
    except OSError:  # a name that is too long for one
        there = False
    if not there:
        raise _not_there(path_or_name)
    return file


def parse_spec(text: str, *, file: str, root: str) -> PipelineSpec:
    """The validated spec that ``text`` holds; ``file`` is what problems call it, ``root`` the directory where models
    and user code are looked for. Raises :class:`SpecError`."""
    document = read_yaml(text, file)
    converted = convert_spec(document.value)
    problems = document.problems + converted.problems
    spec = converted.spec
    if spec is not None:
        spec = msgspec.structs.replace(spec, root=root)
        bad = converted.bad | {problem.path for problem in document.problems}
        problems += validate(spec, bad) + missing_files(spec, bad)
    if problems or spec is None:
        located = {document.located(problem): None for problem in problems}
        raise SpecError(sorted(located, key=lambda problem: problem.line))
    return spec


def read_text(file: Path) -> str:
    """What a pipeline file says. Raises :class:`SpecError` where it cannot be read."""

    def error(message: str, advice: str) -> SpecError:
        return SpecError([Problem((), message, advice, str(file))])

    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except IsADirectoryError as cause:
        raise error("this is a directory", "name the YAML file in it") from cause
    except OSError as cause:
        raise error(f"cannot be read: {cause.strerror}", "check the path and its permissions") from cause
    if len(content) > MAX_BYTES:
        raise error(f"larger than {MAX_BYTES // 1024} KiB", "give a pipeline file, not a model or data")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = content.count(b"\n", 0, cause.start) + 1
        raise error(f"not UTF-8 text (line {line})", "save the file as UTF-8") from cause


def _not_there(name: str) -> SpecNotFound:
    shipped = shipped_pipelines()
    if re.search(r"[/\\]|\.ya?ml$", name):
        return SpecNotFound([Problem((), "there is no such file", "check the path", name)])
    near = nearest(name, shipped)
    meant = f"write {near!r}, " if near else ""
    return SpecNotFound(
        [
            Problem(
                (),
                f"neither a file nor a shipped pipeline (those are {', '.join(shipped)})",
                f"{meant}or give the path of a YAML file" if meant else "give the path of a YAML file",
                name,
            )
        ]
    )
