"""Native-resolution mini-batches (paper section 2.4 and Table 6; appendix A): each has its own number of patches a picture.

A mini-batch draws A, the most patches a picture may have, as A = floor(2^n), n = 9.5 + 2.5 z, z from N(0, 1) truncated
to [-1, 1], and takes B = floor(C / A) pictures, so that every mini-batch costs about C patches. Drawn freely, the number
of samples before mini-batch m would be a sum over all of them; drawn by strata it is arithmetic: each block of 64
mini-batches uses the 64 mid-quantiles of z once, in an order that depends on (seed, block).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import torch

from aimv2_vlm.config import UserError
from aimv2_vlm.data.order import combine, draws, permute
from aimv2_vlm.data.pairs import PairDataset
from aimv2_vlm.data.shards import BadSample
from aimv2_vlm.data.transforms import decode_image, resize

STRATA = 64
CENTER, SPREAD = 9.5, 2.5  # of n = log2(A)


@lru_cache(maxsize=8)
def patch_budgets(center: float = CENTER, spread: float = SPREAD) -> tuple[int, ...]:
    """A of the 64 strata, rising: floor(2^(center + spread z)) at the middle of each 64th of the truncated normal; 132 … 3944
    for the paper's values."""
    normal = NormalDist()
    low, high = normal.cdf(-1.0), normal.cdf(1.0)
    return tuple(math.floor(2 ** (center + spread * normal.inv_cdf(low + (s + 0.5) / STRATA * (high - low)))) for s in range(STRATA))


class NativeSchedule:
    """mini-batch number -> (positions of its samples, patches a picture may have); pure arithmetic on (seed, number).

    capacity: C, patches of a mini-batch. patch_limit: no picture gets more patches than this, None for the paper's range
    (for small models). Raises UserError where the largest stratum does not fit into C.
    """

    def __init__(self, seed: int, capacity: int, patch_limit: int | None = None, center: float = CENTER, spread: float = SPREAD):
        self.seed, self.capacity = seed, capacity
        self.budgets = [min(a, patch_limit or a) for a in patch_budgets(center, spread)]
        if min(self.budgets) < 2:
            raise UserError(f"image.native.patch_limit: {patch_limit} leaves a picture fewer than 2 patches (center {center:g}, spread {spread:g}); raise it")
        if max(self.budgets) > capacity:
            raise UserError(f"image.native.capacity: {capacity} patches do not hold one picture of {max(self.budgets)}; raise it or set patch_limit")
        self.sizes = [capacity // a for a in self.budgets]
        self.samples_per_block = sum(self.sizes)

    def strata(self, block: int) -> list[int]:
        """The 64 strata in the order in which a block's mini-batches use them."""
        key = combine(self.seed, block, STRATA)
        return [permute(slot, STRATA, key) for slot in range(STRATA)]

    def stratum(self, minibatch: int) -> int:
        """Which of the 64 strata the mini-batch uses."""
        block, slot = divmod(minibatch, STRATA)
        return self.strata(block)[slot]

    def locate(self, minibatch: int) -> tuple[range, int]:
        """(positions, A) of a mini-batch; the positions of successive mini-batches follow each other without gaps."""
        block, slot = divmod(minibatch, STRATA)
        *before, stratum = self.strata(block)[: slot + 1]
        first = block * self.samples_per_block + sum(self.sizes[s] for s in before)
        return range(first, first + self.sizes[stratum]), self.budgets[stratum]

    def minibatch_of(self, position: int) -> int:
        """The mini-batch that a sample's position belongs to (the inverse of `locate`)."""
        if position < 0:
            raise IndexError(f"position {position}")
        block, rest = divmod(position, self.samples_per_block)
        ends = itertools.accumulate(self.sizes[s] for s in self.strata(block))
        return block * STRATA + next(slot for slot, end in enumerate(ends) if rest < end)

    def numbers(self, step: int, minibatches_per_step: int, rank: int = 0, world: int = 1) -> range:
        """This process's mini-batches of a step, by number. Raises UserError where `world` does not divide them."""
        if minibatches_per_step % world:
            raise UserError(f"image.native.minibatches: {minibatches_per_step} a step are not a multiple of {world} processes")
        share = minibatches_per_step // world
        first = step * minibatches_per_step + rank * share
        return range(first, first + share)


def fit_grid(height: int, width: int, num_patches: int) -> tuple[int, int]:
    """(rows, columns) of the largest patch grid with at most `num_patches` patches that keeps a picture's aspect.

    Of the grids next to the exact sides the one with the least distortion and loss of patches is taken, of equal ones the
    less distorted; a side has at least one patch, and a picture thinner than 1 : num_patches becomes one row or column.
    """
    rows = math.sqrt(num_patches * height / width)
    columns = num_patches / rows
    aspect = math.log(height / width)
    best, least = (1, 1), (math.inf, math.inf)
    for r in {math.floor(rows), math.ceil(rows)}:
        r = min(max(r, 1), num_patches)
        for c in {math.floor(columns), math.ceil(columns)}:
            c = min(max(c, 1), num_patches // r)
            # Two patches lost of a hundred weigh like a distortion of two per cent. For a square r x r and r x (r + 1) are equal,
            # and rounding must not choose between them.
            distortion = abs(math.log(r / c) - aspect)
            cost = round(distortion + math.log(num_patches / (r * c)), 9), distortion
            if cost < least:
                best, least = (r, c), cost
    return best


@dataclass(frozen=True)
class WholePicture:
    """A picture at its own size and aspect, its sides rounded to whole patches; reduced to the largest grid of `max_patches` where it
    has more."""

    patch_size: int
    max_patches: int = max(patch_budgets())  # the most that the paper's native stage shows

    def __call__(self, picture_CHW: torch.Tensor) -> torch.Tensor:
        """uint8 (3, H, W) -> uint8 (3, rows * patch_size, columns * patch_size)."""
        grid = [max(1, round(side / self.patch_size)) for side in picture_CHW.shape[1:]]
        if math.prod(grid) > self.max_patches:
            grid = fit_grid(*picture_CHW.shape[1:], self.max_patches)
        return resize(picture_CHW, tuple(side * self.patch_size for side in grid))

    @property
    def blank(self) -> torch.Tensor:
        return torch.zeros(3, self.patch_size, self.patch_size, dtype=torch.uint8)


def patchify(picture_CHW: torch.Tensor, patch_size: int) -> torch.Tensor:
    """uint8 (3, rows * p, columns * p) -> (rows * columns, 3 * p * p) in raster order; a patch's values in (channel, row,
    column) order, that of the patch embedding's weight."""
    patches = picture_CHW.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)  # (3, rows, columns, p, p)
    return patches.permute(1, 2, 0, 3, 4).reshape(-1, 3 * patch_size * patch_size).contiguous()


def native_patches(picture_CHW: torch.Tensor, num_patches: int, patch_size: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """uint8 (3, H, W) -> patches uint8 (rows * columns, 3 * p * p) of the picture resized (bicubic, antialiased) to its grid, and
    the grid (rows, columns)."""
    grid = fit_grid(picture_CHW.shape[1], picture_CHW.shape[2], num_patches)
    return patchify(resize(picture_CHW, tuple(side * patch_size for side in grid)), patch_size), grid


def collate_native(patches: list[torch.Tensor], grids: list[tuple[int, int]], num_patches: int) -> dict[str, torch.Tensor]:
    """patches uint8 (B, A, 3 * p * p), zeros behind the real ones; grids (B, 2) rows and columns; positions (B, A, 2) of each patch in
    its grid (zeros behind); num_real (B,)."""
    out = torch.zeros(len(patches), num_patches, patches[0].shape[1], dtype=torch.uint8)
    positions = torch.zeros(len(patches), num_patches, 2, dtype=torch.int64)
    for row, (values, (rows, columns)) in enumerate(zip(patches, grids, strict=True)):
        out[row, : len(values)] = values
        positions[row, : len(values)] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return {"patches": out, "grids": torch.tensor(grids), "positions": positions, "num_real": torch.tensor([len(p) for p in patches])}


class NativePairs:
    """Image-text pairs at their own resolution: mini-batch number -> batch, a function of (seed, number).

    data: where positions, captions and their draws come from; its image size and crops are not used, its flips are.
    A bad sample keeps its place with weight 0 and is named, as in PairDataset.
    """

    def __init__(
        self, data: PairDataset, capacity: int, patch_size: int, patch_limit: int | None = None, center: float = CENTER, spread: float = SPREAD
    ):
        self.data, self.patch_size = data, patch_size
        self.schedule = NativeSchedule(data.seed, capacity, patch_limit, center, spread)

    def minibatch(self, number: int) -> dict[str, Any]:
        """`collate_native`'s tensors and input_ids (B, T), text_lengths, prefix_lengths U{1 … num_real - 1}, draws (B,), weights
        (B,), num_truncated (captions that were cut), keys, bad."""
        data = self.data
        positions, num_patches = self.schedule.locate(number)
        rows = [self._fetch(position, num_patches) for position in positions]
        return collate_native([row["patches"] for row in rows], [row["grid"] for row in rows], num_patches) | {
            "input_ids": torch.stack([data.padded(row["ids"]) for row in rows]),
            "text_lengths": torch.tensor([len(row["ids"]) for row in rows]),
            "prefix_lengths": torch.tensor([row["prefix_length"] for row in rows]),
            "draws": torch.tensor([draws(data.seed, position, "objective").bits() >> 1 for position in positions]),
            "weights": torch.tensor([float(row["bad"] is None) for row in rows]),
            "num_truncated": sum(row["truncated"] for row in rows),
            "keys": [row["key"] for row in rows],
            "bad": [row["bad"] for row in rows if row["bad"] is not None],
        }

    def _fetch(self, position: int, num_patches: int) -> dict[str, Any]:
        data = self.data
        try:
            raw, caption = data.captioned(position)
            ids, truncated = data.tokens(raw, caption)
            picture = data.decoded(raw, lambda encoded: decode_image(encoded, data.max_pixels, data.max_bytes))
        except BadSample as error:
            blank = torch.zeros(2, 3 * self.patch_size**2, dtype=torch.uint8)
            return {"patches": blank, "grid": (1, 2), "ids": [], "prefix_length": 1, "key": error.key, "truncated": False, "bad": str(error)}
        if draws(data.seed, position, "crop").uniform() < data.train_transform.flip:
            picture = picture.flip(2)
        patches, grid = native_patches(picture, num_patches, self.patch_size)
        prefix_length = draws(data.seed, position, "prefix").integers(1, len(patches))
        return {"patches": patches, "grid": grid, "ids": ids, "prefix_length": prefix_length, "key": raw.key, "truncated": truncated, "bad": None}
