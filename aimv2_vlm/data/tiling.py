"""How a picture becomes views (crops of the encoder's size) and how many tokens it costs. One place for both facts.

1x1 is `Llava`: the picture padded to a square and resized. R x C is `LlavaNext` with the single resolution
(R * tile, C * tile): an overview first, then the tiles in raster order, one newline vector behind each token row.
R x C + R x C + … gives LlavaNext several resolutions; each picture takes the one that shows most of it (anyres).
`unshuffle` is `Cohere2Vision`, the stock class that makes one token of u x u patches: of all grids of at most R x C tiles
each picture takes the one by which it is enlarged least and is squashed into it; the overview comes behind the tiles.
LlavaNext itself squashes the overview, pads the tiles black and removes padded features; `pad_square` pads the
picture with the mean colour *before* it, as the paper does, so that nothing is squashed or removed (paper 5.1,
Figure 5).

`pad_square` on one view is a setting of Llava's processor. With tiles, and with `unshuffle`, stock transformers has no such
setting: the pixels equal the stock processor's on square pictures, and whoever uses such a checkpoint without this package pads
other pictures first (`prepare_picture` shows how). `pad_square: false` is stock for every picture.

`picture_views` gives the stock processor's own numbers without calling it. Its time goes into unpacking and packing
colour planes around torch's uint8 resize, which is up to three times as fast on interleaved colours (as decoders give
them), and into passes over fp32 copies of all views. Here colours stay interleaved to the end (the views' memory format
is torch.channels_last), and fp32 comes last.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

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
    others: further grids (anyres). Each picture takes one of `grid` and these, and what depends on it is asked of
    `at(height, width)`; after pad_square all pictures are squares, so that only their size decides.
    unshuffle: so many by so many patches of a view become one token before the connector. `grid` then says how many tiles
    a picture has at most, and `at` which it has; one that is no larger than a tile is one view. A picture reduced to `source_size`
    would have fewer tiles, so tiles do not go with it.
    """

    grid: tuple[int, int] = (1, 1)
    tile_size: int = 336
    patch_size: int = 14
    pad_square: bool = True
    source_size: int | None = None
    others: tuple[tuple[int, int], ...] = ()
    unshuffle: int = field(default=1, repr=False)

    def __post_init__(self) -> None:
        if any(rows < 1 or columns < 1 for rows, columns in self.grids):
            raise UserError(f"tiling {self}: rows and columns start at 1")
        if len(set(self.grids)) < len(self.grids):
            raise UserError(f"tiling {self}: names a grid twice")
        if self.others and (1, 1) in self.grids:
            raise UserError(f"tiling {self}: 1x1 stands alone (a Llava); leave it out of a choice of grids")
        if self.tile_size < self.patch_size:
            raise UserError(f"tiling: a tile of {self.tile_size} pixels holds no patch of {self.patch_size}")
        if self.source_size is not None and self.source_size < 1:
            raise UserError(f"tiling: source_size {self.source_size} must be at least 1 pixel")
        if self.unshuffle < 1 or self.patches_per_side % self.unshuffle:
            raise UserError(f"tiling.unshuffle: {self.unshuffle} does not divide the {self.patches_per_side} patches of a view's side")
        if self.unshuffle > 1 and self.source_size is not None and not self.single:
            raise UserError(f"tiling.source_size: {self.source_size} would leave pictures fewer tiles, not only fewer pixels, with tiling.unshuffle "
                            f"{self.unshuffle}: the stock class chooses their number by size; write grid 1x1, or unshuffle 1")

    @classmethod
    def parse(
        cls, text: str, *, tile_size: int, patch_size: int = 14, pad_square: bool = True, source_size: int | None = None, unshuffle: int = 1
    ) -> Tiling:
        """From the recipe's "RxC", or "RxC+RxC" for a choice per picture. Raises UserError."""
        matches = [re.fullmatch(r"(\d+)x(\d+)", part) for part in text.split("+")]
        if not all(matches):
            raise UserError(
                f"tiling {text!r}: write ROWSxCOLUMNS, such as 1x1, 2x2 or 3x3, or several as in 2x2+1x2+2x1"
            )
        grid, *others = [(int(match[1]), int(match[2])) for match in matches]
        if unshuffle != 1 and (others or grid[0] != grid[1]):
            raise UserError(f"tiling.unshuffle: takes a grid as the most tiles of a picture and chooses itself; write 1x1, 2x2, 3x3, …, not {text!r}")
        return cls(grid, tile_size, patch_size, pad_square, source_size, tuple(others), unshuffle)

    @classmethod
    def from_processor(cls, processor, source_size: int | None = None) -> Tiling:
        """The tiling that a saved Llava, LlavaNext or Cohere2Vision processor stands for."""
        images = processor.image_processor
        pinpoints = getattr(images, "image_grid_pinpoints", None)
        tile_size = images.size["height"]
        if hasattr(images, "max_patches"):
            most = _max_tiles(images)
            side = math.isqrt(most)
            unshuffle = getattr(images, "downsample_factor", 2)
            grid = (side, side) if side**2 == most else (1, most)
            return cls(grid, tile_size, tile_size // (images.patch_size * unshuffle), bool(getattr(images, "pad_square", False)), source_size, (), unshuffle)
        if pinpoints is None:
            return cls((1, 1), tile_size, processor.patch_size, bool(images.do_pad), source_size)
        if not pinpoints or any(side % tile_size for resolution in pinpoints for side in resolution):
            raise UserError(f"processor: image_grid_pinpoints {pinpoints} are not made of tiles of {tile_size} px")
        grid, *others = [(height // tile_size, width // tile_size) for height, width in pinpoints]
        pad_square = bool(getattr(images, "pad_square", False))
        return cls(grid, tile_size, processor.patch_size, pad_square, source_size, tuple(others))

    def __str__(self) -> str:
        return "+".join(f"{rows}x{columns}" for rows, columns in self.grids)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        return (self.grid, *self.others)

    def at(self, height: int, width: int) -> Tiling:
        """The tiling of one grid that a picture of this size (as the user has it) gets, by the stock class's own choice."""
        if self.unshuffle > 1:
            from transformers.models.cohere2_vision.image_processing_cohere2_vision import get_optimal_tiled_canvas

            columns, rows = get_optimal_tiled_canvas(self.processed_size(height, width), (self.tile_size,) * 2, 1, math.prod(self.grid))
            return replace(self, grid=(rows, columns))
        if not self.others:
            return self
        from transformers.image_processing_utils import select_best_resolution

        chosen = select_best_resolution(self.processed_size(height, width), self.pinpoints)
        return replace(self, grid=(chosen[0] // self.tile_size, chosen[1] // self.tile_size), others=())

    @property
    def single(self) -> bool:
        """One view and no overview."""
        return self.grid == (1, 1)

    @property
    def varies(self) -> bool:
        """Whether pictures of different sizes may take different numbers of tokens."""
        return not self.single and (not self.pad_square or bool(self.others) or self.unshuffle > 1)

    @property
    def num_views(self) -> int:
        """Views of one picture; of the largest grid where pictures differ (`at` tells each one's)."""
        return 1 if self.single else 1 + max(rows * columns for rows, columns in self.grids)

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

    @property
    def patches_per_view(self) -> int:
        return self.patches_per_side**2

    @property
    def tokens_per_view(self) -> int:
        """Tokens that the patches of one view become before the connector."""
        return self.patches_per_view // self.unshuffle**2

    @property
    def max_image_tokens(self) -> int:
        """Tokens of a picture that loses none to padding; of the largest grid where pictures differ."""
        if self.unshuffle > 1:
            return self.num_views * self.tokens_per_view
        side = self.patches_per_side
        tiles = max(rows * side * columns * side + rows * side for rows, columns in self.grids)
        return self.patches_per_view + (0 if self.single else tiles)

    @property
    def pinpoints(self) -> list[list[int]] | None:
        """LlavaNext's `image_grid_pinpoints`: (height, width) in pixels that the tiles cover together. Other classes: None."""
        tile = self.tile_size
        return None if self.single or self.unshuffle > 1 else [[rows * tile, columns * tile] for rows, columns in self.grids]

    def processed_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the picture after `prepare_picture`: what stock processors call the image's size."""
        if self._pads_here:
            height = width = max(height, width)
        if self.source_size is not None and max(height, width) > self.source_size:
            scale = self.source_size / max(height, width)
            height, width = max(1, round(height * scale)), max(1, round(width * scale))
        return height, width

    def num_image_tokens(self, height: int, width: int) -> int:
        """Tokens that a picture of this size (as the user has it) takes in the language model."""
        if self.single or self.unshuffle > 1:
            return self.at(height, width).num_views * self.tokens_per_view
        rows, columns = self.at(height, width)._kept_patches(*self.processed_size(height, width))
        return self.patches_per_view + rows * columns + rows

    def shows_something(self, height: int, width: int) -> bool:
        """False where LlavaNext removes every token of the tiles (aspect beyond 48:1 at 2x2 of 336)."""
        processed = self.processed_size(height, width)
        return self.single or self.unshuffle > 1 or min(self.at(height, width)._kept_patches(*processed)) > 0

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
        rows, columns = self.at(height, width).grid
        if (rows, columns) == (1, 1):
            return [overview]
        target_height, target_width = rows * self.tile_size, columns * self.tile_size
        scale_y, scale_x = target_height / padded_height, target_width / padded_width
        if self.unshuffle == 1:
            scale_y = scale_x = min(scale_y, scale_x)
        pad_y = (target_height - padded_height * scale_y) / 2
        pad_x = (target_width - padded_width * scale_x) / 2

        def box(row: int, column: int) -> tuple[float, float, float, float]:
            x0, y0 = column * self.tile_size - pad_x, row * self.tile_size - pad_y
            return (
                x0 / scale_x - left,
                y0 / scale_y - top,
                (x0 + self.tile_size) / scale_x - left,
                (y0 + self.tile_size) / scale_y - top,
            )

        tiles = [View(f"{r},{c}", box(r, c), scale_y != scale_x) for r in range(rows) for c in range(columns)]
        return self._in_order(overview, tiles)

    def _in_order(self, overview: Any, tiles: list) -> list:
        """As the stock class shows them to the encoder."""
        return [overview, *tiles] if self.unshuffle == 1 else [*tiles, overview]

    @property
    def _pads_here(self) -> bool:
        """Whether `prepare_picture` pads. Llava's processor pads a single view itself, unless it is to be reduced first."""
        return self.pad_square and (not self.single or self.source_size is not None or self.unshuffle > 1)

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
    from transformers import Cohere2VisionImageProcessor, LlavaImageProcessor, LlavaNextImageProcessor

    size = {"height": tiling.tile_size, "width": tiling.tile_size}
    common = dict(size=size, image_mean=list(image_mean), image_std=list(image_std))
    if tiling.unshuffle > 1:
        side = tiling.patches_per_side // tiling.unshuffle  # its `patch_size` is a view's side in tokens
        processor = Cohere2VisionImageProcessor(patch_size=side, crop_to_patches=not tiling.single, max_patches=math.prod(tiling.grid), **common)
        processor.downsample_factor = tiling.unshuffle
    elif tiling.single:
        return LlavaImageProcessor(do_pad=tiling.pad_square, crop_size=size, do_center_crop=False, **common)
    else:
        processor = LlavaNextImageProcessor(image_grid_pinpoints=tiling.pinpoints, crop_size=size, do_center_crop=False, **common)
    processor.pad_square = tiling.pad_square  # stock classes carry it along unread; `Tiling.from_processor` reads it
    return processor


def prepare_picture(picture_CHW: torch.Tensor, tiling: Tiling, image_mean: list[float]) -> torch.Tensor:
    """What is done to a picture (uint8, RGB) before the stock processor sees it; mostly nothing.

    Square padding centres the picture on the mean colour, rounded down, as LlavaImageProcessor does.
    """
    if tiling._pads_here:
        picture_CHW = _padded_to_square(picture_CHW, image_mean)
    return _resized(picture_CHW, tiling.processed_size(*picture_CHW.shape[-2:]))


def cut_views(
    picture_CHW: torch.Tensor, tiling: Tiling, image_mean: list[float]
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Views (K, 3, tile, tile) of one picture, uint8 as it is, and its processed (height, width).

    `transforms.normalize` of them, on whatever device, is within 1e-6 of what the stock image processor gives.
    """
    import torch

    crops, size = _crops(picture_CHW, tiling, image_mean)
    views_KHWC = torch.empty(len(crops), tiling.tile_size, tiling.tile_size, 3, dtype=torch.uint8)
    for crop, view_HWC in zip(crops, views_KHWC, strict=True):
        crop.paste_into(view_HWC)
    return views_KHWC.permute(0, 3, 1, 2), size


def picture_views(picture_CHW: torch.Tensor, tiling: Tiling, image_processor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pixels (K, 3, tile, tile), normalised fp32, of one picture (uint8, RGB) and its processed (height, width).

    They are the stock image processor's, to 1e-6, for the picture that `prepare_picture` gives. A processor with other settings
    than `image_processor` makes is asked itself.
    """
    import torch

    if not only_normalizes(image_processor, tiling):
        picture_CHW = prepare_picture(picture_CHW, tiling, image_processor.image_mean)
        pixels = image_processor(picture_CHW, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        return (pixels[0] if pixels.dim() == 5 else pixels), tuple(picture_CHW.shape[-2:])
    # (value * rescale - mean) / std as one product and sum, within 3e-7 of the stock arithmetic; view by view, so that they stay in
    # the CPU's cache, and on whole lines, because three colours are too short an axis to be computed fast.
    tile = tiling.tile_size
    mean, std = (torch.tensor(value, dtype=torch.float64) for value in (image_processor.image_mean, image_processor.image_std))
    shift_line, scale_line = (value.float().repeat(tile) for value in (-mean / std, image_processor.rescale_factor / std))
    crops, size = _crops(picture_CHW, tiling, image_processor.image_mean)
    pixels_KHWC = torch.empty(len(crops), tile, tile, 3)
    for crop, view_HWC in zip(crops, pixels_KHWC, strict=True):
        crop.paste_into(view_HWC)
        lines = view_HWC.flatten(1)
        torch.addcmul(shift_line, lines, scale_line, out=lines)
    return pixels_KHWC.permute(0, 3, 1, 2), size


class _Crop(NamedTuple):
    """Part of a resized picture (H, W, 3) and where it begins in its view, the rest of which is black."""

    pixels_HWC: torch.Tensor
    top: int = 0
    left: int = 0

    def paste_into(self, view_HWC: torch.Tensor) -> None:
        height, width = self.pixels_HWC.shape[:2]
        if (height, width) != tuple(view_HWC.shape[:2]):
            view_HWC.zero_()
        view_HWC[self.top : self.top + height, self.left : self.left + width] = self.pixels_HWC


def _crops(picture_CHW: torch.Tensor, tiling: Tiling, image_mean: list[float]) -> tuple[list[_Crop], tuple[int, int]]:
    """What each view shows, uint8, in the order in which the encoder sees them; the processed (height, width)."""
    from transformers.image_processing_utils import get_patch_output_size
    from transformers.image_utils import ChannelDimension

    tiling, tile = tiling.at(*picture_CHW.shape[-2:]), tiling.tile_size
    picture_CHW = prepare_picture(picture_CHW, tiling, image_mean)
    picture_CHW = picture_CHW.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # colours interleaved
    shown_CHW = _padded_to_square(picture_CHW, image_mean) if tiling.single and tiling.pad_square else picture_CHW
    overview = _Crop(_resized(shown_CHW, (tile, tile)).permute(1, 2, 0))
    tiles = []
    if not tiling.single:
        rows, columns = tiling.grid
        height, width = target = (rows * tile, columns * tile)
        if tiling.unshuffle == 1:
            height, width = get_patch_output_size(picture_CHW, target, ChannelDimension.FIRST)
        resized_HWC = _resized(picture_CHW, (height, width)).permute(1, 2, 0)
        vertical = _spans(height, (target[0] - height) // 2, rows, tile)
        horizontal = _spans(width, (target[1] - width) // 2, columns, tile)
        tiles = [_Crop(resized_HWC[y, x], top, left) for y, top in vertical for x, left in horizontal]
    return tiling._in_order(overview, tiles), tuple(picture_CHW.shape[-2:])


def _spans(length: int, offset: int, count: int, tile: int) -> list[tuple[slice, int]]:
    """For `count` tiles in a row, over which something of `length` pixels lies from `offset` on: its part that a tile
    shows, and where in the tile that begins."""
    starts = [number * tile - offset for number in range(count)]
    return [(slice(max(0, start), max(0, min(length, start + tile))), max(0, min(tile, -start))) for start in starts]


def only_normalizes(image_processor, tiling: Tiling) -> bool:
    """Whether this image processor does what the one that `image_processor` makes for the tiling does."""
    from transformers import Cohere2VisionImageProcessor, LlavaImageProcessor, LlavaNextImageProcessor
    from transformers.image_utils import PILImageResampling

    images, side = image_processor, tiling.tile_size
    cropped = tiling.unshuffle == 1 and images.do_center_crop
    if tiling.unshuffle > 1:
        same = type(images) is Cohere2VisionImageProcessor and _max_tiles(images) == math.prod(tiling.grid)
    elif tiling.single:
        same = type(images) is LlavaImageProcessor and bool(images.do_pad) == tiling.pad_square
    else:
        same = type(images) is LlavaNextImageProcessor and [*map(list, images.image_grid_pinpoints)] == tiling.pinpoints
    return (
        same
        and (images.size.height, images.size.width) == (side, side)
        and images.do_resize and images.do_rescale and images.do_normalize and not cropped
        and images.resample == PILImageResampling.BICUBIC
    )  # fmt: skip


def _max_tiles(images) -> int:
    """Most tiles that a Cohere2Vision image processor cuts."""
    return images.max_patches if images.crop_to_patches else 1


def _resized(picture_CHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """As stock processors resize: bicubic, antialiased; in torch's uint8 arithmetic where the CPU has it."""
    from torchvision.transforms.v2 import functional as tvF

    if tuple(picture_CHW.shape[-2:]) == tuple(size):
        return picture_CHW
    return tvF.resize(picture_CHW, list(size), interpolation=tvF.InterpolationMode.BICUBIC, antialias=True)


def _padded_to_square(picture_CHW: torch.Tensor, image_mean: list[float]) -> torch.Tensor:
    """In the middle of a square of the mean colour, rounded to the upper left; a view of (side, side, 3) memory."""
    import torch

    height, width = picture_CHW.shape[-2:]
    if height == width:
        return picture_CHW
    side = max(height, width)
    top, left = (side - height) // 2, 3 * ((side - width) // 2)
    bottom, right = top + height, left + 3 * width
    line = torch.tensor([int(255 * mean) for mean in image_mean], dtype=torch.uint8).repeat(side)
    lines = torch.empty(side, 3 * side, dtype=torch.uint8)
    lines[:top], lines[bottom:] = line, line
    lines[top:bottom, :left], lines[top:bottom, right:] = line[:left], line[right:]
    lines[top:bottom, left:right] = picture_CHW.permute(1, 2, 0).reshape(height, 3 * width)
    return lines.view(side, side, 3).permute(2, 0, 1)
