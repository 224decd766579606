"""One image's step of the ascent, logits and input gradient, against plain PyTorch's best.

    python -m benchmarks.ops.bench_ascent_image_step                     # all models
    python -m benchmarks.ops.bench_ascent_image_step squeezenet1_0 --rounds 3

Eager is the model itself with frozen weights, channels-last or not, in batches of 4, 8 and 16, and
only the input's gradient. Ours are the copies that the ascent chooses among, with the memory kept
as in the ascent. The floor is the model's convolutions alone, forward and input gradient, in
float32: what the library needs whoever calls it. All take turns in one process; only the ratios
count on a busy machine. On one thread the clock is the process's CPU time, page faults included.
Writes ``cpu_image_step.md``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import RESULTS, machine
from benchmarks.real_data import load_model
from zsu_fast.models.input_spec import noise_images
from zsu_fast.models.prepare import prepare_model
from zsu_fast.runtime.allocator import keep_freed_memory
from zsu_fast.runtime.torch_settings import Precision
from zsu_fast.synthesis import candidates
from zsu_fast.synthesis.space import input_space
from zsu_fast.synthesis.synthesize import batch_rows

MODELS = ("tf_efficientnet_lite0", "squeezenet1_0", "resnet18", "resnet50", "resnet20_cifar")
BATCHES = (4, 8, 16)

Step = Callable[[], None]
_COLUMNS = (
    "| model | threads | precision | eager's best, batch: ms per image "
    "| convolutions alone, float32 | ours | convolutions, of eager | ours, of eager |"
)


def build(name: str) -> nn.Module:
    """A model with public weights; the torchvision ones have random weights, of the same speed."""
    if name in ("resnet18", "resnet50"):
        torch.manual_seed(0)
        model: nn.Module = getattr(torchvision.models, name)().eval()
        return model
    return load_model(name)


def step(model: Callable[[Tensor], Tensor], images: Tensor) -> Step:
    """Logits and their gradient to ``images``."""

    def run() -> None:
        x = images.detach().requires_grad_(True)
        torch.autograd.grad(model(x)[:, 0].sum(), x)

    return run


def padded(layer: nn.Conv2d, x: Tensor, output: Tensor) -> Tensor:
    """``x`` with the rows and columns that a layer which pads by itself adds (TensorFlow's)."""
    borders: list[int] = []
    for axis in (1, 0):
        size = (output.shape[2 + axis] - 1) * layer.stride[axis]
        size += layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        missing = max(0, size - x.shape[2 + axis] - 2 * int(layer.padding[axis]))
        borders += [missing // 2, missing - missing // 2]
    return F.pad(x, borders)


def convolutions(model: nn.Module, images: Tensor) -> Step:
    """The model's convolutions alone: their outputs, and the gradients of their inputs."""
    calls: list[tuple[nn.Conv2d, Tensor, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        calls.append((layer, padded(layer, args[0], output), torch.randn_like(output)))

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        with torch.no_grad():
            for layer, x, gradient in calls:
                nn.Conv2d.forward(layer, x)  # not a subclass's, which would pad again
                torch.ops.aten.convolution_backward(
                    gradient, x, layer.weight, None, layer.stride, layer.padding, layer.dilation,
                    False, [0, 0], layer.groups, [True, False, False],
                )  # fmt: skip

    return run


def contenders(name: str, precision: Precision) -> dict[str, tuple[Step, int, str]]:
    """Name -> a step, its batch, and whose it is: "eager", "floor" or "ours"."""
    prepared = prepare_model(build(name), None, None, None, None, None, None)
    found: dict[str, tuple[Step, int, str]] = {}
    for rows in BATCHES:
        images = noise_images(prepared.spec, rows)
        for layout in (torch.contiguous_format, torch.channels_last):
            model = copy.deepcopy(prepared.model).requires_grad_(False).to(memory_format=layout)
            laid_out, suffix = images.contiguous(memory_format=layout), f"{str(layout)[6:]}, {rows}"
            found[f"eager, {suffix}"] = step(model, laid_out), rows, "eager"
            found[f"convolutions alone, {suffix}"] = convolutions(model, laid_out), rows, "floor"
    space = input_space(prepared.model, prepared.spec, precision)
    default_rows = batch_rows(space)[1]
    for variant, make in candidates.variants(precision).items():
        ours = make(space)
        if ours is not None:
            for rows in sorted({*BATCHES, default_rows}):
                run = step(ours, ours.layout(noise_images(prepared.spec, rows)))
                label = f"{variant}, {rows}{' (default)' if rows == default_rows else ''}"
                found[label] = run, rows, "ours"
    return found


def measure(name: str, precision: Precision, rounds: int) -> list[str]:
    """Lines of the table: milliseconds per image, relative to eager's best."""
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {}
    runs = contenders(name, precision)
    for _ in range(rounds):
        for ours in (False, True):
            with keep_freed_memory() if ours else nullcontext():
                for label, (run, rows, whose) in runs.items():
                    if (whose == "ours") == ours:
                        run()
                        started = clock()
                        run()
                        times.setdefault(label, []).append((clock() - started) / rows)
    medians = {label: statistics.median(values) for label, values in times.items()}
    best = {
        whose: min((medians[label], label) for label in medians if runs[label][2] == whose)
        for whose in ("eager", "floor", "ours")
    }
    eager = best["eager"][0]
    cells = [f"{label}: {1e3 * value:.2f}" for value, label in best.values()]
    worst = max(medians[label] for label in medians if "(default)" in label) / eager
    ratios = [f"{best[whose][0] / eager:.2f}" for whose in ("floor", "ours")]
    chosen = f"{ratios[1]} (the batch of the ascent: at most {worst:.2f})"
    line = f"| {name} | {threads} | {precision} | {' | '.join(cells)} | {ratios[0]} | {chosen} |"
    print(*(f"  {label}: {1e3 * value:.2f}" for label, value in medians.items()), line, sep="\n")
    return [line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    clock = "CPU time of the process on one thread, elapsed time on more"
    known = {k: v for k, v in machine().items() if k != "threads"} | {"clock": clock}
    facts = ", ".join(f"{k}: {v}" for k, v in known.items())
    command = "Written by `python -m benchmarks.ops.bench_ascent_image_step`."
    lines = ["# Image-step of the ascent", "", command, "", f"{facts}.", "", _COLUMNS]
    lines.append("|---|---:|---|---|---|---|---:|---:|")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in options.models:
            for precision in ("float32", "auto"):
                lines += measure(name, precision, options.rounds)
    (RESULTS / "cpu_image_step.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
