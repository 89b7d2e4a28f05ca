"""Stage ``detect``: where the text is. PP-OCR's detector with rapidocr's own steps before and after."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.ocr.pictures import Picture, decode
from pipelines.ocr.recognize import HEIGHT, MAX_WIDTH

LONGER_SIDE = 960
"""Pictures are reduced to this many pixels on the longer side: detection takes six times as long on a photo."""
MIN_SIDE = 64
MAX_RATIO = 8
"""The detector finds nothing in slimmer pictures; they get a margin."""
SMALLEST = 4
"""Boxes with a side of fewer pixels are no text."""


class Framed:
    """A picture with the margin it was detected with, in pixels on either side."""

    def __init__(self, picture: Picture, margin_x: int, margin_y: int) -> None:
        self.picture = picture
        self.margin_x = margin_x
        self.margin_y = margin_y


def before(request: Any) -> tuple[npt.NDArray[np.float32], Framed]:
    """The picture as float32[3, height, width], both multiples of 32, and the original for ``after``."""
    import cv2

    picture = decode(request)
    height, width = picture.shape[:2]
    margin_x = _margin(width, height)
    margin_y = _margin(height, width)
    framed = cv2.copyMakeBorder(picture, margin_y, margin_y, margin_x, margin_x, cv2.BORDER_REPLICATE)
    return _preprocess()(framed)[0], Framed(picture, margin_x, margin_y)


def after(heat: npt.NDArray[np.float32], framed: Framed) -> dict[str, Any]:
    """``boxes`` float32[n, 4, 2], corners (x, y) from the top left clockwise in the original picture's pixels,
    lines from top to bottom; ``crops`` n pictures of these lines, ready for ``recognize``."""
    height, width = framed.picture.shape[:2]
    shape = (height + 2 * framed.margin_y, width + 2 * framed.margin_x)
    found, _ = _postprocess()(heat[None], shape)
    boxes = [_inside(box, framed) for box in _in_order(found)] if len(found) else []
    boxes = [box for box in boxes if _shorter_side(box) >= SMALLEST]
    if not boxes:
        return {"boxes": np.zeros((0, 4, 2), np.float32), "crops": []}
    return {"boxes": np.stack(boxes), "crops": [_crop(framed.picture, box) for box in boxes]}


def sample() -> bytes:
    """For profiling: a drawn page of 960 x 720 pixels as a picture file."""
    from pipelines.ocr.samples import draw_samples

    return draw_samples()[0].png


def _margin(side: int, other: int) -> int:
    wanted = max(MIN_SIDE, -(-other // MAX_RATIO))
    return max(0, -(-(wanted - side) // 2))


def _inside(box: npt.NDArray[Any], framed: Framed) -> npt.NDArray[np.float32]:
    height, width = framed.picture.shape[:2]
    moved = box.astype(np.float32) - np.array([framed.margin_x, framed.margin_y], np.float32)
    clipped: npt.NDArray[np.float32] = moved.clip(0, np.array([width - 1, height - 1], np.float32))
    return clipped


def _shorter_side(box: npt.NDArray[np.float32]) -> float:
    return float(min(np.linalg.norm(box[0] - box[1]), np.linalg.norm(box[0] - box[3])))


def _crop(picture: Picture, box: npt.NDArray[np.float32]) -> Picture:
    """The box's content upright and as high as the recogniser wants it: what goes on is a tenth of the bytes."""
    import cv2
    from rapidocr.utils.process_img import get_rotate_crop_image

    crop = get_rotate_crop_image(picture, box)
    width = round(crop.shape[1] * HEIGHT / crop.shape[0])
    resized: Picture = cv2.resize(crop, (min(max(width, 1), MAX_WIDTH), HEIGHT))
    return resized


def _in_order(boxes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    from rapidocr.ch_ppocr_det import TextDetector

    ordered: npt.NDArray[Any] = TextDetector.sorted_boxes(boxes)
    return ordered


@cache
def _preprocess() -> Any:
    from rapidocr.ch_ppocr_det.utils import DetPreProcess

    return DetPreProcess(LONGER_SIDE, "max", mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])


@cache
def _postprocess() -> Any:
    from rapidocr.ch_ppocr_det.utils import DBPostProcess

    return DBPostProcess(
        thresh=0.3, box_thresh=0.5, max_candidates=1000, unclip_ratio=1.6, score_mode="fast", use_dilation=True
    )
