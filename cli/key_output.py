"""Key files that commands write: never over anything but the same owner's, and only together with the store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from cluster.keystore import Unsettled
from laxity.keys import LARGEST, KeyFile, write_key_file


def key_path(given: str | None, name: str) -> Path:
    """The file that -o names, or NAME.key here. Raises :class:`click.UsageError`."""
    if given in ("-", "/dev/stdout", "/dev/stderr"):
        raise click.UsageError("a key is not written to a terminal or a pipe, where others may see it; name a file")
    path = Path(given) if given else Path(f"{name}.key")
    if path.is_dir():
        raise click.UsageError(f"{path} is a directory; name a file in it, such as {path / f'{name}.key'}")
    if not path.absolute().parent.is_dir():
        raise click.UsageError(f"there is no directory {str(path.parent)!r} to write {path.name!r} into")
    return path


@contextmanager
def written(path: Path, key: KeyFile) -> Iterator[None]:
    """Write a key into a new file, then do what the block does with the store; the file goes if that fails.

    Raises :class:`click.ClickException`, before the block, where the file cannot be written or is there already.
    """
    _write(path, key)
    with _withdrawn(path):
        yield


@contextmanager
def replaced(path: Path, key: KeyFile) -> Iterator[None]:
    """As :func:`written`, and where the owner's old key lies there, that stays until the store has the new one."""
    if not os.path.lexists(path):
        with written(path, key):
            yield
        return
    path = path.resolve()
    _check_same_owner(path, key)
    staged = path.with_name(f"{path.name}.new")
    if staged.exists():
        raise click.ClickException(
            f"{staged} is what an interrupted rotation left: if `laxity keys show {key.name}` has its public key, "
            f"`mv` it to {path}, otherwise remove it"
        )
    _write(staged, key)
    with _withdrawn(staged):
        _keep_owner(path, staged)
        yield
    try:
        os.replace(staged, path)
    except OSError as error:
        raise click.ClickException(
            f"the store has the new key, but {path} cannot be replaced ({error.strerror}): the key is in {staged}, "
            "move it there"
        ) from error


def rewrite(path: Path, key: KeyFile) -> None:
    """Write a key file that is there anew. Raises :class:`click.ClickException`; then it is as it was."""
    path = path.resolve()
    try:
        found = path.stat()
        write_key_file(path, key, replace=True)
        if os.geteuid() == 0:
            os.chown(path, found.st_uid, found.st_gid)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}; it is as it was") from error


def _write(path: Path, key: KeyFile) -> None:
    try:
        write_key_file(path, key)
    except FileExistsError:
        raise click.ClickException(
            f"{path} is there already, and a key is never written over anything; name another file with -o"
        ) from None
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}; no key was made") from error


@contextmanager
def _withdrawn(path: Path) -> Iterator[None]:
    """Remove a file that was just written if the block fails, unless the store may have its key."""
    try:
        yield
    except (Unsettled, KeyboardInterrupt):
        click.echo(f"{path} was written; it stays, as the store may have its key", err=True)
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _check_same_owner(path: Path, key: KeyFile) -> None:
    """Whether what lies there is an old key of this owner: one that others can read, or whose halves do not belong
    together, is replaced for that very reason."""
    try:
        if not path.is_file():
            raise click.ClickException(f"{path} is no file; name another one with -o")
        with path.open("rb") as file:
            old = msgspec.json.decode(file.read(LARGEST + 1), type=KeyFile)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be read: {error.strerror}; no key was made") from error
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise click.ClickException(f"{path} is there already, and no key file; name another one with -o") from None
    if (old.cluster, old.name) != (key.cluster, key.name):
        raise click.ClickException(
            f"{path} is the key of {old.name!r} in the cluster {old.cluster!r}; name another file with -o"
        )


def _keep_owner(path: Path, staged: Path) -> None:
    """Have the new file belong to whom the old one does: root may rotate for a service that runs as another user."""
    found, mine = path.stat(), staged.stat()
    if found.st_uid == mine.st_uid:
        return
    try:
        os.chown(staged, found.st_uid, found.st_gid)
    except OSError:
        raise click.ClickException(
            f"{path} is another user's, who could not read a file of yours: run this as that user; no key was made"
        ) from None
