"""The request of the ``ocr`` pipeline: a picture."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_PIXELS = 40_000_000
"""Larger pictures are refused: decoded they would take 120 MB and more."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

Picture = npt.NDArray[np.uint8]
"""Height x width x 3, in OpenCV's order: blue, green, red."""


def decode(request: Any) -> Picture:
    """The picture in a request: a picture file's bytes, or an RGB array uint8[height, width, 3].

    Transparent pixels become white, and a photograph is turned as its EXIF data says. TypeError or ValueError
    where the request is no picture or a too large one.
    """
    if isinstance(request, np.ndarray):
        return _from_array(request)
    if isinstance(request, bytes):
        return _from_file(request)
    raise TypeError(
        f"the request is a {type(request).__name__}, not a picture: "
        "send a picture file's bytes, or a uint8 array of height x width x 3 (RGB)"
    )


def _from_array(array: npt.NDArray[Any]) -> Picture:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(
            f"an array {array.dtype}{list(array.shape)} is no picture: send uint8, height x width x 3 (RGB)"
        )
    _check_pixels(array.shape[1], array.shape[0])
    return np.ascontiguousarray(array[:, :, ::-1])


def _from_file(content: bytes) -> Picture:
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            file = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(f"the picture has too many pixels: send at most {MAX_PIXELS:,}") from error
        except Exception as error:
            raise ValueError(
                f"these {len(content)} bytes are no picture that can be read: send one of {', '.join(FORMATS)}"
            ) from error
        _check_pixels(*file.size)
        try:
            picture = ImageOps.exif_transpose(file)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            rgb = np.asarray(picture.convert("RGB"))
        except Exception as error:
            raise ValueError(f"the {file.format} picture is damaged: {error}") from error
    return np.ascontiguousarray(rgb[:, :, ::-1])


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"the picture is {width} x {height}: send one of at most {MAX_PIXELS:,} pixels")
