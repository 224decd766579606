"""The losses are differentiable once, in their logits; what they can't do is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from runners import Runner, runners
from torch import Tensor
from torch.autograd import forward_ad

from zsu_fast import ops

LOSSES = ["signed", "masked"]
RUNNERS = runners(compiled=False)


def case(name: str, runner: Runner, coef: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A loss as a function of the logits [4, 5] alone, with one value."""
    device, backend = runner.device, runner.backend
    if coef is None:
        coef = torch.tensor([-1.0, 1.0, 0.0, 2.0], device=device)
    given = coef
    teacher = torch.linspace(-2, 2, 20, device=device).reshape(4, 5)
    forget = torch.arange(5, device=device) < 2
    if name == "masked":
        return lambda x: ops.masked_cross_entropy(x, teacher, forget, given, backend=backend)
    target = torch.arange(4, device=device)
    return lambda x: ops.signed_cross_entropy(x, target, given, backend=backend).sum()


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("factor", [1.0, -3.0])
def test_func_grad_is_the_gradient_of_autograd(runner: Runner, name: str, factor: float) -> None:
    loss = case(name, runner)
    x = torch.randn(4, 5, device=runner.device)
    leaf = x.clone().requires_grad_()
    (factor * loss(leaf)).backward()
    got = torch.func.grad(lambda x: factor * loss(x))(x)
    torch.testing.assert_close(got, leaf.grad)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_are_refused(runner: Runner, name: str) -> None:
    loss = case(name, runner)
    x = torch.randn(4, 5, device=runner.device)
    squared = lambda x: torch.func.grad(loss)(x).square().sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(squared)(x)
    leaf = x.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(leaf), leaf, create_graph=True)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own
def test_forward_mode_is_refused(runner: Runner, name: str) -> None:
    """A tangent would be lost in silence: the derivative would be None."""
    loss = case(name, runner)
    x = torch.randn(4, 5, device=runner.device)
    with pytest.raises(RuntimeError, match="no forward-mode"):
        torch.func.jvp(loss, (x,), (x,))
    with forward_ad.dual_level():
        loss(x)  # without a tangent
        with pytest.raises(RuntimeError, match="no forward-mode"):
            loss(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_coefficients_are_refused(runner: Runner, name: str) -> None:
    coef = torch.ones(4, device=runner.device, requires_grad=True)
    loss = case(name, runner, coef)
    for x in (
        torch.randn(4, 5, device=runner.device, requires_grad=grad) for grad in (True, False)
    ):
        with pytest.raises(RuntimeError, match="logits only"):
            loss(x)
        with torch.no_grad():
            loss(x)


def test_the_ops_of_torch_ops_refuse_the_same() -> None:
    x, target, coef = torch.randn(4, 5), torch.arange(4), torch.ones(4)
    op = torch.ops.zsu_fast.signed_cross_entropy
    with pytest.raises(RuntimeError, match="logits only"):
        op(x, target, coef.clone().requires_grad_())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode"):
        op(forward_ad.make_dual(x, x), target, coef)


@pytest.mark.parametrize("runner", RUNNERS)
def test_classes_far_below_a_low_maximum_keep_their_gradient(runner: Runner) -> None:
    """Where the largest logit is -16, a logit of -87 still has a share of e^-71."""
    x = torch.full((1, 256), -16.0, device=runner.device)
    x[0, 1] = -87.0
    target, coef = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    _, grad = ops.signed_cross_entropy_and_grad(
        x, target.to(x.device), coef.to(x.device), backend=runner.backend
    )
    exact = x.double().softmax(1)[0, 1].item()
    assert grad[0, 1].item() == pytest.approx(exact, rel=1e-5)
