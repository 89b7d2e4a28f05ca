"""A live cluster of emulated GPUs on this machine for benchmarks: brought up, looked at, hurt, loaded, and ended."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from laxity import Client
from laxity.outcomes import LaxityError, Outcome

OUTCOMES = [str(outcome) for outcome in Outcome]


class LiveCluster:
    """``laxity`` in a run directory of its own, by the interpreter ``engine``; ends what it started."""

    def __init__(self, engine: str = sys.executable) -> None:
        self._runtime = tempfile.TemporaryDirectory(prefix="laxity-bench-")
        self._command = [engine, "-P", "-m", "cli.main"]
        self._environment = os.environ | {"XDG_RUNTIME_DIR": self._runtime.name}
        self._up = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._runtime.cleanup()

    def __call__(self, *arguments: str) -> str:
        """Run ``laxity ARGUMENTS``; what it printed."""
        command = [*self._command, *arguments]
        return subprocess.run(command, env=self._environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))

    def up(self, *arguments: str) -> dict[str, Any]:
        """``laxity up ARGUMENTS --detach``; what it says of itself."""
        self._up = True
        return self.json("up", *arguments, "--detach")  # type: ignore[no-any-return]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """``laxity ARGUMENTS``, which the caller waits for."""
        return subprocess.Popen([*self._command, *arguments], env=self._environment, stdout=subprocess.PIPE, text=True)

    def down(self) -> None:
        """``laxity down``, if it is up; its telemetry is complete then."""
        if self._up:
            self._up = False
            self("down")

    def status(self) -> dict[str, Any]:
        return self.json("status")  # type: ignore[no-any-return]

    def addresses(self) -> str:
        """The shards' addresses for services."""
        return ",".join(shard["frontend"] for shard in self.status()["shards"])


class Process(NamedTuple):
    """A process of this machine."""

    pid: int
    command: list[str]


def processes() -> list[Process]:
    """All processes that this user may look at."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                raw = (directory / "cmdline").read_bytes()
            except OSError:
                continue
            found.append(Process(int(directory.name), [part.decode(errors="replace") for part in raw.split(b"\0")]))
    return found


class Sent(NamedTuple):
    """One request: when it was due, when it had ended (seconds from the load's begin), and how."""

    due: float
    ended: float
    outcome: str


Choice = Callable[[random.Random], tuple[str, Any]]
"""The pipeline and the payload of the next request."""


Check = Callable[[str, Any], bool]
"""Whether a pipeline's answer is right."""


def always(pipeline: str, payload: Any = b"x" * 256) -> Choice:
    """The same each time."""
    return lambda _: (pipeline, payload)


class Load:
    """Open-loop Poisson load through one SDK client, from a thread of its own, until :meth:`stop`."""

    def __init__(self, addresses: str, choose: Choice, rate: float, seed: int, check: Check | None = None) -> None:
        """An answer that ``check`` does not like counts as 'wrong'."""
        self._client = Client(addresses, max_pending=200_000)
        self._client.wait_ready(20.0)
        self._choose = choose
        self._check = check
        self.rate = rate
        """Requests a second; may be changed while it runs."""
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._sent: list[Sent] = []
        self._submitted = 0
        self._stopping = False
        self.begin = time.monotonic()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def now(self) -> float:
        """Seconds since the load's begin."""
        return time.monotonic() - self.begin

    def sleep_until(self, seconds: float) -> None:
        """Let it run until ``seconds`` after its begin."""
        time.sleep(max(0.0, seconds - self.now()))

    def stop(self, patience: float = 30.0) -> tuple[int, list[Sent]]:
        """End it: how many were submitted, and those that had ended within ``patience`` seconds after."""
        self._stopping = True
        self._thread.join()
        until = time.monotonic() + patience
        while len(self._sent) < self._submitted and time.monotonic() < until:
            time.sleep(0.05)
        with self._lock:
            sent = sorted(self._sent)
        self._client.close()
        return self._submitted, sent

    def _run(self) -> None:
        due = 0.0
        while not self._stopping:
            left = due - self.now()
            if left > 0:
                time.sleep(min(left, 0.25))
                continue
            self._submitted += 1
            pipeline, payload = self._choose(self._random)
            try:
                future = self._client.submit(pipeline, payload)
            except LaxityError as error:
                self._note(due, str(error.outcome))
            else:
                future.add_done_callback(partial(self._answered, due, pipeline))
            due += self._random.expovariate(self.rate)

    def _answered(self, due: float, pipeline: str, future: Any) -> None:
        outcome = str(future.reply(0).outcome)
        if outcome == "ok" and self._check is not None and not self._check(pipeline, future.result(0)):
            outcome = "wrong"
        self._note(due, outcome)

    def _note(self, due: float, outcome: str) -> None:
        with self._lock:
            self._sent.append(Sent(due, self.now(), outcome))


def outcomes(sent: list[Sent], begin: float = 0.0, end: float = float("inf")) -> Counter[str]:
    """How those ended that were due in [begin, end)."""
    return Counter(one.outcome for one in sent if begin <= one.due < end)


def seconds_to_recover(sent: list[Sent], hurt_at: float, part: float = 0.99) -> float:
    """Seconds after ``hurt_at`` from when on each second had ``part`` of its requests answered ok (0: never less)."""
    last_bad = hurt_at
    for second in range(int(hurt_at), int(max((one.due for one in sent), default=0.0))):
        counts = outcomes(sent, second, second + 1)
        if sum(counts.values()) and counts["ok"] < part * sum(counts.values()) and second + 1 > hurt_at:
            last_bad = second + 1.0
    return last_bad - hurt_at
