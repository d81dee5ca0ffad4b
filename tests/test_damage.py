"""Damaged input: every good sample arrives, every bad one is named, and no input whatever ends in a traceback.

Short versions of benchmarks/reliability/{corruption,headers,fuzz}.py, and sources that are too few, too small or of no
weight.
"""

import csv
import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aimv2_vlm import recipe as recipes
from aimv2_vlm.config import ImageInput, PairSource, UserError
from aimv2_vlm.data.captions import CaptionTokenizer, train_tokenizer
from aimv2_vlm.data.conversations import ConversationSet
from aimv2_vlm.data.pairs import PairDataset
from aimv2_vlm.data.shards import BadSample, ShardSet, build_index, index_path, pack, write_shards
from aimv2_vlm.train import checkpoint
from aimv2_vlm.train.loop import BadSamples, StepDataset, fetch_steps
from benchmarks.reliability import corruption, fuzz, headers
from benchmarks.reliability.corpus import DAMAGES, caption_of, key_of, number_of, picture

COUNT = 1000


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return corruption.stages(COUNT, 0, tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize("name", [
    "epoch, 0 workers", "epoch, 2 workers", "run, limit 6 %", "run, default limit, stops at the index",
    "run, default limit, stops after 1,000",
])
def test_every_good_sample_arrives_once_and_every_bad_one_is_named(stages, name):
    assert stages[name]() == []


def test_the_corpus_has_every_damage_and_its_judge_sees_what_is_wrong(tmp_path):
    corpus = corruption.write_corpus(tmp_path / "c", 60, 30, 1)
    assert {kind for _, kind in corpus.bad.values()} == set(DAMAGES) and len(corpus.good) == 30
    right = [f"{shard}: {key_of(n)}: {DAMAGES[kind].reason}" for n, (shard, kind) in corpus.bad.items()]
    plain = corruption.Corpus(tmp_path, 60, bad={1: ("0.tar", "empty file"), 2: ("0.tar", "missing caption")})
    named = ["0.tar: s000001: empty picture file", "0.tar: s000002: no caption"]
    assert corruption.wrong_names(plain, named) == [] and len(right) == 30
    for wrong in (named[:1], [*named, named[0]], [*named, "0.tar: s000003: no caption"], [named[0], "0.tar: s000002: empty caption"]):
        assert corruption.wrong_names(plain, wrong)
    assert all(number_of(fuzz_decode(picture(n))) == n for n in (0, 21, 22, 9999, 10_647))


def fuzz_decode(data):
    from aimv2_vlm.data.transforms import decode_image

    return decode_image(data).numpy()


def test_bad_samples_are_judged_over_the_last_ten_thousand_and_not_before_one_thousand():
    early = BadSamples(0.01)
    for _ in range(9):
        early.add(100, 100, [])
        early.check()  # 900 seen, all bad: too early to judge
    with pytest.raises(UserError, match="max_bad_fraction"):
        early.add(100, 0, ["0.tar: k: x"])
        early.check()
    late = BadSamples(0.01)
    for _ in range(1000):
        late.add(100, 0, [])
    late.add(100, 100, [])
    late.check()  # 100 of the last 10,000 are 1 %
    with pytest.raises(UserError, match="101 of the last 10000"):
        late.add(100, 1, [])
        late.check()


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_garbage_over_a_header_costs_at_most_its_sample_and_is_named(tmp_path, first):
    for number in range(first, first + 10):
        what, problems = headers.trial(number, 0, tmp_path)
        assert not problems, what


# A fifth each, so that workers of a parallel run share them.
@pytest.mark.parametrize("first", range(0, 10_000, 2000))
def test_no_input_raises_anything_but_the_declared_errors(first):
    assert list(fuzz.try_inputs(range(first, first + 2000), 0)) == []


def test_the_fuzzer_notices_errors_hangs_and_memory(monkeypatch, tmp_path):
    def raises(draw, folder):
        raise KeyError("x")

    def hangs(draw, folder):
        while True:
            pass

    def grows(draw, folder):
        pass  # `resident` below says so

    monkeypatch.setattr(fuzz, "WHEEL", [raises, hangs, grows, lambda draw, folder: None])
    monkeypatch.setattr(fuzz, "HANG_S", 0.2)
    monkeypatch.setattr(fuzz, "MEMORY", 64 << 20)
    monkeypatch.setattr(fuzz, "import_readers", lambda: None)
    peak = iter([*[100 << 20] * 3, *[200 << 20] * 20])  # when watching begins, after the first two inputs, from the third on
    monkeypatch.setattr(fuzz, "resident", lambda: next(peak))
    found = dict(fuzz.try_inputs(range(4), 0))
    assert "KeyError" in found[0] and "Hang" in found[1] and "memory" in found[2] and 3 not in found
    monkeypatch.setattr(fuzz, "WHEEL", [lambda draw, folder: os._exit(9), lambda draw, folder: None])
    fuzz.run_block(range(2), 0, tmp_path / "log.jsonl")
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["number"] == 0 and "died" in line["problem"]


# ------------------------------------------------------------------------- faults that the fuzzer found, one law for each


@pytest.mark.parametrize("text, said", [
    ("a: b\0c", "not valid YAML"),
    ("? [a]\n: b", "not valid YAML"),
    ("seed: 2024-99-99", "not valid YAML"),
    ("out: &a [*a]", "aliases"),
    ("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)), "aliases"),
    ("[" * 5000, "not valid YAML"),
    ("seed: .inf", "seed"),
    ("optim: {steps: .nan}", "optim.steps"),
])
def test_a_recipe_that_cannot_be_read_is_one_line(tmp_path, text, said):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        recipes.load_recipe("pretrain", str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_aliases_of_an_ordinary_size_are_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("image: {mean: &m [0.5, 0.5, 0.5], std: *m}")
    assert recipes.load_recipe("pretrain", str(path)).image.std == [0.5, 0.5, 0.5]


def forge(path, change):
    """The index of a shard, changed and sealed again, as one that came with a download might be."""
    import hashlib

    header, body = build_index(path)
    change(header, body)
    data = json.dumps(body, separators=(",", ":")).encode()
    header["digest"] = hashlib.sha256(data).hexdigest()[:32]
    index_path(path, None).write_bytes(json.dumps(header).encode() + b"\n" + data + b"\n")


@pytest.mark.parametrize("change", [
    lambda header, body: body.pop("image"),
    lambda header, body: body["image"].__setitem__(0, (-512, 9, 0)),
    lambda header, body: body["image"].__setitem__(0, (512, 2**40, 0)),
    lambda header, body: body.update(bad={}),
    lambda header, body: body["text"].pop(),
    lambda header, body: body["mask"].__setitem__(0, "1"),
    lambda header, body: body["mask"].__setitem__(0, 2**70),
    lambda header, body: header["column_counts"].update({"1": 99}),
    lambda header, body: header.update(num_bad=7),
    lambda header, body: body["key"].__setitem__(0, {"a": 1}),
    lambda header, body: body["bad"].append({"key": 3}),
    lambda header, body: body.update(columns=[["txt"]]),
])
def test_a_forged_index_is_refused_or_built_again(tmp_path, change):
    (path,) = write_shards(make_rows(3), tmp_path)
    forge(path, change)
    try:
        shards = ShardSet(path)
        samples = [shards.read(0, number) for number in range(shards.num_samples[0])]
    except UserError as error:
        assert "index is damaged" in str(error)
    else:
        assert [sample.caption for sample in samples] == [caption_of(n) for n in range(3)]


def test_an_index_that_promises_a_caption_is_not_believed(tmp_path):
    """It names the metadata's caption for a sample whose metadata has none."""
    rows = [row | {"caption": " "} for row in make_rows(2)]
    for row in rows:
        row["json"] = {"alt": "text"}
    (path,) = write_shards(rows, tmp_path)
    index = build_index(path)[1]
    assert "json:alt" in index["columns"] and "json:invented" not in index["columns"]

    def change(header, body):
        header["columns"] = body["columns"] = [name.replace("json:alt", "json:invented") for name in body["columns"]]

    forge(path, change)
    with pytest.raises(BadSample, match="00000.tar: s000000: the index promises a caption"):
        ShardSet(path, "json:invented").read(0, 0)


@pytest.mark.parametrize("change", [
    lambda spans, verdicts: (spans + 2**40, verdicts),
    lambda spans, verdicts: (spans.reshape(-1), verdicts),
    lambda spans, verdicts: (spans[:1], verdicts),
    lambda spans, verdicts: (spans, verdicts + 200),
    lambda spans, verdicts: (spans.astype("float32"), verdicts),
    lambda spans, verdicts: (-spans, verdicts),
])
def test_a_damaged_row_index_is_made_again(tmp_path, change):
    import safetensors.numpy

    path, source = tmp_path / "rows.jsonl", fuzz.SimpleNamespace(path=str(tmp_path / "rows.jsonl"), images="", take="all")
    path.write_text("\n".join(json.dumps(fuzz.ROWS[1] | {"id": n}) for n in range(3)))
    ConversationSet([source])
    place = Path(f"{path}.rows")
    with safetensors.safe_open(place, framework="np") as stored:
        metadata, (spans, verdicts) = stored.metadata(), (stored.get_tensor("spans"), stored.get_tensor("verdicts"))
    spans, verdicts = change(spans, verdicts)
    safetensors.numpy.save_file({"spans": spans.copy(), "verdicts": verdicts.copy()}, place, metadata=metadata)
    rows = ConversationSet([source])
    assert [rows[n].id for n in range(len(rows))] == ["0", "1", "2"]


@pytest.mark.parametrize("change", [
    {"samples": 9}, {"tokens": "40"}, {"bad": {}}, {"fingerprint": None}, {"world": [1]}, {"digest": "0"}, {"new": 1},
])
def test_a_checkpoint_whose_state_was_changed_is_passed_over(tmp_path, capsys, change):
    step = tmp_path / "step_00000001"
    step.mkdir()
    for name, data in fuzz.checkpoint_files().items():
        (step / name).write_bytes(data)
    assert checkpoint.newest(tmp_path, fuzz.placement())[1]["samples"] == 8
    state = json.loads((step / "state.json").read_text())
    (step / "state.json").write_text(json.dumps(state | change))
    assert checkpoint.newest(tmp_path, fuzz.placement()) is None
    assert "passed over (state.json is damaged" in capsys.readouterr().err


def test_tables_and_pictures_that_cannot_be_packed_are_named(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        (pictures / f"{number}.jpg").write_bytes(picture(number))
    os.mkfifo(pictures / "pipe.jpg")
    (pictures / "zero.jpg").symlink_to("/dev/zero")
    with open(pictures / "big.jpg", "wb") as file:
        file.truncate(2**40)
    rows = [("0.jpg", "one"), ("pipe.jpg", "x"), ("zero.jpg", "x"), ("big.jpg", "x"), ("1.jpg", "half \ud800"), ("1.jpg", "two")]
    (pictures / "c.jsonl").write_text("\n".join(json.dumps({"image": image, "caption": text}) for image, text in rows))
    report = pack(pictures, pictures / "c.jsonl", tmp_path / "out")
    assert report["num_written"] == 2 and [bad["reason"].split(",")[0] for bad in report["bad"]] == [
        "picture is missing or unreadable", "picture is missing or unreadable", f"{2**40} bytes", "text that is not Unicode (half of a surrogate pair)",
    ]
    (pictures / "c.csv").write_text("image,caption\n0.jpg," + "9" * (csv.field_size_limit() + 1))
    with pytest.raises(UserError, match="c.csv: is not a CSV table"):
        pack(pictures, pictures / "c.csv", tmp_path / "out2")


# ----------------------------------------------------------------------------------------------------------- odd sources


def make_rows(count, first=0):
    return [
        {"key": key_of(n), "image_bytes": picture(n), "ext": "jpg", "caption": caption_of(n), "json": {}}
        for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    model = tmp_path_factory.mktemp("tokenizer") / "captions.model"
    train_tokenizer((caption_of(n) for n in range(200)), model, vocab_size=40)
    return CaptionTokenizer(model, 48)


def open_pairs(tokenizer, *sources):
    named = [PairSource(path=str(path), name=f"s{n}", weight=weight) for n, (path, weight) in enumerate(sources)]
    return PairDataset(named, 0, ImageInput(size=28), tokenizer, 4)


def batches(data, count, workers, size=4):
    def fetch(step):
        return [data.microbatch(range(step * size, step * size + size))]

    return [batch for (batch,) in fetch_steps(StepDataset(fetch, count), 0, workers)]


@pytest.mark.parametrize("num_samples, per_shard", [(1, 1), (5, 5), (5, 3)])
def test_fewer_shards_than_workers_one_shard_one_sample(tokenizer, tmp_path, num_samples, per_shard):
    """Epoch after epoch each sample comes once, and three workers bring what none brings."""
    write_shards(make_rows(num_samples), tmp_path, per_shard)
    data = open_pairs(tokenizer, (tmp_path, 1.0))
    alone, together = batches(data, 5, 0), batches(data, 5, 3)
    keys = [key for batch in alone for key in batch["keys"]]
    assert keys == [key for batch in together for key in batch["keys"]]
    assert all((a["pixels"] == b["pixels"]).all() for a, b in zip(alone, together, strict=True))
    for epoch in range(len(keys) // num_samples):
        assert sorted(keys[epoch * num_samples :][:num_samples]) == [key_of(n) for n in range(num_samples)]
    assert not any(batch["bad"] for batch in alone)


def test_sources_of_very_different_sizes_keep_their_quota(tokenizer, tmp_path):
    write_shards(make_rows(1), tmp_path / "tiny")
    write_shards(make_rows(300, 1000), tmp_path / "large", 7)
    data = open_pairs(tokenizer, (tmp_path / "tiny", 0.5), (tmp_path / "large", 0.5))
    keys = [data.fetch(position)["key"] for position in range(100)]
    assert abs(keys.count(key_of(0)) - 50) <= 1 and len(set(keys)) == 100 - keys.count(key_of(0)) + 1
    assert data.epoch_positions >= 599


def test_weight_zero_leaves_a_source_out_and_a_negative_one_is_refused(tokenizer, tmp_path):
    write_shards(make_rows(3), tmp_path / "a")
    write_shards(make_rows(3, 100), tmp_path / "b")
    data = open_pairs(tokenizer, (tmp_path / "a", 1.0), (tmp_path / "b", 0.0))
    assert {data.fetch(position)["key"] for position in range(30)} == {key_of(n) for n in range(3)}
    assert data.epoch_positions == 3
    for weights, said in (((1.0, -0.5), r"sources\[1\].weight = -0.5"), ((0.0, 0.0), "every weight is 0"), ((float("nan"), 1.0), "weight = nan")):
        with pytest.raises(UserError, match=said):
            open_pairs(tokenizer, *zip((tmp_path / "a", tmp_path / "b"), weights, strict=True))
