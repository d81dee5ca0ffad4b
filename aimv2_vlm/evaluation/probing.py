"""Recognition by an attentive probe on a frozen encoder (spec "Recognition probe"; Tables A2 and B1).

`probe` trains and judges one learning rate and weight decay; `best_of` chooses among several on a tenth of train. Both go
on where they were stopped. A wider grid trains many heads at once: it would replace `_train_and_judge`, nothing else.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aimv2_vlm import recipe as recipes
from aimv2_vlm.config import ProbeRecipe, UserError
from aimv2_vlm.data.labelled import FrozenFeatures, LabelledDataset, Picture, class_counts, open_splits, training_transform
from aimv2_vlm.data.transforms import EvalTransform
from aimv2_vlm.evaluation.sweep import digest_checkpoint
from aimv2_vlm.models.assistant import image_statistics
from aimv2_vlm.models.encoder import load_encoder
from aimv2_vlm.models.probe import AttentiveProbe
from aimv2_vlm.train import checkpoint
from aimv2_vlm.train.directory import storage_errors, write_atomically
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.loop import check_batch, global_slice, train
from aimv2_vlm.train.metrics import Progress, say
from aimv2_vlm.train.objectives import ProbeObjective
from aimv2_vlm.train.run import compile_model, make_optimizer, open_run, publish, resolve_schedule, seeded

LEARNING_RATES = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)  # Tables A2 and B1
WEIGHT_DECAYS = (0.05, 0.1)


def probe(recipe: ProbeRecipe, restart: bool = False) -> dict[str, Any]:
    """Train a probe by `recipe` and judge it once; the result also stands in `<out>/result.json`, each picture's outcome in
    `<out>/samples.jsonl`, the probe in `<out>/final`.

    Returns accuracy (0..1) with its 95 % interval (`low`, `high`, Wilson's), mean cross-entropy `loss` (nats), counts of each
    class, sizes of the splits, lr, weight_decay. Pictures that cannot be decoded are counted and named, not judged.
    Raises UserError for what recipe or data get wrong, Stopped after a signal or `train.stop_after`.
    """
    return _train_and_judge(recipe, restart, {})


def best_of(
    recipe: ProbeRecipe, lrs: Sequence[float] = LEARNING_RATES, weight_decays: Sequence[float] = WEIGHT_DECAYS, restart: bool = False,
    best_on_test: bool = True,
) -> dict[str, Any]:
    """The grid of lrs x weight_decays: chosen on a tenth of train, trained anew on all of train, judged on test.

    Returns `selection` (accuracy of each point on that tenth), `selected` (`probe`'s result of the chosen point on test)
    and, with `best_on_test`, under this name the best of the whole grid on test: the paper's way, optimistic because test
    chose it; it costs a training on all of train for every point. Every point is a run of its own below `recipe.out`.
    """
    if not lrs or not weight_decays:
        raise UserError("best_of: give at least one learning rate and one weight decay")
    shared: dict[str, Any] = {}
    results: dict[Any, dict[str, Any]] = {}
    grid = list(itertools.product(lrs, weight_decays))

    def run(point: tuple[float, float], judged: str) -> dict[str, Any]:
        if (point, judged) in results:
            return results[point, judged]
        one = copy.deepcopy(recipe)
        one.optim.lr, one.optim.weight_decay = point
        one.data.judged = judged
        one.out = str(Path(recipe.out or "runs/probe") / judged / f"lr_{point[0]:g}_wd_{point[1]:g}")
        results[point, judged] = _train_and_judge(one, restart, shared)
        return results[point, judged]

    selection = [run(point, "selection") for point in grid]
    chosen = grid[choose(selection)]
    result = {"selected": run(chosen, "test"), "selection": [_row(one) for one in selection], "test_evaluations": 1}
    if best_on_test:
        on_test = [run(point, "test") for point in grid]
        best = min(on_test, key=lambda one: (-one["accuracy"], one["loss"]))
        result |= {"best_on_test": _row(best), "on_test": [_row(one) for one in on_test], "test_evaluations": len(grid)}
    if Placement(recipe.train.strategy, recipe.precision).is_main:
        write_atomically(Path(recipe.out or "runs/probe") / "result.json", json.dumps(result, indent=1, ensure_ascii=False))
    return result


def choose(results: Sequence[dict[str, Any]]) -> int:
    """Number of the point to go on with: the highest accuracy, of equal ones the lowest loss. Refuses results of test."""
    if any(one["judged"] != "selection" for one in results):
        raise ValueError("hyper-parameters are chosen on the selection share of train alone")
    return min(range(len(results)), key=lambda i: (-results[i]["accuracy"], results[i]["loss"]))


def _row(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("lr", "weight_decay", "accuracy", "low", "high", "loss", "num_samples")}


# ------------------------------------------------------------------------------------------------------------ one point


def _train_and_judge(recipe: ProbeRecipe, restart: bool, shared: dict[str, Any]) -> dict[str, Any]:
    """One grid point as one run. `shared`: what the points of one grid have in common, filled by the first that needs it."""
    recipe = copy.deepcopy(recipe)  # its epochs become steps
    recipe.out = recipe.out or "runs/probe"
    with storage_errors(recipe.out):
        placement = Placement(recipe.train.strategy, recipe.precision)
        check_probe(recipe, placement)
        directory = open_run(recipe, placement, restart)
        try:
            if not directory.finished:
                material = shared.get("material") or shared.setdefault("material", Material(recipe, placement))
                fitted, judged = material.datasets(recipe, placement)
                optim = recipe.optim
                schedule = resolve_schedule(optim, len(fitted) / optim.batch_size)
                rebuild = partial(AttentiveProbe, material.encoder, len(material.splits.classes), recipe.encoder.batch_size)
                model = seeded(recipe.seed, rebuild)
                checkpoint.check_room(directory.checkpoints, model, schedule.steps, recipe.train, placement)
                compile_model(model.encoder, recipe.train.compile, placement)
                model, optimizer = placement.place(model, partial(make_optimizer, optim=optim, placement=placement))
                if fitted.features is not None:
                    recipe.train.num_workers = 0  # nothing is decoded: handing features over would cost more than taking them
                objective = ProbeObjective(material.encoder.config.patch_size, *material.statistics)
                train(
                    directory=directory, placement=placement, objective=objective, model=model, optimizer=optimizer,
                    micro_batches=lambda step: [fitted.microbatch(global_slice(step, optim.batch_size, placement.rank, placement.world))],
                    schedule=schedule, loop=recipe.train, fingerprint=material.fingerprint(recipe, fitted.pictures), compare=recipes.differences,
                    max_bad_fraction=recipe.data.max_bad_fraction, report=material.splits.report, what="probing",
                )
                verdict, samples = judge(objective, model, judged, placement)
                result = material.about(recipe, fitted, verdict)
                if placement.is_main:
                    write_atomically(directory.path / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
                directory.write_json("result.json", result)  # before `final/`: what is finished has a result
                publish(directory, placement, model, rebuild, partial(write_probe, result=result))
        finally:
            directory.close()
        result = json.loads((Path(recipe.out) / "result.json").read_text(encoding="utf-8"))
        if placement.is_main:
            say(f"probing: finished; accuracy {result['accuracy']:.1%} ({result['low']:.1%} to {result['high']:.1%}) on {result['num_samples']:,} "
                f"pictures of {result['judged']}; {recipe.out}/result.json")
        return result


def check_probe(recipe: ProbeRecipe, placement: Placement) -> None:
    """Raises UserError where keys do not go together, before anything is read."""
    if not recipe.encoder.path:
        raise UserError("encoder.path: name the encoder, e.g. encoder.path=runs/pretrain/final")
    check_batch(recipe.optim, placement)
    share = recipe.optim.batch_size // placement.world
    if recipe.optim.micro_batch_size < share:
        raise UserError(f"optim.micro_batch_size: the probe's batch norm sees all {recipe.optim.batch_size} rows of a step at once, so it cannot be "
                        f"accumulated; set it to {share} (encoder.batch_size bounds the memory of the frozen encoder)")
    if placement.strategy not in ("single", "ddp"):
        raise UserError(f"train.strategy: {placement.strategy}, but a probe's few weights are not sharded; use single or ddp")
    if recipe.encoder.cache == "on" and recipe.augment.policy != "none":
        raise UserError(f"encoder.cache: on, but augment.policy {recipe.augment.policy} shows every picture anew each time; set one to off or none")
    if not 0 < recipe.crop_fraction <= 1:
        raise UserError(f"crop_fraction: {recipe.crop_fraction:g} is no share of a picture's side")


class Material:
    """Encoder, pictures and cached features: what all points of a grid share."""

    def __init__(self, recipe: ProbeRecipe, placement: Placement):
        section = recipe.encoder
        self.splits = open_splits(recipe.data, recipe.seed)
        self.statistics = image_statistics(section.path)
        self.encoder = load_encoder(section.path, image_size=section.image_size, attention=section.attention)
        self.encoder_digest = digest_checkpoint(section.path)
        self.size = self.encoder.config.image_size
        self.transform = EvalTransform(self.size, int(self.size / recipe.crop_fraction))
        self.features = self._cached(recipe, placement)
        if placement.is_main:
            report = self.splits.report
            say(f"data: {report['train']:,} pictures to train and choose on, {report['test']:,} of test, {report['classes']} classes"
                + (f"; {len(report['duplicates_dropped_from_train'])} left out, test has them too" if report["duplicates_dropped_from_train"] else ""))

    def _cached(self, recipe: ProbeRecipe, placement: Placement) -> FrozenFeatures | None:
        """Every process holds all features in its memory; above `encoder.cache_limit_gb` they are computed at each use."""
        config, section = self.encoder.config, recipe.encoder
        if section.cache == "off" or recipe.augment.policy != "none":
            return None
        pictures = [*self.splits.train, *self.splits.test]
        shape, dtype = ((self.size // config.patch_size) ** 2, config.hidden_size), torch.float16 if recipe.cache_dtype == "fp16" else torch.float32
        gigabytes = len(pictures) * math.prod(shape) * dtype.itemsize / 1e9
        if gigabytes > section.cache_limit_gb:
            told = f"{len(pictures):,} pictures' features take {gigabytes:.1f} GB, above encoder.cache_limit_gb {section.cache_limit_gb:g}"
            if section.cache == "on":
                raise UserError(f"encoder.cache: on, but {told}; raise it, or set cache_dtype=fp16 or encoder.cache=auto")
            if placement.is_main:
                say(f"features are not cached: {told}")
            return None
        model = AttentiveProbe(self.encoder.to(placement.device), 2, section.batch_size)
        normalize = ProbeObjective(config.patch_size, *self.statistics).normalize

        def encode(pixels: torch.Tensor) -> torch.Tensor:
            with placement.autocast():
                return model.features(normalize(pixels.to(placement.device)))

        bar = Progress("encoding pictures", len(pictures), enabled=placement.is_main, unit="pictures")
        try:
            return FrozenFeatures.compute(pictures, self.transform, encode, shape, dtype, section.batch_size, bar.of)
        finally:
            bar.close()

    def datasets(self, recipe: ProbeRecipe, placement: Placement) -> tuple[LabelledDataset, LabelledDataset]:
        """(trained on, judged): all of train and test, or train without the selection share and that share."""
        on_test = recipe.data.judged == "test"
        pictures = (self.splits.train, self.splits.test) if on_test else (self.splits.fit, self.splits.selection)
        augmented = training_transform(recipe.augment, self.size, self.statistics[0])
        fitted, judged = (LabelledDataset(part, self.splits.classes, recipe.seed, self.transform, augmented, self.features) for part in pictures)
        return fitted, judged

    def fingerprint(self, recipe: ProbeRecipe, pictures: Sequence[Picture]) -> dict[str, Any]:
        """What the rows of a run depend on: seed, encoder, pictures by content and label."""
        content = hashlib.sha256("".join(f"{p.digest} {p.label}\n" for p in pictures).encode()).hexdigest()
        return {"seed": recipe.seed, "encoder": self.encoder_digest, "pictures": len(pictures), "content": content}

    def about(self, recipe: ProbeRecipe, fitted: LabelledDataset, verdict: dict[str, Any]) -> dict[str, Any]:
        """The whole result: what was trained on what, and the verdict."""
        splits = self.splits
        trained_on = class_counts(fitted.pictures, splits.classes)
        for name, count in trained_on.items():
            verdict["per_class"][name]["trained_on"] = count
        most_frequent = max(trained_on, key=lambda name: trained_on[name])
        return {
            "judged": recipe.data.judged, "lr": recipe.optim.lr, "weight_decay": recipe.optim.weight_decay, "steps": recipe.optim.steps,
            "batch_size": recipe.optim.batch_size, "seed": recipe.seed, "augment": recipe.augment.policy, "image_size": self.size,
            "cached_features": recipe.cache_dtype if self.features is not None else None,
            "encoder": recipe.encoder.path, "encoder_digest": self.encoder_digest, "num_heads": self.encoder.config.num_attention_heads,
            "data": recipe.data.path, "split_sizes": {"trained_on": len(fitted), "selection": len(splits.selection), "test": len(splits.test)},
            "duplicates_dropped_from_train": len(splits.report["duplicates_dropped_from_train"]),
            "most_frequent_class": verdict["per_class"][most_frequent]["num_samples"] / verdict["num_samples"],  # accuracy of always saying it
        } | verdict


# ------------------------------------------------------------------------------------------------------------ judgement


@torch.no_grad()
def judge(
    objective: ProbeObjective, model: torch.nn.Module, data: LabelledDataset, placement: Placement
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(accuracy over the rows of `data` that can be decoded, those rows one by one: name, label, right), with running statistics.

    The rows are shared over processes; every process returns all of them.
    """
    probe_model = placement.unwrap(model).eval()
    rows = range(placement.rank, len(data), placement.world)
    size = probe_model.batch_size
    outcome = torch.zeros(len(data), 3, dtype=torch.float64, device=placement.device)  # judged, right, cross-entropy
    bad = []
    bar = Progress("judging", len(rows), enabled=placement.is_main, unit="pictures")
    for start in range(0, len(rows), size):
        numbers = rows[start : start + size]
        batch = data.evaluation(numbers)
        with placement.autocast():
            logits = objective.logits(probe_model, batch, placement.device).float()
        labels, weights = batch["labels"].to(placement.device), batch["weights"].to(placement.device)
        entropies = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        outcome[list(numbers)] = (torch.stack([torch.ones_like(weights), logits.argmax(-1) == labels, entropies], 1) * weights[:, None]).double()
        bad += batch["bad"]
        bar.update(min(start + size, len(rows)))
    bar.close()
    judged, right, entropy = placement.sum_tensor(outcome).cpu().unbind(1)
    bad = placement.gather_strings(bad)
    num, correct = int(judged.sum()), int(right.sum())
    if not num:
        raise UserError(f"data.path: none of {len(data)} pictures to judge can be decoded (first: {bad[0]})")
    low, high = wilson_interval(correct, num)
    per_class = {name: [0, 0] for name in data.label_ids}
    samples = []
    for picture, was_judged, was_right in zip(data.pictures, judged.tolist(), right.tolist(), strict=True):
        per_class[picture.label][0] += int(was_judged)
        per_class[picture.label][1] += int(was_right)
        if was_judged:
            samples.append({"name": picture.name, "label": picture.label, "right": int(was_right)})
    verdict = {"accuracy": correct / num, "low": low, "high": high, "loss": float(entropy.sum()) / num, "num_samples": num, "num_correct": correct,
            "per_class": {name: {"num_samples": a, "num_correct": b} for name, (a, b) in per_class.items()}, "num_bad": len(bad), "bad": bad[:1000]}
    return verdict, samples


def wilson_interval(num_correct: int, num_samples: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    from scipy.stats import binomtest

    interval = binomtest(num_correct, num_samples).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


# ------------------------------------------------------------------------------------------------------------ the probe


def write_probe(folder: Path, model: AttentiveProbe, *, result: dict[str, Any]) -> None:
    """`probe.safetensors` (norm and head; the encoder stays where it is) and `probe.json` (classes, encoder, its size)."""
    state = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items() if not name.startswith("encoder.")}
    save_file(state, folder / "probe.safetensors")
    about = {key: result[key] for key in ("encoder", "encoder_digest", "image_size", "num_heads")} | {"classes": list(result["per_class"])}
    write_atomically(folder / "probe.json", json.dumps(about, indent=1, ensure_ascii=False))


def load_probe(folder: str | Path, encoder: str | None = None) -> tuple[AttentiveProbe, list[str]]:
    """(probe in evaluation mode, its classes) of a finished run's `final/`. `encoder`: where it lies now, if it was moved.

    Raises UserError where the encoder is another one than the probe was trained on.
    """
    try:
        about = json.loads((Path(folder) / "probe.json").read_text(encoding="utf-8"))
        path, digest, size, classes = (about[key] for key in ("encoder", "encoder_digest", "image_size", "classes"))
        state = load_file(Path(folder) / "probe.safetensors")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no probe there (probe.json and probe.safetensors): {error}") from None
    if digest_checkpoint(encoder or path) != digest:
        raise UserError(f"{encoder or path}: not the encoder that {folder} was trained on; name that one")
    model = AttentiveProbe(load_encoder(encoder or path, image_size=size), len(classes))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if not name.startswith("encoder.")]:
        raise UserError(f"{folder}: probe.safetensors holds {', '.join(sorted(state))}, which is not a probe's")
    return model.eval(), classes
