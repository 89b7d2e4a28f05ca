"""What a pipeline's files are, and how they get to the shards when it is applied.

In this order, because shards take only files that a pipeline in the store names::

    record = pipeline_record(spec, say)                       # reads the files, finds out their digests
    store.put(paths.pipeline(spec.name), encode(record))      # record.spec, not spec: its version knows the files
    publish_files(record, frontends, say, credentials)        # uploads what the shards do not have
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from cluster.download import DownloadError, record_of
from cluster.records import FileRecord, PipelineRecord
from laxity.credentials import Credentials
from laxity.files import FileClient, TransferError
from pipelines import ModelNotFoundError, PipelineSpec
from pipelines.files import FilesError, addresses, describe
from pipelines.models import is_address

Say = Callable[[str], None]
"""Takes a line for people."""
SHOWN = 16 * 1024**2
"""Bytes from which on an upload's progress is told."""


class PublishError(click.ClickException):
    """The files cannot be given to the cluster; the text says why and what to do."""


def pipeline_record(spec: PipelineSpec, say: Say) -> PipelineRecord:
    """The record of a pipeline, with the files that it needs. Raises :class:`PublishError`."""
    at_addresses = files_at_addresses(spec, say)
    try:
        described, files = describe(spec, at_addresses)
    except (FilesError, ModelNotFoundError) as error:
        raise PublishError(f"{spec.name}: {error}") from error
    except OSError as error:
        raise PublishError(f"{spec.name}: {error.filename} cannot be read: {error.strerror}; mend that") from error
    return PipelineRecord(described.version, described, files)


def files_at_addresses(spec: PipelineSpec, say: Say) -> list[FileRecord]:
    """The models at addresses: all that has to be told of a pipeline whose other files lie where its agents run. Raises
    :class:`PublishError`."""
    found = []
    for address, digest in addresses(spec).items():
        if digest is None:
            say(f"{spec.name}: finding out the digest of {address}")
        try:
            found.append(record_of(address, digest))
        except DownloadError as error:
            raise PublishError(f"{spec.name}: {error}") from error
    return found


def publish_files(
    record: PipelineRecord, frontends: Sequence[str], say: Say, credentials: Credentials | None = None
) -> None:
    """Upload the files of a pipeline, whose record is in the store, to one of the shards at ``frontends``; the others
    get them from there. ``credentials`` know their keys. Raises :class:`PublishError` where no shard took them."""
    left = [file for file in record.files if not is_address(file.path)]
    again = "apply the pipeline again to upload the rest"
    if not left:
        return
    if not frontends:
        raise PublishError(f"{record.spec.name}: no shard is there to take its files; start one, and {again}")
    troubles = []
    for frontend in frontends:
        try:
            with FileClient(frontend, credentials=credentials) as client:
                while left:
                    _upload(client, record.spec, left[0], say)
                    left.pop(0)
            return
        except TransferError as error:
            troubles.append(str(error))
        except OSError as error:
            raise PublishError(f"{error.filename} cannot be read: {error.strerror}; mend that, and {again}") from error
    raise PublishError(f"{record.spec.name}: {left[0].path} was not uploaded ({'; '.join(troubles)}); {again}")


def _upload(client: FileClient, spec: PipelineSpec, file: FileRecord, say: Say) -> None:
    told = 0

    def progress(have: int) -> None:
        nonlocal told
        percent = have * 100 // max(file.size, 1)
        if file.size >= SHOWN and percent >= told + 10:
            told = percent
            say(f"{spec.name}: {file.path} {percent} %")

    client.upload(file.digest, file.size, Path(spec.root) / file.path, progress)
