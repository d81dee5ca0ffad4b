"""Labelled pictures: splits of folders or parquet files, kept disjoint by content, and their rows as batches.

Shapes: B rows, C channels, S side of a picture, K pictures, N patches, D width.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aimv2_vlm.config import LabelledData, ProbeAugmentation, UserError
from aimv2_vlm.data.augmentation import AugmentedTransform
from aimv2_vlm.data.native import WholePicture
from aimv2_vlm.data.order import Order, combine, draws
from aimv2_vlm.data.recognition import Row, check_parts, find_split, split_differs
from aimv2_vlm.data.shards import IMAGE_EXTENSIONS
from aimv2_vlm.data.transforms import MAX_BYTES, BadImage, EvalTransform, TrainTransform, decode_image


@dataclass(frozen=True)
class Picture:
    """One labelled picture. `source`: its file, or the bytes that a parquet cell holds. `digest`: of its content, or of its name
    where it cannot be read."""

    name: str
    label: str
    source: Path | bytes
    digest: str

    def read(self) -> bytes:
        """Raises BadImage. Of a file over the limit only as much is read as shows that it is."""
        if isinstance(self.source, bytes):
            return self.source
        try:
            with open(self.source, "rb") as file:
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None


def read_split(data: LabelledData, split: str) -> list[Picture]:
    """The pictures of one split in the order of their names (rows of parquet files and lists in stored order).

    With `data.name`, of a set of data/recognition.py as it lies below `data.path`. Pictures of parquet files are held in memory.
    Raises UserError where the split, a column or a label is missing.
    """
    found, data = _find(data, split)
    if isinstance(found, list):
        return [Picture(name, label, source, file_digest(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest())
                for name, label, source in found]
    pictures = [picture for file in found for picture in _read_parquet(file, data)]
    if not pictures:
        raise UserError(f"{found[0]}: split '{split}' holds no row{' that data.where keeps' if data.where else ''}")
    return pictures


def count_split(data: LabelledData, split: str) -> int | None:
    """How many pictures `read_split` would give, told without reading them; None where `data.where` chooses among rows.

    Raises UserError where the split, a column or a file is missing.
    """
    import pyarrow
    import pyarrow.parquet

    found, data = _find(data, split)
    if isinstance(found, list):
        if gone := [str(source) for _, _, source in found if isinstance(source, Path) and not source.is_file()]:
            raise UserError(f"{data.path}: {len(gone):,} of {len(found):,} pictures of split '{split}' are not there (first: {gone[0]})")
        return len(found)
    total = 0
    for file in found:
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                _check_columns(file, table.schema_arrow.names, data)
                total += table.metadata.num_rows
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: not readable as parquet ({str(error).splitlines()[0]})") from None
    return None if data.where else total


def _find(data: LabelledData, split: str) -> tuple[list[Row] | tuple[Path, ...], LabelledData]:
    """(rows of a split, or its parquet files; the keys to read these by)."""
    if not data.path:
        raise UserError("data.path: names no labelled pictures; give a folder of <split>/<class>/* or of <split>-*.parquet")
    if data.name:
        rows, data, split = find_split(data, "train" if split == data.train else "test")
        if rows is not None:
            return rows, data
    root, place = Path(data.path), Path(data.path) / split
    if place.is_dir():
        return _list_folder(place), data
    files = [place] if place.is_file() else sorted([*root.glob(f"{split}-*.parquet"), *root.glob(f"data/{split}-*.parquet")])
    if not files:
        there = [p.name for p in sorted(root.iterdir()) if p.is_dir()] if root.is_dir() else []
        raise UserError(f"{root}: no split '{split}' (neither {split}/<class>/* nor {split}-*.parquet)"
                        f"{'; folders there: ' + ', '.join(there[:8]) if there else ''}; set data.path, data.train or data.test")
    if not place.is_file():
        check_parts(f"split '{split}'", files)
    return tuple(files), data


def _list_folder(folder: Path) -> list[Row]:
    rows = []
    for group in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in sorted(group.rglob("*")):
            if file.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and not file.is_dir():
                rows.append((str(file.relative_to(folder.parent)), group.name, file))
    if not rows:
        raise UserError(f"{folder}: holds no <class>/<picture>")
    return rows


def _check_columns(file: Path, present: Sequence[str], data: LabelledData) -> list[str]:
    wanted = [data.image_column, data.label_column, *data.where]
    if missing := [column for column in wanted if column not in present]:
        raise UserError(f"{file}: no column {', '.join(missing)} (columns: {', '.join(present)}); set data.image_column or data.label_column")
    return wanted


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, of its name where it cannot be read."""
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:  # reading it again will say why
        return _name_digest(str(file))


def _name_digest(name: str) -> str:
    return hashlib.sha256(f"no content: {name}".encode()).hexdigest()


def _read_parquet(file: Path, data: LabelledData) -> list[Picture]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        wanted = _check_columns(file, table.schema_arrow.names, data)
        class_names = _class_names(table.schema_arrow.metadata, data.label_column)
        where_names = {column: _class_names(table.schema_arrow.metadata, column) for column in data.where}
        pictures, row = [], -1
        for batch in table.iter_batches(batch_size=64, columns=list(dict.fromkeys(wanted))):
            for cells in batch.to_pylist():
                row += 1
                if all(_is(cells[column], value, where_names[column]) for column, value in data.where.items()):
                    cell, name = cells[data.image_column], f"{file}: row {row}"
                    content = (cell.get("bytes") if isinstance(cell, dict) else cell) or b""
                    if not isinstance(content, bytes):
                        raise UserError(f"{file}: column {data.image_column} holds no pictures (bytes, or a struct with bytes)")
                    label = _label(cells[data.label_column], class_names, f"{name}: {data.label_column}")
                    pictures.append(Picture(name, label, content, hashlib.sha256(content).hexdigest() if content else _name_digest(name)))
        return pictures
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: not readable as parquet ({str(error).splitlines()[0]})") from None


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    """Names behind integer labels, where the file was written by `datasets`."""
    try:
        return list(json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"])
    except (KeyError, ValueError, TypeError):
        return None


def _is(cell: Any, wanted: str, names: list[str] | None) -> bool:
    """Whether a cell has the wanted value, as it is written or by the name of its class."""
    return str(cell) == wanted or (names is not None and isinstance(cell, int) and 0 <= cell < len(names) and names[cell] == wanted)


def _label(value: Any, class_names: list[str] | None, where: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, int) and class_names is not None and not isinstance(value, bool):
        if not 0 <= value < len(class_names):
            raise UserError(f"{where}: label {value}, but the file names {len(class_names)} classes")
        return class_names[value]
    if value is None or not isinstance(value, (str, int)):
        raise UserError(f"{where}: {value!r} is no class; labels are words or integers")
    return str(value)


# ------------------------------------------------------------------------------------------------------------------ splits


@dataclass(frozen=True)
class Splits:
    """Disjoint pictures of a data set (`duplicates: keep` leaves pictures of test in train, as it was published): `train` without
    `selection`, its 10 % for choosing hyper-parameters, and `test`."""

    classes: list[str]
    fit: list[Picture]
    selection: list[Picture]
    test: list[Picture]
    report: dict[str, Any]

    @property
    def train(self) -> list[Picture]:
        """All training pictures."""
        return [*self.fit, *self.selection]


def open_splits(data: LabelledData, seed: int) -> Splits:
    """Read, compare and divide. Raises UserError where test holds a class that train lacks, or pictures of train.

    The selection share is drawn class by class from (seed, content), so copies of one picture stay on one side.
    """
    if not 0 < data.selection < 1:
        raise UserError(f"data.selection: {data.selection:g} is no share of train between 0 and 1")
    train, test = read_split(data, data.train), read_split(data, data.test)
    classes = sorted({picture.label for picture in train})
    if len(classes) < 2:
        raise UserError(f"{data.path}: train has the class {classes[0]} alone; a probe needs two")
    if unknown := sorted({picture.label for picture in test} - set(classes)):
        raise UserError(f"{data.path}: {data.test} has classes that {data.train} lacks: {', '.join(unknown[:5])}")
    held = {picture.digest for picture in test}
    shared = [picture.name for picture in train if picture.digest in held]
    if shared and data.duplicates == "refuse":
        raise UserError(f"{data.path}: {len(shared)} pictures of {data.train} are in {data.test} too (first: {shared[0]}); remove them "
                        "or set data.duplicates=drop, which trains without them (keep: the set as it was published)")
    # One content under two classes is a mistake in the data that no probe can mend; it is counted, not judged.
    two_labels = sum(len(labels) > 1 for labels in _labels_of_contents([*train, *test]).values())
    if data.duplicates != "keep":
        train = [picture for picture in train if picture.digest not in held]
    if left := sorted(set(classes) - {picture.label for picture in train}):
        raise UserError(f"{data.path}: without the pictures of {data.test}, {data.train} has none of {', '.join(left[:5])}")
    chosen = _chosen(train, data.selection, seed)
    copies = Counter(picture.digest for picture in train)
    report = {"train": len(train), "test": len(test), "classes": len(classes),
              "duplicates_dropped_from_train": shared[:1000] if data.duplicates == "drop" else [],
              "duplicates_kept_in_train": len(shared) if data.duplicates == "keep" else 0,
              "differs_from_published": split_differs(data.name, len(train), len(test), len(classes)) if data.name else "",
              "copies_within_train": sum(count - 1 for count in copies.values()), "contents_with_two_labels": two_labels}
    fit, selection = ([p for p in train if (p.digest in chosen) == inside] for inside in (False, True))
    return Splits(classes, fit, selection, test, report)


def _labels_of_contents(pictures: Iterable[Picture]) -> dict[str, set[str]]:
    labels: dict[str, set[str]] = defaultdict(set)
    for picture in pictures:
        labels[picture.digest].add(picture.label)
    return labels


def _chosen(train: Sequence[Picture], share: float, seed: int) -> set[str]:
    """Contents that go to the selection split: of each class this share, one at least where the class has two."""
    by_class: dict[str, set[str]] = defaultdict(set)
    for picture in train:
        by_class[picture.label].add(picture.digest)
    chosen: set[str] = set()
    for contents in by_class.values():
        ranked = sorted(contents, key=lambda content: combine(seed, int(content[:16], 16)))
        chosen.update(ranked[: min(len(ranked) - 1, max(1, math.floor(share * len(ranked) + 0.5)))])
    return chosen


# -------------------------------------------------------------------------------------------------------------------- rows


class FrozenFeatures:
    """Features of pictures under the evaluation transform, computed once and held in memory."""

    def __init__(self, table_KND: torch.Tensor, places: dict[str, int], bad: dict[str, str]):
        self.table_KND, self.places, self.bad = table_KND, places, bad

    @classmethod
    def compute(
        cls, pictures: Sequence[Picture], transform: EvalTransform, encode: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, int],
        dtype: torch.dtype = torch.float32, batch_size: int = 64, progress: Callable[[int, int], None] | None = None,
    ) -> FrozenFeatures:
        """encode: uint8 (B, 3, S, S) -> (B, N, D). shape: (N, D). Bad pictures have no place, `get` says why."""
        pictures = list({picture.digest: picture for picture in pictures}.values())
        table_KND, places, bad = torch.zeros(len(pictures), *shape, dtype=dtype), {}, {}
        for start in range(0, len(pictures), batch_size):
            pixels = []
            for picture in pictures[start : start + batch_size]:
                try:
                    pixels.append(transform(decode_image(picture.read())))
                    places[picture.digest] = len(places)
                except BadImage as error:
                    bad[picture.digest] = error.reason
            if pixels:
                table_KND[len(places) - len(pixels) : len(places)] = encode(torch.stack(pixels)).to("cpu", dtype)
            if progress is not None:
                progress(min(start + batch_size, len(pictures)), len(pictures))
        return cls(table_KND, places, bad)

    def get(self, picture: Picture) -> torch.Tensor:
        """(N, D). Raises BadImage."""
        if picture.digest in self.bad:
            raise BadImage(self.bad[picture.digest])
        return self.table_KND[self.places[picture.digest]]

    @property
    def blank(self) -> torch.Tensor:
        """What a hole holds."""
        return torch.zeros(self.table_KND.shape[1:], dtype=self.table_KND.dtype)


class LabelledDataset:
    """Rows of labelled pictures: `microbatch` in the order of training, `evaluation` in stored order.

    A batch: pixels uint8 (B, 3, S, S) (B, 3, H, W for `WholePicture`) or features (B, N, D); labels int64 (B,); weights float32 (B,), 0 for a hole (a
    picture that cannot be decoded: blank, label 0); bad: list of 'name: reason'. With `features` nothing is decoded.
    """

    def __init__(
        self, pictures: Sequence[Picture], classes: Sequence[str], seed: int, evaluation: EvalTransform | WholePicture,
        training: AugmentedTransform | None = None, features: FrozenFeatures | None = None,
    ):
        self.pictures, self.seed, self.features = pictures, seed, features
        self.evaluation_transform, self.training_transform = evaluation, training
        self.label_ids = {label: number for number, label in enumerate(classes)}
        self.order = Order([[len(pictures)]], [1.0], seed)

    def __len__(self) -> int:
        return len(self.pictures)

    def microbatch(self, positions: Iterable[int]) -> dict[str, Any]:
        """The training rows at global positions; every epoch in a new order, every draw from (seed, position)."""
        return self._batch(*self._rows([(self.pictures[self.order.locate(p).sample], p) for p in positions]))

    def evaluation(self, numbers: Iterable[int]) -> dict[str, Any]:
        """Rows by their number in the split; pictures of one size."""
        return self._batch(*self._rows([(self.pictures[number], None) for number in numbers]))

    def evaluations(self, numbers: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """The same rows as batches of pictures of one size each, with their numbers."""
        inputs, labels, weights, bad = self._rows([(self.pictures[number], None) for number in numbers])
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, one in enumerate(inputs):
            groups[tuple(one.shape)].append(row)
        for rows in groups.values():
            taken = ([column[row] for row in rows] for column in (inputs, labels, weights))
            yield [numbers[row] for row in rows], self._batch(*taken, bad)
            bad = []  # told once

    def _rows(self, rows: list[tuple[Picture, int | None]]) -> tuple[list[torch.Tensor], list[int], list[float], list[str]]:
        inputs, labels, weights, bad = [], [], [], []
        for picture, position in rows:
            try:
                inputs.append(self._input(picture, position))
                labels.append(self.label_ids[picture.label])
                weights.append(1.0)
            except BadImage as error:
                inputs.append(self._blank())
                labels.append(0)
                weights.append(0.0)
                bad.append(f"{picture.name}: {error.reason}")
        return inputs, labels, weights, bad

    def _batch(self, inputs: list[torch.Tensor], labels: list[int], weights: list[float], bad: list[str]) -> dict[str, Any]:
        return {"pixels" if self.features is None else "features": torch.stack(inputs), "labels": torch.tensor(labels),
                "weights": torch.tensor(weights), "bad": bad}

    def _input(self, picture: Picture, position: int | None) -> torch.Tensor:
        if self.features is not None:
            return self.features.get(picture)
        if position is None or self.training_transform is None:
            return self.evaluation_transform(decode_image(picture.read()))
        return self.training_transform.decode(picture.read(), draws(self.seed, position, "crop"), draws(self.seed, position, "augment"))

    def _blank(self) -> torch.Tensor:
        return self.evaluation_transform.blank if self.features is None else self.features.blank


def training_transform(augment: ProbeAugmentation, size: int, mean: Sequence[float]) -> AugmentedTransform | None:
    """Tables A2 and B1's transform of training pictures, None for `policy: none`."""
    if augment.policy == "none":
        return None
    crop = TrainTransform(size, tuple(augment.scale), tuple(augment.ratio), augment.flip, augment.resize)
    return AugmentedTransform(crop, augment.color_jitter, tuple(mean))


def class_counts(pictures: Iterable[Picture], classes: Sequence[str]) -> dict[str, int]:
    """Pictures of each class."""
    counts = Counter(picture.label for picture in pictures)
    return {label: counts[label] for label in classes}
