"""What ``laxity profile`` prints for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from cli.options import print_table
from nodes.meter import StageTimes


def print_measured(measured: Sequence[StageTimes]) -> None:
    """The latencies by batch size, and what they come to for each stage on each device."""
    print_table(_batches(measured))
    print_table(_stages(measured))


def milliseconds(seconds: float) -> str:
    """'1,234.5', '12.35' or '0.0123': four digits at least."""
    value = seconds * 1e3
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"


def _batches(measured: Sequence[StageTimes]) -> Table:
    table = Table("stage", "device")
    for head in ("batch", "runs", "median ms", "p99 ms", "worst ms", "inputs ms", "per second"):
        table.add_column(head, justify="right")
    for times in measured:
        for each in times.batches:
            first = each is times.batches[0]
            table.add_row(
                Text(times.stage if first else ""),
                Text(times.device_type if first else ""),
                str(each.batch),
                str(len(each.latency)),
                *(milliseconds(value) for value in (each.median, each.p99, each.worst, each.inputs_median)),
                f"{each.throughput:,.1f}",
                end_section=each is times.batches[-1],
            )
    return table


def _stages(measured: Sequence[StageTimes]) -> Table:
    table = Table("stage", "device")
    for head in ("α ms", "β ms", "off by up to", "load ms", "memory MB", "most per second"):
        table.add_column(head, justify="right")
    for times in measured:
        fit = times.fit()
        table.add_row(
            Text(times.stage),
            Text(times.device_type),
            milliseconds(fit.alpha),
            milliseconds(fit.beta),
            f"{fit.error:.1%}",
            milliseconds(times.load_seconds),
            f"{times.memory_mb:,.1f}" if times.memory_mb else "not known",
            f"{max(each.throughput for each in times.batches):,.1f}",
        )
    return table
