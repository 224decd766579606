"""Translates names in a state dict, as the libraries do that published it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from .layouts import Needed, StateDict

# In the files of torchvision's DenseNets, from before module names could not hold dots.
_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)")


def renamed(found: StateDict, model: nn.Module, needed: Needed) -> Iterator[tuple[str, StateDict]]:
    """Yields (by what, ``found`` under other names), for a state dict that does not fit as it is.

    Args:
        found: a state dict of a file.
        model: the model to load, in which timm's filters look up sizes.
        needed: its tensors.
    """
    if not any("module" in name.split(".") for name in needed.tensors):
        inner = {re.sub(r"(^|\.)module\.", r"\1", n): t for n, t in found.tensors.items()}
        if len(inner) == len(found.tensors):
            yield "DataParallel around a part", StateDict(found.keys, inner)
    dotless = {_DENSENET.sub(r"\1\2", name): t for name, t in found.tensors.items()}
    yield "torchvision's DenseNet", StateDict(found.keys, dotless)
    translate = _timm_filter(model)
    if translate is not None:
        starts = {name.partition(".")[0] + "." for name in found.tensors}
        variants = [""] + ([starts.pop()] if len(starts) == 1 else [])
        for start in variants:
            plain = {name.removeprefix(start): t for name, t in found.tensors.items()}
            try:
                tensors = translate(plain)
            except Exception:  # noqa: BLE001  it expects other names: these are not its own
                continue
            if isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values()):
                yield "timm's checkpoint filter", StateDict(found.keys, tensors)


def _timm_filter(model: nn.Module) -> Callable[[dict[str, Tensor]], object] | None:
    """The function by which timm reads the published weights of this kind of model."""
    module = type(model).__module__
    if not module.startswith("timm."):
        return None
    for name in ("checkpoint_filter_fn", "checkpoint_filter_fn_classifier", "_filter_fn"):
        function = getattr(sys.modules[module], name, None)
        if function is not None:
            two = len(inspect.signature(function).parameters) > 1
            return lambda tensors: function(tensors, model) if two else function(tensors)
    return None
