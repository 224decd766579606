"""Choose the code that runs an op: by argument, `use_backend`, ZSU_FAST_BACKEND, or automatically.

| backend | what runs                                      | device                              |
|---------|------------------------------------------------|-------------------------------------|
| cpp     | C++ kernels, AVX2 or AVX-512 at run time       | cpu                                 |
| cuda    | CUDA C++ kernels                               | cuda                                |
| triton  | Triton kernels                                 | cuda (cpu under TRITON_INTERPRET=1) |
| eager   | `reference`, plain torch                       | any                                 |
| compile | `reference` under ``torch.compile``            | any                                 |

The automatic choice takes the first backend of `PREFERENCE` that can run, and logs once why a
faster one cannot. An explicit choice that cannot run raises `BackendUnavailable` with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch

from . import library, validation
from .schemas import CPU_ONLY

Backend: TypeAlias = Literal["cpp", "cuda", "triton", "eager", "compile"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
PREFERENCE: dict[str, tuple[Backend, ...]] = {
    "cpu": ("cpp", "eager"),
    "cuda": ("cuda", "triton", "eager"),
}

log = logging.getLogger("zsu_fast")


class BackendUnavailable(RuntimeError):
    """The requested backend cannot run here; the message says why."""


def _checked(name: str | None) -> Backend | None:
    if name in (None, "", "auto"):
        return None
    for backend in BACKENDS:
        if backend == name:
            return backend
    raise ValueError(f"unknown backend {name!r}: choose from auto, {', '.join(BACKENDS)}")


_forced: Backend | None = _checked(os.environ.get("ZSU_FAST_BACKEND"))
_chosen: dict[tuple[str, str, Backend | None], Callable[..., Any]] = {}


@contextmanager
def use_backend(backend: Backend | Literal["auto"]) -> Iterator[None]:
    """Run every op inside the block on one backend, in all threads."""
    global _forced
    before, _forced = _forced, _checked(backend)
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> Backend | None:
    """Returns the backend set by `use_backend` or ZSU_FAST_BACKEND, None for automatic."""
    return _forced


def why_unavailable(backend: Backend, device_type: str) -> str | None:
    """Returns why a backend cannot run on a type of device; None if it can."""
    if backend == "cpp":
        return library.CPU.reason if device_type == "cpu" else "cpp runs on the CPU only"
    if backend == "cuda":
        return library.CUDA.reason if device_type == "cuda" else "cuda runs on CUDA devices only"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device_type != "cuda" and not interpreted:
            return "triton runs on CUDA devices only (or on any under TRITON_INTERPRET=1)"
    return None


def best_backend(device_type: str) -> tuple[Backend, list[str]]:
    """Returns the automatic choice for a type of device, and why each faster one cannot run."""
    reasons: list[str] = []
    for backend in PREFERENCE.get(device_type, ("eager",)):
        reason = why_unavailable(backend, device_type)
        if reason is None:
            return backend, reasons
        reasons.append(f"{backend}: {reason}")
    raise AssertionError("eager runs everywhere")


def choose(op: str, device: torch.device, backend: str | None = None) -> Callable[..., Any]:
    """Returns the function that runs ``op`` (a name in `schemas`) on ``device``.

    Raises:
        BackendUnavailable: the requested backend cannot run on this device.
        ValueError: there is no such backend.
    """
    wanted = _forced if backend is None else _checked(backend) or _forced
    key = (op, device.type, wanted)
    if key in _chosen:
        return _chosen[key]
    if wanted is None and op in CPU_ONLY and device.type != "cpu":
        wanted = "eager"
    elif wanted is None:
        wanted, reasons = best_backend(device.type)
        for reason in reasons:
            _log_once(f"{device.type}: falling back to {wanted} ({reason})")
    elif (refusal := why_unavailable(wanted, device.type)) is not None:
        raise BackendUnavailable(f"backend {wanted!r} on {device.type}: {refusal}")
    elif op in CPU_ONLY and wanted in ("cuda", "triton"):
        raise BackendUnavailable(f"backend {wanted!r}: {op} has no kernel for GPUs")
    _chosen[key] = _load(op, wanted)
    return _chosen[key]


@functools.cache
def _log_once(text: str) -> None:
    log.warning(text)


def _load(op: str, backend: Backend) -> Callable[..., Any]:
    function: Callable[..., Any]
    if backend in ("cpp", "cuda"):
        function = getattr(torch.ops.zsu_fast, op).default
    elif backend == "triton":
        module = importlib.import_module(f"zsu_fast.ops.triton.{op.rstrip('_')}")
        function = getattr(module, op)
    else:
        function = validation.checked_reference(op, compiled=backend == "compile")
    return function
