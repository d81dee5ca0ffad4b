"""One memory-mapped file for all the shard indexes of a source: 29 bytes a sample, read where a sample is wanted.

Ten thousand small index files take minutes to open on a network disk, one file takes milliseconds. The manifest is only
a copy: every shard's own index stays the source of truth, a manifest whose shards have another name, size or time is not
used, and a sample that does not fit its fixed-size row (a very long caption, a key without a number at its end, members
far apart) is looked up in its shard's own index.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

MANIFEST_VERSION = 1
BLOCK = 512  # of a tar: members start at multiples of it, after one block of header
_MAGIC = b"AIMv2mft"
_HEAD = struct.Struct("<8sQQ")  # magic, where the rows end and the tables begin, bytes of the tables
_ELSEWHERE = 255  # layout of a row that says: see the shard's own index

# A sample's members in the order in which they stand in the tar, each right behind the one before.
LAYOUTS = [
    ("image",), ("image", "text"), ("text", "image"), ("image", "metadata"), ("metadata", "image"),
    ("image", "text", "metadata"), ("image", "metadata", "text"), ("text", "image", "metadata"),
    ("text", "metadata", "image"), ("metadata", "image", "text"), ("metadata", "text", "image"),
]  # fmt: skip
_ROW = np.dtype([
    ("block", "<u4"),  # of the first member's data
    ("image", "<u4"), ("image_crc", "<u4"), ("text", "<u2"), ("text_crc", "<u4"), ("metadata", "<u2"), ("metadata_crc", "<u4"),
    ("key", "<u2"),  # added to the shard's first number
    ("kind", "<u2"),  # which caption columns the sample has
    ("layout", "u1"),
])  # fmt: skip
BYTES_PER_SAMPLE = _ROW.itemsize
_SHARD = np.dtype([
    ("size", "<u8"), ("mtime_ns", "<i8"), ("digest", "S32"), ("row", "<u8"), ("num_rows", "<u4"), ("crc", "<u4"),
    ("key_number", "<u8"), ("key_prefix", "<u4"), ("key_width", "u1"), ("num_bad", "<u4"), ("num_damaged", "<u4"),
])  # fmt: skip
_COUNT = np.dtype([("shard", "<u4"), ("kind", "<u4"), ("count", "<u4")])


class Entry(NamedTuple):
    """One sample of an index: members as (offset, size, crc32) in bytes, None where there is none."""

    key: str
    image: tuple[int, int, int]
    text: tuple[int, int, int] | None
    metadata: tuple[int, int, int] | None
    columns: frozenset[str]


class Packed(NamedTuple):
    """What the manifest keeps of one shard's index; `rows` have the shard's own column masks (`masks`) as kinds."""

    header: dict[str, Any]
    rows: bytes
    masks: list[int]
    key_prefix: str
    key_number: int
    key_width: int


# ------------------------------------------------------------------------------------------------------------------ pack


def pack_index(header: Mapping[str, Any], body: Mapping[str, Any]) -> Packed | None:
    """Fixed-size rows of one shard's index (`shards.build_index`); None when the shard has too many kinds of samples."""
    number = len(body["key"])
    members = {kind: np.array(body[kind], dtype=np.int64).reshape(-1, 3) for kind in ("image", "text", "metadata")}
    rows = np.zeros(number, dtype=_ROW)
    masks = sorted(set(body["mask"]))
    if len(masks) > 2**16:
        return None
    kind_of = {mask: kind for kind, mask in enumerate(masks)}
    rows["kind"] = [kind_of[mask] for mask in body["mask"]]
    rows["layout"] = _ELSEWHERE
    present = {kind: table[:, 0] >= 0 for kind, table in members.items()}
    fits = np.ones(number, dtype=bool)
    for kind, table in members.items():
        fits &= table[:, 1] <= np.iinfo(_ROW[kind]).max
        rows[kind], rows[f"{kind}_crc"] = np.where(fits, table[:, 1], 0), table[:, 2]
    for code, order in enumerate(LAYOUTS):
        first = members[order[0]][:, 0]
        right = fits & (first % BLOCK == 0) & (first >= 0) & (first // BLOCK < 2**32)
        at = first
        for kind in members:
            right &= present[kind] == (kind in order)
        for kind in order:
            right &= members[kind][:, 0] == at
            at = at + (-(-members[kind][:, 1] // BLOCK) + 1) * BLOCK
        rows["block"][right], rows["layout"][right] = first[right] // BLOCK, code
    prefix, width, numbers = _numbered(body["key"])
    base = min((n for n in numbers if n is not None), default=0)
    for row, n in enumerate(numbers):
        if n is None or n - base >= 2**16:
            rows["layout"][row] = _ELSEWHERE
        else:
            rows["key"][row] = n - base
    return Packed(dict(header), rows.tobytes(), masks, prefix, base, width)


def _numbered(keys: Sequence[str]) -> tuple[str, int, list[int | None]]:
    """(prefix, width, numbers): key = prefix + number with zeros to the width; None for a key of another form."""
    match = re.fullmatch(r"(.*?)([0-9]{1,18})", keys[0], re.DOTALL) if keys else None
    if match is None:
        return "", 0, [None] * len(keys)
    prefix = match[1]
    # 0007 has its zeros; of 7 and 12 the width is that of the number itself
    width = len(match[2]) if len({len(key) for key in keys}) == 1 or match[2][0] == "0" else 0
    numbers: list[int | None] = []
    for key in keys:
        digits = key[len(prefix) :]
        number = int(digits) if key.startswith(prefix) and re.fullmatch(r"[0-9]{1,18}", digits) else None
        numbers.append(number if number is not None and prefix + str(number).zfill(width) == key else None)
    return prefix, width, numbers


def write_manifest(file: IO[bytes], names: str, shards: Iterable[Packed | None]) -> None:
    """Write the manifest of `shards`, in order, to a seekable file. names: digest of the list of shards.

    Raises ValueError when there are more kinds of samples than a row can name.
    """
    shard_rows, counts = [], []
    kinds: dict[frozenset[str], int] = {}
    prefixes: dict[str, int] = {}
    file.write(bytes(_HEAD.size))
    row = 0
    for number, packed in enumerate(shards):
        if packed is None:
            raise ValueError("too many kinds of samples")
        header, columns = packed.header, packed.header["columns"]
        globally = np.zeros(max(1, len(packed.masks)), dtype=np.uint16)
        for local, mask in enumerate(packed.masks):
            kind = kinds.setdefault(frozenset(name for bit, name in enumerate(columns) if mask >> bit & 1), len(kinds))
            if kind >= 2**16:
                raise ValueError("too many kinds of samples")
            globally[local] = kind
            counts.append((number, kind, header["column_counts"][str(mask)]))
        rows = np.frombuffer(packed.rows, dtype=_ROW).copy()
        rows["kind"] = globally[rows["kind"]]
        data = rows.tobytes()
        file.write(data)
        shard_rows.append((
            header["size"], header["mtime_ns"], header["digest"].encode(), row, len(rows), zlib.crc32(data), packed.key_number,
            prefixes.setdefault(packed.key_prefix, len(prefixes)), packed.key_width, header["num_bad"], header["num_damaged"],
        ))  # fmt: skip
        row += len(rows)
    tables = np.array(shard_rows, dtype=_SHARD).tobytes() + np.array(counts, dtype=_COUNT).tobytes()
    facts = {
        "version": MANIFEST_VERSION, "names": names, "num_shards": len(shard_rows), "num_counts": len(counts), "num_rows": row,
        "kinds": [sorted(kind) for kind in kinds], "key_prefixes": list(prefixes),
    }  # fmt: skip
    text = json.dumps(facts).encode()
    file.write(tables + text + hashlib.sha256(tables + text).digest())
    file.seek(0)
    file.write(_HEAD.pack(_MAGIC, _HEAD.size + row * _ROW.itemsize, len(tables)))


def names_digest(paths: Iterable[str | os.PathLike]) -> str:
    """Digest of a list of shards, by name and order."""
    return hashlib.sha256("\0".join(map(os.fspath, paths)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------------------------ read


class Manifest:
    """A written manifest. Raises ValueError or OSError for a file that is none, is damaged or is of another version.

    names: `names_digest` of its shards. size, mtime_ns, num_bad, num_damaged: (shards,) int64. digests: the shards'
    index digests. Only what is asked for is read: `rows` copies one shard's rows.
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._map) < _HEAD.size:
            raise ValueError("cut off")
        magic, tail_at, length = _HEAD.unpack_from(self._map)
        tail = self._map[tail_at:]
        if magic != _MAGIC or len(tail) < length + 32 or hashlib.sha256(tail[:-32]).digest() != tail[-32:]:
            raise ValueError("no manifest, or a damaged one")
        self.identity = tail[-32:].hex()
        facts = json.loads(tail[length:-32])
        if facts["version"] != MANIFEST_VERSION or _HEAD.size + facts["num_rows"] * _ROW.itemsize != tail_at:
            raise ValueError("a manifest of another version")
        self.names: str = facts["names"]
        self._prefixes: list[str] = facts["key_prefixes"]
        self._kinds = [frozenset(columns) for columns in facts["kinds"]]
        self._shards = np.frombuffer(tail, dtype=_SHARD, count=facts["num_shards"])
        self._counts = np.frombuffer(tail, dtype=_COUNT, count=facts["num_counts"], offset=self._shards.nbytes)
        self.size, self.mtime_ns, self.num_bad, self.num_damaged = (
            self._shards[name].astype(np.int64) for name in ("size", "mtime_ns", "num_bad", "num_damaged")
        )
        self.digests = [digest.decode() for digest in self._shards["digest"].tolist()]

    def __len__(self) -> int:
        return len(self._shards)

    def num_samples(self, caption: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """(usable, all) samples with a position of every shard, (shards,) int64; usable ones have a column of `caption`."""
        weights = self._counts["count"] * self._wanted(caption)[self._counts["kind"]]
        counts = [np.bincount(self._counts["shard"], w, len(self)).astype(np.int64) for w in (weights, self._counts["count"])]
        return counts[0], counts[1]

    def rows(self, shard: int, caption: Iterable[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """(rows, numbers of the usable ones) of one shard, None when they are damaged."""
        facts = self._shards[shard]
        begin = _HEAD.size + int(facts["row"]) * _ROW.itemsize
        data = self._map[begin : begin + int(facts["num_rows"]) * _ROW.itemsize]
        # Pages read stay mapped until told otherwise; the copy is all that is needed of them.
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, page, begin + len(data) - page)
        if zlib.crc32(data) != facts["crc"]:
            return None
        rows = np.frombuffer(data, dtype=_ROW)
        return rows, np.flatnonzero(self._wanted(caption)[rows["kind"]])

    def entry(self, shard: int, row: np.void) -> Entry | None:
        """A row of `rows(shard)` in words; None when the shard's own index must be asked."""
        block, image, image_crc, text, text_crc, metadata, metadata_crc, key, kind, layout = row.item()
        if layout == _ELSEWHERE:
            return None
        facts = self._shards[shard]
        sizes = {"image": (image, image_crc), "text": (text, text_crc), "metadata": (metadata, metadata_crc)}
        members: dict[str, tuple[int, int, int]] = {}
        for name in LAYOUTS[layout]:
            size, crc = sizes[name]
            members[name] = (block * BLOCK, size, crc)
            block += -(-size // BLOCK) + 1
        number = str(int(facts["key_number"]) + key).zfill(int(facts["key_width"]))
        return Entry(
            self._prefixes[facts["key_prefix"]] + number, members["image"], members.get("text"), members.get("metadata"),
            self._kinds[kind],
        )  # fmt: skip

    def _wanted(self, caption: Iterable[str]) -> np.ndarray:
        columns = set(caption)
        return np.array([bool(kind & columns) for kind in self._kinds] or [False])
