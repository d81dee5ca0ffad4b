"""COCO captions and boxes, LVIS and RefCOCO annotation files -> rows of one kind. A broken annotation is left out, counted under a
reason and named; nothing is repaired silently (boxes that stick out of their picture are cut, and counted)."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from aimv2_vlm.config import UserError
from aimv2_vlm.data.shards import atomic_file

EXAMPLES = 10  # broken annotations of one reason that a report names


@dataclass(frozen=True)
class Box:
    """`xyxy`: left, top, right, bottom in pixels, inside the picture. `text` is the category's name, or the phrase that refers to
    the box. `id` is the annotation's (of a phrase its box's). A crowd box covers many objects at once: detectors are neither
    trained on it nor punished for what they find in it."""

    xyxy: tuple[float, float, float, float]
    text: str
    id: int | str
    category_id: int | None = None
    is_crowd: bool = False


@dataclass(frozen=True)
class AnnotatedImage:
    """One picture. `image` is its path below the image folder, (height, width) its size in pixels as the file says.

    LVIS: categories surely absent (`absent_ids`), and those of which not every instance is marked (`partial_ids`).
    """

    image: str
    id: int | str
    height: int
    width: int
    captions: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    split: str | None = None
    absent_ids: tuple[int, ...] = ()
    partial_ids: tuple[int, ...] = ()

    def as_row(self) -> dict[str, Any]:
        """JSON-ready; with `image` and `captions` it is a row for `aimv2-vlm data pack --captions`."""
        row: dict[str, Any] = {"image": self.image, "image_id": self.id, "height": self.height, "width": self.width}
        if self.split is not None:
            row["split"] = self.split
        if self.captions:
            row["captions"] = list(self.captions)
        if self.boxes:
            row["boxes"] = [
                {"xyxy": list(box.xyxy), "text": box.text, "id": box.id, "category_id": box.category_id, "is_crowd": box.is_crowd}
                for box in self.boxes
            ]
        return row


@dataclass
class Annotations:
    """What a reader found. `categories`: id -> name. `broken`: (what, reason) of everything left out, in the file's order."""

    path: str
    rows: list[AnnotatedImage] = field(default_factory=list)
    categories: dict[int, str] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)
    num_clipped: int = 0  # boxes cut at the picture's border

    def leave_out(self, what: str, reason: str) -> None:
        self.broken.append((what, reason))

    def report(self) -> dict[str, Any]:
        """Counts, and the first EXAMPLES of every reason; JSON-ready."""
        examples: dict[str, list[str]] = {}
        for what, reason in self.broken:
            names = examples.setdefault(reason, [])
            if len(names) < EXAMPLES:
                names.append(what)
        boxes = [box for row in self.rows for box in row.boxes]
        return {
            "path": self.path,
            "num_images": len(self.rows),
            "num_captions": sum(len(row.captions) for row in self.rows),
            "num_boxes": len(boxes),
            "num_crowd_boxes": sum(box.is_crowd for box in boxes),
            "num_clipped_boxes": self.num_clipped,
            "num_categories": len(self.categories),
            "num_broken": len(self.broken),
            "broken": dict(Counter(reason for _, reason in self.broken).most_common()),
            "broken_examples": examples,
        }

    def write_jsonl(self, path: str | os.PathLike) -> None:
        """All rows as JSON lines (`as_row`), atomically."""
        with atomic_file(Path(path)) as file:
            for row in self.rows:
                file.write(json.dumps(row.as_row(), ensure_ascii=False).encode("utf-8", "replace") + b"\n")


# -------------------------------------------------------------------------------------------------------------- readers

FORMS = ("coco_captions", "coco_instances", "lvis", "refcoco")


def read_annotations(
    form: str, path: str | os.PathLike, images: str | os.PathLike, instances: str | os.PathLike | None = None, split: str | None = None
) -> Annotations:
    """By the name of a form, one of FORMS; instances and split as in `read_refcoco`. Raises UserError."""
    if form not in FORMS:
        raise UserError(f"{form}: is no form of annotations; choose from {', '.join(FORMS)}")
    if form == "refcoco":
        return read_refcoco(path, images, instances, split)
    if instances is not None or split is not None:
        raise UserError(f"{path}: instances and split are for refcoco, not for {form}")
    return {"coco_captions": read_coco_captions, "coco_instances": read_coco_instances, "lvis": read_lvis}[form](path, images)


def read_coco_captions(path: str | os.PathLike, images: str | os.PathLike) -> Annotations:
    """COCO's `captions_*.json` with the pictures below `images`; a row per picture that has a caption.

    Raises UserError when the file is no such JSON, or no picture at all is found below `images`; so do the others.
    """
    data, found = _load(path), Annotations(str(path))
    pictures = _pictures(data, found, images)
    captions: dict[int | str, list[str]] = {}
    for what, item in _items(data, "annotations", found, unique=True):
        text = item.get("caption")
        if not _is_id(item.get("image_id")) or item["image_id"] not in pictures:
            found.leave_out(what, _no_picture(item))
        elif not isinstance(text, str) or not text.strip():
            found.leave_out(what, "empty caption")
        else:
            captions.setdefault(item["image_id"], []).append(" ".join(text.split()))
    for key, picture in pictures.items():
        if key in captions:
            found.rows.append(AnnotatedImage(**picture, captions=tuple(captions[key])))
        else:
            found.leave_out(f"image {key}", "no caption")
    return found


def read_coco_instances(path: str | os.PathLike, images: str | os.PathLike, keep_crowd: bool = True) -> Annotations:
    """COCO's `instances_*.json`: boxes with category names. Pictures without any box are rows too (detectors are judged on them).

    `keep_crowd=False` leaves crowd boxes out (they are not broken, so not counted as such).
    """
    return _read_boxes(path, images, _file_name, keep_crowd)


def read_lvis(path: str | os.PathLike, images: str | os.PathLike) -> Annotations:
    """LVIS v1's `lvis_v1_*.json`. `images` holds COCO's `train2017` and `val2017`: the split is part of each picture's address
    in the file, and LVIS mixes the two. Rows carry `absent_ids` and `partial_ids`."""
    return _read_boxes(path, images, _lvis_name, keep_crowd=True)


def read_refcoco(
    path: str | os.PathLike, images: str | os.PathLike, instances: str | os.PathLike | None = None, split: str | None = None
) -> Annotations:
    """RefCOCO, RefCOCO+ and RefCOCOg as JSON: a row per picture, a box per phrase.

    Two forms: the list of `refs(unc).p`, dumped as JSON, with the `instances.json` that lies beside it (or `instances`);
    or MDETR's `finetune_refcoco_*.json`, where each phrase is an image of its own with `caption` and one box. `split`
    keeps train, val, testA, testB or test of the first form. The original `.p` file is a pickle and is refused.
    """
    data = _load(path, "JSON list of refs, or MDETR's object with 'images' and 'annotations'", (list, dict))
    if isinstance(data, dict):
        if split is not None:
            raise UserError(f"{path}: split={split!r} is for the refs form; an MDETR file holds one split")
        return _read_mdetr(data, path, images)
    beside = Path(instances) if instances is not None else Path(path).with_name("instances.json")
    if not beside.is_file():
        raise UserError(f"{beside}: no such file; the boxes of {path} stand in its instances.json: give instances=")
    return _read_refs(data, _load(beside), Annotations(str(path)), images, split)


def _read_boxes(path: str | os.PathLike, images: str | os.PathLike, name_of: Callable[[dict], Any], keep_crowd: bool) -> Annotations:
    data, found = _load(path), Annotations(str(path))
    _categories(data, found)
    pictures = _pictures(data, found, images, name_of)
    boxes: dict[int | str, list[Box]] = {}
    for what, item in _items(data, "annotations", found, unique=True):
        box = _box(item, what, pictures, found)
        if box is not None and (keep_crowd or not box.is_crowd):
            boxes.setdefault(item["image_id"], []).append(box)
    extras = {item.get("id"): item for item in data["images"] if isinstance(item, dict) and _is_id(item.get("id"))}
    for key, picture in pictures.items():
        ids = {
            name: tuple(i for i in listed if isinstance(i, int) and i in found.categories) if isinstance(listed, list) else ()
            for name, listed in (
                ("absent_ids", extras[key].get("neg_category_ids")),
                ("partial_ids", extras[key].get("not_exhaustive_category_ids")),
            )
        }
        found.rows.append(AnnotatedImage(**picture, boxes=tuple(boxes.get(key, ())), **ids))
    return found


def _read_refs(refs: list, data: dict, found: Annotations, images: str | os.PathLike, split: str | None) -> Annotations:
    _categories(data, found)
    wanted = {
        ref.get("image_id") for ref in refs if isinstance(ref, dict) and split in (None, ref.get("split")) and _is_id(ref.get("image_id"))
    }
    everything = {item.get("id") for item in data["images"] if isinstance(item, dict) and _is_id(item.get("id"))}
    needed = {
        **data,
        "images": [item for item in data["images"] if isinstance(item, dict) and _is_id(item.get("id")) and item["id"] in wanted],
    }
    pictures = _pictures(needed, found, images)
    # An annotation that nothing refers to is nobody's loss: only those that a ref names are judged.
    annotations = {item["id"]: item for item in data["annotations"] if isinstance(item, dict) and _is_id(item.get("id"))}
    boxes: dict[tuple[Any, Any], list[Box]] = {}
    for number, ref in enumerate(refs):
        if not isinstance(ref, dict):
            found.leave_out(f"ref number {number}", "not an object")
            continue
        if split is not None and ref.get("split") != split:
            continue
        what = f"ref {ref.get('ref_id', f'number {number}')}"
        item = annotations.get(ref.get("ann_id")) if _is_id(ref.get("ann_id")) else None
        if item is None:
            found.leave_out(what, "unknown annotation")
        elif item.get("image_id") != ref.get("image_id"):
            found.leave_out(what, "annotation of another picture")
        elif item["image_id"] not in everything:
            found.leave_out(what, "unknown picture")
        else:
            box = _box(item, what, pictures, found)
            phrases = _phrases(ref, what, found) if box is not None else []
            key = item["image_id"], ref.get("split")
            boxes.setdefault(key, []).extend(Box(box.xyxy, text, box.id, box.category_id, box.is_crowd) for text in phrases)
    for (key, part), phrases in boxes.items():
        if phrases:
            found.rows.append(AnnotatedImage(**pictures[key], boxes=tuple(phrases), split=part))
    if split is not None and not found.rows:
        splits = ", ".join(sorted({str(ref.get("split")) for ref in refs if isinstance(ref, dict)}))
        raise UserError(f"{found.path}: nothing usable in split={split!r} (the file has {splits})")
    return found


def _phrases(ref: dict, what: str, found: Annotations) -> list[str]:
    sentences = ref.get("sentences")
    texts = []
    for number, sentence in enumerate(sentences if isinstance(sentences, list) else []):
        text = sentence.get("sent") or sentence.get("raw") if isinstance(sentence, dict) else None
        if isinstance(text, str) and text.strip():
            texts.append(" ".join(text.split()))
        else:
            found.leave_out(f"{what}: sentence {number}", "empty phrase")
    if not sentences or not isinstance(sentences, list):
        found.leave_out(what, "no phrase")
    return texts


def _read_mdetr(data: dict, path: str | os.PathLike, images: str | os.PathLike) -> Annotations:
    found = Annotations(str(path))
    if isinstance(data.get("categories"), list):
        _categories(data, found)
    pictures = _pictures(data, found, images)
    phrases = {item["id"]: item for item in data["images"] if isinstance(item, dict) and _is_id(item.get("id"))}
    rows: dict[Any, tuple[dict, list[Box]]] = {}
    for what, item in _items(data, "annotations", found, unique=True):
        box = _box(item, what, pictures, found, need_category=False)
        if box is None:
            continue
        image = phrases[item["image_id"]]
        text = image.get("caption")
        if not isinstance(text, str) or not text.strip():
            found.leave_out(what, "empty phrase")
            continue
        # Every phrase is an image of its own there; `original_id` is COCO's, so one row holds all phrases of a picture.
        key = image["original_id"] if _is_id(image.get("original_id")) else item["image_id"]
        picture = {**pictures[item["image_id"]], "id": key}
        name = item["original_id"] if _is_id(item.get("original_id")) else box.id
        rows.setdefault(key, (picture, []))[1].append(Box(box.xyxy, " ".join(text.split()), name, box.category_id, box.is_crowd))
    found.rows = [AnnotatedImage(**picture, boxes=tuple(boxes)) for picture, boxes in rows.values()]
    return found


# --------------------------------------------------------------------------------------------------------------- pieces


def _load(path: str | os.PathLike, shape: str = "JSON object with 'images' and 'annotations'", kinds: tuple[type, ...] = (dict,)) -> Any:
    """The JSON of an annotation file, outlines left out (they are most of it). Raises UserError."""

    def without_outline(item: dict) -> dict:
        item.pop("segmentation", None)
        return item

    try:
        with open(path, "rb") as file:
            start = file.read(2)
            # A pickle of protocol 2 or later begins with 0x80, of protocol 0 (the refs files) with "(".
            if start[:1] in (b"\x80", b"(") or str(path).endswith((".p", ".pkl", ".pickle")):
                raise UserError(
                    f"{path}: is a pickle, which can run code when it is opened, and is never read; convert it to JSON "
                    "once, in an environment that you would lose without regret, and give that file"
                )
            file.seek(0)
            data = json.load(file, object_hook=without_outline)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({str(error)[:100]}); is the file complete?") from None
    if not isinstance(data, kinds):
        raise UserError(f"{path}: is not a {shape}")
    missing = [] if isinstance(data, list) else [name for name in ("images", "annotations") if not isinstance(data.get(name), list)]
    if missing:
        raise UserError(f"{path}: has no list '{missing[0]}', so it is not a {shape}")
    return data


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _items(data: dict, name: str, found: Annotations, unique: bool) -> Iterator[tuple[str, dict]]:
    """(what to call it, item) of a list's objects with an id; others, and a second one of an id, are left out."""
    seen: set[int | str] = set()
    for number, item in enumerate(data[name]):
        what = f"{name.removesuffix('s')} number {number}"
        if not isinstance(item, dict):
            found.leave_out(what, "not an object")
        elif not _is_id(item.get("id")):
            found.leave_out(what, "no id")
        elif unique and item["id"] in seen:
            found.leave_out(f"{name.removesuffix('s')} {item['id']}", "id used before")
        else:
            seen.add(item["id"])
            yield f"{name.removesuffix('s')} {item['id']}", item


def _categories(data: dict, found: Annotations) -> None:
    if not isinstance(data.get("categories"), list):
        raise UserError(f"{found.path}: has no list 'categories', so boxes have no names; is it a captions file?")
    for number, item in enumerate(data["categories"]):
        name = item.get("name") if isinstance(item, dict) else None
        if isinstance(name, str) and name.strip() and isinstance(item.get("id"), int) and item["id"] not in found.categories:
            found.categories[item["id"]] = name
        else:
            found.leave_out(f"category number {number}", "no id and name of its own")


def _file_name(item: dict) -> Any:
    return item.get("file_name")


def _lvis_name(item: dict) -> Any:
    """`train2017/000000391895.jpg` of `http://…/train2017/000000391895.jpg`."""
    address = item.get("coco_url")
    return "/".join(PurePosixPath(urlsplit(address).path).parts[-2:]) if isinstance(address, str) else item.get("file_name")


def _pictures(data: dict, found: Annotations, images: str | os.PathLike, name_of: Callable[[dict], Any] = _file_name) -> dict[Any, dict]:
    """id -> image, id, height, width of every picture that is there."""
    root = Path(images)
    if not root.is_dir():
        raise UserError(f"{root}: no such image folder (pictures of {found.path})")
    pictures: dict[Any, dict] = {}
    exists: dict[str, bool] = {}
    missing = None
    for what, item in _items(data, "images", found, unique=True):
        name, height, width = name_of(item), item.get("height"), item.get("width")
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            found.leave_out(what, "no file name")
        elif PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            found.leave_out(what, "picture outside the image folder")
        elif not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in (height, width)):
            found.leave_out(what, "no size")
        else:
            if name not in exists:
                exists[name] = (root / name).is_file()
            if exists[name]:
                pictures[item["id"]] = {"image": name, "id": item["id"], "height": height, "width": width}
            else:
                missing = missing or name
                found.leave_out(f"{what} ({name})", "missing picture")
    if missing is not None and not pictures:
        raise UserError(
            f"{root}: holds none of the {len(exists)} pictures of {found.path}, for instance no '{missing}'; "
            "give the folder that these names are relative to"
        )
    return pictures


def _no_picture(item: dict) -> str:
    return "picture unknown or left out" if _is_id(item.get("image_id")) else "no image_id"


def _box(item: dict, what: str, pictures: dict[Any, dict], found: Annotations, need_category: bool = True) -> Box | None:
    """COCO's [left, top, width, height] -> Box, or None and a reason in `found`."""
    key, category, crowd = item.get("image_id"), item.get("category_id"), item.get("iscrowd", 0)
    if not _is_id(key) or key not in pictures:
        found.leave_out(what, _no_picture(item))
        return None
    known = isinstance(category, int) and category in found.categories
    if need_category and not known:
        found.leave_out(what, "unknown category")
        return None
    sides = item.get("bbox")
    if not (
        isinstance(sides, list)
        and len(sides) == 4
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and -1e9 < v < 1e9 for v in sides)
    ):  # so no NaN either
        found.leave_out(what, "box is not four numbers")
        return None
    if crowd not in (0, 1):
        found.leave_out(what, "iscrowd is neither 0 nor 1")
        return None
    left, top, width, height = map(float, sides)
    if width <= 0 or height <= 0:
        found.leave_out(what, "box without area")
        return None
    picture = pictures[key]
    whole = left, top, left + width, top + height
    inside = max(0.0, left), max(0.0, top), min(float(picture["width"]), whole[2]), min(float(picture["height"]), whole[3])
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        found.leave_out(what, "box outside its picture")
        return None
    found.num_clipped += inside != whole
    text = found.categories[category] if known else ""
    return Box(inside, text, item["id"], category if isinstance(category, int) else None, bool(crowd))
