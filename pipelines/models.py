"""What of a stage is a file: its model, by path or address, and its code, by reference."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from pipelines.packages import install_advice, package_directories
from pipelines.spec import PipelineSpec, StageSpec

TORCH_FILES = (".pt", ".pt2", ".pth", ".ts")
"""By these endings a ``torch`` model is a file and not a factory."""
_IN_PACKAGE = re.compile(r"^(?P<package>[A-Za-z_][A-Za-z0-9_.]*):(?P<path>.+)$", re.ASCII)


class ModelNotFoundError(Exception):
    """There is no such model file; ``advice`` says what to do."""

    def __init__(self, message: str, advice: str) -> None:
        super().__init__(f"{message}; {advice}")
        self.message = message
        self.advice = advice


def is_model_file(stage: StageSpec) -> bool:
    """Whether the stage's model is a file (``python`` models, ``torch`` factories, Triton's models and emulated ones
    are not)."""
    if stage.model is None:
        return False
    path = re.split(r"[?#]", stage.model)[0] if is_address(stage.model) else stage.model
    return stage.executor == "onnx" or (stage.executor == "torch" and path.endswith(TORCH_FILES))


def is_address(model: str) -> bool:
    """Whether a model is fetched over HTTP."""
    return model.startswith(("http://", "https://"))


def code_references(stage: StageSpec) -> dict[str, str | None]:
    """The fields that name user code, with what they name."""
    named = {"before": stage.before, "collate": stage.collate, "after": stage.after, "sample": stage.sample}
    is_code = stage.executor in ("python", "torch") and not is_model_file(stage)
    # A model without a colon is reported by itself.
    return {"model": stage.model if is_code and ":" in (stage.model or "") else None, **named}


def resolve_model_file(spec: PipelineSpec, stage: str) -> Path:
    """The model file of a stage: a path relative to the spec's directory, or 'package:path' for a file inside an
    installed package (which is not imported).

    Raises :class:`ModelNotFoundError` where it does not exist.
    """
    model = spec.stages[stage].model or ""
    if is_address(model):
        raise ModelNotFoundError(
            f"{model} is an address, not a file", "serve the pipeline (laxity pipeline apply): its agents fetch it"
        )
    file = Path(spec.root) / model
    if model and file.is_file():
        return file
    match = _IN_PACKAGE.match(model)
    if match:
        return _in_package(match["package"], match["path"])
    if model and file.is_dir():
        raise ModelNotFoundError(f"{file} is a directory", "name the model file in it")
    near = sorted(other.name for other in file.parent.glob(f"*{file.suffix}") if other.is_file())
    there = f" (there: {', '.join(near[:5])})" if near and file.suffix else ""
    raise ModelNotFoundError(
        f"no file {file}{there}",
        "write the model's path relative to the spec's directory, or package:path for a file in an installed package",
    )


def _in_package(package: str, path: str) -> Path:
    relative = PurePosixPath(path)
    if relative.is_absolute() or ".." in relative.parts:
        raise ModelNotFoundError(f"{path!r} leads out of the package {package}", "write a path inside the package")
    directories = package_directories(package)
    top = package.partition(".")[0]
    if directories is None:
        raise ModelNotFoundError(f"the package {top} is not installed", install_advice(top))
    for directory in directories:
        file = Path(directory) / relative
        if file.is_file():
            return file
    raise ModelNotFoundError(
        f"the package {package} has no file {path}",
        f"look into {', '.join(directories) or 'the package'} and check that its version fits",
    )
