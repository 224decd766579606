"""Random embeddings: what they train, on what rows, and what stays unchanged."""

from __future__ import annotations

import pytest
import torch
from support import changed_tensors, same_bits, tiny, tiny_data, untouched

from zsu_fast import ArgumentError, random_embeddings
from zsu_fast.splitting.layers import layer_names
from zsu_fast.training.teacher import Teacher

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


def test_noise_for_a_deeper_tail_has_the_scale_of_its_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer with ten times the scale before the split gives rows of ten times the scale."""
    sizes = []

    def note(teacher, rows):  # type: ignore[no-untyped-def]
        sizes.append(float(rows[0].square().mean().sqrt()))
        return label(teacher, rows)

    label = Teacher.label
    monkeypatch.setattr(Teacher, "label", note)
    model = tiny()
    *_, before_last, _ = layer_names(model, tiny_data(2)[0])
    for factor in (1, 10):
        with torch.no_grad():
            model.bn.weight.mul_(factor)
            model.bn.bias.mul_(factor)
        random_embeddings(model, FORGET, tail=before_last)
        random_embeddings(model, FORGET)
    train_deep, _, train_last, _, larger_deep, _, larger_last, _ = sizes
    assert larger_deep == pytest.approx(10 * train_deep, rel=1e-3)
    assert train_last == pytest.approx(1, abs=0.05)  # of unit scale, as published
    assert larger_last == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("forget", [[], [9], "1", range(5)])
def test_bad_classes_are_refused(forget: object) -> None:
    with pytest.raises(ArgumentError, match=r"^forget: got"):
        random_embeddings(tiny(), forget)


def test_auto_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^tail: got 'auto'"):
        random_embeddings(tiny(), FORGET, tail="auto")
