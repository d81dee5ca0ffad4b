"""`aimv2-vlm convert`: one checkpoint layout into another, proved by running both sides, with a receipt.

A conversion only renames tensors (see `checkpoints`), so both sides must give the same numbers. The side under Apple's
names runs through `apple_outputs`, a plain forward that reads those names itself and knows none of the renaming rules;
the side under transformers' names runs through the stock classes, opened from the disk as anyone would open them. Both
get the same random input in float32. What differs by more than `TOLERANCE` is not written.

A further target is one more entry of `TARGETS`, a writer in `_convert_into` and its outputs in `prove`. Assistants, to
LLaVA's layout and back, are `llava_format`'s.

Shapes: B batch, C channels, H, W picture, N image patches, T text tokens, S sequence, D width, A heads, K width of one
head, E projection, V vocabulary, P values in one patch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Aimv2Config, Aimv2Model, Aimv2TextConfig, Aimv2VisionModel, AutoModel
from transformers.initialization import no_init_weights

from aimv2_vlm.config import UserError
from aimv2_vlm.models import checkpoints
from aimv2_vlm.models.contrastive import INITIAL_SCALE, make_text_causal
from aimv2_vlm.models.encoder import assemble_encoder, encode, locate
from aimv2_vlm.models.pretraining import FOLDER, AIMv2ForPreTraining

RECEIPT = "conversion.json"
TOLERANCE = 1e-4  # of the largest output
SEED = 0
ENCODER, TWO_TOWER, PRETRAINING = "encoder", "two towers", "encoder, decoder and heads"
CONTENT = {"apple_encoder": ENCODER, "transformers_encoder": ENCODER, "apple_two_tower": TWO_TOWER,
           "transformers_two_tower": TWO_TOWER, "apple_trainer": PRETRAINING}  # fmt: skip
TARGETS = {"transformers": (ENCODER, TWO_TOWER, PRETRAINING), "apple_encoder": (ENCODER, TWO_TOWER, PRETRAINING),
           "apple_two_tower": (TWO_TOWER,), "apple_trainer": (PRETRAINING,), "llava": ()}  # fmt: skip
# Belongs to the checkpoint and is copied as it is. Mean and deviation of pictures stand in the first two.
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
TEXT_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")

Outputs = dict[str, torch.Tensor]


@dataclass
class Source:
    """A checkpoint as it was found.

    `stored`: its tensors under the names that they have there. `named`: the same as `checkpoints.to_transformers` names
    them; with a decoder those of `AIMv2ForPreTraining`. `origin`: each key of the source (those of its folder
    `pretraining/` with that prefix) -> its names in `named`. `read`: the files that were read.
    """

    path: Path
    layout: checkpoints.Layout
    content: str
    config: dict
    stored: checkpoints.State
    named: checkpoints.State
    origin: dict[str, list[str]]
    read: list[Path]
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.path.parent if self.path.is_file() else self.path

    @property
    def text_folder(self) -> Path:
        """Where its tokenizer lies."""
        return self.folder / FOLDER if self.content == PRETRAINING and not self.layout.rules else self.folder


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "transformers",
    *,
    versions: dict[str, str] | None = None,
    sync: Callable[[Path], None] = lambda folder: None,
) -> dict[str, Any]:
    """Write the checkpoint `source` into the new folder `destination` in another layout; returns the receipt.

    `source`: folder, .safetensors file or name on the model hub, in any layout of `checkpoints`, or `final/` of a run.
    `to`: "transformers" (a folder that plain `AutoModel` opens; decoder and heads beside it in `pretraining/`), or
    Apple's key names: "apple_encoder" (of any source: the encoder alone), "apple_two_tower", "apple_trainer". An assistant
    goes to LLaVA's layout with "llava", and one in LLaVA's layout comes back with "transformers".
    `versions` go into the receipt; `sync` makes a folder durable before it gets its name.

    The folder appears when it is complete and proved, or not at all. Raises `UserError` for a source that is missing,
    unknown, incomplete or of other shapes, a destination that is in use, and a result that does not compute the same.
    """
    from aimv2_vlm.models import llava_format  # which needs this module

    destination = Path(destination)
    if to not in TARGETS:
        raise UserError(f"--to: {to!r} is unknown; choose {', '.join(TARGETS)}")
    if destination.is_symlink() or (destination.exists() and not (destination.is_dir() and not any(destination.iterdir()))):
        raise UserError(f"{destination}: exists already; nothing is overwritten: name a new folder")
    path = locate(source, (*PICTURE_FILES, *TEXT_FILES, f"{FOLDER}/*", *llava_format.FILES))
    if assistant := llava_format.assistant_layout(path):
        write = partial(llava_format.convert_into, path=path, layout=assistant, to=to, versions=versions or {})
    else:
        found = read_source(path, encoder_only=to == "apple_encoder")
        if found.content not in TARGETS[to]:
            raise UserError(f"{found.path}: holds {found.content} (layout {found.layout.name}), of which {to} cannot be made")
        write = partial(_convert_into, source=found, to=to, versions=versions or {})

    temporary = destination.absolute().with_name(f".{destination.absolute().name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed conversion left
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{destination}: cannot be made ({error.strerror}); name another folder") from error
    try:
        receipt = write(temporary)
        (temporary / RECEIPT).write_text(json.dumps(receipt, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(temporary)
        os.replace(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return receipt


def _convert_into(folder: Path, source: Source, to: str, versions: dict[str, str]) -> dict[str, Any]:
    """Write, prove, account."""
    with without_progress_bars():
        model = assemble(source)
        probe = Probe.of(model)
        write = _write_transformers if to == "transformers" else _write_apple
        placed = write(folder, source, model, to)
        _carry(folder, source, to)
        key_map, left_out = _key_map(source, placed)
        parameters = sum(tensor.numel() for name, tensor in source.named.items() if name in placed)
        expected = source_outputs(source, model.float(), probe)
        del model
        source.stored.clear()  # from here on only what was written is in memory
        source.named.clear()
        proof = prove(source, expected, folder, to, probe)
    if left_out:
        source.notes.append(f"left out, for {to} has no place for them: {checkpoints.name_some(left_out)}")
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "source": {"path": str(source.path), "layout": source.layout.name, "content": source.content,
                   "files": {str(path.relative_to(source.folder)): sha256(path) for path in source.read}},
        "target": {"layout": to, "files": {str(path.relative_to(folder)): sha256(path) for path in written}},
        "parameters": parameters,
        "keys": key_map,
        "proof": proof,
        "notes": source.notes,
        "versions": versions,
    }  # fmt: skip


def summary(receipt: dict[str, Any], destination: str | Path) -> str:
    """A few lines for the terminal."""
    proof, keys = receipt["proof"], receipt["keys"]
    renamed = sum(entry["to"] not in ([], [key]) for key, entry in keys.items())
    control = proof["control"]
    lines = {
        "layout": f"{receipt['source']['layout']} -> {receipt['target']['layout']} ({receipt['source']['content']})",
        "parameters": f"{receipt['parameters']:,} in {len(keys)} tensors, {renamed} of them renamed",
        "difference": f"{proof['largest_relative_difference']:.1e} of the largest output, at {proof['at']} (allowed: {TOLERANCE:.0e})"
        + (f"; {control['change']} would show {control['relative_difference']:.1e}" if control else ""),
        "input": proof["input"],
        "written": f"{destination} ({RECEIPT} is the receipt)",
    }
    return "\n".join([*(f"{name:<12}{text}" for name, text in lines.items()), *(f"{'note':<12}{note}" for note in receipt["notes"])])


# ------------------------------------------------------------------------------------------------------------- reading


def read_source(path: Path, encoder_only: bool = False) -> Source:
    """Everything that the checkpoint holds; with `encoder_only` nothing of a folder `pretraining/` beside the encoder."""
    stored, config = checkpoints.read_safetensors(path)
    layout, named = checkpoints.to_transformers(stored, str(path))
    origin = {key: checkpoints.transformers_names(layout, key) for key in stored}
    content = CONTENT[layout.name]
    folder = path.parent if path.is_file() else path
    read = [*checkpoints.weight_files(path), *existing(folder, ["config.json"])]
    if path.is_dir() and (path / "model.safetensors.index.json").is_file() and not (path / "model.safetensors").is_file():
        read.append(path / "model.safetensors.index.json")
    if content == ENCODER and not layout.rules and path.is_dir() and (path / FOLDER).is_dir() and not encoder_only:
        content = PRETRAINING
        rest, sizes = checkpoints.read_safetensors(path / FOLDER)
        if "objective" in sizes:
            raise UserError(f"{path / FOLDER}: a model of {sizes['objective']} has no other layout; its encoder has: --to apple_encoder")
        named = {f"encoder.{key}": tensor for key, tensor in named.items()} | rest
        origin = {key: [f"encoder.{key}"] for key in stored} | {f"{FOLDER}/{key}": [key] for key in rest}
        read += [*checkpoints.weight_files(path / FOLDER), path / FOLDER / "config.json"]
    source = Source(path, layout, content, config, stored, named, origin, read)
    if odd := [key for key, tensor in stored.items() if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16)]:
        raise UserError(f"{path}: {checkpoints.name_some(odd)}: type {stored[odd[0]].dtype}; only float32, float16 and bfloat16 are converted")
    if guessed := _guessed_heads(source):
        width = checkpoints.HEAD_WIDTH
        parts = " and the ".join(guessed)
        source.notes.append(f"no config.json gives the number of heads of the {parts}: taken to be {width} wide, as in every released AIMv2")
    return source


def _guessed_heads(source: Source) -> list[str]:
    """Parts whose number of heads is stated nowhere; an absent key in a config.json of transformers means its default."""
    if source.layout.kept and source.config:
        return []
    asked = {"encoder": (_vision_section(source.config), {"num_attention_heads", "vision_heads"})}
    if source.content == TWO_TOWER:
        asked["text tower"] = (_text_section(source.config), {"num_attention_heads"})
    if source.layout.name == "apple_trainer":
        asked["decoder"] = (source.config, {"decoder_heads"})
    return [part for part, (section, names) in asked.items() if not names & section.keys()]


def existing(folder: Path, names: list[str] | tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def assemble(source: Source) -> Aimv2VisionModel | Aimv2Model | AIMv2ForPreTraining:
    """The stock model (or the pre-training model around one) of these tensors, in float32; `UserError` for any misfit."""
    if source.content == PRETRAINING:
        return AIMv2ForPreTraining.from_pretrained(source.path)
    encoder = assemble_encoder(source.layout, source.named, source.config, source.path, None, "sdpa")
    if source.content == TWO_TOWER:
        config, model_class = _two_tower_config(source, encoder), Aimv2Model
    elif any(name.startswith("head.") for name in source.named):
        config, model_class = encoder.config, Aimv2VisionModel
        config.use_head = True
    else:
        return encoder.eval()
    config._attn_implementation = "sdpa"
    with no_init_weights():
        model = model_class(config)
    checkpoints.load_strictly(model, source.named, source.path)
    return model.eval()


def _two_tower_config(source: Source, encoder: Aimv2VisionModel) -> Aimv2Config:
    """The text tower's sizes from the tensors; what they do not tell from config.json, or `UserError`."""
    config = source.config
    stated = _text_section(config)
    if not source.layout.rules and config:
        stated = Aimv2TextConfig.from_dict(stated).to_dict()  # an absent key means the class's default there
    names = {"words": "text_model.embeddings.token_embedding.weight", "positions": "text_model.embeddings.position_embedding.weight",
             "hidden": "text_model.encoder.layers.0.ffn.gate_proj.weight", "projection": "text_projection.weight"}  # fmt: skip
    if missing := [name for name in names.values() if name not in source.named or source.named[name].dim() != 2]:
        raise UserError(f"{source.path}: missing keys, or of another shape: {checkpoints.name_some(missing)}")
    shapes = {what: source.named[name].shape for what, name in names.items()}
    vocab_size, width = shapes["words"]
    heads = stated.get("num_attention_heads") or checkpoints.heads_from_width(width, "text_config.num_attention_heads", source.path)
    eos_token_id, scale = stated.get("eos_token_id"), config.get("max_logit_scale", 100.0)
    eps = stated.get("rms_norm_eps", config.get("rms_norm_eps", encoder.config.rms_norm_eps))
    for key, number, kind, most in (("text_config.num_attention_heads", heads, int, width),
                                    ("text_config.eos_token_id", eos_token_id, int, vocab_size - 1),
                                    ("text_config.rms_norm_eps", eps, float, 1), ("max_logit_scale", scale, (int, float), math.inf)):  # fmt: skip
        if isinstance(number, bool) or not isinstance(number, kind) or not 0 <= number <= most:
            raise UserError(f"{source.path}: config.json: {key}: needed beside these weights, found {number!r}")
    if not heads or width % heads:
        raise UserError(f"{source.path}: config.json: text_config.num_attention_heads: {heads} heads do not divide the width {width}")
    text = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shapes["hidden"][0],
        "num_hidden_layers": len({name.split(".")[3] for name in source.named if name.startswith("text_model.encoder.layers.")}),
        "num_attention_heads": heads,
        "max_position_embeddings": shapes["positions"][0],
        "eos_token_id": eos_token_id,
        "rms_norm_eps": eps,
    }
    return Aimv2Config(
        vision_config=encoder.config.to_dict() | {"use_head": True}, text_config=text, projection_dim=shapes["projection"][0],
        logit_scale_init_value=math.log(INITIAL_SCALE), max_logit_scale=float(scale),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- writing


def _write_transformers(folder: Path, source: Source, model: torch.nn.Module, to: str) -> dict[str, str]:
    """transformers' own folder, tensors in the type that they had; returns name in `source.named` -> key in the folder."""
    types = {tensor.dtype for tensor in source.named.values()}
    if len(types) == 1:
        model.to(types.pop())  # what save_pretrained then notes in config.json
    model.save_pretrained(folder, state_dict={name: tensor.contiguous() for name, tensor in source.named.items()})
    if source.content != PRETRAINING:
        return {name: name for name in source.named}
    return {name: name.removeprefix("encoder.") if name.startswith("encoder.") else f"{FOLDER}/{name}" for name in source.named}


def _write_apple(folder: Path, source: Source, model: torch.nn.Module, to: str) -> dict[str, str]:
    """Tensors under Apple's names and a config.json; without `model_type`, for AutoModel would make a random model of it."""
    from safetensors.torch import save_file

    layout = checkpoints.layout_named(to)
    named, prefix = source.named, ""
    if to == "apple_encoder":
        prefix = {PRETRAINING: "encoder."}.get(source.content, source.layout.encoder_prefix)
        named = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
        named = {name: tensor for name, tensor in named.items() if not name.startswith("head.")}
    vision = _vision_part(model).config
    sizes: dict[str, Any] = {
        "hidden_size": vision.hidden_size, "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers, "num_attention_heads": vision.num_attention_heads,
        "num_channels": vision.num_channels, "image_size": vision.image_size, "patch_size": vision.patch_size,
        "rms_norm_eps": vision.rms_norm_eps, "qkv_bias": False, "use_bias": False,
    }  # fmt: skip
    if vision.is_native:
        sizes["pos_embed_type"] = "sincos"
    if to == "apple_two_tower":
        text = model.config.text_config
        words = {key: getattr(text, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                                     "num_attention_heads", "eos_token_id", "rms_norm_eps")}  # fmt: skip
        words["max_context_length"] = text.max_position_embeddings
        sizes = {"vision_config": sizes, "text_config": words, "projection_dim": model.config.projection_dim,
                 "max_logit_scale": model.config.max_logit_scale}  # fmt: skip
    if to == "apple_trainer":
        decoder = model.decoder_config
        sizes = {
            "vision_dim": vision.hidden_size, "vision_blocks": vision.num_hidden_layers, "vision_heads": vision.num_attention_heads,
            "decoder_dim": decoder.hidden_size, "decoder_blocks": decoder.num_hidden_layers, "decoder_heads": decoder.num_attention_heads,
            "image_size": vision.image_size, "patch_size": vision.patch_size, "vocab_size": decoder.vocab_size,
            "context_length": model.context_length, "rms_norm_eps": vision.rms_norm_eps,
        }  # fmt: skip
        if not (model.predicts_patches and model.predicts_text):
            raise UserError(f"{source.path}: its decoder predicts patches or text only; Apple's trainer layout holds both; --to apple_encoder works")
    state = checkpoints.from_transformers(named, layout, str(source.path))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    return {prefix + name: str(checkpoints.stored_name(layout, name)) for name in named}


def _carry(folder: Path, source: Source, to: str) -> None:
    """Copy image processor and tokenizer, which belong to the checkpoint; what is not there is not invented."""
    pictures = existing(source.folder, PICTURE_FILES)
    texts = existing(source.text_folder, TEXT_FILES) if to != "apple_encoder" else []
    text_folder = folder / FOLDER if source.content == PRETRAINING and to == "transformers" else folder
    for files, where in ((pictures, folder), (texts, text_folder)):
        for file in files:
            shutil.copyfile(file, where / file.name)
            source.read.append(file)
    if not pictures:
        source.notes.append("the source has no preprocessor_config.json: mean and deviation of its pictures are unknown, and none are written")


def _key_map(source: Source, placed: dict[str, str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(each key of the source -> its keys in the result and its shape, the keys that have none there)."""
    keys = {}
    for key, names in source.origin.items():
        tensor = source.stored[key] if key in source.stored else source.named[names[0]]
        to = list(dict.fromkeys(placed[name] for name in names if name in placed))
        keys[key] = {"to": to, "shape": list(tensor.shape)}
    return keys, [key for key, entry in keys.items() if not entry["to"]]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# --------------------------------------------------------------------------------------------------------------- proof


FEATURES, PREFIX_FEATURES = "encoder features", "encoder features with a prefix"
PLAIN_TEXT = "text embeddings of the unchanged stock model, no row padded"  # known to be wrong, see contrastive.py
CONTROL = "encoder features, queries and keys exchanged"


@dataclass
class Probe:
    """Random input that both sides get: pictures, prefixes, and token rows for a text tower or captions for a decoder.

    Every row of `ids_BT` is full; row b of `short_ids_BT` ends at `lengths_B[b]`, the first one at T.
    """

    pixels_BCHW: torch.Tensor
    prefix_lengths_B: torch.Tensor
    ids_BT: torch.Tensor
    short_ids_BT: torch.Tensor
    lengths_B: torch.Tensor
    text: str

    @classmethod
    def of(cls, model: torch.nn.Module) -> Probe:
        """Of the sizes that this model takes; an encoder with sin-cos positions gets pictures that are no squares."""
        generator = torch.Generator().manual_seed(SEED)
        vision = _vision_part(model).config
        height, width = (vision.image_size,) * 2 if not vision.is_native else (6 * vision.patch_size, 10 * vision.patch_size)
        num_patches = (height // vision.patch_size) * (width // vision.patch_size)
        pixels_BCHW = torch.randn(2, vision.num_channels, height, width, generator=generator)
        prefix_lengths_B = torch.tensor([max(1, num_patches // 3), max(1, num_patches // 2)])
        num_tokens, vocab_size, eos = 1, 1, None
        if isinstance(model, Aimv2Model):
            text = model.config.text_config
            num_tokens, vocab_size, eos = text.max_position_embeddings, text.vocab_size, text.eos_token_id
        elif isinstance(model, AIMv2ForPreTraining):
            num_tokens, vocab_size = model.context_length, model.decoder_config.vocab_size
        ids_BT = torch.randint(vocab_size, (2, num_tokens), generator=generator)
        lengths_B = torch.tensor([num_tokens, max(1, num_tokens // 2)])
        short_ids_BT = ids_BT.clone()
        if eos is not None:
            ids_BT = torch.where(ids_BT == eos, (eos + 1) % vocab_size, ids_BT)
            short_ids_BT = torch.where(torch.arange(num_tokens) >= lengths_B[:, None] - 1, eos, ids_BT)
            ids_BT[:, -1] = eos
        described = f"2 pictures of {height} x {width}, normal noise, seed {SEED}, float32; prefixes {prefix_lengths_B.tolist()}"
        if not isinstance(model, Aimv2VisionModel):
            described += f"; 2 rows of {num_tokens} random tokens"
            short = int(lengths_B[1])
            described += f" with lengths {lengths_B.tolist()}" if eos is None else f", the second once full and once {short} long and padded"
        return cls(pixels_BCHW, prefix_lengths_B, ids_BT, short_ids_BT, lengths_B, described)


def source_outputs(source: Source, model: torch.nn.Module, probe: Probe) -> Outputs:
    """Outputs of the source: of Apple's names by `apple_outputs`, with a control beside them, else of its stock `model`."""
    if not source.layout.rules:
        return stock_outputs(model, probe)
    arguments = (source.stored, source.config, source.layout.name, probe)
    return apple_outputs(*arguments) | {CONTROL: apple_outputs(*arguments, exchanged=True)[FEATURES]}


def prove(source: Source, expected: Outputs, folder: Path, to: str, probe: Probe) -> dict[str, Any]:
    """Run what was written, read from the disk, and compare with the source's outputs; returns what was measured.

    The control shows that an error would be seen: the same network with queries and keys exchanged. Raises `UserError`
    for a difference above `TOLERANCE`.
    """
    if to == "transformers":
        outputs = stock_outputs(_open(folder, source.content), probe)
        if PLAIN_TEXT in outputs:
            off = difference(expected["text embeddings, no row padded"], outputs.pop(PLAIN_TEXT))
            source.notes.append(
                f"transformers leaves out the text tower's causal mask when no row is padded (embeddings then differ by {off:.1e} of the "
                "largest): pad a row and give attention_mask, or mark the tower's attention modules is_causal"
            )
    else:
        arguments = (*checkpoints.read_safetensors(folder), to, probe)
        outputs = apple_outputs(*arguments)
        expected = expected | {CONTROL: apple_outputs(*arguments, exchanged=True)[FEATURES]}
    differences = {name: difference(expected[name], outputs[name]) for name in outputs}
    worst = max(differences, key=lambda name: differences[name])
    if differences[worst] > TOLERANCE:
        raise UserError(
            f"{source.path}: the result does not compute what the source does: {worst}: largest difference {differences[worst]:.1e} of the "
            f"largest value (inf: another shape, or numbers that are not finite), allowed {TOLERANCE:.0e} ({probe.text}); nothing was written"
        )
    control = None
    if CONTROL in expected:
        shown = difference(expected[FEATURES], expected[CONTROL])
        control = {"change": "queries and keys of the encoder exchanged", "output": FEATURES, "relative_difference": shown}
        if shown <= TOLERANCE:
            source.notes.append(f"the proof is blind here: with these weights exchanged queries and keys change the features by {shown:.1e} only")
    return {"largest_relative_difference": differences[worst], "at": worst, "tolerance": TOLERANCE, "input": probe.text,
            "relative_differences": differences, "control": control}  # fmt: skip


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Largest difference over the largest expected value; infinite for another shape or numbers that are none."""
    if expected.shape != found.shape or not (expected.isfinite().all() and found.isfinite().all()):
        return math.inf
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _open(folder: Path, content: str) -> torch.nn.Module:
    """What anyone gets from this folder; `UserError` if a weight was missing or left over."""
    if content == PRETRAINING:
        return AIMv2ForPreTraining.from_pretrained(folder)
    model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, local_files_only=True)
    if misfits := {kind: keys for kind, keys in info.items() if keys}:
        raise UserError(f"{folder}: AutoModel does not find every weight: {misfits}")
    return model.eval()


def _vision_part(model: torch.nn.Module) -> Aimv2VisionModel:
    if isinstance(model, Aimv2VisionModel):
        return model
    return model.encoder if isinstance(model, AIMv2ForPreTraining) else model.vision_model


@torch.no_grad()
def stock_outputs(model: torch.nn.Module, probe: Probe) -> Outputs:
    """Outputs of a model of transformers' classes. Marks the text tower causal once its unchanged outputs are taken."""
    encoder = _vision_part(model)
    found = {FEATURES: encode(encoder, probe.pixels_BCHW), PREFIX_FEATURES: encode(encoder, probe.pixels_BCHW, probe.prefix_lengths_B)}
    if isinstance(model, AIMv2ForPreTraining):
        out = model(probe.pixels_BCHW, probe.ids_BT, probe.lengths_B, probe.prefix_lengths_B)
        scores = {"patch predictions": out.patch_predictions, "text logits": out.text_logits,
                  "pixel loss": out.pixel_loss, "text loss": out.text_loss}  # fmt: skip
        found |= {name: tensor for name, tensor in scores.items() if tensor is not None}
    elif isinstance(model, Aimv2Model):
        attended_BT = (torch.arange(probe.ids_BT.shape[1]) < probe.lengths_B[:, None]).long()
        padded = model(pixel_values=probe.pixels_BCHW, input_ids=probe.short_ids_BT, attention_mask=attended_BT)
        found |= {"image embeddings": padded.image_embeds, "text embeddings, one row padded": padded.text_embeds,
                  "logits": padded.logits_per_image}  # fmt: skip
        found[PLAIN_TEXT] = model(pixel_values=probe.pixels_BCHW, input_ids=probe.ids_BT).text_embeds
        make_text_causal(model)
        found["text embeddings, no row padded"] = model(pixel_values=probe.pixels_BCHW, input_ids=probe.ids_BT).text_embeds
    elif model.config.use_head:
        found["pooled features"] = model(pixel_values=probe.pixels_BCHW).pooler_output
    return found


# ------------------------------------------------------------------- the same network, read from Apple's names in plain torch


@torch.no_grad()
def apple_outputs(
    state: checkpoints.State, config: dict, layout: str, probe: Probe, *, exchanged: bool = False
) -> Outputs:
    """Outputs of the network whose tensors have Apple's names. `exchanged`: the control, encoder features only, from
    attention whose queries and keys are exchanged."""
    prefix = {"apple_encoder": "", "apple_two_tower": "image_encoder.", "apple_trainer": "models.image_encoder."}[layout]
    vision = _vision_section(config)
    net = _Apple(state, vision.get("rms_norm_eps", config.get("rms_norm_eps", 1e-5)))
    width = len(state[f"{prefix}trunk.post_trunk_norm.weight"])
    heads = vision.get("num_attention_heads") or vision.get("vision_heads") or width // 128

    patches_BND = net.patches(probe.pixels_BCHW, f"{prefix}preprocessor.{'blocks.0.' if layout == 'apple_trainer' else ''}")
    num_patches = patches_BND.shape[1]
    place_N = torch.arange(num_patches)
    can_attend_BNN = (place_N < probe.prefix_lengths_B[:, None, None]) | (place_N <= place_N[:, None])
    features_BND = net.trunk(patches_BND, f"{prefix}trunk.", heads, exchanged=exchanged)
    found = {FEATURES: features_BND}
    if exchanged:
        return found
    prefix_features_BND = net.trunk(patches_BND, f"{prefix}trunk.", heads, can_attend_BNN)
    found[PREFIX_FEATURES] = prefix_features_BND

    if layout == "apple_two_tower":
        text = _text_section(config)
        text_heads = text.get("num_attention_heads") or len(state["text_encoder.trunk.post_trunk_norm.weight"]) // 128
        image_BE = F.normalize(net.pooled(features_BND, "image_encoder.head.", heads) @ net["image_projector.weight"].T, dim=-1)
        texts = {name: net.text(ids_BT, text_heads, text["eos_token_id"])
                 for name, ids_BT in (("no row padded", probe.ids_BT), ("one row padded", probe.short_ids_BT))}  # fmt: skip
        scale = net["log_logit_scale"].clamp(0, math.log(config.get("max_logit_scale", 100.0))).exp()
        found |= {"image embeddings": image_BE, "logits": scale * image_BE @ texts["one row padded"].T}
        found |= {f"text embeddings, {name}": text_BE for name, text_BE in texts.items()}
    if layout == "apple_trainer":
        decoder_heads = config.get("decoder_heads") or len(state["models.text_decoder.trunk.post_trunk_norm.weight"]) // 128
        given = "models.text_decoder.preprocessor."
        image_BND = F.linear(prefix_features_BND, net[f"{given}vision_preprocessor.module.weight"], net[f"{given}vision_preprocessor.module.bias"])
        words_BTD = F.embedding(probe.ids_BT, net[f"{given}text_preprocessor.text_embedding.weight"])
        bos_B1D = net[f"{given}text_preprocessor.cls_token"].reshape(1, 1, -1).expand(len(words_BTD), 1, -1)
        text_BTD = torch.cat([bos_B1D, words_BTD], 1)
        text_BTD = text_BTD + net[f"{given}text_preprocessor.positional_embedding"][: text_BTD.shape[1]]
        hidden_BSD = net.trunk(torch.cat([image_BND, text_BTD], 1), "models.text_decoder.trunk.", decoder_heads, "causal")
        logits_BTV = hidden_BSD[:, num_patches:] @ net["models.text_decoder.head.blocks.0.linear.weight"].T
        predicted_BNP = hidden_BSD[:, :num_patches] @ net["models.text_decoder.head.blocks.1.linear.weight"].T
        found |= {"patch predictions": predicted_BNP, "text logits": logits_BTV, "pixel loss": _pixel_loss(predicted_BNP, probe),
                  "text loss": _text_loss(logits_BTV, probe)}  # fmt: skip
    return found


def _vision_section(config: dict) -> dict:
    return next((config[name] for name in ("vision_config", "vision") if isinstance(config.get(name), dict)), config)


def _text_section(config: dict) -> dict:
    return next((config[name] for name in ("text_config", "text") if isinstance(config.get(name), dict)), {})


class _Apple:
    """Operations of the network on a state dict in Apple's names; `[...]` gives a tensor in float32."""

    def __init__(self, state: checkpoints.State, eps: float) -> None:
        self.state, self.eps = state, eps

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.state[key].float()

    def norm(self, x: torch.Tensor, key: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self[key]

    def patches(self, pixels_BCHW: torch.Tensor, name: str) -> torch.Tensor:
        kernel = self[f"{name}patchifier.proj.weight"]
        grid_BDHW = F.conv2d(pixels_BCHW, kernel, self[f"{name}patchifier.proj.bias"], stride=kernel.shape[-1])
        rows, columns = grid_BDHW.shape[-2:]
        patches_BND = self.norm(grid_BDHW.flatten(2).mT, f"{name}patchifier.norm.weight")
        if f"{name}pos_embed" in self.state:
            return patches_BND + self[f"{name}pos_embed"].flatten(0, -2)
        quarter = patches_BND.shape[-1] // 4
        frequency = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
        row_ND, column_ND = ((torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[:, axis, None] * frequency) for axis in (0, 1))
        return patches_BND + torch.cat([column_ND.sin(), column_ND.cos(), row_ND.sin(), row_ND.cos()], -1).float()

    def trunk(
        self, x_BSD: torch.Tensor, name: str, heads: int, can_attend: torch.Tensor | str | None = None, exchanged: bool = False
    ) -> torch.Tensor:
        """All blocks below `name` and the last norm. `can_attend`: bool (B, S, S), "causal", or None."""
        length = x_BSD.shape[1]
        if isinstance(can_attend, str):
            can_attend = torch.ones(1, length, length, dtype=torch.bool).tril()
        number = 0
        while f"{name}blocks.{number}.norm_1.weight" in self.state:
            block = f"{name}blocks.{number}."
            x_BSD = x_BSD + self.attention(self.norm(x_BSD, f"{block}norm_1.weight"), f"{block}attn.", heads, can_attend, exchanged)
            given_BSD = self.norm(x_BSD, f"{block}norm_2.weight")
            gated = F.silu(given_BSD @ self[f"{block}mlp.fc1.weight"].T) * (given_BSD @ self[f"{block}mlp.fc3.weight"].T)
            x_BSD = x_BSD + gated @ self[f"{block}mlp.fc2.weight"].T
            number += 1
        return self.norm(x_BSD, f"{name}post_trunk_norm.weight")

    def attention(self, x_BSD: torch.Tensor, name: str, heads: int, can_attend: torch.Tensor | None, exchanged: bool) -> torch.Tensor:
        if f"{name}qkv.weight" in self.state:
            projected = (x_BSD @ self[f"{name}qkv.weight"].T).chunk(3, -1)
        else:
            projected = tuple(x_BSD @ self[f"{name}{letter}_proj.weight"].T for letter in "qkv")
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in projected)  # (B, A, S, K)
        if exchanged:
            query, key = key, query
        return self.mix(query, key, value, can_attend) @ self[f"{name}proj.weight"].T

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, can_attend: torch.Tensor | None = None) -> torch.Tensor:
        scores_BASS = query @ key.mT / math.sqrt(query.shape[-1])
        if can_attend is not None:
            scores_BASS = scores_BASS.masked_fill(~can_attend[:, None], -math.inf)
        return (scores_BASS.softmax(-1) @ value).transpose(1, 2).flatten(2)

    def pooled(self, features_BND: torch.Tensor, name: str, heads: int) -> torch.Tensor:
        """One learned query over the patches: (B, D)."""
        query_B1D = self[f"{name}cls_token"].reshape(1, 1, -1).expand(len(features_BND), 1, -1)
        parts = (query_B1D, features_BND @ self[f"{name}k.weight"].T, features_BND @ self[f"{name}v.weight"].T)
        pooled_BD = self.mix(*(t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in parts))[:, 0]
        return F.linear(pooled_BD, self[f"{name}linear.weight"], self[f"{name}linear.bias"])

    def text(self, ids_BT: torch.Tensor, heads: int, eos_token_id: int) -> torch.Tensor:
        """Unit vectors (B, E) of texts, read at the first end token."""
        words_BTD = F.embedding(ids_BT, self["text_encoder.preprocessor.text_embedding.weight"])
        words_BTD = words_BTD + self["text_encoder.preprocessor.positional_embedding"][: ids_BT.shape[1]]
        hidden_BTD = self.trunk(words_BTD, "text_encoder.trunk.", heads, "causal")
        end_B = (ids_BT == eos_token_id).int().argmax(-1)
        return F.normalize(hidden_BTD[torch.arange(len(end_B)), end_B] @ self["text_projector.weight"].T, dim=-1)


def _pixel_loss(predicted_BNP: torch.Tensor, probe: Probe) -> torch.Tensor:
    """Mean over the patches behind the prefix of the squared error against the next patch, standardised."""
    size = math.isqrt(predicted_BNP.shape[-1] // probe.pixels_BCHW.shape[1])
    tiles = probe.pixels_BCHW.unfold(2, size, size).unfold(3, size, size)  # (B, C, rows, columns, row, column)
    patches_BNP = torch.einsum("bcyxij->byxijc", tiles).flatten(3).flatten(1, 2)
    targets_BNP = (patches_BNP - patches_BNP.mean(-1, keepdim=True)) / (patches_BNP.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = [(predicted_BNP[b, m - 1 : -1] - targets_BNP[b, m:]).square().mean(-1) for b, m in enumerate(probe.prefix_lengths_B.tolist())]
    return torch.cat(errors).mean()


def _text_loss(logits_BTV: torch.Tensor, probe: Probe) -> torch.Tensor:
    """Mean cross-entropy of the captions' tokens: place t, the begin token being 0, predicts token t."""
    rows = [(logits_BTV[b, :n], probe.ids_BT[b, :n]) for b, n in enumerate(probe.lengths_B.tolist())]
    return F.cross_entropy(torch.cat([logits for logits, _ in rows]), torch.cat([ids for _, ids in rows]))
