"""Reads a folder with one sub-folder of images per class."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, UnlearningWarning, shorten
from ..models.input_spec import InputSpec


class ImageFolder(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images in sub-folders, as torchvision's, but without hidden folders, and with empty ones.

    Attributes:
        classes: names of the sub-folders, sorted; a label is an index into them.
        samples: (path, label) of each image.
    """

    def __init__(self, path: Path, transform: Any) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        self.transform = transform
        self.classes = sorted(e.name for e in path.iterdir() if e.is_dir() and _visible(e))
        numbers = {name: label for label, name in enumerate(self.classes)}
        found = (
            make_dataset(str(path), numbers, IMG_EXTENSIONS, allow_empty=True) if numbers else []
        )
        self.samples = [(file, label) for file, label in found if _visible(Path(file))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        file, label = self.samples[index]
        try:
            with Image.open(file) as image:
                return self.transform(image), label
        except (OSError, ValueError) as error:
            raise ArgumentError(
                "data", f"{file} can't be read ({error})", "Replace or remove it."
            ) from error


def image_folder(path: Path, spec: InputSpec, classes: int | None = None, workers: int = 0) -> Any:
    """Returns a data loader, of batches of 64, for a folder with one sub-folder per class.

    Labels count the sub-folders in sorted order; `evaluate` and `audit` match their names with the
    model's classes.

    Args:
        path: the folder; hidden files and folders do not count.
        spec: how to resize, crop and normalise the images.
        classes: the number of sub-folders expected; None for any.
        workers: processes that read images.

    Raises:
        ArgumentError: there are no sub-folders, or another number of them, or no images, or
            torchvision is missing.

    Warns:
        UnlearningWarning: there are images beside the sub-folders.
    """
    transform = spec.transform()
    if not path.is_dir():
        raise ArgumentError("data", f"{path} is not a folder", "Name one that exists.")
    images = ImageFolder(path, transform)
    count = len(images.classes)
    beside = sum(entry.is_file() and _visible(entry) for entry in path.iterdir())
    if not count or (classes is not None and count != classes):
        raise ArgumentError(
            "data",
            f"{path} holds {count} folders and {beside} files",
            f"Make one sub-folder per class{'' if classes is None else f', {classes} of them'}, "
            "named by its number, its name or its WordNet id. "
            "Images that lie side by side, as in ILSVRC2012_img_val.tar, have to be moved into "
            "their classes' folders first.",
        )
    if not len(images):
        raise ArgumentError("data", f"there is no image in {path}", "Put some into its folders.")
    parts = {"train", "val", "valid", "validation", "test", "testing", "training"}
    if parts.issuperset(name.casefold() for name in images.classes):
        raise ArgumentError(
            "data", f"{path} holds {shorten(images.classes)}, not classes", "Name one of them."
        )
    if beside:
        warnings.warn(
            f"data: {beside} files lie beside the folders in {path}; they are not used",
            UnlearningWarning,
            stacklevel=2,
        )
    return torch.utils.data.DataLoader(images, batch_size=64, num_workers=workers)


def _visible(path: Path) -> bool:
    return not path.name.startswith((".", "__MACOSX", "@eaDir"))
