"""What is in some data before a run is spent on it: counts, sizes, captions, duplicates, leaks from an evaluation set, and whether
a download brought what it should have. Pictures and captions are read; nothing is changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aimv2_vlm.config import UserError
from aimv2_vlm.data.duplicates import alike, evaluation_pictures, look_alikes, perceptual_hash
from aimv2_vlm.data.shards import BadSample, ShardSet, open_index
from aimv2_vlm.data.transforms import MAX_BYTES, MAX_PIXELS, BadImage, decode_image, read_header

NEAR = 6  # bits of 64: copies at another size, quality or brightness stay below, other photographs above
# What img2dataset writes into every sample's .json and into the parquet file beside the tar.
DOWNLOAD_KEYS = ("key", "caption", "url", "status", "error_message", "width", "height", "original_width", "original_height")
EXPECTED = {  # dataset -> columns that only `--save_additional_columns` carries over
    "cc12m": (),
    "coyo": (
        "clip_similarity_vitb32",
        "clip_similarity_vitl14",
        "nsfw_score_opennsfw2",
        "nsfw_score_gantman",
        "watermark_score",
        "aesthetic_score_laion_v2",
    ),
    "dfn": ("uid",),
    "recap": ("re_caption",),
}

Progress = Callable[[int, int], None]


class Look(NamedTuple):
    """What is kept of one picture. Sizes are those of the header; `digest` is of the bytes, `likeness` a perceptual hash."""

    height: int
    width: int
    num_bytes: int
    extension: str
    digest: int
    likeness: tuple[int, int, int, int] | None


def look(data: bytes, decode: bool = False, hashed: bool = False, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Look:
    """Judge a picture by its header, or `decode` all of it; `hashed` without `decode` decodes as little as a hash needs.

    Raises BadImage.
    """
    header = read_header(data, max_pixels, max_bytes)
    likeness = None
    if decode or hashed:
        pixels = decode_image(data, max_pixels, max_bytes, min_size=None if decode else (64, 64))
        likeness = perceptual_hash(pixels) if hashed else None
    return Look(header.height, header.width, len(data), header.extension, _digest(data), likeness)


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def in_order(pool: Executor, work: Callable, items: Iterable, ahead: int = 64) -> Iterator:
    """`work(item)` of every item, in their order, with at most `ahead` of them held at a time."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def num_threads() -> int:
    """Decoding and checksums leave Python's lock, so threads share the work; above 8 the lock is what they wait for."""
    return min(8, len(os.sched_getaffinity(0)))


class Pictures:
    """What was seen of many pictures, 73 bytes each, by the number they were added under."""

    def __init__(self) -> None:
        self.number, self.height, self.width, self.num_bytes = array("q"), array("q"), array("q"), array("q")
        self.digest, self.likeness, self.has_likeness = array("Q"), array("Q"), array("b")
        self.formats: Counter[str] = Counter()

    def add(self, number: int, seen: Look) -> None:
        self.number.append(number)
        self.height.append(seen.height)
        self.width.append(seen.width)
        self.num_bytes.append(seen.num_bytes)
        self.digest.append(seen.digest)
        self.likeness.extend(seen.likeness or (0, 0, 0, 0))
        self.has_likeness.append(seen.likeness is not None)
        self.formats[seen.extension] += 1

    def hashes(self) -> np.ndarray:
        """(pictures, 4) uint64; zeros where a picture is flat."""
        return np.asarray(self.likeness).reshape(-1, 4)

    def report(self, name: Callable[[int], str], hashed: bool, max_distance: int) -> dict:
        """Sizes, formats and duplicates; `name(number)` names a picture in the lists."""
        heights, widths = np.asarray(self.height), np.asarray(self.width)
        report = {
            "formats": dict(self.formats.most_common()),
            "height": quantiles(heights),
            "width": quantiles(widths),
            "aspect_ratio": quantiles(widths / np.maximum(heights, 1)),
            "picture_bytes": quantiles(np.asarray(self.num_bytes)),
            "total_picture_bytes": int(np.sum(self.num_bytes, dtype=np.int64)),
            **self._groups("duplicate_pictures", np.asarray(self.digest), np.asarray(self.number), name),
        }
        if hashed:
            usable = np.asarray(self.has_likeness, dtype=bool)
            groups = alike(self.hashes()[usable], max_distance) if usable.any() else np.zeros(0, np.int64)
            report |= self._groups("near_duplicate_pictures", groups, np.asarray(self.number)[usable], name)
            report["near_duplicate_max_bits"] = max_distance
            report["num_flat_pictures"] = int(len(usable) - usable.sum())  # nothing to compare in them
        return report

    @staticmethod
    def _groups(title: str, labels: np.ndarray, numbers: np.ndarray, name: Callable[[int], str]) -> dict:
        """Number of pictures that repeat an earlier one, and every group, the largest first."""
        order = np.argsort(labels, kind="stable")
        _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
        repeated = np.flatnonzero(counts > 1)
        repeated = repeated[np.argsort(-counts[repeated], kind="stable")]
        groups = [numbers[order[starts[run] : starts[run] + counts[run]]] for run in repeated]
        return {f"num_{title}": sum(len(group) - 1 for group in groups), title: [[name(int(n)) for n in group] for group in groups]}

    def against(self, path: str | Path, name: Callable[[int], str], pool: Executor, max_distance: int, decode: bool = False) -> dict:
        """Which of these pictures are, or look like, one of an evaluation set: each with its nearest picture there."""
        names, others, bad = [], Pictures(), []
        for label, seen in in_order(pool, partial(_look_at, decode=decode), evaluation_pictures(path)):
            if isinstance(seen, str):
                bad.append(f"{label}: {seen}")
            else:
                others.add(len(names), seen)
                names.append(label)
        if not names:
            raise UserError(f"{path}: none of its {len(bad)} pictures can be read ({bad[0]})" if bad else f"{path}: holds no picture")
        nearest: dict[int, tuple[int, int]] = {}  # row here -> (bits, row there); identical bytes count as -1
        there = {digest: row for row, digest in reversed(list(enumerate(others.digest)))}
        for row, digest in enumerate(self.digest):
            if digest in there:
                nearest[row] = (-1, there[digest])
        mine, theirs = (np.flatnonzero(np.asarray(part.has_likeness, dtype=bool)) for part in (self, others))
        here_hash, there_hash = self.hashes()[mine], others.hashes()[theirs]
        for query, target in zip(*look_alikes(here_hash, there_hash, max_distance)):
            bits = int(np.bitwise_count(here_hash[query, 0] ^ there_hash[target, 0]))
            row = int(mine[query])
            nearest[row] = min(nearest.get(row, (99, 0)), (bits, int(theirs[target])))
        matches = [
            {"sample": name(self.number[row]), "evaluation": names[other], "bits": max(0, bits), "identical_bytes": bits < 0}
            for row, (bits, other) in sorted(nearest.items())
        ]
        return {
            "path": str(path),
            "num_pictures": len(names),
            "num_unreadable": len(bad),
            "unreadable": bad,
            "num_matches": len(matches),
            "num_evaluation_pictures_matched": len({other for _, other in nearest.values()}),
            "max_bits": max_distance,
            "matches": matches,
        }


def _look_at(named: tuple[str, bytes], decode: bool) -> tuple[str, Look | str]:
    label, data = named
    try:
        return label, look(data, decode, hashed=True)
    except BadImage as error:
        return label, error.reason


def quantiles(values: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    levels = {"min": 0, "5%": 5, "median": 50, "95%": 95, "max": 100}
    found = np.percentile(np.asarray(values), list(levels.values()))
    return {name: round(float(value), 4) for name, value in zip(levels, found)} | {"mean": round(float(np.mean(values)), 4)}


def plain_reason(reason: str) -> str:
    """A reason without its numbers, for counting."""
    return re.sub(r"\d+", "N", reason)


# --------------------------------------------------------------------------------------------------------------- shards


def captions_of(text: bytes | None, metadata: bytes | None) -> tuple[dict[str, list[str]], dict]:
    """({column: captions}, metadata) of one sample. Columns are `txt` and `json:<field>`; of a .txt that is not UTF-8, none."""
    columns, fields = {}, {}
    if metadata is not None:
        try:
            fields = json.loads(metadata)
        except (ValueError, RecursionError):
            fields = None
        fields = fields if isinstance(fields, dict) else {}  # the index has seen an object, if it belongs to this tar
        for field_name, value in fields.items():
            values = value if isinstance(value, list) else [value]
            found = [item for item in values if isinstance(item, str) and item.strip()]
            if found:
                columns[f"json:{field_name}"] = found
    if text is not None:
        try:
            caption = text.decode("utf-8")
        except UnicodeDecodeError:
            caption = ""
        if caption.strip():
            columns = {"txt": [caption], **columns}
    elif "json:caption" in columns:
        columns = {"txt": columns["json:caption"], **columns}  # the fallback that training uses
    return columns, fields


class _Seen(NamedTuple):
    key: str
    picture: Look | None
    bad: str | None
    captions: dict[str, list[str]]
    missing: tuple[str, ...]  # expected metadata fields that are not there


@dataclass
class _Captions:
    characters: array = field(default_factory=lambda: array("q"))
    words: array = field(default_factory=lambda: array("q"))
    digest: array = field(default_factory=lambda: array("Q"))

    def add(self, caption: str) -> None:
        self.characters.append(len(caption))
        self.words.append(len(caption.split()))
        self.digest.append(_digest(caption.encode("utf-8", "replace")))

    def report(self) -> dict:
        return {
            "count": len(self.words),
            "num_repeated": len(self.digest) - len(np.unique(np.asarray(self.digest))),
            "characters": quantiles(self.characters),
            "words": quantiles(self.words),
        }


def check(
    patterns: str | os.PathLike | Sequence[str | os.PathLike],
    caption: str | Mapping[str, float] = "txt",
    *,
    decode: bool = False,
    against: str | os.PathLike | None = None,
    expect: str | None = None,
    max_distance: int = NEAR,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    cache_dir: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> dict:
    """Read every sample of some shards (checksums verified); the report is JSON-ready.

    Pictures are judged by their headers, or `decode`d whole. Identical bytes are always found; pictures that look alike
    (perceptual hashes within `max_distance` bits) with `decode`, and those that look like a picture of the evaluation
    set `against`. `expect` (a key of EXPECTED) compares with what that dataset's download brings. Every bad sample is
    named: 'shard: key: reason'. Raises UserError as ShardSet and `evaluation_pictures` do.
    """
    hashed = decode or against is not None
    fields = _expected_fields(expect) if expect is not None else ()
    shards = ShardSet(patterns, caption, cache_dir)
    bad, starts = shards.bad_samples(), np.cumsum([0, *shards.num_samples])
    num_bad_indexed, total = len(bad), int(starts[-1])

    def place(number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        return shard, number - int(starts[shard])

    def name(number: int) -> str:
        shard, sample = place(number)
        return f"{shards.paths[shard].name}: {shards.key(shard, sample)}"

    def read(number: int) -> _Seen:
        shard, sample = place(number)
        try:
            key, data, text, metadata = shards.members(shard, sample)
            texts, found = captions_of(text, metadata)
            missing = tuple(f for f in fields if f not in found or (f not in DOWNLOAD_KEYS and found[f] is None))
            return _Seen(key, look(data, decode, hashed, max_pixels, max_bytes), None, texts, missing)
        except BadSample as error:
            return _Seen(error.key, None, str(error), {}, ())
        except BadImage as error:
            return _Seen(key, None, str(BadSample(shards.paths[shard].name, key, error.reason)), {}, missing)

    pictures, texts = Pictures(), {column: _Captions() for column in shards.caption}
    keys, missing, columns = array("Q"), Counter(), Counter()
    with ThreadPoolExecutor(num_threads()) as pool:
        for number, seen in enumerate(in_order(pool, read, range(total))):
            keys.append(_digest(seen.key.encode("utf-8", "surrogatepass")))
            missing.update(seen.missing)
            if seen.bad is not None:
                bad.append(seen.bad)
            else:
                pictures.add(number, seen.picture)
                columns.update(seen.captions.keys())
                for column, captions in texts.items():
                    for text in seen.captions.get(column, ()):
                        captions.add(text)
            if progress:
                progress(number + 1, total)
        compared = pictures.against(against, name, pool, max_distance, decode) if against is not None else None
    _, first, counts = np.unique(np.asarray(keys), return_index=True, return_counts=True)
    repeated = sorted(shards.key(*place(int(number))) for number in first[counts > 1])
    report = {
        "num_shards": len(shards.paths),
        "num_samples": total + num_bad_indexed,
        "num_good": len(pictures.number),
        "num_bad": len(bad),
        "bad_reasons": dict(Counter(plain_reason(entry.split(": ", 2)[-1]) for entry in bad).most_common()),
        "bad": bad,
        "decoded": decode,
        "text_columns": dict(columns.most_common()),  # what a recipe's `caption:` can choose from, and in how many good samples it is
        "captions": {column: captions.report() for column, captions in texts.items()},
        "num_duplicate_keys": len(repeated),
        "duplicate_keys": repeated,
        **pictures.report(name, hashed=decode, max_distance=max_distance),
    }
    if compared is not None:
        report["against"] = compared
    if expect is not None:
        report["expect"] = _arrived(shards.paths, expect, fields, missing, total, cache_dir)
    return report


# ------------------------------------------------------------------------------------------------------ what should be there


def _expected_fields(dataset: str) -> tuple[str, ...]:
    if dataset not in EXPECTED:
        raise UserError(f"--expect {dataset}: is none of {', '.join(EXPECTED)}")
    return DOWNLOAD_KEYS + EXPECTED[dataset]


def _arrived(
    paths: Sequence[Path], dataset: str, fields: Sequence[str], missing: Mapping[str, int], total: int, cache_dir: str | os.PathLike | None
) -> dict:
    """Compare shards with the files img2dataset writes beside them: `NNNNN.parquet` (a row per address, failed ones too)
    and `NNNNN_stats.json`. `missing` counts samples whose .json lacks a field. `problems` is empty when all is there."""
    problems = [f".json of {missing[name]} of {total} samples: no '{name}'{_advice(name)}" for name in fields if missing.get(name)]
    without_column: dict[str, list[str]] = {}
    counts, failures = Counter(), Counter()
    for path in paths:
        header, _ = open_index(path, cache_dir)
        in_tar = sum(header["column_counts"].values()) + header["num_bad"]
        stats = _read_stats(path.with_name(f"{path.stem}_stats.json"))
        if isinstance(stats, str):
            problems.append(stats)
        else:
            counts.update({name: stats[name] for name in ("count", "successes", "failed_to_download", "failed_to_resize")})
            failures.update({reason: n for reason, n in stats["status_dict"].items() if reason != "success"})
            if stats["successes"] != in_tar:
                problems.append(
                    f"{path.name}: holds {in_tar} samples, {path.stem}_stats.json says {stats['successes']}: "
                    "incomplete; delete both and run the same img2dataset command again"
                )
        table = path.with_suffix(".parquet")
        columns, rows = _read_schema(table)
        if columns is None:
            problems.append(rows)
            continue
        for name in fields:
            if name not in columns:
                without_column.setdefault(name, []).append(table.name)
        if not isinstance(stats, str) and rows != stats["count"]:
            problems.append(f"{table.name}: {rows} rows, {path.stem}_stats.json says {stats['count']}")
    for name, tables in without_column.items():
        problems.append(f"{tables[0]}{f' and {len(tables) - 1} more' if len(tables) > 1 else ''}: no column '{name}'{_advice(name)}")
    arrived = round(counts["successes"] / counts["count"], 4) if counts["count"] else None
    return {"dataset": dataset, "problems": problems, **counts, "share_arrived": arrived, "failures": dict(failures.most_common(20))}


def _advice(name: str) -> str:
    if name == "caption":
        return " (give --caption_col and download again)"
    return "" if name in DOWNLOAD_KEYS else " (add it to --save_additional_columns and download again)"


def _read_stats(path: Path) -> dict | str:
    """A shard's statistics, or what is wrong with them."""
    try:
        stats = json.loads(path.read_bytes())
        numbers = [stats[name] for name in ("count", "successes", "failed_to_download", "failed_to_resize")]
        if all(isinstance(n, int) for n in [*numbers, *stats["status_dict"].values()]):
            return stats
    except FileNotFoundError:
        return f"{path.name}: is not there: the shard's download was not finished; run the same img2dataset command again"
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    return f"{path.name}: is not what img2dataset writes"


def _read_schema(path: Path) -> tuple[set[str] | None, Any]:
    """(column names, number of rows), or (None, what is wrong)."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        return set(table.schema_arrow.names), table.metadata.num_rows
    except FileNotFoundError:
        return None, f"{path.name}: is not there; it belongs beside the tar file"
    except (OSError, pyarrow.ArrowException) as error:
        return None, f"{path.name}: cannot be read ({error})"


# -------------------------------------------------------------------------------------------------------- conversations


def check_pictures(
    paths: Sequence[str],
    *,
    decode: bool,
    against: str | os.PathLike | None = None,
    max_distance: int = NEAR,
    progress: Progress | None = None,
) -> dict:
    """Look at picture files (those of conversations): sizes, formats, duplicates, every bad one by name; as `check`."""
    hashed = decode or against is not None

    def read(path: str) -> Look | str:
        try:
            with open(path, "rb") as file:
                return look(file.read(MAX_BYTES + 1), decode, hashed)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        except BadImage as error:
            return error.reason

    pictures, bad = Pictures(), []
    with ThreadPoolExecutor(num_threads()) as pool:
        for number, seen in enumerate(in_order(pool, read, paths)):
            if isinstance(seen, str):
                bad.append(f"{paths[number]}: {seen}")
            else:
                pictures.add(number, seen)
            if progress:
                progress(number + 1, len(paths))
        compared = pictures.against(against, paths.__getitem__, pool, max_distance, decode) if against is not None else None
    report = {
        "num_pictures": len(paths),
        "num_bad_pictures": len(bad),
        "bad_picture_reasons": dict(Counter(plain_reason(entry.rpartition(": ")[2]) for entry in bad).most_common()),
        "bad_pictures": bad,
        "decoded": decode,
        **pictures.report(paths.__getitem__, hashed=decode, max_distance=max_distance),
    }
    return report if compared is None else report | {"against": compared}
