"""Published figures of GPUs, for estimates without the device (`zsu_fast.plan`)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ArgumentError


@dataclass(frozen=True)
class Accelerator:
    """A GPU's published figures.

    Attributes:
        name: full product name.
        rate: peak of the tensor cores for dense bfloat16 (T4: float16), in multiply-adds per second
            (half the published operations).
        bandwidth: memory bandwidth, bytes per second.
        memory: bytes.
    """

    name: str
    rate: float
    bandwidth: float
    memory: float


# Data sheets: NVIDIA H100 SXM, H200 SXM, A100 80 GB SXM, L4 and T4, without sparsity.
ACCELERATORS = {
    "h100": Accelerator("NVIDIA H100 SXM", 989e12 / 2, 3.35e12, 80e9),
    "h200": Accelerator("NVIDIA H200 SXM", 989e12 / 2, 4.8e12, 141e9),
    "a100": Accelerator("NVIDIA A100 80 GB SXM", 312e12 / 2, 2.039e12, 80e9),
    "l4": Accelerator("NVIDIA L4", 121e12 / 2, 0.3e12, 24e9),
    "t4": Accelerator("NVIDIA T4", 65e12 / 2, 0.32e12, 16e9),
}
# Assumed fraction of both peaks that convolutional networks reach.
UTILISATION = 0.3


def accelerator(name: str) -> Accelerator:
    """Looks up a GPU by its short name, such as "h100".

    Raises:
        ArgumentError: unknown name.
    """
    if not isinstance(name, str) or name.lower() not in ACCELERATORS:
        raise ArgumentError(
            "hardware",
            f"got {name!r}",
            f"Pass one of {', '.join(ACCELERATORS)}, or None for the device in use.",
        )
    return ACCELERATORS[name.lower()]
