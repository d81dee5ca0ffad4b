"""What a finished sweep says beyond single scores: models against each other, and the questions that need the picture.

Both are computed from the ledger and its samples alone and stand in `comparisons.json`:

- `paired`: for every benchmark (each number of shots is one) the difference of two models over the questions that both answered, with
  its 95 % interval, pictures as clusters. `told_apart` is true where the interval excludes 0; a ranking is worth printing only there.
- `needs_picture`: questions that no model of the ledger answers right blind and that the most frequent training answer misses (right:
  a score of at least 0.5), with each model's score on them. All models share one subset. Captions have none: all of them need it.
- `in_context`: averages as in Table 8, for each model and number of shots over the benchmarks that have every number of shots whole;
  with the controls of the shots. It mixes accuracies and CIDEr, as the table does.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from aimv2_vlm.evaluation.metrics import SINGLE_METRICS, paired_scores, score_interval
from aimv2_vlm.evaluation.sweep import read_ledger
from aimv2_vlm.train.directory import write_atomically

RIGHT = 0.5


def write_comparisons(out: str | Path) -> Path:
    """Writes `comparisons.json` beside the ledger of `out`."""
    path = Path(out) / "comparisons.json"
    write_atomically(path, json.dumps(compare(out), indent=1, ensure_ascii=False) + "\n")
    return path


def compare(out: str | Path) -> dict[str, list[dict[str, Any]]]:
    """`paired`, `needs_picture` and `in_context` of the ledger in `out`, in the order of the ledger."""
    out = Path(out)
    rows = [row for row in read_ledger(out / "ledger.jsonl") if row["score"] is not None and row.get("kind", "benchmarks") == "benchmarks"]
    cells = [_Cell(out, row) for row in rows]
    asked: dict[tuple, list[_Cell]] = {}  # the same questions of the same data under the same shots
    for cell in cells:
        if cell.row["control"] is None:
            asked.setdefault(cell.questions, []).append(cell)
    paired = [
        found
        for group in asked.values()
        for first, second in itertools.combinations(group, 2)
        if (found := _paired(first, second)) is not None
    ]
    needs_picture = [row for group in asked.values() for row in _needs_picture(group, cells)]
    return {"paired": paired, "needs_picture": needs_picture, "in_context": in_context_averages(rows)}


class _Cell:
    def __init__(self, out: Path, row: dict[str, Any]) -> None:
        self.row, self._file = row, out / row["samples"]

    @property
    def questions(self) -> tuple:
        return self.row["benchmark"], self.row["data_hash"], self.row["split"], self.row["limit"]

    @property
    def base(self) -> tuple[str, Any]:
        """Name without shots, and how many questions were asked."""
        return without_shots(self.row), self.row["limit"]

    @cached_property
    def samples(self) -> dict[str, dict[str, Any]]:
        """Scored samples by question id; none where the file is gone."""
        if not self._file.is_file():
            return {}
        rows = [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]
        return {row["id"]: row for row in rows if row["score"] is not None}


def without_shots(row: Mapping[str, Any]) -> str:
    """The benchmark of a ledger row, whatever the number of shots."""
    shots = row.get("shots") or 0
    return row["benchmark"].removesuffix(f"_{shots}shot") if shots else row["benchmark"]


def in_context_averages(rows: Iterable[Mapping[str, Any]], benchmarks: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Mean scores over `benchmarks` (None: those that a model has with every number of shots) for each model that was asked with
    shots, number of shots and control of these. A cell with errors does not count."""
    table: dict[tuple[str, int, str | None], dict[str, float]] = {}
    for row in rows:
        if row["control"] not in ("blind", "wrong_picture") and row.get("complete", True):
            table.setdefault((row["model"], row.get("shots") or 0, row["control"]), {})[without_shots(row)] = row["score"]
    found = []
    for (model, shots, control), scores in table.items():
        plain = [set(other) for (name, _, arm), other in table.items() if name == model and arm is None]
        with_shots = any(number for name, number, _ in table if name == model)
        names = sorted(benchmarks or set.intersection(*plain)) if with_shots and plain else []
        if names and set(names) <= set(scores):
            average = sum(scores[name] for name in names) / len(names)
            found.append({"model": model, "shots": shots, "control": control, "average": round(average, 4), "benchmarks": names})
    return found


def _paired(first: _Cell, second: _Cell) -> dict[str, Any] | None:
    one, other = first.samples, second.samples
    both = [number for number in one if number in other]
    if len({one[number]["picture_id"] for number in both}) < 2:
        return None
    scores = [[samples[number]["score"] for number in both] for samples in (one, other)]
    difference, low, high, p = paired_scores(first.row["metric"], *scores, [one[number] for number in both])
    return {
        "benchmark": first.row["benchmark"], "split": first.row["split"], "metric": first.row["metric"],
        "first": first.row["model"], "second": second.row["model"], "num_questions": len(both),
        "difference": round(difference, 4), "interval": [round(low, 4), round(high, 4)],
        "p": None if p is None else round(p, 6), "told_apart": bool(low > 0 or high < 0),
    }  # fmt: skip


def _needs_picture(group: list[_Cell], cells: Iterable[_Cell]) -> Iterable[dict[str, Any]]:
    metric = group[0].row["metric"]
    if metric not in SINGLE_METRICS:
        return
    blind = [cell.samples for cell in cells if cell.base == group[0].base and cell.row["control"] == "blind"]
    for cell in group:
        samples = cell.samples
        if not blind and all(sample["majority"] is None for sample in samples.values()):
            continue
        need = [
            sample
            for number, sample in samples.items()
            if not any(number in answers and answers[number]["score"] >= RIGHT for answers in blind)
            and (sample["majority"] is None or SINGLE_METRICS[metric](sample["majority"], sample) < RIGHT)
        ]
        if not need:
            continue
        scores = [sample["score"] for sample in need]
        low, high = score_interval("mean", scores, need)
        yield {
            "benchmark": cell.row["benchmark"], "split": cell.row["split"], "metric": metric, "model": cell.row["model"],
            "num_questions": len(need), "num_asked": len(samples), "score": round(100.0 * sum(scores) / len(scores), 4),
            "interval": [round(low, 4), round(high, 4)],
        }  # fmt: skip
