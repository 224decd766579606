"""The precisions that the hardware multiplies in, and how to select one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS = ("auto", "float32", "bfloat16")


@contextmanager
def fp32_precision(settings: Any, precision: str) -> Iterator[None]:
    """Sets the precision of float32 work in one backend, and restores it afterwards.

    Args:
        settings: a module under ``torch.backends`` with ``fp32_precision``.
        precision: its value in the block, such as "bf16".
    """
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (on a CPU: AVX512_BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
