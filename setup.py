"""Compiles the modules named in pyproject.toml with mypyc where LAXITY_COMPILE=1; all else is in pyproject.toml."""

import os
import sys
import tomllib
from glob import glob
from pathlib import Path

from setuptools import setup


def extensions() -> list:
    if os.environ.get("LAXITY_COMPILE") != "1":
        return []
    if "editable_wheel" in sys.argv:
        sys.exit(
            "LAXITY_COMPILE=1 beside the source would leave extension modules there that shadow every edit; "
            "build a wheel instead: LAXITY_COMPILE=1 pip wheel --no-deps ."
        )
    from mypyc.build import mypycify

    patterns = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["laxity"]["compiled"]
    sources = sorted(source for pattern in patterns for source in glob(pattern))
    return mypycify([source for source in sources if not source.endswith("__init__.py")], opt_level="3")


setup(ext_modules=extensions())
