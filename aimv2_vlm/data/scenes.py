"""Embedded data: real handwritten digits, coloured shapes and printed words and numbers on textured grounds.

A scene is a pure function of (split, index, kind, seed). Its description (the graph: what stands where, how it looks)
comes first, from Python's `random.Random` alone; pixels, captions, questions and answers follow from the description.

    scene = make_scene("train", 7)          # description, hashable
    render(scene)                           # uint8 (height, width, 3)
    alt_text(scene), sentence(scene)        # the two caption columns
    questions(scene)                        # every question whose answer is unique

Splits share no scene, and no digit image: scikit-learn's digits come from a few writers in blocks, so they are split by
contiguous blocks. Some visual attributes (HELD_OUT_CANDIDATES) are drawn and asked about but named by no caption, so
that what pre-training teaches can be told from what captions give away.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aimv2_vlm.config import UserError

# -------------------------------------------------------------------------- what defines the generator

GENERATOR_VERSION = 2  # 1 named places in its second caption and was judged once: this one's scenes are all new
SPLIT_DIGITS = {"train": (0, 1400), "dev": (1400, 1598), "test": (1598, 1797)}  # blocks of scikit-learn's digit images
SCENE_SIZE = 112
DETAIL_SIZES = (56,)  # small canvases: objects as large as tiles show them
DETAIL_MAGNIFIED = 56  # an encoder of this size sees a detail canvas; its print heights are drawn for that view

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS = {
    "red": (222, 38, 38),
    "orange": (250, 140, 20),
    "yellow": (248, 226, 50),
    "green": (30, 165, 55),
    "blue": (40, 75, 225),
    "purple": (140, 45, 185),
    "pink": (250, 130, 195),
}
WORDS = tuple("bird book cake door fish jazz lamp moon ship snow tree wolf".split())  # of one length: a plate's width tells nothing
NUMBERS = (10, 99)  # both included
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif")  # they ship inside matplotlib
CAP_RATIO = 0.729  # cap height / em of these fonts, so size = cap height / CAP_RATIO renders it to the pixel
PRINT_HEIGHTS = (("small", 0.45, (7, 9)), ("middle", 0.1, (11, 12)), ("large", 0.45, (14, 18)))  # share, cap height in px
DETAIL_PRINT_HEIGHTS = (("small", 1.0, (7, 9)),)  # of the magnified canvas
DIGIT_SIZES = (28, 40)
SHAPE_SIZES = (28, 40)
DETAIL_OBJECT_SIZES = (14, 20)  # digits and shapes, of the magnified canvas
DETAIL_ROLE_CHANCE = 0.75  # each of digit, shape, word and number stands on a detail canvas with this chance
MIN_UNPLATED = 12  # smaller print always gets a plate, else the texture would make it unfair
RASTER = {"scene": 28, "detail": 14}  # objects begin on this raster: two patches of a full view, one of a half-size view
MARGIN = 2  # pixels between objects, and between objects and the border

FILLS = ("solid", "outlined", "striped")
TEXTURES = ("stripes", "checks", "dots", "grain")
INKS = ("dark", "light")
PLATES = ("dark", "light", "none")
SIDES = ("left", "right")
HELD_OUT_CANDIDATES = ("fill", "texture", "ink", "plate", "side")  # drawn and asked about, named by no caption
HELD_OUT = "side"  # the one that claims are made about: on dev any encoder told ink and plate, and none of this size fill or texture

SINGLE_WORD = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
SUFFIXES = {"single_word": SINGLE_WORD, "option_letter": OPTION_LETTER, "caption": ""}
QUESTION_FORMS = {
    "digit": "Which digit is handwritten?",
    "color": "What color is the {shape}?",
    "shape": "What shape is {color}?",
    "word": "Which word is printed?",
    "number": "Which number is printed?",
    "choice": "Which shape is {color}?",
    "caption": CAPTION_PROMPT,
    "fill": "Is the {shape} solid, outlined or striped?",
    "texture": "Does the background show stripes, checks, dots or grain?",
    "ink": "Is the handwritten digit dark or light?",
    "plate": "Is the label of the word dark or light?",
    "side": "On which side is the {shape}, left or right?",
}
LETTERS = "ABCD"

# Streams of scene numbers: pre-training, conversations and benchmarks never show the same picture.
FIRST_CONVERSATION = 10_000_000
FIRST_BENCHMARK = 20_000_000

TEST_GENERATOR_HASH = "086f24fd560e6c01d668f7f532b3579165667a881176b648760ca25725c96491"


def generator_constants() -> dict:
    """Everything that defines the generator besides its code, as JSON values."""
    names = (
        "GENERATOR_VERSION SPLIT_DIGITS SCENE_SIZE DETAIL_SIZES DETAIL_MAGNIFIED SHAPES COLORS WORDS NUMBERS "
        "DIGIT_WORDS FONTS CAP_RATIO PRINT_HEIGHTS DETAIL_PRINT_HEIGHTS DIGIT_SIZES SHAPE_SIZES DETAIL_OBJECT_SIZES "
        "MIN_UNPLATED MARGIN FILLS TEXTURES INKS PLATES SIDES HELD_OUT_CANDIDATES SUFFIXES QUESTION_FORMS "
        "FIRST_CONVERSATION FIRST_BENCHMARK"
    ).split()
    return {name: globals()[name] for name in names}


def test_generator_hash(num_scenes: int = 64) -> str:
    """SHA-256 over the constants and the first test scenes (descriptions, captions, questions, answers; no pixels)."""
    scenes = [make_scene("test", FIRST_BENCHMARK + i) for i in range(num_scenes)]
    content = [generator_constants()]
    content += [[asdict(s), alt_text(s), sentence(s), [q._asdict() for q in questions(s)]] for s in scenes]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


test_generator_hash.__test__ = False  # pytest would collect it by its name

# ----------------------------------------------------------------------------------------- description


@dataclass(frozen=True)
class Box:
    """Where an object stands, in pixels; (height, width)."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Digit:
    """A handwritten digit: number `image` of scikit-learn's set."""

    box: Box
    value: int
    image: int
    ink: str


@dataclass(frozen=True)
class Shape:
    """A coloured shape; `angle` in degrees, `fill` one of FILLS."""

    box: Box
    name: str
    color: str
    fill: str
    angle: int


@dataclass(frozen=True)
class Print:
    """A printed word or number; `cap_height` is the height of a capital H in pixels of the picture."""

    box: Box
    role: str  # word | number
    text: str
    font: str
    cap_height: int
    plate: str
    ink: str


@dataclass(frozen=True)
class Ground:
    """The textured background: mean colour, texture with its period (pixels), direction and contrast."""

    color: tuple[int, int, int]
    texture: str
    period: int
    angle: int
    contrast: int
    pixel_seed: int


@dataclass(frozen=True)
class Scene:
    """The graph of one picture; objects in raster order."""

    split: str
    index: int
    kind: str
    seed: int
    size: int
    ground: Ground
    objects: tuple[Digit | Shape | Print, ...]

    @property
    def digits(self) -> list[Digit]:
        return [o for o in self.objects if isinstance(o, Digit)]

    @property
    def shapes(self) -> list[Shape]:
        return [o for o in self.objects if isinstance(o, Shape)]

    def prints(self, role: str) -> list[Print]:
        return [o for o in self.objects if isinstance(o, Print) and o.role == role]


def make_scene(split: str, index: int, kind: str = "scene", seed: int = 0) -> Scene:
    """The scene number `index` of a split; kind "scene" (112 px, 4-5 objects) or "detail" (56 px, 1-4 objects)."""
    if split not in SPLIT_DIGITS or kind not in ("scene", "detail"):
        raise UserError(
            f"scenes: no split {split!r} with kind {kind!r}; splits: {', '.join(SPLIT_DIGITS)}; kinds: scene, detail"
        )
    random = Random(f"{GENERATOR_VERSION}/{seed}/{split}/{kind}/{index}")
    size = SCENE_SIZE if kind == "scene" else random.choice(DETAIL_SIZES)
    ground = _draw_ground(random, size)
    for _ in range(100):  # a draw that finds no room is drawn again
        objects = _place(random, size, RASTER[kind], _draw_objects(random, split, kind, size))
        if objects:
            return Scene(split, index, kind, seed, size, ground, objects)
    raise AssertionError(f"no room for the objects of scene {split}/{kind}/{index}")


def _draw_ground(random: Random, size: int) -> Ground:
    grey = random.randint(105, 150)  # middle grey: dark ink, light ink and every colour stand out from it
    color = tuple(grey + random.randint(-16, 16) for _ in range(3))
    return Ground(
        color=color,
        texture=random.choice(TEXTURES),
        period=random.choice((8, 11, 15)),
        angle=random.randrange(0, 180, 30),
        contrast=random.randint(10, 22),
        pixel_seed=random.getrandbits(63),
    )


def _draw_objects(random: Random, split: str, kind: str, size: int) -> list[Digit | Shape | Print]:
    """Objects with their sizes, not yet placed (top = left = 0)."""
    if kind == "scene":
        roles = ["digit", "word", "number", "shape"] + ["shape"] * random.randint(0, 1)
        scale, heights, digit_sizes, shape_sizes = 1.0, PRINT_HEIGHTS, DIGIT_SIZES, SHAPE_SIZES
    else:
        roles = [role for role in ("digit", "word", "number", "shape") if random.random() < DETAIL_ROLE_CHANCE] or ["shape"]
        scale, heights = size / DETAIL_MAGNIFIED, DETAIL_PRINT_HEIGHTS
        digit_sizes = shape_sizes = DETAIL_OBJECT_SIZES
    objects: list[Digit | Shape | Print] = []
    for role in roles:
        if role == "digit":
            side = round(scale * random.randint(*digit_sizes))
            image = random.randrange(*SPLIT_DIGITS[split])
            objects.append(Digit(Box(0, 0, side, side), int(_digits()[1][image]), image, random.choice(INKS)))
        elif role == "shape":
            side = round(scale * random.randint(*shape_sizes))
            taken = {(o.name, o.color) for o in objects if isinstance(o, Shape)}
            looks = [(name, color) for name in SHAPES for color in COLORS if (name, color) not in taken]
            name, color = random.choice(looks)
            objects.append(
                Shape(Box(0, 0, side, side), name, color, random.choice(FILLS), random.randrange(-12, 13, 4))
            )
        else:
            text = random.choice(WORDS) if role == "word" else str(random.randint(*NUMBERS))
            band = random.choices(heights, [share for _, share, _ in heights])[0]
            cap_height = round(scale * random.randint(*band[2]))
            font = random.choice(FONTS)
            plate = random.choice(PLATES if cap_height >= MIN_UNPLATED else PLATES[:2])
            ink = random.choice(INKS) if plate == "none" else ("light" if plate == "dark" else "dark")
            box = _print_box(text, font, cap_height)
            objects.append(Print(box, role, text, font, cap_height, plate, ink))
    return objects


def _print_box(text: str, font: str, cap_height: int) -> Box:
    """Room for a text with its plate: width from the font's unhinted advances, height with ascenders and descenders."""
    pad = _print_pad(cap_height)
    width = math.ceil(_text_width(text, font) * cap_height / CAP_RATIO)
    return Box(0, 0, math.ceil(1.34 * cap_height) + 2 * pad, width + 2 * pad)


def _print_pad(cap_height: int) -> int:
    return max(3, round(0.25 * cap_height))


def _place(random: Random, size: int, raster: int, objects: list) -> tuple | None:
    """Random places without overlap, large objects first; None if no room was found. Objects in raster order."""
    if any(max(o.box.height, o.box.width) > size - 2 * MARGIN for o in objects):
        return None
    by_area = sorted(range(len(objects)), key=lambda i: -objects[i].box.height * objects[i].box.width)
    for _ in range(20):
        placed: list[Box] = []
        for i in by_area:
            height, width = objects[i].box.height, objects[i].box.width
            for _ in range(25):
                top = random.randrange(MARGIN, size - MARGIN - height + 1, raster)
                left = random.randrange(MARGIN, size - MARGIN - width + 1, raster)
                if all(
                    top >= b.top + b.height + MARGIN
                    or b.top >= top + height + MARGIN
                    or left >= b.left + b.width + MARGIN
                    or b.left >= left + width + MARGIN
                    for b in placed
                ):
                    placed.append(Box(top, left, height, width))
                    break
            else:
                break
        if len(placed) == len(objects):
            done = [replace(objects[i], box=box) for i, box in zip(by_area, placed, strict=True)]
            return tuple(sorted(done, key=lambda o: (_third(o.box.top, o.box.height, size), o.box.left)))
    return None


def _third(start: int, length: int, size: int) -> int:
    """0, 1 or 2: the third of the canvas in which the middle of [start, start + length) lies."""
    return min(2, int((start + length / 2) * 3 / size))


# ------------------------------------------------------------------------------------ words of a scene

def _side(box: Box, size: int) -> str | None:
    """The side of the canvas that the middle of a box lies on; None within a sixteenth of the canvas from its middle."""
    off = box.left + box.width / 2 - size / 2
    return SIDES[off > 0] if abs(off) >= size / 16 else None


def _named(item: Digit | Shape | Print) -> str:
    if isinstance(item, Digit):
        return f"a handwritten {DIGIT_WORDS[item.value]}"
    if isinstance(item, Shape):
        return f"{'an' if item.color[0] in 'aeiou' else 'a'} {item.color} {item.name}"
    return f"the {'printed word' if item.role == 'word' else 'number'} {item.text}"


def _joined(parts: Sequence[str]) -> str:
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return text[0].upper() + text[1:] + "."


def _in_order(scene: Scene) -> list[Digit | Shape | Print]:
    """Shapes, digit, word, number; shapes by name, because captions say nothing about places, not even by their order."""
    shapes = sorted(scene.shapes, key=lambda shape: (shape.name, shape.color))
    return [*shapes, *scene.digits, *scene.prints("word"), *scene.prints("number")]


def alt_text(scene: Scene) -> str:
    """Terse alt text (`txt` of the shards): shapes, digit, word, number."""
    terse = {"a handwritten": "handwritten", "the printed word": "word", "the number": "number"}
    parts = []
    for item in _in_order(scene):
        text = _named(item)
        long = next((phrase for phrase in terse if text.startswith(phrase)), None)
        parts.append(terse[long] + text[len(long) :] if long else text.split(" ", 1)[1])
    return ", ".join(parts)


def sentence(scene: Scene) -> str:
    """Synthetic caption (`synthetic` in the shards' JSON), one full sentence: also a right answer to CAPTION_PROMPT."""
    return _joined([_named(item) for item in _in_order(scene)])


class Question(NamedTuple):
    """One question with its answer. `form` groups questions that are the same but for the picture; `print_height` is
    the cap height in pixels of the picture, None unless the question is about print."""

    form: str
    attribute: str
    text: str
    answers: tuple[str, ...]
    suffix: str = "single_word"
    options: tuple[str, ...] = ()
    letter: str = ""
    print_height: int | None = None


def questions(scene: Scene) -> list[Question]:
    """Every question about the scene that has exactly one answer, in a fixed order."""
    asked: list[Question] = []
    for digit in scene.digits:
        asked.append(Question("digit", "digit", QUESTION_FORMS["digit"], (str(digit.value),)))
        asked.append(Question("ink", "ink", QUESTION_FORMS["ink"], (digit.ink,)))
    names, colors = [s.name for s in scene.shapes], [s.color for s in scene.shapes]
    for shape in scene.shapes:
        if names.count(shape.name) == 1:
            for attribute in ("color", "fill"):
                text = QUESTION_FORMS[attribute].format(shape=shape.name)
                asked.append(Question(f"{attribute}:{shape.name}", attribute, text, (getattr(shape, attribute),)))
            if side := _side(shape.box, scene.size):
                asked.append(Question(f"side:{shape.name}", "side", QUESTION_FORMS["side"].format(shape=shape.name), (side,)))
        if colors.count(shape.color) == 1:
            text = QUESTION_FORMS["shape"].format(color=shape.color)
            asked.append(Question(f"shape:{shape.color}", "shape", text, (shape.name,)))
            asked.append(_choice(scene, shape))
    for role in ("word", "number"):
        for printed in scene.prints(role):
            text = QUESTION_FORMS[role]
            asked.append(Question(role, role, text, (printed.text,), print_height=printed.cap_height))
            if role == "word" and printed.plate != "none":
                asked.append(Question("plate", "plate", QUESTION_FORMS["plate"], (printed.plate,)))
    asked.append(Question("texture", "texture", QUESTION_FORMS["texture"], (scene.ground.texture,)))
    references = (sentence(scene), alt_text(scene))
    asked.append(Question("caption", "caption", QUESTION_FORMS["caption"], references, suffix="caption"))
    return asked


def _choice(scene: Scene, shape: Shape) -> Question:
    """Multiple choice with four options; another shape of the scene is always among the wrong ones."""
    random = Random(f"choice/{scene.seed}/{scene.split}/{scene.kind}/{scene.index}/{shape.color}")
    present = {s.name for s in scene.shapes} - {shape.name}
    absent = sorted(set(SHAPES) - present - {shape.name})
    options = [shape.name, *sorted(present), *random.sample(absent, len(LETTERS) - 1 - len(present))]
    random.shuffle(options)
    letter = LETTERS[options.index(shape.name)]
    text = QUESTION_FORMS["choice"].format(color=shape.color)
    return Question(f"choice:{shape.color}", "choice", text, (shape.name,), "option_letter", tuple(options), letter)


def prompt(question: Question, with_suffix: bool = True) -> str:
    """The user's words: question, options as "A. circle" lines, the suffix on a line of its own (Table C2)."""
    lines = [question.text, *(f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=False))]
    return "\n".join([*lines, *filter(None, [SUFFIXES[question.suffix]] if with_suffix else [])])


def reply(question: Question) -> str:
    """What a perfect assistant says."""
    return question.letter or question.answers[0]


# ---------------------------------------------------------------------------------------------- pixels


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 digit images, uint8 (1797, 8, 8) in 0..240, and their values."""
    rows = np.loadtxt(_package_file("sklearn", "datasets/data/digits.csv.gz"), delimiter=",", dtype=np.uint8)
    return rows[:, :64].reshape(-1, 8, 8) * 15, rows[:, 64]


@lru_cache(maxsize=256)
def _font(name: str, size: float) -> ImageFont.FreeTypeFont:
    path = _package_file("matplotlib", f"mpl-data/fonts/ttf/{name}.ttf")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _package_file(package: str, name: str) -> Path:
    """A data file of an installed package, without importing the package (that takes seconds in every process)."""
    spec = find_spec(package)
    path = Path(spec.origin).parent / name if spec and spec.origin else None
    if path is None or not path.exists():
        raise UserError(f"scenes: {name} of the package {package} not found; pip install {package}")
    return path


@lru_cache(maxsize=4096)
def _text_width(text: str, font: str) -> float:
    """Width in em, from a size at which hinting does not matter."""
    return _font(font, 1000).getlength(text) / 1000


def render(scene: Scene) -> np.ndarray:
    """Pixels of a scene, uint8 (height, width, 3)."""
    random = np.random.Generator(np.random.PCG64(scene.ground.pixel_seed))
    canvas = _render_ground(scene.ground, scene.size, random)
    for item in scene.objects:
        if isinstance(item, Print):
            _draw_print(canvas, item, random)
        elif isinstance(item, Digit):
            canvas.paste(_ink(item.ink, random), (item.box.left, item.box.top), _digit_mask(item))
        else:
            canvas.paste(_jittered(COLORS[item.color], 10, random), (item.box.left, item.box.top), _shape_mask(item))
    return np.asarray(canvas)


def encode_jpeg(pixels: np.ndarray, quality: int = 92) -> bytes:
    """JPEG bytes of uint8 (height, width, 3)."""
    import simplejpeg

    return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")


def _render_ground(ground: Ground, size: int, random: np.random.Generator) -> Image.Image:
    """Clouds of colour + texture + pixel noise. The sum stays within 0..255 by the bounds of its parts."""
    cells = random.integers(-22, 23, (3, _CLOUD_CELLS, _CLOUD_CELLS)) + np.array(ground.color)[:, None, None]
    smooth = _cloud_weights(size)
    planes = smooth @ cells.astype(np.float32) @ smooth.T
    texture = _texture_bank(ground.texture, ground.period, ground.angle)
    planes += _window(texture, size, random) * np.float32(ground.contrast) + _window(_noise_bank(), size, random)
    return Image.merge("RGB", [Image.fromarray(plane) for plane in planes.astype(np.uint8)])


def _window(bank: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    top, left = random.integers(0, _BANK_SIZE - size, 2).tolist()
    return bank[top : top + size, left : left + size]


_CLOUD_CELLS, _BANK_SIZE = 5, 300


@lru_cache(maxsize=16)
def _cloud_weights(size: int) -> np.ndarray:
    """Weights that spread a row of cells over `size` pixels smoothly, float32 (size, cells), rows add up to 1."""
    at = np.linspace(0, _CLOUD_CELLS - 1, size)[:, None] - np.arange(_CLOUD_CELLS)
    weights = np.exp(-0.5 * (at / 0.5) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    """Pixel noise, float32 (300, 300); pictures take windows of it."""
    noise = np.random.Generator(np.random.PCG64(0)).normal(0, 4, (_BANK_SIZE, _BANK_SIZE))
    return np.clip(noise, -16, 16).astype(np.float32)


@lru_cache(maxsize=256)
def _texture_bank(texture: str, period: int, angle: int) -> np.ndarray:
    """A texture, float32 (300, 300) in [-1, 1]; pictures take windows of it."""
    if texture == "grain":  # coarse speckle without direction; period and angle only choose another one
        random = np.random.Generator(np.random.PCG64([period, angle]))
        speckle = Image.fromarray(random.integers(0, 256, (_BANK_SIZE // 3, _BANK_SIZE // 3)).astype(np.uint8))
        speckle = speckle.resize((_BANK_SIZE, _BANK_SIZE), Image.Resampling.BILINEAR)
        return np.asarray(speckle, dtype=np.float32) / 127.5 - 1
    along = np.arange(_BANK_SIZE, dtype=np.float32) * np.float32(2 * math.pi / period)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    u, v = np.sin(along[:, None] * s + along * c), np.sin(along[:, None] * c - along * s)
    if texture == "stripes":
        pattern = np.clip(2.5 * u, -1, 1)
    elif texture == "checks":
        pattern = np.clip(2.5 * u, -1, 1) * np.clip(2.5 * v, -1, 1)
    else:  # dots: peaks of two crossing waves
        pattern = 1.5 * np.clip(3 * (u + v - 1), 0, 1) - 0.5
    return pattern.astype(np.float32)


def _jittered(color: Sequence[int], amount: int, random: np.random.Generator) -> tuple[int, ...]:
    changes = random.integers(-amount, amount + 1, 3).tolist()
    return tuple(min(255, max(0, c + d)) for c, d in zip(color, changes, strict=True))


def _ink(ink: str, random: np.random.Generator) -> tuple[int, ...]:
    return _jittered((22, 22, 22) if ink == "dark" else (240, 240, 240), 15, random)


_SHARPEN = [min(255, max(0, round((v - 60) * 2.2))) for v in range(256)]  # crisp pen strokes from a blurred 8x8 picture


def _digit_mask(digit: Digit) -> Image.Image:
    small = Image.fromarray(_digits()[0][digit.image])
    return small.resize((digit.box.width, digit.box.height), Image.Resampling.BICUBIC).point(_SHARPEN)


def _shape_mask(shape: Shape) -> Image.Image:
    """Alpha of a shape, "L" (side, side)."""
    side = shape.box.height
    return _large_shape(shape.name, shape.fill, shape.angle).resize((side, side), Image.Resampling.BOX)


@lru_cache(maxsize=256)
def _large_shape(name: str, fill: str, angle: int, side: int = 256) -> Image.Image:
    stroke = {"solid": 0, "outlined": 28, "striped": 10}[fill]
    half = (side - stroke) / 2 - 4
    points = [(side / 2 + half * x, side / 2 + half * y) for x, y in _outline(name, angle)]
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    if fill != "outlined":
        draw.polygon(points, fill=255)
    if fill == "striped":
        for top in range(14, side, 56):
            draw.rectangle((0, top, side, top + 27), fill=0)
    if stroke:
        draw.line([*points, *points[:2]], fill=255, width=stroke, joint="curve")
    return mask


def _outline(name: str, angle: int) -> list[tuple[float, float]]:
    """Corners of a shape inside [-1, 1] x [-1, 1], y downwards, turned by `angle` degrees."""
    if name == "circle":
        corners = [(math.cos(t * math.pi / 24), math.sin(t * math.pi / 24)) for t in range(48)]
    elif name == "square":
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif name == "triangle":
        corners = [(0, -1), (1, 0.9), (-1, 0.9)]
    elif name == "star":
        radii = [1.0 if t % 2 == 0 else 0.5 for t in range(10)]
        corners = [(r * math.sin(t * math.pi / 5), -r * math.cos(t * math.pi / 5)) for t, r in enumerate(radii)]
    elif name == "cross":
        a = 0.36
        corners = [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    else:  # heart
        ts = [t * math.pi / 24 for t in range(48)]
        corners = [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
            )
            for t in ts
        ]
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turned = [(x * c - y * s, x * s + y * c) for x, y in corners]
    reach = max(max(abs(x), abs(y)) for x, y in turned)
    return [(x / reach, y / reach) for x, y in turned]


def _draw_print(canvas: Image.Image, item: Print, random: np.random.Generator) -> None:
    box, pad = item.box, _print_pad(item.cap_height)
    draw = ImageDraw.Draw(canvas)
    if item.plate != "none":
        plate = _jittered((35, 35, 40) if item.plate == "dark" else (232, 230, 222), 12, random)
        corners = (box.left, box.top, box.left + box.width - 1, box.top + box.height - 1)
        draw.rounded_rectangle(corners, radius=max(2, pad // 2), fill=plate)
    font = _font(item.font, item.cap_height / CAP_RATIO)
    baseline = box.top + pad + math.ceil(1.05 * item.cap_height)
    draw.text((box.left + pad, baseline), item.text, font=font, fill=_ink(item.ink, random), anchor="ls")


# --------------------------------------------------------------------------------------------- writers

Progress = Callable[[int, int], None]  # (pictures done, pictures in all)


def write_pretraining_shards(
    out_dir: str | os.PathLike,
    split: str,
    num_samples: int,
    seed: int = 0,
    samples_per_shard: int = 1000,
    workers: int = 2,
    detail_share: float = 0.5,
    quality: int = 92,
    progress: Progress | None = None,
) -> Path:
    """img2dataset shards: JPEG, `.txt` = terse alt text, `.json` with `caption` (the same) and `synthetic` (sentence).

    A share of `detail_share` of the samples are detail canvases, evenly mixed in. Split "dev" gives validation shards.
    A finished folder with the same parameters is left as it is; another one raises UserError. Returns `out_dir`.
    """
    from aimv2_vlm.data.shards import write_shards

    parameters = dict(what="shards", split=split, num_samples=num_samples, seed=seed)
    parameters |= dict(samples_per_shard=samples_per_shard, detail_share=detail_share, quality=quality)
    with _finished_folder(out_dir, parameters) as folder:
        if folder:
            wanted = [(split, i, _kind_of(i, detail_share), seed) for i in range(num_samples)]
            write_shards(map(_shard_row, _pictures(wanted, quality, workers, progress)), folder, samples_per_shard)
    return Path(out_dir)


def _kind_of(index: int, detail_share: float) -> str:
    """Evenly spread: after any n samples floor(n * detail_share) were detail canvases."""
    return "detail" if math.floor((index + 1) * detail_share) > math.floor(index * detail_share) else "scene"


def _shard_row(picture: tuple[Scene, bytes]) -> dict:
    scene, jpeg = picture
    key, text = f"{scene.index:09d}", alt_text(scene)
    fields = dict(
        key=key, caption=text, synthetic=sentence(scene), width=scene.size, height=scene.size, status="success"
    )
    return dict(key=key, image_bytes=jpeg, ext="jpg", caption=text, json=fields)


def write_conversations(
    out_dir: str | os.PathLike,
    split: str,
    num_pictures: int,
    seed: int = 0,
    workers: int = 2,
    held_out: Sequence[str] = HELD_OUT_CANDIDATES,
    turns: tuple[int, int] = (4, 7),
    questioned: int = 1,
    quality: int = 92,
    progress: Progress | None = None,
) -> Path:
    """LLaVA conversations: `out_dir/conversations.json` with pictures under `out_dir/images/`.

    Every picture has a row with its description, every `questioned`-th one also a row of questions. `turns` = fewest
    and most questions a row; print and a held-out attribute are always among them. Returns the JSON's path.
    """
    parameters = dict(what="conversations", split=split, num_pictures=num_pictures, seed=seed, questioned=questioned)
    parameters |= dict(held_out=_check_held_out(held_out), turns=list(turns), quality=quality)
    with _finished_folder(out_dir, parameters) as folder:
        if folder:
            (folder / "images").mkdir()
            rows = []
            wanted = [(split, FIRST_CONVERSATION + i, "scene", seed) for i in range(num_pictures)]
            for i, (scene, jpeg) in enumerate(_pictures(wanted, quality, workers, progress)):
                rows.append(description(scene))
                (folder / "images" / rows[-1]["image"]).write_bytes(jpeg)
                if i % questioned == 0:
                    rows.append(conversation(scene, held_out, turns))
            (folder / "conversations.json").write_text(json.dumps(rows, indent=0))
    return Path(out_dir) / "conversations.json"


def _check_held_out(held_out: Sequence[str]) -> list[str]:
    if unknown := sorted(set(held_out) - set(HELD_OUT_CANDIDATES)):
        raise UserError(f"scenes: held_out {', '.join(unknown)} unknown; choose from {', '.join(HELD_OUT_CANDIDATES)}")
    return list(held_out)


def conversation(scene: Scene, held_out: Sequence[str] = HELD_OUT_CANDIDATES, turns: tuple[int, int] = (4, 7)) -> dict:
    """One LLaVA row: several questions about one picture in shuffled order, `<image>` in the first turn. As in LLaVA's own
    mixture a turn repeats the suffix of its prompt only where it differs from the turn before."""
    random = Random(f"conversation/{scene.seed}/{scene.split}/{scene.kind}/{scene.index}")
    pool = [q for q in questions(scene) if q.attribute in held_out or q.attribute not in (*HELD_OUT_CANDIDATES, "caption")]
    random.shuffle(pool)
    asked = [next((q for q in pool if wanted(q)), None) for wanted in (_is_print, lambda q: q.attribute in held_out)]
    asked = [q for q in asked if q]
    asked += [q for q in pool if q not in asked][: random.randint(*turns) - len(asked)]
    random.shuffle(asked)
    return _question_row(scene, "questions", asked)


def lone_questions(scene: Scene, attribute: str) -> dict | None:
    """One LLaVA row that asks for one attribute and nothing else; None for a scene without it."""
    asked = [q for q in questions(scene) if q.attribute == attribute]
    return _question_row(scene, attribute, asked) if asked else None


def description(scene: Scene) -> dict:
    """One LLaVA row: the caption prompt, answered by the alt text with digits as answers write them (3, not three)."""
    text = alt_text(scene)
    for digit in scene.digits:
        text = text.replace(f"handwritten {DIGIT_WORDS[digit.value]}", f"handwritten {digit.value}")
    return _row(scene, "description", [(CAPTION_PROMPT, text)])


def _question_row(scene: Scene, what: str, asked: Sequence[Question]) -> dict:
    said = [prompt(q, with_suffix=i == 0 or q.suffix != asked[i - 1].suffix) for i, q in enumerate(asked)]
    return _row(scene, what, zip(said, map(reply, asked), strict=True))


def _row(scene: Scene, what: str, turns: Iterable[tuple[str, str]]) -> dict:
    lines = []
    for i, (human, gpt) in enumerate(turns):
        lines += [{"from": "human", "value": ("" if i else "<image>\n") + human}, {"from": "gpt", "value": gpt}]
    return {"id": f"{scene.split}-{scene.index}-{what}", "image": f"{scene.index:09d}.jpg", "conversations": lines}


def _is_print(question: Question) -> bool:
    return question.attribute in ("word", "number")


BENCHMARKS = {  # folder -> attributes; inside its parquet the split is "test", wherever the scenes are from
    "scenes_objects": ("digit", "color", "shape"),
    "scenes_print": ("word", "number"),
    "scenes_choice": ("choice",),
    "scenes_heldout": HELD_OUT_CANDIDATES,
    "scenes_captions": ("caption",),
}


def write_benchmarks(
    out_dir: str | os.PathLike,
    split: str,
    num_pictures: int,
    seed: int = 0,
    workers: int = 2,
    held_out: Sequence[str] = HELD_OUT_CANDIDATES,
    quality: int = 92,
    progress: Progress | None = None,
) -> Path:
    """Benchmark folders `out_dir/<benchmark>/data/test-00000-of-00001.parquet`, all about the same pictures.

    Columns: id, picture_id, image, question (without prompt suffix), question_form, answers, options, answer_letter,
    attribute, print_height (NaN where the question is not about print). Returns `out_dir`.
    """
    parameters = dict(what="benchmarks", split=split, num_pictures=num_pictures, seed=seed)
    parameters |= dict(held_out=_check_held_out(held_out), quality=quality)
    with _finished_folder(out_dir, parameters) as folder:
        if folder:
            wanted = [(split, FIRST_BENCHMARK + i, "scene", seed) for i in range(num_pictures)]
            pictures = list(_pictures(wanted, quality, workers, progress))
            for benchmark, attributes in BENCHMARKS.items():
                asked = set(attributes) - (set(HELD_OUT_CANDIDATES) - set(held_out))
                rows = [row for picture in pictures for row in _benchmark_rows(picture, asked)]
                _write_parquet(rows, folder / benchmark / "data" / "test-00000-of-00001.parquet")
    return Path(out_dir)


def _benchmark_rows(picture: tuple[Scene, bytes], attributes: set[str]) -> Iterator[dict]:
    scene, jpeg = picture
    picture_id = f"{scene.split}-{scene.index}" + (f"-{scene.seed}" if scene.seed else "")
    for question in questions(scene):
        if question.attribute in attributes:
            yield {
                "id": f"{picture_id}-{question.form}",
                "picture_id": picture_id,
                "image": {"bytes": jpeg, "path": f"{picture_id}.jpg"},
                "question": question.text,
                "question_form": question.form,
                "answers": list(question.answers),
                "options": list(question.options),
                "answer_letter": question.letter,
                "attribute": question.attribute,
                "print_height": math.nan if question.print_height is None else float(question.print_height),
            }


def _write_parquet(rows: list[dict], path: Path) -> None:
    """Parquet that `datasets` opens with the image decoded: Arrow types, and the features in the schema's metadata."""
    import pyarrow
    import pyarrow.parquet

    text, texts = (
        {"dtype": "string", "_type": "Value"},
        {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    )
    columns = {
        "id": (pyarrow.string(), text),
        "picture_id": (pyarrow.string(), text),
        "image": (pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]), {"_type": "Image"}),
        "question": (pyarrow.string(), text),
        "question_form": (pyarrow.string(), text),
        "answers": (pyarrow.list_(pyarrow.string()), texts),
        "options": (pyarrow.list_(pyarrow.string()), texts),
        "answer_letter": (pyarrow.string(), text),
        "attribute": (pyarrow.string(), text),
        "print_height": (pyarrow.float64(), {"dtype": "float64", "_type": "Value"}),
    }
    features = {"info": {"features": {name: feature for name, (_, feature) in columns.items()}}}
    schema = pyarrow.schema(
        [(name, kind) for name, (kind, _) in columns.items()], {"huggingface": json.dumps(features)}
    )
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=256)


# -------------------------------------------------------------------------- processes and safe folders

_CHUNK = 128


def _pictures(
    wanted: Sequence[tuple[str, int, str, int]], quality: int, workers: int, progress: Progress | None
) -> Iterator[tuple[Scene, bytes]]:
    """(scene, JPEG) for each (split, index, kind, seed), in order; with at most a few chunks ahead of the reader."""
    chunks = [wanted[at : at + _CHUNK] for at in range(0, len(wanted), _CHUNK)]
    make, done = partial(_make_chunk, quality=quality), 0
    for chunk in _in_processes(make, chunks, workers) if workers > 1 and len(chunks) > 1 else map(make, chunks):
        yield from chunk
        done += len(chunk)
        if progress:
            progress(done, len(wanted))


def _make_chunk(wanted: Iterable[tuple[str, int, str, int]], quality: int) -> list[tuple[Scene, bytes]]:
    scenes = [make_scene(split, index, kind, seed) for split, index, kind, seed in wanted]
    return [(scene, encode_jpeg(render(scene), quality)) for scene in scenes]


def _in_processes(function: Callable, tasks: Iterable, workers: int) -> Iterator:
    """Like map, results in order, in fresh processes: the caller may hold threads, so they are spawned, not forked,
    and a script that calls this needs the usual `if __name__ == "__main__":`."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        ahead: deque = deque()
        for task in tasks:
            ahead.append(pool.submit(function, task))
            if len(ahead) > 3 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@contextmanager
def _finished_folder(out_dir: str | os.PathLike, parameters: dict) -> Iterator[Path | None]:
    """A folder to fill that appears under its name only when complete, with a receipt `done.json`.

    Gives None if `out_dir` is already finished with these parameters. What a killed run left is thrown away.
    """
    out_dir = Path(out_dir)
    definition = json.dumps(generator_constants(), sort_keys=True).encode()
    receipt = {"parameters": parameters, "generator": hashlib.sha256(definition).hexdigest()}
    receipt_file = out_dir / "done.json"
    if receipt_file.exists():
        if json.loads(receipt_file.read_text()) != receipt:
            raise UserError(
                f"{receipt_file}: holds data written with other parameters; remove {out_dir} or choose another folder"
            )
        yield None
        return
    if out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir}: not empty and without done.json; choose another folder or empty this one")
    partial_dir = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir(parents=True)
    yield partial_dir
    (partial_dir / "done.json").write_text(json.dumps(receipt, indent=1))
    if out_dir.exists():
        out_dir.rmdir()
    os.replace(partial_dir, out_dir)
