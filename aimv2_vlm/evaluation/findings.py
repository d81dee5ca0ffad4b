"""What the report says, as numbers: run directories and an evaluation's ledger read as far as they go, with the
differences, intervals and curves drawn from them. `report.py` puts them on a page.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aimv2_vlm.evaluation.metrics import paired_difference, share_interval
from aimv2_vlm.page import picture_uri

# Cap heights in pixels of an encoder that sees the whole picture in one view: the smallest legible bitmap fonts are
# 5 pixels high, from 7 on every letter has its shape. "Small print" and "large print" mean below 5 and from 7 on.
SMALL_PRINT, LARGE_PRINT = 5.0, 7.0

NUM_RANDOM_SAMPLES, NUM_DIFFERING_SAMPLES = 9, 6
PICTURE_PIXELS = 448  # longer side of an embedded picture
MAX_PICTURE_PIXELS = 64_000_000
MIN_BIN = 5  # questions a point of the print-height curves needs
DRAWS = 1000  # of a bootstrap
SUMMED = ("mme",)  # metrics in another unit than the mean of their questions' scores
CHUNK_ELEMENTS = 4_000_000  # drawn counts held at once: 32 MB


# ------------------------------------------------------------------------------------------------ what is read


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of a JSON-lines file and the number of lines that are none (the last one, after a kill)."""
    rows, damaged = [], 0
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                damaged += bool(line.strip())
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                damaged += 1
    return rows, damaged


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass
class Run:
    """A training run's directory as far as it can be read; `gaps` names what could not."""

    name: str
    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    recipe: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    data_report: dict[str, Any] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, name: str, path: Path) -> Run:
        run = cls(name, path)
        if not path.is_dir():
            run.gaps.append(f"{name}: there is no run directory {path}")
            return run
        try:
            run.rows, damaged = read_jsonl(path / "metrics.jsonl")
        except OSError:
            run.gaps.append(f"{name}: no metrics.jsonl in {path}")
        else:
            if damaged:
                run.gaps.append(f"{name}: {damaged} unreadable line{'s' if damaged > 1 else ''} in metrics.jsonl")
        run.rows = [row for row in run.rows if finite(row.get("step"))]
        try:
            run.recipe = (path / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
        except OSError:
            run.gaps.append(f"{name}: no recipe.yaml in {path}")
        run.environment = read_json(path / "environment.json")
        run.data_report = read_json(path / "data_report.json")
        if not (path / "final").is_dir():
            run.gaps.append(f"{name}: no final/ in {path} (the run is not finished)")
        return run

    def curve(self, key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in self.rows if finite(row.get(key))]

    def last(self, key: str) -> float | None:
        curve = self.curve(key)
        return curve[-1][1] if curve else None

    @property
    def train_seconds(self) -> float | None:
        """Time inside the loop, from the logged rates (validation and saving not counted)."""
        rows = [
            row
            for row in self.rows
            if finite(row.get("samples")) and finite(row.get("samples_per_s")) and row["samples_per_s"] > 0
        ]
        before = [0.0, *(row["samples"] for row in rows)]
        return (
            sum((row["samples"] - b) / row["samples_per_s"] for row, b in zip(rows, before, strict=False))
            if rows
            else None
        )


@dataclass(frozen=True, order=True)
class Arm:
    """One row of the comparison: a model with its tiling, or the same with pictures reduced first (`source_size`)."""

    model: str
    tiling: str
    source_size: int | None = None

    @property
    def label(self) -> str:
        parts = [self.model] + [self.tiling] * (self.tiling not in self.model)
        if self.source_size is not None and "upsampled" not in self.model:
            parts.append(f"upsampled from {self.source_size} px")
        return ", ".join(parts)

    @property
    def grid(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+)x(\d+)", self.tiling)
        return (int(found[1]), int(found[2])) if found else (1, 1)

    @property
    def varies(self) -> bool:
        """Whether pictures have different numbers of tiles, so that no `grid` is every picture's."""
        return "+" in self.tiling or "up to" in self.tiling


@dataclass(frozen=True)
class Picture:
    data_uri: str
    height: int
    width: int


class Evaluation:
    """The ledger with its samples: `cells[arm, benchmark, control]`, arms and benchmarks in the ledger's order."""

    def __init__(self, path: Path | None):
        self.path = path
        self.gaps: list[str] = []
        self.cells: dict[tuple[Arm, str, str | None], dict[str, Any]] = {}
        self._samples: dict[tuple[Arm, str, str | None], list[dict[str, Any]]] = {}
        self._encoder_sizes: dict[Arm, int | None] = {}
        if path is None:
            self.gaps.append("evaluation: none was given")
            return
        try:
            rows, damaged = read_jsonl(path / "ledger.jsonl")
        except OSError:
            self.gaps.append(f"evaluation: no ledger.jsonl in {path}")
            return
        for row in rows:
            if row.get("submission"):
                self.gaps.append(f"evaluation: {row.get('benchmark')}: its answers are withheld; those of {row.get('model')} wait for the organisers in {row['submission']}")
                continue
            if not (finite(row.get("score")) and row.get("model") is not None and row.get("benchmark") is not None):
                damaged += 1
                continue
            size = row.get("source_size")
            arm = Arm(str(row["model"]), str(row.get("tiling", "1x1") or ""), int(size) if finite(size) else None)  # encoders alone cut nothing
            self.cells[arm, str(row["benchmark"]), row.get("control") or None] = row
        if damaged:
            self.gaps.append(f"evaluation: {damaged} unreadable line{'s' if damaged > 1 else ''} in ledger.jsonl")
        if (path / "failed.jsonl").is_file():
            for row in read_jsonl(path / "failed.jsonl")[0]:
                control = f", {row['control']}" if row.get("control") else ""
                self.gaps.append(
                    f"evaluation: {row.get('model')}, {row.get('benchmark')}{control} failed: {row.get('reason')}"
                )

    @cached_property
    def arms(self) -> list[Arm]:
        return list(dict.fromkeys(arm for arm, _, control in self.cells if control is None))

    @cached_property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(benchmark for _, benchmark, control in self.cells if control is None))

    def style(self, arm: Arm) -> int:
        return self.arms.index(arm)

    def samples(self, arm: Arm, benchmark: str, control: str | None = None) -> list[dict[str, Any]]:
        """Scored answers of one cell with `points` (the score in the ledger's unit); [] when there are none."""
        return [sample for sample in self.answers(arm, benchmark, control) if "points" in sample]

    def answers(self, arm: Arm, benchmark: str, control: str | None = None) -> list[dict[str, Any]]:
        """All answers of one cell: those with an `error` instead of a score have no `points`."""
        key = (arm, benchmark, control)
        if key not in self._samples:
            self._samples[key] = self._read_samples(key)
        return self._samples[key]

    def _read_samples(self, key: tuple[Arm, str, str | None]) -> list[dict[str, Any]]:
        row = self.cells.get(key)
        if row is None or self.path is None or not row.get("samples") or row.get("kind", "benchmarks") != "benchmarks":
            return []  # pictures of zero-shot sets have classes and captions, not questions and answers
        where = f"evaluation: {key[0].label}, {key[1]}" + (f", {key[2]}" if key[2] else "")
        try:
            samples, _ = read_jsonl(self.path / str(row["samples"]))
        except OSError:
            self.gaps.append(f"{where}: no samples file {row['samples']}")
            return []
        scored = [100.0 * sample["score"] for sample in samples if finite(sample.get("score"))]
        if not scored or row.get("metric") not in SUMMED and abs(sum(scored) / len(scored) - row["score"]) > 0.1:
            mean = f"average to {sum(scored) / len(scored):.1f}" if scored else "have no scores"
            self.gaps.append(f"{where}: the {len(samples)} samples {mean}, the ledger says {row['score']:.1f}")
        return [s | {"points": 100.0 * s["score"]} if finite(s.get("score")) else s for s in samples]

    def encoder_size(self, arm: Arm) -> int | None:
        """Pixels of one view's side, from the checkpoint's own configuration."""
        if arm not in self._encoder_sizes:
            config = read_json(Path(str(self.any_cell(arm).get("model_path", ""))) / "config.json")
            vision = config.get("vision_config")
            size = vision.get("image_size") if isinstance(vision, dict) else None
            self._encoder_sizes[arm] = int(size) if finite(size) else None
        return self._encoder_sizes[arm]

    def any_cell(self, arm: Arm) -> dict[str, Any]:
        """A ledger row of the arm: for what is the same in all of them."""
        return next(row for (a, _, _), row in self.cells.items() if a == arm)

    def print_samples(self, arm: Arm) -> list[tuple[str, dict[str, Any]]]:
        """(benchmark, sample) of every question about print whose height is known."""
        return [
            (benchmark, sample)
            for benchmark in self.benchmarks
            for sample in self.samples(arm, benchmark)
            if finite(sample.get("print_height")) and sample["print_height"] > 0
        ]


def _parquet_rows(folder: Path, split: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as parquet

    for file in sorted((folder / "data").glob(f"{split}-*.parquet")):
        opened = parquet.ParquetFile(file)
        for batch in opened.iter_batches(batch_size=64, columns=[c for c in columns if c in opened.schema_arrow.names]):
            yield from batch.to_pylist()


def _image_bytes(value: Any, folder: Path) -> bytes | None:
    if not isinstance(value, dict):
        return None
    if value.get("bytes"):
        return value["bytes"]
    path = folder / "data" / str(value.get("path") or "")
    return path.read_bytes() if path.is_file() else None


def _embed(content: bytes) -> Picture:
    """A picture as a data URI, reduced to PICTURE_PIXELS; ValueError or OSError when it cannot be shown."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as opened:
        if opened.width * opened.height > MAX_PICTURE_PIXELS:
            raise ValueError("over the pixel limit")
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    height, width = picture.height, picture.width
    return Picture(picture_uri(picture, PICTURE_PIXELS, quality=88), height, width)


def read_pictures(
    folder: Path, split: str, shown: set[str], sized: set[str]
) -> tuple[dict[str, Picture], dict[str, int]]:
    """From a benchmark's parquet: pictures of question ids `shown`, longer sides of picture ids `sized`."""
    from PIL import Image

    pictures: dict[str, Picture] = {}
    sides: dict[str, int] = {}
    for row in _parquet_rows(folder, split, ["id", "picture_id", "image"]):
        key, picture_id = str(row.get("id")), str(row.get("picture_id"))
        if key not in shown and (picture_id not in sized or picture_id in sides):
            continue
        try:
            content = _image_bytes(row.get("image"), folder)
            if content is None:
                continue
            if picture_id in sized and picture_id not in sides:
                with Image.open(io.BytesIO(content)) as opened:
                    sides[picture_id] = max(opened.size)
            if key in shown:
                pictures[key] = _embed(content)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # stated where the picture would stand
    return pictures, sides


# ---------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Gain:
    """A difference in points with its 95 % interval (null: no samples to draw from)."""

    value: float
    interval: tuple[float, float] | None
    num_questions: int


def control_scores(evaluation: Evaluation, arm: Arm, benchmark: str) -> dict[str, float]:
    """Scores that need no look at the picture: blind, wrong_picture, majority, as far as they were measured."""
    found = {}
    for control in ("blind", "wrong_picture"):
        row = evaluation.cells.get((arm, benchmark, control))
        if row is not None:
            found[control] = float(row["score"])
    majority = evaluation.cells[arm, benchmark, None].get("majority_score")
    if finite(majority):
        found["majority"] = float(majority)
    return found


def further_scores(row: Mapping[str, Any]) -> list[str]:
    """What a ledger row of a probe or of zero-shot says beyond its score, in words: the best of the grid on test, top-5, other recalls."""
    found = []
    best = row.get("best_on_test")
    if isinstance(best, dict) and finite(best.get("score")):
        found.append(f"best on test {best['score']:.1f}")
    if finite(row.get("top_5")):
        found.append(f"top-5 {row['top_5']:.1f}")
    recalls = row.get("recalls")
    for name, recall in recalls.items() if isinstance(recalls, dict) else ():
        low, high = recall["interval"]
        found.append(f"{name.replace('_', ' ')} {recall['score']:.1f} ({low:.1f} to {high:.1f})")
    if row.get("differs_from_published"):
        found.append(f"another split: {row['differs_from_published']}")
    return found


def uses_picture(evaluation: Evaluation, arm: Arm, benchmarks: Sequence[str] | None = None) -> Gain | None:
    """Score − max(blind, wrong picture, most frequent answer), averaged over benchmarks where both controls ran.

    Captions (CIDEr) and MME's sum are left out of the average. The interval draws whole pictures; the most frequent answer's score is
    held fixed. None where no benchmark has both controls.
    """
    wanted = evaluation.benchmarks if benchmarks is None else benchmarks
    usable = [
        b for b in wanted
        if all((arm, b, control) in evaluation.cells for control in (None, "blind", "wrong_picture"))
        and (benchmarks is not None or evaluation.cells[arm, b, None].get("metric") not in ("cider", *SUMMED))
    ]  # fmt: skip
    if not usable:
        return None
    gains = [evaluation.cells[arm, b, None]["score"] - max(control_scores(evaluation, arm, b).values()) for b in usable]
    samples = {(b, c): evaluation.samples(arm, b, c) for b in usable for c in (None, "blind", "wrong_picture")}
    num = sum(len(samples[b, None]) for b in usable)
    value = sum(gains) / len(gains)
    if not all(samples.values()):
        return Gain(value, None, num)
    pictures = sorted({str(s.get("picture_id")) for rows in samples.values() for s in rows})
    place = {picture: i for i, picture in enumerate(pictures)}
    per_picture = {}  # (benchmark, control) -> sum of points and number of questions of each picture
    for key, rows in samples.items():
        where = [place[str(row.get("picture_id"))] for row in rows]
        sums = np.bincount(where, [row["points"] for row in rows], len(pictures))
        per_picture[key] = sums, np.bincount(where, minlength=len(pictures))
    generator, replicates = np.random.default_rng(0), []
    shares, chunk = np.full(len(pictures), 1 / len(pictures)), max(1, CHUNK_ELEMENTS // len(pictures))
    for start in range(0, DRAWS, chunk):
        drawn = generator.multinomial(len(pictures), shares, size=min(chunk, DRAWS - start)).astype(float)
        means = {k: drawn @ sums / np.maximum(drawn @ counts, 1.0) for k, (sums, counts) in per_picture.items()}
        gain = np.zeros(len(drawn))
        for b in usable:
            fixed = control_scores(evaluation, arm, b).get("majority", -math.inf)
            control = np.maximum(np.maximum(means[b, "blind"], means[b, "wrong_picture"]), fixed)
            gain += (means[b, None] - control) / len(usable)
        replicates.append(gain)
    low, high = np.quantile(np.concatenate(replicates), [0.025, 0.975])
    return Gain(value, (float(low), float(high)), num)


def resolution_pairs(evaluation: Evaluation) -> list[tuple[Arm, Arm]]:
    """(real tiles, the same tiling of pictures that were first reduced): the same checkpoint where there is one."""
    pairs = []
    for real in evaluation.arms:
        same = [a for a in evaluation.arms if a.tiling == real.tiling and a.source_size is not None]
        if real.source_size is None and real.grid != (1, 1) and same:
            path = evaluation.any_cell(real).get("model_path")
            pairs.append((real, min(same, key=lambda a: evaluation.any_cell(a).get("model_path") != path)))
    return pairs


class PrintHeights:
    """Print heights of an evaluation in source pixels, in one view's pixels, and in pixels of the tiled encoder."""

    def __init__(self, evaluation: Evaluation, sides: Mapping[tuple[str, str], int]):
        self.evaluation, self.sides = evaluation, sides

    def scale(self, arm: Arm, benchmark: str, sample: Mapping[str, Any], grid: int) -> float | None:
        """Encoder pixels per source pixel when `grid` views stand side by side."""
        size, side = self.evaluation.encoder_size(arm), self.sides.get((benchmark, str(sample.get("picture_id"))))
        return None if size is None or side is None else size * grid / side

    def one_view(self, arm: Arm, benchmark: str, sample: Mapping[str, Any]) -> float | None:
        scale = self.scale(arm, benchmark, sample, 1)
        return None if scale is None else scale * sample["print_height"]

    def encoder(self, arm: Arm, benchmark: str, sample: Mapping[str, Any]) -> float | None:
        """Height in the pixels that carry information: a picture reduced first has no more than it was reduced to."""
        scale = None if arm.varies else self.scale(arm, benchmark, sample, max(arm.grid))
        if scale is None:
            return None
        if arm.source_size is not None:
            scale = min(scale, arm.source_size / self.sides[benchmark, str(sample.get("picture_id"))])
        return scale * sample["print_height"]


def resolution_gain(heights: PrintHeights, real: Arm, upsampled: Arm, low: float, high: float) -> Gain | None:
    """Real tiles − upsampled tiles on print whose one-view height lies in [low, high), the same questions in both."""
    evaluation = heights.evaluation
    others = {(b, s.get("doc_id")): s for b, s in evaluation.print_samples(upsampled)}
    first, second, clusters = [], [], []
    for benchmark, sample in evaluation.print_samples(real):
        height, other = heights.one_view(real, benchmark, sample), others.get((benchmark, sample.get("doc_id")))
        if height is None or other is None or not low <= height < high:
            continue
        first.append(sample["points"])
        second.append(other["points"])
        clusters.append(f"{benchmark} {sample.get('picture_id')}")
    if len(first) < MIN_BIN:
        return None
    value, bottom, top = paired_difference([first], [second], [clusters], num=DRAWS)
    return Gain(value, (bottom, top), len(first))


@dataclass(frozen=True)
class Bin:
    """Questions of similar print height: mean height, accuracy in points, its interval, their number."""

    height: float
    score: float
    interval: tuple[float, float]
    num: int


def height_bins(found: Sequence[tuple[float, float, str]]) -> list[Bin]:
    """(height, points, picture) in steps of a factor sqrt 2; steps with fewer than MIN_BIN questions are left out."""
    groups: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
    for item in found:
        groups[math.floor(2 * math.log2(item[0]) + 1e-9)].append(item)
    bins = []
    for _, group in sorted(groups.items()):
        if len(group) >= MIN_BIN:
            heights, scores, pictures = zip(*group, strict=True)
            low, high = share_interval([score / 100 for score in scores], pictures, num=DRAWS)
            bins.append(Bin(sum(heights) / len(group), sum(scores) / len(group), (100 * low, 100 * high), len(group)))
    return bins


def smooth(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Running mean with a memory of a thirtieth of the curve, started without bias."""
    keep, value, weight, out = math.exp(-30 / max(30, len(curve))), 0.0, 0.0, []
    for x, y in curve:
        value, weight = keep * value + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, value / weight))
    return out


def thin(curve: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours, so that nothing is picked."""
    if len(curve) <= most:
        return list(curve)
    size = math.ceil(len(curve) / most)
    pieces = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(piece[-1][0], sum(y for _, y in piece) / len(piece)) for piece in pieces]


# ---------------------------------------------------------------------------------------------------- samples


def _drawn_order(key: tuple[str, str]) -> str:
    """A fixed order that knows nothing of the outcome."""
    return hashlib.sha256("\0".join(key).encode("utf-8", "replace")).hexdigest()


def choose_samples(evaluation: Evaluation) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Questions to show, as (benchmark, id): some by a hash of their name, some more where the models' scores differ.

    Both go round the (benchmark, attribute) groups, and show a picture once.
    """
    answers: dict[tuple[str, str], dict[Arm, float]] = defaultdict(dict)
    about: dict[tuple[str, str], tuple[str, str]] = {}
    for arm in evaluation.arms:
        for benchmark in evaluation.benchmarks:
            for sample in evaluation.samples(arm, benchmark):
                key = (benchmark, str(sample.get("id")))
                answers[key][arm] = sample["points"]
                about[key] = (str(sample.get("attribute")), f"{sample.get('picture_id')}")
    used: set[str] = set()

    def draw(keys: Iterable[tuple[str, str]], most: int) -> list[tuple[str, str]]:
        groups: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        for key in sorted(keys, key=_drawn_order, reverse=True):
            groups[key[0], about[key][0]].append(key)
        taken: list[tuple[str, str]] = []
        while len(taken) < most and any(groups.values()):
            for group in groups.values():
                while group and about[group[-1]][1] in used:
                    group.pop()
                if group and len(taken) < most:
                    used.add(about[group[-1]][1])
                    taken.append(group.pop())
        return taken

    drawn = draw(answers, NUM_RANDOM_SAMPLES)
    differing = [
        key for key, scores in answers.items() if len(scores) > 1 and max(scores.values()) - min(scores.values()) >= 50
    ]
    return drawn, draw(differing, NUM_DIFFERING_SAMPLES)
