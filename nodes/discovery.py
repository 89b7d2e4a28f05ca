"""The devices of this host, and those that ``--devices`` names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from nodes.agent import DeviceConfig

TIMEOUT = 20.0
"""Seconds that the GPU driver's tool may take."""
MAX_EMULATED = 1024
"""The most devices that one agent plays."""


class NoSuchDevices(ValueError):
    """The devices asked for are not here; the text says what to do."""


def parse_devices(text: str) -> list[DeviceConfig]:
    """The devices that 'cpu', 'cuda' (all visible GPUs) or 'emulated:N' means; :class:`NoSuchDevices` otherwise."""
    if text == "cpu":
        return [DeviceConfig("cpu", "cpu", spare_cores())]
    if text == "cuda":
        devices = cuda_devices()
        if not devices:
            raise NoSuchDevices("there is no NVIDIA GPU here (nvidia-smi lists none); use cpu or emulated:N")
        return devices
    match = re.fullmatch(r"emulated:(\d{1,4})", text)
    if match and 1 <= int(match[1]) <= MAX_EMULATED:
        return [DeviceConfig("emulated", "emulated")] * int(match[1])
    raise NoSuchDevices(f"unknown devices {text!r}; write cpu, cuda, or emulated:N with N up to {MAX_EMULATED}")


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
            [tool, "--query-gpu=index,uuid,name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return visible_devices(listed, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible_devices(listed: str, visible: str | None) -> list[DeviceConfig]:
    """The devices of ``nvidia-smi``'s lines 'index, uuid, name' in ``visible`` (indexes or UUIDs; None: all)."""
    devices = {}
    for line in listed.splitlines():
        index, uuid, name = (part.strip() for part in line.split(",", 2))
        device = DeviceConfig(f"cuda:{index}", re.sub(r"[^A-Za-z0-9.]+", "-", name.removeprefix("NVIDIA ")).strip("-"))
        devices[index] = devices[uuid] = device
    if visible is None:
        return list(dict.fromkeys(devices.values()))
    return [devices[name.strip()] for name in visible.split(",") if name.strip() in devices]
