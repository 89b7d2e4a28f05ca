"""Pictures to try the ``classify`` pipeline with, drawn here, with the label that fits what they say."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.ocr.samples import Sample, draw_note

TEXTS = {
    "billing": ("Dear customer,", "The invoice is due in 30 days.", "Please pay by bank transfer."),
    "sports": ("Late goal decides the derby", "The striker scored twice", "before the final whistle."),
    "weather": ("Tomorrow: heavy rain and wind", "Snow above 800 metres,", "temperatures fall to 2 degrees."),
}


@dataclass(frozen=True)
class Labelled(Sample):
    """A picture file, its lines, and the one of :data:`pipelines.classify.detect.LABELS` that fits them."""

    label: str


def draw_samples() -> list[Labelled]:
    """The samples; the same at every call."""
    return [Labelled(f"{label}-note", draw_note(lines), lines, label) for label, lines in TEXTS.items()]
