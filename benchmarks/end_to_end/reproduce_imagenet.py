"""A row of the paper's ImageNet table on your own copy of the validation images.

    python -m benchmarks.end_to_end.reproduce_imagenet --data val --model torchvision:resnet50
    python -m benchmarks.end_to_end.reproduce_imagenet --data val --model torchvision:alexnet

``--data`` is a folder with one sub-folder per class, named by WordNet id, with 50 images each.
Images are resized, cropped and normalised as the model's weights require, and used for measuring
only. Prints one line per method: FA, RA and overall accuracy in per cent, and seconds from call
to result.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import zsu_fast
from benchmarks.harness import processor
from zsu_fast.cli.inputs import image_folder, parse_classes
from zsu_fast.errors import ZsuFastError
from zsu_fast.models.loading import PRETRAINED, load_model
from zsu_fast.models.prepare import prepare_model

# The classes of the published tables: the paper says 100, its figures fit these 150.
CLASSES = "0-49,390-439,950-999"
# Overall before; FA, RA and overall after, in per cent: Table 1 of the paper.
PUBLISHED = {"resnet50": (76.14, 0.01, 76.83, 65.31), "alexnet": (56.55, 0.01, 57.11, 48.55)}


def main(arguments: Sequence[str] | None = None) -> list[str]:
    """Measures, prints the table, and returns its lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with one sub-folder per class"
    )
    parser.add_argument("--model", default="torchvision:resnet50", help="as for zsu-fast unlearn")
    parser.add_argument("--weights", default=PRETRAINED, help="'pretrained' or a file")
    parser.add_argument("--classes", type=int, help="number of logits, if not the model's default")
    parser.add_argument("--forget", default=CLASSES)
    parser.add_argument("--methods", default="original,mask,random embeddings,zsu_fast")
    parser.add_argument("--impressions-per-class", type=int, default=4)
    parser.add_argument("--tail", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--out", type=Path, help="also write the table (Markdown) here")
    given = parser.parse_args(arguments)
    try:
        lines = run(given)
    except ZsuFastError as error:
        parser.error(str(error))
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")
    return lines


def run(given: argparse.Namespace) -> list[str]:
    """The table's lines."""
    forget = parse_classes(given.forget)
    model = load_model(given.model, given.weights, given.classes)
    prepared = prepare_model(model, given.device)
    spec, classes, device = prepared.spec, prepared.classes, prepared.device
    model = model.to(device)
    loader = image_folder(given.data, spec, classes, given.workers)  # fails early
    tail = int(given.tail) if given.tail.isdigit() else given.tail

    def ours() -> nn.Module:
        return zsu_fast.unlearn(
            model, forget, tail=tail, impressions_per_class=given.impressions_per_class,
            seed=given.seed, depth="output", space="input",
        )  # fmt: skip

    def randomly() -> nn.Module:
        return zsu_fast.random_embeddings(model, forget, seed=given.seed)

    methods: dict[str, Callable[[], nn.Module]] = {
        "original": lambda: model,
        "mask": lambda: zsu_fast.mask(model, forget),
        "random embeddings": randomly,
        "zsu_fast": ours,
    }
    chosen = [name.strip() for name in given.methods.split(",")]
    if unknown := [name for name in chosen if name not in methods]:
        raise zsu_fast.ArgumentError("methods", f"got {unknown}", f"There are {list(methods)}.")
    rows = []
    for name in chosen:
        started = time.perf_counter()
        unlearned = methods[name]()
        seconds = time.perf_counter() - started
        print(f"{name}: {seconds:.1f} s, measuring", file=sys.stderr, flush=True)
        rows.append((name, zsu_fast.evaluate(unlearned, loader, forget), seconds))
    images = rows[0][1]
    name = given.model.partition(":")[2] or given.model
    lines = [
        f"# {name}, {len(forget)} of {classes} classes forgotten",
        "",
        f"{images.forget_count} images of forgotten classes, {images.retain_count} of others. "
        f"Images: {spec.source}. {device}, {processor()}, torch {torch.__version__}, seed "
        f"{given.seed}, tail {tail}, {given.impressions_per_class} impressions per class.",
        "",
        "| method | FA % | RA % | overall % | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, result, seconds in rows:
        figures = (result.forget_accuracy, result.retain_accuracy, result.overall_accuracy)
        shown = " | ".join("-" if f is None else f"{f:.2f}" for f in figures)
        lines.append(f"| {method} | {shown} | {seconds:.1f} |")
    if name in PUBLISHED and forget == parse_classes(CLASSES):
        before, fa, ra, overall = PUBLISHED[name]
        lines.append(f"| published ({before:.2f} before) | {fa:.2f} | {ra:.2f} | {overall:.2f} | |")
    return lines


if __name__ == "__main__":
    main()
