"""The tail restricted to some classes, if each logit has weights of its own in the last layer.

If only the forgotten logits are trained, nothing else has to be computed again at each step: the
retained logits stay as they are, and the loss needs only their logsumexp, one number per row. So a
step costs what the forgotten classes cost, however many classes there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ClassSubsetTail(nn.Module):
    """Logits of some classes: the tail, run with these classes' rows of its weights.

    Args:
        tail: features -> logits [N, C].
        names: those of its parameters that have one row per class.
        classes: which classes, an index tensor or a slice.
        trainable: whether the rows are copied into parameters of this module, or are views.
    """

    full_tail: nn.Module

    def __init__(
        self, tail: nn.Module, names: Sequence[str], classes: Tensor | slice, trainable: bool
    ) -> None:
        super().__init__()
        # bypasses nn.Module's registration: the tail's weights are not this module's
        object.__setattr__(self, "full_tail", tail)
        self.names, self.classes = list(names), classes
        full = dict(tail.named_parameters())
        values = [full[n].detach()[classes] for n in names]
        if trainable:
            values = [nn.Parameter(v.clone()) for v in values]
            self.rows = nn.ParameterList(values)
        self._values = values

    def forward(self, *features: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(
            self.full_tail, dict(zip(self.names, self._values, strict=True)), features
        )
        return logits

    @torch.no_grad()
    def write_back(self) -> None:
        """Copies the rows into the full tail's weights."""
        full = dict(self.full_tail.named_parameters())
        for name, value in zip(self.names, self._values, strict=True):
            full[name][self.classes] = value


@torch.no_grad()
def supports_subset(tail: nn.Module, names: Sequence[str], features: tuple[Tensor, ...]) -> bool:
    """Whether some classes' logits come out the same without the other classes' weights.

    They don't if the logits are normalised or reshaped after the last layer. The first rows of
    ``features``, each [N, ...], are tried; ``names`` are parameters of ``tail``, each [C, ...].
    """
    probe = tuple(f[:2] for f in features)
    full = tail(*probe)
    chosen = torch.arange(0, full.shape[1], max(1, full.shape[1] // 7), device=full.device)
    try:
        subset = ClassSubsetTail(tail, names, chosen, trainable=False)(*probe)
    except (RuntimeError, ValueError, IndexError):  # shapes that hold for all classes only
        return False
    full = full[:, chosen]
    atol = 1e-4 * float(full.std())
    return subset.shape == full.shape and torch.allclose(subset, full, 1e-4, atol)
