"""The certificates of a cluster on one machine."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from cluster.certificates import Certificates, make_certificates

HOSTS = ["127.0.0.1", "localhost"]


def contents(certificates: Certificates) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in msgspec.structs.asdict(certificates).items()}


def test_they_are_made_once_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "new" / "directory", HOSTS)
    made = contents(certificates)
    assert {stat.S_IMODE(path.stat().st_mode) for path in msgspec.structs.astuple(certificates)} == {0o600}
    assert stat.S_IMODE((tmp_path / "new" / "directory").stat().st_mode) == 0o700
    assert sorted(path.name for path in (tmp_path / "new" / "directory").iterdir()) == sorted(
        path.name for path in msgspec.structs.astuple(certificates)
    )
    assert contents(make_certificates(tmp_path / "new" / "directory", HOSTS)) == made


@pytest.mark.parametrize("damage", ["missing", "nonsense", "another CA's", "another key", "other hosts"])
def test_they_are_made_anew_where_they_do_not_fit(tmp_path: Path, damage: str) -> None:
    certificates = make_certificates(tmp_path / "a", HOSTS)
    other = make_certificates(tmp_path / "b", HOSTS)
    made = contents(certificates)
    hosts = HOSTS
    if damage == "missing":
        certificates.client_key.unlink()
    elif damage == "nonsense":
        certificates.server_cert.write_text("nonsense")
    elif damage == "another CA's":
        certificates.ca.write_bytes(other.ca.read_bytes())
    elif damage == "another key":
        certificates.server_key.write_bytes(other.server_key.read_bytes())
    else:
        hosts = ["10.0.0.1"]
    anew = contents(make_certificates(tmp_path / "a", hosts))
    assert not set(anew.values()) & set(made.values())
    assert contents(make_certificates(tmp_path / "a", hosts)) == anew


@pytest.mark.parametrize("name", HOSTS)
def test_server_and_client_know_each_other_by_them(tmp_path: Path, name: str) -> None:
    ours, theirs = make_certificates(tmp_path / "ours", HOSTS), make_certificates(tmp_path / "theirs", HOSTS)
    assert greeting(ours, ours, name) == b"hello"
    with pytest.raises(ssl.SSLCertVerificationError):
        greeting(theirs, ours, name)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)mismatch"):
        greeting(ours, ours, "elsewhere")


def greeting(server: Certificates, client: Certificates, name: str) -> bytes:
    """What a client hears from a server that it knows by ``name``; both demand a certificate of the other."""
    near, far = socket.socketpair()
    of_server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(server.ca))
    of_server.load_cert_chain(server.server_cert, server.server_key)
    of_server.verify_mode = ssl.CERT_REQUIRED
    of_client = ssl.create_default_context(cafile=str(client.ca))
    of_client.load_cert_chain(client.client_cert, client.client_key)

    def serve() -> None:
        try:
            with of_server.wrap_socket(far, server_side=True) as connection:
                connection.sendall(b"hello")
        except OSError:  # the client hung up
            far.close()

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        with of_client.wrap_socket(near, server_hostname=name) as connection:
            return connection.recv(5)
    finally:
        near.close()
        serving.join()
