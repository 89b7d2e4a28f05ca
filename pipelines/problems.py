"""What can be wrong with a pipeline file, and how it is told to its author."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

SpecPath = tuple[str | int, ...]
"""Where in a spec: ``("stages", "detect", "inputs", 0)``."""


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong with a spec.

    ``message`` says what is wrong and ``advice`` what to do or write instead; ``file`` and ``line``
    (from 1; 0 where unknown) are filled in when the spec was read from a file.
    """

    path: SpecPath
    message: str
    advice: str
    file: str = ""
    line: int = 0

    @property
    def where(self) -> str:
        """The path as text: ``stages.detect.inputs[0]``; empty for the file as a whole."""
        text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return text.removeprefix(".")

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(part for part in (place, self.where, f"{self.message}; {self.advice}") if part)


class SpecError(Exception):
    """A pipeline file cannot be used; ``problems`` holds everything that is wrong with it, in the order of the
    file."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = list(problems)


class SpecNotFound(SpecError):
    """There is no such pipeline file, nor a shipped pipeline of that name."""
