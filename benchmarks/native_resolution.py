"""Miniature of Table 6: encoders trained at one size or at native resolution, each probed at every size: the whole 3 x 3 grid.

    python benchmarks/native_resolution.py [--out runs/native_resolution] [--steps 1200] [--seeds 1 2 3] [--jobs N]

Rows: fixed 56 px, fixed 112 px, native (16 to 64 patches of 14 px), and fixed 56 px with sin-cos positions, so that positions and sizes are not mixed up.
Every row spends the same number of patches (--steps x 32 x 16); learning rates as in benchmarks/objectives.py, on dev.
Columns: pictures at 56 px, at 112 px, and native: each as it is stored (detail pictures have 56 px, scenes 112; the embedded pictures are square, so
sizes differ here and aspects do not). A fixed encoder with learned positions gets them resized to the size it is probed at. In the native column each size
has its own probe, and the two accuracies are averaged over all pictures.
Reported: accuracy in every cell, native - fixed at the same column with a 95 % interval over seeds x pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import objectives
from pool import Pool, jobs_here
from record import record

from aimv2_vlm import demo
from aimv2_vlm.config import ProbeRecipe
from aimv2_vlm.data.native import STRATA, NativeSchedule
from aimv2_vlm.evaluation.metrics import paired_difference
from aimv2_vlm.recipe import load_recipe

PATCH, SIZES, KINDS = 14, (56, 112), ("detail", "scene")
ROWS: dict[str, tuple[str, list[str]]] = {
    "fixed 56": ("mini_aimv2", []), "fixed 112": ("mini_aimv2", ["image.size=112"]), "native": ("mini_native", []),
    "fixed 56, sin-cos": ("mini_aimv2", ["encoder.position_embedding=sincos"]),
}
COLUMNS = ("56", "112", "native")
TASKS = ("word", "shape", "texture")


def patches_a_step(row: str, keys: list[str]) -> float:
    recipe = load_recipe("pretrain", ROWS[row][0], ["data_root=/", *ROWS[row][1], *keys])
    native = recipe.image.native
    if not native.capacity:
        return recipe.optim.batch_size * (recipe.image.size // recipe.encoder.patch_size) ** 2
    schedule = NativeSchedule(0, native.capacity, native.patch_limit, native.center, native.spread)
    return native.minibatches / STRATA * sum(a * b for a, b in zip(schedule.budgets, schedule.sizes, strict=True))


def train_row(place: Path, data: Path, row: str, seed: int, patches: float, rate: float, keys: list[str]) -> Path:
    recipe, own = ROWS[row]
    steps = max(2, round(patches / patches_a_step(row, keys)))
    demo.train("pretrain", recipe, [*objectives.run_keys(data, seed, place, rate, steps), *own, *keys])
    return place


def held_out_loss_of(place: Path, data: Path, row: str, patches: float, rate: float, keys: list[str]) -> float | None:
    return objectives.held_out_loss(train_row(place, data, row, 0, patches, rate, keys))


def judge_row(place: Path, data: Path, labelled: Path, row: str, seed: int, patches: float, rate: float, tasks: list[str], keys: list[str],
              optim: dict[str, Any]) -> dict[str, dict[str, dict[str, int]]]:
    """Train one row and probe its cells: column -> task -> outcome of each judged picture."""
    train_row(place, data, row, seed, patches, rate, keys)
    probes = place.with_name(f"{row} probes")
    return {column: {task: probe_cell(place, labelled, task, column, probes, seed, optim) for task in tasks} for column in COLUMNS}


def probe_cell(encoder: Path, labelled: Path, task: str, column: str, out: Path, seed: int, optim: dict[str, Any]) -> dict[str, int]:
    """Name of each judged picture -> right or wrong."""
    from aimv2_vlm.evaluation.probing import best_of

    outcomes: dict[str, int] = {}
    for kind, size in zip(KINDS, SIZES, strict=True) if column == "native" else [(None, int(column))]:
        recipe = ProbeRecipe(out=str(out / task / f"{column}-{kind or 'all'}"), seed=seed)
        recipe.encoder.path, recipe.encoder.image_size = str(encoder / "final"), size
        recipe.data.path, recipe.data.test, recipe.augment.policy, recipe.crop_fraction = str(labelled), "judged", "none", 1.0
        recipe.data.where = {"task": task} | ({"kind": kind} if kind else {})
        objectives.small_probe(recipe, optim)
        outcomes |= {row["name"]: row["right"] for row in objectives.judged_pictures(recipe, best_of(recipe, objectives.PROBE_RATES, objectives.PROBE_DECAYS, best_on_test=False))}
    return outcomes


def run(arguments: argparse.Namespace, counts: dict[str, int], rates: tuple[float, ...], optim: dict[str, Any], data: dict[str, Path]) -> dict[str, Any]:
    root, patches = arguments.out, arguments.steps * 32 * 16
    for split in data:
        objectives.write_labelled(root / f"labelled_{split}", split, counts, KINDS, TASKS)
    points = {(row, rate): root / "rates" / f"{row} {rate:g}" for row in ROWS for rate in rates}
    places = {(row, seed): root / f"seed_{seed}" / row for seed in arguments.seeds for row in ROWS}
    with Pool(arguments.jobs) as pool:
        losses = pool.run("learning rates", [
            (place, held_out_loss_of, (place, data["dev"], row, patches, rate, arguments.keys)) for (row, rate), place in points.items()])
        best = objectives.best_rates(dict(zip(points, losses, strict=True)))
        judged = pool.run("rows of the grid", [
            (place, judge_row, (place, data["test"], root / "labelled_test", row, seed, patches, best[row], arguments.tasks, arguments.keys, optim))
            for (row, seed), place in places.items()])
    cells: dict[tuple[str, str, str], dict[int, dict[str, int]]] = {}
    for (row, seed), columns in zip(places, judged, strict=True):
        for column, tasks in columns.items():
            for task, cell in tasks.items():
                cells.setdefault((row, column, task), {})[seed] = cell
    grid: dict[str, Any] = {}
    for (row, column, task), seeds in cells.items():
        grid.setdefault(task, {}).setdefault(row, {})[column] = round(100 * float(np.mean([v for s in seeds.values() for v in s.values()])), 1)
    against = {}
    for task in arguments.tasks:
        for column, fixed in (("56", "fixed 56"), ("112", "fixed 112"), ("native", "fixed 112")):
            ours, theirs = cells["native", column, task], cells[fixed, column, task]
            names = {s: sorted(ours[s].keys() & theirs[s].keys()) for s in ours}
            mean, low, high = paired_difference([[ours[s][n] for n in names[s]] for s in ours], [[theirs[s][n] for n in names[s]] for s in ours], list(names.values()))
            against[f"{task} at {column}: native - {fixed}"] = {"points": round(100 * mean, 1), "interval": [round(100 * low, 1), round(100 * high, 1)]}
    line = {"name": "native resolution, 3 x 3 grid", "seeds": arguments.seeds, "patches_spent": patches, "lr": best, "grid": grid, "differences": against}
    record("native_resolution", json.loads(json.dumps(line)))
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/native_resolution"))
    parser.add_argument("--steps", type=int, default=1200, help="of 32 pictures of 16 patches: what every row spends (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--keys", nargs="*", default=[], help="keys of every pre-training recipe (smaller models for a quick look)")
    parser.add_argument("--jobs", type=int, default=jobs_here(), help="runs at once, one a core (default: %(default)s)")
    arguments = parser.parse_args()
    data = {split: arguments.out / f"data_{split}" for split in ("dev", "test")}
    for split, folder in data.items():
        demo.write_data(folder, split)
    run(arguments, {"train": 2400, "judged": 800}, objectives.LEARNING_RATES, {}, data)


if __name__ == "__main__":
    main()
