"""The record of a run: what was asked, what was done, and hashes that prove which weights."""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..models.input_spec import InputSpec
from ..models.parameters import unwrap, weights_hash
from ..splitting.split import Split
from ..synthesis import class_sampling as sampling
from ..synthesis.impressions import ClassImpressions
from ..training.trainer import Fit
from ..version import VERSION


@dataclass
class Record:
    """Everything about one run, as plain values; `to_json` writes it.

    Attributes:
        model: class name of the user's model.
        forget: the forgotten classes.
        forgotten: classes that the model had forgotten before.
        classes: the number of logits.
        settings: the options of the run.
        input: shape, mean, std, and where they are known from.
        versions: of zsu_fast, torch, python; the platform; threads; the device, a GPU by its name.
        weights_before, weights_after: `classifier.weights_hash`.
        impressions: count, of how many classes, chosen by what rule where not all have some, hit
            rate, worst class's hit rate, mean confidence, steps.
        depth: "output" or "deep"; of a deep run also what its held-out rows showed before and
            after (`deep.forget_deeply`).
        split: where, why, what was trained, whether only outputs can forget.
        fit: why it stopped, the best check and the history.
        timings: seconds by stage, and in all.
        distributed: ranks, backend, and the rows that each rank made; {} without a process group.
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
    weights_after: str = ""
    impressions: dict[str, Any] = field(default_factory=dict)
    depth: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    distributed: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

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
        """The part that is known before the run."""
        record = cls(
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
                "device": f"{device} ({torch.cuda.get_device_name(device)})"
                if device.type == "cuda"
                else str(device),
            },
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            weights_before=weights_hash(model),
        )
        record._clock = time.perf_counter()
        return record

    def finish(
        self,
        model: nn.Module,
        made: ClassImpressions,
        cut: Split,
        fit: Fit,
        sampled: str = sampling.ALL,
    ) -> None:
        """Adds what came out; ``sampled`` says which classes have impressions, in words."""
        self.weights_after = weights_hash(model)
        # nothing was made of classes that the model does not answer any more, or were left out
        before = set(self.forgotten)
        having = [c for c in made.labels.unique().tolist() if c not in before]
        rates = {c: made.hit_rate_of(c) for c in having}
        self.impressions = {
            "count": len(made),
            "classes": len(having),
            "rule": sampled,
            "hit_rate": made.hit_rate,
            "worst_class_hit_rate": min(rates.values()),
            "mean_confidence": float(made.confidence.mean()),
            "mean_steps": float(made.steps.float().mean()),
            "most_steps": int(made.steps.max()),
        }
        self.split = {
            "at": cut.name,
            "reason": cut.reason,
            "trained": cut.parameters,
            "output_level": cut.output_level,
        }
        self.fit = {
            "stopped": fit.stopped,
            "learning_rate": fit.learning_rate,
            "best": asdict(fit.best) if fit.best else None,
            "history": [asdict(c) for c in fit.history],
        }
        self.timings["total"] = time.perf_counter() - self._clock
        self.warnings = list(self._warnings(fit, rates))

    def _warnings(self, fit: Fit, rates: dict[int, float]) -> list[str]:
        notes = []
        if self.input.get("assumed"):
            notes.append(
                f"mean and std of the images are a guess ({self.input['source']}): pass mean= and "
                f"std= as the model was trained."
            )
        if self.split.get("output_level"):
            notes.append(
                f"only the last layer ({', '.join(self.split['trained'])}) was trained: outputs "
                f"forget, the features of the forgotten classes are still inside. Name an "
                f"earlier module by tail= to train more."
            )
        empty = [c for c, rate in rates.items() if rate == 0]
        if empty:
            notes.append(
                f"no impression reached its confidence for class {_few(empty)}: the model may "
                f"never answer it, or input_shape, mean and std are not the model's. Raise "
                f"max_steps if they are."
            )
        if "given up" in self.depth.get("stopped", ""):
            notes.append(
                f"the features were left as they are, only outputs forget: "
                f"{self.depth['stopped']}. Leave learning_rate out, or pass a smaller one."
            )
        few = self.impressions["count"] / self.impressions["classes"]
        if self.depth.get("depth") == "deep" and few < 4:
            notes.append(
                f"depth='deep' had {few:.3g} impressions a class: RA may fall by ten points and "
                f"more (EfficientNet-lite0: 12). Measure it; depth='output' keeps it."
            )
        if fit.best is None or fit.best.leak > 0.01:
            leak = 100 * fit.best.leak if fit.best else 100
            notes.append(
                f"{leak:.1f} % of held-out rows are still answered with a forgotten class: "
                f"{fit.stopped}. Try objective='masked', more steps, or another tail."
            )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """As plain values; numbers that are not finite become None."""
        return _finite(asdict(self))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    _clock: float = field(default=0.0, init=False, repr=False)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items() if not k.startswith("_")}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _few(items: list[int]) -> str:
    shown = ", ".join(map(str, items[:8]))
    return shown + (f" and {len(items) - 8} more" if len(items) > 8 else "")
