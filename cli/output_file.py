"""Files that commands write: reports, and pipelines with what was measured of them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

html_option = click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="REPORT",
    help="Write a report with plots to this file.",
)


def check_directory(file: Path | None) -> None:
    """Refuse a file that cannot be made, before the work that it is for is done."""
    if file is not None and not file.parent.is_dir():
        raise click.UsageError(f"there is no directory {str(file.parent)!r} to write {file.name!r} into")


def write_file(file: Path, text: str) -> None:
    """Write a file as a whole: where that fails (:class:`click.ClickException`), what it was is still there."""
    try:
        if file.exists() and not file.is_file():
            file.write_text(text, encoding="utf-8")  # a terminal, a pipe
        else:
            _replace(file.resolve(), text)
    except OSError as error:
        raise click.ClickException(f"{file} cannot be written: {error.strerror}") from error


def _replace(target: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
    ) as new:
        try:
            new.write(text)
            new.flush()
            os.fsync(new.fileno())
            os.chmod(new.name, target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~_umask())
            os.replace(new.name, target)
        except BaseException:
            os.unlink(new.name)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
