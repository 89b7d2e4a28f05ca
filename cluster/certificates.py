"""Certificates for a cluster on one machine: a CA of its own, and one certificate each for servers and for clients."""

from __future__ import annotations

import datetime
import ipaddress
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

LIFE = datetime.timedelta(days=3650)
LEAST_LEFT = datetime.timedelta(days=30)
"""Certificates that end sooner are made anew."""
CLOCK_SKEW = datetime.timedelta(hours=1)
"""By how much another machine's clock may be behind."""


class Certificates(msgspec.Struct, frozen=True):
    """Paths of PEM files. The server's certificate also serves its peers as a client's; nobody has the CA's key."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path


def make_certificates(directory: Path, hosts: Sequence[str]) -> Certificates:
    """Have certificates in ``directory`` (made where it is absent) for servers at ``hosts``, names or IP addresses.

    What is there already and still good for these hosts stays. All files can be read by their owner only. Not for
    two callers at once. Raises ImportError without the package cryptography, OSError where nothing can be written.
    """
    certificates = Certificates(
        ca=directory / "ca.pem",
        server_cert=directory / "server.pem",
        server_key=directory / "server.key",
        client_cert=directory / "client.pem",
        client_key=directory / "client.key",
    )
    if not _good(certificates, hosts):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make(certificates, hosts)
    return certificates


def _good(certificates: Certificates, hosts: Sequence[str]) -> bool:
    """Whether all files are there, belong together, name the hosts and will not end soon."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        ca = x509.load_pem_x509_certificate(certificates.ca.read_bytes())
        for cert_path, key_path in (
            (certificates.server_cert, certificates.server_key),
            (certificates.client_cert, certificates.client_key),
        ):
            cert = x509.load_pem_x509_certificate(cert_path.read_bytes())
            key = load_pem_private_key(key_path.read_bytes(), None)
            cert.verify_directly_issued_by(ca)
            if cert.public_key() != key.public_key() or cert.not_valid_after_utc < _now() + LEAST_LEFT:
                return False
        server = x509.load_pem_x509_certificate(certificates.server_cert.read_bytes())
        names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    return set(names) == set(_alternative_names(hosts))


def _make(certificates: Certificates, hosts: Sequence[str]) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = _name("laxity CA")
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key(), ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
    )

    def issue(name: str, usages: list[x509.ObjectIdentifier], alternatives: list[x509.GeneralName]) -> _Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(_name(name), ca_name, key.public_key(), ca_key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return _Pair(builder, ca_key, key)

    as_server, as_client = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
    server = issue("laxity server", [as_server, as_client], _alternative_names(hosts))
    client = issue("laxity client", [as_client], [])
    _write(certificates.server_key, server.key_pem)
    _write(certificates.server_cert, server.cert_pem)
    _write(certificates.client_key, client.key_pem)
    _write(certificates.client_cert, client.cert_pem)
    _write(certificates.ca, _Pair(ca, ca_key, ca_key).cert_pem)


class _Pair:
    """A certificate and its key, as PEM."""

    def __init__(
        self, builder: x509.CertificateBuilder, signer: ec.EllipticCurvePrivateKey, key: ec.EllipticCurvePrivateKey
    ) -> None:
        from cryptography.hazmat.primitives import hashes, serialization

        self.cert_pem = builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        self.key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, issuer_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = _now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + LIFE)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _name(common: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _key_usage(ca: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    from cryptography import x509

    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _write(path: Path, content: bytes) -> None:
    """Replace a file as a whole; nobody but its owner can ever read it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
