"""The plain-torch truth of each op, against float64, autograd and torch's own Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import bits
from torch import Tensor
from torch.nn import functional as F

from zsu_fast import ops
from zsu_fast.ops import reference

SHAPES = [(1, 2), (7, 10), (33, 1000)]


def rows(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Logits, targets and coefficients of both signs and 0."""
    logits = 5 * torch.randn(shape, dtype=dtype)
    coef = torch.randn(shape[0], dtype=dtype)
    coef[::5] = 0 if shape[0] > 1 else 1
    return logits, torch.randint(shape[1], (shape[0],)), coef


def naive_signed(logits: Tensor, target: Tensor, coef: Tensor) -> Tensor:
    return (coef * F.cross_entropy(logits, target, reduction="none")).sum()


# --- signed cross-entropy --------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_equals_autograd_in_float64(shape: tuple[int, int]) -> None:
    logits, target, coef = rows(shape, torch.float64)
    logits.requires_grad_(True)
    want = naive_signed(logits, target, coef)
    (want_grad,) = torch.autograd.grad(want, logits)
    losses = ops.signed_cross_entropy(logits, target, coef)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.allclose(losses.sum(), want, rtol=1e-12)
    assert torch.allclose(grad, want_grad, rtol=1e-9, atol=1e-13)
    negative = naive_signed(logits, target, coef.clamp(max=0))
    assert torch.allclose(losses[0], negative, rtol=1e-12)


def test_signed_gradcheck() -> None:
    logits, target, coef = rows((5, 4), torch.float64)
    logits.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: ops.signed_cross_entropy(x, target, coef), (logits,), atol=1e-7
    )


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (2.0, -3.0)])
def test_signed_gradients_of_each_term(weights: tuple[float, float]) -> None:
    logits, target, coef = rows((6, 5), torch.float64)
    logits.requires_grad_(True)
    losses = ops.signed_cross_entropy(logits, target, coef)
    (grad,) = torch.autograd.grad((losses * torch.tensor(weights)).sum(), logits)
    scaled = coef * torch.where(coef < 0, weights[0], weights[1])
    (want,) = torch.autograd.grad(naive_signed(logits, target, scaled), logits)
    assert torch.allclose(grad, want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("rest", [1e-3, 1e-8, 1e-12, 1e-30])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_signed_gradient_of_a_saturated_row(rest: float, sign: float) -> None:
    """At p_y = 1 - rest, float32 ``softmax - onehot`` is 0 or noise; this is not."""
    gap = -torch.log(torch.tensor(rest / 9, dtype=torch.float64))
    logits = torch.zeros(1, 10, dtype=torch.float64)
    logits[0, 3] = gap
    target, coef = torch.tensor([3]), torch.tensor([sign])
    others = 9 * torch.exp(-gap)
    miss = others / (1 + others)
    single = logits.float().requires_grad_(True)
    losses = ops.signed_cross_entropy(single, target, coef)
    (grad,) = torch.autograd.grad(losses.sum(), single)
    assert float(grad[0, 3]) == pytest.approx(-sign * float(miss), rel=1e-5)
    assert float(grad[0, 0]) == pytest.approx(sign * float(miss) / 9, rel=1e-5)
    assert float(grad.double().sum()) == pytest.approx(0, abs=1e-6 * float(miss))
    assert float(losses.detach().sum()) == pytest.approx(
        sign * float(torch.log1p(others)), rel=1e-5
    )
    if rest < 1e-8:
        plain = single.detach().softmax(1)
        assert float(plain[0, 3] - 1) == 0  # what naive code sees


@pytest.mark.parametrize("shift", [1e6, -1e6])
def test_signed_does_not_change_with_a_shift(shift: float) -> None:
    logits, target, coef = rows((7, 10))
    logits = logits.mul(8).round().div(8)  # so that the shift itself does not round
    want = reference.signed_cross_entropy(logits, target, coef)
    got = reference.signed_cross_entropy(logits + shift, target, coef)
    assert torch.equal(logits + shift - shift, logits)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [1e3, 3e37])
def test_signed_is_finite_for_any_finite_logits(scale: float) -> None:
    logits = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [1, 1, 1]]) * scale
    target, coef = torch.tensor([0, 0, 2]), torch.tensor([-1.0, 1, 1])
    losses, grad = reference.signed_cross_entropy(logits, target, coef)
    assert losses.isfinite().all()
    assert grad.isfinite().all()
    assert float(losses[1]) == pytest.approx(2 * scale + float(torch.tensor(3.0).log()), rel=1e-6)


def test_signed_leaves_rows_out() -> None:
    logits, target, coef = rows((6, 4))
    coef = torch.tensor([0.0, -1, 0, 1, 0, 2])
    logits[0], logits[2, 1] = float("nan"), float("inf")
    losses, grad = reference.signed_cross_entropy(logits, target, coef)
    used = coef != 0
    want, want_grad = reference.signed_cross_entropy(logits[used], target[used], coef[used])
    assert torch.equal(losses, want)
    assert torch.equal(grad[used], want_grad)
    assert not grad[~used].any()


def test_signed_does_not_hide_nan() -> None:
    logits, target, _ = rows((3, 4))
    logits[1, 2] = float("nan")
    losses, grad = reference.signed_cross_entropy(logits, target, torch.tensor([-1.0, 1, 1]))
    assert losses[1].isnan()
    assert losses[0].isfinite()
    assert grad[1].isnan().any()
    assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_signed_rounds_half_types_once(dtype: torch.dtype) -> None:
    logits, target, coef = rows((9, 20))
    logits = logits.to(dtype)
    losses, grad = reference.signed_cross_entropy(logits, target, coef)
    want, want_grad = reference.signed_cross_entropy(logits.double(), target, coef)
    assert (losses.dtype, grad.dtype) == (torch.float32, dtype)
    assert torch.allclose(losses.double(), want, rtol=1e-5, atol=1e-5)
    tiny = torch.finfo(dtype).tiny  # below it a half type has fewer digits
    assert torch.allclose(grad.double(), want_grad, rtol=torch.finfo(dtype).eps, atol=tiny)


# --- masked cross-entropy --------------------------------------------------------------------


def masked_case(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, _, coef = rows(shape, torch.float64)
    teacher = 5 * torch.randn(shape, dtype=torch.float64)
    forget = torch.zeros(shape[1], dtype=torch.bool)
    forget[:: max(2, shape[1] // 3)] = True
    return logits, teacher, forget, coef.abs()


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_equals_kl_divergence(shape: tuple[int, int]) -> None:
    logits, teacher, forget, coef = masked_case(shape)
    logits.requires_grad_(True)
    keep = ~forget
    q = teacher[:, keep].softmax(1)
    terms = F.kl_div(logits.log_softmax(1)[:, keep], q, reduction="none").sum(1)
    want = (coef * terms).sum()
    (want_grad,) = torch.autograd.grad(want, logits)
    loss = ops.masked_cross_entropy(logits, teacher, forget, coef)
    (grad,) = torch.autograd.grad(3 * loss, logits)
    assert torch.allclose(loss, want, rtol=1e-10)
    assert torch.allclose(grad, 3 * want_grad, rtol=1e-8, atol=1e-12)


def test_masked_gradcheck() -> None:
    logits, teacher, forget, coef = masked_case((5, 4))
    logits.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: ops.masked_cross_entropy(x, teacher, forget, coef), (logits,), atol=1e-7
    )


def test_masked_is_zero_at_the_mask_and_positive_elsewhere() -> None:
    _, teacher, forget, coef = masked_case((7, 10))
    loss, grad = reference.masked_cross_entropy(
        teacher.masked_fill(forget, -1e4), teacher, forget, coef
    )
    assert abs(float(loss)) < 1e-12
    assert float(grad.abs().max()) < 1e-12
    loss, grad = reference.masked_cross_entropy(teacher, teacher, forget, coef)
    assert float(loss) > 0.1
    assert (grad[:, forget] >= 0).all()  # descent lowers the forgotten logits


def test_masked_does_not_depend_on_the_teacher_s_forgotten_logits() -> None:
    logits, teacher, forget, coef = masked_case((7, 10))
    other = torch.where(forget, 50.0 + teacher, teacher)
    a = reference.masked_cross_entropy(logits, teacher, forget, coef)
    b = reference.masked_cross_entropy(logits, other, forget, coef)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_masked_leaves_rows_out_and_shows_nan() -> None:
    logits, teacher, forget, _ = masked_case((4, 6))
    logits[0, 1] = float("nan")
    coef = torch.tensor([0.0, 1, 1, 1], dtype=torch.float64)
    loss, grad = reference.masked_cross_entropy(logits, teacher, forget, coef)
    assert loss.isfinite()
    assert not grad[0].any()
    loss, grad = reference.masked_cross_entropy(logits, teacher, forget, coef + 1)
    assert loss.isnan()
    assert grad[0].isnan().any()


@pytest.mark.parametrize("shift", [1e6, -1e6])
def test_masked_does_not_change_with_a_shift(shift: float) -> None:
    logits, teacher, forget, coef = masked_case((7, 10))
    want = reference.masked_cross_entropy(logits, teacher, forget, coef)
    got = reference.masked_cross_entropy(logits + shift, teacher - shift, forget, coef)
    assert torch.allclose(got[0], want[0], rtol=1e-7)
    assert torch.allclose(got[1], want[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_in_other_dtypes(dtype: torch.dtype) -> None:
    logits, teacher, forget, coef = masked_case((9, 20))
    logits, teacher = logits.to(dtype), teacher.to(dtype)
    loss, grad = reference.masked_cross_entropy(logits, teacher, forget, coef.float())
    want, want_grad = reference.masked_cross_entropy(
        logits.double(), teacher.double(), forget, coef
    )
    assert grad.dtype == dtype
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    assert torch.allclose(grad.double(), want_grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


# --- ascent step -----------------------------------------------------------------------------


def ascent_case(count: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    x = torch.rand(count, 3, 4, 4, dtype=dtype)
    return {
        "x": x,
        "grad": torch.randn_like(x),
        "exp_avg": torch.zeros_like(x),
        "exp_avg_sq": torch.zeros_like(x),
        "step": torch.zeros(count, dtype=torch.int32),
        "active": torch.ones(count, dtype=torch.bool),
        "low": torch.tensor(-10.0, dtype=dtype),
        "high": torch.tensor(10.0, dtype=dtype),
        "lr": torch.tensor(0.1, dtype=dtype),
        "beta": torch.tensor(0.0, dtype=dtype),
    }


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_ascent_follows_adam(beta: float) -> None:
    case = ascent_case(dtype=torch.float64)
    case["beta"] = torch.tensor(beta, dtype=torch.float64)
    twin = case["x"].clone().requires_grad_(True)
    adam = torch.optim.Adam([twin], lr=0.1, maximize=True)
    for _ in range(25):
        grad = torch.randn_like(twin)
        twin.grad = grad - 2 * beta * twin.detach()
        adam.step()
        case["grad"] = grad
        reference.ascent_step_(**case)
    assert torch.allclose(case["x"], twin, rtol=1e-9, atol=1e-10)
    assert (case["step"] == 25).all()


def test_ascent_first_steps_in_float32_are_accurate() -> None:
    case = ascent_case()
    wide = {
        k: v.double() if v.is_floating_point() else v.clone()
        for k, v in case.items()
    }  # fmt: skip
    for _ in range(3):
        reference.ascent_step_(**case)
        reference.ascent_step_(**wide)
    assert torch.allclose(case["x"].double(), wide["x"], rtol=1e-6, atol=1e-6)


def test_ascent_leaves_inactive_rows_bit_identical() -> None:
    case = ascent_case()
    case["exp_avg"].normal_()
    case["exp_avg_sq"].uniform_()
    case["x"][1, 0, 0, 0], case["x"][3, 0, 0, 0] = -0.0, 99.0  # a sign, and beyond the bound
    case["exp_avg"][1, 0, 0, 1] = float("nan")
    case["grad"][3] = float("nan")
    case["step"] += torch.arange(6, dtype=torch.int32)
    case["active"] = torch.tensor([True, False, True, False, False, True])
    names = ("x", "exp_avg", "exp_avg_sq", "step")
    before = {n: [bits(row) for row in case[n]] for n in names}
    reference.ascent_step_(**case)
    for name in names:
        after = [bits(row) for row in case[name]]
        for i, active in enumerate(case["active"].tolist()):
            assert (after[i] == before[name][i]) == (not active), (name, i)


def test_ascent_clamps_to_valid_images_by_channel() -> None:
    case = ascent_case()
    case["lr"] = torch.tensor(100.0)
    case["low"] = torch.tensor([-1.0, -2, -3]).view(3, 1, 1)
    case["high"] = torch.tensor([1.0, 2, 3]).view(3, 1, 1)
    up = case["grad"] > 0
    reference.ascent_step_(**case)
    assert torch.equal(case["x"], torch.where(up, case["high"], case["low"]))


def test_ascent_does_not_hide_nan_behind_the_clamp() -> None:
    case = ascent_case()
    case["grad"][2, 1, 3, 0] = float("nan")
    reference.ascent_step_(**case)
    assert case["x"][2, 1, 3, 0].isnan()
    assert int(case["x"].isnan().sum()) == 1


def test_ascent_takes_a_learning_rate_by_channel() -> None:
    case = ascent_case()
    before = case["x"].clone()
    case["lr"] = torch.tensor([0.0, 0.1, 0.2]).view(3, 1, 1)
    reference.ascent_step_(**case)
    moved = (case["x"] - before).abs().amax((0, 2, 3))
    assert torch.allclose(moved, torch.tensor([0.0, 0.1, 0.2]), atol=1e-6)


def test_ascent_of_flat_inputs() -> None:
    case = ascent_case()
    flat = {k: v.flatten(1).clone() if v.ndim == 4 else v.clone() for k, v in case.items()}
    reference.ascent_step_(**case)
    reference.ascent_step_(**flat)
    assert torch.equal(case["x"].flatten(1), flat["x"])
