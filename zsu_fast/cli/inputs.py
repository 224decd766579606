"""Reads what a user types or points to: classes, numbers, labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ArgumentError
from ..models.input_spec import InputSpec
from .demo import mnist_test


def parse_classes(text: str) -> list[int]:
    """Reads class indices from "1,2,3", "0-99", a mix of both, or a file that holds such text.

    Raises:
        ArgumentError: the text is anything else.
    """
    path = Path(text)
    content = path.read_text() if path.is_file() else text
    chosen: list[int] = []
    for part in content.replace(",", " ").split():
        low, dash, high = part.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()) or (dash and int(high) < int(low)):
            raise ArgumentError(
                "forget",
                f"got {text!r}, in which {part!r} is neither a class nor a range",
                "Pass 1,2,3 or 0-99, or a file that exists and holds such text.",
            )
        chosen.extend(range(int(low), int(high or low) + 1))
    return chosen


def parse_numbers(name: str, text: str | None, kind: type[int] | type[float]) -> list[Any] | None:
    """Reads numbers separated by commas or "x"; None stays None.

    Raises:
        ArgumentError: the text of the argument ``name`` is anything else.
    """
    if text is None:
        return None
    try:
        return [kind(part) for part in text.replace("x", ",").split(",")]
    except ValueError as error:
        raise ArgumentError(
            name, f"got {text!r} ({error})", "Pass numbers separated by commas."
        ) from error


def parse_tail(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def read_images(source: str, spec: InputSpec) -> Any:
    """Reads labelled images as two tensors, or as a data loader of such pairs.

    Args:
        source: "demo" (2,000 MNIST images), an .npz file with uint8 ``images`` [N, C, H, W] and
            ``labels`` [N], or [N, C] of 0 and 1, or a folder as for `image_folder`.
        spec: describes the images that the model expects.

    Raises:
        ArgumentError: ``source`` is none of these, or can't be read.
    """
    if source == "demo":
        return mnist_test()
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                images, labels = (torch.from_numpy(file[k]) for k in ("images", "labels"))
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise ArgumentError(
                "data", f"{source} can't be read ({error})", "Store 'images' and 'labels'."
            ) from error
        # [N, C] of a multi-label model: nothing is rounded, so that .5 is refused
        return spec.normalise(images), labels if labels.ndim == 2 else labels.long()
    if path.is_dir():
        return image_folder(path, spec)
    raise ArgumentError(
        "data", f"got {source!r}, neither a folder nor an .npz file", "Pass one, or 'demo'."
    )


def image_folder(path: Path, spec: InputSpec, classes: int | None = None, workers: int = 0) -> Any:
    """Returns a data loader, of batches of 64, for a folder with one sub-folder per class.

    Args:
        path: the folder; its sub-folders are numbered in sorted order.
        spec: how to resize, crop and normalise the images.
        classes: the number of sub-folders expected; None for any.
        workers: processes that read images.

    Raises:
        ArgumentError: there are no sub-folders, or another number of them, or no images, or
            torchvision is missing.
    """
    transform = spec.transform()
    from torchvision import datasets

    if not path.is_dir():
        raise ArgumentError("data", f"{path} is not a folder", "Name one that exists.")
    folders = [entry for entry in path.iterdir() if entry.is_dir()]
    if not folders or (classes is not None and len(folders) != classes):
        files = sum(entry.is_file() for entry in path.iterdir())
        raise ArgumentError(
            "data",
            f"{path} holds {len(folders)} folders and {files} files",
            f"Make one sub-folder per class{'' if classes is None else f', {classes} of them'}: "
            "folders are numbered in sorted order, and ImageNet's are named by WordNet id. "
            "Images that lie side by side, as in ILSVRC2012_img_val.tar, have to be moved into "
            "their classes' folders first.",
        )
    images = datasets.ImageFolder(str(path), transform, allow_empty=True)
    if not len(images):
        raise ArgumentError("data", f"there is no image in {path}", "Put some into its folders.")
    return torch.utils.data.DataLoader(images, batch_size=64, num_workers=workers)
