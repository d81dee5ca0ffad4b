"""The image encoder: `transformers.Aimv2VisionModel` with Apple's initialisation, from any known layout (paper 2.1).

Features are the normalised ones (`last_hidden_state`). `tie_last_hidden_states` in the config makes `hidden_states[-1]`
the same tensor, so that Llava and LlavaNext, which read `hidden_states`, get them too.

Shapes: B batch, C channels, H, W picture, N image patches, D width, P values in one patch.
"""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Aimv2VisionConfig, Aimv2VisionModel
from transformers.initialization import no_init_weights

from aimv2_vlm.config import UserError
from aimv2_vlm.models import checkpoints, masks

POSITIONS = "embeddings.position_embedding.weight"


def build_encoder(
    *,
    image_size: int,
    patch_size: int = 14,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    position_embedding: str = "learned",
    attention: str = "sdpa",
    generator: torch.Generator | None = None,
) -> Aimv2VisionModel:
    """A fresh encoder with Apple's initialisation, drawn from `generator` or else from torch's global one.

    `position_embedding`: "learned" (fixed image size) or "sincos" (native resolution). Raises `UserError` for sizes
    that cannot be.
    """
    if position_embedding not in ("learned", "sincos"):
        raise UserError(f"position_embedding: {position_embedding!r} is unknown; choose learned or sincos")
    encoder = _uninitialized(
        Aimv2VisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            is_native=position_embedding == "sincos",
        ),
        attention,
    )
    initialize_encoder(encoder, generator)
    return encoder


def _uninitialized(config: Aimv2VisionConfig, attention: str) -> Aimv2VisionModel:
    """The stock model with memory for its weights and nothing drawn yet."""
    masks.check_attention(attention)
    if config.image_size % config.patch_size:
        raise UserError(f"image_size: {config.image_size} is not a multiple of the patch size {config.patch_size}")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"num_heads: {config.num_attention_heads} heads do not divide the encoder's width {config.hidden_size}"
        )
    if config.is_native and config.hidden_size % 4:
        raise UserError(f"hidden_size: sincos positions need a multiple of 4, not {config.hidden_size}")
    config.use_head = False
    config.tie_last_hidden_states = True
    config._attn_implementation = attention
    with no_init_weights():
        return Aimv2VisionModel(config)


def xavier_uniform_linears(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Apple's initialisation of a trunk: every linear Xavier-uniform."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight, generator=generator)


@torch.no_grad()
def initialize_encoder(encoder: Aimv2VisionModel, generator: torch.Generator | None = None) -> None:
    """Draw every weight as Apple does. The stock N(0, 0.02) makes a small random encoder almost the identity."""
    patch_embed = encoder.embeddings.patch_embed
    nn.init.xavier_uniform_(patch_embed.weight.view(patch_embed.out_channels, -1), generator=generator)
    nn.init.zeros_(patch_embed.bias)
    if not encoder.config.is_native:
        nn.init.normal_(encoder.embeddings.position_embedding.weight, std=0.02, generator=generator)
    xavier_uniform_linears(encoder.encoder, generator)
    norms = [norm for layer in encoder.encoder.layers for norm in (layer.rms_norm1, layer.rms_norm2)]
    for norm in (encoder.embeddings.rms_norm, *norms, encoder.rms_norm):
        nn.init.ones_(norm.weight)


class NativePictures(NamedTuple):
    """Pictures of several sizes, patch by patch; rows are filled up with zeros to the same number of patches.

    `patches_BNP`: normalised values, a patch's in the order (channel, row, column). `positions_BN2`: row and column of
    each patch in its picture. `num_real_B`: patches of each picture.
    """

    patches_BNP: torch.Tensor
    positions_BN2: torch.Tensor
    num_real_B: torch.Tensor


def num_patches_of(encoder: Aimv2VisionModel, pictures: torch.Tensor | NativePictures) -> int:
    """N: patches of a row."""
    if isinstance(pictures, NativePictures):
        return pictures.patches_BNP.shape[1]
    patch_size = encoder.config.patch_size
    return (pictures.shape[-2] // patch_size) * (pictures.shape[-1] // patch_size)


def encode(
    encoder: Aimv2VisionModel, pictures: torch.Tensor | NativePictures, prefix_lengths_B: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalised features (B, N, D); bidirectional without `prefix_lengths_B`, with prefix attention otherwise.

    `pictures`: (B, C, H, W), or several sizes in one batch (for an encoder with sin-cos positions), where the places
    behind a picture's patches are attended to as well (paper, native resolution). Raises `UserError` when the encoder
    runs an attention implementation under which the mask is not proved, or has no positions for pictures of any size.
    """
    attention = masks.check_attention(encoder.config._attn_implementation)
    mask_B1NN = None
    if prefix_lengths_B is not None:
        can_attend_B1NN = masks.prefix_can_attend(prefix_lengths_B, num_patches_of(encoder, pictures))
        mask_B1NN = masks.for_attention(can_attend_B1NN, attention, encoder.dtype)
    if not isinstance(pictures, NativePictures):
        return encoder(pixel_values=pictures, attention_mask=mask_B1NN).last_hidden_state
    # The stock forward lays out one grid for the whole batch; this is the same computation with one for each picture.
    if not encoder.config.is_native:
        raise UserError("encoder: pictures of several sizes need position_embedding: sincos; this one has learned positions")
    embeddings = encoder.embeddings
    patch_embed = embeddings.patch_embed
    patches_BND = embeddings.rms_norm(F.linear(pictures.patches_BNP, patch_embed.weight.flatten(1), patch_embed.bias))
    patches_BND = patches_BND + sincos_positions(pictures.positions_BN2, encoder.config.hidden_size).to(patches_BND.dtype)
    return encoder.rms_norm(encoder.encoder(inputs_embeds=patches_BND, attention_mask=mask_B1NN).last_hidden_state)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """What is computed here stays in its own precision, whatever the caller's autocast says."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else contextlib.nullcontext()


def sincos_positions(positions_BN2: torch.Tensor, width: int) -> torch.Tensor:
    """(B, N, D) laid out [sin column | cos column | sin row | cos row], as transformers and Apple do."""
    frequency = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64, device=positions_BN2.device) / (width // 4))
    row_BNF, column_BNF = (positions_BN2[..., axis, None] * frequency for axis in (0, 1))
    return torch.cat([column_BNF.sin(), column_BNF.cos(), row_BNF.sin(), row_BNF.cos()], dim=-1).float()


def load_encoder(path_or_name: str | Path, image_size: int | None = None, attention: str = "sdpa") -> Aimv2VisionModel:
    """The encoder of a checkpoint in any known layout, in float32.

    `path_or_name`: a folder, a .safetensors file, or a name on the model hub. `image_size`: learned positions are
    resized to it (bicubic, antialiased); None: as it is. Raises `UserError` naming the keys that are missing,
    unexpected or of another shape.
    """
    source = locate(path_or_name)
    state, config = checkpoints.read_safetensors(source)
    layout, renamed = checkpoints.to_transformers(state, str(source))
    return assemble_encoder(layout, renamed, config, source, image_size, attention)


def locate(path_or_name: str | Path, also: tuple[str, ...] = ()) -> Path:
    """A local path as it is; a hub name (`owner/model`) as the folder of its files in the cache, fetched if need be.

    `also`: patterns of files that are wanted beside weights and config.
    """
    path = Path(path_or_name)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_name)):
        raise UserError(f"{path_or_name}: no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_name), allow_patterns=["config.json", "model*.safetensors*", *also]))
    except Exception as error:  # the hub's client has many ways to fail; all of them mean "not reachable by this name"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path_or_name}: neither a local path nor reachable on the model hub: {reason}") from error


def assemble_encoder(
    layout: checkpoints.Layout,
    renamed: checkpoints.State,
    config: dict,
    source: str | Path,
    image_size: int | None,
    attention: str,
) -> Aimv2VisionModel:
    """The encoder from what `checkpoints.to_transformers` returned; arguments otherwise as in `load_encoder`."""
    state = checkpoints.encoder_part(layout, renamed)
    encoder_config = _config_from(layout, state, config, source)
    if image_size is not None:
        encoder_config.image_size = image_size
    encoder = _uninitialized(encoder_config, attention)
    if POSITIONS in state and not encoder_config.is_native:
        state[POSITIONS] = resize_positions(state[POSITIONS], encoder_config.image_size // encoder_config.patch_size)
    checkpoints.load_strictly(encoder, state, source)
    return encoder


def resize_positions(positions_ND: torch.Tensor, grid_side: int) -> torch.Tensor:
    """Learned positions of a square grid for one of `grid_side`² patches; the same side returns them untouched."""
    old_side = math.isqrt(len(positions_ND))
    if old_side == grid_side or old_side**2 != len(positions_ND):  # not a square: refused by its shape afterwards
        return positions_ND
    grid_1DHW = positions_ND.float().T.reshape(1, -1, old_side, old_side)
    resized_1DHW = F.interpolate(grid_1DHW, size=(grid_side, grid_side), mode="bicubic", antialias=True)
    return resized_1DHW.flatten(2)[0].T.contiguous()


# What config.json of each family calls a number; absent ones are read off the tensors.
_CONFIG_NAMES = {
    "hidden_size": ("hidden_size", "vision_dim"),
    "intermediate_size": ("intermediate_size",),
    "num_hidden_layers": ("num_hidden_layers", "vision_blocks"),
    "num_attention_heads": ("num_attention_heads", "vision_heads"),
    "rms_norm_eps": ("rms_norm_eps",),
    "patch_size": ("patch_size",),
    "image_size": ("image_size",),
}


def _config_from(
    layout: checkpoints.Layout, state: checkpoints.State, config: dict, source: str | Path
) -> Aimv2VisionConfig:
    """The encoder's config: what config.json says, completed from the tensors; heads are 128 wide if unknown."""
    section = next((config[name] for name in ("vision_config", "vision") if isinstance(config.get(name), dict)), config)
    if layout.name.startswith("transformers_") and config:
        section = Aimv2VisionConfig.from_dict(section).to_dict()  # an absent key means the class's default there
    stated = {
        key: next(section[name] for name in names if name in section)
        for key, names in _CONFIG_NAMES.items()
        if any(name in section for name in names)
    }
    needed = ("embeddings.patch_embed.weight", "encoder.layers.0.ffn.gate_proj.weight")
    if missing := [key for key, dims in zip(needed, (4, 2)) if key not in state or state[key].dim() != dims]:
        raise UserError(f"{source}: missing keys, or of another shape: {', '.join(missing)}")
    patch_weight, ffn_weight = (state[key] for key in needed)
    read = {
        "hidden_size": patch_weight.shape[0],
        "intermediate_size": ffn_weight.shape[0],
        "num_hidden_layers": 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layers.")),
        "num_channels": patch_weight.shape[1],
        "patch_size": patch_weight.shape[-1],
    }
    sizes = read | stated
    if "num_attention_heads" not in sizes:
        width = sizes["hidden_size"]
        sizes["num_attention_heads"] = checkpoints.heads_from_width(width, "num_attention_heads", source)
    sizes["is_native"] = bool(section.get("is_native", False)) or (
        not layout.name.startswith("transformers_") and POSITIONS not in state
    )
    if POSITIONS in state:
        sizes["image_size"] = math.isqrt(len(state[POSITIONS])) * sizes["patch_size"]
    for key, size in sizes.items():
        if key not in ("rms_norm_eps", "is_native") and (not isinstance(size, int) or size < 1):
            raise UserError(f"{source}: config.json: {key}: expected a positive integer, found {size!r}")
    return Aimv2VisionConfig(**sizes)
