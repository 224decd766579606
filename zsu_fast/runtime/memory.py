"""How many rows fit: what a row needs is measured, what is free is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# A working batch may take this share of the free memory: other programs want some too.
_SHARE = 0.25
# Taken to be free where the system does not tell.
_UNKNOWN = 4 * 1024**3


def bytes_per_row(run: Callable[[Tensor], Tensor], row: Tensor) -> int:
    """Measures what the forward and backward pass of one row hold at their peak, in bytes.

    On a GPU the allocator counts it. On a CPU it is the row, its gradient, and every tensor that
    autograd keeps for the backward pass, each storage once.

    Args:
        run: rows [1, ...] -> any tensor.
        row: [1, ...].
    """
    x = row.detach().clone().requires_grad_(True)
    if row.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(row.device)
        before = torch.cuda.memory_allocated(row.device)
        with torch.enable_grad():
            torch.autograd.grad(run(x).sum(), x)
        return max(1, torch.cuda.max_memory_allocated(row.device) - before)
    kept: dict[int, torch.UntypedStorage] = {}

    def count(tensor: Tensor) -> None:  # the tensor itself would keep its own graph alive
        storage = tensor.untyped_storage()
        owner = tensor if tensor._base is None else tensor._base
        if not owner.is_leaf:  # weights are there anyway, however many rows there are
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda none: none):
        out = run(x)
    inner = sum(storage.nbytes() for storage in kept.values())
    return 2 * row.numel() * row.element_size() + inner + 2 * out.numel() * 4


def free_bytes(device: torch.device) -> int:
    """Free memory of ``device``; on a CPU what the system and the control group leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    left = [n for n in (_available(), _left_in_group()) if n is not None]
    return min(left, default=_UNKNOWN)


def rows_that_fit(row: int, device: torch.device, processes: int = 1) -> int:
    """Rows of ``row`` bytes each in a quarter of the free memory, 1 or more.

    Args:
        row: bytes.
        device: where they go.
        processes: so many share a CPU's memory.
    """
    share = _SHARE / (processes if device.type == "cpu" else 1)
    return max(1, int(free_bytes(device) * share / max(1, row)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is the error of an allocation that failed, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_in_group() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        used = (group / "memory.current").read_text().strip()
    except OSError:
        return None
    return None if most == "max" else max(0, int(most) - int(used))
