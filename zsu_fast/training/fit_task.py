"""What is trained, on which rows, with which loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..models.wrapper import LogitsModel
from ..runtime.measuring import multiply_adds
from ..splitting.split import Split
from .class_subset import ClassSubsetTail, supports_subset
from .features import FeatureSet, FeatureSettings, absence_margin
from .losses import ForgetOnlyKL, MaskedKL, MultiLabelKL, Objective, ObjectiveSettings
from .teacher import Teacher, train_val_sets

# Weights of the term that keeps retained logits where more than the classifier's rows is trained:
# if that is the last layer alone, and otherwise. LeNet5, two layers: they move by 1 instead of 27
# on MNIST, FA stays 0; with 8, it rises in other cases, from few impressions.
_KEEP_LAST, _KEEP = 8.0, 3.0


@dataclass
class FitTask:
    """A tail to train: everything that `train_tail` needs but its settings."""

    tail: nn.Module  # features -> logits, in eval mode; trained in place
    parameters: list[nn.Parameter]  # those of its parameters that are trained
    train: FeatureSet
    validation: FeatureSet  # rows mixed from other impressions, or in other proportions
    objective: Objective
    validation_loss: MaskedKL  # scores the validation rows, whatever the objective
    generator: torch.Generator  # draws the batches, on the CPU
    masks: Sequence[Tensor | None] | None = None  # factor on the gradient of each parameter
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    sampling: Tensor | None = None  # float32 [N], how often each row is drawn; None for equally
    fast_matmul: bool = True  # allow products in bfloat16 or TF32
    start: Sequence[Tensor] | None = None  # values that training starts from; None: the original's
    settled: bool = False  # whether `start` can't be improved on, see `_is_mean_of_retained`
    scale_biases: bool = False  # step biases in proportion to the logits, not to the weights
    coupled: bool = False  # only the last layer is trained, and its rows depend on one another

    @property
    def device(self) -> torch.device:
        return self.train.label.device

    @cached_property
    def row_work(self) -> int:
        """Multiply-adds of the tail's forward pass per row."""
        return multiply_adds(self.tail, *self.train.features_at(self.train.label.new_zeros(1)))


def make_fit_task(
    model: LogitsModel,
    split: Split,
    features: tuple[Tensor, ...],
    labels: Tensor,
    forget: Tensor,
    objective: ObjectiveSettings,
    settings: FeatureSettings,
    seed: int,
) -> FitTask:
    """Builds the rows from the impressions' features, and the loss.

    With the masked objective, only the forgotten logits are trained if each trained parameter holds
    one row per class (`Split.class_dims`); of many classes, only those logits are computed: call
    `ClassSubsetTail.write_back` on the task's tail after training. Otherwise, the retained logits
    are kept besides.

    Args:
        model: the working copy that ``split`` shares its parameters with.
        split: where the tail starts.
        features, labels: of the impressions at the split, each [N, ...]; int64 [N].
        forget: bool [C].
        objective, settings: the training loss; number of mixtures, margin and memory limits.
        seed: decides the mixtures and the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    tail, parameters, classes = split.tail, trained_parameters(model, split), len(forget)
    dims, last = split.class_dims, split.output_level and objective.name == "masked"
    forget_logits_only = objective.name == "masked" and bool(dims)
    names = []
    multi_label, many = objective.multi_label, classes > settings.limits.subset_above
    if forget_logits_only and many and not multi_label and not any(dims.values()):
        trained = {id(p) for p in parameters}
        names = [name for name, p in tail.named_parameters() if id(p) in trained]
        if not supports_subset(tail, names, features):
            names = []
    teacher = Teacher(tail, forget, names, settings.limits, multi_label)
    train, validation, logit_margin = train_val_sets(teacher, features, labels, settings, generator)
    loss, margin = _make_loss(
        teacher, train, logit_margin, split, forget, objective, settings, last, forget_logits_only
    )
    start, settled = None, False
    if split.directions and forget_logits_only:
        named = zip(split.parameters, parameters, strict=True)
        start = [_mean_rows(p, dims[name], forget) for name, p in named]
        settled = (
            not multi_label
            and settings.margin is None
            and _is_mean_of_retained(tail, parameters, start, train, forget)
        )
    if names:
        start = None if start is None else [values[forget] for values in start]
        tail = ClassSubsetTail(tail, names, forget.nonzero()[:, 0], trainable=True)
        parameters, loss = list(tail.parameters()), ForgetOnlyKL(forget, margin)
    tail = _linear_layer(tail, parameters) or tail
    return FitTask(
        tail, parameters, train, validation, objective.make(loss), loss, generator,
        start=start, settled=settled, scale_biases=last, coupled=last and not forget_logits_only,
    )  # fmt: skip


def _linear_layer(tail: nn.Module, parameters: Sequence[nn.Parameter]) -> nn.Linear | None:
    """The plain linear layer that is all of ``tail`` and has the ``parameters``; None if there is
    more to it. Most tails at the output level are one.
    """
    if not isinstance(tail, torch.fx.GraphModule):
        return None
    nodes = list(tail.graph.nodes)
    if [node.op for node in nodes] != ["placeholder", "call_module", "output"]:
        return None
    layer = tail.get_submodule(str(nodes[1].target))
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    same = {id(p) for p in layer.parameters()} == {id(p) for p in parameters}
    return layer if same and nodes[2].args == (nodes[1],) else None


def _make_loss(
    teacher: Teacher,
    train: FeatureSet,
    logit_margin: float,
    split: Split,
    forget: Tensor,
    objective: ObjectiveSettings,
    settings: FeatureSettings,
    last: bool,
    forget_logits_only: bool,
) -> tuple[MaskedKL, float]:
    """The masked loss, and its margin; ``last``: whether the tail is the last layer."""
    if objective.multi_label:
        margin = settings.margin
        if margin is None:
            margin = absence_margin(teacher.forgotten_logits(train))
            margin = 2 * margin if forget_logits_only else margin
        several = MultiLabelKL(forget, margin, forget_logits_only)
        several.constant = objective.constant
        return several, margin
    keep = _KEEP_LAST if last else _KEEP
    if forget_logits_only or _are_normalised(train.teacher):
        keep = 0.0
    # if retained logits stay, the forgotten ones alone have to make the margin
    fixed = forget_logits_only or (keep > 0 and objective.name == "masked")
    margin = settings.margin_for(logit_margin, len(forget), fixed)
    if split.directions and settings.margin is None:
        margin = 0.0  # out of reach for logits without a bias: it would leave more of the class
    return MaskedKL(forget, margin, forget_logits_only, keep, keep_all=last), margin


def _mean_rows(parameter: Tensor, dim: int, forget: Tensor) -> Tensor:
    """A copy of ``parameter`` whose forgotten rows along ``dim`` are the mean of the others.

    On whatever features, their logits are the mean of the retained ones then, never the highest. It
    is where training starts if logits depend on directions alone: the rows that it sees do not
    reach all directions of images, in which a trace of the class would be left.
    """
    values = parameter.detach().clone()
    rows = values.movedim(dim, 0)
    rows[forget] = rows[~forget].mean(0)
    return values


@torch.no_grad()
def _is_mean_of_retained(
    tail: nn.Module,
    parameters: Sequence[nn.Parameter],
    start: Sequence[Tensor],
    rows: FeatureSet,
    forget: Tensor,
) -> bool:
    """Whether the forgotten logits are the mean of the retained ones at ``start``.

    They are where logits are linear in the classifier's rows. Then no features whatsoever have a
    forgotten class at the top. Training would lower those logits further on the rows that it sees,
    and raise them elsewhere, since there is no bias: FA on images rose to 9 % at a leak of 0. They
    are not where the rows are normalised, as in a cosine classifier.
    """
    before = copied_values(parameters)
    load_values(parameters, start)
    logits = tail(*rows.features_at(torch.arange(min(64, len(rows)), device=forget.device)))
    load_values(parameters, before)
    retained = logits[:, ~forget]
    if retained.shape[1] < 2:
        return False  # the mean of one is a tie
    spread = float((retained - retained.mean(0)).abs().max())
    difference = logits[:, forget] - retained.mean(1, keepdim=True)
    return float(difference.abs().max()) <= 1e-3 * spread


def trained_parameters(model: LogitsModel, split: Split) -> list[nn.Parameter]:
    """The parameters of ``model`` that the tail of ``split`` trains."""
    named = dict(model.module.named_parameters())
    return [named[name] for name in split.parameters]


def copied_values(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Copies of the parameters' values, for `load_values`."""
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def load_values(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Copies ``values`` into the parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _are_normalised(logits: Tensor) -> bool:
    """Whether rows of [N, C] are (log-)probabilities, which can't stay when others are removed."""
    sums = torch.stack([logits.sum(1), logits.logsumexp(1).exp()])
    return bool(((sums - 1).abs() < 1e-3).all(1).any())
