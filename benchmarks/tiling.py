"""A picture becomes views: ours against the stock image processor of transformers, for 1x1, 2x2 and 3x3 tiles of 336 px.

    python benchmarks/tiling.py [--rounds 7] [--repeats 3]

Both sides get the same decoded photograph (uint8, as this package's decoder gives it) and deliver the views of one picture. Lines "fp32": both
deliver the normalised pixels. Lines "uint8": ours delivers the views to be normalised on the device, the stock processor cannot. Without
`pad_square` the peer is the processor alone; with it, the peer also pads the picture to a square, in the way its class LlavaImageProcessor does
(LlavaNextImageProcessor has no such setting; a single view is padded by the processor itself). Times are of the processor, not of the clock,
and single-threaded, so that a busy machine counts less. `equal`: no pixel differs by more than 1e-6 (uint8: after normalisation).

Photographs of 640 x 480 and 1600 x 1200 are made from the two that scikit-learn ships.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from record import interleaved, record
from transformers import LlavaImageProcessor
from transforms import MEAN, STD, cover, jpeg, load_photographs

from aimv2_vlm.data.tiling import Tiling, cut_views, image_processor, picture_views
from aimv2_vlm.data.transforms import decode_image, normalize

SIZES = ((640, 480), (1600, 1200))
GRIDS = ((1, 1), (2, 2), (3, 3))
TOLERANCE = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3, help="times that each photograph is cut in a round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    photographs, source = load_photographs(None, 2)
    for width, height in SIZES:
        pictures = [decode_image(jpeg(cover(photograph, width, height))) for photograph in photographs]
        for grid in GRIDS:
            for pad_square in (False, True):
                tiling = Tiling(grid, pad_square=pad_square)
                padding = "padded to a square" if pad_square else "not padded"
                for line in compare(pictures, tiling, args.rounds, args.repeats):
                    line["name"] = f"tiling {tiling} {line['name']}, {width}x{height}, {padding}, {source}"
                    record("tiling", line)


def compare(pictures: list[torch.Tensor], tiling: Tiling, rounds: int, repeats: int) -> list[dict]:
    """One line for fp32 and one for uint8. Sides alternate picture by picture."""
    stock = image_processor(tiling, list(MEAN), list(STD))
    sides: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "peer": stock_side(stock, tiling),
        "fp32": lambda picture: picture_views(picture, tiling, stock)[0],
        "uint8": lambda picture: cut_views(picture, tiling, stock.image_mean)[0],
    }
    equal = {name: True for name in sides}
    for picture in pictures:
        expected = sides["peer"](picture)
        for name, found in (("fp32", sides["fp32"](picture)), ("uint8", normalize(sides["uint8"](picture), MEAN, STD))):
            equal[name] &= found.shape == expected.shape and bool(np.abs((found - expected).numpy()).max() <= TOLERANCE)
    seconds = interleaved(sides, ((picture,) for _ in range((rounds + 1) * repeats) for picture in pictures), time.process_time)
    # Means of the rounds; the first one warms up.
    milliseconds = {name: 1000 * np.reshape(spent, (rounds + 1, -1)).mean(1)[1:] for name, spent in seconds.items()}
    theirs = float(np.median(milliseconds["peer"]))
    return [
        {
            "name": name,
            "ours": round(float(np.median(milliseconds[name])), 3),
            "peer": round(theirs, 3),
            "ratio": round(theirs / float(np.median(milliseconds[name])), 2),
            "unit": "ms of one core per picture",
            "equal": equal[name],
            "ratios_of_rounds": (milliseconds["peer"] / milliseconds[name]).round(2).tolist(),
            "peer_is": f"transformers' {type(stock).__name__}: normalised fp32",
        }
        for name in ("fp32", "uint8")
    ]


def stock_side(stock, tiling: Tiling) -> Callable[[torch.Tensor], torch.Tensor]:
    """The processor's call, after padding by transformers' own function where the processor has no setting for it."""
    pads_first = tiling.pad_square and not tiling.single
    padding, colour = LlavaImageProcessor(), [int(255 * mean) for mean in MEAN]

    def views(picture_CHW: torch.Tensor) -> torch.Tensor:
        picture_CHW = padding.pad_to_square(picture_CHW, colour) if pads_first else picture_CHW
        pixels = stock(picture_CHW, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        return pixels if tiling.single else pixels[0]

    return views


if __name__ == "__main__":
    main()
