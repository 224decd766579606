"""The tail for some of its classes alone, where its last layer has weights of its own for each.

Where only forgotten logits move, nothing else has to be computed again at each step: of the
retained ones, which stay what they are, the loss takes no more than their logsumexp, one number a
row. So a step costs what the forgotten classes cost, however many there are in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

# Logits of a tile, rows times classes, that are held at once.
TILE_VALUES = 8 * 1024 * 1024
TILE_CLASSES = 8192


class ClassSubsetTail(nn.Module):
    """Logits of some classes: the tail, run with their rows of its weights in place of all.

    Args:
        tail: features -> logits [N, C].
        names: those of its parameters that have a row a class.
        rows: which classes, an index or slice into them.
        copied: whether the rows are parameters of their own, to be trained, or views.
    """

    def __init__(
        self, tail: nn.Module, names: Sequence[str], rows: Tensor | slice, copied: bool
    ) -> None:
        super().__init__()
        self._whole = [tail]  # in a list, so that its weights are not this module's
        self.names, self.rows = list(names), rows
        whole = dict(tail.named_parameters())
        values = [whole[n].detach()[rows] for n in names]
        if copied:
            values = [nn.Parameter(v.clone()) for v in values]
            self.own = nn.ParameterList(values)
        self._values = values

    def forward(self, *features: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(
            self._whole[0], dict(zip(self.names, self._values, strict=True)), features
        )
        return logits

    @torch.no_grad()
    def write_back(self) -> None:
        """Puts the rows into the whole tail's weights."""
        whole = dict(self._whole[0].named_parameters())
        for name, value in zip(self.names, self._values, strict=True):
            whole[name][self.rows] = value


def row_names(tail: nn.Module, parameters: Sequence[nn.Parameter]) -> list[str]:
    """What ``tail`` calls ``parameters``."""
    wanted = {id(p) for p in parameters}
    return [n for n, p in tail.named_parameters() if id(p) in wanted]


@torch.no_grad()
def supports_subset(
    tail: nn.Module, parameters: Sequence[nn.Parameter], features: tuple[Tensor, ...]
) -> bool:
    """Whether some classes' logits come out the same without the others' weights.

    They don't where the logits are normalised or reshaped after the last layer.

    Args:
        tail: features -> logits [N, C].
        parameters: each [C, ...].
        features: some rows.
    """
    names = row_names(tail, parameters)
    probe = tuple(f[:2] for f in features)
    want = tail(*probe)
    chosen = torch.arange(0, want.shape[1], max(1, want.shape[1] // 7), device=want.device)
    try:
        got = ClassSubsetTail(tail, names, chosen, copied=False)(*probe)
    except (RuntimeError, ValueError, IndexError):  # shapes that hold for all classes only
        return False
    want = want[:, chosen]
    return got.shape == want.shape and torch.allclose(got, want, 1e-4, 1e-4 * float(want.std()))


def tiles(
    tail: nn.Module, names: Sequence[str], classes: int, features: tuple[Tensor, ...]
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of all classes, tile by tile: (which classes, float [N, tile])."""
    for start in range(0, classes, TILE_CLASSES):
        part = slice(start, min(start + TILE_CLASSES, classes))
        yield part, ClassSubsetTail(tail, names, part, copied=False)(*features)
