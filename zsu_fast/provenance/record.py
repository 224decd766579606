"""The record of a run: its settings, its results, and the hashes of the weights."""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import shorten
from ..models.checkpoint import origin
from ..models.embedding_classifier import deliverable
from ..models.input_spec import InputSpec
from ..models.parameters import unwrap, weights_hash
from ..splitting.split import Split
from ..synthesis import class_sampling as sampling
from ..synthesis.impressions import ClassImpressions
from ..training.trainer import Fit
from ..version import VERSION

# Share of answers that deep forgetting changes on scenes, from which on it is warned of:
# EfficientNet-lite0 is at 6 to 13 % and loses 3 points of RA (benchmarks/results/deep_limits.md).
_MANY_CHANGED = 0.15


@dataclass
class Record:
    """Everything about one run, as plain values that `to_json` writes.

    Attributes:
        model: class name of the user's model.
        forget: the classes to forget.
        forgotten: classes that the model had forgotten before.
        multi_label: whether each class has a sigmoid of its own.
        classes: number of logits.
        gallery: of an `EmbeddingClassifier`: ``identities``, their number; ``metric``; ``scale``;
            ``templates``, how many of ``forget`` are in no gallery: these are numbered on from its
            last identity; and ``forgotten_as``. Else {}.
        labels: class index, as text, -> name, for the forgotten classes; {} if names are unknown.
        identities: of an encoder with a gallery: a salt, and the salted hashes of the templates of
            each of ``forget`` (`zsu_fast.provenance.templates`); else {}.
        settings: the options of the run.
        input: shape, mean, std and so on of the images, and how they are known (`InputSpec`).
        versions: of zsu_fast, torch and python; platform, threads, device.
        started: when, in UTC.
        weights_file: where the weights were read: the file, the entry in it, what else it holds
            (`zsu_fast.models.checkpoint.Origin`); {} if the package did not read them.
        weights_before, weights_after: `weights_hash` of the model; of the encoder alone if it has
            a gallery, which may change from run to run.
        impressions: their count and number of classes, the rule that chose the classes, hit rate
            (also of the worst class), mean confidence, steps; ``computed``: how the steps were
            computed, where that was chosen by timing.
        depth: ``depth``, what was asked for, "deep" or "output"; ``level``, what was reached;
            ``fallback``, why that is "output" instead; after deep forgetting, also what
            `forget_deeply` returns.
        split: where and why, the trained parameters, whether only outputs can forget.
        fit: why it stopped, the learning rate, the best validation, the history.
        timings: seconds per stage, and in total.
        compact: with compact=True, ``classes_before`` and ``classes``, the numbers of classes;
            ``new_index``, from the old index of each retained class (as text) to its new one;
            ``tensors``, the names of those that were cut, and along which dimension; else {}.
        distributed: ranks, backend, and rows per rank; {} without a process group.
        warnings: what the user should know, in words.
    """

    model: str
    forget: list[int]
    classes: int
    settings: dict[str, Any]
    input: dict[str, Any]
    versions: dict[str, str]
    started: str
    weights_before: str
    forgotten: list[int] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    identities: dict[str, Any] = field(default_factory=dict)
    multi_label: bool = False
    gallery: dict[str, Any] = field(default_factory=dict)
    weights_after: str = ""
    weights_file: dict[str, Any] = field(default_factory=dict)
    impressions: dict[str, Any] = field(default_factory=dict)
    depth: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    compact: dict[str, Any] = field(default_factory=dict)
    distributed: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _clock: float = field(default_factory=time.perf_counter, init=False, repr=False)

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        spec: InputSpec,
        forget: list[int],
        classes: int,
        settings: dict[str, Any],
        device: torch.device,
    ) -> Record:
        """Starts the record with what is known before the run."""
        model = deliverable(model)
        source = origin(model)
        gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        return cls(
            model=type(unwrap(model)).__name__,
            forget=forget,
            classes=classes,
            settings={k: _plain(v) for k, v in settings.items()},
            input=asdict(spec),
            versions={
                "zsu_fast": VERSION,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "threads": str(torch.get_num_threads()),
                "device": f"{device}{gpu}",
            },
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            weights_before=weights_hash(model),
            weights_file={} if source is None else source.to_dict(),
        )

    def finish(
        self,
        model: nn.Module,
        impressions: ClassImpressions,
        split: Split,
        fit: Fit,
        rule: str = sampling.ALL,
    ) -> None:
        """Adds the results; ``rule`` says in words which classes have impressions."""
        self.weights_after = weights_hash(deliverable(model))
        # given impressions may include classes that were forgotten before
        before = set(self.forgotten)
        having = [c for c in impressions.labels.unique().tolist() if c not in before]
        rates = {c: impressions.hit_rate_of(c) for c in having}
        self.impressions = {
            "count": len(impressions),
            "classes": len(having),
            "rule": rule,
            "hit_rate": impressions.hit_rate,
            "worst_class_hit_rate": min(rates.values()),
            "mean_confidence": float(impressions.confidence.mean()),
            "mean_steps": float(impressions.steps.float().mean()),
            "most_steps": int(impressions.steps.max()),
        }
        if impressions.computed:
            self.impressions["computed"] = impressions.computed
        self.split = {
            "at": split.name,
            "reason": split.reason,
            "trained": split.parameters,
            "output_level": split.output_level,
        }
        self.fit = {
            "stopped": fit.stopped,
            "learning_rate": fit.learning_rate,
            "best": asdict(fit.best) if fit.best else None,
            "history": [asdict(c) for c in fit.history],
        }
        self.timings["total"] = time.perf_counter() - self._clock
        self.warnings = self._warnings(rates)

    def _warnings(self, rates: dict[int, float]) -> list[str]:
        notes = []
        if self.input.get("assumed"):
            notes.append(
                f"mean and std of the images are a guess ({self.input['source']}): pass mean= and "
                f"std= as in the model's training."
            )
        notes += self.depth.get("unused", [])
        if "fallback" in self.depth:
            notes.append(
                f"level: output. Deep forgetting was not possible, so only the outputs forget: "
                f"{self.depth['fallback']}"
            )
        elif self.split.get("output_level"):
            notes.append(
                f"level: output. Only the last layer ({', '.join(self.split['trained'])}) was "
                f"trained: the outputs forget, but the features of the forgotten classes are still "
                f"inside, and the original last layer brings them back. Pass depth='deep' to train "
                f"the layers before it too."
            )
        changed = 1 - self.depth.get("agreement", {}).get("after", 1.0)
        if "fallback" not in self.depth and changed > _MANY_CHANGED:
            where = "rows" if self.gallery.get("forgotten_as") == "stranger" else "scenes"
            notes.append(
                f"deep forgetting changed {changed:.0%} of the retained answers on held-out "
                f"{where}. Measure with evaluate() how many stay on photographs."
            )
        if empty := [c for c, rate in rates.items() if rate == 0]:
            notes.append(
                f"no impression reached its confidence for class {shorten(empty)}: the model may "
                f"never predict it, or input_shape, mean and std are wrong. Raise max_steps if "
                f"they are right."
            )
        return notes

    @property
    def forgotten_rows(self) -> list[int]:
        """The forgotten classes that the result has logits of, sorted: none if it is compact."""
        return [] if self.compact else sorted({*self.forget, *self.forgotten})

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values; numbers that are not finite become None."""
        return _finite(asdict(self))

    def to_json(self) -> str:
        """Returns the record as strict JSON."""
        return json.dumps(self.to_dict(), indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items() if not k.startswith("_")}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
