"""The images that a model expects, as the model itself states: size, normalisation, crop.

The first of these sources counts: an attribute ``input_spec`` (set by the zoo and `load_model`),
the image processor of a transformers model that was loaded from a folder, timm's
``pretrained_cfg``, and the transforms of the torchvision weights that fit the model.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .parameters import UNCOPYABLE, deep_copy

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Pillow's numbers of its filters, which transformers' processors store.
_PILLOW_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True)
class InputSpec:
    """The images that a model expects.

    Attributes:
        shape: (channels, height, width).
        mean: per-channel mean, subtracted from pixels in 0..1.
        std: per-channel standard deviation, by which they are divided then.
        source: how this is known, in words, for the run record.
        resize: size to which a photo is resized before the central crop to ``shape``: (shorter
            side,), or (height, width), which ignores the aspect ratio; None for 256/224 of the
            crop.
        interpolation: Pillow's name of the filter for resizing.
        assumed: whether mean and std are a guess, since nothing states them.
        bgr: whether the model takes blue first: `normalise` and `transform` reverse RGB images.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str = "given"
    resize: tuple[int, ...] | None = None
    interpolation: str = "bilinear"
    assumed: bool = False
    bgr: bool = False

    @property
    def low(self) -> Tensor:
        """The value of a black pixel after normalisation, float32 [channels]."""
        return torch.tensor([(0.0 - m) / s for m, s in zip(self.mean, self.std, strict=True)])

    @property
    def high(self) -> Tensor:
        """The value of a white pixel after normalisation, float32 [channels]."""
        return torch.tensor([(1.0 - m) / s for m, s in zip(self.mean, self.std, strict=True)])

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [N, channels, H, W] in 0..255, RGB -> normalised float32 of the same shape."""
        if self.bgr:
            images = images.flip(1)
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return (images.float() / 255 - mean) / std

    def transform(self) -> Any:
        """A torchvision transform: Pillow image -> normalised float32 of ``shape``.

        Raises:
            ArgumentError: torchvision is not installed, or ``shape`` is not that of a photo.
        """
        if len(self.shape) != 3 or self.shape[0] not in (1, 3):
            raise ArgumentError(
                "input_shape", f"got {self.shape}", "Pass (1 or 3, height, width) for photos."
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
                *([_reverse_channels] if self.bgr else []),
                transforms.Normalize(self.mean, self.std),
            ]
        )


def _as_rgb(image: Any) -> Any:  # a lambda could not be sent to the workers of a DataLoader
    return image.convert("RGB")


def _reverse_channels(image: Tensor) -> Tensor:
    return image.flip(0)


def stated_spec(model: nn.Module) -> InputSpec | None:
    """Returns what ``model`` states about its images, or None; see the top of this file."""
    own = getattr(model, "input_spec", None)
    if isinstance(own, InputSpec):
        return own
    return _from_transformers(model) or _from_timm(model) or _from_torchvision(model)


def stated_shape(model: nn.Module) -> tuple[tuple[int, ...], str] | None:
    """Shape and source if a model states only its size, as a transformers config does."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config  # of a dual encoder such as CLIP
    size = getattr(config, "image_size", None)
    size = (size, size) if isinstance(size, int) else size
    if not isinstance(size, tuple | list) or len(size) != 2:
        return None
    channels = int(getattr(config, "num_channels", None) or 3)
    return (channels, int(size[0]), int(size[1])), "size stated by the model's config"


def torchvision_spec(transforms: Any) -> InputSpec:
    """Reads ``weights.transforms()`` of a torchvision weights entry."""
    crop = transforms.crop_size[0]
    mean, std, resize = map(tuple, (transforms.mean, transforms.std, transforms.resize_size))
    source, mode = "stated by torchvision's weights", transforms.interpolation.value
    return InputSpec((3, crop, crop), mean, std, source, resize, mode)


def torchvision_entry(model: nn.Module) -> Any:
    """The torchvision weights entry for the model's class with the same number of parameters."""
    module = type(model).__module__
    if not module.startswith("torchvision.models."):
        return None
    from torchvision.models import WeightsEnum

    count = sum(p.numel() for p in model.parameters())
    for _, found in inspect.getmembers(sys.modules[module], inspect.isclass):
        entries: Any = found if issubclass(found, WeightsEnum) else ()
        for entry in entries:
            if entry.meta.get("num_params") == count:
                return entry
    return None


def _from_torchvision(model: nn.Module) -> InputSpec | None:
    entry = torchvision_entry(model)
    return None if entry is None else torchvision_spec(entry.transforms())


def _from_timm(model: nn.Module) -> InputSpec | None:
    """Reads ``pretrained_cfg`` as timm does, if it states all that timm would otherwise assume."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, dict) or not {"input_size", "mean", "std"} <= set(config):
        return None
    try:
        from timm.data.config import resolve_data_config
    except ImportError:  # the model can't be timm's
        return None
    config = resolve_data_config(pretrained_cfg=config)
    shape = tuple(config["input_size"])
    sides = tuple(int(side / config["crop_pct"]) for side in shape[-2:])
    resize = sides if config["crop_mode"] == "squash" else (min(sides),)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    mode = config["interpolation"] if config["interpolation"] in _PILLOW_FILTERS else "bilinear"
    return InputSpec(shape, mean, std, "stated by the model's pretrained_cfg", resize, mode)


def _from_transformers(model: nn.Module) -> InputSpec | None:
    """Reads the image processor in the folder that the model was loaded from.

    Reads the JSON file: importing ``transformers.AutoImageProcessor`` would take seconds.
    """
    folder = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(folder, str) or not folder:
        return None
    file = Path(folder) / "preprocessor_config.json"
    if not file.is_file():
        return None
    try:
        spec = processor_spec(json.loads(file.read_text()))
        stated = stated_shape(model)
        if stated is None or stated[0][1:] == spec.shape[1:]:
            return spec
        if runs_on(model, spec.shape):  # DINOv2 was trained at 518 pixels and is used at 224
            source = f"{spec.source}; the model's config says {stated[0][1:]}"
            return replace(spec, source=source)
        raise ValueError(
            f"it makes images of {spec.shape[1:]}, the model's config says {stated[0][1:]}"
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(
            "input_shape",
            f"not given, and {file} can't be used ({type(error).__name__}: {error})",
            "Pass input_shape, mean and std.",
        ) from error


def runs_on(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a copy of ``model`` runs on two images of ``shape``."""
    copied = deep_copy(model, UNCOPYABLE)
    copied.float()
    copied.eval()
    device = next((p.device for p in copied.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            copied(torch.zeros(2, *shape, device=device))
    except Exception:  # noqa: BLE001  any error in the user's code means no
        return False
    return True


def processor_spec(processor: dict[str, Any]) -> InputSpec:
    """Reads a transformers image processor's ``to_dict()``.

    Args:
        processor: the content of preprocessor_config.json.

    Raises:
        KeyError, TypeError, ValueError: it is incomplete or malformed.
    """
    processor = _with_defaults(processor)
    normalises = processor.get("do_normalize", True)
    if normalises:
        mean = tuple(float(m) for m in processor["image_mean"])
        std = tuple(float(s) for s in processor["image_std"])
        if processor.get("include_top"):  # EfficientNet's divides twice
            std = tuple(s * s for s in std)
    else:
        channels = len(processor.get("image_mean") or (0.0,) * 3)
        mean, std = (0.0,) * channels, (1.0,) * channels
    # relative to pixels in 0..1
    factor = float(processor.get("rescale_factor", 1 / 255))
    scale = 255 * (factor if processor.get("do_rescale", True) else 1.0)
    offset = 1.0 if processor.get("rescale_offset") else 0.0
    mean, std = tuple((m + offset) / scale for m in mean), tuple(s / scale for s in std)
    size = _sides(processor["size"])
    edge = size.get("shortest_edge")
    if edge is None:
        crop = (int(size["height"]), int(size["width"]))
        resize: tuple[int, ...] = crop
    else:
        resize, crop = (int(edge),), (int(edge), int(edge))
    if processor.get("do_center_crop"):
        box = _sides(processor["crop_size"])
        crop = (int(box["height"]), int(box["width"]))
    elif edge is not None and processor.get("crop_pct"):
        # ConvNext's processor crops below 384 pixels, and squashes from there on
        resize = (int(edge / processor["crop_pct"]),) if int(edge) < 384 else crop
    source, mode = "stated by the model's image processor", int(processor.get("resample", 2))
    bgr = bool(processor.get("do_flip_channel_order"))
    filter_name = _PILLOW_FILTERS[mode]
    return InputSpec((len(mean), *crop), mean, std, source, resize, filter_name, bgr=bgr)


def _with_defaults(processor: dict[str, Any]) -> dict[str, Any]:
    """``processor`` with the defaults of its class, where it leaves out how it normalises.

    MobileViT's files state neither mean nor std: its processor does not normalise.
    """
    named = processor.get("image_processor_type") or processor.get("feature_extractor_type")
    complete = {"do_normalize", "image_mean", "image_std"} <= set(processor)
    if complete or not isinstance(named, str):
        return processor
    import transformers

    name = named.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    kind = getattr(transformers, name, None)
    if kind is None:
        return processor
    full = kind(**processor)
    described: dict[str, Any] = full.to_dict()
    return described | {"do_normalize": bool(getattr(full, "do_normalize", False))}


def _sides(size: Any) -> dict[str, Any]:
    return {"height": size, "width": size} if isinstance(size, int) else size


def noise_images(spec: InputSpec, count: int) -> Tensor:
    """Normalised images of independent uniform pixels, float32 [count, *shape]; fixed seed."""
    bounds = (-1, 1, 1) if len(spec.shape) == 3 else (-1,)
    low, high = spec.low.view(bounds), spec.high.view(bounds)
    generator = torch.Generator().manual_seed(0)
    return low + (high - low) * torch.rand(count, *spec.shape, generator=generator)
