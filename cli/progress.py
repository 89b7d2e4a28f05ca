"""What people see while a cluster starts, and while runs are simulated."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cli.local_setup import Loading
from cli.rollout import ModelLoading


class LoadingDisplay:
    """Shows :class:`~cli.local_cluster.Loading` on stderr: a live table on a terminal, a line a change elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, transient=True) if self._console.is_terminal else None
        self._spinner = Spinner("dots", "starting the cluster; models are loaded and measured")
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, loading: Loading) -> None:
        if self._live is not None:
            self._live.update(self._table(loading))
            return
        for part, doing in loading.parts.items():
            self._tell(f"{part}: {doing}")
        for line in model_lines(loading.models):
            self._tell(line)
        if loading.waits:
            self._tell(f"waiting: {loading.waits}")

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._console.print(Text(line), soft_wrap=True)

    def _table(self, loading: Loading) -> Group:
        table = Table.grid(padding=(0, 2))
        for part, doing in loading.parts.items():
            table.add_row(Text(part), Text(doing))
        for model in loading.models:
            table.add_row(Text(model.model), f"{model.ready}/{model.devices} ready", Text(_doing(model)))
        return Group(self._spinner, table, Text(f"waiting: {loading.waits}" if loading.waits else ""))


def model_lines(models: Sequence[ModelLoading]) -> list[str]:
    """A line for each model of which there is anything to say."""
    lines = []
    for model in models:
        if model.devices and model.ready == model.devices:
            lines.append(f"{model.model}: ready on {_devices(model.devices)}")
        elif model.doing:
            lines.append(f"{model.model}: {model.doing}")
    return lines


class StepDisplay:
    """Shows on stderr what is being done: beside a spinner on a terminal, a line a change elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status = self._console.status("") if self._console.is_terminal else None

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, what: str, doing: str) -> None:
        text = Text(f"{what}: {doing}")
        if self._status is not None:
            self._status.update(text)
        else:
            self._console.print(text, soft_wrap=True)


class RunsDisplay:
    """Shows how far simulated runs are, a bar each, on stderr where that is a terminal."""

    def __init__(self, labels: Sequence[str]) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks = [self._progress.add_task(label, total=1.0) for label in labels]

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, run: int, part: float) -> None:
        """``part`` (0 to 1) of the run of that number is done."""
        self._progress.update(self._tasks[run], completed=part)


def _doing(model: ModelLoading) -> str:
    return "" if model.ready == model.devices else model.doing


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"
