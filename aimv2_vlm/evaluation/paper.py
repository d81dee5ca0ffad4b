"""The paper's tables beside our own scores: which of our numbers may stand in which of its columns, and by how much they differ.

A column is a benchmark by this package's name, so a score of another split or prompt has no place in it. A model whose name is that of a
paper's row, alone or followed by " (…)", is set against it: `name: AIMv2 L (second seed)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from aimv2_vlm.config import ProbeAugmentation
from aimv2_vlm.evaluation.comparison import in_context_averages, without_shots
from aimv2_vlm.evaluation.hub_sets import HUB_SETS

NUMBERS = Path(__file__).with_name("paper.yaml")
IN_CONTEXT = ("aimv2_coco2017_val", "aimv2_nocaps_val", "aimv2_textcaps_val", "aimv2_vqav2_val", "aimv2_textvqa_val", "aimv2_vizwiz_val",
              "aimv2_gqa_val", "aimv2_okvqa_val")  # Table 8


@dataclass(frozen=True)
class Table:
    """One of the paper's. kinds: of the eval configs that its numbers come from; rows: name -> score of each column (None: not printed)."""

    name: str
    title: str
    kinds: tuple[str, ...]
    columns: tuple[str, ...]
    rows: Mapping[str, Sequence[float | None]]
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """Our score, its 95 % interval, and the paper's subtracted from it where a row of that name exists. note: what is unlike the paper."""

    score: float
    interval: tuple[float, float] | None = None
    delta: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Beside:
    """A paper's table cut to the columns that we have measured: its rows, and ours."""

    table: Table
    columns: tuple[str, ...]
    paper: Mapping[str, Sequence[float | None]]
    ours: Mapping[str, Sequence[Cell | None]]


@cache
def tables() -> dict[str, Table]:
    content = yaml.safe_load(NUMBERS.read_text(encoding="utf-8"))
    return {name: Table(name, t["title"], tuple(t["kinds"]), tuple(t["columns"]), t["rows"], t.get("note", "")) for name, t in content.items()}


def beside_the_paper(rows: Iterable[Mapping[str, Any]]) -> list[Beside]:
    """Every table of the paper that shares a column with these ledger rows (those of controls are left out)."""
    measured = [row for row in rows if row.get("control") is None and row.get("score") is not None and row.get("limit") is None and _as_printed(row)]
    found = []
    for table in tables().values():
        scores = _in_context(measured) if table.name == "Table 8" else _by_benchmark(measured, table)
        columns = [i for i, column in enumerate(table.columns) if any(column in cells for cells in scores.values())]
        if not columns:
            continue
        ours = {
            model: [_against(cells.get(table.columns[i]), table.rows.get(_paper_row(table, model) or ""), i) for i in columns]
            for model, cells in scores.items() if any(table.columns[i] in cells for i in columns)
        }
        paper = {name: [values[i] for i in columns] for name, values in table.rows.items()}
        found.append(Beside(table, tuple(table.columns[i] for i in columns), paper, ours))
    return [beside for beside in found if _belongs(beside)]


def _as_printed(row: Mapping[str, Any]) -> bool:
    """Whether a benchmark was asked whole and in its own words: a mirror's part and another prompt keep the benchmark's name."""
    hub_set = HUB_SETS.get(without_shots(row))
    return hub_set is None or (row.get("split", hub_set.split) == hub_set.split and row.get("prompt_suffix", hub_set.suffix) == hub_set.suffix)


def _belongs(beside: Beside) -> bool:
    """Tables 3, B2, 5, 6 and 9 share columns: one is shown where a model bears one of its rows' names. Table 8 is shown always, Table 7 beside any assistant."""
    return beside.table.name in ("Table 7", "Table 8") or any(_paper_row(beside.table, model) for model in beside.ours)


def _by_benchmark(rows: Iterable[Mapping[str, Any]], table: Table) -> dict[str, dict[str, Cell]]:
    scores: dict[str, dict[str, Cell]] = {}
    for row in rows:
        if row["benchmark"] in table.columns and row.get("kind", "benchmarks") in table.kinds:
            scores.setdefault(row["model"], {})[row["benchmark"]] = _cell(row, table)
    return scores


def _cell(row: Mapping[str, Any], table: Table) -> Cell:
    """A score with all that was not done as the paper does it."""
    notes = [] if row.get("complete", True) else [f"{row.get('num_errors', 0)} errors"]
    if row.get("tiling_override"):
        notes.append("not the grid it was tuned with")
    if table.name == "Table 7" and not str(row.get("tiling") or "one view").startswith(("one view", "1x1")):  # the paper's: one view
        notes.append(f"tiled: {row['tiling']}")
    if row.get("source_size"):
        notes.append(f"pictures reduced to {row['source_size']} px")
    if row.get("num_cut"):
        notes.append(f"{row['num_cut']:,} answers cut at {row['max_new_tokens']} tokens")
    if row.get("templates"):
        notes.append(f"templates: {len(row['templates'])}, the paper's are not stated")
    if row.get("augment") not in (None, ProbeAugmentation().policy):
        notes.append(f"augmentation: {row['augment']}")
    if row.get("kind") == "probing" and not row.get("best_on_test"):
        notes.append("chosen on train, the paper's on test")
    score, interval = row["score"], tuple(row["interval"]) if row.get("interval") else None
    if row.get("best_on_test"):  # what the paper prints; the interval belongs to the point that train chose
        score, interval = row["best_on_test"]["score"], None
        notes.append(f"best on test as in the paper; chosen on train {row['score']:.1f}")
    if row.get("differs_from_published"):
        notes.append(f"another split: {row['differs_from_published']}")
    return Cell(score, interval, note="; ".join(notes))


def _in_context(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Cell]]:
    """Mean of the eight benchmarks for each number of shots, where all eight are there and whole."""
    found: dict[str, dict[str, Cell]] = {}
    for one in in_context_averages(rows, IN_CONTEXT):
        found.setdefault(one["model"], {})[str(one["shots"])] = Cell(one["average"])
    return found


def _paper_row(table: Table, model: str) -> str | None:
    return next((name for name in table.rows if model == name or model.startswith(f"{name} (")), None)


def _against(cell: Cell | None, printed: Sequence[float | None] | None, column: int) -> Cell | None:
    if cell is None or printed is None or printed[column] is None:
        return cell
    return replace(cell, delta=cell.score - printed[column])


def markdown(found: Sequence[Beside]) -> str:
    """The tables in Markdown, ours in bold."""
    lines: list[str] = []
    for beside in found:
        lines += [f"### {beside.table.name}: {beside.table.title}", ""]
        lines += ["| | " + " | ".join(beside.columns) + " |", "|---" * (len(beside.columns) + 1) + "|"]
        for name, values in beside.paper.items():
            lines.append(f"| {name}, the paper | " + " | ".join("" if v is None else f"{v:g}" for v in values) + " |")
        for model, cells in beside.ours.items():
            lines.append(f"| **{escape(model)}, ours** | " + " | ".join(map(cell_words, cells)) + " |")
        lines += ["", *([f"The paper's: {beside.table.note}.", ""] if beside.table.note else [])]
    return "\n".join(lines)


def escape(value: Any) -> str:
    """Text from data as it may stand in a cell of a Markdown table."""
    return str(value).encode("utf-8", "replace").decode().replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def cell_words(cell: Cell | None) -> str:
    """`79.2 (78.8 to 79.6), -0.5`."""
    if cell is None:
        return ""
    words = f"{cell.score:.1f}" + ("" if cell.interval is None else f" ({cell.interval[0]:.1f} to {cell.interval[1]:.1f})")
    words += "" if cell.delta is None else f", {cell.delta:+.1f}"
    return words + (f" [{cell.note}]" if cell.note else "")
