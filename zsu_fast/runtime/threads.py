"""One thread for small models.

Operations of a few microseconds gain nothing from a second thread, and OpenMP threads spin while
they wait for each other: next to one other busy process on a two-core machine, LeNet5 took 72 s
with two threads and 1 s with one (on the idle machine both take the same).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Multiply-adds of one image's forward pass, or of one optimiser step, up to which one thread is
# enough. Per image, LeNet5 has 0.4 million, KarpathyNet 4, ResNet-20 at 32 pixels 41, and
# EfficientNet-Lite0 at 224 pixels 385.
SMALL = 50_000_000


@contextmanager
def threads_for(work: int, device: torch.device) -> Iterator[None]:
    """Runs the block with one thread if ``work`` (multiply-adds) is small and on the CPU.

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
