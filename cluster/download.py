"""Files at http(s) addresses, streamed and bounded."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.files import MAX_BYTES, FileRecord

TIMEOUT = 10.0
"""Seconds that a server may stay silent."""
CHUNK = 1024 * 1024


class DownloadError(Exception):
    """An address gave no file; the text says why and what to do."""


def record_of(address: str, digest: str | None) -> FileRecord:
    """The file at an address as a pipeline's record names it. It is downloaded, unless ``digest`` is known and the
    server says how long it is. Raises :class:`DownloadError`."""
    with _opened(address) as response:
        if digest is not None and response.length is not None:
            return FileRecord(address, digest, response.length)
        found = hashlib.sha256()
        size = 0
        for chunk in _chunks(address, response):
            found.update(chunk)
            size += len(chunk)
    if digest is not None and found.hexdigest() != digest:
        raise DownloadError(
            f"{address} has the SHA-256 digest {found.hexdigest()}, and the spec says {digest}; correct one of the two"
        )
    return FileRecord(address, found.hexdigest(), size)


def download(address: str) -> Iterator[bytes]:
    """The content of the file at an address, in pieces; redirects are followed. Raises :class:`DownloadError`."""
    with _opened(address) as response:
        yield from _chunks(address, response)


def _chunks(address: str, response: http.client.HTTPResponse) -> Iterator[bytes]:
    size = 0
    announced = response.length
    try:
        while chunk := response.read(CHUNK):
            size += len(chunk)
            if size > MAX_BYTES:
                raise DownloadError(f"{address} sends more than {MAX_BYTES} bytes; split the file")
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{address} broke off after {size} bytes: {error}; is the server well?") from error
    if announced is not None and size < announced:
        raise DownloadError(f"{address} broke off after {size} of {announced} bytes; is the server well?")


@contextmanager
def _opened(address: str) -> Iterator[http.client.HTTPResponse]:
    # Only these: the usual opener would also follow a redirect to FTP.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    request = urllib.request.Request(address, headers={"User-Agent": "laxity", "Accept-Encoding": "identity"})
    try:
        response: Any = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise DownloadError(f"{address} answers {error.code} {error.reason}; correct the address") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DownloadError(f"{address} cannot be reached: {why}; is the server there?") from error
    if response is None:
        raise DownloadError(f"{address} leads to no http(s) address; correct it")
    with response:
        yield response
