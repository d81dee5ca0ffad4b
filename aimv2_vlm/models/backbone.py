"""Image encoders behind one interface: AIMv2 and those it is compared with (paper 4.1), through stock transformers classes.

`load_backbone` opens CLIP, DFN-CLIP (CLIP's class), SigLIP, DINOv2 (with registers too), MAE and every AIMv2 layout, at any image size,
read after any block. Features are those of the last block after the encoder's final norm unless a layer is named.

Shapes: B batch, C channels, H, W picture, N tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aimv2_vlm.config import UserError
from aimv2_vlm.models.encoder import encode, load_encoder, locate

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Kind:
    """Where a family of encoders keeps what is needed. `model_class`: in transformers, None for AIMv2."""

    model_class: str | None
    model_types: tuple[str, ...]  # of config.json
    blocks: str  # the list of its blocks
    norm: str  # after the last one
    num_prefix: Callable[[Any], int] = lambda config: 1  # tokens before the patches: CLS, registers
    resizes: str = "argument"  # other image sizes by the forward pass: an argument, always, or at loading
    last_is_tied: bool = False  # whether `hidden_states[-1]` can be the normalised features, which is where Llava looks


KINDS = {
    "aimv2": Kind(None, ("aimv2", "aimv2_vision_model"), "encoder.layers", "rms_norm", lambda config: 0, "loading", True),
    "clip": Kind("CLIPVisionModel", ("clip", "clip_vision_model"), "encoder.layers", "post_layernorm"),
    "dfn_clip": Kind("CLIPVisionModel", (), "encoder.layers", "post_layernorm"),
    "siglip": Kind("SiglipVisionModel", ("siglip", "siglip_vision_model"), "encoder.layers", "post_layernorm", lambda config: 0, last_is_tied=True),
    "dinov2": Kind("Dinov2Model", ("dinov2",), "encoder.layer", "layernorm", resizes="always"),
    "dinov2_registers": Kind("Dinov2WithRegistersModel", ("dinov2_with_registers",), "encoder.layer", "layernorm",
                             lambda config: 1 + config.num_register_tokens, "always"),
    "mae": Kind("ViTMAEModel", ("vit_mae",), "layers", "layernorm"),
}


class Backbone(nn.Module):
    """One encoder: pictures -> features, and the sizes a head or connector on it needs.

    `kind`, `width`, `num_heads`, `patch_size`, `image_size`, `num_blocks` (those that run), `num_tokens` of a picture; `model`: the stock
    module; `says`: which tokens of which layer the features are, in words.
    """

    def __init__(self, kind: str, model: nn.Module, image_size: int | None = None, layer: int | None = None, tokens: str = "all"):
        """`layer`: None for the last block and the final norm; else features as that block left them, 0 being the embeddings, L and
        -1 the last of L blocks, -2 the one before it. `tokens`: all, or patches (without CLS and registers). Raises UserError."""
        super().__init__()
        if tokens not in ("all", "patches"):
            raise UserError(f"encoder.tokens: {tokens!r} is unknown; choose all or patches")
        self.kind, self.model, self.about = kind, model, KINDS[kind]
        config = model.config
        self.width, self.num_heads, self.patch_size = config.hidden_size, config.num_attention_heads, config.patch_size
        self.image_size, own_size = image_size or config.image_size, config.image_size
        if self.image_size != own_size and self.image_size % self.patch_size:
            raise UserError(f"encoder.image_size: {self.image_size} is not a multiple of the patch size {self.patch_size}")
        self.resizes = self.image_size != own_size and self.about.resizes == "argument"
        self.grid_side = self.image_size // self.patch_size
        self.num_prefix = self.about.num_prefix(config)
        self.cut = 0 if tokens == "all" else self.num_prefix
        self.num_blocks = self._keep_blocks(layer)
        names = {0: "", 1: "CLS and "}.get(self.num_prefix - self.cut, f"CLS, {self.num_prefix - 1} registers and ")
        where = "last layer, normalised" if layer is None else f"block {self.num_blocks}, not normalised"
        self.says = f"{names}{self.grid_side**2} patches, {where}"

    def _keep_blocks(self, layer: int | None) -> int:
        """Blocks behind `layer` and the final norm are taken out: what nobody reads is not computed."""
        blocks = self.model.get_submodule(self.about.blocks)
        if layer is None:
            return len(blocks)
        if not -len(blocks) - 1 <= layer <= len(blocks):
            raise UserError(f"encoder.layer: {layer}, but the encoder has {len(blocks)} blocks; give 0 (embeddings) to {len(blocks)}, "
                            f"or -1 to -{len(blocks)}")
        kept = layer if layer >= 0 else len(blocks) + 1 + layer
        del blocks[kept:]
        parent, _, name = self.about.norm.rpartition(".")
        setattr(self.model.get_submodule(parent) if parent else self.model, name, nn.Identity())
        if hasattr(self.model.config, "num_hidden_layers"):
            self.model.config.num_hidden_layers = kept
        return kept

    @property
    def num_tokens(self) -> int:
        """N of the features of one picture."""
        return self.grid_side**2 + self.num_prefix - self.cut

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Pictures normalised with the checkpoint's mean and std -> features (B, N, D)."""
        if self.kind == "aimv2":
            return encode(self.model, pixels_BCHW)
        arguments: dict[str, Any] = {"interpolate_pos_encoding": True} if self.resizes else {}
        if self.kind == "mae":  # it would hide three quarters of the patches, and shuffle them
            arguments["noise"] = torch.arange(self.grid_side**2, device=pixels_BCHW.device).expand(len(pixels_BCHW), -1)
        features_BND = self.model(pixel_values=pixels_BCHW, **arguments).last_hidden_state
        if self.about.model_class == "CLIPVisionModel":  # its last hidden state is before the norm, which it applies to CLS alone
            features_BND = self.model.post_layernorm(features_BND)
        return features_BND[:, self.cut :]

    def forward_flops(self, rows: float) -> float:
        """Operations of the patch projection, the blocks' matrix products and dense attention on `rows` pictures."""
        tokens = self.grid_side**2 + self.num_prefix
        linears = sum(m.weight.numel() for m in self.model.get_submodule(self.about.blocks).modules() if isinstance(m, nn.Linear))
        patches = self.grid_side**2 * 3 * self.patch_size**2 * self.width
        return 2 * rows * (linears * tokens + patches + 2 * self.num_blocks * tokens**2 * self.width)


def load_backbone(
    path_or_name: str | Path, kind: str = "auto", image_size: int | None = None, attention: str = "sdpa", layer: int | None = None,
    tokens: str = "all",
) -> Backbone:
    """The frozen encoder of a checkpoint, in float32 and evaluation mode.

    `path_or_name`: folder, .safetensors file (AIMv2) or hub name. `kind`: a key of KINDS, or `auto`: by config.json's model_type; other
    arguments as in `Backbone`. Only safetensors are read. Raises UserError for an unknown kind, missing weights, impossible sizes.
    """
    if kind != "auto" and kind not in KINDS:
        raise UserError(f"encoder.kind: {kind!r} is unknown; choose auto, {', '.join(KINDS)}")
    folder = locate(path_or_name, also=PROCESSOR_FILES)
    kind = recognised_kind(folder) if kind == "auto" else kind
    about = KINDS[kind]
    if about.model_class is None:
        return Backbone(kind, load_encoder(folder, image_size, attention), image_size, layer, tokens).eval()
    model = _load_stock(folder, about, attention)
    if kind == "mae":
        model.config.mask_ratio = 0.0
    if kind == "siglip":
        model.use_head = False  # its pooled output is not read
    return Backbone(kind, model, image_size, layer, tokens).eval()


def kind_of(encoder: nn.Module) -> str:
    """The kind of a stock module. Raises UserError."""
    for kind, about in KINDS.items():
        if encoder.config.model_type in about.model_types:
            return kind
    raise UserError(f"encoder: a {type(encoder).__name__} is none of {', '.join(KINDS)}")


def recognised_kind(folder: Path) -> str:
    """The kind of a checkpoint by its config.json; without one it can only be AIMv2 in one of its layouts, which `load_encoder` checks."""
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "aimv2")
    except OSError:
        return "aimv2"
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: not JSON ({error})") from None
    for kind, about in KINDS.items():
        if model_type in about.model_types:
            return kind
    known = sorted(name for about in KINDS.values() for name in about.model_types)
    raise UserError(f"{folder}: model_type {model_type!r} is none of {', '.join(known)}; set encoder.kind if one of these classes fits")


def _load_stock(folder: Path, about: Kind, attention: str) -> nn.Module:
    import transformers

    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no .safetensors file; pickled weights (.bin) are not opened, save the model with safetensors first")
    return open_whole(getattr(transformers, about.model_class), folder, attention)


def open_whole(model_class: type, folder: str | Path, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A stock model of a folder or hub name, from safetensors alone; UserError where weights are missing (those of other towers may be there)."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a table of every key of the other tower says nothing new
    try:
        model, found = model_class.from_pretrained(
            folder, use_safetensors=True, dtype=dtype, attn_implementation=attention, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: cannot be opened as {model_class.__name__} ({str(error).strip().splitlines()[0]})") from None
    finally:
        logging.set_verbosity(verbosity)
    if bad := [*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])]:
        raise UserError(f"{folder}: not a whole {model_class.__name__}: missing or of another shape: {', '.join(sorted(map(str, bad))[:4])}")
    return model
