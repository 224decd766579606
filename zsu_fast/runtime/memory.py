"""Batch size from memory: measures the bytes per row, queries the free memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Fraction of the free memory that a batch may take; the rest is for other programs.
_SHARE = 0.25
_CHUNK_VALUES = 2**25  # of rows that are run at once: layers take several times as many
# Assumed to be free if the system does not report it.
_UNKNOWN = 4 * 1024**3


def bytes_per_row(run: Callable[[Tensor], Tensor], row: Tensor) -> int:
    """Measures the peak memory of the forward and backward pass of one row, in bytes.

    On a GPU the allocator reports it. On a CPU it is the sum of the row, the output, their
    gradients, and all storages that autograd saves for the backward pass.

    Args:
        run: maps rows [1, ...] to any tensor.
        row: [1, ...].
    """
    x = row.detach().clone().requires_grad_(True)
    if row.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(row.device)
        before = torch.cuda.memory_allocated(row.device)
        with torch.enable_grad():
            torch.autograd.grad(run(x).sum(), x)
        return max(1, torch.cuda.max_memory_allocated(row.device) - before)
    saved: dict[int, torch.UntypedStorage] = {}

    def count(tensor: Tensor) -> None:  # returns None: saving the tensor would keep its graph alive
        storage = tensor.untyped_storage()
        owner = tensor if tensor._base is None else tensor._base
        if not owner.is_leaf:  # weights need the same memory for any number of rows
            saved[storage.data_ptr()] = storage  # held, so that its address is not reused

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda none: none):
        out = run(x)
    inner = sum(storage.nbytes() for storage in saved.values())
    return 2 * row.numel() * row.element_size() + inner + 2 * out.numel() * 4


def empty_rows(like: Tensor, count: int) -> Tensor:
    """An uninitialised tensor [count, ...] with the rows, dtype and memory layout of ``like``."""
    channels_last = like.ndim == 4 and not like.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (count, *like.shape[1:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def chunk_of(*rows: Tensor) -> int:
    """How many of these rows [N, ...] to run at once where no gradient is needed: 16 to 256."""
    values = sum(t[:1].numel() for t in rows)
    return max(16, min(256, _CHUNK_VALUES // max(1, values)))


def free_bytes(device: torch.device) -> int:
    """Free memory of ``device``; on a CPU, what both the system and the control group allow."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [n for n in (proc_bytes("meminfo", "MemAvailable"), _left_in_group()) if n is not None]
    return min(limits, default=_UNKNOWN)


def rows_that_fit(row: int, device: torch.device, processes: int = 1) -> int:
    """How many rows fit into a quarter of the free memory; at least 1.

    Args:
        row: bytes per row.
        device: the device whose memory is used.
        processes: number of processes that share the CPU's memory.
    """
    share = _SHARE / (processes if device.type == "cpu" else 1)
    return max(1, int(free_bytes(device) * share / max(1, row)))


# The words in which allocators and libraries say so; the third is torch's CPU allocator, the
# fourth cuBLAS. An op of `zsu_fast.ops` passes them on, or says itself that memory is likely out.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate|can't allocate memory|_ALLOC_FAILED|bad_alloc", re.I
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` reports a failed allocation, on a GPU or a CPU, also within an op."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def proc_bytes(file: str, name: str) -> int | None:
    """Reads line ``name`` of a file in /proc, in bytes; None where there is no such line."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{name}:")), None)


def _left_in_group() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = (group / "memory.current").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))
