"""Kinds of models: modes, dtypes, outputs, shapes, tied weights, wrappers."""

from __future__ import annotations

import pytest
import torch
from support import (
    FORGET,
    QUICK,
    QUICK_DEEP as QUICK_ROWS,
    Answer,
    Returning,
    TinyNet,
    assert_forgets,
    bits,
    changed_tensors,
    same_bits,
    tiny,
    tiny_data,
    unlearned_tiny,
    untouched,
)
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast import ArgumentError, ModelError, ZeroShotUnlearner, evaluate, unlearn
from zsu_fast.models import zoo
from zsu_fast.models.parameters import unwrap

# --- state of the model ----------------------------------------------------------------------


def test_train_mode_and_batch_norm_statistics_are_kept() -> None:
    model = tiny().train()
    model.drop.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    with untouched(model):
        result = unlearn(model, FORGET, **QUICK)
    assert {n: m.training for n, m in result.named_modules()} == modes
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert bits(getattr(result.bn, name)) == bits(getattr(model.bn, name))
    assert same_bits(result, unlearned_tiny())  # dropout has no effect


@pytest.mark.parametrize("tail", ["auto", "conv"])
def test_batch_norm_statistics_inplace(tail: str) -> None:
    model = tiny().train()
    before = {n: bits(b) for n, b in model.named_buffers()}
    unlearn(model, FORGET, inplace=True, tail=tail, **QUICK)
    assert {n: bits(b) for n, b in model.named_buffers()} == before
    assert model.training
    assert model.bn.training


@pytest.mark.parametrize("inplace", [False, True])
def test_a_frozen_model_is_trained_and_stays_frozen(inplace: bool) -> None:
    result = unlearn(tiny().requires_grad_(False), FORGET, inplace=inplace, **QUICK)
    assert not any(p.requires_grad for p in result.parameters())
    assert all(p.grad is None for p in result.parameters())
    assert same_bits(result, unlearned_tiny())


def test_gradients_of_the_user_are_kept() -> None:
    model = tiny()
    model(tiny_data(10)[0]).sum().backward()
    before = {n: bits(p.grad) for n, p in model.named_parameters()}
    unlearn(model, FORGET, inplace=True, **QUICK)
    assert {n: bits(p.grad) for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("inplace", [False, True])
def test_nan_weights_are_refused(inplace: bool) -> None:
    model = tiny()
    with torch.no_grad():
        model.fc1.weight[3, 4] = float("nan")
    with untouched(model), pytest.raises(ModelError, match=r"fc1\.weight holds 1 NaN.* Load a"):
        unlearn(model, FORGET, inplace=inplace, **QUICK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
def test_dtypes_are_kept(dtype: torch.dtype, inplace: bool) -> None:
    model = tiny().to(dtype)
    dtypes = {n: t.dtype for n, t in model.state_dict().items()}
    result = unlearn(model, FORGET, inplace=inplace, **QUICK)
    assert {n: t.dtype for n, t in result.state_dict().items()} == dtypes
    assert_forgets(result, FORGET)


@pytest.mark.shared
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lenet5_in_half_precision_forgets(dtype: torch.dtype, mnist: tuple[Tensor, Tensor]) -> None:
    model, forget = zoo.load("lenet5").to(dtype), [1, 2, 3, 4]
    result = unlearn(model, forget, **(QUICK | {"steps": 200}))
    measured = evaluate(result, (mnist[0][:2000], mnist[1][:2000]), forget)
    assert next(result.parameters()).dtype == dtype
    assert measured.forget_accuracy <= 1, str(measured)
    assert measured.retain_accuracy >= 97, str(measured)


# --- outputs and inputs ----------------------------------------------------------------------


OUTPUTS = {
    "tuple": lambda y: (y, 0 * y),
    "list": lambda y: [y],
    "dict": lambda y: {"loss": y.sum(), "logits": y},
    "object": Answer,
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_outputs_in_a_container(form: str) -> None:
    model = Returning(tiny(), OUTPUTS[form])
    with untouched(model):
        result = unlearn(model, FORGET, **QUICK)
    assert type(result(tiny_data(5)[0])) is type(OUTPUTS[form](torch.zeros(1, 5)))
    assert_forgets(result, FORGET)
    assert same_bits(result.inner, unlearned_tiny())


def test_a_tail_without_parameters() -> None:
    class Scaled(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(super().forward(x))

    model = Scaled().eval()
    match = "tail: 'out' is followed by no layer with parameters.*such as 'fc2'"
    with untouched(model), pytest.raises(ArgumentError, match=match):
        unlearn(model, FORGET, tail="out", **QUICK)


def test_a_model_without_parameters() -> None:
    with pytest.raises(ModelError, match="without parameters"):
        unlearn(nn.Flatten(), FORGET)


def test_a_model_for_one_image_at_a_time() -> None:
    class One(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1:
                raise RuntimeError("one image at a time")
            return super().forward(x)

    model = One().eval()
    match = r"model: .*not a batch of two.*one image at a time.*any batch size"
    with untouched(model), pytest.raises(ModelError, match=match):
        unlearn(model, FORGET, input_shape=(3, 8, 8), **QUICK)


def test_one_image_at_a_time_without_a_shape() -> None:
    class One(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(1, 3, 8, 8))

    model = One().eval()
    with untouched(model), pytest.raises(ModelError, match="not a batch of two"):
        unlearn(model, FORGET, **QUICK)


def test_a_model_that_raises_for_the_inferred_shape() -> None:
    class Picky(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != 9:
                raise RuntimeError("expects nine pixels")
            return super().forward(x[..., :8, :8])

    model = Picky().eval()
    match = r"input_shape: .*expects nine pixels.*Pass input_shape=\("
    with untouched(model), pytest.raises(ArgumentError, match=match):
        unlearn(model, FORGET, **QUICK)


def test_a_given_shape_at_which_the_model_raises() -> None:
    model = tiny()
    with untouched(model), pytest.raises(ArgumentError, match=r"input_shape: .*\(3, 32, 32\)"):
        unlearn(model, FORGET, input_shape=(3, 32, 32), **QUICK)


# --- shared weights, wrappers, control flow --------------------------------------------------


class TiedNet(nn.Module):
    """Two linear layers with one 16x16 weight matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.final = nn.Linear(16, 16), nn.Linear(16, 16)
        self.final.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.final(F.relu(self.first(x.flatten(1))))


def tied_net() -> nn.Module:
    torch.manual_seed(1)
    model = TiedNet().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


TIED = QUICK | {"input_shape": (1, 4, 4), "impressions_per_class": 4}


@pytest.mark.parametrize("tail", ["auto", "last"])
def test_the_tail_includes_both_layers_with_tied_weights(tail: str) -> None:
    model = tied_net()
    runner = ZeroShotUnlearner(model, FORGET, tail=tail, **TIED)
    with untouched(model):
        result = runner.run()
    assert runner.split_point.name == "first"
    assert result.first.weight is result.final.weight
    assert changed_tensors(model, result) >= {"first.weight", "final.weight", "final.bias"}
    if tail == "last":
        assert "tied to the backbone" in runner.split_point.reason


def test_a_named_tail_with_weights_tied_to_the_backbone_is_refused() -> None:
    model = tied_net()
    match = r"tail: 'final' would train first\.weight.*tied weights.*leave tail='auto'"
    with untouched(model), pytest.raises(ArgumentError, match=match):
        unlearn(model, FORGET, tail="final", **TIED)


def test_two_names_of_one_tensor_in_the_tail() -> None:
    model = tiny()
    model.again = model.fc2
    model.alias = model.fc2.weight
    result = unlearn(model, FORGET, tail="fc2", **QUICK)
    assert result.again is result.fc2
    assert result.alias is result.fc2.weight
    assert {"fc2.weight", "again.weight", "alias"} <= changed_tensors(model, result)
    assert_forgets(result, FORGET)


def test_functional_dropout_has_no_effect() -> None:
    class Functional(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.bn(self.conv(x))).flatten(1)
            return self.fc2(F.dropout(self.act(self.fc1(x)), 0.5, self.training))

    model = Functional().train()
    model.load_state_dict(tiny().state_dict())
    assert same_bits(unlearn(model, FORGET, **QUICK), unlearned_tiny())


def test_a_compiled_model() -> None:
    inner = tiny()
    model = torch.compile(inner, backend="eager")
    model(tiny_data(5)[0])
    with untouched(inner):
        result = unlearn(model, FORGET, **QUICK)
    assert type(result) is type(model)
    assert unwrap(result) is not inner
    assert same_bits(unwrap(result), unlearned_tiny())
    images = tiny_data()[0]
    assert torch.allclose(result(images), unwrap(result)(images), atol=1e-5)
    assert_forgets(result, FORGET)
    assert unlearn(model, FORGET, inplace=True, **QUICK) is model
    assert_forgets(model, FORGET)
    assert_forgets(inner, FORGET)


def test_a_data_parallel_model() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # DataParallel uses all GPUs
    inner = tiny().to(device)
    model = nn.DataParallel(inner)
    with untouched(model):
        result = unlearn(model, FORGET, **QUICK)
    assert type(result) is nn.DataParallel
    assert result.module is not inner
    assert_forgets(result, FORGET)
    assert same_bits(result.module, unlearn(tiny().to(device), FORGET, **QUICK))
    assert unlearn(model, FORGET, inplace=True, **QUICK).module is inner
    assert_forgets(inner, FORGET)


def test_a_model_with_python_control_flow() -> None:
    class Branching(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool(x.abs().sum() >= 0) else x

    model = Branching().eval()
    model.load_state_dict(tiny().state_dict())
    result = unlearn(model, FORGET, **QUICK)
    assert_forgets(result, FORGET)
    assert "forward" not in result.conv.__dict__


def test_a_class_that_the_model_never_predicts() -> None:
    model = tiny()
    with torch.no_grad():
        model.fc2.weight[4] = 0
        model.fc2.bias[4] = -1e4
    with pytest.warns(UserWarning, match="no impression reached its confidence for class 4"):
        result = unlearn(model, FORGET, **(QUICK | {"max_steps": 20, "restarts": 0}))
    assert all(p.isfinite().all() for p in result.parameters())


# --- gradients and precision in forward --------------------------------------------------------


class FrozenBackbone(TinyNet):
    """The backbone runs under ``context()``."""

    context = torch.no_grad

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            x = self.act(self.bn(self.conv(x))).flatten(1)
        return self.fc2(self.act(self.fc1(x.clone())))


class Detached(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(self.act(self.bn(self.conv(x))).flatten(1)))
        return self.fc2(x.detach())


class InferenceBackbone(FrozenBackbone):
    context = torch.inference_mode


class Autocast(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("depth", [None, "output"])
@pytest.mark.parametrize("kind", [FrozenBackbone, Detached, InferenceBackbone, Autocast])
def test_forward_without_gradients_or_in_bfloat16(kind: type[TinyNet], depth: str | None) -> None:
    model = kind().eval()
    model.load_state_dict(tiny().state_dict())
    run = ZeroShotUnlearner(model, FORGET, input_shape=(3, 8, 8), depth=depth, **QUICK_ROWS)
    with untouched(model):
        assert_forgets(run.run(), FORGET)
    if kind is Detached and depth is None:
        assert run.record.depth["level"] == "output"
        assert "only the last layer follows" in run.record.depth["fallback"]


@pytest.mark.parametrize("kind", [FrozenBackbone, Detached, InferenceBackbone])
def test_images_that_no_gradient_reaches_are_refused(kind: type[TinyNet]) -> None:
    model = kind().eval()
    match = r"model: no gradient reaches its images.*Pass space='tail-input'"
    with untouched(model), pytest.raises(ModelError, match=match):
        unlearn(model, FORGET, **QUICK)


@pytest.mark.parametrize("depth", [None, "output"])
def test_weight_norm_that_stores_a_computed_tensor(depth: str | None) -> None:
    model = tiny()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.fc2)
    model(tiny_data(4)[0])
    result = unlearn(model, FORGET, input_shape=(3, 8, 8), depth=depth, **QUICK_ROWS)
    assert_forgets(result, FORGET)
