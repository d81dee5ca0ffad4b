"""Documents with pictures in their text: every text token is learned, no image token is; cut between pieces, counted, left out
under the right reason; through the same batches and the same training as conversations."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import TINY_TUNING, run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_labels import KINDS, TEXTS, decode, make, wild_text

from aimv2_vlm.config import ConversationSource, UserError
from aimv2_vlm.data.chat import IGNORED, RowTooLong, train_chat_tokenizer
from aimv2_vlm.data.collate import InstructionDataset
from aimv2_vlm.data.conversations import REASONS, ConversationSet, Rejection, parse_document
from aimv2_vlm.data.interleaved import Document
from aimv2_vlm.data.tiling import Tiling, image_processor


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        train_chat_tokenizer(TEXTS, out / kind, 600, "plain" if kind.startswith("own") else kind)
    return {kind: make(out / kind, kind) for kind in KINDS}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in {"a": (20, 50), "b": (70, 31), "c": (40, 40)}.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def mmc4(texts, *matches, **more):
    return {"text_list": texts, "image_info": [{"image_name": n, "matched_text_index": i} for n, i in matches], **more}


def obelics(*pieces, **more):
    """Names ending in .png are pictures."""
    is_image = [piece is not None and piece.endswith(".png") for piece in pieces]
    return {
        "images": [piece if image else None for piece, image in zip(pieces, is_image, strict=True)],
        "texts": [None if image else piece for piece, image in zip(pieces, is_image, strict=True)],
        **more,
    }


def test_a_document_reads_as_the_page_did():
    row = obelics("One.", "a.png", " Two.\n\n \nThree. ", None, "b.png", "c.png", "Four.", url="https://example.org/page")
    assert parse_document(row, 3, "obelics") == Document(
        "https://example.org/page", ("a.png", "b.png", "c.png"), ("One.\n", None, "\nTwo.", "\n\nThree.\n", None, None, "\nFour.")
    )
    row = mmc4(["One.", "Two.", " ", "Three."], ("b.png", 1), ("a.png", 0), ("c.png", 1))
    assert parse_document(row, 3, "mmc4") == Document(
        "row 3", ("a.png", "b.png", "c.png"), (None, "\nOne.\n", None, None, "\nTwo.", " Three.")
    )


BAD = [
    ("not_an_object", "obelics", ["text"]),
    ("no_document", "obelics", {"texts": ["a"]}),
    ("no_document", "obelics", {"images": [], "texts": []}),
    ("no_document", "obelics", mmc4(["a"])),
    ("no_document", "mmc4", obelics("a")),
    ("no_document", "mmc4", {"text_list": ["a"], "image_info": None}),
    ("length_mismatch", "obelics", {"images": ["a.png"], "texts": [None, "a"]}),
    ("malformed_piece", "obelics", {"images": ["a.png"], "texts": ["a"]}),
    ("malformed_piece", "obelics", {"images": [None], "texts": [3]}),
    ("malformed_piece", "mmc4", mmc4(["a", None])),
    ("bad_match", "mmc4", mmc4(["a"], ("a.png", 1))),
    ("bad_match", "mmc4", mmc4(["a"], ("a.png", -1))),
    ("bad_match", "mmc4", mmc4(["a"], ("a.png", True))),
    ("bad_match", "mmc4", mmc4(["a"], (None, 0))),
    ("bad_match", "mmc4", {"text_list": ["a"], "image_info": ["a.png"]}),
    ("no_text", "obelics", obelics("a.png", None, " \n")),
    ("no_text", "mmc4", mmc4([" "], ("a.png", 0))),
    ("picture_is_url", "obelics", obelics("https://example.org/a.png", "a")),
    ("invalid_text", "mmc4", mmc4(["a \ud83d"])),
]


@pytest.mark.parametrize("reason,format,row", BAD)
def test_bad_documents_have_a_reason(reason, format, row):
    verdict = parse_document(row, 7, format)
    assert isinstance(verdict, Rejection) and verdict.reason == reason and verdict.row == 7


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.text(max_size=4) | st.sampled_from(["a.png", "ftp://x/y"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["images", "texts", "text_list", "image_info", "image_name", "matched_text_index"]), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(anything, st.sampled_from(["obelics", "mmc4"]))
def test_any_json_is_a_document_or_a_named_rejection(value, format):
    verdict = parse_document(value, 0, format)
    if isinstance(verdict, Rejection):
        assert verdict.reason in REASONS[1:]
    else:
        assert verdict.pieces.count(None) == len(verdict.images) and any(text.strip() for text in verdict.texts)


@st.composite
def documents(draw):
    """Of both formats, with hostile text."""
    texts = draw(st.lists(wild_text.filter(lambda t: t.strip() and not t.endswith(".png")), min_size=1, max_size=4))
    if draw(st.booleans()):
        pieces = [piece for text in texts for piece in (*["a.png"] * draw(st.integers(0, 2)), text)]
        return parse_document(obelics(*pieces), 0, "obelics")
    return parse_document(mmc4(texts, *[("a.png", draw(st.integers(0, len(texts) - 1))) for _ in range(draw(st.integers(0, 3)))]), 0, "mmc4")


def expected_text(chat, pieces, count):
    return "".join(chat.image_token * count if piece is None else piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(document=documents())
def test_all_text_is_learned_and_gives_no_special_token(formats, kind, document):
    chat, _ = formats[kind]
    row = chat.assemble_document(document, [3] * len(document.images))
    bos = [] if chat.tokenizer.bos_token_id is None else [chat.tokenizer.bos_token_id]
    assert row.ids[: len(bos)] == bos and row.ids[-1] == chat.document_end_id and row.num_cut == 0
    body = row.ids[len(bos) : -1]
    assert [i for i in body if i in chat.special_ids] == [chat.image_token_id] * 3 * len(document.images)
    # Text after text: a placeholder before keeps sentencepiece from dropping the first space.
    anchor = [chat.image_token_id]
    if document.pieces[0] is None:
        assert decode(chat, anchor + body) == chat.image_token + expected_text(chat, document.pieces, 3)
    else:
        assert decode(chat, body) == expected_text(chat, document.pieces, 3)
    assert row.labels[0] == IGNORED
    assert row.labels[1:] == [IGNORED if i == chat.image_token_id else i for i in row.ids[1:]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_without_pictures_begins_as_a_text_does_at_inference(formats, kind):
    """Behind BOS alone sentencepiece puts a space in front of the first word; behind a picture it does not."""
    chat, _ = formats[kind]
    text = "One two, three."
    row = chat.assemble_document(Document("", (), (text,)), [])
    bos = [] if chat.tokenizer.bos_token_id is None else [chat.tokenizer.bos_token_id]
    assert row.ids == [*bos, *chat.tokenizer(text, add_special_tokens=False)["input_ids"], chat.document_end_id]


@pytest.mark.parametrize("kind", KINDS)
def test_long_documents_are_cut_behind_a_text(formats, kind):
    chat, _ = formats[kind]
    document = parse_document(obelics("One two.", "a.png", "Three.\n\nFour.", "b.png", "c.png", "Five.", "a.png", "Six. Seven"), 0, "obelics")
    counts = [20, 30, 40, 20]
    whole = chat.assemble_document(document, counts)
    lengths = set()
    for limit in range(1, len(whole.ids) + 2):
        try:
            row = chat.assemble_document(document, counts, limit)
        except RowTooLong as error:
            assert not lengths and f"max_length is {limit}" in str(error)
            continue
        kept = document.pieces[: len(document.pieces) - row.num_cut]
        assert len(row.ids) <= limit and kept[-1] is not None and row.num_images == kept.count(None)
        assert row.ids.count(chat.image_token_id) == sum(counts[: row.num_images])
        assert (row.ids[-1] == chat.document_end_id) == (len(row.ids) == len(whole.ids))
        ids, uncut = row.ids, chat.assemble_document(Document("", document.images[: row.num_images], kept), counts[: row.num_images])
        assert ids == uncut.ids[: len(ids)] and len(row.labels) == len(ids)
        lengths.add(len(ids))
    assert len(lengths) == 6  # five texts, and the whole with its end


def test_counts_must_be_those_of_the_images(formats):
    with pytest.raises(ValueError, match="images"):
        formats["llama3"][0].assemble_document(Document("", ("a",), (None, "text")), [])


# --------------------------------------------------------------------------------------------------------------- files


def write_documents(folder, rows, group=2):
    """The same OBELICS-style rows as parquet and as lines."""
    table = pyarrow.table({"images": [r["images"] for r in rows], "metadata": ["x"] * len(rows), "texts": [r["texts"] for r in rows]})
    pyarrow.parquet.write_table(table, folder / "documents.parquet", row_group_size=group)
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "documents.parquet", folder / "documents.jsonl"


GOOD = [
    obelics("One.", "a.png", "Two."),
    obelics("a.png", "b.png", "Three.\n\nFour."),
    obelics("Only text."),
    obelics("c.png", "Five.", "a.png"),
    obelics("a.png", "word " * 200),
]


def source(path, images, **more):
    return ConversationSource(path=str(path), images=str(images), **more)


def test_parquet_and_lines_are_the_same_documents(tmp_path, pictures):
    rows = [*GOOD[:2], obelics("lost.png", "x"), obelics("../out.png", "x"), {"images": ["a.png"], "texts": ["x"]}, *GOOD[2:]]
    for path in write_documents(tmp_path, rows):
        for _ in range(2):  # then from the index
            documents = ConversationSet([source(path, pictures, format="obelics")])
            assert documents.report()["rejected"] == {"missing_picture": 1, "outside_image_folder": 1, "malformed_piece": 1}
            assert [documents[i].pieces for i in (4, 0, 3, 1)] == [parse_document(GOOD[i], 0, "obelics").pieces for i in (4, 0, 3, 1)]
            assert documents.picture_paths(1) == [str(pictures / "a.png"), str(pictures / "b.png")]
    assert len(ConversationSet([source(path, pictures, format="obelics", take="40%")])) == 2


def test_files_of_another_kind_are_refused_in_one_line(tmp_path, pictures):
    parquet, lines = write_documents(tmp_path, GOOD)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    pyarrow.parquet.write_table(pyarrow.table({"texts": ["a"]}), tmp_path / "other.parquet")
    for path, format, message in (
        (parquet, "conversations", "format: obelics"),
        (tmp_path / "broken.parquet", "obelics", "broken.parquet: cannot be read"),
        (tmp_path / "other.parquet", "obelics", "no column images"),
        (lines, "rows", "'rows' is none of conversations, obelics, mmc4"),
        (lines, "mmc4", "no usable conversation"),
    ):
        with pytest.raises(UserError, match=message) as error:
            ConversationSet([source(path, pictures, format=format)])
        assert "\n" not in str(error.value)


def test_documents_and_conversations_share_batches(formats, tmp_path, pictures):
    _, lines = write_documents(tmp_path, GOOD)
    (tmp_path / "talk.json").write_text(json.dumps([{"image": "a.png", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]))
    chat, _ = formats["llama3"]
    tiling = Tiling((2, 2), 28, 14)
    sources = [source(lines, pictures, format="obelics"), source(tmp_path / "talk.json", pictures)]
    data = InstructionDataset(ConversationSet(sources), chat, tiling, image_processor(tiling, [0.5] * 3, [0.5] * 3), max_length=100)
    rows = [data.fetch(index) for index in range(len(data))]
    assert [len(row.pictures) for row in rows] == [1, 2, 0, 2, 0, 1] and [row.bad is None for row in rows] == [True] * 4 + [False, True]
    assert "too_long" in rows[4].bad and [row.num_cut for row in rows] == [0] * 6
    per_image = tiling.num_image_tokens(9, 9)
    assert [row.input_ids.count(chat.image_token_id) for row in rows] == [per_image * len(row.pictures) for row in rows]
    assert [data.length(index) for index in range(6)] == [len(row.input_ids) for row in rows]
    [batch] = data.microbatches(range(6), 6)
    assert batch["input_ids"][0].tolist() == [token for row in rows for token in row.input_ids]
    assert batch["pixel_values"].shape == (6 * 5, 3, 28, 28) and len(batch["bad"]) == 1 and batch["num_truncated"] == 0
    shorter = InstructionDataset(data.conversations, chat, tiling, data.image_processor, max_length=max(len(rows[1].input_ids), per_image + 20) - 2)
    [batch] = shorter.microbatches([1], 1)
    assert batch["num_truncated"] == 1


def test_ids_are_assembled_once_a_step(formats, tmp_path, pictures, monkeypatch):
    """Sharing out rows needs their lengths; the ids are kept for the batch. A picture whose header lied costs a second time."""
    chat, _ = formats["llama3"]
    tiling = Tiling((2, 2), 28, 14, pad_square=False)
    turned = Image.new("RGB", (90, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(pictures / "turned.jpg", exif=exif)
    rows = [{"image": name, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]} for name in ("a.png", "b.png", "turned.jpg")]
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    data = InstructionDataset(ConversationSet([source(tmp_path / "talk.json", pictures)]), chat, tiling, image_processor(tiling, [0.5] * 3, [0.5] * 3))
    calls = []
    monkeypatch.setattr(chat, "assemble", lambda *args, real=chat.assemble: calls.append(args[1]) or real(*args))
    data.microbatches([0, 1], 2)
    assert len(calls) == 2
    [batch] = data.microbatches([2], 1)
    same = tiling.num_image_tokens(30, 90) == tiling.num_image_tokens(90, 30)
    assert len(calls) == (3 if same else 4)
    assert batch["input_ids"][0].tolist().count(chat.image_token_id) == tiling.num_image_tokens(90, 30)


def test_tuning_on_documents(scenes_root, tiny_encoder, tmp_path):
    """The shipped recipe on the embedded pictures, written as documents of both kinds."""
    images = scenes_root / "conversations" / "images"
    talk = json.loads((scenes_root / "conversations" / "conversations.json").read_text())
    texts = [(row["image"], row["conversations"][1]["value"]) for row in talk if row.get("image")][:12]
    rows = [obelics(name, text, other, text2) for (name, text), (other, text2) in zip(texts[::2], texts[1::2], strict=True)]
    rows = [row for row in rows if all(isinstance(name, str) for name in row["images"] if name)]
    write_documents(tmp_path, rows)
    lines = [mmc4([text, "And so on."], (name, 0)) for name, text in texts]
    (tmp_path / "mmc4.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_cli("sft", "interleaved", f"data_root={tmp_path}", f"encoder.path={tiny_encoder}", f"out={tmp_path / 'run'}", "optim.steps=2", *TINY_TUNING,
            "llm.path=null", "data.max_length=256", "tiling.grid=1x1",
            "data.sources=[{path: '{data_root}/documents.parquet', images: '" + str(images) + "', format: obelics}, "
            "{path: '{data_root}/mmc4.jsonl', images: '" + str(images) + "', format: mmc4, take: 'first:4'}]")
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["taken"] == len(rows) + 4 and not report["rejected"]
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["text_loss"]) for row in losses if "text_loss" in row)
