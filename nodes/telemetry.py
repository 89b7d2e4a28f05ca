"""An agent's actions as rows of telemetry."""

from __future__ import annotations

from cluster.telemetry import ActionTelemetry
from nodes.action_record import ActionRecord


def note(telemetry: ActionTelemetry, device: int, record: ActionRecord) -> None:
    """Have telemetry note an action of a device that has ended."""
    came, started = record.came, record.started
    telemetry.ended(
        came,
        device,
        record.kind,
        record.model,
        record.asked,
        record.elements,
        record.session.shard if record.session is not None else "",
        int((record.expected_start - came) * 1e6),
        int(record.expected * 1e6),
        int((record.earliest - came) * 1e6),
        int((record.latest - came) * 1e6),
        int((started - came) * 1e6) if started is not None else -1,
        int(record.duration * 1e6),
        int(record.input * 1e6),
        int(record.output * 1e6),
        record.code,
        record.memory_mb,
        record.detail,
    )
