"""AIMv2's autoregressive pre-training model: encoder with prefix attention, causal decoder, two heads (paper 2.1).

Shapes: B batch, C channels, H, W picture, N image patches, T text tokens, S sequence, D width, P values in one patch,
V vocabulary, R rows picked out of (batch, position).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Aimv2TextConfig, Aimv2VisionModel
from transformers.initialization import no_init_weights
from transformers.models.aimv2.modeling_aimv2 import Aimv2Encoder, Aimv2RMSNorm
from transformers.utils import ModelOutput

from aimv2_vlm.config import UserError
from aimv2_vlm.models import checkpoints, masks
from aimv2_vlm.models.encoder import assemble_encoder, encode, load_encoder, locate, xavier_uniform_linears

FOLDER = "pretraining"  # everything but the encoder, inside a checkpoint's folder
PIXEL_WEIGHT = 0.4  # alpha of the paper


@dataclass
class PretrainingOutput(ModelOutput):
    """Sums and counts are to be added over micro-batches and ranks and divided once; the losses are this batch's.

    `pixel_sum` adds, over the scored patches, the mean squared error of a patch's values; `text_sum` the cross-entropy
    of the target tokens; `mean_color_sum` what `pixel_sum` were if each patch was predicted as its own mean colour.
    Predictions and features are there when asked for: (B, N, P), where place i predicts patch i + 1 and the last one
    nothing; (B, T + 1, V), where place t predicts token t and the last one nothing; (B, N, D).
    """

    loss: torch.Tensor | None = None
    pixel_loss: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    pixel_sum: torch.Tensor | None = None
    pixel_count: torch.Tensor | None = None
    text_sum: torch.Tensor | None = None
    text_count: torch.Tensor | None = None
    mean_color_sum: torch.Tensor | None = None
    patch_predictions: torch.Tensor | None = None
    text_logits: torch.Tensor | None = None
    encoder_features: torch.Tensor | None = None


class AIMv2ForPreTraining(nn.Module):
    """Patches, then text, one autoregressive sequence (paper Figure 1)."""

    def __init__(
        self,
        encoder: Aimv2VisionModel,
        *,
        decoder_hidden_size: int,
        decoder_intermediate_size: int,
        decoder_num_layers: int,
        decoder_num_heads: int,
        vocab_size: int,
        context_length: int,
        attention: str = "sdpa",
        generator: torch.Generator | None = None,
    ) -> None:
        """Decoder and heads get Apple's initialisation from `generator`, or else from torch's global one.

        `context_length`: most tokens of a text, its end token included. `attention`: the decoder's implementation.
        """
        super().__init__()
        if decoder_hidden_size % decoder_num_heads:
            raise UserError(
                f"decoder_num_heads: {decoder_num_heads} heads do not divide the decoder's width {decoder_hidden_size}"
            )
        self.context_length = context_length
        self.decoder_config = Aimv2TextConfig(
            hidden_size=decoder_hidden_size,
            intermediate_size=decoder_intermediate_size,
            num_hidden_layers=decoder_num_layers,
            num_attention_heads=decoder_num_heads,
            vocab_size=vocab_size,
            max_position_embeddings=context_length + 1,
            eos_token_id=None,
            rms_norm_eps=encoder.config.rms_norm_eps,
        )
        self.decoder_config._attn_implementation = masks.check_attention(attention)
        values_in_patch = encoder.config.num_channels * encoder.config.patch_size**2

        self.encoder = encoder
        with no_init_weights():  # drawn below, and only there
            self.image_projection = nn.Linear(encoder.config.hidden_size, decoder_hidden_size)
            self.bos = nn.Parameter(torch.empty(decoder_hidden_size))
            self.token_embedding = nn.Embedding(vocab_size, decoder_hidden_size)
            self.text_position_embedding = nn.Embedding(context_length + 1, decoder_hidden_size)
            self.decoder = Aimv2Encoder(self.decoder_config)  # the same block as the encoder's
            self.decoder_norm = Aimv2RMSNorm(decoder_hidden_size, self.decoder_config.rms_norm_eps)
            self.pixel_head = nn.Linear(decoder_hidden_size, values_in_patch, bias=False)
            self.text_head = nn.Linear(decoder_hidden_size, vocab_size, bias=False)
        for layer in self.decoder.layers:
            layer.attention.is_causal = True  # read by sdpa when it gets no mask
        self.initialize_decoder(generator)

    @torch.no_grad()
    def initialize_decoder(self, generator: torch.Generator | None = None) -> None:
        """Draw everything but the encoder as Apple does."""
        bound = 1 / math.sqrt(self.image_projection.in_features)  # torch's default for a linear layer
        for parameter in self.image_projection.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        nn.init.normal_(self.bos, std=0.02, generator=generator)
        nn.init.normal_(self.token_embedding.weight, std=0.02, generator=generator)
        nn.init.normal_(self.text_position_embedding.weight, std=0.01, generator=generator)
        xavier_uniform_linears(self.decoder, generator)
        for head in (self.pixel_head, self.text_head):
            std = math.sqrt(1 / ((1 + len(self.decoder.layers)) * head.in_features))
            std_before_cut = std / 0.87962566103423978  # cutting a normal at two deviations narrows it by this factor
            nn.init.trunc_normal_(
                head.weight, std=std_before_cut, a=-2 * std_before_cut, b=2 * std_before_cut, generator=generator
            )

    def forward(
        self,
        pixel_values_BCHW: torch.Tensor,
        input_ids_BT: torch.Tensor,
        text_lengths_B: torch.Tensor,
        prefix_lengths_B: torch.Tensor,
        weights_B: torch.Tensor | None = None,
        return_predictions: bool = True,
        pixel_weight: float = PIXEL_WEIGHT,
    ) -> PretrainingOutput:
        """Both losses of a batch.

        `pixel_values_BCHW` as the encoder sees them (mean and deviation taken out). Row b of `input_ids_BT` holds
        `text_lengths_B[b]` target tokens, with the end token if it is to be learned; the rest is padding, of any id.
        The first `prefix_lengths_B[b]` patches see each other and are not scored. `weights_B`: 0 removes a row
        from every sum and count. Without `return_predictions` (training) the heads run only where something is scored.
        """
        num_tokens = input_ids_BT.shape[1]
        if num_tokens > self.context_length:
            raise ValueError(f"input_ids: {num_tokens} tokens, but the model has context_length {self.context_length}")
        # Shapes that depend on values cost nothing in eager mode on a CPU; elsewhere they would wait for the device.
        pick = not return_predictions and input_ids_BT.device.type == "cpu" and not torch.compiler.is_compiling()
        if pick:
            longest = int(text_lengths_B.max())
            if longest > num_tokens:
                raise ValueError(f"text_lengths: {longest} tokens in a row of input_ids that holds {num_tokens}")
            num_tokens = max(1, longest)
            input_ids_BT = input_ids_BT[:, :num_tokens]
        kept_B = torch.ones_like(text_lengths_B, dtype=torch.bool) if weights_B is None else weights_B.bool()

        features_BND = encode(self.encoder, pixel_values_BCHW, prefix_lengths_B)
        # The last token is a target only: its place is computed for who wants to look at all predictions.
        read_ids_BT = input_ids_BT if return_predictions else input_ids_BT[:, :-1]
        sequence_BSD = torch.cat([self.image_projection(features_BND), self._embed_text(read_ids_BT)], dim=1)
        hidden_BSD = self._decode(sequence_BSD)
        num_patches = features_BND.shape[1]
        image_BND, text_BTD = hidden_BSD[:, :num_patches], hidden_BSD[:, num_patches:]

        pixel = self._score_patches(image_BND, pixel_values_BCHW, prefix_lengths_B, kept_B, pick)
        text = self._score_text(text_BTD, input_ids_BT, text_lengths_B, kept_B, pick)
        pixel_loss = pixel["pixel_sum"] / pixel["pixel_count"].clamp(min=1)
        text_loss = text["text_sum"] / text["text_count"].clamp(min=1)
        outputs = {"pixel_loss": pixel_loss, "text_loss": text_loss, "encoder_features": features_BND} | pixel | text
        if not return_predictions:
            outputs |= dict.fromkeys(("patch_predictions", "text_logits", "encoder_features"))
        return PretrainingOutput(loss=text_loss + pixel_weight * pixel_loss, **outputs)

    def _embed_text(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """[BOS] and the tokens, with their positions: (B, T + 1, D)."""
        bos_B1D = self.bos.expand(len(input_ids_BT), 1, -1)
        embedded_BTD = torch.cat([bos_B1D, self.token_embedding(input_ids_BT)], dim=1)
        return embedded_BTD + self.text_position_embedding.weight[: embedded_BTD.shape[1]]

    def _decode(self, sequence_BSD: torch.Tensor) -> torch.Tensor:
        """Causal over patches and text; normalised."""
        attention, mask_11SS = self.decoder_config._attn_implementation, None
        if attention != "sdpa":  # sdpa follows the layers' is_causal
            can_attend_11SS = masks.causal_can_attend(sequence_BSD.shape[1], sequence_BSD.device)
            mask_11SS = masks.for_attention(can_attend_11SS, attention, sequence_BSD.dtype)
        return self.decoder_norm(self.decoder(sequence_BSD, mask_11SS).last_hidden_state)

    def _score_patches(
        self,
        hidden_BND: torch.Tensor,
        pixel_values_BCHW: torch.Tensor,
        prefix_lengths_B: torch.Tensor,
        kept_B: torch.Tensor,
        pick: bool,
    ) -> dict[str, torch.Tensor | None]:
        """Squared error of the patches from index M on; place i predicts patch i + 1. `pick`: head on those only."""
        num_patches = hidden_BND.shape[1]
        target_index_N = torch.arange(1, num_patches, device=hidden_BND.device)
        scored_BN = (target_index_N >= prefix_lengths_B[:, None]) & kept_B[:, None]
        patches_BNP = patchify(pixel_values_BCHW, self.encoder.config.patch_size)[:, 1:]
        if pick:
            targets_RP = standardize(patches_BNP[scored_BN])
            error_R = (self.pixel_head(hidden_BND[:, :-1][scored_BN]).float() - targets_RP).square().mean(-1)
            mean_color_R = mean_color_error(targets_RP, self.encoder.config.num_channels)
            pixel_sum, mean_color_sum, predictions_BNP = error_R.sum(), mean_color_R.sum(), None
        else:
            targets_BNP = standardize(patches_BNP)
            predictions_BNP = self.pixel_head(hidden_BND)
            error_BN = (predictions_BNP[:, :-1].float() - targets_BNP).square().mean(-1)
            mean_color_BN = mean_color_error(targets_BNP, self.encoder.config.num_channels)
            pixel_sum, mean_color_sum = (torch.where(scored_BN, e, 0).sum() for e in (error_BN, mean_color_BN))
        return {
            "pixel_sum": pixel_sum,
            "pixel_count": scored_BN.sum(),
            "mean_color_sum": mean_color_sum,
            "patch_predictions": predictions_BNP,
        }

    def _score_text(
        self,
        hidden_BTD: torch.Tensor,
        target_ids_BT: torch.Tensor,
        text_lengths_B: torch.Tensor,
        kept_B: torch.Tensor,
        pick: bool,
    ) -> dict[str, torch.Tensor | None]:
        """Cross-entropy of the first `text_lengths_B` tokens; BOS (place 0) predicts token 0. `pick`: as above."""
        num_tokens = target_ids_BT.shape[1]
        is_target_BT = torch.arange(num_tokens, device=hidden_BTD.device) < text_lengths_B[:, None]
        is_target_BT = is_target_BT & kept_B[:, None]
        if pick:
            logits_BTV = None
            logits_RV = self.text_head(hidden_BTD[:, :num_tokens][is_target_BT])
            text_sum = F.cross_entropy(logits_RV.float(), target_ids_BT[is_target_BT], reduction="sum")
        else:
            logits_BTV = self.text_head(hidden_BTD)
            targets_BT = target_ids_BT.masked_fill(~is_target_BT, -100)
            text_sum = F.cross_entropy(
                logits_BTV[:, :num_tokens].flatten(0, 1).float(),
                targets_BT.flatten(),
                ignore_index=-100,
                reduction="sum",
            )
        return {"text_sum": text_sum, "text_count": is_target_BT.sum(), "text_logits": logits_BTV}

    def parameter_roles(self) -> dict[str, str]:
        """Parameter name -> "norm", "bias", "position", "bos" or "weight"; only the last are decayed (Table A1)."""
        positions = {self.text_position_embedding, getattr(self.encoder.embeddings, "position_embedding", None)}
        roles = {}
        for module_name, module in self.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                if isinstance(module, Aimv2RMSNorm):
                    role = "norm"
                elif module in positions:
                    role = "position"
                else:
                    role = {"bias": "bias", "bos": "bos"}.get(name, "weight")
                roles[f"{module_name}.{name}" if module_name else name] = role
        return roles

    def save_pretrained(
        self,
        directory: str | Path,
        image_processor: Any = None,
        extra_files: Iterable[str | Path] = (),
        state_dict: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write the encoder as a stock transformers checkpoint into `directory`, the rest into `directory`/pretraining.

        `image_processor` goes beside the encoder, copies of `extra_files` (a tokenizer) beside the rest. `state_dict`:
        the gathered weights, where the model holds only a shard of them.
        """
        from safetensors.torch import save_file

        state = self.state_dict() if state_dict is None else state_dict
        parts: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
        for key, tensor in state.items():
            parts[key.startswith("encoder.")][key] = tensor
        directory = Path(directory)
        folder = directory / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        encoder_state = {key.removeprefix("encoder."): tensor for key, tensor in parts[True].items()}
        self.encoder.save_pretrained(directory, state_dict=encoder_state)
        if image_processor is not None:
            image_processor.save_pretrained(directory)
        rest = {key: tensor.detach().cpu().contiguous() for key, tensor in parts[False].items()}
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self._sizes(), indent=2) + "\n", encoding="utf-8")
        for file in extra_files:
            shutil.copyfile(file, folder / Path(file).name)

    def _sizes(self) -> dict[str, int]:
        return {
            "decoder_hidden_size": self.decoder_config.hidden_size,
            "decoder_intermediate_size": self.decoder_config.intermediate_size,
            "decoder_num_layers": self.decoder_config.num_hidden_layers,
            "decoder_num_heads": self.decoder_config.num_attention_heads,
            "vocab_size": self.decoder_config.vocab_size,
            "context_length": self.context_length,
        }

    @classmethod
    def from_pretrained(
        cls, path_or_name: str | Path, image_size: int | None = None, attention: str = "sdpa"
    ) -> AIMv2ForPreTraining:
        """Open what `save_pretrained` wrote, or a checkpoint in the layout of Apple's trainer.

        `image_size`: the encoder's learned positions are resized to it. Raises `UserError` naming what is missing.
        """
        source = locate(path_or_name)
        folder = source / FOLDER
        if folder.is_dir():
            encoder = load_encoder(source, image_size, attention)
            rest, sizes = checkpoints.read_safetensors(folder)
            if misfits := set(_SIZE_NAMES) ^ sizes.keys():
                raise UserError(f"{folder / 'config.json'}: missing or unknown keys: {checkpoints.name_some(misfits)}")
            source = folder
        else:
            state, config = checkpoints.read_safetensors(source)
            layout, renamed = checkpoints.to_transformers(state, str(source))
            if layout.name != "apple_trainer":
                raise UserError(
                    f"{source}: holds an encoder only (layout {layout.name}, no folder {FOLDER}/): "
                    "continue pre-training from a pre-training checkpoint, or start a fresh decoder on this encoder"
                )
            encoder = assemble_encoder(layout, renamed, config, source, image_size, attention)
            rest = {key: tensor for key, tensor in renamed.items() if not key.startswith(layout.encoder_prefix)}
            sizes = _sizes_from_tensors(rest, config, source)
        with no_init_weights():
            model = cls(encoder, **sizes, attention=attention)
        own = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
        checkpoints.load_strictly(model, own | rest, source)
        return model


_SIZE_NAMES = (
    "decoder_hidden_size",
    "decoder_intermediate_size",
    "decoder_num_layers",
    "decoder_num_heads",
    "vocab_size",
    "context_length",
)


def _sizes_from_tensors(rest: checkpoints.State, config: dict, source: Path) -> dict[str, int]:
    """The decoder's sizes from the tensors of the trainer's layout; its heads from config.json, else 128 wide."""
    needed = ("token_embedding.weight", "text_position_embedding.weight", "decoder.layers.0.ffn.gate_proj.weight")
    if missing := [key for key in needed if key not in rest]:
        raise UserError(f"{source}: missing keys: {checkpoints.name_some(missing)}")
    (vocab_size, width), (num_positions, _), (intermediate_size, _) = (rest[key].shape for key in needed)
    return {
        "decoder_hidden_size": width,
        "decoder_intermediate_size": intermediate_size,
        "decoder_num_layers": config.get("decoder_blocks")
        or 1 + max(int(key.split(".")[2]) for key in rest if key.startswith("decoder.layers.")),
        "decoder_num_heads": config.get("decoder_heads")
        or checkpoints.heads_from_width(width, "decoder_heads", source),
        "vocab_size": vocab_size,
        "context_length": num_positions - 1,
    }


def patchify(pixel_values_BCHW: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Patches in raster order, values of one in the order (row, column, channel): (B, N, P)."""
    batch, channels, height, width = pixel_values_BCHW.shape
    rows, columns = height // patch_size, width // patch_size
    split = pixel_values_BCHW.view(batch, channels, rows, patch_size, columns, patch_size)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


@torch.no_grad()
def standardize(patches: torch.Tensor) -> torch.Tensor:
    """Each patch (last dimension, P values of all channels together) with its mean and unbiased deviation taken out."""
    centered = patches.float() - patches.float().mean(-1, keepdim=True)
    variance = centered.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)
    return centered * torch.rsqrt(variance + 1e-6)


@torch.no_grad()
def mean_color_error(targets: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Mean squared error of predicting each patch (..., P) as its own mean colour."""
    color = targets.unflatten(-1, (-1, num_channels)).mean(-2)
    return targets.square().mean(-1) - color.square().mean(-1)
