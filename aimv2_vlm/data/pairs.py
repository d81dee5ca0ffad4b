"""Image-text pairs for pre-training: global position -> sample, and micro-batches of them."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from aimv2_vlm.config import UserError
from aimv2_vlm.data.captions import CaptionTokenizer
from aimv2_vlm.data.order import Order, Place, combine, draws, fingerprint
from aimv2_vlm.data.remote import ShardCache
from aimv2_vlm.data.shards import BadSample, RawSample, ShardSet
from aimv2_vlm.data.transforms import MAX_BYTES, MAX_PIXELS, BadImage, EvalTransform, TrainTransform, decode_image

# Validation draws its prefixes from this, whatever the run's seed: every run is judged on the same ones.
VALIDATION_SEED = 20_241_121


class PairDataset:
    """Samples of an image-text mixture as a function of (seed, position).

    sources: objects with `.name`, `.path`, `.weight`, `.caption` (config.PairSource). image: `.size` (pixels),
    `.scale`, `.ratio`, `.flip`, `.resize` (config.ImageInput). num_patches: N; prefixes are U{1 … N - 1}. cache_dir:
    for indexes whose shards cannot be written beside. shard_cache: where copies of remote shards go. shuffle_captions:
    control arm, every picture gets the caption of another picture of its source, always the same one.

    A sample that turns out bad keeps its position, with weight 0, and is named. Cheap to send to worker processes.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        seed: int,
        image: Any,
        tokenizer: CaptionTokenizer,
        num_patches: int,
        cache_dir: str | os.PathLike | None = None,
        window_shards: int = 16,
        shuffle_captions: bool = False,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
        progress: Callable[[int, int], None] | None = None,
        shard_cache: ShardCache | None = None,
    ):
        if num_patches < 2:
            raise UserError(f"image.size = {image.size}: gives {num_patches} patches; a prefix needs at least 2")
        if not sources:
            raise UserError("data.sources: is empty; name at least one source of shards")
        self.names = [source.name or f"source{number}" for number, source in enumerate(sources)]
        if len(set(self.names)) < len(self.names):
            raise UserError(f"data.sources: two sources have the same name ({', '.join(self.names)})")
        self.seed, self.tokenizer, self.num_patches = seed, tokenizer, num_patches
        self.shuffle_captions, self.max_pixels, self.max_bytes = shuffle_captions, max_pixels, max_bytes
        self.weights = [source.weight for source in sources]
        self.captions = [source.caption for source in sources]
        self.shards = [ShardSet(source.path, source.caption, cache_dir, progress=progress, shard_cache=shard_cache) for source in sources]
        check_cache(self.shards, window_shards)
        for name, weight, shards in zip(self.names, self.weights, self.shards):
            if weight and not sum(shards.num_samples):
                bad = shards.bad_samples(1)
                example = f" ({bad[0]})" if bad else ""
                raise UserError(f"data source '{name}': no usable sample in {len(shards.paths)} shards{example}")
        self.order = Order([shards.num_samples for shards in self.shards], self.weights, seed, window_shards)
        self.train_transform = TrainTransform(
            image.size, tuple(image.scale), tuple(image.ratio), image.flip, getattr(image, "resize", "exact")
        )
        self.eval_transform = EvalTransform(image.size)
        # First storage number of each shard, over all sources: where `validation` and wrong captions find a sample.
        counts = [count for shards in self.shards for count in shards.num_samples]
        self._starts = [0, *itertools.accumulate(counts)]
        self._shard_of = [
            (number, shard) for number, shards in enumerate(self.shards) for shard in range(len(shards.paths))
        ]

    # --------------------------------------------------------------------------------------------------------- sizes

    @property
    def num_samples(self) -> int:
        """Samples with a position, over all sources."""
        return self._starts[-1]

    @property
    def epoch_positions(self) -> int:
        """Positions after which every sample of every source has been seen at least once."""
        return self.order.positions_for_epochs(1)

    @property
    def image_size(self) -> int:
        return self.eval_transform.size

    @property
    def num_bad(self) -> int:
        """How many `bad_samples` there are, without reading them."""
        return sum(shards.num_bad for shards in self.shards)

    def bad_samples(self, limit: int | None = None) -> list[str]:
        """What the index pass found: 'shard: key: reason'; none of these has a position. The first `limit` of them."""
        named: list[str] = []
        for shards in self.shards:
            named += shards.bad_samples(None if limit is None else limit - len(named))
        return named

    def fingerprint(self) -> dict:
        """What the samples of a run depend on; compare with `order.compare_fingerprints`."""
        sources = [
            {"name": name, "weight": weight, "caption": caption, "shards": shards.shard_facts()}
            for name, weight, caption, shards in zip(self.names, self.weights, self.captions, self.shards)
        ]
        return fingerprint(self.seed, self.order.window_shards, sources, shuffle_captions=self.shuffle_captions)

    def texts(self, limit: int | None = None) -> Iterable[str]:
        """Captions of the first positions, for training a tokenizer: sources and columns in the shares that a run sees, each with its
        own picture's caption. At most `limit`, and no more than there are samples; unreadable ones are passed over."""
        for position in range(self.num_samples if limit is None else min(limit, self.num_samples)):
            try:
                yield self._read(position)[0].caption
            except BadSample:
                continue

    # ------------------------------------------------------------------------------------------------------- samples

    def fetch(self, position: int) -> dict:
        """The training sample at a global position:
        pixels uint8 (3, S, S); input_ids int64 (T,) padded to the context length; text_length, end token included;
        truncated; prefix_length; draw (63 random bits for the objective's own use); weight 1 or 0; key; bad: None or 'shard: key: reason' (then pixels and ids are blank
        and the length is 0)."""
        drawn = self._drawn(self.seed, position)
        try:
            raw, caption = self.captioned(position)
        except BadSample as error:
            return self._blank(error.key, drawn, str(error))
        crop = draws(self.seed, position, "crop")
        return self._sample(
            raw,
            caption,
            drawn,
            lambda data: self.train_transform.decode(data, crop, self.max_pixels, self.max_bytes),
        )

    def fetch_validation(self, position: int) -> dict:
        """Sample number `position` in storage order (sources in the order given): centre crop, the first column's
        caption, a prefix that depends on the position only. The row is that of `fetch`."""
        drawn = self._drawn(VALIDATION_SEED, position)
        try:
            raw, (source, shard, sample) = self._stored(position)
            caption = self._wrong_caption(source, shard, sample) if self.shuffle_captions else raw.caption
        except BadSample as error:
            return self._blank(error.key, drawn, str(error))
        return self._sample(
            raw,
            caption,
            drawn,
            lambda data: self.eval_transform(decode_image(data, self.max_pixels, self.max_bytes)),
        )

    def microbatch(self, positions: Iterable[int]) -> dict:
        """Collated training samples (see `collate`)."""
        return collate([self.fetch(position) for position in positions])

    def validation(self, positions: Iterable[int]) -> dict:
        """Collated validation samples (see `collate`)."""
        return collate([self.fetch_validation(position) for position in positions])

    def captioned(self, position: int) -> tuple[RawSample, str]:
        """The sample at a global position and the caption it is trained with. Raises BadSample."""
        raw, place = self._read(position)
        return raw, self._wrong_caption(place.source, place.shard, place.sample) if self.shuffle_captions else raw.caption

    def tokens(self, raw: RawSample, caption: str) -> tuple[list[int], bool]:
        """(ids with the end token, whether the caption was cut). Raises BadSample for a caption of no words."""
        ids, truncated = self.tokenizer.encode_counted(caption)
        if len(ids) <= self.tokenizer.num_special:
            raise BadSample(raw.shard_name, raw.key, "caption is empty after cleaning")
        return ids, truncated

    def decoded(self, raw: RawSample, decode: Callable[[bytes], torch.Tensor]) -> torch.Tensor:
        """`decode` of the sample's picture. Raises BadSample."""
        try:
            return decode(raw.image_bytes)
        except BadImage as error:
            raise BadSample(raw.shard_name, raw.key, error.reason) from None

    def padded(self, ids: list[int]) -> torch.Tensor:
        """ids int64 (T,), padded to the context length."""
        return torch.tensor(ids + [self.tokenizer.pad_id] * (self.tokenizer.context_length - len(ids)), dtype=torch.int64)

    def _sample(
        self, raw: RawSample, caption: str, drawn: dict[str, int], decode: Callable[[bytes], torch.Tensor]
    ) -> dict:
        try:
            ids, truncated = self.tokens(raw, caption)
            pixels = self.decoded(raw, decode)
        except BadSample as error:
            return self._blank(raw.key, drawn, str(error))
        return self._row(pixels, ids, drawn, raw.key) | {"truncated": truncated}

    def _drawn(self, seed: int, position: int) -> dict[str, int]:
        return {
            "prefix_length": draws(seed, position, "prefix").integers(1, self.num_patches),
            "draw": draws(seed, position, "objective").bits() >> 1,
        }

    def _row(self, pixels: torch.Tensor, ids: list[int], drawn: dict[str, int], key: str) -> dict:
        return drawn | {
            "pixels": pixels,
            "input_ids": self.padded(ids),
            "text_length": len(ids),
            "truncated": False,
            "weight": 1,
            "key": key,
            "bad": None,
        }

    def _blank(self, key: str, drawn: dict[str, int], bad: str) -> dict:
        pixels = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
        return self._row(pixels, [], drawn, key) | {"weight": 0, "bad": bad}

    def _read(self, position: int) -> tuple[RawSample, Place]:
        """The sample at a global position, with the caption column drawn for it."""
        place = self.order.locate(position)
        if self.shards[place.source].remote:
            self.shards[place.source].read_ahead(self.order.coming_shards(position)[1])
        return self.shards[place.source].read(place.shard, place.sample, draws(self.seed, position, "caption"), self.max_bytes), place

    def _stored(self, number: int) -> tuple[RawSample, tuple[int, int, int]]:
        if not 0 <= number < self.num_samples:
            raise IndexError(f"sample {number} of {self.num_samples}")
        at = bisect_right(self._starts, number) - 1
        source, shard = self._shard_of[at]
        sample = number - self._starts[at]
        return self.shards[source].read(shard, sample, max_bytes=self.max_bytes), (source, shard, sample)

    def _wrong_caption(self, source: int, shard: int, sample: int) -> str:
        """The caption of the sample that stands a fixed, seeded distance further in the same source."""
        first = self._shard_of.index((source, 0))
        begin = self._starts[first]
        total = self.order.totals[source]
        if total < 2:
            raise UserError(f"data source '{self.names[source]}': one sample has no other caption to be given")
        distance = 1 + combine(self.seed, source, 2) % (total - 1)
        number = self._starts[first + shard] - begin + sample
        return self._stored(begin + (number + distance) % total)[0].caption


def check_cache(sources: Sequence[ShardSet], window_shards: int) -> None:
    """Raises UserError when the windows being read and those after them do not fit the cache of remote shards."""
    remote = [shards for shards in sources if shards.remote]
    need = sum(sum(sorted(shards.sizes)[-2 * window_shards :]) for shards in remote)
    if remote and need > remote[0].remote[0].cache.limit:
        raise UserError(f"data.shard_cache_gb: two windows of {window_shards} shards take {need / 2**30:.3g} GiB; raise it, or lower "
                        "data.window_shards")  # fmt: skip


def collate(samples: Sequence[Mapping[str, Any]]) -> dict:
    """Samples -> pixels uint8 (B, 3, S, S), input_ids (B, T), text_lengths, prefix_lengths, draws (B,) int64, weights (B,)
    float32, num_truncated (captions that were cut), keys (list), bad (list of 'shard: key: reason')."""
    return {
        "pixels": torch.stack([sample["pixels"] for sample in samples]),
        "input_ids": torch.stack([sample["input_ids"] for sample in samples]),
        "text_lengths": torch.tensor([sample["text_length"] for sample in samples]),
        "prefix_lengths": torch.tensor([sample["prefix_length"] for sample in samples]),
        "draws": torch.tensor([sample["draw"] for sample in samples]),
        "weights": torch.tensor([sample["weight"] for sample in samples], dtype=torch.float32),
        "num_truncated": sum(sample["truncated"] for sample in samples),
        "keys": [sample["key"] for sample in samples],
        "bad": [sample["bad"] for sample in samples if sample["bad"]],
    }
