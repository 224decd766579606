"""Impressions as PNG images inside the page, encoded with zlib alone."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor

from ...models.input_spec import InputSpec
from ...synthesis.impressions import ClassImpressions

# Larger impressions are shrunk to this side length, to keep the page small.
_MAX_SIDE = 96


def data_uri(image: Tensor) -> str:
    """uint8 [1 or 3, H, W] -> "data:image/png;base64,..."."""
    channels, height, width = image.shape
    rows = image.permute(1, 2, 0).reshape(height, -1).contiguous().numpy()
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


def pixels(images: Tensor, spec: InputSpec) -> Tensor | None:
    """Normalised float [N, C, H, W] -> uint8 [N, 1 or 3, H, W]; None for inputs of other ranks."""
    if images.ndim != 4:
        return None
    view = (1, -1, 1, 1)
    mean, std = (torch.tensor(values).view(view) for values in (spec.mean, spec.std))
    shown = (images * std + mean).clamp(0, 1)
    if spec.bgr:
        shown = shown.flip(1)
    if shown.shape[1] not in (1, 3):
        shown = shown.mean(1, keepdim=True)
    side = max(shown.shape[-2:])
    if side > _MAX_SIDE:
        scale = _MAX_SIDE / side
        size = [max(1, round(s * scale)) for s in shown.shape[-2:]]
        shown = torch.nn.functional.interpolate(shown, size, mode="area")
    return (shown * 255).round().to(torch.uint8)


def gallery(
    impressions: ClassImpressions, classes: list[int], per_class: int
) -> list[tuple[int, list[tuple[str, str]]]]:
    """Returns (class, [(data URI, description), ...]) with ``per_class`` impressions at most."""
    groups = []
    for c in classes:
        rows = (impressions.labels == c).nonzero()[:per_class, 0]
        if (pictures := pixels(impressions.images[rows], impressions.spec)) is None:
            continue
        texts = [
            f"class {c}, p = {float(impressions.confidence[i]):.2f} after "
            f"{int(impressions.steps[i])} steps"
            + ("" if bool(impressions.hit[i]) else ", not reached")
            for i in rows
        ]
        groups.append((c, [(data_uri(p), t) for p, t in zip(pictures, texts, strict=True)]))
    return groups
