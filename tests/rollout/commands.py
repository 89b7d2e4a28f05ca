"""Running commands: what they print is kept, and said when they fail."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


class Failed(Exception):
    """What was to be tried does not work, or cannot be tried here; the text says why."""


def run(
    command: Sequence[str | Path],
    *,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    accept: Sequence[int] = (0,),
) -> str:
    """What ``command`` prints. Raises :class:`Failed` with its last lines when its exit status is none of ``accept`` or
    ``timeout`` seconds are over."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=timeout,
            env=None if env is None else {**os.environ, **env},
            cwd=cwd,
        )
    except FileNotFoundError as error:
        raise Failed(f"there is no {words[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{' '.join(words)} has not ended after {timeout:g} s") from error
    if done.returncode not in accept:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise Failed(f"{' '.join(words)}: exit status {done.returncode}\n{said}")
    return done.stdout
