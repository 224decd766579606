"""Process-wide PyTorch settings: set for one call at a time, and restored after it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
def torch_defaults() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, float32 as default dtype.

    Restores the caller's settings at the end. Also works as a decorator. Only one thread at a time
    runs the block.
    """
    with _lock.lock:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast("cpu", enabled=False),
                torch.autocast("cuda", enabled=False),
            ):
                yield
        finally:
            torch.set_default_dtype(dtype)
