"""Pictures that look alike: a perceptual hash, all pairs within a Hamming distance, and the pictures of an evaluation set."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aimv2_vlm.config import UserError
from aimv2_vlm.data.shards import IMAGE_EXTENSIONS
from aimv2_vlm.data.transforms import MAX_BYTES

SIDE = 32  # of the grey thumbnail that is hashed
MAX_DISTANCE = 7  # of 64 bits; what `near_pairs` can search
# Charts and tables made from one template agree in their coarse bits; of their 192 fine bits more than this many differ, while
# copies at another size, quality or brightness, and most of those that lost 2 % of each side, differ in fewer.
MAX_FINE_DISTANCE = 32
FLAT = 2.0  # grey levels: a thumbnail whose standard deviation is below has no structure to compare
FAINT = 64.0  # four times what noise of one grey level gives a frequency: below, noise would decide its bit
PAIRS_AT_ONCE = 4_000_000
# The first sixteen rows of the discrete cosine transform of a line of SIDE pixels.
_DCT = np.cos(np.pi / SIDE * (np.arange(SIDE) + 0.5) * np.arange(16)[:, None])


def perceptual_hash(pixels: torch.Tensor) -> tuple[int, int, int, int] | None:
    """uint8 (3, H, W) -> four 64-bit words: pHash (the 8 x 8 lowest frequencies of a 32 x 32 grey thumbnail, above their median
    or not), then which of the next 192 frequencies are clearly positive.

    Resized and recompressed copies differ in a few bits, unrelated photographs in about half. None: the picture is flat.
    """
    from PIL import Image

    grey = Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L")
    thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64)
    if thumbnail.std() < FLAT:
        return None
    frequencies = _DCT @ thumbnail @ _DCT.T
    coarse = frequencies[:8, :8].ravel()
    fine = np.concatenate([frequencies[8:, :8].ravel(), frequencies[:, 8:].ravel()])
    bits = [coarse > np.median(coarse[1:]), fine > FAINT]  # coarse[0] is the mean brightness
    return tuple(int(word) for word in np.packbits(np.concatenate(bits)).view(">u8"))


def near_pairs(queries: np.ndarray, targets: np.ndarray, max_distance: int) -> tuple[np.ndarray, np.ndarray]:
    """All (query, target) index pairs whose uint64 hashes differ in at most `max_distance` (0 to 7) bits, sorted.

    No pair is missed: of two hashes that differ in at most 7 bits, one of the four 16-bit quarters differs in at most
    one bit, so looking up each quarter and its 16 neighbours is enough. Raises ValueError for another distance.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"distance {max_distance}: must be from 0 to {MAX_DISTANCE}")
    flips = [0] if max_distance <= 3 else [0, *(1 << bit for bit in range(16))]
    found = [np.zeros((0, 2), dtype=np.int64)]
    for quarter in range(4):
        shift, mask = np.uint64(16 * quarter), np.uint64(0xFFFF)
        values = ((targets >> shift) & mask).astype(np.int64)
        order = np.argsort(values, kind="stable")
        starts = np.searchsorted(values[order], np.arange(2**16 + 1))
        wanted = ((queries >> shift) & mask).astype(np.int64)
        for flip in flips:
            first = starts[wanted ^ flip]
            counts = starts[(wanted ^ flip) + 1] - first
            for rows in _batches(counts):
                many = counts[rows]
                inside = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
                query, target = np.repeat(rows, many), order[np.repeat(first[rows], many) + inside]
                near = np.bitwise_count(queries[query] ^ targets[target]) <= max_distance
                found.append(np.stack([query[near], target[near]], axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[:, 0], pairs[:, 1]


def _batches(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Rows with a count above 0, in runs of about PAIRS_AT_ONCE pairs."""
    rows = np.flatnonzero(counts)
    ends = np.cumsum(counts[rows])
    cuts = np.searchsorted(ends, np.arange(PAIRS_AT_ONCE, ends[-1] if len(ends) else 0, PAIRS_AT_ONCE))
    return (run for run in np.split(rows, np.unique(cuts)) if len(run))


def look_alikes(queries: np.ndarray, targets: np.ndarray, max_distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Index pairs of hashes (n, 4) whose first words differ in at most `max_distance` bits, the others in MAX_FINE_DISTANCE."""
    rows, columns = near_pairs(queries[:, 0], targets[:, 0], max_distance)
    near = np.bitwise_count(queries[rows, 1:] ^ targets[columns, 1:]).sum(axis=1) <= MAX_FINE_DISTANCE
    return rows[near], columns[near]


def alike(hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """Group number of each of the hashes (n, 4): pictures that look alike, directly or through others, share a group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    unique, member = np.unique(hashes, axis=0, return_inverse=True)  # a thousand copies of one picture are one node
    rows, columns = look_alikes(unique, unique, max_distance)
    links = coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(len(unique), len(unique)))
    return connected_components(links, directed=False)[1][member]


def evaluation_pictures(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every picture of an evaluation set: image files, parquet (binary columns, or `{bytes, path}` as
    datasets writes them) and tar files, at `path` itself or anywhere below it. Pictures above 40 MB, and parquet
    cells that hold a path alone, come as b"".

    Raises UserError when there is nothing of the kind, or when a parquet or tar file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (--against takes a folder of pictures, parquet or tar files)")
    kinds = {".parquet", ".tar", *("." + extension for extension in IMAGE_EXTENSIONS)}
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix.lower() in kinds)
    files = [file for file in files if file.suffix.lower() in kinds]
    if not files:
        raise UserError(f"{path}: holds no picture, parquet or tar file to compare with")
    for file in files:
        name = file.name if file == path else str(file.relative_to(path))
        try:
            if file.suffix.lower() == ".parquet":
                yield from _parquet_pictures(file, name)
            elif file.suffix.lower() == ".tar":
                yield from _tar_pictures(file, name)
            else:
                yield name, file.read_bytes() if file.stat().st_size <= MAX_BYTES else b""
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{file}: cannot be read ({error}); repair or remove it") from error


def _tar_pictures(file: Path, name: str) -> Iterator[tuple[str, bytes]]:
    # Not by ShardSet: evaluation shards have no captions, and nothing is to be written beside somebody's test set.
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            if member.isreg() and member.name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS:
                data = tar.extractfile(member).read() if member.size <= MAX_BYTES else b""
                yield f"{name}: {member.name}", data


def _parquet_pictures(file: Path, name: str) -> Iterator[tuple[str, bytes]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [field.name for field in table.schema_arrow if _holds_pictures(field.type)]
        if not columns:
            raise UserError(f"{file}: no column holds pictures (columns: {', '.join(table.schema_arrow.names)})")
        row = 0
        for batch in table.iter_batches(batch_size=64, columns=columns):
            for cells in batch.to_pylist():
                for column, cell in cells.items():
                    data = cell.get("bytes") if isinstance(cell, dict) else cell
                    if cell is not None:
                        yield f"{name}: row {row}: {column}", data if data and len(data) <= MAX_BYTES else b""
                row += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: is not a parquet file, or a damaged one ({error})") from error


def _holds_pictures(kind: Any) -> bool:
    """Whether a pyarrow type is bytes, or a struct with `bytes`."""
    from pyarrow.types import is_binary, is_large_binary, is_struct

    if is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
    return kind is not None and (is_binary(kind) or is_large_binary(kind))
