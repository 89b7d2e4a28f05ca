"""What the driver of NVIDIA GPUs says of them (NVML, through ``nvidia-ml-py``)."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from cluster.records import GpuGauges

log = logging.getLogger("laxity.node")

MB = 1024.0**2


def load_nvml() -> Any:
    """The library; ImportError where it is not installed."""
    return importlib.import_module("pynvml")


class GpuReader:
    """``gpus``: the driver's index of each GPU, by device number. A library or a driver that is not there, or fails, is
    told once and tried again at the next reading; a figure that a GPU does not have is left out. Calls may take some
    ms."""

    def __init__(self, gpus: Mapping[int, int], load: Callable[[], Any] = load_nvml) -> None:
        self._gpus = gpus
        self._load = load
        self._library: Any = None
        self._installed = True
        self._failing = False

    def read(self) -> dict[int, GpuGauges]:
        """The gauges by device number, of those that answer."""
        if not self._gpus or not self._installed:
            return {}
        try:
            nvml = self._initialised()
        except ImportError as error:
            self._installed = False
            log.warning("GPUs' clocks, temperature and power are not read: %s; pip install 'laxity[gpu]'", error)
            return {}
        except Exception as error:  # the library has one of its own for each of the driver's codes
            self._fail(error)
            return {}
        found: dict[int, GpuGauges] = {}
        failed: Exception | None = None
        for number, index in self._gpus.items():
            try:
                found[number] = _gauges(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
            except nvml.NVMLError as error:
                failed = error
        if failed is not None:
            self._fail(failed)
            self.close()  # the driver may have been loaded anew
        elif self._failing:
            self._failing = False
            log.info("the GPUs' driver answers again")
        return found

    def close(self) -> None:
        """Let go of the driver."""
        nvml, self._library = self._library, None
        if nvml is not None:
            try:
                nvml.nvmlShutdown()
            except nvml.NVMLError as error:
                log.debug("NVML: %s", error)

    def _initialised(self) -> Any:
        if self._library is None:
            library = self._load()
            library.nvmlInit()
            self._library = library
        return self._library

    def _fail(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            log.warning("the GPUs' driver does not tell clocks, temperature and power at present (NVML: %s)", error)


def _gauges(nvml: Any, handle: Any) -> GpuGauges:
    """Raises NVMLError where the GPU does not answer at all."""
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)

    def figure(read: Callable[[], float]) -> float | None:
        try:
            return float(read())
        except nvml.NVMLError:
            return None  # not every GPU has it (a part of one least of all)

    utilization = figure(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    power = figure(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    return GpuGauges(
        utilization=None if utilization is None else utilization / 100.0,
        memory_used_mb=round(memory.used / MB, 1),
        memory_total_mb=round(memory.total / MB, 1),
        sm_clock_mhz=figure(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        memory_clock_mhz=figure(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        temperature_c=figure(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        power_w=None if power is None else power / 1000.0,
    )
