"""Run every CUDA C++ kernel once on small, awkward inputs, for compute-sanitizer to watch.

compute-sanitizer python -m benchmarks.tools.touch_every_kernel
python -m benchmarks.tools.touch_every_kernel --device cpu    # the same calls on the C++ kernels
"""

from __future__ import annotations

import argparse

import torch

from zsu_fast import ops


def run_losses(rows: int, classes: int, dtype: torch.dtype, device: str, backend: str) -> None:
    """Both losses with their backward pass, on rows aligned to 16 bytes and on others."""
    storage = torch.randn(rows, classes + 3, device=device).to(dtype)
    teacher = torch.randn(rows + 2, classes, device=device)
    index = torch.arange(rows, device=device) % 2
    target = torch.randint(classes, (rows,), device=device)
    coef = torch.randn(rows, device=device)
    coef[0] = 0
    forget = torch.arange(classes, device=device) % 3 == 1
    for logits in (storage[:, 1 : classes + 1], storage[:, :classes].contiguous()):
        leaf = logits.detach().requires_grad_()
        losses = ops.signed_cross_entropy(leaf, target, coef, backend=backend)
        (2 * losses.sum()).backward()
        for of_teacher in (dtype, torch.float32):
            z = teacher.to(of_teacher)
            ops.masked_cross_entropy(leaf, z[:rows], forget, coef, backend=backend).backward()
            for keep in (None, coef.abs()):
                ops.masked_cross_entropy(
                    leaf, z, forget, coef, index=index, keep=keep, shift=2.0, forget_only=True,
                    backend=backend,
                ).backward()  # fmt: skip


def run_step(
    shape: tuple[int, ...], layout: torch.memory_format, device: str, backend: str
) -> None:
    """An ascent step with bounds per channel and an inactive row."""
    tensors = [torch.randn(shape, device=device) for _ in range(4)]
    x, grad, exp_avg, exp_avg_sq = (t.contiguous(memory_format=layout) for t in tensors)
    exp_avg_sq.abs_()
    rows = shape[0]
    bounds = (1, shape[1], *[1] * (len(shape) - 2))
    ops.ascent_step_(
        x, grad, exp_avg, exp_avg_sq, torch.zeros(rows, dtype=torch.int32, device=device),
        torch.arange(rows, device=device) != 1,
        -torch.ones(bounds, device=device), torch.ones(bounds, device=device),
        torch.tensor(0.1, device=device), torch.tensor(0.01, device=device), backend=backend,
    )  # fmt: skip


def main(device: str) -> None:
    """Odd sizes and offsets, every dtype, and rows in and out of registers."""
    backend = "cuda" if device == "cuda" else "cpp"
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for rows, classes in (
            (3, 1), (5, 10), (7, 1001), (3, 1000), (2, 4097), (2, 4096), (2, 8209)
        ):  # fmt: skip
            run_losses(rows, classes, dtype, device, backend)
    for shape in ((3, 3, 32, 32), (2, 3, 7, 5), (4, 5), (3, 16, 5, 5)):
        for layout in (torch.contiguous_format, torch.channels_last):
            if layout == torch.contiguous_format or len(shape) == 4:
                run_step(shape, layout, device, backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    main(parser.parse_args().device)
