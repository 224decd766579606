"""`masked_cross_entropy` on every backend, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from runners import Runner, runners, same
from torch import Tensor

from zsu_fast import ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ABSOLUTE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.float16: 6e-4, torch.bfloat16: 8e-3}


def make(
    rows: int, classes: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns student, teacher, forgotten classes (never all) and coefficients (every fourth 0)."""
    logits, teacher = (
        (3 * torch.randn(rows, classes, dtype=torch.float64)).to(dtype).to(device) for _ in range(2)
    )
    forget = torch.rand(classes) < 0.3
    forget[0] = False
    coef = torch.rand(rows) / max(rows, 1)
    coef[3::4] = 0
    return logits, teacher, forget.to(device), coef.to(device)


def and_grad(runner: Runner, logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = ops.masked_cross_entropy(leaf, *rest, backend=runner.backend)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


def truth(logits: Tensor, teacher: Tensor, forget: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    """Torch's KL divergence over the retain classes in float64, independent of `reference`."""
    leaf = logits.detach().cpu().double().requires_grad_()
    keep = ~forget.cpu()
    q = teacher.cpu().double()[:, keep].log_softmax(1)
    log_p = leaf.log_softmax(1)[:, keep]
    terms = F.kl_div(log_p, q, log_target=True, reduction="none").sum(1)
    loss = (coef.cpu().double() * terms).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


@pytest.mark.parametrize("runner", runners(compiled=False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 10, 1000, 1001, 32000])
def test_against_float64(runner: Runner, classes: int, dtype: torch.dtype) -> None:
    args = make(7 if classes > 1000 else 33, classes, dtype, runner.device)
    loss, grad = and_grad(runner, *args)
    expected_loss, expected = truth(*args)
    scale = float(args[3].max())
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=5e-6, atol=5e-6)
    assert (grad.cpu().double() - expected).abs().max() <= ABSOLUTE[dtype] * scale
    assert (grad[args[3] == 0] == 0).all()


@pytest.mark.parametrize("runner", runners())
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_batch_sizes(runner: Runner, rows: int) -> None:
    args = make(rows, 10, device=runner.device)
    loss, grad = and_grad(runner, *args)
    expected_loss, expected = truth(*args)
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=5e-6, atol=1e-6)
    torch.testing.assert_close(grad.cpu().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_zero_exactly_at_the_masked_teacher(runner: Runner) -> None:
    _, teacher, forget, coef = make(6, 100, device=runner.device)
    student = teacher.masked_fill(forget, -torch.inf)
    loss, grad = and_grad(runner, student, teacher, forget, coef)
    assert abs(loss.item()) < 1e-6
    assert grad.abs().max() < 1e-7
    loss, grad = and_grad(runner, teacher, teacher, torch.zeros_like(forget), coef)
    assert abs(loss.item()) < 1e-6
    assert grad.abs().max() < 1e-7


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_the_gradient_points_away_from_forgotten_classes(runner: Runner) -> None:
    logits, teacher, forget, coef = make(6, 10, device=runner.device)
    coef = coef.abs() + 0.1
    _, grad = and_grad(runner, logits, teacher, forget, coef)
    assert (grad[:, forget] > 0).all()
    torch.testing.assert_close(grad.sum(1), torch.zeros(6, device=runner.device), atol=1e-6, rtol=0)


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_special_values(runner: Runner) -> None:
    logits, teacher, forget, coef = make(5, 10, device=runner.device)
    coef = torch.full_like(coef, 0.5)
    expected = and_grad(runner, logits, teacher, forget, coef)
    torch.testing.assert_close(  # a common shift changes nothing
        and_grad(runner, logits.round() + 1e6, teacher.round() - 1e6, forget, coef),
        and_grad(runner, logits.round(), teacher.round(), forget, coef),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    for value in (torch.inf, torch.nan):  # masked logits do not matter
        hidden = teacher.clone()
        hidden[:, forget] = value
        got = and_grad(runner, logits, hidden, forget, coef)
        assert torch.equal(got[1], expected[1])
    certain = teacher.clone()  # a teacher that rules a retain class out: 0 log 0 = 0
    certain[:, 0] = -torch.inf
    loss, grad = and_grad(runner, logits, certain, forget, coef)
    assert loss.isfinite()
    assert grad.isfinite().all()
    logits[1, 3] = torch.nan
    loss, grad = and_grad(runner, logits, teacher, forget, coef)
    assert loss.isnan()
    assert grad[1].isnan().all()
    assert grad[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_any_strides_and_teacher_types(runner: Runner) -> None:
    logits, teacher, forget, coef = make(9, 37, device=runner.device)
    expected = and_grad(runner, logits, teacher, forget, coef)
    wide = torch.zeros(9, 50, device=runner.device)
    wide[:, 5:42] = logits
    for x in (wide[:, 5:42], logits.t().contiguous().t()):
        got = and_grad(runner, x, teacher.t().contiguous().t(), forget, coef)
        same(runner, got[0], expected[0])
        same(runner, got[1], expected[1])
    got = and_grad(runner, logits, teacher.double(), forget, coef)
    torch.testing.assert_close(got, expected)
    shared = and_grad(runner, logits, teacher[:1].expand(9, 37), forget, coef)
    torch.testing.assert_close(
        shared, and_grad(runner, logits, teacher[:1].repeat(9, 1), forget, coef)
    )


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_twice_the_same_bits_on_any_number_of_threads(runner: Runner) -> None:
    args = make(257, 1001 if runner.backend != "triton" else 10, device=runner.device)
    first = and_grad(runner, *args)
    torch.set_num_threads(2)
    again = and_grad(runner, *args)
    if runner.backend == "eager":
        torch.testing.assert_close(again, first)
    else:
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_incoming_gradient(runner: Runner) -> None:
    args = make(9, 37, device=runner.device)
    _, unit = and_grad(runner, *args)
    leaf = args[0].clone().requires_grad_()
    loss = ops.masked_cross_entropy(leaf, *args[1:], backend=runner.backend)
    for _ in range(2):
        (grad,) = torch.autograd.grad(-2 * loss, leaf, retain_graph=True)
        torch.testing.assert_close(grad, -2 * unit)


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_gradcheck(runner: Runner) -> None:
    logits, *rest, coef = make(5, 6, torch.float64, runner.device)
    torch.autograd.gradcheck(
        lambda x: ops.masked_cross_entropy(x, *rest, coef.double(), backend=runner.backend),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize("runner", runners(compiled=False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 1000, 1001, 8209])
@pytest.mark.parametrize("forget_only", [False, True])
def test_index_keep_and_shift_against_float64(
    runner: Runner, classes: int, dtype: torch.dtype, forget_only: bool
) -> None:
    rows = 5
    logits, _, forget, coef = make(rows, classes, dtype, runner.device)
    teacher = (3 * torch.randn(8, classes, dtype=torch.float64)).to(dtype).to(runner.device)
    index = torch.tensor([7, 0, 3, 3, 5], device=runner.device)
    keep = torch.tensor([0.1, 0.0, 0.02, 5.0, 0.3], device=runner.device) / classes
    loss, grad = ops.masked_cross_entropy_and_grad(
        logits, teacher, forget, coef, index=index, keep=keep, shift=2.5, forget_only=forget_only,
        backend=runner.backend,
    )  # fmt: skip
    shifted = logits.cpu().double() + 2.5 * forget.cpu()
    expected_loss, expected = truth(shifted, teacher[index], forget, coef)
    used = (keep * (coef != 0)).cpu().double()[:, None]
    change = (logits.cpu().double() - teacher[index].cpu().double()) * ~forget.cpu()
    expected_loss = expected_loss + (used * change.square()).sum()
    expected = expected + 2 * used * change
    if forget_only:
        expected = expected * forget.cpu()
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=5e-6, atol=5e-6)
    scale = max(float(coef.max()), float(expected.abs().max()))
    assert (grad.cpu().double() - expected).abs().max() <= ABSOLUTE[dtype] * scale
    assert (grad[coef == 0] == 0).all()


@pytest.mark.parametrize("runner", runners(compiled=False))
@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_index_out_of_range(runner: Runner, bad: int) -> None:
    logits, teacher, forget, coef = make(5, 10, device=runner.device)
    coef[:4] = 0.5
    index = torch.tensor([0, bad, 2, 3, 4], device=runner.device)
    if runner.backend in ("cpp", "eager") and runner.device == "cpu":
        with pytest.raises(RuntimeError, match="row 1 is out of range"):
            ops.masked_cross_entropy(
                logits, teacher, forget, coef, index=index, backend=runner.backend
            )
    else:
        loss, grad = ops.masked_cross_entropy_and_grad(
            logits, teacher, forget, coef, index=index, backend=runner.backend
        )
        assert loss.isnan()
        assert grad[1].isnan().all()
        assert grad[[0, 2, 3, 4]].isfinite().all()
    coef[1] = 0  # a row that is not used needs no teacher
    loss = ops.masked_cross_entropy(
        logits, teacher, forget, coef, index=index, backend=runner.backend
    )
    assert loss.isfinite()


@pytest.mark.parametrize("runner", runners(compiled=False))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [10, 1000, 1001, 8209])
def test_the_teacher_keeps_its_precision(runner: Runner, classes: int, dtype: torch.dtype) -> None:
    logits, teacher, forget, coef = make(5, classes, dtype, runner.device)
    teacher = 8 * torch.randn(5, classes, device=runner.device)
    teacher[0] *= 1e5 / teacher[0].abs().max()  # infinite in float16
    loss, grad = and_grad(runner, logits, teacher, forget, coef)
    expected_loss, expected = truth(logits, teacher, forget, coef)
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=2e-5, atol=1e-5)
    assert (grad.cpu().double() - expected).abs().max() <= ABSOLUTE[dtype] * float(coef.max())


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_keep_ignores_what_is_infinite_where_it_is_0(runner: Runner) -> None:
    logits, teacher, forget, coef = make(3, 10, device=runner.device)
    coef = torch.full_like(coef, 0.5)
    teacher[0, 0] = -torch.inf
    keep = torch.tensor([0.0, 1.0, 1.0], device=runner.device)
    loss, grad = ops.masked_cross_entropy_and_grad(
        logits, teacher, forget, coef, keep=keep, backend=runner.backend
    )
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    logits, *rest = make(5, 6, dtype)
    for sample in (logits, logits.clone().requires_grad_()):
        op = torch.ops.zsu_fast.masked_cross_entropy.default
        torch.library.opcheck(op, (sample, *rest))
        index, keep = torch.tensor([1, 1, 0, 2, 4]), torch.rand(5)
        torch.library.opcheck(op, (sample, *rest, index, keep, 0.5, True))


def test_shapes_are_checked() -> None:
    logits, teacher, forget, coef = make(4, 5)
    for bad in (
        (logits, teacher[:, :3], forget, coef),
        (logits, teacher, forget[:3], coef),
        (logits, teacher, forget.int(), coef),
        (logits, teacher, forget, coef[:2]),
        (logits, teacher[:2], forget, coef),
    ):
        with pytest.raises(RuntimeError):
            ops.masked_cross_entropy(*bad, backend="cpp")
    for options in (
        {"index": torch.zeros(3).long()},
        {"index": torch.zeros(4)},
        {"keep": torch.zeros(3)},
        {"keep": torch.zeros(4).long()},
    ):
        with pytest.raises(RuntimeError):
            ops.masked_cross_entropy(logits, teacher, forget, coef, backend="cpp", **options)
