"""Recognition by an attentive probe on a frozen encoder (spec "Recognition probe"; Tables A2 and B1).

`probe` trains and judges one learning rate and weight decay; `best_of` chooses among a grid of them on a tenth of train. All points
of a grid learn at once from the same pictures, decoded, augmented and encoded once; each is what its separate run would be. Both go on
where they were stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aimv2_vlm import recipe as recipes
from aimv2_vlm.config import (
    FrozenEncoder,
    LabelledData,
    ProbedData,
    ProbedModel,
    ProbeRecipe,
    ProbeSettings,
    ProbingConfig,
    UserError,
)
from aimv2_vlm.data.labelled import (
    FrozenFeatures,
    LabelledDataset,
    Picture,
    class_counts,
    open_splits,
    read_split,
    training_transform,
)
from aimv2_vlm.data.native import WholePicture
from aimv2_vlm.data.transforms import EvalTransform
from aimv2_vlm.evaluation.cells import Cell, check_names, checkpoint_content, known_before, run_cells
from aimv2_vlm.evaluation.metrics import wilson_interval
from aimv2_vlm.evaluation.sweep import digest_checkpoint, mean_tokens
from aimv2_vlm.models.assistant import image_statistics
from aimv2_vlm.models.backbone import PROCESSOR_FILES, load_backbone
from aimv2_vlm.models.encoder import locate
from aimv2_vlm.models.probe import AttentiveProbe
from aimv2_vlm.train import checkpoint
from aimv2_vlm.train.directory import storage_errors, write_atomically
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.grid import GridAdamW, grid_points
from aimv2_vlm.train.loop import check_batch, global_slice, train
from aimv2_vlm.train.metrics import Progress, say
from aimv2_vlm.train.objectives import ProbeObjective, entropies
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
    recipe = copy.deepcopy(recipe)
    recipe.grid = []
    return _train_and_judge(recipe, restart, {})[0]


def best_of(
    recipe: ProbeRecipe, lrs: Sequence[float] = LEARNING_RATES, weight_decays: Sequence[float] = WEIGHT_DECAYS, restart: bool = False,
    best_on_test: bool = True,
) -> dict[str, Any]:
    """The grid of lrs x weight_decays: chosen on a tenth of train, trained anew on all of train, judged on test.

    Returns `selection` (accuracy of each point on that tenth), `selected` (`probe`'s result of the chosen point on test)
    and, with `best_on_test`, under this name the best of the whole grid on test: the paper's way, optimistic because test
    chose it. Two runs below `recipe.out` (`selection/`; `test_grid/`, or `test/` of the chosen point alone), each of all its
    points at once; the chosen point's pictures are in `<out>/samples.jsonl`, its probe in the second run's `final/`.
    """
    if not lrs or not weight_decays:
        raise UserError("best_of: give at least one learning rate and one weight decay")
    shared: dict[str, Any] = {}
    grid, root = [list(point) for point in itertools.product(lrs, weight_decays)], Path(recipe.out or "runs/probe")

    def run(folder: str, judged: str, points: list[list[float]], kept: int | None = None) -> list[dict[str, Any]]:
        all_at_once = copy.deepcopy(recipe)
        all_at_once.grid, all_at_once.data.judged, all_at_once.out = points, judged, str(root / folder)
        return _train_and_judge(all_at_once, restart, shared, kept)

    selection = run("selection", "selection", grid)
    chosen = choose(selection)
    place, points, number = ("test_grid", grid, chosen) if best_on_test else ("test", [grid[chosen]], 0)
    on_test = run(place, "test", points, number)
    result = {"selected": on_test[number], "selection": [_row(one) for one in selection], "test_evaluations": len(on_test)}
    if best_on_test:
        best = min(on_test, key=lambda one: (-one["accuracy"], one["loss"]))
        result |= {"best_on_test": _row(best), "on_test": [_row(one) for one in on_test]}
    if Placement.of(recipe).is_main:
        rows = map(json.loads, (root / place / "samples.jsonl").read_text(encoding="utf-8").splitlines())
        lines = [json.dumps(row | {"right": row["right"][number]}, ensure_ascii=False) + "\n" for row in rows]
        write_atomically(root / "samples.jsonl", "".join(lines))
        write_atomically(root / "result.json", json.dumps(result, indent=1, ensure_ascii=False))
    return result


def evaluate(config: ProbingConfig, restart: bool = False) -> int:
    """`aimv2-vlm eval` of a probing config: every model on every data set into `<out>/ledger.jsonl`; returns the exit status.

    `score` of a row is the test accuracy of the point that a tenth of train chose, `best_on_test` the paper's way.
    """
    placement = Placement.of(config)
    models, data_sets = check_names(config.models, config.data_sets, config.out)
    recipe_of = {}
    contents = {name: cache(partial(split_content, data, data.train, data.test)) for name, data in zip(data_sets, config.data_sets, strict=True)}
    for model_name, model in zip(models, config.models, strict=True):
        checkpoint_read = cache(partial(checkpoint_content, model.path))
        for set_name, data in zip(data_sets, config.data_sets, strict=True):
            recipe = _cell_recipe(config, model, data)
            settings = recipes.to_dict(recipe)
            for key in ("out", "train", "grid", "data_root", *(() if recipe.judge_native else ("judge_native",))):
                settings.pop(key)
            known = known_before(checkpoint_read, contents[set_name])
            if not isinstance(known, UserError):
                known = [*known, settings, config.lrs, config.weight_decays, config.best_on_test, placement.precision]
            recipe_of[Cell(model_name, set_name, known)] = recipe

    def run(cell: Cell) -> dict[str, Any]:
        recipe = recipe_of[cell]
        recipe.out = str(Path(config.out) / "runs" / cell.folder)
        return ledger_columns(best_of(recipe, config.lrs, config.weight_decays, restart, config.best_on_test), recipe, placement)

    with storage_errors(config.out):
        return run_cells(config.out, list(recipe_of), run, placement, "probing", restart)


def _cell_recipe(config: ProbingConfig, model: ProbedModel, data: ProbedData) -> ProbeRecipe:
    """The recipe that all points of a cell share."""
    def taken(cls: type, source: Any) -> Any:
        return cls(**{f.name: copy.deepcopy(getattr(source, f.name)) for f in dataclasses.fields(cls)})

    settings = {f.name: copy.deepcopy(getattr(config, f.name)) for f in dataclasses.fields(ProbeSettings)}
    parts = {"encoder": taken(FrozenEncoder, model), "data": taken(LabelledData, data)}
    recipe = ProbeRecipe(**settings, **parts, judge_native=model.judge_native, seed=config.seed, precision=config.precision)
    recipe.optim.batch_size = data.batch_size or recipe.optim.batch_size
    recipe.optim.micro_batch_size = 0  # the batch norm sees a step's rows at once
    recipe.warmup_epochs = recipe.warmup_epochs if data.warmup_epochs is None else data.warmup_epochs
    return recipe


def ledger_columns(result: dict[str, Any], recipe: ProbeRecipe, placement: Placement) -> dict[str, Any]:
    """A ledger row's columns from what `best_of` returned; shares in points."""
    chosen, best = result["selected"], result.get("best_on_test")
    return {
        "metric": "top-1", "split": recipe.data.test, "score": round(100 * chosen["accuracy"], 4),
        "interval": [round(100 * chosen[side], 4) for side in ("low", "high")], "num_questions": chosen["num_samples"],
        "num_errors": chosen["num_bad"], "complete": not chosen["num_bad"], "selection_score": round(100 * max(one["accuracy"] for one in result["selection"]), 4),
        "lr": chosen["lr"], "weight_decay": chosen["weight_decay"],
        "best_on_test": None if best is None else {"score": round(100 * best["accuracy"], 4), "lr": best["lr"], "weight_decay": best["weight_decay"]},
        "test_evaluations": result["test_evaluations"], "majority_score": round(100 * chosen["most_frequent_class"], 4),
        "model_path": recipe.encoder.path, "model_digest": chosen["encoder_digest"], "encoder_kind": chosen["encoder_kind"],
        "tokens_per_picture": chosen["num_tokens"], "tiling": None, "source_size": None, "data": recipe.data.path,
        **{key: chosen[key] for key in ("image_size", "judge_native", "features", "data_hash", "split_sizes", "differs_from_published", "duplicates_kept_in_train",
                                        "steps", "batch_size")},
        "augment": recipe.augment.policy, "seed": recipe.seed, "precision": placement.precision,
    }


def choose(results: Sequence[dict[str, Any]]) -> int:
    """Number of the point to go on with: the highest accuracy, of equal ones the lowest loss. Refuses results of test."""
    if any(one["judged"] != "selection" for one in results):
        raise ValueError("hyper-parameters are chosen on the selection share of train alone")
    return min(range(len(results)), key=lambda i: (-results[i]["accuracy"], results[i]["loss"]))


def _row(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("lr", "weight_decay", "accuracy", "low", "high", "loss", "num_samples")}


# ------------------------------------------------------------------------------------------------------------- one run


def _train_and_judge(recipe: ProbeRecipe, restart: bool, shared: dict[str, Any], kept: int | None = None) -> list[dict[str, Any]]:
    """One run: a result for its probe, or for each point of `recipe.grid`.

    `shared`: what runs on the same data have in common, filled by the first that needs it. `kept`: the point of a grid whose
    probe is written.
    """
    recipe = copy.deepcopy(recipe)  # its epochs become steps
    recipe.out = recipe.out or "runs/probe"
    with storage_errors(recipe.out):
        placement = Placement.of(recipe)
        check_probe(recipe, placement)
        with closing(open_run(recipe, placement, restart)) as directory:
            if not directory.finished:
                material = shared.get("material") or shared.setdefault("material", Material(recipe, placement))
                fitted, judged = material.datasets(recipe, placement)
                optim = recipe.optim
                if recipe.warmup_epochs is not None:
                    optim.warmup_steps = round(recipe.warmup_epochs * len(fitted) / optim.batch_size)
                schedule = resolve_schedule(optim, len(fitted) / optim.batch_size)
                points = grid_points(optim, recipe.grid)
                rebuild = partial(AttentiveProbe, material.encoder, len(material.splits.classes), recipe.encoder.batch_size, len(points) or None)
                model = seeded(recipe.seed, rebuild)
                checkpoint.check_room(directory.checkpoints, model, schedule.steps, recipe.train, placement)
                compile_model(model.encoder, recipe.train.compile, placement)
                model, optimizer = placement.place(model, partial(probe_optimizer, optim=optim, points=points, placement=placement))
                if fitted.features is not None:
                    recipe.train.num_workers = 0  # nothing is decoded: handing features over would cost more than taking them
                objective = ProbeObjective(material.encoder.patch_size, *material.statistics, [f"lr_{o.lr:g}_wd_{o.weight_decay:g}" for o in points])
                train(
                    directory=directory, placement=placement, objective=objective, model=model, optimizer=optimizer,
                    micro_batches=lambda step: [fitted.microbatch(global_slice(step, optim.batch_size, placement.rank, placement.world))],
                    schedule=schedule, loop=recipe.train, fingerprint=material.fingerprint(recipe, fitted.pictures), compare=recipes.differences,
                    max_bad_fraction=recipe.data.max_bad_fraction, report=material.splits.report, what="probing",
                )
                verdicts, samples = judge(objective, model, judged, placement)
                results = [material.about(recipe, fitted, verdict, one) for verdict, one in zip(verdicts, points or [optim], strict=True)]
                if placement.is_main:
                    write_atomically(directory.path / "samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
                # before `final/`: what is finished has a result
                directory.write_json("result.json", {"points": results} if points else results[0])
                publish(directory, placement, model, rebuild, partial(write_probe, results=results, kept=kept))
        found = json.loads((Path(recipe.out) / "result.json").read_text(encoding="utf-8"))
        results = found["points"] if recipe.grid else [found]
        if Path(recipe.encoder.path).expanduser().is_dir() and results[0]["encoder_digest"] != (now := digest_checkpoint(recipe.encoder.path)):
            raise UserError(f"{recipe.out}: finished with other weights of {recipe.encoder.path} ({results[0]['encoder_digest']} -> {now}); bring them "
                            "back, choose another out=, or begin anew with --restart")
        if placement.is_main:
            best = max(results, key=lambda one: one["accuracy"])
            of = f" (best of {len(results)})" if len(results) > 1 else ""
            say(f"probing: finished; accuracy {best['accuracy']:.1%} ({best['low']:.1%} to {best['high']:.1%}){of} on {best['num_samples']:,} "
                f"pictures of {best['judged']}; {recipe.out}/result.json")
        return results


def probe_optimizer(model: torch.nn.Module, *, optim: Any, points: list[Any], placement: Placement) -> torch.optim.Optimizer:
    """AdamW of the head, or of all points' heads at once."""
    if not points:
        return make_optimizer(model, optim=optim, placement=placement)
    if placement.is_main:
        say(f"optimizer: a grid of {len(points)} probes at once, {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters")
    return GridAdamW([p for p in model.parameters() if p.requires_grad], points)


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
    if recipe.optim.states != "fp32":
        raise UserError(f"optim.states: {recipe.optim.states}, but a probe's few weights keep exact moments; remove the key")
    if any(len(point) != 2 for point in recipe.grid):
        raise UserError("grid: every point is a pair of lr and weight_decay, e.g. [[1e-3, 0.05], [1e-3, 0.1]]")
    if recipe.encoder.cache == "on" and recipe.augment.policy != "none":
        raise UserError(f"encoder.cache: on, but augment.policy {recipe.augment.policy} shows every picture anew each time; set one to off or none")


class Material:
    """Encoder, pictures and cached features: what all points of a grid share."""

    def __init__(self, recipe: ProbeRecipe, placement: Placement):
        section = recipe.encoder
        self.splits = open_splits(recipe.data, recipe.seed)
        self.statistics = image_statistics(locate(section.path, also=PROCESSOR_FILES))
        self.encoder = load_backbone(section.path, section.kind, section.image_size, section.attention, section.layer, section.tokens)
        self.encoder_digest = digest_checkpoint(section.path)
        self.size = self.encoder.image_size
        self.transform = EvalTransform(self.size, int(self.size / recipe.crop_fraction))
        self.judged_as = WholePicture(self.encoder.patch_size) if recipe.judge_native else self.transform
        if recipe.judge_native and not getattr(self.encoder.model.config, "is_native", False):
            raise UserError(f"judge_native: {section.path} has positions for one size of pictures; name an encoder of the native-resolution stage, or leave it out")
        self.features = self._cached(recipe, placement)
        if placement.is_main:
            report = self.splits.report
            say(f"data: {report['train']:,} pictures to train and choose on, {report['test']:,} of test, {report['classes']} classes"
                + (f"; {len(report['duplicates_dropped_from_train'])} left out, test has them too" if report["duplicates_dropped_from_train"] else "")
                + (f"; the split differs from the published one: {report['differs_from_published']}" if report["differs_from_published"] else ""))

    def _cached(self, recipe: ProbeRecipe, placement: Placement) -> FrozenFeatures | None:
        """Every process holds all features in its memory; above `encoder.cache_limit_gb` they are computed at each use."""
        encoder, section = self.encoder, recipe.encoder
        if section.cache == "off" or recipe.augment.policy != "none":
            return None
        pictures = [*self.splits.train, *([] if recipe.judge_native else self.splits.test)]
        shape, dtype = (encoder.num_tokens, encoder.width), torch.float16 if recipe.cache_dtype == "fp16" else torch.float32
        gigabytes = len(pictures) * math.prod(shape) * dtype.itemsize / 1e9
        if gigabytes > section.cache_limit_gb:
            told = f"{len(pictures):,} pictures' features take {gigabytes:.1f} GB, above encoder.cache_limit_gb {section.cache_limit_gb:g}"
            if section.cache == "on":
                raise UserError(f"encoder.cache: on, but {told}; raise it, or set cache_dtype=fp16 or encoder.cache=auto")
            if placement.is_main:
                say(f"features are not cached: {told}")
            return None
        model = AttentiveProbe(encoder.to(placement.device), 2, section.batch_size)
        normalize = ProbeObjective(encoder.patch_size, *self.statistics).normalize

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
        fitted = LabelledDataset(pictures[0], self.splits.classes, recipe.seed, self.transform, augmented, self.features)
        features = None if recipe.judge_native else self.features
        return fitted, LabelledDataset(pictures[1], self.splits.classes, recipe.seed, self.judged_as, features=features)

    def fingerprint(self, recipe: ProbeRecipe, pictures: Sequence[Picture]) -> dict[str, Any]:
        """What the rows of a run depend on: seed, encoder, pictures by content and label."""
        return {"seed": recipe.seed, "encoder": self.encoder_digest, "pictures": len(pictures), "content": content_hash(pictures)}

    def about(self, recipe: ProbeRecipe, fitted: LabelledDataset, verdict: dict[str, Any], optim: Any) -> dict[str, Any]:
        """The whole result of one point: what was trained on what, by which `optim`, and the verdict."""
        splits, encoder = self.splits, self.encoder
        trained_on = class_counts(fitted.pictures, splits.classes)
        for name, count in trained_on.items():
            verdict["per_class"][name]["trained_on"] = count
        most_frequent = max(trained_on, key=lambda name: trained_on[name])
        return {
            "judged": recipe.data.judged, "lr": optim.lr, "weight_decay": optim.weight_decay, "steps": optim.steps, "batch_size": optim.batch_size,
            "seed": recipe.seed, "augment": recipe.augment.policy, "image_size": self.size, "judge_native": recipe.judge_native,
            "cached_features": recipe.cache_dtype if self.features is not None else None,
            "encoder": recipe.encoder.path, "encoder_digest": self.encoder_digest, "encoder_kind": encoder.kind, "layer": recipe.encoder.layer,
            "tokens": recipe.encoder.tokens, "features": encoder.says + "; judged at each picture's own size" * recipe.judge_native, "num_heads": encoder.num_heads,
            "data": recipe.data.path, "data_hash": content_hash([*splits.train, *splits.test]),
            "split_sizes": {"trained_on": len(fitted), "selection": len(splits.selection), "test": len(splits.test)},
            "duplicates_dropped_from_train": len(splits.report["duplicates_dropped_from_train"]),
            "duplicates_kept_in_train": splits.report["duplicates_kept_in_train"], "differs_from_published": splits.report["differs_from_published"],
            "most_frequent_class": verdict["per_class"][most_frequent]["num_samples"] / verdict["num_samples"],  # accuracy of always saying it
        } | verdict


def content_hash(pictures: Sequence[Picture]) -> str:
    """Of pictures by content and label, in their order."""
    return hashlib.sha256("".join(f"{p.digest} {p.label}\n" for p in pictures).encode()).hexdigest()


def split_content(data: LabelledData, *splits: str) -> str:
    """`content_hash` of these splits as they lie there now: what is in a ledger is of the same pictures and labels, or runs again."""
    return content_hash([picture for split in splits for picture in read_split(data, split)])


# ------------------------------------------------------------------------------------------------------------ judgement


@torch.no_grad()
def judge(
    objective: ProbeObjective, model: torch.nn.Module, data: LabelledDataset, placement: Placement
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a verdict for the probe, or for each of a grid: accuracy over the rows of `data` that can be decoded, with running statistics;
    those rows one by one: name, label, right, of a grid a list).

    The rows are shared over processes; every process returns all of them.
    """
    probe_model = placement.unwrap(model).eval()
    rows = range(placement.rank, len(data), placement.world)
    size, probes = probe_model.batch_size, max(1, len(objective.points))
    outcome = torch.zeros(len(data), probes, 3, dtype=torch.float64, device=placement.device)  # judged, right, cross-entropy
    num_tokens, bad = torch.zeros(len(data), dtype=torch.float64, device=placement.device), []
    bar = Progress("judging", len(rows), enabled=placement.is_main, unit="pictures")
    for start in range(0, len(rows), size):
        for numbers, batch in data.evaluations(rows[start : start + size]):
            with placement.autocast():
                logits = objective.logits(probe_model, batch, placement.device).float()
            labels, weights = batch["labels"].to(placement.device), batch["weights"].to(placement.device)
            found = torch.stack([torch.ones_like(logits[..., 0]), logits.argmax(-1) == labels, entropies(logits, labels)], -1) * weights[:, None]
            outcome[numbers] = found.view(probes, len(numbers), 3).transpose(0, 1).double()
            num_tokens[numbers] = batch["weights"].double().to(placement.device) * objective.num_tokens(probe_model, batch)
            bad += batch["bad"]
        bar.update(min(start + size, len(rows)))
    bar.close()
    outcome, num_tokens = placement.sum_tensor(outcome).cpu(), placement.sum_tensor(num_tokens).cpu()
    bad = placement.gather_strings(bad)
    was_judged = outcome[:, 0, 0] > 0
    if not was_judged.any():
        raise UserError(f"data.path: none of {len(data)} pictures to judge can be decoded (first: {bad[0]})")
    about = {"num_tokens": mean_tokens(num_tokens[was_judged].tolist())}
    verdicts = [_verdict(data, was_judged, one[:, 1].int(), float(one[:, 2].sum()), bad) | about for one in outcome.unbind(1)]
    right = outcome[:, :, 1].int().tolist()
    samples = [{"name": data.pictures[i].name, "label": data.pictures[i].label, "right": right[i] if objective.points else right[i][0]}
               for i in was_judged.nonzero().flatten().tolist()]
    return verdicts, samples


def _verdict(data: LabelledDataset, was_judged: torch.Tensor, right: torch.Tensor, entropy: float, bad: list[str]) -> dict[str, Any]:
    num, correct = int(was_judged.sum()), int(right.sum())
    low, high = wilson_interval(correct, num)
    per_class = {name: {"num_samples": 0, "num_correct": 0} for name in data.label_ids}
    for picture, judged, was_right in zip(data.pictures, was_judged.tolist(), right.tolist(), strict=True):
        per_class[picture.label]["num_samples"] += int(judged)
        per_class[picture.label]["num_correct"] += was_right
    return {"accuracy": correct / num, "low": low, "high": high, "loss": entropy / num, "num_samples": num, "num_correct": correct,
            "per_class": per_class, "num_bad": len(bad), "bad": bad[:1000]}


# ------------------------------------------------------------------------------------------------------------ the probe


def write_probe(folder: Path, model: AttentiveProbe, *, results: list[dict[str, Any]], kept: int | None = None) -> None:
    """`probe.safetensors` (norm and head; the encoder stays where it is) and `probe.json` (classes, encoder, how it is read).

    Of a grid the probe of point `kept`, or nothing but the points."""
    if len(results) > 1 and kept is None:
        write_atomically(folder / "points.json", json.dumps([_row(one) for one in results], indent=1))
        return
    result = results[kept or 0]
    save_file(model.probe_state(kept), folder / "probe.safetensors")
    about = {key: result[key] for key in ("encoder", "encoder_digest", "encoder_kind", "layer", "tokens", "image_size", "num_heads")}
    write_atomically(folder / "probe.json", json.dumps(about | {"classes": list(result["per_class"])}, indent=1, ensure_ascii=False))


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
    backbone = load_backbone(encoder or path, about.get("encoder_kind", "auto"), size, layer=about.get("layer"), tokens=about.get("tokens", "all"))
    model = AttentiveProbe(backbone, len(classes))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if not name.startswith("encoder.")]:
        raise UserError(f"{folder}: probe.safetensors holds {', '.join(sorted(state))}, which is not a probe's")
    return model.eval(), classes
