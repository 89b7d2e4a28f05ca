"""The wheels that the hosts install, as they reach no index: Laxity in two versions, and all that it needs."""

from __future__ import annotations

import hashlib
import os
import shutil
import tomllib
import zipfile
from pathlib import Path

from rollout.commands import run

EXTRAS = "etcd"
PYTHON = "3.11"
"""The hosts' own."""
PACKAGES = ("laxity", "pipelines", "cluster", "broker", "nodes", "simulation", "cli")
UPGRADE = "+upgrade"
"""The local version of the second wheel: the same code, but another version to everybody."""


def version(source: Path) -> str:
    """The version that the source says it is."""
    found: dict[str, str] = {}
    exec((source / "laxity/version.py").read_text(), found)
    return found["__version__"]


def make_wheelhouse(source: Path, python: Path, cache: Path, wheelhouse: Path) -> None:
    """Put all wheels into ``wheelhouse``: Laxity's own version, and the same with UPGRADE. Raises Failed."""
    shutil.rmtree(wheelhouse, ignore_errors=True)
    wheelhouse.mkdir(parents=True)
    first = version(source)
    for made in (first, first + UPGRADE):
        _build(source, python, made, wheelhouse)
    for wheel in _dependencies(source, python, cache, wheelhouse / f"laxity-{first}-py3-none-any.whl").iterdir():
        shutil.copy(wheel, wheelhouse)


def unpack(wheelhouse: Path, made: str, directory: Path) -> None:
    """Unpack the wheel of Laxity in the version ``made``."""
    with zipfile.ZipFile(wheelhouse / f"laxity-{made}-py3-none-any.whl") as wheel:
        wheel.extractall(directory)


def _build(source: Path, python: Path, made: str, wheelhouse: Path) -> None:
    """Build from a copy: building leaves files beside the source. Without compiling, which takes a minute."""
    copy = wheelhouse.parent / "source"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for package in PACKAGES:
        shutil.copytree(source / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(source / file, copy)
    (copy / "laxity/version.py").write_text(f'"""The version of the package."""\n\n__version__ = "{made}"\n')
    options: list[str | Path] = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheelhouse]
    run([python, "-m", "pip", "wheel", *options, "."], cwd=copy, env={"LAXITY_COMPILE": "0"})
    shutil.rmtree(copy)


def _dependencies(source: Path, python: Path, cache: Path, wheel: Path) -> Path:
    """A directory in ``cache`` with the wheels of everything that ``wheel`` requires on the hosts."""
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"][EXTRAS]]
    kept = cache / f"wheels-{hashlib.sha256(chr(10).join(wanted).encode()).hexdigest()[:12]}"
    if kept.exists():
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob("wheels-*"):
        shutil.rmtree(old)
    unfinished = cache / f"wheels-unfinished-{os.getpid()}"
    machine = os.uname().machine
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in (36, 34, 31, 28, 24, 17)] + [f"manylinux2014_{machine}"]
    run(
        [
            *(python, "-m", "pip", "download", "--quiet", "--dest", unfinished, "--only-binary=:all:"),
            *("--implementation=cp", f"--python-version={PYTHON}", f"--abi=cp{PYTHON.replace('.', '')}", "--abi=abi3"),
            *("--abi=none", *(f"--platform={platform}" for platform in platforms), *wanted),
        ],
        timeout=600,
    )
    unfinished.rename(kept)
    return kept
