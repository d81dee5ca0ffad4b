"""Which sample stands at global position i: arithmetic on (seed, i), no state (decision 2 of the design).

Three steps, each O(log) in what it depends on. The mixture: a binary tree over the sources splits positions 0, 1, 2, …
by rounding, so at every prefix each source has its quota within one sample (`Order.quota_bound`). The epoch: a source's
r-th sample is number r mod n of its epoch r div n. The shuffle: shards are ordered by hash, cut into windows, and the
samples of one window are permuted by a keyed Feistel network. Everything is integer arithmetic written out here, so the
order does not depend on the version of any library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aimv2_vlm.config import UserError
from aimv2_vlm.data.shards import atomic_file

ORDER_VERSION = 1
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """splitmix64's finaliser: a bijection of 64-bit integers that looks random."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def combine(*values: int) -> int:
    """One 64-bit key from several integers; their order matters."""
    key = 0x243F6A8885A308D3
    for value in values:
        key = mix((key + _GOLDEN) & _MASK ^ mix(value + _GOLDEN))
    return key


# ------------------------------------------------------------------------------------------------------------------
# draws


class Draws:
    """A stream of random numbers that is a function of its 64-bit key (splitmix64)."""

    def __init__(self, key: int):
        self._state = key & _MASK

    def bits(self) -> int:
        """64 random bits."""
        self._state = (self._state + _GOLDEN) & _MASK
        return mix(self._state)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * ((self.bits() >> 11) * 2.0**-53)

    def integers(self, low: int, high: int) -> int:
        """Uniform in low, …, high - 1 (bias below 2^-64 times the range)."""
        return low + (self.bits() * (high - low) >> 64)


# The streams of one sample: each purpose draws from its own, so that another crop setting never moves the prefixes.
STREAMS = {"prefix": 1, "crop": 2, "caption": 3, "objective": 4, "augment": 5}


def sample_seed(seed: int, position: int) -> int:
    """64 bits that belong to one position of one run."""
    return combine(seed, position)


def draws(seed: int, position: int, stream: str) -> Draws:
    """The draws of one sample for one purpose (a key of STREAMS)."""
    return Draws(combine(sample_seed(seed, position), STREAMS[stream]))


# ------------------------------------------------------------------------------------------------------------
# permutations


def permute(index: int, length: int, key: int) -> int:
    """Where `index` goes under the keyed permutation of 0 … length - 1: four Feistel rounds, walking the cycle into
    range."""
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            left, right = right, left ^ (mix(key + _GOLDEN * (right << 3 | round_number)) & mask)
        index = left << half | right
        if index < length:
            return index


def _shard_order(num_shards: int, key: int) -> np.ndarray:
    """All shard numbers, ordered by a hash of (key, number)."""
    value = np.arange(num_shards, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(value ^ (value >> np.uint64(31)), kind="stable")


# -----------------------------------------------------------------------------------------------------------------
# mixture


class _Split(NamedTuple):
    """A node of the mixture tree: of its first j positions, round(j · left_weight / weight) go left."""

    left_weight: int
    weight: int
    left: "_Split | int"
    right: "_Split | int"


def _mixture_tree(weights: Sequence[int]) -> tuple["_Split | int", Fraction]:
    """(tree, proven bound on |count - quota| over all prefixes and sources) for positive integer weights.

    A source's deviation is at most ½ (1 + Σ w / W) over the nodes W strictly between it and the root. So a source
    bears Σ 1 / W <= 1 / w for a bound of one sample, and a group of sources bears what its worst split leaves, less
    its own 1 / W. The tree that bears most is found by dynamic programming: over all groups up to ten sources, over
    runs of the sources sorted by weight beyond.
    """
    numbers = sorted(range(len(weights)), key=lambda number: (weights[number], number), reverse=True)
    num_sources = len(numbers)
    everything = (1 << num_sources) - 1

    def splits(group: int) -> Iterable[int]:
        if num_sources <= 10:
            lowest = group & -group
            rest = group ^ lowest
            part = (rest - 1) & rest
            while True:
                yield part | lowest
                if part == 0:
                    return
                part = (part - 1) & rest
        lowest = (group & -group).bit_length() - 1
        for cut in range(lowest + 1, group.bit_length()):
            yield group & ((1 << cut) - 1)

    @lru_cache(maxsize=None)
    def total(group: int) -> int:
        return sum(weights[numbers[bit]] for bit in range(num_sources) if group >> bit & 1)

    @lru_cache(maxsize=None)
    def bears(group: int) -> tuple[float, int]:
        if group & (group - 1) == 0:
            return 1.0 / total(group), 0
        room, part = max((min(bears(part)[0], bears(group ^ part)[0]), part) for part in splits(group))
        return room - (1.0 / total(group) if group != everything else 0.0), part

    def build(group: int) -> _Split | int:
        if group & (group - 1) == 0:
            return numbers[group.bit_length() - 1]
        part = bears(group)[1]
        return _Split(total(part), total(group), build(part), build(group ^ part))

    def bound(node: _Split | int, above: Fraction, root: bool) -> Fraction:
        if isinstance(node, int):
            return (1 + weights[node] * above) / 2 if not root else Fraction(0)
        here = above if root else above + Fraction(1, node.weight)
        return max(bound(node.left, here, False), bound(node.right, here, False))

    tree = build(everything)
    return tree, bound(tree, Fraction(0), True)


def _left_count(node: _Split, position: int) -> int:
    return (2 * position * node.left_weight + node.weight) // (2 * node.weight)


# -------------------------------------------------------------------------------------------------------------------
# order


class Place(NamedTuple):
    source: int
    shard: int
    sample: int
    epoch: int


@dataclass(frozen=True)
class _Epoch:
    """One epoch of one source: shards in order, and where each starts in that order (length num_shards + 1)."""

    shards: list[int]
    starts: list[int]


class Order:
    """Position -> sample, for a mixture of sources.

    num_samples: per source, the number of samples of each shard. weights: per source, any non-negative numbers
    (normalised; 0 leaves the source out). window_shards: shards whose samples are shuffled together. Raises UserError
    for impossible input.
    """

    def __init__(
        self, num_samples: Sequence[Sequence[int]], weights: Sequence[float], seed: int, window_shards: int = 16
    ):
        if len(num_samples) != len(weights) or not weights:
            raise UserError(
                f"data.sources: {len(num_samples)} sources and {len(weights)} weights; need one weight for each"
            )
        if window_shards < 1:
            raise UserError(f"data.window_shards = {window_shards}: must be at least 1")
        for number, weight in enumerate(weights):
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise UserError(f"data.sources[{number}].weight = {weight!r}: must be a number that is not negative")
            if weight > 0 and sum(num_samples[number]) == 0:
                raise UserError(
                    f"data.sources[{number}]: has a weight but not one usable sample; see `aimv2-vlm data check`"
                )
        if not any(weights):
            raise UserError("data.sources: every weight is 0; at least one must be positive")
        self.seed, self.window_shards = seed, window_shards
        self.num_samples = [np.asarray(counts, dtype=np.int64) for counts in num_samples]
        self.totals = [int(counts.sum()) for counts in self.num_samples]
        # str: 0.1 means one tenth, not the nearest binary fraction
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(fraction.denominator for fraction in exact))
        self.weights = [int(fraction * scale) for fraction in exact]
        live = [number for number, weight in enumerate(self.weights) if weight > 0]
        self._live = live
        # Proven bound on |count - quota|: at most 1 up to four sources and for the paper's five; a few percent above it
        # for some mixtures of more.
        self._tree, self.quota_bound = _mixture_tree([self.weights[number] for number in live])
        self._epochs: dict[tuple[int, int], _Epoch] = {}

    def source_at(self, position: int) -> tuple[int, int]:
        """(source, how many samples of that source stand before this position)."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        node = self._tree
        while isinstance(node, _Split):
            before = _left_count(node, position)
            if _left_count(node, position + 1) > before:
                node, position = node.left, before
            else:
                node, position = node.right, position - before
        return self._live[node], position

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` samples come from each source."""
        counts = [0] * len(self.weights)

        def descend(node: _Split | int, number: int) -> None:
            if isinstance(node, int):
                counts[self._live[node]] = number
                return
            left = _left_count(node, number)
            descend(node.left, left)
            descend(node.right, number - left)

        descend(self._tree, position)
        return counts

    def locate(self, position: int) -> Place:
        """The sample at a global position."""
        source, rank = self.source_at(position)
        epoch, index = divmod(rank, self.totals[source])
        layout = self._epoch(source, epoch)
        # The window that holds `index`: its first shard in this epoch's order, its first sample, its length.
        shard_at = bisect_right(layout.starts, index) - 1
        window = shard_at // self.window_shards
        first = window * self.window_shards
        last = min(first + self.window_shards, len(layout.shards))
        start = layout.starts[first]
        length = layout.starts[last] - start
        within = start + permute(index - start, length, combine(self.seed, source, epoch, 1, window))
        slot = bisect_right(layout.starts, within) - 1
        return Place(source, layout.shards[slot], within - layout.starts[slot], epoch)

    def coming_shards(self, position: int) -> tuple[int, tuple[int, ...]]:
        """(source, its shards that hold the window of the sample at `position` and the window after it)."""
        source, rank = self.source_at(position)
        epoch, index = divmod(rank, self.totals[source])
        layout = self._epoch(source, epoch)
        first = (bisect_right(layout.starts, index) - 1) // self.window_shards * self.window_shards
        shards = layout.shards[first : first + 2 * self.window_shards]
        if first + self.window_shards >= len(layout.shards):
            shards = shards + self._epoch(source, epoch + 1).shards[: self.window_shards]
        return source, tuple(dict.fromkeys(shards))

    def positions_for_epochs(self, epochs: float = 1.0) -> int:
        """The least number of positions after which every source of positive weight has gone through `epochs` of its
        samples."""
        need = [math.ceil(self.totals[number] * epochs) for number in self._live]
        low, high = 0, 1
        while not self._reached(high, need):
            high *= 2
        while low < high:
            middle = (low + high) // 2
            if self._reached(middle, need):
                high = middle
            else:
                low = middle + 1
        return low

    def _reached(self, position: int, need: list[int]) -> bool:
        counts = self.counts(position)
        return all(counts[number] >= wanted for number, wanted in zip(self._live, need))

    def _epoch(self, source: int, epoch: int) -> _Epoch:
        layout = self._epochs.get((source, epoch))
        if layout is None:
            if len(self._epochs) >= 4 * len(self.weights):
                self._epochs.clear()
            shards = _shard_order(len(self.num_samples[source]), combine(self.seed, source, epoch, 0))
            starts = np.concatenate([[0], np.cumsum(self.num_samples[source][shards])])
            layout = self._epochs[source, epoch] = _Epoch(shards.tolist(), starts.tolist())
        return layout

    def __getstate__(self) -> dict:
        return vars(self) | {"_epochs": {}}


# -------------------------------------------------------------------------------------------------------------
# fingerprint


def fingerprint(seed: int, window_shards: int, sources: Sequence[Mapping[str, Any]], **more: Any) -> dict:
    """What the order depends on, JSON-ready, with a digest of it all.

    sources: {"name", "weight", "caption", "shards": [{"name", "size", "count", "digest"}]} each; `more`: other facts
    that must not change.
    """
    facts = {"order_version": ORDER_VERSION, "seed": seed, "window_shards": window_shards, **more}
    facts["sources"] = [dict(source) for source in sources]
    facts = json.loads(json.dumps(facts))
    return facts | {"digest": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]}


LISTED_SHARDS = 16  # a source of at most so many shards lists them in its fingerprint


def compact_fingerprint(facts: Mapping[str, Any], folder: str | os.PathLike, write: bool = True) -> dict:
    """`fingerprint` in less than 4 KB for a handful of sources: the shards of a large source go into a file of their own.

    The list is written below `folder` (if `write`) under a name that is its digest, once for each state of the data, and
    `compare_fingerprints` reads it from there to name what changed.
    """
    sources = []
    for source in facts["sources"]:
        if len(source["shards"]) > LISTED_SHARDS:
            text, source = _listing(source["shards"]), _summary(source)
            path = Path(folder) / source["listing"]
            if write and not path.exists():
                with atomic_file(path) as file:
                    file.write(text)
        sources.append(source)
    return {**facts, "sources": sources}


def _with_shards(source: Mapping[str, Any], folder: str | os.PathLike | None) -> dict:
    """A fingerprint's source with its shards listed, read from `folder` where they stand in a file of their own."""
    if "listing" not in source:
        return dict(source)
    listed = {key: value for key, value in source.items() if key not in ("listing", "num_shards", "num_samples")}
    try:
        text = (Path(folder or ".") / os.path.basename(source["listing"])).read_bytes()
        if source["listing"] == _listing_name(text):
            return listed | {"shards": json.loads(text)}
    except (OSError, ValueError):
        pass
    return dict(source)


class Added(str):
    """A difference by which nothing that was there before changed."""


def compare_fingerprints(
    old: Mapping[str, Any], new: Mapping[str, Any], folder: str | os.PathLike | None = None
) -> list[str]:
    """Every difference in words ("source 'coyo': shard 00003.tar: size 10 -> 12"); empty when the data are the same. What only came to the old data is `Added`.

    folder: where the lists of large sources stand (`compact_fingerprint`). Without the old list a changed shard cannot
    be named, only how many shards and samples there were.
    """
    if old.get("digest") is not None and old.get("digest") == new.get("digest"):
        return []
    changes = [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if name not in ("sources", "digest") and old.get(name) != new.get(name)
    ]
    before = {source["name"]: _with_shards(source, folder) for source in old.get("sources", [])}
    after = {source["name"]: _with_shards(source, folder) for source in new.get("sources", [])}
    for name in dict.fromkeys([*before, *after]):
        label = f"source '{name}'"
        if name not in after or name not in before:
            changes.append(f"{label}: removed" if name in before else Added(f"{label}: added"))
            continue
        one, two = before[name], after[name]
        if "listing" in one or "listing" in two:
            one, two = _summary(one), _summary(two)
        changes += [
            f"{label}: {key}: {one.get(key)!r} -> {two.get(key)!r}"
            for key in dict.fromkeys([*one, *two])
            if key not in ("name", "shards", "listing") and one.get(key) != two.get(key)
        ]
        if one.get("listing") != two.get("listing"):
            changes.append(f"{label}: shards changed, and their old list is missing")
        changes += [type(change)(f"{label}: {change}") for change in _compare_shards(one.get("shards", []), two.get("shards", []))]
    if not changes and old.get("digest") != new.get("digest"):
        changes.append("the order of the sources changed")
    return changes


def _listing(shards: Sequence[Mapping]) -> bytes:
    return json.dumps(shards, indent=0).encode()


def _listing_name(text: bytes) -> str:
    return f"shards-{hashlib.sha256(text).hexdigest()[:32]}.json"


def _summary(source: Mapping[str, Any]) -> dict:
    """A source by the digest and the size of its list of shards alone."""
    if "listing" in source:
        return dict(source)
    return {key: value for key, value in source.items() if key != "shards"} | {
        "listing": _listing_name(_listing(source["shards"])),
        "num_shards": len(source["shards"]),
        "num_samples": sum(shard["count"] for shard in source["shards"]),
    }


def _compare_shards(old: Sequence[Mapping], new: Sequence[Mapping]) -> list[str]:
    changes: list[str] = []
    if len(old) != len(new):
        changes.append((Added if len(old) < len(new) else str)(f"number of shards: {len(old)} -> {len(new)}"))
    for number, (one, two) in enumerate(zip(old, new)):
        if one["name"] != two["name"]:
            changes.append(f"shard number {number}: {one['name']} -> {two['name']}")
            continue
        different = [f"{key} {one.get(key)} -> {two.get(key)}" for key in one if one.get(key) != two.get(key)]
        if different:
            changes.append(f"shard {one['name']}: {', '.join(different)}")
    return (
        changes
        + [f"shard {shard['name']} removed" for shard in old[len(new) :]]
        + [Added(f"shard {shard['name']} added") for shard in new[len(old) :]]
    )
