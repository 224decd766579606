"""Random embeddings: what they train, on what rows, and what stays unchanged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support import changed_tensors, same_bits, tiny, tiny_data, untouched
from torch import Tensor, nn

from zsu_fast import ArgumentError, ModelError, random_embeddings
from zsu_fast.splitting.layers import layer_names

FORGET = [1, 3]


def test_the_last_layer_alone_forgets() -> None:
    model = tiny()
    last = layer_names(model, tiny_data(2)[0])[-1]
    with untouched(model):
        unlearned = random_embeddings(model, FORGET)
    assert changed_tensors(model, unlearned) == {f"{last}.weight", f"{last}.bias"}
    features = torch.randn(500, unlearned.get_submodule(last).weight.shape[1]).abs()
    layer, before = unlearned.get_submodule(last), model.get_submodule(last)
    leaked = torch.isin(layer(features).argmax(1), torch.tensor(FORGET))
    assert torch.isin(before(features).argmax(1), torch.tensor(FORGET)).float().mean() > 0.1
    assert leaked.float().mean() < 0.02


def test_a_named_deeper_tail_is_trained() -> None:
    model = tiny()
    names = layer_names(model, tiny_data(2)[0])
    changed = changed_tensors(model, random_embeddings(model, FORGET, tail=names[-2]))
    assert {f"{n}.weight" for n in names[-2:]} <= changed
    assert not any(name.startswith(f"{names[0]}.") for name in changed)


def test_the_seed_decides() -> None:
    one, same, other = (random_embeddings(tiny(), FORGET, seed=s) for s in (0, 0, 1))
    assert same_bits(one, same)
    assert not same_bits(one, other)


def noise_scales(model: nn.Module, tail: str) -> list[float]:
    """Root mean squares of the training and held-out rows that a tail gets, in six chunks."""
    batches: list[Tensor] = []

    class Recording(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            batches.append(x.detach())
            return super().forward(x)

    layer = model.get_submodule(tail)
    layer.__class__ = Recording  # copies of the model record too, as they would not with a hook
    random_embeddings(model, FORGET, tail=tail)
    layer.__class__ = nn.Linear
    chunks = [rows for rows in batches if len(rows) > 50][:6]  # smaller ones are images' features
    assert sum(len(rows) for rows in chunks) > 4000
    return [float(rows.square().mean().sqrt()) for rows in chunks]


def test_noise_for_a_deeper_tail_has_the_scale_of_its_features() -> None:
    """A layer with ten times the scale before the split gives rows of ten times the scale."""
    model = tiny()
    *_, before_last, last = layer_names(model, tiny_data(2)[0])
    deep, output_level = [], []
    for factor in (1, 10):
        with torch.no_grad():
            model.bn.weight.mul_(factor)
            model.bn.bias.mul_(factor)
        deep.append(noise_scales(model, before_last))
        output_level.append(noise_scales(model, last))
    assert deep[1] == pytest.approx([10 * scale for scale in deep[0]], rel=1e-3)
    assert output_level[0] == pytest.approx([1] * 6, abs=0.05)  # of unit scale, as published
    assert output_level[1] == pytest.approx([1] * 6, abs=0.05)


@pytest.mark.parametrize("forget", [[], [9], "1", range(5)])
def test_bad_classes_are_refused(forget: object) -> None:
    with pytest.raises(ArgumentError, match=r"^forget: got"):
        random_embeddings(tiny(), forget)


def test_auto_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^tail: got 'auto'"):
        random_embeddings(tiny(), FORGET, tail="auto")


def test_random_embeddings_of_a_multi_label_model_are_refused() -> None:
    model = tiny()
    model.config = SimpleNamespace(problem_type="multi_label_classification")
    with pytest.raises(ModelError, match="loss of a softmax"):
        random_embeddings(model, FORGET)
