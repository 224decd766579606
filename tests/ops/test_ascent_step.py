"""`ascent_step_` on every backend, against float64."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from runners import Runner, runners
from torch import Tensor

from zsu_fast import ops
from zsu_fast.ops import reference

CHANNELS_LAST = torch.channels_last


@dataclass
class State:
    """The tensors of a step, in the order of `ascent_step_`."""

    x: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    active: Tensor
    low: Tensor
    high: Tensor
    lr: Tensor
    beta: Tensor

    def clone(self) -> State:
        return State(*(getattr(self, f.name).clone() for f in fields(self)))

    def tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]

    def double(self) -> State:
        return State(
            *(
                t.cpu().double() if t.dtype == torch.float32 else t.cpu().clone()
                for t in self.tensors()
            )
        )


def make(shape: tuple[int, ...], device: str = "cpu") -> State:
    """Returns a state in the middle of a run: rows at different steps, the second inactive."""
    n = shape[0]
    channels = (1, shape[1], *[1] * (len(shape) - 2)) if len(shape) > 1 else (1,)
    active = torch.ones(n, dtype=torch.bool)
    active[1::5] = False
    state = State(
        x=torch.randn(shape),
        grad=torch.randn(shape) * 10 ** torch.randn(shape),
        exp_avg=0.1 * torch.randn(shape),
        exp_avg_sq=torch.rand(shape),
        step=torch.arange(n, dtype=torch.int32) % 7,
        active=active,
        low=-2 - torch.rand(channels),
        high=2 + torch.rand(channels),
        lr=torch.tensor(0.05),
        beta=torch.tensor(0.01),
    )
    return State(*(t.to(device) for t in state.tensors()))


def run(runner: Runner, state: State) -> State:
    after = state.clone()
    ops.ascent_step_(*after.tensors(), backend=runner.backend)
    return after


def truth(state: State) -> State:
    after = state.double()
    reference.ascent_step_(*after.tensors())
    return after


def check(after: State, expected: State, atol: float = 2e-6) -> None:
    for name in ("x", "exp_avg", "exp_avg_sq"):
        got = getattr(after, name).cpu().double()
        torch.testing.assert_close(got, getattr(expected, name), rtol=2e-6, atol=atol, msg=name)
    assert torch.equal(after.step.cpu(), expected.step)


SHAPES = [
    (5, 3, 32, 32),
    (3, 3, 7, 5),
    (4, 1, 28, 28),
    (7, 10),
    (5, 33),
    (1, 3, 4, 4),
    (6,),
    (2, 17, 3),
]


@pytest.mark.parametrize("runner", runners(compiled=False))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(runner: Runner, shape: tuple[int, ...]) -> None:
    state = make(shape, runner.device)
    after = run(runner, state)
    check(after, truth(state))
    low, high = state.low.cpu(), state.high.cpu()
    moved = after.x.cpu()[state.active.cpu()]
    assert ((moved >= low) & (moved <= high)).all()


def test_compiled() -> None:
    state = make((5, 3, 8, 8))
    check(run(Runner("compile", "cpu"), state), truth(state))


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_first_step_from_zero(runner: Runner) -> None:
    """Adam's first step is lr * sign(g): it shows bias corrections 1 - b^1 that lose digits."""
    state = make((4, 3, 8, 8), runner.device)
    zeros = torch.zeros_like(state.x)
    state = replace(
        state, exp_avg=zeros.clone(), exp_avg_sq=zeros.clone(), step=torch.zeros_like(state.step)
    )
    check(run(runner, state), truth(state), atol=3e-7)


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_long_runs_do_not_drift(runner: Runner) -> None:
    state = make((3, 3, 8, 8), runner.device)
    expected = state.double()
    for seed in range(30):
        grad = torch.randn(state.x.shape, generator=torch.Generator().manual_seed(seed))
        state.grad.copy_(grad)
        expected.grad.copy_(grad)
        ops.ascent_step_(*state.tensors(), backend=runner.backend)
        reference.ascent_step_(*expected.tensors())
    check(state, expected, atol=1e-5)


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_inactive_rows_keep_every_bit(runner: Runner) -> None:
    state = make((11, 3, 5, 7), runner.device)
    state.grad[1] = torch.nan
    state.x[1] = 100.0  # outside the bounds: not even clamped
    after = run(runner, state)
    still = ~state.active
    for name in ("x", "exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(getattr(after, name)[still], getattr(state, name)[still])
    assert not torch.equal(after.x[~still], state.x[~still])
    nobody = run(runner, replace(state, active=torch.zeros_like(state.active)))
    assert torch.equal(nobody.x, state.x)
    assert torch.equal(nobody.step, state.step)


@pytest.mark.parametrize("runner", runners(compiled=False))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_is_not_clamped(runner: Runner, value: float) -> None:
    state = make((5, 3, 7, 5), runner.device)
    state.grad[2, 1, 3, 2] = value
    after = run(runner, state)
    assert after.x[2, 1, 3, 2].isnan()
    assert int((~after.x.isfinite()).sum()) <= 1


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_channels_last_is_the_same_step(runner: Runner) -> None:
    for shape in ((5, 3, 6, 7), (3, 16, 5, 5), (3, 5, 1, 9)):
        state = make(shape, runner.device)
        expected = run(runner, state)
        dense = state.clone()
        for name in ("x", "grad", "exp_avg", "exp_avg_sq"):
            setattr(dense, name, getattr(dense, name).contiguous(memory_format=CHANNELS_LAST))
        address = dense.x.data_ptr()
        ops.ascent_step_(*dense.tensors(), backend=runner.backend)
        assert dense.x.data_ptr() == address
        for name in ("x", "exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(
                getattr(dense, name), getattr(expected, name), rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_any_layout(runner: Runner) -> None:
    state = make((5, 3, 6, 7), runner.device)
    expected = run(runner, state)
    wide = torch.zeros(5, 3, 6, 20, device=runner.device)
    layouts = {
        "sliced": lambda t: wide.clone()[..., 4:11].copy_(t),
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "channels last": lambda t: t.contiguous(memory_format=CHANNELS_LAST),
    }
    for name, layout in layouts.items():
        for changed in (
            ("x",),
            ("grad",),
            ("exp_avg", "exp_avg_sq"),
            ("x", "grad", "exp_avg", "exp_avg_sq"),
        ):
            other = state.clone()
            for field in changed:
                setattr(other, field, layout(getattr(other, field)))
            ops.ascent_step_(*other.tensors(), backend=runner.backend)
            for field in ("x", "exp_avg", "exp_avg_sq", "step"):
                torch.testing.assert_close(
                    getattr(other, field), getattr(expected, field), rtol=1e-6, atol=1e-6, msg=name
                )
    other = replace(state.clone(), grad=torch.ones((), device=runner.device).expand(5, 3, 6, 7))
    same = replace(state, grad=torch.ones(5, 3, 6, 7, device=runner.device))
    ops.ascent_step_(*other.tensors(), backend=runner.backend)
    assert torch.equal(other.x, run(runner, same).x)


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_scalar_bounds_and_one_lr_per_row(runner: Runner) -> None:
    state = make((5, 3, 6, 7), runner.device)
    state = replace(
        state,
        low=torch.tensor(-1.0, device=runner.device),
        lr=torch.rand(5, 1, 1, 1, device=runner.device),
    )
    check(run(runner, state), truth(replace(state, low=state.low.view(1, 1, 1, 1))), atol=1e-5)


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_bounds_that_only_eager_takes(runner: Runner) -> None:
    state = make((5, 3, 6, 7), runner.device)
    state = replace(state, low=-torch.rand(1, 1, 6, 7, device=runner.device))
    if runner.backend == "eager":
        check(run(runner, state), truth(state))
    else:
        with pytest.raises(ops.BackendUnavailable, match="per channel"):
            run(runner, state)
        automatic = state.clone()
        ops.ascent_step_(*automatic.tensors())
        check(automatic, truth(state))


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_twice_the_same_bits_on_any_number_of_threads(runner: Runner) -> None:
    state = make((16, 3, 32, 32) if runner.backend != "triton" else (3, 3, 8, 8), runner.device)
    first = run(runner, state)
    torch.set_num_threads(2)
    again = run(runner, state)
    if runner.backend == "eager":
        torch.testing.assert_close(again.x, first.x)
    else:
        assert all(map(torch.equal, again.tensors(), first.tensors()))


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_empty_batch(runner: Runner) -> None:
    state = make((0, 3, 4, 4), runner.device)
    assert run(runner, state).x.shape == (0, 3, 4, 4)


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_autograd_notices(runner: Runner) -> None:
    state = make((3, 3, 4, 4), runner.device)
    weight = torch.ones(1, device=runner.device, requires_grad=True)
    out = (weight * state.x).sum()  # saves x
    ops.ascent_step_(*state.tensors(), backend=runner.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("runner", runners(compiled=False))
def test_a_leaf_that_requires_grad_stays_a_leaf(runner: Runner) -> None:
    state = make((3, 3, 4, 4), runner.device)
    expected = run(runner, state).x
    state.x.requires_grad_()
    ops.ascent_step_(*state.tensors(), backend=runner.backend)
    assert state.x.is_leaf
    assert state.x.requires_grad
    assert torch.equal(state.x, expected)


def test_in_inference_mode() -> None:
    outside = make((3, 3, 4, 4))
    expected = run(Runner("cpp", "cpu"), outside).x
    with torch.inference_mode():
        for state in (outside.clone(), make((3, 3, 4, 4))):
            ops.ascent_step_(*state.tensors())
        ops.ascent_step_(*outside.tensors())
    assert torch.equal(outside.x, expected)


def test_inside_torch_compile() -> None:
    state = make((3, 3, 4, 4))
    expected = run(Runner("cpp", "cpu"), state)

    def twice(tensors: list[Tensor]) -> Tensor:
        ops.ascent_step_(*tensors)
        return tensors[0] * 2

    compiled = torch.compile(twice, fullgraph=True)
    doubled = compiled(state.tensors())
    torch.testing.assert_close(state.x, expected.x)
    torch.testing.assert_close(state.step, expected.step)
    torch.testing.assert_close(doubled, expected.x * 2)


def test_opcheck() -> None:
    state = make((3, 3, 4, 4))
    state = replace(state, low=state.low.view(-1), high=state.high.view(-1), lr=state.lr.view(1))
    op = torch.ops.zsu_fast.ascent_step_.default
    torch.library.opcheck(op, tuple(state.tensors()))


def test_arguments_are_checked() -> None:
    good = make((3, 3, 4, 4))
    for bad in (
        replace(good, grad=good.grad[:2]),
        replace(good, exp_avg=good.exp_avg.double()),
        replace(good, step=good.step.long()),
        replace(good, active=good.active.int()),
        replace(good, beta=torch.ones(2)),
    ):
        with pytest.raises(RuntimeError):
            run(Runner("cpp", "cpu"), bad)
