"""R6: 1,000,000 damaged inputs: only the declared errors, no hang over 2 s, no memory blow-up.

    python benchmarks/reliability/fuzz.py [--count 1000000] [--seed 0] [--first 0] [--work FOLDER] [--replay NUMBER]

Input i is a function of (seed, i): a tar, an index, a conversation file or its row index, a caption table, a picture, a
recipe, or a checkpoint's files, grown from a valid one. A child process opens them one after another and is replaced
when it hangs or dies. How far the driver got and every failure stand in FOLDER/fuzz.jsonl; --replay shows one input.
Prints and appends to results/reliability.jsonl one line: `ours` is the number of failures.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.reliability.corpus import MAX_PIXELS, caption_of, key_of, picture, tar_header  # noqa: E402
from benchmarks.reliability.summary import argument_parser, done_lines, remember, summarise  # noqa: E402

HANG_S = 2.0  # processor seconds of one input
DEAD_S, ASLEEP_S = 20.0, 300.0  # processor and wall seconds after which a child that did not move on is given up
MEMORY = 16 * MAX_PIXELS  # bytes above the start: a picture at the limit, its RGBA form and copies of both
BLOCK_SIZE = 2000  # inputs of one child


# ----------------------------------------------------------------------------------------------------------- mutations

NUMBERS = [0, 1, -1, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, -(2**31), 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30]


def mutate_bytes(data: bytes, draw: random.Random, words: tuple[bytes, ...] = ()) -> bytes:
    """One to six changes: bits, bytes, binary and written numbers, words, pieces cut, doubled, moved or left out."""
    new = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 3, 6])):
        at = draw.randrange(len(new) + 1)
        length = min(len(new) - at, draw.choice([1, 2, 4, 8, 40, 512, 4000]))
        kind = draw.randrange(9)
        if kind == 0 and at < len(new):
            new[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            new[at : at + length] = draw.randbytes(length)
        elif kind == 2:
            width = draw.choice([1, 2, 4, 8])
            value = draw.choice(NUMBERS) % 256**width
            new[at : at + width] = value.to_bytes(width, draw.choice(["little", "big"]))
        elif kind == 3:
            new[at:at] = str(draw.choice(NUMBERS)).encode()
        elif kind == 4 and words:
            new[at : at + draw.choice([0, length])] = draw.choice(words)
        elif kind == 5:
            del new[at : at + length]
        elif kind == 6:
            new[at:at] = new[at : at + length] * draw.choice([1, 2, 50])
        elif kind == 7:
            other = draw.randrange(len(new) + 1)
            new[other:other] = new[at : at + length]
        else:
            new[at : at + length] = bytes([draw.choice([0, 0x20, 0x7F, 0x80, 0xFF])]) * length
    return bytes(new[: draw.randrange(len(new) + 1)] if draw.random() < 0.1 else new)


def mutate_value(value: Any, draw: random.Random, words: tuple[str, ...] = ()) -> Any:
    """A JSON-like value with one to three of its nodes changed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 2, 3])):
        value = _mutate_node(value, draw, words, depth=0)
    return value


def _mutate_node(value: Any, draw: random.Random, words: tuple[str, ...], depth: int) -> Any:
    if isinstance(value, (dict, list)) and value and draw.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw.choice(keys)
        kind = draw.random()
        if kind < 0.1:
            del value[key]
        elif kind < 0.2 and isinstance(value, dict):
            value[draw.choice(words or ("x",))] = value.pop(key)
        elif kind < 0.25 and isinstance(value, list):
            value += value
        else:
            value[key] = _mutate_node(value[key], draw, words, depth + 1)
        return value
    simple: list[Any] = [None, True, "", "\0", "\ud800", "é" * 3, [], {}, 0.5, float("nan"), float("inf"), 1e300, *NUMBERS, *words]
    choice = draw.choice([*simple, [value], {"x": value}, "y" * draw.choice([10, 5000]), "deep"])
    if choice == "deep":
        for _ in range(draw.choice([50, 900])):
            value = [value] if draw.random() < 0.5 else {"d": value}
        return value
    return choice


# ------------------------------------------------------------------------------------------------------------- targets
#
# A target makes a damaged input in `folder` and opens it as the program does. It returns normally or raises one of its
# declared errors; anything else is a failure.


@lru_cache
def small_tar() -> bytes:
    parts = []
    for number in range(4):
        members = [("jpg", small_picture(number)), ("txt", caption_of(number).encode()), ("json", b'{"caption": "c", "n": %d}' % number)]
        for name, data in members:
            parts += [tar_header(f"{key_of(number)}.{name}", len(data)), data, bytes(-len(data) % 512)]
    return b"".join(parts) + bytes(1024)


@lru_cache
def small_picture(number: int) -> bytes:
    return picture(number, size=(16, 20))


def read_shards(path: Path, original: bool) -> None:
    """Open and read everything; with `original`, what arrives must be what was written."""
    from aimv2_vlm.data.shards import BadSample, ShardSet

    shards = ShardSet(path)
    assert all(isinstance(line, str) for line in shards.bad_samples())
    for sample in range(shards.num_samples[0]):
        try:
            raw = shards.read(0, sample)
        except BadSample:
            continue
        assert isinstance(raw.caption, str) and raw.caption.strip() and isinstance(raw.image_bytes, bytes)
        if original:
            number = int(raw.key[1:])
            assert (raw.image_bytes, raw.caption) == (small_picture(number), caption_of(number)), f"{raw.key} has other bytes"


def fuzz_tar(draw: random.Random, folder: Path) -> None:
    data = bytearray(mutate_bytes(small_tar(), draw, (b"ustar\0", b"ustar  \0", b"././@LongLink", b"30 path=../../x\n", b"\x80\0\0\0", b"77777777777\0")))
    if draw.random() < 0.7:  # a header with one changed field and a right checksum reaches deeper
        for at in range(0, len(data) - 511, 512):
            if data[at + 257 : at + 262] == b"ustar" and draw.random() < 0.2:
                place, width = draw.choice([(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
                kind = draw.choice([b"x", b"g", b"L", b"K", b"S", b"5", b"1", b"2"])
                value = draw.choice([b"", b"\xff" * width, b"\x80" + draw.randbytes(width), b"7" * width, draw.randbytes(width), kind])
                data[at + place : at + place + width] = value[:width].ljust(width, b"\0")
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path = folder / "s.tar"
    path.write_bytes(data)
    read_shards(path, original=False)


def fuzz_index(draw: random.Random, folder: Path) -> None:
    """The index beside a whole tar; half of the changed ones say that they are whole (their digest is made right)."""
    import hashlib

    from aimv2_vlm.data.shards import build_index, index_path

    path = folder / "s.tar"
    path.write_bytes(small_tar())
    header, body = build_index(path)
    place = index_path(path, None)
    forged = draw.random() < 0.5
    if draw.random() < 0.5:
        words = ("key", "image", "text", "metadata", "mask", "columns", "bad", "damage", "digest", "column_counts", "0", "1", "txt")
        header, body = (mutate_value(header, draw, words), body) if draw.random() < 0.4 else (header, mutate_value(body, draw, words))
        tail = json.dumps(body, separators=(",", ":")).encode()
        if forged and isinstance(header, dict):
            header["digest"] = hashlib.sha256(tail).hexdigest()[:32]
        place.write_bytes(json.dumps(header).encode() + b"\n" + tail + b"\n")
    else:
        forged = False
        whole = json.dumps(header, separators=(",", ":")).encode() + b"\n" + json.dumps(body, separators=(",", ":")).encode() + b"\n"
        place.write_bytes(mutate_bytes(whole, draw, (b'"', b"[", b"{", b"null", b"\n")))
    read_shards(path, original=not forged)


ROWS: list[Any] = [
    {"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]},
    {"id": 7, "conversations": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"id": "b", "image": ["a.png", "a.png"], "conversations": [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "é\u6f22"}]},
]
ROW_WORDS = ("id", "image", "video", "conversations", "from", "value", "role", "content", "human", "gpt", "system", "<image>", "../../x", "/dev/zero", "None")


def read_conversations(path: Path, images: Path) -> None:
    from aimv2_vlm.data.conversations import Conversation, ConversationSet

    conversations = ConversationSet([SimpleNamespace(path=str(path), images=str(images), take="all")])
    for index in range(len(conversations)):
        assert isinstance(conversations[index], Conversation)
        conversations.picture_paths(index)
    json.dumps(conversations.report())
    assert all(rejection.reason != "good" for _, rejection in conversations.rejections())


def dumped(value: Any, indent: int | None = None) -> str:
    """As JSON; what is nested too deeply to be written so, as the deepest text there is."""
    try:
        return json.dumps(value, indent=indent)
    except RecursionError:
        return "[" * 3000


def fuzz_rows(draw: random.Random, folder: Path) -> None:
    """Conversation files, as a list or as lines."""
    (folder / "a.png").write_bytes(b"")
    rows = [mutate_value(row, draw, ROW_WORDS) if draw.random() < 0.5 else row for row in ROWS]
    lines = draw.random() < 0.5
    text = "\n".join(map(dumped, rows)) if lines else dumped(rows, indent=draw.choice([None, 1]))
    data = mutate_bytes(text.encode(), draw, (b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b"\xef\xbb\xbf", b"\n", b"1" * 5000, b"NaN", b"1e999"))
    path = folder / ("rows.jsonl" if lines else "rows.json")
    path.write_bytes(data if draw.random() < 0.7 else text.encode())
    read_conversations(path, folder)


def fuzz_row_index(draw: random.Random, folder: Path) -> None:
    """The stored offsets and verdicts of a conversation file."""
    import numpy as np
    import safetensors
    import safetensors.numpy

    (folder / "a.png").write_bytes(b"")
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    read_conversations(path, folder)
    place = Path(f"{path}.rows")
    if draw.random() < 0.5:
        place.write_bytes(mutate_bytes(place.read_bytes(), draw, (b'"dtype":"F32"', b'"shape":[3]', b'"I64"', b"[9999999999,2]")))
    else:
        with safetensors.safe_open(place, framework="np") as stored:
            metadata, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}
        name = draw.choice(list(tensors))
        tensor = tensors[name].astype(draw.choice([np.int64, np.uint8, np.float32]))
        tensor.flat[draw.randrange(tensor.size)] = draw.choice([-1, 0, 5, 17, 200, 2**40, -(2**62)]) % (256 if tensor.dtype == np.uint8 else 2**63)
        tensors[name] = draw.choice([tensor, tensor[:-1], tensor.reshape(-1), np.zeros((0,), tensor.dtype), tensors[name]])
        safetensors.numpy.save_file(tensors, place, metadata=metadata)
    read_conversations(path, folder)


def fuzz_captions(draw: random.Random, folder: Path) -> None:
    """What `data pack` reads: JSONL and CSV tables, names of pictures."""
    from aimv2_vlm.data.shards import pack

    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(2):
        (pictures / f"{number}.jpg").write_bytes(small_picture(number))
    words = ("image", "caption", "captions", "0.jpg", "../0.jpg", "/dev/zero", "", "image_bytes", "key")
    if draw.random() < 0.5:
        rows: list[Any] = [{"image": "0.jpg", "caption": "one", "split": "train"}, {"image": "1.jpg", "captions": ["two", "three"]}]
        text, name = "\n".join(dumped(mutate_value(row, draw, words) if draw.random() < 0.6 else row) for row in rows), "captions.jsonl"
    else:
        text, name = 'image,caption,split\n0.jpg,"one, two",train\n1.jpg,three,val\n', "captions.csv"
    data = text.encode("utf-8", "surrogatepass")
    table = pictures / name
    table.write_bytes(mutate_bytes(data, draw, (b'"', b"\0", b",", b"\r", b"9" * 200_000)) if draw.random() < 0.8 else data)
    pack(pictures, table, folder / "out", where={"split": "train"} if draw.random() < 0.2 else None)


@lru_cache
def seed_pictures() -> list[bytes]:
    """Small pictures of every format and mode that is read."""
    import numpy as np
    from PIL import Image

    base = Image.open(io.BytesIO(small_picture(3))).convert("RGB")
    made = [
        (base, "JPEG", {}), (base, "JPEG", {"progressive": True}), (base.convert("L"), "JPEG", {}), (base.convert("CMYK"), "JPEG", {}),
        (base, "PNG", {}), (base.convert("RGBA"), "PNG", {}), (base.convert("P"), "PNG", {"transparency": 0}), (base.convert("LA"), "PNG", {}),
        (base.convert("1"), "PNG", {}), (Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200), "PNG", {}),
        (base, "WEBP", {}), (base, "WEBP", {"lossless": True}), (base.convert("P"), "GIF", {}),
        (base.convert("P"), "GIF", {"save_all": True, "append_images": [base.convert("P")]}), (base, "BMP", {}), (base.convert("P"), "BMP", {}),
        (base, "TIFF", {}), (base, "TIFF", {"compression": "tiff_lzw"}), (base.convert("F"), "TIFF", {}),
    ]
    exif = Image.Exif()
    exif[0x0112] = 6
    made += [(base, "JPEG", {"exif": exif}), (base, "PNG", {"exif": exif}), (base, "WEBP", {"exif": exif})]
    found = []
    for image, kind, options in made:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


def fuzz_picture(draw: random.Random, folder: Path) -> None:
    from aimv2_vlm.data.order import Draws
    from aimv2_vlm.data.transforms import BadImage, TrainTransform, decode_image, read_header

    data = mutate_bytes(draw.choice(seed_pictures()), draw, (b"Exif\0\0", b"\xff\xc0", b"\xff\xd8\xff", b"IHDR", b"acTL", b"II*\0", b"RIFF", b"GIF89a", b"BM"))
    if data[:8] == b"\x89PNG\r\n\x1a\n" and draw.random() < 0.8:
        data = _right_png_checksums(data)
    try:
        header = read_header(data)
        assert 0 < header.height * header.width <= MAX_PIXELS
        if draw.random() < 0.5:
            pixels = decode_image(data)
            assert pixels.shape[0] == 3 and pixels.shape[1] * pixels.shape[2] == header.height * header.width
        else:
            pixels = TrainTransform(14, mode=draw.choice(["exact", "fast"])).decode(data, Draws(1))
            assert pixels.shape == (3, 14, 14)
        assert pixels.dtype.itemsize == 1
    except BadImage as error:
        assert error.reason


def _right_png_checksums(data: bytes) -> bytes:
    new, at = bytearray(data), 8
    while at + 12 <= len(new):
        (length,) = struct.unpack(">I", new[at : at + 4])
        if at + 12 + length > len(new):
            break
        new[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(new[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(new)


YAML_WORDS = (
    b"&a ", b"*a", b"&a [*a, *a]", b"<<: *a\n", b"? [a]: b\n", b"? {a: 1}\n: 2\n", b"!!python/object/apply:os.system [touch x]", b"!!binary x",
    b"!!set {a}", b"!!timestamp 2024-99-99", b"2024-99-99", b".inf", b".nan", b"1e999", b"-0", b"0x", b"1_000", b"null", b"~", b"- ", b"\t", b"---\n",
    b"%YAML 9.9\n", b"[" * 500, b"{a: " * 300, b"\xef\xbb\xbf", b"\0", b"base: x.yaml\n", b"{data_root}", b"1" * 5000,
)


@lru_cache
def shipped() -> list[tuple[str, bytes]]:
    from aimv2_vlm.recipe import shipped_recipes

    return [(verb, b"\n".join(line for line in path.read_bytes().splitlines() if not line.startswith(b"#"))) for verb, path in shipped_recipes()
            if b"base:" not in path.read_bytes()]


def alias_bomb(draw: random.Random) -> bytes:
    """Nested aliases: a few hundred bytes that would be 10^9 words if anybody wrote them out."""
    lines = [b"- &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [b"- &a%d [%s]" % (n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 9)]
    return b"%s:\n" % draw.choice([b"seed", b"out", b"base", b"data", b"data_root", b"a", b"image", b"? "]) + b"\n".join(lines) + b"\n"


def fuzz_recipe(draw: random.Random, folder: Path) -> None:
    from aimv2_vlm import recipe as recipes

    verb, text = draw.choice(shipped())
    lines = text.splitlines()
    if draw.random() < 0.5:  # a few lines are parsed faster than all, and fail at the same places
        lines = [line for line in lines if draw.random() < 0.4]
    data = mutate_bytes(b"\n".join(lines), draw, YAML_WORDS)
    if draw.random() < 0.05:
        data = alias_bomb(draw)
    path = folder / "r.yaml"
    path.write_bytes(data)
    overrides = ["data_root=x"]
    if draw.random() < 0.3:
        word = draw.choice(["optim.lr=1e-4", "data.sources.0.path=x", "image.scale=[1, 2]", "seed=1", "out=x", "data.sources.0=null", "a.b.c=1"])
        overrides.append(mutate_bytes(word.encode(), draw, YAML_WORDS).decode("utf-8", "surrogateescape").replace("\0", ""))
    loaded = recipes.load_recipe(verb, str(path), overrides)
    assert recipes.parse_yaml(recipes.dump(loaded), "dumped") == recipes.to_dict(loaded) or "nan" in recipes.dump(loaded)


@lru_cache
def placement() -> Any:
    from aimv2_vlm.train.distributed import Placement

    return Placement("single", "fp32")


def some_tensors() -> dict[str, Any]:
    import torch

    return {"model.weight": torch.zeros(3, 2), "optim.step": torch.zeros(()), "optim.exp_avg": torch.zeros(3, 2)}


@lru_cache
def checkpoint_files() -> dict[str, bytes]:
    from aimv2_vlm.data.order import fingerprint
    from aimv2_vlm.train import checkpoint

    source = {"name": "coyo", "weight": 1.0, "caption": "txt", "shards": [{"name": "0.tar", "size": 9, "count": 2, "digest": "d"}]}
    state = {"samples": 8, "tokens": 40, "fingerprint": fingerprint(0, 16, [source]), "world": 1, "stopped": "",
             "bad": {"total": 1, "named": ["0.tar: k: x"], "window": [[8, 1]], "seen": 8}}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), 1, some_tensors(), state, placement(), 2)
        return {path.name: path.read_bytes() for path in (Path(folder) / "step_00000001").iterdir()}


def fuzz_checkpoint(draw: random.Random, folder: Path) -> None:
    """state.json or a safetensors shard; opened as the training loop does."""
    from aimv2_vlm.data.order import compare_fingerprints
    from aimv2_vlm.train import checkpoint
    from aimv2_vlm.train.loop import BadSamples

    files = dict(checkpoint_files())
    name = draw.choice(sorted(files))
    if name == "state.json":
        state = json.loads(files[name])
        if draw.random() < 0.6:
            words = ("step", "samples", "fingerprint", "files", "bad", "window", "format", "sources", "shards", "../x", "/dev/zero")
            files[name] = dumped(mutate_value(state, draw, words)).encode()
        else:
            files[name] = mutate_bytes(files[name], draw, (b"[" * 3000, b"null", b'"', b"1" * 5000))
    else:
        size = len(files[name])
        files[name] = mutate_bytes(files[name], draw, (b'"dtype":"I64"', b'"shape":[9999999999]', b"__metadata__", b'"data_offsets":[0,4]'))
        if draw.random() < 0.5:
            files[name] = files[name][:size].ljust(size, b"\0")
        else:
            files["state.json"] = files["state.json"].replace(b": %d" % size, b": %d" % len(files[name]))
    step = folder / "step_00000001"
    step.mkdir()
    for name, data in files.items():
        (step / name).write_bytes(data)
    found = checkpoint.newest(folder, placement())
    if found is None:
        return
    path, state = found
    expected = json.loads(checkpoint_files()["state.json"])["fingerprint"]
    assert all(isinstance(change, str) for change in compare_fingerprints(state["fingerprint"], expected))
    checkpoint.load(path, some_tensors(), placement())
    bad = BadSamples(0.5)
    bad.restore(state["bad"])
    bad.add(8, 0, [])
    bad.check()
    assert state["step"] + state["samples"] + state["tokens"] >= 0


# Share of each target in twenty inputs, and the errors it may raise (UserError is every reader's own).
TARGETS: list[tuple[int, Callable[[random.Random, Path], None]]] = [
    (4, fuzz_tar), (3, fuzz_index), (3, fuzz_rows), (1, fuzz_row_index), (1, fuzz_captions), (5, fuzz_picture), (1, fuzz_recipe), (2, fuzz_checkpoint),
]
WHEEL = [target for share, target in TARGETS for _ in range(share)]


# -------------------------------------------------------------------------------------------------------------- driver


class Hang(BaseException):
    """One input took longer than HANG_S of processor time (no reader catches a BaseException)."""


def _on_time(*_: object) -> None:
    raise Hang(f"more than {HANG_S:g} s")


def try_input(number: int, seed: int, folder: Path) -> str:
    """"" or what went wrong with input `number`."""
    from aimv2_vlm.config import UserError

    target = WHEEL[number % len(WHEEL)]
    place = folder / "input"
    place.mkdir()
    signal.setitimer(signal.ITIMER_PROF, HANG_S, 0.1)  # again and again, in case a library swallows the first
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            target(random.Random(f"fuzz {seed} {number}"), place)
    except UserError as error:
        return "" if str(error).strip() and len(str(error)) < 5000 else f"{target.__name__}: an unusable message: {str(error)[:200]!r}"
    except (Exception, Hang) as error:
        where = "; ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-4:])
        return f"{target.__name__}: {type(error).__name__}: {str(error)[:200]} ({where})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(place, ignore_errors=True)
    return ""


def import_readers() -> None:
    """What the targets use; importing it must not count as an input's time."""
    import PIL.Image
    import safetensors.numpy  # noqa: F401

    import aimv2_vlm.data.pairs
    import aimv2_vlm.train.loop  # noqa: F401

    PIL.Image.init()
    for make in (seed_pictures, shipped, checkpoint_files):
        make()


def resident() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def try_inputs(
    numbers: range, seed: int, now_at: Callable[[int], None] = lambda number: None, inputs: str | None = None
) -> Iterator[tuple[int, str]]:
    """(number, what went wrong) of every input that fails; time and peak memory are watched. inputs: folder for the files."""
    import warnings

    import_readers()
    old = signal.signal(signal.SIGPROF, _on_time)
    try:
        with tempfile.TemporaryDirectory(dir=inputs or _memory_folder()) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            limit = 0
            for number in numbers:
                now_at(number)
                try:
                    problem = try_input(number, seed, Path(folder))
                except Hang as late:  # between the reader's return and the timer's end
                    problem = str(late)
                limit = limit or resident() + MEMORY
                if resident() > limit:
                    problem = problem or f"{WHEEL[number % len(WHEEL)].__name__}: memory grew to {resident() >> 20} MiB"
                    limit = resident() + MEMORY
                if problem:
                    yield number, problem
    finally:
        signal.signal(signal.SIGPROF, old)


def _memory_folder() -> str | None:
    """Inputs live in memory where the system has a place for that: a disk would sync every one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _child(numbers: range, seed: int, log: Path, at: mmap.mmap, folder: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff complains there
    about = {"seed": seed}
    for number, problem in try_inputs(numbers, seed, lambda number: at.__setitem__(slice(0, 8), struct.pack("<q", number)), folder):
        remember(log, about | {"number": number, "problem": problem})


def run_block(numbers: range, seed: int, log: Path) -> None:
    """Open `numbers` in child processes; one that hangs beyond interruption or dies costs the input it was at."""
    at = mmap.mmap(-1, 8)
    start = numbers.start
    while start < numbers.stop:
        with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
            status, seen = _watch(range(start, numbers.stop), seed, log, at, folder)
        if status == 0:
            return
        what = f"{WHEEL[seen % len(WHEEL)].__name__}: the process died or hung (exit status {status})"
        remember(log, {"seed": seed, "number": seen, "problem": what})
        start = seen + 1


def _watch(numbers: range, seed: int, log: Path, at: mmap.mmap, folder: str) -> tuple[int | None, int]:
    """(exit status of a child that opens `numbers`, the input it was at); a child that stands still is killed."""
    at[:8] = struct.pack("<q", numbers.start)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(numbers, seed, log, at, folder))
    child.start()
    seen, since, used = -1, 0.0, 0.0
    while child.is_alive():
        child.join(0.2)
        (number,) = struct.unpack("<q", at[:8])
        if number != seen:
            seen, since, used = number, time.monotonic(), _processor_seconds(child.pid)
        elif time.monotonic() - since > ASLEEP_S or _processor_seconds(child.pid) - used > DEAD_S:
            child.kill()
            child.join()
    return child.exitcode, struct.unpack("<q", at[:8])[0]


def _processor_seconds(process: int) -> float:
    """What a process has used so far; on a busy machine the wall clock says little."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argument_parser(__doc__, 1_000_000, "inputs")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after the block that passes this time, and say how far it came")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "aimv2_vlm_fuzz")
    parser.add_argument("--replay", type=int, default=None, metavar="NUMBER", help="open one input here, with its traceback")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        with tempfile.TemporaryDirectory() as folder:
            WHEEL[arguments.replay % len(WHEEL)](random.Random(f"fuzz {arguments.seed} {arguments.replay}"), Path(folder))
        return
    log, about = arguments.work / "fuzz.jsonl", {"seed": arguments.seed}
    done = {line["done"] for line in done_lines(log, about) if "done" in line}
    stop, began = arguments.first + arguments.count, time.monotonic()
    import_readers()  # once, before any child

    opened = 0
    for first in range(arguments.first - arguments.first % BLOCK_SIZE, stop, BLOCK_SIZE):
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        if first not in done:
            run_block(range(max(first, arguments.first), min(first + BLOCK_SIZE, stop)), arguments.seed, log)
            if first + BLOCK_SIZE <= stop:
                remember(log, about | {"done": first})
        opened = min(first + BLOCK_SIZE, stop) - arguments.first
    inputs = range(arguments.first, arguments.first + opened)
    failed = {line["number"]: line["problem"] for line in done_lines(log, about) if line.get("number") in inputs}
    for number, problem in sorted(failed.items()):
        print(f"input {number}: {problem}", flush=True)
    kinds = Counter(WHEEL[number % len(WHEEL)].__name__ for number in failed)
    summarise("R6 fuzzing", len(failed), "inputs with an undeclared error, a hang or a memory blow-up", count=opened, first=arguments.first,
              seed=arguments.seed, failed_kinds=dict(kinds))


if __name__ == "__main__":
    main()
