"""Instruction batches: rows with pictures as views or cached features, in micro-batches whose cut changes nothing.

The rows of a micro-batch are concatenated (`packing.py`), so no computation is spent on padding.

Shapes: B rows, S tokens of all of them together, K views of all pictures of a batch, N patches of a view, D width.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aimv2_vlm.config import UserError
from aimv2_vlm.data.chat import IGNORED, Assembled, ChatFormat, RowTooLong, TemplateError
from aimv2_vlm.data.conversations import Conversation, ConversationSet
from aimv2_vlm.data.interleaved import Document
from aimv2_vlm.data.packing import pack_rows
from aimv2_vlm.data.shards import too_many_bytes
from aimv2_vlm.data.tiling import Tiling, cut_views, only_normalizes, picture_views
from aimv2_vlm.data.transforms import MAX_BYTES, BadImage, decode_image, normalize, read_header

CACHE_VERSION = 3
KEPT_TOKENS = 4_000_000  # of rows that stay assembled in a process: 32 MB


@dataclass
class Row:
    """One conversation ready for a batch. A bad row: weight 0, one pad token, no picture, the reason in `bad`."""

    input_ids: list[int]
    labels: list[int]
    pictures: list[torch.Tensor] = field(
        default_factory=list
    )  # (views, 3, tile, tile) pixels or (views, N, D) features each
    image_sizes: list[list[int]] = field(default_factory=list)  # (height, width) as LlavaNext means them
    weight: float = 1.0
    num_cut: int = 0  # turns or pieces that max_length took
    bad: str | None = None


@dataclass(frozen=True)
class _Planned:
    """A row before its pictures are decoded; without `assembled` where it is bad."""

    index: int
    conversation: Conversation | Document
    counts: Sequence[int] = ()
    assembled: Assembled | None = None

    @property
    def length(self) -> int:
        return 1 if self.assembled is None else len(self.assembled.ids)


class InstructionDataset:
    """Rows of conversations and documents as ids, labels and pictures. `features`: a FeatureCache, or None to deliver pixels.

    What only decoding shows (a broken picture, a row too long) keeps its position: `fetch` gives a row of weight 0
    with the reason. max_length: tokens of a row; longer ones lose turns (documents: pieces) at the end.
    """

    def __init__(
        self,
        conversations: ConversationSet,
        chat: ChatFormat,
        tiling: Tiling,
        image_processor,
        features: FeatureCache | None = None,
        max_length: int | None = None,
    ) -> None:
        self.conversations, self.chat, self.tiling, self.image_processor = conversations, chat, tiling, image_processor
        self.features, self.max_length = features, max_length
        self._kept: dict[int, _Planned] = {}
        self._kept_tokens = 0

    def __len__(self) -> int:
        return len(self.conversations)

    def fetch(self, index: int) -> Row:
        """The row at `index`. Never raises for what is wrong with the row itself."""
        return self._fetch(self._plan(index))

    def length(self, index: int) -> int:
        """Tokens of the row at `index`, without decoding its pictures; 1 for a row that will be of weight 0.

        For sharing out rows: a picture that turns out otherwise costs balance, nothing else.
        """
        return self._plan(index).length

    def microbatches(
        self, indices: Sequence[int], max_rows: int, budget: int | None = None, rank: int = 0, world: int = 1
    ) -> list[dict[str, Any]]:
        """The micro-batches (`collate`) of process `rank` in a step of the rows `indices`; the rows of a step are the same for
        every world. max_rows, budget: most rows and tokens of a micro-batch. A pure function of the rows."""
        rows = [self._plan(index) for index in indices]
        lengths = [row.length for row in rows]
        plan = pack_rows(lengths, world, budget or max(1, sum(lengths)), max_rows)[rank]
        return [self.collate([self._fetch(rows[number]) for number in numbers]) for numbers in plan]

    def _plan(self, index: int) -> _Planned:
        """The row at `index` as far as it is known without decoding its pictures.

        The first rows met stay for later epochs: rendering is a third of the work of tuning a small model on a CPU.
        """
        if index in self._kept:
            return self._kept[index]
        conversation = self.conversations[index]
        try:
            paths = [self.conversations.picture_path(index, name) for name in conversation.images]
            counts = [self.tiling.num_image_tokens(*self._size(path)) for path in paths]
            row = _Planned(index, conversation, counts, self._assemble(conversation, counts))
        except (BadImage, RowTooLong, TemplateError):
            return _Planned(index, conversation)  # `_fetch` tells the reason
        if self._kept_tokens + row.length <= KEPT_TOKENS:
            compact = replace(row.assembled, ids=array("i", row.assembled.ids), labels=array("i", row.assembled.labels))
            self._kept[index] = replace(row, assembled=compact)
            self._kept_tokens += row.length
        return row

    def _fetch(self, row: _Planned) -> Row:
        """Ids are assembled anew only where a decoded picture takes other tokens than its header promised."""
        try:
            paths = [self.conversations.picture_path(row.index, name) for name in row.conversation.images]
            pictures = [self._picture(path) for path in paths]
            counts = [self.tiling.num_image_tokens(*size) for _, size, _ in pictures]
            assembled = row.assembled
            if assembled is None or counts != row.counts:
                assembled = self._assemble(row.conversation, counts)
        except BadImage as error:
            return self._bad(row.index, f"picture: {error}")
        except RowTooLong as error:
            return self._bad(row.index, f"too_long: {error}")
        except TemplateError as error:
            return self._bad(row.index, f"prefix_law: {error}")
        kept = pictures[: assembled.num_images]
        return Row(
            list(assembled.ids),
            list(assembled.labels),
            [views for views, _, _ in kept],
            [list(size) for _, _, size in kept],
            num_cut=assembled.num_cut,
        )

    def _assemble(self, conversation: Conversation | Document, counts: Sequence[int]) -> Assembled:
        if isinstance(conversation, Document):
            return self.chat.assemble_document(conversation, counts, self.max_length)
        return self.chat.assemble(conversation, counts, self.max_length)

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """`AssistantForTraining.forward`'s arguments `num_truncated` (rows that max_length cut) and `bad`: the reasons
        of rows of weight 0. Without a row, one pad token
        from which nothing is learned: the process takes its part in what all do together."""
        bad = [row.bad for row in rows if row.bad is not None]
        num_rows = len(rows)
        rows = rows or [Row([self.chat.tokenizer.pad_token_id], [IGNORED], weight=0.0)]
        pictures = [views for row in rows for views in row.pictures]
        return {
            "input_ids": torch.tensor([[token for row in rows for token in row.input_ids]]),
            "labels": torch.tensor([[label for row in rows for label in row.labels]]),
            "position_ids": torch.cat([torch.arange(len(row.input_ids)) for row in rows])[None],
            "row_lengths": [len(row.input_ids) for row in rows],
            "weights": torch.tensor([row.weight for row in rows]),
            "features" if self.features is not None else "pixel_values": torch.cat(pictures)
            if pictures
            else self._no_pictures(),
            "image_sizes": [size for row in rows for size in row.image_sizes],
            "views_per_image": [len(views) for views in pictures],
            "num_rows": num_rows,
            "num_truncated": sum(row.num_cut > 0 for row in rows),
            "bad": bad,
        }

    def _picture(self, path: str) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
        """Views, the picture's own size and its processed one. Raises BadImage."""
        if self.features is not None:
            return self.features.get(path)
        return read_views(path, self.tiling, self.image_processor, as_uint8=True)

    def _size(self, path: str) -> tuple[int, int]:
        """(height, width) of a picture, or any, where its number of tokens does not depend on it. Raises BadImage."""
        if self.features is not None:
            return self.features.size(path)
        if not self.tiling.varies:
            return self.tiling.tile_size, self.tiling.tile_size
        return read_size(path)

    def _no_pictures(self) -> torch.Tensor:
        tile = self.tiling.tile_size
        return torch.zeros(0, 3, tile, tile) if self.features is None else torch.zeros(0, *self.features.view_shape)

    def _bad(self, index: int, reason: str) -> Row:
        pad = self.chat.tokenizer.pad_token_id
        return Row([pad], [IGNORED], weight=0.0, bad=f"{self.conversations.where(index)}: {reason}")


def read_size(path: str) -> tuple[int, int]:
    """(height, width) of a picture file from its header, before any rotation that it asks for. Raises BadImage."""
    try:
        header = read_header(_read_file(path))
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None
    return header.height, header.width


def _read_file(path: str) -> bytes:
    """A picture file's bytes; none of them where they are more than any picture may have. Raises BadImage."""
    try:
        if (size := os.stat(path).st_size) > MAX_BYTES:
            raise BadImage(too_many_bytes(size, MAX_BYTES))
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise BadImage(str(error)) from None


def read_views(
    path: str, tiling: Tiling, image_processor, as_uint8: bool = False
) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
    """Pixels (views, 3, tile, tile) of a picture file, its (height, width) and its processed one. Raises BadImage.

    as_uint8: four times less to hand over, normalised on the device; fp32 all the same where the processor does more
    than that.
    """
    try:
        picture_CHW = decode_image(_read_file(path))
    except BadImage as error:
        raise BadImage(f"{path}: {error}") from None
    size = tuple(picture_CHW.shape[-2:])
    if not tiling.shows_something(*size):
        raise BadImage(
            f"{path}: {size[0]}x{size[1]} is so thin that no token of its tiles is kept; set tiling.pad_square"
        )
    if as_uint8 and only_normalizes(image_processor, tiling):
        views, processed = cut_views(picture_CHW, tiling, image_processor.image_mean)
    else:
        views, processed = picture_views(picture_CHW, tiling, image_processor)
    return views, size, processed


class FeatureCache:
    """Frozen encoder features of every distinct picture, computed once: `features.bin` (fp32, mapped) and `cache.json`.

    The order and the composition of the encoder's batches are fixed by the picture list, so the file does not
    depend on how often its making was interrupted. It counts as there only once `cache.json` is; another encoder,
    tiling, processor or picture list has another digest and is computed anew. Pictures that cannot be decoded are
    remembered with the reason.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        about = json.loads((self.directory / "cache.json").read_text())
        self.digest: str = about["digest"]
        self.view_shape = tuple(about["view_shape"])  # (N, D)
        self._entries = {entry["path"]: entry for entry in about["pictures"]}
        shape = (about["num_stored"], *self.view_shape)
        self._features = np.memmap(self.directory / "features.bin", np.float32, "r", shape=shape) if shape[0] else None

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike,
        conversations: ConversationSet,
        tiling: Tiling,
        image_processor,
        encode: Callable[[torch.Tensor], torch.Tensor],
        encoder_state: dict[str, torch.Tensor],
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> FeatureCache:
        """The cache in `directory`, made when it is not there or was made for something else.

        encode: pixels (K, 3, tile, tile) -> features (K, N, D), e.g. `encode_views` of the model. encoder_state:
        its weights, for the digest. batch_size: views of one encoder pass. progress: called with (pictures done,
        all).
        """
        directory = Path(directory)
        paths = distinct_pictures(conversations)
        digest = _digest(paths, tiling, image_processor, encoder_state)
        try:
            cache = cls(directory)
            if cache.digest == digest:
                return cache
        except (OSError, ValueError, KeyError):
            pass  # none yet, or one that was not finished
        _build(directory, digest, paths, tiling, image_processor, encode, batch_size, progress)
        return cls(directory)

    @staticmethod
    def num_bytes(conversations: ConversationSet, tiling: Tiling, hidden_size: int) -> int:
        """Size of `features.bin` for these conversations, before it is made; the most where view counts differ."""
        return len(distinct_pictures(conversations)) * tiling.num_views * tiling.patches_per_view * hidden_size * 4

    def size(self, path: str) -> tuple[int, int]:
        """The picture's own (height, width). Raises BadImage."""
        entry = self._entries[path]
        if entry["bad"] is not None:
            raise BadImage(entry["bad"])
        return tuple(entry["size"])

    def get(self, path: str) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
        """Features (views, N, D), the picture's (height, width) and its processed one. Raises BadImage."""
        entry = self._entries[path]
        if entry["bad"] is not None:
            raise BadImage(entry["bad"])
        start, num_views = entry["place"]
        return (
            torch.from_numpy(np.array(self._features[start : start + num_views])),
            tuple(entry["size"]),
            tuple(entry["processed"]),
        )

    @property
    def bad(self) -> dict[str, str]:
        """Pictures that could not be decoded, with the reason."""
        return {path: entry["bad"] for path, entry in self._entries.items() if entry["bad"] is not None}

    def __getstate__(self) -> dict:
        return {"directory": self.directory}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["directory"])


def distinct_pictures(conversations: ConversationSet) -> list[str]:
    """Files of all pictures, each once, in the order of their first row."""
    return list(
        dict.fromkeys(path for index in range(len(conversations)) for path in conversations.picture_paths(index))
    )


def _digest(paths: list[str], tiling: Tiling, image_processor, encoder_state: dict[str, torch.Tensor]) -> str:
    unshuffled = f" unshuffled by {tiling.unshuffle}" * (tiling.unshuffle > 1)  # the same views, but chosen and ordered otherwise
    digest = hashlib.sha256(f"{CACHE_VERSION} {tiling!r}{unshuffled} {image_processor.to_json_string()}".encode())
    for name, tensor in sorted(encoder_state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for path in paths:
        try:
            stat = os.stat(path)
            digest.update(f"{path}\0{stat.st_size} {stat.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path}\0missing\n".encode())
    return digest.hexdigest()


def _as_seen(views_KCHW: torch.Tensor, image_processor) -> torch.Tensor:
    """Normalised as training does it, so that cached features are those that would have been computed."""
    if views_KCHW.dtype != torch.uint8:
        return views_KCHW
    return normalize(views_KCHW, image_processor.image_mean, image_processor.image_std)


def _build(
    directory: Path,
    digest: str,
    paths: list[str],
    tiling: Tiling,
    image_processor,
    encode: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cache.json").unlink(missing_ok=True)
    temporary = directory / "features.bin.tmp"
    pictures_per_batch = max(1, batch_size // tiling.num_views)
    entries: list[dict] = []
    num_stored, view_shape = 0, (tiling.patches_per_view, 0)
    try:
        with open(temporary, "wb") as file:
            for start in range(0, len(paths), pictures_per_batch):
                views = []
                for path in paths[start : start + pictures_per_batch]:
                    entry = {
                        "path": path,
                        "place": None,  # first view and number of views
                        "size": None,
                        "processed": None,
                        "bad": None,
                    }
                    try:
                        pixels, entry["size"], entry["processed"] = read_views(path, tiling, image_processor, as_uint8=True)
                        entry["place"] = [num_stored, len(pixels)]
                        num_stored += len(pixels)
                        views.append(pixels)
                    except BadImage as error:
                        entry["bad"] = str(error)
                    entries.append(entry)
                if views:
                    with torch.no_grad():
                        features_KND = encode(_as_seen(torch.cat(views), image_processor)).float().cpu().contiguous()
                    view_shape = tuple(features_KND.shape[1:])
                    file.write(features_KND.numpy().tobytes())
                if progress is not None:
                    progress(min(start + pictures_per_batch, len(paths)), len(paths))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{temporary}: the feature cache could not be written ({error.strerror}); "
            "set encoder.cache: off or free some space"
        ) from None
    os.replace(temporary, directory / "features.bin")
    about = {
        "digest": digest,
        "num_stored": num_stored,
        "view_shape": list(view_shape),
        "pictures": entries,
    }
    (directory / "cache.json.tmp").write_text(json.dumps(about))
    os.replace(directory / "cache.json.tmp", directory / "cache.json")
