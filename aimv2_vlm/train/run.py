"""Entry points of training: `pretrain` and `sft` show a whole run each."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch

from aimv2_vlm import recipe as recipes
from aimv2_vlm.config import Optimizer, PairData, PairSource, PretrainRecipe, SftRecipe, UserError
from aimv2_vlm.data.captions import CaptionTokenizer, ClipTokenizer, train_clip_tokenizer, train_tokenizer
from aimv2_vlm.data.chat import ChatFormat, train_chat_tokenizer
from aimv2_vlm.data.collate import FeatureCache, InstructionDataset
from aimv2_vlm.data.conversations import ConversationSet, check_bad_fraction
from aimv2_vlm.data.native import STRATA, NativePairs
from aimv2_vlm.data.order import Order, compact_fingerprint, compare_fingerprints
from aimv2_vlm.data.packing import pack_rows
from aimv2_vlm.data.pairs import PairDataset
from aimv2_vlm.data.remote import ShardCache, is_url
from aimv2_vlm.data.shards import PACK_REPORT, atomic_file, default_cache_dir, pack_once
from aimv2_vlm.data.tiling import Tiling
from aimv2_vlm.models import adapters
from aimv2_vlm.models.assistant import (
    AssistantForTraining, build_assistant, check_context, check_rows_apart, encode_views, image_statistics, part_of, set_trainable,
)
from aimv2_vlm.models.contrastive import TwoTowerForPreTraining
from aimv2_vlm.models.backbone import load_backbone
from aimv2_vlm.models.checkpoints import weights_digest
from aimv2_vlm.models.encoder import build_encoder, load_encoder
from aimv2_vlm.models.genlip import GenLIPForPreTraining
from aimv2_vlm.models.llava_format import connector_place, load_connector
from aimv2_vlm.models.pretraining import AIMv2ForPreTraining
from aimv2_vlm.train import card, checkpoint, memory
from aimv2_vlm.train.directory import RunDirectory, changed_keys, storage_errors
from aimv2_vlm.train.distributed import Placement, blocks, lost_processes
from aimv2_vlm.train.loop import check_batch, check_shared_memory, global_slice, train, validate
from aimv2_vlm.train.metrics import Progress, say
from aimv2_vlm.train.objectives import ContrastiveObjective, GenerativeObjective, InstructionObjective, TrainingObjective
from aimv2_vlm.train.optim import Schedule, build_optimizer, describe, parameter_groups
from aimv2_vlm.train.precision import convert_to_fp8

CAPTION_TOKENIZER, CLIP_TOKENIZER = "tokenizer.model", "clip_tokenizer"  # in the run directory
TOKENIZER_TEXTS = 200_000  # a tokenizer trained for a run sees at most this many texts


def told_in_one_line(entry: Callable[..., Path]) -> Callable[..., Path]:
    """A training entry whose disk troubles, and those of another of its processes, are UserErrors of one line."""
    @wraps(entry)
    def guarded(recipe: Any, restart: bool = False) -> Path:
        with storage_errors(recipe.out), lost_processes():
            return entry(recipe, restart)

    return guarded


# ------------------------------------------------------------------------------------------------------------ pre-training


@told_in_one_line
def pretrain(recipe: PretrainRecipe, restart: bool = False) -> Path:
    """Pre-train an encoder by `recipe` (paper section 2.1); returns the folder of the finished model (`final/`)."""
    check_pretraining(recipe)
    placement = Placement.of(recipe)
    check_states(recipe.optim, placement)
    with closing(open_run(recipe, placement, restart)) as directory:
        if not directory.finished:
            trunk = cooldown_run(recipe)
            tokenizer, data, held_out = pair_data(recipe, directory, placement, trunk)
            check_decoder_tokenizer(recipe, directory)
            steps = NativeSteps(recipe, data, placement) if recipe.image.native.capacity else PairSteps(recipe, data, placement)
            check_shared_memory(steps.bytes, recipe.train.num_workers)
            schedule = resolve_schedule(recipe.optim, data.epoch_positions / steps.samples)
            rebuild = partial(build_pretraining_model, recipe, tokenizer.vocab_size, tokenizer.eos_id)
            model = seeded(recipe.seed, rebuild)
            checkpoint.check_room(directory.checkpoints, model, schedule.steps, recipe.train, placement)
            objective = pretraining_objective(recipe)
            if recipe.precision == "fp8":
                layers = convert_to_fp8(model)
                if placement.is_main:
                    emulated = "" if placement.device.type == "cuda" else "; emulated on this CPU, and slower than fp32"
                    uncompiled = "" if recipe.train.compile else "; train.compile=true is what makes it faster"
                    say(f"fp8: {layers} linear layers of the blocks, the rest in bf16{emulated or uncompiled}")
            compile_model(model, recipe.train.compile, placement)
            model, optimizer = placement.place(model, partial(make_optimizer, optim=schedule.optim, placement=placement, roles=model.parameter_roles()))
            facts = data.fingerprint()
            if recipe.objective.name == "lit" and recipe.encoder.path is not None:  # what does not learn stands in no checkpoint
                facts["frozen"] = weights_digest(recipe.encoder.path)
            goes_on_from = directory.path if trunk is None or any(directory.checkpoints.glob("step_*")) else trunk
            train(
                directory=directory, placement=placement, objective=objective, model=model, optimizer=optimizer,
                micro_batches=steps, schedule=schedule, loop=recipe.train,
                fingerprint=compact_fingerprint(facts, directory.path, write=placement.is_main),
                # every process has the new shards at hand; only the old ones are looked up
                compare=lambda old, _: compare_pairs(old, facts, goes_on_from), changed=recipe.data.changed, max_bad_fraction=recipe.data.max_bad_fraction,
                report=pair_report(recipe, data), what="pre-training",
                validation=partial(validate_pairs, objective, model, held_out, recipe, placement) if held_out else None,
            )
            publish(directory, placement, model, rebuild, partial(write_pretrained, recipe=recipe))
        return say_finished(directory, placement, "pre-training")


def compare_pairs(old: dict[str, Any], new: dict[str, Any], folder: Path) -> list[str]:
    """`compare_fingerprints`. Raises UserError where the encoder that a text tower is tuned to is another one (an older checkpoint does not say)."""
    before, now = (facts.get("frozen") for facts in (old, new))
    if before not in (None, now):
        raise UserError(f"encoder.path: its weights are not those that this run began with ({before} -> {now}); bring them back, or begin anew with --restart")
    return compare_fingerprints(*({key: value for key, value in facts.items() if key != "frozen"} for facts in (old, new)), folder)


def cooldown_run(recipe: PretrainRecipe) -> Path | None:
    """The run that a cooldown goes on from. Raises UserError where its model, text or pictures are not the recipe's."""
    path = recipe.optim.cooldown.checkpoint
    if path is None:
        return None
    run = Path(path).resolve().parent.parent
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"optim.cooldown.checkpoint: {path}: no {run / 'recipe.yaml'}, which says what was trained; name a checkpoint where its run left it")
    changed = [line for line in changed_keys(run / "recipe.yaml", recipe)
               if line.startswith(("image.", "text.", "encoder.", "decoder.", "objective.")) and not line.startswith("text.tokenizer:")]
    if changed:
        raise UserError(f"optim.cooldown.checkpoint: {run} was trained by another recipe ({'; '.join(changed)}); take its values")
    return run


CONTRASTIVE = ("clip", "lit")


def check_pretraining(recipe: PretrainRecipe) -> None:
    """Raises UserError where keys of the recipe do not go together, before anything is read or built."""
    o, native = recipe.objective, recipe.image.native.capacity is not None
    num_patches(recipe)
    for key, value, low in (("parallel_fraction", o.parallel_fraction, 0.0), ("caption_patches", o.caption_patches, 0.0)):
        if not low <= value <= 1 or (key == "caption_patches" and value == 0):
            raise UserError(f"objective.{key}: {value:g} is no share; give a number up to 1")
    if o.caption_patches < 1 and o.name != "captioning":
        raise UserError(f"objective.caption_patches: {o.caption_patches:g} goes with captioning alone (patches are predicted from all patches "
                        f"before them); objective.name is {o.name}")
    if o.attention == "bidirectional" and o.name in ("aimv2", "aimv1"):
        raise UserError(f"objective.attention: bidirectional leaves no patch to predict, but objective.name is {o.name}; write prefix")
    if o.decoders == "separate" and o.name != "aimv2":
        raise UserError(f"objective.decoders: separate needs pixels and text, but objective.name is {o.name}")
    if native and o.name in (*CONTRASTIVE, "genlip"):
        raise UserError(f"image.native.capacity: pictures of several sizes go with the decoder's objectives, not with {o.name}")
    if native and recipe.encoder.path is None and recipe.encoder.position_embedding != "sincos":
        raise UserError("image.native.capacity: needs encoder.position_embedding: sincos (learned positions have one size)")
    if o.name == "lit" and recipe.encoder.path is None:
        raise UserError("encoder.path: lit tunes a text tower to a trained encoder; name it")
    if recipe.decoder.path is not None and o.name in (*CONTRASTIVE, "genlip"):
        raise UserError(f"decoder.path: {o.name} has no decoder; remove the key")
    if o.name in CONTRASTIVE and recipe.text.context_length < 3:
        raise UserError(f"text.context_length: {recipe.text.context_length} tokens hold no word between begin and end")


def num_patches(recipe: PretrainRecipe) -> int:
    if recipe.image.size % recipe.encoder.patch_size:
        raise UserError(f"image.size: {recipe.image.size} is not a multiple of encoder.patch_size {recipe.encoder.patch_size}")
    return (recipe.image.size // recipe.encoder.patch_size) ** 2


def pair_data(
    recipe: PretrainRecipe, directory: RunDirectory, placement: Placement, trunk: Path | None = None
) -> tuple[CaptionTokenizer | ClipTokenizer, PairDataset, PairDataset | None]:
    """Tokenizer, training pairs and, where the recipe names held-out shards, validation pairs. Rank 0 indexes first. `trunk`: the run whose weights, and
    so whose tokenizer, this one goes on with."""
    if not recipe.data.sources:
        raise UserError("data.sources: names no shards; give at least one source with a path")
    dataset = partial(pair_set, recipe, shows_progress=placement.is_main)

    def build() -> tuple[CaptionTokenizer | ClipTokenizer, PairDataset, PairDataset | None]:
        pack_sources(recipe.data)
        contrastive = recipe.objective.name in CONTRASTIVE
        path = directory.path / (CLIP_TOKENIZER if contrastive else CAPTION_TOKENIZER)
        if placement.is_main and not path.exists():
            if trunk is not None and recipe.text.tokenizer == "train":
                copy_tokenizer(trunk / path.name, path)
            else:
                make = make_clip_tokenizer if contrastive else make_caption_tokenizer
                make(recipe, path, lambda: dataset(recipe.data.sources, None, 0).texts(TOKENIZER_TEXTS))  # the same for every seed
        if trunk is not None and _contents(path) != _contents(trunk / path.name):
            raise UserError(f"text.tokenizer: is not {trunk / path.name}, whose ids the weights of optim.cooldown.checkpoint know; `train` takes that one")
        tokenizer = (ClipTokenizer if contrastive else CaptionTokenizer)(path, recipe.text.context_length, recipe.text.canonicalize)
        held_out = dataset(recipe.data.validation, tokenizer, 0) if recipe.data.validation else None
        return tokenizer, dataset(recipe.data.sources, tokenizer, recipe.seed), held_out

    tokenizer, data, held_out = placement.main_first(build)
    directory.write_json("data_report.json", pair_report(recipe, data))
    total = data.num_samples + data.num_bad
    if placement.is_main:
        say(f"data: {data.num_samples:,} samples in {sum(len(s.paths) for s in data.shards):,} shards, {data.num_bad:,} bad ones left out")
    if data.num_bad > recipe.data.max_bad_fraction * total:
        raise UserError(f"data.sources: {data.num_bad} of {total} samples are bad, above max_bad_fraction {recipe.data.max_bad_fraction:g} "
                        f"(first: {data.bad_samples(1)[0]}); see data_report.json")
    return tokenizer, data, held_out


def pair_set(recipe: PretrainRecipe, sources: Sequence[PairSource], tokenizer: CaptionTokenizer | ClipTokenizer | None, seed: int,
             shows_progress: bool = True) -> PairDataset:
    """`sources` as the recipe reads them; shards without an index get one. tokenizer: None where only texts are read."""
    bar = Progress("indexing shards", 1, enabled=shows_progress, unit="shards")
    return PairDataset(
        sources, seed, recipe.image, tokenizer, num_patches(recipe), cache_dir=recipe.data.index_dir,
        window_shards=recipe.data.window_shards, shuffle_captions=recipe.objective.shuffle_captions, progress=bar.of,
        shard_cache=ShardCache(Path(recipe.data.shard_cache or default_cache_dir().parent / "shards"), int(recipe.data.shard_cache_gb * 2**30)),
    )


def pack_sources(data: PairData) -> None:
    """Shards of the sources that name a folder of pictures, made the first time. Raises UserError where those there are of something else, or too many
    rows could not be packed."""
    for source in packed_sources(data):
        if not isinstance(source.path, str) or is_url(source.path):
            raise UserError(f"data source '{source.name}': pack makes the shards of one local folder, but path is {source.path!r}; write FOLDER/*.tar")
        assert source.pack is not None
        folder = packed_folder(source)
        if not (folder / PACK_REPORT).exists():
            say(f"packing {source.pack.folder} into {folder}")
        report = pack_once(source.pack.folder, source.pack.captions, folder, source.pack.where)
        rows = report["num_written"] + report["num_bad"]
        if report["num_bad"] > data.max_bad_fraction * rows:
            first = report["bad"][0]
            raise UserError(f"{folder / PACK_REPORT}: {report['num_bad']:,} of {rows:,} rows could not be packed, above data.max_bad_fraction "
                            f"{data.max_bad_fraction:g} (first: {first['row']}: {first['image']}: {first['reason']}); mend them and remove {folder}")


def packed_sources(data: PairData) -> list[PairSource]:
    return [source for source in (*data.sources, *data.validation) if source.pack is not None]


def packed_folder(source: PairSource) -> Path:
    """Where the shards of `path` stand: FOLDER/*.tar, or FOLDER."""
    path = Path(str(source.path))
    return path.parent if "*" in path.name or path.suffix == ".tar" else path


def make_caption_tokenizer(recipe: PretrainRecipe, path: Path, captions: Callable[[], Any]) -> None:
    """The recipe's .model file, or one trained on the run's own captions."""
    if recipe.text.tokenizer == "train":
        train_tokenizer(captions(), path, recipe.text.vocab_size, canonicalize=recipe.text.canonicalize)
        return
    source = Path(recipe.text.tokenizer)
    if not source.is_file():
        raise UserError(f"text.tokenizer: {source}: no such sentencepiece .model file (or write `train`)")
    with atomic_file(path) as file:
        file.write(source.read_bytes())


def make_clip_tokenizer(recipe: PretrainRecipe, path: Path, captions: Callable[[], Any]) -> None:
    """The recipe's folder with CLIP's tokenizer, or one trained on the run's own captions."""
    with fresh_folder(path) as temporary:
        if recipe.text.tokenizer == "train":
            train_clip_tokenizer(captions(), temporary, recipe.text.vocab_size, recipe.text.canonicalize)
        else:
            ClipTokenizer(recipe.text.tokenizer, recipe.text.context_length).stock.save_pretrained(temporary)


def copy_tokenizer(source: Path, path: Path) -> None:
    """Another run's tokenizer, a file or a folder."""
    if not source.exists():
        raise UserError(f"{source}: is not there, but optim.cooldown.checkpoint goes on with its ids; bring it back")
    if source.is_dir():
        with fresh_folder(path) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
        return
    with atomic_file(path) as file:
        file.write(source.read_bytes())


def _contents(path: Path) -> dict[str, bytes]:
    """Name and bytes of a file, or of the files of a folder."""
    return {file.name: file.read_bytes() for file in ([path] if path.is_file() else sorted(path.glob("*")))}


def pair_report(recipe: PretrainRecipe, data: PairDataset) -> dict[str, Any]:
    """What a run's `data_report.json` says of its shards, and what packing left out of them, by source."""
    left_out = {}
    for source in packed_sources(recipe.data):
        path = packed_folder(source) / PACK_REPORT
        report = json.loads(path.read_text(encoding="utf-8"))
        left_out[source.name or str(source.path)] = {"rows": report["num_bad"], "reasons": report["bad_reasons"], "named_in": str(path)}
    return {"samples": data.num_samples, "bad_samples_in_index": data.num_bad, "named_in_index": data.bad_samples(1000)} | (
        {"left_out_by_packing": left_out} if left_out else {})


def build_pretraining_model(recipe: PretrainRecipe, vocab_size: int, eos_id: int = 1) -> torch.nn.Module:
    """Encoder (from its sizes or a checkpoint) and what the objective puts on it, with Apple's initialisation.

    `decoder.path`: decoder and heads go on from a pre-training checkpoint.
    """
    e, d, o = recipe.encoder, recipe.decoder, recipe.objective
    if e.path is not None:
        encoder = load_encoder(e.path, image_size=recipe.image.size, attention=e.attention)
        check_encoder(recipe, encoder.config)
        if recipe.image.native.capacity is not None and not encoder.config.is_native:
            raise UserError(f"encoder.path: {e.path} has learned positions of one size; image.native needs a native (sin-cos) encoder")
    else:
        encoder = build_encoder(
            image_size=recipe.image.size, patch_size=e.patch_size, hidden_size=e.hidden_size, intermediate_size=e.intermediate_size,
            num_layers=e.num_layers, num_heads=e.num_heads, position_embedding=e.position_embedding, attention=e.attention,
        )
    text = {"vocab_size": vocab_size, "context_length": recipe.text.context_length}
    if o.name in CONTRASTIVE:
        return TwoTowerForPreTraining(encoder, o.text_tower, **text, eos_token_id=eos_id, freeze_encoder=o.name == "lit")
    if o.name == "genlip":
        return GenLIPForPreTraining(encoder, **text)
    model = AIMv2ForPreTraining(
        encoder, decoder_hidden_size=d.hidden_size, decoder_intermediate_size=d.intermediate_size, decoder_num_layers=d.num_layers,
        decoder_num_heads=d.num_heads, **text, predicts_patches=o.name in ("aimv2", "aimv1"), predicts_text=o.name != "aimv1",
        separate_decoders=o.decoders == "separate", parallel_captions=o.name == "cappa", attention=e.attention,
    )
    if d.path is not None:
        model.load_decoder(d.path)
    return model


def check_encoder(recipe: PretrainRecipe, config: Any) -> None:
    """Raises UserError where the encoder in `encoder.path` has other sizes, or saw pictures normalised by other values, than the recipe says."""
    e = recipe.encoder
    config_names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    found = {key: getattr(config, config_names.get(key, key)) for key in ("patch_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")}
    if differing := {key: value for key, value in found.items() if value != getattr(e, key)}:
        said = ", ".join(f"{key} {value} (here: {getattr(e, key)})" for key, value in differing.items())
        raise UserError(f"encoder: the one in {e.path} has {said}; write that, or name another checkpoint")
    try:
        statistics = image_statistics(e.path)
    except UserError:
        return  # a bare encoder says nothing of its pictures
    for key, theirs in zip(("mean", "std"), statistics, strict=True):
        if max(abs(a - b) for a, b in zip(theirs, getattr(recipe.image, key), strict=True)) > 1e-4:
            raise UserError(f"image.{key}: {getattr(recipe.image, key)}, but the encoder in {e.path} was trained with {theirs} (its preprocessor_config.json); "
                            f"write image.mean={json.dumps(statistics[0])} image.std={json.dumps(statistics[1])}")


def check_decoder_tokenizer(recipe: PretrainRecipe, directory: RunDirectory) -> None:
    """Raises UserError where the decoder in `decoder.path` learned its words from another tokenizer than the run's."""
    if recipe.decoder.path is None or recipe.objective.name == "aimv1":
        return
    theirs, own = Path(recipe.decoder.path) / "pretraining" / CAPTION_TOKENIZER, directory.path / CAPTION_TOKENIZER
    if theirs.is_file() and theirs.read_bytes() != own.read_bytes():
        raise UserError(f"text.tokenizer: {recipe.text.tokenizer} is another one than the decoder in {recipe.decoder.path} learned with, so its words "
                        f"would mean others; write text.tokenizer={theirs} (in a run folder of its own, or with --restart)")


def pretraining_objective(recipe: PretrainRecipe) -> TrainingObjective:
    """The recipe's objective, which knows the model's forward pass."""
    i, patch_size = recipe.image, recipe.encoder.patch_size
    if recipe.objective.name in CONTRASTIVE:
        return ContrastiveObjective(patch_size, i.mean, i.std)
    return GenerativeObjective(recipe.objective, patch_size, i.mean, i.std)


class PairSteps:
    """step -> this process's micro-batches of image-text pairs. `samples`: of one step, over all processes; `bytes`: of its
    pictures on this one."""

    def __init__(self, recipe: PretrainRecipe, data: PairDataset, placement: Placement):
        self.data, self.optim, self.rank, self.world = data, recipe.optim, placement.rank, placement.world
        self.samples = self.optim.batch_size
        check_batch(self.optim, placement)
        if recipe.objective.name in CONTRASTIVE and self.optim.micro_batch_size * self.world != self.optim.batch_size:
            raise UserError(f"optim.micro_batch_size: {recipe.objective.name} compares all {self.optim.batch_size} rows of a step at once, so it "
                            f"cannot be accumulated; set it to 0 (optim.batch_size / {self.world} processes = {self.optim.batch_size // self.world})")
        self.bytes = self.samples // self.world * 3 * recipe.image.size**2

    def __call__(self, step: int) -> list[dict[str, Any]]:
        positions = global_slice(step, self.optim.batch_size, self.rank, self.world)
        size = self.optim.micro_batch_size
        return [self.data.microbatch(positions[i : i + size]) for i in range(0, len(positions), size)]


class NativeSteps:
    """step -> this process's mini-batches of pictures at their own resolution. `samples`: of a step, on average; `bytes`: as of `PairSteps`."""

    def __init__(self, recipe: PretrainRecipe, data: PairDataset, placement: Placement):
        native = recipe.image.native
        self.pairs = NativePairs(data, native.capacity, recipe.encoder.patch_size, native.patch_limit, native.center, native.spread)
        self.minibatches, self.rank, self.world = native.minibatches, placement.rank, placement.world
        self.samples = self.pairs.schedule.samples_per_block * self.minibatches / STRATA
        self.bytes = self.minibatches // self.world * native.capacity * 3 * recipe.encoder.patch_size**2
        self.pairs.schedule.numbers(0, self.minibatches, self.rank, self.world)  # refuses a world that does not divide them

    def __call__(self, step: int) -> list[dict[str, Any]]:
        numbers = self.pairs.schedule.numbers(step, self.minibatches, self.rank, self.world)
        return [self.pairs.minibatch(number) for number in numbers]


def validate_pairs(objective: TrainingObjective, model: torch.nn.Module, data: PairDataset, recipe: PretrainRecipe,
                   placement: Placement) -> dict[str, float]:
    """Held-out losses (centre crop, one stored prefix a sample) of samples that lie evenly over the set, shared over processes."""
    total, size = min(recipe.data.validation_samples, data.num_samples), recipe.optim.micro_batch_size or recipe.optim.batch_size
    mine, share = range(placement.rank, total, placement.world), math.ceil(total / placement.world)

    def batches() -> Iterator[dict[str, Any]]:
        # As many batches on every process, with as many rows (those too many have no weight): FSDP2 and ZeRO-3 exchange weights in each forward
        # pass, CLIP rows.
        for start in range(0, share, size):
            rows = min(size, share - start)
            positions = mine[start : start + rows]
            batch = data.validation([*(i * data.num_samples // total for i in positions), *[0] * (rows - len(positions))])
            batch["weights"][len(positions) :] = 0
            yield batch

    return validate(objective, model, batches(), placement)


def write_pretrained(folder: Path, model: torch.nn.Module, *, recipe: PretrainRecipe) -> None:
    """`final/`: encoder + image processor for plain AutoModel; `final/pretraining/`: decoder, heads, the run's tokenizer.model.

    Of two towers: transformers' `Aimv2Model` and its processor.
    """
    from transformers import CLIPImageProcessor, CLIPProcessor

    size = recipe.image.size
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, resample=3,
                                   image_mean=list(recipe.image.mean), image_std=list(recipe.image.std),
                                   do_center_crop=recipe.image.native.capacity is None)  # native: of its own aspect
    if recipe.objective.name in CONTRASTIVE:
        tokenizer = ClipTokenizer(folder.parent / CLIP_TOKENIZER, recipe.text.context_length, recipe.text.canonicalize).stock
        model.save_pretrained(folder, processor=CLIPProcessor(image_processor=processor, tokenizer=tokenizer))
    else:
        model.save_pretrained(folder, image_processor=processor, extra_files=[folder.parent / CAPTION_TOKENIZER])
    card.write_card(folder, recipe, card.parameters_of(model))


# ------------------------------------------------------------------------------------------------------ instruction tuning


@told_in_one_line
def sft(recipe: SftRecipe, restart: bool = False) -> Path:
    """Tune an assistant by `recipe` (section 4.3.1); returns its folder (`final/`), a stock transformers checkpoint."""
    placement = Placement.of(recipe)
    check_tuning(recipe, placement)
    with closing(open_run(recipe, placement, restart)) as directory:
        if not directory.finished:
            conversations = conversation_data(recipe, directory, placement)
            check_batch(recipe.optim, placement)
            schedule = resolve_schedule(recipe.optim, len(conversations) / recipe.optim.batch_size)
            optim = schedule.optim
            rebuild = partial(build_tunable, recipe, chat_tokenizer(recipe, conversations, directory, placement), placement.precision)
            assistant, processor = seeded(recipe.seed, rebuild)
            tiling = Tiling.from_processor(processor, recipe.tiling.source_size)
            check_context(assistant, tiling.max_image_tokens, 1)
            check_pictures_fit(recipe, assistant, tiling, conversations)
            report_parts(set_trainable(assistant, recipe.trainable), placement)
            report_plan(recipe, assistant, placement)
            checkpoint.check_room(directory.checkpoints, assistant, schedule.steps, recipe.train, placement)
            features = feature_cache(recipe, assistant, processor, tiling, conversations, directory, placement)
            data = InstructionDataset(conversations, ChatFormat(processor.tokenizer, processor.chat_template, processor.image_token),
                                      tiling, processor.image_processor, features, max_length(recipe, assistant))
            model = AssistantForTraining(assistant, None if placement.shards_weights else recipe.encoder.batch_size)
            check_rows_apart(model, together=optim.micro_batch_size > 1)
            steps = ConversationSteps(data, optim, placement, recipe.seed, recipe.data.tokens_per_microbatch)
            objective = InstructionObjective(processor.image_processor.image_mean, processor.image_processor.image_std)
            memory.check(model, steps.largest, objective.normalize, recipe, placement)
            model, optimizer = placement.place(
                model, partial(make_optimizer, optim=optim, placement=placement, connector_lr_scale=recipe.connector_lr_scale))
            train(
                directory=directory, placement=placement, objective=objective, model=model, optimizer=optimizer,
                micro_batches=steps, schedule=schedule, loop=recipe.train,
                fingerprint=conversation_fingerprint(conversations, recipe), compare=compare_conversations,
                max_bad_fraction=recipe.data.max_bad_fraction, report=conversations.report(), what="tuning",
                dropout_seed=recipe.seed,  # of an adapter, and of a decoder that has some of its own
            )
            publish(directory, placement, model, lambda: AssistantForTraining(rebuild()[0]), partial(write_assistant, processor=processor, recipe=recipe))
        return say_finished(directory, placement, "tuning")


def conversation_data(recipe: SftRecipe, directory: RunDirectory, placement: Placement) -> ConversationSet:
    """Every row judged once; bad ones are counted by reason in data_report.json, too many stop the run."""
    if not recipe.data.sources:
        raise UserError("data.sources: names no conversation file; give at least one source with path and images")
    conversations = placement.main_first(lambda: ConversationSet(recipe.data.sources, recipe.seed))
    report = conversations.report()
    directory.write_json("data_report.json", report)
    check_bad_fraction(report, recipe.data.max_bad_fraction)
    if placement.is_main:
        say(f"data: {len(conversations):,} conversations; left out: {report.get('rejected') or 'none'}")
    return conversations


def chat_tokenizer(recipe: SftRecipe, conversations: ConversationSet, directory: RunDirectory, placement: Placement) -> Path | None:
    """For a decoder from scratch: a tokenizer trained on the conversations' texts. None: the decoder brings its own."""
    if recipe.llm.path is not None:
        return None
    folder = directory.path / "tokenizer"

    def make() -> None:
        if folder.exists():
            return
        rows = (conversations[i] for i in range(min(len(conversations), TOKENIZER_TEXTS)))
        with fresh_folder(folder) as temporary:
            train_chat_tokenizer((text for row in rows for text in row.texts), temporary, recipe.llm.vocab_size, recipe.llm.template)

    placement.main_alone(make, "train the tokenizer")
    return folder


def build_from_recipe(recipe: SftRecipe, tokenizer: Path | None) -> tuple[torch.nn.Module, Any]:
    """(assistant, processor) of the recipe: frozen encoder, connector new or from `connector_path`, decoder from `llm.path` or new."""
    if not recipe.encoder.path:
        raise UserError("encoder.path: name the encoder, e.g. encoder.path=runs/pretrain/final")
    llm = recipe.llm
    encoder = load_backbone(recipe.encoder.path, recipe.encoder.kind, recipe.encoder.image_size, recipe.encoder.attention).model
    mean, std = image_statistics(recipe.encoder.path)
    sizes = {"hidden_size": llm.hidden_size, "intermediate_size": llm.intermediate_size, "num_hidden_layers": llm.num_layers,
             "num_attention_heads": llm.num_heads, "num_key_value_heads": llm.num_kv_heads or llm.num_heads, "max_position_embeddings": llm.max_positions,
             # Llama's own 0.02 makes blocks of a small model nearly identities; at width 2500 the two agree.
             "initializer_range": max(0.02, llm.hidden_size**-0.5)}
    assistant, processor = build_assistant(
        encoder, llm.path, recipe.tiling.grid, tokenizer=tokenizer, llm_config=sizes, template=llm.template, image_mean=mean,
        image_std=std, pad_square=recipe.tiling.pad_square, unshuffle=recipe.tiling.unshuffle, attention=llm.attention,
        image_size=recipe.encoder.image_size, layer=recipe.encoder.layer, tokens=recipe.encoder.tokens,
    )
    if recipe.connector_path is not None:
        load_connector(assistant, recipe.connector_path)
    return assistant, processor


def check_tuning(recipe: SftRecipe, placement: Placement) -> None:
    """Raises UserError where keys about adapters and number formats do not go together, before anything is read or built.

    The one place that names what goes with what: adapters with every strategy but DoRA with zero3, and with every number format
    but DoRA with int8; a quantised decoder and 8-bit states of the optimizer with one process and with ddp.
    """
    adapter, llm, quantization, strategy = recipe.adapter, recipe.llm, recipe.llm.quantization, placement.strategy
    replicated = strategy in REPLICATED
    check_states(recipe.optim, placement)
    if recipe.train.compile:
        raise UserError("train.compile: true is for pre-training; micro-batches of tuning have a new length each time and would be compiled anew; write false")
    if llm.path is None and llm.hidden_size % llm.num_heads:
        raise UserError(f"llm.num_heads: {llm.num_heads} does not divide llm.hidden_size {llm.hidden_size}")
    if llm.path is None and llm.num_heads % (llm.num_kv_heads or llm.num_heads):
        raise UserError(f"llm.num_kv_heads: {llm.num_kv_heads} does not divide llm.num_heads {llm.num_heads}")
    if adapter.kind == "none" and adapter.path is not None:
        raise UserError("adapter.path: names an adapter to start from, but adapter.kind is none; write its kind, lora or dora")
    if adapter.kind != "none" and "llm" not in recipe.trainable:
        raise UserError(f"adapter.kind: {adapter.kind} trains the llm, but trainable ({', '.join(recipe.trainable)}) does not name it")
    if not adapter.merge and (adapter.kind == "none" or "encoder" in recipe.trainable):
        raise UserError("adapter.merge: false keeps an adapter beside its base: it needs adapter.kind: lora or dora and a frozen encoder")
    if adapter.path is not None and recipe.connector_path is not None:
        raise UserError("connector_path: adapter.path brings a connector of its own; remove one of the two keys")
    if quantization != "none" and adapter.kind == "none" and "llm" in recipe.trainable:
        raise UserError(f"llm.quantization: {quantization} weights cannot be trained; add adapter.kind: lora, or take llm out of trainable")
    if quantization != "none" and not replicated:
        raise UserError(f"llm.quantization: {quantization} does not go with train.strategy: {strategy}, only with single and ddp; use one, or none")
    if adapter.kind == "dora" and strategy == "zero3":
        raise UserError("adapter.kind: dora reads whole weights, which train.strategy: zero3 holds apart; use lora, or fsdp2")
    if adapter.kind == "dora" and quantization == "int8":
        raise UserError("adapter.kind: dora reads whole weights in every pass, which llm.quantization: int8 does not stand on a CPU; use lora, or nf4")


REPLICATED = ("single", "ddp")  # strategies whose processes have every weight and moment whole


def check_states(optim: Optimizer, placement: Placement) -> None:
    """Raises UserError where the strategy shards what `optim.states` cannot have sharded."""
    if optim.states == "8bit" and placement.strategy not in REPLICATED:
        raise UserError(f"optim.states: 8bit does not go with train.strategy: {placement.strategy}, which shards them, only with single and ddp; write fp32")


def build_tunable(recipe: SftRecipe, tokenizer: Path | None, precision: str) -> tuple[torch.nn.Module, Any]:
    """(assistant, processor) of the recipe with the decoder quantised and adapted as it says."""
    assistant, processor = build_from_recipe(recipe, tokenizer)
    adapters.quantize(assistant, recipe.llm, torch.bfloat16 if precision == "bf16" else torch.float32)
    adapters.add_adapter(assistant, recipe.adapter)
    if recipe.adapter.path is not None:
        adapters.load_adapter(assistant, recipe.adapter.path, recipe.adapter)
    return assistant, processor


def report_plan(recipe: SftRecipe, assistant: torch.nn.Module, placement: Placement) -> None:
    """Print what is stored how and what learns, where that is not plain; the real model must be what the recipe says."""
    adapters.check_plan(assistant, recipe.adapter, recipe.llm, recipe.trainable)
    if placement.is_main and (recipe.adapter.kind != "none" or recipe.llm.quantization != "none"):
        for line in adapters.table(adapters.plan(assistant)):
            say(line)


def max_length(recipe: SftRecipe, assistant: torch.nn.Module) -> int:
    """Most tokens of a row: the recipe's, or the decoder's positions where they are fewer."""
    return min(recipe.data.max_length, getattr(assistant.config.text_config, "max_position_embeddings", recipe.data.max_length))


def check_pictures_fit(recipe: SftRecipe, assistant: torch.nn.Module, tiling: Tiling, conversations: ConversationSet) -> None:
    """Raises UserError where no picture could fit and, by the first thousand, too many rows begin with one: each would be left out at its turn.
    Rows whose pictures come later are cut before them, and counted."""
    longest, some = max_length(recipe, assistant), range(min(len(conversations), 1000))
    if tiling.varies or tiling.max_image_tokens < longest:
        return
    if sum(conversations[i].begins_with_picture for i in some) > recipe.data.max_bad_fraction * len(some):
        raise UserError(f"data.max_length: rows of {longest} tokens, but a picture alone takes {tiling.max_image_tokens}; raise it "
                        f"(llm.max_positions too, where it is the limit), or make pictures shorter by tiling.grid or tiling.unshuffle=2")


def report_parts(counts: dict[str, int], placement: Placement) -> None:
    if placement.is_main:
        say("trainable parameters: " + ", ".join(f"{part} {count:,}" for part, count in counts.items()))


def feature_cache(recipe: SftRecipe, assistant: torch.nn.Module, processor: Any, tiling: Tiling, conversations: ConversationSet,
                  directory: RunDirectory, placement: Placement) -> FeatureCache | None:
    """Features of the frozen encoder, computed once where pictures are used more than once (`encoder.cache`)."""
    cache = recipe.encoder.cache
    if cache == "off" or "encoder" in recipe.trainable:
        if cache == "on":
            raise UserError("encoder.cache: on, but trainable names the encoder; its features change at every step")
        return None
    width = assistant.config.vision_config.hidden_size
    if cache == "auto":
        again = recipe.optim.steps * recipe.optim.batch_size > len(conversations) or (recipe.optim.epochs or 0) > 1
        if not again or FeatureCache.num_bytes(conversations, tiling, width) > recipe.encoder.cache_limit_gb * 1e9:
            return None
    bar = Progress("encoding pictures", 1, enabled=placement.is_main, unit="pictures")
    tower, weights = assistant.eval().model.vision_tower, assistant.model.vision_tower.state_dict()

    def encode(pixels_KCHW: torch.Tensor) -> torch.Tensor:
        tower.to(placement.device)  # alone: the decoder may not fit there before it is placed
        return encode_views(assistant, pixels_KCHW.to(placement.device))

    try:
        return placement.main_first(lambda: FeatureCache.open(
            directory.path / "features", conversations, tiling, processor.image_processor, encode, weights, recipe.encoder.batch_size, bar.of,
        ))
    finally:
        tower.to("cpu")
        bar.close()


class ConversationSteps:
    """step -> this process's micro-batches of conversations; every epoch in a new order (data/order.py)."""

    def __init__(self, data: InstructionDataset, optim: Optimizer, placement: Placement, seed: int, budget: int):
        self.data, self.optim, self.rank, self.world, self.budget = data, optim, placement.rank, placement.world, budget
        self.order = Order([[len(data)]], [1.0], seed)

    def __call__(self, step: int) -> list[dict[str, Any]]:
        positions = global_slice(step, self.optim.batch_size, 0, 1)  # all rows of the step: which are this process's depends on their lengths
        rows = [self.order.locate(p).sample for p in positions]
        return self.data.microbatches(rows, self.optim.micro_batch_size, self.budget, self.rank, self.world)

    def largest(self) -> list[dict[str, Any]]:
        """Of the first step's micro-batches, of whichever process, those of most tokens and of most pictures."""
        rows = [self.order.locate(p).sample for p in range(self.optim.batch_size)]
        lengths = [self.data.length(row) for row in rows]
        pictures = [len(self.data.conversations[row].images) for row in rows]
        plan = pack_rows(lengths, self.world, self.budget, self.optim.micro_batch_size)
        parts = [numbers for process in plan for numbers in process]
        chosen = {tuple(max(parts, key=lambda part: sum(sizes[i] for i in part))) for sizes in (lengths, pictures)}
        return [self.data.collate([self.data.fetch(rows[i]) for i in part]) for part in sorted(chosen)]


def conversation_fingerprint(conversations: ConversationSet, recipe: SftRecipe) -> dict[str, Any]:
    """What a run depends on besides its recipe: seed, rows (files by content), and the checkpoints of the parts that do not learn."""
    connector = recipe.connector_path or recipe.adapter.path
    frozen = {"encoder": recipe.encoder.path if "encoder" not in recipe.trainable else None,
              "llm": recipe.llm.path if "llm" not in recipe.trainable or recipe.adapter.kind != "none" else None,
              "connector": connector_place(Path(connector).expanduser()) if connector and "connector" not in recipe.trainable else None}
    return {"seed": recipe.seed, **conversations.fingerprint(), "frozen": {part: weights_digest(path) for part, path in frozen.items() if path}}


def compare_conversations(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed since a checkpoint, of what it knows of: an older one names less."""
    new = {key: value for key, value in new.items() if key in old}
    if "frozen" in new:
        new["frozen"] = {part: digest for part, digest in new["frozen"].items() if part in old["frozen"]}
    return recipes.differences(old, new)


def write_assistant(folder: Path, model: AssistantForTraining, *, processor: Any, recipe: SftRecipe) -> None:
    """A stock checkpoint: weights, processor with its chat template, generation config, model card; adapters merged, or apart in adapter/."""
    if not recipe.adapter.merge:
        adapters.save_adapter(folder / adapters.ADAPTER, model.assistant)
        adapters.take_off(model.assistant)
    adapters.merge(model.assistant)
    model.assistant.save_pretrained(folder)
    processor.save_pretrained(folder)
    card.write_card(folder, recipe, card.parameters_of(model))


# ------------------------------------------------------------------------------------------------------------ any run


def open_run(recipe: Any, placement: Placement, restart: bool) -> RunDirectory:
    """The run directory on every process; rank 0 holds the lock and refuses a changed recipe."""
    problem, directory = "", None
    try:
        with storage_errors(recipe.out):
            directory = RunDirectory(recipe.out, recipe, restart, placement.is_main, placement.world)
    except UserError as error:
        problem = str(error)
    if placement.any(bool(problem)):
        raise UserError(problem or f"{recipe.out}: refused by the main process")
    return directory


def resolve_schedule(optim: Optimizer, steps_per_epoch: float) -> Schedule:
    """The schedule of a run: `epochs` turned into steps, the start of a cooldown read from its checkpoint."""
    if optim.epochs is not None:
        optim.steps = max(1, math.ceil(optim.epochs * steps_per_epoch))
    if optim.warmup_steps >= optim.steps:
        raise UserError(f"optim.warmup_steps: {optim.warmup_steps} leave nothing of {optim.steps} steps; lower it")
    path = optim.cooldown.checkpoint
    return Schedule(optim, None if path is None else checkpoint.at(Path(path))[1]["step"])


def compile_model(model: torch.nn.Module, wanted: bool, placement: Placement) -> None:
    """torch.compile in place (names of weights stay): the whole model, or block by block where weights are sharded between blocks."""
    if not wanted:
        return
    if not placement.shards_weights:
        model.compile()
        return
    for block in blocks(model):
        block.compile()


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path`: several files, and a kill between two must not leave half of them."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    os.replace(temporary, path)


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """Every process draws the same initial weights, whatever was drawn before."""
    torch.manual_seed(seed)
    return build()


def make_optimizer(model: torch.nn.Module, *, optim: Optimizer, placement: Placement, roles: dict[str, str] | None = None,
                   connector_lr_scale: float = 1.0) -> torch.optim.Optimizer:
    """AdamW of the trainable parameters; without `roles` (tuning) everything is decayed, as torch's AdamW does."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = {name: connector_lr_scale for name in names if part_of(name) == "connector"} if roles is None else {}
    groups = parameter_groups(model.named_parameters(), roles or dict.fromkeys(names, "weight"), optim, scales)
    if placement.is_main:
        for line in describe(groups):
            say(line)
    return build_optimizer(groups, optim)


def publish(directory: RunDirectory, placement: Placement, placed: torch.nn.Module, rebuild: Callable[[], torch.nn.Module],
            write: Callable[[Path, torch.nn.Module], None]) -> None:
    """Write `final/` with the full trained weights, wherever they lie; rank 0 writes."""
    state = placement.full_state(placed)

    def write_final() -> str:
        """The problem met, if any."""
        model = placement.unwrap(placed)
        if placement.shards_weights:
            model = rebuild()
            model.load_state_dict(state, strict=True)
        try:
            with storage_errors(directory.final):
                directory.publish(lambda folder: write(folder, model))
        except UserError as error:
            return str(error)
        return ""

    if problem := placement.gather_strings([placement.main_alone(write_final, f"write {directory.final}") or ""])[0]:
        raise UserError(problem)


def say_finished(directory: RunDirectory, placement: Placement, what: str) -> Path:
    if placement.is_main:
        say(f"{what}: finished; the model is in {directory.final}")
    return directory.final
