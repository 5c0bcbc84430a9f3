"""From stored pixels to what a backbone takes, as tensor code.

The same module runs when features are extracted, when a backbone is trained and inside the exported ONNX
graph, so the three can never disagree. Pillow's own resize differs from this one by up to 0.9 grey levels and
is used nowhere.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a source task's backbone expects of its images; part of a source card and of its fingerprint."""

    resize: int
    """Length of the short side in pixels after the antialiased bilinear resize."""
    crop: int
    """Side of the centre crop in pixels, at most `resize`."""
    channels: Literal[1, 3] = 3
    """3 is RGB; 1 is ITU-R 601 grey, 0.299 R + 0.587 G + 0.114 B."""
    mean: tuple[float, ...]
    """Subtracted from each channel, on the [0, 1] scale."""
    std: tuple[float, ...]
    """Each channel is divided by it, on the [0, 1] scale."""

    def __post_init__(self) -> None:
        # A card written in YAML gives lists, and whole numbers as ints; both would change the fingerprint.
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.resize < 1:
            raise ValueError(f"preprocessing.resize is {self.resize}; accepted: at least 1 pixel")
        if not 1 <= self.crop <= self.resize:
            raise ValueError(f"preprocessing.crop is {self.crop}; accepted: 1 up to resize ({self.resize})")
        if self.channels not in (1, 3):
            raise ValueError(f"preprocessing.channels is {self.channels}; accepted: 1 or 3")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels or not all(math.isfinite(value) for value in values):
                raise ValueError(f"preprocessing.{name} is {values}; accepted: {self.channels} finite numbers")
        if min(self.std) <= 0:
            raise ValueError(f"preprocessing.std is {self.std}; accepted: numbers above 0")


class Preprocess(nn.Module):
    """Resize, crop, grey where asked, normalise: uint8 [N, H, W, 3] -> float32 [N, channels, crop, crop].

        preprocess = Preprocess(Preprocessing(resize=256, crop=224, mean=(0.5,) * 3, std=(0.5,) * 3))
        pixels = preprocess(images)                      # one size a batch
        pixels = torch.stack([preprocess.one(image) for image in images_of_any_size])

    Equal to torchvision's ToDtype(float32, scale=True), Resize(resize, antialias=True), CenterCrop(crop),
    Normalize within 1e-6. Exports through `torch.onnx.export(dynamo=True)` with N, H and W dynamic.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        shape = (preprocessing.channels, 1, 1)
        # Not persistent: a backbone's state dict stays the same with and without its preprocessing.
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(shape), persistent=False)
        self.mean: torch.Tensor
        self.std: torch.Tensor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Turn images of one size, uint8 [N, H, W, 3], into float32 [N, channels, crop, crop].

        Raises ValueError for another dtype or shape: a float image would be scaled by 255 a second time.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; accepted: torch.uint8 [N, H, W, 3]")
        pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 255
        if self.preprocessing.channels == 1:
            # Grey is linear, so before the resize is as good as after it, and a third of the work.
            red, green, blue = pixels.unbind(dim=1)
            pixels = (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
        pixels = _centre_crop(_resize_short_side(pixels, self.preprocessing.resize), self.preprocessing.crop)
        return (pixels - self.mean) / self.std

    def one(self, image: torch.Tensor) -> torch.Tensor:
        """Turn one image, uint8 [H, W, 3], into float32 [channels, crop, crop]."""
        pixels: torch.Tensor = self(image.unsqueeze(0))
        return pixels[0]


def _resize_short_side(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Resize [N, C, H, W] so that the shorter of H and W becomes `side`; the longer is rounded down."""
    height, width = pixels.shape[-2:]
    # sym_min keeps H and W symbolic under export; min() would specialise the graph to portrait or landscape.
    short = torch.sym_min(height, width)
    # Any: under export these are symbolic integers, which interpolate takes and its annotation does not know.
    size: Any = (side * height // short, side * width // short)
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)


def _centre_crop(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Cut the middle [N, C, side, side] out of [N, C, H, W]."""
    height, width = pixels.shape[-2:]
    top, left = _half(height - side), _half(width - side)
    return pixels.narrow(-2, top, side).narrow(-1, left, side)


def _half(margin: int) -> int:
    """Return round(margin / 2), halves to the even side, as torchvision's CenterCrop has it.

    Written in integers because `round` cannot be exported for a symbolic size.
    """
    return (margin + margin // 2 % 2) // 2
