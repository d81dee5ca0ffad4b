"""Laws of the embedded data."""

import io
import json
import math
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aimv2_vlm.config import UserError
from aimv2_vlm.data import scenes as S

SCENES = st.builds(
    S.make_scene, st.sampled_from(sorted(S.SPLIT_DIGITS)), st.integers(0, 10**8), st.sampled_from(("scene", "detail"))
)


def many(split="dev", count=400, kind="scene"):
    return [S.make_scene(split, i, kind) for i in range(count)]


# --------------------------------------------------------------------------------------- the generator


def test_test_generator_is_frozen():
    assert S.test_generator_hash() == S.TEST_GENERATOR_HASH


@pytest.mark.parametrize("name", ["PRINT_HEIGHTS", "QUESTION_FORMS", "WORDS", "SUFFIXES", "FONTS"])
def test_the_hash_notices_a_change(monkeypatch, name):
    old = getattr(S, name)
    new = {k: v + "!" for k, v in old.items()} if isinstance(old, dict) else type(old)(reversed(old))
    monkeypatch.setattr(S, name, new)
    changed = S.test_generator_hash(2)
    monkeypatch.undo()
    assert S.test_generator_hash(2) != changed


def test_digits_are_those_of_scikit_learn_and_fonts_those_of_matplotlib():
    import matplotlib
    from sklearn.datasets import load_digits

    data = load_digits()
    images, values = S._digits()
    assert np.array_equal(images, data.images.astype(np.uint8) * 15) and np.array_equal(values, data.target)
    for font in S.FONTS:
        assert S._package_file("matplotlib", f"mpl-data/fonts/ttf/{font}.ttf") == (
            Path(matplotlib.get_data_path()) / f"fonts/ttf/{font}.ttf"
        )


def test_missing_package_data_is_named():
    with pytest.raises(UserError, match="no-such-font.ttf.*matplotlib"):
        S._package_file("matplotlib", "mpl-data/fonts/ttf/no-such-font.ttf")


def test_no_digit_image_is_shared_by_splits():
    used = {
        split: {d.image for kind in ("scene", "detail") for s in many(split, 300, kind) for d in s.digits}
        for split in S.SPLIT_DIGITS
    }
    assert all(len(images) > 100 for images in used.values())
    assert not (used["train"] & used["dev"] or used["train"] & used["test"] or used["dev"] & used["test"])
    assert max(used["train"]) < 1400 <= min(used["dev"] | used["test"])


def test_no_scene_is_shared_by_splits_streams_or_seeds():
    looks = []
    for split in S.SPLIT_DIGITS:
        for first in (0, S.FIRST_CONVERSATION, S.FIRST_BENCHMARK):
            for seed in (0, 1):
                looks += [
                    (s.ground, s.objects) for s in (S.make_scene(split, first + i, "scene", seed) for i in range(60))
                ]
    assert len(set(looks)) == len(looks)


@settings(max_examples=60, deadline=None)
@given(SCENES)
def test_objects_stand_inside_and_apart_and_in_raster_order(scene):
    count = len(scene.objects)
    assert (
        (4 <= count <= 5 and scene.size == S.SCENE_SIZE)
        if scene.kind == "scene"
        else (1 <= count <= 4 and scene.size in S.DETAIL_SIZES)
    )
    covered = np.zeros((scene.size, scene.size), int)
    for item in scene.objects:
        box = item.box
        assert (
            box.top >= 0 and box.left >= 0 and box.top + box.height <= scene.size and box.left + box.width <= scene.size
        )
        covered[box.top : box.top + box.height, box.left : box.left + box.width] += 1
    assert covered.max() == 1
    thirds = [min(2, int((o.box.top + o.box.height / 2) * 3 / scene.size)) for o in scene.objects]
    assert thirds == sorted(thirds)


def test_scene_has_one_digit_one_word_one_number_and_print_heights_as_announced():
    heights = Counter()
    scenes = many("train", 1500)
    for scene in scenes:
        assert len(scene.digits) == len(scene.prints("word")) == len(scene.prints("number")) == 1
        for item in scene.prints("word") + scene.prints("number"):
            heights[next(name for name, _, (low, high) in S.PRINT_HEIGHTS if low <= item.cap_height <= high)] += 1
            assert item.plate != "none" or item.cap_height >= S.MIN_UNPLATED
    for name, share, _ in S.PRINT_HEIGHTS:  # a scene without room is drawn again, which costs large print some of its share
        assert share / 2 < heights[name] / (2 * len(scenes)) < share + 0.25


@pytest.mark.parametrize("attribute", S.HELD_OUT_CANDIDATES)
def test_held_out_values_are_balanced(attribute):
    answers = Counter(q.answers[0] for s in many("dev", 900) for q in S.questions(s) if q.attribute == attribute)
    assert max(answers.values()) < 1.25 * min(answers.values())


def test_unknown_split_or_kind_is_refused():
    with pytest.raises(UserError, match="validation.*train, dev, test"):
        S.make_scene("validation", 0)
    with pytest.raises(UserError, match="kind"):
        S.make_scene("dev", 0, "tile")


# ---------------------------------------------------------------------------------------------- pixels


@settings(max_examples=20, deadline=None)
@given(SCENES)
def test_a_scene_is_a_pure_function_of_its_key(scene):
    again = S.make_scene(scene.split, scene.index, scene.kind, scene.seed)
    assert again == scene
    pixels = S.render(scene)
    assert pixels.shape == (scene.size, scene.size, 3) and pixels.dtype == np.uint8
    assert S.encode_jpeg(pixels) == S.encode_jpeg(S.render(again))


def _print_rows(item):
    """First and last + 1 row and column in which the text (without plate) covers at least half of a pixel."""
    canvas = Image.new("RGB", (S.SCENE_SIZE, S.SCENE_SIZE), (128, 128, 128))
    S._draw_print(canvas, replace(item, plate="none", ink="light"), np.random.Generator(np.random.PCG64(0)))
    inked = np.asarray(canvas)[:, :, 0] > 128 + 45
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def test_recorded_print_heights_are_the_rendered_ones_and_text_stays_on_its_plate():
    seen = set()
    for scene in many("dev", 250):
        for item in scene.prints("word") + scene.prints("number"):
            top, bottom, left, right = _print_rows(item)
            assert item.box.top < top and bottom < item.box.top + item.box.height
            assert item.box.left < left and right < item.box.left + item.box.width
            top, bottom, *_ = _print_rows(replace(item, text="H"))
            assert abs(bottom - top - item.cap_height) <= 1
            seen.add((item.font, item.cap_height))
    assert {font for font, _ in seen} == set(S.FONTS) and {h for _, h in seen} == {h for _, _, (low, high) in S.PRINT_HEIGHTS for h in range(low, high + 1)}


@settings(max_examples=25, deadline=None)
@given(SCENES)
def test_background_is_never_flat(scene):
    ground = replace(scene, objects=())
    grey = S.render(ground).astype(float).mean(2)
    patches = (
        grey[: scene.size // 14 * 14, : scene.size // 14 * 14].reshape(scene.size // 14, 14, -1, 14).swapaxes(1, 2)
    )
    assert patches.std((2, 3)).min() > 3
    assert 4 < grey.std() < 45


def test_every_object_stands_out_from_its_background():
    for scene in many("dev", 40):
        without = S.render(replace(scene, objects=())).astype(int)
        pixels = S.render(scene).astype(int)
        for item in scene.objects:
            box = np.s_[item.box.top : item.box.top + item.box.height, item.box.left : item.box.left + item.box.width]
            changed = np.abs(pixels[box] - without[box]).max(2) > 40
            assert changed.mean() > 0.02


@pytest.mark.parametrize("fill", S.FILLS)
@pytest.mark.parametrize("name", S.SHAPES)
def test_fills_differ_in_ink(name, fill):
    shares = {
        f: np.asarray(S._shape_mask(S.Shape(S.Box(0, 0, 40, 40), name, "red", f, 0))).mean() / 255 for f in S.FILLS
    }
    assert shares["solid"] == max(shares.values()) and shares["solid"] > 0.2
    assert shares[fill] > 0.15


# ----------------------------------------------------------------------------------------------- words


def _oracle(scene: dict, text: str, options: list[str]) -> list[str]:
    """Answers to a question read off the description alone; more than one where the question is ambiguous."""
    objects = scene["objects"]
    shapes = [o for o in objects if "fill" in o]
    printed = {role: [o for o in objects if o.get("role") == role] for role in ("word", "number")}
    if match := re.fullmatch(r"What color is the (\w+)\?", text):
        return [s["color"] for s in shapes if s["name"] == match[1]]
    if match := re.fullmatch(r"(?:What shape|Which shape) is (\w+)\?", text):
        return [s["name"] for s in shapes if s["color"] == match[1]]
    if match := re.fullmatch(r"Is the (\w+) solid, outlined or striped\?", text):
        return [s["fill"] for s in shapes if s["name"] == match[1]]
    if match := re.fullmatch(r"On which side is the (\w+), left or right\?", text):
        middles = [s["box"]["left"] + s["box"]["width"] / 2 for s in shapes if s["name"] == match[1]]
        return ["left" if middle < scene["size"] / 2 else "right" for middle in middles if not 7 / 16 < middle / scene["size"] < 9 / 16]
    if match := re.fullmatch(r"Which (word|number) is printed\?", text):
        return [o["text"] for o in printed[match[1]]]
    return {
        "Which digit is handwritten?": [str(o["value"]) for o in objects if "image" in o],
        "Is the handwritten digit dark or light?": [o["ink"] for o in objects if "image" in o],
        "Is the label of the word dark or light?": [o["plate"] for o in printed["word"]],
        "Does the background show stripes, checks, dots or grain?": [scene["ground"]["texture"]],
    }[text]


@settings(max_examples=80, deadline=None)
@given(SCENES)
def test_every_question_has_exactly_one_answer_in_the_description(scene):
    asked = S.questions(scene)
    assert len({q.form for q in asked}) == len(asked)
    for question in asked:
        if question.attribute == "caption":
            assert question.answers == (S.sentence(scene), S.alt_text(scene))
            continue
        assert _oracle(asdict(scene), question.text, list(question.options)) == list(question.answers)
        if question.options:
            assert (
                len(set(question.options)) == 4
                and question.options["ABCD".index(question.letter)] == question.answers[0]
            )
        if question.attribute in ("word", "number"):
            (item,) = scene.prints(question.attribute)
            assert question.print_height == item.cap_height
        else:
            assert question.print_height is None


def test_both_shapes_are_options_of_a_choice():
    for scene in many("dev", 120):
        for question in S.questions(scene):
            if question.attribute == "choice":
                assert {s.name for s in scene.shapes} <= set(question.options)


def test_letters_are_balanced():
    letters = Counter(q.letter for s in many("dev", 3000) for q in S.questions(s) if q.attribute == "choice")
    assert set(letters) == set("ABCD") and max(letters.values()) < 1.2 * min(letters.values())


@settings(max_examples=80, deadline=None)
@given(SCENES)
def test_captions_name_everything_but_held_out_attributes(scene):
    forbidden = set(S.FILLS + S.TEXTURES + S.INKS + S.SIDES) | {
        "stripe", "check", "dot", "checked", "dotted", "plate", "label", "side", "top", "bottom", "middle", "above", "below"}
    for caption in (S.alt_text(scene), S.sentence(scene)):
        words = re.findall(r"\w+", caption.lower())
        assert not forbidden & set(words)
        for item in scene.objects:
            wanted = {
                "Digit": lambda o: [S.DIGIT_WORDS[o.value]],
                "Shape": lambda o: [o.color, o.name],
                "Print": lambda o: [o.text],
            }
            assert set(wanted[type(item).__name__](item)) <= set(words)
        assert len(words) < 60


def test_captions_do_not_depend_on_where_things_stand():
    for scene in many("dev", 200):
        mirrored = replace(scene, objects=scene.objects[::-1])
        assert (S.alt_text(scene), S.sentence(scene)) == (S.alt_text(mirrored), S.sentence(mirrored))


def test_alt_text_lists_shapes_digit_word_number():
    scene = S.make_scene("dev", 0)
    named = {
        "Digit": lambda o: f"handwritten {S.DIGIT_WORDS[o.value]}",
        "Shape": lambda o: f"{o.color} {o.name}",
        "Print": lambda o: f"{o.role} {o.text}",
    }
    ordered = [*sorted(scene.shapes, key=lambda s: s.name), *scene.digits, *scene.prints("word"), *scene.prints("number")]
    assert S.alt_text(scene) == ", ".join(named[type(o).__name__](o) for o in ordered)


def test_prompts_are_the_papers():
    scene = S.make_scene("dev", 3)
    for question in S.questions(scene):
        lines = S.prompt(question).split("\n")
        assert lines[0] == question.text
        if question.attribute == "caption":
            assert lines == ["Provide a one-sentence caption for the provided image."]
        elif question.options:
            assert lines[-1] == "Answer with the option's letter from the given choices directly."
            assert lines[1:-1] == [
                f"{letter}. {option}" for letter, option in zip("ABCD", question.options, strict=True)
            ]
            assert S.reply(question) == question.letter
        else:
            assert lines[1:] == ["Answer the question using a single word or phrase."]


# --------------------------------------------------------------------------------------------- writers


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    S.write_conversations(root / "conversations", "train", 30, workers=1)
    S.write_benchmarks(root / "benchmarks", "dev", 12, workers=1)
    return root


def _contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_conversations_are_valid_llava(written):
    rows = json.loads((written / "conversations" / "conversations.json").read_text())
    assert len(rows) == 60 == len({row["id"] for row in rows})
    attributes = Counter()
    for i, row in enumerate(rows):
        assert set(row) == {"id", "image", "conversations"}
        with Image.open(written / "conversations" / "images" / row["image"]) as picture:
            assert picture.format == "JPEG" and picture.size == (S.SCENE_SIZE, S.SCENE_SIZE)
        turns = row["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n") and sum(t["value"].count("<image>") for t in turns) == 1
        assert all(t["value"].strip() for t in turns)
        scene = S.make_scene("train", S.FIRST_CONVERSATION + i // 2)
        if i % 2 == 0:
            said = turns[1]["value"]
            for digit in scene.digits:
                said = said.replace(f"handwritten {digit.value}", f"handwritten {S.DIGIT_WORDS[digit.value]}")
            assert turns[0]["value"] == f"<image>\n{S.CAPTION_PROMPT}" and said == S.alt_text(scene)
            continue
        assert 4 <= len(turns) // 2 <= 7
        said, asked, suffix = [t["value"].removeprefix("<image>\n") for t in turns[::2]], [], None
        for text in said:  # every prompt is a known question's, with its suffix unless the turn before had the same
            question = next(q for q in S.questions(scene) if text in (S.prompt(q), S.prompt(q._replace(suffix="caption"))))
            assert (text == S.prompt(question)) == (question.suffix != suffix)
            suffix = question.suffix
            asked.append(question)
        assert [S.reply(q) for q in asked] == [t["value"] for t in turns[1::2]] and len(set(asked)) == len(asked)
        assert {q.attribute for q in asked} & {"word", "number"} and {q.attribute for q in asked} & set(
            S.HELD_OUT_CANDIDATES
        )
        attributes.update(q.attribute for q in asked)
    assert set(attributes) | {"caption"} == {a for group in S.BENCHMARKS.values() for a in group}


def test_only_some_pictures_are_asked_about(tmp_path):
    path = S.write_conversations(tmp_path / "conversations", "train", 7, workers=1, questioned=3)
    ids = [row["id"] for row in json.loads(path.read_text())]
    assert len(ids) == 7 + 3 and [i.rsplit("-", 1)[1] for i in ids[:3]] == ["description", "questions", "description"]


def test_rows_of_one_attribute_ask_nothing_else_about_the_tuning_pictures():
    found = [S.make_scene("train", S.FIRST_CONVERSATION + i) for i in range(40)]
    rows = [S.lone_questions(scene, S.HELD_OUT) for scene in found]
    assert rows.count(None) < 10 and all(row is None for row, scene in zip(rows, found, strict=True) if not any(q.attribute == S.HELD_OUT for q in S.questions(scene)))
    for row, scene in zip(rows, found, strict=True):
        if row:
            expected = [(q.text, q.answers[0]) for q in S.questions(scene) if q.attribute == S.HELD_OUT]
            turns = [turn["value"] for turn in row["conversations"]]
            assert [text.removeprefix("<image>\n").split("\n")[0] for text in turns[::2]] == [text for text, _ in expected]
            assert turns[1::2] == [answer for _, answer in expected] and row["image"] == f"{scene.index:09d}.jpg"


def test_held_out_argument_limits_the_candidates():
    for scene in many("train", 60):
        texts = " ".join(turn["value"] for turn in S.conversation(scene, ("fill",), (7, 7))["conversations"][::2])
        assert "background" not in texts and "label" not in texts and "digit dark" not in texts


def test_benchmark_columns_and_types(written):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for benchmark, attributes in S.BENCHMARKS.items():
        table = pq.read_table(written / "benchmarks" / benchmark / "data" / "test-00000-of-00001.parquet")
        assert [(f.name, f.type) for f in table.schema] == [
            ("id", pa.string()),
            ("picture_id", pa.string()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("question", pa.string()),
            ("question_form", pa.string()),
            ("answers", pa.list_(pa.field("element", pa.string()))),
            ("options", pa.list_(pa.field("element", pa.string()))),
            ("answer_letter", pa.string()),
            ("attribute", pa.string()),
            ("print_height", pa.float64()),
        ]
        rows = table.to_pylist()
        assert len({row["id"] for row in rows}) == len(rows) and {row["attribute"] for row in rows} == set(attributes)
        pictures = {row["picture_id"] for row in rows}  # two shapes of one colour leave nothing to choose
        assert len(pictures) == 12 if benchmark != "scenes_choice" else 8 <= len(pictures) <= 12
        for row in rows:
            assert math.isnan(row["print_height"]) == (benchmark != "scenes_print")
            assert bool(row["answer_letter"]) == bool(row["options"]) == (benchmark == "scenes_choice")
            assert row["answers"] and all(row["answers"]) and "Answer" not in row["question"]


def test_benchmarks_open_with_datasets(written, tmp_path):
    from datasets import load_dataset

    data = load_dataset(str(written / "benchmarks" / "scenes_print"), split="test", cache_dir=str(tmp_path))
    scene = S.make_scene("dev", S.FIRST_BENCHMARK)
    assert data[0]["image"].size == (S.SCENE_SIZE, S.SCENE_SIZE) and data[0]["answers"] == [scene.prints("word")[0].text]
    error = np.asarray(data[0]["image"]).astype(int) - S.render(scene)
    assert np.abs(error).mean() < 6


def test_shards_can_be_read_back(tmp_path):
    tarfile = pytest.importorskip("tarfile")
    S.write_pretraining_shards(tmp_path / "shards", "dev", 25, samples_per_shard=10, workers=1, detail_share=0.4)
    names, kinds = [], Counter()
    for shard in sorted((tmp_path / "shards").glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}
        for name in (n for n in members if n.endswith(".jpg")):
            key = name.removesuffix(".jpg")
            size = Image.open(io.BytesIO(members[name])).size[0]
            kind = "scene" if size == S.SCENE_SIZE else "detail"
            scene = S.make_scene("dev", int(key), kind)
            fields = json.loads(members[f"{key}.json"])
            assert members[f"{key}.txt"].decode() == S.alt_text(scene) == fields["caption"]
            assert fields["synthetic"] == S.sentence(scene) and scene.size == size
            names.append(int(key))
            kinds[kind] += 1
    assert names == list(range(25)) and kinds == {"detail": 10, "scene": 15}


def test_number_of_processes_does_not_change_a_byte(tmp_path):
    kept = S._CHUNK
    try:
        S._CHUNK = 8
        S.write_benchmarks(tmp_path / "one", "dev", 20, workers=1)
        S.write_benchmarks(tmp_path / "two", "dev", 20, workers=2)
    finally:
        S._CHUNK = kept
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


def test_progress_reaches_the_end(tmp_path):
    seen = []
    S.write_conversations(
        tmp_path / "c", "dev", 130, workers=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen) and seen[-1] == (130, 130)


def test_a_finished_folder_is_left_as_it_is(written):
    folder = written / "conversations"
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    assert S.write_conversations(folder, "train", 30, workers=1) == folder / "conversations.json"
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before
    with pytest.raises(UserError, match="other parameters"):
        S.write_conversations(folder, "train", 31, workers=1)


def test_a_killed_write_starts_again_cleanly(tmp_path):
    def kill(done, total):
        if done >= 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        S.write_conversations(tmp_path / "killed", "dev", 140, workers=1, progress=kill)
    assert not (tmp_path / "killed").exists()
    (tmp_path / "killed.partial" / "images" / "left-over.jpg").write_bytes(b"half")
    S.write_conversations(tmp_path / "killed", "dev", 140, workers=1)
    S.write_conversations(tmp_path / "calm", "dev", 140, workers=1)
    assert _contents(tmp_path / "killed") == _contents(tmp_path / "calm")
    assert not (tmp_path / "killed.partial").exists()


def test_a_strangers_folder_is_not_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="not empty"):
        S.write_benchmarks(tmp_path / "mine", "dev", 2, workers=1)
    assert _contents(tmp_path / "mine") == {"thesis.txt": b"words"}
