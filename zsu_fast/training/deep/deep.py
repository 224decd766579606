"""Deep forgetting: the classes leave the features, not only the outputs.

The last layer *and* the layers ahead of it are trained, on four terms:

1. the logits match the masked original, as in output-level forgetting;
2. so do those that the frozen *original* last layer gives on the new features: whoever puts it
   back (the un-mask test) still gets no forgotten class;
3. the features shrink: what the retained classes do not need fades;
4. a ridge regression, fitted anew on each batch, must not find the original's forgotten logits in
   the features: a linear probe then has little to go by (its explained variance is what
   Belrose et al., "LEACE", 2023, bring to 0 in closed form; here the layers learn to). Nor in
   what the trained layers ahead of the last take: what is left inside is quickly relearned.

Features are only kept where they are seen, and impressions lie far from any real image: so the
rows are mostly *scenes* (`sample_dead_leaves`), as drawn and pushed to each class by a few ascent steps,
beside the impressions and mixtures of them.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ...models.input_spec import InputSpec
from ...models.wrapper import LogitsModel
from ...runtime.events import Stopped
from ...runtime.flops import multiply_adds
from ...runtime.progress import Reporter
from ...splitting.split import Split
from ...synthesis.impressions import ClassImpressions
from ..features import FeatureSet, FeatureSettings, logit_margin
from ..loop import Fit, LoopSettings, relative_learning_rate
from .data import make_deep_rows
from .losses import SHARE_OF_ROOM, DeepObjective, room_above_floor
from .settings import DeepSettings
from .tail import DualClassifierTail

_PRUNED = 0.1  # share of zeros from which on a layer's zeros are not chance


def forget_deeply(
    model: LogitsModel,
    spec: InputSpec,
    cut: Split,
    made: ClassImpressions,
    forget: Tensor,
    rows: FeatureSettings,
    loop: LoopSettings,
    seed: int,
    report: Reporter,
    settings: DeepSettings | None = None,
) -> dict[str, Any]:
    """Trains the tail of ``cut`` until the classes are gone from its features.

    The last layer is then to be fitted as in output-level forgetting, which looks farther out.

    Args:
        model: the working copy that ``cut`` shares its parameters with; changed in place.
        spec: of its images.
        cut: from `find_deep_split`.
        made: impressions of all classes; one in four is held out, as is one scene in eight.
        forget: bool [C].
        rows: for the margin.
        loop: its learning rate, where given, and whether fewer ``steps`` are wanted.
        seed: everything random.
        report: told after every check; a stop asked for keeps the state of then.
        settings: the constants.

    Returns:
        What the record is to tell: how the fit went; ``margin``, and ``margin_asked``,
        which is less where logits have a lowest value; ``unmask_leak``, the share of held-out
        rows answered with a forgotten class once the original last layer is back, and
        ``evidence``, the share of the forgotten logits' variance that a ridge regression on the
        features explains (``evidence_inside``: the most of what inner layers take, if there are
        any); each before and after.

    Raises:
        ModelError: the model's last layer takes more than one tensor from the others.
    """
    device = forget.device
    tail = DualClassifierTail(model, cut, made.images[:4].to(device))
    settings = (settings or DeepSettings()).fit_to(len(tail.trained) + 1)
    train, held_out, impressions = make_deep_rows(model, spec, cut, made, forget, seed, settings)
    margins = logit_margin(train.teacher[:impressions], train.label[:impressions])
    margin = rows.margin_for(float(margins.mean()), len(forget), forget_logits_only=False)
    asked = min(margin, SHARE_OF_ROOM * room_above_floor(tail, train, forget))
    objective = DeepObjective(tail, train, forget, asked, settings)
    named = dict(model.module.named_parameters())
    parameters = [named[name] for name in cut.parameters]
    row = multiply_adds(cut.tail, *train.features_at(train.label.new_zeros(1)))
    steps = min(settings.steps_for(row, device), loop.steps or settings.steps)
    start = [p.detach().clone() for p in parameters]
    fit = Fit(learning_rate=loop.learning_rate or relative_learning_rate(parameters))
    before = objective.look(train, held_out)
    while not _descend(fit, steps, objective, parameters, train, held_out, seed, report):
        with torch.no_grad():  # values blew up: from the start, more slowly
            for parameter, saved in zip(parameters, start, strict=True):
                parameter.copy_(saved)
        fit.learning_rate *= 0.3
        if fit.history[-1].attempt >= 3:
            fit.stopped += "; given up"
            break
    after = objective.look(train, held_out)
    return {
        "stopped": fit.stopped,
        "learning_rate": fit.learning_rate,
        "margin": margin,
        "margin_asked": objective.margin,
        "history": [asdict(check) for check in fit.history],
        "rows": len(train),
        "held_out": len(held_out),
        **{k: {"before": before[k], "after": after[k]} for k in before},
    }


def _descend(
    fit: Fit,
    steps: int,
    objective: DeepObjective,
    parameters: list[nn.Parameter],
    rows: FeatureSet,
    held_out: FeatureSet,
    seed: int,
    report: Reporter,
) -> bool:
    """One run over all steps at ``fit.learning_rate``; False if values stopped being finite."""
    draw = torch.Generator().manual_seed(seed)
    device = rows.label.device
    attempt = fit.history[-1].attempt + 1 if fit.history else 0
    fit.history.append(objective.check(held_out, 0, attempt, fit.learning_rate, math.nan))
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.0)
    masks = [_not_pruned(p) for p in parameters]
    every = max(1, steps // 10)
    batch = min(objective.settings.batch, len(rows))
    for step in range(steps):
        picked = torch.randint(len(rows), (batch,), generator=draw).to(device)
        rate = fit.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = objective(rows.select(picked))
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, grad, mask in zip(parameters, grads, masks, strict=True):
            parameter.grad = grad if grad is None or mask is None else grad * mask
        optimiser.step()
        if (step + 1) % every and step + 1 < steps:
            continue
        check = objective.check(held_out, step + 1, attempt, rate, float(loss.detach()))
        fit.history.append(check)
        if not math.isfinite(check.divergence):
            fit.stopped = f"non-finite values at step {step + 1}, rolled back to the start"
            fit.best = fit.history[0]
            return False
        fit.best = check
        try:
            report(
                "fit", step + 1, steps, divergence=check.divergence, leak=check.leak,
                agreement=check.agreement,
            )  # fmt: skip
        except Stopped as stop:
            fit.stopped = str(stop)
            return True
    fit.stopped = f"all {steps} steps taken"
    return True


def _not_pruned(parameter: Tensor) -> Tensor | None:
    """Where a pruned layer's weights are not 0: a tenth of them is. They stay what they are."""
    kept = parameter.detach() != 0
    pruned = parameter.ndim > 1 and float(kept.float().mean()) < 1 - _PRUNED
    return kept.to(parameter.dtype) if pruned else None
