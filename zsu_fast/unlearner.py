"""Zero-shot class unlearning, the whole procedure on one page.

``unlearn(model, forget=[...])`` synthesises class impressions, splits the model into a frozen
head and a trainable tail, caches the head's output on the impressions once, trains the tail on
it, and puts the tail's new weights into a copy of the user's model.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ArgumentError, check_flag
from .models.class_indices import check_forget, check_forgotten
from .models.infer_spec import resolve_spec
from .models.input_spec import noise_images
from .models.parameters import deep_copy, replace_parameters, restored_on_failure
from .models.wrapper import count_classes, resolve_device, working_copy
from .provenance.ledger import Ledger, as_ledger
from .provenance.record import Record
from .runtime import distributed
from .runtime.distributed import Ranks
from .runtime.events import Callback
from .runtime.flops import multiply_adds
from .runtime.precision import Precision
from .runtime.progress import Reporter
from .runtime.threads import threads_for
from .runtime.torch_defaults import torch_defaults
from .splitting import split as tails
from .splitting.layers import layer_names
from .splitting.split import Split
from .synthesis import class_sampling as sampling
from .synthesis.ascent import AscentSettings
from .synthesis.impressions import ClassImpressions, default_per_class
from .synthesis.space import SPACES, SearchSpace, SpaceName, input_space, tail_input_space
from .synthesis.synthesize import ascend, synthesize
from .training.class_subset import ClassSubsetTail
from .training.deep.data import DeepInputs
from .training.deep.deep import forget_deeply
from .training.deep.settings import DeepSettings, Depth, check_depth
from .training.deep.split_rule import find_deep_split
from .training.features import FeatureSettings
from .training.fit_task import make_fit_task
from .training.loop import LoopSettings, train_tail
from .training.losses import ObjectiveName, ObjectiveSettings
from .training.train_step import Loop
from .training.trainer import Fit


def unlearn(model: nn.Module, forget: Any, **options: Any) -> nn.Module:
    """Returns ``model`` without the classes ``forget``; no data needed.

    Args:
        model: any trained image classifier: one image tensor in, logits [N, C] out (plain, or in
            a tuple, dict, or object with ``.logits``).
        forget: class indices: an int, list, set, range, numpy array or tensor of ints.
        **options: everything that `ZeroShotUnlearner` takes, all optional.

    Returns:
        A model of the same class, on the same device, in the same dtype and train/eval mode: a
        copy, or ``model`` itself with ``inplace=True``.

    Raises:
        ArgumentError: an argument can't be used (a `ValueError`); the model is unchanged then,
            as after any other error or Ctrl-C.
    """
    return ZeroShotUnlearner(model, forget, **options).run()


def paper_preset() -> dict[str, Any]:
    """Options that follow the paper: ``unlearn(model, forget, **paper_preset())``.

    Plain logit ascent without a confidence stop; AdamW 1e-3; w_f 0.9, w_r 0.1; 100 epochs and no
    early stop. Impressions saturate, so that their gradients vanish and classes are often not
    forgotten, or everything is (DESIGN section 3): for comparison, not for use.
    """
    return {
        "objective": "differential",
        "confidence": None,
        "restarts": 0,
        "max_steps": 200,
        "step_size": 0.02,
        "learning_rate": 1e-3,
        "weights": (0.9, 0.1),
        "steps": 100,
        "mixtures": 0,
        "early_stop": False,
        "tail": "last",
    }


class ZeroShotUnlearner:
    """`unlearn` in steps: ``synthesise``, ``split``, ``fit``, ``apply``; ``run`` does them all.

    Args:
        model: as for `unlearn`.
        forget: as for `unlearn`.
        tail: "auto" (the first responsive layer, see `tail.find_split`), "last" (the last layer
            with parameters), the name of the module at which the tail starts, or how many of the
            last layers with weights it has.
        depth: "output" (the outputs forget), or "deep" (the features too: slower, and at a cost of
            RA; see `deep`).
        forgotten: classes that ``model`` has forgotten in earlier calls (as ``forget``): they stay
            forgotten. None for those in the ledger, or for none.
        ledger: a `Ledger`, or the path of one: the run becomes its next entry.
        objective: "masked" (match the original with the forgotten classes taken out; bounded) or
            "differential" (the paper's signed cross-entropy).
        impressions: `ClassImpressions` made before, of all classes (but with ``retain_sample``);
            None makes them.
        space: "input" makes impressions that are images; "tail-input" makes activations at the
            cut, far cheaper since the head is never run on them.
        impressions_per_class: of 4 or more, one in four is held out to decide when to stop, of
            fewer none: fresh mixtures are held out then. None for 32, or fewer for many classes.
        retain_sample: of so many retained classes impressions are made, beside those of all that
            are forgotten: half of them nearest by the last layer's weights, half by lot
            (`sampling`). None for all, or of more than 4,096 for 1,024.
        confidence, max_steps, restarts, step_size, beta, precision: see `synthesize`.
        batch_norm: see `synthesize`.
        input_shape, mean, std: see `synthesize`.
        mixtures: training rows mixed from impressions at the cut; None for four an impression, at
            least twelve a class and 2,048.
        cache: folder in which finished impressions are kept, see `synthesize`.
        steps: most optimiser steps of one attempt; None for 400, more for many classes.
        batch: rows an optimiser step; None for 512, fewer for a heavy tail.
        learning_rate: None lets it scale itself.
        weights: (w_f, w_r) of the differential objective.
        margin: by how many logits forgotten classes are pushed below what the mask asks for; None
            for the default of `FeatureSettings`.
        early_stop: stop on held-out impressions and keep the best state.
        loop: "eager", "compiled" (the tail through torch.compile), "graph" (a captured CUDA graph),
            or "auto": graph on a GPU, eager on a CPU.
        seed: everything random depends on it alone.
        device: where to compute; None for the model's own.
        inplace: change ``model`` itself: all tensors at the very end, or none.
        progress: True, False, or None for "if stderr is a terminal".
        callback: called with an `Event`; return True to end the stage early.
        distributed: share the synthesis with the other ranks of torch.distributed's default group,
            each of which has to make the same call (see `zsu_fast.distributed`); None for "if it is
            initialised", False for this process alone.

    Attributes:
        impressions: `ClassImpressions` or None.
        history: the held-out checks (`ValidationResult`) of the fit.
        split_point: the `Split` or None.
        stopped: why the fit ended, in words.
        record: the `Record` of the run, for JSON.
        ranks: the ranks that make the call.
    """

    ranks: Ranks

    @torch_defaults()
    @distributed.joins_ranks
    def __init__(
        self,
        model: nn.Module,
        forget: Any,
        *,
        forgotten: Any = None,
        ledger: Ledger | str | Path | None = None,
        tail: str | int = "auto",
        depth: Depth = "output",
        objective: ObjectiveName = "masked",
        impressions: ClassImpressions | None = None,
        space: SpaceName = "input",
        impressions_per_class: int | None = None,
        retain_sample: int | None = None,
        confidence: tuple[float, float] | None = (0.55, 0.99),
        max_steps: int = 100,
        restarts: int = 2,
        step_size: float = 0.01,
        beta: float = 1e-4,
        input_shape: Sequence[int] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        mixtures: int | None = None,
        steps: int | None = None,
        batch: int | None = None,
        learning_rate: float | None = None,
        weights: tuple[float, float] = (0.9, 0.1),
        margin: float | None = None,
        early_stop: bool = True,
        loop: Loop = "auto",
        precision: Precision = "auto",
        batch_norm: float = 0.0,
        seed: int = 0,
        device: str | torch.device | None = None,
        inplace: bool = False,
        cache: str | Path | None = None,
        progress: bool | None = None,
        callback: Callback | None = None,
        distributed: bool | None = None,
    ) -> None:
        settings = {
            k: v for k, v in locals().items()
            if k not in ("self", "model", "forget", "forgotten", "ledger", "impressions",
                         "progress", "callback", "distributed")
        }  # fmt: skip
        check_flag("inplace", inplace)
        if not isinstance(space, str) or space not in SPACES:
            raise ArgumentError("space", f"got {space!r}", f"Pass one of {', '.join(SPACES)}.")
        self.loop = LoopSettings(steps, batch, learning_rate, early_stop, loop)
        self.rows = FeatureSettings(mixtures, margin)
        self.deep = DeepSettings()
        if isinstance(tail, bool) or not isinstance(tail, str | int):
            raise ArgumentError(
                "tail", f"got {tail!r}", "Pass 'auto', 'last', a module's name, or a whole number."
            )
        if device is None and self.ranks.device.type == "cuda":
            device = self.ranks.device
        self.device = resolve_device(model, device)
        self.spec = resolve_spec(model, input_shape, mean, std)
        self.original, self.inplace = model, inplace
        self.work = working_copy(model, self.device)
        self.classes = count_classes(self.work, self.spec, self.device)
        self.forget = check_forget(forget, self.classes)
        self.ledger = as_ledger(ledger) if self.ranks.is_main else None
        if forgotten is None:
            forgotten = self.ranks.broadcast_object(
                self.ledger.forgotten() if self.ledger else None
            )
        self.forgotten = check_forgotten(forgotten, self.forget, self.classes)
        grey = torch.zeros(1, *self.spec.shape, device=self.device)
        self.multiply_adds = multiply_adds(self.work, grey)
        self.forget_mask = torch.zeros(self.classes, dtype=torch.bool, device=self.device)
        self.forget_mask[self.forget + self.forgotten] = True
        # classes of which impressions are made: those that the model still answers, or some
        self.active_classes = self._sample(retain_sample, seed)
        per_class = impressions_per_class
        if per_class is None:
            per_class = default_per_class(len(self.active_classes))
        elif isinstance(per_class, bool) or not isinstance(per_class, int) or per_class < 1:
            raise ArgumentError(
                "impressions_per_class",
                f"got {per_class!r}",
                "Pass a whole number, 1 or more, or None.",
            )
        self.ascent = AscentSettings(
            per_class, confidence, max_steps, restarts, step_size, beta, seed, precision,
            batch_norm,
        )  # fmt: skip
        self.objective = ObjectiveSettings(objective, weights)
        check_depth(depth, objective, space)
        self.depth = depth
        self.tail, self.seed, self.space, self.cache = tail, seed, space, cache
        self.report = Reporter(progress, callback, self.ranks)
        self.impressions = self._check_impressions(impressions)
        self.split_point: Split | None = None
        self.result: Fit | None = None
        self.record = Record.begin(
            model, self.spec, self.forget, self.classes, settings, self.device
        )
        self.record.depth["depth"] = depth
        self.record.forgotten = self.forgotten
        if self.ledger is not None:
            self.ledger.check(self.record.weights_before)
        own = ("device", "cache", "inplace", "ledger")
        self.ranks.check_same(
            {k: v for k, v in self.record.settings.items() if k not in own}
            | {"model": self.record.weights_before, "forget": self.forget}
            | {"forgotten": self.forgotten}
        )

    def run(self) -> nn.Module:
        """All steps; the unlearned model."""
        with self.report:
            if self.impressions is None:
                self.synthesise()
            self.split()
            self.fit()
        return self.apply()

    @torch_defaults()
    @distributed.all_or_none
    def synthesise(self) -> ClassImpressions:
        """Makes impressions of every class but those forgotten before, in one batch."""
        space: SearchSpace
        if self.space == "tail-input":
            cut = self.split_point or self.split()
            space = tail_input_space(cut, self.spec, self.device)
        else:
            space = input_space(self.work, self.spec, self.ascent.precision)
        with self._stage("synthesise"):
            self.impressions = ascend(
                self.work, space, self.spec, self.active_classes, self.ascent, self.report, self.cache,
                ranks=self.ranks,
            )  # fmt: skip
        counts = torch.bincount(self.impressions.labels, minlength=self.classes)
        counts = counts[self.active_classes]
        if not bool(counts.min()):
            raise ArgumentError(
                "callback",
                f"it stopped the synthesis without any of {int((counts == 0).sum())} classes",
                "Let it run until each class has one.",
            )
        return self.impressions

    @torch_defaults()
    @distributed.all_or_none
    def split(self) -> Split:
        """Cuts the model at ``tail``; "auto" is "last" where impressions need the cut first."""
        if self.space == "tail-input":
            at = "last" if self.tail == "auto" else self.tail
            images, labels = noise_images(self.spec, 4), torch.arange(4)
        else:
            made = self._made()
            at, images, labels = self.tail, made.images, made.labels
        with self._stage("split"):
            images, labels = images.to(self.device), labels.to(self.device)
            if self.depth == "deep":
                self.split_point = find_deep_split(self.work, at, images)
            else:
                self.split_point = tails.find_split(self.work, at, images, labels)
        cut = self.split_point
        self.ranks.check_same({"tail": cut.name, "parameters": cut.parameters})
        return cut

    @torch_defaults()
    @distributed.all_or_none
    def fit(self) -> Fit:
        """Trains the tail on the cached features of the impressions that are not held out."""
        cut = self.split_point or self.split()
        made = self._made()
        if self.depth == "deep":
            with self._stage("deepen"):
                inputs = DeepInputs(self.work, self.spec, cut, made, self.forget_mask, self.seed)
                self.record.depth |= forget_deeply(
                    inputs, self.rows, self.loop, self.deep, self.report
                )
                # nothing leads by now: the margin stays what the original's lead asked for
                self.rows = replace(self.rows, margin=self.record.depth["margin"])
                trained = dict(self.work.module.named_parameters())
                self.ranks.exchange()  # a stop ends what was, not the fit to come
                self.ranks.copy_from_main([trained[name] for name in cut.parameters])
                images, labels = made.images.to(self.device), made.labels.to(self.device)
                cut = tails.find_split(self.work, "last", images, labels)
        with self._stage("fit"):
            points, labels = made.images.to(self.device), made.labels.to(self.device)
            if self.space == "tail-input":
                features = tail_input_space(cut, self.spec, self.device).parts(points)
            else:
                features = cut.features(points)
            task = make_fit_task(
                self.work, cut, features, labels, self.forget_mask, self.objective, self.rows,
                self.seed,
            )  # fmt: skip
            self.result = train_tail(task, self.loop, self.report)
            if isinstance(task.tail, ClassSubsetTail):
                task.tail.write_back()
            trained = dict(self.work.module.named_parameters())
            self.result = self.ranks.broadcast_object(self.result)
            self.ranks.copy_from_main([trained[name] for name in cut.parameters])
        return self.result

    @torch_defaults()
    @distributed.all_or_none
    def apply(self) -> nn.Module:
        """The user's model, or a copy, with the tail's weights replaced."""
        if self.split_point is None or self.result is None:
            raise ArgumentError(
                "apply()", "called before fit()", "Call run(), or synthesise(), split(), fit()."
            )
        target = (
            self.original
            if self.inplace
            else deep_copy(self.original, "Pass inplace=True, or the module inside the wrapper.")
        )
        changed = dict(self.work.module.named_parameters())
        values = {n: changed[n].detach() for n in self.split_point.parameters}
        with restored_on_failure(target, values), self.ranks.all_or_none():
            replace_parameters(target, values)
            self.record.distributed = self.ranks.facts()
            made = self._made()
            self.record.finish(target, made, self.split_point, self.result, self.sampled)
            self.ranks.check_same({"result": self.record.weights_after})
            for note in self.record.warnings if self.ranks.is_main else ():
                warnings.warn(note, stacklevel=4)
            if self.ledger is not None:  # last, so that nothing is recorded of a run that fails
                self.ledger.append(self.record)
        return target

    def _sample(self, retain_sample: int | None, seed: int) -> list[int]:
        """Classes to make impressions of, sorted; not of those forgotten before."""
        sampling.check_retain_sample(retain_sample)
        retained = sorted({*range(self.classes)} - {*self.forget, *self.forgotten})
        size = sampling.sample_size(len(retained), retain_sample)
        self.sampled = sampling.ALL
        if size == len(retained):
            return sorted([*self.forget, *retained])
        last = layer_names(self.work.module, noise_images(self.spec, 2).to(self.device))[-1]
        weight = sampling.class_weights(self.work.module, last, self.classes)
        self.sampled = sampling.RANDOM if weight is None else sampling.RULE
        return sampling.sample_classes(weight, self.forget, retained, size, seed)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Times a stage and gives it as many threads as its model is worth."""
        started = time.perf_counter()
        with threads_for(self.multiply_adds, self.device):
            yield
        self.record.timings[name] = time.perf_counter() - started

    @property
    def history(self) -> list[Any]:
        return [] if self.result is None else self.result.history

    @property
    def stopped(self) -> str:
        return "" if self.result is None else self.result.stopped

    def _made(self) -> ClassImpressions:
        return self.impressions if self.impressions is not None else self.synthesise()

    def _check_impressions(self, given: ClassImpressions | None) -> ClassImpressions | None:
        if given is None:
            return None
        if not isinstance(given, ClassImpressions):
            raise ArgumentError(
                "impressions", f"got {given!r:.80}", "Pass what synthesize() made, or None."
            )
        counts = torch.bincount(given.labels, minlength=self.classes)
        # where a sample is enough, any that has the classes to forget and one to keep will do
        sampled = self.sampled != sampling.ALL
        few = int(counts[self.forget if sampled else self.active_classes].min())
        if sampled and len(given.labels.unique()) <= len(self.forget):
            few = 0
        if given.spec.shape != self.spec.shape or len(counts) > self.classes or few < 1:
            raise ArgumentError(
                "impressions",
                f"got {len(given)} of shape {given.spec.shape}, at least {few} a class of "
                f"{len(counts)}",
                f"Give some of shape {self.spec.shape} for each of {self.classes} classes.",
            )
        if given.space != self.space:
            raise ArgumentError(
                "impressions",
                f"got some of space={given.space!r} with space={self.space!r}",
                "Pass the space that they were made in.",
            )
        return given


@torch_defaults()
def split(
    model: nn.Module,
    at: str | int = "auto",
    *,
    impressions: ClassImpressions | None = None,
    input_shape: Sequence[int] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Split:
    """Cuts a copy of ``model`` into a frozen head and a tail, ``tail(*head(x)) == model(x)``.

    Args:
        model: an image classifier; it is not changed.
        at: "auto" (the first responsive layer), "last", a module's name, or a number of layers.
        impressions: to search the responsive layer with; None makes a few.
        input_shape: see `synthesize`.
        seed, device: as there.

    Raises:
        ArgumentError: no such module, or nothing to train from it on.
    """
    where = resolve_device(model, device)
    spec = resolve_spec(model, input_shape)
    work = working_copy(model, where)
    classes = count_classes(work, spec, where)
    if at == "auto" and impressions is None:
        impressions = synthesize(
            model, per_class=8, input_shape=spec.shape, seed=seed, device=where, progress=False
        )
    if impressions is None:
        images = spec.normalise(torch.full((4, *spec.shape), 128, dtype=torch.uint8))
        labels = torch.arange(4) % classes
    else:
        images, labels = impressions.images, impressions.labels
    return tails.find_split(work, at, images.to(where), labels.to(where))
