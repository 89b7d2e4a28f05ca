"""The network namespace of a run, with the bridge that its hosts are on."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rollout.commands import run

BRIDGE = "hosts"
RUNNER = "10.213.0.1"
"""The runner's own address on the bridge. Nobody outside of the namespace sees these addresses, so they may lie
wherever they do."""
PREFIX = 24


def address(number: int) -> str:
    """The address of the host with this number, from 1 on."""
    return f"10.213.0.{10 + number}"


def make(name: str) -> None:
    """A namespace with the bridge in it. Raises Failed."""
    run(["ip", "netns", "add", name])
    inside = ["ip", "-netns", name]
    run([*inside, "link", "set", "lo", "up"])
    run([*inside, "link", "add", BRIDGE, "type", "bridge"])
    run([*inside, "address", "add", f"{RUNNER}/{PREFIX}", "dev", BRIDGE])
    run([*inside, "link", "set", BRIDGE, "up"])


def enter(name: str, command: Sequence[str]) -> NoReturn:
    """Become ``command``, within the namespace. (`ip netns exec` would mount /sys anew, without control groups.)"""
    sys.stdout.flush()
    os.execvp("nsenter", ["nsenter", f"--net=/run/netns/{name}", *command])


def inside(name: str) -> bool:
    """Whether this process is in the namespace."""
    made = Path("/run/netns") / name
    return made.exists() and os.stat("/proc/self/ns/net").st_ino == os.stat(made).st_ino
