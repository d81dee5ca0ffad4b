"""`aimv2-vlm scaling`: encoder sizes x samples seen, and the size that a compute budget wants (paper section 3.1, Figure 2).

For each size one long half-cosine run (the trunk) and, from each of its checkpoints, a linear cooldown; the loss of a point
is the cooled model's on the whole held-out set. Every run is a run directory below `<out>/runs`, so the same command goes on
where it was stopped. Compute-optimal sizes follow Approach 1 of Hoffmann et al. (arXiv 2203.15556): the envelope of the
measured curves, and N_opt = a C^b through it. Nothing is claimed beyond 4 x the largest compute that was measured.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from aimv2_vlm.config import Cooldown, Optimizer, PretrainRecipe, ScalingConfig, StudySize, UserError
from aimv2_vlm.data.captions import CaptionTokenizer
from aimv2_vlm.data.pairs import PairDataset
from aimv2_vlm.data.shards import atomic_file
from aimv2_vlm.evaluation.charts import NUM_STYLES, Series, axis, line_chart, number
from aimv2_vlm.evaluation.report import STYLE, figure, scrolled, table
from aimv2_vlm.models.pretraining import AIMv2ForPreTraining
from aimv2_vlm.page import page, text
from aimv2_vlm.recipe import load_recipe, merge
from aimv2_vlm.train import checkpoint
from aimv2_vlm.train.directory import acquire_lock, changed_keys, storage_errors, write_atomically
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.metrics import Progress, say
from aimv2_vlm.train.optim import Schedule
from aimv2_vlm.train.run import (
    CAPTION_TOKENIZER, TOKENIZER_TEXTS, build_pretraining_model, make_caption_tokenizer, num_patches, pack_sources, pair_set, pretrain,
    pretraining_objective,
)

MAX_EXTRAPOLATION = 4.0  # times the largest (or a quarter of the smallest) compute measured
MAX_WARMUP = 0.1  # of the shortest run
OBJECTIVES = ("aimv2", "aimv1", "captioning", "cappa")
SIZE_SECTIONS = ("encoder", "optim", "train")  # the decoder is the same for all sizes, or losses would not compare
GRID = 400  # values of compute on which the envelope is looked at
LEVEL = 95.0  # per cent, of intervals
DATA, POINTS, RESULT, PAGE, PICTURE, PER_PICTURE = "data.json", "points.jsonl", "scaling.json", "scaling.html", "scaling", "held_out.safetensors"


def scaling(config: ScalingConfig, *, collect: bool = False, budgets: Sequence[float] = (), restart: bool = False) -> int:
    """Run what is missing of the study, then write points.jsonl, scaling.json, scaling.html, scaling.png and scaling.svg.

    collect: nothing is trained; points whose runs are not finished are left out. budgets: training FLOPs, for each of which
    the wanted size and samples are printed, and nothing is written. Raises UserError where the study breaks a rule (see `plan`) or a budget lies beyond
    what can be said, Stopped after a signal. Every process of a launch calls it.
    """
    arms = plan(config)
    out, placement = Path(config.out), Placement()
    with storage_errors(out):
        lock = None
        try:
            if not collect:
                out.mkdir(parents=True, exist_ok=True)
                lock = acquire_lock(out) if placement.is_main else None
                train_all(config, arms, placement, restart)
            if placement.is_main:
                points = measured(config, arms)
                result = analyse(points, config) | {"data": stored_facts(out)}
                for budget in budgets:
                    print(describe(answer(result, budget)))
                if not budgets:
                    write_results(out, points, result)
                    print(f"{len(points)} points; {describe_law(result)}; report: {(out / PAGE).resolve()}")
        finally:
            placement.barrier()
            if lock is not None:
                lock.close()
    return 0


# -------------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Arm:
    """One size and seed: the recipe of its long run, and the steps of that run at which cooldowns begin."""

    size: str
    seed: int
    trunk: PretrainRecipe
    starts: tuple[int, ...]

    def cooldown(self, start: int, config: ScalingConfig) -> PretrainRecipe:
        recipe = copy.deepcopy(self.trunk)
        trunk = Path(self.trunk.out)
        recipe.out = str(trunk.with_name(f"cooldown_{start:08d}"))
        recipe.optim.cooldown = Cooldown(str(trunk / "checkpoints" / checkpoint.step_name(start)), config.cooldown_fraction, config.cooldown_min_lr)
        recipe.train = replace(recipe.train, keep_steps=[], keep_last=1)
        return recipe


def plan(config: ScalingConfig) -> list[Arm]:
    """The runs of a study, before anything is read or trained; sizes in the order given, seeds within.

    Raises UserError where the study breaks a rule that is known by then: names, points and seeds that differ, each size
    with its own learning rate and the shared decoder, a generative objective, a warm-up of at most a tenth of the shortest run.
    """
    for key, values in (("sizes", [size.name for size in config.sizes]), ("samples", config.samples), ("seeds", config.seeds)):
        if not values:
            raise UserError(f"{key}: is empty; a scaling study needs at least one")
        if len(set(values)) < len(values):
            raise UserError(f"{key}: {values} name one twice; keep one of each")
    if not config.recipe:
        raise UserError("recipe: name the pre-training recipe that all sizes share")
    if not 0 < config.cooldown_fraction <= 1:
        raise UserError(f"cooldown_fraction: {config.cooldown_fraction:g} is no share of the run; the paper's is 0.2")
    if min(config.samples) < 1 or config.resamples < 1:
        raise UserError(f"samples: {min(config.samples)} and resamples: {config.resamples} must be positive")
    return [_arm(config, size, seed) for size in config.sizes for seed in config.seeds]


def data_root(config: ScalingConfig) -> str | None:
    return config.data_root or (f"{config.out}/data" if config.embedded.samples else None)


def _arm(config: ScalingConfig, size: StudySize, seed: int) -> Arm:
    where = f"sizes: {size.name!r}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", size.name):
        raise UserError(f"{where}: names a folder; use letters, digits, '.', '_' and '-'")
    for key in size.keys:
        if key not in SIZE_SECTIONS:
            raise UserError(f"{where}: key '{key}' must be the same for all sizes; put it under `keys` "
                            f"(a size may differ in {', '.join(SIZE_SECTIONS)})")
    if not isinstance(size.keys.get("optim"), dict) or "lr" not in size.keys["optim"]:
        raise UserError(f"{where}: has no optim.lr; a learning rate that suits one size does not suit another, so give each its own")
    root = data_root(config)
    words = [f"{key}={json.dumps(value)}" for key, value in merge(config.keys, size.keys).items()]
    try:
        recipe: PretrainRecipe = load_recipe("pretrain", config.recipe, [*([f"data_root={json.dumps(root)}"] if root else []), *words])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    optim = recipe.optim
    for wrong, key, reason in (
        (recipe.objective.name not in OBJECTIVES, f"objective.name: {recipe.objective.name}", f"held-out losses compare for {', '.join(OBJECTIVES)}"),
        (recipe.encoder.path is not None, "encoder.path", "a study trains each size from its beginning; remove the key"),
        (recipe.image.native.capacity is not None, "image.native.capacity", "a study counts samples of one size; remove the key"),
        (optim.epochs is not None, "optim.epochs", "`samples` says how long runs are; remove the key"),
        (optim.cooldown.checkpoint is not None, "optim.cooldown", "`cooldown_fraction` says how runs end; remove the key"),
        (not recipe.data.validation, "data.validation", "a study compares held-out losses; name held-out shards"),
        (not recipe.data.sources, "data.sources", "names no shards"),
    ):
        if wrong:
            raise UserError(f"{where}: {key}: {reason}")
    starts = tuple(round(samples / optim.batch_size) for samples in sorted(config.samples))
    if starts[0] < 1 or len(set(starts)) < len(starts):
        raise UserError(f"samples: {sorted(config.samples)} are steps {list(starts)} of optim.batch_size {optim.batch_size}; "
                        "take larger or fewer counts")
    shortest = starts[0] + cooldown_steps(starts[0], config)
    if optim.warmup_steps > MAX_WARMUP * shortest:
        raise UserError(f"{where}: optim.warmup_steps: {optim.warmup_steps} is more than {MAX_WARMUP:.0%} of the shortest run ({shortest} steps); "
                        f"lower it to {int(MAX_WARMUP * shortest)} or raise the smallest of samples")
    optim.steps, optim.schedule = starts[-1], "half_cosine"
    recipe.seed = seed
    recipe.out = str(Path(config.out) / "runs" / size.name / f"seed_{seed}" / "trunk")
    recipe.train.keep_steps, recipe.train.validate_every = list(starts), 2 * starts[-1]  # that is, at the end
    if recipe.text.tokenizer == "train":
        recipe.text.tokenizer = str(Path(config.out) / CAPTION_TOKENIZER)  # one for all runs
    return Arm(size.name, seed, recipe, starts)


def cooldown_steps(start: int, config: ScalingConfig) -> int:
    return Schedule(Optimizer(cooldown=Cooldown(fraction=config.cooldown_fraction)), start).steps - start


# -------------------------------------------------------------------------------------------------------------------- runs


def train_all(config: ScalingConfig, arms: Sequence[Arm], placement: Placement, restart: bool) -> None:
    """Data, then every run that is not finished yet, then the held-out losses picture by picture of each cooled model."""
    out = Path(config.out)
    if restart and placement.is_main:
        shutil.rmtree(out / "runs", ignore_errors=True)
        for name in (CAPTION_TOKENIZER, DATA, POINTS, RESULT, PAGE, f"{PICTURE}.png", f"{PICTURE}.svg"):
            (out / name).unlink(missing_ok=True)
    facts = placement.main_first(lambda: prepare(config, arms))
    total, done = sum(1 + len(arm.starts) for arm in arms), 0

    def tell(arm: Arm, what: str) -> None:
        if placement.is_main:
            say(f"scaling: run {done + 1} of {total}: size {arm.size}, seed {arm.seed}, {what}")

    for arm in arms:
        arm.trunk.data.validation_samples = facts["held_out"]
        tell(arm, f"{number(arm.starts[-1] * arm.trunk.optim.batch_size)} samples with half-cosine")
        pretrain(arm.trunk)
        done += 1
        for start in arm.starts:
            recipe = arm.cooldown(start, config)
            tell(arm, f"cooldown from {number(start * recipe.optim.batch_size)} samples")
            if not (Path(recipe.out) / "final").is_dir() and not Path(recipe.optim.cooldown.checkpoint).is_dir():
                raise UserError(f"{recipe.optim.cooldown.checkpoint}: is not there: the long run ended before this point was asked for; take the "
                                "points it was started with, another out=, or --restart")
            pretrain(recipe)
            done += 1
            judge(recipe, placement)


def prepare(config: ScalingConfig, arms: Sequence[Arm]) -> dict[str, int]:
    """Shards and tokenizer that all runs share; what the data hold. Raises UserError when a run would see a picture twice."""
    out, recipe = Path(config.out), arms[0].trunk
    if config.embedded.samples:
        draw_pictures(config)
    pack_sources(recipe.data)
    data = pair_set(recipe, recipe.data.sources, None, arms[0].seed)
    held_out = pair_set(recipe, recipe.data.validation, None, 0)
    tokenizer = Path(recipe.text.tokenizer)
    if tokenizer == out / CAPTION_TOKENIZER and not tokenizer.exists():
        make_caption_tokenizer(replace(recipe, text=replace(recipe.text, tokenizer="train")), tokenizer, lambda: data.texts(TOKENIZER_TEXTS))
    longest = max((arm.starts[-1] + cooldown_steps(arm.starts[-1], config)) * arm.trunk.optim.batch_size for arm in arms)
    facts = {"samples": data.num_samples, "longest_run": longest, "without_repetition": without_repetition(data), "held_out": held_out.num_samples}
    if longest > facts["without_repetition"] and config.repeats == "refuse":
        raise UserError(f"samples: the longest run sees {longest:,} with its cooldown, but the data give {facts['without_repetition']:,} before one "
                        "comes again; lower the largest of samples, bring more shards, or set repeats=allow (the results then say so)")
    again = {str(path) for shards in data.shards for path in shards.paths} & {str(path) for shards in held_out.shards for path in shards.paths}
    if again:
        raise UserError(f"data.validation: {sorted(again)[0]} is trained on as well; held-out shards must be others")
    write_atomically(out / DATA, json.dumps(facts))
    return facts


def draw_pictures(config: ScalingConfig) -> None:
    from aimv2_vlm.data import scenes

    def bar(what: str) -> Callable[[int, int], None]:
        return Progress(what, 1, unit="pictures").of

    root, wanted = Path(data_root(config)), config.embedded
    scenes.write_pretraining_shards(root / "shards", "train", wanted.samples, detail_share=wanted.detail_share, progress=bar("drawing shards"))
    scenes.write_pretraining_shards(root / "held_out", "dev", wanted.held_out, progress=bar("drawing held-out shards"))


def without_repetition(data: PairDataset) -> int:
    """How many samples (pictures with one of their captions) a run may see before one comes again; 0 when two sources share some."""
    samples = [(str(path), json.dumps(caption)) for shards, caption in zip(data.shards, data.captions, strict=True) for path in shards.paths]
    if len(set(samples)) < len(samples):
        return 0
    weights, totals = data.order.weights, data.order.totals
    return min(total * sum(weights) // weight for total, weight in zip(totals, weights, strict=True) if weight)


def judge(recipe: PretrainRecipe, placement: Placement) -> None:
    """Sums and counts of each loss term on each held-out picture, as `held_out.safetensors` in the run; shared over processes."""
    path = Path(recipe.out) / PER_PICTURE
    if placement.any(placement.is_main and path.exists()):
        return
    run = Placement.of(recipe)  # the runs' own device and precision
    objective = pretraining_objective(recipe)
    tokenizer = CaptionTokenizer(recipe.text.tokenizer, recipe.text.context_length, recipe.text.canonicalize)
    data = pair_set(recipe, recipe.data.validation, tokenizer, 0, shows_progress=False)
    model = AIMv2ForPreTraining.from_pretrained(Path(recipe.out) / "final", attention=recipe.encoder.attention).to(run.device).eval()
    terms = sorted(objective.weights)
    found = torch.zeros(2 * len(terms), data.num_samples, dtype=torch.float64, device=run.device)
    for position in range(run.rank, data.num_samples, run.world):
        batch = data.validation([position])
        with torch.no_grad(), run.autocast():
            sums = objective.sums(model, batch, run.device)
        counts = objective.counts(batch)
        found[:, position] = torch.stack([*(sums[term].double() for term in terms), *(torch.tensor(counts[t], device=run.device) for t in terms)])
    values = dict(zip([*(f"{t}_sum" for t in terms), *(f"{t}_count" for t in terms)], run.sum_tensor(found).cpu().numpy(), strict=True))
    if placement.is_main:
        with atomic_file(path) as file:
            file.write(safetensors.numpy.save(values))
    placement.barrier()


# ------------------------------------------------------------------------------------------------------------------ points


@dataclass(frozen=True)
class Point:
    """One cooled model. facts: the row of points.jsonl; sums, counts: (terms, pictures); weights: of the terms in the loss."""

    facts: dict[str, Any]
    sums: np.ndarray
    counts: np.ndarray
    weights: np.ndarray


def measured(config: ScalingConfig, arms: Sequence[Arm]) -> list[Point]:
    """The points whose runs are finished. UserError when a run was made with another recipe or did not converge."""
    out = Path(config.out)
    facts = stored_facts(out)
    points, missing = [], []
    for arm in arms:
        for start in arm.starts:
            recipe = arm.cooldown(start, config)
            run = Path(recipe.out)
            if facts is None or not (run / "final").is_dir() or not (run / PER_PICTURE).exists():
                missing.append(f"{arm.size} (seed {arm.seed}) at {number(start * recipe.optim.batch_size)}")
                continue
            recipe.data.validation_samples = facts["held_out"]
            if changed := changed_keys(run / "recipe.yaml", recipe):
                raise UserError(f"{run}: was made with another recipe ({'; '.join(changed)}); use the old values, another out=, or --restart")
            points.append(_point(arm, start, recipe))
    if missing:
        say(f"scaling: {len(missing)} points are not measured yet ({', '.join(missing[:3])}{' …' if len(missing) > 3 else ''})")
    if not points:
        raise UserError(f"{out}: no run of the study is finished; start it without --collect and --budget")
    return points


def stored_facts(out: Path) -> dict[str, int] | None:
    """What `prepare` found in the data."""
    return json.loads((out / DATA).read_text(encoding="utf-8")) if (out / DATA).exists() else None


def _point(arm: Arm, start: int, recipe: PretrainRecipe) -> Point:
    rows = [json.loads(line) for line in (Path(recipe.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = next(row for row in reversed(rows) if "tokens" in row)
    judged = next(row for row in reversed(rows) if "val_loss" in row)
    if judged["val_loss"] is None:
        raise UserError(f"{recipe.out}: the validation loss is not finite; lower optim.lr of size {arm.size} and use --restart or another out=")
    tensors = safetensors.numpy.load_file(Path(recipe.out) / PER_PICTURE)
    weights = pretraining_objective(recipe).weights
    vocab_size = CaptionTokenizer(recipe.text.tokenizer, recipe.text.context_length, recipe.text.canonicalize).vocab_size
    flops = training_flops(recipe, vocab_size, trained["samples"] - trained["bad_samples"], trained["tokens"])
    facts = {
        "size": arm.size, "seed": arm.seed, "encoder_parameters": encoder_parameters(recipe, vocab_size), "samples": trained["samples"],
        "trunk_samples": start * recipe.optim.batch_size, "flops": flops, "lr": recipe.optim.lr,
        **{key: value for key, value in judged.items() if key.startswith("val_")},
    }
    return Point(facts, *(np.stack([tensors[f"{t}_{kind}"] for t in weights]) for kind in ("sum", "count")), np.array(list(weights.values())))


def training_flops(recipe: PretrainRecipe, vocab_size: int, samples: int, tokens: int) -> float:
    """FLOPs of training on `samples` pictures with `tokens` patches and text tokens together.

    Three forward passes a sample, decoder and heads included; the prefix leaves half of the patches scored on average.
    """
    with torch.device("meta"):
        model = build_pretraining_model(recipe, vocab_size)
    patches, share = num_patches(recipe), recipe.objective.caption_patches
    return 3.0 * model.forward_flops(
        samples, num_patches=patches, num_tokens=tokens - samples * patches, scored_patches=samples * patches / 2,
        caption_patches=round(patches * share) if share < 1 else None)


def encoder_parameters(recipe: PretrainRecipe, vocab_size: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_pretraining_model(recipe, vocab_size).encoder.parameters())


# ---------------------------------------------------------------------------------------------------------------- analysis


@dataclass(frozen=True)
class Curve:
    """Loss against compute of one size; `flops` rises."""

    size: str
    parameters: int
    flops: np.ndarray
    samples: np.ndarray
    loss: np.ndarray

    @property
    def flops_per_sample(self) -> float:
        return float(np.mean(self.flops / self.samples))


def envelope(curves: Sequence[Curve], flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of the size with the least loss, that loss) for each compute in `flops`; -1 and inf where sizes do not compare.

    curves: parameters rise. Losses between two points of a size are interpolated in log compute; a size says nothing outside of
    its own points. So the best size counts only where the next smaller and the next larger one were measured too: else it may
    be the best because the other's curve has ended (or only begins further on).
    """
    at = np.log(flops)
    losses = np.stack([np.interp(at, np.log(c.flops), c.loss, left=np.inf, right=np.inf) for c in curves])
    measured_here = np.isfinite(losses)
    best, last = losses.argmin(0), len(curves) - 1
    columns = np.arange(len(flops))
    if len(curves) < 2:
        measured_here[:] = False
    compared = measured_here[best, columns] & measured_here[np.maximum(best - 1, 0), columns] & measured_here[np.minimum(best + 1, last), columns]
    return np.where(compared, best, -1), np.where(compared, losses.min(0), np.inf)


def grid_of(curves: Sequence[Curve]) -> np.ndarray:
    return np.geomspace(min(c.flops[0] for c in curves), max(c.flops[-1] for c in curves), GRID)


def power_law(flops: np.ndarray, parameters: np.ndarray) -> tuple[float, float]:
    """(a, b) of N = a C^b, least squares in logarithms."""
    b, log_a = np.polyfit(np.log(flops), np.log(parameters), 1)
    return float(np.exp(log_a)), float(b)


def optimal_sizes(curves: Sequence[Curve], flops: np.ndarray, best: np.ndarray) -> tuple[float, float, int] | None:
    """(a, b, sizes on the envelope) of N_opt = a C^b through `best`, what `envelope` says of `flops`; None where sizes compare nowhere."""
    compared = best >= 0
    if compared.sum() < 2:
        return None
    sizes = np.array([c.parameters for c in curves])
    return *power_law(flops[compared], sizes[best[compared]]), len(set(best[compared].tolist()))


def analyse(points: Sequence[Point], config: ScalingConfig) -> dict[str, Any]:
    """What the points say, as scaling.json holds it, with intervals from resampling held-out pictures (and seeds, of several).

    A (size, samples) that lacks one of the seeds is left out and named.
    """
    groups, left_out = _grouped(points, config.seeds)
    estimate = _curves(groups, [p.facts["val_loss"] for group in groups for p in group])
    grid = grid_of(estimate)
    best, loss = envelope(estimate, grid)
    law = optimal_sizes(estimate, grid, best)
    resampled = list(_resampled(groups, config))
    winners = np.stack([envelope(curves, grid)[0] for curves in resampled])
    laws = [found[:2] for curves, winner in zip(resampled, winners, strict=True) if (found := optimal_sizes(curves, grid, winner))]
    pictures = groups[0][0].sums.shape[1]
    over = f"{config.resamples:,} resamples of {pictures:,} held-out pictures" + (
        f" and {len(config.seeds)} seeds" if len(config.seeds) > 1
        else "; one seed, so what another initialisation and data order would change is not in it")
    sizes = [{"size": c.size, "encoder_parameters": c.parameters, "flops_per_sample": c.flops_per_sample,
              "points": [{"samples": int(d), "flops": float(f), "loss": float(l)} for d, f, l in zip(c.samples, c.flops, c.loss, strict=True)]}
             for c in estimate]
    result = {
        "loss": "val_loss", "seeds": config.seeds, "left_out": left_out, "sizes": sizes,
        "interval": {"level": LEVEL, "over": over, "resamples": config.resamples},
        "measured_flops": [float(grid[0]), float(grid[-1])], "max_extrapolation": MAX_EXTRAPOLATION,
        "envelope": [{"flops": float(c), "size": estimate[w].size, "loss": float(v)}
                     for c, w, v in zip(grid, best, loss, strict=True) if w >= 0],
        "winners": {c.size: [round(float(share), 4) for share in (winners == i).mean(0)] for i, c in enumerate(estimate)},
        "law": None, "parametric": parametric_fit(estimate),
    }
    if law is not None and law[2] > 1:
        a, b = np.array(laws).T
        result["law"] = {"form": "N_opt = a C^b", "a": law[0], "b": law[1], "b_interval": _interval(b), "sizes_on_envelope": law[2],
                         "resampled": [[float(x), float(y)] for x, y in zip(a, b, strict=True)]}
    result["no_law"] = "" if result["law"] else (
        "sizes were nowhere measured at the same compute" if law is None
        else "one size has the least loss wherever sizes compare, so the study does not bracket the optimum")
    result["budgets"] = _budget_table(result)
    return result


def _grouped(points: Sequence[Point], seeds: Sequence[int]) -> tuple[list[list[Point]], list[str]]:
    """Points of the same size and samples, all seeds in order; sizes by parameters, samples rising."""
    found: dict[tuple[int, str, int], dict[int, Point]] = {}
    for p in points:
        found.setdefault((p.facts["encoder_parameters"], p.facts["size"], p.facts["samples"]), {})[p.facts["seed"]] = p
    whole = {key: [found[key][s] for s in seeds] for key in sorted(found) if set(seeds) <= set(found[key])}
    left_out = [f"{size} at {samples:,} samples: seed {', '.join(str(s) for s in seeds if s not in found[n, size, samples])} is missing"
                for n, size, samples in sorted(found.keys() - whole.keys())]
    if not whole:
        raise UserError(f"seeds: no point has all of {list(seeds)} yet ({left_out[0]}); train on, or name fewer seeds")
    return list(whole.values()), left_out


def _curves(groups: Sequence[Sequence[Point]], losses: Sequence[float]) -> list[Curve]:
    """Curves from one loss a point (groups flattened); seeds of a group are averaged."""
    rows: dict[str, list[tuple[int, float, int, float]]] = {}
    taken = iter(losses)
    for group in groups:
        loss = float(np.mean([next(taken) for _ in group]))
        facts = group[0].facts
        flops = float(np.mean([p.facts["flops"] for p in group]))
        rows.setdefault(facts["size"], []).append((facts["encoder_parameters"], flops, facts["samples"], loss))
    return [Curve(size, found[0][0], *(np.array(column) for column in list(zip(*found, strict=True))[1:])) for size, found in rows.items()]


def _resampled(groups: Sequence[Sequence[Point]], config: ScalingConfig) -> Iterator[list[Curve]]:
    """`config.resamples` times the curves of pictures (and seeds) drawn with replacement, the same ones for every point."""
    draws = np.random.default_rng(0)
    # (groups, seeds, terms, pictures)
    sums, counts = (np.stack([[getattr(p, kind) for p in group] for group in groups]) for kind in ("sums", "counts"))
    weights = groups[0][0].weights
    for _ in range(config.resamples):
        times = np.bincount(draws.integers(sums.shape[-1], size=sums.shape[-1]), minlength=sums.shape[-1]).astype(float)
        loss = ((sums @ times) / np.maximum(1.0, counts @ times)) @ weights  # (groups, seeds)
        chosen = draws.integers(sums.shape[1], size=sums.shape[1])
        yield _curves(groups, loss[:, chosen].ravel().tolist())


def _interval(values: Sequence[float]) -> list[float]:
    return [float(v) for v in np.percentile(values, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])]


def parametric_fit(curves: Sequence[Curve]) -> dict[str, float] | None:
    """L = E + A / N^alpha + B / D^beta (N encoder parameters, D samples), by a Huber loss on log L (Approach 3). None with fewer
    than six points, two sizes or two sample counts, and where the loss falls with N or D in no way that a power could describe."""
    from scipy.optimize import least_squares

    n = np.concatenate([np.full(len(c.loss), c.parameters, float) for c in curves])
    d, loss = (np.concatenate([getattr(c, key) for c in curves]).astype(float) for key in ("samples", "loss"))
    if len(loss) < 6 or len(set(n)) < 2 or len(set(d)) < 2 or loss.min() <= 0:
        return None
    n0, d0 = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())  # A and B at the middle of the data: well conditioned

    def predicted(p: np.ndarray) -> np.ndarray:
        return np.exp(p[0]) + np.exp(p[1]) * (n / n0) ** -p[3] + np.exp(p[2]) * (d / d0) ** -p[4]

    low = loss.min()
    starts = [(np.log(e * low), np.log(0.1 * low), np.log(0.1 * low), alpha, beta)
              for e in (0.3, 0.9) for alpha in (0.2, 0.6) for beta in (0.2, 0.6)]
    bounds = ([-30, -30, -30, 0, 0], [30, 30, 30, 5, 5])
    fits = [least_squares(lambda p: np.log(predicted(p)) - np.log(loss), s, bounds=bounds, loss="huber", f_scale=1e-3, xtol=1e-12, ftol=1e-12,
                          gtol=1e-12, max_nfev=300) for s in starts]
    best = min(fits, key=lambda fit: fit.cost)
    e, a, b, alpha, beta = best.x
    if min(alpha, beta) < 1e-3:
        return None
    return {"E": float(np.exp(e)), "A": float(np.exp(a) * n0**alpha), "alpha": float(alpha), "B": float(np.exp(b) * d0**beta), "beta": float(beta),
            "rms_relative_error": float(np.sqrt(np.mean((predicted(best.x) / loss - 1) ** 2)))}


# ----------------------------------------------------------------------------------------------------------------- answers


def answer(result: dict[str, Any], budget: float) -> dict[str, Any]:
    """What `budget` training FLOPs want. `best`: the size with the least loss there among those measured; `law`: N_opt = a C^b.

    Raises UserError for a budget beyond MAX_EXTRAPOLATION times what was measured, or where neither was measured nor a law found.
    """
    low, high = result["measured_flops"]
    if not (np.isfinite(budget) and low / MAX_EXTRAPOLATION <= budget <= high * MAX_EXTRAPOLATION):
        raise UserError(f"--budget: {budget:.3g} FLOPs; compute was measured from {low:.3g} to {high:.3g}, and nothing is said beyond "
                        f"{MAX_EXTRAPOLATION:g} x that ({low / MAX_EXTRAPOLATION:.3g} to {high * MAX_EXTRAPOLATION:.3g})")
    sizes = result["sizes"]
    found: dict[str, Any] = {"flops": float(budget), "best": None, "law": None, "beyond": max(1.0, budget / high, low / budget)}
    curves = [Curve(s["size"], s["encoder_parameters"], *(np.array([p[key] for p in s["points"]]) for key in ("flops", "samples", "loss")))
              for s in sizes]
    (winner,), (loss,) = envelope(curves, np.array([float(budget)]))
    if winner >= 0:
        nearest = int(np.abs(np.log(grid_of(curves)) - np.log(budget)).argmin())
        shares = [result["winners"][c.size][nearest] for c in curves]  # sizes stand by parameters
        tail = (1 - LEVEL / 100) / 2
        cumulated = np.cumsum(shares)
        first, last = int(np.argmax(cumulated > tail)), int(np.argmax(cumulated >= cumulated[-1] - tail))
        found["best"] = {"size": curves[winner].size, "encoder_parameters": curves[winner].parameters, "loss": float(loss),
                         "samples": float(budget / curves[winner].flops_per_sample), "share_of_resamples": shares[winner],
                         "interval": [curves[min(first, winner)].size, curves[max(last, winner)].size]}
    law = result["law"]
    if law is not None:
        # FLOPs a sample are close to linear in the encoder's parameters (the decoder is the same).
        slope, base = np.polyfit([c.parameters for c in curves], [c.flops_per_sample for c in curves], 1)
        wanted = [a * budget**b for a, b in [(law["a"], law["b"]), *law["resampled"]]]
        per_sample = max(slope * wanted[0] + base, min(c.flops_per_sample for c in curves) / MAX_EXTRAPOLATION)
        interval = _interval(wanted[1:])
        found["law"] = {"encoder_parameters": wanted[0], "interval": [min(interval[0], wanted[0]), max(interval[1], wanted[0])],
                        "samples": float(budget / per_sample),
                        "between_sizes": bool(curves[0].parameters <= wanted[0] <= curves[-1].parameters)}
    if found["best"] is None and law is None:
        raise UserError(f"--budget: sizes do not compare at {budget:.3g} FLOPs (the best one, or the next smaller or larger, was not measured there), and "
                        f"there is no law to go by: {result['no_law']}")
    return found


def _budget_table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers over the compute that was measured and, with a law, up to the largest that may be asked for."""
    low, high = result["measured_flops"]
    asked = [*np.geomspace(low, high, 7).clip(low, high), *([2 * high, MAX_EXTRAPOLATION * high] if result["law"] else [])]
    found = []
    for budget in asked:
        with contextlib.suppress(UserError):  # where sizes do not compare
            found.append(answer(result, float(budget)))
    return found


def describe(found: dict[str, Any]) -> str:
    """An answer in one line of words."""
    parts = []
    if best := found["best"]:
        low, high = best["interval"]
        between = low if low == high else f"{low} to {high}"
        parts.append(f"size {best['size']} ({number(best['encoder_parameters'])} encoder parameters) on {round(best['samples']):,} samples, validation "
                     f"loss {best['loss']:.4f}; least in {best['share_of_resamples']:.0%} of resamples, {LEVEL:g} % interval {between}")
    if law := found["law"]:
        low, high = (number(float(f"{v:.3g}")) for v in law["interval"])
        outside = "" if law["between_sizes"] else "; outside of the sizes measured"
        parts.append(f"law: {number(float(format(law['encoder_parameters'], '.3g')))} encoder parameters [{low}, {high}] on "
                     f"{round(law['samples']):,} samples{outside}")
    beyond = f" (extrapolated {found['beyond']:.2g} x)" if found["beyond"] > 1 else ""
    return f"{found['flops']:.3g} FLOPs{beyond}: " + "; ".join(parts)


def describe_law(result: dict[str, Any]) -> str:
    law = result["law"]
    if law is None:
        return f"no law: {result['no_law']}"
    low, high = law["b_interval"]
    return f"N_opt = {law['a']:.3g} C^{law['b']:.3f}, exponent [{low:.3f}, {high:.3f}] ({LEVEL:g} % over {result['interval']['over']})"


# ----------------------------------------------------------------------------------------------------------------- results


def write_results(out: Path, points: Sequence[Point], result: dict[str, Any]) -> None:
    write_atomically(out / POINTS, "".join(json.dumps(p.facts) + "\n" for p in points))
    write_atomically(out / RESULT, json.dumps(result, indent=1))
    left, right = panels(result)
    for kind in ("png", "svg"):
        draw(out / f"{PICTURE}.{kind}", left, right)
    write_atomically(out / PAGE, html_page(result, points, left, right))


def panels(result: dict[str, Any]) -> tuple[list[Series], list[Series]]:
    """Figure 2: validation loss against samples seen, and against training FLOPs with the envelope of the least loss."""
    def lines(key: str) -> list[Series]:
        return [Series(f"{s['size']} ({number(float(format(s['encoder_parameters'], '.3g')))})", [(p[key], p["loss"]) for p in s["points"]], i,
                       markers=True) for i, s in enumerate(result["sizes"])]

    compared = [(e["flops"], e["loss"]) for e in result["envelope"]]
    least = [Series("least loss where sizes compare", compared, NUM_STYLES - 3, dashed=True)] if compared else []
    return lines("samples"), [*lines("flops"), *least]


POINT_COLUMNS = ("size", "seed", "encoder parameters", "samples", "FLOPs", "lr", "loss", "text", "pixel")
LOSSES = ("val_loss", "val_text_loss", "val_pixel_loss")
AXES = ("pictures seen", "training FLOPs", "validation loss")


def draw(path: Path, left: Sequence[Series], right: Sequence[Series]) -> None:
    """Both panels as one picture, PNG or SVG by the name's ending, in the report's colours."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    colours = dict(re.findall(r"--s(\d): (#\w+)", STYLE.read_text(encoding="utf-8").split("@media")[0]))
    with plt.rc_context({"svg.hashsalt": "scaling", "font.size": 9}):
        figure_, panes = plt.subplots(1, 2, figsize=(9.6, 3.8), sharey=True, layout="constrained")
        for pane, lines, label in zip(panes, (left, right), AXES, strict=False):
            for line in lines:
                x, y = zip(*line.points, strict=True)
                look = line.style % NUM_STYLES
                pane.plot(x, y, "--" if line.dashed else "-", color=colours[str(look)], marker="osD^vP*X"[look] if line.markers else None,
                          markersize=4, label=line.name)
            scale = axis(label, [x for line in lines for x, _ in line.points], log=True)
            pane.set(xscale="log", xlim=(scale.low, scale.high), xlabel=label)
            pane.set_xticks(scale.ticks(), labels=[number(tick) for tick in scale.ticks()])
            pane.minorticks_off()
            pane.grid(alpha=0.3)
        panes[0].set_ylabel(AXES[2])
        figure_.legend(*panes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(right), frameon=False)
        with atomic_file(path) as file:
            figure_.savefig(file, format=path.suffix[1:], dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure_)


def html_page(result: dict[str, Any], points: Sequence[Point], left: Sequence[Series], right: Sequence[Series]) -> str:
    losses = [y for line in left for _, y in line.points]

    def chart(name: str, title: str, label: str, lines: Sequence[Series]) -> str:
        x = axis(label, [px for line in lines for px, _ in line.points], log=True)
        return figure(name, title, line_chart(lines, x, axis(AXES[2], losses), f"{title}: {', '.join(line.name for line in lines)}"), lines)

    low, high = result["measured_flops"]
    header = (f'<p class="sub">{text(describe_law(result)[:1].upper() + describe_law(result)[1:])}.</p>'
              f'<p class="sub">{len(points)} points, {len(result["sizes"])} sizes, compute from {low:.3g} to {high:.3g} FLOPs.</p>')
    figures = ('<section><div class="figures">' + chart("Samples", "Loss of each size against pictures seen, each point cooled down", AXES[0], left)
               + chart("Compute", "The same points against training FLOPs, and the least loss at each compute", AXES[1], right) + "</div></section>")
    wanted = "".join(_budget_row(found) for found in result["budgets"])
    columns = ("training FLOPs", "best size measured", "share of resamples", "samples", "N by the law", "interval", "samples")
    measured_rows = "".join(
        f"<tr><th scope=row>{text(p['size'])}</th>" + "".join(
            f"<td>{value}</td>" for value in (p["seed"], f"{p['encoder_parameters']:,}", f"{p['samples']:,}", f"{p['flops']:.4g}", f"{p['lr']:g}",
                                              *(f"{p[key]:.4f}" if key in p else "" for key in LOSSES))) + "</tr>"
        for p in (point.facts for point in points))
    fit = result["parametric"]
    extra = "" if fit is None else (
        f'<p class="how">Parametric fit, as an extra: L = {fit["E"]:.4g} + {fit["A"]:.4g} / N^{fit["alpha"]:.3f} + {fit["B"]:.4g} / '
        f'D^{fit["beta"]:.3f}, with a relative error of {fit["rms_relative_error"]:.2%} (root mean square) on these points.</p>')
    data = result["data"]
    warnings = [*result["left_out"], *([f"No law: {result['no_law']}."] if result["no_law"] else [])]
    if data["longest_run"] > data["without_repetition"]:
        warnings.append(f"Samples were repeated: the longest run sees {data['longest_run']:,}, the data give {data['without_repetition']:,} "
                        "before one comes again.")
    missing = "".join(f'<p class="missing">{text(line)}</p>' for line in warnings)
    rules = ("Training FLOPs: three forward passes, encoder, decoder and heads, of the long run until the point and of the cooldown. N: encoder "
             "parameters. The envelope and N_opt = a C^b use compute at which the best size, the next smaller and the next larger one were all "
             "measured; a size says nothing outside of its own points. Nothing is said beyond "
             f"{MAX_EXTRAPOLATION:g} x the compute measured. Intervals: {LEVEL:g} % over {result['interval']['over']}.")
    main = (f'{missing}{figures}<section><h2>Which size a budget wants</h2>{scrolled("Budgets", table("plain", columns, wanted))}{extra}'
            f'<p class="how">{text(rules)}</p></section><section><h2>Points</h2>'
            + scrolled("Points", table("plain", POINT_COLUMNS, measured_rows)) + "</section>")
    return page("Scaling study", STYLE.read_text(encoding="utf-8"), header, main)


def _budget_row(found: dict[str, Any]) -> str:
    best, law = found["best"], found["law"]
    cells = [""] * 6
    if best:
        cells[:3] = [text(best["size"]), f"{best['share_of_resamples']:.0%}", f"{round(best['samples']):,}"]
    if law:
        cells[3:] = [f"{law['encoder_parameters']:.3g}", "{:.3g} to {:.3g}".format(*law["interval"]), f"{round(law['samples']):,}"]
    beyond = f" ({found['beyond']:.2g} x beyond)" if found["beyond"] > 1 + 1e-9 else ""
    return f"<tr><th scope=row>{found['flops']:.3g}{beyond}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
