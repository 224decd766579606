"""Accelerators that are not here: what their makers publish, for estimates on paper."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ArgumentError


@dataclass(frozen=True)
class Accelerator:
    """A card's published figures.

    Attributes:
        name: what it is called.
        rate: dense bfloat16 (T4: float16) tensor-core peak, multiply-adds a second (half the
            published operations).
        bandwidth: of its memory, bytes a second.
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
# The share of both peaks that convolutional networks are taken to reach.
UTILISATION = 0.3


def accelerator(name: str) -> Accelerator:
    """The card called ``name``.

    Raises:
        ArgumentError: it is not known.
    """
    if not isinstance(name, str) or name.lower() not in ACCELERATORS:
        raise ArgumentError(
            "hardware",
            f"got {name!r}",
            f"Pass one of {', '.join(ACCELERATORS)}, or None for the device here.",
        )
    return ACCELERATORS[name.lower()]
