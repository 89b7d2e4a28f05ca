"""What ``laxity doctor`` looks at of addresses: whether they can be bound, and who has them."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from cli.finding import Finding

_ADDRESS = re.compile(r"(?:tcp://)?(?P<host>\[[^\]]+\]|[^\s/:\[\]]+):(?P<port>\d{1,5})")
_LISTENS = "0A"


def check_ports(addresses: Mapping[str, str]) -> Iterator[Finding]:
    """``addresses`` by the option that has them; those without a fixed port are passed over."""
    for option, address in addresses.items():
        match = _ADDRESS.fullmatch(address)
        if match is not None:
            yield _check(option, match["host"].strip("[]"), int(match["port"]))


def _check(option: str, host: str, port: int) -> Finding:
    shown = f"{option} {host}:{port}"
    if port > 65535:
        return Finding("ports", "error", f"{shown} is no port", "take one from 1024 to 65535")
    try:
        found = socket.getaddrinfo("0.0.0.0" if host == "*" else host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return Finding(
            "ports", "error", f"{shown}: {error.strerror}", "name an address of this host, or 0.0.0.0 for all of them"
        )
    family, kind, protocol, _, at = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(at)
        except OSError as error:
            return _why_not(shown, port, error)
    return Finding("ports", "ok", f"{shown} is free")


def _why_not(shown: str, port: int, error: OSError) -> Finding:
    if error.errno == errno.EADDRINUSE:
        holder = holder_of(port)
        if holder is None:
            return Finding(
                "ports", "error", f"{shown} is taken by another user's process", f"look with `ss -ltnp sport = :{port}`"
            )
        pid, command = holder
        if any(word in command for word in ("cli.main", "laxity run", "/laxity ")):
            advice = "nothing, if that is the service that is to run here"
            return Finding("ports", "note", f"{shown} is held by process {pid}: {command}", advice)
        return Finding("ports", "error", f"{shown} is held by process {pid}: {command}", "end it, or take another port")
    if error.errno == errno.EADDRNOTAVAIL:
        advice = "name an address of this host (`ip addr`), or 0.0.0.0 and --advertise"
        return Finding("ports", "error", f"{shown} is no address of this host", advice)
    return Finding("ports", "error", f"{shown}: {error.strerror}", "take a port above 1023")


def holder_of(port: int) -> tuple[int, str] | None:
    """(process, command) of who listens at a TCP port, where this user may know it."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            if any(os.readlink(file) in inodes for file in (directory / "fd").iterdir()):
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return int(directory.name), command[:160]
        except OSError:
            continue  # it has ended, or is another user's
    return None
