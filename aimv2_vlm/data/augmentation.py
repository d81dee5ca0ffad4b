"""Colour and shape changes of a probe's training pictures (Tables A2 and B1), each a function of a sample's own draws.

The policy is what timm's `rand-m9-mstd0.5-inc1` means, with its fifteen operations of Pillow. torchvision's RandAugment
has other operations and strengths, applies each of them always, and draws from torch's global generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from aimv2_vlm.data.order import Draws
from aimv2_vlm.data.transforms import MAX_BYTES, MAX_PIXELS, TrainTransform

NUM_OPERATIONS, PROBABILITY = 2, 0.5  # drawn for a picture, each carried out with this probability
MAGNITUDE, MAGNITUDE_STD, MAX_MAGNITUDE = 9.0, 0.5, 10.0

Operation = Callable[[Image.Image, float, int, tuple[int, int, int]], Image.Image]  # picture, strength 0..1, sign, fill


def _enhance(kind: type) -> Operation:
    return lambda image, strength, sign, fill: kind(image).enhance(max(0.1, 1 + sign * 0.9 * strength))


def _affine(matrix: Callable[[float, Image.Image], Sequence[float]], most: float) -> Operation:
    def warp(image: Image.Image, strength: float, sign: int, fill: tuple[int, int, int]) -> Image.Image:
        coefficients = matrix(sign * most * strength, image)
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=fill)

    return warp


def _solarize_add(image: Image.Image, strength: float, sign: int, fill: tuple[int, int, int]) -> Image.Image:
    added = min(128, int(110 * strength))
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, strength, sign, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, strength, sign, fill: ImageOps.equalize(image),
    "Invert": lambda image, strength, sign, fill: ImageOps.invert(image),
    "Rotate": lambda image, strength, sign, fill: image.rotate(sign * 30 * strength, Image.Resampling.BICUBIC, fillcolor=fill),
    # At least one bit: timm asks for none at full strength, which made pictures black and is an error in Pillow now.
    "Posterize": lambda image, strength, sign, fill: ImageOps.posterize(image, max(1, 4 - int(4 * strength))),
    "Solarize": lambda image, strength, sign, fill: ImageOps.solarize(image, 256 - min(256, int(256 * strength))),
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": _affine(lambda amount, image: (1, amount, 0, 0, 1, 0), 0.3),
    "ShearY": _affine(lambda amount, image: (1, 0, 0, amount, 1, 0), 0.3),
    "TranslateX": _affine(lambda amount, image: (1, 0, amount * image.width, 0, 1, 0), 0.45),
    "TranslateY": _affine(lambda amount, image: (1, 0, 0, 0, 1, amount * image.height), 0.45),
}


def rand_augment(image: Image.Image, rng: Draws, fill: tuple[int, int, int]) -> Image.Image:
    """Two operations drawn with replacement, each with probability 1/2 and strength N(0.9, 0.05) clipped to 0..1."""
    names = list(OPERATIONS)
    for _ in range(NUM_OPERATIONS):
        name, carried_out = names[rng.integers(0, len(names))], rng.uniform() < PROBABILITY
        magnitude = min(MAX_MAGNITUDE, max(0.0, MAGNITUDE + MAGNITUDE_STD * _gauss(rng)))
        sign = -1 if rng.uniform() < 0.5 else 1
        if carried_out:
            image = OPERATIONS[name](image, magnitude / MAX_MAGNITUDE, sign, fill)
    return image


def color_jitter(image: Image.Image, rng: Draws, amount: float) -> Image.Image:
    """Brightness, contrast and saturation times U(1 - amount, 1 + amount), in a drawn order (torchvision's ColorJitter)."""
    kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    while kinds:
        kind = kinds.pop(rng.integers(0, len(kinds)))
        image = kind(image).enhance(rng.uniform(max(0.0, 1 - amount), 1 + amount))
    return image


def _gauss(rng: Draws) -> float:
    """N(0, 1) by Box and Muller."""
    return math.sqrt(-2 * math.log(1 - rng.uniform())) * math.cos(2 * math.pi * rng.uniform())


@dataclass(frozen=True)
class AugmentedTransform:
    """Random crop and flip, the policy, colour jitter (0: none). Corners that a warp uncovers get `mean`'s colour."""

    crop: TrainTransform
    jitter: float
    mean: tuple[float, float, float]

    def decode(
        self, data: bytes, crop_rng: Draws, augment_rng: Draws, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
    ) -> torch.Tensor:
        """Picture bytes -> uint8 (3, size, size). Raises BadImage."""
        pixels = self.crop.decode(data, crop_rng, max_pixels, max_bytes)
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        image = rand_augment(image, augment_rng, tuple(min(255, round(255 * value)) for value in self.mean))
        if self.jitter > 0:
            image = color_jitter(image, augment_rng, self.jitter)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
