"""What telemetry's rows say taken together: predictions, windows, memory and outcomes, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from cli.quantiles import Quantiles
from cluster.telemetry import ActionRow, RequestRow

TOTAL = ""
"""The key of what is of all models, or of all pipelines."""
BUCKETS = 60
"""Points of a timeline at most."""


class Executions:
    """How long the actions of one kind took, by batch size: what a batch of 1 takes says nothing of one of 16."""

    def __init__(self) -> None:
        self.by_batch: dict[int, Quantiles] = {}

    def add(self, batch: int, microseconds: float) -> None:
        found = self.by_batch.get(batch)
        if found is None:
            found = self.by_batch[batch] = Quantiles()
        found.add(microseconds)

    def over_median(self) -> Quantiles:
        """All of them in thousandths of their batch size's median."""
        relative = Quantiles()
        for quantiles in self.by_batch.values():
            median = quantiles.quantile(0.5)
            if median:
                relative.merge(quantiles, 1000.0 / median)
        return relative

    def all(self) -> Quantiles:
        together = Quantiles()
        for quantiles in self.by_batch.values():
            together.merge(quantiles)
        return together


class ActionFigures:
    """Actions of one kind on one model, or on all."""

    def __init__(self) -> None:
        self.count = 0
        self.elements = 0
        self.codes: Counter[str] = Counter()
        self.over = Quantiles()
        """Microseconds by which those were predicted to take too long that were, and ``under`` likewise."""
        self.under = Quantiles()
        self.start_error = Quantiles()
        """Microseconds between the expected start and the actual one."""
        self.executions = Executions()
        """Of one model's actions."""
        self.late = 0
        """Begun after their window had closed, which must never be."""
        self.latest = 0
        """By how many microseconds the latest of them."""
        self.cold = 0
        """The first batches of a model after it was loaded."""

    def add(self, row: ActionRow, cold: bool) -> None:
        self.count += 1
        self.elements += row.batch
        self.codes[row.code] += 1
        self.cold += cold
        if row.start_us is None:
            return
        if row.start_us > row.latest_us:
            self.late += 1
            self.latest = max(self.latest, row.start_us - row.latest_us)
        if row.code == "ok":
            self.start_error.add(abs(row.start_us - row.expected_start_us))
            error = row.expected_us - row.duration_us
            (self.over if error > 0 else self.under).add(abs(error))

    def described(self, kind: str, executions: list[Executions]) -> dict[str, Any]:
        """As plain data, times in microseconds; ``executions`` are those of these actions, by model."""
        relative, together = Quantiles(), Quantiles()
        for each in executions:
            relative.merge(each.over_median())
            together.merge(each.all())
        predicted = self.over.count + self.under.count
        ok = self.codes["ok"]
        return {
            "count": self.count,
            "elements": self.elements,
            "codes": dict(self.codes.most_common()),
            "over": {"part": _part(self.over.count, predicted)} | _quantiles(self.over),
            "under": {"part": _part(self.under.count, predicted)} | _quantiles(self.under),
            "start_error": _quantiles(self.start_error),
            "duration": _quantiles(together),
            "p99_over_median": _thousandth(relative.quantile(0.99)),
            "p9999_over_median": _thousandth(relative.quantile(0.9999)),
            "late_starts": self.late,
            "latest_start": self.latest,
            "hit_part": _part(ok - self.cold, ok) if kind == "INFER" else None,
        }


class Timeline:
    """The highest of a value over time, in up to :data:`BUCKETS` steps of even length, which grows with the time."""

    def __init__(self) -> None:
        self.most = 0.0
        self.at = 0.0
        self._step = 1.0
        self._buckets: dict[int, float] = {}

    def add(self, at: float, value: float) -> None:
        if value > self.most or not self.at:
            self.most, self.at = value, at
        number = int(at // self._step)
        self._buckets[number] = max(self._buckets.get(number, 0.0), value)
        while max(self._buckets) - min(self._buckets) >= BUCKETS:
            self._step *= 2.0
            coarser: dict[int, float] = {}
            for number, highest in self._buckets.items():
                coarser[number // 2] = max(coarser.get(number // 2, 0.0), highest)
            self._buckets = coarser

    def points(self) -> Iterator[tuple[float, float]]:
        """(Unix seconds, highest value) of each step."""
        for number, value in sorted(self._buckets.items()):
            yield number * self._step, value


class RequestFigures:
    """Requests of one pipeline, or of all."""

    def __init__(self) -> None:
        self.count = 0
        self.outcomes: Counter[str] = Counter()
        self.met = 0
        self.latency = Quantiles()
        """Of those that were answered ``ok``, in microseconds."""
        self.cold = 0
        """Requests that waited for a model to be loaded."""
        self.cold_latency = Quantiles()
        self.first = float("inf")
        self.last = 0.0

    def add(self, row: RequestRow) -> None:
        self.count += 1
        self.outcomes[row.outcome] += 1
        self.met += row.met
        self.cold += row.cold
        self.first = min(self.first, row.at)
        self.last = max(self.last, row.at)
        if row.outcome == "ok":
            self.latency.add(row.latency_us)
            if row.cold:
                self.cold_latency.add(row.latency_us)

    def described(self) -> dict[str, Any]:
        seconds = self.last - self.first
        return {
            "count": self.count,
            "outcomes": dict(self.outcomes.most_common()),
            "met": self.met,
            "met_part": _part(self.met, self.count),
            "seconds": round(seconds, 3),
            "goodput_rps": round(self.met / seconds, 3) if seconds > 0 else None,
            "latency": _quantiles(self.latency),
            "cold": self.cold,
            "warm_part": _part(self.count - self.cold, self.count),
            "cold_latency": _quantiles(self.cold_latency),
        }


class Summary:
    """Of all rows that :meth:`add` is given; those of a process in the order in which they were written."""

    def __init__(self) -> None:
        self.actions: dict[tuple[str, str], ActionFigures] = {}
        """By (kind, model)."""
        self.memory: dict[tuple[str, int], Timeline] = {}
        """By device: what the resident models took."""
        self.requests: dict[str, RequestFigures] = {}
        self.lost = 0
        """Rows that their processes had to drop."""
        self._fresh: set[tuple[str, int, str]] = set()
        """(agent, device, model) that were loaded, and have not run since."""

    def add(self, row: ActionRow | RequestRow) -> None:
        self.lost += row.lost
        if isinstance(row, ActionRow):
            self._action(row)
        else:
            for pipeline in (row.pipeline or "(unknown)", TOTAL):
                self.requests.setdefault(pipeline, RequestFigures()).add(row)

    def _action(self, row: ActionRow) -> None:
        device = (row.agent, row.device)
        held = (row.agent, row.device, row.model)
        cold = False
        if row.code == "ok":
            if row.kind == "LOAD":
                self._fresh.add(held)
            elif row.kind == "INFER":
                cold = held in self._fresh
                self._fresh.discard(held)
        for model in (row.model, TOTAL):
            key = (row.kind, model)
            figures = self.actions.get(key)
            if figures is None:
                figures = self.actions[key] = ActionFigures()
            figures.add(row, cold)
            if model != TOTAL and row.code == "ok" and row.start_us is not None:
                figures.executions.add(row.batch, row.duration_us)
        self.memory.setdefault(device, Timeline()).add(row.at, row.memory_mb)

    def described(self) -> dict[str, Any]:
        """As plain data; times in microseconds unless the name says otherwise."""
        return {
            "actions": [
                {"kind": kind, "model": model or None} | self.described_actions(kind, model)
                for kind, model in sorted(self.actions)
            ],
            "memory": [
                {
                    "agent": agent,
                    "device": number,
                    "most_mb": timeline.most,
                    "at": timeline.at,
                    "timeline": [[at, value] for at, value in timeline.points()],
                }
                for (agent, number), timeline in sorted(self.memory.items())
            ],
            "requests": [
                {"pipeline": pipeline or None} | figures.described()
                for pipeline, figures in sorted(self.requests.items())
            ],
            "lost_rows": self.lost,
        }

    def described_actions(self, kind: str, model: str) -> dict[str, Any]:
        """The actions of a kind on a model, or on all (:data:`TOTAL`)."""
        figures = self.actions[kind, model]
        if model != TOTAL:
            batches = figures.executions.by_batch
            return figures.described(kind, [figures.executions]) | {
                "by_batch": {
                    batch: {"count": taken.count} | _quantiles(taken) for batch, taken in sorted(batches.items())
                }
            }
        each = [other.executions for (of, name), other in self.actions.items() if of == kind and name != TOTAL]
        return figures.described(kind, each)


def _quantiles(of: Quantiles) -> dict[str, float | None]:
    return {
        name: None if value is None else round(value, 1)
        for name, value in (
            ("p50", of.quantile(0.5)),
            ("p99", of.quantile(0.99)),
            ("p999", of.quantile(0.999)),
            ("p9999", of.quantile(0.9999)),
            ("most", of.most if of.count else None),
        )
    }


def _thousandth(value: float | None) -> float | None:
    return None if value is None else round(value / 1000.0, 4)


def _part(count: int, of: int) -> float | None:
    return round(count / of, 6) if of else None
