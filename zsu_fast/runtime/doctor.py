"""Reports which kernels and packages are available on this machine, and why others are not."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata
from typing import Any

import torch

from ..ops import backends, library
from ..version import VERSION
from .nvml import GpuState, gpu_state

_EXTRAS = ("torchvision", "timm", "transformers", "PIL")


def doctor() -> dict[str, Any]:
    """Returns the state of the installation: `zsu_fast.doctor` without ``ascent``."""
    forced = backends.forced_backend()
    devices = {
        device: {
            "present": present,
            "chosen": (forced or backends.best_backend(device)[0]) if present else None,
            "backends": {b: backends.why_unavailable(b, device) for b in backends.BACKENDS},
        }
        for device, present in (("cpu", True), ("cuda", torch.cuda.is_available()))
    }
    triton: str | None = None
    if importlib.util.find_spec("triton") is not None:
        try:
            triton = metadata.version("triton")
        except metadata.PackageNotFoundError:
            triton = "unknown version"
    return {
        "zsu_fast": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": triton,
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "gpu_state": [
            state if isinstance(state, str) else state.to_dict()
            for state in map(gpu_state, range(torch.cuda.device_count()))
        ],
        "threads": torch.get_num_threads(),
        "cpu_isa": library.cpu_isa(),
        "libraries": {
            x.name: {"loaded": x.loaded, "path": x.path and str(x.path), "reason": x.reason}
            for x in (library.CPU, library.CUDA)
        },
        "extras": {name: _version(name) for name in _EXTRAS},
        "forced_backend": forced,
        "devices": devices,
    }


def _version(module: str) -> str:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return f"missing: {error}"
    return str(getattr(found, "__version__", "present"))


def _gpu_line(state: dict[str, Any] | str) -> str:
    """Formats one entry of ``gpu_state``."""
    if isinstance(state, str):
        return f"clocks, power and temperature {state}"
    return str(GpuState(**state | {"throttled": tuple(state["throttled"])}))


def render(report: dict[str, Any] | None = None) -> str:
    """Formats `doctor()` as text."""
    report = report or doctor()
    lines = [
        f"zsu_fast {report['zsu_fast']}",
        f"python {report['python']}, torch {report['torch']}"
        f" (CUDA {report['torch_cuda'] or 'none'}), triton {report['triton'] or 'none'}",
        f"GPU: {', '.join(report['gpu']) or 'none'}; CPU threads: {report['threads']};"
        f" CPU kernels: {report['cpu_isa'] or 'none'}",
        *(f"  {_gpu_line(state)}" for state in report["gpu_state"]),
        "",
    ]
    for name, state in report["libraries"].items():
        lines.append(f"{name:10s} {'loaded' if state['loaded'] else 'absent: ' + state['reason']}")
    if report["forced_backend"]:
        lines += ["", f"backend forced to {report['forced_backend']}"]
    for device, state in report["devices"].items():
        chosen = f"{state['chosen']} is chosen" if state["present"] else "none"
        lines += ["", f"{device}: {chosen}"]
        for backend, reason in state["backends"].items():
            lines.append(f"  {backend:8s} {'can run' if reason is None else reason}")
    lines += ["", "optional packages:"]
    lines += [f"  {name:12s} {state}" for name, state in report["extras"].items()]
    return "\n".join(lines)
