"""Load the native libraries, and define every op whether they are present or not.

``_C_cpu`` holds the schemas and the CPU kernels, ``_C_cuda`` the CUDA kernels: a torch without
CUDA loads the first alone. On a device without a native kernel an op runs `reference`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .schemas import CPU_ONLY, SCHEMAS
from .validation import checked_reference


@dataclass(frozen=True)
class NativeLibrary:
    """One shared library: its path, and the reason why it is not loaded (None if it is)."""

    name: str
    path: Path | None
    reason: str | None

    @property
    def loaded(self) -> bool:
        return self.reason is None


def _load(name: str) -> NativeLibrary:
    package = Path(__file__).parents[1]
    found = sorted(package.glob(f"{name}.*so"))
    if not found:
        left_out = package / f"{name}.left_out.txt"  # written by setup.py
        why = (
            left_out.read_text().strip()
            if left_out.exists()
            else "see the output of pip install -v"
        )
        return NativeLibrary(name, None, f"{name} was not built ({why})")
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return NativeLibrary(name, found[0], f"{found[0].name} does not load: {error}")
    return NativeLibrary(name, found[0], None)


CPU = _load("_C_cpu")
if torch.version.cuda is None:
    CUDA = NativeLibrary("_C_cuda", None, "this torch is built without CUDA")
else:
    CUDA = _load("_C_cuda")

definitions = torch.library.Library("zsu_fast", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    if not CPU.loaded:
        definitions.define(_name + _schema)
        definitions.impl(_name, checked_reference(_name), "CPU")
    if not CUDA.loaded or _name in CPU_ONLY:
        definitions.impl(_name, checked_reference(_name), "CUDA")


def _bump_versions(name: str) -> None:
    """Tell autograd which arguments op ``name`` overwrites.

    A kernel registered from C++ does not bump the version counter, whatever its schema says, and a
    backward pass that saved the old values would silently use the new ones.
    """
    op = getattr(torch.ops.zsu_fast, name).default
    arguments = op._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]

    def kernel(keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        for i in written:
            torch.autograd.graph.increment_version(
                args[i] if i < len(args) else kwargs[arguments[i].name]
            )
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    definitions.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


# Not scale_rows_: only the backward pass calls it, on a gradient that nothing else has seen.
_bump_versions("ascent_step_")


def cpu_isa() -> str | None:
    """Returns the instruction set of the CPU kernels: baseline, avx2, avx512; None without them."""
    if not CPU.loaded:
        return None
    name = ctypes.CDLL(str(CPU.path)).zsu_fast_cpu_isa
    name.restype = ctypes.c_char_p
    return str(name().decode())
