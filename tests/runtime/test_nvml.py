"""The state of a GPU by NVML, for which there is a stand-in; throttled figures are no results."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import harness
from zsu_fast.runtime import doctor as doctor_module
from zsu_fast.runtime.nvml import GpuState, gpu_state


class NVMLError(Exception):
    """As the library's."""


def fake_nvml(reasons: int = 0) -> Any:
    """The functions of pynvml that are called."""
    return SimpleNamespace(
        NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda _handle: reasons,
        nvmlDeviceGetName=lambda _handle: "a card",
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetClockInfo=lambda _handle, kind: {1: 1200, 2: 2600}[kind],
        nvmlDeviceGetMaxClockInfo=lambda _handle, _kind: 1980,
        nvmlDeviceGetPowerUsage=lambda _handle: 350_400,
        nvmlDeviceGetEnforcedPowerLimit=lambda _handle: 700_000,
        nvmlDeviceGetTemperature=lambda _handle, _kind: 61,
    )  # fmt: skip


def test_the_state_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(0x1))  # idle, which is no throttling
    state = gpu_state()
    assert state == GpuState("a card", "580.1", 1200, 1980, 2600, 350.4, 700.0, 61, ())
    assert str(state) == (
        "a card, driver 580.1, 1200 of 1980 MHz, memory 2600 MHz, 350 of 700 W, 61 C"
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(0x4 | 0x40))
    throttled = gpu_state()
    assert isinstance(throttled, GpuState)
    assert throttled.throttled == ("power cap", "hardware thermal slowdown")
    assert "throttled: power cap, hardware thermal slowdown" in str(throttled)


def test_the_card_is_found_by_the_id_that_cuda_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA_VISIBLE_DEVICES, the two number the cards differently."""
    asked: list[Any] = []
    nvml = fake_nvml()
    nvml.nvmlDeviceGetName = lambda handle: asked.append(handle) or "a card"
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"id-{index}")
    )
    gpu_state(1)
    assert asked == ["GPU-id-1"]


def test_an_unknown_state_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import fails
    assert gpu_state() == "unknown: nvidia-ml-py is not installed"
    nvml = fake_nvml()

    def refuse() -> None:
        raise NVMLError("no driver")

    nvml.nvmlInit = refuse
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu_state() == "unknown: no driver"


def test_the_doctor_shows_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "a card")
    states = [gpu_state_of(fake_nvml(), monkeypatch), "unknown: no driver"]
    monkeypatch.setattr(doctor_module, "gpu_state", lambda index: states[index])
    report = doctor_module.doctor()
    assert report["gpu_state"][0]["temperature"] == 61
    text = doctor_module.render(report)
    assert "350 of 700 W, 61 C" in text
    assert "clocks, power and temperature unknown: no driver" in text


def gpu_state_of(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> GpuState:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    state = gpu_state()
    assert isinstance(state, GpuState)
    return state


@pytest.mark.parametrize("reasons", [0, 0x8])
def test_throttled_figures_are_no_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reasons: int
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    log = harness.GpuLog()
    log.states.append(gpu_state_of(fake_nvml(reasons), monkeypatch))
    table = harness.Table("op", "An op")
    table.rows.append(harness.Row("a case", "ours", 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, **log.facts()))
    name = f"{harness.DEVICE}_op"
    if reasons:
        with pytest.raises(harness.Throttled, match="hardware slowdown"):
            table.write()
        assert not (tmp_path / f"{name}.md").exists()
        name = f"throttled_{name}"
    else:
        table.write()
    text = (tmp_path / f"{name}.md").read_text()
    assert "a case: 1200 MHz at least, 350 W and 61 C at most" in text
    assert ("throttled: hardware slowdown" in text) == bool(reasons)
    assert "61 C" in (tmp_path / f"{name}.csv").read_text()
