"""``etcd://host:2379,...?ca=...&cert=...&key=...``: where an etcd is, and the files that TLS needs."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

import msgspec

from cluster.store.base import StoreError
from laxity.private import NotPrivate, read_private

EXAMPLE = "etcd://host:2379,host2:2379?ca=/path/ca.pem&cert=/path/client.pem&key=/path/client.key"
LARGEST_KEY = 1024**2
"""Bytes of a private key's file at most."""


class Tls(NamedTuple):
    """The contents of the PEM files; without ``cert`` and ``key`` the client shows no certificate."""

    ca: bytes
    cert: bytes | None
    key: bytes | None


class EtcdAddress(msgspec.Struct, frozen=True):
    """Endpoints are ``host:port``. Without ``ca`` there is no TLS. ``server_name`` is the name that the servers'
    certificates are checked for, where it is not their host's."""

    endpoints: tuple[str, ...]
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""

    @property
    def url(self) -> str:
        query = {"ca": self.ca, "cert": self.cert, "key": self.key, "server_name": self.server_name}
        parameters = "&".join(f"{name}={quote(str(value))}" for name, value in query.items() if value)
        return f"etcd://{','.join(self.endpoints)}" + (f"?{parameters}" if parameters else "")


def parse_address(url: str) -> EtcdAddress:
    """The address that a URL names; :class:`StoreError` says what is wrong with it."""
    _, _, rest = url.partition("://")
    hosts, _, query = rest.partition("?")
    if "@" in hosts:
        raise StoreError(f"the store {url!r} names a user; who a client is, its certificate says: {EXAMPLE}")
    endpoints = tuple(_endpoint(endpoint, url) for endpoint in hosts.removesuffix("/").split(","))
    given = _parameters(query, url)
    files = {name: _file(name, value, url) for name, value in given.items() if name != "server_name"}
    server_name = given.get("server_name", "")
    if ("cert" in files) != ("key" in files):
        missing = "key" if "cert" in files else "cert"
        raise StoreError(f"the store {url!r} has half a key pair; add {missing}=/path")
    if "ca" not in files and (files or server_name):
        raise StoreError(f"the store {url!r} names no CA, by which its servers are known; add ca=/path/ca.pem")
    return EtcdAddress(endpoints, files.get("ca"), files.get("cert"), files.get("key"), server_name)


def _endpoint(endpoint: str, url: str) -> str:
    host, separator, port = endpoint.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not host or "/" in endpoint or (":" in host and not bracketed):
        raise StoreError(f"{endpoint!r} in the store {url!r} is no host:port; write {EXAMPLE}")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
        raise StoreError(f"{endpoint!r} in the store {url!r} has no port from 1 to 65535; etcd's usual one is 2379")
    return endpoint


def _parameters(query: str, url: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for parameter in filter(None, query.split("&")):
        name, _, value = parameter.partition("=")
        if name not in ("ca", "cert", "key", "server_name"):
            raise StoreError(f"the store {url!r} has an unknown parameter {name!r}; write {EXAMPLE}")
        if name in found or not value:
            raise StoreError(f"the parameter {name} of the store {url!r} must have one value")
        found[name] = unquote(value)
    return found


def _file(name: str, value: str, url: str) -> Path:
    path = Path(value)
    if not path.is_absolute():
        raise StoreError(f"{name}={value} in the store {url!r} is no absolute path; write {name}=/path")
    return path


def read_tls(address: EtcdAddress) -> Tls | None:
    """The files' contents, None without TLS; :class:`StoreError` where one is missing or not what it should be, or the
    key can be read by others."""
    if address.ca is None:
        return None
    ca = _read(address.ca)
    try:
        # OpenSSL says what is wrong with them; of gRPC nothing more would be heard than that it cannot connect.
        context = ssl.create_default_context(cafile=str(address.ca))
    except ssl.SSLError as error:
        raise StoreError(f"ca={address.ca} holds no certificate in PEM form ({error})") from error
    if address.cert is None or address.key is None:
        return Tls(ca, None, None)
    cert, key = _read(address.cert), _read_key(address.key)
    try:
        context.load_cert_chain(address.cert, address.key, password=lambda: _encrypted(address))
    except ssl.SSLError as error:
        raise StoreError(
            f"cert={address.cert} and key={address.key} are no certificate and its key in PEM form ({error})"
        ) from error
    return Tls(ca, cert, key)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_key(path: Path) -> bytes:
    try:
        return read_private(path, LARGEST_KEY, "have another certificate and key issued")
    except NotPrivate as error:
        raise StoreError(f"key={path} of the store: {error}") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> StoreError:
    why = f"the store's file {path} cannot be read: {error.strerror}"
    return StoreError(f"{why}; correct its path in the URL, or its permissions")


def _encrypted(address: EtcdAddress) -> str:
    raise StoreError(f"key={address.key} is encrypted; store it without a passphrase, readable by its owner only")
