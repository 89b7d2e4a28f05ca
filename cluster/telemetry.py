"""A row for every action of an agent and every request of a shard, in CSV files (see ``docs/operations.md``).

The thread that serves hands over a tuple and goes on. A thread of telemetry's own formats rows and writes them; what it
cannot keep up with, or write, is dropped and counted. Nothing here waits for a disk but that thread.
"""

from __future__ import annotations

import csv
import io
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from cluster.telemetry_files import RotatingFiles

log = logging.getLogger("laxity.telemetry")

ACTIONS: Final = "actions"
REQUESTS: Final = "requests"


class ActionRow(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent did: a row of ``actions``. Times are in microseconds; starts are relative to ``at`` (Unix seconds),
    when the action came to the agent. ``lost`` rows had to be dropped shortly before this one."""

    at: float
    agent: str
    device: int
    kind: str
    """HOLD, LOAD, UNLOAD or INFER."""
    model: str
    action: int
    """Its number at the device."""
    batch: int
    """Elements."""
    shard: str = ""
    expected_start_us: int
    expected_us: int
    """What its execution was expected to take."""
    earliest_us: int
    latest_us: int
    start_us: int | None = None
    """None where it never began."""
    duration_us: int
    """Of its execution."""
    input_us: int
    output_us: int
    code: str
    """``ok``, or why not."""
    memory_mb: float
    """Taken on the device by the models that were resident after it."""
    detail: str = ""
    lost: int = 0


class RequestRow(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a request: a row of ``requests``; ``at`` (Unix seconds) is when it came to the shard."""

    at: float
    shard: str
    client: str
    id: int
    pipeline: str
    slo_us: int
    """The pipeline's."""
    budget_us: int
    """The request's own."""
    latency_us: int
    outcome: str
    met: int
    """1 where it was answered in time."""
    stage: str = ""
    """Where it ended, if not at the pipeline's end."""
    cold: int
    """1 where it waited for a model to be loaded."""
    detail: str = ""
    lost: int = 0


COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    ACTIONS: ActionRow.__struct_fields__,
    REQUESTS: RequestRow.__struct_fields__,
}
"""The columns of each kind of row. What has a default may be empty."""
DEFAULT_LIMIT: Final = 512 * 1024**2
"""Bytes of one kind of rows that a process keeps."""
QUEUE: Final = 65_536
"""Rows that wait to be written, at most."""
PERIOD: Final = 0.5
"""Seconds between two writes."""
RETRY: Final = 5.0
"""Seconds until a write that failed is tried again."""
QUIET: Final = 60.0
"""Seconds between two lines of the log about rows that are lost."""
CHUNK: Final = 64
"""Rows that are formatted at a time: the thread that serves cannot run in the meantime (0.2 ms)."""
PAUSE: Final = 0.0005
"""Seconds between two chunks, in which it can: it would not get the interpreter for 5 ms otherwise."""

Row = tuple[int | float | str, ...]


class Telemetry:
    """Rows of one kind. ``who`` is the agent or shard, ``limit`` in bytes, ``queue`` in rows.

    Rows may be added by one thread, from before :meth:`start` on.
    """

    def __init__(self, kind: str, directory: str, who: str, limit: int = DEFAULT_LIMIT, queue: int = QUEUE) -> None:
        self._columns = len(COLUMNS[kind])
        self._kind = kind
        self._who = who
        self._directory = Path(directory)
        self._rows: deque[Row] = deque()
        self._most = queue
        self.lost = 0
        """Rows dropped until now."""
        self._lost_told = 0
        """Of these, what stands in the file."""
        self._lost_logged = 0
        self._log_after = 0.0
        self._unwritten = b""
        """Lines that could not be written yet."""
        self._failing = False
        self._files = RotatingFiles(self._directory, kind, who, _line(COLUMNS[kind]).encode(), limit)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry")

    def add(self, row: Row) -> None:
        """Take a row in (monotonic seconds first, then the columns behind the agent's or shard's name), or count it as
        lost. Never waits."""
        rows = self._rows
        if len(rows) < self._most:
            rows.append(row)
        else:
            self.lost += 1

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what there is (once: a disk that is full is not waited for) and end."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    # ---- telemetry's thread --------------------------------------------------------------------

    def _run(self) -> None:
        delay = PERIOD
        while not self._stopping.wait(delay):
            delay = PERIOD if self._write(PAUSE) else RETRY
        self._write(0.0)
        self._files.close()
        self.lost += len(self._rows) + self._unwritten.count(b"\n")
        self._log_lost(float("inf"))

    def _write(self, pause: float) -> bool:
        """Write what there is, with a pause in seconds after each chunk; False where it could not be written."""
        try:
            while self._unwritten or self._rows:
                if not self._unwritten:
                    self._unwritten = self._take().encode(errors="backslashreplace")
                self._files.write(self._unwritten)
                self._unwritten = b""
                if self._failing:
                    self._failing = False
                    log.info("telemetry is written to %s again", self._directory)
                if pause:
                    time.sleep(pause)
        except OSError as error:
            if not self._failing:
                self._failing = True
                log.warning(
                    "telemetry cannot be written to %s at present (%s); it is tried again every %g s, and nothing "
                    "else is affected",
                    self._directory,
                    error.strerror or error,
                    RETRY,
                )
            return False
        finally:
            self._log_lost(time.monotonic())
        return True

    def _take(self) -> str:
        """The next rows as lines."""
        lost = self.lost - self._lost_told
        self._lost_told += lost
        offset = time.time() - time.monotonic()
        rows = self._rows
        taken = [rows.popleft() for _ in range(min(len(rows), CHUNK))]
        lines = [[f"{row[0] + offset:.6f}", self._who, *row[1:], ""] for row in taken]  # type: ignore[operator]
        if lost:
            lines[0][-1] = lost
        assert len(lines[0]) == self._columns, (self._kind, lines[0])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        found = text.getvalue()
        if found.count("\n") == len(lines):
            return found
        # A line break within a name or a detail would make a row more than one line.
        return "".join(_line([_unbroken(field) for field in line]) for line in lines)

    def _log_lost(self, now: float) -> None:
        if self.lost != self._lost_logged and now >= self._log_after:
            self._lost_logged = self.lost
            self._log_after = now + QUIET
            log.warning("%d rows of telemetry (%s) were lost until now", self.lost, self._kind)


class ActionTelemetry(Telemetry):
    """What an agent did."""

    def __init__(self, directory: str, agent: str, limit: int = DEFAULT_LIMIT, queue: int = QUEUE) -> None:
        super().__init__(ACTIONS, directory, agent, limit, queue)

    def ended(
        self,
        at: float,
        device: int,
        kind: str,
        model: str,
        action: int,
        batch: int,
        shard: str,
        expected_start_us: int,
        expected_us: int,
        earliest_us: int,
        latest_us: int,
        start_us: int,
        duration_us: int,
        input_us: int,
        output_us: int,
        code: str,
        memory_mb: float,
        detail: str,
    ) -> None:
        """An action ended that came ``at`` (monotonic seconds); all starts are relative to that, ``start_us`` is below
        0 where it never began. ``batch`` is in elements."""
        start = start_us if start_us >= 0 else ""
        self.add(
            (
                at,
                device,
                kind,
                model,
                action,
                batch,
                shard,
                expected_start_us,
                expected_us,
                earliest_us,
                latest_us,
                start,
                duration_us,
                input_us,
                output_us,
                code,
                memory_mb,
                detail,
            )
        )


class RequestTelemetry(Telemetry):
    """What became of a shard's requests."""

    def __init__(self, directory: str, shard: str, limit: int = DEFAULT_LIMIT, queue: int = QUEUE) -> None:
        super().__init__(REQUESTS, directory, shard, limit, queue)

    def ended(
        self,
        at: float,
        client: str,
        id: int,
        pipeline: str,
        slo_us: int,
        budget_us: int,
        latency_us: int,
        outcome: str,
        met: int,
        stage: str,
        cold: int,
        detail: str,
    ) -> None:
        """A request ended that came ``at`` (monotonic seconds). ``met`` is 1 where it was answered in time, ``cold``
        where it waited for a model to be loaded."""
        self.add((at, client, id, pipeline, slo_us, budget_us, latency_us, outcome, met, stage, cold, detail))


def _line(fields: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue()


def _unbroken(field: object) -> object:
    return field.replace("\n", " ").replace("\r", " ") if isinstance(field, str) else field
