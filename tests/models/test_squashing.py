"""Models that end in a softmax, log-softmax, sigmoid or tanh are unlearned ahead of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import (
    FORGET,
    QUICK,
    SPEC,
    Answer,
    Returning,
    TinyNet,
    assert_forgets,
    changed_tensors,
    deep_run,
    same_bits,
    tiny,
    tiny_data,
    unlearned_tiny,
    untouched,
)
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast import ZeroShotUnlearner, audit
from zsu_fast.models.input_spec import noise_images
from zsu_fast.models.prepare import PreparedModel, prepare_model


def _own_softmax(z: Tensor) -> Tensor:
    e = torch.exp(z - z.max(1, keepdim=True)[0])
    return e / e.sum(1, keepdim=True)


SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "F.log_softmax": lambda z: F.log_softmax(z, 1),
    "F.softmax": lambda z: F.softmax(z, dim=1),
    "torch.softmax": lambda z: torch.softmax(z, 1),
    "method": lambda z: z.softmax(1),
    "log of softmax": lambda z: torch.log(z.softmax(1) + 1e-8),
    "by hand": _own_softmax,
    "log by hand": lambda z: z - torch.logsumexp(z, 1, keepdim=True),
    "reshaped": lambda z: z[:, :, None, None].softmax(1).flatten(1),
    "twice": lambda z: z.softmax(1).log_softmax(1),
}
BOUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "in place": lambda z: (z / 8).sigmoid_(),
    "tanh in 0..1": lambda z: (torch.tanh(z / 8) + 1) / 2,
    "hardsigmoid": lambda z: F.hardsigmoid(z / 8),
}


class _Squashed(TinyNet):
    """The tiny model with ``squash`` at the end of its own forward."""

    def __init__(self, squash: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.squash = squash

    def forward(self, x: Tensor) -> Tensor:
        return self.squash(super().forward(x))


def squashed(squash: Callable[[Tensor], Tensor]) -> nn.Module:
    model = _Squashed(squash).eval()
    model.load_state_dict(tiny().state_dict())
    return model


def prepared(model: nn.Module) -> PreparedModel:
    with untouched(model):
        return prepare_model(model, None, SPEC.shape, SPEC.mean, SPEC.std)


@pytest.mark.parametrize("form", [k for k in SOFTMAX if k != "twice"])
def test_the_working_copy_returns_what_the_softmax_takes(form: str) -> None:
    found = prepared(squashed(SOFTMAX[form]))
    images = noise_images(SPEC, 7)
    logits, want = found.model(images), tiny()(images)
    shift = (logits - want).mean(1, keepdim=True)  # some subtract the maximum themselves
    assert torch.allclose(logits - shift, want, atol=1e-5)
    assert "unlearned ahead of its softmax" in found.notes[0]
    assert found.model.returns == ("log-probabilities" if "log" in form else "probabilities")
    assert found.model.returns in found.notes[0]


@pytest.mark.parametrize("form", BOUNDED)
def test_the_working_copy_returns_what_the_sigmoid_takes(form: str) -> None:
    found = prepared(squashed(BOUNDED[form]))
    images = noise_images(SPEC, 7)
    with torch.no_grad():
        logits, want = found.model(images), tiny()(images)
    scale = float(want.abs().max() / logits.abs().max())
    assert torch.allclose(scale * logits, want, rtol=1e-4, atol=1e-4)
    assert "ahead of the sigmoid" in found.notes[0]
    assert len(found.notes) == 1
    assert found.model.returns == "scores"


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("form", ["F.log_softmax", "method", "twice"])
def test_unlearning_is_as_with_logits(form: str, deep: bool) -> None:
    model = squashed(SOFTMAX[form])
    if deep and form != "twice":
        (run, result), (_, want) = deep_run(model), deep_run()
        assert run.record.depth["level"] == "deep"
    else:
        run = ZeroShotUnlearner(model, FORGET, **QUICK)
        result, want = run.run(), unlearned_tiny()
    assert not changed_tensors(want, result) or form == "twice"
    assert_forgets(result, FORGET)
    assert any("ahead of its softmax" in warning for warning in run.record.warnings)
    assert torch.allclose(result(tiny_data(5)[0]).exp().sum(1) > 0, torch.ones(5).bool())


def test_a_softmax_that_is_a_module_of_its_own() -> None:
    model = nn.Sequential(nn.Sequential(tiny(), nn.LogSoftmax(1)), nn.Identity()).eval()
    run = ZeroShotUnlearner(model, FORGET, **QUICK)
    with untouched(model):
        result = run.run()
    assert same_bits(result[0][0], unlearned_tiny())
    assert type(result[0][1]) is nn.LogSoftmax
    assert type(run.split_point.backbone).__name__ == "GraphModule"  # traced, not replayed


def test_probabilities_in_an_object() -> None:
    model = Returning(tiny(), lambda z: Answer(z.softmax(1)))
    found = prepared(model)
    images = noise_images(SPEC, 3)
    assert torch.equal(found.model(images), tiny()(images))


def test_the_mean_of_two_softmaxes_goes_through_a_log() -> None:
    model = squashed(lambda z: (z.softmax(1) + (0.9 * z).softmax(1)) / 2)
    found = prepared(model)
    images = noise_images(SPEC, 5)
    assert torch.allclose(found.model(images).exp(), model(images), atol=1e-6)
    assert "their logarithms serve as logits" in found.notes[0]
    run = ZeroShotUnlearner(model, FORGET, **QUICK)
    assert_forgets(run.run(), FORGET)
    assert any("their logarithms" in warning for warning in run.record.warnings)


def test_scores_of_0_to_1_from_elsewhere_are_noted() -> None:
    model = squashed(lambda z: (z - z.amin()) / (z.amax() - z.amin()))
    assert any("lie between 0 and 1" in note for note in prepared(model).notes)


def test_logits_are_taken_as_they_are() -> None:
    found = prepared(tiny())
    assert found.notes == []
    assert found.model.extra_repr() == ""
    assert found.model.returns == "logits"
    soft = squashed(lambda z: 3 * torch.tanh(z / 3))  # soft-capped logits, beyond 1
    assert torch.equal(prepared(soft).model(noise_images(SPEC, 3)), soft(noise_images(SPEC, 3)))


def test_a_softmax_over_the_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: each column .* over the images.*dim=1"):
        prepared(squashed(lambda z: z.softmax(0)))


def test_the_audit_looks_ahead_of_the_softmax() -> None:
    model = squashed(SOFTMAX["F.softmax"])
    result = ZeroShotUnlearner(model, FORGET, **QUICK).run()
    options = {"input_shape": SPEC.shape, "relearn_steps": 0, "progress": False}
    found = audit(model, result, FORGET, tiny_data(100), **options)
    plain = audit(tiny(), unlearned_tiny(), FORGET, tiny_data(100), **options)
    assert found.verdict == plain.verdict
