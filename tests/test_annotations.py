"""Laws of the annotation readers: boxes are what pycocotools reads; every annotation is a row's or has a reason; no pickle is opened."""

import contextlib
import io
import json
import pickle
import sys

import pytest
from conftest import run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aimv2_vlm.config import UserError, ZeroShotData
from aimv2_vlm.data.annotations import read_coco_captions, read_coco_instances, read_lvis, read_refcoco
from aimv2_vlm.data.shards import ShardSet, pack
from aimv2_vlm.evaluation.zeroshot import read_captions

CATEGORIES = [{"id": 3, "name": "dog", "supercategory": "animal"}, {"id": 7, "name": "kite"}]


def image(key, name=None, **more):
    return {"id": key, "file_name": name or f"{key}.jpg", "height": 40, "width": 60, **more}


def box(key, picture, *bbox, **more):
    return {
        "id": key,
        "image_id": picture,
        "category_id": 3,
        "bbox": list(bbox),
        "iscrowd": 0,
        "area": 9.0,
        "segmentation": [[1, 2, 3]],
        **more,
    }


@pytest.fixture
def folder(tmp_path):
    for name in ("1.jpg", "2.jpg", "3.jpg", "train2017/9.jpg", "val2017/8.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), (len(name) * 9, 90, 30)).save(tmp_path / "images" / name)
    return tmp_path


def write(folder, data, name="annotations.json"):
    (folder / name).write_text(json.dumps(data), encoding="utf-8")
    return folder / name, folder / "images"


def broken(found):
    return dict(found.broken)


def test_boxes_are_those_of_pycocotools(folder):
    from pycocotools.coco import COCO

    annotations = [box(10, 1, 5, 6.5, 20, 10.25), box(11, 2, 0, 0, 60, 40, iscrowd=1, category_id=7), box(12, 1, 59, 39, 1, 1)]
    path, images = write(folder, {"images": [image(1), image(2), image(3)], "annotations": annotations, "categories": CATEGORIES})
    with contextlib.redirect_stdout(io.StringIO()):
        peer = COCO(str(path))
    found = read_coco_instances(path, images)
    assert found.broken == [] and found.num_clipped == 0 and [row.id for row in found.rows] == [1, 2, 3]
    for row in found.rows:
        theirs = peer.loadAnns(peer.getAnnIds(imgIds=row.id))
        assert [b.id for b in row.boxes] == [a["id"] for a in theirs]
        for mine, other in zip(row.boxes, theirs):
            x, y, w, h = other["bbox"]
            assert mine.xyxy == (x, y, x + w, y + h)
            assert (mine.text, mine.is_crowd) == (peer.loadCats(other["category_id"])[0]["name"], other["iscrowd"] == 1)
        assert (row.height, row.width) == (40, 60) and (images / row.image).is_file()
    without = read_coco_instances(path, images, keep_crowd=False)
    assert [len(row.boxes) for row in without.rows] == [2, 0, 0] and without.broken == []


def test_every_broken_annotation_is_named_under_its_reason(folder):
    bad = {
        "annotation 20": (box(20, 1, 1, 1, 0, 5), "box without area"),
        "annotation 21": (box(21, 1, 1, 1, -3, 5), "box without area"),
        "annotation 22": (box(22, 1, 70, 1, 5, 5), "box outside its picture"),
        "annotation 23": (box(23, 1, 1, 1, 5), "box is not four numbers"),
        "annotation 24": (box(24, 1, 1, 1, float("nan"), 5), "box is not four numbers"),
        "annotation 25": (box(25, 1, 1, 1, 10**400, 5), "box is not four numbers"),
        "annotation 26": (box(26, 99, 1, 1, 5, 5), "picture unknown or left out"),
        "annotation 27": (box(27, 5, 1, 1, 5, 5), "picture unknown or left out"),
        "annotation 28": (box(28, [1], 1, 1, 5, 5), "no image_id"),
        "annotation 29": (box(29, 1, 1, 1, 5, 5, category_id=4), "unknown category"),
        "annotation 30": (box(30, 1, 1, 1, 5, 5, iscrowd=2), "iscrowd is neither 0 nor 1"),
    }
    annotations = [
        box(10, 1, 1, 1, 5, 5),
        box(11, 1, 50, 30, 20, 20),
        *(item for item, _ in bad.values()),
        box(10, 1, 2, 2, 5, 5),
        "text",
        {},
    ]
    images = [
        image(1),
        image(5, "absent.jpg"),
        image(6, "../1.jpg"),
        image(7, "/1.jpg"),
        image(2, height=0),
        image(3, width=None),
        image(1),
        {"id": 8},
        4,
    ]
    path, root = write(folder, {"images": images, "annotations": annotations, "categories": [*CATEGORIES, {"id": 3, "name": "again"}]})
    found = read_coco_instances(path, root)
    assert [b.id for row in found.rows for b in row.boxes] == [10, 11] and found.num_clipped == 1
    assert found.rows[0].boxes[1].xyxy == (50, 30, 60, 40)
    assert broken(found) == {what: reason for what, (_, reason) in bad.items()} | {
        "annotation 10": "id used before",
        "annotation number 14": "not an object",
        "annotation number 15": "no id",
        "image 5 (absent.jpg)": "missing picture",
        "image 6": "picture outside the image folder",
        "image 7": "picture outside the image folder",
        "image 2": "no size",
        "image 3": "no size",
        "image 1": "id used before",
        "image 8": "no file name",
        "image number 8": "not an object",
        "category number 2": "no id and name of its own",
    }
    report = found.report()
    assert report["num_broken"] == len(found.broken) == sum(report["broken"].values())
    assert report["broken_examples"]["missing picture"] == ["image 5 (absent.jpg)"] and json.loads(json.dumps(report))["num_boxes"] == 2


@settings(max_examples=150, deadline=None)
@given(
    items=st.lists(
        st.dictionaries(
            st.sampled_from(["id", "image_id", "bbox", "category_id", "iscrowd", "caption", "file_name", "height"]),
            st.recursive(
                st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=4),
                lambda inner: st.lists(inner, max_size=4),
                max_leaves=6,
            ),
        )
        | st.integers(),
        max_size=6,
    )
)
def test_any_annotation_is_used_or_named(tmp_path_factory, items):
    folder = tmp_path_factory.getbasetemp() / "any"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "1.jpg").touch()
    path, root = write(folder, {"images": [image(1), *items], "annotations": items, "categories": CATEGORIES + items})
    found = read_coco_instances(path, root)
    used = sum(len(row.boxes) for row in found.rows)
    named = [what for what, _ in found.broken if what.startswith("annotation")]
    assert used + len(named) == len(items)
    captions = read_coco_captions(path, root)
    assert sum(len(row.captions) for row in captions.rows) + sum(what.startswith("annotation") for what, _ in captions.broken) == len(items)


def test_captions_become_rows_that_can_be_packed(folder, tmp_path):
    annotations = [{"id": n, "image_id": 1 + n % 2, "caption": f" caption\n {n} "} for n in range(5)] + [
        {"id": 9, "image_id": 1, "caption": " "}
    ]
    path, images = write(folder, {"images": [image(1), image(2), image(3)], "annotations": annotations})
    found = read_coco_captions(path, images)
    assert [(row.image, row.captions) for row in found.rows] == [
        ("1.jpg", ("caption 0", "caption 2", "caption 4")),
        ("2.jpg", ("caption 1", "caption 3")),
    ]
    assert found.broken == [("annotation 9", "empty caption"), ("image 3", "no caption")]
    found.write_jsonl(folder / "rows.jsonl")
    assert pack(images, folder / "rows.jsonl", tmp_path / "shards")["num_written"] == 2
    assert ShardSet(tmp_path / "shards", {"json:captions": 1.0}).num_samples == [2]


def test_the_command_writes_rows_names_what_is_broken_and_ends_with_1_beyond_the_limit(folder):
    annotations = [{"id": n, "image_id": 1 + n % 2, "caption": f"caption {n}"} for n in range(5)] + [{"id": 9, "image_id": 1, "caption": " "}]
    path, images = write(folder, {"images": [image(1), image(2)], "annotations": annotations})
    words = ["data", "annotations", path, folder / "rows.jsonl", "--images", images, "--form"]
    done = run_cli(*words, "coco_captions", "--json", folder / "report.json", check=False)
    assert done.returncode == 1 and "bad: annotation 9: empty caption" in done.stdout and "rows.jsonl: 2 rows" in done.stdout
    assert json.loads((folder / "report.json").read_text())["broken_examples"] == {"empty caption": ["annotation 9"]}
    data = ZeroShotData(path=str(images), captions=str(folder / "rows.jsonl"))
    assert [len(texts) for texts in read_captions(data)[1]] == [3, 2]
    assert run_cli(*words, "coco_captions", "--max-bad-fraction", "0.5").returncode == 0
    for out, message in ((path, "is read or written for something else"), (path / "below", "cannot be written")):
        refused = run_cli("data", "annotations", path, out, "--images", images, "--form", "coco_captions", check=False)
        assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr
    assert json.loads(path.read_text())["annotations"] == annotations
    refused = run_cli(*words, "lvis", "--split", "val", check=False)
    assert refused.returncode == 2 and refused.stderr.strip().endswith("instances and split are for refcoco, not for lvis")


def test_lvis_finds_both_splits_and_keeps_its_category_lists(folder):
    address = "http://images.cocodataset.org/{}".format
    images = [
        image(9, coco_url=address("train2017/9.jpg"), neg_category_ids=[7, 99], not_exhaustive_category_ids=[3]),
        image(8, coco_url=address("val2017/8.jpg"), neg_category_ids=None),
    ]
    for item in images:
        del item["file_name"]
    path, root = write(folder, {"images": images, "annotations": [box(1, 9, 1, 2, 3, 4)], "categories": CATEGORIES})
    found = read_lvis(path, root)
    assert [(row.image, row.absent_ids, row.partial_ids) for row in found.rows] == [
        ("train2017/9.jpg", (7,), (3,)),
        ("val2017/8.jpg", (), ()),
    ]
    with pytest.raises(UserError, match="none of the 2 pictures.*no 'train2017/9.jpg'.*relative to"):
        read_lvis(path, root / "train2017")


def ref(key, annotation, picture, *phrases, split="train"):
    return {
        "ref_id": key,
        "ann_id": annotation,
        "image_id": picture,
        "category_id": 3,
        "split": split,
        "file_name": "COCO_1_5.jpg",
        "sentences": [{"sent": text, "raw": text, "sent_id": n, "tokens": text.split()} for n, text in enumerate(phrases)],
    }


def test_refcoco_refs_take_their_boxes_from_instances(folder):
    write(
        folder,
        {
            "images": [image(1), image(2), image(3)],
            "annotations": [box(5, 1, 1, 2, 10, 10), box(6, 1, 20, 2, 10, 10), box(7, 2, 1, 1, 4, 4)],
            "categories": CATEGORIES,
        },
        "instances.json",
    )
    refs = [
        ref(1, 5, 1, "left dog", "the first"),
        ref(2, 6, 1, "right one"),
        ref(3, 7, 2, "it", split="testA"),
        ref(4, 99, 1, "x"),
        ref(5, 7, 1, "x"),
        ref(6, 5, 1, " "),
        3,
    ]
    path, images = write(folder, refs, "refs(unc).json")
    found = read_refcoco(path, images)
    assert [(row.id, row.split, [(b.text, b.id, b.xyxy) for b in row.boxes]) for row in found.rows] == [
        (1, "train", [("left dog", 5, (1, 2, 11, 12)), ("the first", 5, (1, 2, 11, 12)), ("right one", 6, (20, 2, 30, 12))]),
        (2, "testA", [("it", 7, (1, 1, 5, 5))]),
    ]
    assert broken(found) == {
        "ref 4": "unknown annotation",
        "ref 5": "annotation of another picture",
        "ref 6: sentence 0": "empty phrase",
        "ref number 6": "not an object",
    }
    assert [row.id for row in read_refcoco(path, images, split="testA").rows] == [2]
    with pytest.raises(UserError, match="split='val'.*testA, train"):
        read_refcoco(path, images, split="val")
    with pytest.raises(UserError, match="instances.json"):
        read_refcoco(path, images, instances=folder / "absent" / "instances.json")


def test_refcoco_in_mdetrs_form_groups_phrases_by_picture(folder):
    images = [
        image(100, "1.jpg", original_id=1, caption="left dog"),
        image(101, "1.jpg", original_id=1, caption="right one"),
        image(102, "2.jpg", original_id=2, caption=""),
    ]
    annotations = [box(0, 100, 1, 2, 3, 4, original_id=55), box(1, 101, 5, 5, 5, 5, original_id=56), box(2, 102, 1, 1, 1, 1)]
    path, root = write(folder, {"images": images, "annotations": annotations})
    found = read_refcoco(path, root)
    assert [(row.id, row.image, [(b.text, b.id) for b in row.boxes]) for row in found.rows] == [
        (1, "1.jpg", [("left dog", 55), ("right one", 56)])
    ]
    assert found.broken == [("annotation 2", "empty phrase")]
    with pytest.raises(UserError, match="MDETR file holds one split"):
        read_refcoco(path, root, split="val")


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("name", ["refs(unc).p", "refs.json"])
def test_pickles_are_refused_unopened_with_a_hint(folder, protocol, name):
    (folder / name).write_bytes(pickle.dumps([{"ref_id": 1}], protocol))
    opened, watching = [], True
    sys.addaudithook(lambda event, _: opened.append(event) if watching and event.startswith("pickle.") else None)
    try:
        with pytest.raises(
            UserError, match="pickle.*never read; convert it to JSON" if protocol != 1 or name.endswith(".p") else "pickle|not JSON"
        ):
            read_refcoco(folder / name, folder / "images")
    finally:
        watching = False
    assert opened == []


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"images": [', "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"images": []}', "no list 'annotations'"),
        (b'{"images": [], "annotations": []}', "no list 'categories'"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
    ],
)
def test_files_of_another_kind_are_refused(folder, content, message):
    (folder / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_coco_instances(folder / "a.json", folder / "images")


def test_missing_files_and_folders_are_named(folder):
    with pytest.raises(UserError, match="absent.json: cannot be read"):
        read_coco_captions(folder / "absent.json", folder / "images")
    path, _ = write(folder, {"images": [image(1)], "annotations": [], "categories": []})
    with pytest.raises(UserError, match="no such image folder"):
        read_coco_instances(path, folder / "absent")
