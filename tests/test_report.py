"""The report is judged on run directories as the loop and the sweep write them, with real pictures in real parquet."""

import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from aimv2_vlm.evaluation.charts import Axis, axis
from aimv2_vlm.evaluation.findings import (
    LARGE_PRINT,
    SMALL_PRINT,
    Arm,
    Evaluation,
    PrintHeights,
    choose_samples,
    resolution_gain,
    uses_picture,
)
from aimv2_vlm.evaluation.report import write_report
from aimv2_vlm.page import text

HOSTILE = "</bdi><script>alert(1)</script><img src=x onerror=alert(2)> \u202eevil\x00 \ud800 & \"quotes\" 'too'"
ARMS = [("demo 1x1", "1x1", None), ("demo 2x2", "2x2", None), ("demo 2x2 upsampled", "2x2", 112)]
SECTIONS = ["headline", "losses", "results", "resolution", "print", "samples", "facts"]
OPTIONAL = {"resolution"}  # not shown where there is nothing to compare
NUM_PICTURES = 100
PICTURE, ENCODER = 224, 112  # pixels: pictures of the benchmarks, one view of the encoder


# -------------------------------------------------------------------------------------------- directories to report on


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(path: Path, pretraining: bool, steps: int = 300, seed: int = 0) -> Path:
    noise, rows = random.Random(seed), []
    for step in range(10, steps + 1, 10):
        row = {
            "step": step,
            "samples": 64 * step,
            "tokens": 900 * step,
            "lr": 1e-3 * (1 - step / steps),
            "grad_norm": 1.0,
        }
        row |= {"samples_per_s": 140.0 + noise.random(), "data_wait": 0.01, "bad_samples": 3}
        if pretraining:
            text_loss = 1.1 + 5 * math.exp(-step / 60) + 0.1 * noise.random()
            pixel_loss = 0.55 + 0.5 * math.exp(-step / 90) + 0.02 * noise.random()
            row |= {
                "loss": text_loss + 0.4 * pixel_loss,
                "text_loss": text_loss,
                "pixel_loss": pixel_loss,
                "mean_color_loss": 0.83,
            }
        else:
            row["loss"] = 0.4 + 6 * math.exp(-step / 40) + 0.05 * noise.random()
        rows.append(row)
        if pretraining and step % 50 == 0:
            rows.append(
                {
                    "step": step,
                    "val_loss": 2.0,
                    "val_pixel_loss": row["pixel_loss"] + 0.03,
                    "val_text_loss": text_loss + 0.2,
                    "val_mean_color_loss": 0.845,
                }
            )
    write_jsonl(path / "metrics.jsonl", rows)
    (path / "recipe.yaml").write_text("seed: 0\nprecision: auto\noptim:\n  lr: 0.001\n", encoding="utf-8")
    environment = {
        "versions": {"torch": "2.15.0", "transformers": "5.23.0"},
        "git_commit": "c0ffee",
        "seed": 0,
        "world": 1,
        "cores": 2,
        "processor": "a CPU",
    }
    (path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    (path / "data_report.json").write_text(
        json.dumps({"samples": 6000, "bad_samples_in_training": 3, "named": ["a"]}), encoding="utf-8"
    )
    (path / "checkpoints" / f"step_{steps:08d}").mkdir(parents=True)
    (path / "final").mkdir()
    (path / "final" / "model.safetensors").write_bytes(b"0" * 2_500_000)
    (path / "final" / "config.json").write_text(
        json.dumps({"vision_config": {"image_size": ENCODER}}), encoding="utf-8"
    )
    return path


def draw_picture(index: int, words: str, height: int, size: tuple[int, int] = (PICTURE, PICTURE)) -> bytes:
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    noise = random.Random(index)
    picture = Image.effect_noise(size[::-1], 40).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y, side = noise.randrange(0, size[1] - 60), noise.randrange(60, size[0] - 60), noise.randrange(24, 56)
        shape = noise.choice([draw.ellipse, draw.rectangle])
        shape((x, y, x + side, y + side), fill=tuple(noise.randrange(256) for _ in range(3)))
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", height / 0.729)
    draw.text((8, 8), words, font=font, fill=(255, 255, 240), stroke_width=1, stroke_fill=(0, 0, 0))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def write_benchmark(folder: Path, rows: list[dict]) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    (folder / "data").mkdir(parents=True)
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    columns = {name: arrow.array([row[name] for row in rows]) for name in rows[0] if name != "image"}
    columns["image"] = arrow.array([row["image"] for row in rows], type=image)
    parquet.write_table(arrow.table(columns), folder / "data" / "test-00000-of-00001.parquet")


def chance(arm: tuple, attribute: str, height: float, control: str | None) -> float:
    """How often the imagined assistant is right."""
    if control:
        return 0.15
    if attribute != "word":
        return 0.75
    grid, source = (1 if arm[1] == "1x1" else 2), arm[2] or PICTURE
    pixels = height * min(ENCODER * grid, source) / PICTURE
    return 0.95 / (1 + math.exp(-(pixels - 7) * 0.9))


def make_evaluation(root: Path, models: Path, num_pictures: int, hostile: str = "") -> Path:
    out, questions = root / "eval", {"scenes_exact": [], "scenes_print": []}
    noise = random.Random(1)
    for i in range(num_pictures):
        height = noise.choice([8, 9, 10, 11, 13, 16, 20, 24, 28, 32, 36])
        size = (PICTURE, PICTURE) if i % 5 else (160, PICTURE)
        word = noise.choice(["apple", "bird", "clock", "piano"])
        picture = {"bytes": draw_picture(i, word, height, size), "path": None}
        common = {"picture_id": f"p{i}", "image": picture, "options": [""], "answer_letter": ""}
        questions["scenes_print"].append(
            {
                "id": f"word{i}",
                "question": "Which word is printed?",
                "question_form": "word",
                "answers": [word],
                "attribute": "word",
                "print_height": float(height),
                **common,
            }
        )
        for attribute in ("digit", "color"):
            questions["scenes_exact"].append(
                {
                    "id": f"{attribute}{i}",
                    "question": f"Which {attribute}?",
                    "question_form": attribute,
                    "answers": ["7"],
                    "attribute": attribute,
                    "print_height": float("nan"),
                    **common,
                }
            )
    ledger = []
    for benchmark, rows in questions.items():
        write_benchmark(root / "data" / benchmark, rows)
        for arm in ARMS:
            for control in (None, "blind", "wrong_picture"):
                samples = []
                for doc, row in enumerate(rows):
                    right = noise.random() < chance(arm, row["attribute"], row["print_height"], control)
                    samples.append(
                        {
                            key: row[key]
                            for key in (
                                "id",
                                "picture_id",
                                "question",
                                "answers",
                                "attribute",
                                "print_height",
                                "question_form",
                            )
                        }
                        | {
                            "doc_id": doc,
                            "question": row["question"] + hostile,
                            "prediction": row["answers"][0] if right else f"no{hostile}",
                            "score": float(right),
                            "error": None,
                        }
                    )
                name = f"samples/{benchmark}-{arm[0]}-{control}.jsonl".replace(" ", "_")
                write_jsonl(out / name, samples)
                score = 100 * sum(s["score"] for s in samples) / len(samples)
                row = {
                    "model": arm[0] + hostile,
                    "model_path": str(models / "final"),
                    "tiling": arm[1],
                    "source_size": arm[2],
                    "tokens_per_picture": 64 if arm[1] == "1x1" else 328,
                    "benchmark": benchmark,
                    "split": "test",
                    "control": control,
                    "metric": "exact_match",
                    "score": score,
                    "interval": [max(0, score - 5), min(100, score + 5)],
                    "num_questions": len(samples),
                    "num_pictures": num_pictures,
                    "num_errors": 0,
                    "prompt": f"Answer the question using a single word or phrase.{hostile}",
                    "majority_score": 21.5,
                    "data": str(root / "data" / benchmark),
                    "data_hash": "d" * 64,
                    "versions": {"lmms_eval": "0.7.3"},
                    "seconds": 12.5,
                    "samples": name,
                }
                ledger.append(row)
    write_jsonl(out / "ledger.jsonl", ledger)
    return out


def make_everything(root: Path, hostile: str = "", **sizes) -> dict:
    runs = {"pre-training": make_run(root / "pretrain", True), "tuning 2x2": make_run(root / "sft", False, seed=1)}
    return {
        "runs": runs,
        "eval_dir": make_evaluation(root, root / "sft", hostile=hostile, **sizes),
        "title": f"The demo{hostile}",
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    return make_everything(tmp_path_factory.mktemp("report"), num_pictures=NUM_PICTURES)


@pytest.fixture(scope="module")
def page(made, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(out, **made, extra={"command": "aimv2-vlm demo"}).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Everything the tests ask of a page: tags, attributes, ids, table rows, visible text by section."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.stack: list[str] = []
        self.section, self.words = "", {}
        self.rows: list[list[str]] = []
        self.feed(source)
        assert self.stack == [], f"left open: {self.stack}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "section":
            self.section = attributes["id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "path", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.words[self.section] = self.words.get(self.section, "") + data
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data


def number_of(cell: str) -> float:
    return float(cell.replace("\u2212", "-").replace(",", ""))


# ------------------------------------------------------------------------------------------------------------ the page


def assert_self_contained(source: str) -> None:
    parsed = Page(source)
    for tag, attributes in parsed.tags:
        assert tag not in (
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "use",
            "image",
            "foreignobject",
        ), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert value.startswith(("#", "data:image/jpeg;base64,")), (tag, name, value[:60])
    style = "".join(re.findall(r"<style>(.*?)</style>", source, flags=re.DOTALL))
    assert style and not re.search(r"@import|url\(|expression|http", style)
    assert "default-src 'none'" in source


def test_page_opens_without_a_network(page):
    assert_self_contained(page)


def test_every_section_stands_in_order_and_explains_itself(page):
    parsed = Page(page)
    assert [a["id"] for t, a in parsed.tags if t == "section"] == SECTIONS
    assert sum(tag == "p" and a.get("class") == "how" for tag, a in parsed.tags) == len(SECTIONS)
    targets = {a["href"][1:] for tag, a in parsed.tags if tag == "a"}
    assert targets <= set(SECTIONS)


def test_pictures_and_charts_have_words_for_who_cannot_see_them(page):
    parsed = Page(page)
    pictures = [a for tag, a in parsed.tags if tag == "img"]
    charts = [a for tag, a in parsed.tags if tag == "svg" and a.get("role") == "img"]
    assert len(pictures) >= 9 and all(len(a["alt"]) > 10 for a in pictures)
    assert len(charts) == 7 and all(len(a["aria-label"]) > 30 for a in charts)
    assert all(a.get("aria-hidden") == "true" or a.get("role") == "img" for tag, a in parsed.tags if tag == "svg")


def test_table_says_what_the_ledger_says(made, page):
    ledger = [json.loads(line) for line in (made["eval_dir"] / "ledger.jsonl").read_text().splitlines()]
    cells = {(row["benchmark"], row["model"], row["control"]): row for row in ledger}
    benchmark, seen = "", set()
    for row in Page(page).rows:
        if len(row) == 1:
            benchmark = row[0].split()[0]
        elif len(row) == 9 and row[0] != "model":
            name, _, score, interval, blind, wrong, majority, used, tokens = row
            real = cells[benchmark, name, None]
            seen.add((benchmark, name))
            assert score == f"{real['score']:.1f}"
            assert interval == f"{real['interval'][0]:.1f} to {real['interval'][1]:.1f}"
            assert blind == f"{cells[benchmark, name, 'blind']['score']:.1f}"
            assert wrong == f"{cells[benchmark, name, 'wrong_picture']['score']:.1f}"
            assert majority == f"{real['majority_score']:.1f}"
            controls = [cells[benchmark, name, c]["score"] for c in ("blind", "wrong_picture")] + [
                real["majority_score"]
            ]
            assert number_of(used) == pytest.approx(real["score"] - max(controls), abs=0.051)
            assert tokens == str(real["tokens_per_picture"])
    assert seen == {(b, m) for b, m, c in cells if c is None}


def test_headline_is_the_mean_over_benchmarks_and_lies_in_its_interval(made, page):
    evaluation = Evaluation(made["eval_dir"])
    arm = Arm("demo 2x2", "2x2")
    by_hand = []
    for benchmark in evaluation.benchmarks:
        score = {c: evaluation.cells[arm, benchmark, c]["score"] for c in (None, "blind", "wrong_picture")}
        by_hand.append(score[None] - max(score["blind"], score["wrong_picture"], 21.5))
    gain = uses_picture(evaluation, arm)
    assert gain.value == pytest.approx(sum(by_hand) / 2)
    assert gain.interval[0] < gain.value < gain.interval[1]
    assert gain.interval[0] > 0 and gain.num_questions == 3 * NUM_PICTURES
    best = max(uses_picture(evaluation, a).value for a in evaluation.arms if a.source_size is None)
    assert f"+{best:.1f} points" in Page(page).words["headline"]


def test_resolution_gain_is_large_on_small_print_and_none_on_large(made):
    evaluation = Evaluation(made["eval_dir"])
    real, upsampled = Arm("demo 2x2", "2x2"), Arm("demo 2x2 upsampled", "2x2", 112)
    sides = {(b, f"p{i}"): PICTURE for b in evaluation.benchmarks for i in range(NUM_PICTURES)}
    heights = PrintHeights(evaluation, sides)
    small = resolution_gain(heights, real, upsampled, 0, SMALL_PRINT)
    large = resolution_gain(heights, real, upsampled, LARGE_PRINT, math.inf)
    samples = {s["id"]: s["points"] for s in evaluation.samples(real, "scenes_print") if s["print_height"] < 2 * SMALL_PRINT}
    others = {s["id"]: s["points"] for s in evaluation.samples(upsampled, "scenes_print")}
    assert small.value == pytest.approx(sum(samples[i] - others[i] for i in samples) / len(samples))
    assert small.num_questions == len(samples)
    assert small.interval[0] > 20 and abs(large.value) < 10


def test_print_heights_of_the_arms_in_encoder_pixels(made):
    evaluation = Evaluation(made["eval_dir"])
    heights = PrintHeights(evaluation, {("scenes_print", "p0"): PICTURE})
    sample = {"picture_id": "p0", "print_height": 10.0}
    seen = {arm.model: heights.encoder(arm, "scenes_print", sample) for arm in evaluation.arms}
    assert seen == {"demo 1x1": 5.0, "demo 2x2": 10.0, "demo 2x2 upsampled": 5.0}


def test_shown_questions_do_not_depend_on_the_outcome(made, tmp_path):
    """Turning every score of one model around changes nothing in the group that is drawn blindly."""
    before, differing = choose_samples(Evaluation(made["eval_dir"]))
    turned = tmp_path / "eval"
    rows = [json.loads(line) for line in (made["eval_dir"] / "ledger.jsonl").read_text().splitlines()]
    write_jsonl(turned / "ledger.jsonl", rows)
    for row in rows:
        samples = [json.loads(line) for line in (made["eval_dir"] / row["samples"]).read_text().splitlines()]
        flip = row["model"] == "demo 1x1"
        write_jsonl(turned / row["samples"], [s | {"score": 1 - s["score"] if flip else s["score"]} for s in samples])
    after, differing_after = choose_samples(Evaluation(turned))
    assert before == after and len(before) == 9
    assert differing and differing != differing_after
    pictures = [key[1].lstrip("abcdefghijklmnopqrstuvwxyz") for key in before + differing]
    assert len(set(pictures)) == len(pictures)


def test_right_and_wrong_are_said_in_words_and_tiles_are_drawn(page):
    parsed = Page(page)
    looks = re.findall(r'<li class="(right|wrong)">.*?<em>(\w+)', page)
    assert set(looks) == {("right", "right"), ("wrong", "wrong")}
    tiles = [a["d"] for tag, a in parsed.tags if a.get("class") == "tile"]
    assert tiles and set(tiles) == {"M112.0,0V224M0,112.0H224"}
    assert any(a.get("class") == "pad" for _, a in parsed.tags)  # some pictures are wider than high


def test_a_question_without_an_answer_is_no_score_and_is_shown_as_such(tmp_path):
    made = make_everything(tmp_path, num_pictures=6)
    rows = [json.loads(line) for line in (made["eval_dir"] / "ledger.jsonl").read_text().splitlines()]
    for row in rows:
        samples = [json.loads(line) for line in (made["eval_dir"] / row["samples"]).read_text().splitlines()]
        lost = samples[0] | {"score": None, "prediction": None, "error": "the picture is cut off"}
        write_jsonl(made["eval_dir"] / row["samples"], [lost, *samples[1:]])
        row |= {"score": 100 * sum(s["score"] for s in samples[1:]) / (len(samples) - 1), "num_errors": 1}
    write_jsonl(made["eval_dir"] / "ledger.jsonl", rows)
    evaluation = Evaluation(made["eval_dir"])
    assert [len(evaluation.samples(evaluation.arms[0], b)) for b in evaluation.benchmarks] == [11, 5]
    words = Page(write_report(tmp_path / "report.html", **made).read_text(encoding="utf-8")).words
    assert "gaps" not in words and "3 errors" in words["results"]
    assert words["samples"].count("no answer: the picture is cut off") % 3 == 0


def test_hostile_strings_stay_text(tmp_path):
    made = make_everything(tmp_path, hostile=HOSTILE, num_pictures=40)
    (made["runs"]["pre-training"] / "recipe.yaml").write_text(
        f"seed: 0  # {HOSTILE}".encode("utf-8", "replace").decode(), encoding="utf-8"
    )
    source = write_report(tmp_path / "report.html", **made, extra={HOSTILE: HOSTILE}).read_text(encoding="utf-8")
    assert_self_contained(source)
    parsed = Page(source)
    assert "<script>alert(1)</script>" in parsed.words["results"]  # as words, not as a tag
    assert not any("onerror" in a for _, a in parsed.tags)
    assert "\x00" not in source and len([a for tag, a in parsed.tags if a.get("class") == "chart"]) == 7


def test_escaping_covers_what_html_could_read():
    assert text("<a href='x'>&\"\x00\ud800") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;\ufffd?"


# ------------------------------------------------------------------------------------------------------ missing pieces


def test_nothing_at_all_is_said_and_not_guessed(tmp_path):
    source = write_report(tmp_path / "a" / "report.html", runs={}, eval_dir=None, title="empty").read_text(
        encoding="utf-8"
    )
    assert_self_contained(source)
    parsed = Page(source)
    assert [a["id"] for t, a in parsed.tags if t == "section"] == ["headline", "gaps", *(s for s in SECTIONS[1:] if s not in OPTIONAL)]
    for name in set(SECTIONS) - OPTIONAL:
        assert "Not shown: " in parsed.words[name], name


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: (m["runs"]["tuning 2x2"] / "metrics.jsonl").unlink(), "no metrics.jsonl"),
        (lambda m: (m["runs"]["tuning 2x2"] / "recipe.yaml").unlink(), "no recipe.yaml"),
        (lambda m: (m["runs"]["tuning 2x2"] / "final" / "config.json").unlink(), "heights in encoder pixels"),
        (lambda m: cut_last_line(m["runs"]["pre-training"] / "metrics.jsonl"), "1 unreadable line in metrics.jsonl"),
        (lambda m: cut_last_line(m["eval_dir"] / "ledger.jsonl"), "1 unreadable line in ledger.jsonl"),
        (lambda m: (m["eval_dir"] / "ledger.jsonl").unlink(), "no ledger.jsonl"),
        (lambda m: next((m["eval_dir"] / "samples").glob("scenes_print-demo_2x2-None*")).unlink(), "no samples file"),
        (
            lambda m: next((m["eval_dir"] / "samples").glob("scenes_print-demo_2x2-None*")).write_text(
                '{"id": "a", "score": 1}\n'
            ),
            "average to",
        ),
        (
            lambda m: write_jsonl(
                m["eval_dir"] / "failed.jsonl",
                [{"model": "other", "benchmark": "scenes_exact", "control": "blind", "reason": "no memory"}],
            ),
            "other, scenes_exact, blind failed: no memory",
        ),
        (
            lambda m: next((m["eval_dir"].parent / "data" / "scenes_print" / "data").iterdir()).unlink(),
            "pictures could not be read",
        ),
    ],
)
def test_a_missing_piece_is_named_and_the_rest_is_shown(tmp_path, damage, said):
    made = make_everything(tmp_path, num_pictures=24)
    damage(made)
    source = write_report(tmp_path / "report.html", **made).read_text(encoding="utf-8")
    assert_self_contained(source)
    words = Page(source).words
    assert said in "".join(words.values())
    assert set(words) - {"", "gaps"} - OPTIONAL == set(SECTIONS) - OPTIONAL


def cut_last_line(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"{") + 20])


def test_report_is_replaced_whole_or_not_at_all(made, tmp_path):
    out = tmp_path / "report.html"
    first = write_report(out, **made).read_bytes()
    assert write_report(out, **made).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_a_paper_row_stands_beside_ours_and_the_scores_are_in_markdown_too(tmp_path):
    made = make_everything(tmp_path, num_pictures=24)
    ledger = made["eval_dir"] / "ledger.jsonl"
    row = json.loads(ledger.read_text(encoding="utf-8").splitlines()[0]) | {"model": "AIMv2 L (of <b>ours</b>)", "benchmark": "aimv2_gqa_val", "control": None}
    ledger.write_text(ledger.read_text(encoding="utf-8") + json.dumps(row | {"score": 70.0, "interval": [69.0, 71.0], "samples": "none.jsonl", "limit": None, "split": "val"}) + "\n", encoding="utf-8")
    source = write_report(tmp_path / "report.html", **made).read_text(encoding="utf-8")
    assert_self_contained(source)
    words = Page(source).words["paper"]
    assert "Table 7" in words and "70.0 (69.0 to 71.0), -2.5" in words and "72.5" in words
    told = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "70.0 (69.0 to 71.0), -2.5" in told and "<b>" not in told


# ---------------------------------------------------------------------------------------------------------------- axes


@pytest.mark.parametrize(
    ("low", "high"), [(0.4, 6.0), (0.58, 1.02), (3.9, 33.0), (1e-5, 1e-3), (1.1, 1.3), (8, 36), (100, 1e6)]
)
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_few_round_and_inside(low, high, log):
    drawn = axis("", [low, high], log=log)
    ticks = drawn.ticks()
    assert 3 <= len(ticks) <= 12 and ticks == sorted(set(ticks))
    assert all(drawn.low <= tick <= drawn.high for tick in ticks)
    assert all(float(f"{tick:.3g}") == pytest.approx(tick) for tick in ticks)


def test_axes_place_their_ends_at_0_and_1():
    for log in (False, True):
        drawn = Axis("", 2.0, 32.0, log)
        assert drawn.place(2.0) == 0 and drawn.place(32.0) == pytest.approx(1)
    assert Axis("", 2.0, 32.0, True).place(8.0) == pytest.approx(0.5)
    assert axis("", [1.0, 3.9]).log is False and axis("", [1.0, 4.1]).log is True and axis("", [-1.0, 9.0]).log is False
