"""A Triton server as a worker sees it: one model, its errors in our terms, and its coming back after a restart."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nodes.executors.base import MissingExtra, Unavailable
from nodes.executors.errors import is_out_of_memory

log = logging.getLogger(__name__)

CALL_SECONDS = 5.0
LOAD_SECONDS = 600.0
PATIENCE_SECONDS = 0.02
"""How long a batch waits for a server that is away. Failing at once, this device would always be free, and draw the
requests away from those that work; waiting for long, its batches' windows would close, and its agent take its inputs
for hanging."""
_RETRY_SECONDS = (0.05, 1.0)
_NOT_EXPLICIT = "explicit model load / unload is not allowed"
_ANSWERED = ("[request id:", "Request for unknown model")
"""How the server's own messages begin; those of a connection that is lost have the same status."""
_STUB_DIED = "is not healthy"
"""Of a Python model whose own process has ended: until it is loaded anew, the server takes a second to say so."""


class TritonError(RuntimeError):
    """What the server said of a request, in its own words."""


class Unanswered(Unavailable):
    """The server may still work on what it was asked for, or not: nobody knows."""


class ModelServer:
    """One model of the server at ``url``.

    ``infer`` and the others are called from any thread. Once the server is found to be away, or to have forgotten the
    model, a thread of its own brings it back (``restore`` is called then as well, to bring back what else was lost);
    until then ``infer`` raises :class:`Unavailable`.
    """

    def __init__(self, url: str, model: str, version: str, restore: Callable[[], None]) -> None:
        try:
            from tritonclient import grpc
        except ImportError as error:
            raise MissingExtra("triton", "tritonclient[grpc]", "triton") from error
        self.url = url
        self.client: Any = _Bounded(
            grpc.InferenceServerClient(
                url,
                channel_args=[
                    ("grpc.max_send_message_length", -1),
                    ("grpc.max_receive_message_length", -1),
                    ("grpc.initial_reconnect_backoff_ms", 50),
                    ("grpc.min_reconnect_backoff_ms", 2000),
                    ("grpc.max_reconnect_backoff_ms", 500),
                    # A connection of its own: large tensors of one model do not hold up those of another.
                    ("grpc.use_local_subchannel_pool", 1),
                ],
            ),
            self._translated,
        )
        self._model = model
        self._version = version
        self._restore = restore
        self._use = _Use(url, model)
        self._available = threading.Event()
        self._available.set()
        self._lock = threading.Lock()
        self._residence = threading.Lock()
        """Held while it is decided whether the model is to be loaded, and while it is unloaded."""
        self._closed = threading.Event()
        self._why = ""
        self._reload = False
        self._wanted = False

    def check(self) -> None:
        """Raise where there is no such server or no such model in its repository."""
        if not self.client.is_server_live():
            raise Unavailable(f"the Triton server at {self.url} is not live")
        known = sorted({entry.name for entry in self.client.get_model_repository_index().models})
        if self._model not in known:
            names = ", ".join(known[:10]) or "none"
            raise ValueError(f"the Triton server at {self.url} has no model {self._model!r} (it has: {names})")

    def config(self) -> Any:
        """The loaded model's ModelConfig."""
        return self.client.get_model_config(self._model, self._version).config

    def load(self) -> None:
        """Have the server load the model, unless it is ready (another worker's, or all are loaded at its start)."""
        with self._residence:
            self._use.begin()
            self._wanted = True
        try:
            self._load()
            self._restore()
        except BaseException:
            with self._residence:
                self._wanted = False
                self._use.end(None)
            raise

    def unload(self) -> None:
        """Have the server unload the model, unless others use it; return when its memory is free."""
        with self._residence:
            self._wanted = False
            self._use.end(self._unload)

    def infer(self, inputs: list[Any], outputs: list[Any], timeout: float) -> Any:
        """Run a batch. Raises :class:`Unavailable` (:class:`Unanswered` where the batch may still run), MemoryError, or
        :class:`TritonError` with Triton's own message."""
        self.wait()
        try:
            return self.client.infer(
                self._model, inputs, self._version, outputs=outputs, client_timeout=timeout, allow_missing=False
            )
        except Unavailable as error:
            self._lost(str(error))
            raise
        except TritonError as error:
            if _STUB_DIED in str(error):
                self._reload = True
                self._lost(str(error))
            raise

    def wait(self) -> None:
        """Wait a little for a server that is away; Unavailable where it stays away."""
        if not self._available.wait(PATIENCE_SECONDS):
            raise Unavailable(self._why)

    def close(self) -> None:
        """Let go of the connection; where the server is being brought back, as soon as its answer to that is there."""
        with self._lock:
            self._closed.set()
            recovering = not self._available.is_set()
        if not recovering:
            self._disconnect()

    def _disconnect(self) -> None:
        self._use.end(None)
        self.client.close()

    def _load(self) -> None:
        if self._reload:
            self._ask_to_unload()  # loaded again without that, it stays as it is while its files are the same
        elif self.client.is_model_ready(self._model, self._version):
            return
        try:
            self.client.load_model(self._model, client_timeout=LOAD_SECONDS)
        except Unavailable as error:
            if _NOT_EXPLICIT not in str(error):
                raise
            advice = "start it with --model-control-mode=explicit, or see in its log why the model is not ready"
            if not self.client.is_model_ready(self._model, self._version):
                raise TritonError(
                    f"{self._model!r} is not ready on the Triton server at {self.url}; {advice}"
                ) from None
        self._reload = False
        if not self.client.is_model_ready(self._model, self._version):
            raise TritonError(f"{self._model!r} has no version {self._version or '(any)'} that is ready at {self.url}")

    def _unload(self) -> None:
        if self._ask_to_unload():
            ends = time.monotonic() + CALL_SECONDS
            while self._unloading() and time.monotonic() < ends:
                self._closed.wait(0.005)

    def _ask_to_unload(self) -> bool:
        try:
            self.client.unload_model(self._model)
        except Unavailable as error:
            if _NOT_EXPLICIT in str(error):
                log.warning("%s stays loaded: its server is not run with --model-control-mode=explicit", self._model)
            return False
        return True

    def _unloading(self) -> bool:
        try:
            index = self.client.get_model_repository_index().models
        except Unavailable:  # a server that is away holds nothing
            return False
        return any(each.name == self._model and each.state in ("READY", "UNLOADING") for each in index)

    def _lost(self, why: str) -> None:
        with self._lock:
            self._why = why
            if self._available.is_set() and not self._closed.is_set():
                self._available.clear()
                log.warning("%s: %s", self._model, why)
                threading.Thread(target=self._recover, name="triton-recovery", daemon=True).start()

    def _recover(self) -> None:
        begun = time.monotonic()
        pause, longest = _RETRY_SECONDS
        while not self._closed.is_set():
            try:
                if self.client.is_server_live():
                    if self._wanted:
                        self._load_again()
                    log.warning("%s is back at %s after %.2f s", self._model, self.url, time.monotonic() - begun)
                    break
                self._why = f"the Triton server at {self.url} is not live"
            except Exception as error:
                self._why = str(error)
            self._closed.wait(pause)
            pause = min(2 * pause, longest)
        with self._lock:
            self._available.set()
            closed = self._closed.is_set()
        if closed:
            self._disconnect()

    def _load_again(self) -> None:
        try:
            self._load()
        finally:
            with self._residence:
                if not self._wanted:  # it was to be unloaded meanwhile
                    self._use.begin()
                    self._use.end(self._unload)
        if not self._closed.is_set():
            self._restore()

    def _translated(self, error: Any, allow_missing: bool) -> Exception:
        """Triton's error as ours. A model or region that it does not know was there before: then it has restarted."""
        status, message = str(error.status()).rpartition(".")[2], str(error.message()).strip()
        if status == "DEADLINE_EXCEEDED":
            return Unanswered(f"the Triton server at {self.url} did not answer in time")
        if (status == "UNAVAILABLE" and not message.startswith(_ANSWERED)) or status == "CANCELLED":
            return Unanswered(f"the Triton server at {self.url}: {message}")
        if status == "UNAVAILABLE" or (status == "NOT_FOUND" and not allow_missing):
            return Unavailable(f"the Triton server at {self.url}: {message}")
        if is_out_of_memory(message):
            return MemoryError(f"the Triton server at {self.url}: {message}")
        return TritonError(message)


class _Bounded:
    """A client whose calls all have a timeout and raise our errors."""

    def __init__(self, client: Any, translated: Callable[[Any, bool], Exception]) -> None:
        self._client = client
        self._translated = translated

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from tritonclient.utils import InferenceServerException

        method = getattr(self._client, name)

        def call(*arguments: Any, allow_missing: bool = True, **options: Any) -> Any:
            if name != "close":
                options.setdefault("client_timeout", CALL_SECONDS)
            try:
                return method(*arguments, **options)
            except InferenceServerException as error:
                raise self._translated(error, allow_missing) from None

        return call


class _Use:
    """Who of this host's workers use a model of a server: each holds a shared lock on one file, so that nobody unloads
    what another one uses. The locks of those who die end with them."""

    def __init__(self, url: str, model: str) -> None:
        digest = hashlib.sha256(f"{os.getuid()} {url} {model}".encode()).hexdigest()[:16]
        self._path = Path(tempfile.gettempdir()) / f"laxity-triton-{digest}.lock"
        self._file: int | None = None

    def begin(self) -> None:
        """From now on it is used here; waits while another one has it unloaded."""
        if self._file is not None:
            return
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(file, fcntl.LOCK_SH)
            if self._is_current(file):
                self._file = file
                return
            os.close(file)  # the last user has just removed it

    def end(self, last: Callable[[], None] | None) -> None:
        """It is not used here any more. If nobody else uses it, ``last`` is called before anybody can begin to."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_current(file):
                if last is not None:
                    last()
                self._path.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(file)

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False
