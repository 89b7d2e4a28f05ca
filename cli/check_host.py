"""What ``laxity doctor`` looks at on a host: its clock, its limits, its network's buffers and its disks."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from cli.finding import Finding

OPEN_FILES = 4096
"""Open files that a shard with some hundred connections needs with room to spare."""
PROCESSES = 1024
"""Processes and threads of this user: each has a dozen."""
SHARED_MB = 256
"""Of shared memory, by way of which tensors reach a Triton server."""
CONNECTIONS = 1024
"""That may wait to be accepted: after a shard's restart all services come at once."""
BUFFER = 2 * 1024**2
"""Bytes of a socket's buffer that large payloads need on a fast network."""
FREE_BYTES = 256 * 1024**2
"""Free space below which something may soon fail to write."""
_UNSYNCHRONISED = 0x40
_CLOCK_ERROR = 5


class _Timex(ctypes.Structure):
    """The beginning of Linux' struct timex, and room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 512),
    )


def check_clock() -> Iterator[Finding]:
    """Budgets are counted on monotonic clocks, which nobody sets; the host's clock is for people, and certificates."""
    timex = _Timex()
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    advice = (
        "run chrony or systemd-timesyncd: logs, certificates and the end of keys go by this clock (requests do not)"
    )
    if state < 0:
        yield Finding(
            "clock", "note", f"adjtimex: {os.strerror(ctypes.get_errno())}", "nothing, if others keep the time"
        )
    elif state == _CLOCK_ERROR or timex.status & _UNSYNCHRONISED:
        yield Finding("clock", "warning", "not synchronised by NTP", advice)
    else:
        yield Finding("clock", "ok", f"synchronised, within {timex.maxerror / 1000:.0f} ms")
    before = time.monotonic()
    resolution = time.get_clock_info("monotonic").resolution
    source = _read(Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")) or "unknown source"
    if resolution > 1e-5 or time.monotonic() < before:
        advice = "choose a better one (see /sys/devices/system/clocksource): windows are kept to 0.1 ms"
        yield Finding("monotonic clock", "error", f"{source}, {resolution * 1e6:g} µs a step", advice)
    elif source in ("hpet", "acpi_pm", "jiffies", "refined-jiffies"):
        advice = "boot with a tsc (or kvm-clock) clock source: each look at this one takes microseconds"
        yield Finding("monotonic clock", "warning", source, advice)
    else:
        yield Finding("monotonic clock", "ok", source)


def check_limits(proc: Path = Path("/proc/sys"), shared: Path = Path("/dev/shm")) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _below(soft, OPEN_FILES):
        advice = f"raise it with `ulimit -n {OPEN_FILES}`, or LimitNOFILE= of the service (the hard limit is {hard})"
        yield Finding("open files", "warning", f"at most {soft}", advice)
    else:
        yield Finding("open files", "ok", _at_most(soft))
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if _below(soft, PROCESSES):
        advice = f"raise it with `ulimit -u {PROCESSES}`, or LimitNPROC= and TasksMax= of the service"
        yield Finding("processes", "warning", f"at most {soft} processes and threads", advice)
    else:
        yield Finding("processes", "ok", _at_most(soft))
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield Finding("locked memory", "ok", _at_most(soft, "bytes"))
    try:
        megabytes = shutil.disk_usage(shared).total // 1024**2
    except OSError as error:
        advice = "mount a tmpfs there if stages run on a Triton server: tensors go over the network otherwise"
        yield Finding("shared memory", "note", f"{shared}: {error.strerror}", advice)
    else:
        if megabytes < SHARED_MB:
            advice = f"start the container with --shm-size={SHARED_MB}m or more, if stages run on a Triton server"
            yield Finding("shared memory", "warning", f"{shared} holds {megabytes} MiB", advice)
        else:
            yield Finding("shared memory", "ok", f"{shared} holds {megabytes} MiB")
    yield from _sysctl(proc / "net/core/somaxconn", CONNECTIONS, "connections may wait to be accepted")
    for name in ("rmem_max", "wmem_max"):
        yield from _sysctl(proc / "net/core" / name, BUFFER, "bytes in a socket's buffer")


def check_disks(directories: Mapping[str, Path]) -> Iterator[Finding]:
    """``directories`` by what they are for; those that are not there yet are looked at where they will be made."""
    for what, directory in directories.items():
        there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        if not there.is_dir():
            yield Finding(
                what, "error", f"{there} is no directory", f"name another one than {directory}, or move it away"
            )
        elif not os.access(there, os.W_OK | os.X_OK):
            advice = f"`chown` it to the user that runs Laxity (this is {os.getuid()}), or name another one"
            yield Finding(what, "error", f"{there} cannot be written", advice)
        elif (free := shutil.disk_usage(there).free) < FREE_BYTES:
            yield Finding(what, "warning", f"{directory}: only {free // 1024**2} MiB free", "make room there")
        else:
            yield Finding(what, "ok", f"{directory}: {free / 1024**3:.1f} GiB free")


def _sysctl(file: Path, least: int, what: str) -> Iterator[Finding]:
    text = _read(file)
    name = ".".join(file.parts[-3:])
    if not text.isdecimal():
        return  # another kernel, or hidden by a container
    if int(text) < least:
        advice = f"for many or large requests: `sysctl -w {name}={least}`"
        yield Finding("network", "note", f"{name}: {text} {what}", advice)
    else:
        yield Finding("network", "ok", f"{name}: {text} {what}")


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _below(limit: int, least: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < least


def _at_most(limit: int, what: str = "") -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"at most {limit} {what}".strip()
