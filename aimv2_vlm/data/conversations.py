"""LLaVA conversations (JSON list), Cambrian's (JSONL) and interleaved documents: rows by offset, cleaned, or rejected under
a named reason.

A file of millions of rows is scanned once; row offsets and verdicts are kept beside it (`<file>.rows`), and rebuilt
when the file's size or time changes. Rows are never read through a type-inferring reader: ids may be text or
numbers in one file.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import re
import stat
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aimv2_vlm.config import UserError
from aimv2_vlm.data.interleaved import PARSERS, Document
from aimv2_vlm.data.layouts import describe_missing

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
NO_IMAGE = {"", "None", "none", "nan"}
FORMATS = ("conversations", *PARSERS)
INDEX_VERSION = 4
PARALLEL_ROWS = 100_000  # below this, starting processes takes longer than judging
MOST_NAMES = 500_000  # pictures remembered while a file is judged; those of more rows are looked for again

# Verdicts are stored as positions in this list; other rules under the same names need another INDEX_VERSION.
REASONS = [
    "good",
    "invalid_json",  # the line is not JSON, or not UTF-8
    "not_an_object",  # the row is no mapping
    "invalid_text",  # half of a surrogate pair: no text in any encoding
    "video",  # rows with a video are for other tools
    "bad_image_field",  # `image`, or `images` of a row without it, is neither a name, a list of names, nor one of the ways to say none
    "no_conversation",  # `conversations` is missing, empty or no list
    "malformed_turn",  # a turn without {from, value} or {role, content}, or with a value that is no text
    "unknown_speaker",
    "system_turn_inside",  # a system turn anywhere but first
    "first_turn_not_user",
    "same_speaker_twice",
    "last_turn_user",
    "empty_answer",
    "placeholder_without_image",
    "image_count_mismatch",  # the number of <image> is not the number of images
    "missing_picture",  # no such file under the image folder
    "empty_question",  # a user's turn without text and without image
    "outside_image_folder",  # an absolute name, one that climbs out by .., or a link that leads out
    # Of documents only:
    "no_document",  # a list of the format is missing, empty or no list
    "length_mismatch",  # `images` and `texts` are of different length
    "malformed_piece",  # neither text nor null, or text and picture in one place
    "bad_match",  # a picture without a name, or matched to a text that is not there
    "no_text",  # pictures alone: nothing to learn
    "picture_is_url",  # nothing is downloaded: the names must be those of files
]
_SURROGATE = re.compile("[\ud800-\udfff]")
_CODE = {reason: code for code, reason in enumerate(REASONS)}


@dataclass(frozen=True)
class Turn:
    role: str  # user | assistant
    text: str


@dataclass(frozen=True)
class Conversation:
    """One usable row. `images` are names as the row has them; every IMAGE in a user's text stands for the next one.

    IMAGE in an answer or in the system text is plain text.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]  # user, assistant, user, assistant, ...
    system: str | None = None

    @property
    def texts(self) -> list[str]:
        return [turn.text for turn in self.turns]

    @property
    def begins_with_picture(self) -> bool:
        """Whether every part of it that may be trained on, from its beginning to a cut, holds a picture."""
        return IMAGE in self.turns[0].text


@dataclass(frozen=True)
class Rejection:
    row: int
    id: str
    reason: str  # one of REASONS


def parse_row(row: Any, index: int) -> Conversation | Rejection:
    """Judge one decoded row by formats' rules; pictures are not looked at. `index` names rows that have no id."""
    if not isinstance(row, dict):
        return Rejection(index, f"row {index}", "not_an_object")
    name = _name(row.get("id"), index)

    def reject(reason: str) -> Rejection:
        return Rejection(index, name.encode("utf-8", "replace").decode(), reason)

    if row.get("video"):
        return reject("video")
    images = _images(_image_field(row))
    if images is None:
        return reject("bad_image_field")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        return reject("no_conversation")

    system, cleaned = None, []
    for position, turn in enumerate(turns):
        if not isinstance(turn, dict):
            return reject("malformed_turn")
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(speaker, str) or not isinstance(text, str):
            return reject("malformed_turn")
        role = ROLES.get(speaker)
        if role is None:
            return reject("unknown_speaker")
        if role != "system":
            cleaned.append(Turn(role, text))
        elif position == 0:
            system = text.strip() or None
        else:
            return reject("system_turn_inside")
    if not _is_text([name, system or "", *images, *(turn.text for turn in cleaned)]):
        return reject("invalid_text")
    if not cleaned or cleaned[0].role != "user":
        return reject("first_turn_not_user")
    if any(a.role == b.role for a, b in pairwise(cleaned)):
        return reject("same_speaker_twice")
    if cleaned[-1].role == "user":
        return reject("last_turn_user")
    if any(turn.role == "assistant" and not turn.text.strip() for turn in cleaned):
        return reject("empty_answer")
    if any(not turn.text.strip() for turn in cleaned[0 if not images else 2 :: 2]):
        return reject("empty_question")

    placeholders = sum(turn.text.count(IMAGE) for turn in cleaned if turn.role == "user")
    if placeholders and not images:
        return reject("placeholder_without_image")
    if len(images) == 1 and placeholders == 0:
        cleaned[0] = Turn("user", _image_first(cleaned[0].text))
    elif placeholders != len(images):
        return reject("image_count_mismatch")
    elif len(images) == 1:
        cleaned = [Turn("user", _image_first(t.text)) if t.role == "user" and IMAGE in t.text else t for t in cleaned]
    return Conversation(name, images, tuple(cleaned), system)


def parse_document(row: Any, index: int, format: str) -> Document | Rejection:
    """`parse_row` for one document of a format in `interleaved.PARSERS`."""
    if not isinstance(row, dict):
        return Rejection(index, f"row {index}", "not_an_object")
    name = _name(row.get("id", row.get("url")), index)
    document = PARSERS[format](row, name)
    if isinstance(document, Document) and not _is_text([name, *document.images, *document.texts]):
        document = "invalid_text"
    return document if isinstance(document, Document) else Rejection(index, name.encode("utf-8", "replace").decode(), document)


def _name(field: Any, index: int) -> str:
    return str(field) if isinstance(field, (str, int)) and not isinstance(field, bool) and field != "" else f"row {index}"


def _is_text(parts: Iterable[str]) -> bool:
    return _SURROGATE.search("".join(parts)) is None


def _image_field(row: dict[str, Any]) -> Any:
    """`image`; where there is none `images`, unless that is a key of one's own (a count, say)."""
    if row.get("image") is not None:
        return row["image"]
    return row["images"] if isinstance(row.get("images"), str | list) else None


def _images(field: Any) -> tuple[str, ...] | None:
    """Names of the row's images, () for none, None where the field makes no sense."""
    if field is None or (isinstance(field, float) and math.isnan(field)):
        return ()
    if isinstance(field, str):
        return () if field.strip() in NO_IMAGE else (field,)
    if isinstance(field, list) and all(isinstance(name, str) and name.strip() not in NO_IMAGE for name in field):
        return tuple(field)
    return None


def _image_first(text: str) -> str:
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


class Rows:
    """Random access to the rows of a .json list or a .jsonl file, without holding them: offsets, then `os.pread`.

    `spans` (num_rows, 2): first byte and number of bytes. Safe to use after fork and from threads.
    """

    def __init__(self, path: str | os.PathLike, spans: np.ndarray | None = None) -> None:
        self.path = str(path)
        self.spans = _scan(self.path) if spans is None else spans
        self._file = None

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, index: int) -> bytes:
        start, length = self.spans[index].tolist()
        if self._file is None:
            self._file = open(self.path, "rb")
        return os.pread(self._file.fileno(), length, start)

    def load(self, index: int) -> Any:
        """The decoded row. Raises ValueError or RecursionError for what is no JSON."""
        return json.loads(self.read(index))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}


class ParquetRows:
    """Random access to the rows of a parquet file, some columns of them; the row group read last is kept.

    `spans` (num_rows, 2): row group, and the row's place in it.
    """

    def __init__(self, path: str | os.PathLike, columns: Sequence[str], spans: np.ndarray | None = None) -> None:
        import pyarrow
        from pyarrow import parquet

        self.path, self.columns = str(path), list(columns)
        try:
            self._file = parquet.ParquetFile(self.path)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{self.path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None
        missing = [column for column in columns if column not in self._file.schema_arrow.names]
        if missing:
            raise UserError(f"{self.path}: has no column {', '.join(missing)}; set the source's format to what the file holds")
        about = self._file.metadata
        groups = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        self.spans = np.array([(group, row) for group, count in enumerate(groups) for row in range(count)], np.int64).reshape(-1, 2)
        self._group: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return len(self.spans)

    def load(self, index: int) -> dict:
        """The row as a mapping. Raises ValueError for a damaged row group."""
        group, row = self.spans[index].tolist()
        if self._group[0] != group:
            import pyarrow

            try:
                self._group = (group, self._file.read_row_group(group, self.columns, use_threads=False))
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(str(error)) from None
        return self._group[1].slice(row, 1).to_pylist()[0]

    def __getstate__(self) -> dict:
        return {"path": self.path, "columns": self.columns}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def _open_rows(path: str, format: str, spans: np.ndarray | None = None) -> Rows | ParquetRows:
    if not path.endswith(".parquet"):
        return Rows(path, spans)
    if format != "obelics":
        raise UserError(f"{path}: of parquet files only OBELICS-style documents are read; set format: obelics, or give .json or .jsonl")
    return ParquetRows(path, ("images", "texts"))


def _scan(path: str) -> np.ndarray:
    """Byte spans of all rows. Blank lines of a .jsonl are no rows. Raises UserError where a list is broken."""
    spans = array("q")
    if path.endswith((".jsonl", ".ndjson")):
        position = 0
        with open(path, "rb") as file:
            for line in file:
                if not line.isspace():
                    spans.extend((position, len(line)))
                position += len(line)
    else:
        # latin-1 keeps one character per byte, so that positions found by the decoder are byte positions.
        text = Path(path).read_bytes().decode("latin-1")
        for span in _list_spans(text, path):
            spans.extend(span)
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _list_spans(text: str, path: str) -> Iterator[tuple[int, int]]:
    # Where rows lie does not depend on their numbers, of which Python refuses to read the longest: that is the row's fault, not the file's.
    decoder, space = json.JSONDecoder(parse_int=len), re.compile(r"[ \t\r\n]*")
    position = 3 if text.startswith("\xef\xbb\xbf") else 0
    position = space.match(text, position).end()
    if text[position : position + 1] != "[":
        raise UserError(f"{path}: neither a JSON list ('[' expected) nor a .jsonl file")
    position = space.match(text, position + 1).end()
    while text[position : position + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}: broken JSON at byte {getattr(error, 'pos', position)}: {error}") from None
        yield position, end - position
        position = space.match(text, end).end()
        if text[position : position + 1] == ",":
            position = space.match(text, position + 1).end()
        elif text[position : position + 1] != "]":
            raise UserError(f"{path}: broken JSON at byte {position}: ',' or ']' expected (is the file complete?)")


class SourceLike(Protocol):
    """config.ConversationSource; `format` and `follow_links` may be absent."""

    path: str
    images: str | None
    take: str


class _Source:
    """One file: its rows, a verdict for each, which of the good ones are taken, and the file's `sha256`."""

    def __init__(self, source: SourceLike, seed: int, cache_dir: str | None) -> None:
        self.path, self.root, self.take = str(source.path), str(source.images or ""), source.take or "all"
        self.format = getattr(source, "format", "conversations")
        if self.format not in FORMATS:
            raise UserError(f"{self.path}: format: {self.format!r} is none of {', '.join(FORMATS)}")
        self.folder = _ImageFolder(self.root, getattr(source, "follow_links", False))
        if not os.path.isfile(self.path):
            raise UserError(f"{self.path}: no such conversation file")
        if self.root and not os.path.isdir(self.root):
            raise UserError(f"{self.root}: no such image folder (images of {self.path})")
        self.rows, self.verdicts = self._indexed(cache_dir)
        good = np.flatnonzero(self.verdicts == 0)
        self.taken = good[_take(self.take, len(good), seed, self.path)]

    def judge(self, index: int) -> Conversation | Document | Rejection:
        """One row by its own content; pictures are not looked for."""
        return _judge(self.rows, self.format, index)

    def rejections(self) -> Iterator[Rejection]:
        for index in np.flatnonzero(self.verdicts != 0):
            verdict = self.judge(int(index))
            yield Rejection(int(index), verdict.id, REASONS[self.verdicts[index]])

    def report(self) -> dict:
        examples: dict[str, list[str]] = {}
        counts: Counter[str] = Counter()
        for rejection in self.rejections():
            counts[rejection.reason] += 1
            if counts[rejection.reason] <= 10:
                examples.setdefault(rejection.reason, []).append(rejection.id)
        return {
            "path": self.path,
            "images": self.root,
            "take": self.take,
            "rows": len(self.rows),
            "good": int((self.verdicts == 0).sum()),
            "taken": len(self.taken),
            "rejected": dict(counts),
            "rejected_ids": examples,
            "missing_folders": describe_missing(self.root, self._missing_names()),
        }

    def _missing_names(self) -> Iterator[str]:
        """Names of the pictures that are not there, each once."""
        seen: set[str] = set()
        for index in np.flatnonzero(self.verdicts == _CODE["missing_picture"]):
            verdict = self.judge(int(index))
            for name in () if isinstance(verdict, Rejection) else verdict.images:
                if name not in seen and self.folder.problem(name) == "missing_picture":
                    seen.add(name)
                    yield name

    def _indexed(self, cache_dir: str | None) -> tuple[Rows | ParquetRows, np.ndarray]:
        """Rows and verdicts, from the stored index where it fits the file; rows whose picture was missing or elsewhere
        are looked at again."""
        from safetensors import SafetensorError, safe_open

        status = os.stat(self.path)
        key = {
            "version": f"{INDEX_VERSION}: {' '.join(REASONS)}",
            "size": str(status.st_size),
            "mtime": str(status.st_mtime_ns),
            "images": os.path.abspath(self.root) if self.root else "",
            "format": self.format,
            "follow_links": str(self.folder.follow_links),
        }
        place = _index_path(self.path, cache_dir)
        try:
            with safe_open(place, framework="np") as index:
                spans, verdicts, stored = index.get_tensor("spans"), index.get_tensor("verdicts"), index.metadata() or {}
                self.sha256 = stored.pop("sha256", "")
                if stored == key and self.sha256 and _fits(spans, verdicts, status.st_size):
                    self.rows = _open_rows(self.path, self.format, spans)
                    again = np.flatnonzero(np.isin(verdicts, [_CODE["missing_picture"], _CODE["outside_image_folder"]]))
                    verdicts[again] = _judge_all(self.rows, self.format, self.folder, again.tolist())
                    return self.rows, verdicts
        except (OSError, SafetensorError):
            pass  # no index yet, or a broken one: it is made again
        self.rows = _open_rows(self.path, self.format)
        verdicts = self._judge_everything()
        with open(self.path, "rb") as file:  # here, so that nobody who opens it later reads gigabytes for it
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        _write_index(place, self.rows.spans, verdicts, key | {"sha256": self.sha256})
        return self.rows, verdicts

    def _judge_everything(self) -> np.ndarray:
        """Verdicts of all rows; of a large file by one process a core, whose number changes nothing but the time."""
        count = len(os.sched_getaffinity(0))
        if isinstance(self.rows, Rows) and len(self.rows) >= PARALLEL_ROWS and count > 1 and not multiprocessing.current_process().daemon:
            parts = np.array_split(self.rows.spans, -(-len(self.rows) // PARALLEL_ROWS))
            pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
            try:
                return np.concatenate(list(pool.map(partial(_judge_part, self.path, self.format, self.root, self.folder.follow_links), parts)))
            except BrokenProcessPool:
                pass  # a script without a main guard, or a process killed for memory: this one does the work
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        return _judge_all(self.rows, self.format, self.folder, range(len(self.rows)))


def _judge(rows: Rows | ParquetRows, format: str, index: int) -> Conversation | Document | Rejection:
    try:
        row = rows.load(index)
    except (ValueError, RecursionError):
        return Rejection(index, f"row {index}", "invalid_json")
    return parse_row(row, index) if format == "conversations" else parse_document(row, index, format)


def _judge_all(rows: Rows | ParquetRows, format: str, folder: _ImageFolder, indices: Iterable[int]) -> np.ndarray:
    """Verdicts (len(indices),) uint8: positions in REASONS."""
    codes = bytearray()
    for index in indices:
        verdict = _judge(rows, format, index)
        if isinstance(verdict, Rejection):
            codes.append(_CODE[verdict.reason])
        else:
            codes.append(max((_CODE[folder.problem(name)] for name in verdict.images), default=0))
    return np.frombuffer(codes, dtype=np.uint8)


def _judge_part(path: str, format: str, root: str, follow_links: bool, spans: np.ndarray) -> np.ndarray:
    return _judge_all(Rows(path, spans), format, _ImageFolder(root, follow_links), range(len(spans)))


class _ImageFolder:
    """Which names are pictures under `root`. Links that lead out of it count as outside, unless `follow_links`."""

    def __init__(self, root: str, follow_links: bool) -> None:
        self.root, self.follow_links = root, follow_links
        self._real_root = os.path.realpath(root or ".")
        self._known: dict[str, str] = {}  # pictures are shared by many rows
        self._folders: dict[str, bool] = {}

    def problem(self, name: str) -> str:
        """good | missing_picture | outside_image_folder. One look at the file; one more for every folder."""
        if name not in self._known:
            if len(self._known) >= MOST_NAMES:
                self._known.clear()
            self._known[name] = self._look(name)
        return self._known[name]

    def _look(self, name: str) -> str:
        if os.path.isabs(name) or (os.pardir in name and os.path.normpath(name).split(os.sep)[0] == os.pardir):
            return "outside_image_folder"
        path = os.path.join(self.root, name)
        try:
            if self.follow_links:
                return "good" if stat.S_ISREG(os.stat(path).st_mode) else "missing_picture"
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                mode = os.stat(path).st_mode
                inside = self._is_inside(os.path.realpath(path))
            else:
                folder = os.path.dirname(path)
                if folder not in self._folders:
                    self._folders[folder] = self._is_inside(os.path.realpath(folder))
                inside = self._folders[folder]
        except (OSError, ValueError):
            return "missing_picture"
        if not stat.S_ISREG(mode):
            return "missing_picture"
        return "good" if inside else "outside_image_folder"

    def _is_inside(self, path: str) -> bool:
        return path == self._real_root or path.startswith(self._real_root.rstrip(os.sep) + os.sep)


def _fits(spans: np.ndarray, verdicts: np.ndarray, file_size: int) -> bool:
    """Whether a stored index can be one of a file of this size."""
    return (
        spans.dtype == np.int64
        and spans.ndim == 2
        and spans.shape[1] == 2
        and verdicts.dtype == np.uint8
        and verdicts.shape == spans.shape[:1]
        and bool((verdicts < len(REASONS)).all())
        and bool(((spans >= 0) & (spans <= file_size)).all())
        and bool((spans.sum(1) <= file_size).all())
    )


def _index_path(path: str, cache_dir: str | None) -> str:
    if cache_dir is None and os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
        return path + ".rows"
    folder = cache_dir or os.path.join(os.path.expanduser("~"), ".cache", "aimv2-vlm")
    return os.path.join(folder, hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:24] + ".rows")


def _write_index(place: str, spans: np.ndarray, verdicts: np.ndarray, key: dict[str, str]) -> None:
    """Written under another name and renamed. An index is a help, not a need: without room for it the run goes on."""
    from safetensors.numpy import save_file

    try:
        os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(place) or ".", suffix=".rows.tmp")
        os.close(handle)
        try:
            save_file({"spans": spans, "verdicts": verdicts}, temporary, metadata=key)
            os.replace(temporary, place)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
    except OSError:
        pass


def _take(take: str, num_good: int, seed: int, path: str) -> np.ndarray:
    """Positions among the good rows: all | first:N | random:N | N% (random; file order is kept)."""
    if take == "all":
        return np.arange(num_good)
    match = re.fullmatch(r"(first|random):(\d+)|(\d+(?:\.\d+)?)%", take)
    if not match or (match[3] and float(match[3]) > 100):
        raise UserError(f"{path}: take: {take!r} is none of all, first:N, random:N, N%")
    count = int(match[2]) if match[1] else int(num_good * float(match[3]) / 100)
    if count > num_good:
        raise UserError(f"{path}: take: {take!r}, but only {num_good} rows are usable")
    if match[1] == "first":
        return np.arange(count)
    name = os.path.basename(path)
    entropy = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
    return np.sort(np.random.Generator(np.random.PCG64(entropy)).permutation(num_good)[:count])


class ConversationSet:
    """The usable conversations and documents of all sources, one after another; everything is judged when it is opened.

    sources: config.ConversationSource, or whatever has its fields. seed: for `random:N` and `N%`. cache_dir: where row
    indices go (default: beside each file). Pictures are only looked for here; one that cannot be decoded shows at
    fetch time.
    """

    def __init__(self, sources: list[SourceLike], seed: int = 0, cache_dir: str | None = None) -> None:
        self.sources = [_Source(source, seed, cache_dir) for source in sources]
        self._starts = np.cumsum([0] + [len(source.taken) for source in self.sources])
        if not len(self):
            raise UserError(f"{', '.join(s.path for s in self.sources)}: no usable conversation")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Conversation | Document:
        source, row = self._locate(index)
        conversation = source.judge(row)
        if isinstance(conversation, Rejection):
            raise UserError(f"{source.path}: row {row} changed while it was in use ({conversation.reason})")
        return conversation

    def picture_path(self, index: int, name: str) -> str:
        return os.path.join(self._locate(index)[0].root, name)

    def picture_paths(self, index: int) -> list[str]:
        """Files of a row's pictures, in order."""
        return [self.picture_path(index, name) for name in self[index].images]

    def where(self, index: int) -> str:
        """File and row, for messages."""
        source, row = self._locate(index)
        return f"{source.path}: row {row}"

    def fingerprint(self) -> dict[str, Any]:
        """What the rows depend on: how many there are, each file by its content, and which of its rows are taken."""
        return {
            "rows": len(self),
            "sources": {source.path: f"{source.take} {source.sha256}" for source in self.sources},
            "rows_taken": {
                f"{number} {source.path}": hashlib.sha256(source.taken.astype("<i8").tobytes()).hexdigest()[:16] for number, source in enumerate(self.sources)
            },
        }

    def rejections(self) -> Iterator[tuple[str, Rejection]]:
        """(path, rejection) of every row that is left out."""
        return ((source.path, rejection) for source in self.sources for rejection in source.rejections())

    def report(self) -> dict:
        """For data_report.json: counts per source and reason, the first ids of each."""
        sources = [source.report() for source in self.sources]
        rejected: Counter[str] = Counter()
        for source in sources:
            rejected.update(source["rejected"])
        return {
            "rows": sum(s["rows"] for s in sources),
            "good": sum(s["good"] for s in sources),
            "taken": len(self),
            "rejected": dict(rejected),
            "missing_folders": [line for source in sources for line in source.pop("missing_folders")],
            "sources": sources,
        }

    def _locate(self, index: int) -> tuple[_Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        source = self.sources[number]
        return source, int(source.taken[index - self._starts[number]])


def check_bad_fraction(report: dict, max_bad_fraction: float, at_least: int = 1000) -> None:
    """Raises UserError when the share of rejected rows passes the limit. Sets under `at_least` rows are not judged."""
    bad = sum(report["rejected"].values())
    if report["rows"] >= at_least and bad > max_bad_fraction * report["rows"]:
        worst = ", ".join(f"{reason} {count}" for reason, count in Counter(report["rejected"]).most_common(3))
        paths = ", ".join(source["path"] for source in report["sources"])
        where = report.get("missing_folders", [])[:3]
        raise UserError(
            f"{paths}: {bad} of {report['rows']} rows are bad ({worst}), more than "
            f"max_bad_fraction = {max_bad_fraction:g}; mend the file or raise the limit" + "".join(f". {line}" for line in where)
        )
