"""The 14 recognition sets of the paper (Table B1) by name, read as their owners publish them, their counts checked.

Each is found as `<split>/<class>/*`, as parquet (Hugging Face), or in its own layout (torchvision's, WILDS'). Pickled batches are never
opened: CIFAR is read from its binary version.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aimv2_vlm.config import LabelledData, UserError

Row = tuple[str, str, Path | bytes]  # name, label, file or content
Layout = Callable[[Path, str], list[Row] | None]  # (folder, "train" or "test") -> rows, None where the set does not lie like that


@dataclass(frozen=True)
class DataSet:
    """Table B1's counts, the names its two splits go by, parquet columns, and its own layout. The metric is top-1 accuracy."""

    train: int
    test: int
    classes: int
    own: Layout | None = None
    layout: str = ""  # the own one, in words
    train_names: tuple[str, ...] = ("train",)
    test_names: tuple[str, ...] = ("test",)
    image_columns: tuple[str, ...] = ("image", "img")
    label_columns: tuple[str, ...] = ("label",)
    where: dict[str, str] = field(default_factory=dict)  # parquet rows that belong to it
    metric: str = "top-1"


def find_data_set(name: str) -> DataSet:
    """Raises UserError with the nearest names."""
    if name in DATA_SETS:
        return DATA_SETS[name]
    near = difflib.get_close_matches(name.lower(), DATA_SETS, n=2, cutoff=0.0)
    raise UserError(f"data.name: {name!r} is none of the known sets; did you mean {' or '.join(near)}? (for your own pictures leave the name out)")


def find_split(data: LabelledData, split: str) -> tuple[list[Row] | None, LabelledData, str]:
    """How the split ("train" or "test") of the named set lies below `data.path`: (its rows, -, -) in its own layout, else
    (None, keys, split name) to read it as a folder or parquet by. Raises UserError where it is not there."""
    about, root = find_data_set(data.name), Path(data.path)
    if (other := next((key for key in ("train", "test") if getattr(data, key) != getattr(LabelledData(), key)), None)) is not None:
        raise UserError(f"data.{other}: {getattr(data, other)!r}, but {data.name} has its own splits; remove the key, or data.name")
    if about.own is not None and (rows := about.own(root, split)) is not None:
        if not rows:
            raise UserError(f"{root}: {data.name}'s {split} split names no picture")
        return rows, data, split
    names = about.train_names if split == "train" else about.test_names
    for name in names:
        files = sorted([*root.glob(f"{name}-*.parquet"), *root.glob(f"data/{name}-*.parquet")])
        if files:
            return None, _columns(data, about, files[0]), name
        if (root / name).is_dir():
            return None, data, name
    kinds = [f"{names[0]}/<class>/*", f"{names[0]}-*.parquet", *([about.layout] if about.layout else [])]
    raise UserError(f"{root}: no {split} split of {data.name}; looked for {', '.join(kinds)}{_pickled(root)}")


def _pickled(root: Path) -> str:
    found = [name for name in ("cifar-10-batches-py", "cifar-100-python") if (root / name).is_dir()]
    return f"; {found[0]} holds pickles, which are not opened: fetch the binary version" if found else ""


def _columns(data: LabelledData, about: DataSet, file: Path) -> LabelledData:
    """`data` with the columns that this parquet file has."""
    import copy

    import pyarrow.parquet

    present = pyarrow.parquet.read_schema(file).names
    data = copy.copy(data)
    for key, known in (("image_column", about.image_columns), ("label_column", about.label_columns)):
        if getattr(data, key) == getattr(LabelledData(), key):  # another one was asked for
            setattr(data, key, next((column for column in known if column in present), getattr(data, key)))
    data.where = {c: v for c, v in about.where.items() if c in present} | data.where
    return data


_PART = re.compile(r"-(\d{5})-of-(\d{5})")


def check_parts(what: str, files: Sequence[Path]) -> None:
    """A set in parts (`…-00000-of-00003.parquet`) is whole: each part once, none missing. Raises UserError."""
    parts = [found.groups() for found in (_PART.search(file.name) for file in files) if found]
    totals = {total for _, total in parts}
    if len(totals) > 1 or len(set(parts)) < len(parts):
        twice = Counter(part for part, _ in parts).most_common(1)[0][0]
        raise UserError(f"{files[0].parent}: part {twice} of {what} lies there more than once (two uploads?); keep one of each")
    if parts and len(parts) < int(parts[0][1]):
        raise UserError(f"{files[0].parent}: {len(parts)} of {int(parts[0][1])} parts of {what}; fetch the missing ones")


def split_differs(name: str, train: int, test: int, classes: int) -> str:
    """What of a set's counts is not Table B1's, in words; empty where all are."""
    about = find_data_set(name)
    pairs = {"train": (train, about.train), "test": (test, about.test), "classes": (classes, about.classes)}
    return "; ".join(f"{part} {found:,} instead of {wanted:,}" for part, (found, wanted) in pairs.items() if found != wanted)


# ----------------------------------------------------------------------------------------------------------------- layouts


def _at(root: Path, *relative: str) -> Path | None:
    """The folder (root, or one below it) that holds one of these files or folders."""
    places = [root, *sorted(p for p in root.iterdir() if p.is_dir())] if root.is_dir() else []
    return next((place for place in places for name in relative if (place / name).exists()), None)


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not JSON ({error})") from None


def _csv(file: Path, *columns: str) -> Iterable[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if missing := [c for c in columns if c not in (reader.fieldnames or [])]:
            raise UserError(f"{file}: no column {', '.join(missing)} (columns: {', '.join(reader.fieldnames or [])})")
        yield from reader


def _food101(root: Path, split: str) -> list[Row] | None:
    if (place := _at(root, f"meta/{split}.txt", f"meta/{split}.json")) is None:
        return None
    if (place / f"meta/{split}.txt").exists():
        names = _lines(place / f"meta/{split}.txt")
    else:
        names = [name for listed in _json(place / f"meta/{split}.json").values() for name in listed]
    return [(name, name.split("/")[0], place / "images" / f"{name}.jpg") for name in names]


def _dtd(root: Path, split: str) -> list[Row] | None:
    if (place := _at(root, "labels/train1.txt")) is None:
        return None
    names = [name for part in (("train1", "val1") if split == "train" else ("test1",)) for name in _lines(place / "labels" / f"{part}.txt")]
    return [(name, name.split("/")[0], place / "images" / name) for name in names]


def _pets(root: Path, split: str) -> list[Row] | None:
    if (place := _at(root, "annotations/trainval.txt")) is None:
        return None
    names = [line.split()[0] for line in _lines(place / "annotations" / ("trainval.txt" if split == "train" else "test.txt")) if line[0] != "#"]
    return [(name, name.rpartition("_")[0], place / "images" / f"{name}.jpg") for name in names]


def _eurosat(root: Path, split: str) -> list[Row] | None:
    if (lists := _at(root, f"eurosat-{split}.txt")) is None or (pictures := _at(root, "AnnualCrop")) is None:
        return None
    stems = [line.split("/")[-1].rpartition(".")[0] or line for line in _lines(lists / f"eurosat-{split}.txt")]
    return [(stem, label := stem.rpartition("_")[0], pictures / label / f"{stem}.jpg") for stem in stems]


def _infograph(root: Path, split: str) -> list[Row] | None:
    if (place := _at(root, f"infograph_{split}.txt")) is None:
        return None
    names = [line.rsplit(" ", 1)[0] for line in _lines(place / f"infograph_{split}.txt")]
    return [(name, name.split("/")[-2], place / name) for name in names]


def _inat18(root: Path, split: str) -> list[Row] | None:
    if (place := _at(root, file := f"{'train' if split == 'train' else 'val'}2018.json")) is None:
        return None
    content = _json(place / file)
    try:
        labels = {row["image_id"]: str(row["category_id"]) for row in content["annotations"]}
        return [(row["file_name"], labels[row["id"]], place / row["file_name"]) for row in content["images"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{place / file}: not iNaturalist's annotations ({type(error).__name__}: {error})") from None


def _cars(root: Path, split: str) -> list[Row] | None:
    names = {"train": ["devkit/cars_train_annos.mat"], "test": ["cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat"]}[split]
    if (place := _at(root, *names)) is None:
        return None
    from scipy.io import loadmat

    file = next(place / name for name in names if (place / name).exists())
    try:
        rows = loadmat(file, squeeze_me=True)["annotations"]
        return [(str(row["fname"]), str(int(row["class"])), place / f"cars_{split}" / str(row["fname"])) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the annotations of Cars ({type(error).__name__}: {error})") from None


def _cifar(files: dict[str, list[str]], names: str, label_bytes: int) -> Layout:
    def read(root: Path, split: str) -> list[Row] | None:
        if (place := _at(root, files[split][0])) is None:
            return None
        import numpy as np
        from PIL import Image

        classes, rows = _lines(place / names), []
        for name in files[split]:
            content = np.fromfile(place / name, np.uint8)
            if content.size % (label_bytes + 3072):
                raise UserError(f"{place / name}: {content.size:,} bytes are not whole rows of {label_bytes + 3072}")
            for number, row in enumerate(content.reshape(-1, label_bytes + 3072)):
                picture = io.BytesIO()
                Image.fromarray(row[label_bytes:].reshape(3, 32, 32).transpose(1, 2, 0)).save(picture, "BMP")
                rows.append((f"{name}: row {number}", classes[row[label_bytes - 1]], picture.getvalue()))
        return rows

    return read


def _camelyon17(root: Path, split: str) -> list[Row] | None:
    """WILDS: train without hospitals 1 and 2; test is the out-of-distribution validation, hospital 1."""
    columns = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
    if (place := _at(root, "metadata.csv")) is None or not (place / "patches").is_dir():
        return None
    rows = []
    for row in _csv(place / "metadata.csv", *columns):
        wanted = row["center"] == "1" if split == "test" else row["center"] not in ("1", "2") and row["split"] == "0"
        if wanted:
            folder = f"patient_{int(row['patient']):03d}_node_{row['node']}"
            name = f"patches/{folder}/patch_{folder}_x_{row['x_coord']}_y_{row['y_coord']}.png"
            rows.append((name, row["tumor"], place / name))
    return rows


def _rxrx1(root: Path, split: str) -> list[Row] | None:
    """WILDS: train is site 1 of the training experiments; test the out-of-distribution validation, both sites."""
    columns = ("experiment", "plate", "well", "site", "sirna_id", "dataset")
    if (place := _at(root, "metadata.csv")) is None or not (place / "images").is_dir():
        return None
    rows = []
    for row in _csv(place / "metadata.csv", *columns):
        if row["dataset"] == "val" if split == "test" else row["dataset"] == "train" and row["site"] == "1":
            name = f"images/{row['experiment']}/Plate{row['plate']}/{row['well']}_s{row['site']}.png"
            rows.append((name, row["sirna_id"], place / name))
    return rows


def _fmow(root: Path, split: str) -> list[Row] | None:
    """WILDS: train until 2012; test the out-of-distribution validation, 2013 to 2015."""
    if (place := _at(root, "rgb_metadata.csv")) is None:
        return None
    rows = []
    for number, row in enumerate(_csv(place / "rgb_metadata.csv", "split", "category", "timestamp")):
        year = int(row["timestamp"][:4])
        if row["split"] == "val" and 2013 <= year < 2016 if split == "test" else row["split"] == "train" and year < 2013:
            rows.append((f"rgb_img_{number}.png", row["category"], place / "images" / f"rgb_img_{number}.png"))
    return rows


_VALIDATION = ("val", "validation")
_CIFAR10 = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
_CIFAR100 = {"train": ["train.bin"], "test": ["test.bin"]}
DATA_SETS: dict[str, DataSet] = {
    "imagenet-1k": DataSet(1_281_167, 50_000, 1000, test_names=_VALIDATION),
    "inat-18": DataSet(437_513, 24_426, 8142, _inat18, "train2018.json and val2018.json", test_names=_VALIDATION),
    "cifar-10": DataSet(50_000, 10_000, 10, _cifar(_CIFAR10, "batches.meta.txt", 1), "cifar-10-batches-bin"),
    "cifar-100": DataSet(50_000, 10_000, 100, _cifar(_CIFAR100, "fine_label_names.txt", 2), "cifar-100-binary", label_columns=("fine_label", "label")),
    "food101": DataSet(75_750, 25_250, 101, _food101, "images/ and meta/train.txt", test_names=("test", *_VALIDATION)),
    "dtd": DataSet(3_760, 1_880, 47, _dtd, "images/ and labels/train1.txt"),
    "pets": DataSet(3_680, 3_669, 37, _pets, "images/ and annotations/trainval.txt", train_names=("train", "trainval")),
    "cars": DataSet(8_144, 8_041, 196, _cars, "devkit/cars_train_annos.mat and cars_test_annos_withlabels.mat"),
    "camelyon17": DataSet(302_436, 34_904, 2, _camelyon17, "WILDS' metadata.csv and patches/", test_names=_VALIDATION),
    "pcam": DataSet(262_144, 32_768, 2),
    "rxrx1": DataSet(40_612, 9_854, 1139, _rxrx1, "WILDS' metadata.csv and images/", test_names=_VALIDATION, label_columns=("sirna_id", "label")),
    "eurosat": DataSet(16_200, 5_400, 10, _eurosat, "eurosat-train.txt beside the classes' folders"),
    "fmow": DataSet(76_863, 19_915, 62, _fmow, "WILDS' rgb_metadata.csv and images/", test_names=_VALIDATION, label_columns=("label", "category")),
    "infograph": DataSet(36_023, 15_582, 345, _infograph, "infograph_train.txt and infograph/", where={"domain": "infograph"}),
}
