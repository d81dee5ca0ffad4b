"""Miniatures of Table 9a/b/d and Figure 4: one encoder an objective on the embedded data, told apart by attentive probes.

    python benchmarks/objectives.py [--out runs/objectives] [--steps 800] [--seeds 4 5 6] [--budgets 1 0.5] [--jobs N]

Arms (recipes of pretrain/, all with mini_aimv2's data, encoder and decoder): aimv2, aimv1, captioning with a prefix and bidirectional, CLIP
(batches of 64, half the updates), CapPa, separate decoders; and what is cheaper than the paper: captions from a third of the patches, half the
resolution first. Figure 4 is aimv2 against captioning at --figure4 shares of the samples. Rules:
- The learning rate of each arm is the best by its own held-out loss, seed 0: of three, and of further ones until the best has a worse one on
  both sides. It is found at each length that is compared: at half the length aimv2 is best at 8e-4, at the whole length at 4e-4.
  Then fresh seeds, judged on test pictures, once. (The same pictures judged a first round, of seeds 1 to 3, whose rates were those of half the
  length; nothing was chosen by them.)
- Seeds are paired: the same pictures in the same order, and the encoder's initial weights are the same tensors in every arm (at half the
  resolution with its positions resized). The second stage of half resolution first draws an order of its own; a part of its pictures repeats.
- Equal samples: every arm sees as many pictures. Equal operations: every arm gets aimv2's (arms within 3 % of it are not run twice), and what is
  cheaper than the paper stands beside it at a second budget.
- Probes (evaluation/probing.py) on labelled detail pictures nobody trained on: word (print), digit, shape, color, and what no caption names,
  texture (on dev aimv2 told every plate and no side, so neither is asked). Their learning rate is chosen on a tenth of train.
- Reported: accuracy, and arm - aimv2 (captions from a third: - captioning with a prefix) with a 95 % interval over seeds x pictures. A ranking stands
  only where it excludes 0; of the comparisons of a line one in twenty does so by chance. The paper's own gaps in Table 9 are 0.2 to 1 point.
Runs stand side by side, one a core (pool.py). Every stage continues after a kill and is passed over when finished. One result line a comparison
goes to benchmarks/results/; --recorded takes from there what already has a line with these very settings.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pool import Pool, jobs_here
from record import record, recorded

from aimv2_vlm import demo
from aimv2_vlm.config import ProbeRecipe
from aimv2_vlm.data import scenes
from aimv2_vlm.data.shards import write_json
from aimv2_vlm.evaluation.metrics import paired_difference
from aimv2_vlm.recipe import load_recipe
from aimv2_vlm.train.metrics import say

BASE = "aimv2"
ARMS = {  # name -> recipes of its stages
    "aimv2": ["mini_aimv2"], "aimv1": ["mini_aimv1"], "captioning prefix": ["mini_cap_prefix"], "captioning bidirectional": ["mini_cap_bidir"],
    "clip": ["mini_clip"], "cappa": ["mini_cappa"], "separate decoders": ["mini_separate"], "captions from a third": ["mini_caption_third"],
    "half resolution first": ["mini_low_resolution_first", "mini_low_resolution_then_full"],
}
AGAINST = {"captions from a third": "captioning prefix"}  # where it is not BASE
CHEAPER = ("captions from a third", "half resolution first")  # than the paper
LEARNING_RATES = (2e-4, 4e-4, 8e-4)
TASKS = ("word", "digit", "shape", "color", "texture")
LABELLED = {"train": 2000, "judged": 2000}
FIRST_LABELLED = 30_000_000  # scene numbers that no other stream uses
PROBE_RATES, PROBE_DECAYS = (1e-3, 4e-3), (0.05,)
SAME_COST = 0.03


# ------------------------------------------------------------------------------------------------------------------ data


def labels(scene: scenes.Scene) -> dict[str, str]:
    """What a probe may be asked about a picture: only attributes that one object of it has."""
    found = {"texture": scene.ground.texture}
    if len(scene.digits) == 1:
        found["digit"] = str(scene.digits[0].value)
    if len(scene.shapes) == 1:
        found |= {"shape": scene.shapes[0].name, "color": scene.shapes[0].color}
    if len(words := scene.prints("word")) == 1:
        found["word"] = words[0].text
    return found


def write_labelled(folder: Path, split: str, counts: dict[str, int], kinds: tuple[str, ...] = ("detail",), tasks: tuple[str, ...] = TASKS) -> None:
    """`train-0.parquet` and `judged-0.parquet` with columns image, kind, task, label: pictures of `kinds` in equal parts, those of train from train
    scenes. Raises SystemExit where other ones are there."""
    import pyarrow
    import pyarrow.parquet

    about = {"split": split, "counts": counts, "kinds": list(kinds), "tasks": list(tasks), "generator": scenes.GENERATOR_VERSION}
    if (folder / "about.json").exists():
        if json.loads((folder / "about.json").read_text(encoding="utf-8")) != about:
            raise SystemExit(f"{folder / 'about.json'}: these labelled pictures are other ones than asked for now ({json.dumps(about)}); give another --out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, of_split in (("train", "train"), ("judged", split)):
        rows: list[dict[str, Any]] = []
        for number in range(counts[name]):
            kind, index = kinds[number % len(kinds)], FIRST_LABELLED + number
            scene = scenes.make_scene(of_split, index, kind)
            image = {"bytes": scenes.encode_jpeg(scenes.render(scene)), "path": f"{of_split}-{kind}-{index}.jpg"}
            rows += [{"image": image, "kind": kind, "task": task, "label": label} for task, label in labels(scene).items() if task in tasks]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}-0.parquet")
    write_json(folder / "about.json", about)


# ------------------------------------------------------------------------------------------------------------------ arms


def run_keys(data: Path, seed: int, out: Path, rate: float, steps: int) -> list[str]:
    """What every training run of a study is given: one precision, so that its runs may stand on several machines."""
    return [f"data_root={data}", f"seed={seed}", f"out={out}", "precision=fp32", "train.trackers=[]", f"optim.lr={rate}", f"optim.steps={steps}",
            f"optim.warmup_steps={min(50, max(1, steps // 10))}", f"train.validate_every={steps}", f"train.save_every={max(1, steps // 4)}"]


def starting_encoder(place: Path, seed: int, keys: list[str], position_embedding: str = "learned") -> Path:
    """`place`, a checkpoint of the encoder that mini_aimv2 begins from with this seed, for a run whose own draw would be another one: at another size the
    learned positions are resized; with sin-cos positions the rest is the same."""
    from aimv2_vlm.models.encoder import POSITIONS, build_encoder
    from aimv2_vlm.train.run import seeded

    if not place.exists():
        recipe = load_recipe("pretrain", "mini_aimv2", ["data_root=/", *keys])
        sizes = {key: getattr(recipe.encoder, key) for key in ("patch_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")}
        encoder = seeded(seed, lambda: build_encoder(image_size=recipe.image.size, **sizes))
        if position_embedding == "sincos":
            drawn = encoder.state_dict()
            del drawn[POSITIONS]
            encoder = build_encoder(image_size=recipe.image.size, position_embedding="sincos", **sizes)
            encoder.load_state_dict(drawn, strict=False)
        partial = place.with_name(f"{place.name}.partial")
        encoder.save_pretrained(partial)
        partial.rename(place)
    return place


def next_stage_keys(run: Path, seed: int) -> list[str]:
    """Of a run that goes on from encoder, decoder and tokenizer of a finished one, in an order of its own."""
    return [f"text.tokenizer={run}/final/pretraining/tokenizer.model", f"encoder.path={run}/final", f"decoder.path={run}/final", f"seed={seed}"]


def train_arm(root: Path, data: Path, arm: str, seed: int, steps: list[int], rate: float, more: list[str]) -> Path:
    """Every stage of an arm; returns the last run. A later stage goes on from encoder, decoder and tokenizer of the one before, in an order of its own."""
    run = root
    for number, (recipe, count) in enumerate(zip(ARMS[arm], steps, strict=True)):
        keys = []
        if number:
            keys = next_stage_keys(run, seed + 1000 * number)
        elif len(ARMS[arm]) > 1:  # of another size
            keys = [f"encoder.path={starting_encoder(root / 'start', seed, more)}"]
        run = root / f"stage_{number + 1}"
        say(f"== {arm}, seed {seed}, lr {rate:g}: {recipe}, {count} steps")
        demo.train("pretrain", recipe, [*run_keys(data, seed, run, rate, count), *keys, *more])
    return run


def arm_steps(arm: str, steps: int, share: float = 1.0) -> list[int]:
    """Steps of each stage for as many samples as `steps` of 32; half resolution first splits its recipe's proportion."""
    recipes = [load_recipe("pretrain", name, ["data_root=/"]) for name in ARMS[arm]]
    total = sum(r.optim.steps for r in recipes)
    return [max(2, round(share * steps * 32 * r.optim.steps / total / r.optim.batch_size)) for r in recipes]


def place_of(arm: str, steps: list[int]) -> str:
    return f"{arm} {'+'.join(map(str, steps))}"


def arm_flops(root: Path, arm: str) -> float:
    """Operations of every stage, from what the runs logged."""
    from aimv2_vlm.scaling import training_flops

    total = 0.0
    for number in range(len(ARMS[arm])):
        run = root / f"stage_{number + 1}"
        recipe = load_recipe("pretrain", str(run / "recipe.yaml"))
        recipe.encoder.path = recipe.decoder.path = None
        row = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if '"tokens"' in line][-1]
        total += training_flops(recipe, recipe.text.vocab_size, row["samples"], row["tokens"])
    return total


def held_out_loss(run: Path) -> float | None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(row["val_loss"] for row in reversed(rows) if "val_loss" in row)


def held_out_loss_of(root: Path, data: Path, arm: str, steps: list[int], rate: float, more: list[str]) -> float | None:
    """What a learning rate is chosen by: the held-out loss of the arm's own objective, seed 0."""
    return held_out_loss(train_arm(root, data, arm, 0, steps, rate, more))


def choose_rates(losses_of: Callable[[list[tuple[str, float]]], list[float | None]], arms: Sequence[str], rates: Sequence[float]) -> dict[str, dict[float, float | None]]:
    """arm -> losses by learning rate, the best first. losses_of: (arm, rate) pairs -> losses, None where one diverged.

    An arm whose best is the highest or the lowest gets twice or half of it, too. Raises SystemExit where no rate of an arm gives a loss.
    """
    found: dict[str, dict[float, float | None]] = {arm: {} for arm in arms}
    open_points = [(arm, rate) for arm in arms for rate in rates]
    while open_points:
        for (arm, rate), loss in zip(open_points, losses_of(open_points), strict=True):
            found[arm][rate] = loss
        open_points = []
        for arm, losses in found.items():
            finite = {rate: loss for rate, loss in losses.items() if loss is not None}
            if not finite:
                raise SystemExit(f"{arm}: the held-out loss is not finite at any of the learning rates {sorted(losses)}; give lower ones")
            best = min(finite, key=lambda rate: finite[rate])
            further = {max(losses): 2 * best, min(losses): best / 2}.get(best) if len(rates) > 1 else None
            if further is not None:
                open_points.append((arm, further))
    return {arm: dict(sorted(losses.items(), key=lambda point: math.inf if point[1] is None else point[1])) for arm, losses in found.items()}


def judge_arm(place: Path, data: Path, labelled: Path, arm: str, seed: int, steps: list[int], rate: float, tasks: tuple[str, ...], more: list[str],
              probe_optim: dict[str, Any]) -> dict[str, Any]:
    """Train one arm and probe it: `flops` of the training, `outcomes` of each task's judged pictures."""
    last = train_arm(place, data, arm, seed, steps, rate, more)
    return {"flops": arm_flops(place, arm), "outcomes": probe_tasks(last, labelled, seed, tasks, probe_optim)}


def probe_tasks(run: Path, labelled: Path, seed: int, tasks: tuple[str, ...], more: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Each task's judged pictures with their outcome."""
    from aimv2_vlm.evaluation.probing import best_of

    outcomes = {}
    for task in tasks:
        recipe = ProbeRecipe(out=str(run.parent / "probes" / task), seed=seed)
        recipe.encoder.path = str(run / "final")
        recipe.data.path, recipe.data.test, recipe.data.where, recipe.augment.policy = str(labelled), "judged", {"task": task}, "none"
        recipe.crop_fraction = 1.0
        small_probe(recipe, more)
        outcomes[task] = judged_pictures(recipe, best_of(recipe, PROBE_RATES, PROBE_DECAYS, best_on_test=False))
    return outcomes


def small_probe(recipe: ProbeRecipe, optim: dict[str, Any]) -> None:
    """Lengths that fit some thousand small pictures; `optim`: keys that differ."""
    recipe.optim.batch_size = recipe.optim.micro_batch_size = 256
    recipe.optim.epochs, recipe.optim.warmup_steps = 20.0, 10
    recipe.precision = "fp32"
    recipe.train.trackers, recipe.train.num_workers, recipe.train.save_every = [], 0, 10_000
    for key, value in optim.items():
        setattr(recipe.optim, key, value)


def judged_pictures(recipe: ProbeRecipe, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The chosen point's judged pictures, one by one."""
    return [json.loads(line) for line in (Path(recipe.out) / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------------------------------------------- findings


def compare(results: dict[str, dict[int, dict[str, list[dict[str, Any]]]]], tasks: tuple[str, ...]) -> dict[str, Any]:
    """Accuracy of each arm at each task, and its difference to the arm that it stands beside, in points."""
    table: dict[str, Any] = {}
    for arm, seeds in results.items():
        beside = AGAINST.get(arm, BASE)
        row: dict[str, Any] = {}
        for task in tasks:
            scores = {s: {r["name"]: r["right"] for r in seeds[s][task]} for s in seeds}
            row[task] = {"accuracy": round(100 * float(np.mean([right for s in seeds for right in scores[s].values()])), 1)}
            if arm == BASE or beside not in results:
                continue
            others = {s: {r["name"]: r["right"] for r in results[beside][s][task]} for s in seeds}
            names = {s: sorted(scores[s].keys() & others[s].keys()) for s in seeds}
            mean, low, high = paired_difference([[scores[s][n] for n in names[s]] for s in seeds], [[others[s][n] for n in names[s]] for s in seeds], list(names.values()), seed=0)
            row[task] |= {"minus_" + beside.replace(" ", "_"): round(100 * mean, 1), "interval": [round(100 * low, 1), round(100 * high, 1)],
                          "told_apart": bool(low > 0 or high < 0)}
        table[arm] = row
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--steps", type=int, default=800, help="of 32 samples each (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--budgets", type=float, nargs="*", default=[1.0, 0.5], help="shares of aimv2's operations to compare at; below 1 only the cheaper arms (default: %(default)s)")
    parser.add_argument("--figure4", type=float, nargs="*", default=[0.25, 0.5], help="shares of the samples at which aimv2 stands beside captioning")
    parser.add_argument("--keys", nargs="*", default=[], help="keys of every pre-training recipe (smaller models for a quick look)")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="of the judged pictures (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=jobs_here(), help="runs at once, one a core (default: %(default)s)")
    parser.add_argument("--recorded", action="store_true", help="do not run again what benchmarks/results/objectives.jsonl holds with these settings")
    run(parser.parse_args())


def run(arguments: argparse.Namespace, labelled_counts: dict[str, int] | None = None, rates: tuple[float, ...] = LEARNING_RATES,
        probe_keys: dict[str, Any] | None = None, data: Path | None = None) -> list[dict[str, Any]]:
    """The whole study; returns its result lines. The last arguments are for a quick look (tests)."""
    root, arms, tasks = arguments.out, [BASE, *(a for a in arguments.arms if a != BASE)], tuple(arguments.tasks)
    if data is None:
        demo.write_shards(data := root / "data")
    write_labelled(root / "labelled", arguments.split, labelled_counts or LABELLED)
    with Pool(arguments.jobs) as pool:
        lines = []

        def line_of(name: str, settings: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            """Settings and what `work` found."""
            settings = {"name": f"objectives, {name}", "keys": arguments.keys} | settings
            line = recorded("objectives", settings) if arguments.recorded else None
            if line is None:
                record("objectives", line := settings | work())
            lines.append(line)
            return line

        best: dict[tuple[str, tuple[int, ...]], float] = {}  # learning rate of an arm at a length

        def find_rates(of: str, steps: dict[str, list[int]]) -> dict[str, float]:
            new = {arm: counts for arm, counts in steps.items() if (arm, tuple(counts)) not in best}
            if new:
                found = line_of(f"learning rates{of}", {"seeds": [0], "steps": new, "rates": list(rates)}, lambda: rates_of(new))["lr"]
                best.update({(arm, tuple(new[arm])): rate for arm, rate in found.items()})
            return {arm: best[arm, tuple(counts)] for arm, counts in steps.items()}

        def rates_of(steps: dict[str, list[int]]) -> dict[str, Any]:
            losses = choose_rates(lambda points: pool.run("learning rates", [
                (place := root / "rates" / f"{place_of(arm, steps[arm])} {rate:g}", held_out_loss_of, (place, data, arm, steps[arm], rate, arguments.keys))
                for arm, rate in points]), list(steps), rates)
            return {"lr": {arm: next(iter(found)) for arm, found in losses.items()}, "held_out_loss_by_lr": losses}

        def study(name: str, steps: dict[str, list[int]]) -> dict[str, float]:
            """Operations of each arm, in TFLOP."""
            lr = find_rates("" if steps == whole else f", {name}", steps)
            settings = {"split": arguments.split, "seeds": arguments.seeds, "tasks": list(tasks), "steps": steps, "lr": lr}
            return line_of(name, settings, lambda: judge_arms(name, steps, lr))["tflop"]

        def judge_arms(name: str, steps: dict[str, list[int]], lr: dict[str, float]) -> dict[str, Any]:
            places = {(arm, seed): root / f"seed_{seed}" / place_of(arm, counts) for seed in arguments.seeds for arm, counts in steps.items()}
            found = pool.run(name, [
                (place, judge_arm, (place, data, root / "labelled", arm, seed, steps[arm], lr[arm], tasks, arguments.keys, probe_keys or {}))
                for (arm, seed), place in places.items()])
            judged = dict(zip(places, found, strict=True))
            flops = {arm: float(f"{judged[arm, arguments.seeds[-1]]['flops'] / 1e12:.5g}") for arm in steps}
            outcomes = {arm: {seed: judged[arm, seed]["outcomes"] for seed in arguments.seeds} for arm in steps}
            return {"tflop": flops, "evaluations_of_each_run": 1, "table": compare(outcomes, tasks)}

        whole = {arm: arm_steps(arm, arguments.steps) for arm in arms}
        cost = study("equal samples", whole)
        share = {arm: 1.0 if abs(cost[BASE] / cost[arm] - 1) < SAME_COST else cost[BASE] / cost[arm] for arm in arms}
        for budget in arguments.budgets:
            compared = arms if budget == 1 else [arm for arm in arms if arm in (BASE, *CHEAPER, *AGAINST.values())]
            study(f"equal operations, {budget:g} of the budget", {arm: arm_steps(arm, arguments.steps, budget * share[arm]) for arm in compared})
        for part in arguments.figure4 if "captioning prefix" in arms else []:
            study(f"Figure 4, {part:g} of the samples", {arm: arm_steps(arm, arguments.steps, part) for arm in (BASE, "captioning prefix")})
    return lines


if __name__ == "__main__":
    main()
