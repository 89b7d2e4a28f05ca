"""How a load goes, each second, on stderr where that is a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cli.load.generator import Generator
from cli.load.tally import Bin, StepTally
from laxity.outcomes import Outcome


class Progress:
    """One line for the step that runs."""

    def __init__(self, steps: int) -> None:
        console = Console(stderr=True)
        self._live = Live(console=console, transient=True, refresh_per_second=2) if console.is_terminal else None
        self._steps = steps
        self._step = 0
        self._label = ""
        self._shown = 0.0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, label: str) -> None:
        self._step += 1
        self._label = label
        self._shown = 0.0

    def show(self, elapsed: float, tally: StepTally, generator: Generator) -> None:
        """How far the step is, some times a second."""
        if self._live is None or elapsed - self._shown < 1.0:
            return
        self._shown = elapsed
        series = tally.series
        place = int(elapsed / series.width) - 1
        last = series.bins[place] if 0 <= place < len(series.bins) else Bin()
        self._live.update(Text(self._line(elapsed, last, series.width, tally, generator)))

    def _line(self, elapsed: float, last: Bin, width: float, tally: StepTally, generator: Generator) -> str:
        ended = sum(last.outcomes.values())
        good = last.outcomes[Outcome.OK]
        half, most = last.latency.quantile(0.5), last.latency.quantile(0.99)
        latency = "" if half is None or most is None else f", p50 {half / 1e3:.1f} ms, p99 {most / 1e3:.1f} ms"
        step = f"{self._step}/{self._steps} " if self._steps > 1 else ""
        sent = f"{last.offered / width:,.0f}/s offered, {good / width:,.0f}/s good"
        rest = f"{(ended - good + last.unsent) / width:,.0f}/s not{latency}; {generator.in_flight:,} in flight"
        so_far = f"{tally.ok:,} of {tally.offered:,} good so far"
        return f"{step}{self._label} at {elapsed:,.0f} s: {sent}, {rest}, {so_far}"
