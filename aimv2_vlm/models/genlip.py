"""GenLIP (arXiv 2605.00809): one transformer reads patches and text and predicts the text; there is no decoder.

Patches see each other, text sees all patches and the text before it (a prefix language model). Patches never see text,
so the trained transformer without its text parts is an ordinary `Aimv2VisionModel`. The objective is that paper's; its
gated attention and rotary positions are left out, for the encoder would not be the stock one with them.

Shapes: B batch, C channels, H, W picture, N image patches, T text tokens, S sequence, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Aimv2VisionModel
from transformers.initialization import no_init_weights

from aimv2_vlm.config import UserError
from aimv2_vlm.models import checkpoints, masks
from aimv2_vlm.models.encoder import load_encoder, locate, num_patches_of
from aimv2_vlm.models.pretraining import (
    FOLDER, EncoderWithText, Places, PretrainingOutput, blocks_flops, encoder_flops, gather_losses, initialize_head,
    score_text, scored_places,
)  # fmt: skip


class GenLIPForPreTraining(EncoderWithText):
    """An encoder that speaks: [patches, BOS, tokens] through one stack of blocks, a vocabulary head on the text."""

    def __init__(
        self,
        encoder: Aimv2VisionModel,
        *,
        vocab_size: int,
        context_length: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Text parts get the initialisation of AIMv2's. `context_length`: most tokens of a text, end token included."""
        super().__init__()
        width = encoder.config.hidden_size
        self.context_length = context_length
        self.encoder = encoder
        with no_init_weights():
            self._make_text_inputs(width, vocab_size, context_length)
            self.text_head = nn.Linear(width, vocab_size, bias=False)
        self._initialize_text_inputs(generator)
        initialize_head(self.text_head, encoder.config.num_hidden_layers, generator)

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        text_lengths: torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        return_predictions: bool = True,
        places: Places | None = None,
    ) -> PretrainingOutput:
        """Text loss of a batch; arguments and output as `AIMv2ForPreTraining.forward`'s."""
        num_tokens = input_ids.shape[1]
        if num_tokens > self.context_length:
            raise ValueError(f"input_ids: {num_tokens} tokens, but the model has context_length {self.context_length}")
        num_patches = num_patches_of(self.encoder, pixel_values)
        if not return_predictions and places is None:
            kept = None if weights is None else weights.cpu()
            places = scored_places(num_patches, text_lengths.cpu(), None, kept).to(input_ids.device)
        read_ids_BT = input_ids if places is None else input_ids[:, : places.num_tokens - 1]
        text_BTD = self._with_positions(self._embed_text(read_ids_BT))
        sequence_BSD = torch.cat([self.encoder.embeddings(pixel_values), text_BTD], dim=1)
        patches_B = torch.full((1,), num_patches, device=sequence_BSD.device)
        can_attend_11SS = masks.prefix_can_attend(patches_B, sequence_BSD.shape[1])
        mask = masks.for_attention(can_attend_11SS, self.encoder.config._attn_implementation, sequence_BSD.dtype)
        hidden_BSD = self.encoder.rms_norm(self.encoder.encoder(sequence_BSD, mask).last_hidden_state)
        scores = score_text(self.text_head, hidden_BSD[:, num_patches:], input_ids, text_lengths, weights, places)
        return gather_losses(scores, 0.0, hidden_BSD[:, :num_patches] if return_predictions else None)

    def forward_flops(self, rows: int, num_patches: int, num_tokens: int, **_: Any) -> float:
        """Operations of one forward pass; see `AIMv2ForPreTraining.forward_flops`."""
        config = self.encoder.config
        context = num_patches + num_tokens / max(1, rows)
        trunk = encoder_flops(self.encoder, rows, num_patches) - blocks_flops(config, rows * num_patches, num_patches)
        trunk += blocks_flops(config, rows * context, context)
        return trunk + 2 * num_tokens * self.text_head.in_features * self.text_head.out_features

    def _sizes(self) -> dict[str, Any]:
        return {"objective": "genlip", "vocab_size": self.text_head.out_features, "context_length": self.context_length}

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path, image_size: int | None = None, attention: str = "sdpa") -> GenLIPForPreTraining:
        """Open what `save_pretrained` wrote. Raises `UserError` naming what is missing."""
        source = locate(path_or_name)
        encoder = load_encoder(source, image_size, attention)
        rest, sizes = checkpoints.read_safetensors(source / FOLDER)
        if sizes.pop("objective", None) != "genlip" or sizes.keys() != {"vocab_size", "context_length"}:
            raise UserError(f"{source / FOLDER / 'config.json'}: no GenLIP checkpoint; its objective is another one")
        with no_init_weights():
            model = cls(encoder, **sizes)
        model._fill(rest, source)
        return model
