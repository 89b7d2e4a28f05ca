"""Which build of the engines the tests run: the source, or what mypyc made of it."""

from __future__ import annotations

import importlib
import os
import pkgutil
import tomllib
from pathlib import Path

import pytest

from cli.checks import engines_compiled


def modules(pattern: str) -> list[str]:
    """The modules that a pattern of pyproject.toml names, wherever their package is installed."""
    package, _, file = pattern.rpartition("/")
    package = package.replace("/", ".")
    if file != "*.py":
        return [f"{package}.{file.removesuffix('.py')}"]
    return [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + ".")]


COMPILED = [
    name
    for pattern in tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["tool"]["laxity"][
        "compiled"
    ]
    for name in modules(pattern)
]


def test_the_engines_are_among_them() -> None:
    assert "broker.engine.scheduler" in COMPILED
    assert "nodes.engine.device" in COMPILED


@pytest.mark.skipif("LAXITY_EXPECT_COMPILED" not in os.environ, reason="nobody said which build is expected")
@pytest.mark.parametrize("name", COMPILED)
def test_the_expected_build_runs(name: str) -> None:
    file = importlib.import_module(name).__file__
    assert file is not None
    compiled = os.environ["LAXITY_EXPECT_COMPILED"] == "1"
    assert file.endswith(".so" if compiled else ".py")
    assert engines_compiled() == compiled


@pytest.mark.skipif(os.environ.get("LAXITY_EXPECT_COMPILED") == "1", reason="extension modules are wanted there")
@pytest.mark.parametrize("package", ["laxity", "pipelines", "cluster", "broker", "nodes", "cli"])
def test_no_extension_module_shadows_the_source(package: str) -> None:
    directory = Path(next(iter(importlib.import_module(package).__path__)))
    assert list(directory.rglob("*.so")) == []
