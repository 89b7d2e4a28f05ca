"""The tables of `laxity top`: pipelines, stages, nodes and drops; a node's devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cli.live.view import LiveDevice, LiveDrop, LiveNode, LivePipeline, LiveStage
from cli.top.cells import (
    Cell,
    Span,
    Tone,
    bar,
    clean,
    clock,
    count,
    counted,
    duration,
    joined,
    middle,
    percent,
    rate,
    share_tone,
    sparkline,
)
from cli.top.listing import Column, Listing
from cli.top.totals import DEVICE_TONES, dropped, emptying, ended, held, letter, share

OUTCOME_TONES: dict[str, Tone] = {"dropped": "warn", "expired": "warn", "failed": "bad", "unavailable": "bad"}
_FULL_LOAD = 1.0


@dataclass(frozen=True)
class StageRow:
    """A stage and the pipeline that it belongs to."""

    pipeline: str
    stage: LiveStage


def pipeline_share(pipeline: LivePipeline) -> float | None:
    return share(pipeline.good, ended(pipeline.outcomes))


def _dropped(pipeline: LivePipeline) -> float:
    return dropped(pipeline.outcomes)


def _toned(text: str, tone: Tone) -> Cell:
    return [(text, tone)]


def _alarming(value: float) -> Cell:
    """A rate that had better be nothing."""
    return _toned(rate(value), "bad" if value else "quiet")


def _traffic(pipeline: LivePipeline, width: int) -> Cell:
    if pipeline.waits_for:
        return _toned(f"waits: {clean(pipeline.waits_for)}", "warn")
    return sparkline(pipeline.history, width)


def _tail(pipeline: LivePipeline) -> Cell:
    if pipeline.latency is None:
        return _toned("-", "quiet")
    late = bool(pipeline.slo) and pipeline.latency[1] > pipeline.slo
    return _toned(duration(pipeline.latency[1]), "bad" if late else "")


def _admission(pipeline: LivePipeline) -> Cell:
    part = pipeline.admission
    return _toned(percent(part), "warn" if part is not None and part < 1.0 else "quiet" if part is None else "")


PIPELINES: Listing[LivePipeline] = Listing(
    "Pipelines",
    (
        Column("PIPELINE", 12, lambda row, _: clean(row.name), lambda row: row.name, most=40),
        Column("OFFERED/S", 9, lambda row, _: rate(row.offered), lambda row: row.offered, right=True),
        Column("GOOD/S", 7, lambda row, _: rate(row.good), lambda row: row.good, right=True),
        Column(
            "GOOD",
            6,
            lambda row, _: _toned(percent(pipeline_share(row)), share_tone(pipeline_share(row))),
            lambda row: -1.0 if (part := pipeline_share(row)) is None else part,
            right=True,
        ),
        Column(
            "DROP/S", 6, lambda row, _: _alarming(dropped(row.outcomes)), lambda row: dropped(row.outcomes), 1, True
        ),
        Column("P50", 6, lambda row, _: duration(_latency(row, 0)), lambda row: _latency(row, 0) or 0.0, 6, True),
        Column("P99", 6, lambda row, _: _tail(row), lambda row: _latency(row, 1) or 0.0, 2, True),
        Column("SLO", 6, lambda row, _: _toned(duration(row.slo), "quiet"), lambda row: row.slo, 2, True),
        Column("FLIGHT", 6, lambda row, _: count(row.in_flight), lambda row: row.in_flight, 4, True),
        Column("λ", 4, lambda row, _: _plain(row.quantile), lambda row: row.quantile or 0.0, 7, True),
        Column("WINDOW", 6, lambda row, _: duration(row.window), lambda row: row.window or 0.0, 7, True),
        Column("ADMIT", 6, lambda row, _: _admission(row), lambda row: row.admission or 0.0, 5, True),
        Column("GOOD OF OFFERED", 15, _traffic, _dropped, 3, fills=True),
    ),
    lambda view: view.pipelines,
    lambda row: row.name,
    lambda row: row.name,
    "No pipeline is served: apply one with `laxity pipeline apply`.",
)


def _latency(pipeline: LivePipeline, which: int) -> float | None:
    return pipeline.latency[which] if pipeline.latency is not None else None


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def stage_rows(pipelines: Iterable[LivePipeline]) -> list[StageRow]:
    """Their stages, in topological order."""
    return [StageRow(pipeline.name, stage) for pipeline in pipelines for stage in pipeline.stages]


def _slack(row: StageRow) -> Cell:
    if row.stage.slack is None:
        return _toned("-", "quiet")
    least = row.stage.least_slack
    tone: Tone = "warn" if least is not None and least <= 0.0 else ""
    return [(duration(least), tone), ("/", "quiet"), (duration(row.stage.slack), "")]


def _stage_name(row: StageRow) -> Cell:
    spans: list[Span] = [(clean(row.stage.name), "bad" if row.stage.failed else "")]
    if row.stage.map:
        spans.append((" ×n", "quiet"))
    return spans


def _note(row: StageRow) -> Cell:
    if row.stage.failed:
        return _toned(f"failed {clean(row.stage.failed)}", "bad")
    return "" if row.stage.devices else _toned("no device", "warn")


STAGES: Listing[StageRow] = Listing(
    "Stages",
    (
        Column("PIPELINE", 9, lambda row, _: clean(row.pipeline), lambda row: row.pipeline, most=30),
        Column("STAGE", 12, lambda row, _: _stage_name(row), lambda row: row.stage.name, most=30),
        Column("ARR/S", 6, lambda row, _: rate(row.stage.arrived), lambda row: row.stage.arrived, 0, True),
        Column("BATCH/S", 7, lambda row, _: rate(row.stage.batches), lambda row: row.stage.batches, 7, True),
        Column("BATCH", 5, lambda row, _: rate(row.stage.batch), lambda row: row.stage.batch, 2, True),
        Column("QUEUE", 5, lambda row, _: count(row.stage.waiting), lambda row: row.stage.waiting, 1, True),
        Column("QUEUED", 6, lambda row, _: duration(row.stage.queued), lambda row: row.stage.queued, 3, True),
        Column("EXEC", 6, lambda row, _: duration(row.stage.execution), lambda row: row.stage.execution, 3, True),
        Column("SLACK10/50", 13, lambda row, _: _slack(row), lambda row: row.stage.slack or 0.0, 4, True),
        Column("LOAD", 5, lambda row, _: _load(row.stage), lambda row: row.stage.load_factor, 5, True),
        Column("GPUS", 4, lambda row, _: count(row.stage.devices), lambda row: row.stage.devices, 6, True),
        Column("DROP/S", 6, lambda row, _: _alarming(row.stage.dropped), lambda row: row.stage.dropped, 1, True),
        Column("ORDER", 5, lambda row, _: clean(row.stage.order), lambda row: row.stage.order, 8),
        Column("NOTE", 10, lambda row, _: _note(row), lambda row: row.stage.failed, 9, fills=True),
    ),
    lambda view: stage_rows(view.pipelines),
    lambda row: f"{row.pipeline}/{row.stage.name}",
    lambda row: f"{row.pipeline}/{row.stage.name}",
    "No pipeline is served: apply one with `laxity pipeline apply`.",
)


def _load(stage: LiveStage) -> Cell:
    tone: Tone = "bad" if stage.load_factor > _FULL_LOAD else "" if stage.load_factor else "quiet"
    return _toned(f"{stage.load_factor:.2f}", tone)


def node_busy(node: LiveNode) -> float:
    """The part of the time in which its devices executed."""
    return sum(device.utilization for device in node.devices) / len(node.devices) if node.devices else 0.0


def node_state(node: LiveNode) -> Span:
    tones: dict[str, Tone] = {"active": "good", "draining": "warn", "standby": "quiet", "lost": "bad"}
    return (node.state, tones[node.state])


def _devices(node: LiveNode, width: int) -> Cell:
    """A letter each where there is room, else how many of each."""
    if len(node.devices) <= width:
        return joined((letter(device.state), DEVICE_TONES[device.state]) for device in node.devices)
    states = Counter(device.state for device in node.devices)
    spans: list[Span] = [(f"{states[how]}{letter(how)} ", tone) for how, tone in DEVICE_TONES.items() if states[how]]
    return joined(spans)


def busy_bar(part: float, width: int) -> list[Span]:
    """'██████▌    66%'; a track of points where nothing is."""
    size = max(1, width - 5)
    filled = bar(part, size).rstrip()
    return [(filled, "good"), ("·" * (size - len(filled)), "quiet"), (f"{part * 100:4.0f}%", "")]


def _why(node: LiveNode) -> Cell:
    if emptying(node):
        return _toned(f"{counted(held(node), 'model')} left · {clean(node.why)}", "warn")
    return _toned(clean(node.why), "quiet" if node.state != "lost" else "bad")


def models_by_pipeline(devices: Sequence[LiveDevice]) -> str:
    """'ocr 8, tm 4': on how many devices their stages' models lie, all stages together."""
    counts = Counter(model.partition("/")[0] for device in devices for model in device.models)
    return ", ".join(f"{clean(pipeline)} {number}" for pipeline, number in sorted(counts.items())) or "-"


NODES: Listing[LiveNode] = Listing(
    "Nodes",
    (
        Column("NODE", 10, lambda row, _: clean(row.name), lambda row: row.name, most=30),
        Column("STATE", 8, lambda row, _: [node_state(row)], lambda row: row.state),
        Column("DEVICES", 8, _devices, lambda row: -len(row.devices), most=24),
        Column("BUSY", 15, lambda row, width: busy_bar(node_busy(row), width), node_busy, 1),
        Column("MODELS", 12, lambda row, _: models_by_pipeline(row.devices), lambda row: -held(row), 3, most=36),
        Column("HOST", 10, lambda row, _: _toned(clean(row.host), "quiet"), lambda row: row.host, 4, most=30),
        Column("WHY", 18, lambda row, _: _why(row), lambda row: row.why, 2, fills=True),
    ),
    lambda view: view.nodes,
    lambda row: row.name,
    lambda row: f"{row.name} {row.host} {row.state}",
    "No node is registered: start one with `laxity node run`.",
)


def _outcome(drop: LiveDrop) -> Cell:
    return _toned(clean(drop.outcome), OUTCOME_TONES.get(drop.outcome, ""))


def _request(drop: LiveDrop, width: int) -> Cell:
    return _toned(middle(clean(drop.request), width), "quiet")


DROPS: Listing[LiveDrop] = Listing(
    "Drops",
    (
        Column("TIME", 8, lambda row, _: _toned(clock(row.at), "quiet"), lambda row: row.at),
        Column("PIPELINE", 8, lambda row, _: clean(row.pipeline), lambda row: row.pipeline, most=24),
        Column("STAGE", 9, lambda row, _: clean(row.stage) or "-", lambda row: row.stage, most=24),
        Column("OUTCOME", 11, lambda row, _: _outcome(row), lambda row: row.outcome, 1),
        Column("REASON", 24, lambda row, _: clean(row.detail), lambda row: row.detail, 2, fills=True),
        Column("REQUEST", 14, _request, lambda row: row.request, 3),
    ),
    lambda view: view.drops,
    lambda row: f"{row.shard} {row.request} {row.stage} {row.at}",
    lambda row: f"{row.pipeline} {row.stage} {row.outcome} {row.detail} {row.request}",
    "No request was dropped, expired or failed lately.",
)


def _memory(device: LiveDevice) -> str:
    if not device.memory_mb and not device.budget_mb:
        return "-"
    return f"{device.memory_mb:,.0f}" + (f" of {device.budget_mb:,.0f}" if device.budget_mb else "")


def devices_of(node: str) -> Listing[LiveDevice]:
    """The devices of one node."""
    return Listing(
        "Devices",
        (
            Column("GPU", 3, lambda row, _: str(row.number), lambda row: -row.number, right=True),
            Column("TYPE", 8, lambda row, _: clean(row.type), lambda row: row.type, most=30),
            Column("STATE", 8, lambda row, _: _toned(row.state, DEVICE_TONES[row.state]), lambda row: row.state),
            Column("BUSY", 15, lambda row, width: busy_bar(row.utilization, width), lambda row: row.utilization, 1),
            Column("SHARD", 7, lambda row, _: clean(row.shard) or "-", lambda row: row.shard, 3, most=24),
            Column("MEMORY MB", 15, lambda row, _: _memory(row), lambda row: row.memory_mb, 4, True),
            Column("MODELS", 16, lambda row, _: clean(", ".join(row.models)) or "-", _count_models, 2, fills=True),
        ),
        lambda view: next((one.devices for one in view.nodes if one.name == node), []),
        lambda row: str(row.number),
        lambda row: f"{row.type} {row.state} {' '.join(row.models)}",
        "It has no devices.",
    )


def _count_models(device: LiveDevice) -> float:
    return -len(device.models)
