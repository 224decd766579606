"""Every backend refuses the same bad inputs, by RuntimeError, and leaves its arguments alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from runners import Runner, runners
from torch import Tensor

from zsu_fast import ops
from zsu_fast.ops import backends
from zsu_fast.ops.scale_rows import scale_rows_

ROWS, CLASSES = 4, 6
Args = dict[str, Any]


def signed(device: str) -> Args:
    return {
        "logits": torch.randn(ROWS, CLASSES, device=device),
        "target": torch.arange(ROWS, device=device),
        "coef": torch.tensor([-0.5, 0.5, 0.25, 0.25], device=device),
    }


def masked(device: str) -> Args:
    given = signed(device)
    return {
        "logits": given["logits"],
        "teacher": torch.randn(ROWS, CLASSES, device=device),
        "forget": torch.arange(CLASSES, device=device) < 2,
        "coef": given["coef"],
    }


def scale(device: str) -> Args:
    given = signed(device)
    return {"rows": given["logits"], "coef": given["coef"], "grad": torch.ones(2, device=device)}


def step(device: str) -> Args:
    x, grad = (torch.randn(ROWS, 3, 4, 4, device=device) for _ in range(2))
    return {
        "x": x, "grad": grad, "exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.zeros_like(x),
        "step": torch.zeros(ROWS, dtype=torch.int32, device=device),
        "active": torch.ones(ROWS, dtype=torch.bool, device=device),
        "low": torch.full((1, 3, 1, 1), -2.0, device=device),
        "high": torch.full((1, 3, 1, 1), 2.0, device=device),
        "lr": torch.tensor(0.1, device=device), "beta": torch.tensor(0.01, device=device),
    }  # fmt: skip


OPS: dict[str, tuple[Callable[..., Any], Callable[[str], Args]]] = {
    "signed": (ops.signed_cross_entropy, signed),
    "signed and grad": (ops.signed_cross_entropy_and_grad, signed),
    "masked": (ops.masked_cross_entropy, masked),
    "masked and grad": (ops.masked_cross_entropy_and_grad, masked),
    "scale": (scale_rows_, scale),
    "step": (ops.ascent_step_, step),
}
short = lambda t: t[:-1]  # noqa: E731
longer = lambda t: torch.cat([t, t[:1]])  # noqa: E731
integers = lambda t: t.int()  # noqa: E731
column = lambda t: t[:, None]  # noqa: E731
# op, argument, what is done to it
BAD: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
    *((op, "logits", change) for op in ("signed", "masked", "masked and grad")
      for change in (integers, column, lambda t: t[0], lambda t: t[:, :0], lambda t: t.bool())),
    *((op, "target", change) for op in ("signed", "signed and grad")
      for change in (short, longer, column, lambda t: t.float(), lambda t: t.to(torch.int8))),
    *((op, "coef", change) for op in ("signed", "signed and grad", "masked", "masked and grad")
      for change in (short, longer, column, integers)),
    *(("masked", "teacher", change)
      for change in (short, integers, lambda t: t[:, :-1], lambda t: t[0], lambda t: t[:, :1])),
    *(("masked", "forget", change) for change in (short, longer, column, integers)),
    *(("scale", "coef", change) for change in (short, longer, column)),
    *(("scale", "grad", change) for change in (longer, lambda t: t.double(), integers)),
    *(("scale", "rows", change)
      for change in (integers, lambda t: t[0], lambda t: t.t().contiguous().t())),
    *(("step", name, change) for name in ("grad", "exp_avg", "exp_avg_sq")
      for change in (short, lambda t: t.double(), lambda t: t[:, :-1], lambda t: t[0])),
    ("step", "x", lambda t: t.double()),
    ("step", "x", lambda t: t[0, 0, 0, 0]),
    *(("step", "step", change)
      for change in (short, longer, lambda t: t.long(), lambda t: t.float())),
    *(("step", "active", change) for change in (short, longer, integers)),
    *(("step", name, change) for name in ("low", "high")
      for change in (lambda t: t[:, :2], lambda t: t[:, :0], lambda t: t.double())),
    *(("step", "lr", change)
      for change in (lambda t: t.expand(2), lambda t: t[None][:0], lambda t: t.double())),
    *(("step", "beta", change) for change in (lambda t: t.expand(2), lambda t: t.double())),
]  # fmt: skip


@pytest.mark.parametrize("runner", runners())
@pytest.mark.parametrize(
    ("op", "argument", "change"), BAD, ids=[f"{op}-{arg}-{i}" for i, (op, arg, _) in enumerate(BAD)]
)
def test_bad_input_is_refused(
    runner: Runner, op: str, argument: str, change: Callable[[Tensor], Tensor]
) -> None:
    function, good = OPS[op]
    args = good(runner.device)
    args[argument] = change(args[argument])
    before = {name: t.clone() for name, t in args.items()}
    with pytest.raises(RuntimeError):
        function(**args, backend=runner.backend)
    assert all(torch.equal(t, before[name]) for name, t in args.items())


@pytest.mark.parametrize("runner", runners())
@pytest.mark.parametrize("op", OPS)
def test_the_good_inputs_are_not(runner: Runner, op: str) -> None:
    function, good = OPS[op]
    function(**good(runner.device), backend=runner.backend)


@pytest.mark.parametrize("runner", runners())
@pytest.mark.parametrize("op", OPS)
def test_tensors_of_another_device_are_refused(runner: Runner, op: str) -> None:
    function, good = OPS[op]
    for name in list(good("cpu"))[1:]:
        args = good(runner.device)
        args[name] = args[name].to("meta")
        with pytest.raises((RuntimeError, NotImplementedError)):
            function(**args, backend=runner.backend)


@pytest.mark.parametrize("runner", runners())
@pytest.mark.parametrize("shape", [(0, 0), (0, CLASSES)], ids=str)
def test_no_rows_give_no_loss(runner: Runner, shape: tuple[int, int]) -> None:
    device = runner.device
    logits, coef = torch.zeros(shape, device=device), torch.zeros(0, device=device)
    forget = torch.zeros(shape[1], dtype=torch.bool, device=device)
    target = torch.zeros(0, dtype=torch.int64, device=device)
    losses, grad = ops.signed_cross_entropy_and_grad(logits, target, coef, backend=runner.backend)
    assert losses.tolist() == [0, 0]
    assert grad.shape == shape
    loss, grad = ops.masked_cross_entropy_and_grad(
        logits, logits, forget, coef, backend=runner.backend
    )
    assert loss.item() == 0
    assert grad.shape == shape


@pytest.mark.parametrize("runner", runners())
@pytest.mark.parametrize("shape", [(ROWS, 0, 4, 4), (ROWS, 3, 0, 4), (0, 3, 4, 4)], ids=str)
def test_empty_rows_count_their_steps(runner: Runner, shape: tuple[int, ...]) -> None:
    """Without channels there are no bounds; one backend divided by their number."""
    args = step(runner.device)
    for name in ("x", "grad", "exp_avg", "exp_avg_sq"):
        args[name] = torch.zeros(shape, device=runner.device)
    for name in ("low", "high"):
        args[name] = args[name][:, : shape[1]]
    for name in ("step", "active"):
        args[name] = args[name][: shape[0]]
    ops.ascent_step_(**args, backend=runner.backend)
    assert args["step"].tolist() == [1] * shape[0]


def test_more_rows_than_a_grid_has_in_its_second_dimension() -> None:
    """65,536 rows; needs Triton's interpreter, or a GPU."""
    rows = 65_536 + 3
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if why := backends.why_unavailable("triton", device):
        pytest.skip(why)
    from zsu_fast.ops.triton.ascent_step import ascent_step_kernel

    grids: list[Any] = []
    x = torch.zeros(rows, 1, device=device)
    args = step(device) | {
        "x": x, "grad": torch.ones_like(x), "exp_avg": torch.zeros_like(x),
        "exp_avg_sq": torch.zeros_like(x),
        "step": torch.zeros(rows, dtype=torch.int32, device=device),
        "active": torch.ones(rows, dtype=torch.bool, device=device),
        "low": torch.tensor(-2.0, device=device), "high": torch.tensor(2.0, device=device),
    }  # fmt: skip
    if device == "cuda":
        ops.ascent_step_(**args, backend="triton")
        assert (args["x"] > 0).all()
        return
    with pytest.MonkeyPatch.context() as patch:  # the interpreter would take minutes
        module = __import__("zsu_fast.ops.triton.ascent_step", fromlist=["wrap_triton"])
        launcher = type("Launcher", (), {"__getitem__": lambda _self, grid: (
            lambda *_a, **_k: grids.append(grid))})  # fmt: skip
        patch.setattr(module, "wrap_triton", lambda _kernel: launcher())
        ops.ascent_step_(**args, backend="triton")
    ((first, *others),) = grids
    assert first >= rows
    assert all(size <= 65_535 for size in others)
    assert ascent_step_kernel is not None
