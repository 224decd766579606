"""The models that every audit puts beside the unlearned one: the mask and random embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from ..classifier import InputSpec
from ..errors import ModelError
from ..loop import LoopSettings, train_tail
from ..objective import Masked, RowSettings, make_rows, mean_lead
from ..progress import Reporter
from .subject import Subject, variant

# Rows to train on and rows held out: as many as the default makes of 10 classes.
_TRAIN, _HELD_OUT = 2288, 2128


def masked(original: Subject, forget: list[int], spec: InputSpec) -> Subject:
    """The original with the forgotten logits at -inf: hides, does not forget."""
    made = variant(original, "mask", spec)
    made.hidden = forget
    return made


def random_embeddings(
    original: Subject, forget: list[int], classes: int, spec: InputSpec, seed: int
) -> Subject:
    """The last layer trained on random vectors instead of impressions; no synthesis at all.

    Half-normal vectors stand for the last layer's input, labelled by the model itself; the
    masked objective, its margin, loop and stop are those of `unlearn`. What differs is where the
    rows come from. After "Source-Free Class Unlearning via Synthetic Embeddings" (TMLR 2026).

    Raises:
        ModelError: more than one tensor crosses the cut before the last layer.
    """
    made = variant(original, "random embeddings", spec)
    device = next(made.model.parameters()).device
    crossing = made.cut.features(torch.zeros(2, *spec.shape, device=device))
    if len(crossing) != 1:
        raise ModelError(
            f"{len(crossing)} tensors enter its last layer's part, not one",
            "Random embeddings need a model that is a chain at its end.",
        )
    gone = torch.zeros(classes, dtype=torch.bool, device=device)
    gone[forget] = True
    draw = torch.Generator().manual_seed(seed)
    tail = made.cut.tail

    def rows(count: int) -> Tensor:
        return torch.randn(count, *crossing[0].shape[1:], generator=draw).abs().to(device)

    halves = []
    for count in (_TRAIN, _HELD_OUT):
        x = rows(count)
        with torch.no_grad():
            label = torch.cat([tail(part).argmax(1) for part in x.split(256)])
        halves.append(make_rows(tail, (x,), label, gone, 0, draw))
    train, held_out = halves
    lead = mean_lead(tail, train, len(train), classes)
    # all logits move: that serves random rows better than the forgotten ones alone
    yardstick = Masked(gone, RowSettings().margin_of(lead, classes, alone=False))
    named = dict(made.model.model.named_parameters())
    train_tail(
        tail,
        [named[name] for name in made.cut.parameters],
        train,
        held_out,
        yardstick,
        yardstick,
        LoopSettings(),
        draw,
        Reporter(False),
    )
    return made
