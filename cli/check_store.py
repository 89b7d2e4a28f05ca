"""What ``laxity doctor`` looks at of a store: whether it answers, how well it is, and its certificates."""

from __future__ import annotations

import asyncio
import datetime
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.finding import Finding
from cli.store_health import store_health
from cluster.store import sqlite_path
from cluster.store.base import StoreError
from cluster.store.etcd_address import EtcdAddress, parse_address, read_tls

if TYPE_CHECKING:
    from cryptography import x509

SLOW_MS = 100.0
"""Milliseconds for opening a store and reading a key, from which on something is wrong with it."""
LEFT = datetime.timedelta(days=30)
"""Certificates that end sooner are warned of."""
PATIENCE = 2.0
"""Seconds that a member of etcd has to answer."""
LARGE = 1536 * 1024**2
"""Bytes of an etcd's database; it stops taking writes at 2 GiB unless told otherwise."""
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "glusterfs", "ceph", "fuse.glusterfs", "lustre")
"""File systems of several hosts, on which SQLite's locks do not hold."""
_OLDEST = (3, 4)


def check_store(url: str) -> Iterator[Finding]:
    """Everything about the store at an address."""
    try:
        if url.startswith("etcd://"):
            address = parse_address(url)
            yield from check_certificates(address)
            yield from _etcd(url, address)
        else:
            yield from _sqlite(url)
    except StoreError as error:
        yield Finding("store", "error", str(error), "correct its address")


# ---- sqlite ------------------------------------------------------------------------------------


def _sqlite(url: str) -> Iterator[Finding]:
    file = sqlite_path(url)
    directory = file.parent
    if not directory.is_dir():
        yield Finding("store", "error", f"{directory} is no directory", "make it, or correct the store's path")
        return
    kind = file_system(directory)
    if kind in REMOTE:
        advice = "keep it on a disk of this host; clusters of several hosts need etcd"
        yield Finding("store", "error", f"{file} lies on {kind}, where locks cannot be relied on", advice)
    if not os.access(directory, os.W_OK | os.X_OK) or (file.exists() and not os.access(file, os.R_OK | os.W_OK)):
        advice = f"`chown` its directory and files to the user that runs Laxity (this is {os.getuid()})"
        yield Finding("store", "error", f"{file} cannot be written", advice)
    elif not file.exists():
        yield Finding("store", "note", f"{file} is not there yet", "nothing: it is made when a service starts")
    else:
        yield from _answers(url, f"on {kind}")


def file_system(path: Path) -> str:
    """The kind of the file system that a path lies on, as in 'ext4'."""
    found, best = "unknown", -1
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].replace("\\040", " ")
        if (path.absolute().is_relative_to(mount)) and len(mount) >= best:
            found, best = after.split()[0], len(mount)
    return found


def _answers(url: str, what: str) -> Iterator[Finding]:
    for member in store_health(url):
        if member.ms is None:
            yield Finding("store", "error", member.trouble, "see whether it is what the address says, and whole")
        elif member.ms > SLOW_MS:
            advice = "it is slow: look for a busy disk; requests do not wait for it, changes do"
            yield Finding("store", "warning", f"{member.member}: {member.ms:.0f} ms", advice)
        else:
            yield Finding("store", "ok", f"{member.member} answers in {member.ms:.1f} ms, {what}")


# ---- etcd --------------------------------------------------------------------------------------


def _etcd(url: str, address: EtcdAddress) -> Iterator[Finding]:
    health = store_health(url)
    away = [member for member in health if member.ms is None]
    needed = len(health) // 2 + 1
    for member in away:
        lost = len(health) - len(away) < needed
        advice = "start it, or open the way to it" + ("; without a quorum nothing can be changed" if lost else "")
        yield Finding("store", "error" if lost else "warning", f"{member.member}: {member.trouble}", advice)
    for member in health:
        if member.ms is None:
            continue
        if member.ms > SLOW_MS:
            advice = "etcd wants a quiet disk (see its metric etcd_disk_wal_fsync_duration_seconds) and a short way"
            yield Finding("store", "warning", f"{member.member}: {member.ms:.0f} ms", advice)
        else:
            yield Finding("store", "ok", f"{member.member} answers in {member.ms:.1f} ms")
    if len(health) % 2 == 0:
        advice = "run 3 or 5: an even number outlives no more losses than one less"
        yield Finding("store", "note", f"the address names {len(health)} members", advice)
    try:
        told = asyncio.run(_ask([member.member for member in health if member.ms is not None], address))
    except Exception as error:  # gRPC's own, and those of TLS; that members do not answer has been said
        yield Finding("etcd", "warning", f"its members' status cannot be read: {error}", "see the lines above")
        return
    yield from _statuses(told)


async def _ask(members: list[str], address: EtcdAddress) -> dict[str, tuple[Any, list[int]]]:
    """By member, its status and the alarms that it knows of."""
    import etcd3aio

    tls = read_tls(address)
    options: dict[str, Any] = {}
    if tls is not None:
        options = {"ca_cert": tls.ca, "cert_chain": tls.cert, "cert_key": tls.key}
        if address.server_name:
            options["tls_server_name"] = address.server_name
    found = {}
    for member in members:
        async with asyncio.timeout(PATIENCE), etcd3aio.Etcd3Client([member], **options) as client:
            status = await client.maintenance.status()
            alarms = await client.maintenance.alarms()
            found[member] = (status, [alarm.alarm for alarm in getattr(alarms, "alarms", alarms)])
    return found


def _statuses(told: dict[str, tuple[Any, list[int]]]) -> Iterator[Finding]:
    versions = {status.version for status, _ in told.values()}
    if len(versions) > 1:
        yield Finding("etcd", "warning", f"members of versions {', '.join(sorted(versions))}", "upgrade the older ones")
    for member, (status, alarms) in told.items():
        numbers = tuple(int(part) for part in status.version.split(".")[:2] if part.isdecimal())
        if numbers < _OLDEST:
            yield Finding("etcd", "error", f"{member} is version {status.version}", "upgrade it: 3.4 is the oldest")
        if alarms:
            names = ", ".join({1: "NOSPACE", 2: "CORRUPT"}.get(alarm, str(alarm)) for alarm in alarms)
            advice = "see `etcdctl alarm list`: for NOSPACE compact, `etcdctl defrag`, then `etcdctl alarm disarm`"
            yield Finding("etcd", "error", f"{member} has an alarm: {names}", advice)
        if not status.leader:
            yield Finding("etcd", "error", f"{member} has no leader", "see whether most members run and are connected")
        size = f"{status.dbSize / 1024**2:.1f} MiB"
        if status.dbSize > LARGE:
            advice = "set --auto-compaction-retention, then `etcdctl defrag`: it takes no writes from 2 GiB on"
            yield Finding("etcd", "warning", f"{member}: the database takes {size}", advice)
        elif not alarms and status.leader:
            leads = ", leads" if status.leader == status.header.member_id else ""
            yield Finding("etcd", "ok", f"{member}: version {status.version}, {size}{leads}")


# ---- certificates ------------------------------------------------------------------------------


def check_certificates(address: EtcdAddress) -> Iterator[Finding]:
    """The files that an address names, and what its members show."""
    if address.ca is None:
        advice = "add ca=, cert= and key= to its address, unless nobody else reaches it"
        yield Finding("certificates", "note", "the store is used without TLS", advice)
        return
    missing = False
    for path in (address.ca, address.cert, address.key):
        if path is not None and not os.access(path, os.R_OK):
            missing = True
            why = "cannot be read" if path.exists() else "is not there"
            yield Finding(
                "certificates", "error", f"{path} {why}", "correct its path in the address, or its permissions"
            )
    if missing:
        return
    try:
        read_tls(address)
        yield from _own(address.ca, address.cert)
    except ModuleNotFoundError:
        yield Finding("certificates", "note", "not looked into", "pip install 'laxity[etcd]'")
    except (StoreError, ValueError) as error:
        yield Finding("certificates", "error", str(error), "see to the file: no service connects with it as it is")
        return
    for endpoint in address.endpoints:
        yield from _shown(address, endpoint)


def _own(ca_file: Path, cert_file: Path | None) -> Iterator[Finding]:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    ca = x509.load_pem_x509_certificate(ca_file.read_bytes())
    yield _ends(str(ca_file), ca)
    if cert_file is None:
        return
    cert = x509.load_pem_x509_certificate(cert_file.read_bytes())
    yield _ends(str(cert_file), cert)
    try:
        cert.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        advice = "have one issued by the CA of the store's servers, or name that one's certificate"
        yield Finding("certificates", "error", f"{cert_file} was not issued by {ca_file}", advice)


def _ends(name: str, cert: x509.Certificate) -> Finding:
    now = datetime.datetime.now(datetime.UTC)
    until, since = cert.not_valid_after_utc, cert.not_valid_before_utc
    if until < now:
        return Finding("certificates", "error", f"{name} ended on {until:%Y-%m-%d}", "have a new one issued")
    if since > now:
        advice = "set this host's clock, or wait"
        return Finding("certificates", "error", f"{name} begins on {since:%Y-%m-%d %H:%M} UTC only", advice)
    if until < now + LEFT:
        return Finding("certificates", "warning", f"{name} ends on {until:%Y-%m-%d}", "have a new one issued in time")
    return Finding("certificates", "ok", f"{name} is good until {until:%Y-%m-%d}")


def _shown(address: EtcdAddress, endpoint: str) -> Iterator[Finding]:
    """What a member shows, by a handshake; nothing where it cannot be reached, which the store's check tells."""
    host, _, port = endpoint.rpartition(":")
    context = ssl.create_default_context(cafile=str(address.ca))
    if address.cert is not None and address.key is not None:
        context.load_cert_chain(address.cert, address.key)
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=address.server_name or host.strip("[]")) as shown,
        ):
            der = shown.getpeercert(True)
    except ssl.SSLCertVerificationError as error:
        advice = (
            "have a certificate issued with this name among its alternative ones, or add server_name= to the address"
        )
        if "hostname" not in error.verify_message.lower() and "ip address" not in error.verify_message.lower():
            advice = "name the CA that issued it as ca=, or have a new one issued"
        yield Finding("certificates", "error", f"{endpoint}: {error.verify_message}", advice)
    except ssl.SSLError as error:
        advice = "see whether it is served with TLS, and knows the CA of the certificate that is shown to it"
        yield Finding("certificates", "error", f"{endpoint}: {error.reason or error}", advice)
    except OSError:
        return
    else:
        from cryptography import x509

        if der is not None:
            yield _ends(endpoint, x509.load_der_x509_certificate(der))
