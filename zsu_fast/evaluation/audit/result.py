"""The result of an audit: rows of metrics, checks, findings, a verdict, and the names in them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...models import checkpoint
from ...synthesis.impressions import ClassImpressions
from ..accuracy import Evaluation
from .encoder_metrics import ENCODER_MAIN, ENCODER_METRICS
from .metrics import BY_KEY, Metric, definitions

# The rows of an audit, in the order of its tables.
MODELS = ("original", "mask", "random embeddings", "unlearned", "golden")
ORIGINAL, MASK, RANDOM, UNLEARNED, GOLDEN = MODELS
# What the un-mask test restores of the original's last layer: the rows of the forgotten classes, or
# the whole layer.
Restored = Literal["rows", "last layer"]
# The prefix of the metrics with that part restored.
UNMASK_PREFIXES: dict[Restored, str] = {"rows": "unmask", "last layer": "unmask_last_layer"}
# The weights that relearning trains, and the words for them.
Trained = Literal["last_layer", "full"]
TRAINED_WORDS: dict[Trained, str] = {"last_layer": "last layer", "full": "all weights"}


class FindingName:
    """What an audit can recognise in an unlearned model."""

    UNTOUCHED = "untouched"
    ONE_CLASS = "one class only"
    MASK = "mask"
    SHUFFLED = "shuffled last layer"
    NOISE = "noise in the last layer"
    OUTPUT_LEVEL = "output level"
    HIDDEN = "hidden by the last layer"
    FEATURES_KEPT = "features kept"
    DAMAGED = "damaged"
    NOT_FORGOTTEN = "not forgotten"
    ACCUSES = "taken for another identity"


class CheckName:
    """The tests that an unlearned model passes or fails."""

    OUTPUTS = "outputs"
    RETAINED = "retained classes"
    UNMASK = "un-mask"
    ADAPTED_UNMASK = "adapted un-mask"
    AMONG_FORGOTTEN = "forgotten classes among themselves"
    FEATURES = "features changed"
    LAST_LAYER = "no trick in the last layer"
    RESYNTHESIS = "re-synthesis"
    PROBE = "linear probe"
    KNN = "k-NN"
    MEMBERSHIP = "membership inference"
    RELEARN_LAST_LAYER = "relearning (last layer)"
    RELEARN_FULL = "relearning (all weights)"
    DIVERGENCE = "outputs like the golden model's"


class EncoderCheckName:
    """The tests of an unlearned encoder, besides the linear probe and relearning."""

    IDENTIFICATION = "identification"
    RETAINED_IDENTITIES = "retained identities"
    STRANGERS = "like a stranger"
    REENROLMENT = "re-enrolment"


@dataclass
class Layer:
    """One layer of one model, compared with the same layer of the original.

    Attributes:
        layer: the module's name; its features are its *input*.
        weights: ||W' - W|| / ||W|| of its own parameters; None if the original has no such layer.
        features_forget, features_retain: `feature_drift` on impressions; None if shapes differ.
        probe_forget, probe_retain: accuracy of the linear probe, per cent; None without data.
    """

    layer: str
    weights: float | None = None
    features_forget: float | None = None
    features_retain: float | None = None
    probe_forget: float | None = None
    probe_retain: float | None = None


@dataclass
class Row:
    """All measurements of one model. Each metric has a value or a reason why it has none.

    Attributes:
        name: one of `MODELS`.
        values: metric's key -> number.
        missing: metric's key -> why it could not be computed.
        evaluation: FA, RA, overall and per class; None without data.
        confusion: forgotten class -> predicted class -> per cent of its images (without data:
            impressions).
        layers: at most eight of the model's layers.
        relearning: "last_layer" and "full" -> the (step, FA) curve.
        distributions: of an encoder: gallery ("original's" or "re-enrolled") -> kind of pair ->
            (similarity, per cent of the pairs), see `zsu_fast.evaluation.identification`.
    """

    name: str
    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    confusion: dict[int, dict[int, float]] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    relearning: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    distributions: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)

    def put(self, key: str, value: float | None, reason: str = "it is undefined here") -> None:
        """Stores a finite value, or the ``reason`` why there is none.

        Raises:
            KeyError: neither `METRICS` nor `ENCODER_METRICS` defines ``key``.
        """
        if key not in BY_KEY and key not in ENCODER_METRICS:
            raise KeyError(f"{key} has no definition in METRICS")
        if value is None or not math.isfinite(value):
            self.missing[key] = reason
        else:
            self.values[key] = float(value)
            self.missing.pop(key, None)

    def get(self, key: str) -> float | None:
        return self.values.get(key)


@dataclass(frozen=True)
class Check:
    """One test of the unlearned model.

    Attributes:
        name: one of `CheckName` or `EncoderCheckName`.
        passed: True, False, or None if the test can't tell.
        says: the numbers and the limit, in words, or why the test can't tell.
    """

    name: str
    passed: bool | None
    says: str


@dataclass(frozen=True)
class Finding:
    """Something that the audit recognised in the unlearned model, such as a mask.

    Attributes:
        name: one of `FindingName`.
        says: a sentence about it, without the full stop.
    """

    name: str
    says: str


@dataclass
class Audit:
    """The result of `audit`. `str` gives the verdict and the main table.

    Attributes:
        verdict: sentences, the most important first.
        findings: what the audit recognised, the gravest first; empty if nothing is wrong.
        checks: the tests of the unlearned model.
        rows: the models side by side.
        forget, classes: the classes that were to be forgotten, and the number of logits.
        settings: the options of the audit.
        counts: the number of images of each kind.
        hashes: model's name -> `zsu_fast.models.parameters.weights_hash`.
        notes: caveats for reading the numbers.
        timings: seconds per part.
        pictures: model's name -> its impressions of forgotten classes (not in JSON).
        impressions: the held-out impressions of the original (not in JSON).
    """

    verdict: list[str]
    findings: list[Finding]
    checks: list[Check]
    rows: list[Row]
    forget: list[int]
    classes: int
    settings: dict[str, Any]
    counts: dict[str, int]
    hashes: dict[str, str]
    notes: list[str]
    timings: dict[str, float]
    pictures: dict[str, ClassImpressions] = field(default_factory=dict, repr=False)
    impressions: ClassImpressions | None = field(default=None, repr=False)

    @property
    def passed(self) -> bool:
        """Whether no check failed; a check that can't tell does not count."""
        return all(c.passed is not False for c in self.checks)

    @property
    def definitions(self) -> dict[str, Metric]:
        """The definition of each metric, by its key."""
        if self.settings.get("encoder"):
            return ENCODER_METRICS
        return definitions(bool(self.settings.get("multi_label")))

    @property
    def main(self) -> list[str]:
        """The keys of the short table's metrics: those that a row has."""
        keys = ENCODER_MAIN if self.settings.get("encoder") else MAIN
        return [key for key in keys if any(key in row.values for row in self.rows)]

    def row(self, name: str) -> Row:
        """Returns the row of the model called ``name``.

        Raises:
            KeyError: there is none.
        """
        return {row.name: row for row in self.rows}[name]

    def found(self, name: str) -> bool:
        """Whether there is a finding called ``name``."""
        return any(f.name == name for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, with the definition of every metric."""
        skip = {"rows", "pictures", "impressions"}
        plain = {name: getattr(self, name) for name in vars(self) if name not in skip}
        plain["passed"] = self.passed
        for name in ("findings", "checks", "rows"):
            plain[name] = [asdict(entry) for entry in getattr(self, name)]
        plain["metrics"] = [asdict(m) for m in self.definitions.values()]
        return plain

    def to_json(self) -> str:
        """Returns `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Writes the JSON file atomically; replaces an existing one only with ``force``.

        Raises:
            OutputError: the file exists, or can't be written.
        """
        content = self.to_json().encode()
        checkpoint.write_atomically(path, lambda file: file.write(content), force)

    def __str__(self) -> str:
        keys = self.main
        lines = [*self.verdict, ""]
        titles = {k: self.definitions[k].title for k in keys}
        width = max(map(len, titles.values()), default=0)
        lines.append(" " * width + "".join(f"{row.name:>19}" for row in self.rows))
        for key in keys:
            cells = "".join(f"{show(row.get(key)):>19}" for row in self.rows)
            lines.append(f"{titles[key]:<{width}}{cells}")
        return "\n".join(lines)


# The metrics of the short table
MAIN = (
    "fa", "ra", "erasure_cost", "overall", "impressions_fa", "unmask_fa", "unmask_last_layer_fa",
    "unmask_impressions_fa", "unmask_last_layer_impressions_fa", "unmask_ff", "adapted_unmask_fa",
    "agreement_kl", "drift_features_forget", "resynthesis_hit", "resynthesis_steps",
    "probe_forget", "knn_forget", "cka_original_forget", "mia_forget_confidence",
    "mia_retain_confidence", "relearn_last_layer_steps", "relearn_full_steps", "ain_full",
)  # fmt: skip


def show(value: float | None) -> str:
    """Formats a number for people: two decimals, or none from 100 on; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value == round(value) and abs(value) >= 100 else f"{value:.2f}"
