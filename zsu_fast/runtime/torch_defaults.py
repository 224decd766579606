"""Process-wide torch settings: set for one call, restored afterwards, one thread at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ProcessLock:
    """What threads wait for: the right to set what belongs to the whole process.

    The default dtype, the number of threads, how matrices are multiplied, and torch.fx's tracing:
    two threads that set and restored these in turn would compute in each other's modes.
    """

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """A forked child has only the thread that forked: nobody else gives the turn back."""
        self.lock = threading.RLock()


_lock = ProcessLock()


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, float32 as the default dtype, whatever the
    caller's are; put back afterwards. A decorator too. One thread at a time is inside.
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
