"""The process that speaks HTTP for another one: metrics, health and traces, without a moment of the latter's time for
anything but the figures themselves.

The process binds the socket, and does nothing more until somebody connects. Then a thread starts the other process
(``laxity observe``), which inherits the socket, accepts connections there, and asks for figures over a socketpair. It
ends with the process that it speaks for, however that ends: it reads the end of the socketpair's stream.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Final, Literal, Self

from cluster.addresses import ANYWHERE, advertised, split_address
from cluster.observe.figures import Figures
from cluster.observe.link import MOST_ASKED, answer, receive, send
from cluster.observe.source import Source
from cluster.observe.trace import TraceRecord

log = logging.getLogger("laxity.observe")

BACKLOG: Final = 128
STUCK: Final = 5.0
"""Seconds in which the other process does not read its answer, after which it is killed."""
GRACE: Final = 2.0
"""Seconds that it has to end once it was let go of."""
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
"""Seconds before one that died is started again; each further pause is twice as long."""
SETTLED: Final = 60.0
"""Seconds after which one that runs is trusted again."""


class Beginning:
    """A :class:`Source` while there is nothing to tell but for what a process waits."""

    def __init__(self, process: Literal["shard", "agent", "coordinator"], name: str, waits_for: str) -> None:
        self._process: Literal["shard", "agent", "coordinator"] = process
        self._name = name
        self._waits_for = waits_for
        self._started_at = time.time()

    def figures(self) -> Figures:
        return Figures(self._process, self._name, os.getpid(), self._started_at, self._waits_for, {})

    def trace(self, request: str) -> TraceRecord | None:
        return None

    def traces(self, after: int, limit: int) -> tuple[int, list[TraceRecord]]:
        return after, []


class Sidecar:
    """Use it as a context manager. It binds on construction; OSError says why that cannot be.

    ``http`` is the address, 'HOST:PORT' ('': none), ``host`` the name by which others reach this one ('': see
    :func:`advertised`). ``command`` is the command line of the process that speaks HTTP there, which is told the file
    descriptors by ``--listen-fd`` and ``--link-fd``; ``at_once``: it is started without waiting for anybody, as it has
    something to do by itself. ``source`` answers it, and may be replaced at any time.
    """

    def __init__(self, http: str, host: str, command: Sequence[str], source: Source, *, at_once: bool = False) -> None:
        self.source = source
        self.address = ""
        """'http://host:port' as others reach it; '' for none."""
        self.bound: str | None = None
        """The IP address that it is bound to."""
        self._command = command
        self._at_once = at_once
        self._listener: socket.socket | None = None
        if http:
            self._listener = listen(http)
            self.bound, port = self._listener.getsockname()[:2]
            self.address = advertised(f"http://{split_address(http)[0]}:{port}", host)
        self._stopping = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="observe", daemon=True)

    def __enter__(self) -> Self:
        if self.address:
            log.info("metrics and health at %s", self.address)
        if self.address or self._at_once:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the other process, and close the socket."""
        self._stopping = True
        self._wake_in.close()
        if self._thread.ident is not None:
            self._thread.join()
        self._wake_out.close()
        if self._listener is not None:
            self._listener.close()

    # ---- the observing thread --------------------------------------------------------------

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while self._wanted():
            began = time.monotonic()
            try:
                how = self._serve()
            except OSError as error:
                how = f"could not be started: {error}"
            if self._stopping:
                return
            if time.monotonic() > began + SETTLED:
                pause = FIRST_PAUSE
            log.warning("the process that speaks HTTP %s; it is started again in %g s at the earliest", how, pause)
            if self._readable(self._wake_out, pause):
                return
            pause = min(2.0 * pause, LONGEST_PAUSE)

    def _wanted(self) -> bool:
        """Wait until somebody connects; False once this is to stop."""
        if self._at_once:
            return not self._stopping
        assert self._listener is not None
        self._readable(self._listener, None)
        return not self._stopping

    def _serve(self) -> str:
        """Start the other process and answer it until it ends, or this is to stop; how it ended."""
        mine, its = socket.socketpair()
        with mine:
            with its:
                arguments = ["--link-fd", str(its.fileno())]
                inherited = [its.fileno()]
                if self._listener is not None:
                    arguments += ["--listen-fd", str(self._listener.fileno())]
                    inherited.append(self._listener.fileno())
                process = subprocess.Popen(
                    [*self._command, *arguments],
                    stdin=subprocess.DEVNULL,
                    pass_fds=inherited,
                    # Ctrl-C at the terminal is this process's alone, which then ends the other one.
                    start_new_session=True,
                )
            mine.settimeout(STUCK)
            try:
                why = self._answer(mine)
            finally:
                mine.close()
                status = _end(process)
        return why or f"ended with status {status}"

    def _answer(self, link: socket.socket) -> str:
        """Answer until the other end is gone or makes no sense, or this is to stop; what was wrong with it."""
        while self._readable(link, None) and not self._stopping:
            try:
                asked = receive(link, MOST_ASKED)
                if not asked:
                    return ""
                send(link, answer(self.source, asked))
            except (OSError, ValueError) as error:
                return f"was ended ({error})"
        return ""

    def _readable(self, source: socket.socket, seconds: float | None) -> bool:
        """Wait for ``source``, or the end; whether it is readable."""
        poll = select.poll()
        poll.register(source, select.POLLIN)
        poll.register(self._wake_out, select.POLLIN)
        ready = poll.poll(None if seconds is None else seconds * 1e3)
        return any(fd == source.fileno() for fd, _ in ready)


def listen(address: str, option: str = "--http") -> socket.socket:
    """A socket that listens at 'HOST:PORT'. Where that cannot be, OSError says why, and what to do about ``option``."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = "" if host in ANYWHERE else host.strip("[]")
    try:
        return socket.create_server((bound, port), family=family, backlog=BACKLOG)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
        raise OSError(
            f"HTTP cannot be served at {address} ({why}): end what uses that port, choose another address with "
            f"{option} (with * as PORT for any free one), or {option} '' for none"
        ) from error


def _end(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a process whose link is closed; kill it where it does not come. Its status."""
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
