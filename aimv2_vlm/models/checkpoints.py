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

import hashlib
import json
import os
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

# A rule is (name in the layout, name after `to_transformers`); it is read in both directions. "#" stands for a block's
# number, "[qkv]" for one of the three letters; where the layout's name lacks it, the three are stored as one tensor, q
# above k above v.
_JOINED = ("attn.qkv.weight", "attention.[qkv]_proj.weight")
_SEPARATE = ("attn.[qkv]_proj.weight", "attention.[qkv]_proj.weight")
_BLOCK = (
    ("attn.proj.weight", "attention.out_proj.weight"),
    ("mlp.fc1.weight", "ffn.gate_proj.weight"),
    ("mlp.fc2.weight", "ffn.down_proj.weight"),
    ("mlp.fc3.weight", "ffn.up_proj.weight"),
    ("norm_1.weight", "rms_norm1.weight"),
    ("norm_2.weight", "rms_norm2.weight"),
)


def _trunk(source: str, blocks: str, norm: str, qkv: Rules) -> Rules:
    """Rules for a stack of blocks and its last norm; both forms of `qkv` are read, the first is the one written."""
    inside = tuple((f"{source}trunk.blocks.#.{old}", f"{blocks}.#.{new}") for old, new in (*qkv, *_BLOCK))
    return (*inside, (f"{source}trunk.post_trunk_norm.weight", f"{norm}.weight"))


def _image_encoder(source: str, target: str, preprocessor: str = "preprocessor.", qkv: Rules = (_JOINED, _SEPARATE)) -> Rules:
    """Rules for Apple's image encoder, whose names begin with `source`."""
    return (
        (f"{source}{preprocessor}patchifier.proj.weight", f"{target}embeddings.patch_embed.weight"),
        (f"{source}{preprocessor}patchifier.proj.bias", f"{target}embeddings.patch_embed.bias"),
        (f"{source}{preprocessor}patchifier.norm.weight", f"{target}embeddings.rms_norm.weight"),
        (f"{source}{preprocessor}pos_embed", f"{target}embeddings.position_embedding.weight"),
        *_trunk(source, f"{target}encoder.layers", f"{target}rms_norm", qkv),
    )


_DECODER_INPUT = "models.text_decoder.preprocessor."
_DECODER_HEAD = "models.text_decoder.head.blocks."


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint names its tensors: `marker` is a key that only it has.

    `kept`: in transformers' own layouts, which have no rules, a regular expression of the names that are right already.
    """

    name: str
    marker: str
    encoder_prefix: str
    rules: Rules = ()
    kept: str = ""


LAYOUTS = (
    Layout("apple_encoder", "preprocessor.patchifier.proj.weight", "", _image_encoder("", "")),
    Layout(
        "apple_two_tower",
        "image_encoder.preprocessor.patchifier.proj.weight",
        "vision_model.",
        (
            *_image_encoder("image_encoder.", "vision_model."),
            ("image_encoder.head.cls_token", "vision_model.head.cls_token"),
            ("image_encoder.head.k.weight", "vision_model.head.k_proj.weight"),
            ("image_encoder.head.v.weight", "vision_model.head.v_proj.weight"),
            ("image_encoder.head.linear.weight", "vision_model.head.output_proj.weight"),
            ("image_encoder.head.linear.bias", "vision_model.head.output_proj.bias"),
            ("text_encoder.preprocessor.text_embedding.weight", "text_model.embeddings.token_embedding.weight"),
            ("text_encoder.preprocessor.positional_embedding", "text_model.embeddings.position_embedding.weight"),
            *_trunk("text_encoder.", "text_model.encoder.layers", "text_model.rms_norm", (_JOINED, _SEPARATE)),
            ("image_projector.weight", "visual_projection.weight"),
            ("text_projector.weight", "text_projection.weight"),
            ("log_logit_scale", "logit_scale"),
        ),
    ),
    Layout(
        "apple_trainer",
        "models.image_encoder.preprocessor.blocks.0.patchifier.proj.weight",
        "encoder.",
        (
            *_image_encoder("models.image_encoder.", "encoder.", "preprocessor.blocks.0.", (_SEPARATE, _JOINED)),
            (_DECODER_INPUT + "vision_preprocessor.module.weight", "image_projection.weight"),
            (_DECODER_INPUT + "vision_preprocessor.module.bias", "image_projection.bias"),
            (_DECODER_INPUT + "text_preprocessor.cls_token", "bos"),
            (_DECODER_INPUT + "text_preprocessor.text_embedding.weight", "token_embedding.weight"),
            (_DECODER_INPUT + "text_preprocessor.positional_embedding", "text_position_embedding.weight"),
            *_trunk("models.text_decoder.", "decoder.layers", "decoder_norm", (_SEPARATE, _JOINED)),
            (_DECODER_HEAD + "0.linear.weight", "text_head.weight"),
            (_DECODER_HEAD + "1.linear.weight", "pixel_head.weight"),
        ),
    ),
    Layout("transformers_encoder", "embeddings.patch_embed.weight", "", kept=r".*"),
    Layout(
        "transformers_two_tower",
        "vision_model.embeddings.patch_embed.weight",
        "vision_model.",
        kept=r"(?:vision_model|text_model)\..*|(?:visual|text)_projection\.weight|logit_scale",
    ),
)

# Stored with leading dimensions of size one, or not, depending on the layout: (end of the name, number of dimensions).
_DIMS = {"position_embedding.weight": 2, "bos": 1}  # after `to_transformers`
_APPLE_DIMS = {"pos_embed": 3, "text_preprocessor.cls_token": 3}


def _pattern(template: str) -> str:
    return re.escape(template).replace(r"\#", r"(?P<number>\d+)").replace(r"\[qkv\]", "(?P<letter>[qkv])")


def _counterparts(name: str, rules: Rules) -> list[str]:
    """The names that `name` has on the other side of the first rule that knows it: three for one that joins q, k and v."""
    for old, new in rules:
        if found := re.fullmatch(_pattern(old), name):
            found = found.groupdict()
            filled = new.replace("#", found.get("number") or "")
            letters = found.get("letter") or "qkv"
            return [filled.replace("[qkv]", letter) for letter in letters] if "[qkv]" in new else [filled]
    return []


def transformers_names(layout: Layout, key: str) -> list[str]:
    """What `to_transformers` makes of this key: one name, three where q, k and v are stored as one, none if unknown."""
    if layout.kept:
        return [key] if re.fullmatch(layout.kept, key) else []
    return _counterparts(key, layout.rules)


def stored_name(layout: Layout, name: str) -> str | None:
    """The key under which the layout stores what `to_transformers` calls `name`; None where it has no place for it."""
    if layout.kept:
        return name if re.fullmatch(layout.kept, name) else None
    return next(iter(_counterparts(name, tuple((new, old) for old, new in layout.rules))), None)


def _with_dims(tensor: torch.Tensor, name: str, dims: dict[str, int]) -> torch.Tensor:
    """Leading dimensions of size one added or taken away, where the name asks for it; other shapes stay as they are."""
    wanted = next((number for ending, number in dims.items() if name.endswith(ending)), tensor.dim())
    extra = tensor.dim() - wanted
    if extra > 0 and all(size == 1 for size in tensor.shape[:extra]):
        return tensor.reshape(tensor.shape[extra:])
    return tensor[(None,) * -extra] if extra < 0 else tensor


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


def layout_named(name: str) -> Layout:
    return next(layout for layout in LAYOUTS if layout.name == name)


def to_transformers(state: State, source: str = "checkpoint") -> tuple[Layout, State]:
    """Rename every tensor (see the table above).

    Raises `UserError` naming the keys that no rule knows, or one that cannot be cut into q, k and v.
    """
    layout = detect_layout(state, source)
    renamed: State = {}
    names = {key: transformers_names(layout, key) for key in state}
    if unknown := [key for key in state if not names[key]]:
        raise UserError(f"{source}: unexpected keys for the layout {layout.name}: {name_some(unknown)}")
    for key, tensor in state.items():
        if len(names[key]) == 3:
            if tensor.dim() != 2 or len(tensor) % 3:
                raise UserError(f"{source}: {key}: shape {tuple(tensor.shape)} is not that of q, k and v in one")
            renamed.update((name, part.contiguous()) for name, part in zip(names[key], tensor.chunk(3), strict=True))
        else:
            renamed[names[key][0]] = _with_dims(tensor, names[key][0], _DIMS)
    return layout, renamed


def from_transformers(renamed: State, layout: Layout, source: str = "checkpoint") -> State:
    """The inverse of `to_transformers`: the tensors under the layout's own keys, q, k and v in one where it has them so.

    Raises `UserError` naming what the layout has no key for, or where one of q, k and v is missing.
    """
    keys = {name: stored_name(layout, name) for name in renamed}
    if unknown := [name for name, key in keys.items() if key is None]:
        raise UserError(f"{source}: the layout {layout.name} has no place for {name_some(unknown)}")
    state: State = {}
    for key in dict.fromkeys(keys.values()):
        names = transformers_names(layout, key)
        if missing := [name for name in names if name not in renamed]:
            raise UserError(f"{source}: missing keys: {name_some(missing)}")
        tensor = renamed[names[0]] if len(names) == 1 else torch.cat([renamed[name] for name in names])
        state[key] = _with_dims(tensor, key, _APPLE_DIMS if layout.rules else {})
    return state


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
    for file in weight_files(path):
        try:
            part = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: not readable as safetensors: {error}") from error
        if twice := state.keys() & part.keys():
            raise UserError(f"{file}: keys that another shard holds too: {name_some(twice)}")
        state.update(part)
    config = folder / "config.json"
    return state, read_json(config) if config.is_file() else {}


def weight_files(path: Path) -> list[Path]:
    """The .safetensors files that `read_safetensors` reads; raises `UserError` as it does."""
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


def weights_digest(path: str | Path) -> str:
    """Sixteen hexadecimal digits that tell one training state of a local checkpoint from another, without reading it whole; of a hub name, of the name.

    Of `path`, or of each .safetensors file in it, the size and 256 blocks spread over it: training changes every one of them.
    """
    place = Path(path).expanduser()
    digest = hashlib.sha256() if place.exists() else hashlib.sha256(str(path).encode())
    for file in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for block in range(256):
                digest.update(os.pread(stream.fileno(), 4096, size * block // 256))
    return digest.hexdigest()[:16]


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
