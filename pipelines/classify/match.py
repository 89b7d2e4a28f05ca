"""Stage ``match``: the label nearest to the text."""

from __future__ import annotations

from typing import Any

import numpy as np


def nearest(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each picture the ``label`` of the highest score, and the ``scores``: each label's cosine similarity to the
    text, from the best to the worst. ``embeddings`` are unit vectors, first the text's, then the labels'. Without text
    there is no label (None) and no score."""
    return [_nearest(each["embeddings"], each["labels"]) for each in inputs]


def _nearest(embeddings: list[Any], labels: list[str]) -> dict[str, Any]:
    if not embeddings:
        return {"label": None, "scores": {}}
    text, *others = embeddings
    similar = np.stack(others) @ text
    ranked = sorted(zip(labels, similar.tolist(), strict=True), key=lambda each: -each[1])
    return {"label": ranked[0][0], "scores": dict(ranked)}


def sample() -> dict[str, Any]:
    """For profiling: as many vectors as a text and three labels have."""
    vectors = np.random.default_rng(1).normal(size=(4, 384)).astype(np.float32)
    return {"embeddings": list(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)), "labels": ["a", "b", "c"]}
