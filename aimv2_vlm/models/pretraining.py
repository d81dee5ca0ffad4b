"""AIMv2's autoregressive pre-training model: encoder with prefix attention, causal decoder, two heads (paper 2.1).

Its parts can be left out or doubled, which gives AIMv1 (no text), captioning (no pixels), CapPa (captions also decoded
in parallel) and separate decoders (Table 9, Figure 4).

Shapes: B batch, C channels, H, W picture, N image patches, K of them kept for captions, T text tokens, S sequence,
D width, P values in one patch, V vocabulary, R places picked out of (batch, position).
"""

from __future__ import annotations

import json
import math
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Aimv2TextConfig, Aimv2VisionModel
from transformers.initialization import no_init_weights
from transformers.models.aimv2.modeling_aimv2 import Aimv2Encoder, Aimv2RMSNorm
from transformers.utils import ModelOutput

from aimv2_vlm.config import UserError
from aimv2_vlm.models import checkpoints, masks
from aimv2_vlm.models.encoder import (
    NativePictures, assemble_encoder, encode, load_encoder, locate, num_patches_of, xavier_uniform_linears,
)

FOLDER = "pretraining"  # everything but the encoder, inside a checkpoint's folder
PIXEL_WEIGHT = 0.4  # alpha of the paper


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, made on the host, on `device`: from pinned memory, or the host would wait for the device."""
    return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)


class Places(NamedTuple):
    """Where a micro-batch is scored, found on the host: no shape then depends on values that lie on the device.

    `patches_R`: flat indices into (B, N) of the places that predict a scored patch (the one after them). `tokens_R`:
    flat indices into (B, num_tokens) of the target tokens. `num_tokens`: columns of the ids that are read.
    """

    patches_R: torch.Tensor
    tokens_R: torch.Tensor
    num_tokens: int

    def to(self, device: torch.device) -> Places:
        """The same with its tensors on `device`."""
        return Places(to_device(self.patches_R, device), to_device(self.tokens_R, device), self.num_tokens)


def check_prefixes(prefix_lengths_B: torch.Tensor, num_patches: int) -> None:
    """Raises ValueError for prefixes (on the host) outside a picture of so many patches."""
    if int(prefix_lengths_B.min()) < 1 or int(prefix_lengths_B.max()) >= max(2, num_patches):
        raise ValueError(f"prefix_lengths: must be 1 to {num_patches - 1}, the picture having {num_patches} patches")


def scored_places(
    num_patches: int,
    text_lengths_B: torch.Tensor,
    prefix_lengths_B: torch.Tensor | None,
    weights_B: torch.Tensor | None = None,
    num_tokens: int | None = None,
    num_real_B: torch.Tensor | None = None,
) -> Places:
    """The places of a micro-batch whose lengths are on the host.

    Patches are scored from 0-based index M (`prefix_lengths_B`; None: none is) up to `num_real_B` (None: all N of a
    row). `num_tokens`: columns to read; None: as many as the longest text. Rows of weight 0 are scored nowhere.
    """
    kept_B1 = torch.ones(len(text_lengths_B), 1, dtype=torch.bool) if weights_B is None else weights_B.bool()[:, None]
    num_tokens = max(1, int(text_lengths_B.max())) if num_tokens is None else num_tokens
    is_target_BT = (torch.arange(num_tokens) < text_lengths_B[:, None]) & kept_B1
    if prefix_lengths_B is None:
        return Places(torch.empty(0, dtype=torch.int64), is_target_BT.flatten().nonzero()[:, 0], num_tokens)
    next_patch_N = torch.arange(1, num_patches + 1)
    end_B1 = num_patches if num_real_B is None else num_real_B[:, None]
    scores_next_BN = (next_patch_N >= prefix_lengths_B[:, None]) & (next_patch_N < end_B1) & kept_B1
    return Places(*(mask.flatten().nonzero()[:, 0] for mask in (scores_next_BN, is_target_BT)), num_tokens)


@dataclass
class PretrainingOutput(ModelOutput):
    """Sums and counts are to be added over micro-batches and ranks and divided once; the losses are this batch's.

    `pixel_sum` adds, over the scored patches, the mean squared error of a patch's values; `text_sum` the cross-entropy
    of the target tokens; `mean_color_sum` what `pixel_sum` were if each patch was predicted as its own mean colour.
    Predictions and features are there when asked for: (B, N, P), where place i predicts patch i + 1 and the last one
    nothing; (B, T + 1, V), where place t predicts token t and the last one nothing; (B, N, D). What the model has no
    head for is None.
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


class EncoderWithText(nn.Module):
    """What every generative pre-training model has beside its blocks: an encoder, text inputs, one way to be written."""

    encoder: Aimv2VisionModel

    def _make_text_inputs(self, width: int, vocab_size: int, context_length: int) -> None:
        """Parameters without values; `_initialize_text_inputs` draws them."""
        self.bos = nn.Parameter(torch.empty(width))
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.text_position_embedding = nn.Embedding(context_length + 1, width)

    def _initialize_text_inputs(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.bos, std=0.02, generator=generator)
        nn.init.normal_(self.token_embedding.weight, std=0.02, generator=generator)
        nn.init.normal_(self.text_position_embedding.weight, std=0.01, generator=generator)

    def _embed_text(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """[BOS] and the tokens, without their positions: (B, T + 1, D)."""
        return torch.cat([self.bos.expand(len(input_ids_BT), 1, -1), self.token_embedding(input_ids_BT)], dim=1)

    def _with_positions(self, embedded_BTD: torch.Tensor) -> torch.Tensor:
        return embedded_BTD + self.text_position_embedding.weight[: embedded_BTD.shape[1]]

    def parameter_roles(self) -> dict[str, str]:
        """Parameter name -> "norm", "bias", "position", "bos" or "weight"; only the last are decayed (Table A1)."""
        return parameter_roles(self)

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
        directory = Path(directory)
        folder = directory / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        own = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
        self.encoder.save_pretrained(directory, state_dict=own)
        if image_processor is not None:
            image_processor.save_pretrained(directory)
        rest = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items() if not key.startswith("encoder.")}
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self._sizes(), indent=2) + "\n", encoding="utf-8")
        for file in extra_files:
            shutil.copyfile(file, folder / Path(file).name)

    @abstractmethod
    def _sizes(self) -> dict[str, Any]:
        """config.json of everything but the encoder."""

    def _fill(self, rest: checkpoints.State, source: str | Path) -> None:
        """Take everything but the encoder from `rest`. Raises `UserError` naming the keys that do not fit."""
        own = {f"encoder.{key}": tensor for key, tensor in self.encoder.state_dict().items()}
        checkpoints.load_strictly(self, own | rest, source)


class AIMv2ForPreTraining(EncoderWithText):
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
        predicts_patches: bool = True,
        predicts_text: bool = True,
        separate_decoders: bool = False,
        parallel_captions: bool = False,
        attention: str = "sdpa",
        generator: torch.Generator | None = None,
    ) -> None:
        """Decoder and heads get Apple's initialisation from `generator`, or else from torch's global one.

        `context_length`: most tokens of a text, its end token included. `attention`: the decoder's implementation.
        `separate_decoders`: patches are predicted by a decoder of their own (Table 9d). `parallel_captions`: adds the
        [MASK] embedding from which CapPa decodes captions in parallel (Table 9b).
        """
        super().__init__()
        if decoder_hidden_size % decoder_num_heads:
            raise UserError(
                f"decoder_num_heads: {decoder_num_heads} heads do not divide the decoder's width {decoder_hidden_size}"
            )
        if separate_decoders and not (predicts_patches and predicts_text):
            raise UserError("separate_decoders: there is one kind of target only; use a joint decoder")
        self.context_length = context_length
        self.predicts_patches, self.predicts_text = predicts_patches, predicts_text
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
            self.decoder = Aimv2Encoder(self.decoder_config)  # the same block as the encoder's
            self.decoder_norm = Aimv2RMSNorm(decoder_hidden_size, self.decoder_config.rms_norm_eps)
            self.pixel_projection = self.pixel_decoder = self.pixel_decoder_norm = None
            if separate_decoders:
                self.pixel_projection = nn.Linear(encoder.config.hidden_size, decoder_hidden_size)
                self.pixel_decoder = Aimv2Encoder(self.decoder_config)
                self.pixel_decoder_norm = Aimv2RMSNorm(decoder_hidden_size, self.decoder_config.rms_norm_eps)
            self.bos = self.mask_embedding = self.pixel_head = self.text_head = None
            if predicts_text:
                self._make_text_inputs(decoder_hidden_size, vocab_size, context_length)
                self.text_head = nn.Linear(decoder_hidden_size, vocab_size, bias=False)
            if parallel_captions:
                self.mask_embedding = nn.Parameter(torch.empty(decoder_hidden_size))
            if predicts_patches:
                self.pixel_head = nn.Linear(decoder_hidden_size, values_in_patch, bias=False)
        for layers in (self.decoder.layers, self.pixel_decoder.layers if separate_decoders else ()):
            for layer in layers:
                layer.attention.is_causal = True  # read by sdpa when it gets no mask
        self.initialize_decoder(generator)

    @torch.no_grad()
    def initialize_decoder(self, generator: torch.Generator | None = None) -> None:
        """Draw everything but the encoder as Apple does."""
        for projection in filter(None, (self.image_projection, self.pixel_projection)):
            bound = 1 / math.sqrt(projection.in_features)  # torch's default for a linear layer
            for parameter in projection.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        if self.predicts_text:
            self._initialize_text_inputs(generator)
        if self.mask_embedding is not None:
            nn.init.normal_(self.mask_embedding, std=0.02, generator=generator)
        for decoder in filter(None, (self.decoder, self.pixel_decoder)):
            xavier_uniform_linears(decoder, generator)
        for head in filter(None, (self.pixel_head, self.text_head)):
            initialize_head(head, len(self.decoder.layers), generator)

    def forward(
        self,
        pixel_values: torch.Tensor | NativePictures,
        input_ids: torch.Tensor,
        text_lengths: torch.Tensor,
        prefix_lengths: torch.Tensor | None,
        weights: torch.Tensor | None = None,
        *,
        parallel: torch.Tensor | None = None,
        caption_patches: torch.Tensor | None = None,
        return_predictions: bool = True,
        places: Places | None = None,
        pixel_weight: float = PIXEL_WEIGHT,
    ) -> PretrainingOutput:
        """Both losses of a batch.

        `pixel_values` (B, C, H, W) as the encoder sees them (mean and deviation taken out), or pictures of several sizes.
        Row b of `input_ids` (B, T) holds `text_lengths[b]` target tokens, with the end token if it is to be learned; the
        rest is padding, of any id. The first `prefix_lengths[b]` patches see each other and are not scored; None: the
        encoder is bidirectional, which leaves no patch to predict. `weights` (B,): 0 removes a row from every sum and
        count. `parallel` (B,), bool: rows whose caption is decoded from [MASK]s alone, each place seeing all patches and
        all of the caption's places (CapPa). `caption_patches` (B, K): indices, in raster order, of the patches that
        captions are decoded from; the others cost the decoder nothing, and no patch can be predicted then.

        Without `return_predictions` (training) the heads run only on `places`, which are found here if not given (that
        reads the lengths on the host). Raises `ValueError` for arguments that do not fit each other or the model.
        """
        self._check(pixel_values, input_ids, text_lengths, prefix_lengths, caption_patches)
        if not return_predictions and places is None:
            lengths = (text_lengths, prefix_lengths if self.predicts_patches else None, weights)
            places = scored_places(
                num_patches_of(self.encoder, pixel_values), *(None if t is None else t.cpu() for t in lengths),
                num_real_B=pixel_values.num_real_B.cpu() if isinstance(pixel_values, NativePictures) else None,
            ).to(input_ids.device)
        features_BND = encode(self.encoder, pixel_values, prefix_lengths)

        scores: dict[str, torch.Tensor | None] = {}
        given_BND = features_BND
        if caption_patches is not None:
            given_BND = features_BND.gather(1, caption_patches[..., None].expand(-1, -1, features_BND.shape[-1]))
        num_patches = given_BND.shape[1]
        sequence_BSD, mask_B1SS = self.image_projection(given_BND), None
        if self.predicts_text:
            # The last token is a target only: its place is computed for who wants to look at all predictions.
            read_ids_BT = input_ids if places is None else input_ids[:, : places.num_tokens - 1]
            text_BTD = self._embed_text(read_ids_BT)
            if parallel is not None:
                text_BTD = torch.where(parallel[:, None, None], self.mask_embedding, text_BTD)
            sequence_BSD = torch.cat([sequence_BSD, self._with_positions(text_BTD)], dim=1)
            if parallel is not None:
                mask_B1SS = self._parallel_mask(sequence_BSD, num_patches, text_lengths, parallel)
        hidden_BSD = self._decode(self.decoder, self.decoder_norm, sequence_BSD, mask_B1SS)
        if self.predicts_text:
            text_BTD = hidden_BSD[:, num_patches:]
            scores |= score_text(self.text_head, text_BTD, input_ids, text_lengths, weights, places)
        if self.predicts_patches:
            image_BND = hidden_BSD[:, :num_patches]
            if self.pixel_decoder is not None:
                image_BND = self._decode(
                    self.pixel_decoder, self.pixel_decoder_norm, self.pixel_projection(features_BND)
                )
            scores |= self._score_patches(image_BND, pixel_values, prefix_lengths, weights, places)
        return gather_losses(scores, pixel_weight, features_BND if return_predictions else None)

    def _check(
        self,
        pixel_values: torch.Tensor | NativePictures,
        input_ids_BT: torch.Tensor,
        text_lengths_B: torch.Tensor,
        prefix_lengths_B: torch.Tensor | None,
        caption_patches_BK: torch.Tensor | None,
    ) -> None:
        num_tokens = input_ids_BT.shape[1]
        if self.predicts_text and num_tokens > self.context_length:
            raise ValueError(f"input_ids: {num_tokens} tokens, but the model has context_length {self.context_length}")
        if self.predicts_patches and (prefix_lengths_B is None or caption_patches_BK is not None):
            raise ValueError("prefix_lengths: patches are predicted after a prefix, from all patches before them")
        if torch.compiler.is_compiling() or text_lengths_B.device.type != "cpu":
            return  # values stay unread where that would wait for a device
        if self.predicts_text and int(text_lengths_B.max()) > num_tokens:
            longest = int(text_lengths_B.max())
            raise ValueError(f"text_lengths: {longest} tokens in a row of input_ids that holds {num_tokens}")
        if prefix_lengths_B is not None:
            check_prefixes(prefix_lengths_B, num_patches_of(self.encoder, pixel_values))

    def _parallel_mask(
        self, sequence_BSD: torch.Tensor, num_patches: int, text_lengths_B: torch.Tensor, parallel_B: torch.Tensor
    ) -> torch.Tensor:
        """Causal, but in parallel rows every place of the caption sees all patches and the whole caption."""
        length = sequence_BSD.shape[1]
        position_S = torch.arange(length, device=sequence_BSD.device)
        in_caption_BS = position_S < num_patches + text_lengths_B[:, None]
        sees_BSS = in_caption_BS[:, None] & (position_S >= num_patches)[:, None] & parallel_B[:, None, None]
        can_attend_B1SS = masks.causal_can_attend(length, sequence_BSD.device) | sees_BSS[:, None]
        return masks.for_attention(can_attend_B1SS, self.decoder_config._attn_implementation, sequence_BSD.dtype)

    def _decode(
        self, decoder: Aimv2Encoder, norm: nn.Module, sequence_BSD: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Causal over patches and text, unless `mask` says otherwise; normalised."""
        attention = self.decoder_config._attn_implementation
        if mask is None and attention != "sdpa":  # sdpa follows the layers' is_causal
            can_attend_11SS = masks.causal_can_attend(sequence_BSD.shape[1], sequence_BSD.device)
            mask = masks.for_attention(can_attend_11SS, attention, sequence_BSD.dtype)
        return norm(decoder(sequence_BSD, mask).last_hidden_state)

    def _score_patches(
        self,
        hidden_BND: torch.Tensor,
        pixel_values: torch.Tensor | NativePictures,
        prefix_lengths_B: torch.Tensor,
        weights_B: torch.Tensor | None,
        places: Places | None,
    ) -> dict[str, torch.Tensor | None]:
        """Squared error of the patches from index M on; place i predicts patch i + 1. The head runs on `places` only."""
        config = self.encoder.config
        native = isinstance(pixel_values, NativePictures)
        if native:
            patches_BNP = in_target_order(pixel_values.patches_BNP, config.num_channels)
        else:
            patches_BNP = patchify(pixel_values, config.patch_size)
        if places is not None:
            targets_RP = standardize(patches_BNP.flatten(0, 1)[places.patches_R + 1])
            error_R = (self.pixel_head(hidden_BND.flatten(0, 1)[places.patches_R]).float() - targets_RP).square().mean(-1)
            mean_color_sum = mean_color_error(targets_RP, config.num_channels).sum()
            count = torch.full((), error_R.shape[0], dtype=torch.int64, device=error_R.device)
            return {"pixel_sum": error_R.sum(), "pixel_count": count, "mean_color_sum": mean_color_sum}
        num_patches = hidden_BND.shape[1]
        target_index_N = torch.arange(1, num_patches, device=hidden_BND.device)
        scored_BN = target_index_N >= prefix_lengths_B[:, None]
        if native:
            scored_BN = scored_BN & (target_index_N < pixel_values.num_real_B[:, None])
        if weights_B is not None:
            scored_BN = scored_BN & weights_B.bool()[:, None]
        targets_BNP = standardize(patches_BNP[:, 1:])
        predictions_BNP = self.pixel_head(hidden_BND)
        error_BN = (predictions_BNP[:, :-1].float() - targets_BNP).square().mean(-1)
        mean_color_BN = mean_color_error(targets_BNP, config.num_channels)
        pixel_sum, mean_color_sum = (torch.where(scored_BN, e, 0).sum() for e in (error_BN, mean_color_BN))
        return {
            "pixel_sum": pixel_sum,
            "pixel_count": scored_BN.sum(),
            "mean_color_sum": mean_color_sum,
            "patch_predictions": predictions_BNP,
        }

    def forward_flops(self, rows: int, num_patches: int, num_tokens: int, scored_patches: int, caption_patches: int | None = None) -> float:
        """Floating-point operations of one forward pass (matrix products and dense attention; x 3 with the backward one).

        `rows` pictures of `num_patches` with `num_tokens` text tokens together; heads run on `scored_patches` and on
        every text token. `caption_patches`: patches a picture that the decoder gets (None: all).
        """
        total = encoder_flops(self.encoder, rows, num_patches)
        d = self.decoder_config
        given = num_patches if caption_patches is None else caption_patches
        tokens = num_tokens if self.predicts_text else 0
        places = rows * given + tokens
        total += 2 * rows * given * self.encoder.config.hidden_size * d.hidden_size
        total += blocks_flops(d, places, places / max(1, rows))
        if self.pixel_decoder is not None:
            total += 2 * rows * num_patches * self.encoder.config.hidden_size * d.hidden_size
            total += blocks_flops(d, rows * num_patches, num_patches)
        if self.predicts_text:
            total += 2 * num_tokens * d.hidden_size * d.vocab_size
        if self.predicts_patches:
            total += 2 * scored_patches * d.hidden_size * self.pixel_head.out_features
        return total

    def _sizes(self) -> dict[str, int | bool]:
        return {
            "decoder_hidden_size": self.decoder_config.hidden_size,
            "decoder_intermediate_size": self.decoder_config.intermediate_size,
            "decoder_num_layers": self.decoder_config.num_hidden_layers,
            "decoder_num_heads": self.decoder_config.num_attention_heads,
            "vocab_size": self.decoder_config.vocab_size,
            "context_length": self.context_length,
            "predicts_patches": self.predicts_patches,
            "predicts_text": self.predicts_text,
            "separate_decoders": self.pixel_decoder is not None,
            "parallel_captions": self.mask_embedding is not None,
        }

    @classmethod
    def from_pretrained(
        cls, path_or_name: str | Path, image_size: int | None = None, attention: str = "sdpa"
    ) -> AIMv2ForPreTraining:
        """Open what `save_pretrained` wrote, or a checkpoint in the layout of Apple's trainer.

        `image_size`: the encoder's learned positions are resized to it. Raises `UserError` naming what is missing.
        """
        source = locate(path_or_name)
        rest, sizes, encoder_parts = _read_parts(source)
        if encoder_parts is None:
            encoder = load_encoder(source, image_size, attention)
        else:
            encoder = assemble_encoder(*encoder_parts, source, image_size, attention)
        with no_init_weights():
            model = cls(encoder, **sizes, attention=attention)
        model._fill(rest, source if encoder_parts else source / FOLDER)
        return model

    def load_decoder(self, path_or_name: str | Path) -> None:
        """Take everything but the encoder from another pre-training checkpoint of the same sizes and parts.

        Raises `UserError` naming the keys that are missing, unexpected or of another shape.
        """
        source = locate(path_or_name)
        rest, _, _ = _read_parts(source)
        self._fill(rest, source)


def _read_parts(source: Path) -> tuple[checkpoints.State, dict[str, Any], tuple[checkpoints.Layout, checkpoints.State, dict] | None]:
    """(everything but the encoder, its sizes, the encoder's tensors where they lie in the same file)."""
    folder = source / FOLDER
    if folder.is_dir():
        rest, sizes = checkpoints.read_safetensors(folder)
        if misfits := (set(_SIZE_NAMES) - sizes.keys()) | (sizes.keys() - {*_SIZE_NAMES, *_PART_NAMES}):
            raise UserError(f"{folder / 'config.json'}: missing or unknown keys: {checkpoints.name_some(misfits)}")
        return rest, sizes, None
    state, config = checkpoints.read_safetensors(source)
    layout, renamed = checkpoints.to_transformers(state, str(source))
    if layout.name != "apple_trainer":
        raise UserError(
            f"{source}: holds an encoder only (layout {layout.name}, no folder {FOLDER}/): "
            "continue pre-training from a pre-training checkpoint, or start a fresh decoder on this encoder"
        )
    rest = {key: tensor for key, tensor in renamed.items() if not key.startswith(layout.encoder_prefix)}
    return rest, _sizes_from_tensors(rest, config, source), (layout, renamed, config)


_SIZE_NAMES = (
    "decoder_hidden_size",
    "decoder_intermediate_size",
    "decoder_num_layers",
    "decoder_num_heads",
    "vocab_size",
    "context_length",
)
_PART_NAMES = ("predicts_patches", "predicts_text", "separate_decoders", "parallel_captions")  # absent: AIMv2's


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


def initialize_head(head: nn.Linear, num_layers: int, generator: torch.Generator | None) -> None:
    """Apple's: truncated normal of variance 1 / ((1 + layers) * fan_in)."""
    std = math.sqrt(1 / ((1 + num_layers) * head.in_features))
    std_before_cut = std / 0.87962566103423978  # cutting a normal at two deviations narrows it by this factor
    nn.init.trunc_normal_(head.weight, std=std_before_cut, a=-2 * std_before_cut, b=2 * std_before_cut, generator=generator)


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Parameter name -> "norm", "bias", "position", "bos", "logit_scale" or "weight", by what the parameter is."""
    own = {"bias": "bias", "bos": "bos", "mask_embedding": "bos", "cls_token": "bos", "logit_scale": "logit_scale"}
    roles = {}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(module, Aimv2RMSNorm):
                role = "norm"
            elif module_name.endswith("position_embedding"):
                role = "position"
            else:
                role = own.get(name, "weight")
            roles[f"{module_name}.{name}" if module_name else name] = role
    return roles


def score_text(
    head: nn.Linear,
    hidden_BTD: torch.Tensor,
    target_ids_BT: torch.Tensor,
    text_lengths_B: torch.Tensor,
    weights_B: torch.Tensor | None,
    places: Places | None,
) -> dict[str, torch.Tensor | None]:
    """Cross-entropy of the first `text_lengths_B` tokens; BOS (place 0) predicts token 0. The head runs on `places` only."""
    if places is not None:
        targets_R = target_ids_BT[:, : places.num_tokens].flatten()[places.tokens_R]
        logits_RV = head(hidden_BTD[:, : places.num_tokens].flatten(0, 1)[places.tokens_R])
        text_sum = F.cross_entropy(logits_RV.float(), targets_R, reduction="sum")
        return {"text_sum": text_sum, "text_count": torch.full((), targets_R.shape[0], dtype=torch.int64, device=targets_R.device)}
    num_tokens = target_ids_BT.shape[1]
    is_target_BT = torch.arange(num_tokens, device=hidden_BTD.device) < text_lengths_B[:, None]
    if weights_B is not None:
        is_target_BT = is_target_BT & weights_B.bool()[:, None]
    logits_BTV = head(hidden_BTD)
    text_sum = F.cross_entropy(
        logits_BTV[:, :num_tokens].flatten(0, 1).float(),
        target_ids_BT.masked_fill(~is_target_BT, -100).flatten(),
        ignore_index=-100,
        reduction="sum",
    )
    return {"text_sum": text_sum, "text_count": is_target_BT.sum(), "text_logits": logits_BTV}


def gather_losses(
    scores: dict[str, torch.Tensor | None], pixel_weight: float, features_BND: torch.Tensor | None
) -> PretrainingOutput:
    """The output with the losses of this batch: text + alpha * pixel, of what was scored."""
    text_loss = scores["text_sum"] / scores["text_count"].clamp(min=1) if "text_sum" in scores else None
    pixel_loss = scores["pixel_sum"] / scores["pixel_count"].clamp(min=1) if "pixel_sum" in scores else None
    if text_loss is None:
        loss = pixel_loss  # alpha only weighs it against a text loss
    else:
        loss = text_loss if pixel_loss is None else text_loss + pixel_weight * pixel_loss
    return PretrainingOutput(loss=loss, pixel_loss=pixel_loss, text_loss=text_loss, encoder_features=features_BND, **scores)


def blocks_flops(config: Any, places: float, context: float) -> float:
    """Forward operations of a stack of blocks over `places` that attend to `context` places each (dense attention)."""
    width, hidden = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * places * (2 * (4 * width**2 + 3 * width * hidden) + 4 * context * width)


def encoder_flops(encoder: Aimv2VisionModel, rows: float, num_patches: float) -> float:
    """Forward operations of the encoder on `rows` pictures of `num_patches`."""
    config = encoder.config
    values = config.num_channels * config.patch_size**2
    return 2 * rows * num_patches * values * config.hidden_size + blocks_flops(config, rows * num_patches, num_patches)


def in_target_order(patches_BNP: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Patches whose values stand as (channel, row, column), the embedding's order, as (row, column, channel)."""
    return patches_BNP.unflatten(-1, (num_channels, -1)).transpose(-1, -2).flatten(-2)


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
