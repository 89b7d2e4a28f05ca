"""Stage ``recognize``: what a line says. PP-OCR's recogniser with rapidocr's decoding."""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.ocr.pictures import Picture

MODEL = "models/PP-OCRv6_rec_small.onnx"
"""Inside the package rapidocr; its metadata holds the characters that its classes stand for."""
HEIGHT = 48
MIN_WIDTH = 64
MAX_WIDTH = 3200
"""Wider lines are squeezed; this is about 200 characters."""

Line = npt.NDArray[np.float32]
"""float32[3, HEIGHT, width], from -1 to 1; 0 is padding."""


def before(crop: Picture) -> Line:
    """One line's picture (uint8[height, width, 3], blue, green, red) as the recogniser's feed."""
    import cv2

    if not isinstance(crop, np.ndarray) or crop.dtype != np.uint8 or crop.ndim != 3 or crop.shape[2] != 3:
        raise ValueError("a line must be a picture: a uint8 array of height x width x 3")
    height, width = crop.shape[:2]
    wide = min(max(1, round(width * HEIGHT / height)), MAX_WIDTH)
    resized = crop if (wide, HEIGHT) == (width, height) else cv2.resize(crop, (wide, HEIGHT))
    line = np.zeros((3, HEIGHT, max(wide, MIN_WIDTH)), np.float32)
    line[:, :, :wide] = resized.transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)
    return line


def collate(lines: list[Line]) -> npt.NDArray[np.float32]:
    """Lines padded on the right to the widest: float32[n, 3, HEIGHT, width]."""
    batch = np.zeros((len(lines), 3, HEIGHT, max(line.shape[2] for line in lines)), np.float32)
    for row, line in zip(batch, lines, strict=True):
        row[:, :, : line.shape[2]] = line
    return batch


def after(classes: npt.NDArray[np.float32], _crop: Picture) -> dict[str, Any]:
    """``text`` and its ``confidence`` (0 to 1) from the scores float32[step, class] of one line."""
    ((text, confidence),), _ = _decoder()(classes[None])
    return {"text": text, "confidence": float(confidence)}


def sample() -> Picture:
    """For profiling: a drawn line of mean width."""
    from pipelines.ocr.samples import draw_line

    return draw_line("Total to pay: 1,284.50")


@cache
def _decoder() -> Any:
    import onnxruntime
    from rapidocr.ch_ppocr_rec.utils import CTCLabelDecode

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with as_file(files("rapidocr") / MODEL) as path:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    return CTCLabelDecode(character=characters)
