"""Entry points of training: `pretrain` and `sft` show a whole run each."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aimv2_vlm.config import PretrainRecipe, SftRecipe, UserError
from aimv2_vlm.data.captions import CaptionTokenizer, train_tokenizer
from aimv2_vlm.data.order import compare_fingerprints
from aimv2_vlm.data.pairs import PairDataset
from aimv2_vlm.models.encoder import build_encoder, load_encoder
from aimv2_vlm.models.pretraining import AIMv2ForPreTraining
from aimv2_vlm.train.directory import RunDirectory
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.loop import check_batch, global_slice, train, validate
from aimv2_vlm.train.metrics import Progress, say
from aimv2_vlm.train.objectives import AIMv2Objective, InstructionObjective
from aimv2_vlm.train.optim import build_optimizer, describe, parameter_groups

TOKENIZER_CAPTIONS = 200_000  # a tokenizer trained for a run sees at most this many captions


# ------------------------------------------------------------------------------------------------------------ pre-training


def pretrain(recipe: PretrainRecipe, restart: bool = False) -> Path:
    """Pre-train an encoder by `recipe` (paper section 2.1); returns the folder of the finished model (`final/`)."""
    placement = Placement(recipe.train.strategy, recipe.precision)
    directory = open_run(recipe, placement, restart)
    if not directory.finished:
        check_batch(recipe.optim, placement)
        tokenizer = caption_tokenizer(recipe, directory, placement)
        data, held_out = pair_datasets(recipe, tokenizer, directory, placement)
        torch.manual_seed(recipe.seed)
        model = build_pretraining_model(recipe, tokenizer.vocab_size)
        roles = model.parameter_roles()
        objective = AIMv2Objective(recipe.objective.pixel_weight, num_patches(recipe), recipe.image.mean, recipe.image.std)
        placed, optimizer = placement.place(model, partial(make_optimizer, recipe=recipe, roles=roles, placement=placement))
        train(
            directory=directory, placement=placement, objective=objective, model=placed, optimizer=optimizer,
            micro_batches=PairSteps(data, recipe, placement), optim=recipe.optim, loop=recipe.train,
            fingerprint=data.fingerprint(), compare=compare_fingerprints, changed=recipe.data.changed,
            max_bad_fraction=recipe.data.max_bad_fraction, report=data.report(), what="pre-training",
            validation=partial(validate_pairs, objective, placed, held_out, recipe, placement) if held_out else None,
        )
        publish(directory, placement, model, placed, partial(write_pretrained, recipe=recipe, tokenizer=tokenizer))
    return close_run(directory, placement, "pre-training")


def num_patches(recipe: PretrainRecipe) -> int:
    return (recipe.image.size // recipe.encoder.patch_size) ** 2


def caption_tokenizer(recipe: PretrainRecipe, directory: RunDirectory, placement: Placement) -> CaptionTokenizer:
    """The recipe's .model file, or one trained on the captions of the run's first samples (rank 0 trains)."""
    path = directory.path / "tokenizer.model"
    if placement.is_main and not path.exists():
        if recipe.text.tokenizer == "train":
            captions = PairDataset.captions(recipe.data.sources, TOKENIZER_CAPTIONS, recipe.seed, recipe.data.index_dir)
            train_tokenizer(captions, path, recipe.text.vocab_size, canonicalize_text=recipe.text.canonicalize)
        else:
            source = Path(recipe.text.tokenizer)
            if not source.is_file():
                raise UserError(f"text.tokenizer: {source}: no such sentencepiece .model file (or write `train`)")
            shutil.copyfile(source, path)
    placement.barrier()
    return CaptionTokenizer(path, recipe.text.context_length, recipe.text.canonicalize)


def pair_datasets(
    recipe: PretrainRecipe, tokenizer: CaptionTokenizer, directory: RunDirectory, placement: Placement
) -> tuple[PairDataset, PairDataset | None]:
    """Training pairs and, where the recipe names held-out shards, validation pairs. Rank 0 builds the indexes first."""
    def build(sources: list, seed: int) -> PairDataset:
        return PairDataset(sources, seed=seed, image=recipe.image, tokenizer=tokenizer, num_patches=num_patches(recipe),
                           index_dir=recipe.data.index_dir, window_shards=recipe.data.window_shards,
                           shuffle_captions=recipe.objective.shuffle_captions,
                           progress=placement.is_main)

    if not recipe.data.sources:
        raise UserError("data.sources: names no shards; give at least one source with a path")
    if not placement.is_main:
        placement.barrier()
    data = build(recipe.data.sources, recipe.seed)
    held_out = build(recipe.data.validation, 0) if recipe.data.validation else None
    if placement.is_main:
        placement.barrier()
        for line in data.summary():
            say(line)
    directory.write_json("data_report.json", data.report())
    return data, held_out


def build_pretraining_model(recipe: PretrainRecipe, vocab_size: int) -> AIMv2ForPreTraining:
    """Encoder (from its sizes or a checkpoint) and multimodal decoder with Apple's initialisation."""
    e, d = recipe.encoder, recipe.decoder
    if recipe.image.size % e.patch_size:
        raise UserError(f"image.size: {recipe.image.size} is not a multiple of encoder.patch_size {e.patch_size}")
    if e.path is not None:
        encoder = load_encoder(e.path, image_size=recipe.image.size, attention=e.attention)
    else:
        encoder = build_encoder(
            image_size=recipe.image.size, patch_size=e.patch_size, hidden_size=e.hidden_size, intermediate_size=e.intermediate_size,
            num_layers=e.num_layers, num_heads=e.num_heads, position_embedding=e.position_embedding, attention=e.attention,
        )
    return AIMv2ForPreTraining(
        encoder, decoder_hidden_size=d.hidden_size, decoder_intermediate_size=d.intermediate_size, decoder_num_layers=d.num_layers,
        decoder_num_heads=d.num_heads, vocab_size=vocab_size, context_length=recipe.text.context_length, attention=e.attention,
    )


def make_optimizer(model: torch.nn.Module, *, recipe: Any, roles: dict[str, str], placement: Placement,
                   lr_scales: dict[str, float] | None = None) -> torch.optim.Optimizer:
    groups = parameter_groups(model.named_parameters(), roles, recipe.optim, lr_scales or {})
    if placement.is_main:
        for line in describe(groups):
            say(line)
    return build_optimizer(groups, recipe.optim)


class PairSteps:
    """step -> this process's micro-batches of image-text pairs."""

    def __init__(self, data: PairDataset, recipe: PretrainRecipe, placement: Placement):
        self.data, self.optim = data, recipe.optim
        self.rank, self.world = placement.rank, placement.world

    def __call__(self, step: int) -> list[dict[str, Any]]:
        positions = global_slice(step, self.optim.batch_size, self)
        size = self.optim.micro_batch_size
        return [self.data.microbatch(positions[i : i + size]) for i in range(0, len(positions), size)]


def validate_pairs(objective: AIMv2Objective, model: torch.nn.Module, data: PairDataset, recipe: PretrainRecipe,
                   placement: Placement) -> dict[str, float]:
    """Held-out losses (centre crop, one stored prefix a sample), the samples shared over processes."""
    total, size = min(recipe.data.validation_samples, len(data)), recipe.optim.micro_batch_size
    mine = range(placement.rank, total, placement.world)
    batches = (data.validation(mine[i : i + size]) for i in range(0, len(mine), size))
    return validate(objective, model, batches, placement)


def write_pretrained(folder: Path, model: AIMv2ForPreTraining, *, recipe: PretrainRecipe, tokenizer: CaptionTokenizer) -> None:
    """`final/`: encoder + image processor for plain AutoModel; `final/pretraining/`: decoder, heads, tokenizer."""
    model.save_pretrained(folder, image_processor=image_processor(recipe), extra_files=[tokenizer.model_file])


def image_processor(recipe: PretrainRecipe) -> Any:
    """Resize and centre crop with the run's own mean and std: they belong to the checkpoint."""
    from transformers import CLIPImageProcessor

    size = recipe.image.size
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size},
                              image_mean=list(recipe.image.mean), image_std=list(recipe.image.std), resample=3)


# ------------------------------------------------------------------------------------------------------------ any run


def open_run(recipe: Any, placement: Placement, restart: bool) -> RunDirectory:
    """The run directory on every process; rank 0 holds the lock and refuses a changed recipe."""
    problem, directory = "", None
    try:
        directory = RunDirectory(recipe.out, recipe, restart, placement.is_main, placement.world)
    except UserError as error:
        problem = str(error)
    if placement.any(bool(problem)):
        raise UserError(problem or f"{recipe.out}: refused by the main process")
    return directory


def publish(directory: RunDirectory, placement: Placement, model: torch.nn.Module, placed: torch.nn.Module, write: Any) -> None:
    """Write `final/` from the trained weights of every process."""
    state = placement.full_state(placed)
    if placement.is_main:
        model.to("cpu").load_state_dict(state, strict=False, assign=True) if model is not placement.unwrap(placed) else None
        directory.publish(lambda folder: write(folder, model))
    placement.barrier()


def close_run(directory: RunDirectory, placement: Placement, what: str) -> Path:
    if placement.is_main:
        say(f"{what}: finished; the model is in {directory.final}")
    directory.close()
    return directory.final
