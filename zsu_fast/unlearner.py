"""Zero-shot class unlearning: the whole procedure in four stages.

`unlearn(model, forget=[...])` runs them: **synthesise** class impressions; **split** the model
into a frozen backbone and a trainable tail; **fit** the tail on the backbone's features of the
impressions, which are computed once; **apply** the tail's new weights to a copy of the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, ModelError, UnlearningWarning
from .evaluation.verdict import Verdict
from .fit_stage import (
    deepen,
    deepen_encoder,
    fit_tail,
    fit_tail_or_last,
    invert_rows,
    rows_that_show,
    rows_to_change,
)
from .models.input_spec import noise_images
from .models.outputs import OutputChoice
from .models.parameters import replace_parameters, restored_on_failure
from .options import Options
from .provenance.ledger import Ledger
from .request import Request
from .runtime.distributed import all_or_none, join
from .runtime.progress import Callback, Reporter
from .runtime.torch_settings import Precision, torch_defaults
from .splitting.copies import erase_rows
from .splitting.split import Split, find_split
from .synthesis.impressions import ClassImpressions, check_impressions
from .synthesis.space import SearchSpace, SpaceName, input_space, tail_input_space
from .synthesis.synthesize import ascend
from .training.deep.rows import RowSource
from .training.deep.settings import Depth, ForgottenAs
from .training.deep.split import OnlyLastLayer, find_deep_split
from .training.fit_task import trained_parameters
from .training.losses import ObjectiveName
from .training.train_step import Loop
from .training.trainer import Fit


def unlearn(model: nn.Module, forget: Any, **options: Any) -> nn.Module:
    """Returns ``model`` without the classes ``forget``; no data is needed.

    Args:
        model: any trained image classifier: one image tensor in, logits [N, C] out (plain, or in
            a tuple, dict, or object with ``.logits``; see ``output``).
        forget: class indices: an int, list, set, range, numpy array or tensor of ints; or names of
            classes, where they are known (see ``class_names``).
        **options: see `ZeroShotUnlearner`; all are optional.

    Returns:
        A model of the same class, on the same device, in the same dtype and train/eval mode: a
        copy, or ``model`` itself with ``inplace=True``.

    Raises:
        ArgumentError: an argument can't be used (a `ValueError`). The model is unchanged then, as
            after any other error or Ctrl-C.
    """
    return ZeroShotUnlearner(model, forget, **options).run()


class ZeroShotUnlearner(Request):
    """`unlearn` in stages: `synthesise`, `split`, `fit`, `apply`; `run` does all of them.

    Args:
        model: as for `unlearn`.
        forget: as for `unlearn`.
        forgotten: classes that earlier calls removed from ``model`` (given like ``forget``); they
            stay forgotten. None: those in the ledger, or none.
        ledger: a `Ledger`, or the path of one; the run becomes its next entry.
        tail: where the tail starts: "auto" (see `find_deep_split`; with depth="output" the last
            layer, or with space="input" the first responsive one, see `find_split`), "last" (the
            last layer with weights), a module's name, or k (the last k layers with weights).
        depth: "deep" (the features forget too, so that the original last layer put back brings
            nothing back; accuracy on the retained classes drops a little, see `forget_deeply`), or
            "output" (only the last layer changes: quick, and as easily undone as a mask). None:
            "deep", or "output" with tail="last" (or the last layer's name) or
            objective="differential". Where deep forgetting
            is not possible or fails its checks, the run falls back to "output" and warns.
        objective: "masked" (match the original model with the forgotten classes removed; bounded)
            or "differential" (the paper's signed cross-entropy).
        impressions: `ClassImpressions` to use; None synthesises them.
        space: "input" synthesises images; "tail-input" synthesises what the backbone passes to the
            tail, which is far cheaper because the backbone never runs on it. None: that of
            ``impressions``, or "tail-input"; at the output level "input" if the classifier sees
            only the direction of the features (`Split.directions`), or has no bias per class.
        impressions_per_class: None: 32, or fewer for many classes; `DeepSettings` for deep
            forgetting with space="tail-input". With 4 or more, one in four is held out for
            validation; with fewer, fresh mixtures serve instead.
        retain_sample: number of retained classes to synthesise, besides the forgotten ones: half
            are the nearest by last-layer weights, half are drawn at random. None: all of them, or
            1,024 if there are more than 4,096.
        confidence, max_steps, restarts, step_size, beta, precision, batch_norm: see
            `AscentSettings`.
        input_shape, mean, std: the images that the model expects; None: see `resolve_spec`.
        output: which item of the model's output holds the logits: an index, a key or attribute, or
            a callable; None: the item that the last layer makes (see `find_output`).
        class_names: the names of all classes, in the order of the logits: a list, a dict of indices
            and names, or a text or JSON file (see `read_class_names`). None: what the model states
            (see `known_labels`).
        mixtures, margin: see `FeatureSettings`.
        steps, batch, learning_rate, early_stop, loop: see `LoopSettings`.
        weights: (w_f, w_r) of the forget and the retain term of the differential objective.
        seed: seed of everything random.
        device: where to compute; None: where the model is.
        inplace: change ``model`` itself, at the very end: all tensors or none.
        compact: return a model whose classifier has no rows for the classes ``forget`` and
            ``forgotten``: see `zsu_fast.compact`. The record's ``compact`` maps old indices to new
            ones. A later request to forget names the new ones, and none as ``forgotten``.
        everywhere: erase the forgotten classes' rows in further copies of the classifier too, such
            as an EMA copy or an auxiliary head (`class_copies`), by the mean of the other rows.
            Otherwise a warning names those tensors.
        cache: folder for finished impressions, from which an interrupted run resumes; None: none.
        progress: whether to show a progress bar; None: if stderr is a terminal.
        callback: called with an `Event`; return True to end the stage early.
        distributed: whether to share the synthesis with the other ranks of torch.distributed's
            default group, which must all make the same call; None: if the group is initialised.
        multi_label: whether each class has a sigmoid of its own, and an image any number of
            classes; None: if the model's transformers config says so, or if it ends in a sigmoid.
        forgotten_as: of an `EmbeddingClassifier`, what becomes of a forgotten identity: "stranger"
            (its images are less similar to every template than the threshold that the others set
            at a false accept rate of 1 %), or "redistribute" (they go to whomever they resemble, as
            with classes). None: "stranger", or "redistribute" if there is a bias, as of the rows of
            a linear classifier.

    Attributes:
        impressions: the `ClassImpressions`; None before `synthesise`.
        split_point: the `Split`; None before `split`.
        rows: the `RowSource` of deep forgetting; None at the output level.
        history: the `ValidationResult` of each validation of the fit.
        stopped: why the fit ended, in words.
        record: the `Record` of the run.
        multi_label: whether each class has a sigmoid of its own.
        notes: what was found while probing the model (`PreparedModel.notes`).
        unlearned: what `apply` returns; None before.
        full_size: with compact=True, the same model before the rows were cut; None before `apply`.
        verdict: the `Verdict` on the result; None before `apply`.
        ranks: the ranks that make the call.
        labels: the `Labels` of the model's classes; None if they are not known.
        options: the `Options`; the settings of a stage may be replaced before it runs.
    """

    @torch_defaults()
    def __init__(
        self,
        model: nn.Module,
        forget: Any,
        *,
        forgotten: Any = None,
        ledger: Ledger | str | Path | None = None,
        tail: str | int = "auto",
        depth: Depth | None = None,
        objective: ObjectiveName = "masked",
        impressions: ClassImpressions | None = None,
        space: SpaceName | None = None,
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
        output: OutputChoice | None = None,
        class_names: Any = None,
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
        compact: bool = False,
        everywhere: bool = False,
        cache: str | Path | None = None,
        progress: bool | None = None,
        callback: Callback | None = None,
        distributed: bool | None = None,
        multi_label: bool | None = None,
        forgotten_as: ForgottenAs | None = None,
    ) -> None:
        keywords = locals()
        if space is None and isinstance(impressions, ClassImpressions):
            keywords["space"] = impressions.space
        self._space_given = keywords["space"] is not None
        self.split_point: Split | None = None
        self.rows: RowSource | None = None
        self.result: Fit | None = None
        self.unlearned: nn.Module | None = None
        self.full_size: nn.Module | None = None
        self.verdict: Verdict | None = None
        ranks = join(distributed)
        with ranks.all_or_none():
            chosen = Options.from_keywords(keywords)
            report = Reporter(progress, callback, ranks, quiet=not ranks.is_main)
            super().__init__(model, forget, forgotten, ledger, class_names, chosen, ranks, report)
            self.check_options(impressions is not None)
            sampled = len(self.active_classes) < self.classes - len(self.forgotten)
            if self.options.depth == "deep" and self.options.space == "tail-input":
                sampled = True  # inverted rows: of many classes, some retained one has none
            self.impressions = check_impressions(
                impressions, self.spec, self.options.space, self.classes, self.forget,
                None if sampled else self.active_classes,
            )  # fmt: skip

    def run(self) -> nn.Module:
        """Runs all stages and returns the unlearned model."""
        with self.report:
            if self.impressions is None:
                self.synthesise()
            self.split()
            self.fit()
        return self.apply()

    @torch_defaults()
    @all_or_none
    def synthesise(self) -> ClassImpressions:
        """Synthesises impressions of the classes to forget and of retained ones."""
        needed = {*self.active_classes}
        rows = self._row_source() if self.options.space == "tail-input" else None
        if rows is not None:
            needed = {*self.forget}  # of many classes, some have no row
            with self.stage("synthesise"):
                self.impressions = invert_rows(self, rows)
            if self.impressions is None:  # it fell back
                self.split_point = None
                return self.synthesise()
        else:
            self._choose_space()
            space = self.search_space()
            with self.stage("synthesise"):
                self.impressions = ascend(
                    self.work, space, self.active_classes, self.options.ascent, self.report,
                    self.options.cache, ranks=self.ranks,
                )  # fmt: skip
        if self.gallery is not None:
            self.impressions = self.gallery.as_users(self.impressions)
            needed = {*self.forget}
        missing = len(needed.difference(self.impressions.labels.tolist()))
        if missing:
            got = f"it stopped the synthesis before {missing} classes had an impression"
            raise ArgumentError("callback", got, "Let it run until each class has one.")
        return self.impressions

    @torch_defaults()
    @all_or_none
    def split(self) -> Split:
        """Splits the model at ``tail``, ahead of the layers that are trained."""
        if (rows := self._row_source()) is not None:
            self.split_point = rows.deep.split
        else:
            self.split_point = self._output_split()
        split = self.split_point
        self.ranks.check_same({"tail": split.name, "parameters": split.parameters})
        return split

    def _output_split(self) -> Split:
        """The split of the output level; with space="tail-input", "auto" means "last"."""
        if self.options.space == "tail-input":
            at = "last" if self.options.tail == "auto" else self.options.tail
            images, labels = noise_images(self.spec, 4), torch.arange(4)
        else:
            impressions = self._synthesised()
            at, images, labels = self.options.tail, impressions.images, impressions.labels
        with self.stage("split"):
            return find_split(self.work, at, images.to(self.device), labels.to(self.device))

    def _choose_space(self) -> None:
        """Takes images where rows at the split would be unlike theirs, unless the user chose."""
        options = self.options
        if options.space == "tail-input" and not self._space_given:
            split = self.split_point or self.split()
            rows = [self.work.module.get_parameter(name).ndim for name in split.class_dims]
            if split.directions or (rows and 1 not in rows):
                options.space, self.split_point = "input", None
                options.tail = "last" if options.tail == "auto" else options.tail

    def _row_source(self) -> RowSource | None:
        """Where the rows of deep forgetting come from; None at the output level."""
        options = self.options
        if self.rows is None and options.depth == "deep":
            try:
                with self.stage("deep split"):
                    deep = find_deep_split(self.work, options.tail, self.spec)
            except (ArgumentError, ModelError) as error:
                named = isinstance(error, OnlyLastLayer) and options.tail != "auto"
                if named and not options.depth_given and self.gallery is None:
                    self.options.depth = "output"  # as with tail="last"
                    self.record.depth |= {"depth": "output", "level": "output", "unused": []}
                    return None
                if isinstance(error, ArgumentError) and options.tail != "auto":
                    raise
                self.fall_back(str(error))
                return None
            self.rows = RowSource(
                self.work, deep, self.spec, self.forget_mask, options.deep_settings(
                    self.work, self.classes, len(self.active_classes), len(self.forget),
                ), options.seed, options.cache,
            )  # fmt: skip
        return self.rows if options.depth == "deep" else None

    @torch_defaults()
    @all_or_none
    def fit(self) -> Fit:
        """Trains the tail on the impressions; with depth="deep", the layers before it first."""
        split = self.split_point or self.split()
        impressions = self._synthesised()
        features: tuple[Tensor, ...] | None = None
        rows = self._row_source()
        if self.gallery is not None and rows is not None:
            with self.stage("deepen"):
                self.result = deepen_encoder(self, self.gallery, rows, impressions)
            return self.result
        shown: Tensor | None = None
        if rows is not None:
            points, images = impressions.images.to(self.device), impressions.space == "input"
            shown = rows_to_change(self, rows, impressions)
            with self.stage("deepen"):
                split = deepen(self, rows, impressions)
            if self.options.depth == "output":
                self.split_point, shown = split, None  # it failed: what it trained is put back
            features = (rows.deep.last_features(self.work, points, images),)
        with self.stage("fit"):
            if features is None and self.options.tail == "auto" and not split.class_dims:
                self.split_point, self.result = fit_tail_or_last(self, split, impressions)
            else:
                self.result = fit_tail(self, split, impressions, features)
        if shown is not None and features is not None and self.result.best is not None:
            # to the fit, whose rows are of the new features, hardly any row has a forgotten class
            leaks = rows_that_show(self, split, features[0])[shown].float().mean()
            self.result.best.forgotten_leak = float(leaks)
        return self.result

    @torch_defaults()
    @all_or_none
    def apply(self) -> nn.Module:
        """Writes the tail's weights into a copy of the user's model, or into that model itself."""
        split, result = self.split_point, self.result
        if split is None or result is None:
            raise ArgumentError(
                "apply()", "called before fit()", "Call run(), or synthesise(), split(), fit()."
            )
        target, copies, impressions = self.target(), self.copies(split), self._synthesised()
        trained = trained_parameters(self.work, split)
        values = {n: p.detach() for n, p in zip(split.parameters, trained, strict=True)}
        with restored_on_failure(target, [*values, *copies]), self.ranks.all_or_none():
            replace_parameters(target, values)
            if self.options.everywhere:
                erase_rows(target, copies, self.forget_mask)
            if (smaller := self.compacted(target)) is not None:
                self.full_size, target = target, smaller
            self.record.distributed = self.ranks.facts()
            self.record.finish(target, impressions, split, result, self.class_rule)
            self.record.warnings += self.notes
            self.note_left_out(split, copies)
            self.ranks.check_same({"result": self.record.weights_after})
            self.verdict = Verdict.of_record(self.record.to_dict())
            self.record.warnings += self.verdict.failures
            for note in self.record.warnings if self.ranks.is_main else ():
                warnings.warn(note, UnlearningWarning, stacklevel=4)
            self.unlearned = target
            if self.ledger is not None:  # last: a run that fails must not be in the ledger
                self.ledger.append(self.record)
        return target

    def search_space(self) -> SearchSpace:
        """The space in which impressions are synthesised: images, or inputs of the tail."""
        if self.options.space == "tail-input":
            return tail_input_space(self.split_point or self.split(), self.spec, self.device)
        return input_space(self.work, self.spec, self.options.ascent.precision)

    @property
    def history(self) -> list[Any]:
        return [] if self.result is None else self.result.history

    @property
    def stopped(self) -> str:
        return "" if self.result is None else self.result.stopped

    def _synthesised(self) -> ClassImpressions:
        return self.impressions if self.impressions is not None else self.synthesise()
