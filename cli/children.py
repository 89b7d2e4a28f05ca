"""The processes of a local cluster: started, watched, started again, and all ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cli import tether
from cli.restarts import Restarts

GRACE = 8.0
"""Seconds that children have to end after SIGTERM; then comes SIGKILL."""


SHARD_GRACE = 15.0
"""Seconds that shards have to drain and end; what is in flight may take ten."""
TURN = 0.05
"""Seconds between two looks at children that are ending."""
LOG_BYTES = 16 * 1024**2
"""Of a log, after which it becomes NAME.log.1, and the one before that goes."""


class ChildDied(Exception):
    """A child ended while the cluster was starting; the text has the end of its log."""


def laxity(*arguments: str) -> list[str]:
    """The command line of ``laxity ARGUMENTS``."""
    # -P: what lies in the working directory must not shadow modules.
    return [sys.executable, "-P", "-m", "cli.main", *arguments]


class Child:
    """One process: ``command`` (its first word a path), its output appended to ``log``. The kernel ends it with this
    one. ``inherited`` are the file descriptors that it gets."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        inherited: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.command = list(command)
        self.log = log
        self.restarts = Restarts()
        self.start_at: float | None = None
        """When to start it again (``time.monotonic``); None while it runs."""
        self._environment = dict(environment)
        self._inherited = inherited
        self._process: subprocess.Popen[bytes] | None = None
        self._log_from = 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._log_from = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=self._inherited,
                # Ctrl-C at the terminal is the supervisor's alone, which then ends its children in order.
                start_new_session=True,
            )
        self.start_at = None
        self.restarts.started(time.monotonic())

    @property
    def pid(self) -> int | None:
        """Its process, while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def ended(self) -> str | None:
        """How it ended ('exit status 1', 'signal SIGKILL'), or None while it runs or was never started."""
        status = self._process.poll() if self._process is not None else None
        if status is None:
            return None
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

    def last_words(self, lines: int = 12) -> str:
        """The end of what its latest run wrote."""
        with self.log.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(self._log_from, log.tell() - 16_384))
            return "\n".join(log.read().decode(errors="replace").strip().splitlines()[-lines:])

    def rotate_log(self, limit: int = LOG_BYTES) -> None:
        """Begin the log anew where it is larger than ``limit`` bytes."""
        if rotate(self.log, limit):
            self._log_from = 0

    def terminate(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End it for good; it has ended then."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def wait(self, seconds: float) -> bool:
        """Wait so long for its end at most; whether it has ended."""
        if self._process is None:
            return True
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True


class Children:
    """Processes that start and end together; ``say`` takes a line for people."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._children: list[Child] = []

    def add(self, child: Child) -> Child:
        child.start()
        self._children.append(child)
        return child

    def check_alive(self) -> None:
        """Raise :class:`ChildDied` if one has ended: while a cluster starts nothing is tried twice."""
        for child in self._children:
            how = child.ended()
            if how is not None:
                raise ChildDied(f"{child.name} ended ({how}):\n{child.last_words()}\nIts log: {child.log}")

    def revive(self) -> None:
        """Notice the dead, and start those again whose time has come."""
        now = time.monotonic()
        for child in self._children:
            how = child.ended()
            if how is None:
                continue
            if child.start_at is None:
                delay = child.restarts.died(now)
                child.start_at = now + delay
                self._say(f"{child.name} ended ({how}); it is started again in {delay:g} s. Its log: {child.log}")
            if now >= child.start_at:
                child.start()
                self._say(f"{child.name} is running again (process {child.pid})")

    def rotate_logs(self) -> None:
        """Keep the logs within bounds."""
        for child in self._children:
            child.rotate_log()

    def end(
        self, grace: float = GRACE, chosen: Sequence[Child] | None = None, hurried: Callable[[], bool] = lambda: False
    ) -> None:
        """End them, or those ``chosen``: SIGTERM, after ``grace`` seconds SIGKILL, the latest started first. Once
        ``hurried`` says True, they are told a second time, so that they end at once."""
        ending = [child for child in reversed(self._children) if chosen is None or child in chosen]
        for child in ending:
            child.terminate()
        deadline = time.monotonic() + grace
        told = False
        for child in ending:
            while not child.wait(min(TURN, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    child.kill()
                elif hurried() and not told:
                    told = True
                    for other in ending:
                        other.terminate()
        self._children = [child for child in self._children if child not in ending]


def rotate(log: Path, limit: int) -> bool:
    """Copy a log of more than ``limit`` bytes to NAME.log.1 and empty it; whether it was so large. Whoever has it open
    goes on writing at its end; what comes between the two steps is lost."""
    try:
        if log.stat().st_size <= limit:
            return False
        shutil.copyfile(log, log.with_name(f"{log.name}.1"))
        os.truncate(log, 0)
    except OSError:
        return False  # a full disk: at the next turn again
    return True
