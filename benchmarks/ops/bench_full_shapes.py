"""ResNet50 and AlexNet at full shapes (224 pixels, 1,000 classes), random weights: the two loops.

    pytest benchmarks/ops/bench_full_shapes.py

*Ascent step*: a batch of 8 images, seconds an image: forward, gradient of the class logit with
respect to the image, one Adam step with clamp. `eager` is fp32, contiguous, autograd with respect
to the images alone, Adam in plain torch ops. `ours` is what `synthesize` runs: the copy by
`inference_copy` and the op `ascent_step_`.

*Tail epoch*: the last layer (2048 or 4096 to 1,000) over 25,000 rows of features, what the
published run had (25 impressions of each of 1,000 classes), forward, loss, gradient, AdamW. Timed
on 1,024 rows (GPU: 5,120) and scaled to 25,000. `eager, batch 16` takes the published batch,
`eager` the batch of 512 that `unlearn` takes, both with autograd and AdamW in plain torch ops.
`ours, all logits` is the loop's own stepper at the same work; `ours` is what `unlearn` runs by
default: only the 100 forgotten classes' logits move, so that only these are computed. The published
ResNet50 run took 1.85 s an epoch (30:47 for 1,000) on a GPU that it does not name. The *floor* is
the two matrix products of an epoch over all classes, fp32, nothing else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import DEVICE, Contender, Table, compare
from zsu_fast import ops
from zsu_fast.models.input_spec import IMAGENET_MEAN, IMAGENET_STD, InputSpec
from zsu_fast.models.wrapper import working_copy
from zsu_fast.synthesis.inference_copy import inference_copy
from zsu_fast.training.class_subset import ClassSubsetTail
from zsu_fast.training.features import FeatureSet
from zsu_fast.training.fit_task import FitTask
from zsu_fast.training.losses import ForgetOnlyKL, MaskedKL
from zsu_fast.training.teacher import Teacher, build_feature_set
from zsu_fast.training.train_step import EagerTrainStep, make_train_step

SPEC = InputSpec((3, 224, 224), IMAGENET_MEAN, IMAGENET_STD)
IMAGES = 8 if DEVICE == "cpu" else 128
ROWS, EPOCH_ROWS, BATCH = 1_024 if DEVICE == "cpu" else 5_120, 25_000, 512
PUBLISHED = 1.85  # seconds an epoch of ResNet50's tail
LR, B1, B2, EPS = 0.05, 0.9, 0.999, 1e-8


def build(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    return models.get_model(name).to(DEVICE).eval()


def adam_(x: Tensor, g: Tensor, moment: Tensor, variance: Tensor, step: int, lr: float) -> None:
    """One Adam step in plain torch ops, in place."""
    moment.mul_(B1).add_(g, alpha=1 - B1)
    variance.mul_(B2).addcmul_(g, g, value=1 - B2)
    root = (variance / (1 - B2**step)).sqrt_().add_(EPS)
    x.sub_((moment / (1 - B1**step)).div_(root), alpha=lr)


@pytest.mark.parametrize("name", ["resnet50", "alexnet"])
def test_ascent_step(table: Table, name: str) -> None:
    work = working_copy(build(name), torch.device(DEVICE))
    low, high = (b.view(3, 1, 1).to(DEVICE) for b in (SPEC.low, SPEC.high))
    start = low + (high - low) * torch.rand(IMAGES, *SPEC.shape, device=DEVICE)
    label = torch.arange(IMAGES, device=DEVICE)
    model = inference_copy(work, start[:2])
    state = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]

    def eager() -> Tensor:
        x = state[0].requires_grad_(True)
        logits = work(x)
        (g,) = torch.autograd.grad(logits.gather(1, label[:, None]).sum(), x)
        with torch.no_grad():
            adam_(x, 2e-4 * x - g, state[1], state[2], 5, LR)
            x.clamp_(low, high)
        return logits.detach().softmax(1)

    zeros = torch.zeros_like(start)
    mine = [model.layout(t).clone() for t in (start, zeros, zeros)]
    step = torch.full((IMAGES,), 5, dtype=torch.int32, device=DEVICE)
    active = torch.ones(IMAGES, dtype=torch.bool, device=DEVICE)
    lr, beta = torch.tensor(LR, device=DEVICE), torch.tensor(1e-4, device=DEVICE)

    def ours() -> Tensor:
        x = mine[0].detach().requires_grad_(True)
        logits = model(x)
        (g,) = torch.autograd.grad(logits.gather(1, label[:, None]).sum(), x)
        ops.ascent_step_(mine[0], g, mine[1], mine[2], step, active, low, high, lr, beta)
        return logits.detach().softmax(1)

    def climbs(_: Any) -> None:
        """Both fast_model: the class is likelier than at the start, for the model itself."""
        with torch.no_grad():
            before = work(start).gather(1, label[:, None]).mean()
            for images in (state[0], mine[0]):
                assert work(images).gather(1, label[:, None]).mean() > before

    at = len(table.rows)
    contenders = [Contender("eager", eager), Contender("ours", ours, verify=climbs)]
    case = f"{name}, ascent step, an image"
    medians = compare(table, case, contenders, rounds=5, budget=0, capture=False)
    scale(table, at, 1 / IMAGES)
    layout = "channels-last" if model.channels_last else "contiguous"
    table.notes.append(
        f"{name}, ascent step: {medians['eager'] / medians['ours']:.2f}x eager (bar 2x); ours ran "
        f"in {model.dtype}, {layout}, batch norms {'folded' if model.folded else 'as they are'}."
    )


@pytest.mark.parametrize(("name", "width"), [("resnet50", 2048), ("alexnet", 4096)])
def test_tail_epoch(table: Table, name: str, width: int) -> None:
    torch.manual_seed(0)
    features = torch.rand(ROWS, width, device=DEVICE)
    forget = torch.zeros(1000, dtype=torch.bool, device=DEVICE)
    forget[:100] = True
    layers = {
        key: nn.Linear(width, 1000, device=DEVICE) for key in ("eager 16", "eager", "all", "ours")
    }
    with torch.no_grad():
        teacher = layers["all"](features)
    wanted = teacher.masked_fill(forget, -torch.inf).softmax(1)
    label = teacher.argmax(1)
    rows = FeatureSet((features,), teacher, label, forget[label])

    def eager(key: str, batch: int) -> Any:
        layer = layers[key]
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in layer.parameters()]

        def epoch() -> None:
            for index in torch.randperm(ROWS, device=DEVICE).split(batch):
                log_p = layer(features[index]).log_softmax(1)
                loss = F.kl_div(log_p, wanted[index], reduction="batchmean")
                grads = torch.autograd.grad(loss, list(layer.parameters()))
                with torch.no_grad():
                    for p, g, (m, v) in zip(layer.parameters(), grads, moments, strict=True):
                        adam_(p, g, m, v, 5, 1e-4)

        return epoch

    tail = layers["all"]
    draw, loss = torch.Generator().manual_seed(0), MaskedKL(forget, 0.0)
    task = FitTask(tail, list(tail.parameters()), rows, rows, loss, loss, draw)
    every = make_train_step("auto", task)
    names = ["weight", "bias"]
    subset_rows = build_feature_set(
        Teacher(layers["ours"], forget, names), (features,), label, 0, draw
    )
    subset = ClassSubsetTail(layers["ours"], names, forget.nonzero()[:, 0], trainable=True)
    loss = ForgetOnlyKL(forget, 0.0)
    task = FitTask(subset, list(subset.parameters()), subset_rows, subset_rows, loss, loss, draw)
    some = make_train_step("auto", task)

    def ours(stepper: EagerTrainStep) -> Any:
        def epoch() -> None:
            index = torch.randperm(ROWS).view(-1, BATCH)
            stepper.run(index, [1e-4] * len(index))

        return epoch

    out, weight = torch.empty(BATCH, 1000, device=DEVICE), layers["eager"].weight.detach().clone()
    grad = torch.empty_like(weight)
    parts = features.split(BATCH)

    def floor() -> None:
        for part in parts:
            torch.mm(part, weight.t(), out=out)
            torch.mm(out.t(), part, out=grad)

    at = len(table.rows)
    medians = compare(
        table,
        f"{name}, tail epoch of {EPOCH_ROWS:,} rows",
        [
            Contender("eager", eager("eager", BATCH)),
            Contender("eager, batch 16", eager("eager 16", 16)),
            Contender("ours, all logits", ours(every)),
            Contender("ours", ours(some)),
            Contender("floor: 2 products a step", floor),
        ],
        floor="floor: 2 products a step",
        rounds=5,
        budget=0,
        capture=False,
    )
    scale(table, at, EPOCH_ROWS / ROWS)
    epoch = medians["ours"] * EPOCH_ROWS / ROWS
    flops = 2 * 2 * EPOCH_ROWS * width * 1000
    peak = flops / (medians["floor: 2 products a step"] * EPOCH_ROWS / ROWS)
    note = (
        f"{name}, tail epoch: ours {epoch:.3f} s; {medians['eager'] / medians['ours']:.1f}x eager "
        f"at the same batch ({medians['eager'] / medians['ours, all logits']:.2f}x with all "
        f"logits), {medians['eager, batch 16'] / medians['ours']:.0f}x at the published batch of "
        f"16 (bar 2x). The two products over all classes are {flops / 1e9:.0f} GFLOP, "
        f"{peak / 1e9:.0f} GFLOP/s here."
    )
    if name == "resnet50":
        note += (
            f" Published, on a GPU: {PUBLISHED} s, that is {PUBLISHED / epoch:.2f}x ours (bar 50x)."
        )
    table.notes.append(note)


def scale(table: Table, first: int, factor: float) -> None:
    """Times of the rows from ``first`` on: from seconds a call to seconds a unit of work."""
    for row in table.rows[first:]:
        row.median, row.low, row.high = (t * factor for t in (row.median, row.low, row.high))
