"""`signed_cross_entropy` on every backend, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from runners import INTERPRETED, Runner, runners, same
from torch import Tensor

from zsu_fast import ops
from zsu_fast.ops import reference

CLASSES = [1, 2, 10, 1000, 1001, 32000]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# largest error of a gradient element, relative to the element
RELATIVE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.float16: 6e-4, torch.bfloat16: 4.1e-3}
APPROXIMATE = ("eager", "compile", "triton")  # these round logit - largest
if INTERPRETED:  # the interpreter truncates where the GPU rounds
    RELATIVE[torch.bfloat16] = 9e-3


def make(
    rows: int, classes: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits, targets and coefficients of both signs; every fourth row is ignored."""
    logits = (3 * torch.randn(rows, classes, dtype=torch.float64)).to(dtype)
    target = torch.randint(classes, (rows,))
    coef = torch.randn(rows) / max(rows, 1)
    coef[3::4] = 0
    target[3::4] = -100
    return logits.to(device), target.to(device), coef.to(device)


def and_grad(runner: Runner, logits: Tensor, target: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    """Returns losses and gradient, through the public function and autograd."""
    leaf = logits.detach().requires_grad_()
    losses = ops.signed_cross_entropy(leaf, target, coef, backend=runner.backend)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad


def truth(logits: Tensor, target: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    """Torch's cross-entropy and autograd in float64 on the CPU, independent of `reference`."""
    leaf = logits.detach().cpu().double().requires_grad_()
    coef = coef.cpu().double()
    used = (coef != 0).nonzero()[:, 0]
    terms = coef[used] * F.cross_entropy(leaf[used], target.cpu().long()[used], reduction="none")
    negative = coef[used] < 0
    losses = torch.stack([terms[negative].sum(), terms[~negative].sum()])
    if not len(used):
        return losses.detach(), torch.zeros_like(leaf)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad


def check(
    runner: Runner, logits: Tensor, target: Tensor, coef: Tensor, relative: float | None = None
) -> None:
    losses, grad = and_grad(runner, logits, target, coef)
    expected_losses, _ = truth(logits, target, coef)
    # torch's own gradient loses the target's digits as p -> 1 even in float64
    _, expected = reference.signed_cross_entropy(
        logits.cpu().double(), target.cpu(), coef.cpu().double()
    )
    relative = relative or RELATIVE[logits.dtype]
    tiny = 1e-4 if logits.dtype == torch.float16 else 1e-30
    assert losses.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert grad.dtype == logits.dtype
    torch.testing.assert_close(losses.cpu().double(), expected_losses, rtol=2e-6, atol=1e-6)
    error = (grad.cpu().double() - expected).abs()
    assert (error <= relative * expected.abs().clamp_min(tiny)).all(), (
        error / expected.abs()
    ).max()


@pytest.mark.parametrize("runner", runners(compiled=False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_against_float64(runner: Runner, classes: int, dtype: torch.dtype) -> None:
    relative = 8e-6 if runner.backend in APPROXIMATE and dtype == torch.float32 else None
    check(runner, *make(7 if classes > 1000 else 33, classes, dtype, runner.device), relative)


@pytest.mark.parametrize("runner", runners())
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_batch_sizes(runner: Runner, rows: int) -> None:
    check(runner, *make(rows, 10, device=runner.device), relative=8e-6)


@pytest.mark.parametrize("runner", runners(compiled=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(runner: Runner, dtype: torch.dtype) -> None:
    logits, target, coef = make(9, 37, dtype, runner.device)
    wide = torch.zeros(9, 50, dtype=dtype, device=runner.device)
    wide[:, 3:40] = logits
    layouts = {
        "row stride": wide[:, 3:40],
        "transposed": logits.t().contiguous().t(),
        "every second": logits.repeat_interleave(2, 1)[:, ::2],
        "one row for all": logits[:1].expand(9, 37),
        "one logit for all": logits[:, :1].expand(9, 37),
    }
    for layout in layouts.values():
        losses, grad = and_grad(runner, layout, target, coef)
        dense_losses, dense = and_grad(runner, layout.contiguous(), target, coef)
        same(runner, grad, dense)
        same(runner, losses, dense_losses)
    check(runner, layouts["row stride"], target, coef, 8e-6 if dtype == torch.float32 else None)


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_int32_targets_and_strided_targets(runner: Runner) -> None:
    logits, target, coef = make(12, 10, device=runner.device)
    expected = and_grad(runner, logits, target, coef)
    for other in (target.int(), target.repeat_interleave(2)[::2]):
        got = and_grad(runner, logits, other, coef.repeat_interleave(3)[::3])
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("runner", runners(compiled=False))
@pytest.mark.parametrize("gap", [5.0, 16.0, 28.0, 34.6])
def test_saturated_rows_keep_their_gradient(runner: Runner, gap: float) -> None:
    """p up to 1 - 1e-12 (and beyond): softmax - onehot would be exactly 0."""
    logits = torch.randn(6, 1000, device=runner.device)
    target = torch.arange(6, device=runner.device)
    logits[torch.arange(6), target] = gap + 7
    coef = torch.tensor([-0.9, 0.1, -1.0, 1.0, -2.0, 3.0], device=runner.device)
    check(runner, logits, target, coef, 8e-6 if runner.backend in APPROXIMATE else 2e-6)
    for row in range(6):  # each loss on its own keeps all its digits, even at 1e-12
        alone = torch.zeros_like(coef)
        alone[row] = coef[row]
        losses = ops.signed_cross_entropy(logits, target, alone, backend=runner.backend)
        exact = logits.cpu().double(), target.cpu(), alone.cpu().double()
        expected, _ = reference.signed_cross_entropy(
            *exact
        )  # torch's own has 16 digits of 1 + loss
        torch.testing.assert_close(losses.cpu().double(), expected, rtol=8e-6, atol=0)


@pytest.mark.parametrize("runner", runners(compiled=False))
@pytest.mark.parametrize("classes", [100, 1000])
@pytest.mark.parametrize("top", [0.0, 40.0, -40.0])
def test_wide_rows_keep_the_digits_of_small_gradients(
    runner: Runner, classes: int, top: float
) -> None:
    """Logits down to 60 below the largest: rounding x - max would cost 2e-6 and more."""
    logits = top - 60 * torch.rand(9, classes, device=runner.device)
    target = torch.arange(9, device=runner.device)
    coef = torch.ones(9, device=runner.device)
    check(runner, logits, target, coef, 1e-5 if runner.backend in APPROXIMATE else 8e-7)


@pytest.mark.parametrize("runner", runners(compiled=False))
@pytest.mark.parametrize("shift", [1e3, 1e6])
def test_common_shift_changes_nothing(runner: Runner, shift: float) -> None:
    base = torch.randint(-8, 8, (8, 100), device=runner.device).float()  # exact after the shift
    target = torch.randint(100, (8,), device=runner.device)
    coef = torch.randn(8, device=runner.device)
    losses, grad = and_grad(runner, base, target, coef)
    shifted_losses, shifted = and_grad(runner, base + shift, target, coef)
    torch.testing.assert_close(shifted_losses, losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(shifted, grad, rtol=2e-6, atol=0)


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_special_values(runner: Runner) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[0.0, -inf, 1.0], [-inf, -inf, 2.0], [nan, 0.0, 1.0], [1e4, -1e4, 0.0], [-inf, 0.0, 0.0]],
        device=runner.device,
    )
    target = torch.tensor([0, 2, 1, 1, 0], device=runner.device)
    coef = torch.tensor([1.0, -1.0, 0.0, -1.0, 0.0], device=runner.device)
    losses, grad = and_grad(runner, logits, target, coef)
    expected, dlogits = truth(logits.nan_to_num(nan=0, neginf=-1e30, posinf=inf), target, coef)
    torch.testing.assert_close(losses.cpu().double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.cpu().double(), dlogits, rtol=1e-6, atol=1e-7)
    coef[2] = 1.0  # a NaN that is used shows, in its own row only
    losses, grad = and_grad(runner, logits, target, coef)
    assert losses[1].isnan()
    assert not losses[0].isnan()
    assert grad[2].isnan().all()
    assert grad[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("runner", runners(compiled=False))
@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_target_out_of_range(runner: Runner, bad: int) -> None:
    logits, target, coef = make(6, 10, device=runner.device)
    target[1] = bad
    if runner.backend in ("cpp", "eager") and runner.device == "cpu":
        with pytest.raises(RuntimeError, match="out of range"):
            ops.signed_cross_entropy(logits, target, coef, backend=runner.backend)
    else:
        losses, grad = and_grad(runner, logits, target, coef)
        assert losses.isnan().any()
        assert grad[1].isnan().all()
        assert grad[[0, 2, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_twice_the_same_bits_on_any_number_of_threads(runner: Runner) -> None:
    args = make(257, 1001 if runner.backend != "triton" else 10, device=runner.device)
    first = and_grad(runner, *args)
    torch.set_num_threads(2)
    for again in (and_grad(runner, *args), and_grad(runner, *args)):
        if runner.backend in ("eager", "compile"):
            torch.testing.assert_close(again, first)
        else:
            assert torch.equal(again[0], first[0])
            assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_incoming_gradient(runner: Runner) -> None:
    logits, target, coef = make(9, 37, device=runner.device)
    _, unit = and_grad(runner, logits, target, coef)
    leaf = logits.clone().requires_grad_()
    losses = ops.signed_cross_entropy(leaf, target, coef, backend=runner.backend)
    weights = torch.tensor([2.0, -3.0], device=runner.device)
    factor = torch.where(coef < 0, weights[0], weights[1])[:, None]
    for _ in range(3):  # the graph is kept: a pass must not change what the next one reads
        (grad,) = torch.autograd.grad(losses, leaf, weights, retain_graph=True)
        torch.testing.assert_close(grad, unit * factor)
        grad.zero_()
    losses.sum().backward(retain_graph=True)
    losses.sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * unit)


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_logits_of_any_size_in_one_batch(runner: Runner) -> None:
    """Long rows are first tried without subtracting the largest logit, then with it if needed."""
    logits = torch.randn(9, 1003, device=runner.device)
    logits += torch.tensor([0, 100, 0, -50, -50, 1e4, 20, 0, 90.0], device=runner.device)[:, None]
    target = torch.arange(9, device=runner.device)
    target[::2] = logits[::2].argmax(1)
    coef = torch.randn(9, device=runner.device)
    check(runner, logits, target, coef, 8e-6 if runner.backend in APPROXIMATE else 2e-6)


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_unit_gradient_is_returned_without_a_copy(runner: Runner) -> None:
    logits, target, coef = make(9, 37, device=runner.device)
    leaf = logits.requires_grad_()
    losses = ops.signed_cross_entropy(leaf, target, coef, backend=runner.backend)
    saved = losses.grad_fn.saved_tensors[0].data_ptr()
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    assert grad.data_ptr() == saved


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_gradcheck(runner: Runner) -> None:
    logits, target, coef = make(5, 6, torch.float64, runner.device)
    coef = coef.double()
    torch.autograd.gradcheck(
        lambda x: ops.signed_cross_entropy(x, target, coef, backend=runner.backend),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    logits, target, coef = make(5, 6, dtype)
    for sample in (logits, logits.clone().requires_grad_()):
        torch.library.opcheck(
            torch.ops.zsu_fast.signed_cross_entropy.default, (sample, target, coef)
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad = torch.tensor([1.0, 2.0], dtype=wide)
    torch.library.opcheck(torch.ops.zsu_fast.scale_rows_.default, (logits, coef, grad))


def test_the_registered_op_differentiates_like_the_function() -> None:
    logits, target, coef = make(9, 37)
    expected = and_grad(Runner("cpp", "cpu"), logits, target, coef)
    leaf = logits.requires_grad_()
    losses, dlogits = torch.ops.zsu_fast.signed_cross_entropy(leaf, target, coef)
    assert not dlogits.requires_grad
    (grad,) = torch.autograd.grad(3 * losses.sum(), leaf)
    torch.testing.assert_close(grad, 3 * expected[1])


def test_inside_torch_compile() -> None:
    logits, target, coef = make(9, 37)
    weight = torch.randn(37, 37, requires_grad=True)

    def loss(weight: Tensor) -> Tensor:
        return 2 * ops.signed_cross_entropy(logits @ weight, target, coef).sum()

    (expected,) = torch.autograd.grad(loss(weight), weight)
    compiled = torch.compile(loss, fullgraph=True)
    for _ in range(2):
        (grad,) = torch.autograd.grad(compiled(weight), weight)
        torch.testing.assert_close(grad, expected)


def test_autocast_leaves_the_loss_in_float32() -> None:
    target, coef = torch.randint(10, (4,)), torch.ones(4)
    weight = torch.randn(8, 10, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.randn(4, 8) @ weight
        losses = ops.signed_cross_entropy(logits, target, coef)
    assert logits.dtype == torch.bfloat16
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_second_derivatives_are_refused() -> None:
    logits, target, coef = make(3, 5)
    leaf = logits.requires_grad_()
    losses = ops.signed_cross_entropy(leaf, target, coef)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(losses.sum(), leaf, create_graph=True)


def test_shapes_and_types_are_checked() -> None:
    logits, target, coef = make(4, 5)
    for bad in (
        (logits[0], target, coef),
        (logits, target[:3], coef),
        (logits, target, coef[:3]),
        (logits.int(), target, coef),
        (logits, target.float(), coef),
    ):
        with pytest.raises(RuntimeError):
            ops.signed_cross_entropy(*bad, backend="cpp")
