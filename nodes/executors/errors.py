"""One line about an error in somebody else's code: what it was, and where in that code."""

from __future__ import annotations

import os
import sysconfig
import traceback
from types import TracebackType

_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
LONGEST = 2000
"""How many characters of an error's own text are kept."""


def describe_error(error: BaseException, doing: str) -> str:
    """``"before steps:load: ValueError: no picture (steps.py, line 12, in load)"``.

    ``doing`` says what was being done. The place is the deepest frame of the user's own code; where there
    is none (a library was called straight away), the deepest frame of all is named.
    """
    text = str(error).strip()
    if len(text) > LONGEST:
        text = text[:LONGEST] + " ..."
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{doing}: {said}{_place(error.__traceback__)}"


def _place(trace: TracebackType | None) -> str:
    frames = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith(_OURS)]
    if not frames:
        return ""
    users = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, "<"))]
    frame = (users or frames)[-1]
    return f" ({os.path.basename(frame.filename)}, line {frame.lineno}, in {frame.name})"
