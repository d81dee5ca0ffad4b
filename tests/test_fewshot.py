"""In-context questions: shots come from train, show no test picture, and reach the model as earlier turns with their pictures."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from mirrors import picture, run_mirrors, write_mirrors
from PIL import Image

from aimv2_vlm.config import UserError
from aimv2_vlm.evaluation.benchmarks import find_benchmarks, read_benchmark, write_benchmark
from aimv2_vlm.evaluation.fewshot import choose_shots, earlier_turns, read_shots, with_shots, write_shots
from aimv2_vlm.evaluation.generation import Generator, Question, load_assistant, open_picture
from aimv2_vlm.evaluation.hub_sets import HUB_SETS

TABLE_8 = ("coco2017_val", "nocaps_val", "textcaps_val", "vqav2_val", "textvqa_val", "vizwiz_val", "gqa_val", "okvqa_val")


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory):
    return write_mirrors(tmp_path_factory.mktemp("mirrors"))


def opened(mirrors, name: str):
    (found,) = find_benchmarks(mirrors, [name])
    return read_benchmark(*found)


@pytest.mark.parametrize("name", TABLE_8)
def test_every_benchmark_of_table_8_has_shots_that_seed_and_name_decide(mirrors, name):
    benchmark = opened(mirrors, f"aimv2_{name}")
    shots = choose_shots(benchmark, 4, seed=1)
    assert shots == choose_shots(benchmark, 4, seed=1) and shots[:2] == choose_shots(benchmark, 2, seed=1)
    assert any(shots != choose_shots(benchmark, 4, seed=seed) for seed in (2, 3, 4))
    test_pictures = {data for _, data in benchmark.pictures()}
    assert len({shot.picture for shot in shots}) == 4 and not test_pictures & {shot.picture for shot in shots}
    for shot in shots:
        assert shot.answer and open_picture(shot.picture).size == (40, 30)
        assert open_picture_number(shot.picture) in NUMBERS, "a training picture"


def open_picture_number(data: bytes) -> int:
    """Which of the embedded pictures this is."""
    return next(number for number in NUMBERS if NUMBERS[number] == data)


NUMBERS = {
    first + i: picture(first + i)["bytes"] for first in (100, 250, 350, 460, 1150, 1250, 1350, 1450) for i in range(12)
}


def test_a_shot_belongs_to_its_own_picture(mirrors):
    """GQA keeps pictures in files of their own and in another order."""
    for shot in choose_shots(opened(mirrors, "aimv2_gqa_val"), 4, seed=0):
        assert open_picture_number(shot.picture) == 460 + int(shot.id[3:]) // 2 and shot.answer == ["cat", "dog"][int(shot.id[3:]) % 2]


def test_no_shot_shows_a_test_picture_not_even_recompressed(tmp_path):
    def row(number: int, data: bytes) -> dict:
        return {"id": str(number), "picture_id": str(number), "image": {"bytes": data, "path": f"{number}.jpg"}, "question": "what ?",
                "question_form": "f", "answers": [f"word{number}"]}  # fmt: skip

    originals = [picture(i, (120, 160))["bytes"] for i in range(4)]
    smaller = io.BytesIO()
    Image.open(io.BytesIO(originals[1])).resize((100, 75)).save(smaller, "JPEG", quality=60)
    assert smaller.getvalue() not in originals
    write_benchmark(tmp_path / "own", [row(i, data) for i, data in enumerate(originals)], {"metric": "exact_match"})
    train = [originals[0], smaller.getvalue(), originals[2][:300], picture(50)["bytes"], picture(50)["bytes"], picture(51)["bytes"]]
    card = (tmp_path / "own" / "benchmark.json").read_text()
    write_benchmark(tmp_path / "own", [row(100 + i, data) for i, data in enumerate(train)], {"metric": "exact_match", "split": "train"})
    (tmp_path / "own" / "benchmark.json").write_text(card)
    benchmark = opened(tmp_path, "own")
    for seed in range(6):
        shots = choose_shots(benchmark, 2, seed)
        assert {shot.id for shot in shots} in ({"103", "105"}, {"104", "105"})
    with pytest.raises(UserError, match="only 2 of 3 questions have an answer and a picture of their own"):
        choose_shots(benchmark, 3, 0)
    path = tmp_path / "own_seed0.json"  # a published list is checked against other test data than it was made for
    write_shots(path, benchmark, 0, choose_shots(benchmark, 2, 0))
    write_benchmark(tmp_path / "own", [row(0, train[5]), row(1, originals[0])], {"metric": "exact_match"})
    with pytest.raises(UserError, match="shot 105 shows a picture that own asks about"):
        read_shots(path, opened(tmp_path, "own"))


def test_a_published_list_asks_the_same_again_and_fewer_shots_are_its_first(mirrors, tmp_path):
    benchmark = opened(mirrors, "aimv2_okvqa_val")
    four = with_shots(benchmark, 4, 7, 6, tmp_path, published=False)
    listed = json.loads((tmp_path / "aimv2_okvqa_val_seed7.json").read_text())
    assert len(listed["shots"]) == 6 and listed["source"] == "OK-VQA/data/train2014-*.parquet"
    assert listed["checked_against"] == benchmark.data_hash and set(listed["shots"][0]) == {"id", "picture_sha256", "question", "options", "answer"}
    again = with_shots(benchmark, 4, 7, 6, tmp_path, published=True)
    assert again == four and again.name == "aimv2_okvqa_val_4shot" and again.shots[:2] == with_shots(benchmark, 2, 7, 6, tmp_path, True).shots
    assert again.data_hash not in (benchmark.data_hash, with_shots(benchmark, 2, 7, 6, tmp_path, True).data_hash)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(benchmark="aimv2_vqav2_val"), "these shots are for aimv2_vqav2_val, not for aimv2_okvqa_val"),
        (lambda c: c["shots"][0].update(picture_sha256="0" * 64), "holds no question .* with the picture 000000000000"),
        (lambda c: c.pop("shots"), "not a list of shots"),
        (lambda c: c.update(shots=c["shots"][:1]), "1 shots, but 2 are asked for"),
    ],
)
def test_another_list_is_refused_in_one_line(mirrors, tmp_path, change, reason):
    benchmark = opened(mirrors, "aimv2_okvqa_val")
    with_shots(benchmark, 2, 0, 2, tmp_path, published=False)
    path = tmp_path / "aimv2_okvqa_val_seed0.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=reason):
        with_shots(benchmark, 2, 0, 2, tmp_path, published=True)


def test_missing_training_questions_name_the_files(mirrors, tmp_path):
    shutil.copytree(mirrors / "GQA", tmp_path / "GQA", ignore=shutil.ignore_patterns("train*"))
    with pytest.raises(UserError, match=r"no train_balanced_instructions/train-\*.parquet in .*GQA; fetch them from lmms-lab-encoder/GQA"):
        choose_shots(opened(tmp_path, "aimv2_gqa_val"), 1, 0)
    with pytest.raises(UserError, match="shots: aimv2_mme_perception: no training questions"):
        choose_shots(opened(mirrors, "aimv2_mme_perception"), 1, 0)
    assert all(HUB_SETS[f"aimv2_{name}"].train for name in TABLE_8)


# ---------------------------------------------------------------------------------------------- asking


def test_shuffled_answers_leave_none_in_its_place_and_pictureless_shots_keep_their_words(mirrors, tmp_path):
    benchmark = with_shots(opened(mirrors, "aimv2_gqa_val"), 4, 0, 4, tmp_path, published=False)
    plain, shuffled, pictureless = (earlier_turns(benchmark, c) for c in (None, "shuffled_answers", "shots_without_pictures"))
    assert [role for role, _ in plain["before"]] == ["user", "assistant"] * 4 and plain["places"] == (1, 0) * 4
    assert plain["before"][0][1].endswith("\nAnswer the question using a single word or phrase.")
    answers = [[text for role, text in turns["before"] if role == "assistant"] for turns in (plain, shuffled)]
    assert answers[1] == answers[0][1:] + answers[0][:1]
    assert pictureless["before"] == plain["before"] and pictureless["pictures"] == () and sum(pictureless["places"]) == 0
    assert [p.key for p in shuffled["pictures"]] == [p.key for p in plain["pictures"]]


def test_answers_go_round_by_as_much_as_moves_the_most_and_one_alone_is_no_control(mirrors, tmp_path):
    from aimv2_vlm.config import EvalConfig
    from aimv2_vlm.evaluation.sweep import _arms

    benchmark = with_shots(opened(mirrors, "aimv2_gqa_val"), 4, 0, 4, tmp_path, published=False)
    for answers, wanted in ((["yes", "yes", "no", "no"], ["no", "no", "yes", "yes"]), (["yes", "yes", "yes", "2"], ["yes", "yes", "2", "yes"])):
        given = replace(benchmark, shots=[replace(shot, answer=answer) for shot, answer in zip(benchmark.shots, answers, strict=True)])
        assert [text for role, text in earlier_turns(given, "shuffled_answers")["before"] if role == "assistant"] == wanted
    assert _arms(EvalConfig(), benchmark) == [None, "shuffled_answers", "shots_without_pictures"]
    assert _arms(EvalConfig(), replace(benchmark, shots=benchmark.shots[:1])) == [None, "shots_without_pictures"]


@pytest.fixture(scope="module")
def in_context(mirrors, tmp_path_factory):
    """One sweep of two benchmarks at 0 and 2 shots with all controls, with a tiny random assistant."""
    out = tmp_path_factory.mktemp("in_context")
    gqa = opened(mirrors, "aimv2_gqa_val")
    seed = next(seed for seed in range(20) if len({shot.answer for shot in choose_shots(gqa, 2, seed)}) == 2)  # so that shuffling shows
    names = ["aimv2_gqa_val", "aimv2_chartqa_test"]
    status, _, rows = run_mirrors(mirrors, out, benchmarks=names, shots=[0, 2], seed=seed)
    return status, out, rows


def test_a_sweep_has_a_row_for_each_number_of_shots_and_names_what_it_cannot_ask(in_context):
    status, out, rows = in_context
    assert [(row["benchmark"], row["control"], row["shots"]) for row in rows] == [
        ("aimv2_gqa_val", None, 0), ("aimv2_gqa_val_2shot", None, 2), ("aimv2_gqa_val_2shot", "shuffled_answers", 2),
        ("aimv2_gqa_val_2shot", "shots_without_pictures", 2), ("aimv2_chartqa_test", None, 0)]  # fmt: skip
    failures = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert status == 1 and {f["benchmark"] for f in failures} == {"aimv2_chartqa_test_2shot"}
    assert all("no training questions" in f["reason"] for f in failures)
    assert (out / "shots" / f"aimv2_gqa_val_seed{rows[0]['seed']}.json").is_file()


def test_in_context_answers_are_those_of_the_plain_chat_template_with_all_pictures(in_context, mirrors):
    _, out, rows = in_context
    model, processor = load_assistant(out / "assistant", "fp32", "cpu")
    benchmark = with_shots(opened(mirrors, "aimv2_gqa_val"), 2, rows[0]["seed"], 2, out / "shots", published=True)
    pictures = dict(benchmark.pictures())
    samples = {row["control"]: (out / row["samples"]).read_text().splitlines() for row in rows if row["shots"]}
    answers = {control: [json.loads(line)["prediction"] for line in lines] for control, lines in samples.items()}
    assert len({tuple(texts) for texts in answers.values()}) == 3, "pictures and answers of shots must matter, or equality shows nothing"
    for control, given in answers.items():
        expected = []
        for row, prompt in list(zip(benchmark.rows, benchmark.prompts, strict=True))[:4]:
            turns = []
            said = [text for _, text in earlier_turns(benchmark, control)["before"]]
            for k, shot in enumerate(benchmark.shots):
                image = [{"type": "image", "image": open_picture(shot.picture)}] if control != "shots_without_pictures" else []
                turns.append({"role": "user", "content": [*image, {"type": "text", "text": said[2 * k]}]})
                turns.append({"role": "assistant", "content": [{"type": "text", "text": said[2 * k + 1]}]})
            image = {"type": "image", "image": open_picture(pictures[row["picture_id"]])}
            turns.append({"role": "user", "content": [image, {"type": "text", "text": prompt}]})
            inputs = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            expected.append(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        assert given == expected


def test_places_must_fit_the_pictures(in_context):
    model, processor = load_assistant(in_context[1] / "assistant", "fp32", "cpu")
    (answer,) = Generator(model, processor, max_new_tokens=2).answer([Question("dog ?", (), (("user", "cat ?"), ("assistant", "a")), (1, 0, 0))])
    assert not isinstance(answer, str) and "places" in str(answer)
