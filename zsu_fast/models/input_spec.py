"""The images a model expects, as far as the model itself says: size, normalisation, crop.

Sources, the first that speaks: an attribute ``input_spec`` (an `InputSpec`, as zoo models and
`load_model` set it), the image processor of a transformers model loaded from a folder, timm's
``pretrained_cfg``, the transforms of the torchvision weights that are made for the model.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

# How Pillow numbers its filters, as transformers' processors store them.
_PILLOW_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True)
class InputSpec:
    """The images that a model expects.

    Attributes:
        shape: (channels, height, width).
        mean: per-channel mean that was subtracted from pixels in 0..1.
        std: per-channel divisor of the same.
        source: where this is known from, in words (it goes into the run record).
        resize: what a photo is resized to before the central crop of ``shape``: (shorter side,),
            or (height, width) whatever its aspect; None for 256/224 of the crop.
        interpolation: of that resizing, as Pillow calls it.
        assumed: True where nothing stated mean and std, so that they were guessed.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str = "given"
    resize: tuple[int, ...] | None = None
    interpolation: str = "bilinear"
    assumed: bool = False

    @property
    def low(self) -> Tensor:
        """The value of a black pixel after normalisation, float32 [channels]."""
        return torch.tensor([(0.0 - m) / s for m, s in zip(self.mean, self.std, strict=True)])

    @property
    def high(self) -> Tensor:
        """The value of a white pixel after normalisation, float32 [channels]."""
        return torch.tensor([(1.0 - m) / s for m, s in zip(self.mean, self.std, strict=True)])

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [N, channels, H, W] (0..255) -> float32 of that shape, as the model wants it."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return (images.float() / 255 - mean) / std

    def transform(self) -> Any:
        """A torchvision transform: Pillow image -> float32 of ``shape``, as the model wants it.

        Raises:
            ArgumentError: torchvision is not installed, or the shape is not that of an image.
        """
        if len(self.shape) != 3 or self.shape[0] not in (1, 3):
            raise ArgumentError(
                "input_shape", f"got {self.shape}", "Photos have (1 or 3, height, width)."
            )
        try:
            from torchvision import transforms
        except ImportError as error:
            raise ArgumentError(
                "data",
                f"a folder of images needs torchvision ({error})",
                "Run pip install 'zsu-fast[models]', or pass an .npz file.",
            ) from error
        channels, height, width = self.shape
        resize = self.resize or (round(max(height, width) * 256 / 224),)
        mode = transforms.InterpolationMode(self.interpolation)
        return transforms.Compose(
            [
                transforms.Grayscale(channels) if channels == 1 else _as_rgb,
                transforms.Resize(list(resize), mode),
                transforms.CenterCrop((height, width)),
                transforms.ToTensor(),
                transforms.Normalize(self.mean, self.std),
            ]
        )


def _as_rgb(image: Any) -> Any:
    return image.convert("RGB")


def stated_spec(model: nn.Module) -> InputSpec | None:
    """What ``model`` says about its images, or None; see the top of this file."""
    own = getattr(model, "input_spec", None)
    if isinstance(own, InputSpec):
        return own
    return _from_transformers(model) or _from_timm(model) or _from_torchvision(model)


def stated_shape(model: nn.Module) -> tuple[tuple[int, ...], str] | None:
    """Shape and source where a model states its size alone, as a transformers config does."""
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, tuple | list) or len(size) != 2:
        return None
    channels = int(getattr(config, "num_channels", None) or 3)
    return (channels, int(size[0]), int(size[1])), "size stated by the model's config"


def torchvision_spec(transforms: Any) -> InputSpec:
    """The spec in ``weights.transforms()`` of a torchvision weights entry."""
    crop = transforms.crop_size[0]
    return InputSpec(
        (3, crop, crop),
        tuple(transforms.mean),
        tuple(transforms.std),
        "stated by torchvision's weights",
        tuple(transforms.resize_size),
        transforms.interpolation.value,
    )


def _from_torchvision(model: nn.Module) -> InputSpec | None:
    """From the weights entries beside the model's class, where one has as many parameters."""
    module = type(model).__module__
    if not module.startswith("torchvision.models."):
        return None
    from torchvision.models import WeightsEnum

    count = sum(p.numel() for p in model.parameters())
    for _, found in inspect.getmembers(sys.modules[module], inspect.isclass):
        if not issubclass(found, WeightsEnum) or found is WeightsEnum:
            continue
        entries: Any = found
        for entry in entries:
            if entry.meta.get("num_params") == count:
                return torchvision_spec(entry.transforms())
    return None


def _from_timm(model: nn.Module) -> InputSpec | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, dict) or not {"input_size", "mean", "std"} <= set(config):
        return None
    shape = tuple(config["input_size"])
    resize: tuple[int, ...] | None = None
    if config.get("crop_pct"):
        sides = tuple(int(side / config["crop_pct"]) for side in shape[-2:])
        resize = sides if config.get("crop_mode") == "squash" else (min(sides),)
    mode = config.get("interpolation") or "bilinear"
    return InputSpec(
        shape,
        tuple(config["mean"]),
        tuple(config["std"]),
        "stated by the model's pretrained_cfg",
        resize,
        mode if mode in _PILLOW_FILTERS else "bilinear",
    )


def _from_transformers(model: nn.Module) -> InputSpec | None:
    """From the image processor in the folder that the model was loaded from."""
    folder = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(folder, str) or not folder:
        return None
    file = Path(folder) / "preprocessor_config.json"
    if not file.is_file():
        return None
    try:
        processor = json.loads(file.read_text())
        return processor_spec(processor, stated_shape(model))
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(
            "input_shape",
            f"not given, and {file} can't be used ({type(error).__name__}: {error})",
            "Pass input_shape, mean and std.",
        ) from error


def processor_spec(
    processor: dict[str, Any], stated: tuple[tuple[int, ...], str] | None = None
) -> InputSpec:
    """The spec in a transformers image processor's ``to_dict()``.

    Args:
        processor: as stored in preprocessor_config.json.
        stated: what `stated_shape` says about the model.

    Raises:
        KeyError, TypeError, ValueError: it lacks what is needed.
    """
    mean = tuple(float(m) for m in processor["image_mean"])
    std = tuple(float(s) for s in processor["image_std"])
    if not processor.get("do_normalize", True):
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    scale = float(processor.get("rescale_factor", 1 / 255)) * 255  # of pixels in 0..1
    mean, std = tuple(m / scale for m in mean), tuple(s / scale for s in std)
    size = processor["size"]
    size = {"height": size, "width": size} if isinstance(size, int) else size
    edge = size.get("shortest_edge")
    if edge is None:
        resize: tuple[int, ...] = (int(size["height"]), int(size["width"]))
        crop = resize
    else:
        resize, crop = (int(edge),), (int(edge), int(edge))
    if processor.get("do_center_crop"):
        box = processor["crop_size"]
        box = {"height": box, "width": box} if isinstance(box, int) else box
        crop = (int(box["height"]), int(box["width"]))
    elif edge is not None and processor.get("crop_pct") and int(edge) < 384:
        # ConvNext's processor: at 384 pixels and more it squashes, below it crops
        resize = (int(edge / processor["crop_pct"]),)
    elif edge is not None and processor.get("crop_pct"):
        resize = crop
    if stated is not None and stated[0][1:] != crop:
        raise ValueError(f"it makes images of {crop}, the model's config says {stated[0][1:]}")
    number = processor.get("resample", 2)
    return InputSpec(
        (len(mean), *crop),
        mean,
        std,
        "stated by the model's image processor",
        resize,
        _PILLOW_FILTERS[int(number)],
    )


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def noise_images(spec: InputSpec, count: int) -> Tensor:
    """Images of independent uniform pixels, normalised, float32 [count, *shape]."""
    bounds = (-1, 1, 1) if len(spec.shape) == 3 else (-1,)
    low, high = spec.low.view(bounds), spec.high.view(bounds)
    generator = torch.Generator().manual_seed(0)
    return low + (high - low) * torch.rand(count, *spec.shape, generator=generator)
