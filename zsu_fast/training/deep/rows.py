"""The rows of deep forgetting: dead-leaves scenes, and rows inverted to every class.

Training preserves features only where it sees them, and impressions are unlike any real image. So
most rows are drawn *scenes*. With BatchNorm, half of them go through the backbone with the batch's
own statistics instead of the recorded ones: each channel then has the mean and variance of real
data. What forgets the classes are *inverted* rows: boundary tensors of scenes, some layers ahead of
the trained ones, that a few ascent steps optimise for a class (Yin et al., "Dreaming to Distill",
2020, do so with images).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import ModelError
from ...models.input_spec import InputSpec
from ...models.multi_label import log_probabilities
from ...models.parameters import weights_hash
from ...runtime import memory
from ...runtime.inference import Inference
from ...runtime.measuring import multiply_adds
from ...runtime.progress import Reporter, Stopped
from ...splitting.batch_dim import BoundaryTensors
from ...synthesis.batch_norm_prior import batch_norms
from ...synthesis.cache import Cache
from ...synthesis.dead_leaves import dead_leaves_chunks
from ...synthesis.impressions import ClassImpressions
from ...synthesis.space import flatten_boundary
from .row_ascent import RowAscent
from .settings import DeepSettings
from .split import DeepSplit

_BATCH = 64  # scenes that share the statistics of a batch, and of which there is a multiple
_CHUNK = 128  # inverted rows that share the BatchNorm statistics of a batch
_CHUNK_BYTES = 512 * 1024 * 1024  # the most memory that a chunk takes
_ROW_SETTINGS = (  # those that the rows depend on
    "scenes", "large_scenes", "inverted", "inverted_per_class", "ascent_steps", "ascent_step",
    "statistics",
)  # fmt: skip
_CONFIDENCE = (0.3, 0.99)  # each inverted row stops at a probability drawn from this range


@dataclass(frozen=True)
class Scenes:
    """Scenes at the split and at the early split.

    Attributes:
        features: boundary tensors of the split, each [N, ...].
        starts: flattened boundary tensors of the early split, [M, D], of the first M scenes: those
            with the batch's own statistics, if there is BatchNorm. Inverted rows start from them.
    """

    features: BoundaryTensors
    starts: Tensor


@dataclass(frozen=True)
class RowCounts:
    """The number of rows of each kind."""

    scenes: int
    inverted: int


@dataclass
class RowSource:
    """Draws the rows of a model, or takes them from a cache.

    Attributes:
        model: the whole model, for the key of the cache.
        deep: where the rows lie.
        spec: the model's images.
        forget: bool [C].
        settings: how many, and how.
        seed: of everything random.
        cache: folder for finished rows; None stores nothing.
        failure: why training on these rows is known to fail.
    """

    model: nn.Module
    deep: DeepSplit
    spec: InputSpec
    forget: Tensor
    settings: DeepSettings
    seed: int
    cache: str | Path | None = None
    failure: Exception | None = None

    @cached_property
    def scenes(self) -> Scenes:
        """Scenes, run through the backbone in chunks."""
        store = self._store("scenes")
        found = store.load(0) if store else None
        if found is not None:
            features = [found[name].to(self.forget.device) for name in sorted(found)]
            return Scenes(tuple(features[:-1]), features[-1])
        scenes = self._draw()
        if store is not None:
            named = {f"feature_{i:03}": f.cpu() for i, f in enumerate(scenes.features)}
            store.save(0, named | {"starts": scenes.starts.cpu()})
        return scenes

    @torch.no_grad()
    def counts(self) -> RowCounts:
        """How many rows there will be, within memory and time."""
        deep, device, classes = self.deep, self.forget.device, len(self.forget)
        image = self._grey()
        boundary = deep.early.backbone(image)
        points = flatten_boundary(boundary)
        values = max(sum(t.numel() for t in ts) for ts in (boundary, deep.features(points)))
        work = multiply_adds(deep.early.backbone, image)
        pixels = image[0].numel() // image.shape[1]
        scenes = self.settings.scenes_for(pixels, values, classes, work, device)
        work = multiply_adds(deep.flat, points)
        return RowCounts(scenes, self.settings.inverted_for(values, classes, work, device))

    def _grey(self) -> Tensor:
        """A grey image, [1, ...]."""
        bounds = (1, -1, *[1] * (len(self.deep.shape) - 1))
        grey = (self.spec.low.view(bounds) + self.spec.high.view(bounds)).div(2)
        return grey.expand(1, *self.deep.shape).to(self.forget.device)

    @torch.no_grad()
    def _draw(self) -> Scenes:
        deep, device = self.deep, self.forget.device
        bounds = (1, -1, *[1] * (len(deep.shape) - 1))
        low, high = (b.to(device).view(bounds) for b in (self.spec.low, self.spec.high))
        count, image = self.counts().scenes, self._grey()
        parts = [p for p in (deep.early.backbone, deep.middle) if p is not None]
        norms = [norm for part in parts for norm in batch_norms(part)]
        backbone = Inference(deep.early.backbone, image)
        features: list[Tensor] = []  # filled batch by batch: twice as much would be in memory else
        starts, drawn = [], 0
        generator = torch.Generator(device).manual_seed(self.seed)
        for chunk in dead_leaves_chunks(count, deep.shape, self.seed, device):
            chunk = stretch_contrast(chunk, generator) if len(deep.shape) == 3 else chunk
            images = low + chunk * (high - low)
            first = drawn < count // 2
            with _batch_statistics(norms if first else []):
                for batch in images.split(_BATCH):
                    points = flatten_boundary(backbone(batch))
                    found = deep.features(points)
                    features = features or [memory.empty_rows(f, count) for f in found]
                    for column, part in zip(features, found, strict=True):
                        column[drawn : drawn + len(batch)] = part
                    if first or not norms:
                        starts.append(points)
                    drawn += len(batch)
        return Scenes(tuple(features), torch.cat(starts))

    def invert(
        self,
        classes: Sequence[int],
        report: Reporter,
        is_hopeless: Callable[[ClassImpressions], bool] | None = None,
    ) -> ClassImpressions:
        """Optimises boundary tensors of the early split for ``classes``.

        A third of the rows are of forgotten classes, or more if each needs one; the others are
        spread over all. Row k of a class starts from the scene that the model gives the class's
        k-th highest log-probability, and takes Adam-like steps, with one second moment per row,
        until it reaches a probability of its own. If most never do, only a quarter are drawn.
        ``report`` is called after every chunk; a stop that it asks for keeps the rows so far.
        ``is_hopeless`` is called once, with the rows so far, when there are a quarter of those per
        class, and says whether they are the last, which are not cached then. It is not called with
        cached rows.

        Raises:
            ModelError: rows are not finite, such as where squares of the features underflow.
        """
        starts, flat = self.scenes.starts, self.deep.flat
        count, device = self.counts().inverted, starts.device
        generator = torch.Generator().manual_seed(self.seed)
        labels = _labels(torch.tensor(classes), self.forget.cpu(), count, generator)
        count = len(labels)
        target = torch.empty(count).uniform_(*_CONFIDENCE, generator=generator)
        store = self._store("inverted", list(classes), self.forget.nonzero()[:, 0].tolist())
        columns = store.load(0) if store else None
        if columns is None:
            first = self._nearest_scenes(labels)
            ascent = RowAscent(self.deep, self.spec, starts, self.settings)
            row = memory.bytes_per_row(flat, starts[:1])
            chunk = min(_CHUNK, memory.rows_that_fit(row, device), max(1, _CHUNK_BYTES // row))
            done, arrived = [], 0
            with suppress(Stopped):  # the rows so far are kept
                for part in torch.arange(count).split(chunk):
                    done.append(
                        ascent.run(starts[first[part]], labels[part].to(device), target[part])
                    )
                    drawn = int(part[-1]) + 1
                    report("synthesise", drawn, count)
                    arrived += int((done[-1][1].cpu() >= target[part]).sum())
                    if not self._are_a_quarter(labels[:drawn]):
                        continue
                    enough = 2 * arrived < drawn  # as of a model with random weights
                    if is_hopeless is not None and drawn < count and not enough:
                        enough = is_hopeless(self._impressions(_columns(done), labels, target))
                        is_hopeless, store = None, None if enough else store
                    if enough:
                        count = drawn
                        break
            columns = _columns(done)
            if store is not None and len(columns["steps"]) == count:
                store.save(0, columns)
        if not bool(columns["points"].isfinite().all()):
            raise ModelError(
                f"rows inverted ahead of {self.deep.early.name!r} are not finite",
                "Check the scale of its weights, or pass depth='output'.",
            )
        return self._impressions(columns, labels, target)

    def _impressions(
        self, columns: dict[str, Tensor], labels: Tensor, target: Tensor
    ) -> ClassImpressions:
        """The rows drawn so far; ``labels`` and ``target`` are of all that were asked for."""
        confidence = columns["confidence"]
        labels, target = labels[: len(confidence)], target[: len(confidence)]
        return ClassImpressions(
            columns["points"], labels, confidence, target, columns["steps"], confidence >= target,
            self.spec, "tail-input",
        )  # fmt: skip

    def _are_a_quarter(self, labels: Tensor) -> bool:
        """Whether rows of these classes are a quarter of those per class, at least as many as with
        few classes, and one of each forgotten class.
        """
        s = self.settings
        if len(labels) < max(s.inverted, int(len(self.forget) * s.inverted_per_class / 4)):
            return False
        missing = self.forget.cpu().clone()
        missing[labels] = False
        return not bool(missing.any())

    @torch.no_grad()
    def _nearest_scenes(self, labels: Tensor) -> Tensor:
        """For each row, int64, the scene that it starts from."""
        starts = self.scenes.starts
        multi_label = self.settings.multi_label
        parts = [log_probabilities(self.deep.flat(p), multi_label) for p in starts.split(256)]
        log_probability = torch.cat(parts)
        first = torch.zeros_like(labels)
        for label in labels.unique():
            rows = (labels == label).nonzero()[:, 0]
            most = min(len(rows), len(starts))
            nearest = log_probability[:, label].topk(most).indices.cpu()
            first[rows] = nearest[torch.arange(len(rows)) % most]
        return first

    def _store(self, kind: str, *more: Any) -> Cache | None:
        if self.cache is None:
            return None
        deep, spec = self.deep, self.spec
        facts = {
            "format": 3,
            "kind": kind,
            "weights": weights_hash(self.model),
            "output": self.model.extra_repr(),
            "split": [deep.early.name, deep.split.name, list(deep.shape)],
            "spec": [spec.shape, spec.mean, spec.std],
            "settings": [getattr(self.settings, name) for name in _ROW_SETTINGS],
            "seed": self.seed,
            "torch": torch.__version__,
            "device": self.forget.device.type,
            "more": more,
        }
        if self.settings.multi_label:  # keeps the keys of existing caches
            facts["multi_label"] = True
        return Cache(self.cache, facts)


def stretch_contrast(images: Tensor, generator: torch.Generator) -> Tensor:
    """Raises the contrast of every second image, [N, C, H, W] in 0..1, by up to a factor of 12.

    What lies below a random level becomes black, or above it white: dead leaves are grey throughout
    otherwise, unlike digits on black or objects in sunlight. LeNet5 forgetting {1, 2, 3, 4}:
    un-mask FA falls from 4 to 0 %; KarpathyNet: RA rises by 1 point.
    """

    def uniform(low: float, high: float) -> Tensor:
        empty = torch.empty(len(images), 1, 1, 1, device=images.device)
        return empty.uniform_(low, high, generator=generator)

    level, factor = uniform(0.2, 0.9), uniform(0, 2.5).exp()
    stretched = (images - level) * factor + 0.5 * (level < 0.55)
    return torch.where(uniform(0, 1) < 0.5, stretched.clamp(0, 1), images)


@contextmanager
def _batch_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    """Makes BatchNorm layers use the statistics of the batch, and leaves them as they were."""
    saved = [{n: b.clone() for n, b in norm.named_buffers(recurse=False)} for norm in norms]
    try:
        for norm in norms:
            norm.training = True  # not train(), which would reach dropout inside
        yield
    finally:
        for norm, buffers in zip(norms, saved, strict=True):
            norm.training = False
            for name, buffer in norm.named_buffers(recurse=False):
                buffer.copy_(buffers[name])


def _columns(done: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """The results of `RowAscent.run`, of all chunks, on the CPU."""
    values = (torch.cat(column).cpu() for column in zip(*done, strict=True))
    return dict(zip(("points", "confidence", "steps"), values, strict=True))


def _labels(classes: Tensor, forget: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Labels of ``count`` rows, int64, in random order.

    A third are forgotten classes, or more: each has a row, and ``count`` is raised if it must be.
    """

    def spread(among: Tensor, number: int) -> Tensor:
        if number < len(among):
            return among[torch.randperm(len(among), generator=generator)[:number]]
        return among[torch.arange(number) % len(among)]

    wanted = classes[forget[classes]]
    count = max(count, len(wanted) * 3 // 2)
    forgotten = spread(wanted, max(count // 3, len(wanted)))
    labels = torch.cat([forgotten, spread(classes, count - len(forgotten))])
    return labels[torch.randperm(count, generator=generator)]
