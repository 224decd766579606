"""What an audit returns: rows of metrics, checks, findings, and a verdict in words."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...models import checkpoint
from ...synthesis.impressions import ClassImpressions
from ..accuracy import Evaluation
from .metrics import BY_KEY, METRICS

ORIGINAL, MASK, RANDOM, UNLEARNED, GOLDEN = (
    "original", "mask", "random embeddings", "unlearned", "golden",
)  # fmt: skip


@dataclass
class Layer:
    """One layer of one model, against the same layer of the original.

    Attributes:
        layer: the module's name; what is said of features is said of its *input*.
        weights: ||W' - W|| / ||W|| of its own parameters; None if the original has no such layer.
        features_forget, features_retain: `drift.feature_drift` on impressions.
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
    """All that was measured of one model. Each metric has a value or a reason why it has none.

    Attributes:
        name: "original", "mask", "random embeddings", "unlearned" or "golden".
        values: metric's key -> number.
        missing: metric's key -> why it could not be computed.
        evaluation: FA, RA, overall and per class; None without data.
        confusion: forgotten class -> answer -> per cent of its images (without data: impressions).
        layers: at most eight of the model's layers.
        relearning: "head" and "full" -> the (step, FA) curve.
    """

    name: str
    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    confusion: dict[int, dict[int, float]] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    relearning: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def put(self, key: str, value: float | None, otherwise: str = "it is not defined here") -> None:
        """Stores a value, or why there is none."""
        if key not in BY_KEY:
            raise KeyError(f"{key} has no definition in METRICS")
        if value is None or not math.isfinite(value):
            self.missing[key] = otherwise
        else:
            self.values[key] = float(value)
            self.missing.pop(key, None)

    def get(self, key: str) -> float | None:
        """The value, None where there is none."""
        return self.values.get(key)


@dataclass(frozen=True)
class Check:
    """One test of the unlearned model.

    Attributes:
        name: of the test.
        passed: True, False, or None where it can't be told.
        says: the numbers and the limit, in words, or why it can't be told.
    """

    name: str
    passed: bool | None
    says: str


@dataclass(frozen=True)
class Finding:
    """Something that was recognised, such as a mask.

    Attributes:
        name: "untouched", "one class only", "mask", "shuffled head", "noise in the head",
            "output level", "hidden behind the head", "features kept".
        says: what it is, in words.
    """

    name: str
    says: str


@dataclass
class Audit:
    """What was forgotten, on evidence. `str` gives the verdict and the main table.

    Attributes:
        verdict: sentences, the most important first.
        findings: what was recognised; empty if nothing is wrong.
        checks: each test of the unlearned model.
        rows: the models side by side.
        forget, classes: what was to be forgotten, and the number of logits.
        settings: of the audit.
        counts: images of each kind that were measured on.
        hashes: model's name -> `classifier.weights_hash`.
        notes: what to know when reading the numbers.
        timings: seconds by part.
        pictures: model's name -> impressions of forgotten classes made from it (not in JSON).
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
        """No check failed (one that can't be told does not count)."""
        return all(c.passed is not False for c in self.checks)

    def row(self, name: str) -> Row:
        """The row of that name.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def found(self, name: str) -> bool:
        """Whether a finding of that name was made."""
        return any(f.name == name for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, with the definition of every metric."""
        skip = {"rows", "pictures", "impressions"}
        plain = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in skip
        }
        plain["passed"] = self.passed
        plain["findings"] = [asdict(f) for f in self.findings]
        plain["checks"] = [asdict(c) for c in self.checks]
        plain["rows"] = [asdict(row) for row in self.rows]
        plain["metrics"] = [asdict(m) for m in METRICS]
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Writes the JSON file, atomically; never over an existing one without ``force``.

        Raises:
            OutputError: the file exists or can't be written.
        """
        content = self.to_json().encode()
        checkpoint.write_atomically(path, lambda file: file.write(content), force)

    def __str__(self) -> str:
        keys = [k for k in MAIN if any(k in row.values for row in self.rows)]
        lines = [*self.verdict, ""]
        width = max(len(BY_KEY[k].title) for k in keys)
        heads = "".join(f"{row.name:>19}" for row in self.rows)
        lines.append(" " * width + heads)
        for key in keys:
            cells = "".join(f"{show(row.get(key)):>19}" for row in self.rows)
            lines.append(f"{BY_KEY[key].title:<{width}}{cells}")
        return "\n".join(lines)


# The rows of the short table.
MAIN = (
    "fa", "ra", "overall", "impressions_fa", "unmask_fa", "whole_head_fa", "unmask_impressions_fa",
    "whole_head_impressions_fa", "agreement_kl",
    "drift_features_forget", "resynthesis_hit", "resynthesis_steps", "probe_forget", "knn_forget",
    "cka_original_forget", "mia_forget_confidence", "mia_retain_confidence",
    "relearn_head_steps", "relearn_full_steps", "ain_full",
)  # fmt: skip


def show(value: float | None) -> str:
    """A number for people: two decimals, "-" for none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value == round(value) and abs(value) >= 100 else f"{value:.2f}"
