"""Run every CUDA C++ kernel once on small, awkward inputs: what compute-sanitizer watches.

compute-sanitizer python benchmarks/touch_every_kernel.py
python benchmarks/touch_every_kernel.py --device cpu    # the same calls on the C++ kernels
"""

from __future__ import annotations

import argparse

import torch

from zsu_fast import ops


def main(device: str) -> None:
    """Odd sizes and offsets, every type, both row widths."""
    backend = "cuda" if device == "cuda" else "cpp"
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for rows, classes in ((3, 1), (5, 10), (7, 1001), (3, 1000), (2, 4097)):
            storage = torch.randn(rows, classes + 3, device=device).to(dtype)
            logits = storage[:, 1 : classes + 1]  # rows that start off 16 bytes
            teacher = torch.randn(rows, classes, device=device).to(dtype)
            target = torch.randint(classes, (rows,), device=device)
            coef = torch.randn(rows, device=device)
            coef[0] = 0
            forget = torch.arange(classes, device=device) % 3 == 1
            leaf = logits.detach().requires_grad_()
            losses = ops.signed_cross_entropy(leaf, target, coef, backend=backend)
            (2 * losses.sum()).backward()
            ops.masked_cross_entropy(leaf, teacher, forget, coef, backend=backend).backward()
    for shape in ((3, 3, 32, 32), (2, 3, 7, 5), (4, 5), (3, 16, 5, 5)):
        for layout in (torch.contiguous_format, torch.channels_last):
            if layout == torch.channels_last and len(shape) != 4:
                continue
            tensors = [torch.randn(shape, device=device) for _ in range(4)]
            x, grad, exp_avg, exp_avg_sq = (t.contiguous(memory_format=layout) for t in tensors)
            exp_avg_sq.abs_()
            rows = shape[0]
            bounds = (1, shape[1], *[1] * (len(shape) - 2))
            ops.ascent_step_(
                x, grad, exp_avg, exp_avg_sq,
                torch.zeros(rows, dtype=torch.int32, device=device),
                torch.arange(rows, device=device) != 1,
                -torch.ones(bounds, device=device), torch.ones(bounds, device=device),
                torch.tensor(0.1, device=device), torch.tensor(0.01, device=device),
                backend=backend,
            )  # fmt: skip
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    main(parser.parse_args().device)
