"""Random embeddings, the baseline that synthesis has to beat: noise at the split, no ascent.

After "Source-Free Class Unlearning via Synthetic Embeddings" (TMLR 2026): half-normal vectors stand
in for the backbone's features, and the model itself labels them. Objective, margin, loop and
stopping rule are those of `unlearn`; only the origin of the rows differs. Scale matters: at the
last layer it is 1, as published (LeNet5: FA 4; at the scale of noise images' features, FA 79).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError
from ..models.class_indices import check_forget
from ..models.input_spec import InputSpec, noise_images
from ..models.labels import known_labels
from ..models.outputs import OutputChoice
from ..models.prepare import prepare_model
from ..models.wrapper import LogitsModel
from ..runtime.progress import Reporter
from ..runtime.torch_settings import torch_defaults
from ..splitting.split import Split, find_split
from ..training.features import FeatureSet, FeatureSettings
from ..training.fit_task import FitTask, trained_parameters
from ..training.losses import MaskedKL
from ..training.teacher import Teacher
from ..training.trainer import LoopSettings, train_tail

# Training rows, besides those for mixtures, and held-out rows: as many as `unlearn` uses by default
# for ten classes.
_IMPRESSIONS, _HELD_OUT = 240, 2128
# At most this many numbers in a set of rows, which limits sets of feature maps; but a set may
# always have the second number of rows.
_MAX_VALUES, _MIN_LIMIT = 2**27, 1024


@torch_defaults()
def random_embeddings(
    model: nn.Module,
    forget: Any,
    *,
    tail: str | int = "last",
    output: OutputChoice | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Returns a copy of ``model`` whose tail unlearned ``forget`` on noise at the split.

    The copy is float32, in eval mode, of the module inside a wrapper.

    Args:
        model, forget, device: as for `unlearn`.
        tail: "last", the name of the module at which the tail starts, or a number of layers.
        output: which item of the model's output holds the logits, see `pick_logits`.
        seed: of the noise.

    Raises:
        ArgumentError: as `unlearn` does; ``tail`` is "auto", which needs impressions.
    """
    if tail == "auto":
        raise ArgumentError(
            "tail",
            "got 'auto', which needs impressions",
            "Pass 'last', a module's name, or a number.",
        )
    work = prepare_model(model, device, output=output)
    if work.multi_label:
        raise ModelError(
            "it is multi-label, and this baseline trains with the loss of a softmax",
            "Compare with zsu_fast.mask.",
        )
    forget_mask = torch.zeros(work.classes, dtype=torch.bool, device=work.device)
    forget_mask[check_forget(forget, work.classes, known_labels(model, work.classes))] = True
    images = noise_images(work.spec, 4).to(work.device)
    labels = torch.zeros(4, dtype=torch.int64, device=work.device)
    split = find_split(work.model, tail, images, labels)
    train_on_noise(work.model, split, work.spec, forget_mask, seed)
    return work.model.module


def train_on_noise(
    model: LogitsModel, split: Split, spec: InputSpec, forget: Tensor, seed: int
) -> None:
    """Trains the tail of ``split`` on random rows, in place.

    Args:
        model: the working copy that shares its parameters with ``split``.
        split: its tail is trained. Noise for a last layer has unit scale, as published; for deeper
            tails it has the scale of noise images' features.
        spec: the images the model takes.
        forget: bool [C], True for forgotten classes.
        seed: of the noise.
    """
    draw, device, classes = torch.Generator().manual_seed(seed), forget.device, len(forget)
    # one image is enough for shapes, a scale needs more
    images = noise_images(spec, 1 if split.output_level else 32)
    features = split.features(images.to(device))
    scales = [1.0 if split.output_level else float(f.square().mean().sqrt()) for f in features]
    limit = max(_MIN_LIMIT, _MAX_VALUES // sum(f[0].numel() for f in features))

    teacher, settings = Teacher(split.tail, forget), FeatureSettings()

    def noise_rows(wanted: int) -> FeatureSet:
        count = min(limit, wanted)
        embeddings = tuple(
            scale * torch.randn(count, *f.shape[1:], generator=draw).abs().to(device)
            for f, scale in zip(features, scales, strict=True)
        )
        return teacher.label(embeddings)

    train = noise_rows(_IMPRESSIONS + settings.mixtures_for(_IMPRESSIONS, classes))
    held_out = noise_rows(_HELD_OUT)
    logit_margin = teacher.mean_logit_margin(train, len(train))
    # all logits are trained: random rows need it (LeNet5: FA 4 instead of 40)
    loss = MaskedKL(forget, settings.margin_for(logit_margin, classes, forget_logits_only=False))
    task = FitTask(split.tail, trained_parameters(model, split), train, held_out, loss, loss, draw)
    train_tail(task, LoopSettings(), Reporter(False))
