"""Shards whose samples know who they are, damaged in known ways: what corruption.py and headers.py deliver and lose.

Sample number n has the key `s00000n`, a caption that says its number, and a picture whose mean colour is a code of it,
so that a caption or a picture given to the wrong key shows after the training crop too.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

LEVELS, STEP, DARKEST = 22, 9, 24  # per colour channel: 22 levels, far enough apart for JPEG and a crop
MAX_NUMBER = LEVELS**3
MAX_PIXELS, MAX_BYTES = 64_000_000, 40_000_000  # the limits that the project declares


def key_of(number: int) -> str:
    return f"s{number:06d}"


def caption_of(number: int) -> str:
    return f"sample number {number} of the corpus"


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (40, 56)) -> bytes:
    """A noisy picture (height, width) whose mean colour is `number`'s code."""
    levels = np.array([number % LEVELS, number // LEVELS % LEVELS, number // LEVELS**2])
    noise = np.random.default_rng(number).integers(-16, 17, (*size, 3))
    pixels = (DARKEST + STEP * levels + noise).astype(np.uint8)
    buffer = io.BytesIO()
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def number_of(pixels_CHW: np.ndarray) -> int:
    """The number whose picture these uint8 pixels (3, H, W) are cut from."""
    levels = np.rint((pixels_CHW.reshape(3, -1).mean(1) - DARKEST) / STEP).astype(int)
    return int(levels[0] + LEVELS * levels[1] + LEVELS**2 * levels[2])


# ------------------------------------------------------------------------------------------------------------- damage


@dataclass
class Sample:
    """Members of one sample, in the order of the archive; `past_end` names one whose header claims a size beyond it."""

    number: int
    members: list[tuple[str, bytes]]
    zeros: int = 0  # bytes of zeros behind the picture, written as a hole in the file
    past_end: str = ""
    flip: str = ""  # member of which one byte changes after indexing


class Payload:
    """Whoever unpickles this makes a folder."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def _good(number: int) -> Sample:
    extension, kind = {7: ("png", "PNG"), 8: ("webp", "WEBP")}.get(number % 10, ("jpg", "JPEG"))
    members = [(extension, picture(number, kind)), ("txt", caption_of(number).encode()), ("json", b'{"n": %d}' % number)]
    if number % 10 == 9:  # no .txt: the metadata's caption stands in
        members[1:] = [("json", json.dumps({"caption": caption_of(number)}).encode())]
    return Sample(number, members)


def _jpeg(number: int, data: bytes) -> Sample:
    return Sample(number, [("jpg", data), ("txt", caption_of(number).encode()), ("json", b"{}")])


def _captioned(number: int, text: bytes | None) -> Sample:
    return Sample(number, [("jpg", picture(number)), *([("txt", text)] if text is not None else []), ("json", b"{}")])


def declare_jpeg_size(data: bytes, height: int, width: int) -> bytes:
    """The JPEG with another size in its frame header."""
    at = re.search(rb"\xff[\xc0-\xc2]\x00\x11\x08", data).start()
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def declare_png_size(data: bytes, height: int, width: int) -> bytes:
    """The PNG with another size in its header, checksum right."""
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _sized(number: int, height: int, width: int) -> Sample:
    if number % 2:
        return _jpeg(number, declare_jpeg_size(picture(number), height, width))
    return _jpeg(number, declare_png_size(picture(number, "PNG"), height, width))


def _truncated(number: int, draw: random.Random) -> Sample:
    data = picture(number)
    scan = data.index(b"\xff\xda")
    return _jpeg(number, data[: draw.randrange(scan, len(data) - 8)])


def _invalid_json(number: int, draw: random.Random) -> Sample:
    sample = _captioned(number, caption_of(number).encode())
    sample.members[-1] = ("json", draw.choice([b'{"caption": "cut', b"[1, 2]", b"\xff\xfe", b"", b"[" * 5000, b"NaN,"]))
    return sample


def _pickled(number: int, draw: random.Random) -> Sample:
    sample = _good(number)
    extension = draw.choice(["pyd", "pth", "pt", "pkl", "pickle", "npy", "npz", "x.pkl", "PYD"])
    sample.members.insert(draw.randrange(len(sample.members) + 1), (extension, pickle.dumps(Payload(f"executed-{number}"))))
    return sample


def _past_end(number: int, draw: random.Random) -> Sample:
    sample = _captioned(number, caption_of(number).encode())
    sample.past_end = draw.choice(["jpg", "txt", "json"])
    return sample


def _flipped(number: int, draw: random.Random) -> Sample:
    sample = _good(number)
    sample.flip = draw.choice([name for name, _ in sample.members[:2]])
    return sample


@dataclass(frozen=True)
class Damage:
    """How a sample is damaged, and what the reason must say."""

    make: Callable[[int, random.Random], Sample]
    reason: str  # regular expression
    indexed: bool  # seen by the index pass: gets no position; otherwise a named hole of weight 0


DAMAGES: dict[str, Damage] = {
    "truncated JPEG": Damage(_truncated, r"cannot be decoded", False),
    "empty file": Damage(lambda n, _: _jpeg(n, b""), r"empty picture file", True),
    "text named .jpg": Damage(lambda n, _: _jpeg(n, b"<html>404 not found</html>" * 9), r"not a picture", False),
    "over the pixel limit": Damage(lambda n, _: _sized(n, 9001, 9000), r"9001 x 9000 pixels, over the limit", False),
    "over the byte limit": Damage(
        lambda n, _: Sample(n, _jpeg(n, picture(n)).members, zeros=MAX_BYTES), r"bytes, over the limit", False
    ),
    "zero-sized side": Damage(lambda n, _: _sized(n, 40, 0), r"zero|cannot be decoded|not a picture", False),
    "missing caption": Damage(lambda n, _: _captioned(n, None), r"no caption", True),
    "empty caption": Damage(lambda n, draw: _captioned(n, draw.choice([b"", b" \n\t"])), r"empty caption", True),
    "non-UTF-8 caption": Damage(lambda n, _: _captioned(n, b"caf\xe9 \xff\xfe"), r"caption is not UTF-8", True),
    "invalid JSON": Damage(_invalid_json, r"metadata is not a JSON object", True),
    "flipped byte after indexing": Damage(_flipped, r"differs from what was indexed", False),
    "pickled member": Damage(_pickled, r"forbidden member .* \(never opened\)", True),
    "member past the end of the tar": Damage(_past_end, r"reaches past the end of the file", True),
}


@dataclass
class Corpus:
    """What stands in a folder of shards: which samples are good, and what must be said of each of the others."""

    folder: Path
    count: int
    good: set[int] = field(default_factory=set)
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)  # number -> (shard, kind of damage)
    flips: list[tuple[Path, int]] = field(default_factory=list)  # (shard, byte) that change after indexing

    def flip_bytes(self) -> None:
        """What a failing disk does: other bytes under the old date and size."""
        for path, at in self.flips:
            status = path.stat()
            with open(path, "r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << at % 8]))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def write_corpus(
    folder: Path, count: int, num_damaged: int, seed: int, samples_per_shard: int = 500, kinds: list[str] | None = None
) -> Corpus:
    """`count` samples in shards; `num_damaged` of them, chosen by `seed`, have the damages `kinds` in turn (all by default)."""
    if count > MAX_NUMBER:
        raise ValueError(f"{count} samples: pictures tell at most {MAX_NUMBER} apart")
    folder.mkdir(parents=True)
    draw = random.Random(f"corpus {seed}")
    kinds = kinds or list(DAMAGES)
    damaged = {number: kinds[i % len(kinds)] for i, number in enumerate(draw.sample(range(count), num_damaged))}
    corpus = Corpus(folder, count)
    for first in range(0, count, samples_per_shard):
        path = folder / f"{first // samples_per_shard:05d}.tar"
        with open(path, "wb") as file:
            for number in range(first, min(first + samples_per_shard, count)):
                kind = damaged.get(number)
                sample = DAMAGES[kind].make(number, draw) if kind else _good(number)
                for at, size in _write_sample(file, sample):
                    corpus.flips.append((path, at + draw.randrange(size)))
                if kind:
                    corpus.bad[number] = (path.name, kind)
                else:
                    corpus.good.add(number)
            file.write(bytes(1024))
    return corpus


def _write_sample(file: io.BufferedWriter, sample: Sample) -> Iterator[tuple[int, int]]:
    """Append the members; gives (offset, size) of those whose bytes are to change later."""
    for name, data in sample.members:
        zeros = sample.zeros if name == "jpg" else 0
        size = len(data) + zeros
        file.write(tar_header(f"{key_of(sample.number)}.{name}", 2**40 if name == sample.past_end else size))
        if name == sample.flip:
            yield file.tell(), size
        file.write(data)
        file.seek(zeros, os.SEEK_CUR)
        file.write(bytes(-file.tell() % 512))
