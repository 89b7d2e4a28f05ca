"""Pictures to try the ``ocr`` pipeline with, drawn here, with the lines of text that are on them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipelines.ocr.pictures import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

RECEIPT = (
    "CORNER BAKERY",
    "12 Mill Lane, Ashford",
    "2 x Rye bread 7.80",
    "1 x Apple tart 4.50",
    "3 x Espresso 8.10",
    "Total 20.40",
    "Thank you!",
)
COLUMNS = (
    ("Departures", "Leeds 10:42", "Platform 4", "Calling at York", "Delayed"),
    ("Arrivals", "Harwich 11:05", "Platform 9", "Nine coaches", "On time"),
)


@dataclass(frozen=True)
class Sample:
    """A picture file and the lines of text on it, in no particular order."""

    name: str
    png: bytes
    lines: tuple[str, ...]


def draw_samples() -> list[Sample]:
    """The samples, the page that fills the detector's view first; the same at every call."""
    drawn: list[tuple[str, Callable[[], Image], tuple[str, ...]]] = [
        ("columns", _columns, COLUMNS[0] + COLUMNS[1]),
        ("receipt", _receipt, RECEIPT),
        ("sign", _sign, ("NO ENTRY", "Staff only beyond this point")),
        ("tilted", _tilted, ("This note hangs askew", "but reads well")),
        ("blank", _blank, ()),
    ]
    return [Sample(name, _png(draw()), lines) for name, draw, lines in drawn]


def draw_line(text: str) -> Picture:
    """One line of text as ``detect`` crops it: black on white, 48 pixels high."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=32)
    left, top, right, bottom = (round(side) for side in font.getbbox(text))
    line = Image.new("RGB", (right - left + 16, 48), "white")
    ImageDraw.Draw(line).text((8 - left, (48 - top - bottom) / 2), text, fill="black", font=font)
    return np.asarray(line)


def draw_note(lines: Sequence[str]) -> bytes:
    """A picture file of these lines below one another, black on white."""
    return _png(_note(lines))


def _note(lines: Sequence[str]) -> Image:
    from PIL import ImageFont

    font = ImageFont.load_default(size=34)
    widest = max(round(font.getlength(text)) for text in lines)
    picture = _paper(max(560, widest + 120), 80 + 80 * len(lines), "white")
    for row, text in enumerate(lines):
        _write(picture, (60, 40 + 80 * row), text, 34, "black")
    return picture


def _receipt() -> Image:
    return _note(RECEIPT)


def _sign() -> Image:
    picture = _paper(800, 360, "#7a1020")
    _write(picture, (150, 60), "NO ENTRY", 96, "white")
    _write(picture, (120, 230), "Staff only beyond this point", 40, "#ffe9c0")
    return picture


def _columns() -> Image:
    picture = _paper(960, 720, "#f4f1e8")
    for column, texts in enumerate(COLUMNS):
        for row, text in enumerate(texts):
            _write(picture, (60 + 480 * column, 60 + 130 * row), text, 44, "#202840")
    return picture


def _tilted() -> Image:
    from PIL import Image

    picture = _paper(800, 500, "#dfe8f5")
    _write(picture, (140, 160), "This note hangs askew", 46, "#102030")
    _write(picture, (220, 280), "but reads well", 46, "#102030")
    return picture.rotate(9, resample=Image.Resampling.BICUBIC, fillcolor="#dfe8f5")


def _blank() -> Image:
    return _paper(640, 480, "white")


def _paper(width: int, height: int, colour: str) -> Image:
    from PIL import Image

    return Image.new("RGB", (width, height), colour)


def _write(picture: Image, at: tuple[int, int], text: str, size: int, colour: str) -> None:
    from PIL import ImageDraw, ImageFont

    ImageDraw.Draw(picture).text(at, text, fill=colour, font=ImageFont.load_default(size=size))


def _png(picture: Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
