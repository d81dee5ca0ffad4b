"""Laws of the shards: what is written is read back; every good sample is found, every bad one named, nothing is
executed."""

import fcntl
import io
import json
import os
import pickle
from copy import deepcopy
import random
import shutil
import sys
import tarfile

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from aimv2_vlm.config import UserError
from aimv2_vlm.data import shards as shards_module
from aimv2_vlm.data.inspection import check
from aimv2_vlm.data.order import Draws, draws
from aimv2_vlm.data.shards import (
    BadSample,
    ShardSet,
    build_index,
    expand_pattern,
    pack,
    pack_once,
    parse_caption,
    write_shards,
)


def picture(number=0, size=(20, 24), kind="JPEG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def rows(count, **fields):
    return [
        {"key": None, "image_bytes": picture(n), "ext": "jpg", "caption": f"caption {n}", "json": {"n": n} | fields}
        for n in range(count)
    ]


def write_tar(path, members):
    """members: (name, bytes) or a ready TarInfo."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def read_all(shards):
    return [shards.read(s, n) for s, count in enumerate(shards.num_samples) for n in range(count)]


def keys(shards):
    return [sample.key for sample in read_all(shards)]


# --- writing and reading back


def test_round_trip(tmp_path):
    wanted = rows(25, label="x")
    paths = write_shards(wanted, tmp_path, samples_per_shard=10)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    shards = ShardSet(tmp_path)
    assert shards.num_samples == [10, 10, 5] and shards.bad_samples() == []
    for row, sample in zip(wanted, read_all(shards), strict=True):
        assert (sample.image_bytes, sample.caption) == (row["image_bytes"], row["caption"])
    assert shards.read(2, 4).key == "000020004" and shards.read(2, 4).shard_name == "00002.tar"
    table = pyarrow.parquet.read_table(tmp_path / "00001.parquet").to_pylist()
    assert table[3] == {"key": "000010003", "caption": "caption 13", "n": 13, "label": "x", "status": "success"}
    assert json.loads((tmp_path / "00002_stats.json").read_text())["successes"] == 5
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_shards_are_plain_tars_and_reproducible(tmp_path):
    first = write_shards(rows(4), tmp_path / "a")[0]
    second = write_shards(rows(4), tmp_path / "b")[0]
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        assert tar.getnames()[:4] == ["000000000.jpg", "000000000.txt", "000000000.json", "000000001.jpg"]
        assert json.load(tar.extractfile("000000001.json"))["caption"] == "caption 1"


def test_metadata_of_mixed_types_and_start_number(tmp_path):
    mixed = rows(2)
    mixed[0]["json"] = {"value": 1}
    mixed[1]["json"] = {"value": "one"}
    (path,) = write_shards(mixed, tmp_path, start=7)
    assert path.name == "00007.tar"
    assert pyarrow.parquet.read_table(tmp_path / "00007.parquet")["value"].to_pylist() == ["1", '"one"']


@pytest.mark.parametrize("key", ["a.b", "../x", "", "a/b"])
def test_unusable_keys_are_refused_and_leave_no_file(tmp_path, key):
    with pytest.raises(ValueError, match="key"):
        write_shards([rows(1)[0] | {"key": key}], tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- patterns


def test_patterns(tmp_path):
    for number in range(4):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"")
    names = [f"{number:05d}.tar" for number in range(4)]
    for pattern in ("{00000..00003}.tar", "0000{0,1,2,3}.tar", "*.tar", "0000[0-3].tar", "", "{0000,0000}{0..3}.tar"):
        if pattern.startswith("{0000,"):
            with pytest.raises(UserError, match="more than once"):
                expand_pattern(f"{tmp_path}/{pattern}")
        else:
            assert [path.name for path in expand_pattern(f"{tmp_path}/{pattern}")] == names
    assert [path.name for path in expand_pattern([tmp_path / "00002.tar", f"{tmp_path}/00000.tar"])] == [
        names[2],
        names[0],
    ]


@pytest.mark.parametrize(
    "pattern, text",
    [
        ("{00000..00009}.tar", r"00000.tar.* and 9 more.*10 of 10 missing"),
        ("*.tar", "missing"),
        ("", "holds no .tar file"),
        ("{5..2}.tar", "empty or too long"),
    ],
)
def test_a_pattern_without_a_file_is_an_error(tmp_path, pattern, text):
    with pytest.raises(UserError, match=text):
        expand_pattern(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize(
    "pattern",
    ["pipe:cat x.tar", " PIPE:touch y", "|touch y", "file:x.tar", "ssh://host/x.tar", "simplecache::s3://bucket/x.tar",
     "https://host/x.tar::pipe:ls", "zip://a.tar::memory://b.zip", "reference://x", "git://x@y", "s3:x.tar"],
)  # fmt: skip
def test_urls_that_run_something_or_hide_something_are_refused(pattern):
    for act in (expand_pattern, ShardSet):
        with pytest.raises(UserError, match="refused|only local"):
            act([pattern])
    with pytest.raises(UserError, match="only local"):
        expand_pattern("s3://bucket/{0..3}.tar")


# --- captions


def caption_tar(tmp_path, members):
    image = picture()
    full = []
    for key, text, metadata in members:
        full.append((f"{key}.jpg", image))
        full += [(f"{key}.txt", text)] if text is not None else []
        full += (
            [(f"{key}.json", metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode())]
            if metadata
            else []
        )
    return write_tar(tmp_path / "s.tar", full)


def test_caption_columns_and_fallback(tmp_path):
    path = caption_tar(
        tmp_path,
        [
            ("a", b"alt a", {"caption": "json a", "synthetic": "made a"}),
            ("b", None, {"caption": "json b"}),
            ("c", b"  \n", {"synthetic": "made c"}),
            ("d", b"\xff\xfe", {"other": "x"}),
            ("e", None, {"caption": "   "}),
            ("f", b"alt f", b"{not json"),
            ("g", b"alt g", b"[1]"),
            ("h", b"alt h", None),
        ],
    )
    plain = ShardSet(path)
    assert [(s.key, s.caption) for s in read_all(plain)] == [("a", "alt a"), ("b", "json b"), ("h", "alt h")]
    assert plain.bad_samples() == [
        "s.tar: e: no caption",
        "s.tar: f: metadata is not a JSON object",
        "s.tar: g: metadata is not a JSON object",
        "s.tar: c: empty caption",
        "s.tar: d: caption is not UTF-8",
    ]
    synthetic = ShardSet(path, "json:synthetic")
    assert [(s.key, s.caption) for s in read_all(synthetic)] == [("a", "made a"), ("c", "made c")]
    assert "s.tar: h: no caption in json:synthetic" in synthetic.bad_samples()


def test_weighted_columns_are_drawn_by_weight(tmp_path):
    path = caption_tar(
        tmp_path, [("a", b"alt", {"synthetic": "made", "many": ["one", "two"]}), ("b", b"alt", {"x": 1})]
    )
    shards = ShardSet(path, {"txt": 1, "json:synthetic": 3, "json:unused": 0})
    drawn = [shards.read(0, 0, draws(0, position, "caption")).caption for position in range(2000)]
    assert abs(drawn.count("made") / 2000 - 0.75) < 0.04
    assert drawn == [shards.read(0, 0, draws(0, position, "caption")).caption for position in range(2000)]
    assert shards.read(0, 0).caption == "alt"  # without draws: the first column
    assert {shards.read(0, 1, Draws(n)).caption for n in range(20)} == {"alt"}  # b has one of the two
    many = ShardSet(path, "json:many")
    assert {many.read(0, 0, Draws(n)).caption for n in range(20)} == {"one", "two"}
    assert many.read(0, 0).caption == "one"


@pytest.mark.parametrize("spec", ["text", "json:", {"txt": -1}, {"txt": 0}, {"txt": "1"}, {}, {"txt": float("inf")}])
def test_impossible_caption_columns(spec):
    with pytest.raises(UserError, match="caption column"):
        parse_caption(spec)


# --- hostile and damaged shards


def good(key, number=0):
    return [(f"{key}.jpg", picture(number)), (f"{key}.txt", f"text {key}".encode())]


class Payload:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_forbidden_members_are_named_and_never_opened(tmp_path):
    trace = str(tmp_path / "executed")
    payload = pickle.dumps(Payload(trace))
    members = good("a")
    for key, extension in zip("bcdefg", ("pyd", "pth", "npy", "pkl", "pt", "x.pickle")):
        members += good(key) + [(f"{key}.{extension}", payload)]
    events = []

    def audit(event, arguments):
        if watching and (event.startswith(("pickle.", "os.mkdir", "subprocess", "os.system", "shutil"))):
            events.append(event)

    watching = True
    sys.addaudithook(audit)
    try:
        path = write_tar(tmp_path / "s.tar", members + good("h"))
        shards = ShardSet(path)
        assert keys(shards) == ["a", "h"]
    finally:
        watching = False
    assert events == [] and not os.path.exists(trace)
    assert sum("forbidden member" in text for text in shards.bad_samples()) == 6


def test_links_devices_and_paths_outside_are_refused(tmp_path):
    def special(name, kind, target=""):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    members = [
        *good("a"),
        special("folder", tarfile.DIRTYPE),
        special("b.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        ("b.txt", b"x"),
        special("c.jpg", tarfile.LNKTYPE, "a.jpg"),
        special("d.jpg", tarfile.CHRTYPE),
        *good("../e"),
        *good("/f"),
        *good("folder/g"),
    ]
    shards = ShardSet(write_tar(tmp_path / "s.tar", members))
    assert keys(shards) == ["a", "folder/g"]
    reasons = "\n".join(shards.bad_samples())
    assert reasons.count("is a link or a special file") == 3 and reasons.count("leaves the archive's folder") == 2


def test_long_names_and_other_tar_dialects(tmp_path):
    long = "x" * 180
    for number, dialect in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)):
        name = f"{long[:60]}/{long[:90]}" if dialect == tarfile.USTAR_FORMAT else f"{long}ü"
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=dialect) as tar:
            for member, data in (
                (f"{name}.JPG", picture()),
                (f"{name}.txt", b"long"),
                ("z.png", picture()),
                ("z.txt", b"z"),
            ):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        shards = ShardSet(path)
        assert keys(shards) == [name, "z"] and shards.bad_samples() == []


def test_samples_without_picture_or_with_an_empty_one(tmp_path):
    members = [("a.txt", b"x"), ("b.jpg", b""), ("b.txt", b"x"), ("c.jpg", picture()), ("d.mp4", b"1"), *good("e")]
    shards = ShardSet(write_tar(tmp_path / "s.tar", members))
    assert keys(shards) == ["e"]
    assert shards.bad_samples() == [
        "s.tar: a: no picture (members: txt)",
        "s.tar: b: empty picture file",
        "s.tar: c: no caption",
        "s.tar: d: no picture (members: mp4)",
    ]


def test_two_samples_of_one_key_are_two_samples(tmp_path):
    path = write_tar(tmp_path / "s.tar", good("a", 1) + good("a", 2))
    shards = ShardSet(path)
    assert keys(shards) == ["a", "a"]
    assert [sample.image_bytes for sample in read_all(shards)] == [picture(1), picture(2)]
    assert check(path)["duplicate_keys"] == ["a"]


def test_members_sorted_by_kind_still_form_samples(tmp_path):
    members = [item for index in range(2) for key in "abc" for item in good(key)[index : index + 1]]
    assert keys(ShardSet(write_tar(tmp_path / "s.tar", members))) == ["a", "b", "c"]


def test_a_garbage_header_costs_at_most_its_sample_and_is_named(tmp_path):
    """Any one 512-byte block overwritten: all other samples arrive with their own bytes, and the loss is reported."""
    members = [member for n in range(6) for member in [*good(f"k{n}", n), (f"k{n}.json", b'{"a": 1}')]]
    original = write_tar(tmp_path / "whole.tar", members).read_bytes()
    content = {f"k{n}": picture(n) for n in range(6)}
    with tarfile.open(tmp_path / "whole.tar") as tar:
        headers = [(info.name, info.offset) for info in tar.getmembers()]
    generator = random.Random(0)
    for name, offset in headers:
        for garbage in (generator.randbytes(512), b"\xff" * 512, b"\0" * 512):
            path = tmp_path / "s.tar"
            path.write_bytes(original[:offset] + garbage + original[offset + 512 :])
            shards = ShardSet(path)
            found = {sample.key: sample.image_bytes for sample in read_all(shards)}
            lost = name.split(".")[0]
            assert set(found) >= set(content) - {lost}, (name, garbage[:4])
            assert all(found[key] == content[key] for key in found)
            named = "\n".join(shards.bad_samples())
            assert "damage" in named
            assert lost in found or f"{lost}:" in named
            path.unlink()


def test_a_shard_that_was_cut_off(tmp_path):
    """Cut anywhere: never an exception, every complete sample before the cut is there, the cut one is named."""
    members = [member for n in range(3) for member in good(f"k{n}", n)]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        infos = {info.name: info for info in tar.getmembers()}
    end = infos["k2.txt"].offset_data + infos["k2.txt"].size
    for cut in range(700, end, 331):
        path = tmp_path / "s.tar"
        path.write_bytes(whole[:cut])
        complete = [n for n in range(3) if infos[f"k{n}.txt"].offset_data + infos[f"k{n}.txt"].size <= cut]
        shards = ShardSet(path)
        assert keys(shards) == [f"k{n}" for n in complete]
        next_key = f"k{len(complete)}"
        if cut > infos[f"{next_key}.jpg"].offset:
            assert any(next_key in text or "cut off" in text for text in shards.bad_samples())
        path.unlink()


def test_a_member_past_the_end_does_not_hide_the_rest(tmp_path):
    path = write_tar(tmp_path / "s.tar", good("a") + good("b") + good("c"))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmember("b.jpg").offset
    data[offset + 124 : offset + 136] = b"77777777777\0"
    data[offset + 148 : offset + 156] = b" " * 8
    data[offset + 148 : offset + 156] = b"%06o\0 " % sum(data[offset : offset + 512])
    path.write_bytes(data)
    shards = ShardSet(path)
    assert keys(shards) == ["a", "c"]
    assert shards.bad_samples() == ["s.tar: b: .jpg reaches past the end of the file"]


def test_random_bytes_never_raise(tmp_path):
    generator = random.Random(1)
    base = write_tar(tmp_path / "base.tar", good("a") + good("b")).read_bytes()
    for _ in range(300):
        data = bytearray(base)
        for _ in range(generator.randint(1, 40)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path = tmp_path / "s.tar"
        path.write_bytes(data[: generator.randint(1, len(data))])
        header, body = build_index(path)
        assert len(body["key"]) + len(body["bad"]) <= 6 and header["digest"]


def test_a_flipped_byte_after_indexing_is_named(tmp_path):
    path = write_tar(tmp_path / "s.tar", good("a") + good("b"))
    shards = ShardSet(path)
    with tarfile.open(path) as tar:
        picture_at, text_at = tar.getmember("a.jpg").offset_data + 30, tar.getmember("b.txt").offset_data
    with open(path, "r+b") as file:
        for at in (picture_at, text_at):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
    with pytest.raises(BadSample, match=r"s.tar: a: picture differs from what was indexed"):
        shards.read(0, 0)
    with pytest.raises(BadSample, match=r"s.tar: b: caption differs"):
        shards.read(0, 1)
    os.truncate(path, 600)
    with pytest.raises(BadSample, match="cut off"):
        shards.read(0, 0)


def test_a_picture_over_the_limit_is_refused_by_its_size_without_being_read(tmp_path, monkeypatch):
    shards = ShardSet(write_tar(tmp_path / "s.tar", good("a")))
    size = len(shards.read(0, 0).image_bytes)
    monkeypatch.setattr(shards, "_member", lambda *_: pytest.fail("it was read"))
    with pytest.raises(BadSample, match=f"{size} bytes, over the limit of {size - 1}"):
        shards.read(0, 0, max_bytes=size - 1)


def test_a_shard_that_disappears_is_a_clear_error(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", good("a"))
    shards = ShardSet(path)
    monkeypatch.setattr(shards_module, "RETRY_WAITS", (0.01, 0.01))
    path.unlink()
    with pytest.raises(UserError, match="s.tar.*disappeared while in use .*tried 3 times"):
        shards.read(0, 0)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        ShardSet(path)


def test_a_shard_that_comes_back_is_read_as_if_nothing_had_been(tmp_path, monkeypatch):
    """Gone, then unreadable, then there again: tried a bounded number of times, from opening on."""
    path = write_tar(tmp_path / "s.tar", good("a"))
    shards = ShardSet(path)
    hidden, waits, pread, calls = tmp_path / "hidden", [], os.pread, []

    def sleep(seconds):
        waits.append(seconds)
        if hidden.exists():
            os.rename(hidden, path)

    def flaky(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(116, "Stale file handle")
        return pread(*arguments)

    monkeypatch.setattr(shards_module.time, "sleep", sleep)
    os.rename(path, hidden)
    monkeypatch.setattr(shards_module.os, "pread", flaky)
    assert shards.read(0, 0).image_bytes == picture() and waits == list(shards_module.RETRY_WAITS[:2])
    monkeypatch.setattr(shards_module.os, "pread", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(BadSample, match="a: picture cannot be read .Input/output error"):
        shards.read(0, 0)
    assert len(waits) == 2 + len(shards_module.RETRY_WAITS)


def test_an_index_of_another_tar_is_never_used(tmp_path):
    """Copied beside a tar of another size or time it is built again; made to look right, the checksums tell."""
    one = write_tar(tmp_path / "one.tar", good("a", 1) + good("b", 2))
    two = write_tar(tmp_path / "two.tar", good("c", 3))
    ShardSet(one), ShardSet(two)
    index = tmp_path / "two.tar.index.json"
    shutil.copy(tmp_path / "one.tar.index.json", index)
    assert keys(ShardSet(two)) == ["c"]
    header, body = (tmp_path / "one.tar.index.json").read_bytes().split(b"\n")[:2]
    status = two.stat()
    header = json.dumps(json.loads(header) | {"name": "two.tar", "size": status.st_size, "mtime_ns": status.st_mtime_ns}).encode()
    index.write_bytes(header + b"\n" + body + b"\n")
    for sample in range(2):
        with pytest.raises(BadSample, match="differs from what was indexed|is cut off"):
            ShardSet(two).read(0, sample)


# --- the index


def test_index_is_kept_and_rebuilt_when_the_tar_changes(tmp_path):
    path = write_tar(tmp_path / "s.tar", good("a"))
    digest = ShardSet(path).shard_facts()[0]["digest"]
    index = tmp_path / "s.tar.index.json"
    first = index.stat().st_mtime_ns
    ShardSet(path)
    assert index.stat().st_mtime_ns == first
    os.utime(path, ns=(1, 1))  # touched, not changed: another pass, the same digest
    assert ShardSet(path).shard_facts()[0]["digest"] == digest and index.stat().st_mtime_ns != first
    write_tar(path, good("a", 9))
    assert ShardSet(path).shard_facts()[0]["digest"] != digest
    assert ShardSet(path).read(0, 0).image_bytes == picture(9)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04garbage", b"[" * 100_000, b'{"version": 1}\n', b"null\n"])
def test_a_broken_index_is_built_again(tmp_path, content):
    path = write_tar(tmp_path / "s.tar", good("a"))
    (tmp_path / "s.tar.index.json").write_bytes(content)
    assert keys(ShardSet(path)) == ["a"]


def test_a_changed_index_body_is_refused(tmp_path):
    path = write_tar(tmp_path / "s.tar", good("a") + good("b"))
    ShardSet(path)
    index = tmp_path / "s.tar.index.json"
    index.write_bytes(index.read_bytes().replace(b'"b"', b'"z"'))
    with pytest.raises(UserError, match="index is damaged"):
        ShardSet(path).read(0, 0)


def test_an_unwritable_folder_uses_the_cache(tmp_path, monkeypatch):
    """Root may write anywhere, so the folder beside is blocked by a directory of the index's name."""
    path = write_tar(tmp_path / "s.tar", good("a"))
    (tmp_path / "s.tar.index.json").mkdir()
    cache = tmp_path / "cache"
    shards = ShardSet(path, cache_dir=cache)
    assert keys(shards) == ["a"] and len(list(cache.iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert keys(ShardSet(path)) == ["a"]
    assert len(list((tmp_path / "home").rglob("*.index.json"))) == 1


def test_shard_sets_travel_and_keep_few_files_open(tmp_path):
    write_shards(rows(12), tmp_path, samples_per_shard=1)
    shards = ShardSet(tmp_path, max_open=3)
    before = len(os.listdir("/proc/self/fd"))
    captions = [sample.caption for sample in read_all(shards)]
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    copy = deepcopy(shards)
    assert [sample.caption for sample in read_all(copy)] == captions


# --- pack and check


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    (root / "images").mkdir(parents=True)
    for number in range(4):
        (root / "images" / f"{number}.jpg").write_bytes(picture(number))
    (root / "images" / "gif.jpg").write_bytes(picture(5, kind="GIF"))
    (root / "images" / "text.jpg").write_bytes(b"no picture at all")
    (tmp_path / "secret.jpg").write_bytes(picture(6))
    lines = [
        {"image": "images/0.jpg", "captions": ["first", " ", "second"], "split": "train", "label": "x"},
        {"image": "images/1.jpg", "caption": " single ", "split": "train"},
        {"image": "images/2.jpg", "captions": ["val"], "split": "val"},
        {"image": "images/gif.jpg", "caption": "a gif", "split": "train"},
        {"image": "images/text.jpg", "caption": "text", "split": "train"},
        {"image": "images/none.jpg", "caption": "missing", "split": "train"},
        {"image": "images/3.jpg", "captions": [], "split": "train"},
        {"image": "../secret.jpg", "caption": "outside", "split": "train"},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n\nnot json\n"
    (root / "captions.jsonl").write_text(text)
    return root


def test_pack_jsonl(folder, tmp_path):
    out = tmp_path / "out"
    report = pack(folder, folder / "captions.jsonl", out, samples_per_shard=2, where={"split": "train"})
    assert (report["num_rows"], report["num_written"], report["num_skipped"], report["num_bad"]) == (9, 3, 1, 5)
    assert [(bad["row"], bad["reason"]) for bad in report["bad"]] == [
        ("line 5", "not a picture in a known format"),
        ("line 6", "picture is missing or unreadable"),
        ("line 7", "empty caption"),
        ("line 8", "picture lies outside the folder"),
        ("line 10", "not a JSON object"),
    ]
    assert json.loads((out / "data_report.json").read_text())["bad"] == report["bad"]
    shards = ShardSet(out)
    assert [sample.caption for sample in read_all(shards)] == ["first", "single", "a gif"]
    assert shards.read(0, 0).image_bytes == (folder / "images" / "0.jpg").read_bytes()
    with tarfile.open(out / "00000.tar") as tar:
        metadata = json.load(tar.extractfile("000000000.json"))
    assert metadata["captions"] == ["first", "second"] and metadata["caption_1"] == "second"
    assert (metadata["label"], metadata["height"], metadata["width"]) == ("x", 20, 24)
    with tarfile.open(out / "00001.tar") as tar:
        assert tar.getnames()[0] == "000010000.gif"  # by what the bytes are, not by the file's name


def test_pack_csv_and_sidecars(folder, tmp_path):
    table = folder / "captions.csv"
    table.write_text('image,caption,split\nimages/0.jpg,"one, two",train\nimages/1.jpg,,train\n')
    assert pack(folder, table, tmp_path / "csv")["bad_reasons"] == {"empty caption": 1}
    assert ShardSet(tmp_path / "csv").read(0, 0).caption == "one, two"
    (folder / "images" / "2.txt").write_text("beside\n")
    report = pack(folder, None, tmp_path / "sidecar")
    assert report["num_written"] == 1 and report["num_bad"] == 5
    assert ShardSet(tmp_path / "sidecar").read(0, 0).caption == "beside"


def test_pack_refuses_what_cannot_work(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        pack(tmp_path / "nowhere", None, tmp_path / "out")
    with pytest.raises(UserError, match="cannot be read"):
        pack(folder, folder / "absent.jsonl", tmp_path / "out")
    with pytest.raises(UserError, match="9 skipped|none of 9 rows"):
        pack(folder, folder / "captions.jsonl", tmp_path / "out", where={"split": "test"})
    pack(folder, folder / "captions.jsonl", tmp_path / "out")
    with pytest.raises(UserError, match="holds shards already"):
        pack(folder, folder / "captions.jsonl", tmp_path / "out")


def test_pack_touches_nothing_that_it_did_not_write(folder, tmp_path):
    out, table = tmp_path / "out", folder / "captions.jsonl"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt and maybe more; choose another folder"):
        pack(folder, table, out)
    assert (out / "notes.txt").read_text() == "mine" and not (tmp_path / "out.partial").exists()


def test_a_killed_packing_leaves_no_shards_under_the_name_and_the_next_one_is_whole(folder, tmp_path, monkeypatch):
    table, out = folder / "captions.jsonl", tmp_path / "out"
    link = tmp_path / "link"
    link.symlink_to(out)  # a name on another disk
    out.mkdir()
    monkeypatch.setattr(shards_module, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(folder, table, link, samples_per_shard=2)
    assert not any(out.iterdir()) and (tmp_path / "out.partial" / "00000.tar").exists()
    monkeypatch.undo()
    with open(tmp_path / "out.partial" / ".lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is packing into it; wait for it"):
            pack(folder, table, link)
    report = pack(folder, table, link)
    assert sorted(path.name for path in out.iterdir()) == ["00000.parquet", "00000.tar", "00000_stats.json", "data_report.json"]
    assert link.is_symlink() and not (tmp_path / "out.partial").exists() and len(read_all(ShardSet(link))) == report["num_written"] == 4


def test_pack_once_takes_only_shards_of_the_same_pictures_captions_and_rows(folder, tmp_path):
    table, out = folder / "captions.jsonl", tmp_path / "out"
    made = pack_once(folder, table, out, {"split": "train"})
    before = (out / "00000.tar").stat().st_mtime_ns
    assert pack_once(folder, table, out, {"split": "train"}) == json.loads(json.dumps(made))
    for other, said in (((folder / "images", table, out, {"split": "train"}), "folder: "), ((folder, table, out), "where: "), ((folder, None, out), "captions: ")):
        with pytest.raises(UserError, match=f"packed from something else .*{said}.*remove the folder to pack anew"):
            pack_once(*other)
    text = table.read_text()
    table.write_text(text + json.dumps({"image": "images/0.jpg", "caption": "one more", "split": "train"}) + "\n")
    with pytest.raises(UserError, match="captions_sha256: "):
        pack_once(folder, table, out, {"split": "train"})
    table.unlink()  # the shards stand without what they were made of
    assert pack_once(folder, table, out, {"split": "train"})["num_written"] == 3
    assert (out / "00000.tar").stat().st_mtime_ns == before


def test_check_counts_and_names(tmp_path):
    broken = picture(3)
    members = [
        *good("a", 1),
        *good("b", 1),
        *good("c", 2),
        ("d.txt", b"x"),
        ("e.jpg", broken[: len(broken) // 2]),
        ("e.txt", b"cut"),
    ]
    report = check(write_tar(tmp_path / "s.tar", members), decode=True)
    assert (report["num_samples"], report["num_good"], report["num_bad"]) == (5, 3, 2)
    assert report["bad"][0] == "s.tar: d: no picture (members: txt)"
    assert report["bad"][1].startswith("s.tar: e: cannot be decoded")
    assert report["num_duplicate_pictures"] == 1 and report["num_duplicate_keys"] == 0
    assert report["height"]["median"] == 20 and report["width"]["max"] == 24 and report["captions"]["txt"]["words"]["mean"] == 2


def test_empty_and_deep_objects_of_a_caption_table_are_packed_as_json(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(picture(0))
    nested: list | dict = {"a": 1}
    for _ in range(150):
        nested = [{"d": nested}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "0.png", "caption": "one", "more": {}, "deep": [{"a": {}}], "deeper": nested, "plain": {"a": [1]}}))
    assert pack(tmp_path / "pictures", rows, tmp_path / "out")["num_written"] == 1
    table = pyarrow.parquet.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    assert json.loads(table[0]["deeper"]) == nested and table[0]["plain"] == {"a": [1]}
    assert table[0]["more"] == "{}" and json.loads(table[0]["deep"]) == [{"a": {}}]
