"""The devices of this host, and those that ``--devices`` names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from nodes.device import DeviceConfig

TIMEOUT = 20.0
"""Seconds that the GPU driver's tool may take."""
RESERVE_MB = 1024.0
RESERVE = 1 / 16
"""Of a GPU's memory models may not take this part, and RESERVE_MB at least: it is for the driver, for libraries, and
for what batches need while they run."""
MAX_EMULATED = 1024
"""The most devices that one agent plays."""


class NoSuchDevices(ValueError):
    """The devices asked for are not here; the text says what to do."""


def parse_devices(text: str) -> list[DeviceConfig]:
    """The devices that ``text`` means: 'cpu[:MEMORY_MB]', 'cuda' (all visible GPUs),
    'emulated:N[:TYPE[:MEMORY_MB]]', or several of these joined by '+'; :class:`NoSuchDevices` otherwise."""
    parts = text.split("+")
    devices = [device for part in parts for device in _parse(part, text)]
    kinds = [part.partition(":")[0] for part in parts]
    if any(kinds.count(kind) > 1 for kind in ("cpu", "cuda")):
        raise NoSuchDevices(f"{text!r} names the same devices twice; write cpu and cuda once each")
    if sum(device.kind == "emulated" for device in devices) > MAX_EMULATED:
        raise NoSuchDevices(f"{text!r} are more than {MAX_EMULATED} devices; start another agent for the rest")
    return devices


def _parse(part: str, text: str) -> list[DeviceConfig]:
    cpu = re.fullmatch(r"cpu(?::(\d{1,9}))?", part)
    if cpu is not None:
        return [DeviceConfig("cpu", "cpu", spare_cores(), float(cpu[1] or 0))]
    if part == "cuda":
        devices = cuda_devices()
        if not devices:
            raise NoSuchDevices("there is no NVIDIA GPU here (nvidia-smi lists none); use cpu or emulated:N")
        return devices
    match = re.fullmatch(r"emulated:(\d{1,4})(?::([A-Za-z0-9][A-Za-z0-9.-]*)(?::(\d{1,9}))?)?", part)
    if match is None or not 1 <= int(match[1]) <= MAX_EMULATED:
        raise NoSuchDevices(
            f"unknown devices {text!r}; write cpu, cuda, or emulated:N with N up to {MAX_EMULATED}, also with the MB "
            "that models may take and the type that is played, as in cpu:2048 and emulated:8:A100:81920+emulated:8:T4"
        )
    return [DeviceConfig("emulated", match[2] or "emulated", memory_mb=float(match[3] or 0))] * int(match[1])


def spare_cores() -> int:
    """The cores that models may use when the broker and the services keep one."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def cuda_devices() -> list[DeviceConfig]:
    """The NVIDIA GPUs of this host, those in ``CUDA_VISIBLE_DEVICES`` only where that is set."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        listed = subprocess.run(
            [tool, "--query-gpu=index,uuid,memory.total,name", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return visible_devices(listed, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible_devices(listed: str, visible: str | None) -> list[DeviceConfig]:
    """The devices of ``nvidia-smi``'s lines 'index, uuid, memory in MiB, name' in ``visible`` (indexes or UUIDs; None:
    all)."""
    devices = {}
    for line in listed.splitlines():
        index, uuid, memory, name = (part.strip() for part in line.split(",", 3))
        kind = re.sub(r"[^A-Za-z0-9.]+", "-", name.removeprefix("NVIDIA ")).strip("-")
        # Some GPUs share the host's memory and say '[N/A]'.
        memory_mb = _budget(float(memory)) if memory.isdecimal() else 0.0
        devices[index] = devices[uuid] = DeviceConfig(f"cuda:{index}", kind, memory_mb=memory_mb)
    if visible is None:
        return list(dict.fromkeys(devices.values()))
    return [devices[name.strip()] for name in visible.split(",") if name.strip() in devices]


def _budget(memory_mb: float) -> float:
    """What models may take of a GPU's memory."""
    return max(memory_mb - max(RESERVE_MB, RESERVE * memory_mb), 1.0)
