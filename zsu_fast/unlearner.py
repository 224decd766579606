"""Zero-shot class unlearning: the whole procedure in four stages.

`unlearn(model, forget=[...])` runs them: **synthesise** class impressions; **split** the model
into a frozen backbone and a trainable tail; **fit** the tail on the backbone's features of the
impressions, which are computed once; **apply** the tail's new weights to a copy of the model.
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
from torch import Tensor, nn

from .errors import ArgumentError, ModelError, UnlearningWarning, shorten
from .evaluation.verdict import Verdict
from .models.class_indices import check_forget, check_forgotten
from .models.compact import Compaction, cut, find_compaction
from .models.input_spec import noise_images
from .models.labels import resolve_labels
from .models.outputs import OutputChoice
from .models.parameters import deep_copy, replace_parameters, restored_on_failure
from .models.prepare import prepare_model
from .options import PER_RANK, Options
from .provenance.ledger import Ledger, as_ledger
from .provenance.record import Record
from .runtime.distributed import all_or_none, join
from .runtime.progress import Callback, Reporter
from .runtime.torch_settings import Precision, threads_for, torch_defaults
from .splitting.class_rows import ClassDims
from .splitting.copies import class_copies, erase_rows
from .splitting.split import Split, check_frozen, find_split
from .synthesis.class_sampling import classes_to_synthesise
from .synthesis.impressions import ClassImpressions, check_impressions
from .synthesis.space import SearchSpace, SpaceName, input_space, tail_input_space
from .synthesis.synthesize import ascend, synthesize
from .training.class_subset import ClassSubsetTail
from .training.deep.deep import DeepFailed, forget_deeply
from .training.deep.rows import RowSource
from .training.deep.settings import Depth
from .training.deep.split import OnlyLastLayer, find_deep_split
from .training.fit_task import (
    FitTask,
    copied_values,
    load_values,
    make_fit_task,
    trained_parameters,
)
from .training.losses import ObjectiveName
from .training.train_step import Loop
from .training.trainer import AGREEMENT_GOAL, Fit, train_tail

# The last layer's fit after deep forgetting: the classes hardly reach it any more.
_LAST_MIXTURES, _LAST_STEPS = 4096, 400


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


class ZeroShotUnlearner:
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
            only the direction of the features (`Split.directions`).
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
    ) -> None:
        keywords = locals()
        if space is None and isinstance(impressions, ClassImpressions):
            keywords["space"] = impressions.space
        self._space_given = keywords["space"] is not None
        self.ranks = join(distributed)
        with self.ranks.all_or_none():
            self.options = Options.from_keywords(keywords)
            self.report = Reporter(progress, callback, self.ranks, quiet=not self.ranks.is_main)
            self.split_point: Split | None = None
            self.rows: RowSource | None = None
            self.result: Fit | None = None
            self._target: nn.Module | None = None
            self.unlearned: nn.Module | None = None
            self.full_size: nn.Module | None = None
            self.verdict: Verdict | None = None
            self._prepare(model, forget, forgotten, ledger, class_names)
            self._check_options(impressions is not None)
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
            with self._stage("synthesise"):
                self.impressions = rows.invert(self.active_classes, self.report)
        else:
            self._choose_space()
            space = self.search_space()
            with self._stage("synthesise"):
                self.impressions = ascend(
                    self.work, space, self.active_classes, self.options.ascent, self.report,
                    self.options.cache, ranks=self.ranks,
                )  # fmt: skip
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
        with self._stage("split"):
            return find_split(self.work, at, images.to(self.device), labels.to(self.device))

    def _choose_space(self) -> None:
        """Takes images where rows at the split would be unlike theirs, unless the user chose."""
        options = self.options
        if options.space == "tail-input" and not self._space_given:
            split = self.split_point or self.split()
            if split.directions:
                options.space, self.split_point = "input", None
                options.tail = "last" if options.tail == "auto" else options.tail

    def _row_source(self) -> RowSource | None:
        """Where the rows of deep forgetting come from; None at the output level."""
        options = self.options
        if self.rows is None and options.depth == "deep":
            try:
                with self._stage("deep split"):
                    deep = find_deep_split(self.work, options.tail, self.spec)
            except (ArgumentError, ModelError) as error:
                named = isinstance(error, OnlyLastLayer) and options.tail != "auto"
                if named and not options.depth_given:
                    self.options.depth = "output"  # as with tail="last"
                    self.record.depth |= {"depth": "output", "level": "output", "unused": []}
                    return None
                if isinstance(error, ArgumentError) and options.tail != "auto":
                    raise
                self._fall_back(str(error))
                return None
            self.rows = RowSource(
                self.work, deep, self.spec, self.forget_mask, options.deep_settings(
                    self.classes, len(self.active_classes)), options.seed, options.cache,
            )  # fmt: skip
        return self.rows if options.depth == "deep" else None

    def _check_options(self, impressions_given: bool) -> None:
        """Notes options without effect. Raises before the synthesis if ``tail`` can't be used; with
        space="tail-input" the split comes before it.
        """
        options = self.options
        self.record.depth["unused"] = options.without_effect(impressions_given)
        if options.space != "input" or options.tail in ("auto", "last"):
            return
        if options.depth == "deep":
            try:
                find_deep_split(self.work, options.tail, self.spec)
                return
            except ModelError:  # falls back
                pass
            except OnlyLastLayer:
                if options.depth_given:
                    raise
        images, labels = noise_images(self.spec, 4).to(self.device), torch.arange(4)
        find_split(self.work, options.tail, images, labels.to(self.device))

    def _fall_back(self, reason: str) -> None:
        """Goes on at the output level."""
        self.options.depth = "output"
        self.record.depth |= {"level": "output", "fallback": reason}

    @torch_defaults()
    @all_or_none
    def fit(self) -> Fit:
        """Trains the tail on the impressions; with depth="deep", the layers before it first."""
        split = self.split_point or self.split()
        impressions = self._synthesised()
        features: tuple[Tensor, ...] | None = None
        if (rows := self._row_source()) is not None:
            with self._stage("deepen"):
                split = self._deepen(rows, impressions)
            points, images = impressions.images.to(self.device), impressions.space == "input"
            features = (rows.deep.last_features(self.work, points, images),)
        with self._stage("fit"):
            before = copied_values(trained_parameters(self.work, split))
            self.result = self._fit_at(split, impressions, features)
            if features is None and self.options.tail == "auto" and not split.class_dims:
                self.result = self._try_last(split, before, impressions, self.result)
        return self.result

    def _fit_at(
        self, split: Split, impressions: ClassImpressions, features: tuple[Tensor, ...] | None
    ) -> Fit:
        """Trains the tail of ``split``, in place; ``features`` of the impressions are given, or
        None.
        """
        if features is None:
            features = self.features_of(split, impressions)
        task = self.fit_task(split, features, impressions)
        result = train_tail(task, self.options.loop, self.report)
        if isinstance(task.tail, ClassSubsetTail):
            task.tail.write_back()
        result = self.ranks.broadcast_object(result)
        self.ranks.copy_from_main(trained_parameters(self.work, split))
        return result

    def _try_last(
        self, split: Split, before: list[Tensor], impressions: ClassImpressions, first: Fit
    ) -> Fit:
        """If too few retained answers stayed, fits the last layer alone; keeps the better fit."""
        best = first.best
        if best is None or best.agreement >= AGREEMENT_GOAL or self.options.space != "input":
            return first
        parameters = trained_parameters(self.work, split)
        after = copied_values(parameters)
        load_values(parameters, before)
        images, labels = impressions.images[:4], impressions.labels[:4]
        last = find_split(self.work, "last", images.to(self.device), labels.to(self.device))
        untrained = copied_values(trained_parameters(self.work, last))
        second = self._fit_at(last, impressions, None)
        if second.best is not None and second.best.better_than(best):
            kept = f"{best.agreement:.0%} of the retained answers stayed"
            last.reason = f"{last.reason}; trained from {split.name!r} on, {kept}"
            self.split_point = last
            return second
        load_values(trained_parameters(self.work, last), untrained)
        load_values(parameters, after)
        return first

    @torch_defaults()
    @all_or_none
    def apply(self) -> nn.Module:
        """Writes the tail's weights into a copy of the user's model, or into that model itself."""
        if self.split_point is None or self.result is None:
            raise ArgumentError(
                "apply()", "called before fit()", "Call run(), or synthesise(), split(), fit()."
            )
        target, self._target = self._target, None  # the next call gets another copy
        target = self._copy_of_original() if target is None else target
        names = self.split_point.parameters
        copies = self._copies()
        trained = trained_parameters(self.work, self.split_point)
        values = {n: p.detach() for n, p in zip(names, trained, strict=True)}
        with restored_on_failure(target, [*names, *copies]), self.ranks.all_or_none():
            replace_parameters(target, values)
            if self.options.everywhere:
                erase_rows(target, copies, self.forget_mask)
            target = self._compacted(target)
            self.record.distributed = self.ranks.facts()
            self.record.finish(
                target, self._synthesised(), self.split_point, self.result, self.class_rule
            )
            self.record.warnings += self.notes
            self._note_left_out(copies)
            self.ranks.check_same({"result": self.record.weights_after})
            self.verdict = Verdict.of_record(self.record.to_dict())
            self.record.warnings += self.verdict.failures
            for note in self.record.warnings if self.ranks.is_main else ():
                warnings.warn(note, UnlearningWarning, stacklevel=4)
            self.unlearned = target
            if self.ledger is not None:  # last: a run that fails must not be in the ledger
                self.ledger.append(self.record)
        return target

    def _compacted(self, unlearned: nn.Module) -> nn.Module:
        """With compact=True, a copy without the rows of forgotten classes; else ``unlearned``."""
        if self.compaction is None:
            return unlearned
        self.full_size, smaller = unlearned, deep_copy(unlearned, "Leave compact out.")
        cut(smaller, self.compaction)
        self.record.compact = self.compaction.to_dict()
        return smaller

    def _copy_of_original(self) -> nn.Module:
        """The model that the result is written into."""
        if self.options.inplace:
            return self.original
        return deep_copy(self.original, "Pass inplace=True, or the module inside the wrapper.")

    def _copies(self) -> ClassDims:
        """Tensors with one row per class that are not trained."""
        assert self.split_point is not None
        images = noise_images(self.spec, 2).to(self.device)
        return class_copies(self.work, images, self.split_point.parameters)

    def _note_left_out(self, copies: ClassDims) -> None:
        """Adds to the record what the run has not changed, and further copies that it erased."""
        split, notes = self.split_point, [self.frozen] if self.frozen else []
        assert split is not None
        self.record.split |= {"copies": list(copies), "erased": self.options.everywhere}
        if copies and not self.options.everywhere:
            notes.append(
                f"further tensors hold one row per class, and still those of the forgotten ones: "
                f"{shorten(copies)}. Pass everywhere=True to erase these rows."
            )
        self.record.warnings += [f"not covered: {note}" for note in notes]
        self.record.warnings += [split.warning] if split.warning else []

    def search_space(self) -> SearchSpace:
        """The space in which impressions are synthesised: images, or inputs of the tail."""
        if self.options.space == "tail-input":
            return tail_input_space(self.split_point or self.split(), self.spec, self.device)
        return input_space(self.work, self.spec, self.options.ascent.precision)

    def features_of(self, split: Split, impressions: ClassImpressions) -> tuple[Tensor, ...]:
        """The backbone's output for the impressions, which may be such an output already."""
        points = impressions.images.to(self.device)
        if self.options.space == "tail-input":
            return tail_input_space(split, self.spec, self.device).parts(points)
        return split.features(points)

    def fit_task(
        self, split: Split, features: tuple[Tensor, ...], impressions: ClassImpressions
    ) -> FitTask:
        """The data that the tail is trained on, and the loss."""
        return make_fit_task(
            self.work, split, features, impressions.labels.to(self.device), self.forget_mask,
            self.options.objective, self.options.features, self.options.seed,
        )  # fmt: skip

    @property
    def history(self) -> list[Any]:
        return [] if self.result is None else self.result.history

    @property
    def stopped(self) -> str:
        return "" if self.result is None else self.result.stopped

    def _prepare(
        self, model: nn.Module, forget: Any, forgotten: Any, ledger: Any, class_names: Any
    ) -> None:
        """Copies the model, chooses the classes to synthesise, and begins the record."""
        options = self.options
        device = options.device
        if device is None and self.ranks.device.type == "cuda":
            device = self.ranks.device
        prepared = prepare_model(
            model, device, options.input_shape, options.mean, options.std, options.output,
            options.multi_label,
        )  # fmt: skip
        self.multi_label = prepared.multi_label
        options.set_multi_label(self.multi_label)
        self.original, self.work, self.spec = model, prepared.model, prepared.spec
        self.device, self.classes = prepared.device, prepared.classes
        self.notes = prepared.notes
        self._target = self._copy_of_original()  # may fail: before the work
        self.frozen = check_frozen(self.work, noise_images(self.spec, 4).to(self.device))
        self.multiply_adds = prepared.multiply_adds()
        self.labels = resolve_labels(class_names, model, self.classes)
        self.forget = check_forget(forget, self.classes, self.labels)
        self.ledger = as_ledger(ledger) if self.ranks.is_main else None
        if forgotten is None:
            known = self.ledger.forgotten() if self.ledger else None
            forgotten = self.ranks.broadcast_object(known)
        self.forgotten = check_forgotten(forgotten, self.forget, self.classes, self.labels)
        if self.ledger is not None:
            self.ledger.check_forgotten(self.forgotten)
        self.compaction: Compaction | None = None
        if options.compact:
            removed, images = sorted(self.forget + self.forgotten), noise_images(self.spec, 2)
            self.compaction = find_compaction(self.work, removed, images.to(self.device))
        self.forget_mask = torch.zeros(self.classes, dtype=torch.bool, device=self.device)
        self.forget_mask[self.forget + self.forgotten] = True
        self.active_classes, self.class_rule = classes_to_synthesise(
            self.work, self.spec, self.classes, self.forget, self.forgotten,
            options.retain_sample, options.seed,
        )  # fmt: skip
        options.set_per_class(len(self.active_classes))
        self.record = Record.begin(
            model, self.spec, self.forget, self.classes, options.given, self.device
        )
        self.record.depth |= {"depth": options.depth, "level": options.depth}
        self.record.forgotten, self.record.multi_label = self.forgotten, self.multi_label
        if self.labels is not None:
            self.record.labels = self.labels.named([*self.forget, *self.forgotten])
        before = self.record.weights_before
        if self.ledger is not None:
            self.ledger.check(before)
        call = {"model": before, "forget": self.forget, "forgotten": self.forgotten}
        same = {k: v for k, v in self.record.settings.items() if k not in PER_RANK}
        self.ranks.check_same(same | call)

    def _deepen(self, rows: RowSource, impressions: ClassImpressions) -> Split:
        """Trains the layers ahead of the last; returns the split that is fitted afterwards."""
        options, failure = self.options, ""
        try:
            facts = forget_deeply(
                self.work, rows.deep, rows.scenes, impressions, self.forget_mask,
                options.features, options.loop, rows.settings, options.seed, self.report,
            )  # fmt: skip
        except DeepFailed as error:
            failure, facts = str(error), error.facts
        self.ranks.exchange()  # a new stage: a stop request must not carry over into the fit
        failure, facts = self.ranks.broadcast_object((failure, facts))
        self.ranks.copy_from_main(trained_parameters(self.work, rows.deep.split))
        self.record.depth |= facts
        if failure:
            self._fall_back(failure)
            self.split_point = rows.deep.last
        else:  # logits have collapsed by now: keep the margin computed from the original
            features, loop = options.features, options.loop
            mixtures = _LAST_MIXTURES if features.mixtures is None else features.mixtures
            margin = features.margin if rows.deep.last.directions else facts["margin"]
            options.features = replace(features, margin=margin, mixtures=mixtures)
            options.loop = replace(loop, steps=loop.steps or _LAST_STEPS)
            options.objective = replace(options.objective, constant=self.multi_label)
        return rows.deep.last

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Times a stage, and sets a number of threads that suits the model."""
        started = time.perf_counter()
        with threads_for(self.multiply_adds, self.device):
            yield
        self.record.timings[name] = time.perf_counter() - started

    def _synthesised(self) -> ClassImpressions:
        return self.impressions if self.impressions is not None else self.synthesise()


@torch_defaults()
def split(
    model: nn.Module,
    at: str | int = "auto",
    *,
    impressions: ClassImpressions | None = None,
    input_shape: Sequence[int] | None = None,
    output: OutputChoice | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Split:
    """Splits a copy of ``model`` into backbone and tail: ``tail(*backbone(x)) == model(x)``.

    Args:
        model: an image classifier; it is not changed.
        at: "auto" (the first responsive layer), "last", a module's name, or a number of layers.
        impressions: used to find the responsive layer; None synthesises a few.
        input_shape: (channels, height, width); None: see `resolve_spec`.
        output: which item of the model's output holds the logits, as for `ZeroShotUnlearner`.
        seed: of the impressions.
        device: where to compute; None: where the model is.

    Raises:
        ArgumentError: there is no such module, or nothing after it can be trained.
    """
    prepared = prepare_model(model, device, input_shape, output=output)
    spec, where = prepared.spec, prepared.device
    if at == "auto" and impressions is None:
        impressions = synthesize(
            model, per_class=8, input_shape=spec.shape, output=output, seed=seed, device=where,
            progress=False,
        )  # fmt: skip
    if impressions is None:
        grey = torch.full((4, *spec.shape), 128, dtype=torch.uint8)
        images, labels = spec.normalise(grey), torch.arange(4) % prepared.classes
    else:
        images, labels = impressions.images, impressions.labels
    return find_split(prepared.model, at, images.to(where), labels.to(where))
