"""One checked request to forget classes: the model's copy, the classes, and the record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, ModelError, shorten
from .models.class_indices import check_forget, check_forgotten
from .models.compact import Compaction, cut, find_compaction
from .models.embedding_classifier import EmbeddingClassifier, as_embedding_classifier
from .models.input_spec import noise_images
from .models.labels import resolve_labels
from .models.parameters import deep_copy
from .models.prepare import prepare_model
from .options import ENCODER_REMEDY, PER_RANK, Options
from .provenance.ledger import as_ledger
from .provenance.record import Record
from .provenance.templates import hash_templates
from .runtime.distributed import Ranks
from .runtime.progress import Reporter
from .runtime.torch_settings import threads_for
from .splitting.class_rows import ClassDims
from .splitting.copies import class_copies
from .splitting.split import Split, check_frozen, find_split
from .synthesis.class_sampling import classes_to_synthesise
from .synthesis.gallery_sampling import WorkingGallery, as_templates
from .training.deep.split import OnlyLastLayer, find_deep_split


class Request:
    """What a call of `unlearn` asks for, checked before any work is done.

    Args:
        model, forget, forgotten, ledger, class_names: as for `ZeroShotUnlearner`.
        options: the call's other options.
        ranks: the ranks that make the call.
        report: where progress goes.

    Attributes:
        original: the user's model.
        work: the copy that is computed with, on ``device``.
        spec: of the images that the model expects.
        device: where to compute.
        classes: number of logits.
        multi_label: whether each class has a sigmoid of its own.
        notes: what was found while probing the model (`PreparedModel.notes`).
        frozen: in words, which parameters have ``requires_grad=False``; "" if none.
        multiply_adds: of one image.
        labels: the `Labels` of the model's classes; None if they are not known.
        forget, forgotten: class indices.
        gallery: of an `EmbeddingClassifier`, the identities that the run computes with; then
            ``classes``, ``forget_mask`` and ``active_classes`` count these. None for other models.
        forget_mask: bool [C]: those of ``forget`` and ``forgotten``.
        active_classes: the classes to synthesise, chosen by ``class_rule`` (in words).
        ledger: None without one, and on all ranks but the first.
        compaction: which rows compact=True cuts; None without it.
        record: the `Record`, begun.
    """

    def __init__(
        self,
        model: nn.Module,
        forget: Any,
        forgotten: Any,
        ledger: Any,
        class_names: Any,
        options: Options,
        ranks: Ranks,
        report: Reporter,
    ) -> None:
        self.options, self.ranks, self.report = options, ranks, report
        self.active_classes: list[int]
        self.forget_mask: Tensor
        device = options.device
        if device is None and ranks.device.type == "cuda":
            device = ranks.device
        classifier = as_embedding_classifier(model)
        self.gallery: WorkingGallery | None = None
        if classifier is not None:
            options.check_encoder(classifier.bias is not None)
            self._choose_identities(classifier, forget, forgotten, ledger, class_names)
        elif options.forgotten_as == "stranger":
            raise ArgumentError(
                "forgotten_as", "got 'stranger', and the model is no EmbeddingClassifier",
                "Leave it out: the images of a class go to the classes that they resemble.",
            )  # fmt: skip
        prepared = prepare_model(
            model if self.gallery is None else self.gallery.classifier, device,
            options.input_shape, options.mean, options.std, options.output, options.multi_label,
        )  # fmt: skip
        self.multi_label = prepared.multi_label
        options.set_multi_label(self.multi_label)
        self.original, self.work, self.spec = model, prepared.model, prepared.spec
        self.device, self.classes = prepared.device, prepared.classes
        self.notes = prepared.notes
        self._target: nn.Module | None = self._copy_of_original()  # may fail: before the work
        self.frozen = check_frozen(self.work, noise_images(self.spec, 4).to(self.device))
        self.multiply_adds = prepared.multiply_adds()
        if self.gallery is None:
            self._choose_classes(forget, forgotten, ledger, class_names)
        else:
            self.forget_mask = self.gallery.forget_mask.to(self.device)
        options.set_per_class(len(self.active_classes))
        self._begin_record()

    def _choose_classes(self, forget: Any, forgotten: Any, ledger: Any, class_names: Any) -> None:
        """Checks the classes to forget, and chooses those to synthesise."""
        options = self.options
        self.labels = resolve_labels(class_names, self.original, self.classes)
        self.forget = check_forget(forget, self.classes, self.labels)
        self._choose_forgotten(forgotten, ledger, self.classes)
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

    def _choose_forgotten(
        self, forgotten: Any, ledger: Any, classes: int, encoder: EmbeddingClassifier | None = None
    ) -> None:
        """Checks the classes that were forgotten before, and opens the ledger."""
        self.ledger = as_ledger(ledger) if self.ranks.is_main else None
        if forgotten is None:
            known: list[int] | None = None
            if self.ledger is not None and encoder is not None:
                known = self.ledger.forgotten_identities(encoder)
            elif self.ledger is not None:
                known = self.ledger.forgotten()
            forgotten = self.ranks.broadcast_object(known)
        self.forgotten = check_forgotten(forgotten, self.forget, classes, self.labels)
        if self.ledger is not None:
            self.ledger.check_forgotten(self.forgotten)

    def _choose_identities(
        self, model: EmbeddingClassifier, forget: Any, forgotten: Any, ledger: Any, names: Any
    ) -> None:
        """The same for an encoder: the identities to forget, and the gallery to compute with."""
        options, count = self.options, len(model.gallery)
        self.labels, self.compaction = resolve_labels(names, model, count), None
        templates = as_templates(forget, model.templates.shape[1])
        self.forget = [] if templates is not None else check_forget(forget, count, self.labels)
        self._choose_forgotten(forgotten, ledger, count, model)
        if templates is not None:
            templates = templates.to(model.templates.device)
        self.gallery = WorkingGallery.choose(
            model, self.forget, self.forgotten, templates, options.retain_sample, options.seed
        )
        self.forget, self.class_rule = self.gallery.forget, self.gallery.rule
        self.active_classes = self.gallery.active

    def _begin_record(self) -> None:
        """Begins the record; checks that it fits the ledger, and is the same on all ranks."""
        classes = self.classes if self.gallery is None else self.gallery.classes
        self.record = Record.begin(
            self.original, self.spec, self.forget, classes, self.options.given, self.device
        )
        self.record.depth |= {"depth": self.options.depth, "level": self.options.depth}
        self.record.forgotten, self.record.multi_label = self.forgotten, self.multi_label
        if self.gallery is not None:
            self.record.gallery = self.gallery.facts() | {"forgotten_as": self.options.forgotten_as}
        if self.labels is not None:
            known = [c for c in (*self.forget, *self.forgotten) if c < len(self.labels)]
            self.record.labels = self.labels.named(known)
        if self.gallery is not None:
            self.record.identities = hash_templates(self.gallery.templates_to_forget())
        before = self.record.weights_before
        if self.ledger is not None:
            self.ledger.check(before)
        call = {"model": before, "forget": self.forget, "forgotten": self.forgotten}
        same = {k: v for k, v in self.record.settings.items() if k not in PER_RANK}
        self.ranks.check_same(same | call)

    def check_options(self, impressions_given: bool) -> None:
        """Notes options without effect. Raises before the synthesis if ``tail`` can't be used; with
        space="tail-input" the split comes before it.
        """
        options = self.options
        self.record.depth["unused"] = options.without_effect(
            impressions_given, self.work, self.classes, len(self.forget)
        )
        if self.gallery is not None and impressions_given:
            raise ArgumentError(
                "impressions", "got some for an encoder", "Leave it out; cache= keeps the rows."
            )
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

    def fall_back(self, reason: str) -> None:
        """Goes on at the output level; an encoder has none.

        Raises:
            ModelError: the model is an encoder.
        """
        if self.gallery is not None:
            raise ModelError(f"its encoder can't forget: {reason}", ENCODER_REMEDY)
        self.options.depth = "output"
        self.record.depth |= {"level": "output", "fallback": reason}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, and sets a number of threads that suits the model."""
        started = time.perf_counter()
        with threads_for(self.multiply_adds, self.device):
            yield
        self.record.timings[name] = time.perf_counter() - started

    def target(self) -> nn.Module:
        """The model that the result is written into; each call returns another copy."""
        target, self._target = self._target, None
        return self._copy_of_original() if target is None else target

    def _copy_of_original(self) -> nn.Module:
        if self.options.inplace:
            return self.original
        return deep_copy(self.original, "Pass inplace=True, or the module inside the wrapper.")

    def compacted(self, unlearned: nn.Module) -> nn.Module | None:
        """With compact=True, a copy without the rows of forgotten classes; else None."""
        if self.compaction is None:
            return None
        smaller = deep_copy(unlearned, "Leave compact out.")
        cut(smaller, self.compaction)
        self.record.compact = self.compaction.to_dict()
        return smaller

    def copies(self, split: Split) -> ClassDims:
        """Tensors with one row per class that are not trained, but for an encoder's templates."""
        if self.gallery is not None:
            return {}
        images = noise_images(self.spec, 2).to(self.device)
        return class_copies(self.work, images, split.parameters)

    def note_left_out(self, split: Split, copies: ClassDims) -> None:
        """Adds to the record what the run has not changed, and further copies that it erased."""
        notes = [self.frozen] if self.frozen else []
        self.record.split |= {"copies": list(copies), "erased": self.options.everywhere}
        if copies and not self.options.everywhere:
            notes.append(
                f"further tensors hold one row per class, and still those of the forgotten ones: "
                f"{shorten(copies)}. Pass everywhere=True to erase these rows."
            )
        self.record.warnings += [f"not covered: {note}" for note in notes]
        self.record.warnings += [split.warning] if split.warning else []
