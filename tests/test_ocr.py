"""The shipped ``ocr`` pipeline on real pictures, through its executors and the wire's form of every value."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rapidocr", reason="rapidocr is not installed: pip install 'laxity[ocr]'")

from executing import run_batch
from PIL import Image, ImageDraw, ImageFont

from laxity import payload
from nodes.executors.base import Executor, ItemError
from nodes.executors.build import build_executor
from pipelines.load import load_spec
from pipelines.ocr import detect, recognize
from pipelines.ocr.pictures import MAX_PIXELS, decode
from pipelines.ocr.samples import Sample, draw_line, draw_samples

Ocr = dict[str, Executor]


@pytest.fixture(scope="module")
def ocr() -> Iterator[Ocr]:
    spec = load_spec("ocr")
    executors = {name: build_executor(spec, name, "cpu") for name in spec.stages}
    for executor in executors.values():
        executor.hold()
        executor.load()
    yield executors
    for executor in executors.values():
        executor.unload()


def over_the_wire(value: Any) -> Any:
    return payload.decode(payload.encode(value))


def read(ocr: Ocr, request: Any) -> tuple[np.ndarray[Any, Any], list[Any]]:
    """The answer to a request: its boxes and its lines."""
    (found,) = run_batch(ocr["detect"], [over_the_wire(request)])
    assert not isinstance(found, ItemError), found
    found = over_the_wire(found)
    lines = run_batch(ocr["recognize"], found["crops"]) if found["crops"] else []
    boxes: np.ndarray[Any, Any] = found["boxes"]
    assert boxes.shape == (len(lines), 4, 2)
    return boxes, over_the_wire(lines)


def texts(lines: list[Any]) -> list[str]:
    return sorted(line["text"] for line in lines)


def written(text: str, size: int = 40, canvas: tuple[int, int] = (640, 200), mode: str = "RGB") -> Image.Image:
    picture = Image.new(mode, canvas, (255, 255, 255, 0) if mode == "RGBA" else "white")
    ImageDraw.Draw(picture).text((60, 60), text, fill="black", font=ImageFont.load_default(size=size))
    return picture


def file_of(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("sample", draw_samples(), ids=lambda sample: sample.name)
def test_every_line_of_every_sample_is_read(ocr: Ocr, sample: Sample) -> None:
    boxes, lines = read(ocr, sample.png)
    assert texts(lines) == sorted(sample.lines)
    assert all(0.8 < line["confidence"] <= 1 for line in lines)
    assert boxes.dtype == np.float32


def test_samples_are_the_same_every_time() -> None:
    assert draw_samples() == draw_samples()


def test_boxes_are_in_the_original_s_pixels(ocr: Ocr) -> None:
    picture = Image.new("RGB", (2400, 1600), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=110)
    draw.text((1200, 900), "Far away", fill="black", font=font)
    boxes, lines = read(ocr, file_of(picture))
    assert texts(lines) == ["Far away"]
    left, top, right, bottom = draw.textbbox((1200, 900), "Far away", font=font)
    expected = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    assert np.abs(boxes[0] - expected).max() < 40


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_colour_modes(ocr: Ocr, mode: str) -> None:
    picture = written("Hello there", mode="RGBA" if mode == "RGBA" else "RGB").convert(mode)
    assert texts(read(ocr, file_of(picture))[1]) == ["Hello there"]


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_file_formats(ocr: Ocr, form: str) -> None:
    assert texts(read(ocr, file_of(written("Hello there"), form))[1]) == ["Hello there"]


def test_a_photograph_is_turned_as_its_exif_data_says(ocr: Ocr) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    sideways = written("Hello there").rotate(90, expand=True)
    boxes, lines = read(ocr, file_of(sideways, "JPEG", exif=exif))
    assert texts(lines) == ["Hello there"]
    assert boxes[0, :, 0].max() > 240, "the boxes are those of the turned picture"


def test_an_array_is_red_green_blue() -> None:
    array = np.zeros((4, 6, 3), np.uint8)
    array[:, :, 0] = 200
    picture = decode(array)
    assert picture[0, 0].tolist() == [0, 0, 200]
    np.testing.assert_array_equal(decode(file_of(Image.fromarray(array))), picture)


def test_an_array_is_read(ocr: Ocr) -> None:
    assert texts(read(ocr, np.asarray(written("Hello there")))[1]) == ["Hello there"]


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (4000, 9), (9, 4000)])
def test_pictures_too_small_or_slim_for_text_have_none(ocr: Ocr, size: tuple[int, int]) -> None:
    boxes, lines = read(ocr, file_of(Image.new("RGB", size, "white")))
    assert (boxes.shape, lines) == ((0, 4, 2), [])


def test_a_strip_without_margins_is_read(ocr: Ocr) -> None:
    assert texts(read(ocr, draw_line("A single tight strip of text"))[1]) == ["A single tight strip of text"]


def test_lines_of_mixed_widths_say_in_a_batch_what_they_say_alone(ocr: Ocr) -> None:
    said = ["No 7", "Platform 4", "Staff only beyond this point"]
    crops = [draw_line(text) for text in said]
    assert [line["text"] for line in run_batch(ocr["recognize"], crops)] == said
    assert [run_batch(ocr["recognize"], [crop])[0]["text"] for crop in crops] == said


def test_a_very_long_line_is_squeezed() -> None:
    assert recognize.before(np.zeros((10, 9000, 3), np.uint8)).shape == (3, recognize.HEIGHT, recognize.MAX_WIDTH)


def huge() -> bytes:
    side = int(MAX_PIXELS**0.5) + 1
    return file_of(Image.new("1", (side, side)))


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (b"", "these 0 bytes are no picture that can be read: send one of PNG"),
        (b"no picture at all", "these 17 bytes are no picture"),
        (file_of(written("x"))[:200], "the PNG picture is damaged"),
        (huge(), f"send one of at most {MAX_PIXELS:,} pixels"),
        (np.zeros((4, 4), np.uint8), "an array uint8[4, 4] is no picture"),
        (np.zeros((4, 4, 3)), "an array float64[4, 4, 3] is no picture"),
        (np.zeros((0, 4, 3), np.uint8), "an array uint8[0, 4, 3] is no picture"),
        ("a path.png", "the request is a str, not a picture: send a picture file's bytes"),
        (None, "the request is a NoneType, not a picture"),
    ],
    ids=range(9),
)
def test_what_is_no_picture_fails_alone_and_says_why(ocr: Ocr, request_: Any, says: str) -> None:
    bad, good = run_batch(ocr["detect"], [over_the_wire(request_), draw_samples()[0].png])
    assert isinstance(bad, ItemError)
    assert says in bad.detail
    assert len(good["crops"]) == len(draw_samples()[0].lines)


def test_a_crop_that_is_no_picture_fails_alone(ocr: Ocr) -> None:
    bad, good = run_batch(ocr["recognize"], [np.zeros(3), draw_line("fine")])
    assert isinstance(bad, ItemError)
    assert "a line must be a picture" in bad.detail
    assert good["text"] == "fine"


def test_the_samples_for_profiling_are_inputs_of_their_stages(ocr: Ocr) -> None:
    assert len(run_batch(ocr["detect"], [over_the_wire(detect.sample())])[0]["crops"]) > 0
    assert run_batch(ocr["recognize"], [over_the_wire(recognize.sample())])[0]["text"] == "Total to pay: 1,284.50"
