"""What ``laxity simulate`` prints for people."""

from __future__ import annotations

from collections.abc import Sequence

import click
from rich.table import Table
from rich.text import Text

from cli.options import print_table
from pipelines import format_duration
from simulation.results import RunResult


def print_results(group: Sequence[RunResult], slo: float) -> None:
    """The runs of one pipeline under one load: what they have in common, their figures, and where they dropped."""
    first = group[0]
    own = ", ".join(f"{count} {stage}" for stage, count in zip(first.drops_by_stage, first.split, strict=False))
    others = first.gpus - sum(first.split)
    if first.scaler:
        own = f"scaled by the {first.scaler}"
        others = 0
    divided = f"{own}, {others} for others" if own and others else own or "each serves every stage"
    load = first.offered_rps / first.capacity_rps if first.capacity_rps else 0.0
    click.echo(f"{first.pipeline} under {first.trace}, {first.seconds:g} s, seed {first.seed}")
    click.echo(
        f"{first.gpus} GPUs: {divided}; SLO {format_duration(slo)}\n"
        f"offered {first.offered_rps:,.1f} req/s, load {load:.2f} of {first.capacity_rps:,.1f} req/s; "
        f"fluid bound {first.bound_rps:,.1f} req/s"
    )
    print_table(_figures(group))
    print_table(_drops(group))
    if any(run.scaler for run in group):
        print_table(_scaling(group))


def _figures(group: Sequence[RunResult]) -> Table:
    table = Table("policy")
    for head in (
        "goodput/s",
        "of bound",
        "drops",
        "avoidable",
        "invalid",
        "GPU-s",
        "of all",
        "/ floor",
        "batch",
        "p50 ms",
        "p99 ms",
    ):
        table.add_column(head, justify="right")
    for run in group:
        table.add_row(
            Text(run.policy),
            f"{run.goodput_rps:,.1f}",
            f"{run.bound_ratio:.1%}",
            f"{run.drop_rate:.2%}",
            f"{run.avoidable_drop_rate:.2%}",
            f"{run.invalid_rate:.2%}",
            f"{run.gpu_seconds_busy:,.1f}",
            f"{run.gpu_seconds_busy / run.gpu_seconds_allocated:.1%}",
            f"{run.gpu_seconds_busy / run.gpu_seconds_floor:.3f}" if run.gpu_seconds_floor else "",
            f"{run.mean_batch:.1f}",
            f"{run.latency_ms.p50:.0f}",
            f"{run.latency_ms.p99:.0f}",
        )
    return table


def _drops(group: Sequence[RunResult]) -> Table:
    """Requests dropped or expired by stage, and those that were not good without any stage's doing."""
    table = Table("drops at")
    stages = list(group[0].drops_by_stage)
    for head in (*stages, "elsewhere"):
        table.add_column(Text(head), justify="right")
    for run in group:
        lost = run.submitted - run.outcomes.get("ok", 0)
        counts = [*run.drops_by_stage.values(), lost - sum(run.drops_by_stage.values())]
        table.add_row(Text(run.policy), *(_share(count, run.submitted) for count in counts))
    return table


def _scaling(group: Sequence[RunResult]) -> Table:
    """What was allocated of the whole cluster, and what its moves cost."""
    table = Table("scaled by")
    for head in ("GPU-hours", "of all", "mean GPUs", "most", "moves", "moves/h", "loads", "loading GPU-s", "/ move"):
        table.add_column(head, justify="right")
    for run in group:
        table.add_row(
            Text(f"{run.scaler} ({run.policy})"),
            f"{run.gpu_seconds_allocated / 3600:,.2f}",
            f"{run.gpu_seconds_allocated / (run.gpus * run.seconds):.1%}",
            f"{run.gpu_seconds_allocated / run.seconds:.1f}",
            f"{max(run.series.allocated, default=0.0):.0f}",
            f"{run.moves:,}",
            f"{run.moves_per_hour:,.0f}",
            f"{run.loads:,}",
            f"{run.gpu_seconds_loading:,.1f}",
            f"{run.gpu_seconds_loading / run.moves:.2f}" if run.moves else "",
        )
    return table


def _share(count: int, whole: int) -> str:
    return f"{count:,} ({count / whole:.1%})" if count else "0"
