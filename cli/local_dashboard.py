"""The dashboard of a cluster on this machine: its address is there from the start, its process once somebody looks."""

from __future__ import annotations

import os
import secrets
import select

from cli.children import laxity
from cli.rundir import RunDirectory
from cluster.addresses import advertised, split_address
from cluster.observe.sidecar import listen
from laxity.curve import is_local


class LocalDashboard:
    """Binds on construction; OSError says why that cannot be. ``address`` is 'HOST:PORT', with * as PORT for any free
    one. The token with which people sign in is new each time, and lies beside the store for the user alone to read."""

    def __init__(self, directory: RunDirectory, address: str) -> None:
        self._listener = listen(address, "--dashboard")
        self.url = advertised(f"http://{split_address(address)[0]}:{self._listener.getsockname()[1]}", "")
        """Where people find it."""
        self.token_file = directory.path / "dashboard.token"
        self.token_file.unlink(missing_ok=True)
        descriptor = os.open(self.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(24) + "\n")

    @property
    def inherited(self) -> tuple[int]:
        """The file descriptor that its process is to inherit."""
        return (self._listener.fileno(),)

    def command(self, store: str, cluster: str) -> list[str]:
        """The command line of its process."""
        arguments = ["--listen-fd", str(self._listener.fileno()), "--http-token-file", str(self.token_file)]
        if is_local(f"tcp://{self._listener.getsockname()[0]}:0"):
            arguments += ["--http-open", "dashboard"]  # who is on this host sees it; changes want the token
        return laxity("dashboard", *arguments, "--store", store, "--cluster", cluster)

    def asked_for(self, seconds: float) -> bool:
        """Wait for somebody to connect; whether one does within ``seconds``."""
        return bool(select.select([self._listener], [], [], seconds)[0])

    def close(self) -> None:
        self._listener.close()
        self.token_file.unlink(missing_ok=True)
