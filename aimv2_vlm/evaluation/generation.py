"""Greedy answers to questions about pictures: batched, every picture encoded once, equal to one-at-a-time answers.

Works with whatever plain `AutoModelForImageTextToText` + `AutoProcessor` open. Llava, LlavaNext and Cohere2Vision encode a picture once, and
what the questions of a picture have in common (template, picture) goes through the decoder once: its questions then stand
beside each other in one row of the decoder, as branches that see the common part and themselves. Whether a decoder takes such
rows is tried before they are used; one that does not gets the picture's features through stock `generate`. Other classes get
pixels with every question. A question that cannot be answered yields a `GenerationError`, never an empty string.
"""

from __future__ import annotations

import contextlib
import os.path
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.cache_utils import Cache, DynamicLayer

from aimv2_vlm.config import UserError
from aimv2_vlm.data.tiling import Tiling, prepare_picture
from aimv2_vlm.data.transforms import decode_image, to_rgb

UNSHUFFLING = "cohere2_vision"
MARKS = ("boi_token", "eoi_token", "img_line_break_token")  # what its processors, but for ours, write around pictures and behind tiles
FEATURE_SHARING = ("llava", "llava_next", UNSHUFFLING)  # config.model_type of the classes that take `mm_encoder_outputs`
# At most so many tokens of a batch's common parts go through the decoder at once: what keeps a GPU busy, what stays in a CPU's caches.
PREFILL_TOKENS = {"cuda": 16_384, "cpu": 1024}
ENCODER_TOKENS = {"cuda": 1 << 30, "cpu": 2048}  # the same of pictures' features and the encoder; one picture at least
BRANCH_TOKENS = 256  # a row's branches may be as long together as its common part, or this
SHARED_TOKENS = 64  # rows that begin with as many equal tokens (in-context examples) compute these once
# Settings of a generation config that do not change greedy answers; with any other, stock `generate` answers.
HARMLESS_SETTINGS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "do_sample", "num_beams",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "early_stopping", "length_penalty", "use_cache",
    "cache_implementation", "num_return_sequences", "transformers_version", "return_dict_in_generate", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "_from_model_config",
}  # fmt: skip


class GenerationError(Exception):
    """Why one question has no answer. Returned in the answer's place, so that it is counted and named."""


@dataclass(frozen=True)
class Picture:
    """One of the user's pictures. `key` identifies it: questions with equal keys share one encoding."""

    key: Hashable
    open: Callable[[], Image.Image]


@dataclass(frozen=True)
class Question:
    """What one user turn holds: pictures first, then the text. `before`: (role, text) of each earlier turn of the
    conversation; then the pictures stand in front of the first of them, or `places` says how many stand in each turn."""

    prompt: str
    pictures: tuple[Picture, ...] = ()
    before: tuple[tuple[str, str], ...] = ()
    places: tuple[int, ...] = ()


class Answer(str):
    """The text of an answer. `token_ids`: those before the stop token; `cut`: it ended at the limit and not at a stop token."""

    token_ids: tuple[int, ...]
    cut: bool

    def __new__(cls, text: str, token_ids: Sequence[int] = (), cut: bool = False) -> Answer:
        answer = super().__new__(cls, text)
        answer.token_ids, answer.cut = tuple(token_ids), cut
        return answer


@dataclass(frozen=True)
class Check:
    """One answer beside the one that plain transformers gives to the question alone.

    `gap`: how far the first token that differs lies below the best one, in logits of the single answer. A difference is a `tie`
    where that is within the rounding of the precision, else a `flip`.
    """

    ours: str
    stock: str
    gap: float = 0.0
    tie: bool = False
    flip: bool = False


# ---------------------------------------------------------------------------------------------- pictures


def open_picture(source: bytes | str | Path | Image.Image) -> Image.Image:
    """An upright RGB picture from bytes, a path or an open image; the first frame of an animation.

    Limits are checked from the header. Raises BadImage for a broken, truncated or oversized picture, even where
    lmms-eval has switched Pillow to accept truncated files.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    pixels_CHW = decode_image(source if isinstance(source, bytes) else Path(source).read_bytes())
    return Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy())


def prepare_for(processor: Any, picture: Image.Image, source_size: int | None = None) -> Image.Image:
    """What `processor` must be given for this RGB picture so that the model sees the pixels it was tuned with.

    Tuning's own `prepare_picture`: padding to a square, then reduction to `source_size`. A processor from elsewhere
    knows no `pad_square`; its pictures are reduced only.
    """
    from transformers import LlavaImageProcessor

    images = processor.image_processor
    one_view = isinstance(images, LlavaImageProcessor) and images.do_pad and images.size.height
    if one_view or hasattr(images, "pad_square"):
        tiling = Tiling.from_processor(processor, source_size)
    else:
        tiling = Tiling(pad_square=False, source_size=source_size)
    if tiling.processed_size(picture.height, picture.width) == (picture.height, picture.width):
        return picture
    pixels_CHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    prepared_CHW = prepare_picture(pixels_CHW, tiling, images.image_mean)
    return Image.fromarray(prepared_CHW.permute(1, 2, 0).numpy())


# ---------------------------------------------------------------------------------------------- checkpoints


def load_assistant(path: str | Path, precision: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Model and processor of any checkpoint that the plain transformers classes open, in evaluation mode.

    An adapter that a run left apart (its folder in the checkpoint's) is put on and merged.
    Raises UserError where transformers would only warn: no processor, no chat template, missing weights.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from aimv2_vlm.models import adapters
    from aimv2_vlm.train.precision import choose_precision

    path = str(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if choose_precision(precision, device.partition(":")[0]) == "bf16" else torch.float32
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not (Path(path).expanduser() / "config.json").is_file():
        raise UserError(f"{path}: no checkpoint here (config.json is missing); give the folder that training wrote")
    path = str(Path(path).expanduser()) if looks_local else path
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: the checkpoint has no usable processor: {_first_line(error)}") from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UserError(f"{path}: its processor is a {type(processor).__name__}, not one for pictures and text")
    if not processor.chat_template:
        raise UserError(f"{path}: the processor has no chat template, so prompts are unknown; add chat_template.jinja")
    adapter = Path(path) / adapters.ADAPTER
    apart = adapter.is_dir()
    try:
        # Whether an adapter fits is told by its base's exact weights.
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32 if apart else dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be loaded as an assistant: {_first_line(error)}") from error
    lost = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lost:
        raise UserError(f"{path}: {len(lost)} weights are missing or of another shape: {', '.join(lost[:5])}")
    if apart:
        adapters.load_adapter(model, adapter)
        adapters.merge(model)
        for parameter in model.parameters():  # not the buffers, which stay fp32 when transformers loads
            parameter.data = parameter.data.to(dtype)
    return model.to(device).eval(), processor


def tiling_of(model: Any, processor: Any) -> str:
    """How a checkpoint cuts pictures: "1x1" for one view, "2x2" (rows x columns) for tiles, "1x2+2x1" for a choice, "up to 4 tiles,
    unshuffled by 2" where 2 x 2 patches become one token."""
    if model.config.model_type == UNSHUFFLING:
        tiling = Tiling.from_processor(processor)
        return f"{'one view' if tiling.single else f'up to {tiling.num_views - 1} tiles'}, unshuffled by {tiling.unshuffle}"
    pinpoints = getattr(model.config, "image_grid_pinpoints", None)
    if not pinpoints:
        return "1x1"
    tile = model.config.vision_config.image_size
    return "+".join(f"{height // tile}x{width // tile}" for height, width in pinpoints)


def set_tiling(model: Any, processor: Any, tiling: str) -> None:
    """Evaluate a LlavaNext checkpoint at another grid than the one it was tuned with, e.g. "3x3". Raises UserError."""
    own = tiling_of(model, processor)
    if tiling == own:
        return
    if model.config.model_type != "llava_next":
        raise UserError(f"tiling: {tiling} needs a LlavaNext checkpoint, this one sees pictures as {own}")
    vision = model.config.vision_config
    other = Tiling.parse(tiling, tile_size=vision.image_size, patch_size=vision.patch_size)
    if other.single:
        raise UserError("tiling: 1x1 needs a Llava checkpoint; this one is LlavaNext and adds an overview to its tiles")
    model.config.image_grid_pinpoints = other.pinpoints
    processor.image_processor.image_grid_pinpoints = other.pinpoints


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------- rows and their cache


@dataclass(frozen=True)
class _Row:
    """One row of the decoder: the tokens that its questions share, and the rest of each question, by number."""

    prefix: list[int]
    features: list[torch.Tensor]  # of the pictures, which all lie in the prefix
    keys: tuple[Hashable, ...]  # of the same pictures
    branches: list[tuple[int, list[int]]]

    @property
    def width(self) -> int:
        return sum(len(ids) for _, ids in self.branches)

    def only(self, chosen: set[int]) -> _Row:
        return replace(self, branches=[branch for branch in self.branches if branch[0] in chosen])


class _RoomyLayer(DynamicLayer):
    """Keys and values in room set aside once: the stock layer copies all of them with every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def reserve(self, like_BHSD: torch.Tensor, num_rows: int, length: int) -> None:
        """Empty room for `num_rows`; the first `length` columns count as written."""
        _, heads, _, width = like_BHSD.shape
        # Zeros: what is masked must still be finite.
        self.room = [like_BHSD.new_zeros(num_rows, heads, self.capacity, width) for _ in range(2)]
        self.dtype, self.device, self.is_initialized = like_BHSD.dtype, like_BHSD.device, True
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (room[:, :, :length] for room in self.room)

    def write(self, rows: list[int], keys_BHSD: torch.Tensor, values_BHSD: torch.Tensor) -> None:
        index = torch.tensor(rows, device=keys_BHSD.device)
        for room, states in zip(self.room, (keys_BHSD, values_BHSD), strict=True):
            room[index, :, : states.shape[2]] = states

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.reserve(key_states, len(key_states), 0)
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        length = self.keys.shape[2]
        self.room = [room[indices] for room in self.room]
        self._show(length)


class _PrefixKnown(Exception):
    """The last layer has its keys and values: what it would still compute of a prefix, nobody reads."""


class _LastLayer(DynamicLayer):
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        super().update(key_states, value_states)
        raise _PrefixKnown


# ---------------------------------------------------------------------------------------------- generation


class Generator:
    """Answers questions with one model. Greedy; answers do not depend on the batch (up to rounding).

    `source_size` reduces every picture first (`prepare_for`), `tiling` overrides the checkpoint's grid, `num_workers` threads
    open and prepare the pictures of the next questions. `share_features=False` gives pixels with every question,
    `share_prefix=False` the whole prompt. Raises UserError at once where a picture alone fills the decoder's positions.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        batch_size: int = 16,
        max_new_tokens: int = 64,
        source_size: int | None = None,
        tiling: str | None = None,
        share_features: bool | None = None,
        share_prefix: bool | None = None,
        num_workers: int = 2,
    ) -> None:
        if batch_size < 1 or max_new_tokens < 1 or num_workers < 1:
            raise UserError(
                f"batch_size ({batch_size}), max_new_tokens ({max_new_tokens}) and num_workers ({num_workers}) must be at least 1"
            )
        if tiling is not None:
            set_tiling(model, processor, tiling)
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.batch_size, self.max_new_tokens, self.source_size, self.num_workers = batch_size, max_new_tokens, source_size, num_workers
        self.unshuffles = model.config.model_type == UNSHUFFLING
        sharing = model.config.model_type in FEATURE_SHARING and not any(getattr(processor, mark, "") for mark in MARKS)
        self.share_features = sharing if share_features is None else share_features and sharing
        if share_prefix is False or not self.share_features:
            self.shares_prefix = False
        stops = model.generation_config.eos_token_id
        stops = self.tokenizer.eos_token_id if stops is None else stops
        self.stop_ids = sorted({stops} if isinstance(stops, int) else set(stops or ()))
        pad = self.tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else (self.stop_ids[0] if self.stop_ids else 0)
        self.num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.image_id = getattr(model.config, "image_token_id", None)
        self.control_tokens = tuple(self.tokenizer.get_added_vocab())
        self.tiles_per_picture = self.patches_per_token = 1
        self.tokens_seen: dict[Hashable, int] = {}  # picture key -> placeholders it took
        self._examples: tuple[list[int], tuple, list] | None = None  # beginning of the last rows, its keys and values
        if self.share_features:
            self._check_picture_fits()

    @property
    def tiling(self) -> str:
        return tiling_of(self.model, self.processor)

    def _check_picture_fits(self) -> None:
        """One grey picture goes through the encoder: wrong processors and over-long pictures fail at load."""
        if self.unshuffles:  # as many tiles as one can have
            images = self.processor.image_processor
            self.patches_per_token = Tiling.from_processor(self.processor, self.source_size).unshuffle ** 2
            pixels = self._pixels([Image.new("RGB", (images.size["width"] * images.max_patches, images.size["height"]), "grey")])
            self.tiles_per_picture = len(pixels["pixel_values"])
        else:
            pixels = self._pixels([prepare_for(self.processor, Image.new("RGB", (64, 64), "grey"), self.source_size)])
            self.tiles_per_picture = pixels["pixel_values"].shape[1] if pixels["pixel_values"].dim() == 5 else 1
        (self._grey,) = self._features(pixels)
        if self.num_positions is not None and len(self._grey) >= self.num_positions:
            raise UserError(
                f"tiling {self.tiling}: one picture takes {len(self._grey)} tokens, the decoder has "
                f"{self.num_positions} positions; use fewer tiles or a decoder with a longer context"
            )

    @cached_property
    @torch.inference_mode()
    def shares_prefix(self) -> bool:
        """Whether rows with branches give this model's own logits: declared, then tried on a grey picture and two questions."""
        settings = self.model.generation_config.to_diff_dict()
        config = self.model.config.get_text_config()
        windowed = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        windowed = windowed or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))
        if settings.keys() - HARMLESS_SETTINGS or windowed or config._attn_implementation not in ("sdpa", "eager"):
            return False
        try:
            asked = [Question(prompt, (Picture("grey", lambda: Image.new("RGB", (64, 64), "grey")),)) for prompt in ("1 2 3", "3 2 1 3 2")]
            ids = {i: self._expanded_ids(question, [self._grey]) for i, question in enumerate(asked)}
            rows, alone = self._rows(dict(enumerate(asked)), ids, {0: [self._grey], 1: [self._grey]})
            if alone:
                return False
            branched = self._prefill(rows, 1)[0]
            single = [self.model(**self._inputs([i], ids, {i: [self._grey]}), logits_to_keep=1).logits[0, -1] for i in ids]
        except (GenerationError, TypeError, ValueError, AttributeError, IndexError, RuntimeError):
            return False
        order = [i for row in rows for i, _ in row.branches]
        single_NV = torch.stack([single[i] for i in order]).float()
        return bool((branched.float() - single_NV).abs().max() <= 30 * self._rounding * single_NV.abs().max())

    @property
    def _rounding(self) -> float:
        """What two orders of the same sums may differ by, relative to the largest logit."""
        return 1e-4 if self.model.dtype == torch.float32 else 2**-6

    # ------------------------------------------------------------------ pictures

    def _pixels(self, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
        # Cohere2Vision's processor takes no pictures without text.
        cut = self.processor.image_processor if self.unshuffles else self.processor
        inputs = cut(images=pictures, return_tensors="pt")
        return {name: inputs[name] for name in ("pixel_values", "image_sizes", "num_patches") if name in inputs}

    @torch.inference_mode()
    def _features(self, pixels: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Projected features of each picture, (tokens, width of the decoder)."""
        values = pixels["pixel_values"].to(self.model.device, self.model.dtype)
        if (num_views := pixels.get("num_patches")) is not None:
            projected_KND = self.model.model.get_image_features(values, return_dict=True).pooler_output
            return [part.flatten(0, 1) for part in projected_KND.split(num_views.tolist())]
        output = self.model.model.get_image_features(**{**pixels, "pixel_values": values}, return_dict=True)
        return list(output.pooler_output)

    def _open(self, picture: Picture) -> Image.Image | GenerationError:
        try:
            return prepare_for(self.processor, open_picture(picture.open()), self.source_size)
        except Exception as error:  # whatever a picture does, it is this picture's error
            return GenerationError(f"picture {picture.key}: {_first_line(error)}")

    def _prepare(self, picture: Picture) -> dict[str, torch.Tensor] | GenerationError:
        """What the encoder is given; without features to share, the picture that the processor is given."""
        opened = self._open(picture)
        if isinstance(opened, GenerationError) or not self.share_features:
            return opened
        try:
            return self._pixels([opened])
        except Exception as error:
            return GenerationError(f"picture {picture.key}: {_as_generation_error(error)}")

    def _encode(self, pictures: dict[Hashable, Picture]) -> dict[Hashable, torch.Tensor | GenerationError]:
        return self._encode_prepared({key: self._prepare(picture) for key, picture in pictures.items()})

    def _encode_prepared(self, prepared: dict[Hashable, dict | GenerationError]) -> dict[Hashable, torch.Tensor | GenerationError]:
        """Features of every picture; where a group fails, each member is tried alone so that only the guilty fails."""
        encoded = {key: part for key, part in prepared.items() if isinstance(part, GenerationError)}
        pictures = min(self.batch_size // self.tiles_per_picture, ENCODER_TOKENS.get(self.model.device.type, 1 << 30) // (len(self._grey) * self.patches_per_token))
        for group in _chunks([key for key in prepared if key not in encoded], max(1, pictures)):
            for key, features in _isolating(lambda keys: self._features(_stack([prepared[key] for key in keys])), group).items():
                bad = isinstance(features, GenerationError)
                encoded[key] = GenerationError(f"picture {key}: {features}") if bad else features
        self.tokens_seen.update((key, len(part)) for key, part in encoded.items() if isinstance(part, torch.Tensor))
        return encoded

    # ------------------------------------------------------------------ prompts

    def prompt_text(self, question: Question) -> str:
        """The prompt as the checkpoint's template renders it, one image token a picture."""
        return self.processor.apply_chat_template(_messages(question), add_generation_prompt=True, tokenize=False)

    def _has_control_tokens(self, question: Question) -> bool:
        texts = [question.prompt, *(text for _, text in question.before)]
        return any(token in text for text in texts for token in self.control_tokens)

    def _prompt_ids(self, question: Question) -> list[int]:
        """What stock inference tokenises; control tokens typed in the question's text stay text."""
        text = self.prompt_text(question)
        bos = self.tokenizer.bos_token
        has_bos = bool(bos) and text.startswith(bos)
        if not self._has_control_tokens(question):
            return self.tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        ids = self.tokenizer.apply_chat_template(
            _messages(question),
            chat_template=self.processor.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        needs_bos = not has_bos and self.tokenizer("", add_special_tokens=True)["input_ids"][:1] == [
            self.tokenizer.bos_token_id
        ]
        return [self.tokenizer.bos_token_id] * needs_bos + list(ids)

    def _expanded_ids(self, question: Question, features: list[torch.Tensor]) -> list[int]:
        """Prompt ids with every image token repeated once per feature. Raises GenerationError where it cannot fit."""
        ids, parts = [], iter(features)
        prompt_ids = self._prompt_ids(question)
        if prompt_ids.count(self.image_id) != len(features):
            raise GenerationError(
                f"the template made {prompt_ids.count(self.image_id)} places for {len(features)} pictures"
            )
        for token in prompt_ids:
            ids += [token] * len(next(parts)) if token == self.image_id else [token]
        if self.num_positions is not None and len(ids) >= self.num_positions:
            num_image = sum(map(len, features))
            raise GenerationError(
                f"prompt of {len(ids)} tokens ({num_image} of them picture) fills the decoder's "
                f"{self.num_positions} positions"
            )
        return ids

    # ------------------------------------------------------------------ answers

    def answer(
        self,
        questions: Sequence[Question | tuple],
        max_new_tokens: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Answer | GenerationError]:
        """One answer a question, in the given order; a plain tuple is ([PIL pictures], prompt).

        `on_progress` is called with the number of questions just finished.
        """
        asked = [_as_question(question) for question in questions]
        answers: list[Answer | GenerationError] = [GenerationError("not reached")] * len(asked)
        max_new_tokens = max_new_tokens or self.max_new_tokens
        windows = self._windows(asked)
        wanted = [{picture.key: picture for i in window for picture in asked[i].pictures} for window in windows]
        encoded: dict[Hashable, Any] = {}
        opening: dict[Hashable, Future] = {}
        with ThreadPoolExecutor(self.num_workers) as pool:
            for number, window in enumerate(windows):
                for pictures in wanted[number : number + 2]:  # the next window's while this one is answered
                    new = [key for key in pictures if key not in encoded and key not in opening]
                    opening |= {key: pool.submit(self._prepare, pictures[key]) for key in new}
                prepared = {key: opening.pop(key).result() for key in wanted[number] if key in opening}
                if self.share_features:
                    encoded |= self._encode_prepared(prepared)
                else:
                    encoded |= prepared
                finished = self._answer_window({i: asked[i] for i in window}, encoded, max_new_tokens, on_progress)
                for i, answer in finished.items():
                    answers[i] = answer
                later = wanted[number + 1] if number + 1 < len(wanted) else {}
                encoded = {key: part for key, part in encoded.items() if key in later}
        self._examples = None
        return answers

    def _windows(self, asked: list[Question]) -> list[list[int]]:
        """Large enough to sort by length in, small enough to hold their pictures; questions of a picture stay together."""
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i, question in enumerate(asked):
            groups[tuple(picture.key for picture in question.pictures)].append(i)
        windows: list[list[int]] = []
        pictures: set[Hashable] = set()
        for keys, members in groups.items():
            for part in _chunks(members, 64 * self.batch_size):
                pictures.update(keys)
                if not windows or len(windows[-1]) >= 8 * self.batch_size or len(pictures) > 2 * self.batch_size:
                    windows.append([])
                    pictures = set(keys)
                windows[-1] += part
        return windows

    def _answer_window(
        self, asked: dict[int, Question], encoded: dict[Hashable, Any], max_new_tokens: int, on_progress: Callable[[int], None] | None
    ) -> dict[int, Answer | GenerationError]:
        """Questions whose pictures lie in `encoded` (features, else opened pictures)."""
        answers: dict[int, Answer | GenerationError] = {}
        shown: dict[int, list] = {}
        ids: dict[int, list[int]] = {}
        for i, question in asked.items():
            parts = [encoded[picture.key] for picture in question.pictures]
            try:
                bad = next((part for part in parts if isinstance(part, GenerationError)), None)
                if bad is not None:
                    raise bad
                if self.share_features:
                    ids[i] = self._expanded_ids(question, parts)
                shown[i] = parts
            except Exception as error:
                answers[i] = _as_generation_error(error)
        if on_progress and answers:
            on_progress(len(answers))
        for batch, work in self._batches(asked, ids, shown, max_new_tokens):
            answers |= _isolating(work, batch)
            if on_progress:
                on_progress(len(batch))
        return answers

    def _batches(
        self, asked: dict[int, Question], ids: dict[int, list[int]], shown: dict[int, list], max_new_tokens: int
    ) -> Iterator[tuple[list[int], Callable[[list[int]], list[Answer]]]]:
        """Questions answered at once, and how. Longest first: running out of memory shows at once."""
        if not self.share_features:
            by_length = sorted(shown, key=lambda i: (len(shown[i]), -len(asked[i].prompt)))
            for batch in _same_number(by_length, shown, self.batch_size):
                yield batch, partial(self._generate_plain, asked=asked, opened=shown, max_new_tokens=max_new_tokens)
            return
        rows, alone = self._rows(asked, ids, shown) if self.shares_prefix else ([], list(ids))
        for batch in _row_batches(rows, self.batch_size):
            members = [i for row in batch for i, _ in row.branches]
            yield members, partial(self._answer_rows, rows=batch, max_new_tokens=max_new_tokens)
        for members in _chunks(sorted(alone, key=lambda i: -len(ids[i])), self.batch_size):
            yield members, partial(self._generate_ids, ids=ids, features=shown, max_new_tokens=max_new_tokens)

    # ------------------------------------------------------------------ rows with branches

    def _rows(
        self, asked: dict[int, Question], ids: dict[int, list[int]], features: dict[int, list[torch.Tensor]]
    ) -> tuple[list[_Row], list[int]]:
        """Rows of questions about the same pictures, and the questions that end in a picture (no row can hold these)."""
        groups: dict[tuple, list[int]] = defaultdict(list)
        alone = []
        for i in ids:
            if ids[i][-1] == self.image_id:
                alone.append(i)
            else:
                groups[tuple(picture.key for picture in asked[i].pictures)].append(i)
        rows = []
        for keys, members in groups.items():
            common = min(len(os.path.commonprefix([ids[i] for i in members])), *(len(ids[i]) - 1 for i in members))
            ends = {i: _end_of_pictures(ids[i], self.image_id) for i in members}
            together = len(members) > 1 and common >= max(ends.values())
            parts = [(common, members)] if together else [(ends[i], [i]) for i in members]
            for length, of_part in parts:
                branches, room = [], max(length, BRANCH_TOKENS)
                for i in sorted(of_part, key=lambda i: -len(ids[i])):
                    if branches and sum(len(rest) for _, rest in branches) + len(ids[i]) - length > room:
                        rows.append(_Row(ids[i][:length], features[i], keys, branches))
                        branches = []
                    branches.append((i, ids[i][length:]))
                rows.append(_Row(ids[branches[0][0]][:length], features[branches[0][0]], keys, branches))
        return sorted(rows, key=lambda row: (-len(row.prefix), -row.width)), alone

    def _embed(self, ids: list[int], features: list[torch.Tensor]) -> torch.Tensor:
        """Inputs of the decoder for one prompt or part of one, (S, D)."""
        ids_S = torch.tensor(ids, device=self.model.device)
        embedded_SD = self.model.get_input_embeddings()(ids_S)
        if features:
            embedded_SD[ids_S == self.image_id] = torch.cat(features).to(embedded_SD)
        return embedded_SD

    def _decoder(self, embedded_BSD: torch.Tensor, cache: Cache, **more: Any) -> torch.Tensor:
        return self.model.model.language_model(inputs_embeds=embedded_BSD, past_key_values=cache, use_cache=True, **more).last_hidden_state

    def _logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """(N, V). On a CPU a plain head is multiplied from the left: a few rows take 0.4 of the time that `nn.Linear` needs for them."""
        head = self.model.lm_head
        if hidden_ND.device.type == "cpu" and type(head) is torch.nn.Linear and head.bias is None and len(hidden_ND) > 2:
            return (head.weight @ hidden_ND.T).T
        return head(hidden_ND)

    def _mask(self, can_attend_BQK: torch.Tensor) -> torch.Tensor:
        """(B, 1, Q, K) as the attention implementation wants it."""
        can_attend = can_attend_BQK[:, None]
        if self.model.config.get_text_config()._attn_implementation == "sdpa":
            return can_attend
        dtype = self.model.dtype
        return torch.zeros_like(can_attend, dtype=dtype).masked_fill_(~can_attend, torch.finfo(dtype).min)

    def _common_examples(self, rows: list[_Row]) -> tuple[int, list]:
        """What all rows begin with, computed once: its length, and (keys, values) of every layer; 0 where it is too short."""
        prefix, keys = rows[0].prefix, rows[0].keys
        if self._examples is not None:
            ids, shown, states = self._examples
            if all(row.prefix[: len(ids)] == ids and row.keys[: len(shown)] == shown for row in rows):
                return len(ids), states
        length, end, shown = len(os.path.commonprefix([row.prefix for row in rows])), 0, 0
        for key, part in zip(keys, rows[0].features, strict=True):
            start = prefix.index(self.image_id, end)
            if start >= length or any(row.keys[shown : shown + 1] != (key,) for row in rows):
                length = min(length, start)
                break
            end, shown = start + len(part), shown + 1
        if len(rows) < 2 or length < SHARED_TOKENS:
            return 0, []
        states = self._states_after([], self._embed(prefix[:length], rows[0].features[:shown])[None])
        self._examples = (prefix[:length], keys[:shown], states)
        return length, states

    def _states_after(self, states: list[tuple[torch.Tensor, torch.Tensor]], embedded_BSD: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) of every layer after these inputs; `states` (one row) are those of what stands before them."""
        num_layers = self.model.config.get_text_config().num_hidden_layers
        layers: list[DynamicLayer] = [*(DynamicLayer() for _ in range(num_layers - 1)), _LastLayer()]
        for layer, before in zip(layers, states, strict=False):
            DynamicLayer.update(layer, *(part.expand(len(embedded_BSD), -1, -1, -1) for part in before))
        if embedded_BSD.shape[1]:
            with contextlib.suppress(_PrefixKnown):
                self._decoder(embedded_BSD, Cache(layers=layers))
        return [(layer.keys, layer.values) for layer in layers]

    def _prefix_cache(self, rows: list[_Row], room: int) -> Cache:
        """Keys and values of all prefixes, each from column 0 on, with `room` more columns behind the longest."""
        longest = max(len(row.prefix) for row in rows)
        config = self.model.config.get_text_config()
        layers = [_RoomyLayer(longest + room) for _ in range(config.num_hidden_layers)]
        common, states = self._common_examples(rows)
        device = self.model.device.type
        by_length: dict[int, list[int]] = defaultdict(list)
        for r, row in enumerate(rows):
            by_length[len(row.prefix)].append(r)
        for length, members in by_length.items():
            for chunk in _chunks(members, max(1, PREFILL_TOKENS.get(device, 16_384) // max(1, length))) if length else ():
                embedded = [self._embed(rows[r].prefix, rows[r].features)[common:] for r in chunk]
                for layer, (keys, values) in zip(layers, self._states_after(states, torch.stack(embedded)), strict=True):
                    if not layer.is_initialized:
                        layer.reserve(keys, len(rows), longest)
                    layer.write(chunk, keys, values)
        return Cache(layers=layers)

    def _prefill(self, rows: list[_Row], max_new_tokens: int) -> tuple[torch.Tensor, Cache, torch.Tensor]:
        """Logits after each question (branches in the order of the rows), the cache, and what each branch may attend.

        That is (rows, branches + 1, columns), where the last branch of a row stands for an empty place.
        """
        device = self.model.device
        longest, width = max(len(row.prefix) for row in rows), max(row.width for row in rows)
        most = max(len(row.branches) for row in rows)
        capacity = longest + width + most * max_new_tokens
        cache = self._prefix_cache(rows, capacity - longest)
        ids, branch_of = torch.full((len(rows), width), self.pad_id), torch.full((len(rows), width), most)
        positions, ends = torch.zeros_like(ids), []
        sees = torch.zeros(len(rows), most + 1, capacity, dtype=torch.bool)
        for r, row in enumerate(rows):
            sees[r, :, : len(row.prefix)] = True
            start = 0
            for j, (_, rest) in enumerate(row.branches):
                columns = slice(start, start + len(rest))
                ids[r, columns], branch_of[r, columns] = torch.tensor(rest), j
                positions[r, columns] = torch.arange(len(row.prefix), len(row.prefix) + len(rest))
                sees[r, j, longest + start : longest + start + len(rest)] = True
                start += len(rest)
                ends.append((r, start - 1))
        ids, branch_of, sees = ids.to(device), branch_of.to(device), sees.to(device)
        own_BQK = (branch_of[:, :, None] == branch_of[:, None, :]).tril()
        rows_index = torch.arange(len(rows), device=device)[:, None]
        can_attend_BQK = torch.cat([sees[rows_index, branch_of, :longest], own_BQK], dim=-1)
        hidden_BSD = self._decoder(
            self.model.get_input_embeddings()(ids), cache, attention_mask=self._mask(can_attend_BQK), position_ids=positions.to(device)
        )
        at = torch.tensor(ends, device=device)
        return self._logits(hidden_BSD[at[:, 0], at[:, 1]]), cache, sees

    @torch.inference_mode()
    def _answer_rows(self, members: list[int], rows: list[_Row], max_new_tokens: int) -> list[Answer]:
        """Answers of `members`, which stand in `rows`. Finished branches and rows leave."""
        chosen = set(members)
        rows = [row for row in (row.only(chosen) for row in rows) if row.branches]
        device, most = self.model.device, max(len(row.branches) for row in rows)
        logits_NV, cache, sees = self._prefill(rows, max_new_tokens)
        new = {i: [] for i in members}
        stopped = set()
        # (row, branch, question, position of the next token)
        active = [(r, j, i, len(row.prefix) + len(rest)) for r, row in enumerate(rows) for j, (i, rest) in enumerate(row.branches)]
        tokens = logits_NV.argmax(-1).tolist()
        column, changed = sees.shape[2] - most * max_new_tokens, True
        while True:
            for (_, _, i, _), token in zip(active, tokens, strict=True):
                (stopped.add(i) if token in self.stop_ids else new[i].append(token))
            going = [place for place in active if place[2] not in stopped and len(new[place[2]]) < max_new_tokens]
            changed |= len(going) < len(active)
            active = going
            if not active:
                break
            if changed:
                left = sorted({r for r, *_ in active})
                if 2 * len(left) <= len(sees):  # a row costs more than moving the others together, once they are few
                    index = torch.tensor(left, device=device)
                    cache.batch_select_indices(index)
                    sees = sees[index]
                    active = [(left.index(r), *rest) for r, *rest in active]
                places: list[list[tuple]] = [[] for _ in range(len(sees))]
                for place in active:
                    places[place[0]].append(place)
                width = max(map(len, places))
                branch_of = torch.tensor([[p[1] for p in row] + [most] * (width - len(row)) for row in places], device=device)
                positions = torch.tensor([[p[3] for p in row] + [0] * (width - len(row)) for row in places], device=device)
                rows_index, slots = torch.arange(len(sees), device=device)[:, None], torch.arange(width, device=device)
                flat = torch.tensor([r * width + s for r, row in enumerate(places) for s in range(len(row))], device=device)
                active = [place for row in places for place in row]
            ids = torch.full((len(sees) * width,), self.pad_id, device=device)
            ids[flat] = torch.tensor([new[i][-1] for _, _, i, _ in active], device=device)
            sees[rows_index, branch_of, column + slots] = True
            can_attend_BQK = sees[rows_index, branch_of, : column + width]
            hidden_BQD = self._decoder(
                self.model.get_input_embeddings()(ids.view(len(sees), width)), cache, attention_mask=self._mask(can_attend_BQK),
                position_ids=positions,
            )  # fmt: skip
            tokens = self._logits(hidden_BQD.flatten(0, 1)[flat]).argmax(-1).tolist()
            active = [(r, j, i, position + 1) for r, j, i, position in active]
            positions, column, changed = positions + 1, column + width, False
        return [self._answer_of(new[i], i not in stopped) for i in members]

    # ------------------------------------------------------------------ stock generate

    def _inputs(self, batch: list[int], ids: dict[int, list[int]], features: dict[int, list[torch.Tensor]]) -> dict[str, Any]:
        """What stock `forward` and `generate` of a Llava are given: padded on the left, so that all answers start at the same column."""
        length = max(len(ids[i]) for i in batch)
        input_ids_BS = torch.full((len(batch), length), self.pad_id)
        can_attend_BS = torch.zeros_like(input_ids_BS)
        for row, i in enumerate(batch):
            input_ids_BS[row, length - len(ids[i]) :] = torch.tensor(ids[i])
            can_attend_BS[row, length - len(ids[i]) :] = 1
        parts = [part for i in batch for part in features[i]]
        inputs = {"input_ids": input_ids_BS, "attention_mask": can_attend_BS}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if parts:
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            together = torch.cat(parts)[None] if self.unshuffles else parts
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=together)}
        return inputs

    @torch.inference_mode()
    def _generate_ids(
        self,
        batch: list[int],
        ids: dict[int, list[int]],
        features: dict[int, list[torch.Tensor]],
        max_new_tokens: int,
        **more: Any,
    ) -> list[Answer]:
        """Answers to questions by number; `more` goes to the model's `generate` (streamer, stopping_criteria)."""
        inputs = self._inputs(batch, ids, features)
        return self._decode(self._generate(inputs, max_new_tokens, **more)[:, inputs["input_ids"].shape[1] :], max_new_tokens)

    @torch.inference_mode()
    def _generate_plain(
        self, batch: list[int], asked: dict[int, Question], opened: dict[int, list[Image.Image]], max_new_tokens: int
    ) -> list[Answer]:
        """Any class, as its model card says: the processor makes the inputs, pictures are encoded with every question."""
        inputs = self._plain_inputs([asked[i] for i in batch], [opened[i] for i in batch])
        length = inputs["input_ids"].shape[1]
        if self.num_positions is not None and length >= self.num_positions:
            raise GenerationError(f"prompt of {length} tokens fills the decoder's {self.num_positions} positions")
        if self.image_id is not None:
            for row, i in enumerate(batch):
                if len(asked[i].pictures) == 1:
                    num = int((inputs["input_ids"][row] == self.image_id).sum())
                    self.tokens_seen[asked[i].pictures[0].key] = num
        return self._decode(self._generate(inputs, max_new_tokens)[:, length:], max_new_tokens)

    def _plain_inputs(self, questions: list[Question], opened: list[list[Image.Image]]) -> dict[str, Any]:
        texts = [self.prompt_text(question) for question in questions]
        bos = self.tokenizer.bos_token
        inputs = self.processor(
            text=texts,
            images=opened if opened[0] else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=not (bool(bos) and texts[0].startswith(bos)),
        )
        return dict(inputs.to(self.model.device, self.model.dtype))

    def _generate(self, inputs: dict[str, Any], max_new_tokens: int, **more: Any) -> Any:
        # Sampling settings that a checkpoint brings along would only raise warnings: greedy uses none of them.
        return self.model.generate(
            **inputs,
            **more,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self.stop_ids or None,
            pad_token_id=self.pad_id,
        )

    def _decode(self, new_ids_BT: torch.Tensor, max_new_tokens: int) -> list[Answer]:
        answers = []
        for row in new_ids_BT.tolist():
            end = next((column for column, token in enumerate(row) if token in self.stop_ids), None)
            answers.append(self._answer_of(row[:end], end is None and len(row) >= max_new_tokens))
        return answers

    def _answer_of(self, token_ids: list[int], cut: bool) -> Answer:
        return Answer(self.tokenizer.decode(token_ids, skip_special_tokens=True).strip(), token_ids, cut)

    # ------------------------------------------------------------------ check

    def can_check(self, question: Question) -> bool:
        """Control tokens typed in a question stay text here and become tokens in plain transformers: nothing to compare."""
        return not self._has_control_tokens(question)

    @torch.inference_mode()
    def check(self, question: Question, answer: Answer, max_new_tokens: int | None = None) -> Check:
        """The same question asked alone, as plain transformers does: its own inputs, pixels and `generate`.

        Raises what transformers raises, and GenerationError where a picture does not open.
        """
        max_new_tokens = max_new_tokens or self.max_new_tokens
        opened = [self._open(picture) for picture in question.pictures]
        for part in opened:
            if isinstance(part, GenerationError):
                raise part
        inputs = self._plain_inputs([question], [opened])
        output = self._generate(inputs, max_new_tokens, return_dict_in_generate=True, output_logits=True)
        (stock,) = self._decode(output.sequences[:, inputs["input_ids"].shape[1] :], max_new_tokens)
        if stock.token_ids == answer.token_ids:
            return Check(str(answer), str(stock))
        at = len(os.path.commonprefix([stock.token_ids, answer.token_ids]))
        logits_V = output.logits[at][0].float()
        rivals = [answer.token_ids[at]] if at < len(answer.token_ids) else self.stop_ids
        gap = float(logits_V.max() - logits_V[rivals].max())
        tie = gap <= self._rounding * float(logits_V.abs().max())
        return Check(str(answer), str(stock), round(gap, 6), tie, not tie)


def _as_question(question: Question | tuple) -> Question:
    if isinstance(question, Question):
        return question
    images, prompt = question
    return Question(prompt, tuple(Picture(id(image), lambda image=image: image) for image in images))


def _messages(question: Question) -> list[dict]:
    turns = [*question.before, ("user", question.prompt)]
    places = question.places or (len(question.pictures), *[0] * (len(turns) - 1))
    if len(places) != len(turns) or sum(places) != len(question.pictures):
        raise GenerationError(f"places {places} do not fit {len(question.pictures)} pictures in {len(turns)} turns")
    return [
        {"role": role, "content": [{"type": "image"}] * num_pictures + [{"type": "text", "text": text}]}
        for (role, text), num_pictures in zip(turns, places, strict=True)
    ]


def _as_generation_error(error: Exception) -> GenerationError:
    if isinstance(error, GenerationError):
        return error
    return GenerationError(f"{type(error).__name__}: {_first_line(error)}")


def _isolating(work: Callable[[list], list], members: list) -> dict[Any, Any]:
    """`work` on all members at once; if that raises, on each alone, so that an exception stays with its cause."""
    if not members:
        return {}
    try:
        return dict(zip(members, work(members), strict=True))
    except Exception as error:
        if len(members) == 1:
            return {members[0]: _as_generation_error(error)}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the usual reason why a batch fails and its members do not
    return {member: part for member in members for part in _isolating(work, [member]).values()}


def _stack(pixels: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Inputs of several pictures as one; fewer tiles than the others' are filled up, the model leaves those out again."""
    if pixels[0]["pixel_values"].dim() == 5:
        most = max(part["pixel_values"].shape[1] for part in pixels)
        tiles = [torch.nn.functional.pad(part["pixel_values"], (0, 0) * 3 + (0, most - part["pixel_values"].shape[1])) for part in pixels]
        return {"pixel_values": torch.cat(tiles), "image_sizes": torch.cat([part["image_sizes"] for part in pixels])}
    return {name: torch.cat([part[name] for part in pixels]) for name in pixels[0]}


def _end_of_pictures(ids: list[int], image_id: int) -> int:
    """How many tokens reach to the end of the last picture."""
    return len(ids) - ids[::-1].index(image_id) if image_id in ids else 0


def _row_batches(rows: list[_Row], size: int) -> Iterator[list[_Row]]:
    """At most `size` rows and four times as many questions, but one row at least."""
    batch: list[_Row] = []
    for row in rows:
        num_questions = sum(len(other.branches) for other in batch) + len(row.branches)
        if batch and (len(batch) == size or num_questions > 4 * size):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _same_number(order: list[int], opened: dict[int, list], size: int) -> Iterator[list[int]]:
    """Batches whose questions all have equally many pictures (processors refuse a mixture)."""
    for count in sorted({len(opened[i]) for i in order}):
        yield from _chunks([i for i in order if len(opened[i]) == count], size)
