"""What lies ahead of the softmax or sigmoid at the end of a model.

Unlearning needs logits: changing the row of one class must not change the others, as it does behind
a softmax. `AheadOfSquash` finds the tensor that the last softmax, log-softmax or sigmoid took.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# At most this many squashes follow one another at the end of a model.
MOST_PLACES = 4
_SQUASHES = {
    "softmax", "log_softmax", "special_softmax", "special_log_softmax", "sigmoid", "sigmoid_",
    "logsigmoid", "log_sigmoid", "special_expit", "hardsigmoid", "tanh", "tanh_", "exp", "exp_",
}  # fmt: skip
# What may follow and leaves each row's order as it is. The first kind keeps the values' meaning.
_SCALES = {
    "log", "log_", "log2", "log10", "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_",
    "true_divide", "exp", "exp_", "clamp", "clamp_", "clamp_min", "clamp_min_", "clip",
    "nan_to_num", "__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__truediv__",
}  # fmt: skip
_SHAPES = {
    "view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", "float", "to", "clone",
    "type", "__getitem__", "getitem", "double", "half", "bfloat16", "cpu",
}  # fmt: skip


class AheadOfSquash(TorchFunctionMode):
    """While active, notes for each result of a softmax or sigmoid the tensor that it was made from.

    Also works on torch.fx proxies while a model is traced.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ahead: dict[int, tuple[Any, list[Any]]] = {}

    def ahead_of(self, result: Any) -> list[Any]:
        """The tensors from which ``result`` may have been made, the earliest first; [] for none."""
        return self._ahead.get(id(result), (None, []))[1]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        source = args[0] if args else kwargs.get("input")
        if name not in _SQUASHES | _SCALES | _SHAPES or not _is_row(source):
            return func(*args, **kwargs)
        found = list(self.ahead_of(source))
        if name in _SHAPES:
            found = [func(tensor, *args[1:], **kwargs) for tensor in found]
        elif name in _SQUASHES or _is_shift(name, args):
            # a squash in place is about to overwrite its source
            found.append(source.clone() if name.endswith("_") else source)
        result = func(*args, **kwargs)
        if found and _is_row(result):
            self._ahead[id(result)] = result, found  # the reference keeps the id unique
        return result


def _is_row(value: Any) -> bool:
    """Whether ``value`` may be scores: a row per image. Larger tensors are not kept alive."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and all(size == 1 for size in value.shape[2:])
    return isinstance(value, torch.fx.Proxy)


def _is_shift(name: str, args: Any) -> bool:
    """Whether one number per row is subtracted, as in ``x - x.logsumexp(1, keepdim=True)``."""
    if not name.strip("_").startswith("sub") or len(args) < 2:
        return False
    shift = args[1]
    return isinstance(shift, Tensor) and shift.ndim > 0 and shift.shape[-1] == 1


class _LogitsLayer(nn.Module):
    """Mixed into the class of a module that ends in a softmax: returns what it was made from."""

    squash_place: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with AheadOfSquash() as mode:
            result = super().forward(*args, **kwargs)
        found = mode.ahead_of(result)
        return found[self.squash_place] if len(found) > self.squash_place else result


def skip_squash(module: nn.Module, place: int) -> None:
    """Makes ``module``, part of a working copy, return what its last softmax took.

    Its class is replaced, as by ``torch.nn.utils.parametrize``: names, weights and code stay, and
    copies behave alike.

    Args:
        module: a module whose output is the result of a softmax or sigmoid.
        place: of the tensor in `AheadOfSquash.ahead_of`.
    """
    old = type(module)
    module.__class__ = type(old.__name__, (_LogitsLayer, old), {"__module__": __name__})
    vars(module)["squash_place"] = place
