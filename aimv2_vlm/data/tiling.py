"""How a picture becomes views (crops of the encoder's size) and how many tokens it costs. One place for both facts.

A checkpoint has one grid. 1x1 is `Llava`: the picture padded to a square and resized. R x C is `LlavaNext` with the
single resolution (R * tile, C * tile): an overview first, then the tiles in raster order, one newline vector behind
each token row. LlavaNext itself squashes the overview, pads the tiles black and removes padded features;
`pad_square` pads the picture with the mean colour *before* it, as the paper does, so that nothing is squashed or
removed (paper 5.1, Figure 5).

`pad_square` on one view is a setting of the stock processor. With tiles stock transformers has no such setting: the
pixels equal the stock processor's on square pictures, and whoever uses a tiled checkpoint without this package pads
other pictures first (`prepare_picture` shows how: three lines). `pad_square: false` is stock for every picture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aimv2_vlm.config import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class View:
    """One crop: `name` ("overview" or "row,column") and `box` (left, top, right, bottom) in the user's pixels.

    A box reaches beyond the picture where the view shows padding. `squashed`: the view does not keep the aspect.
    """

    name: str
    box: tuple[float, float, float, float]
    squashed: bool = False


@dataclass(frozen=True)
class Tiling:
    """Grid (rows, columns) of tiles of `tile_size` pixels with patches of `patch_size` pixels.

    pad_square: pad to a square with the processor's mean colour first.
    source_size: reduce the picture until its longer side has this many pixels before anything else is done with it
    (never enlarges); the control arm "upsampled", which has a tiled picture's tokens without its new pixels.
    """

    grid: tuple[int, int] = (1, 1)
    tile_size: int = 336
    patch_size: int = 14
    pad_square: bool = True
    source_size: int | None = None

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows < 1 or columns < 1:
            raise UserError(f"tiling {rows}x{columns}: rows and columns start at 1")
        if self.tile_size % self.patch_size:
            raise UserError(f"tiling: tile size {self.tile_size} is no multiple of the patch size {self.patch_size}")
        if self.source_size is not None and self.source_size < 1:
            raise UserError(f"tiling: source_size {self.source_size} must be at least 1 pixel")

    @classmethod
    def parse(
        cls, text: str, *, tile_size: int, patch_size: int = 14, pad_square: bool = True, source_size: int | None = None
    ) -> Tiling:
        """From the recipe's "RxC". Raises UserError."""
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if not match:
            raise UserError(f"tiling {text!r}: write ROWSxCOLUMNS, such as 1x1, 2x2 or 3x3")
        return cls((int(match[1]), int(match[2])), tile_size, patch_size, pad_square, source_size)

    @classmethod
    def from_processor(cls, processor, source_size: int | None = None) -> Tiling:
        """The tiling that a saved Llava or LlavaNext processor stands for."""
        images = processor.image_processor
        pinpoints = getattr(images, "image_grid_pinpoints", None)
        tile_size = images.size["height"]
        if pinpoints is None:
            return cls((1, 1), tile_size, processor.patch_size, bool(images.do_pad), source_size)
        if len(pinpoints) != 1:
            raise UserError(f"processor: {len(pinpoints)} resolutions in image_grid_pinpoints, one is supported")
        grid = (pinpoints[0][0] // tile_size, pinpoints[0][1] // tile_size)
        return cls(grid, tile_size, processor.patch_size, bool(getattr(images, "pad_square", False)), source_size)

    def __str__(self) -> str:
        return f"{self.grid[0]}x{self.grid[1]}"

    @property
    def single(self) -> bool:
        """One view and no overview: `Llava`, not `LlavaNext`."""
        return self.grid == (1, 1)

    @property
    def num_views(self) -> int:
        return 1 if self.single else 1 + self.grid[0] * self.grid[1]

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

    @property
    def patches_per_view(self) -> int:
        return self.patches_per_side**2

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) in pixels that the tiles cover together."""
        return self.grid[0] * self.tile_size, self.grid[1] * self.tile_size

    def processed_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the picture after `prepare_picture`: what LlavaNext calls the image's size."""
        if self._pads_here:
            height = width = max(height, width)
        if self.source_size is not None and max(height, width) > self.source_size:
            scale = self.source_size / max(height, width)
            height, width = max(1, round(height * scale)), max(1, round(width * scale))
        return height, width

    def num_image_tokens(self, height: int, width: int) -> int:
        """Tokens that a picture of this size (as the user has it) takes in the language model."""
        if self.single:
            return self.patches_per_view
        rows, columns = self._kept_patches(*self.processed_size(height, width))
        return self.patches_per_view + rows * columns + rows

    def shows_something(self, height: int, width: int) -> bool:
        """False where LlavaNext removes every token of the tiles (aspect beyond 48:1 at 2x2 of 336)."""
        return self.single or min(self._kept_patches(*self.processed_size(height, width))) > 0

    def views(self, height: int, width: int) -> list[View]:
        """Where each view lies in the user's picture; in the order in which the encoder sees them."""
        side = max(height, width)
        squashed = not self.pad_square and height != width
        if self.pad_square:
            left, top = (side - width) // 2, (side - height) // 2
            overview = View("overview", (-left, -top, side - left, side - top))
            padded_height = padded_width = side
        else:
            left = top = 0
            overview = View("overview", (0, 0, width, height), squashed)
            padded_height, padded_width = height, width
        if self.single:
            return [overview]
        target_height, target_width = self.resolution
        scale = min(target_height / padded_height, target_width / padded_width)
        pad_y = (target_height - padded_height * scale) / 2
        pad_x = (target_width - padded_width * scale) / 2

        def box(row: int, column: int) -> tuple[float, float, float, float]:
            x0, y0 = column * self.tile_size - pad_x, row * self.tile_size - pad_y
            return (
                x0 / scale - left,
                y0 / scale - top,
                (x0 + self.tile_size) / scale - left,
                (y0 + self.tile_size) / scale - top,
            )

        rows, columns = self.grid
        return [overview] + [View(f"{r},{c}", box(r, c)) for r in range(rows) for c in range(columns)]

    @property
    def _pads_here(self) -> bool:
        """Whether `prepare_picture` pads. The stock processor pads a single view, unless it is to be reduced first."""
        return self.pad_square and (not self.single or self.source_size is not None)

    def _kept_patches(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the tiles' tokens that LlavaNext keeps; its rounding, term by term."""
        rows, columns = self.grid[0] * self.patches_per_side, self.grid[1] * self.patches_per_side
        if width / height > columns / rows:
            kept = int(round(height * (columns / width), 7))
            rows -= (rows - kept) // 2 * 2
        else:
            kept = int(round(width * (rows / height), 7))
            columns -= (columns - kept) // 2 * 2
        return rows, columns


def image_processor(tiling: Tiling, image_mean: list[float], image_std: list[float]):
    """The stock image processor of this tiling. An assistant's is not the encoder's: nothing is cropped away."""
    from transformers import LlavaImageProcessor, LlavaNextImageProcessor

    size = {"height": tiling.tile_size, "width": tiling.tile_size}
    common = dict(
        size=size, crop_size=size, do_center_crop=False, image_mean=list(image_mean), image_std=list(image_std)
    )
    if tiling.single:
        return LlavaImageProcessor(do_pad=tiling.pad_square, **common)
    processor = LlavaNextImageProcessor(image_grid_pinpoints=[list(tiling.resolution)], **common)
    processor.pad_square = tiling.pad_square  # stock classes carry it along unread; `Tiling.from_processor` reads it
    return processor


def prepare_picture(picture_CHW: torch.Tensor, tiling: Tiling, image_mean: list[float]) -> torch.Tensor:
    """What is done to a picture (uint8, RGB) before the stock processor sees it; mostly nothing.

    Square padding centres the picture on the mean colour, rounded down, as LlavaImageProcessor does.
    """
    from torchvision.transforms.v2 import functional as tvF

    height, width = picture_CHW.shape[-2:]
    if tiling._pads_here and height != width:
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        padding = [left, top, side - width - left, side - height - top]
        picture_CHW = tvF.pad(picture_CHW, padding, fill=[int(255 * mean) for mean in image_mean])
    size = tiling.processed_size(height, width)
    if size != tuple(picture_CHW.shape[-2:]):
        picture_CHW = tvF.resize(picture_CHW, list(size), interpolation=tvF.InterpolationMode.BICUBIC, antialias=True)
    return picture_CHW


def picture_views(picture_CHW: torch.Tensor, tiling: Tiling, image_processor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pixels (K, 3, tile, tile) of one picture and its processed (height, width), from the stock image processor."""
    picture_CHW = prepare_picture(picture_CHW, tiling, image_processor.image_mean)
    pixels = image_processor(picture_CHW, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    return (pixels if tiling.single else pixels[0]), tuple(picture_CHW.shape[-2:])
