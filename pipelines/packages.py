"""Finds installed packages without importing them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from importlib.machinery import ModuleSpec

_REQUIREMENT = re.compile(r"^(?P<package>[A-Za-z0-9._-]+).*;.*\bextra\s*==\s*['\"](?P<extra>[^'\"]+)['\"]")


def find_top_level(name: str) -> ModuleSpec | None:
    """Where a plain ``import name`` (without dots) would find the module; None if nowhere. Imports nothing."""
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a module made by hand, such as __main__, has no spec
        return None


def package_directories(name: str) -> Sequence[str] | None:
    """The directories of an installed package, top-level or not; None if its top-level package is not installed.
    Imports nothing, so the parts after the first dot are taken as directories, there or not."""
    top, *rest = name.split(".")
    spec = find_top_level(top)
    if spec is None:
        return None
    return ["/".join([directory, *rest]) for directory in spec.submodule_search_locations or ()]


def install_advice(package: str) -> str:
    """How to install what ``import package`` lacks: by our extra that brings it, otherwise by its own name."""
    try:
        requirements = importlib.metadata.requires("laxity") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        if match and match["package"].lower().replace("-", "_") == package.lower() and match["extra"] != "dev":
            return f"pip install 'laxity[{match['extra']}]'"
    return f"pip install {package} (or whichever package brings it)"
