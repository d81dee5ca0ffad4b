"""Laws of `data check` and `data preview`: what is planted is found and named, nothing else is; pages hold nothing but themselves."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import run_cli
from PIL import Image

from aimv2_vlm.config import UserError
from aimv2_vlm.data import inspection
from aimv2_vlm.data.duplicates import alike, evaluation_pictures, look_alikes, near_pairs, perceptual_hash
from aimv2_vlm.data.preview import preview_conversations, preview_shards
from aimv2_vlm.data.shards import write_json, write_shards

SCORES = inspection.EXPECTED["coyo"]


def scene(seed, size=(60, 80)):
    """A smooth random picture: structure at every coarse scale, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def encoded(picture, kind="JPEG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(key, data, caption="a caption of five words", extension="jpg", **metadata):
    return {"key": key, "image_bytes": data, "ext": extension, "caption": caption, "json": metadata}


def pixels(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


# --- look-alikes


def test_near_pairs_are_those_of_a_full_search():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2**64, 300, dtype=np.uint64)
    flips = np.array([sum(1 << int(b) for b in rng.choice(64, n % 11, replace=False)) for n in range(400)], dtype=np.uint64)
    queries = targets[rng.integers(0, 300, 400)] ^ flips
    distances = np.bitwise_count(queries[:, None] ^ targets[None])
    for limit in range(8):
        rows, columns = near_pairs(queries, targets, limit)
        assert list(zip(rows, columns)) == list(zip(*np.nonzero(distances <= limit)))
    none = np.zeros(0, dtype=np.uint64)
    assert len(near_pairs(none, targets, 6)[0]) == len(near_pairs(queries, none, 6)[0]) == 0
    with pytest.raises(ValueError, match="distance 8"):
        near_pairs(queries, targets, 8)


def test_near_pairs_cut_into_batches_are_the_same(monkeypatch):
    hashes = np.random.default_rng(1).integers(0, 2**18, 500).astype(np.uint64) << np.uint64(23)  # three quarters of equal bits
    whole = near_pairs(hashes, hashes, 5)
    monkeypatch.setattr("aimv2_vlm.data.duplicates.PAIRS_AT_ONCE", 1000)
    assert all(np.array_equal(a, b) for a, b in zip(near_pairs(hashes, hashes, 5), whole))
    assert len(whole[0]) > 500


def test_alike_joins_chains_and_nothing_else():
    base, full = 0x0123456789ABCDEF, 2**64 - 1

    def groups(*hashes):
        return alike(np.array(hashes, dtype=np.uint64), 3).tolist()

    one, two, three, four, five = groups(
        (base, 0, 0, 0), (base ^ 0b111, 0, 0, 1), (base ^ 0b111111, 0, 0, 0), (base, 0, 0, 0), (~base & full, 0, 0, 0)
    )
    assert one == two == three == four != five
    assert len(set(groups((base, 0, 0, 0), (base ^ 0b111111, 0, 0, 0)))) == 2
    assert len(set(groups((base, 0, 0, 0), (base, full >> 32, 0, 0)))) == 1  # 32 fine bits
    assert len(set(groups((base, 0, 0, 0), (base, full >> 32, 1, 0)))) == 2  # 33: another picture from the same template


def test_copies_hash_alike_and_others_do_not():
    pictures = [scene(seed) for seed in range(40)]
    hashes = np.array([perceptual_hash(pixels(p)) for p in pictures], dtype=np.uint64)
    assert hashes.shape == (40, 4)
    for change in (
        lambda p: Image.open(io.BytesIO(encoded(p, quality=50))).convert("RGB"),
        lambda p: p.resize((40, 30), Image.Resampling.BICUBIC),
        lambda p: p.resize((200, 200), Image.Resampling.BILINEAR),  # squashed to a square as well
        lambda p: p.point(lambda v: int(20 + v * 0.8)),
    ):
        changed = np.array([perceptual_hash(pixels(change(p))) for p in pictures], dtype=np.uint64)
        rows, columns = look_alikes(hashes, changed, inspection.NEAR)
        assert rows.tolist() == columns.tolist() == list(range(40))
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])[np.triu_indices(40, 1)]
    assert distances[:, 0].min() > 2 * inspection.NEAR
    assert perceptual_hash(torch.full((3, 50, 50), 200, dtype=torch.uint8)) is None


# --- check


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Two shards with a known number of everything."""
    root = tmp_path_factory.mktemp("planted")
    good = [encoded(scene(n)) for n in range(8)]
    rows = [
        *(sample(f"good{n}", data, f"caption number {n}") for n, data in enumerate(good)),
        sample("copy", good[0]),  # equal bytes
        sample("small", encoded(scene(1).resize((40, 30))), extension="jpg"),  # looks like good1
        sample("png", encoded(scene(20), "PNG"), extension="png"),
        sample("flat", encoded(Image.new("RGB", (64, 64), (9, 9, 9)))),
        sample("cut", encoded(scene(30, (300, 400)))[:-2000]),  # only decoding can tell
        sample("words", b"not a picture at all"),
        sample("good2", encoded(scene(31))),  # a key used twice
        sample("silent", encoded(scene(32)), " "),
    ]
    write_shards(rows, root / "shards", samples_per_shard=10)
    return root


def test_check_by_headers_finds_what_needs_no_decoding(planted):
    report = inspection.check(planted / "shards")
    assert (report["num_samples"], report["num_good"], report["num_bad"], report["num_shards"]) == (16, 14, 2, 2)
    assert report["bad"] == ["00001.tar: silent: empty caption", "00001.tar: words: not a picture in a known format"]
    assert report["formats"] == {"jpg": 13, "png": 1} and report["duplicate_keys"] == ["good2"]
    assert report["duplicate_pictures"] == [["00000.tar: good0", "00000.tar: copy"]] and report["num_duplicate_pictures"] == 1
    assert (
        report["height"]["max"] == 300
        and report["height"]["min"] == 30
        and report["aspect_ratio"]["median"] == pytest.approx(4 / 3, abs=1e-4)
    )
    assert report["captions"]["txt"]["count"] == 14 and report["captions"]["txt"]["num_repeated"] == 5
    assert report["captions"]["txt"]["words"]["max"] == 5 and "near_duplicate_pictures" not in report
    assert report["text_columns"]["txt"] == report["text_columns"]["json:key"] == 14


def test_check_with_decoding_finds_damage_and_look_alikes(planted):
    seen = []
    report = inspection.check(planted / "shards", decode=True, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 15) for n in range(1, 16)]
    assert report["num_bad"] == 3 and report["bad"][1].startswith("00001.tar: cut: cannot be decoded")
    groups = [set(group) for group in report["near_duplicate_pictures"]]
    assert sorted(map(sorted, groups)) == [["00000.tar: copy", "00000.tar: good0"], ["00000.tar: good1", "00000.tar: small"]]
    assert report["num_near_duplicate_pictures"] == 2 and report["num_flat_pictures"] == 1
    assert sum(report["bad_reasons"].values()) == 3


def as_folder(root, pictures):
    for name, data in pictures.items():
        (root / "deep" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "deep" / name).write_bytes(data)
    return root


def as_parquet(root, pictures):
    root.mkdir()
    structs = [{"bytes": data, "path": name} for name, data in pictures.items()] + [None, {"bytes": None, "path": "elsewhere.jpg"}]
    table = pyarrow.table({"question": ["q"] * len(structs), "image": structs, "raw": [None] * len(structs)})
    pyarrow.parquet.write_table(table, root / "test-00000.parquet", row_group_size=2)
    return root


def as_tar(root, pictures):
    return write_shards([sample(name.partition(".")[0], data, " ") for name, data in pictures.items()], root)[0]


@pytest.mark.parametrize("build", [as_folder, as_parquet, as_tar])
@pytest.mark.parametrize("decode", [False, True])
def test_look_alikes_of_an_evaluation_set_are_named_in_every_form(planted, tmp_path, build, decode):
    pictures = {
        "same.jpg": encoded(scene(3)),
        "near.jpg": encoded(scene(4).resize((120, 90), Image.Resampling.BICUBIC), quality=70),
        "other.jpg": encoded(scene(77)),
        "broken.jpg": b"\xff\xd8\xff and then nothing",
        "flat.jpg": encoded(Image.new("RGB", (64, 64), (9, 9, 9))),  # equal bytes, though nothing to compare in it
    }
    path = build(tmp_path / "evaluation", pictures)
    report = inspection.check(planted / "shards", against=path, decode=decode)["against"]
    assert report["num_pictures"] == 4 and report["num_unreadable"] == (2 if build is as_parquet else 1)
    found = {match["sample"]: (match["evaluation"], match["identical_bytes"]) for match in report["matches"]}
    assert set(found) == {"00000.tar: good3", "00000.tar: good4", "00001.tar: flat"} and report["num_matches"] == 3
    assert [same for _, same in found.values()] == [True, False, True]
    names = list(pictures) if build is not as_parquet else [f"row {n}:" for n in range(5)]
    for key, number in (("00000.tar: good3", 0), ("00000.tar: good4", 1), ("00001.tar: flat", 4)):
        assert names[number] in found[key][0]


def test_evaluation_sets_that_cannot_be_read_are_refused(tmp_path):
    def read(path):
        return list(evaluation_pictures(path))

    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no picture"):
        read(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "b": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"no column holds pictures \(columns: a, b\)"):
        read(tmp_path)
    for name in ("u.parquet", "v.tar"):
        (tmp_path / name).write_bytes(b"neither the one nor the other" * 40)
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


# --- expect


def download(root, dataset, count=6, drop=()):
    """Shards with the files and fields of an img2dataset download; `drop` leaves fields out."""
    facts = {
        "url": "https://example.org/p.jpg",
        "error_message": None,
        "width": 80,
        "height": 60,
        "original_width": 80,
        "original_height": 60,
    }
    facts |= dict.fromkeys(inspection.EXPECTED[dataset], "text of it")
    facts = {name: value for name, value in facts.items() if name not in drop}
    write_shards([sample(f"{n:09d}", encoded(scene(n)), **facts) for n in range(count)], root, samples_per_shard=3)
    return root


@pytest.mark.parametrize("dataset", inspection.EXPECTED)
def test_a_whole_download_is_as_expected(tmp_path, dataset):
    found = inspection.check(download(tmp_path / "d", dataset), expect=dataset)["expect"]
    assert found["problems"] == [] and found["share_arrived"] == 1.0 and found["count"] == 6


def test_what_a_download_lacks_is_said(tmp_path):
    root = download(tmp_path / "d", "coyo", drop=("watermark_score", "url"))
    stats = json.loads((root / "00001_stats.json").read_text())
    write_json(
        root / "00001_stats.json",
        stats | {"count": 9, "successes": 5, "failed_to_download": 4, "status_dict": {"success": 5, "HTTP Error 404": 4}},
    )
    found = inspection.check(root, expect="coyo")["expect"]
    assert found["problems"] == [
        ".json of 6 of 6 samples: no 'url'",
        ".json of 6 of 6 samples: no 'watermark_score' (add it to --save_additional_columns and download again)",
        "00001.tar: holds 3 samples, 00001_stats.json says 5: incomplete; delete both and run the same img2dataset command again",
        "00001.parquet: 3 rows, 00001_stats.json says 9",
        "00000.parquet and 1 more: no column 'url'",
        "00000.parquet and 1 more: no column 'watermark_score' (add it to --save_additional_columns and download again)",
    ]
    assert found["failures"] == {"HTTP Error 404": 4} and found["share_arrived"] == pytest.approx(8 / 12, abs=1e-4)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("00000_stats.json", None, "download was not finished"),
        ("00000_stats.json", b'{"count": 3}', "not what img2dataset writes"),
        ("00000_stats.json", b"[" * 100_000, "not what img2dataset writes"),
        ("00000.parquet", None, "belongs beside the tar"),
        ("00000.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_files_beside_the_shard_are_judged(tmp_path, name, content, message):
    root = download(tmp_path / "d", "cc12m", count=3)
    (root / name).unlink() if content is None else (root / name).write_bytes(content)
    (problem,) = inspection.check(root, expect="cc12m")["expect"]["problems"]
    assert problem.startswith(f"{name}: ") and message in problem


# --- the command


def test_the_command_reports_writes_json_and_fails_when_too_much_is_bad(planted, tmp_path):
    done = run_cli("data", "check", planted / "shards", "--json", tmp_path / "full.json", check=False)
    assert done.returncode == 1  # 2 of 16 are bad
    shown = json.loads(done.stdout.partition("\nbad: ")[0])
    full = json.loads((tmp_path / "full.json").read_text())
    assert shown == {key: value for key, value in full.items() if key != "bad"} and "bad: 00001.tar: silent: empty caption\n" in done.stdout
    assert re.search(r'^ "height": \{ "min": 30.0, .* \},$', done.stdout, re.MULTILINE)
    assert run_cli("data", "check", planted / "shards", "--max-bad-fraction", 0.2).returncode == 0
    failed = run_cli("data", "check", planted / "shards", "--max-bad-fraction", 0.2, "--expect", "recap", check=False)
    assert failed.returncode == 1 and "expected of recap: .json of 15 of 15 samples: no 're_caption'" in failed.stdout
    for words, message in (
        (["--near-bits", 9], "--near-bits 9"),
        (["--expect", "laion"], "is none of cc12m, coyo, dfn, recap"),
        (["--caption", "title"], "must be 'txt' or 'json:<field>'"),
        (["--against", tmp_path / "absent"], "--against takes"),
        (["--json", planted / "shards" / "00000.tar" / "x.json"], "--json"),
        ([tmp_path / "full.json"], "name them in two"),
    ):
        done = run_cli("data", "check", planted / "shards", *words, check=False)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == done.stderr.count("reading samples") + 1


@pytest.fixture
def talk(tmp_path):
    """Three conversations with pictures (one cut off, one used twice) and two rows to be rejected."""
    root = tmp_path / "pictures"
    root.mkdir()
    (root / "a.jpg").write_bytes(encoded(scene(1)))
    (root / "b.png").write_bytes(encoded(scene(2), "PNG"))
    (root / "cut.jpg").write_bytes(encoded(scene(3, (300, 400)))[:-2000])

    def row(key, picture, answer="<b>yes</b> & no"):
        turns = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": answer}]
        return {"id": key, "image": picture, "conversations": turns}

    rows = [
        row("one", "a.jpg"),
        row("two", "cut.jpg"),
        row("three", "b.png"),
        row("four", "a.jpg"),
        row("five", "absent.jpg"),
        row("six", "a.jpg", ""),
    ]
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    return tmp_path / "talk.json", root


def test_conversations_pictures_are_checked_once_each(talk, tmp_path):
    path, root = talk
    done = run_cli(
        "data", "check", path, "--images", root, "--decode", "--against", root / "b.png", "--json", tmp_path / "full.json", check=False
    )
    assert done.returncode == 1
    full = json.loads((tmp_path / "full.json").read_text())
    assert (full["rows"], full["good"]) == (6, 4) and full["rejected"] == {"missing_picture": 1, "empty_answer": 1}
    assert (full["pictures"]["num_pictures"], full["pictures"]["num_bad_pictures"]) == (3, 1)
    assert len(full["bad"]) == 3 and full["bad"][2].startswith(f"{root}/cut.jpg: cannot be decoded")
    assert [match["sample"] for match in full["pictures"]["against"]["matches"]] == [str(root / "b.png")]
    assert "pictures" not in json.loads(run_cli("data", "check", path, "--images", root, check=False).stdout.partition("\nbad: ")[0])
    refused = run_cli("data", "check", path, "--images", root, "--expect", "coyo", check=False)
    assert refused.returncode == 2 and "not for conversations" in refused.stderr


# --- preview


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.words = " ".join(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_preview_of_shards_shows_captions_escaped_and_bad_samples_as_such(tmp_path):
    hostile = "</dd><script>alert(1)</script> <img src=x onerror=alert(2)> & \u202eright to left\x07"
    rows = [
        sample("first", encoded(scene(0)), hostile, second="another caption", url="https://example.org/p.jpg", n=3),
        sample("cut", encoded(scene(3, (300, 400)))[:-2000], "of a cut picture"),
        sample("silent", encoded(scene(4)), " "),
        sample("nothing", b""),
        sample("tall", encoded(scene(5, (2000, 30)), "PNG"), "tall one", extension="png"),
    ]
    write_shards(rows, tmp_path / "shards")
    done = run_cli("data", "preview", tmp_path / "shards", "--out", tmp_path / "new" / "page.html")
    assert "4 shown, 2 of them bad; 1 left out" in done.stdout
    page = Page(tmp_path / "new" / "page.html")
    scriptless = "html head meta title style body header h1 p main div article img dl dt dd bdi details summary h2 ul li"
    assert {tag for tag, _ in page.tags} <= {*scriptless.split()}
    assert hostile.replace("\x07", "\ufffd") in page.words and "another caption" in page.words
    reasons = re.findall(r"bad: (?:cannot be decoded|no caption)", "".join(page.text))
    assert reasons == ["bad: cannot be decoded", "bad: no caption"] and "00000.tar: nothing: empty picture file" in page.words
    sizes = []
    for attributes in page.all("img"):
        kind, _, data = attributes["src"].partition(",")
        assert kind == "data:image/jpeg;base64" and not any(name.startswith("on") for name in attributes)
        with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
            sizes.append(shown.size)
    assert sizes == [(80, 60), (80, 60), (7, 480)]
    assert "80 × 60 jpg" in page.words and "00000.tar: first" in page.words and "https://example.org/p.jpg" in page.words
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and not page.all("link") and not page.all("a")


def test_preview_draws_by_seed_and_never_more_than_there_is(tmp_path):
    write_shards([sample(f"k{n}", encoded(scene(n, (8, 8)))) for n in range(30)], tmp_path / "shards", samples_per_shard=7)

    def keys(**options):
        preview_shards(tmp_path / "shards", tmp_path / "page.html", **options)
        return re.findall(r"0000\d\.tar: (k\d+)", (tmp_path / "page.html").read_text())

    first = keys(num=8)
    assert len(set(first)) == 8 and first == keys(num=8) != keys(num=8, seed=1)
    assert keys(num=99) == [f"k{n}" for n in range(30)]
    with pytest.raises(UserError, match="--num 0"):
        keys(num=0)


def test_preview_of_conversations_shows_turns_and_rejected_rows(talk, tmp_path):
    path, root = talk
    done = run_cli("data", "preview", path, "--images", root, "--out", tmp_path / "page.html")
    assert "4 shown, 1 of them bad; 2 left out" in done.stdout
    page = Page(tmp_path / "page.html")
    assert page.words.count("<b>yes</b> & no") == 4 and page.words.count("<image>\nIs it?") == 4 and len(page.all("img")) == 3
    assert "row 4 (id five): missing_picture" in page.words and "row 5 (id six): empty_answer" in page.words
    source = SimpleNamespace(path=str(path), images=str(root), take="all")
    with pytest.raises(UserError, match="--out .*cannot be written"):
        preview_conversations([source], path / "page.html")
