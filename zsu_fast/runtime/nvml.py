"""The state of a GPU from NVIDIA's management library: clocks, power, temperature, throttling."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

# Reasons for which a card runs below the clocks that it was set to; the bits are those of nvml.h.
THROTTLING = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True)
class GpuState:
    """One GPU at one moment.

    Attributes:
        name, driver: of the card.
        sm_clock, max_sm_clock, memory_clock: MHz.
        power, power_limit: W.
        temperature: degrees Celsius.
        throttled: why it runs below its clocks, from `THROTTLING`; empty if it does not.
    """

    name: str
    driver: str
    sm_clock: int
    max_sm_clock: int
    memory_clock: int
    power: float
    power_limit: float
    temperature: int
    throttled: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"throttled": list(self.throttled)}

    def __str__(self) -> str:
        slow = f", throttled: {', '.join(self.throttled)}" if self.throttled else ""
        return (
            f"{self.name}, driver {self.driver}, {self.sm_clock} of {self.max_sm_clock} MHz, memory"
            f" {self.memory_clock} MHz, {self.power:.0f} of {self.power_limit:.0f} W,"
            f" {self.temperature} C{slow}"
        )


def gpu_state(index: int = 0) -> GpuState | str:
    """Asks NVML about the CUDA device ``index``; the reason if there is no answer."""
    try:
        import pynvml as nvml
    except ImportError:
        return "unknown: nvidia-ml-py is not installed"
    try:
        nvml.nvmlInit()
        handle = _handle(nvml, index)
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return GpuState(
            name=str(nvml.nvmlDeviceGetName(handle)),
            driver=str(nvml.nvmlSystemGetDriverVersion()),
            sm_clock=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            max_sm_clock=nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            memory_clock=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            power=nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            power_limit=nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            temperature=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            throttled=tuple(text for bit, text in THROTTLING.items() if reasons & bit),
        )
    except nvml.NVMLError as error:
        return f"unknown: {error}"


def _handle(nvml: Any, index: int) -> Any:
    """NVML's handle of a CUDA device: CUDA numbers the visible ones, NVML all that there are."""
    if not torch.cuda.is_available():
        return nvml.nvmlDeviceGetHandleByIndex(index)
    uuid = torch.cuda.get_device_properties(index).uuid
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
