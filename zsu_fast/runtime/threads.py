"""One thread for small models.

Operations of a few microseconds gain nothing from a second thread, and OpenMP's threads wait for
each other by spinning: beside one other busy process, LeNet5 took 72 s on two threads of a
two-core machine and 1 s on one (measured; on the idle machine both take the same).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Work below this is small, be it a forward pass of one image or a step of the tail. LeNet5 has
# 0.4 million multiply-adds an image, KarpathyNet 4, ResNet-20 at 32 pixels 41, EfficientNet-Lite0
# at 224 pixels 400.
SMALL = 50_000_000


@contextmanager
def threads_for(work: int, device: torch.device) -> Iterator[None]:
    """One thread inside, if ``work`` (multiply-adds) is small and ``device`` is the CPU.

    The choice depends on the model alone, so that results do not depend on the moment.
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
