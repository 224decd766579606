"""Deep forgetting of architectures with random weights: does it end, and at what cost?

    python -m benchmarks.end_to_end.deep_untrained                  # half an hour on one core
    python -m benchmarks.end_to_end.deep_untrained swin_t vit_b_16
    python -m benchmarks.end_to_end.deep_untrained --check          # exit 1 if a bar is missed
    python -m benchmarks.end_to_end.deep_untrained --summary        # from the CSV file, run nothing

The call is ``zsu_fast.unlearn(model, forget)``, without a cache and on one thread: 10 of 1,000
classes at 224 pixels, 2 of 10 at 32. Each runs in a process of its own, whose peak memory is that
of the call. *Image-steps*: see `deep`. Nothing is said about accuracy, as random weights have none.
Writes ``results/deep_untrained.csv``, a line per call, and ``deep_untrained.md``.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision import models

import zsu_fast
from benchmarks.end_to_end.deep import (
    ImageStep,
    machine,
    machines,
    numbers,
    parser,
    printed_warnings,
    run_benchmark,
)
from zsu_fast.models import zoo

_GIGABYTE = 1e9
_NAN = float("nan")


@dataclass(frozen=True)
class Setting:
    """A model and its bars.

    Attributes:
        build: returns the model; its weights are random.
        side: images have this many rows and columns.
        forget: the classes to forget.
        batch: of the image-steps.
        image_steps, gigabytes: at most.
    """

    build: Callable[[], nn.Module]
    side: int
    forget: tuple[int, ...]
    batch: int
    image_steps: float
    gigabytes: float = float("inf")


@dataclass(frozen=True)
class Run:
    """One measured call.

    Attributes:
        level: "deep", or "output" after a fallback.
        reason: of the fallback, or "".
        leak, agreement: on held-out rows, in per cent; see `forget_deeply`.
        factor: by which the change was multiplied.
        gigabytes: peak memory of the process.
    """

    model: str
    level: str
    reason: str
    leak: float
    agreement: float
    factor: float
    seconds: float
    step_seconds: float
    gigabytes: float
    processor: str
    torch: str
    threads: int
    date: str

    @property
    def image_steps(self) -> float:
        """Time of the call in forward and full backward passes of one image."""
        return self.seconds / self.step_seconds


def large(name: str) -> Setting:
    """A torchvision model at 224 pixels."""
    forget = tuple(range(5, 1000, 100))
    return Setting(lambda: _with_answers(models.get_model(name)), 224, forget, 8, 4_000, 6)


def small(build: Callable[[], nn.Module]) -> Setting:
    """A model of ten classes at 32 pixels."""
    return Setting(build, 32, (3, 7), 64, 15_000)


def _with_answers(model: nn.Module) -> nn.Module:
    """Gives a vision transformer of torchvision, whose last layer is 0, other answers than that."""
    if isinstance(model, models.VisionTransformer):
        nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # type: ignore[union-attr]
    return model


def _densenet() -> nn.Module:
    return models.DenseNet(12, (6, 6, 6), 24, num_classes=10)


def _mobilenet() -> nn.Module:
    return models.mobilenet_v3_small(num_classes=10)


def _vit() -> nn.Module:
    return _with_answers(models.VisionTransformer(32, 4, 6, 4, 96, 192, num_classes=10))


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig

    blocks = [CNBlockConfig(48, 96, 2), CNBlockConfig(96, 192, 2), CNBlockConfig(192, None, 2)]
    return models.ConvNeXt(blocks, num_classes=10)


MODELS = {
    **{
        name: large(name)
        for name in (
            "resnet18", "mobilenet_v3_small", "densenet121", "convnext_tiny", "swin_t", "vit_b_16",
        )
    },
    "DenseNet-21, 32 px": small(_densenet),
    "MobileNetV3-small, 32 px": small(_mobilenet),
    "ViT, 32 px": small(_vit),
    "ConvNeXt, 32 px": small(_convnext),
    "ResNet-20, 32 px": small(lambda: zoo.build("resnet20_cifar")),
}  # fmt: skip


def _call(name: str) -> dict[str, Any]:
    """Runs the default call, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    setting = MODELS[name]
    model = setting.build().eval()
    unlearner = zsu_fast.ZeroShotUnlearner(
        model, setting.forget, input_shape=(3, setting.side, setting.side), progress=False
    )
    with printed_warnings():
        started = time.perf_counter()
        unlearner.run()
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIGABYTE
    model.input_spec = unlearner.spec  # type: ignore[assignment]
    times = ImageStep(model, setting.batch).times()
    facts = unlearner.record.depth

    def after(key: str) -> float:
        return 100 * float(facts[key].get("after", _NAN)) if key in facts else _NAN

    return {
        "level": facts["level"], "reason": facts.get("fallback", ""), "leak": after("unmask_leak"),
        "agreement": after("agreement"), "factor": facts.get("factor", _NAN), "seconds": seconds,
        "step_seconds": statistics.median(times), "gigabytes": peak, **machine(),
    }  # fmt: skip


def apart(run: Callable[..., Any], *arguments: Any) -> Any:
    """``run(*arguments)`` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, arguments)


def measure(name: str) -> Iterator[Run]:
    """Runs the default call in a process of its own."""
    run = Run(name, **apart(_call, name))
    print(f"{name}: {run.level} {run.reason} {numbers(run)}", flush=True)
    yield run


def missed(runs: Sequence[Run]) -> list[str]:
    """The bars that are missed, in words."""
    checks = [
        (run.model, what, value, most)
        for run in runs
        if (setting := MODELS.get(run.model)) is not None
        for what, value, most in (
            ("image-steps", run.image_steps, setting.image_steps),
            ("GB", run.gigabytes, setting.gigabytes),
        )
    ]
    return [f"{m}: {w} are {v:,.1f}, at most {most:,.1f} allowed"
            for m, w, v, most in checks if not v <= most]  # fmt: skip


_HEAD = """# Deep forgetting of architectures with random weights

Written by `python -m benchmarks.end_to_end.deep_untrained`: `zsu_fast.unlearn(model, forget)` on \
one thread, 10 of 1,000 classes at 224 pixels, 2 of 10 at 32 pixels, each call in a process of its \
own. Leak: share of held-out inverted rows of forgotten classes that the original last layer still \
assigns to one. Agreement: share of held-out scenes, weighted by confidence, that keep their \
answer. GB: peak memory of the process. Image-steps: seconds of the call over those of a forward \
and full backward pass of one image (float32, channels-last).
"""


def summarise(runs: Sequence[Run]) -> str:
    """The table as Markdown, and the bars that are missed."""
    titles = "model | level | leak % | agreement % | factor | seconds | image-steps | at most | GB"
    lines = [_HEAD, *machines(runs), "", f"| {titles} |", "|---|---|" + "---:|" * 7]
    for run in sorted(runs, key=lambda r: list(MODELS).index(r.model)):
        values = [f"{v:.1f}" if v == v else "-" for v in (run.leak, run.agreement)]
        values += [f"{run.factor:g}" if run.factor == run.factor else "-"]
        most = MODELS[run.model].image_steps
        values += [f"{run.seconds:,.0f}", f"{run.image_steps:,.0f}", f"{most:,.0f}"]
        lines.append(f"| {run.model} | {run.level} | {' | '.join(values)} | {run.gigabytes:.1f} |")
    lines += ["", "## Fallbacks", ""]
    lines += [f"- {r.model}: {r.reason}" for r in runs if r.reason] or ["None."]
    lines += ["", "## Bars", ""]
    lines += [f"- missed: {miss}" for miss in missed(runs)] or ["All are met."]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parser(__doc__.splitlines()[0], list(MODELS))
    options.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    run_benchmark(
        options, "deep_untrained.csv", MODELS, Run,
        lambda name, _given: measure(name), summarise, missed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
