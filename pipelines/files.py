"""Which files a pipeline needs on the hosts that run it, and how they are told apart: by path, digest and size.

Needed are, of what lies below the spec's directory (its *root*): model files, the modules that the stages name with all
that these import from there, and what the spec lists under ``files``; and the models at addresses. Models and code in
installed packages are not: those have to be installed.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import msgspec

from pipelines.models import code_references, is_address, is_model_file, resolve_model_file
from pipelines.packages import find_top_level
from pipelines.spec import PipelineSpec

MAX_FILES = 1000
"""The most files of one pipeline."""
MAX_BYTES = 64 * 1024**3
"""The largest file in bytes."""
MAX_PATH = 1000
"""The longest path or address in characters."""
DIGEST = re.compile(r"[0-9a-f]{64}")
_AGAIN = "apply the pipeline again"
_AT_ADDRESSES = ".laxity"
"""The directory in which files from addresses are laid out."""


class FileRecord(msgspec.Struct, frozen=True):
    """A file that a pipeline needs (model file, user code): ``path`` relative to the spec's directory, or the http(s)
    address of a model, and its digest (SHA-256, hex) and size in bytes, by which it is fetched and checked."""

    path: str
    digest: str
    size: int


class FilesError(Exception):
    """The files of a pipeline cannot be used; ``message`` says which and why, ``advice`` what to do."""

    def __init__(self, message: str, advice: str) -> None:
        super().__init__(f"{message}; {advice}")
        self.message = message
        self.advice = advice


# ---- where the spec was written ---------------------------------------------------------------------


def needed_paths(spec: PipelineSpec) -> list[str]:
    """The paths, relative to the root, of the files that the spec needs, in order.

    Raises :class:`FilesError` for what cannot be given to other hosts (outside of the root, a symbolic link, too
    many), and :class:`~pipelines.models.ModelNotFoundError`.
    """
    if not spec.root:
        return []
    root = Path(spec.root)
    found = {*_models(spec, root), *_modules(spec, root)}
    for pattern in spec.files:
        found.update(matching(root, pattern))
    if len(found) > MAX_FILES:
        raise FilesError(
            f"the pipeline {spec.name} needs {len(found)} files below {root}, at most {MAX_FILES} are allowed",
            "name fewer under `files`, or put code and data into a package that is installed on the agents' hosts",
        )
    return sorted(found)


def matching(root: Path, pattern: str) -> list[str]:
    """The files that a pattern of the spec means. Raises :class:`FilesError` where there are none."""
    wrong = wrong_pattern(pattern)
    if wrong is not None:
        raise FilesError(*wrong)
    found = [path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file() or path.is_symlink()]
    if not found:
        inside = f"write '{pattern.rstrip('/')}/**/*' for all that is in it" if (root / pattern).is_dir() else ""
        raise FilesError(f"{pattern!r} matches no file below {root}", inside or "correct it or remove it")
    return [_regular(root, path) for path in found]


def wrong_pattern(pattern: str) -> tuple[str, str] | None:
    """What is wrong with a pattern, and what to do; None if nothing is."""
    parts = PurePosixPath(pattern).parts
    if not parts or parts[0].startswith("/") or ".." in parts or "\0" in pattern:
        advice = "write one such as labels.txt or data/**/*.json"
        return f"{pattern!r} is no pattern of files below the spec's directory", advice
    if any("**" in part and part != "**" for part in parts):
        return f"{pattern!r} has '**' beside other characters", "write it alone between slashes, as in data/**/*.json"
    return None


def describe(spec: PipelineSpec, at_addresses: Iterable[FileRecord] = ()) -> tuple[PipelineSpec, list[FileRecord]]:
    """The spec with its ``content`` set, and the files that it needs; it has no root where it needs none from there.
    ``at_addresses`` are its models at addresses (whoever may use the network has found them out). Reads all files;
    raises as :func:`needed_paths` does, and OSError."""
    root = Path(spec.root)
    files = [*at_addresses]
    for path in needed_paths(spec):
        digest, size = file_digest(root / path)
        files.append(FileRecord(path, digest, size))
        if size > MAX_BYTES:
            raise FilesError(f"{root / path} has {size} bytes, at most {MAX_BYTES} are allowed", "split it")
    check_files(files)
    content = content_of((file.path, file.digest) for file in files)
    needs_root = any(not is_address(file.path) for file in files)
    return msgspec.structs.replace(spec, content=content, root=spec.root if needs_root else ""), files


def addresses(spec: PipelineSpec) -> dict[str, str | None]:
    """The models at addresses, each with the digest that the spec demands."""
    return {
        stage.model: stage.sha256
        for stage in spec.stages.values()
        if stage.model is not None and is_model_file(stage) and is_address(stage.model)
    }


def _models(spec: PipelineSpec, root: Path) -> Iterator[str]:
    for name, stage in spec.stages.items():
        model = stage.model or ""
        if not is_model_file(stage) or is_address(model):
            continue
        file = resolve_model_file(spec, name)
        if file != root / model:
            continue  # in an installed package
        parts = PurePosixPath(model).parts
        if PurePosixPath(model).is_absolute() or ".." in parts:
            raise FilesError(
                f"stages.{name}.model: {model} lies outside of the spec's directory {root}, and agents on other hosts "
                "get what is below it",
                "move the model there, or write its http(s) address",
            )
        yield _regular(root, PurePosixPath(model).as_posix())


def _modules(spec: PipelineSpec, root: Path) -> Iterator[str]:
    """The code in the root that the stages name, and all that this code imports from the root."""
    waiting = [
        reference.partition(":")[0].partition(".")[0]
        for stage in spec.stages.values()
        if stage.executor != "emulated"
        for reference in code_references(stage).values()
        if reference is not None
    ]
    seen: set[str] = set()
    while waiting:
        top = waiting.pop()
        if top in seen:
            continue
        seen.add(top)
        for file in _top_level(root, top):
            yield _regular(root, file.relative_to(root).as_posix())
            waiting += _imported(file)


def _top_level(root: Path, top: str) -> list[Path]:
    """The source files of the root's own module or package of this name, by the rules of ``usercode.py``."""
    package, module = root / top, root / f"{top}.py"
    if (package / "__init__.py").is_file():
        return sorted(package.rglob("*.py"))
    if module.is_file():
        return [module]
    if package.is_dir():
        installed = find_top_level(top)
        if installed is None or installed.origin is None:
            return sorted(package.rglob("*.py"))
    return []


def _imported(file: Path) -> set[str]:
    """The top-level modules that a source file imports, anywhere in it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return set()  # whoever loads it is told
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def _regular(root: Path, path: str) -> str:
    """The path, if it is a file that others can be given: no link on its way, which may lead anywhere."""
    place = root
    for part in PurePosixPath(path).parts:
        place /= part
        if place.is_symlink():
            raise FilesError(
                f"{place} is a symbolic link, and agents on other hosts get files alone", "put the file itself there"
            )
    if not place.is_file():
        raise FilesError(f"{place} is no regular file", "leave it out of what the spec names")
    return path


# ---- where it is read again -------------------------------------------------------------------------


def check_files(files: Sequence[FileRecord]) -> None:
    """Check what a record says before anything is written by it. Raises :class:`FilesError`."""
    if len(files) > MAX_FILES:
        raise FilesError(f"{len(files)} files in one pipeline; at most {MAX_FILES} are allowed", _AGAIN)
    places = set()
    for file in files:
        if not DIGEST.fullmatch(file.digest):
            raise FilesError(f"{file.path!r}: {file.digest!r} is no SHA-256 digest", _AGAIN)
        if not 0 <= file.size <= MAX_BYTES:
            raise FilesError(f"{file.path!r}: {file.size} bytes; at most {MAX_BYTES} are allowed", _AGAIN)
        if not is_address(file.path):
            _check_path(file.path)
        places.add(place_of(file))
    for place in places:
        if any(parent in places for parent in place.parents):
            raise FilesError(f"{str(place.parent)!r} is both a file and a directory", _AGAIN)
    if len(places) < len(files):
        raise FilesError("a path is named twice", _AGAIN)


def _check_path(path: str) -> None:
    pure = PurePosixPath(path)
    if (
        not 0 < len(path) <= MAX_PATH
        or pure.is_absolute()
        or pure.as_posix() != path
        or not pure.parts
        or ".." in pure.parts
        or pure.parts[0] == _AT_ADDRESSES
        or any(not character.isprintable() for character in path)
    ):
        raise FilesError(f"{path!r} is no path below a spec's directory", _AGAIN)


def place_of(file: FileRecord) -> PurePosixPath:
    """Where a file is laid out, relative to the root."""
    if not is_address(file.path):
        return PurePosixPath(file.path)
    name = re.sub(r"[^\w.-]", "_", unquote(re.split(r"[?#]", file.path)[0].rpartition("/")[2]))
    # The executors tell formats by the ending.
    return PurePosixPath(_AT_ADDRESSES, hashlib.sha256(file.path.encode()).hexdigest()[:16], f"model-{name}"[-100:])


def files_of_stage(spec: PipelineSpec, stage: str, files: Iterable[FileRecord]) -> list[FileRecord]:
    """Those of the pipeline's files that one stage needs: all but the other stages' models."""
    models = {name: _model_path(spec, name) for name in spec.stages}
    own = models.pop(stage)
    others = {model for model in models.values() if model is not None and model != own}
    return [file for file in files if file.path not in others]


def with_files_at(spec: PipelineSpec, root: str, laid_out: Path, files: Iterable[FileRecord]) -> PipelineSpec:
    """The spec as it is loaded from ``root``, its models at addresses from where they are laid out."""
    places = {file.path: str(laid_out / place_of(file)) for file in files if is_address(file.path)}
    stages = {
        name: msgspec.structs.replace(stage, model=places[stage.model]) if stage.model in places else stage
        for name, stage in spec.stages.items()
    }
    return msgspec.structs.replace(spec, root=root, stages=stages)


def _model_path(spec: PipelineSpec, stage: str) -> str | None:
    what = spec.stages[stage]
    if what.model is None or not is_model_file(what):
        return None
    return what.model if is_address(what.model) else PurePosixPath(what.model).as_posix()


def content_of(files: Iterable[tuple[str, str]]) -> str:
    """One digest for (path, digest) of several files."""
    return hashlib.sha256(msgspec.json.encode(sorted(files))).hexdigest()


def file_digest(path: Path, stopped: Callable[[], bool] = lambda: False) -> tuple[str, int]:
    """(SHA-256, size) of a file. Raises OSError, and InterruptedError once ``stopped`` says so."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(1024 * 1024):
            digest.update(block)
            size += len(block)
            if stopped():
                raise InterruptedError(f"reading {path} was interrupted")
    return digest.hexdigest(), size
