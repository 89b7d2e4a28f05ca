"""An error in somebody else's code: which of DONE's codes it is, and one line about what it was and where."""

from __future__ import annotations

import os
import sysconfig
import traceback
from types import TracebackType

from laxity.node import PayloadError
from nodes.executors.base import Unavailable

_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_OUT_OF_MEMORY = (  # in small letters
    "out of memory",  # torch.OutOfMemoryError, what older extensions raise in its place, and Triton
    "can't allocate memory",  # torch's allocator for the host
    "failed to allocate",  # ONNX Runtime and Triton
    "unable to allocate",  # numpy, as a Triton model's error quotes it, and Triton
    "bad_alloc",
    "cuda_error_out_of_memory",
    "cublas_status_alloc_failed",
)
LONGEST = 2000
"""How many characters of an error's own text are kept."""


def is_out_of_memory(text: str) -> bool:
    """Whether an error's text says that there was no memory left, of the host or of a GPU."""
    return any(each in text.lower() for each in _OUT_OF_MEMORY)


def error_code(error: BaseException) -> str:
    """Which of :data:`laxity.protocol.DONE_CODES` an error in a stage's code is: 'out_of_memory', 'unavailable',
    'bad_input' where the frames are no inputs, else 'model_error'. An error counts as what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or is_out_of_memory(str(seen)):
            return "out_of_memory"
        if isinstance(seen, Unavailable):
            return "unavailable"
        if isinstance(seen, PayloadError):
            return "bad_input"
        seen = seen.__cause__
    return "model_error"


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
