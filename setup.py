"""Compiles the engines with mypyc where LAXITY_COMPILE=1; everything else is in pyproject.toml."""

import os
import sys
from glob import glob

from setuptools import setup


def engine_extensions() -> list:
    if os.environ.get("LAXITY_COMPILE") != "1":
        return []
    if "editable_wheel" in sys.argv:
        sys.exit(
            "LAXITY_COMPILE=1 beside the source would leave extension modules there that shadow every edit; "
            "build a wheel instead: LAXITY_COMPILE=1 pip wheel --no-deps ."
        )
    from mypyc.build import mypycify

    sources = sorted(glob("broker/engine/*.py") + glob("nodes/engine/*.py"))
    return mypycify([source for source in sources if not source.endswith("__init__.py")], opt_level="3")


setup(ext_modules=engine_extensions())
