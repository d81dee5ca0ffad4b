"""The training transform, picture bytes to a 224 px crop, on one core: ours (exact and fast) against open_clip's.

    python benchmarks/transforms.py [--data DIR] [--pictures 12] [--rounds 7]

open_clip's side is what its training does with a sample: Pillow's decoding, torchvision's RandomResizedCrop (bicubic), ToTensor, Normalize, from
the installed open_clip package, else the same steps built from torchvision (the line says which); it flips nothing, ours does. It delivers
normalised fp32, we hand uint8 to the device, which normalises there; "+ normalize" lines add ours on the CPU. Times are of the processor, not
of the clock, and single-threaded, so that a busy machine counts less. Equality: both sides take the crop that ours drew; the median PSNR
(before normalisation) has to reach 60 dB in mode exact, 50 dB in mode fast.

JPEGs (quality 90, 4:2:0) of 500 x 375 and 1600 x 1200 are made from the photographs under --data, resized to cover; without it, from the two
photographs that scikit-learn ships. A line "spectrum" has pictures of random phases whose power falls as that of photographs does: a hard
case, with more detail and several times the bytes (`kilobytes`) of these photographs, in which the decoding of bits that both sides share
outweighs the rest, and where a crop decoded at half size can stay below 50 dB.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from record import interleaved, record

from aimv2_vlm.data.order import draws
from aimv2_vlm.data.transforms import TrainTransform, normalize, read_header

SIZES = ((500, 375), (1600, 1200))
SIZE, SCALE, RATIO = 224, (0.4, 1.0), (0.75, 1.33)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LEAST_PSNR = {"exact": 60.0, "fast": 50.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of photographs, searched for .jpg files")
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    peer, peer_name = peer_transform()
    photographs, source = load_photographs(args.data, args.pictures)
    for width, height in SIZES:
        covered = [cover(photograph, width, height) for photograph in photographs]
        spectra = [spectrum_picture(height, width, seed) for seed in range(min(4, args.pictures))]
        for kind, pictures in ((source, covered), ("spectrum", spectra)):
            jpegs = [jpeg(picture) for picture in pictures]
            for line in compare(jpegs, peer, args.rounds):
                line["name"] = f"transform {line['name']}, {width}x{height} JPEG, {kind}"
                line["peer_is"] = f"{peer_name}: normalised fp32"
                record("transforms", line)


# ------------------------------------------------------------------------------------------------------------- both sides


def peer_transform() -> tuple[Callable, str]:
    """open_clip's training transform, a torchvision Compose that begins with RandomResizedCrop, and what to call it."""
    try:
        from open_clip import __version__
        from open_clip.transform import image_transform
    except ImportError:
        from torchvision import transforms

        crop = transforms.RandomResizedCrop(SIZE, SCALE, RATIO, transforms.InterpolationMode.BICUBIC)
        steps = [crop, lambda image: image.convert("RGB"), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        return transforms.Compose(steps), "open_clip's steps built from torchvision, open_clip not being installed"
    transform = image_transform(SIZE, is_train=True, mean=MEAN, std=STD, aug_cfg={"scale": SCALE})
    transform.transforms[0].ratio = RATIO  # open_clip leaves torchvision's 3/4 … 4/3
    return transform, f"open_clip {__version__}"


def compare(jpegs: Sequence[bytes], peer: Callable, rounds: int) -> list[dict]:
    """One line each for exact, fast, and both with normalisation. Sides alternate picture by picture."""
    ours = {mode: TrainTransform(SIZE, SCALE, RATIO, mode=mode) for mode in LEAST_PSNR}
    mean, std = torch.tensor(MEAN), torch.tensor(STD)

    def run_peer(data: bytes, position: int) -> torch.Tensor:
        return peer(Image.open(io.BytesIO(data)).convert("RGB"))

    sides = {"open_clip": run_peer}
    for mode, transform in ours.items():
        sides[mode] = lambda data, position, transform=transform: transform.decode(data, draws(0, position, "crop"))
        sides[f"{mode} + normalize"] = lambda data, position, one=sides[mode]: normalize(one(data, position), mean, std)
    inputs = ((jpegs[position % len(jpegs)], position) for position in range((rounds + 1) * len(jpegs)))
    # Means of the rounds; the first one warms up.
    milliseconds = {
        name: 1000 * np.reshape(spent, (rounds + 1, -1)).mean(1)[1:] for name, spent in interleaved(sides, inputs, time.process_time).items()
    }
    quality = {mode: median_psnr(jpegs, transform, peer) for mode, transform in ours.items()}
    theirs = float(np.median(milliseconds["open_clip"]))
    lines = []
    for name in sides:
        if name == "open_clip":
            continue
        mode, mine = name.split()[0], float(np.median(milliseconds[name]))
        lines.append({
            "name": name,
            "ours": round(mine, 3),
            "peer": round(theirs, 3),
            "ratio": round(theirs / mine, 2),
            "unit": "ms of one core per picture",
            "equal": quality[mode]["median_psnr_db"] >= LEAST_PSNR[mode],
            **quality[mode],
            "ratios_of_rounds": (milliseconds["open_clip"] / milliseconds[name]).round(2).tolist(),
            "kilobytes": round(sum(map(len, jpegs)) / len(jpegs) / 1000),
            "ours_is": "normalised fp32" if "+" in name else "uint8, normalised on the device",
        })  # fmt: skip
    return lines


def median_psnr(jpegs: Sequence[bytes], transform: TrainTransform, peer: Callable, crops: int = 6) -> dict:
    """Our pixels against open_clip's own steps (before ToTensor) at the same crops."""
    unflipped = TrainTransform(transform.size, transform.scale, transform.ratio, flip=0.0, mode=transform.mode)
    cropping = peer.transforms[0]
    found, reduced = [], 0
    for position in range(crops * len(jpegs)):
        data = jpegs[position % len(jpegs)]
        crop, reduction = unflipped.plan(read_header(data), draws(1, position, "crop"))
        reduced += reduction > 1
        cropping.get_params = lambda image, scale, ratio, crop=crop: crop
        theirs = np.asarray(cropping(Image.open(io.BytesIO(data)).convert("RGB")), np.float64)
        mine = unflipped.decode(data, draws(1, position, "crop")).permute(1, 2, 0).numpy()
        found.append(10 * math.log10(255**2 / max(1e-9, np.mean((theirs - mine) ** 2))))
    del cropping.get_params
    return {
        "median_psnr_db": round(statistics.median(found), 1),
        "least_psnr_db": round(min(found), 1),
        "decoded_at_a_reduced_size": round(reduced / len(found), 2),
    }


# --------------------------------------------------------------------------------------------------------------- pictures


def load_photographs(folder: Path | None, count: int) -> tuple[list[Image.Image], str]:
    if folder is None:
        from sklearn.datasets import load_sample_images

        return [Image.fromarray(pixels) for pixels in load_sample_images().images], "scikit-learn's photographs"
    paths = sorted(folder.rglob("*.jpg"))
    if not paths:
        raise SystemExit(f"{folder}: no .jpg file in it; name a folder of photographs")
    chosen = paths[:: max(1, len(paths) // count)][:count]
    return [Image.open(path).convert("RGB") for path in chosen], "photographs"


def cover(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resized so that it covers width x height, its middle kept."""
    scale = max(width / picture.width, height / picture.height)
    resized = picture.resize((max(width, round(picture.width * scale)), max(height, round(picture.height * scale))), Image.Resampling.BICUBIC)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return resized.crop((left, top, left + width, top + height))


def spectrum_picture(height: int, width: int, seed: int) -> Image.Image:
    """Random phases, amplitude 1 / frequency, colours that go together."""
    generator = np.random.default_rng(seed)
    vertical, horizontal = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(vertical, horizontal), 1 / max(height, width))
    channels = np.fft.irfft2(amplitude * np.exp(2j * np.pi * generator.random((3, height, width // 2 + 1))), s=(height, width))
    channels = 0.8 * channels.mean(0) + 0.2 * channels
    channels = (channels - channels.mean()) / channels.std() * 45 + 128
    return Image.fromarray(channels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
