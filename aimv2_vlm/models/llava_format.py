"""LLaVA's formats in both directions: its projector file, and the checkpoints of its Llama family.

LLaVA keeps an assistant as a Llama checkpoint (`model.layers…`, `lm_head.weight`) with the connector among its tensors
(`model.mm_projector.0` and `.2`, the two linears around a GELU) and names its vision tower in config.json, to be loaded
from elsewhere. A stock Llava holds the same tensors under other names, so that a conversion only renames. It is proved
as in `convert`: the side under transformers' names runs through the stock class; the side under LLaVA's through
`llava_logits`, which reads those names itself. Both get the same random picture and tokens.

`mm_projector.bin` is the one pickle that is ever read, in `_read_pickle` alone.

Shapes: V views of a picture, C channels, H, W, N patches of a view, D width, S sequence, A vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from aimv2_vlm.config import UserError
from aimv2_vlm.models import checkpoints, convert
from aimv2_vlm.models.assistant import build_assistant, image_statistics
from aimv2_vlm.models.encoder import assemble_encoder, locate

STOCK, LLAVA = "transformers_assistant", "llava"
TOWER = "vision_tower"  # folder of the encoder inside a checkpoint of LLaVA's layout
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
PROCESSOR_FILES = ("processor_config.json", "chat_template.jinja", "chat_template.json")
FILES = (*PROCESSOR_FILES, "generation_config.json", f"{TOWER}/*")  # wanted beside what `convert` asks the hub for
CONTENT = "assistant"
SHARD_SIZE = "5GB"
TEXT_TOKENS = 6  # of the proof's input, before and behind the picture

# (in LLaVA's, in a stock Llava's state dict, in its files); the first one that fits holds
_RULES = (
    ("lm_head.", "lm_head.", "language_model.lm_head."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "model.image_newline", "image_newline"),
    ("model.vision_tower.vision_tower.", "model.vision_tower.", "vision_tower."),
    ("model.", "model.language_model.", "language_model.model."),
)
Keys = dict[str, dict[str, Any]]  # key of the source -> {"to": its keys in the result, "shape"}
_LAYERS = {"0.weight": "linear_1.weight", "0.bias": "linear_1.bias", "2.weight": "linear_2.weight", "2.bias": "linear_2.bias"}


# ----------------------------------------------------------------------------------------------------------- connector


def load_connector(model: nn.Module, path: str | Path) -> None:
    """Copy a trained connector into a stock Llava or LlavaNext; `image_newline` too where both have one.

    `path`: LLaVA's mm_projector.bin, the same as .safetensors, or a folder with either, with a stock Llava (`final/` of a
    run) or with a checkpoint of LLaVA's. Raises `UserError` for a connector of another kind or of other widths.
    """
    _fill_connector(model.model, read_connector(path), f"connector_path: {path}")


def _fill_connector(model: nn.Module, state: checkpoints.State, source: str) -> None:
    newline, connector = state.pop("image_newline", None), model.multi_modal_projector
    for what, part, given, wanted in (
        ("takes features", "encoder", state["linear_1.weight"].shape[1], connector.linear_1.weight.shape[1]),
        ("gives embeddings", "decoder", state["linear_2.weight"].shape[0], connector.linear_2.weight.shape[0]),
    ):
        if given != wanted:
            raise UserError(f"{source}: {what} {given} wide, but the {part} here is {wanted} wide: it was trained for another {part}"
                            + " or another tiling.unshuffle" * (part == "encoder"))
    checkpoints.load_strictly(connector, state, source)
    if newline is not None and getattr(model, "image_newline", None) is not None:
        if newline.shape != model.image_newline.shape:
            raise UserError(f"{source}: image_newline: shape {list(newline.shape)} instead of {list(model.image_newline.shape)}")
        with torch.no_grad():
            model.image_newline.copy_(newline)


def read_connector(path: str | Path) -> checkpoints.State:
    """{linear_1.weight (hidden, encoder's width), linear_1.bias, linear_2.weight, linear_2.bias} and, if there is one,
    image_newline; `path` as in `load_connector`, or a name on the model hub. Raises `UserError`."""
    path = connector_place(locate(path, PROJECTOR_FILES))
    return _connector_named(_read_pickle(path) if path.suffix in (".bin", ".pt", ".pth") else _connector_tensors(path), path)


def connector_place(path: Path) -> Path:
    """The file in a folder, or the folder, whose weights `read_connector` takes."""
    return next((path / name for name in PROJECTOR_FILES if (path / name).is_file()), path)


def _connector_named(stored: checkpoints.State, path: Path) -> checkpoints.State:
    """Tensors of a connector under any prefix, as `read_connector` returns them; `UserError` for what is no such connector."""
    if tokens := [key for key in stored if "embed_tokens" in key or "lm_head" in key]:
        raise UserError(f"{path}: {tokens[0]}: was trained with tokens around the picture (mm_use_im_start_end), which no template here has")
    named: checkpoints.State = {}
    for key, tensor in stored.items():
        if found := re.search(r"(?:^|\.)(?:mm_projector|multi_modal_projector)\.(.+)$", key):
            named[_LAYERS.get(found[1], found[1])] = tensor
        elif key.endswith("image_newline"):
            named["image_newline"] = tensor
        else:
            raise UserError(f"{path}: {key}: is no tensor of a connector (mm_projector.…)")
    if empty := [key for key, tensor in stored.items() if tensor.numel() == 0]:
        raise UserError(f"{path}: {checkpoints.name_some(empty)}: shape {list(stored[empty[0]].shape)}: saved while ZeRO-3 held its weights apart; "
                        "save it again with the weights gathered")  # fmt: skip
    if named.keys() - {"image_newline"} == {"weight", "bias"}:
        raise UserError(f"{path}: a single linear layer (mm_projector_type linear); the connector here has two with a GELU between (mlp2x_gelu)")
    wanted = set(_LAYERS.values())
    if named.keys() - {"image_newline"} != wanted:
        missing, more = wanted - named.keys(), named.keys() - wanted - {"image_newline"}
        told = " and ".join(f"{what} {checkpoints.name_some(keys)}" for what, keys in (("lacks", missing), ("also has", more)) if keys)
        raise UserError(f"{path}: not a connector of two linear layers (mlp2x_gelu): {told}")
    if odd := [key for key in named if named[key].dim() != (2 if key.endswith("weight") else 1)]:
        raise UserError(f"{path}: {odd[0]}: shape {list(named[odd[0]].shape)} is not that of a linear layer")
    return named


def _connector_tensors(path: Path) -> checkpoints.State:
    """The connector's tensors of a .safetensors file or a whole checkpoint, of which nothing else is read."""
    from safetensors import SafetensorError, safe_open

    found: checkpoints.State = {}
    for file in checkpoints.weight_files(path):
        try:
            with safe_open(file, "pt") as opened:
                names = [key for key in opened.keys() if re.search(r"(^|\.)(mm_projector|multi_modal_projector)\.|(^|\.)image_newline$", key)]
                found.update((key, opened.get_tensor(key)) for key in names)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: not readable as safetensors: {error}") from error
    if not found:
        raise UserError(f"{path}: holds no connector (no tensor mm_projector.… or multi_modal_projector.…)")
    return found


def _read_pickle(path: Path) -> checkpoints.State:
    """The tensors of LLaVA's mm_projector.bin; torch's restricted reader builds tensors and runs nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile file fails in many ways
        reason = re.split(r"\.\s|\n", str(error).strip())[0][:200] or type(error).__name__
        if "weights_only" in str(error) or "Weights only" in str(error):
            reason = "it holds more than tensors"
        raise UserError(f"{path}: not read as a projector file ({reason}); nothing in it was run; save its tensors as .safetensors") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise UserError(f"{path}: not a projector file: expected names with tensors")
    return state


# ----------------------------------------------------------------------------------------------------------- checkpoints


def assistant_layout(path: Path) -> str | None:
    """STOCK or LLAVA where the weights below `path` are those of an assistant, by their keys; else None."""
    from safetensors import SafetensorError, safe_open

    keys: set[str] = set()
    for file in checkpoints.weight_files(path):
        try:
            with safe_open(file, "pt") as opened:
                keys |= set(opened.keys())
        except (OSError, SafetensorError):
            return None  # said by who reads it
    if any(key.startswith("model.mm_projector.") for key in keys):
        return LLAVA
    return STOCK if any("multi_modal_projector." in key for key in keys) else None


def convert_into(folder: Path, path: Path, layout: str, to: str, versions: dict[str, str]) -> dict[str, Any]:
    """Write the assistant `path` into `folder`: a stock one as LLaVA's (`to` "llava") or the reverse ("transformers").

    Returns the receipt of `convert.convert`. Raises `UserError` for what has no equivalent on the other side, naming it,
    and for a result that does not compute the same.
    """
    if (layout, to) not in ((STOCK, LLAVA), (LLAVA, "transformers")):
        already = "; it is in transformers' layout already" if (layout, to) == (STOCK, "transformers") else ""
        raise UserError(f"{path}: holds an {CONTENT} (layout {layout}), of which {to} cannot be made{already}")
    if not path.is_dir():
        raise UserError(f"{path}: an {CONTENT} is a folder with config.json and tokenizer; name that folder")
    if (path / "adapter").is_dir():  # `adapters.ADAPTER`: the weights beside it are those of the base alone
        raise UserError(f"{path}: its adapter lies apart in {path / 'adapter'}, for which {to} has no place; merge it first: "
                        "aimv2_vlm.evaluation.generation.load_assistant opens it merged, save_pretrained writes that")
    state, config = checkpoints.read_safetensors(path)
    if not config:
        raise UserError(f"{path}: has no config.json, without which an {CONTENT} cannot be read")
    read = [*checkpoints.weight_files(path), *convert.existing(path, ["config.json", "model.safetensors.index.json"])]
    with_processor = [*PROCESSOR_FILES, "generation_config.json"] if (path / PROCESSOR_FILES[0]).is_file() else []
    for file in convert.existing(path, [*convert.TEXT_FILES, *with_processor]):
        shutil.copyfile(file, folder / file.name)
        read.append(file)
    notes: list[str] = []
    with convert.without_progress_bars():
        write = _write_llava if to == LLAVA else _write_stock
        keys = write(folder, path, state, config, read, notes)
        parameters = sum(math.prod(entry["shape"]) for entry in keys.values() if entry["to"])
        state.clear()  # from here on only what was written is in memory
        proof = _prove(path, folder, to)
    if left_out := [key for key, entry in keys.items() if not entry["to"]]:
        notes.append(f"left out, for {to} has no place for them: {checkpoints.name_some(left_out)}")
    written = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        "source": {"path": str(path), "layout": layout, "content": CONTENT,
                   "files": {os.path.relpath(file, path) if file.is_relative_to(path) else str(file): convert.sha256(file) for file in read}},
        "target": {"layout": to, "files": {str(file.relative_to(folder)): convert.sha256(file) for file in written}},
        "parameters": parameters, "keys": keys, "proof": proof, "notes": notes, "versions": versions,
    }  # fmt: skip


def _renamed(key: str, columns: tuple[int, ...], into: int) -> str | None:
    """`key` under the names of column `into` of `_RULES`, read as a name of one of `columns`; None for one that none knows."""
    for rule in _RULES:
        for column in columns:
            if key.startswith(rule[column]) and not (column == 0 and rule[0] == "model." and key.startswith("model.mm_projector.")):
                return rule[into] + key.removeprefix(rule[column])
    return None


# ----------------------------------------------------------------------------------------------------- stock -> LLaVA


def _write_llava(folder: Path, path: Path, state: checkpoints.State, config: dict, read: list[Path], notes: list[str]) -> Keys:
    """LLaVA's layout; returns the key map of the receipt (the tower's keys with its folder in front)."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import AutoConfig

    if config.get("model_type") not in ("llava", "llava_next"):
        raise UserError(f"{path}: config.json: model_type {config.get('model_type')!r}: only Llava and LlavaNext have an equivalent in LLaVA")
    stock = AutoConfig.from_pretrained(path, local_files_only=True)
    _check_stock(path, stock)
    named = {key: _renamed(key, (1, 2), 0) for key in state}
    if unknown := [key for key, name in named.items() if name is None]:
        raise UserError(f"{path}: LLaVA's layout has no place for {checkpoints.name_some(unknown)}")
    prefix = "model.vision_tower.vision_tower."
    tower = {name.removeprefix(prefix): state[key] for key, name in named.items() if name.startswith(prefix)}
    rest = {name: state[key].contiguous() for key, name in named.items() if not name.startswith(prefix)}

    plan = split_torch_state_dict_into_shards(rest, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE)
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: rest[key] for key in keys}, folder / name, metadata={"format": "pt"})
    if plan.is_sharded:
        _write_json(folder / "model.safetensors.index.json", {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    projector = {key: tensor for key, tensor in rest.items() if key.startswith("model.mm_projector.")}
    save_file(projector, folder / PROJECTOR_FILES[0], metadata={"format": "pt"})
    _write_json(folder / "config.json", _llava_config(path, stock, rest, notes))
    _write_tower(folder / TOWER, path, stock.vision_config, tower)
    notes += [
        (f"LLaVA's own code builds CLIP towers only: for {TOWER}/ (an AIMv2, in transformers' layout) it needs a tower class of its own that gives "
         "the normalised last features of all patches, and a transformers that knows Aimv2"),
        "mm_vision_tower is relative to this folder; LLaVA reads it relative to where it is started, and wants 'llava' in this folder's name",
    ]
    if not (folder / "tokenizer.model").is_file():
        notes.append("LLaVA opens its tokenizer with use_fast=False, which needs a tokenizer.model that this source does not have")
    where = {key: f"{TOWER}/{name.removeprefix(prefix)}" if name.startswith(prefix) else name for key, name in named.items()}
    return {key: {"to": [where[key]], "shape": list(tensor.shape)} for key, tensor in state.items()}


def _check_stock(path: Path, config: Any) -> None:
    """`UserError` naming the first key that LLaVA has no equivalent of."""
    text, vision = config.text_config, config.vision_config
    width = text.hidden_size // text.num_attention_heads
    checks = (
        ("text_config.model_type", text.model_type, "llama"),
        ("text_config.mlp_bias", getattr(text, "mlp_bias", False), False),
        ("text_config.head_dim", getattr(text, "head_dim", None) or width, width),
        ("vision_config.model_type", vision.model_type, "aimv2_vision_model"),
        ("vision_config.tie_last_hidden_states", getattr(vision, "tie_last_hidden_states", None), True),
        ("vision_config.use_head", getattr(vision, "use_head", None), False),
        ("projector_hidden_act", config.projector_hidden_act, "gelu"),
        ("multimodal_projector_bias", config.multimodal_projector_bias, True),
        ("vision_feature_layer", config.vision_feature_layer, -1),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, "full"),
        ("quantization_config", getattr(config, "quantization_config", None), None),
    )
    for key, found, wanted in checks:
        if found != wanted:
            raise UserError(f"{path}: config.json: {key}: {found!r} has no equivalent that is written in LLaVA's layout, only {wanted!r} has")


def _llava_config(path: Path, stock: Any, state: checkpoints.State, notes: list[str]) -> dict[str, Any]:
    """LLaVA's config.json: that of the Llama, with the numbers of rotary positions as older transformers read them."""
    from transformers import PreTrainedConfig

    text = stock.text_config.to_dict()
    for key in PreTrainedConfig().to_dict().keys() - {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}:
        text.pop(key, None)
    text.pop("model_type", None)
    rope = text.pop("rope_parameters", None) or {}
    theta, kind = rope.pop("rope_theta", 10_000.0), rope.get("rope_type", "default")
    if kind != "default":
        notes.append(f"rope_scaling of type {kind}: transformers 4.37, which LLaVA pins, may not know it")
    tiles: dict[str, Any] = {"image_aspect_ratio": "pad"}
    processor = _processor_section(path)
    if stock.model_type == "llava_next":
        # LLaVA writes (width, height), transformers (height, width).
        pinpoints = [[width, height] for height, width in stock.image_grid_pinpoints]
        tiles = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints, "mm_patch_merge_type": "spatial_unpad"}
        if processor.get("pad_square"):
            notes.append("tiling.pad_square: LLaVA's anyres has no such key; pad pictures to a square with the mean colour before its own processing")
    elif not processor.get("do_pad", True):
        tiles = {"image_aspect_ratio": "square"}
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    return text | {
        "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": theta, "rope_scaling": None if kind == "default" else rope,
        "torch_dtype": types.pop() if len(types) == 1 else "float32",
        "mm_vision_tower": TOWER, "mm_hidden_size": stock.vision_config.hidden_size, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch", "use_mm_proj": True,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_resampler_type": None, "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": False,
        "tokenizer_padding_side": "right", "tokenizer_model_max_length": text["max_position_embeddings"],
    } | tiles  # fmt: skip


def _write_tower(folder: Path, path: Path, config: Any, state: checkpoints.State) -> None:
    """The encoder as a stock checkpoint of its own, with the image processor that LLaVA looks for beside a tower."""
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessor

    folder.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config.to_dict() | {"architectures": ["Aimv2VisionModel"]})
    mean, std = image_statistics(path)
    side = config.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, resample=3,
                       image_mean=mean, image_std=std).save_pretrained(folder)  # fmt: skip


def _processor_section(path: Path) -> dict[str, Any]:
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (path / name).is_file():
            config = checkpoints.read_json(path / name)
            return config.get("image_processor", config)
    raise UserError(f"{path}: has no processor_config.json; an {CONTENT} is written with its processor")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- LLaVA -> stock


@dataclass
class _Tower:
    """Where an encoder came from: its folder, its tensors under stock names as stored, and its part of the key map."""

    folder: Path
    state: checkpoints.State
    keys: Keys


@dataclass
class _Llava:
    """A checkpoint in LLaVA's layout, opened in float32: encoder, Llama, the connector's and newline's tensors, the grid."""

    encoder: nn.Module
    llm: nn.Module
    extra: checkpoints.State
    tower: _Tower
    grid: tuple[int, int]  # rows, columns of tiles; (1, 1): one view and no newline
    pad_square: bool


def _open_llava(path: Path, state: checkpoints.State, config: dict) -> _Llava:
    """Raises `UserError` for every key that a stock Llava here has no equivalent of."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    checks = (
        ("model_type", ("llava_llama", "llava"), "only its Llama family is read"),
        ("mm_projector_type", ("mlp2x_gelu",), "the connector here has two linear layers with a GELU between"),
        ("mm_vision_select_layer", (-1,), "an assistant here reads the encoder's last features"),
        ("mm_vision_select_feature", ("cls_patch",), "an assistant here reads all patches, and AIMv2 has no class token to drop"),
        ("mm_use_im_start_end", (False, None), "no template here has tokens around the picture"),
        ("image_aspect_ratio", ("pad", "square", "anyres", None), "its way to lay out pictures is not known"),
    )
    for key, wanted, why in checks:
        if config.get(key) not in wanted:
            raise UserError(f"{path}: config.json: {key}: {config.get(key)!r}, but {why}")
    lines = {key.removeprefix("model."): tensor for key, tensor in state.items()
             if key.startswith("model.mm_projector.") or key == "model.image_newline"}  # fmt: skip
    inside = {key.removeprefix("model.vision_tower.vision_tower."): t for key, t in state.items() if key.startswith("model.vision_tower.")}
    encoder, tower = _open_tower(path, str(config.get("mm_vision_tower")), inside)
    if config.get("mm_hidden_size", encoder.config.hidden_size) != encoder.config.hidden_size:
        raise UserError(f"{path}: config.json: mm_hidden_size: {config['mm_hidden_size']}, but the tower {tower.folder} is "
                        f"{encoder.config.hidden_size} wide")  # fmt: skip

    known = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "dtype", "transformers_version", "rope_parameters"}
    scaling = dict(config.get("rope_scaling") or {"rope_type": "default"})
    rope = {"rope_theta": config.get("rope_theta", 10_000.0)} | scaling | {"rope_type": scaling.get("rope_type", scaling.pop("type", None))}
    llama = LlamaConfig(**{key: config[key] for key in known & config.keys()}, rope_parameters=rope)
    llama._attn_implementation = "sdpa"
    with no_init_weights():
        llm = LlamaForCausalLM(llama)
    others = ("model.mm_projector.", "model.vision_tower.", "model.image_newline")
    words = {key: tensor for key, tensor in state.items() if not key.startswith(others) and not key.endswith("inv_freq")}
    if llama.tie_word_embeddings:
        words.setdefault("lm_head.weight", words.get("model.embed_tokens.weight"))
    checkpoints.load_strictly(llm, words, path)

    grid = (1, 1)
    if config.get("image_aspect_ratio") == "anyres":
        grid = _grid(path, config, encoder.config.image_size)
        if "image_newline" not in lines:
            raise UserError(f"{path}: missing key model.image_newline, which mm_patch_merge_type spatial_unpad needs")
    processor = _processor_section(path) if convert.existing(path, ["processor_config.json"]) else {}
    pad_square = bool(processor.get("pad_square", False)) if grid != (1, 1) else config.get("image_aspect_ratio") == "pad"
    return _Llava(encoder.eval(), llm.eval(), lines, tower, grid, pad_square)


def _open_tower(path: Path, name: str, inside: checkpoints.State) -> tuple[nn.Module, _Tower]:
    """The encoder that config.json names; `inside`: tensors of a tower that was tuned and saved with the rest."""
    folder = path / name if (path / name).is_dir() else locate(name)
    config = checkpoints.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if str(config.get("model_type")).startswith(("clip", "siglip")):
        raise UserError(f"{path}: config.json: mm_vision_tower: {name} is a {config['model_type']} tower; only AIMv2 towers are converted "
                        "(transformers' own conversions of LLaVA are on the model hub as llava-hf)")  # fmt: skip
    state, before = (inside, "model.vision_tower.vision_tower.") if inside else (checkpoints.read_safetensors(folder)[0], f"{name}/")
    layout, renamed = checkpoints.to_transformers(state, str(folder))
    encoder = assemble_encoder(layout, renamed, config, folder, None, "sdpa")
    if layout.kept:  # not read off the tensors, and no matter but to a file that is to come back as it was
        encoder.config.initializer_range = config.get("initializer_range", encoder.config.initializer_range)
    own = checkpoints.encoder_part(layout, renamed)
    keys: Keys = {}
    for key, tensor in state.items():
        names = [name.removeprefix(layout.encoder_prefix) for name in checkpoints.transformers_names(layout, key)]
        keys[before + key] = {"to": [f"vision_tower.{name}" for name in names if name in own], "shape": list(tensor.shape)}
    return encoder, _Tower(folder, own, keys)


def _grid(path: Path, config: dict, tile: int) -> tuple[int, int]:
    pinpoints = config.get("image_grid_pinpoints")
    try:
        pinpoints = json.loads(pinpoints.replace("(", "[").replace(")", "]")) if isinstance(pinpoints, str) else pinpoints
        ((width, height),) = pinpoints
        if height % tile or width % tile or config.get("mm_patch_merge_type") != "spatial_unpad":
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(
            f"{path}: config.json: image_grid_pinpoints {config.get('image_grid_pinpoints')!r} with mm_patch_merge_type "
            f"{config.get('mm_patch_merge_type')!r}: an {CONTENT} here has one grid of {tile} px tiles and spatial_unpad"
        ) from None
    return height // tile, width // tile


def _write_stock(folder: Path, path: Path, state: checkpoints.State, config: dict, read: list[Path], notes: list[str]) -> Keys:
    """A stock Llava or LlavaNext with its processor; returns the key map of the receipt. `folder` has the source's tokenizer."""
    found = _open_llava(path, state, config)
    own = (path / PROCESSOR_FILES[0]).is_file()
    if found.tower.folder.is_dir():
        read += [*checkpoints.weight_files(found.tower.folder), *convert.existing(found.tower.folder, ["config.json", *convert.PICTURE_FILES])]
    mean, std = image_statistics(path if convert.existing(path, convert.PICTURE_FILES) else found.tower.folder)
    model, processor = build_assistant(
        found.encoder, found.llm, "x".join(map(str, found.grid)), tokenizer=str(folder), template=_template(folder, notes), image_mean=mean,
        image_std=std, pad_square=found.pad_square,
    )  # fmt: skip
    _fill_connector(model.model, _connector_named(found.extra, path), str(path))
    tensors = model.state_dict()
    if found.llm.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    keys: Keys = {}
    for key, tensor in state.items():
        if key.startswith("model.vision_tower.vision_tower."):
            continue  # told with the tower
        name = _renamed(key, (0,), 1)
        keys[key] = {"to": [_renamed(name, (1,), 2)] if name in tensors else [], "shape": list(tensor.shape)}
        if name in tensors and tensors[name].shape == tensor.shape:  # in the type that it had; grown embeddings are new
            tensors[name] = tensor
    tensors |= {f"model.vision_tower.{name}": tensor for name, tensor in found.tower.state.items()}
    kinds = {tensor.dtype for tensor in tensors.values()}
    if len(kinds) == 1:
        model.to(kinds.pop())  # what save_pretrained then notes in config.json
    model.save_pretrained(folder, state_dict={name: tensor.contiguous() for name, tensor in tensors.items()})
    if own:
        for file in convert.existing(path, ["generation_config.json"]):
            shutil.copyfile(file, folder / file.name)
    else:
        processor.save_pretrained(folder)
    return keys | found.tower.keys


def _template(folder: Path, notes: list[str]) -> str:
    """The tokenizer's own template, or Vicuna's with a note."""
    from transformers import AutoTokenizer

    try:
        if AutoTokenizer.from_pretrained(folder, local_files_only=True).chat_template:
            return "own"
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer beside the weights that opens: {str(error).strip().splitlines()[0]}") from None
    notes.append("the source has no chat template: it gets Vicuna's (LLaVA 1.5's); name another in processor and tokenizer if it was tuned with one")
    return "vicuna"


# --------------------------------------------------------------------------------------------------------------- proof


CONTROL = "gate and up projections of the decoder exchanged"


@torch.no_grad()
def _prove(path: Path, folder: Path, to: str) -> dict[str, Any]:
    """Logits of both sides, each opened from the disk, on the same random input; `UserError` above the tolerance."""
    llava, stock = (folder, path) if to == LLAVA else (path, folder)
    opened = _open_llava(llava, *checkpoints.read_safetensors(llava))
    pixels, before, after, told = _probe(opened)
    ours = llava_logits(opened, pixels, before, after)
    for layer in opened.llm.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
    control = convert.difference(ours, llava_logits(opened, pixels, before, after))
    grid, side = opened.grid, opened.encoder.config.image_size
    del opened
    theirs = stock_logits(stock, pixels, before, after, (grid[0] * side, grid[1] * side))
    difference = convert.difference(ours, theirs[:, : ours.shape[1]])  # a stock model may have rows for tokens that LLaVA has not
    if difference > convert.TOLERANCE:
        raise UserError(f"{path}: the result does not compute what the source does: logits differ by {difference:.1e} of the largest value "
                        f"(inf: another shape, or numbers that are not finite), allowed {convert.TOLERANCE:.0e} ({told}); "
                        "nothing was written")  # fmt: skip
    return {"largest_relative_difference": difference, "at": "logits", "tolerance": convert.TOLERANCE, "input": told,
            "relative_differences": {"logits": difference},
            "control": {"change": CONTROL, "output": "logits", "relative_difference": control}}  # fmt: skip


def _probe(opened: _Llava) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """(pixels VCHW, ids before the picture, ids behind it, what they are)."""
    generator = torch.Generator().manual_seed(convert.SEED)
    vision, rows, columns = opened.encoder.config, *opened.grid
    views = 1 if (rows, columns) == (1, 1) else 1 + rows * columns
    pixels = torch.randn(views, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
    # Below 256 there is neither an image token nor an added one in any tokenizer.
    before, after = (torch.randint(min(256, opened.llm.config.vocab_size), (TEXT_TOKENS,), generator=generator) for _ in range(2))
    told = (f"{views} views of {vision.image_size} px, normal noise, between {TEXT_TOKENS} and {TEXT_TOKENS} random tokens, "
            f"seed {convert.SEED}, float32")  # fmt: skip
    return pixels, before, after, told


@torch.no_grad()
def llava_logits(opened: _Llava, pixels_VCHW: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Logits (S, A) as LLaVA computes them: the picture's projected features stand between the embeddings of the texts.

    Tiles lie in their places, a newline vector ends every row of patches, and the overview comes first.
    """
    extra = {key: tensor.float() for key, tensor in opened.extra.items()}
    features_VND = opened.encoder(pixel_values=pixels_VCHW).last_hidden_state
    hidden_VND = F.gelu(F.linear(features_VND, extra["mm_projector.0.weight"], extra["mm_projector.0.bias"]))
    projected_VND = F.linear(hidden_VND, extra["mm_projector.2.weight"], extra["mm_projector.2.bias"])
    picture = projected_VND[0]
    if opened.grid != (1, 1):
        rows, columns = opened.grid
        side = round(projected_VND.shape[1] ** 0.5)
        tiles = projected_VND[1:].reshape(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
        newline = extra["image_newline"].expand(rows * side, 1, -1)
        picture = torch.cat([picture, torch.cat([tiles, newline], 1).flatten(0, 1)])
    words = opened.llm.get_input_embeddings()
    return opened.llm(inputs_embeds=torch.cat([words(before), picture, words(after)])[None], use_cache=False).logits[0]


@torch.no_grad()
def stock_logits(
    path: Path, pixels_VCHW: torch.Tensor, before: torch.Tensor, after: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Logits (S, A) of what anyone gets from this folder. size: (height, width) of a picture that fills every tile."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, local_files_only=True)
    if misfits := {kind: keys for kind, keys in info.items() if keys}:
        raise UserError(f"{path}: AutoModelForImageTextToText does not find every weight: {misfits}")
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    given: dict[str, Any] = {"pixel_values": pixels_VCHW}
    if len(pixels_VCHW) > 1:
        rows = size[0] // model.config.vision_config.patch_size
        patches = patches * len(pixels_VCHW) + rows
        given = {"pixel_values": pixels_VCHW[None], "image_sizes": torch.tensor([size])}
    picture = torch.full((patches,), model.config.image_token_index)
    ids = torch.cat([before, picture, after])[None]
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **given).logits[0]
