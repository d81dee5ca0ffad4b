"""Two towers, picture against text: CLIP from scratch (Table 9b) and LiT on a frozen encoder (Table 5).

The model is transformers' `Aimv2Model` (Apple's two-tower layout): the encoder, an attention-pooling head (one learned
query, keys and values without bias, an output projection), a causal text tower read at its end token, two projections,
a learned temperature. transformers leaves out the text tower's causal mask whenever no row is padded; here the
attention modules themselves are causal, and what is written asks for one more position than a text may have, so that a
processor which pads to it gives every row a pad and the stock model the same embeddings.

Shapes: B rows of this process, G rows of all processes, C channels, H, W picture, T text tokens, E projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import Aimv2Config, Aimv2Model, Aimv2VisionModel
from transformers.initialization import no_init_weights

from aimv2_vlm.config import TextTower, UserError
from aimv2_vlm.models import masks
from aimv2_vlm.models.encoder import full_precision, xavier_uniform_linears
from aimv2_vlm.models.pretraining import blocks_flops, encoder_flops, parameter_roles

INITIAL_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0


class TwoTowerOutput(NamedTuple):
    """Unit vectors (B, E) of pictures and texts, and the factor their products are multiplied by."""

    image_BE: torch.Tensor
    text_BE: torch.Tensor
    scale: torch.Tensor


class TwoTowerForPreTraining(nn.Module):
    """`Aimv2Model` around an encoder, with Apple's initialisation of everything else."""

    def __init__(
        self,
        encoder: Aimv2VisionModel,
        tower: TextTower,
        *,
        vocab_size: int,
        context_length: int,
        eos_token_id: int,
        freeze_encoder: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """`context_length`: most tokens of a text, its begin and end tokens included. `freeze_encoder`: LiT.

        Raises `UserError` for a width that the heads do not divide.
        """
        super().__init__()
        if tower.hidden_size % tower.num_heads:
            raise UserError(
                f"objective.text_tower.num_heads: {tower.num_heads} heads do not divide the width {tower.hidden_size}"
            )
        vision = encoder.config.to_dict() | {"use_head": True}
        text = {
            "vocab_size": vocab_size,
            "hidden_size": tower.hidden_size,
            "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.num_layers,
            "num_attention_heads": tower.num_heads,
            "max_position_embeddings": context_length + 1,  # room for a pad in every row
            "eos_token_id": eos_token_id,
            "rms_norm_eps": encoder.config.rms_norm_eps,
        }
        config = Aimv2Config(
            vision_config=vision, text_config=text, projection_dim=tower.projection_size,
            logit_scale_init_value=math.log(INITIAL_SCALE), max_logit_scale=LARGEST_SCALE,
        )  # fmt: skip
        self.attention = masks.check_attention(encoder.config._attn_implementation)
        config._attn_implementation = config.vision_config._attn_implementation = self.attention
        config.text_config._attn_implementation = self.attention
        self.context_length, self.freeze_encoder = context_length, freeze_encoder
        with no_init_weights():
            self.towers = Aimv2Model(config)
        initialize_towers(self.towers, generator)
        self.towers.vision_model.load_state_dict(encoder.state_dict(), strict=False)
        make_text_causal(self.towers)
        if freeze_encoder:
            for name, parameter in self.towers.vision_model.named_parameters():
                parameter.requires_grad_(name.startswith("head."))

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> TwoTowerOutput:
        """Embeddings of (B, C, H, W) pictures and (B, T) texts, each row with an end token; padding behind it is not read."""
        vision, text = self.towers.vision_model, self.towers.text_model
        image_BE = self.towers.visual_projection(vision(pixel_values=pixel_values).pooler_output)
        # eager attention does not know `is_causal`; given a mask, the text model makes it causal
        attended = torch.ones_like(input_ids) if self.attention == "eager" else None
        text_BE = self.towers.text_projection(text(input_ids=input_ids, attention_mask=attended).pooler_output)
        scale = _AtMost.apply(self.towers.logit_scale, math.log(LARGEST_SCALE)).exp()
        return TwoTowerOutput(F.normalize(image_BE.float(), dim=-1), F.normalize(text_BE.float(), dim=-1), scale)

    def forward_flops(self, rows: int, num_patches: int, num_tokens: int, **_: Any) -> float:
        """Operations of one forward pass, as `AIMv2ForPreTraining.forward_flops`; a frozen trunk counts a third (it has
        no backward pass)."""
        vision, text = self.towers.config.vision_config, self.towers.config.text_config
        trunk = encoder_flops(self.towers.vision_model, rows, num_patches) / (3 if self.freeze_encoder else 1)
        # keys and values of every patch, one query, the output projection
        head = rows * (num_patches * 2 * 2 * vision.hidden_size**2 + 4 * num_patches * vision.hidden_size + 2 * vision.hidden_size**2)
        words = blocks_flops(text, num_tokens, num_tokens / max(1, rows))
        projections = 2 * rows * (vision.hidden_size + text.hidden_size) * self.towers.config.projection_dim
        return trunk + head + words + projections

    def parameter_roles(self) -> dict[str, str]:
        """Parameter name -> role; see `models.pretraining.parameter_roles`. The pooling query is a token, thus "bos"."""
        return parameter_roles(self)

    def save_pretrained(
        self, directory: str | Path, processor: Any = None, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write a stock `Aimv2Model` and its processor; the encoder alone opens from it with `load_encoder`."""
        state = self.state_dict() if state_dict is None else state_dict
        self.towers.save_pretrained(directory, state_dict={key.removeprefix("towers."): t for key, t in state.items()})
        if processor is not None:
            processor.save_pretrained(directory)


@torch.no_grad()
def initialize_towers(towers: Aimv2Model, generator: torch.Generator | None = None) -> None:
    """Apple's initialisation of everything but the image trunk."""
    text, head = towers.text_model, towers.vision_model.head
    nn.init.normal_(text.embeddings.token_embedding.weight, std=0.02, generator=generator)
    nn.init.normal_(text.embeddings.position_embedding.weight, std=0.01, generator=generator)
    xavier_uniform_linears(text.encoder, generator)
    nn.init.normal_(head.cls_token, std=0.02, generator=generator)
    for linear in (head.k_proj, head.v_proj, head.output_proj, towers.visual_projection, towers.text_projection):
        bound = 1 / math.sqrt(linear.in_features)  # torch's default for a linear layer
        for parameter in linear.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    for norm in [text.rms_norm, *(n for layer in text.encoder.layers for n in (layer.rms_norm1, layer.rms_norm2))]:
        nn.init.ones_(norm.weight)
    towers.logit_scale.fill_(math.log(INITIAL_SCALE))


def make_text_causal(towers: Aimv2Model) -> Aimv2Model:
    """Mark the text tower's attention as causal; under sdpa the stock model runs without a causal mask otherwise."""
    for layer in towers.text_model.encoder.layers:
        layer.attention.is_causal = True
    return towers


def contrastive_sum(out: TwoTowerOutput, input_ids_BT: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor:
    """Sum over this process's rows of the symmetric softmax loss against the rows of all processes.

    The logits are (B, G) in each direction, so memory grows with the local batch. Rows with the same text are all right
    answers to each other's picture (with distinct texts this is CLIP's loss). Rows of weight 0 are nobody's answer.
    Divided by the number of good rows of all processes and averaged over processes as gradients are, times their
    number, it is the loss of the whole batch.
    """
    image_GE, text_GE = gather_rows(out.image_BE), gather_rows(out.text_BE)
    ids_GT, weights_G = gather_constants(input_ids_BT), gather_constants(weights_B)
    same_BG = (input_ids_BT[:, None] == ids_GT).all(-1) & (weights_G > 0)
    target_BG = same_BG / same_BG.sum(1, keepdim=True).clamp(min=1)
    loss_B = torch.zeros(len(same_BG), device=same_BG.device)
    with full_precision(same_BG.device):
        for mine_BE, others_GE in ((out.image_BE, text_GE), (out.text_BE, image_GE)):
            logits_BG = out.scale * mine_BE @ others_GE.T
            logits_BG = logits_BG.masked_fill(weights_G == 0, torch.finfo(logits_BG.dtype).min)
            loss_B = loss_B - 0.5 * (target_BG * logits_BG.log_softmax(-1)).sum(-1)
    return (loss_B * (weights_B > 0)).sum()


class _AtMost(torch.autograd.Function):
    """`x` clamped to a bound. Beyond it only a gradient that leads back is passed on: `clamp` alone passes none, and a temperature that one
    step took over its bound would stay there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bound: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(max=bound)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient * ((x <= ctx.bound) | (gradient > 0)), None


class _GatherRows(torch.autograd.Function):
    """All processes' rows; the gradient of each goes back to where it came from, summed over processes."""

    @staticmethod
    def forward(ctx: Any, rows_BE: torch.Tensor) -> torch.Tensor:
        return gather_constants(rows_BE)

    @staticmethod
    def backward(ctx: Any, gradient_GE: torch.Tensor) -> torch.Tensor:
        total_GE = gradient_GE.contiguous()
        dist.all_reduce(total_GE)
        return total_GE.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows_BE: torch.Tensor) -> torch.Tensor:
    """(G, E) of all processes with gradients; as it is in a single process. Every process has as many rows."""
    return _GatherRows.apply(rows_BE) if _world() > 1 else rows_BE


def gather_constants(rows: torch.Tensor) -> torch.Tensor:
    """All processes' rows, in rank order, without gradients."""
    if _world() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(_world())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
