"""Tells systemd how a service does, over the socket that units of ``Type=notify`` have; see sd_notify(3)."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


class ServiceManager:
    """Whoever started this process and wants to hear of it; without ``NOTIFY_SOCKET`` nobody does. From any thread."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._told: set[str] = set()

    def ready(self) -> None:
        """It serves. Said once."""
        self._once("READY=1")

    def stopping(self) -> None:
        """It ends by its own will. Said once."""
        self._once("STOPPING=1")

    def alive(self) -> None:
        """It does what it is there for; to be called by, or after an answer of, the thread that does it. Who is not
        heard for the unit's WatchdogSec is killed and started again."""
        self._send("WATCHDOG=1")

    def _once(self, state: str) -> None:
        if state not in self._told:
            self._told.add(state)
            self._send(state)

    def _send(self, state: str) -> None:
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.setblocking(False)  # a manager that is busy must not hold up the service
            link.sendto(state.encode(), self._address)
