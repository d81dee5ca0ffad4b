"""Laws of the pre-training samples: position decides everything, bad samples are named holes, shapes never change."""

import io
import json
import multiprocessing
import os
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2_vlm.config import ImageInput, PairSource, PretrainRecipe, UserError
from aimv2_vlm.data.captions import CaptionTokenizer, train_tokenizer
from aimv2_vlm.data.order import compare_fingerprints
from aimv2_vlm.data.pairs import PairDataset
from aimv2_vlm.data.shards import write_shards
from aimv2_vlm.train import run
from aimv2_vlm.train.distributed import Placement

SIZE, PATCHES, CONTEXT = 28, 4, 24
TEXTS = [
    f"a {color} {shape} number {n}" for n in range(10) for color in ("red", "green") for shape in ("circle", "square")
]


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 255, (36, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def make_rows(count, first=0):
    return [
        {
            "key": f"k{first + n}",
            "image_bytes": picture(first + n),
            "ext": "jpg",
            "caption": TEXTS[(first + n) % 40],
            "json": {"second": f"green square number {first + n}"},
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    write_shards(make_rows(20), root / "a", samples_per_shard=6)
    write_shards(make_rows(9, 100), root / "b", samples_per_shard=4)
    train_tokenizer(TEXTS, root / "captions.model", vocab_size=150)
    return root


def make(root, seed=0, **options):
    sources = options.pop("sources", None) or [
        PairSource(path=str(root / "a"), name="a", weight=0.7),
        PairSource(path=f"{root}/b/{{00000..00002}}.tar", name="b", weight=0.3, caption={"txt": 1, "json:second": 1}),
    ]
    tokenizer = CaptionTokenizer(root / "captions.model", CONTEXT)
    return PairDataset(sources, seed, ImageInput(size=SIZE), tokenizer, PATCHES, **options)


def same(one, two):
    return all(torch.equal(one[k], two[k]) if torch.is_tensor(one[k]) else one[k] == two[k] for k in one | two)


def test_rows_have_fixed_shapes_and_decode_to_their_captions(root):
    pairs = make(root)
    for position in range(40):
        row = pairs.fetch(position)
        assert row["pixels"].shape == (3, SIZE, SIZE) and row["pixels"].dtype == torch.uint8
        assert row["input_ids"].shape == (CONTEXT,) and row["input_ids"].dtype == torch.int64
        assert 1 <= row["prefix_length"] < PATCHES and row["weight"] == 1 and row["bad"] is None
        assert row["input_ids"][row["text_length"] - 1] == pairs.tokenizer.eos_id
        assert (row["input_ids"][row["text_length"] :] == pairs.tokenizer.pad_id).all()
        number = int(row["key"][1:])
        wanted = {TEXTS[number % 40]} | ({f"green square number {number}"} if number >= 100 else set())
        ids = row["input_ids"].tolist()
        assert ids[: row["text_length"]] in [pairs.tokenizer.encode(text) for text in wanted]


def test_microbatch_is_its_rows_however_it_is_cut(root):
    pairs = make(root)
    whole = pairs.microbatch(range(30))
    for cut in ([range(30)], [range(10), range(10, 30)], [[n] for n in range(30)], [range(0, 30, 2), range(1, 30, 2)]):
        parts = [pairs.microbatch(positions) for positions in cut]
        order = np.argsort(np.concatenate([np.array(positions) for positions in cut]))
        for name in ("pixels", "input_ids", "text_lengths", "prefix_lengths", "weights"):
            assert torch.equal(torch.cat([part[name] for part in parts])[order], whole[name])
    assert whole["pixels"].shape == (30, 3, SIZE, SIZE) and whole["input_ids"].shape == (30, CONTEXT)
    assert whole["weights"].dtype == torch.float32 and whole["text_lengths"].dtype == torch.int64


def _rows_backwards(pairs, count, queue):
    torch.set_num_threads(1)
    rows = [pairs.fetch(position) for position in reversed(range(count))]
    queue.put(
        [{name: value.tolist() if torch.is_tensor(value) else value for name, value in row.items()} for row in rows]
    )


def test_another_process_gets_the_same_rows(root):
    """A spawned process has nothing but the pickle, and asks in another order."""
    pairs = make(root)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_rows_backwards, args=(pairs, 12, queue))
    process.start()
    there = queue.get(timeout=300)[::-1]
    process.join()
    for position, other in enumerate(there):
        row = pairs.fetch(position)
        assert {name: value.tolist() if torch.is_tensor(value) else value for name, value in row.items()} == other


def test_workers_of_a_data_loader_give_the_same_batches(root):
    """Forked workers share nothing harmful with the parent, whose files are open already."""
    pairs = make(root)
    pairs.microbatch(range(20))
    batches = [list(range(start, start + 5)) for start in range(0, 20, 5)]

    class Batches(torch.utils.data.Dataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, number):
            return pairs.microbatch(batches[number])

    def run(workers):
        return list(torch.utils.data.DataLoader(Batches(), batch_size=None, num_workers=workers))

    for one, two in zip(run(0), run(2), strict=True):
        assert same(one, two)


def test_fewer_samples_are_epochs_of_the_same(root):
    pairs = make(root)
    assert pairs.num_samples == 29
    positions = pairs.epoch_positions
    seen = Counter(pairs.fetch(position)["key"] for position in range(positions))
    assert len(seen) == 29  # every sample of both sources
    of_a = [pairs.order.locate(position)[:3] for position in range(60) if pairs.order.locate(position).source == 0]
    assert len(set(of_a[:20])) == 20 and set(of_a[20:40]) == set(of_a[:20])


def test_the_seed_changes_order_crops_and_prefixes(root):
    one, two = make(root, seed=0).microbatch(range(30)), make(root, seed=1).microbatch(range(30))
    assert one["keys"] != two["keys"] and not torch.equal(one["prefix_lengths"], two["prefix_lengths"])
    again = make(root, seed=0)
    first = {again.fetch(p)["key"]: again.fetch(p)["pixels"] for p in range(28)}
    later = [(again.fetch(p)["key"], again.fetch(p)["pixels"]) for p in range(60, 90)]
    assert any(key in first and not torch.equal(first[key], pixels) for key, pixels in later)  # fresh crops each epoch


def test_crop_settings_do_not_move_the_prefixes(root):
    other = make(root)
    other.train_transform = type(other.train_transform)(SIZE, scale=(0.9, 1.0), flip=0.0)
    one, two = make(root).microbatch(range(20)), other.microbatch(range(20))
    assert torch.equal(one["prefix_lengths"], two["prefix_lengths"]) and torch.equal(one["input_ids"], two["input_ids"])
    assert not torch.equal(one["pixels"], two["pixels"])


def test_prefixes_are_uniform(root):
    pairs = make(root)
    counts = Counter(pairs.fetch_validation(position % 29)["prefix_length"] for position in range(29))
    assert set(counts) <= {1, 2, 3}
    drawn = Counter(pairs.fetch(position)["prefix_length"] for position in range(240))
    assert set(drawn) == {1, 2, 3} and min(drawn.values()) > 50


def test_validation_is_stored_order_and_independent_of_the_seed(root):
    one, two = make(root, seed=0).validation(range(29)), make(root, seed=5).validation(range(29))
    assert same(one, two)
    assert one["keys"] == [f"k{n}" for n in range(20)] + [f"k{100 + n}" for n in range(9)]
    assert one["input_ids"][25].tolist()[: one["text_lengths"][25]] == make(root).tokenizer.encode(TEXTS[105 % 40])
    with pytest.raises(IndexError):
        make(root).validation([29])


def test_held_out_samples_lie_evenly_over_all_sources(root, monkeypatch):
    recipe = PretrainRecipe()
    recipe.data.validation_samples, recipe.optim.micro_batch_size = 5, 2
    monkeypatch.setattr(run, "validate", lambda objective, model, batches, placement: [key for batch in batches for key in batch["keys"]])
    assert run.validate_pairs(None, None, make(root), recipe, Placement("single")) == ["k0", "k5", "k11", "k17", "k103"]


# --- bad samples


@pytest.fixture
def broken(root, tmp_path):
    """Twelve samples of which three turn out bad at decoding, one at reading (a flipped byte), two were never given a
    position."""
    rows = make_rows(12)
    rows[2]["image_bytes"] = rows[2]["image_bytes"][:400]
    rows[5]["image_bytes"] = b"this is no picture"
    rows[7]["caption"] = "?!?"
    rows[9]["image_bytes"] = b""
    rows[10]["caption"] = " "
    rows[10]["json"] = {}
    (path,) = write_shards(rows, tmp_path / "broken")
    pairs = make(root, sources=[PairSource(path=str(path), name="x")])
    with tarfile.open(path) as tar:
        at = tar.getmember("k3.jpg").offset_data + 50
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    return pairs


def test_bad_samples_are_named_holes(broken):
    assert broken.num_samples == 10
    assert broken.bad_samples() == ["00000.tar: k9: empty picture file", "00000.tar: k10: empty caption"]
    rows = {row["key"]: row for row in map(broken.fetch, range(10))}
    assert len(rows) == 10
    bad = {key: row["bad"] for key, row in rows.items() if row["bad"]}
    assert set(bad) == {"k2", "k3", "k5", "k7"}
    assert bad["k5"] == "00000.tar: k5: not a picture in a known format"
    assert bad["k3"] == "00000.tar: k3: picture differs from what was indexed (checksum)"
    assert bad["k7"] == "00000.tar: k7: caption is empty after cleaning"
    assert bad["k2"].startswith("00000.tar: k2: cannot be decoded")
    for row in rows.values():
        assert row["pixels"].shape == (3, SIZE, SIZE) and row["input_ids"].shape == (CONTEXT,)
        assert row["weight"] == (row["bad"] is None) and 1 <= row["prefix_length"] < PATCHES
        assert row["bad"] is None or (row["text_length"] == 0 and not row["pixels"].any())
    batch = broken.microbatch(range(10))
    assert sorted(batch["bad"]) == sorted(bad.values()) and batch["weights"].sum() == 6


def test_order_does_not_depend_on_what_is_bad(broken, root, tmp_path):
    """The same shard undamaged: same keys, prefixes and crops at every position."""
    rows = make_rows(12)
    del rows[9:11]
    (path,) = write_shards(rows, tmp_path / "whole")
    whole = make(root, sources=[PairSource(path=str(path), name="x")])
    for position in range(30):
        one, two = broken.fetch(position), whole.fetch(position)
        assert (one["key"], one["prefix_length"]) == (two["key"], two["prefix_length"])
        assert one["bad"] or torch.equal(one["pixels"], two["pixels"])


def test_shuffled_captions_are_other_pictures_captions(root):
    source = [PairSource(path=str(root / "a"), name="a")]
    right, wrong = make(root, sources=source), make(root, sources=source, shuffle_captions=True)
    caption_of = {}
    for position in range(60):
        one, two = right.fetch(position), wrong.fetch(position)
        assert one["key"] == two["key"] and torch.equal(one["pixels"], two["pixels"])
        assert not torch.equal(one["input_ids"], two["input_ids"])
        caption = tuple(two["input_ids"].tolist())
        assert caption_of.setdefault(two["key"], caption) == caption  # always the same wrong one
    assert len(set(caption_of.values())) == 20  # the captions are permuted, none is lost
    assert compare_fingerprints(right.fingerprint(), wrong.fingerprint()) == ["shuffle_captions: False -> True"]


# --- set-up


def test_a_tokenizer_is_trained_on_the_captions_that_a_run_sees(root, broken):
    pairs = make(root)
    texts = list(pairs.texts())
    assert texts == [pairs.captioned(position)[1] for position in range(29)] == list(make(root, shuffle_captions=True).texts())
    second = [text for text in texts if text.startswith("green square number 1") and len(text.split()[-1]) == 3]
    assert 0 < len(second) < sum(pairs.order.locate(position).source for position in range(29))  # both columns of the mixed source
    assert list(pairs.texts(5)) == texts[:5]
    assert len(list(broken.texts())) == 9  # the one whose checksum differs has none


def test_fingerprint_names_a_changed_shard(root, tmp_path):
    for number, rows in enumerate((make_rows(4), make_rows(4), make_rows(5))):
        write_shards(rows, tmp_path / str(number))
    one, two, three = (
        make(root, sources=[PairSource(path=str(tmp_path / str(n)), name="x")]).fingerprint() for n in range(3)
    )
    assert compare_fingerprints(one, two) == [] and one["digest"] == two["digest"]
    assert json.loads(json.dumps(one)) == one
    (change,) = compare_fingerprints(one, three)
    assert change.startswith("source 'x': shard 00000.tar: size ") and "count 4 -> 5" in change


def test_a_dataset_is_light_to_send_and_opens_files_where_it_is_used(root):
    pairs = make(root)
    opened = set(os.listdir("/proc/self/fd"))
    assert len(pickle.dumps(pairs)) < len(pickle.dumps(pairs.tokenizer)) + 10_000
    pairs.microbatch(range(20))
    assert len(set(os.listdir("/proc/self/fd")) - opened) <= 7  # one for each shard at most


@pytest.mark.parametrize(
    "sources, text",
    [
        ([], "empty"),
        ([("a", "a"), ("a", "b")], "same name"),
        ([("x", "nowhere/*.tar")], "nowhere"),
    ],
)
def test_impossible_sources_are_named(root, sources, text):
    with pytest.raises(UserError, match=text):
        PairDataset(
            [PairSource(path=str(root / path), name=name) for name, path in sources],
            0, ImageInput(size=SIZE), CaptionTokenizer(root / "captions.model"), PATCHES,
        )  # fmt: skip


def test_a_source_of_bad_samples_only(root, tmp_path):
    rows = make_rows(2)
    for row in rows:
        row["image_bytes"] = b""
    write_shards(rows, tmp_path)
    with pytest.raises(UserError, match=r"source 'x': no usable sample.*k0: empty picture"):
        make(root, sources=[PairSource(path=str(tmp_path), name="x")])
    with pytest.raises(UserError, match="patches"):
        PairDataset(
            [PairSource(path=str(root / "a"))], 0, ImageInput(size=14), CaptionTokenizer(root / "captions.model"), 1
        )
