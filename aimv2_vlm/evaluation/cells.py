"""Models x data sets without answers in words (probes, zero-shot): cells, one ledger row each, gone on with where they were stopped."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimv2_vlm.config import UserError
from aimv2_vlm.evaluation.sweep import announce_superseded, digest_checkpoint, failure, forget, is_missing, names_of, read_ledger, superseded, write_rows
from aimv2_vlm.train.directory import acquire_lock, versions
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.loop import Stopped
from aimv2_vlm.train.metrics import say


@dataclass(frozen=True, eq=False)
class Cell:
    """One line of the ledger: `model` on `benchmark`. `depends`: all that its numbers depend on and that is known before it runs, or
    the UserError that says why it is not known."""

    model: str
    benchmark: str
    depends: Any

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([self.model, self.benchmark, self.depends], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder(self) -> str:
        """A name for what the cell keeps beside its row."""
        return "".join(c if c.isalnum() or c in "-." else "_" for c in f"{self.model}__{self.benchmark}") + f"__{self.key[:8]}"


def checkpoint_content(path: str) -> str:
    """`digest_checkpoint` of what is there. Raises UserError where nothing is."""
    if is_missing(path):
        raise UserError(f"{path}: no such file or folder")
    return digest_checkpoint(path)


def known_before(*reads: Callable[[], str]) -> list[str] | UserError:
    """What the calls return (the hash of a checkpoint, of a data set), or why one returns nothing."""
    try:
        return [read() for read in reads]
    except UserError as error:
        return error


def check_names(models: Sequence[Any], data_sets: Sequence[Any], out: str | None) -> tuple[list[str], list[str]]:
    """(names of models, names of data sets) as `names_of` gives them. Raises UserError where the config names none."""
    for key, entries in (("models", models), ("data_sets", data_sets), ("out", out)):
        if not entries:
            raise UserError(f"{key}: empty; an evaluation needs models, data_sets and where to write")
    return names_of("models", models), names_of("data_sets", data_sets)


def run_cells(
    out: str, cells: Sequence[Cell], run: Callable[[Cell], dict[str, Any]], placement: Placement, kind: str, restart: bool = False
) -> int:
    """Run every cell that `<out>/ledger.jsonl` does not hold; `run` returns a row's own columns (score and interval in points).

    Rows of these cells from other checkpoints, data or settings stand until their successors are finished. What fails stands in `failed.jsonl` and is tried again
    by the same command; a model or data set that is not there fails, and its rows stay. A collective call: all processes run each
    cell, the main one writes, `report.html` and `report.md` too. Returns 0 when every cell is finished and complete.
    """
    from aimv2_vlm.evaluation.report import write_report

    folder = Path(out)
    ledger, failures, unknown = folder / "ledger.jsonl", [], [cell for cell in cells if isinstance(cell.depends, UserError)]
    cells = [cell for cell in cells if cell not in unknown]
    order = {cell.key: number for number, cell in enumerate(cells)}
    lock, done = None, []
    try:
        if placement.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            lock = acquire_lock(folder)
            if restart:
                forget(folder)
            done = read_ledger(ledger, repair=True)
            if old := superseded(done, {(cell.model, cell.benchmark): {cell.key} for cell in cells}, kind, ledger):
                say(announce_superseded(old))
        for cell in unknown:
            failures.append(_failed(cell, cell.depends, placement))
        finished = set(placement.gather_strings([row["key"] for row in done]))
        if placement.is_main:
            say(f"evaluation: {len(cells) + len(unknown)} cells, {sum(c.key in finished for c in cells)} finished before")
        for cell in [cell for cell in cells if cell.key not in finished]:
            started = time.monotonic()
            try:
                columns = run(cell)
            except Stopped:
                raise
            except Exception as error:  # a cell must not end the others; its reason is kept
                failures.append(_failed(cell, error, placement))
                continue
            if placement.is_main:
                old = superseded(done, {(cell.model, cell.benchmark): {cell.key}}, kind, ledger)
                done = [row for row in done if row not in old and row["key"] != cell.key]
                done.append({"key": cell.key, "model": cell.model, "benchmark": cell.benchmark, "kind": kind, "control": None} | columns
                            | {"versions": versions(), "seconds": (seconds := round(time.monotonic() - started, 1))})
                done.sort(key=lambda row: order.get(row["key"], -1))  # stable: rows of other configs stay in front
                write_rows(ledger, done)
                low, high = columns["interval"]
                say(f"{cell.model} / {cell.benchmark}: {columns['metric']} {columns['score']:.1f} [{low:.1f}, {high:.1f}] on "
                    f"{columns['num_questions']:,} of {columns['split']}, {seconds} s")
        incomplete = [row for row in done if row["key"] in order and not row["complete"]]
        if placement.is_main:
            write_rows(folder / "failed.jsonl", failures)
            for row in incomplete:
                say(f"incomplete: {row['model']} / {row['benchmark']}: {row['num_errors']} pictures cannot be decoded; with other data in their place "
                    "the cell runs again")
            say(f"evaluation: {len(failures)} cells failed, see {folder / 'failed.jsonl'}; the same command tries them again" if failures
                else f"evaluation: finished, {len(cells)} cells in {ledger}")
            say(f"report: {write_report(folder / 'report.html', runs={}, eval_dir=folder, title=folder.name)}")
        num_incomplete = len(placement.gather_strings([row["key"] for row in incomplete]))
    finally:
        if lock is not None:
            lock.close()
    return int(bool(failures or num_incomplete))


def _failed(cell: Cell, error: Exception, placement: Placement) -> dict[str, Any]:
    row = failure(cell.model, cell.benchmark, None, error)
    if placement.is_main:
        say(f"failed: {cell.model} / {cell.benchmark}: {'' if isinstance(error, UserError) else type(error).__name__ + ': '}{row['reason']}")
    return row
