"""Which build of the engines the tests run: the source, or what mypyc made of it."""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path

import pytest

import broker.engine
import nodes.engine
from cli.checks import engines_compiled

ENGINES = [
    module.name
    for package in (broker.engine, nodes.engine)
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + ".")
]


def test_there_are_engines() -> None:
    assert "broker.engine.scheduler" in ENGINES
    assert "nodes.engine.device" in ENGINES


@pytest.mark.skipif("LAXITY_EXPECT_COMPILED" not in os.environ, reason="nobody said which build is expected")
@pytest.mark.parametrize("name", ENGINES)
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
