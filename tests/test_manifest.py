"""Laws of the manifest: the same samples as the shards' own indexes, never for other shards, and small."""

import io
import json
import os
import pickle
import random
import shutil
import tarfile

import numpy as np
import pytest

from aimv2_vlm.config import UserError
from aimv2_vlm.data import manifest as manifests
from aimv2_vlm.data import shards as shards_module
from aimv2_vlm.data.manifest import BYTES_PER_SAMPLE, LAYOUTS, Manifest, names_digest, pack_index, write_manifest
from aimv2_vlm.data.order import Draws, compact_fingerprint, compare_fingerprints, fingerprint
from aimv2_vlm.data.shards import ShardSet, open_indexes, write_shards

CAPTION = {"txt": 1.0, "json:second": 2.0}


def write_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def varied_members(shard, generator):
    """Samples of every shape: each order of members, missing members, other members between, keys of every form."""
    members = []
    for number, order in enumerate(LAYOUTS * 2):
        key = [f"{shard:03d}{number:04d}", f"k{number}", f"word-{'abcdef'[number % 6]}{number}", "x" * 120 + str(number)][number // 8]
        data = {
            "image": ("jpg", generator.randbytes(generator.choice([1, 511, 512, 513, 3000]))),
            "text": ("txt", generator.choice([b"caption", b"", b"c" * 70_000])),
            "metadata": ("json", json.dumps({"second": "other", "n": number, "pad": "p" * generator.choice([0, 70_000])}).encode()),
        }
        for kind in order:
            members.append((f"{key}.{data[kind][0]}", data[kind][1]))
            if number % 5 == 4:
                members.append((f"{key}.cls", b"1"))  # a member that is none of ours stands between
    return members


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("varied")
    generator = random.Random(3)
    for shard in range(6):
        write_tar(folder / f"{shard:03d}.tar", varied_members(shard, generator))
    write_shards(
        ({"key": None, "image_bytes": generator.randbytes(600), "ext": "jpg", "caption": f"c {n}", "json": {}} for n in range(40)),
        folder, samples_per_shard=20, start=900,
    )  # fmt: skip
    return folder


def everything(shards):
    return [
        (shards.key(s, n), shards.read(s, n, Draws(n)), shards._entry(s, n))
        for s, count in enumerate(shards.num_samples) for n in range(count)
    ]  # fmt: skip


def copy(folder, target, *without):
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("manifest-*", *without))


def manifest_files(folder):
    return sorted(folder.glob("manifest-*"))


@pytest.mark.parametrize("caption", ["txt", "json:second", CAPTION])
def test_a_manifest_gives_what_the_indexes_give(folder, caption):
    plain = ShardSet(folder, caption, manifest_shards=10**9)
    quick = ShardSet(folder, caption, manifest_shards=1)
    assert plain._manifest is None and quick._manifest is not None
    assert everything(quick) == everything(plain) and len(everything(plain)) > 60
    for name in ("num_samples", "num_bad", "sizes", "digests"):
        assert getattr(quick, name) == getattr(plain, name)
    assert quick.shard_facts() == plain.shard_facts()
    assert quick.bad_samples() == plain.bad_samples() and len(plain.bad_samples()) == plain.num_bad > 0
    assert quick.bad_samples(2) == plain.bad_samples()[:2]


def test_ordinary_shards_are_read_from_the_manifest_alone(tmp_path):
    """img2dataset's own layout never needs a shard's index once the manifest stands, and costs 29 bytes a sample."""
    rows = ({"key": None, "image_bytes": bytes(n), "ext": "png", "caption": f"c {n}", "json": {"n": n}} for n in range(1, 4001))
    write_shards(rows, tmp_path, samples_per_shard=1000)
    wanted = everything(ShardSet(tmp_path, manifest_shards=10**9))
    ShardSet(tmp_path, manifest_shards=1)
    for path in tmp_path.glob("*.index.json"):
        path.unlink()
    quick = ShardSet(tmp_path, manifest_shards=1)
    assert everything(quick) == wanted
    assert not list(tmp_path.glob("*.index.json"))
    assert manifest_files(tmp_path)[0].stat().st_size < 30 * 4000 and BYTES_PER_SAMPLE < 30


def test_a_missing_index_is_built_again_where_it_is_needed(folder, tmp_path):
    copy(folder, tmp_path / "copy")
    wanted = everything(ShardSet(tmp_path / "copy", manifest_shards=1))
    for path in (tmp_path / "copy").glob("*.index.json"):
        path.unlink()
    assert everything(ShardSet(tmp_path / "copy", manifest_shards=1)) == wanted


def grown(folder):
    write_tar(folder / "1.tar", [("new1.jpg", b"12"), ("new1.txt", b"new")])


def touched(folder):
    os.utime(folder / "1.tar", ns=(5, 5))


def added(folder):
    write_tar(folder / "2.tar", [("b1.jpg", b"1"), ("b1.txt", b"one more")])


def removed(folder):
    (folder / "1.tar").unlink()


def swapped(folder):
    os.rename(folder / "0.tar", folder / "x.tar")
    os.rename(folder / "1.tar", folder / "0.tar")
    os.rename(folder / "x.tar", folder / "1.tar")


@pytest.mark.parametrize("change", [grown, touched, added, removed, swapped])
def test_a_stale_manifest_is_never_used(tmp_path, change):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [(f"a{number}.jpg", b"1"), (f"a{number}.txt", b"old")])
    ShardSet(tmp_path, manifest_shards=1)
    (before,) = manifest_files(tmp_path)
    kept = before.read_bytes()
    ShardSet(tmp_path, manifest_shards=1)
    assert before.read_bytes() == kept
    change(tmp_path)
    quick = ShardSet(tmp_path, manifest_shards=1)
    assert manifest_files(tmp_path) == [before] and before.read_bytes() != kept  # replaced, not added
    assert everything(quick) == everything(ShardSet(tmp_path, manifest_shards=10**9))


def test_a_damaged_manifest_changes_nothing(folder, tmp_path):
    """Cut off anywhere or with any byte flipped: the samples stay the same."""
    copy(folder, tmp_path / "copy")
    quick = ShardSet(tmp_path / "copy", manifest_shards=1)
    wanted = everything(quick)
    (path,) = manifest_files(tmp_path / "copy")
    whole = path.read_bytes()
    generator = random.Random(5)
    damaged = [whole[: generator.randrange(len(whole))] for _ in range(4)] + [b"", b"garbage", bytes(len(whole))]
    for place in [0, 9, 17, *(generator.randrange(len(whole)) for _ in range(9))]:
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << generator.randrange(8)]) + whole[place + 1 :])
    for data in damaged:
        path.write_bytes(data)
        assert everything(ShardSet(tmp_path / "copy", manifest_shards=1)) == wanted


def test_a_manifest_that_cannot_be_written_is_done_without(folder, tmp_path, monkeypatch):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [("a1.jpg", b"1"), ("a1.txt", b"x")])
    monkeypatch.setattr(shards_module, "manifest_name", lambda patterns: "no/such/folder.bin")
    shards = ShardSet(tmp_path, manifest_shards=1, cache_dir=tmp_path / "cache")
    assert shards._manifest is None and shards.read(0, 0).caption == "x"
    monkeypatch.undo()
    monkeypatch.setattr(shards_module, "pack_index", lambda *_: None)  # more kinds of samples than a row can name
    shards = ShardSet(tmp_path, manifest_shards=1)
    assert shards._manifest is None and shards.read(1, 0).caption == "x" and not manifest_files(tmp_path)


def test_a_pickled_set_opens_the_manifest_where_it_arrives_or_does_without(folder, tmp_path):
    copy(folder, tmp_path / "copy")
    quick = ShardSet(tmp_path / "copy", CAPTION, manifest_shards=1)
    wanted, data = everything(quick), pickle.dumps(quick)
    assert len(data) < 20_000
    there = pickle.loads(data)
    assert there._manifest is not None and everything(there) == wanted
    (path,) = manifest_files(tmp_path / "copy")
    path.write_bytes((lambda file: (write_manifest(file, names_digest([]), []), file.getvalue())[1])(io.BytesIO()))
    there = pickle.loads(data)
    assert there._manifest is None and everything(there) == wanted


def test_rows_in_use_stay_few(tmp_path):
    write_shards(({"key": None, "image_bytes": b"1", "ext": "jpg", "caption": "c", "json": {}} for _ in range(30)), tmp_path, 3)
    quick = ShardSet(tmp_path, manifest_shards=1, max_open=2)
    everything(quick)
    assert len(quick._rows) == 2 and not quick._bodies


@pytest.mark.parametrize("keys", [["a", "b"], ["7", "12", "007"], ["a1", "b2"], ["5", str(10**17)], ["1", "70000"], ["٣", "٤"], ["x9", "x10"]])
def test_keys_of_every_form_come_back(tmp_path, keys):
    path = write_tar(tmp_path / "s.tar", [m for key in keys for m in ((f"{key}.jpg", b"1"), (f"{key}.txt", b"c"))])
    quick = ShardSet(path, manifest_shards=1)
    assert [quick.key(0, number) for number in range(len(keys))] == keys


def test_offsets_far_into_a_shard(tmp_path):
    """A row reaches 2 TB; beyond, the shard's own index is asked."""
    header = {"size": 2**42, "mtime_ns": 1, "digest": "d" * 32, "columns": ["txt"], "column_counts": {"1": 2}, "num_bad": 0, "num_damaged": 0}
    far = [(2**32 - 2) * 512, 2**32 * 512]
    body = {
        "key": ["1", "2"], "mask": [1, 1], "image": [(at, 100, 7) for at in far], "text": [(at + 1024, 5, 9) for at in far],
        "metadata": [(-1, 0, 0)] * 2,
    }  # fmt: skip
    with open(tmp_path / "m.bin", "wb") as file:
        write_manifest(file, "x", [pack_index(header, body)])
    opened = Manifest(tmp_path / "m.bin")
    rows, usable = opened.rows(0, ["txt"])
    assert usable.tolist() == [0, 1]
    assert opened.entry(0, rows[0]) == ("1", (far[0], 100, 7), (far[0] + 1024, 5, 9), None, frozenset(["txt"]))
    assert opened.entry(0, rows[1]) is None
    assert isinstance(opened.size, np.ndarray) and manifests.BLOCK == 512


# --- building indexes


def test_indexes_built_by_processes_are_the_serial_ones(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "PARALLEL_BYTES", 1)
    for name in ("serial", "parallel"):
        copy(folder, tmp_path / name, "*.index.json")
    names = sorted(path.name for path in folder.glob("*.tar"))
    seen = []
    for name, processes in (("serial", 1), ("parallel", 2)):
        paths = [tmp_path / name / file for file in names]
        headers = [header for header, _ in open_indexes(paths, progress=lambda *step: seen.append(step), num_processes=processes)]
        assert [header["name"] for header in headers] == names
    assert seen == [(n, len(names)) for n in range(1, len(names) + 1)] * 2
    for name in names:
        one, two = ((tmp_path / kind / f"{name}.index.json").read_bytes() for kind in ("serial", "parallel"))
        differ = json.loads(one.split(b"\n")[0])["mtime_ns"], json.loads(two.split(b"\n")[0])["mtime_ns"]
        assert one.replace(str(differ[0]).encode(), str(differ[1]).encode()) == two


def test_an_error_in_a_process_is_the_same_clear_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "PARALLEL_BYTES", 1)
    copy(folder, tmp_path / "copy", "*.index.json")
    (tmp_path / "copy" / "003.tar").write_bytes(b"")
    with pytest.raises(UserError, match="003.tar: the shard is empty"):
        ShardSet(tmp_path / "copy", num_processes=2)


# --- fingerprints


def facts(shards, weight=1.0):
    return fingerprint(1, 16, [{"name": "x", "weight": weight, "caption": "txt", "shards": shards}])


def listed(count):
    return [{"name": f"{n:05d}.tar", "size": 10 * n, "count": 5, "digest": f"{n:032x}"} for n in range(count)]


def test_a_compact_fingerprint_is_small_and_still_names_the_shard(tmp_path):
    old = facts(listed(3000))
    small = compact_fingerprint(old, tmp_path)
    assert len(json.dumps(small)) < 1000 and small["digest"] == old["digest"]
    assert compare_fingerprints(small, old, tmp_path) == compare_fingerprints(small, small, tmp_path) == []
    changed = listed(3001)
    changed[1234] |= {"size": 7, "digest": "y"}
    for new in (facts(changed), compact_fingerprint(facts(changed), tmp_path)):
        assert compare_fingerprints(json.loads(json.dumps(small)), new, tmp_path) == [
            "source 'x': number of shards: 3000 -> 3001",
            f"source 'x': shard 01234.tar: size 12340 -> 7, digest {1234:032x} -> y",
            "source 'x': shard 03000.tar added",
        ]
    assert compare_fingerprints(small, facts(listed(3000), 2.0), tmp_path) == ["source 'x': weight: 1.0 -> 2.0"]
    assert compact_fingerprint(facts(listed(3)), tmp_path) == facts(listed(3))  # few are listed where they are


def test_a_lost_or_damaged_list_of_shards_is_said(tmp_path):
    small = compact_fingerprint(facts(listed(30)), tmp_path)
    assert compact_fingerprint(facts(listed(30)), tmp_path / "never made", write=False) == small
    (path,) = tmp_path.glob("shards-*.json")
    changed = listed(31)
    wanted = ["source 'x': num_shards: 30 -> 31", "source 'x': num_samples: 150 -> 155",
              "source 'x': shards changed, and their old list is missing"]  # fmt: skip
    path.write_text(path.read_text().replace("00003", "00004"))
    assert compare_fingerprints(small, facts(changed), tmp_path) == wanted
    path.unlink()
    assert compare_fingerprints(small, facts(changed), tmp_path) == wanted
    assert compare_fingerprints(small, facts(listed(30)), tmp_path) == []
