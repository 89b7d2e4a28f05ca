"""A real Triton server for tests and benchmarks: its own process, on a port of the system's choice, ended by its pid.

The program is the ``tritonserver`` on the PATH or beside the running Python, which ``.ci/triton`` puts there.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

START_SECONDS = 60.0


def find_tritonserver() -> str | None:
    """The program, where there is one."""
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return shutil.which("tritonserver", path=beside)


class TritonServer:
    """A server whose models are loaded and unloaded by its clients ("explicit"), or all at its start ("none").

    The port is the system's choice and stays reserved while this object lives: a socket that only *binds* it, with
    SO_REUSEPORT, keeps it from everybody else, while the server, which shares ports too, listens there. So a server
    that was killed comes back at the same address.
    """

    def __init__(self, directory: Path, control: str = "explicit", program: str | None = None) -> None:
        found = program or find_tritonserver()
        if found is None:
            raise FileNotFoundError("there is no tritonserver; .ci/triton DIRECTORY puts one there")
        self.repository = directory / "models"
        self.repository.mkdir(parents=True)
        self.log = directory / "tritonserver.log"
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._reserved.getsockname()[1]}"
        self._command = [
            found,
            *("--model-repository", str(self.repository), "--model-control-mode", control),
            *("--grpc-address", "127.0.0.1", "--grpc-port", self.url.rpartition(":")[2], "--reuse-grpc-port", "1"),
            *("--allow-http", "0", "--allow-metrics", "0", "--exit-timeout-secs", "5"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._reserved.close()

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server runs"
        return self._process.pid

    def add(self, name: str, config: str, code: str, version: int = 1) -> None:
        """Put a model of the Python backend into the repository."""
        directory = self.repository / name / str(version)
        directory.mkdir(parents=True, exist_ok=True)
        (directory.parent / "config.pbtxt").write_text(f'backend: "python"\n{config}\n')
        (directory / "model.py").write_text(code)

    def start(self, *arguments: str) -> None:
        """Start it, and wait until it answers."""
        with self.log.open("ab") as log:
            # A group of its own: a Ctrl-C in the terminal is for whoever started it, who then ends it in order.
            self._process = subprocess.Popen(
                [*self._command, *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL, process_group=0
            )
        self.wait_ready()

    def wait_ready(self) -> None:
        from tritonclient.grpc import InferenceServerClient
        from tritonclient.utils import InferenceServerException

        # A connection of its own, which is tried again at once.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 100)]
        ends = time.monotonic() + START_SECONDS
        with InferenceServerClient(self.url, channel_args=options) as client:
            while True:
                if self._process is None or self._process.poll() is not None:
                    raise RuntimeError(f"tritonserver ended while it started:\n{self.tail()}")
                try:
                    if client.is_server_ready(client_timeout=2.0):
                        return
                except InferenceServerException:
                    pass
                if time.monotonic() > ends:
                    raise TimeoutError(f"tritonserver was not ready within {START_SECONDS:g} s:\n{self.tail()}")
                time.sleep(0.02)

    def kill(self) -> None:
        """Kill it as a crash would (-9), with the processes of its models' Python."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in order."""
        self._end(signal.SIGTERM)

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def _end(self, sign: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        shared = _shared_memory(process.pid)
        process.send_signal(sign)
        try:
            process.wait(15.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # Its models run in processes of their own, which notice only after a while that it is gone.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for file in shared:
            file.unlink(missing_ok=True)


def _shared_memory(pid: int) -> list[Path]:
    """The Python backend's shared memory, which outlives a server that is killed."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return []
    return [Path(path) for path in set(re.findall(r"/dev/shm/triton_python_backend_shm_region_[\w-]+", maps))]
