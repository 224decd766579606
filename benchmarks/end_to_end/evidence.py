"""The audit on real data: what each kind of unlearning forgets, and what it only hides.

    python -m benchmarks.end_to_end.evidence                       # all settings, 3 seeds
    python -m benchmarks.end_to_end.evidence karpathynet lenet5    # some settings
    python -m benchmarks.end_to_end.evidence --seeds 1 --images 2000
    python -m benchmarks.end_to_end.evidence --summary             # rewrite the table from the CSV
    python -m benchmarks.end_to_end.evidence resnet20 --train-golden 12   # none ships

Models compared: original, mask, random embeddings, output level, deep, golden. Images are used for
measuring only. Writes ``results/evidence.csv`` (one line per number) and ``evidence.md``.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zsu_fast
from benchmarks.harness import RESULTS, processor
from benchmarks.real_data import load_model, load_split
from zsu_fast.evaluation.audit.metrics import BY_KEY
from zsu_fast.evaluation.audit.result import Audit
from zsu_fast.models import checkpoint, zoo


@dataclass(frozen=True)
class Setting:
    """A model, its data, and the classes to forget."""

    key: str
    model: str
    data: str
    forget: tuple[int, ...]
    golden: str | None


SETTINGS = [
    Setting("lenet5", "lenet5", "mnist", (1, 2, 3, 4), "lenet5_golden"),
    Setting("karpathynet", "karpathynet", "cifar10", (3, 4, 8), "karpathynet_golden"),
    Setting("resnet20", "resnet20_cifar", "cifar10", (3, 4, 8), None),
]

# Images per class and steps of relearning: as many as the golden models need. With a hundred images
# per class, CIFAR-10's golden model never relearns, and comparing with it says nothing.
SHOTS, RELEARN_STEPS = 5_000, 800

# Metrics in the table; the CSV file has all of them.
COLUMNS = (
    "fa", "ra", "unmask_fa", "unmask_last_layer_fa", "drift_features_forget", "resynthesis_hit",
    "resynthesis_steps", "probe_forget", "knn_forget", "cka_original_forget",
    "cka_golden_forget", "mia_forget_loss", "relearn_last_layer_steps", "relearn_full_steps",
    "ain_full", "js_golden_forget",
)  # fmt: skip


def train_golden(setting: Setting, model: nn.Module, epochs: int) -> nn.Module:
    """Trains a copy of the architecture briefly without the forgotten classes: a weak golden."""
    images, labels = load_split(setting.data, "train")
    keep = ~torch.isin(labels, torch.tensor(setting.forget))
    images, labels = images[keep], labels[keep]
    torch.manual_seed(0)
    golden = zoo.build(setting.model).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(golden.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    steps = len(labels) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, total_steps=epochs * steps)
    for step in range(epochs * steps):
        if step % steps == 0:
            print(f"golden model: epoch {step // steps + 1} of {epochs}", flush=True)
        rows = torch.randint(len(labels), (128,))
        x = model.input_spec.normalise(images[rows])
        x = torch.where(torch.rand(128, 1, 1, 1) < 0.5, x.flip(3), x)
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = golden(x.contiguous(memory_format=torch.channels_last))
        nn.functional.cross_entropy(logits.float(), labels[rows]).backward()
        optimiser.step()
        schedule.step()
    return golden.eval()


# The unlearned models: name -> options of `unlearn`.
METHODS: dict[str, dict[str, Any]] = {"output": {"depth": "output", "space": "input"}, "deep": {}}


def measure(
    setting: Setting, seeds: range, most: int | None, epochs: int, stored_golden: Path | None
) -> list[list[Any]]:
    """One list per number: setting, model, seed, metric, value or "", reason or ""."""
    model = load_model(setting.model)
    test, train = load_split(setting.data, "test", most), load_split(setting.data, "train", most)
    golden = zoo.load(setting.golden) if setting.golden else None
    if golden is None and stored_golden and stored_golden.exists():
        golden = zoo.build(setting.model)
        checkpoint.load_into(golden, stored_golden)
    elif golden is None and epochs:
        golden = train_golden(setting, model, epochs)
        if stored_golden:
            checkpoint.save_weights(stored_golden, golden)
    numbers: list[list[Any]] = []
    for seed in seeds:
        for method, options in METHODS.items():
            started = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                unlearned = zsu_fast.unlearn(
                    model, setting.forget, seed=seed, progress=False, **options
                )
            unlearned_at = time.perf_counter()
            result = zsu_fast.audit(
                model, unlearned, setting.forget, test, golden,
                train_data=train, shots=SHOTS, relearn_steps=RELEARN_STEPS,
                seed=seed, progress=False,
            )  # fmt: skip
            done = time.perf_counter()
            print(f"{setting.key} {method} seed {seed}: {unlearned_at - started:.1f} s to unlearn, "
                  f"{done - unlearned_at:.1f} s to audit", flush=True)  # fmt: skip
            for sentence in result.verdict:
                print(f"    {sentence}", flush=True)
            numbers += collect(setting, method, seed, result)
    return numbers


def collect(setting: Setting, method: str, seed: int, result: Audit) -> list[list[Any]]:
    """The numbers of one audit; models other than the unlearned one count once, from "output"."""
    lines = []
    for row in result.rows:
        name = method if row.name == "unlearned" else row.name
        if row.name != "unlearned" and method != "output":
            continue
        for key, value in row.values.items():
            lines.append([setting.key, name, seed, key, f"{value:.6g}", ""])
        for key, reason in row.missing.items():
            lines.append([setting.key, name, seed, key, "", reason])
    for i, sentence in enumerate(result.verdict):
        lines.append([setting.key, method, seed, f"verdict_{i}", "", sentence])
    return lines


def summarise(numbers: list[list[Any]], settings: list[Setting]) -> list[str]:
    """One Markdown table per setting: mean over seeds, with the range where seeds differ."""
    lines = []
    for setting in settings:
        mine = [n for n in numbers if n[0] == setting.key]
        if not mine:
            lines += ["", f"## {setting.model} on {setting.data}", "", "Not measured yet."]
            continue
        forget = ",".join(map(str, setting.forget))
        lines += ["", f"## {setting.model} on {setting.data}, forgetting {{{forget}}}", ""]
        names = [n for n in ("original", "mask", "random embeddings", "output", "deep", "golden")
                 if any(m[1] == n for m in mine)]  # fmt: skip
        if "golden" not in names:
            lines.append(
                "There is no golden model of this network, so its column is missing, and with it "
                "the level to compare with (`--train-golden` trains a weak one)."
            )
            lines.append("")
        lines += ["| metric | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
        for key in COLUMNS:
            cells = []
            for name in names:
                values = [float(m[4]) for m in mine if m[1] == name and m[3] == key and m[4]]
                cells.append(_cell(values))
            if any(c != "-" for c in cells):
                lines.append(f"| {BY_KEY[key].title} | " + " | ".join(cells) + " |")
        lines.append("")
        for name in ("output", "deep"):
            for m in mine:
                if m[1] == name and m[2] == 0 and m[3].startswith("verdict"):
                    lines.append(f"- {name}, seed 0: {m[5]}")
    return lines


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    text = f"{statistics.mean(values):.3g}" if max(values) < 1 else f"{statistics.mean(values):.1f}"
    if max(values) - min(values) > 0.05 * max(abs(v) for v in values):
        text += f" ({min(values):.3g} to {max(values):.3g})"
    return text


def stored(file: Path) -> list[list[Any]]:
    """The numbers of earlier runs."""
    if not file.exists():
        return []
    with file.open(newline="") as old:
        return [[a, b, int(c), *rest] for a, b, c, *rest in list(csv.reader(old))[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help=", ".join(s.key for s in SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="earlier seeds keep their lines")
    parser.add_argument("--images", type=int, help="at most this many of each split")
    parser.add_argument("--train-golden", type=int, default=0, metavar="EPOCHS")
    parser.add_argument(
        "--golden", type=Path, help="file of the golden weights: read if it exists, else written"
    )
    parser.add_argument("--summary", action="store_true", help="rewrite evidence.md, run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    known = [s.key for s in SETTINGS]
    if wrong := [k for k in arguments.settings if k not in known]:
        parser.error(f"no setting {wrong}; there are {known}")
    chosen = [s for s in SETTINGS if not arguments.settings or s.key in arguments.settings]
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "evidence.csv"
    for setting in [] if arguments.summary else chosen:
        seeds = range(arguments.first_seed, arguments.seeds)
        lines = measure(setting, seeds, arguments.images, arguments.train_golden, arguments.golden)
        # settings and seeds that were not run keep their lines
        old = stored(file)
        lines = [n for n in old if n[0] != setting.key or n[2] < arguments.first_seed] + lines
        with file.open("w", newline="") as new:
            writer = csv.writer(new)
            writer.writerow(["setting", "model", "seed", "metric", "value", "reason"])
            writer.writerows(lines)
    numbers = stored(file)
    images = f"the first {arguments.images:,}" if arguments.images else "all"
    head = [
        "# Evidence",
        "",
        "Written by `python -m benchmarks.end_to_end.evidence`: `zsu_fast.audit` of each model, "
        "mean over seeds, with lowest and highest where they differ by more than 5 %. Accuracies "
        "in per cent; `zsu_fast/evaluation/audit/metrics.py` defines every number, `evidence.csv` "
        f"has all of them, and the reasons for missing ones. Measured on {images} test and "
        f"training images; relearning: at most {SHOTS:,} images per class and {RELEARN_STEPS} "
        "steps.",
        "",
        f"{processor()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{time.strftime('%Y-%m-%d')}.",
    ]
    text = "\n".join(head + summarise(numbers, SETTINGS)) + "\n"
    (arguments.out / "evidence.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
