"""The assistant: encoder, 2-layer MLP connector and language model as a stock Llava or LlavaNext (paper 4.3), or, with fewer
tokens than patches, as a stock Cohere2Vision.

`build_assistant` sets what stock defaults get wrong for AIMv2: normalised features of all patches, nothing cropped
away, end and pad tokens that generation obeys. `AssistantForTraining` adds the loss as a sum and a count, and
cached encoder features.

Shapes: B batch, S sequence, K views of all pictures together, I pictures, N patches of a view, D width, C channels,
H, W.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from aimv2_vlm.config import UserError

if TYPE_CHECKING:
    from aimv2_vlm.data.tiling import Tiling

PARTS = ("encoder", "connector", "llm")
IGNORED = -100


def build_assistant(
    encoder: nn.Module | str | Path,
    llm: nn.Module | str | Path | None = None,
    tiling: Tiling | str = "1x1",
    *,
    tokenizer: Any = None,
    llm_config: dict | None = None,
    template: str = "llama3",
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    pad_square: bool = True,
    unshuffle: int = 1,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    max_new_tokens: int = 128,
    image_size: int | None = None,
    layer: int | None = None,
    tokens: str = "all",
) -> tuple[nn.Module, Any]:
    """(model, processor), both stock: `LlavaForConditionalGeneration` for one view, `LlavaNext…` for tiles, `Cohere2Vision…` for
    either with `unshuffle` (`data.tiling`), whose connector is a gated MLP.

    encoder: an Aimv2VisionModel or one of the encoders it is compared with (`models.backbone`), used as it is, weights untouched; or a
    checkpoint of any layout. image_size, layer, tokens: what of it the decoder sees, as the keys of `encoder` in a recipe.
    llm: a causal language model, its path or name; None makes a Llama from `llm_config` (LlamaConfig's keys; sizes of
    the vocabulary and special ids come from the tokenizer), drawn from torch's global generator.
    tokenizer: fast tokenizer or its path; default: the llm's own. template: llama3 | vicuna | plain | own.
    tiling: "RxC" or "RxC+RxC" (a choice), or a Tiling for more. image_mean, image_std: default: those of the
    encoder's checkpoint.
    Raises UserError.
    """
    from transformers import GenerationConfig

    # The one function where a model meets its processor; models and data know nothing of each other elsewhere.
    from aimv2_vlm.data import chat
    from aimv2_vlm.data import tiling as tilings

    if not isinstance(encoder, nn.Module):
        from aimv2_vlm.models.backbone import load_backbone

        path, encoder = encoder, load_backbone(encoder, image_size=image_size, attention=attention).model
        if image_mean is None or image_std is None:
            image_mean, image_std = image_statistics(path)
    if image_mean is None or image_std is None:
        raise UserError("build_assistant: image_mean and image_std are the encoder's; give those it was trained with")
    if image_size not in (None, encoder.config.image_size):
        raise UserError(f"encoder.image_size: {image_size}, but a stock Llava gives a {encoder.config.model_type} encoder pictures of its own "
                        f"{encoder.config.image_size} px; leave the key out")
    if isinstance(tiling, str):
        sizes = dict(tile_size=encoder.config.image_size, patch_size=encoder.config.patch_size)
        tiling = tilings.Tiling.parse(tiling, pad_square=pad_square, unshuffle=unshuffle, **sizes)
    if tiling.tile_size != encoder.config.image_size or tiling.patch_size != encoder.config.patch_size:
        raise UserError(
            f"tiling: tiles of {tiling.tile_size} px with patches of {tiling.patch_size}, but the encoder takes "
            f"{encoder.config.image_size} px with patches of {encoder.config.patch_size}"
        )

    tokenizer = _open_tokenizer(llm if tokenizer is None else tokenizer)
    image_token = chat.prepare_tokenizer(tokenizer)
    format_ = chat.ChatFormat(
        tokenizer, chat.chat_template(template, image_token, tokenizer.chat_template), image_token
    )
    processor = chat.build_processor(
        tokenizer,
        tilings.image_processor(tiling, image_mean, image_std),
        tiling.patch_size,
        format_.template,
        image_token,
    )
    llm = _open_llm(llm, llm_config, tokenizer, attention, dtype)
    _grow_embeddings(llm, len(tokenizer))
    reading = _stock_reading(encoder, layer, tokens, tiling.unshuffle)
    model = _join(encoder.to(dtype), llm, tiling, format_.image_token_id, *reading)
    model.generation_config = GenerationConfig(
        eos_token_id=format_.stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    return model, processor


def image_statistics(path: str | Path) -> tuple[list[float], list[float]]:
    """(mean, std) that belong to an encoder's checkpoint, from its processor's file. Raises UserError."""
    config = image_processor_values(path)
    return list(config["image_mean"]), list(config["image_std"])


def image_processor_values(path: str | Path) -> dict[str, Any]:
    """What the processor's file of a checkpoint says of pictures. Raises UserError for one without mean and deviation."""
    from aimv2_vlm.models.backbone import PROCESSOR_FILES
    from aimv2_vlm.models.encoder import locate

    folder = locate(path, also=PROCESSOR_FILES)
    folder = folder if folder.is_dir() else folder.parent
    for name in PROCESSOR_FILES:
        try:
            config = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
        config = config.get("image_processor", config)
        if "image_mean" in config and "image_std" in config:
            return config
    raise UserError(f"{folder}: no preprocessor_config.json with image_mean and image_std; give them by hand")


def check_context(model: nn.Module, num_image_tokens: int, prompt_tokens: int, max_new_tokens: int = 0) -> None:
    """Raises UserError when a picture, its prompt and the answer do not fit into the decoder's positions."""
    positions = getattr(_assistant(model).config.text_config, "max_position_embeddings", None)
    needed = num_image_tokens + prompt_tokens + max_new_tokens
    if positions is not None and needed > positions:
        raise UserError(
            f"tiling: {num_image_tokens} tokens of a picture, {prompt_tokens} of its prompt and {max_new_tokens} new "
            f"ones make {needed}, the decoder has {positions} positions; use fewer tiles or another decoder"
        )


def encode_views(model: nn.Module, pixels_KCHW: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
    """Encoder features (K, N, D) of K views, those that the stock model reads; no gradients unless the encoder is trainable."""
    assistant = _assistant(model)
    encoder, layer = assistant.model.vision_tower, getattr(assistant.config, "vision_feature_layer", -1)
    first = 1 if getattr(assistant.config, "vision_feature_select_strategy", "full") == "default" else 0  # CLS, where there is one

    def features(pixels_BCHW: torch.Tensor) -> torch.Tensor:
        if layer == -1 and encoder.config.tie_last_hidden_states:
            return encoder(pixel_values=pixels_BCHW).last_hidden_state[:, first:]
        return encoder(pixel_values=pixels_BCHW, output_hidden_states=True).hidden_states[layer][:, first:]

    trainable = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
    with torch.set_grad_enabled(trainable):
        parts = [features(part) for part in pixels_KCHW.split(batch_size or len(pixels_KCHW))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class AssistantForTraining(nn.Module):
    """The stock assistant with the loss of the paper's tuning as (sum, count) over supervised tokens.

    Rows lie behind each other in one sequence and see only themselves. Everything with parameters runs inside a
    module's own forward, so that wrappers which gather parameters there (DDP, FSDP, ZeRO-3) work; a batch without any
    picture sends an empty one through, so that no rank misses a collective.
    """

    def __init__(self, assistant: nn.Module, views_at_once: int | None = None) -> None:
        """views_at_once: most views of one pass of the encoder (None: all of a micro-batch)."""
        super().__init__()
        self.assistant, self.views_at_once = assistant, views_at_once
        self._places: torch.Tensor | None = None  # during a forward pass: where the last block's outputs are read
        layers = getattr(assistant.model.language_model, "layers", None)
        last = dict(layers[-1].named_modules()) if layers else {}
        for part in (last[name] for name in ("mlp", "self_attn.o_proj") if name in last):
            part.register_forward_pre_hook(self._pick)
            part.register_forward_hook(self._put_back)

    def _pick(self, part: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """The last block works token by token once its keys and values are there: only what is read is computed."""
        return None if self._places is None else (arguments[0][:, self._places], *arguments[1:])

    def _put_back(self, part: nn.Module, arguments: tuple[torch.Tensor, ...], out_1RD: Any) -> Any:
        if self._places is None:
            return None
        if isinstance(out_1RD, tuple):  # experts that return their router's scores too
            return self._put_back(part, arguments, out_1RD[0]), *out_1RD[1:]
        return out_1RD.new_zeros(1, self._length, out_1RD.shape[-1]).index_copy(1, self._places, out_1RD)

    def train(self, mode: bool = True) -> AssistantForTraining:
        super().train(mode)
        encoder = self.assistant.model.vision_tower
        encoder.train(mode and any(p.requires_grad for p in encoder.parameters()))
        see_rows_apart(self.assistant, mode)
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        row_lengths: list[int],
        weights: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        image_sizes: list[list[int]] | None = None,
        views_per_image: list[int] | None = None,
        places: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """{"text_sum", "text_count"}: cross-entropy over supervised tokens and their number.

        input_ids, labels (1, S) of B rows behind each other, labels aligned with the ids, IGNORED where nothing is
        learned; position_ids (1, S) begin anew with each row; row_lengths (B) on the host; weights (B): rows of weight
        0 count nothing. Pictures in order of their placeholders: pixel_values (K, C, H, W), or features (K, N, D) as
        `encode_views` gives them; image_sizes I x (height, width), views_per_image I (both for tiles only). places:
        what `supervised_places` finds, where the host already knows it.
        """
        if places is None:
            places = supervised_places(labels, row_lengths, weights).to(labels.device)
        if features is None:
            features = encode_views(self.assistant, self._views(pixel_values), self.views_at_once)
        pictures = _ProjectedPictures(self.assistant.model, features, pixel_values, image_sizes, views_per_image)
        self._places, self._length = places, input_ids.shape[1]
        try:
            hidden_1SD = self.assistant.model(
                input_ids=input_ids, position_ids=position_ids, mm_encoder_outputs={"image": pictures}, use_cache=False,
                row_lengths=tuple(row_lengths),
            ).last_hidden_state  # fmt: skip
        finally:
            self._places = None
        text_sum = cross_entropy_sum(self.assistant.lm_head, hidden_1SD[0, places], labels[0, places + 1])
        return {"text_sum": text_sum, "text_count": torch.full((), len(places), device=labels.device)}

    def _views(self, pixels_KCHW: torch.Tensor | None) -> torch.Tensor:
        if pixels_KCHW is not None and len(pixels_KCHW):
            return pixels_KCHW
        return _nothing(self.assistant)


def supervised_places(labels_1S: torch.Tensor, row_lengths: list[int], weights_B: torch.Tensor | None = None) -> torch.Tensor:
    """Places whose next token is to be learned, int64 (R,) on the host, rows of weight 0 left out."""
    supervised_S = labels_1S[0].cpu() != IGNORED  # the first token of a row never is
    if weights_B is not None:
        supervised_S = supervised_S & (weights_B.cpu() > 0).repeat_interleave(torch.tensor(row_lengths))
    return supervised_S[1:].nonzero()[:, 0]


def cross_entropy_sum(head: nn.Module, hidden_RD: torch.Tensor, targets_R: torch.Tensor, chunk: int = 4096) -> torch.Tensor:
    """Sum of the cross-entropy of R tokens. Logits of at most `chunk` of them exist at a time, also in the backward pass."""
    if len(targets_R) <= chunk:
        return _cross_entropy(head, hidden_RD, targets_R)
    from torch.utils.checkpoint import checkpoint

    parts = zip(hidden_RD.split(chunk), targets_R.split(chunk), strict=True)
    return torch.stack([checkpoint(_cross_entropy, head, h, t, use_reentrant=False) for h, t in parts]).sum()


def _cross_entropy(head: nn.Module, hidden_RD: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden_RD).float(), targets_R, reduction="sum")


ROWS_APART = "aimv2_vlm_rows_apart"  # name of the attention below in transformers' registry


def see_rows_apart(assistant: nn.Module, on: bool) -> None:
    """Switch the decoder between stock sdpa and `rows_apart`, which computes no product between rows of one sequence.

    Decoders under another implementation find the rows by `position_ids` themselves.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ROWS_APART, rows_apart)
    config = assistant.config.text_config
    if config._attn_implementation == ("sdpa" if on else ROWS_APART):
        config._attn_implementation = ROWS_APART if on else "sdpa"


def rows_apart(
    module: nn.Module, query_BHSD: torch.Tensor, key_BHSD: torch.Tensor, value_BHSD: torch.Tensor, attention_mask: Any = None,
    scaling: float | None = None, dropout: float = 0.0, row_lengths: tuple[int, ...] | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention within each of the rows that lie behind each other in a sequence, as transformers calls it.

    sliding_window: of a layer that sees only so many tokens, the present one counted.
    """
    lengths = list(row_lengths or (query_BHSD.shape[2],))
    how = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query_BHSD.shape[1] != key_BHSD.shape[1]}
    rows = []
    for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query_BHSD, key_BHSD, value_BHSD)), strict=True):
        length, seen = q.shape[2], {"is_causal": True}
        if sliding_window and length > sliding_window:
            seen = {"attn_mask": torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)}
        rows.append(F.scaled_dot_product_attention(q, k, v, **how, **seen))
    return (rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)).transpose(1, 2).contiguous(), None


@torch.no_grad()
def check_rows_apart(model: AssistantForTraining, together: bool = True, num_tokens: int = 6) -> None:
    """Raises UserError where a row is not what stock attention makes of it, or where (together: rows are concatenated) it sees over the
    border to the row before. Windows of the decoder's layers, made short for this, are looked through too."""
    was_training = model.training
    model.eval()  # without dropout; stock attention
    vocab = _assistant(model).config.text_config.vocab_size
    device = next(model.parameters()).device
    language_model = _assistant(model).model.language_model

    def hidden(*rows: list[int]) -> torch.Tensor:
        lengths = tuple(map(len, rows))
        ids = torch.tensor([[token for row in rows for token in row]], device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        return language_model(input_ids=ids, position_ids=positions, use_cache=False, row_lengths=lengths).last_hidden_state[0].float()

    first, second = ([(7 * i + start) % vocab for i in range(num_tokens)] for start in (11, 23))
    try:
        with _set_to(num_tokens // 2, _windows(language_model)), _set_to(0.0, _outlier_thresholds(language_model)):
            stock = hidden(second)
            see_rows_apart(_assistant(model), True)
            try:
                alone, behind = hidden(second), hidden(first, second)[num_tokens:]
            except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # it needs what another implementation gives or takes
                raise UserError(f"llm: {type(language_model).__name__} does not run with rows behind each other "
                                f"({str(error).splitlines()[0]}); set llm.attention=eager and optim.micro_batch_size=1") from error
    finally:
        model.train(was_training)
    tolerance = stock.abs().max() * (1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2)  # bf16 weights round more
    if (alone - stock).abs().max() > tolerance:
        raise UserError(f"llm: {type(language_model).__name__} has an attention that tuning would replace by another; set llm.attention=eager")
    if together and (alone - behind).abs().max() > tolerance:
        raise UserError(f"llm: {type(language_model).__name__} sees the row before when rows are concatenated; set optim.micro_batch_size=1")


WINDOWS = ("sliding_window", "attention_chunk_size")  # transformers' names of how far an attention layer sees


def _windows(language_model: nn.Module) -> list[tuple[Any, str]]:
    """(owner, attribute) of every window; where they are short, a few tokens tell how windows are treated."""
    return [(owner, name) for owner in (language_model.config, *language_model.modules()) for name in WINDOWS
            if type(getattr(owner, name, None)) is int]


def _outlier_thresholds(language_model: nn.Module) -> list[tuple[Any, str]]:
    """(owner, attribute) of every threshold of LLM.int8(), 0 for no columns kept in 16 bits: it chooses them over all tokens of a call,
    which lets a row round differently behind another and would hide whether it sees it."""
    return [(state, "threshold") for module in language_model.modules() if hasattr(state := getattr(module, "state", None), "threshold")]


@contextmanager
def _set_to(value: float, places: list[tuple[Any, str]]) -> Iterator[None]:
    """The attributes `places` hold `value` inside, and afterwards what they held before."""
    before = [getattr(owner, name) for owner, name in places]
    try:
        for owner, name in places:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), its in zip(places, before, strict=True):
            setattr(owner, name, its)


class _ProjectedPictures:
    """Stands for the stock class of image outputs: the model's forward asks for `pooler_output`, and only then are
    features projected and packed, inside the forward of the module that owns `image_newline`."""

    def __init__(self, model: nn.Module, features_KND, pixel_values, image_sizes, views_per_image) -> None:
        self.model, self.features_KND = model, features_KND
        self.image_sizes, self.views_per_image = image_sizes, views_per_image
        self.none = len(features_KND) == 0 or (pixel_values is not None and len(pixel_values) == 0)

    @property
    def pooler_output(self) -> list[torch.Tensor] | torch.Tensor:
        features_KND = self.features_KND
        if not len(features_KND):
            config = self.model.config.vision_config
            patches = (config.image_size // config.patch_size) ** 2
            features_KND = features_KND.new_zeros(1, patches, config.hidden_size)
        projected_KND = self.model.multi_modal_projector(features_KND)
        if projected_KND.dim() == 4:  # unshuffled: rows and columns of tokens
            return projected_KND.flatten(1, 2)[: 0 if self.none else None]
        newline = getattr(self.model, "image_newline", None)
        if self.none:
            nothing = projected_KND.flatten(0, 1)[:0]
            return [nothing if newline is None else torch.cat([nothing, newline[None][:0].to(nothing)])]
        if newline is None:
            return list(projected_KND)
        packed, _ = self.model.pack_image_features(
            projected_KND.split(self.views_per_image),
            self.image_sizes,
            vision_feature_select_strategy="full",
            image_newline=newline,
        )
        return packed


# --------------------------------------------------------------------------------------------------------------- parts


def part_of(name: str) -> str:
    """encoder | connector | llm of a parameter's name. LlavaNext's bare `image_newline` belongs to the connector."""
    pieces = name.split(".")
    if "vision_tower" in pieces:
        return "encoder"
    return "connector" if "multi_modal_projector" in pieces or "image_newline" in pieces else "llm"


ADAPTER_PIECES = ("lora_A", "lora_B", "lora_magnitude_vector")  # peft's names of what it adds to a layer


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(piece in ADAPTER_PIECES for piece in name.split("."))


def set_trainable(model: nn.Module, parts: list[str]) -> dict[str, int]:
    """The only freeze switch: exactly these parts learn, of a decoder with adapters these alone, of an encoder what its features are
    made by (blocks behind the layer that is read have no gradient, for which DDP would wait).

    Returns the number of trainable parameters of each part.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise UserError(f"trainable: {', '.join(unknown)} is unknown; choose from {', '.join(PARTS)}")
    if not parts:
        raise UserError(f"trainable: is empty; name at least one of {', '.join(PARTS)}")
    counts = dict.fromkeys(PARTS, 0)
    adapted = any(is_adapter(name) for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts and (not adapted or part_of(name) != "llm" or is_adapter(name)))
    if "encoder" in parts:
        read = encoder_parameters_read(model)
        for parameter in _assistant(model).model.vision_tower.parameters():
            parameter.requires_grad_(parameter in read)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel() if parameter.requires_grad else 0
    model.train(model.training)
    return counts


@torch.enable_grad()
def encoder_parameters_read(model: nn.Module) -> set[nn.Parameter]:
    """The encoder's parameters that its features depend on, by the graph of one view."""
    assistant = _assistant(model)
    learned = {parameter: parameter.requires_grad for parameter in assistant.model.vision_tower.parameters()}
    try:
        for parameter in learned:
            parameter.requires_grad_(True)
        features = encode_views(model, _nothing(assistant))
    finally:
        for parameter, learns in learned.items():
            parameter.requires_grad_(learns)
    found, seen, left = set(), set(), [features.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
            found |= {node.variable} if hasattr(node, "variable") else set()
    return found


def _nothing(assistant: nn.Module) -> torch.Tensor:
    """One view of zeros (1, C, H, W) in the encoder's number format, where its parameters are."""
    config, weight = assistant.config.vision_config, next(assistant.model.vision_tower.parameters())
    return weight.new_zeros(1, config.num_channels, config.image_size, config.image_size)


def parameter_groups_by_part(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Trainable (name, parameter) pairs of each part, in the model's order; parts without any are left out."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(part_of(name), []).append((name, parameter))
    return groups


def _assistant(model: nn.Module) -> nn.Module:
    """The stock model inside AssistantForTraining and inside wrappers that keep it as `.module`."""
    while not hasattr(model, "generation_config"):
        model = model.assistant if isinstance(model, AssistantForTraining) else model.module
    return model


# ------------------------------------------------------------------------------------------------------------ building


def _open_tokenizer(tokenizer: Any) -> Any:
    if tokenizer is None or isinstance(tokenizer, nn.Module):
        raise UserError("build_assistant: a tokenizer is needed unless llm is a path that holds one")
    if not isinstance(tokenizer, (str, Path)):
        return tokenizer
    from aimv2_vlm.data.chat import open_tokenizer

    return open_tokenizer(tokenizer)


def _open_llm(llm: Any, config: dict | None, tokenizer: Any, attention: str, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from aimv2_vlm.models.backbone import open_whole

    if isinstance(llm, nn.Module):
        return llm.to(dtype)
    if llm is None:
        if config is None:
            raise UserError("llm: neither a path nor the sizes of a new one")
        made = LlamaConfig(
            **config,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        made._attn_implementation = attention
        return LlamaForCausalLM(made).to(dtype)
    try:
        return open_whole(AutoModelForCausalLM, llm, attention, dtype)
    except UserError as error:
        raise UserError(f"llm: {error}") from None


def _grow_embeddings(llm: nn.Module, num_tokens: int) -> None:
    """Rows for added tokens, a multiple of 64 in all, new ones the mean of the old. Nothing where the rows suffice."""
    old = llm.get_input_embeddings().weight.shape[0]
    if num_tokens <= old:
        return
    llm.resize_token_embeddings(num_tokens, pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight)


def _stock_reading(encoder: nn.Module, layer: int | None, tokens: str, unshuffle: int) -> tuple[int, str]:
    """(vision_feature_layer, vision_feature_select_strategy) by which a stock Llava reads these features of the encoder.

    layer None: the last one, normalised, which takes `tie_last_hidden_states`: Llava reads `hidden_states`, whose last entry must be
    it. Cohere2Vision (unshuffle > 1) reads nothing but `last_hidden_state`, all of it. Raises UserError where no setting of the stock class gives what is asked for.
    """
    from aimv2_vlm.models.backbone import KINDS, kind_of

    config, kind = encoder.config, kind_of(encoder)
    about, name = KINDS[kind], encoder.config.model_type
    for flag in ("use_head", "vision_use_head"):  # the pooled vector is nobody's
        if getattr(config, flag, False):
            setattr(config, flag, False)
            encoder.use_head = False
            del encoder.head
    num_prefix = about.num_prefix(config)
    if kind == "mae":
        raise UserError("encoder.kind: mae: the stock class shuffles its patches, which no setting of a stock Llava prevents")
    if num_prefix > 1:
        raise UserError(f"encoder.kind: {kind}: a stock Llava cannot leave out its {num_prefix - 1} registers")
    if num_prefix and tokens != "patches":
        raise UserError(f"encoder.tokens: all, but CLS of a {name} encoder belongs to no place of the picture; write encoder.tokens: patches")
    if unshuffle > 1 and (num_prefix or layer is not None):
        what = f"layer {layer}" if layer is not None else "CLS"
        raise UserError(f"tiling.unshuffle: the stock class reads all of the last layer, normalised: {what} of a {name} encoder is nothing it could leave out or choose")
    if unshuffle == 1 and layer is None and not about.last_is_tied:
        raise UserError(f"encoder.layer: null, but a stock Llava reads a {name} encoder before its last norm only; write -1, or -2 as LLaVA does for CLIP")
    num_blocks = len(encoder.get_submodule(about.blocks))
    if layer is not None and not -num_blocks - 1 <= layer <= num_blocks:
        raise UserError(f"encoder.layer: {layer}, but the encoder has {num_blocks} blocks; give 0 (embeddings) to {num_blocks}, or -1 to -{num_blocks}")
    config.tie_last_hidden_states = layer is None
    return -1 if layer is None else layer, "default" if num_prefix else "full"


def _join(
    encoder: nn.Module, llm: nn.Module, tiling: Tiling, image_token_id: int, layer: int, strategy: str
) -> nn.Module:
    """The stock model around existing parts; only the connector is new (torch's default initialisation)."""
    from transformers import (
        Cohere2VisionConfig,
        Cohere2VisionForConditionalGeneration,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    pinpoints, width = tiling.pinpoints, llm.config.hidden_size
    common = dict(vision_config=encoder.config, text_config=llm.config, tie_word_embeddings=llm.config.tie_word_embeddings)
    llava = dict(
        image_token_index=image_token_id,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
        image_seq_length=tiling.patches_per_view,
    )
    if llm.config.tie_word_embeddings and not hasattr(llm.base_model, "embed_tokens"):
        raise UserError(f"llm: {type(llm).__name__} shares its head's weights with embeddings that a stock Llava looks for as `embed_tokens`; "
                        "use a decoder with these, such as Llama's, or one whose head has weights of its own")
    attention = [(config, config._attn_implementation) for config in (encoder.config, llm.config)]  # the model around them sets its own
    with torch.device("meta"):  # the parts are put in place, so an 8B decoder is never made twice
        if tiling.unshuffle > 1:
            gated = dict(downsample_factor=tiling.unshuffle, alignment_intermediate_size=2 * width)  # half of it is the gate
            model = Cohere2VisionForConditionalGeneration(Cohere2VisionConfig(**common, **gated, image_token_id=image_token_id))
        elif pinpoints is None:
            model = LlavaForConditionalGeneration(LlavaConfig(**common, **llava))
        else:
            model = LlavaNextForConditionalGeneration(LlavaNextConfig(**common, **llava, image_grid_pinpoints=pinpoints))
    if type(model.model.language_model) is not type(llm.base_model):
        raise UserError(f"llm: {type(llm).__name__} does not fit into {type(model).__name__}")
    dtype = next(llm.parameters()).dtype
    model.model.vision_tower, model.model.language_model, model.lm_head = (
        encoder,
        llm.base_model,
        llm.get_output_embeddings(),
    )
    model.config.vision_config, model.config.text_config = encoder.config, llm.config
    for config, implementation in attention:
        config._attn_implementation = implementation
    connector = model.model.multi_modal_projector.to_empty(device="cpu").to(dtype)
    for layer in _linears(connector):
        layer.reset_parameters()
    if pinpoints is not None:
        model.model.image_newline = nn.Parameter((torch.randn(width) / width**0.5).to(dtype))
    model.config.dtype = dtype
    model.tie_weights()
    return model


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    return (child for child in module.modules() if isinstance(child, nn.Linear))
