"""Image-text shards in img2dataset's layout: writing, indexing once, and reading any sample by offset.

A shard is a plain tar of `<key>.jpg|png|webp…`, `<key>.txt`, `<key>.json`. One pass writes an index beside it
(offset, size and crc32 of every member, grouped by sample); after that a sample is three `pread` calls and nothing in
the archive is ever extracted or executed. What the pass can see to be bad is counted with a reason and never gets a
position (decision 2 of the design).
"""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import queue
import re
import tarfile
import tempfile
import threading
import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from aimv2_vlm.config import UserError
from aimv2_vlm.data.manifest import BLOCK, Entry, Manifest, Packed, names_digest, pack_index, write_manifest
from aimv2_vlm.data.remote import RemoteShard, ShardCache, check_url, find, is_url
from aimv2_vlm.train.directory import LOCK, acquire_lock

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
# Members that some reader somewhere would unpickle or import. A sample that carries one is refused as a whole.
FORBIDDEN_EXTENSIONS = frozenset("pyd pth pt pkl pickle npy npz joblib dill py pyc so".split())
INDEX_VERSION = 1
INDEX_SUFFIX = ".index.json"
MAX_TEXT_BYTES = 16 * 2**20  # a caption or metadata member above this is refused
MAX_NAME_BYTES = 2**16  # long names and pax records above this are refused
MANIFEST_SHARDS = 64  # from so many shards on their indexes are also kept in one file (manifest.py)
RETRY_WAITS = (0.1, 0.5, 2.0)  # seconds before a shard that cannot be opened or read is tried again
DEFAULT_CACHE_BYTES = 100 * 2**30  # of local copies of remote shards
PARALLEL_BYTES = 2**28  # below this, starting processes takes longer than indexing


class BadSample(Exception):
    """A sample that has a position but cannot be used. `str()` names shard, key and reason."""

    def __init__(self, shard_name: str, key: str, reason: str):
        super().__init__(f"{shard_name}: {key}: {reason}")
        self.shard_name, self.key, self.reason = shard_name, key, reason


def too_many_bytes(size: int, limit: float) -> str:
    """The reason given for a picture that is not read."""
    return f"{size} bytes, over the limit of {int(limit)}"


@dataclass(frozen=True)
class RawSample:
    key: str
    image_bytes: bytes
    caption: str
    shard_name: str


class Draws(Protocol):
    """The random draws of one sample (`order.draws`)."""

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float: ...

    def integers(self, low: int, high: int) -> int: ...


# ------------------------------------------------------------------------------------------------------------------
# files


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a binary file that becomes visible only when complete: temporary name, fsync, rename."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    """Atomic, human-readable JSON."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def expand_pattern(patterns: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    """Shard paths for `dir/{00000..00003}.tar`, `dir/{a,b}.tar`, a glob, a folder, or a list of these.

    The order is that of the pattern (globs and folders sorted). Raises UserError when nothing matches, when a file of
    a brace range is missing, when a file is named twice, and for URLs (`ShardSet` reads those of stores).
    """
    names = _expand_names(patterns)
    urls = [name for name in names if is_url(name)]
    if urls:
        raise UserError(f"shards '{urls[0]}': only local paths can be read here; copy the shards to a local folder first")
    return list(map(Path, names))


def _expand_names(patterns: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """`expand_pattern` as strings: of ten thousand shards, Path objects would take most of the time of opening."""
    items = [patterns] if isinstance(patterns, (str, os.PathLike)) else list(patterns)
    names = [name for item in items for name in _expand_one(os.fspath(item))]
    if not names:
        raise UserError(f"shards {items}: the pattern names no tar file; check the path")
    folders: dict[str, tuple[str, set[str]]] = {}
    real = []
    for name in names:
        folder, slash, base = name.rpartition("/")
        if is_url(folder + slash):
            real.append(name)
            continue
        if folder not in folders:
            where = folder + slash or "."
            links = {entry.name for entry in os.scandir(where) if entry.is_symlink()}
            folders[folder] = os.path.realpath(where), links
        where, links = folders[folder]
        # only a link can be the same file under another name of the same folder
        real.append(os.path.realpath(name) if base in links else f"{where}/{base}")
    repeated = [name for name, count in Counter(real).items() if count > 1]
    if repeated:
        raise UserError(f"shards {items}: {repeated[0]} is named more than once; name every shard once")
    return names


def _expand_one(pattern: str) -> list[str]:
    if is_url(pattern):
        urls = _expand_braces(check_url(pattern))
        return [url for name in urls for url in (find(name) if re.search(r"[*?\[]", name) else [name])]
    if os.path.isdir(pattern):
        found = sorted(os.path.join(pattern, name) for name in os.listdir(pattern) if name.endswith(".tar"))
        if not found:
            raise UserError(f"shards '{pattern}': the folder holds no .tar file")
        return found
    expanded = _expand_braces(os.path.expanduser(pattern))
    names: list[str] = []
    missing: list[str] = []
    for name in expanded:
        # A name that exists as it stands is that file, even when it contains a bracket.
        hits = [name] if os.path.exists(name) else sorted(glob.glob(name))
        names += hits
        if not hits:
            missing.append(name)
    if missing:
        what = f"no file '{missing[0]}'" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise UserError(f"shards '{pattern}': {what} ({len(missing)} of {len(expanded)} missing); check the path")
    return names


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    before, body, after = pattern[: match.start()], match[1], pattern[match.end() :]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if bounds:
        low, high = int(bounds[1]), int(bounds[2])
        if high < low or high - low >= 10_000_000:
            raise UserError(f"shards '{pattern}': the range {{{body}}} is empty or too long")
        values = [str(number).zfill(len(bounds[1])) for number in range(low, high + 1)]
    else:
        values = body.split(",")
    tails = _expand_braces(after)
    return [before + value + tail for value in values for tail in tails]


# ----------------------------------------------------------------------------------------------------------------
# writing


def write_shards(
    rows: Iterable[dict], out_dir: str | os.PathLike, samples_per_shard: int = 1000, start: int = 0
) -> list[Path]:
    """Write rows as img2dataset does: `00000.tar`, `00000.parquet`, `00000_stats.json`, …; returns the tar paths.

    A row is {"key": str | None, "image_bytes": bytes, "ext": "jpg", "caption": str, "json": dict}; a missing key
    becomes `<shard:05d><sample:04d>`. The same rows give the same tar, byte for byte. Every file appears only when
    complete.
    """
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard = {samples_per_shard}: must be at least 1")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    iterator, paths = iter(rows), []
    for shard in itertools.count(start):
        first = next(iterator, None)
        if first is None:
            return paths
        batch = itertools.chain([first], itertools.islice(iterator, samples_per_shard - 1))
        paths.append(_write_shard(batch, out_dir, shard))
    raise AssertionError("unreachable")


def _write_shard(rows: Iterable[dict], out_dir: Path, shard: int) -> Path:
    path = out_dir / f"{shard:05d}.tar"
    table: list[dict] = []
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, row in enumerate(rows):
            key = row.get("key")
            if key is None:
                key = f"{shard:05d}{number:04d}"
            extension = row["ext"].lower().lstrip(".")
            if not re.fullmatch(r"[^./\\\x00]+", key):
                raise ValueError(f"key {key!r}: a key may not be empty or contain a dot or a slash")
            if extension not in IMAGE_EXTENSIONS:
                raise ValueError(f"key {key}: extension {extension!r} is none of {', '.join(IMAGE_EXTENSIONS)}")
            metadata = {**row.get("json", {}), "caption": row["caption"], "key": key, "status": "success"}
            table.append(metadata)
            for name, data in (
                (f"{key}.{extension}", row["image_bytes"]),
                (f"{key}.txt", row["caption"].encode()),
                (f"{key}.json", json.dumps(metadata, ensure_ascii=False).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
    _write_parquet(out_dir / f"{shard:05d}.parquet", table)
    write_json(
        out_dir / f"{shard:05d}_stats.json",
        {
            "count": len(table),
            "successes": len(table),
            "failed_to_download": 0,
            "failed_to_resize": 0,
            "status_dict": {"success": len(table)},
        },
    )
    return path


def _is_deep(value: Any, most: int = 8) -> bool:
    """Whether objects and lists lie within each other more than `most` times."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inside) and (most == 0 or any(_is_deep(part, most - 1) for part in inside))


def _write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(["key", "caption", *itertools.chain.from_iterable(rows)])
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    with atomic_file(path) as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)


def _column(values: list[Any]) -> Any:
    """A field of all rows as a pyarrow array of its own type; as JSON where parquet has none for it."""
    import pyarrow

    if not any(map(_is_deep, values)):  # a type of hundreds of levels takes gigabytes
        with contextlib.suppress(pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):  # mixed types in one field
            column = pyarrow.array(values)
            if "struct<>" not in str(column.type):  # an empty object
                return column
    return pyarrow.array([None if value is None else json.dumps(value) for value in values])


# --------------------------------------------------------------------------------------------------------------- tar
# walk


@dataclass(frozen=True)
class _Member:
    name: str
    header_offset: int
    offset: int  # of the data
    size: int
    crc: int
    data: bytes | None  # only of captions and metadata
    problem: str | None  # "link", "reaches past the end of the file", …


@dataclass(frozen=True)
class _Damage:
    offset: int
    reason: str


def _octal(field_bytes: bytes) -> int:
    """A tar number: octal text, or GNU's base 256. Raises ValueError."""
    if field_bytes[0] in (0x80, 0xFF):
        return int.from_bytes(field_bytes[1:], "big") - (
            1 << (8 * (len(field_bytes) - 1)) if field_bytes[0] == 0xFF else 0
        )
    text = field_bytes.split(b"\0", 1)[0].strip()
    if not re.fullmatch(rb"[0-7]*", text):
        raise ValueError("not octal")
    return int(text or b"0", 8)


def _is_header(block: bytes, need_magic: bool) -> bool:
    """Whether a 512-byte block is a tar header: its checksum is right (and it carries ustar's magic)."""
    if len(block) < BLOCK or (need_magic and block[257:262] != b"ustar"):
        return False
    try:
        stored = _octal(block[148:156])
    except ValueError:
        return False
    return stored == sum(block[:148]) + 8 * 32 + sum(block[156:]) and block[0] != 0


def _walk(file: IO[bytes], file_size: int) -> Iterator[_Member | _Damage]:
    """All members of a tar in one pass. A damaged header is reported and skipped up to the next block that is a
    header."""
    position, zeros_at, long_name, pax = 0, None, None, {}
    while position + BLOCK <= file_size:
        file.seek(position)
        block = file.read(BLOCK)
        if not block.strip(b"\0"):  # end mark, or two archives joined, or a hole in the file
            zeros_at = position if zeros_at is None else zeros_at
            position += BLOCK
            continue
        if not _is_header(block, need_magic=False):
            start = position
            position = _resynchronise(file, position + BLOCK, file_size)
            yield _Damage(start, f"damaged header at byte {start}, {position - start} bytes skipped")
            long_name, pax, zeros_at = None, {}, None
            continue
        if zeros_at is not None:
            yield _Damage(zeros_at, f"zeros from byte {zeros_at} to {position} inside the archive")
            zeros_at = None
        kind, header_offset, offset = block[156:157], position, position + BLOCK
        try:
            size = int(pax["size"]) if "size" in pax else _octal(block[124:136])
            if size < 0:
                raise ValueError("negative")
        except ValueError:
            position = _resynchronise(file, offset, file_size)
            yield _Damage(header_offset, f"header without a readable size at byte {header_offset}")
            long_name, pax = None, {}
            continue
        past_end = offset + size > file_size
        if kind in b"xgLK" and kind:  # about the next member, not a member
            if past_end or size > MAX_NAME_BYTES:
                yield _Damage(header_offset, f"unusable name record at byte {header_offset}")
                position = _resynchronise(file, offset, file_size)
                long_name, pax = None, {}
                continue
            record = file.read(size)
            if kind == b"x":
                pax = _parse_pax(record)
            elif kind == b"L":
                long_name = record.rstrip(b"\0")
            position = _next_block(offset + size)
            continue
        name_bytes = pax.get("path", long_name)
        if name_bytes is None:
            name_bytes = block[:100].split(b"\0", 1)[0]
            prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
            name_bytes = prefix + b"/" + name_bytes if prefix else name_bytes
        long_name, pax = None, {}
        name = name_bytes.decode("utf-8", "backslashreplace")
        problem, data, crc = None, None, 0
        if kind not in (b"0", b"\0", b"7"):
            if kind == b"5":
                position = offset
                continue
            problem = "is a link or a special file"
            size = size if kind == b"S" else 0
        elif past_end:
            problem = "reaches past the end of the file"
        if past_end:
            position = _resynchronise(file, offset, file_size)
        else:
            position = _next_block(offset + size)
            if problem is None:
                keep = size <= MAX_TEXT_BYTES and name.lower().endswith((".txt", ".json"))
                crc, data = _checksum(file, size, keep)
        yield _Member(name, header_offset, offset, size, crc, data, problem)
    if zeros_at is None and position < file_size:
        yield _Damage(position, f"incomplete header at byte {position}, the file is cut off")


def _next_block(position: int) -> int:
    return -(-position // BLOCK) * BLOCK


def _resynchronise(file: IO[bytes], position: int, file_size: int) -> int:
    """Offset of the next block that is a tar header with magic and right checksum; the end of the file if there is
    none."""
    while position + BLOCK <= file_size:
        file.seek(position)
        chunk = file.read(min(2**20, file_size - position))
        at = chunk.find(b"ustar")
        while at >= 0:
            if at % BLOCK == 257 and _is_header(chunk[at - 257 : at - 257 + BLOCK], need_magic=True):
                return position + at - 257
            at = chunk.find(b"ustar", at + 1)
        position += len(chunk) // BLOCK * BLOCK
    return file_size


def _parse_pax(record: bytes) -> dict[str, Any]:
    """`path` (bytes) and `size` (digits) of a pax record; anything else is ignored."""
    values: dict[str, Any] = {}
    for line in record.split(b"\n"):
        match = re.fullmatch(rb"\d{1,9} (path|size)=(.*)", line, re.DOTALL)
        if match and match[1] == b"path":
            values["path"] = match[2]
        elif match and re.fullmatch(rb"\d{1,19}", match[2]):
            values["size"] = match[2]
    return values


def _checksum(file: IO[bytes], size: int, keep: bool) -> tuple[int, bytes | None]:
    if keep:
        data = file.read(size)
        return zlib.crc32(data), data
    crc = 0
    while size > 0:
        chunk = file.read(min(size, 2**20))
        if not chunk:
            raise OSError("the file became shorter while it was read")
        crc, size = zlib.crc32(chunk, crc), size - len(chunk)
    return crc, None


# ------------------------------------------------------------------------------------------------------------------
# index


@dataclass
class _Open:
    """A sample whose members are still being collected."""

    key: str
    order: int
    image: tuple[int, int, int] | None = None
    text: tuple[int, int, int] | None = None
    metadata: tuple[int, int, int] | None = None
    columns: set[str] = field(default_factory=set)
    text_problem: str | None = None
    problems: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def _split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the last path component; the extension is lower-cased."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _collect(members: Iterable[_Member | _Damage]) -> tuple[list[_Open], list[_Damage]]:
    """Group members into samples by key; a key whose slot is taken already begins another sample of the same key."""
    open_samples: dict[str, _Open] = {}
    samples: list[_Open] = []
    damage: list[_Damage] = []
    for member in members:
        if isinstance(member, _Damage):
            previous = f" after {samples[-1].key}" if samples else " before the first sample"
            damage.append(_Damage(member.offset, member.reason + previous))
            continue
        key, extension = _split_name(member.name)
        sample = open_samples.get(key)
        slot = "image" if extension in IMAGE_EXTENSIONS else {"txt": "text", "json": "metadata"}.get(extension)
        taken = sample is not None and slot is not None and getattr(sample, slot) is not None
        if taken and slot == "image" and sample.text is None and sample.metadata is None:
            sample.problems.append("more than one picture")
        if sample is None or taken:
            sample = open_samples[key] = _Open(key, len(samples))
            samples.append(sample)
        _add(sample, member, extension, slot)
    return samples, damage


def _add(sample: _Open, member: _Member, extension: str, slot: str | None) -> None:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        sample.problems.append("member name leaves the archive's folder")
    if extension.rpartition(".")[2] in FORBIDDEN_EXTENSIONS:
        sample.problems.append(f"forbidden member .{extension} (never opened)")
    elif member.problem:
        sample.problems.append(f".{extension} {member.problem}")
    if slot is None:
        sample.others.append(extension)
        return
    setattr(sample, slot, (member.offset, member.size, member.crc))
    if member.problem:
        return
    if slot == "image":
        if member.size == 0:
            sample.problems.append("empty picture file")
    elif member.data is None:
        sample.problems.append(f".{extension} is larger than {MAX_TEXT_BYTES >> 20} MiB")
    elif slot == "text":
        try:
            if member.data.decode("utf-8").strip():
                sample.columns.add("txt")
            else:
                sample.text_problem = "empty caption"
        except UnicodeDecodeError:
            sample.text_problem = "caption is not UTF-8"
    else:
        try:
            metadata = json.loads(member.data)
        except (ValueError, RecursionError):
            metadata = None
        if not isinstance(metadata, dict):
            sample.problems.append("metadata is not a JSON object")
        else:
            sample.columns |= {f"json:{name}" for name, value in metadata.items() if _texts(value)}


def _texts(value: Any) -> list[str]:
    """The captions in one metadata field: a string, or a list of strings; blank ones do not count."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [text for text in values if isinstance(text, str) and text.strip()]


def scan_shard(tar_path: str | os.PathLike) -> tuple[list[_Member], list[_Open], list[_Damage]]:
    """Every member of a tar, the samples that they form (with what is wrong with them), and the tar's damage; for writing it
    anew. Reading goes by `build_index`."""
    with open(tar_path, "rb") as file:
        members = list(_walk(file, os.fstat(file.fileno()).st_size))
    return [member for member in members if isinstance(member, _Member)], *_collect(members)


def build_index(tar_path: str | os.PathLike) -> tuple[dict, dict]:
    """One pass over a tar -> (header, body), both JSON-ready.

    header: version, name, size, mtime_ns, columns (caption columns seen), column_counts ({bit mask over columns:
    number of samples}), num_bad, num_damaged, digest. body: per sample key, image / text / metadata as [offset, size,
    crc32] and its column mask; `bad` ({key, reason} of samples that get no position), `damage` ({offset, reason}),
    `text_problems` ({sample: reason}).
    """
    path = Path(tar_path)
    status = path.stat()
    with open(path, "rb", buffering=2**20) as file:
        samples, damage = _collect(_walk(file, status.st_size))
    names: dict[str, int] = {}
    body: dict[str, Any] = {
        "key": [],
        "image": [],
        "text": [],
        "metadata": [],
        "mask": [],
        "bad": [],
        "text_problems": {},
    }
    for sample in samples:
        if sample.image is None and not sample.problems:
            found = [*sample.others, *(["txt"] if sample.text else []), *(["json"] if sample.metadata else [])]
            sample.problems.append(f"no picture (members: {', '.join(found)})")
        if not sample.columns and not sample.problems:
            sample.problems.append(sample.text_problem or "no caption")
        if sample.problems:
            body["bad"].append({"key": sample.key, "reason": "; ".join(dict.fromkeys(sample.problems))})
            continue
        if sample.text is None and "json:caption" in sample.columns:
            sample.columns.add("txt")  # formats: a missing .txt falls back to the metadata's caption
        if sample.text_problem:
            body["text_problems"][str(len(body["key"]))] = sample.text_problem
        body["key"].append(sample.key)
        body["image"].append(sample.image)
        body["text"].append(sample.text or (-1, 0, 0))
        body["metadata"].append(sample.metadata or (-1, 0, 0))
        body["mask"].append(sum(1 << names.setdefault(name, len(names)) for name in sorted(sample.columns)))
    body["damage"] = [{"offset": item.offset, "reason": item.reason} for item in damage]
    body["columns"] = list(names)
    header = {
        "version": INDEX_VERSION,
        "name": path.name,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "columns": list(names),
        "column_counts": {str(mask): count for mask, count in sorted(Counter(body["mask"]).items())},
        "num_bad": len(body["bad"]),
        "num_damaged": len(damage),
        "digest": _digest(_dump(body)),
    }
    return header, body


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def index_path(tar_path: Path, cache_dir: str | os.PathLike | None) -> Path:
    """Where a shard's index stands: beside it, or in `cache_dir` under a name that carries the folder."""
    if cache_dir is None:
        return tar_path.with_name(tar_path.name + INDEX_SUFFIX)
    folder = hashlib.sha256(os.fsencode(tar_path.resolve().parent)).hexdigest()[:16]
    return Path(cache_dir) / f"{folder}-{tar_path.name}{INDEX_SUFFIX}"


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aimv2_vlm" / "indexes"


def _index_paths(tar_path: Path, cache_dir: str | os.PathLike | None) -> list[Path]:
    """Where a shard's index may stand, the preferred place first."""
    candidates = [index_path(tar_path, None), index_path(tar_path, cache_dir or default_cache_dir())]
    return candidates if cache_dir is None else candidates[::-1]


def _status(tar_path: str | os.PathLike) -> os.stat_result:
    try:
        return os.stat(tar_path)
    except OSError as error:
        raise UserError(f"{tar_path}: cannot be opened ({error.strerror})") from error


def open_index(tar_path: Path, cache_dir: str | os.PathLike | None = None) -> tuple[dict, Path]:
    """(header, path) of a shard's index; built when absent, of another version, or when the tar's size or time
    changed."""
    status = _status(tar_path)
    candidates = _index_paths(tar_path, cache_dir)
    for candidate in candidates:
        header = _read_header(candidate)
        if header and (header["size"], header["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
            return header, candidate
    if status.st_size == 0:
        raise UserError(f"{tar_path}: the shard is empty (0 bytes); remove it or download it again")
    try:
        header, body = build_index(tar_path)
    except OSError as error:
        raise UserError(f"{tar_path}: cannot be read ({error.strerror or error})") from error
    failure: OSError | None = None
    for candidate in candidates:
        try:
            if not candidate.parent.is_dir():
                candidate.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(candidate) as file:
                file.write(_dump(header) + b"\n" + _dump(body) + b"\n")
            return header, candidate
        except OSError as error:
            failure = error
    raise UserError(f"{candidates[-1]}: the index cannot be written ({failure}); give a writable data.cache_dir")


def _read_header(path: Path) -> dict | None:
    try:
        with open(path, "rb") as file:
            return _parse_header(file.readline(2**24))
    except OSError:
        return None


def _parse_header(line: bytes) -> dict | None:
    try:
        header = json.loads(line)
        well_formed = (
            header["version"] == INDEX_VERSION
            and isinstance(header["columns"], list)
            and all(isinstance(name, str) for name in header["columns"])
            and isinstance(header["digest"], str)
            and all(type(header[name]) is int for name in ("size", "mtime_ns", "num_bad", "num_damaged"))
            and all(
                re.fullmatch(r"[1-9][0-9]{0,4000}", mask) and type(count) is int and 0 < count <= header["size"]
                for mask, count in header["column_counts"].items()
            )
        )
        return header if well_formed else None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class _Body:
    """A shard's loaded index: arrays over all samples with a picture; `usable` selects those with a wanted caption."""

    keys: list[str]
    members: dict[str, np.ndarray]  # image, text, metadata -> (samples, 3) offset, size, crc32
    masks: list[int]
    columns: list[str]
    usable: np.ndarray
    bad: list[dict]
    damage: list[dict]

    def entry(self, index: int) -> Entry:
        columns = frozenset(name for bit, name in enumerate(self.columns) if self.masks[index] >> bit & 1)
        image, text, metadata = (tuple(map(int, self.members[kind][index])) for kind in ("image", "text", "metadata"))
        return Entry(self.keys[index], image, text if text[0] >= 0 else None, metadata if metadata[0] >= 0 else None, columns)


def _open_index_of(shard: Path | RemoteShard, cache_dir: str | os.PathLike | None) -> tuple[dict, Path]:
    """`open_index`; a remote shard is fetched only when it has no index yet."""
    if not isinstance(shard, RemoteShard):
        return open_index(shard, cache_dir)
    where = index_path(shard.path, None)
    header = _read_header(where)
    if header is not None and (header["size"], header["mtime_ns"]) == (shard.size, shard.mtime_ns):
        return header, where
    with shard.open():
        return open_index(shard.path, cache_dir)


def _open_and_pack(shard: Path | RemoteShard, cache_dir: str | os.PathLike | None, packed: bool) -> tuple[dict, Packed | None]:
    """(index header, its rows for the manifest if wanted); runs in the processes that build indexes."""
    header, where = _open_index_of(shard, cache_dir)
    return header, pack_index(header, _read_body(where, header["digest"])) if packed else None


def _read_body(path: Path, digest: str) -> dict:
    """An index's body, its checksum verified. Raises UserError."""
    try:
        with open(path, "rb") as file:
            header = _parse_header(file.readline(2**24))
            data = file.read().rstrip(b"\n")
    except OSError as error:
        raise UserError(f"{path}: the index disappeared while in use ({error.strerror})") from error
    body = _parse_body(data, header) if header and _digest(data) == digest else None
    if body is None:
        raise UserError(f"{path}: the index is damaged or was rebuilt for other data; delete it and start again")
    return body


def _parse_body(data: bytes, header: dict) -> dict | None:
    """The body that belongs to an index's header, None when it does not. Indexes come with downloaded shards: whatever
    they say, nothing is read from outside the shard."""
    try:
        body = json.loads(data)
        number, masks = len(body["key"]), Counter(body["mask"])
        well_formed = (
            all(isinstance(body[name], list) for name in ("key", "mask", "bad", "damage"))
            and all(isinstance(key, str) for key in body["key"])
            and body["columns"] == header["columns"]
            and {str(mask): count for mask, count in masks.items()} == header["column_counts"]
            and all(type(mask) is int and 0 < mask < 1 << len(body["columns"]) for mask in masks)
            and all(_is_members(body[kind], number, kind == "image", header["size"]) for kind in ("image", "text", "metadata"))
            and len(body["bad"]) == header["num_bad"]
            and len(body["damage"]) == header["num_damaged"]
            and all(isinstance(item["key"], str) and isinstance(item["reason"], str) for item in body["bad"])
            and all(isinstance(item["reason"], str) for item in body["damage"])
            and all(isinstance(reason, str) for reason in body["text_problems"].values())
        )
        return body if well_formed else None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _is_members(table: list, number: int, required: bool, file_size: int) -> bool:
    """Whether `table` is [offset, size, crc32] for each of `number` samples, all inside the file; offset -1: none."""
    if not number:
        return table == []
    values = np.array(table)
    if values.dtype != np.int64 or values.shape != (number, 3):
        return False
    inside = (values[:, :2] >= 0).all(1) & (values[:, :2] <= file_size).all(1) & (values[:, :2].sum(1) <= file_size)
    absent = (values == (-1, 0, 0)).all(1) & (not required)
    return bool((inside | absent).all() and (values[:, 2] >= 0).all() and (values[:, 2] < 2**32).all())


def open_indexes(
    shards: Sequence[Path | RemoteShard],
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
    num_processes: int | None = None,
    packed: bool = False,
) -> Iterator[tuple[dict, Packed | None]]:
    """`open_index` of many shards, in order: (header, rows for a manifest if `packed`) each.

    Indexes that must be built are built by `num_processes` processes (None: one a core); the files are the same for
    any number. Where there is little to do, or processes cannot be started, this process does the work.
    """
    count = min(len(os.sched_getaffinity(0)) if num_processes is None else num_processes, len(shards))
    missing = 0
    if count > 1 and not multiprocessing.current_process().daemon:
        for shard in shards:
            if missing >= PARALLEL_BYTES:
                break
            path = shard.path if isinstance(shard, RemoteShard) else shard
            if not any(candidate.exists() for candidate in _index_paths(path, cache_dir)):
                missing += shard.size if isinstance(shard, RemoteShard) else _status(path).st_size
    done = 0
    if missing >= PARALLEL_BYTES:
        # Python and not the checksum takes most of the time, so threads would wait for each other.
        pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
        try:
            for result in pool.map(_open_and_pack, shards, itertools.repeat(cache_dir), itertools.repeat(packed)):
                done += 1
                if progress:
                    progress(done, len(shards))
                yield result
        except BrokenProcessPool:
            pass  # a script without a main guard, or a process killed for memory: go on alone
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for shard in shards[done:]:
        result = _open_and_pack(shard, cache_dir, packed)
        done += 1
        if progress:
            progress(done, len(shards))
        yield result


# ---------------------------------------------------------------------------------------------------------------
# shard set


def manifest_name(patterns: str | os.PathLike | Sequence[str | os.PathLike]) -> str:
    """File name of a source's manifest: one for one way of naming the shards, so that a source that grew replaces it."""
    items = [patterns] if isinstance(patterns, (str, os.PathLike)) else patterns
    return f"manifest-{names_digest(item if is_url(os.fspath(item)) else os.path.abspath(item) for item in items)[:16]}.bin"


def _open_manifest(path: Path) -> Manifest | None:
    try:
        return Manifest(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def parse_caption(spec: str | Mapping[str, float]) -> dict[str, float]:
    """Caption columns with weights: `txt`, `json:<field>`, or a mapping of these to weights. Raises UserError."""
    columns = {spec: 1.0} if isinstance(spec, str) else dict(spec)
    for column, weight in columns.items():
        if column != "txt" and not re.fullmatch(r"json:.+", str(column), re.DOTALL):
            raise UserError(f"caption column '{column}': must be 'txt' or 'json:<field>'")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise UserError(f"caption column '{column}': weight {weight!r} must be a number that is not negative")
    columns = {column: float(weight) for column, weight in columns.items() if weight > 0}
    if not columns:
        raise UserError("caption columns: at least one needs a weight above 0")
    return columns


class ShardSet:
    """The usable samples of some shards, by (shard, sample) number.

    `num_samples[s]` counts what has a picture and at least one wanted caption column; `num_bad` what has none. From
    `manifest_shards` shards on their indexes are kept in one file too, so that opening takes milliseconds. Cheap to
    pickle; files and indexes are opened lazily in each process and at most `max_open` stay open. Shards may be URLs of
    stores (`remote.PROTOCOLS`): whole ones are kept in `shard_cache`, their indexes stay there, and `paths` are the copies.
    """

    def __init__(
        self,
        patterns: str | os.PathLike | Sequence[str | os.PathLike],
        caption: str | Mapping[str, float] = "txt",
        cache_dir: str | os.PathLike | None = None,
        max_open: int = 64,
        progress: Callable[[int, int], None] | None = None,
        manifest_shards: int = MANIFEST_SHARDS,
        num_processes: int | None = None,
        shard_cache: ShardCache | None = None,
    ):
        self.caption, self.max_open, self._cache_dir = parse_caption(caption), max_open, cache_dir
        names = _expand_names(patterns)
        self.remote = self._find_remote(names, shard_cache)
        self.paths = [shard.path for shard in self.remote] if self.remote else list(map(Path, names))
        self._manifest_path: Path | None = None
        self._manifest_identity = ""
        manifest = None
        if len(self.paths) >= manifest_shards:
            manifest = self._fresh_manifest(patterns, names, progress, num_processes)
        if manifest is not None:
            self._manifest_path, self._manifest_identity = manifest.path, manifest.identity
            usable, every = manifest.num_samples(self.caption)
            self.num_samples, self.digests = usable.tolist(), manifest.digests
            self.sizes = manifest.size.tolist()
            self._num_bad = (manifest.num_bad + manifest.num_damaged + every - usable).tolist()
        else:
            headers = [header for header, _ in open_indexes(self.remote or self.paths, cache_dir, progress, num_processes)]
            self.num_samples = [
                sum(count for mask, count in header["column_counts"].items() if int(mask) & self._wanted(header["columns"]))
                for header in headers
            ]
            self.sizes, self.digests = [header["size"] for header in headers], [header["digest"] for header in headers]
            self._num_bad = [
                header["num_bad"] + header["num_damaged"] + sum(header["column_counts"].values()) - count
                for header, count in zip(headers, self.num_samples)
            ]
        self._reset()

    @staticmethod
    def _find_remote(names: list[str], cache: ShardCache | None) -> list[RemoteShard]:
        """The shards behind URLs; empty for local ones."""
        urls = [name for name in names if is_url(name)]
        if not urls:
            return []
        if len(urls) < len(names):
            raise UserError(f"shards '{urls[0]}': a source is either URLs or local paths; make two sources of them")
        return (cache or ShardCache(default_cache_dir().parent / "shards", DEFAULT_CACHE_BYTES)).shards(urls)

    def read_ahead(self, shards: Sequence[int]) -> None:
        """Fetch remote shards in the background, in this order; nothing for local ones. Errors show when one is read."""
        if not self.remote or self._ahead[:2] == (os.getpid(), shards):
            return
        process, _, wanted = self._ahead
        if process != os.getpid():  # a forked worker has its parent's attributes but not its threads
            wanted = queue.SimpleQueue()
            threading.Thread(target=self._fetch_ahead, args=(wanted,), daemon=True).start()
        self._ahead = os.getpid(), shards, wanted
        for shard in shards:
            wanted.put(shard)

    def _fetch_ahead(self, wanted: queue.SimpleQueue) -> None:
        while True:
            with contextlib.suppress(UserError, OSError):
                self.remote[wanted.get()].fetch()

    def _fresh_manifest(
        self, patterns: Any, names: list[str], progress: Callable[[int, int], None] | None, num_processes: int | None
    ) -> Manifest | None:
        """The manifest of these shards as they are now, written anew when there is none; None when it cannot be."""
        file_name = manifest_name(patterns)
        folders = [self.paths[0].parent, Path(self._cache_dir or default_cache_dir())]
        if self.remote:
            folders = [self.remote[0].cache.folder]
        elif self._cache_dir is not None or len({name.rpartition("/")[0] for name in names}) > 1:
            folders.reverse()
        digest = names_digest(names)
        if self.remote:
            facts = np.array([(shard.size, shard.mtime_ns) for shard in self.remote], dtype=np.int64)
        else:
            facts = np.array([(status.st_size, status.st_mtime_ns) for status in map(_status, names)], dtype=np.int64)
        for folder in folders:
            manifest = _open_manifest(folder / file_name)
            if manifest is not None and manifest.names == digest and len(manifest) == len(self.paths):
                if np.array_equal(facts[:, 0], manifest.size) and np.array_equal(facts[:, 1], manifest.mtime_ns):
                    return manifest
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_file(folder / file_name) as file:
                    opened = open_indexes(self.remote or self.paths, self._cache_dir, progress, num_processes, packed=True)
                    write_manifest(file, digest, (pack for _, pack in opened))
            except ValueError:
                return None
            except OSError:
                continue
            return _open_manifest(folder / file_name)
        return None

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()
        self._bodies: OrderedDict[int, _Body] = OrderedDict()
        self._rows: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._ahead: tuple = (None, (), None)  # process, shards asked for last, queue of its fetching thread
        # Opened here and not handed on, so that every process has its own; one that was replaced since is not used.
        manifest = _open_manifest(self._manifest_path) if self._manifest_path else None
        self._manifest = manifest if manifest is not None and manifest.identity == self._manifest_identity else None

    def __getstate__(self) -> dict:
        left = ("_lock", "_files", "_bodies", "_rows", "_manifest", "_ahead")
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._reset()

    def _wanted(self, columns: list[str]) -> int:
        return sum(1 << bit for bit, name in enumerate(columns) if name in self.caption)

    def shard_facts(self) -> list[dict]:
        """Per shard: name, size in bytes, number of usable samples, index digest (for the fingerprint)."""
        return [
            {"name": path.name, "size": size, "count": count, "digest": digest}
            for path, size, count, digest in zip(self.paths, self.sizes, self.num_samples, self.digests)
        ]

    @property
    def num_bad(self) -> int:
        """How many lines `bad_samples` has, without reading them."""
        return sum(self._num_bad)

    def bad_samples(self, limit: int | None = None) -> list[str]:
        """'shard: key: reason' of everything without a position, and of damage that may have swallowed a sample; the
        first `limit` of them."""
        named: list[str] = []
        for shard, (path, count) in enumerate(zip(self.paths, self._num_bad)):
            if count and (limit is None or len(named) < limit):
                body = self._body(shard)
                named += [f"{path.name}: {item['key']}: {item['reason']}" for item in body.bad]
                named += [f"{path.name}: (damage): {item['reason']}" for item in body.damage]
        return named[:limit]

    def read(self, shard: int, sample: int, draws: Draws | None = None, max_bytes: float = math.inf) -> RawSample:
        """One sample by offset, checksums verified. `draws` chooses among several captions; None takes the first
        column's first.

        Raises BadSample when the bytes are not those that were indexed or the picture has more than `max_bytes` (it is
        not read then), UserError when the shard itself is gone.
        """
        entry, name = self._entry(shard, sample), self.paths[shard].name
        if entry.image[1] > max_bytes:
            raise BadSample(name, entry.key, too_many_bytes(entry.image[1], max_bytes))
        image = self._member(shard, entry.key, entry.image, "picture")
        captions = self._captions(shard, entry, self._choose_column(entry.columns, draws))
        if not captions:
            raise BadSample(name, entry.key, "the index promises a caption that is not there")
        return RawSample(
            entry.key, image, captions[draws.integers(0, len(captions)) if draws and len(captions) > 1 else 0], name
        )

    def _captions(self, shard: int, entry: Entry, column: str) -> list[str]:
        """The captions in one column; empty where the index does not tell the truth about it."""
        try:
            if column == "txt" and entry.text is not None:
                return _texts(self._member(shard, entry.key, entry.text, "caption").decode("utf-8"))
            if entry.metadata is None:
                return []
            metadata = json.loads(self._member(shard, entry.key, entry.metadata, "metadata"))
            return _texts(metadata["caption" if column == "txt" else column.removeprefix("json:")])
        except (ValueError, RecursionError, KeyError, TypeError):
            return []

    def members(self, shard: int, sample: int) -> tuple[str, bytes, bytes | None, bytes | None]:
        """(key, picture, .txt, .json) of one sample as they stand in the tar, checksums verified; None: it has none.
        Raises as `read`."""
        entry = self._entry(shard, sample)
        image = self._member(shard, entry.key, entry.image, "picture")
        text, metadata = (
            self._member(shard, entry.key, member, word) if member is not None else None
            for member, word in ((entry.text, "caption"), (entry.metadata, "metadata"))
        )
        return entry.key, image, text, metadata

    def key(self, shard: int, sample: int) -> str:
        return self._entry(shard, sample).key

    def _choose_column(self, present: frozenset[str], draws: Draws | None) -> str:
        columns = [name for name in self.caption if name in present]
        if draws is None or len(columns) == 1:
            return columns[0]
        target = draws.uniform() * sum(self.caption[name] for name in columns)
        for name in columns[:-1]:
            target -= self.caption[name]
            if target < 0:
                return name
        return columns[-1]

    def _member(self, shard: int, key: str, member: tuple[int, int, int], word: str) -> bytes:
        offset, size, crc = member
        name = self.paths[shard].name
        try:
            data = self._pread(shard, size, offset)
        except OSError as error:
            raise BadSample(name, key, f"{word} cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise BadSample(name, key, f"{word} is cut off: {len(data)} of {size} bytes")
        if zlib.crc32(data) != crc:
            raise BadSample(name, key, f"{word} differs from what was indexed (checksum)")
        return data

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        """Bytes of a shard; what the disk refuses is tried again, from opening on, before it counts."""
        for wait in (*RETRY_WAITS, None):
            try:
                file = self._file(shard)  # held here, so that another thread's eviction cannot close it under us
            except OSError as error:
                if wait is None:
                    raise UserError(
                        f"{self.paths[shard]}: the shard disappeared while in use ({error.strerror}; tried {len(RETRY_WAITS) + 1} "
                        "times); bring it back and start the same command again"
                    ) from error
            else:
                try:
                    return os.pread(file.fileno(), size, offset)
                except OSError:
                    if wait is None:
                        raise
                    with self._lock:
                        self._files.pop(shard, None)
            time.sleep(wait)
        raise AssertionError("unreachable")

    def _file(self, shard: int) -> io.FileIO:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                opened = self.remote[shard].open() if self.remote else open(self.paths[shard], "rb", buffering=0)
                file = self._files[shard] = opened
                if len(self._files) > self.max_open:
                    self._files.popitem(last=False)  # closed when its last reader lets go of it
            self._files.move_to_end(shard)
            return file

    def _entry(self, shard: int, sample: int) -> Entry:
        """The index's facts about one sample: from the manifest, or from the shard's own index."""
        if self._manifest is not None:
            with self._lock:
                loaded = self._rows.get(shard)
                if loaded is None:
                    loaded = self._manifest.rows(shard, self.caption)
                    if loaded is not None:
                        self._rows[shard] = loaded
                        if len(self._rows) > self.max_open:
                            self._rows.popitem(last=False)
                if loaded is not None:
                    self._rows.move_to_end(shard)
            if loaded is not None:
                rows, usable = loaded
                number = int(usable[sample])
                return self._manifest.entry(shard, rows[number]) or self._body(shard).entry(number)
        body = self._body(shard)
        return body.entry(int(body.usable[sample]))

    def _body(self, shard: int) -> _Body:
        with self._lock:
            body = self._bodies.get(shard)
            if body is None:
                body = self._bodies[shard] = self._load(shard)
                if len(self._bodies) > self.max_open:
                    self._bodies.popitem(last=False)
            self._bodies.move_to_end(shard)
            return body

    def _load(self, shard: int) -> _Body:
        digest, path = self.digests[shard], self.paths[shard]
        # The index of the data this set was opened on, even when the shard was written to since: its checksums tell.
        where = next((p for p in _index_paths(path, self._cache_dir) if (_read_header(p) or {}).get("digest") == digest), None)
        raw = _read_body(where or _open_index_of(self.remote[shard] if self.remote else path, self._cache_dir)[1], digest)
        wanted = self._wanted(raw["columns"])
        usable = np.array([number for number, mask in enumerate(raw["mask"]) if mask & wanted], dtype=np.int64)
        missing = " or ".join(self.caption)
        without = [
            {"key": raw["key"][number], "reason": raw["text_problems"].get(str(number), f"no caption in {missing}")}
            for number, mask in enumerate(raw["mask"])
            if not mask & wanted
        ]
        members = {kind: np.array(raw[kind], dtype=np.int64).reshape(-1, 3) for kind in ("image", "text", "metadata")}
        return _Body(raw["key"], members, raw["mask"], raw["columns"], usable, raw["bad"] + without, raw["damage"])


# -------------------------------------------------------------------------------------------------------------------
# pack

PACK_REPORT = "data_report.json"


def pack(
    folder: str | os.PathLike,
    captions_file: str | os.PathLike | None,
    out_dir: str | os.PathLike,
    samples_per_shard: int = 1000,
    where: Mapping[str, str] | None = None,
    max_pixels: int = 64_000_000,
    max_bytes: int = 40_000_000,
) -> dict:
    """A folder of pictures and their captions -> shards; returns (and writes as `data_report.json`) what went in and
    what did not.

    captions_file: JSONL rows {"image": path below folder, "captions": [...] | "caption": str, ...}, or CSV with a
    header row of the same names, or None: `<picture>.txt` beside each picture. Of several captions the first becomes
    the .txt; all stand in the metadata as `captions` and `caption_0`, `caption_1`, …. `where` keeps the rows whose
    fields have the given values. Pictures keep their bytes. `out_dir` gets its name when it is whole; until then, and
    after a kill, what is written stands in `<out_dir>.partial`. Raises UserError when an input is missing, `out_dir`
    holds anything, another process packs into it, or no row is usable.
    """
    folder, out_dir = Path(folder), Path(out_dir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures")

    def refuse_full() -> None:
        if out_dir.is_dir() and any(out_dir.iterdir()):
            holds = "shards already" if any(out_dir.glob("*.tar")) else f"{next(out_dir.iterdir()).name} and maybe more"
            raise UserError(f"{out_dir}: holds {holds}; choose another folder or remove them")

    refuse_full()
    if os.path.ismount(out_dir):
        raise UserError(f"{out_dir}: is where a disk is mounted; name a folder in it")
    whole = Path(os.path.realpath(out_dir))  # behind a link, which could not be replaced
    partial = whole.with_name(whole.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = acquire_lock(partial, "packing into it; wait for it or choose another folder")
    with lock:
        refuse_full()  # by who held the lock until now
        for entry in partial.iterdir():  # of a killed packing
            if entry.name != LOCK:
                entry.unlink()
        report = _pack(folder, Path(captions_file) if captions_file is not None else None, partial, samples_per_shard, where, max_pixels, max_bytes)
        (partial / LOCK).unlink()
        os.replace(partial, whole)
    return report


def pack_once(
    folder: str | os.PathLike, captions_file: str | os.PathLike | None, out_dir: str | os.PathLike, where: Mapping[str, str] | None = None
) -> dict:
    """The report of `pack`, which runs unless `out_dir` holds what it would write. Raises UserError where the shards there are of other pictures,
    captions or rows."""
    try:
        report = json.loads((Path(out_dir) / PACK_REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return pack(folder, captions_file, out_dir, where=where)
    found, wanted = report.get("packed_from") or {}, _packed_from(Path(folder), captions_file and Path(captions_file), where)
    if not wanted["captions_sha256"]:  # nothing to compare with: the shards may stand without what they were made of
        wanted["captions_sha256"] = found.get("captions_sha256", "")
    changes = [f"{key}: {found.get(key)!r} -> {value!r}" for key, value in wanted.items() if found.get(key) != value]
    if changes:
        raise UserError(f"{out_dir}: these shards were packed from something else ({'; '.join(changes)}); remove the folder to pack anew, give another "
                        "path, or leave `pack` out to take them as they are")
    return report


def _packed_from(folder: Path, captions_file: Path | None, where: Mapping[str, str] | None) -> dict[str, Any]:
    digest = ""
    if captions_file is not None and captions_file.is_file():
        with open(captions_file, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"folder": str(folder.resolve()), "captions": None if captions_file is None else str(captions_file.resolve()), "captions_sha256": digest,
            "where": dict(where or {})}


def _pack(
    folder: Path, captions_file: Path | None, out_dir: Path, samples_per_shard: int, where: Mapping[str, str] | None, max_pixels: int, max_bytes: int
) -> dict:
    report: dict[str, Any] = {
        "packed_from": _packed_from(folder, captions_file, where),
        "num_rows": 0,
        "num_written": 0,
        "num_skipped": 0,
        "num_bad": 0,
        "bad_reasons": Counter(),
        "bad": [],
    }

    def usable_rows() -> Iterator[dict]:
        for label, row in _caption_rows(folder, captions_file):
            report["num_rows"] += 1
            if (
                isinstance(row, dict)
                and where
                and any(str(row.get(name)) != str(value) for name, value in where.items())
            ):
                report["num_skipped"] += 1
                continue
            try:
                yield _packed_row(folder, row, max_pixels, max_bytes)
                report["num_written"] += 1
            except ValueError as error:
                report["num_bad"] += 1
                report["bad_reasons"][str(error)] += 1
                image = row.get("image") if isinstance(row, dict) else None
                report["bad"].append({"row": label, "image": image, "reason": str(error)})

    paths = write_shards(usable_rows(), out_dir, samples_per_shard)
    report["shards"] = [path.name for path in paths]
    if not paths:
        example = f" (for instance {report['bad'][0]['row']}: {report['bad'][0]['reason']})" if report["bad"] else ""
        raise UserError(
            f"{captions_file or folder}: none of {report['num_rows']} rows could be packed, "
            f"{report['num_skipped']} skipped by the filter, {report['num_bad']} bad{example}"
        )
    write_json(out_dir / PACK_REPORT, report)
    return report


def _caption_rows(folder: Path, captions_file: Path | None) -> Iterator[tuple[str, Any]]:
    """(label for messages, row) of every input row; a line that is no JSON object comes as it is and is refused
    later."""
    if captions_file is None:
        for picture in sorted(
            path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
        ):
            sidecar = picture.with_suffix(".txt")
            caption = sidecar.read_bytes().decode("utf-8", "replace") if sidecar.is_file() else ""
            yield str(picture.relative_to(folder)), {"image": str(picture.relative_to(folder)), "caption": caption}
        return
    try:
        with open(captions_file, encoding="utf-8", errors="replace", newline="") as file:
            if captions_file.suffix.lower() == ".csv":
                for number, row in enumerate(csv.DictReader(file), start=2):
                    yield f"line {number}", row
                return
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield f"line {number}", json.loads(line)
                except (ValueError, RecursionError):
                    yield f"line {number}", None
    except OSError as error:
        raise UserError(f"{captions_file}: cannot be read ({error.strerror})") from error
    except csv.Error as error:
        raise UserError(f"{captions_file}: is not a CSV table ({error}); mend it or write JSONL") from error


def _packed_row(folder: Path, row: Any, max_pixels: int, max_bytes: int) -> dict:
    """A row for write_shards. Raises ValueError(reason)."""
    from aimv2_vlm.data.transforms import BadImage, read_header

    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    name = row.get("image")
    if not isinstance(name, str) or not name:
        raise ValueError("no 'image' field")
    captions = [text.strip() for text in _texts(row.get("captions")) or _texts(row.get("caption"))]
    if not captions:
        raise ValueError("empty caption")
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError("picture lies outside the folder")
    try:
        if not path.is_file():  # a pipe or a device would be read without end
            raise ValueError("no such file")
        if path.stat().st_size > max_bytes:
            raise BadImage(too_many_bytes(path.stat().st_size, max_bytes))
        data = path.read_bytes()
    except BadImage as error:
        raise ValueError(error.reason) from error
    except (OSError, ValueError) as error:
        raise ValueError("picture is missing or unreadable") from error
    try:
        header = read_header(data, max_pixels=max_pixels, max_bytes=max_bytes)
    except BadImage as error:
        raise ValueError(error.reason) from error
    numbered = {f"caption_{number}": text for number, text in enumerate(captions)}
    metadata = {name: value for name, value in row.items() if name is not None and name not in ("captions", "caption")}
    metadata |= {"captions": captions, **numbered, "height": header.height, "width": header.width}
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("text that is not Unicode (half of a surrogate pair)") from None
    return {"key": None, "image_bytes": data, "ext": header.extension, "caption": captions[0], "json": metadata}
