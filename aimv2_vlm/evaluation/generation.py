"""Greedy answers to questions about pictures: batched, every picture encoded once, equal to one-at-a-time answers.

Works with whatever plain `AutoModelForImageTextToText` + `AutoProcessor` open. Llava and LlavaNext get their picture
features once per picture (handed to `generate` as `mm_encoder_outputs`); other classes get pixels with every question.
A question that cannot be answered yields a `GenerationError`, never an empty string.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from aimv2_vlm.config import UserError
from aimv2_vlm.data.tiling import Tiling, prepare_picture
from aimv2_vlm.data.transforms import decode_image, to_rgb

FEATURE_SHARING = ("llava", "llava_next")  # config.model_type of the classes that take `mm_encoder_outputs`


class GenerationError(Exception):
    """Why one question has no answer. Returned in the answer's place, so that it is counted and named."""


@dataclass(frozen=True)
class Picture:
    """One of the user's pictures. `key` identifies it: questions with equal keys share one encoding."""

    key: Hashable
    open: Callable[[], Image.Image]


@dataclass(frozen=True)
class Question:
    """What one user turn holds: pictures first, then the text."""

    prompt: str
    pictures: tuple[Picture, ...] = ()


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

    Raises UserError where transformers would only warn: no processor, no chat template, missing weights.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

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
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be loaded as an assistant: {_first_line(error)}") from error
    lost = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lost:
        raise UserError(f"{path}: {len(lost)} weights are missing or of another shape: {', '.join(lost[:5])}")
    return model.to(device).eval(), processor


def tiling_of(model: Any) -> str:
    """How a checkpoint cuts pictures: "1x1" for one view, "2x2" (rows x columns) for tiles, "1x2+2x1" for a choice."""
    pinpoints = getattr(model.config, "image_grid_pinpoints", None)
    if not pinpoints:
        return "1x1"
    tile = model.config.vision_config.image_size
    return "+".join(f"{height // tile}x{width // tile}" for height, width in pinpoints)


def set_tiling(model: Any, processor: Any, tiling: str) -> None:
    """Evaluate a LlavaNext checkpoint at another grid than the one it was tuned with, e.g. "3x3". Raises UserError."""
    if tiling == tiling_of(model):
        return
    if model.config.model_type != "llava_next":
        raise UserError(f"tiling: {tiling} needs a LlavaNext checkpoint, this one sees pictures as {tiling_of(model)}")
    vision = model.config.vision_config
    other = Tiling.parse(tiling, tile_size=vision.image_size, patch_size=vision.patch_size)
    if other.single:
        raise UserError("tiling: 1x1 needs a Llava checkpoint; this one is LlavaNext and adds an overview to its tiles")
    model.config.image_grid_pinpoints = other.pinpoints
    processor.image_processor.image_grid_pinpoints = other.pinpoints


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------- generation


class Generator:
    """Answers questions with one model. Greedy; answers do not depend on the batch (up to rounding).

    `source_size` reduces every picture first (`prepare_for`), `tiling` overrides the checkpoint's grid.
    Raises UserError at once where a picture alone fills the decoder's positions.
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
    ) -> None:
        if batch_size < 1 or max_new_tokens < 1:
            raise UserError(f"batch_size ({batch_size}) and max_new_tokens ({max_new_tokens}) must be at least 1")
        if tiling is not None:
            set_tiling(model, processor, tiling)
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.batch_size, self.max_new_tokens, self.source_size = batch_size, max_new_tokens, source_size
        sharing = model.config.model_type in FEATURE_SHARING
        self.share_features = sharing if share_features is None else share_features and sharing
        stops = model.generation_config.eos_token_id
        stops = self.tokenizer.eos_token_id if stops is None else stops
        self.stop_ids = sorted({stops} if isinstance(stops, int) else set(stops or ()))
        pad = self.tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else (self.stop_ids[0] if self.stop_ids else 0)
        self.num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.image_id = getattr(model.config, "image_token_id", None)
        self.tiles_per_picture = 1
        self.tokens_seen: dict[Hashable, int] = {}  # picture key -> placeholders it took
        if self.share_features:
            self._check_picture_fits()

    @property
    def tiling(self) -> str:
        return tiling_of(self.model)

    def _check_picture_fits(self) -> None:
        """One grey square goes through the encoder: wrong processors and over-long pictures fail at load."""
        pixels = self._pixels([prepare_for(self.processor, Image.new("RGB", (64, 64), "grey"), self.source_size)])
        self.tiles_per_picture = pixels["pixel_values"].shape[1] if pixels["pixel_values"].dim() == 5 else 1
        (features,) = self._features(pixels)
        if self.num_positions is not None and len(features) >= self.num_positions:
            raise UserError(
                f"tiling {self.tiling}: one picture takes {len(features)} tokens, the decoder has "
                f"{self.num_positions} positions; use fewer tiles or a decoder with a longer context"
            )

    # ------------------------------------------------------------------ pictures

    def _pixels(self, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
        inputs = self.processor(images=pictures, return_tensors="pt")
        return {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}

    @torch.inference_mode()
    def _features(self, pixels: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Projected features of each picture, (tokens, width of the decoder)."""
        values = pixels["pixel_values"].to(self.model.device, self.model.dtype)
        output = self.model.model.get_image_features(**{**pixels, "pixel_values": values}, return_dict=True)
        return list(output.pooler_output)

    def _open(self, picture: Picture) -> Image.Image | GenerationError:
        try:
            return prepare_for(self.processor, open_picture(picture.open()), self.source_size)
        except Exception as error:  # whatever a picture does, it is this picture's error
            return GenerationError(f"picture {picture.key}: {_first_line(error)}")

    def _encode(self, pictures: dict[Hashable, Picture]) -> dict[Hashable, torch.Tensor | GenerationError]:
        """Features of every picture; where a group fails, each member is tried alone so that only the guilty fails."""
        encoded: dict[Hashable, torch.Tensor | GenerationError] = {}
        for group in _chunks(list(pictures.values()), max(1, self.batch_size // self.tiles_per_picture)):
            opened = {picture.key: self._open(picture) for picture in group}
            good = {key: image for key, image in opened.items() if not isinstance(image, GenerationError)}
            encoded.update((key, error) for key, error in opened.items() if isinstance(error, GenerationError))
            parts = _isolating(partial(self._encode_group, good), list(good))
            for key, features in parts.items():
                bad = isinstance(features, GenerationError)
                encoded[key] = GenerationError(f"picture {key}: {features}") if bad else features
        self.tokens_seen.update((key, len(part)) for key, part in encoded.items() if isinstance(part, torch.Tensor))
        return encoded

    def _encode_group(self, images: dict[Hashable, Image.Image], keys: list[Hashable]) -> list[torch.Tensor]:
        return self._features(self._pixels([images[key] for key in keys]))

    # ------------------------------------------------------------------ prompts

    def prompt_text(self, question: Question) -> str:
        """The prompt as the checkpoint's template renders it, one image token a picture."""
        return self.processor.apply_chat_template(_messages(question), add_generation_prompt=True, tokenize=False)

    def _prompt_ids(self, question: Question) -> list[int]:
        """What stock inference tokenises; control tokens typed in the question's text stay text."""
        text = self.prompt_text(question)
        bos = self.tokenizer.bos_token
        has_bos = bool(bos) and text.startswith(bos)
        if not any(token in question.prompt for token in self.tokenizer.get_added_vocab()):
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
    ) -> list[str | GenerationError]:
        """One answer a question, in the given order; a plain tuple is ([PIL pictures], prompt).

        `on_progress` is called with the number of questions just finished.
        """
        asked = [_as_question(question) for question in questions]
        answers: list[str | GenerationError] = [GenerationError("not reached")] * len(asked)
        max_new_tokens = max_new_tokens or self.max_new_tokens
        first_seen: dict[tuple, int] = {}
        for question in asked:
            first_seen.setdefault(tuple(picture.key for picture in question.pictures), len(first_seen))
        by_picture = sorted(range(len(asked)), key=lambda i: first_seen[tuple(p.key for p in asked[i].pictures)])
        # A window is large enough to sort by length in, and small enough to hold the features of its pictures.
        windows = list(_chunks(by_picture, 8 * self.batch_size))
        encoded: dict[Hashable, torch.Tensor | GenerationError] = {}
        for window in windows:
            wanted = {picture.key: picture for i in window for picture in asked[i].pictures}
            if self.share_features:
                encoded = {key: part for key, part in encoded.items() if key in wanted}
                encoded |= self._encode({key: picture for key, picture in wanted.items() if key not in encoded})
                finished = self._answer_shared({i: asked[i] for i in window}, encoded, max_new_tokens, on_progress)
            else:
                finished = self._answer_plain({i: asked[i] for i in window}, max_new_tokens, on_progress)
            for i, text in finished.items():
                answers[i] = text
        return answers

    def _answer_shared(
        self,
        asked: dict[int, Question],
        encoded: dict[Hashable, torch.Tensor | GenerationError],
        max_new_tokens: int,
        on_progress: Callable[[int], None] | None,
    ) -> dict[int, str | GenerationError]:
        answers: dict[int, str | GenerationError] = {}
        features: dict[int, list[torch.Tensor]] = {}
        ids: dict[int, list[int]] = {}
        for i, question in asked.items():
            parts = [encoded[picture.key] for picture in question.pictures]
            bad = next((part for part in parts if isinstance(part, GenerationError)), None)
            try:
                if bad is not None:
                    raise bad
                features[i], ids[i] = parts, self._expanded_ids(question, parts)
            except Exception as error:
                answers[i] = _as_generation_error(error)
        if on_progress and answers:
            on_progress(len(answers))
        by_length = sorted(ids, key=lambda i: -len(ids[i]))  # longest first: running out of memory shows at once
        for batch in _chunks(by_length, self.batch_size):
            answers |= _isolating(lambda batch: self._generate_ids(batch, ids, features, max_new_tokens), batch)
            if on_progress:
                on_progress(len(batch))
        return answers

    @torch.inference_mode()
    def _generate_ids(
        self,
        batch: list[int],
        ids: dict[int, list[int]],
        features: dict[int, list[torch.Tensor]],
        max_new_tokens: int,
        **more: Any,
    ) -> list[str]:
        """Answers to questions by number; `more` goes to the model's `generate` (streamer, stopping_criteria)."""
        length = max(len(ids[i]) for i in batch)
        input_ids_BS = torch.full((len(batch), length), self.pad_id)
        can_attend_BS = torch.zeros_like(input_ids_BS)
        for row, i in enumerate(batch):  # padding on the left, so that all answers start at the same column
            input_ids_BS[row, length - len(ids[i]) :] = torch.tensor(ids[i])
            can_attend_BS[row, length - len(ids[i]) :] = 1
        parts = [part for i in batch for part in features[i]]
        inputs = {"input_ids": input_ids_BS, "attention_mask": can_attend_BS}
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if parts:
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=parts)}
        return self._decode(self._generate(inputs, max_new_tokens, **more)[:, length:])

    def _answer_plain(
        self, asked: dict[int, Question], max_new_tokens: int, on_progress: Callable[[int], None] | None
    ) -> dict[int, str | GenerationError]:
        """Any other class: pictures are prepared and encoded with every question."""
        answers: dict[int, str | GenerationError] = {}
        opened: dict[int, list[Image.Image]] = {}
        for i, question in asked.items():
            images = [self._open(picture) for picture in question.pictures]
            bad = next((image for image in images if isinstance(image, GenerationError)), None)
            if bad is None:
                opened[i] = images
            else:
                answers[i] = bad
        if on_progress and answers:
            on_progress(len(answers))
        by_length = sorted(opened, key=lambda i: (len(opened[i]), -len(asked[i].prompt)))
        for batch in _same_number(by_length, opened, self.batch_size):
            answers |= _isolating(lambda batch: self._generate_plain(batch, asked, opened, max_new_tokens), batch)
            if on_progress:
                on_progress(len(batch))
        return answers

    @torch.inference_mode()
    def _generate_plain(
        self, batch: list[int], asked: dict[int, Question], opened: dict[int, list[Image.Image]], max_new_tokens: int
    ) -> list[str]:
        texts = [self.prompt_text(asked[i]) for i in batch]
        bos = self.tokenizer.bos_token
        inputs = self.processor(
            text=texts,
            images=[opened[i] for i in batch] if opened[batch[0]] else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=not (bool(bos) and texts[0].startswith(bos)),
        ).to(self.model.device, self.model.dtype)
        length = inputs["input_ids"].shape[1]
        if self.num_positions is not None and length >= self.num_positions:
            raise GenerationError(f"prompt of {length} tokens fills the decoder's {self.num_positions} positions")
        if self.image_id is not None:
            for row, i in enumerate(batch):
                if len(asked[i].pictures) == 1:
                    num = int((inputs["input_ids"][row] == self.image_id).sum())
                    self.tokens_seen[asked[i].pictures[0].key] = num
        return self._decode(self._generate(dict(inputs), max_new_tokens)[:, length:])

    def _generate(self, inputs: dict[str, Any], max_new_tokens: int, **more: Any) -> torch.Tensor:
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

    def _decode(self, new_ids_BT: torch.Tensor) -> list[str]:
        texts = []
        for row in new_ids_BT.tolist():
            end = next((column for column, token in enumerate(row) if token in self.stop_ids), len(row))
            texts.append(self.tokenizer.decode(row[:end], skip_special_tokens=True).strip())
        return texts


def _as_question(question: Question | tuple) -> Question:
    if isinstance(question, Question):
        return question
    images, prompt = question
    return Question(prompt, tuple(Picture(id(image), lambda image=image: image) for image in images))


def _messages(question: Question) -> list[dict]:
    content = [{"type": "image"} for _ in question.pictures] + [{"type": "text", "text": question.prompt}]
    return [{"role": "user", "content": content}]


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


def _chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _same_number(order: list[int], opened: dict[int, list], size: int) -> Iterator[list[int]]:
    """Batches whose questions all have equally many pictures (processors refuse a mixture)."""
    for count in sorted({len(opened[i]) for i in order}):
        yield from _chunks([i for i in order if len(opened[i]) == count], size)
