"""What ``laxity doctor`` looks at of a host's GPUs: their driver, what the runtimes see of them, who else uses them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

from cli.finding import Finding

TIMEOUT = 20.0
"""Seconds that the driver's tool may take."""
TAKEN = 0.1
"""The part of a GPU's memory which others may take before that is worth a line."""
_QUERY = "index,name,driver_version,memory.total,memory.used,compute_mode"


def check_gpus() -> Iterator[Finding]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Finding("gpu", "note", "no NVIDIA GPU (no nvidia-smi here): models run on the CPU")
        return
    try:
        command = [tool, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stdout", None) or str(error)).strip().splitlines()
        advice = "install the driver (again), load its modules, or give the container the GPUs"
        yield Finding("gpu", "warning", f"nvidia-smi fails: {said[0] if said else error}", advice)
        return
    exclusive = yield from _each(listed)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        yield Finding("gpu", "note", f"CUDA_VISIBLE_DEVICES={visible}: agents use no others")
    pipe = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if (pipe / "control").exists():
        advice = "end it (`echo quit | nvidia-cuda-mps-control`): a GPU has one worker"
        yield Finding("gpu", "note", f"CUDA MPS runs ({pipe})", advice)
    elif exclusive:
        yield Finding("gpu", "note", "in exclusive mode", "end other processes on it before the agent starts")
    if importlib.util.find_spec("pynvml") is None:
        advice = "pip install 'laxity[gpu]' to see clocks, temperature and power"
        yield Finding("gpu", "note", "NVML's bindings are not installed", advice)
    yield from _runtimes()


def _each(listed: str) -> Generator[Finding, None, bool]:
    """A line for each GPU; returns whether one may be used by one process alone."""
    exclusive = False
    for line in listed.splitlines():
        index, name, driver, total, used, mode = (part.strip() for part in line.rsplit(",", 5))
        exclusive = exclusive or "Exclusive" in mode
        shown = f"cuda:{index} {name}, driver {driver}, {total} MiB"
        if total.isdecimal() and used.isdecimal() and int(used) > TAKEN * int(total):
            advice = "nothing if that is Laxity's agent; else end what uses it (`nvidia-smi` lists it)"
            yield Finding("gpu", "note", f"{shown}, of which {used} are taken", advice)
        else:
            yield Finding("gpu", "ok", shown)
        if mode == "Prohibited":
            yield Finding("gpu", "error", f"cuda:{index} may not be used", f"`nvidia-smi -i {index} -c DEFAULT`")
    return exclusive


def _runtimes() -> Iterator[Finding]:
    if importlib.util.find_spec("onnxruntime") is not None:
        try:
            import onnxruntime
        except ImportError as error:
            yield Finding("gpu", "warning", f"onnxruntime cannot be imported: {error}", "install it again")
        else:
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                advice = "pip install onnxruntime-gpu in place of onnxruntime"
                yield Finding("gpu", "warning", "ONNX Runtime has no CUDA provider: its models run on the CPU", advice)
    if importlib.util.find_spec("torch") is not None:
        try:
            import torch
        except (ImportError, OSError) as error:
            yield Finding("gpu", "warning", f"torch cannot be imported: {error}", "install it again")
            return
        if not torch.cuda.is_available():
            built = torch.version.cuda or "none"
            advice = "install a build of torch for CUDA, and no newer one than the driver's"
            yield Finding("gpu", "warning", f"torch sees no GPU (built for CUDA: {built})", advice)
        else:
            yield Finding("gpu", "ok", f"torch sees {torch.cuda.device_count()} (CUDA {torch.version.cuda})")
