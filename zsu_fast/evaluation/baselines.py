"""Random embeddings, the baseline that synthesis has to beat: noise at the cut, no ascent.

After "Source-Free Class Unlearning via Synthetic Embeddings" (TMLR 2026): half-normal vectors stand
for what the head makes of images, labelled by the model itself. Objective, margin, loop and stop
are those of `unlearn`: what differs is where the rows come from. Scale matters: at the last layer
it is 1, as published (LeNet5: FA 4; as large as the features of noise images, FA 79).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..models.class_indices import check_forget
from ..models.infer_spec import resolve_spec
from ..models.input_spec import InputSpec, noise_images
from ..models.wrapper import LogitsModel, count_classes, resolve_device, working_copy
from ..runtime.progress import Reporter
from ..runtime.torch_defaults import torch_defaults
from ..splitting import split as tails
from ..splitting.split import Split
from ..training.features import FeatureSet, FeatureSettings
from ..training.fit_task import FitTask, trained_parameters
from ..training.loop import LoopSettings, train_tail
from ..training.losses import MaskedKL
from ..training.teacher import Teacher

# Rows to train on beside those for mixtures, and rows held out: as many as the default makes of ten
# classes. Fewer where a row is a whole feature map.
_IMPRESSIONS, _HELD_OUT = 240, 2128
_VALUES = 2**27


@torch_defaults()
def random_embeddings(
    model: nn.Module,
    forget: Any,
    *,
    tail: str | int = "last",
    seed: int = 0,
    device: str | torch.device | None = None,
) -> nn.Module:
    """A copy of ``model`` whose tail unlearned ``forget`` on noise at the cut, for comparison.

    A float32 copy in eval mode, of the module inside a wrapper.

    Args:
        model, forget, device: as for `unlearn`.
        tail: "last", the name of the module at which the tail starts, or a number of layers.
        seed: draws the noise.

    Raises:
        ArgumentError: as `unlearn` does; ``tail`` is "auto", which needs impressions.
    """
    if tail == "auto":
        raise ArgumentError(
            "tail",
            "got 'auto', which needs impressions",
            "Pass 'last', a module's name, or a number.",
        )
    spec, where = resolve_spec(model), resolve_device(model, device)
    work = working_copy(model, where)
    classes = count_classes(work, spec, where)
    gone = torch.zeros(classes, dtype=torch.bool, device=where)
    gone[check_forget(forget, classes)] = True
    probe = noise_images(spec, 4).to(where)
    cut = tails.find_split(work, tail, probe, torch.zeros(4, dtype=torch.int64, device=where))
    train_on_noise(work, cut, spec, gone, seed)
    return work.module


def train_on_noise(
    model: LogitsModel, cut: Split, spec: InputSpec, forget: Tensor, seed: int
) -> None:
    """Trains the tail of ``cut`` on random rows, in place.

    Args:
        model: the working copy that ``cut`` shares its parameters with.
        cut: its tail. Noise for a last layer is of unit scale, as published; that for deeper
            tails as large as what noise images give there.
        spec: of the images.
        forget: bool [C].
        seed: of the noise.
    """
    draw, device, classes = torch.Generator().manual_seed(seed), forget.device, len(forget)
    # one image tells the shapes, some more the scale
    seen = cut.features(noise_images(spec, 1 if cut.output_level else 32).to(device))
    scales = [1.0 if cut.output_level else float(f.square().mean().sqrt()) for f in seen]
    fit = max(1024, _VALUES // sum(f[0].numel() for f in seen))

    teacher, settings = Teacher(cut.tail, forget), FeatureSettings()

    def rows(wanted: int) -> FeatureSet:
        count = min(fit, wanted)
        embeddings = tuple(
            scale * torch.randn(count, *f.shape[1:], generator=draw).abs().to(device)
            for f, scale in zip(seen, scales, strict=True)
        )
        return teacher.label(embeddings)

    train = rows(_IMPRESSIONS + settings.mixtures_for(_IMPRESSIONS, classes))
    held_out = rows(_HELD_OUT)
    logit_margin = teacher.mean_logit_margin(train, len(train))
    # all logits move: that serves random rows better than the forgotten ones alone (LeNet5: FA 4
    # instead of 40)
    loss = MaskedKL(forget, settings.margin_for(logit_margin, classes, forget_logits_only=False))
    task = FitTask(cut.tail, trained_parameters(model, cut), train, held_out, loss, loss, draw)
    train_tail(task, LoopSettings(), Reporter(False))
