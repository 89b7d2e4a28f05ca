"""What is known of models before a device holds them: measured there or elsewhere, stated, or guessed."""

from __future__ import annotations

from typing import Final

import msgspec

from pipelines.models import ModelNotFoundError, is_model_file, resolve_model_file
from pipelines.spec import PipelineSpec

FILE_FACTOR: Final = 1.2
"""A model whose memory nobody knows is taken to need so many times its file's size."""


class Measured(msgspec.Struct, frozen=True):
    """What was found out about a model on devices of a type."""

    profile: list[tuple[int, float]]
    """(batch, seconds)."""
    load_seconds: float
    """What paging it in takes."""
    memory_mb: float
    """What it takes of the device's memory; 0 where that could not be found out."""


Known = dict[tuple[str, str], Measured]
"""By (model key, device type)."""


def memory_needed(spec: PipelineSpec, stage: str, device_type: str, measured: Measured | None) -> float:
    """The megabytes that a model takes of a device's memory: as measured, as its profile says, or by the size of its
    file; 0 where nobody knows."""
    if measured is not None and measured.memory_mb > 0.0:
        return measured.memory_mb
    profile = spec.stages[stage].profile
    stated = profile.on(device_type).memory_mb if profile is not None else None
    if stated is not None:
        return stated
    if not is_model_file(spec.stages[stage]):
        return 0.0
    try:
        return FILE_FACTOR * resolve_model_file(spec, stage).stat().st_size / 1e6
    except (ModelNotFoundError, OSError):
        return 0.0  # holding it will say what is wrong
