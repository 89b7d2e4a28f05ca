"""Telemetry for people: its rows as lines, its summary as tables."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from cli.telemetry_rows import AnyRow
from cluster.telemetry import ACTIONS, REQUESTS, ActionRow

MODELS = 20
"""Models that the table lists one by one; the others are in the total."""
_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS: dict[str, tuple[tuple[str, int], ...]] = {
    ACTIONS: (
        ("time", 23),
        ("device", 12),
        ("kind", 6),
        ("model", 28),
        ("batch", 5),
        ("expected", 9),
        ("start", 9),
        ("latest", 9),
        ("expected", 9),
        ("took", 9),
        ("code", 12),
        ("memory MB", 9),
        ("detail", 0),
    ),
    REQUESTS: (
        ("time", 23),
        ("shard", 10),
        ("client", 8),
        ("id", 8),
        ("pipeline", 12),
        ("outcome", 11),
        ("latency", 9),
        ("budget", 9),
        ("stage", 12),
        ("cold", 4),
        ("detail", 0),
    ),
}
"""(head, width) of each column that a line shows."""


def head_line(kind: str) -> str:
    return _line(kind, [head for head, _ in _COLUMNS[kind]])


def row_line(row: AnyRow) -> str:
    """A row as one line, below :func:`head_line`; the starts are those after the action came."""
    when = datetime.fromtimestamp(row.at).isoformat(" ", "milliseconds")
    if isinstance(row, ActionRow):
        fields = [
            when,
            f"{row.agent}/{row.device}",
            row.kind,
            row.model,
            str(row.batch),
            short(row.expected_start_us),
            short(row.start_us),
            short(row.latest_us),
            short(row.expected_us),
            short(row.duration_us),
            row.code,
            f"{row.memory_mb:g}",
            row.detail,
        ]
        return _line(ACTIONS, fields)
    fields = [
        when,
        row.shard,
        row.client[:8],
        str(row.id),
        row.pipeline,
        row.outcome,
        short(row.latency_us),
        short(row.budget_us),
        row.stage,
        "cold" if row.cold else "",
        row.detail,
    ]
    return _line(REQUESTS, fields)


def _line(kind: str, fields: list[str]) -> str:
    return "  ".join(field.ljust(width) for field, (_, width) in zip(fields, _COLUMNS[kind], strict=True)).rstrip()


def short(microseconds: float | None) -> str:
    """A time of any length in about four figures; '-' for none."""
    if microseconds is None:
        return "-"
    for unit, length in (("s", 1e6), ("ms", 1e3)):
        if abs(microseconds) >= length:
            return f"{microseconds / length:.4g} {unit}"
    return f"{microseconds:.4g} µs"


def summary_tables(described: dict[str, Any]) -> Iterator[Table]:
    """What :meth:`cli.telemetry_summary.Summary.described` says."""
    if described["actions"]:
        yield _predictions(described["actions"])
    if any(one["most_mb"] for one in described["memory"]):
        yield _memory(described["memory"])
    if described["requests"]:
        yield _requests(described["requests"])


def _predictions(actions: list[dict[str, Any]]) -> Table:
    table = Table(
        "action",
        "model",
        "count",
        "codes",
        "took p50",
        "p99/p50",
        "p99.99/p50",
        "predicted over p50 / p99",
        "under p50 / p99",
        "start off p50 / p99",
        "late starts",
        "hits",
        title="actions",
        title_justify="left",
    )
    models = [one for one in actions if one["model"] is not None]
    listed = sorted(models, key=lambda one: -one["count"])[:MODELS]
    for one in actions:
        several = sum(other["kind"] == one["kind"] for other in models) > 1
        if one["model"] is None and several:
            table.add_row(one["kind"], Text("all models", style="italic"), *_prediction(one))
        elif one in listed:
            table.add_row(one["kind"], Text(one["model"]), *_prediction(one))
    if len(models) > len(listed):
        table.caption = f"{len(models) - len(listed)} more lines: see --json, or choose with --model"
    return table


def _prediction(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{one['count']:,}",
        _counts(one["codes"]),
        short(one["duration"]["p50"]),
        _ratio(one["p99_over_median"]),
        _ratio(one["p9999_over_median"]),
        _pair(one["over"]),
        _pair(one["under"]),
        _pair(one["start_error"]),
        f"{one['late_starts']:,}",
        _percent(one["hit_part"]) if one["hit_part"] is not None else "",
    )


def _memory(devices: list[dict[str, Any]]) -> Table:
    table = Table("device", "most MB", "when", "over time", title="memory", title_justify="left")
    for one in devices:
        when = datetime.fromtimestamp(one["at"]).isoformat(" ", "seconds")
        table.add_row(
            Text(f"{one['agent']}/{one['device']}"),
            f"{one['most_mb']:,.1f}",
            when,
            _bars([value for _, value in one["timeline"]], one["most_mb"]),
        )
    return table


def _requests(pipelines: list[dict[str, Any]]) -> Table:
    table = Table(
        "pipeline",
        "requests",
        "outcomes",
        "goodput",
        "met",
        "latency p50",
        "p99",
        "p99.9",
        "warm",
        "cold",
        "cold p50 / p99",
        title="requests",
        title_justify="left",
    )
    for one in pipelines:
        if one["pipeline"] is None and len(pipelines) == 2:
            continue  # the only pipeline says it all
        goodput = one["goodput_rps"]
        table.add_row(
            Text(one["pipeline"]) if one["pipeline"] is not None else Text("all pipelines", style="italic"),
            f"{one['count']:,}",
            _counts(one["outcomes"]),
            f"{goodput:,.1f}/s" if goodput is not None else "-",
            _percent(one["met_part"]),
            short(one["latency"]["p50"]),
            short(one["latency"]["p99"]),
            short(one["latency"]["p999"]),
            _percent(one["warm_part"]),
            f"{one['cold']:,}",
            _pair(one["cold_latency"]),
        )
    return table


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _pair(quantiles: dict[str, Any]) -> str:
    return f"{short(quantiles['p50'])} / {short(quantiles['p99'])}" if quantiles["p50"] is not None else "-"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:.4g} %"


def _bars(values: list[float], most: float) -> str:
    return "".join(_BARS[round(value / most * (len(_BARS) - 1))] if most else _BARS[0] for value in values)
