"""What is sent: files, made-up bytes, and the samples of shipped pipelines."""

from __future__ import annotations

import base64
import binascii
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from laxity.node import PayloadError
from laxity.payload import encode

MADE_UP: Final = ("random", "zero", "samples")
"""Values of --input-data that are no files."""
MOST_BYTES: Final = 1024**3
"""Bytes of payloads that are kept to choose from."""


def payloads(pipeline: str, given: Sequence[str], size: int | None, seed: int) -> list[Any]:
    """The values of which each request of a pipeline gets one. ``given`` are values of --input-data, ``size`` is that
    of made-up bytes. Nothing given: the shipped samples where there are any, else random bytes.

    :class:`click.ClickException` says what cannot be had.
    """
    if not given:
        given = ("samples",) if pipeline in _SAMPLES and size is None else ("random",)
    found: list[Any] = []
    for source in given:
        if source == "random":
            found.append(random.Random(f"{seed} {pipeline}").randbytes(16 if size is None else size))
        elif source == "zero":
            found.append(bytes(16 if size is None else size))
        elif source == "samples":
            found += _samples(pipeline)
        else:
            found += _files(Path(source))
    total = 0
    for value in found:
        try:
            total += encode(value).nbytes
        except PayloadError as error:
            raise click.ClickException(f"--input-data {' '.join(given)}: {error}") from None
    if total > MOST_BYTES:
        raise click.ClickException(f"--input-data has {total:,} bytes, more than {MOST_BYTES:,}: choose fewer files")
    return found


def _files(path: Path) -> list[Any]:
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if file.is_file())
        if not inside:
            raise click.ClickException(f"--input-data {path}: there is no file in that directory")
        return [value for file in inside for value in _file(file)]
    if not path.exists():
        raise click.UsageError(f"--input-data {path}: there is no such file; made up are {', '.join(MADE_UP)}")
    return _file(path)


def _file(path: Path) -> list[Any]:
    """The payloads of one file: JSON as perf_analyzer has it, a text, or bytes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise click.ClickException(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == ".json":
        return _json(path, content)
    if path.suffix == ".txt":
        try:
            return [content.decode()]
        except UnicodeDecodeError as error:
            raise click.ClickException(f"{path} is no text in UTF-8: {error}") from error
    return [content]


def _json(path: Path, content: bytes) -> list[Any]:
    try:
        data = json.loads(content)
        entries = data["data"] if isinstance(data, dict) else None
        if not isinstance(entries, list) or not entries:
            raise ValueError('it must be an object such as {"data": [PAYLOAD, ...]}, with one payload or more')
        return [_bytes_inside(entry) for entry in entries]
    except (ValueError, KeyError, RecursionError) as error:
        why = 'the key "data" is missing' if isinstance(error, KeyError) else error
        raise click.ClickException(f"{path} holds no payloads: {why}") from error


def _bytes_inside(value: Any) -> Any:
    """A value of JSON with each {"b64": TEXT} in it replaced by the bytes."""
    if isinstance(value, dict):
        if set(value) == {"b64"}:
            try:
                return base64.b64decode(value["b64"], validate=True)
            except (binascii.Error, TypeError, ValueError) as error:
                raise ValueError(f"b64 {str(value['b64'])[:40]!r} is no base64: {error}") from error
        return {name: _bytes_inside(item) for name, item in value.items()}
    return [_bytes_inside(item) for item in value] if isinstance(value, list) else value


def _samples(pipeline: str) -> list[Any]:
    if pipeline not in _SAMPLES:
        raise click.UsageError(f"there are no samples for {pipeline!r}, only for {' and '.join(_SAMPLES)}")
    try:
        return _SAMPLES[pipeline]()
    except ImportError as error:
        raise click.ClickException(
            f"the samples for {pipeline!r} need the package {error.name}: pip install 'laxity[ocr]', or give "
            "--input-data FILE"
        ) from error


def _ocr() -> list[bytes]:
    from pipelines.ocr.samples import draw_samples

    return [sample.png for sample in draw_samples()]


def _classify() -> list[bytes]:
    from pipelines.classify.samples import draw_samples

    return [sample.png for sample in draw_samples()]


_SAMPLES: Final[dict[str, Callable[[], list[Any]]]] = {"ocr": _ocr, "classify": _classify}
