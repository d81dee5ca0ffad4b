"""The public benchmarks: mirrors with the hub's schema are asked exactly as Table C2 says, through the real lmms-eval code."""

from __future__ import annotations

import importlib
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow.compute
import pyarrow.parquet
import pytest
from mirrors import TEN, picture, run_mirrors, write_mirrors

from aimv2_vlm.config import UserError
from aimv2_vlm.evaluation.benchmarks import TASKS, TrainingAnswers, build_prompt, convert_val_jsonl, find_benchmarks, read_benchmark
from aimv2_vlm.evaluation.hub_sets import CAPTION, HUB_SETS, OPTION_LETTER, SINGLE_WORD
from aimv2_vlm.evaluation.metrics import SUBMISSION, benchmark_score, score_answers, strict_pillow

UPSTREAM = {  # ours -> (lmms-eval's task, the prefix of its functions, folder and files of the mirror)
    "aimv2_vqav2_val": ("vqav2", "vqav2"), "aimv2_okvqa_val": ("ok_vqa", "ok_vqa"), "aimv2_textvqa_val": ("textvqa", "textvqa"),
    "aimv2_docvqa_val": ("docvqa", "docvqa"), "aimv2_infovqa_val": ("infovqa", "infovqa"), "aimv2_chartqa_test": ("chartqa", "chartqa"),
    "aimv2_seed_image": ("seedbench", "seed"), "aimv2_scienceqa_image": ("scienceqa", "sqa"), "aimv2_mme_perception": ("mme", "mme"),
    "aimv2_vizwiz_val": ("vizwiz_vqa", "vizwiz_vqa"),
}  # fmt: skip


@pytest.fixture(scope="session")
def mirrors(tmp_path_factory) -> Path:
    return write_mirrors(tmp_path_factory.mktemp("mirrors"))


def opened(mirrors: Path, name: str):
    (found,) = find_benchmarks(mirrors, [name])
    return read_benchmark(*found)


def upstream_docs(mirrors: Path, name: str):
    """The mirror as lmms-eval's own task would get it: pictures decoded."""
    import datasets

    hub_set = HUB_SETS[name]
    files = [str(file) for file in sorted((mirrors / hub_set.folder).glob(hub_set.files))]
    return datasets.load_dataset("parquet", data_files={"split": files}, split="split", cache_dir=str(mirrors / "cache"))


def upstream_module(task: str):
    with strict_pillow():
        return importlib.import_module(f"lmms_eval.tasks.{task}.utils")


def test_table_c2_stands_in_the_tasks():
    assert len([name for name in HUB_SETS if name != "aimv2_vizwiz_val"]) == 13 + 3  # GQA testdev and two files for a server
    for name, hub_set in HUB_SETS.items():
        task = (TASKS / f"{name}.yaml").read_text()
        assert f"include: _{hub_set.metric}.yaml" in task and f"test_split: {hub_set.split}\n" in task and f"task: {name}\n" in task
        assert f"{hub_set.split}: {hub_set.folder}/{hub_set.files}" in task
    single = [name for name, hub_set in HUB_SETS.items() if hub_set.suffix == SINGLE_WORD]
    assert [name.split("_")[1] for name in single] == [
        "vqav2", "okvqa", "textvqa", "gqa", "gqa", "docvqa", "docvqa", "infovqa", "infovqa", "chartqa"]  # fmt: skip
    assert {HUB_SETS[f"aimv2_{name}"].suffix for name in ("seed_image", "scienceqa_image")} == {OPTION_LETTER}
    assert all(hub_set.suffix == "" for hub_set in HUB_SETS.values() if hub_set.metric == "cider")
    assert HUB_SETS["aimv2_gqa_val"].split == "val" and HUB_SETS["aimv2_gqa_testdev"].split == "testdev"


EXPECTED_FIRST = {
    "aimv2_vqav2_val": f"what is the colour ?\n{SINGLE_WORD}",
    "aimv2_okvqa_val": f"which dog ?\n{SINGLE_WORD}",
    "aimv2_textvqa_val": f"what is the NASA picture ?\n{SINGLE_WORD}",
    "aimv2_gqa_val": f"which one is red ?\n{SINGLE_WORD}",
    "aimv2_gqa_testdev": f"which one is red ?\n{SINGLE_WORD}",
    "aimv2_docvqa_val": f"which house ?\n{SINGLE_WORD}",
    "aimv2_docvqa_test": f"which house ?\n{SINGLE_WORD}",
    "aimv2_infovqa_val": f"one two ?\n{SINGLE_WORD}",
    "aimv2_infovqa_test": f"one two ?\n{SINGLE_WORD}",
    "aimv2_chartqa_test": f"which one ?\n{SINGLE_WORD}",
    "aimv2_seed_image": f"what is this ?\nA. cat\nB. dog\nC. red\nD. blue\n{OPTION_LETTER}",
    "aimv2_scienceqa_image": f"which one ?\nA. cat\nB. dog\n{OPTION_LETTER}",
    "aimv2_mme_perception": "one cat ? Please answer yes or no.",
    "aimv2_coco2017_val": CAPTION,
    "aimv2_textcaps_val": CAPTION,
    "aimv2_nocaps_val": CAPTION,
    "aimv2_vizwiz_val": "What is the NASA house ?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n" + SINGLE_WORD,
}


@pytest.mark.parametrize("name", HUB_SETS)
def test_prompts_are_those_of_table_c2_and_a_part_is_not_the_split(mirrors, name):
    benchmark = opened(mirrors, name)
    assert benchmark.prompts[0] == EXPECTED_FIRST[name]
    assert benchmark.split == f"{HUB_SETS[name].split}, {len(benchmark.rows)} of {HUB_SETS[name].rows} questions"
    assert len({row["id"] for row in benchmark.rows}) == len(benchmark.rows)
    pictures = dict(benchmark.pictures())
    assert set(pictures) == {row["picture_id"] for row in benchmark.rows} and all(data[:2] == b"\xff\xd8" for data in pictures.values())


def test_videos_cognition_and_other_splits_stay_out(mirrors):
    assert [row["id"] for row in opened(mirrors, "aimv2_seed_image").rows] == ["1", "2", "4", "5"]
    assert {row["attribute"] for row in opened(mirrors, "aimv2_mme_perception").rows} == {"existence", "OCR"}
    assert {row["picture_id"] for row in opened(mirrors, "aimv2_gqa_testdev").rows} == {f"n{430 + i}" for i in range(8)}
    assert opened(mirrors, "aimv2_scienceqa_image").prompts[1].startswith("Context: the red house\nwhich one ?\nA. cat\nB. dog\nC. house\n")


@pytest.mark.parametrize("name", UPSTREAM)
def test_the_schema_is_what_lmms_eval_reads_and_prompts_differ_only_where_table_c2_does(mirrors, name):
    task, prefix = UPSTREAM[name]
    module, docs, benchmark = upstream_module(task), upstream_docs(mirrors, name), opened(mirrors, name)
    post = {"aimv2_mme_perception": "", "aimv2_chartqa_test": "\nAnswer the question with a single word."}.get(name, f"\n{benchmark.prompt_suffix}")
    kwargs = {"format": "default", "pre_prompt": "", "post_prompt": post}
    texts = []
    for row in benchmark.rows:
        doc = docs[row["table_row"]]
        (image, *_) = getattr(module, f"{prefix}_doc_to_visual")(doc)
        assert image.mode == "RGB" and image.size[0] > 10
        doc_to_text = getattr(module, f"{prefix}_doc_to_text")
        texts.append(doc_to_text(doc) if name == "aimv2_seed_image" else doc_to_text(doc, kwargs))
    if name in ("aimv2_textvqa_val", "aimv2_vizwiz_val"):
        assert all("nasa" in theirs and "NASA" in ours for theirs, ours in zip(texts, benchmark.prompts, strict=True))
    elif name == "aimv2_chartqa_test":
        assert [text.replace("with a single word.", "using a single word or phrase.") for text in texts] == benchmark.prompts
    else:
        assert texts == benchmark.prompts


def guesses(row: dict, generator: random.Random) -> str:
    right = row["answer_letter"] or row["answers"][0]
    return generator.choice([right, f"{right}.", right.lower(), right.upper(), "no", "Yes", "yes it is", "two", "39.5%", "3", "B", "c", "red",
                             "the maroon", f"{right}\n", "house's, 12", "", "cat", "a cat", "B dog", "A. cat", "C) red",
                             "The answer is B", *row["options"]])  # fmt: skip


@pytest.mark.parametrize("name", UPSTREAM)
def test_scores_equal_lmms_evals_own_on_the_same_answers(mirrors, name):
    task, prefix = UPSTREAM[name]
    module, docs, benchmark = upstream_module(task), upstream_docs(mirrors, name), opened(mirrors, name)
    with strict_pillow():
        from lmms_eval.api.metrics import anls
    plain = {"aimv2_seed_image": "seed_image"}
    for seed in range(40):
        generator = random.Random(seed)
        answers = [guesses(row, generator).strip() for row in benchmark.rows]  # a model's answers come stripped
        ours = score_answers(benchmark.metric, answers, benchmark.rows)
        theirs = []
        for row, answer in zip(benchmark.rows, answers, strict=True):
            doc = docs[row["table_row"]]
            if benchmark.metric == "anls":
                theirs.append(anls(doc["answers"], [answer])["anls"])
                continue
            function = next(f for f in (f"{prefix}_process_results", f"{prefix}_process_result") if hasattr(module, f))
            results = getattr(module, function)(doc, [answer])
            theirs.append(results[plain.get(name, next(iter(results)))])
        if benchmark.metric == "mme":
            assert benchmark_score("mme", ours, benchmark.rows) == pytest.approx(module.mme_aggregate_results(theirs))
        elif name == "aimv2_seed_image":
            assert ours.mean() == pytest.approx(module.seed_aggregation_result(theirs))
        else:
            assert list(ours) == pytest.approx(theirs, abs=1e-12)


# ---------------------------------------------------------------------------------------------- through lmms-eval


@pytest.fixture(scope="module")
def swept(mirrors, tmp_path_factory):
    """Every benchmark in one sweep, with a tiny random assistant."""
    out = tmp_path_factory.mktemp("swept")
    status, lines, rows = run_mirrors(mirrors, out, benchmarks=list(HUB_SETS))
    return status, lines, {row["benchmark"]: row for row in rows}, out


def test_all_benchmarks_run_offline_from_mirrors_through_lmms_eval(swept):
    status, lines, rows, _ = swept
    assert status == 0, lines
    assert list(rows) == list(HUB_SETS)
    for name, row in rows.items():
        assert row["num_errors"] == 0 and row["complete"] and row["num_questions"] == (3 if "infovqa" in name else 4)
        assert row["prompt"] == EXPECTED_FIRST[name] and row["metric"] == HUB_SETS[name].metric
        if row["metric"] == SUBMISSION:
            continue
        assert row["split"].startswith(f"{HUB_SETS[name].split}, ") and row["tokens_per_picture"] == 4
        assert 0 <= row["interval"][0] <= row["score"] <= row["interval"][1]
    assert rows["aimv2_gqa_val"]["num_pictures"] == 2 and rows["aimv2_seed_image"]["num_pictures"] == 4


def test_the_question_sees_its_own_picture(swept, mirrors):
    """GQA keeps pictures apart, in another order; SEED has videos between: the answers are those of the right pictures."""
    from aimv2_vlm.evaluation.generation import Generator, load_assistant, open_picture

    *_, rows, out = swept
    model, processor = load_assistant(out / "assistant", "fp32", "cpu")
    generator = Generator(model, processor, batch_size=4, max_new_tokens=4)
    for name in ("aimv2_gqa_val", "aimv2_seed_image", "aimv2_docvqa_val"):
        benchmark = opened(mirrors, name)
        pictures = dict(benchmark.pictures())
        asked = list(zip(benchmark.rows, benchmark.prompts, strict=True))[:4]
        expected = generator.answer([([open_picture(pictures[row["picture_id"]])], prompt) for row, prompt in asked])
        samples = [json.loads(line) for line in (out / rows[name]["samples"]).read_text().splitlines()]
        assert [sample["prediction"] for sample in samples] == expected


def test_withheld_answers_give_a_file_for_the_server_and_no_score(swept, mirrors):
    from aimv2_vlm.evaluation.comparison import compare
    from aimv2_vlm.evaluation.report import write_report
    from aimv2_vlm.evaluation.sweep import summary

    *_, rows, out = swept
    row = rows["aimv2_docvqa_test"]
    samples = [json.loads(line) for line in (out / row["samples"]).read_text().splitlines()]
    assert row["score"] is row["interval"] is None and all(sample["score"] is None for sample in samples)
    written = json.loads((out / row["submission"]).read_text())
    assert written == [{"questionId": 500 + i, "answer": samples[i]["prediction"]} for i in range(4)]
    page = write_report(out / "report.html", runs={}, eval_dir=out, title="t").read_text()
    assert "aimv2_mme_perception" in page and compare(out)["paired"] == []
    assert {line["benchmark"] for line in summary(out / "ledger.jsonl")} == {name for name in rows if not name.endswith("vqa_test")}


def test_task_files_run_under_plain_lmms_eval_in_the_folder_of_the_mirrors(mirrors, swept, tmp_path, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from aimv2_vlm.evaluation.lmms_model import AssistantModel

    monkeypatch.chdir(mirrors)
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(swept[-1] / "cache"))
    results = simple_evaluate(
        model=AssistantModel(pretrained=str(swept[-1] / "assistant"), device="cpu", precision="fp32", max_new_tokens=4),
        tasks=["aimv2_docvqa_test", "aimv2_gqa_val", "aimv2_mme_perception"], bootstrap_iters=0, process_docs_parallel=1, limit=4,
        task_manager=TaskManager(include_path=[str(TASKS)], include_defaults=False),
        cli_args=SimpleNamespace(process_with_media=False, output_path=str(tmp_path)),
    )  # fmt: skip
    written = json.loads((tmp_path / "submissions" / "submission.json").read_text())
    assert [row["questionId"] for row in written] == [500, 501, 502, 503] and all(isinstance(row["answer"], str) for row in written)
    ledger = swept[2]
    for name, key in (("aimv2_gqa_val", "gqa_exact,none"), ("aimv2_mme_perception", "mme,none")):
        score = results["results"][name][key] * (1 if name == "aimv2_mme_perception" else 100)
        assert score == pytest.approx(ledger[name]["score"], abs=1e-3)


# ---------------------------------------------------------------------------------------------- bad input


def test_a_public_benchmark_without_its_mirror_and_a_misspelt_one_are_one_line(tmp_path):
    (_, gone), (_, misspelt) = find_benchmarks(tmp_path, ["aimv2_mme_perception", "aimv2_vqav2_vall"])
    assert "MME is missing; put the files of lmms-lab-encoder/MME there" in str(gone)
    assert "nearest: aimv2_vqav2_val" in str(misspelt)


def test_missing_pictures_are_counted_errors_and_controls_run_on_public_benchmarks(mirrors, tmp_path):
    root = tmp_path / "root"
    for name in ("GQA", "MME"):
        shutil.copytree(mirrors / name, root / name)
    (file,) = (root / "GQA" / "val_balanced_images").glob("*.parquet")
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(table.filter(pyarrow.compute.not_equal(table["id"], "n401")), file)
    (file,) = (root / "MME" / "data").glob("*.parquet")
    table = pyarrow.parquet.read_table(file)
    images = table["image"].to_pylist()
    images[2]["bytes"] = images[2]["bytes"][:200]
    images[3] = None
    table = table.set_column(table.column_names.index("image"), table.field("image"), pyarrow.array(images, table.field("image").type))
    pyarrow.parquet.write_table(table, file)
    status, _, rows = run_mirrors(root, tmp_path, benchmarks=["aimv2_gqa_val", "aimv2_mme_perception"], controls=["blind", "wrong_picture"])
    cells = {(row["benchmark"], row["control"]): row for row in rows}
    assert status == 1 and len(cells) == 6
    assert [cells[name, None]["num_errors"] for name in ("aimv2_gqa_val", "aimv2_mme_perception")] == [2, 2]
    assert "n401" in cells["aimv2_gqa_val", None]["first_error"]
    assert all(cells[name, "blind"]["complete"] for name in ("aimv2_gqa_val", "aimv2_mme_perception"))
    samples = [json.loads(line) for line in (tmp_path / cells["aimv2_gqa_val", None]["samples"]).read_text().splitlines()]
    assert [sample["prediction"] is None for sample in samples] == [False, False, True, True]
    shown = [json.loads(line) for line in (tmp_path / cells["aimv2_mme_perception", "wrong_picture"]["samples"]).read_text().splitlines()]
    assert all(sample["shown_picture_id"] != sample["picture_id"] for sample in shown)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("column", "column category missing; nearest to category: categories"),
        ("twice", "part 00000 of lmms-lab-encoder/MME lies there more than once"),
        ("part", "1 of 2 parts of lmms-lab-encoder/MME; fetch the missing ones"),
        ("pairs", "has not two questions; MME counts pairs"),
        ("doubled", "question ids occur more than once"),
        ("garbage", "not readable as parquet"),
        ("none", r"no data/test-\*.parquet; aimv2_mme_perception needs these files"),
    ],
)
def test_a_damaged_mirror_is_one_clear_line(mirrors, tmp_path, damage, reason):
    folder = shutil.copytree(mirrors / "MME", tmp_path / "MME")
    (file,) = (folder / "data").glob("*.parquet")
    table = pyarrow.parquet.read_table(file)
    if damage == "column":
        table = table.rename_columns([{"category": "categories"}.get(c, c) for c in table.column_names])
    elif damage == "pairs":
        table = table.slice(1)
    elif damage == "doubled":
        table = pyarrow.concat_tables([table, table])
    pyarrow.parquet.write_table(table, file)
    if damage == "twice":
        shutil.copy(file, file.with_name("test-00000-of-00001-def.parquet"))
    elif damage == "part":
        file.rename(file.with_name("test-00000-of-00002-abc.parquet"))
    elif damage == "garbage":
        file.write_bytes(b"PAR1 and then nothing")
    elif damage == "none":
        file.unlink()
    with pytest.raises(UserError, match=reason) as error:
        opened(tmp_path, "aimv2_mme_perception")
    assert "\n" not in str(error.value)


def test_a_suffix_that_begins_with_a_space_stays_on_the_line():
    assert build_prompt("Is it?", (), " Please answer.") == "Is it? Please answer."
    assert build_prompt("Which?", ["x"], "Say.") == "Which?\nA. x\nSay." and build_prompt("Say.", (), "") == "Say."
    assert score_answers("vqa_accuracy", ["red"], [{"answers": TEN}])[0] == 1.0


# ---------------------------------------------------------------------------------------------- plan


def write_config(path: Path, root: Path, assistant: str, **changes) -> Path:
    content = {"benchmark_root": str(root), "benchmarks": [name for name in HUB_SETS], "models": [{"path": assistant, "name": "one"}], **changes}
    path.write_text(json.dumps(content))
    return path


def test_the_plan_names_what_is_missing_and_its_status_tells(mirrors, swept, tmp_path):
    from conftest import run_cli

    assistant = str(swept[-1] / "assistant")
    root = tmp_path / "root"
    shutil.copytree(mirrors / "ChartQA", root / "ChartQA")
    done = run_cli("eval", "--plan", write_config(tmp_path / "c.yaml", root, assistant, shots=[0, 8]), check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and "missing or not whole" in lines[-1]
    text = done.stdout
    assert ("MISSING aimv2_vqav2_val: lmms-lab-encoder/VQAv2, data/validation-*.parquet (validation), 214,354 questions, "
            "5.3 questions a picture, vqa_accuracy, size not known, licence: CC BY 4.0") in text  # fmt: skip
    assert f"{root / 'VQAv2'} is missing; put these files there as they lie on the hub" in text
    assert "1.47 GB to fetch" in text and "12.9 questions a picture" in text and "31.6 questions a picture" in text
    assert "4 rows instead of 2,500: a score of these is not the split's" in text
    assert "MISSING aimv2_gqa_val, shots: lmms-lab-encoder/GQA, train_balanced_instructions/train-*.parquet" in text
    assert "MISSING aimv2_mme_perception, shots: no training questions are known for it" in text
    assert f"ok      one: {assistant}, 4 tokens a picture" in text
    assert not (tmp_path / "runs").exists(), "a plan writes nothing"


def test_a_whole_set_is_in_order_and_damage_shows_in_the_plan(mirrors, swept, tmp_path, monkeypatch):
    import dataclasses

    from conftest import run_cli

    from aimv2_vlm.evaluation import plan

    whole = {"aimv2_mme_perception": dataclasses.replace(HUB_SETS["aimv2_mme_perception"], table_rows=12)}  # a set of twelve rows
    monkeypatch.setattr(plan, "HUB_SETS", whole)
    root = tmp_path / "root"
    shutil.copytree(mirrors / "MME", root / "MME")
    config = write_config(tmp_path / "c.yaml", root, str(swept[-1] / "assistant"), benchmarks=list(whole))
    done = run_cli("eval", "--plan", config)
    assert done.stdout.splitlines()[-1] == "plan: all 2 things are there"
    (file,) = (root / "MME" / "data").glob("*")
    file.write_bytes(file.read_bytes()[:-100])
    assert run_cli("eval", "--plan", config, check=False).stdout.count("not readable as parquet") == 1
    too_many = write_config(tmp_path / "long.yaml", root, str(swept[-1] / "assistant"), benchmarks=[], shots=[0, 200])
    assert "200 shots and a question are 804 picture tokens, the decoder has 512 positions" in run_cli("eval", "--plan", too_many, check=False).stdout


# ---------------------------------------------------------------------------------------------- one's own sets


def own_row(**changes):
    return {"id": "1", "image": "a.png", "question": "What?", "answers": ["red"], "metric": "exact_match", "source": "one"} | changes


@pytest.mark.parametrize(("line", "reason"), [
    (json.dumps(own_row(answers="red")), "line 1: answers must be a list, not 'red'"), ("7", "line 1: not JSON .no mapping."),
    (json.dumps(own_row(source="../../escaped")), "line 1: source '../../escaped' names the set's folder; write a word without / or .."),
])  # fmt: skip
def test_a_row_that_cannot_be_converted_is_one_line(line, reason, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0)["bytes"])
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=reason):
        convert_val_jsonl(tmp_path / "rows.jsonl", tmp_path / "out")
    (tmp_path / "rows.jsonl").write_bytes(line.encode() + b"\xe9")
    with pytest.raises(UserError, match="cannot be read"):
        convert_val_jsonl(tmp_path / "rows.jsonl", tmp_path / "out")


def test_a_set_of_ones_own_is_whole_and_its_answers_are_lists(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.png").write_bytes(picture(0)["bytes"])
    (tmp_path / "rows.jsonl").write_text(json.dumps(own_row()) + "\n")
    (folder,) = convert_val_jsonl(tmp_path / "rows.jsonl", tmp_path / "out")
    (file,) = (folder / "data").glob("test-*.parquet")
    assert read_benchmark("own", folder).rows[0]["answers"] == ["red"]
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(table.set_column(table.schema.get_field_index("answers"), "answers", pyarrow.array(["red"])), file)
    with pytest.raises(UserError, match="question 1: answers must be a list of texts, not 'red'"):
        read_benchmark("own", folder)
    pyarrow.parquet.write_table(table, folder / "data" / "test-00000-of-00003.parquet")
    file.unlink()
    with pytest.raises(UserError, match="1 of 3 parts of own; fetch the missing ones"):
        read_benchmark("own", folder)
    (folder / "benchmark.json").write_text("[]")
    with pytest.raises(UserError, match="benchmark.json: not a mapping with the key metric"):
        read_benchmark("own", folder)


def test_a_source_that_the_file_no_longer_has_is_no_set_any_more(tmp_path):
    from aimv2_vlm.evaluation.sweep import _convert_once

    (tmp_path / "a.png").write_bytes(picture(0)["bytes"])
    for sources in (["one", "two"], ["two"]):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(own_row(source=source)) + "\n" for source in sources))
        _convert_once(tmp_path / "rows.jsonl", tmp_path / "set", lambda line: None)
        assert sorted(path.name for path in (tmp_path / "set").iterdir() if path.is_dir()) == sources


@pytest.mark.parametrize(("content", "reason"), [
    (b'["a", "b"]', "has no row with conversations"), (b'{"conversations": []}', "has no row with conversations"), (b'[{"messages": []}]', "has no row with conversations"),
    (b'[{"conversations": [{"from": "human", "value": "caf\xe9"}]}]', "cannot be read"),
])  # fmt: skip
def test_tuning_rows_that_say_nothing_are_one_line(content, reason, tmp_path):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        TrainingAnswers([tmp_path / "rows.json"])


def test_tuning_rows_of_other_forms_are_passed_over(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    listed = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "blue"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": listed}, "text", {"conversations": turns}]))
    assert list(TrainingAnswers([tmp_path / "rows.json"])._answers.values()) == [["red"]]
