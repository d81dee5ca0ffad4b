"""Checkpoint layouts: recognised by their keys, renamed to this project's and transformers' names, loaded strictly.

| layout | where from | names after `to_transformers` | encoder under |
|---|---|---|---|
| `apple_encoder` | Apple's released encoders, fixed (learned positions) and native | `Aimv2VisionModel` | |
| `apple_two_tower` | Apple's zero-shot model | `Aimv2Model` | `vision_model.` |
| `apple_trainer` | Apple's pre-training code | `AIMv2ForPreTraining` | `encoder.` |
| `transformers_encoder` | transformers, and all that this project writes | `Aimv2VisionModel` | |
| `transformers_two_tower` | transformers | `Aimv2Model` | `vision_model.` |

Only safetensors and JSON are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from aimv2_vlm.config import UserError

State = dict[str, torch.Tensor]
Rules = tuple[tuple[str, str], ...]

HEAD_WIDTH = 128

# Apple's names inside one block -> transformers'. "[qkv]" stands for three tensors stored as one, q above k above v.
_BLOCK = {
    r"attn\.qkv\.weight": "attention.[qkv]_proj.weight",
    r"attn\.([qkv])_proj\.weight": r"attention.\2_proj.weight",
    r"attn\.proj\.weight": "attention.out_proj.weight",
    r"mlp\.fc1\.weight": "ffn.gate_proj.weight",
    r"mlp\.fc2\.weight": "ffn.down_proj.weight",
    r"mlp\.fc3\.weight": "ffn.up_proj.weight",
    r"norm_1\.weight": "rms_norm1.weight",
    r"norm_2\.weight": "rms_norm2.weight",
}


def _trunk(source: str, blocks: str, norm: str) -> Rules:
    """Rules for a stack of blocks and its last norm."""
    inside = tuple((rf"{source}trunk\.blocks\.(\d+)\.{old}", rf"{blocks}.\1.{new}") for old, new in _BLOCK.items())
    return (*inside, (rf"{source}trunk\.post_trunk_norm\.weight", f"{norm}.weight"))


def _image_encoder(source: str, target: str) -> Rules:
    """Rules for Apple's image encoder below the regular expression `source`."""
    preprocessor = rf"{source}preprocessor\.(?:blocks\.0\.)?"
    return (
        (rf"{preprocessor}patchifier\.proj\.(weight|bias)", rf"{target}embeddings.patch_embed.\1"),
        (rf"{preprocessor}patchifier\.norm\.weight", f"{target}embeddings.rms_norm.weight"),
        (rf"{preprocessor}pos_embed", f"{target}embeddings.position_embedding.weight"),
        *_trunk(source, f"{target}encoder.layers", f"{target}rms_norm"),
    )


_DECODER_INPUT = r"models\.text_decoder\.preprocessor\."


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint names its tensors: `marker` is a key that only it has."""

    name: str
    marker: str
    encoder_prefix: str
    rules: Rules


LAYOUTS = (
    Layout("apple_encoder", "preprocessor.patchifier.proj.weight", "", _image_encoder("", "")),
    Layout(
        "apple_two_tower",
        "image_encoder.preprocessor.patchifier.proj.weight",
        "vision_model.",
        (
            *_image_encoder(r"image_encoder\.", "vision_model."),
            (r"image_encoder\.head\.cls_token", "vision_model.head.cls_token"),
            (r"image_encoder\.head\.([kv])\.weight", r"vision_model.head.\1_proj.weight"),
            (r"image_encoder\.head\.linear\.(weight|bias)", r"vision_model.head.output_proj.\1"),
            (r"text_encoder\.preprocessor\.text_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
            (
                r"text_encoder\.preprocessor\.positional_embedding",
                "text_model.embeddings.position_embedding.weight",
            ),
            *_trunk(r"text_encoder\.", "text_model.encoder.layers", "text_model.rms_norm"),
            (r"image_projector\.weight", "visual_projection.weight"),
            (r"text_projector\.weight", "text_projection.weight"),
            (r"log_logit_scale", "logit_scale"),
        ),
    ),
    Layout(
        "apple_trainer",
        "models.image_encoder.preprocessor.blocks.0.patchifier.proj.weight",
        "encoder.",
        (
            *_image_encoder(r"models\.image_encoder\.", "encoder."),
            (_DECODER_INPUT + r"vision_preprocessor\.module\.(weight|bias)", r"image_projection.\1"),
            (_DECODER_INPUT + r"text_preprocessor\.cls_token", "bos"),
            (_DECODER_INPUT + r"text_preprocessor\.text_embedding\.weight", "token_embedding.weight"),
            (_DECODER_INPUT + r"text_preprocessor\.positional_embedding", "text_position_embedding.weight"),
            *_trunk(r"models\.text_decoder\.", "decoder.layers", "decoder_norm"),
            (r"models\.text_decoder\.head\.blocks\.0\.linear\.weight", "text_head.weight"),
            (r"models\.text_decoder\.head\.blocks\.1\.linear\.weight", "pixel_head.weight"),
        ),
    ),
    Layout("transformers_encoder", "embeddings.patch_embed.weight", "", ((r"(.*)", r"\1"),)),
    Layout(
        "transformers_two_tower",
        "vision_model.embeddings.patch_embed.weight",
        "vision_model.",
        ((r"((?:vision_model|text_model)\..*|(?:visual|text)_projection\.weight|logit_scale)", r"\1"),),
    ),
)

# Stored with leading dimensions of size one, or not, depending on the layout: (target name, number of dimensions kept).
_SQUEEZED = {"position_embedding.weight": 2, "bos": 1}


def name_some(keys: Iterable[str], limit: int = 4) -> str:
    """'a, b and 7 more': keys for an error line."""
    keys = sorted(keys)
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def detect_layout(keys: Iterable[str], source: str = "checkpoint") -> Layout:
    """The layout that these keys are in; raises `UserError` naming keys when it is none that is known."""
    keys = set(keys)
    for layout in LAYOUTS:
        if layout.marker in keys:
            return layout
    raise UserError(
        f"{source}: not a known AIMv2 layout: none of {', '.join(layout.marker for layout in LAYOUTS)} is among its "
        f"{len(keys)} keys ({name_some(keys)}); give a checkpoint of Apple's or of transformers' AIMv2"
    )


def to_transformers(state: State, source: str = "checkpoint") -> tuple[Layout, State]:
    """Rename every tensor (see the table above); raises `UserError` naming the keys that no rule knows."""
    layout = detect_layout(state, source)
    renamed: State = {}
    unknown = []
    for key, tensor in state.items():
        match = next((m.expand(new) for old, new in layout.rules if (m := re.fullmatch(old, key))), None)
        if match is None:
            unknown.append(key)
        elif "[qkv]" in match:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[match.replace("[qkv]", letter)] = part.contiguous()
        else:
            dims = next((dims for ending, dims in _SQUEEZED.items() if match.endswith(ending)), tensor.dim())
            renamed[match] = tensor.reshape(tensor.shape[tensor.dim() - dims :]) if tensor.dim() > dims else tensor
    if unknown:
        raise UserError(f"{source}: unexpected keys for the layout {layout.name}: {name_some(unknown)}")
    return layout, renamed


def encoder_part(layout: Layout, renamed: State) -> State:
    """The image encoder's tensors under `Aimv2VisionModel`'s names, without a pooling head."""
    prefix = layout.encoder_prefix
    inside = {key.removeprefix(prefix): tensor for key, tensor in renamed.items() if key.startswith(prefix)}
    return {key: tensor for key, tensor in inside.items() if not key.startswith("head.")}


def heads_from_width(width: int, key: str, source: str | Path) -> int:
    """Number of attention heads where no config states it: every AIMv2 head is 128 wide."""
    if width % HEAD_WIDTH:
        raise UserError(
            f"{source}: the number of heads is unknown and width {width} is no multiple of {HEAD_WIDTH}; "
            f"put a config.json with {key} beside the weights"
        )
    return width // HEAD_WIDTH


def read_json(path: Path) -> dict:
    """A JSON object; `UserError` when the file is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_safetensors(path: str | Path) -> tuple[State, dict]:
    """All tensors of a checkpoint and the config.json beside them ({} without one).

    `path` is a .safetensors file, or a folder with `model.safetensors`, or with `model.safetensors.index.json` and its
    shards, or with a single .safetensors file. Raises `UserError` when there is none, or when only a pickle is there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    folder = path.parent if path.is_file() else path
    state: State = {}
    for file in _weight_files(path):
        try:
            part = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: not readable as safetensors: {error}") from error
        if twice := state.keys() & part.keys():
            raise UserError(f"{file}: keys that another shard holds too: {name_some(twice)}")
        state.update(part)
    config = folder / "config.json"
    return state, read_json(config) if config.is_file() else {}


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: only .safetensors files are read (pickles can run code); convert it first")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index}: key weight_map: missing or empty")
        files = sorted({str(name) for name in names.values()})
        for name in files:
            if Path(name).name != name or not (path / name).is_file():
                raise UserError(f"{index}: key weight_map: {name!r} is no file of this folder; fetch it again")
        return [path / name for name in files]
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise UserError(
            f"{path}: several .safetensors files and no index ({name_some(f.name for f in found)}); name one"
        )
    pickles = name_some(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
    hint = f"only pickles ({pickles}), which are never read; convert them to safetensors" if pickles else "no weights"
    raise UserError(f"{path}: no model.safetensors: {hint}")


def load_strictly(module: nn.Module, state: State, source: str | Path) -> None:
    """Copy `state` into `module`; raises `UserError` naming every kind of misfit: missing, unexpected, other shape."""
    own = module.state_dict()
    misfits = {
        "missing keys": own.keys() - state.keys(),
        "unexpected keys": state.keys() - own.keys(),
        "other shapes": {
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        },
    }
    if any(misfits.values()):
        named = "; ".join(f"{kind}: {name_some(keys)}" for kind, keys in misfits.items() if keys)
        raise UserError(f"{source}: the weights do not fit the model: {named}")
    module.load_state_dict(state)
