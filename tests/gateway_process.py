"""A gateway as its own process, on ports of the system's choice."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Self


class GatewayProcess:
    """``laxity gateway run`` with these arguments; ``http`` and ``grpc`` are where it serves."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        command = [sys.executable, "-P", "-m", "cli.main", "gateway", "run"]
        command += ["--http", "127.0.0.1:*", "--grpc", "127.0.0.1:*", *arguments]
        with log.open("wb") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline().split() for _ in range(2)]
        assert [line[:3] for line in lines] == [["Serving", "HTTP", "at"], ["Serving", "gRPC", "at"]], log.read_text()
        self.http, self.grpc = (line[-1] for line in lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def ask_stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """End it in order; its exit status."""
        self.ask_stop()
        return self.process.wait(30.0)
