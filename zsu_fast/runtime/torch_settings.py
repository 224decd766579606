"""Process-wide PyTorch settings: set for one call at a time, and restored after it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS = ("auto", "float32", "bfloat16")
# Multiply-adds of one image's forward pass, or of one optimiser step, up to which one thread is
# enough. Per image, LeNet5 has 0.4 million, KarpathyNet 4, ResNet-20 at 32 pixels 41, and
# EfficientNet-Lite0 at 224 pixels 385.
SMALL = 50_000_000


class ProcessLock:
    """Held by the thread that changes process-wide settings.

    These are the default dtype, the number of threads, the precision of matrix products, and
    torch.fx's tracing: two threads that set and restored them at once would compute with each
    other's settings.
    """

    def __init__(self) -> None:
        self.renew()
        if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """Makes a new lock: in a forked child, the thread that held the old one does not exist."""
        self.lock = threading.RLock()


_lock = ProcessLock()


@contextmanager
def _autocast_off() -> Iterator[None]:
    """Switches autocast off by its flags: inside another ``torch.autocast`` block, one in the
    model's ``forward`` would never clear its cache of cast weights, and go on with stale ones.
    """
    devices, cached = ("cpu", "cuda"), torch.is_autocast_cache_enabled()
    before = [torch.is_autocast_enabled(device) for device in devices]
    try:
        for device in devices:
            torch.set_autocast_enabled(device, False)
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        for device, enabled in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, float32 as default dtype.

    Restores the caller's settings at the end. Also works as a decorator. Only one thread at a time
    runs the block.
    """
    with _lock.lock:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.inference_mode(False), torch.enable_grad(), _autocast_off():
                yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def threads_for(work: int, device: torch.device) -> Iterator[None]:
    """Runs the block with one thread if ``work`` (multiply-adds) is small and on the CPU.

    Operations of a few microseconds gain nothing from a second thread, and OpenMP threads spin
    while they wait for each other: next to one other busy process on a two-core machine, LeNet5
    took 72 s with two threads and 1 s with one (on the idle machine both take the same).

    The choice depends on the model alone, never on the load, so that results can be reproduced.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or work > SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
