"""Requests that go on while something is done to the hosts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rollout.commands import Failed

BAD = ("failed", "unavailable", "rejected")
"""Outcomes that nothing may bring about that is done in order."""


class Traffic:
    """``laxity load`` at a fixed rate, from entering the block to leaving it. Then ``outcomes`` counts how its requests
    ended, and ``said`` what was told of those that were not good."""

    def __init__(self, pipeline: str, rate: float, env: Mapping[str, str], cwd: Path, log: Path) -> None:
        options = ["--request-rate-range", str(rate), "--duration", "1h", "--json"]
        self._command = [sys.executable, "-m", "cli.main", "load", pipeline, *options]
        self._env = dict(env)
        self._cwd = cwd
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self.outcomes: dict[str, int] = {}
        self.said: list[str] = []
        self.latency_ms: dict[str, float] = {}

    def __enter__(self) -> Self:
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                self._command, env=self._env, cwd=self._cwd, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        try:
            printed, _ = self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise Failed(f"the load did not end when asked to:\n{self._log.read_text()[-2000:]}") from error
        if kind is not None:
            return
        if self._process.returncode != 130:
            raise Failed(f"the load ended early, with {self._process.returncode}:\n{self._log.read_text()[-2000:]}")
        self._log.with_suffix(".json").write_text(printed)
        (step,) = json.loads(printed)["steps"]
        self.outcomes = {**step["outcomes"], "not sent": step["unsent"]}
        self.latency_ms = step["latency_ms"]
        self.said = [f"{end['requests']} {end['outcome']} at {end['stage']}: {end['first']}" for end in step["ends"]]

    def running(self) -> bool:
        """Whether it still sends."""
        return self._process is not None and self._process.poll() is None
