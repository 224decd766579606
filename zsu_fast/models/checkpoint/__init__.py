"""Weights files: executes nothing, overwrites nothing, leaves no partial files.

In: a file in a format of `reading`, with the weights somewhere inside of it. Out: a model with
exactly these weights (`loading`, which finds them by `layouts`), and files by `writing`.
"""

from ..parameters import unwrap
from .loading import Origin, load_into, load_weights, origin
from .reading import load_tensors, printable
from .writing import (
    TORCH,
    check_ending,
    check_writable,
    save_tensors,
    save_weights,
    write_atomically,
)

__all__ = [
    "TORCH",
    "Origin",
    "check_ending",
    "check_writable",
    "load_into",
    "load_tensors",
    "load_weights",
    "origin",
    "printable",
    "save_tensors",
    "save_weights",
    "unwrap",
    "write_atomically",
]
