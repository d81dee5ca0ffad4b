"""The page of `data check --page`: every token of a row is on it under what training does with it; text of rows stays text."""

import json
import re

import pytest
from conftest import run_cli
from hypothesis import HealthCheck, given, settings
from PIL import Image
from test_data_tools import Page
from test_interleaved import documents, obelics
from test_labels import KINDS, TEXTS, conversations, make, wild_text

from aimv2_vlm.data.chat import IGNORED, train_chat_tokenizer
from aimv2_vlm.data.collate import Row
from aimv2_vlm.data.interleaved import Document
from aimv2_vlm.data.label_page import spans_of
from aimv2_vlm.data.tiling import Tiling

HOSTILE = "</div></article><script>alert(1)</script><img src=https://example.org/x.png onerror=alert(2)> & <|eot_id|> \u202e\x07"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        train_chat_tokenizer(TEXTS, out / kind, 600, "plain" if kind.startswith("own") else kind)
    return out


@pytest.fixture(scope="module")
def formats(tokenizers):
    return {kind: make(tokenizers / kind, kind)[0] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(conversation=conversations(wild_text) | documents())
def test_spans_are_the_row(formats, kind, conversation):
    chat, counts = formats[kind], [3 + n for n in range(len(conversation.images))]
    is_document = isinstance(conversation, Document)
    assembled = (chat.assemble_document if is_document else chat.assemble)(conversation, counts)
    spans = spans_of(Row(assembled.ids, assembled.labels), chat, counts)
    assert sum(span.num_tokens for span in spans) == len(assembled.ids)
    assert [span.num_tokens for span in spans if span.kind == "image"] == counts
    learned = [span for span in spans if span.kind == "learned"]
    assert sum(span.num_tokens for span in learned) == sum(label != IGNORED for label in assembled.labels)
    if not is_document:
        end = chat.decode(chat.end_ids)
        assert [span.text for span in learned] == [turn.text.strip() + end for turn in conversation.turns[1::2]]


@pytest.fixture
def talk(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (90, 40), "navy").save(folder / "wide.png")
    Image.new("RGB", (30, 30), "teal").save(folder / "square.png")
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:60])

    def row(name, images, *turns):
        return {"id": name, "image": images, "conversations": [{"from": ("human", "gpt")[n % 2], "value": t} for n, t in enumerate(turns)]}

    rows = [
        row("hostile", "wide.png", f"What? {HOSTILE}", f"It is. {HOSTILE}", "And?", "12"),
        row("two", ["wide.png", "square.png"], "<image> or <image>?", "the second"),
        row("text", None, "Hello", "yes"),
        row("broken", "cut.png", "What?", "nothing"),
        row("silent", "wide.png", "What?", " "),
        row("absent", "far/away.png", "What?", "x"),
    ]
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    return tmp_path / "talk.json", folder


def check(path, folder, page, *more):
    done = run_cli("data", "check", path, "--images", folder, "--page", page, "--max-bad-fraction", 1, *more)
    return done, Page(page)


def test_the_page_shows_tokens_tiles_and_counts_and_runs_nothing(talk, tokenizers, tmp_path):
    path, folder = talk
    done, page = check(path, folder, tmp_path / "new" / "page.html", "--llm", tokenizers / "llama3", "--grid", "2x2")
    assert "page.html: 4 rows shown, 1 of them of weight 0" in done.stdout
    assert "missing: far: 1 picture missing, there is no such folder" in done.stdout and "far: 1 picture missing" in page.words
    assert {tag for tag, _ in page.tags} <= set("html head meta title style body header h1 h2 p main div article svg image rect span bdi ul li".split())
    assert page.words.count(HOSTILE.replace("\x07", "\ufffd").strip()) == 2
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert all(attributes["href"].startswith("data:image/jpeg;base64,") for attributes in page.all("image"))
    learned = re.findall(r'<span class="learned"><bdi>(.*?)</bdi>', (tmp_path / "new" / "page.html").read_text(), re.DOTALL)
    assert sorted(text.removesuffix("&lt;|eot_id|&gt;") for text in learned if "script" not in text) == ["12", "the second", "yes"]
    count = Tiling((2, 2)).num_image_tokens(40, 90)
    assert page.words.count(f"{count:,} image tokens") == 3 and f"square.png: 30 × 30, 2x2 tiles and an overview, {count:,} tokens" in page.words
    # One frame a view, in the picture's own pixels; tiles and overview cover each picture.
    assert len(page.all("svg")) == len(page.all("image")) == 3 and len(page.all("rect")) == 3 * 5
    boxes = [tuple(float(a[k]) for k in ("x", "y", "width", "height")) for a in page.all("rect") if a["class"] == "overview"]
    assert sorted(set(boxes)) == [(0, -25, 90, 90), (0, 0, 30, 30)]
    assert "of weight 0" in page.words and "cut.png" in page.words
    assert "row 4 (id silent): empty_answer" in page.words and "row 5 (id absent): missing_picture" in page.words


def test_tokenizer_template_and_tiles_come_from_the_recipe_or_are_said_to_be_made(talk, tokenizers, tmp_path):
    path, folder = talk
    _, page = check(path, folder, tmp_path / "page.html")
    assert "template llama3; tokenizer: one of" in page.words and "trained on these rows" in page.words and "336 px a view" in page.words
    assert page.words.count("576 image tokens") == 3 and len(page.all("rect")) == 3
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"llm: {{path: '{tokenizers / 'vicuna'}', template: vicuna}}\ntiling: {{grid: 3x3, pad_square: false}}\n"
                      "encoder: {path: '{data_root}/encoder', image_size: 56}\ndata: {max_length: 300}\n")
    _, page = check(path, folder, tmp_path / "page.html", "--recipe", recipe)
    assert "template vicuna" in page.words and "grid 3x3, 56 px a view" in page.words and "max_length 300" in page.words
    assert "too_long" in page.words and "ASSISTANT:" in page.words
    _, page = check(path, folder, tmp_path / "page.html", "--recipe", recipe, "--grid", "1x1", "--template", "llama3", "--llm", tokenizers / "llama3")
    assert "template llama3" in page.words and "grid 1x1" in page.words


def test_keys_of_the_page_are_not_passed_over_without_it(talk):
    path, folder = talk
    done = run_cli("data", "check", path, "--images", folder, "--grid", "2x2", "--template", "vicuna", check=False)
    assert done.returncode == 2 and "--template, --grid: say how --page is drawn" in done.stderr


def test_documents_are_learned_but_for_their_pictures(talk, tmp_path):
    _, folder = talk
    path = tmp_path / "documents.jsonl"
    path.write_text(json.dumps(obelics("Once.", "wide.png", "Twice.\n\nThrice.")) + "\n")
    _, page = check(path, folder, tmp_path / "page.html", "--format", "obelics")
    learned = re.findall(r'<span class="learned"><bdi>(.*?)</bdi>', (tmp_path / "page.html").read_text(), re.DOTALL)
    assert learned == ["Once.\n", "\nTwice.\n\nThrice.&lt;|end_of_text|&gt;"]
    assert "576 image tokens" in page.words
    run_cli("data", "preview", path, "--images", folder, "--format", "obelics", "--out", tmp_path / "preview.html")
    assert "Once.\n<image>\nTwice.\n\nThrice." in Page(tmp_path / "preview.html").words


@pytest.mark.parametrize(
    "words,message",
    [
        (["--num", 0], "--num 0"),
        (["--grid", "2by2"], "2by2"),
        (["--template", "llama2"], "llama2"),
        (["--llm", "no/such/folder"], "no tokenizer"),
        (["--recipe", "no_such_recipe"], "no_such_recipe"),
        (["--format", "rows"], "rows"),
    ],
)
def test_what_the_page_cannot_be_made_of_is_refused_in_one_line(talk, tmp_path, words, message):
    path, folder = talk
    refused = run_cli("data", "check", path, "--images", folder, "--page", tmp_path / "page.html", *words, check=False)
    assert refused.returncode == 2 and message in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "page.html").exists()
