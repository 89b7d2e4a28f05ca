"""Stage ``detect``: the request's picture and labels, and where the text is, as in the pipeline ``ocr``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.ocr import detect
from pipelines.ocr.detect import Framed

LABELS = ("billing", "food", "politics", "sports", "travel", "weather")
"""What is chosen from where the request brings no labels."""
MOST_LABELS = 100
LONGEST_LABEL = 1000
"""Characters; the encoder reads some 256 words of a text."""

Kept = tuple[Framed, list[str]]


def before(request: Any) -> tuple[npt.NDArray[np.float32], Kept]:
    """The picture as the detector takes it. ``request`` is a picture as for ``ocr``, or a dict of ``picture`` and
    ``labels``, a list of texts. TypeError or ValueError where it is neither."""
    picture, labels = _parse(request)
    feed, framed = detect.before(picture)
    return feed, (framed, labels)


def after(heat: npt.NDArray[np.float32], kept: Kept) -> dict[str, Any]:
    """``boxes`` and ``crops`` as for ``ocr``, and the ``labels``."""
    framed, labels = kept
    return {**detect.after(heat, framed), "labels": labels}


def _parse(request: Any) -> tuple[Any, list[str]]:
    if not isinstance(request, dict):
        return request, list(LABELS)
    unknown = sorted(set(request) - {"picture", "labels"})
    if "picture" not in request or unknown:
        what = f"has {unknown[0]!r}" if unknown else "lacks 'picture'"
        raise ValueError(f"the request {what}: send a picture, or a dict of 'picture' and 'labels'")
    labels = request.get("labels", LABELS)
    if not isinstance(labels, (list, tuple)) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise TypeError("'labels' must be a list of texts that are not empty, as in ['billing', 'sports']")
    if not 1 <= len(labels) <= MOST_LABELS:
        raise ValueError(f"{len(labels)} labels: send 1 to {MOST_LABELS}")
    if max(map(len, labels)) > LONGEST_LABEL:
        raise ValueError(f"a label of {max(map(len, labels))} characters: send at most {LONGEST_LABEL}")
    return request["picture"], list(dict.fromkeys(labels))
