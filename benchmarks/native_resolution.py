"""Miniature of Table 6: encoders trained at one size or at native resolution, each probed at every size: the whole 3 x 3 grid.

    python benchmarks/native_resolution.py [--out runs/native_resolution] [--trunk 2400] [--steps 800] [--seeds 1 2 3] [--rates 2e-4 4e-4 8e-4]
                                           [--native-times 1] [--jobs N]

As in Table 6 the rows go on from one encoder, a seed's trunk: mini_aimv2 with sin-cos positions, --trunk steps at 56 px. Rows: fixed 56 px, fixed
112 px, native (16 to 64 patches of 14 px), each in an order of its own. With --trunk 0 they are all trained from scratch, from the same initial
tensors (learned positions resized), beside fixed 56 px with sin-cos positions, so that positions and sizes are not mixed up.
Every row makes about as many updates (--steps) of as many patches (512, of which native leaves some 15 % empty); learning rates as in benchmarks/objectives.py
(the held-out pictures of the native row are shown at 56 px; one seed's loss tells rates apart no better than that seed's noise). One rate in
--rates is every row's. --native-times 4 gives the native row four times the patches: what it learns when its sizes need not share what one size gets.
Columns: pictures at 56 px, at 112 px, and native: each as it is stored (detail pictures have 56 px, scenes 112; the embedded pictures are square, so
sizes differ here and aspects do not). A fixed encoder with learned positions gets them resized to the size it is probed at. Each kind of picture
has its own probe at each size; a cell is their accuracy over all pictures.
Reported: accuracy in every cell, native - each other row at the same column with a 95 % interval over seeds x pictures.
"""

from __future__ import annotations

import argparse
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

KINDS = ("detail", "scene")
SINCOS = ["encoder.position_embedding=sincos"]
FROM_SCRATCH: dict[str, tuple[str, list[str]]] = {  # row -> recipe and keys
    "fixed 56": ("mini_aimv2", []), "fixed 112": ("mini_aimv2", ["image.size=112", "optim.batch_size=8", "optim.micro_batch_size=8"]),
    "native": ("mini_native", ["image.native.minibatches=1"]),
    "fixed 56, sin-cos": ("mini_aimv2", SINCOS),
}
FROM_TRUNK = {row: (recipe, [*keys, *SINCOS]) for row, (recipe, keys) in FROM_SCRATCH.items() if row != "fixed 56, sin-cos"}
TRUNK_RATE = 4e-4  # the best of every row from scratch, sin-cos at 56 px among them
COLUMNS = {  # name -> (kind, size) of its probes
    "56": (("detail", 56), ("scene", 56)), "112": (("detail", 112), ("scene", 112)), "native": (("detail", 56), ("scene", 112)),
}
TASKS = ("word", "shape", "texture")


def patches_a_step(recipe_name: str, keys: list[str]) -> float:
    recipe = load_recipe("pretrain", recipe_name, ["data_root=/", *keys])
    native = recipe.image.native
    if not native.capacity:
        return recipe.optim.batch_size * (recipe.image.size // recipe.encoder.patch_size) ** 2
    schedule = NativeSchedule(0, native.capacity, native.patch_limit, native.center, native.spread)
    return native.minibatches / STRATA * sum(a * b for a, b in zip(schedule.budgets, schedule.sizes, strict=True))


def train_trunk(place: Path, data: Path, seed: int, steps: int, keys: list[str]) -> Path:
    start = objectives.starting_encoder(place / "start", seed, keys, "sincos")
    demo.train("pretrain", "mini_aimv2", [*objectives.run_keys(data, seed, place / "run", TRUNK_RATE, steps), *SINCOS, *keys, f"encoder.path={start}"])
    return place / "run"


def train_row(place: Path, data: Path, trunk: Path | None, row: str, seed: int, patches: float, rate: float, keys: list[str]) -> Path:
    recipe, own = (FROM_SCRATCH if trunk is None else FROM_TRUNK)[row]
    keys = [*own, *keys]
    if trunk is None:
        positions = load_recipe("pretrain", recipe, ["data_root=/", *keys]).encoder.position_embedding
        goes_on = [f"encoder.path={objectives.starting_encoder(place / 'start', seed, keys, positions)}"]
    else:
        goes_on = objectives.next_stage_keys(trunk, seed + 1000)
    steps = max(2, round(patches / patches_a_step(recipe, keys)))
    demo.train("pretrain", recipe, [*objectives.run_keys(data, seed, place / "run", rate, steps), *keys, *goes_on])
    return place / "run"


def held_out_loss_of(place: Path, data: Path, trunk: Path | None, row: str, patches: float, rate: float, keys: list[str]) -> float | None:
    return objectives.held_out_loss(train_row(place, data, trunk, row, 0, patches, rate, keys))


def judge_row(place: Path, data: Path, trunk: Path | None, labelled: Path, row: str, seed: int, patches: float, rate: float, tasks: list[str],
              keys: list[str], optim: dict[str, Any]) -> dict[str, dict[str, dict[str, int]]]:
    """Train one row and probe it: column -> task -> name of each judged picture -> right or wrong."""
    encoder = train_row(place, data, trunk, row, seed, patches, rate, keys)
    probed = {(task, *probe): probe_kind(encoder, labelled, task, *probe, place / "probes" / task, seed, optim)
              for task in tasks for probe in sorted({probe for probes in COLUMNS.values() for probe in probes})}
    return {column: {task: {name: right for probe in probes for name, right in probed[task, *probe].items()} for task in tasks} for column, probes in COLUMNS.items()}


def probe_kind(encoder: Path, labelled: Path, task: str, kind: str, size: int, out: Path, seed: int, optim: dict[str, Any]) -> dict[str, int]:
    """Name of each judged picture of a kind, shown at `size` -> right or wrong."""
    from aimv2_vlm.evaluation.probing import best_of

    recipe = ProbeRecipe(out=str(out / f"{kind}-{size}"), seed=seed)
    recipe.encoder.path, recipe.encoder.image_size = str(encoder / "final"), size
    recipe.data.path, recipe.data.test, recipe.augment.policy, recipe.crop_fraction = str(labelled), "judged", "none", 1.0
    recipe.data.where = {"task": task, "kind": kind}
    objectives.small_probe(recipe, optim)
    found = best_of(recipe, objectives.PROBE_RATES, objectives.PROBE_DECAYS, best_on_test=False)
    return {row["name"]: row["right"] for row in objectives.judged_pictures(recipe, found)}


def run(arguments: argparse.Namespace, counts: dict[str, int], rates: tuple[float, ...], optim: dict[str, Any], data: Path) -> dict[str, Any]:
    root, patches = arguments.out, arguments.steps * 32 * 16
    objectives.write_labelled(root / "labelled", arguments.split, counts, KINDS, TASKS)
    rows = FROM_TRUNK if arguments.trunk else FROM_SCRATCH
    times = {row: arguments.native_times if row == "native" else 1 for row in rows}
    names = {row: row if times[row] == 1 else f"{row} x{times[row]}" for row in rows}
    places = {(row, seed): root / f"seed_{seed}" / names[row] for seed in arguments.seeds for row in rows}
    trunks: dict[int, Path | None] = dict.fromkeys((0, *arguments.seeds))
    with Pool(arguments.jobs) as pool:
        if arguments.trunk:
            trunks = dict(zip(trunks, pool.run("trunks", [
                (place := root / "trunks" / f"seed_{seed}", train_trunk, (place, data, seed, arguments.trunk, arguments.keys)) for seed in trunks]), strict=True))
        losses = {row: {rates[0]: None} for row in rows} if len(rates) == 1 else objectives.choose_rates(lambda points: pool.run("learning rates", [
            (place := root / "rates" / f"{names[row]} {rate:g}", held_out_loss_of, (place, data, trunks[0], row, times[row] * patches, rate, arguments.keys))
            for row, rate in points]), list(rows), rates)
        judged = pool.run("rows of the grid", [
            (place, judge_row, (place, data, trunks[seed], root / "labelled", row, seed, times[row] * patches, next(iter(losses[row])), arguments.tasks, arguments.keys, optim))
            for (row, seed), place in places.items()])
    cells: dict[tuple[str, str, str], dict[int, dict[str, int]]] = {}
    for (row, seed), columns in zip(places, judged, strict=True):
        for column, tasks in columns.items():
            for task, cell in tasks.items():
                cells.setdefault((row, column, task), {})[seed] = cell
    grid: dict[str, Any] = {}
    for (row, column, task), seeds in cells.items():
        grid.setdefault(task, {}).setdefault(row, {})[column] = round(100 * float(np.mean([v for s in seeds.values() for v in s.values()])), 1)
    against: dict[str, Any] = {}
    for (other, column, task), theirs in cells.items():
        if other == "native":
            continue
        ours = cells["native", column, task]
        both = {s: sorted(ours[s].keys() & theirs[s].keys()) for s in ours}
        mean, low, high = paired_difference([[ours[s][n] for n in both[s]] for s in ours], [[theirs[s][n] for n in both[s]] for s in ours], list(both.values()), seed=0)
        against.setdefault(task, {}).setdefault(other, {})[column] = {"points": round(100 * mean, 1), "interval": [round(100 * low, 1), round(100 * high, 1)]}
    line = {"name": f"native resolution, 3 x 3 grid, {'from one encoder' if arguments.trunk else 'from scratch'}", "trunk_steps": arguments.trunk, "keys": arguments.keys, "split": arguments.split, "seeds": arguments.seeds, "patches_spent": patches, "native_times": arguments.native_times, "held_out_loss_by_lr": losses,
            "evaluations_of_each_run": 1, "grid": grid, "native_minus": against}
    record("native_resolution", line)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/native_resolution"))
    parser.add_argument("--trunk", type=int, default=2400, help="steps of the encoder that all rows go on from; 0: rows from scratch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=800, help="of 32 pictures of 16 patches: what every row spends (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=list(objectives.LEARNING_RATES), help="learning rates to choose from; one: no choice (default: %(default)s)")
    parser.add_argument("--native-times", type=int, default=1, help="patches of the native row, times those of the others (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--keys", nargs="*", default=[], help="keys of every pre-training recipe (smaller models for a quick look)")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="of the judged pictures (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=jobs_here(), help="runs at once, one a core (default: %(default)s)")
    arguments = parser.parse_args()
    data = arguments.out / "data"
    demo.write_shards(data)
    run(arguments, {"train": 2400, "judged": 2000}, tuple(arguments.rates), {}, data)


if __name__ == "__main__":
    main()
