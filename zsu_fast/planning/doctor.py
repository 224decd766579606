"""`zsu_fast.doctor`: what this installation can do, and how runs on this machine were computed."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from ..runtime import doctor as installation
from ..runtime.torch_settings import has_bfloat16
from ..synthesis.candidates import stored_choices, variants


def doctor(cache: str | Path | None = None) -> dict[str, Any]:
    """Returns the state of the installation, to print or to paste into a bug report.

    Args:
        cache: a folder that runs were given as ``cache=``; None for none.

    Returns:
        ``zsu_fast``, ``python``, ``torch``, ``torch_cuda``, ``triton``: versions, None if absent;
        ``gpu``: names; ``gpu_state``: of each GPU, or why it is unknown; ``threads``: CPU threads;
        ``cpu_isa``: instruction set of the C++ kernels; ``libraries``: name -> {"loaded", "path",
        "reason"}; ``extras``: optional package -> version, or why it can't be imported;
        ``forced_backend``: set by `use_backend` or ZSU_FAST_BACKEND, else None; ``devices``:
        "cpu", "cuda" -> {"present", "chosen", "backends"}, where ``backends`` maps names to the
        reason why they can't run, or to None; ``ascent``: how the ascent's steps on images are
        computed on this CPU, with ``variants``, those that are timed at the start of a run,
        ``bfloat16``, whether the default computes in it, and ``choices``, those in ``cache``, each
        with ``computed``, as in a record, the model's ``weights``, ``classes``, their number,
        ``processor``, ``threads`` and ``here``, whether these two are those of this machine; None
        without ``cache``.

    Raises:
        ArgumentError: ``cache`` is no folder.
    """
    bfloat16 = has_bfloat16(torch.device("cpu"))
    return installation.doctor() | {
        "ascent": {
            "variants": list(variants("auto" if bfloat16 else "float32")),
            "bfloat16": bfloat16,
            "choices": None if cache is None else _choices(cache),
        }
    }


def _choices(cache: str | Path) -> list[dict[str, Any]]:
    here = platform.processor(), torch.get_num_threads()
    return [
        {
            "computed": str(choice),
            "weights": facts.get("weights"),
            "classes": len(set(facts.get("classes") or ())),
            "processor": facts.get("processor"),
            "threads": facts.get("threads"),
            "here": (facts.get("processor"), facts.get("threads")) == here,
        }
        for choice, facts in stored_choices(cache)
    ]


def render(report: dict[str, Any] | None = None) -> str:
    """Formats `doctor()` as text."""
    report = report or doctor()
    ascent = report["ascent"]
    number = "in bfloat16" if ascent["bfloat16"] else "in float32, as this CPU has no bfloat16"
    names = ascent["variants"]
    lines = [
        "", f"ascent on images, on a CPU: {number}; the fastest of these is taken, by timing:",
        f"  {', '.join(names)}; batches of several sizes",
    ]  # fmt: skip
    choices = ascent["choices"]
    if choices is None:
        lines.append("  choices of earlier runs: name their cache")
    elif not choices:
        lines.append("  no choice is stored in this cache")
    for choice in choices or []:
        where = "" if choice["here"] else ", another machine or number of threads"
        lines.append(f"  weights {str(choice['weights'])[:12]}: {choice['computed']}{where}")
    return "\n".join([installation.render(report), *lines])
