"""`report.html`: one file that opens without a network and shows what a chain of runs learned, with its controls.

    write_report("report.html", runs={"pre-training": "runs/l14", "tuning 2x2": "runs/sft"}, eval_dir="runs/eval", title="…")

Reads run directories (`metrics.jsonl`, `recipe.yaml`, `environment.json`, `data_report.json`, `checkpoints/`, `final/`) and
an evaluation directory (`ledger.jsonl`, `samples/*.jsonl`, and the benchmarks' parquet for pictures). Whatever is missing is
named in the report; nothing is guessed. All text that comes from data is escaped; a content security policy in the page
forbids scripts and requests besides.
"""

from __future__ import annotations

import base64
import hashlib
import html
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

from aimv2_vlm.evaluation.charts import NUM_STYLES, Series, axis, legend, line_chart, marker
from aimv2_vlm.evaluation.metrics import bootstrap_interval, paired_difference
from aimv2_vlm.train.directory import write_atomically

STYLE = Path(__file__).with_name("report.css")

# Cap heights in pixels of an encoder that sees the whole picture in one view: below 6 letters melt into each other, from 11 on
# one view reads them. "Small print" and "large print" in the headline mean these.
SMALL_PRINT, LARGE_PRINT = 6.0, 11.0

NUM_RANDOM_SAMPLES, NUM_DIFFERING_SAMPLES = 9, 6
PICTURE_PIXELS = 448  # longer side of an embedded picture
MAX_PICTURE_PIXELS = 64_000_000
MIN_BIN = 5  # questions a point of the print-height curves needs
DRAWS = 1000


# --------------------------------------------------------------------------------------------------------- text into HTML


def text(value: Any) -> str:
    """Any value as harmless HTML text: escaped, control characters and lone surrogates replaced."""
    plain = str(value).encode("utf-8", "replace").decode("utf-8")
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", plain), quote=True)


def quoted(value: Any) -> str:
    """Text from data, isolated so that right-to-left marks in it cannot turn the page's own words around."""
    return f"<bdi>{text(value)}</bdi>"


def points(value: float, sign: bool = False) -> str:
    """A score in points, with a true minus sign."""
    return (f"{value:+.1f}" if sign else f"{value:.1f}").replace("-", "\u2212")


def span(low: float, high: float, sign: bool = False) -> str:
    return f"{points(low, sign)} to {points(high, sign)}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def facts_table(rows: Iterable[tuple[str, Any]]) -> str:
    """Label and value, one pair a line."""
    body = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows)
    return f'<dl class="facts">{body}</dl>'


def missing(reason: str) -> str:
    return f'<p class="missing">Not shown: {text(reason)}.</p>'


# ------------------------------------------------------------------------------------------------------------ what is read


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
        rows = [row for row in self.rows if finite(row.get("samples")) and finite(row.get("samples_per_s")) and row["samples_per_s"] > 0]
        before = [0.0, *(row["samples"] for row in rows)]
        return sum((row["samples"] - b) / row["samples_per_s"] for row, b in zip(rows, before, strict=False)) if rows else None


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
            if not (finite(row.get("score")) and row.get("model") is not None and row.get("benchmark") is not None):
                damaged += 1
                continue
            size = row.get("source_size")
            arm = Arm(str(row["model"]), str(row.get("tiling", "1x1")), int(size) if finite(size) else None)
            self.cells[arm, str(row["benchmark"]), row.get("control") or None] = row
        if damaged:
            self.gaps.append(f"evaluation: {damaged} unreadable line{'s' if damaged > 1 else ''} in ledger.jsonl")

    @cached_property
    def arms(self) -> list[Arm]:
        return list(dict.fromkeys(arm for arm, _, control in self.cells if control is None))

    @cached_property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(benchmark for _, benchmark, control in self.cells if control is None))

    def style(self, arm: Arm) -> int:
        return self.arms.index(arm)

    def samples(self, arm: Arm, benchmark: str, control: str | None = None) -> list[dict[str, Any]]:
        """Answers of one cell, `points` added to each (its score in the ledger's unit); [] when there are none."""
        key = (arm, benchmark, control)
        if key not in self._samples:
            self._samples[key] = self._read_samples(key)
        return self._samples[key]

    def _read_samples(self, key: tuple[Arm, str, str | None]) -> list[dict[str, Any]]:
        row = self.cells.get(key)
        if row is None or self.path is None or not row.get("samples"):
            return []
        where = f"evaluation: {key[0].label}, {key[1]}" + (f", {key[2]}" if key[2] else "")
        try:
            samples, damaged = read_jsonl(self.path / str(row["samples"]))
        except OSError:
            self.gaps.append(f"{where}: no samples file {row['samples']}")
            return []
        scores = [sample["score"] if finite(sample.get("score")) else 0.0 for sample in samples]
        if not scores:
            return []
        mean = sum(scores) / len(scores)
        unit = min((100.0, 1.0), key=lambda u: abs(u * mean - row["score"]))
        if damaged or (row.get("metric") != "cider" and abs(unit * mean - row["score"]) > 0.5):
            self.gaps.append(
                f"{where}: the {len(scores)} samples average to {unit * mean:.1f}, the ledger says {row['score']:.1f}"
            )
        return [sample | {"points": unit * score} for sample, score in zip(samples, scores, strict=True)]

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


def _parquet_rows(folder: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as parquet

    for file in sorted((folder / "data").glob("*.parquet")):
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
    picture.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=88)
    return Picture("data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode(), height, width)


def read_pictures(folder: Path, shown: set[str], sized: set[str]) -> tuple[dict[str, Picture], dict[str, int]]:
    """From a benchmark's parquet: pictures of the question ids in `shown`, longer sides of the picture ids in `sized`."""
    from PIL import Image

    pictures: dict[str, Picture] = {}
    sides: dict[str, int] = {}
    for row in _parquet_rows(folder, ["id", "picture_id", "image"]):
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


# ---------------------------------------------------------------------------------------------------------------- numbers


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


def uses_picture(evaluation: Evaluation, arm: Arm, benchmarks: Sequence[str] | None = None) -> Gain | None:
    """Score − max(blind, wrong picture, most frequent answer), averaged over benchmarks where both controls ran.

    Captions (CIDEr) are left out of the average. The interval draws whole pictures; the most frequent answer's score is
    held fixed. None where no benchmark has both controls.
    """
    wanted = evaluation.benchmarks if benchmarks is None else benchmarks
    usable = [
        b for b in wanted
        if all((arm, b, control) in evaluation.cells for control in (None, "blind", "wrong_picture"))
        and (benchmarks is not None or evaluation.cells[arm, b, None].get("metric") != "cider")
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
    drawn = np.random.default_rng(0).multinomial(len(pictures), np.full(len(pictures), 1 / len(pictures)), size=DRAWS).astype(float)

    def means(rows: list[dict[str, Any]]) -> np.ndarray:
        where = [place[str(row.get("picture_id"))] for row in rows]
        sums = np.bincount(where, [row["points"] for row in rows], len(pictures))
        counts = np.bincount(where, minlength=len(pictures))
        return drawn @ sums / np.maximum(drawn @ counts, 1.0)

    replicates = np.zeros(DRAWS)
    for b in usable:
        controls = [means(samples[b, "blind"]), means(samples[b, "wrong_picture"])]
        majority = control_scores(evaluation, arm, b).get("majority")
        if majority is not None:
            controls.append(np.full(DRAWS, majority))
        replicates += (means(samples[b, None]) - np.max(controls, axis=0)) / len(usable)
    low, high = np.quantile(replicates, [0.025, 0.975])
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
        scale = self.scale(arm, benchmark, sample, max(arm.grid))
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
            interval = bootstrap_interval(scores, pictures, num=DRAWS)
            bins.append(Bin(sum(heights) / len(group), sum(scores) / len(group), interval, len(group)))
    return bins


# --------------------------------------------------------------------------------------------------------------- sections


def section(anchor: str, title: str, how: str, body: str) -> str:
    return f'<section id="{anchor}"><h2>{text(title)}</h2><p class="how">{how}</p>{body}</section>'


def card(value: str, name: str, detail: str) -> str:
    return f'<div class="card"><p class="big">{text(value)}</p><h3>{text(name)}</h3><p>{text(detail)}</p></div>'


def _gain_words(gain: Gain) -> str:
    if gain.interval is None:
        return f"{gain.num_questions} questions; no interval, the samples are incomplete"
    low, high = gain.interval
    sure = "the interval excludes 0" if low > 0 or high < 0 else "the interval includes 0: no difference shown"
    return f"95\u00a0% interval {span(low, high, True)} on {gain.num_questions:,} questions; {sure}"


def headline(runs: Sequence[Run], evaluation: Evaluation, heights: PrintHeights) -> str:
    cards = []
    gains = [(arm, uses_picture(evaluation, arm)) for arm in evaluation.arms if arm.source_size is None]
    known = sorted(((arm, gain) for arm, gain in gains if gain), key=lambda pair: -pair[1].value)
    if known:
        arm, best = known[0]
        rest = "".join(f" {a.label}: {points(g.value, True)}." for a, g in known[1:4])
        cards.append(card(f"{points(best.value, True)} points", "It uses the picture", f"{arm.label}: score above the best of blind, wrong picture "
                          f"and most frequent answer; {_gain_words(best)}.{rest}"))  # fmt: skip
    for real, upsampled in resolution_pairs(evaluation)[:2]:
        for name, low, high in (("small", 0.0, SMALL_PRINT), ("large", LARGE_PRINT, math.inf)):
            gain = resolution_gain(heights, real, upsampled, low, high)
            if gain:
                limit = f"under {SMALL_PRINT:g}" if name == "small" else f"from {LARGE_PRINT:g}"
                cards.append(card(f"{points(gain.value, True)} points", f"Resolution on {name} print", f"Real {real.tiling} tiles minus the same tiles cut "
                                  f"from reduced pictures, cap height {limit} px in one view; {_gain_words(gain)}."))  # fmt: skip
    for run in runs:
        pixel, color, curve = run.last("val_pixel_loss"), run.last("val_mean_color_loss"), run.curve("val_text_loss")
        if pixel is not None and color:
            cards.append(card(f"{pixel:.3f}", f"Held-out pixel loss, {run.name}", f"Painting every next patch in its true mean colour would give {color:.3f}; "
                              f"{'the prediction explains' if pixel < color else 'the prediction is worse by'} {100 * abs(1 - pixel / color):.0f} % of that."))  # fmt: skip
        if curve:
            cards.append(card(f"{curve[-1][1]:.2f} nats", f"Held-out text loss, {run.name}", f"Per caption token; {curve[0][1]:.2f} at step {curve[0][0]:,.0f}. "
                              f"A guess among {math.exp(curve[-1][1]):.1f} equally likely tokens would score the same."))  # fmt: skip
    body = f'<div class="cards">{"".join(cards)}</div>' if cards else missing("neither held-out losses nor controls were found")
    how = (
        "Differences are in points of a hundred; an interval that includes 0 shows nothing. “Uses the picture” is what is "
        "left of the score after taking away the best that can be had without looking."
    )
    return section("headline", "What came out", how, body)


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


def loss_panel(run: Run, key: str, title: str, unit: str) -> str:
    train, held_out = run.curve(key), run.curve(f"val_{key}")
    if not train and not held_out:
        return ""
    lines = []
    if train:
        lines += [Series("training, each log line", thin(train), 0, faint=True), Series("training, smoothed", thin(smooth(train)), 0)]
    if held_out:
        lines.append(Series("held-out", held_out, 1, markers=len(held_out) <= 40))
    if key == "pixel_loss":
        baseline = run.curve("val_mean_color_loss") or run.curve("mean_color_loss")
        if baseline:
            lines.append(Series("mean colour of the patch", thin(baseline), 5, dashed=True))
    values = [y for line in lines for _, y in line.points]
    steps = [x for line in lines for x, _ in line.points]
    last = held_out[-1][1] if held_out else smooth(train)[-1][1]
    description = f"{title} of {run.name} over steps {min(steps):g} to {max(steps):g}, last {'held-out' if held_out else 'smoothed'} value {last:.3f}"
    chart = line_chart(lines, axis("step", steps, log=False, low=0, high=max(steps)), axis(unit, values), description)
    return f"<figure><figcaption><b>{text(run.name)}</b> {text(title)}</figcaption>{chart}{legend(lines)}</figure>"


def losses_section(runs: Sequence[Run]) -> str:
    figures = []
    for run in runs:
        both = run.curve("pixel_loss") or run.curve("text_loss")
        kinds = (("pixel_loss", "pixel loss", "loss per pixel value"), ("text_loss", "text loss", "nats per token"))
        figures += [loss_panel(run, *kind) for kind in kinds] if both else [loss_panel(run, "loss", "loss", "nats per answer token")]
    gaps = "".join(missing(f"the curves of {run.name} ({run.path / 'metrics.jsonl'} has no losses)") for run in runs if not run.curve("loss"))
    how = (
        "Lower is better; the axis is logarithmic where a curve spans more than a factor of four, and held-out points come from "
        "pictures no step has seen. The dashed line is the pixel loss of painting each patch in its own mean colour: only what "
        "lies below it is structure that was predicted."
    )
    return section("losses", "Loss curves", how, (f'<div class="figures">{"".join(figures)}</div>' if any(figures) else "") + gaps or missing("no runs were given"))


def _strip(row: Mapping[str, Any], controls: Mapping[str, float], style: int, top: float) -> str:
    """From 0 to `top`: a grey bar up to the best control, the score with its interval."""

    def place(value: float) -> float:
        return 6 + 148 * min(1.0, max(0.0, value / top))

    parts = ['<svg class="strip" viewBox="0 0 160 20" aria-hidden="true"><path class="axis" d="M6,10H154"/>']
    if controls:
        parts.append(f'<path class="controls" d="M6,10H{place(max(controls.values())):.1f}"/>')
    if _is_interval(row.get("interval")):
        low, high = map(place, row["interval"])
        parts.append(f'<path class="bar s{style % NUM_STYLES}" d="M{low:.1f},10H{high:.1f}"/>')
    return "".join(parts) + marker(style, place(row["score"]), 10) + "</svg>"


def _is_interval(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(finite(v) for v in value)


def results_table(evaluation: Evaluation) -> str:
    head = (
        "<thead><tr><th scope=col>model</th><th scope=col class=wide>at a glance</th><th scope=col>score</th><th scope=col>95\u00a0% interval</th>"
        "<th scope=col>blind</th><th scope=col>wrong picture</th><th scope=col>most frequent</th><th scope=col>uses the picture</th>"
        "<th scope=col>tokens a picture</th></tr></thead>"
    )
    bodies = []
    for benchmark in evaluation.benchmarks:
        arms = [arm for arm in evaluation.arms if (arm, benchmark, None) in evaluation.cells]
        rows = [evaluation.cells[arm, benchmark, None] for arm in arms]
        tops = [max([row["score"], *(row["interval"] if _is_interval(row.get("interval")) else [])]) for row in rows]
        top = 100.0 if rows[0].get("metric") != "cider" else max(100.0, *tops)
        first = rows[0]
        about = [first.get("metric", "metric unknown"), f"split {first['split']}" if first.get("split") else "split unknown"]
        if finite(first.get("num_questions")):
            about.append(f"{first['num_questions']:,} questions on {first.get('num_pictures', 0):,} pictures")
        errors = sum(row.get("num_errors") or 0 for row in rows)
        about.append(f"{errors} error{'s' if errors != 1 else ''}")
        body = [f'<tr class="group"><th scope=rowgroup colspan=9>{quoted(benchmark)} <span>{text(", ".join(map(str, about)))}</span></th></tr>']
        for arm, row in zip(arms, rows, strict=True):
            controls = control_scores(evaluation, arm, benchmark)
            gain = uses_picture(evaluation, arm, [benchmark])
            interval = span(*row["interval"]) if _is_interval(row.get("interval")) else "–"
            used = "–"
            if gain is not None:
                low, high = gain.interval or (-math.inf, math.inf)
                used = f'<span class="{"good" if low > 0 else "bad" if high < 0 else ""}">{points(gain.value, True)}</span>'
            cells = [
                ("score", f"<b>{points(row['score'])}</b>"),
                ("95\u00a0% interval", interval),
                *((name, points(controls[key]) if key in controls else "–") for key, name in
                  (("blind", "blind"), ("wrong_picture", "wrong picture"), ("majority", "most frequent"))),
                ("uses the picture", used),
                ("tokens a picture", text(row.get("tokens_per_picture", "–"))),
            ]  # fmt: skip
            key = f'<svg class="key" viewBox="-6 -6 12 12" aria-hidden="true">{marker(evaluation.style(arm))}</svg>'
            body.append(
                f'<tr><th scope=row>{key}{quoted(arm.label)}</th><td class="wide">{_strip(row, controls, evaluation.style(arm), top)}</td>'
                + "".join(f'<td data-label="{name}">{value}</td>' for name, value in cells) + "</tr>"
            )
        bodies.append(f"<tbody>{''.join(body)}</tbody>")
    return f'<table class="results">{head}{"".join(bodies)}</table>'


def attributes_table(evaluation: Evaluation) -> str:
    """Accuracy by what was asked; captions and questions without a named attribute are left out."""
    found: dict[str, dict[Arm, list[float]]] = defaultdict(lambda: defaultdict(list))
    for arm in evaluation.arms:
        for benchmark in evaluation.benchmarks:
            if evaluation.cells.get((arm, benchmark, None), {}).get("metric") != "cider":
                for sample in evaluation.samples(arm, benchmark):
                    if sample.get("attribute"):
                        found[str(sample["attribute"])][arm].append(sample["points"])
    if not found:
        return ""
    head = "".join(f"<th scope=col>{quoted(arm.label)}</th>" for arm in evaluation.arms)
    body = []
    for attribute, scores in sorted(found.items()):
        cells = "".join(
            f'<td style="--share:{sum(scores[arm]) / len(scores[arm]):.0f}%">{points(sum(scores[arm]) / len(scores[arm]))}</td>' if scores.get(arm) else "<td>–</td>"
            for arm in evaluation.arms
        )
        body.append(f"<tr><th scope=row>{quoted(attribute)}</th>{cells}<td class=num>{max(map(len, scores.values())):,}</td></tr>")
    table = f"<table class=heat><thead><tr><th scope=col>asked about</th>{head}<th scope=col>questions</th></tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<h3>By what was asked</h3><div class="scroll" tabindex="0" role="region" aria-label="accuracy by what was asked">{table}</div>'


def results_section(evaluation: Evaluation) -> str:
    how = (
        "Blind = the same questions without a picture, wrong picture = with another row's picture whose answer differs, most frequent = the commonest "
        "training answer to that question. At a glance: the grey bar ends at the best of these three, the mark is the score with its 95\u00a0% interval "
        "(pictures drawn with replacement), and only the distance between the two was learned from the picture."
    )
    body = results_table(evaluation) + attributes_table(evaluation) if evaluation.arms else missing(evaluation.gaps[0] if evaluation.gaps else "the ledger is empty")
    return section("results", "Scores with controls", how, body)


def print_section(evaluation: Evaluation, heights: PrintHeights) -> str:
    charts: list[tuple[str, str, list[Series], list[tuple[Arm, list[Bin]]]]] = []
    for kind, label in (("source", "cap height in the source picture, pixels"), ("encoder", "cap height as the encoder sees it, pixels")):
        lines, table = [], []
        for arm in evaluation.arms:
            found = []
            for benchmark, sample in evaluation.print_samples(arm):
                height = sample["print_height"] if kind == "source" else heights.encoder(arm, benchmark, sample)
                if height is not None:
                    found.append((height, sample["points"], f"{benchmark} {sample.get('picture_id')}"))
            bins = height_bins(found)
            if bins:
                notes = [f"{arm.label}: {b.score:.1f} ({b.interval[0]:.1f} to {b.interval[1]:.1f}) at {b.height:.1f} px, {b.num} questions" for b in bins]
                lines.append(Series(arm.label, [(b.height, b.score) for b in bins], evaluation.style(arm), dashed=arm.source_size is not None,
                                    markers=True, bars=[(b.height, *b.interval) for b in bins], notes=notes))  # fmt: skip
                table.append((arm, bins))
        charts.append((kind, label, lines, table))
    how = (
        "Each point gathers questions about print of similar height (steps of a factor 1.41), with a 95\u00a0% interval over pictures. If tiles help by resolution alone, "
        "then the curves of the second chart lie on each other and large print does not change."
    )
    if not charts[0][2]:
        has_print = any(evaluation.print_samples(arm) for arm in evaluation.arms)
        few = f"no step of print heights has {MIN_BIN} questions"
        reason = few if has_print else "no question comes with a print height" if evaluation.arms else "there is no evaluation"
        return section("print", "Accuracy against print height", how, missing(reason))
    figures, tables = [], []
    for kind, label, lines, table in charts:
        if not lines:
            figures.append(missing("heights in encoder pixels (they need the checkpoint's config.json and the benchmark's parquet)"))
            continue
        values = [x for line in lines for x, _ in line.points]
        description = f"Accuracy against {label}, " + "; ".join(f"{line.name} from {line.points[0][1]:.0f} to {line.points[-1][1]:.0f}" for line in lines)
        title = "in source pixels" if kind == "source" else "in encoder pixels"
        chart = line_chart(lines, axis(label, values, log=True), axis("accuracy, points", [], log=False, low=0, high=100), description)
        figures.append(f"<figure><figcaption><b>Print height</b> {title}</figcaption>{chart}{legend(lines)}</figure>")
        rows = "".join(
            f"<tr><th scope=row>{quoted(arm.label)}</th><td>{b.height:.1f}</td><td>{points(b.score)}</td><td>{span(*b.interval)}</td><td>{b.num}</td></tr>"
            for arm, bins in table for b in bins
        )  # fmt: skip
        columns = "".join(f"<th scope=col>{name}</th>" for name in ("model", "mean height, px", "accuracy", "95\u00a0% interval", "questions"))
        tables.append(f'<h4>{title[0].upper() + title[1:]}</h4><div class="scroll" tabindex="0" role="region" aria-label="{title}"><table class="plain"><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div>')
    body = f'<div class="figures">{"".join(figures)}</div><details><summary>The numbers behind the charts</summary>{"".join(tables)}</details>'
    if any(arm.source_size is not None for arm in evaluation.arms):
        body += '<p class="note">An upsampled arm is drawn at the pixels it was reduced to: that is all its tiles can know.</p>'
    return section("print", "Accuracy against print height", how, body)


# ---------------------------------------------------------------------------------------------------------------- samples


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
    differing = [key for key, scores in answers.items() if len(scores) > 1 and max(scores.values()) - min(scores.values()) >= 50]
    return drawn, draw(differing, NUM_DIFFERING_SAMPLES)


def picture_with_tiles(picture: Picture, grid: tuple[int, int], alt: str) -> str:
    """The picture inside its padded square, with the borders of the tiles over it."""
    side = max(picture.height, picture.width)
    rows, columns = grid
    lines = "".join(f"M{side * i / columns:.1f},0V{side}" for i in range(1, columns)) + "".join(f"M0,{side * i / rows:.1f}H{side}" for i in range(1, rows))
    frame = f"M0,0H{side}V{side}H0Z"
    padding = ""
    if picture.height != picture.width:
        top, left = (side - picture.height) / 2, (side - picture.width) / 2
        padding = f'<path class="pad" d="M{left:.1f},{top:.1f}h{picture.width}v{picture.height}h-{picture.width}Z"/>'
    overlay = f'<path class="halo" d="{frame}{lines}"/><path class="tile" d="{lines or frame}"/>'
    return (
        f'<div class="picture"><img src="{picture.data_uri}" alt="{text(alt)}" width="{picture.width}" height="{picture.height}">'
        f'<svg viewBox="0 0 {side} {side}" aria-hidden="true">{padding}{overlay}</svg></div>'
    )


def sample_card(evaluation: Evaluation, heights: PrintHeights, benchmark: str, key: str, picture: Picture | None) -> str:
    found = {arm: next((s for s in evaluation.samples(arm, benchmark) if str(s.get("id")) == key), None) for arm in evaluation.arms}
    answered = {arm: sample for arm, sample in found.items() if sample is not None}
    arm, first = next(iter(answered.items()))
    grid = max((a.grid for a in answered), key=math.prod)
    alt = f"Picture {first.get('picture_id')} of {benchmark}, divided into {grid[0]} by {grid[1]} tiles"
    shown = picture_with_tiles(picture, grid, alt) if picture else missing("the picture could not be read from the benchmark's parquet")
    answers = [str(a) for a in first.get("answers") or []]
    truth = ", ".join(quoted(a) for a in answers[:3]) + (f" and {len(answers) - 3} more" if len(answers) > 3 else "") or "–"
    about = [benchmark, str(first.get("attribute") or "")]
    if finite(first.get("print_height")):
        view = heights.one_view(arm, benchmark, first)
        about.append(f"print {first['print_height']:g} px high" + (f" ({view:.1f} in one view)" if view else ""))
    lines = []
    for arm, sample in answered.items():
        mark = marker(evaluation.style(arm))
        name = f'<svg class="key" viewBox="-6 -6 12 12" aria-hidden="true">{mark}</svg>{quoted(arm.label)}'
        if sample.get("error"):
            lines.append(f'<li class="wrong"><span>{name}</span><b>error: {quoted(sample["error"])}</b></li>')
            continue
        is_caption = evaluation.cells[arm, benchmark, None].get("metric") == "cider"
        right = sample["points"] >= 50
        verdict = f"CIDEr {sample['points']:.0f}" if is_caption else ("right" if right else "wrong")
        if not is_caption and 0 < sample["points"] < 100:
            verdict += f", {sample['points']:.0f} of 100"
        look = "" if is_caption else ("right" if right else "wrong")
        prediction = quoted(sample.get("prediction")) if str(sample.get("prediction") or "").strip() else "<i>empty answer</i>"
        lines.append(f'<li class="{look}"><span>{name}</span><b>{prediction}</b> <em>{text(verdict)}</em></li>')
    return (
        f'<article class="sample">{shown}<p class="about">{text(" · ".join(a for a in about if a))}</p>'
        f'<h4>{quoted(first.get("question", ""))}</h4><p class="truth">truth <b>{truth}</b></p><ul>{"".join(lines)}</ul></article>'
    )


def samples_section(evaluation: Evaluation, heights: PrintHeights, chosen: tuple[list, list], pictures: Mapping[tuple[str, str], Picture]) -> str:
    how = (
        "Pictures stand in their padded square, lines are the borders of the tiles (one view sees the whole square at the size of a single tile). "
        "The first group was drawn by a hash of the question's name, not by how it came out; the second only shows where models differ."
    )
    body = ""
    for title, keys in (("Drawn blindly", chosen[0]), ("Where the models differ", chosen[1])):
        if keys:
            cards = "".join(sample_card(evaluation, heights, b, key, pictures.get((b, key))) for b, key in keys)
            body += f'<h3>{title}</h3><div class="samples">{cards}</div>'
    return section("samples", "Pictures, questions, answers", how, body or missing("there are no answers to show"))


# ------------------------------------------------------------------------------------------------------------------ facts


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def run_facts(run: Run) -> str:
    if not run.path.is_dir():
        return f"<h3>{text(run.name)}</h3>{missing(run.gaps[0])}"
    environment, report = run.environment, run.data_report
    rows: list[tuple[str, Any]] = [("directory", run.path)]
    if run.recipe:
        rows.append(("recipe digest (SHA-256)", hashlib.sha256(run.recipe.encode("utf-8", "replace")).hexdigest()[:16]))
    for key in ("seed", "world", "git_commit", "processor", "machine", "cores"):
        if environment.get(key) is not None:
            rows.append((key.replace("_", " "), environment[key]))
    for key, name in (("step", "steps"), ("samples", "samples"), ("tokens", "tokens"), ("bad_samples", "bad samples")):
        value = run.last(key)
        if value is not None:
            rows.append((name, f"{value:,.0f}"))
    if run.train_seconds is not None:
        rows.append(("time in the loop", duration(run.train_seconds)))
    rates = sorted(rate for _, rate in run.curve("samples_per_s"))
    if rates:
        rows.append(("samples per second, median", f"{rates[len(rates) // 2]:,.1f}"))
    waits = [wait for _, wait in run.curve("data_wait")]
    if waits:
        rows.append(("waiting for data", f"{100 * sum(waits) / len(waits):.1f} % of the time"))
    rows += [(f"data: {key.replace('_', ' ')}", value) for key, value in report.items() if isinstance(value, (str, int, float)) and value != ""]
    checkpoints = sorted((run.path / "checkpoints").glob("step_*"))
    if checkpoints:
        rows.append(("checkpoints", ", ".join(path.name for path in checkpoints)))
    if (run.path / "final").is_dir():
        rows.append(("final/", f"{_size(run.path / 'final') / 1e6:,.1f} MB"))
    versions = environment.get("versions")
    if isinstance(versions, dict):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    recipe = f"<details><summary>recipe.yaml as it ran</summary><pre>{text(run.recipe)}</pre></details>" if run.recipe else ""
    return f"<h3>{text(run.name)}</h3>{facts_table(rows)}{recipe}"


def evaluation_facts(evaluation: Evaluation) -> str:
    if not evaluation.cells:
        return ""
    rows: list[tuple[str, Any]] = [("directory", evaluation.path)]
    seconds = [row["seconds"] for row in evaluation.cells.values() if finite(row.get("seconds"))]
    rows.append(("cells of the ledger", len(evaluation.cells)))
    if seconds:
        rows.append(("time", duration(sum(seconds))))
    rows.append(("errors", sum(row.get("num_errors") or 0 for row in evaluation.cells.values())))
    for arm in evaluation.arms:
        rows.append((arm.label, evaluation.any_cell(arm).get("model_path", "path unknown")))
    for benchmark in evaluation.benchmarks:
        row = next(row for (_, b, _), row in evaluation.cells.items() if b == benchmark)
        rows.append((benchmark, f"prompt “{row.get('prompt', 'unknown')}”, data {str(row.get('data_hash', 'unknown'))[:16]}"))
    versions = next((row["versions"] for row in evaluation.cells.values() if isinstance(row.get("versions"), dict)), None)
    if versions:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return f"<h3>evaluation</h3>{facts_table(rows)}"


def facts_section(runs: Sequence[Run], evaluation: Evaluation, extra: Mapping[str, Any]) -> str:
    how = (
        "Everything needed to run it again: recipes as they were resolved, versions, seeds, machines. "
        "Two runs with the same recipe digest, data and seed compute the same numbers on the same machine."
    )
    body = facts_table(extra.items()) if extra else ""
    body += "".join(run_facts(run) for run in runs) + evaluation_facts(evaluation)
    return section("facts", "Run facts", how, body or missing("no runs and no evaluation were given"))


def gaps_section(gaps: Sequence[str]) -> str:
    if not gaps:
        return ""
    return f'<section id="gaps"><h2>What is missing</h2><ul class="gaps">{"".join(f"<li>{text(gap)}</li>" for gap in gaps)}</ul></section>'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p class="sub">{subtitle}</p>
<nav aria-label="sections"><a href="#headline">What came out</a><a href="#losses">Losses</a><a href="#results">Scores</a><a href="#print">Print height</a><a href="#samples">Pictures</a><a href="#facts">Facts</a></nav></header>
<main>
{body}
</main>
</body>
</html>
"""


def write_report(
    out_html: str | Path,
    *,
    runs: Mapping[str, str | Path],
    eval_dir: str | Path | None,
    title: str,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of training `runs` (name -> run directory) and one evaluation directory to `out_html`.

    `extra` adds lines to the run facts (label -> value). Missing directories, files and damaged lines are named in the
    report and stop nothing. The file appears only when it is whole; OSError when it cannot be written.
    """
    read = [Run.read(name, Path(path)) for name, path in runs.items()]
    evaluation = Evaluation(None if eval_dir is None else Path(eval_dir))
    chosen = choose_samples(evaluation)
    pictures: dict[tuple[str, str], Picture] = {}
    sides: dict[tuple[str, str], int] = {}
    for benchmark in evaluation.benchmarks:
        row = next(row for (_, b, _), row in evaluation.cells.items() if b == benchmark)
        shown = {key for b, key in (*chosen[0], *chosen[1]) if b == benchmark}
        sized = {str(s.get("picture_id")) for arm in evaluation.arms for b, s in evaluation.print_samples(arm) if b == benchmark}
        if not shown and not sized:
            continue
        found, lengths = read_pictures(Path(str(row.get("data", ""))), shown, sized)
        pictures |= {(benchmark, key): picture for key, picture in found.items()}
        sides |= {(benchmark, key): side for key, side in lengths.items()}
        if len(found) < len(shown):
            evaluation.gaps.append(f"evaluation: {benchmark}: {len(shown) - len(found)} of {len(shown)} pictures could not be read")
    heights = PrintHeights(evaluation, sides)
    sections = [
        headline(read, evaluation, heights),
        losses_section(read),
        results_section(evaluation),
        print_section(evaluation, heights),
        samples_section(evaluation, heights, chosen, pictures),
        facts_section(read, evaluation, extra or {}),
    ]
    gaps = list(dict.fromkeys([gap for run in read for gap in run.gaps] + evaluation.gaps))
    sections.insert(1, gaps_section(gaps))
    counts = [f"{len(read)} run{'s' if len(read) != 1 else ''}", f"{len(evaluation.arms)} models", f"{len(evaluation.benchmarks)} benchmarks"]
    page = PAGE.format(title=text(title), style=STYLE.read_text(encoding="utf-8"), subtitle=text(", ".join(counts)), body="\n".join(sections))
    out = Path(out_html)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    return out
