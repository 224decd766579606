"""What this installation has, and what it lacks and why."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata
from typing import Any

import torch


def doctor() -> dict[str, Any]:
    """Versions, devices, threads and extras, as plain values."""
    devices = ["cpu"]
    devices += [
        f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "zsu_fast": metadata.version("zsu-fast"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "extras": {name: _version(name) for name in ("torchvision", "timm", "matplotlib", "PIL")},
    }


def _version(module: str) -> str:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return f"missing: {error}"
    return str(getattr(found, "__version__", "present"))
