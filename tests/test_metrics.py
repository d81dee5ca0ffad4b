"""Metrics equal the official ones on stored cases; bootstrap intervals keep pictures together."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2_vlm.config import UserError
from aimv2_vlm.evaluation import metrics
from aimv2_vlm.evaluation.benchmarks import convert_val_jsonl, find_benchmarks, read_benchmark, wrong_pictures
from aimv2_vlm.evaluation.comparison import compare, write_comparisons

FIXTURES = Path(__file__).parent / "fixtures"
SHORT = json.loads((FIXTURES / "short_answers.json").read_text())


def test_cider_equals_pycocoevalcap_with_its_java_tokenizer():
    case = json.loads((FIXTURES / "cider_aerial.json").read_text())
    scores = metrics.cider(case["candidates"], case["references"])
    assert scores.mean() == pytest.approx(case["cider"], abs=1e-3)
    np.testing.assert_allclose(scores, case["per_image"], atol=1e-3)


@pytest.mark.parametrize(
    ("caption", "tokens"),  # right-hand sides printed by stanford-corenlp-3.4.1, punctuation removed
    [
        (
            "A man's dog can't, won't; they're \"happy\" & I've $5",
            "a man 's dog ca n't wo n't they 're happy & i 've $ 5",
        ),
        ("3,000.50 dollars (at 5:30 p.m.) cannot gonna", "3,000.50 dollars -lrb- at 5:30 p.m. -rrb- can not gon na"),
        (
            "Mr. Smith vs. Dr. Jones in the U.S. e.g. this... and -- that",
            "mr. smith vs. dr. jones in the u.s. e.g. this and that",
        ),
        ("pink/purple and/or 1/2 50% #1 @home", "pink/purple and/or 1/2 50 % # 1 @home"),
        ("WHAT?!! really??? ok!!! .!!", "what ?!! really ??? ok !!! !!"),
        ("the 1990s, the 90's, 3-d 4x4 10th x-ray", "the 1990s the 90 's 3-d 4x4 10th x-ray"),
        ("sign says \"STOP\". A sign that reads 'no parking'", "sign says stop a sign that reads no parking"),
        ("petals,flower color.the black&white R&B", "petals flower color.the black & white r&b"),
        ("emoji 😀 café naïve “curly” – dash", "emoji café naïve curly dash"),
        ("two-and-a-half year-old's o'clock", "two-and-a-half year-old 's o'clock"),
    ],
)
def test_captions_are_split_as_the_java_tokenizer_splits_them(caption, tokens):
    assert metrics.tokenize_caption(caption) == tokens


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_text_breaks_the_tokenizer(text):
    assert "\n" not in metrics.tokenize_caption(text)


def test_relaxed_accuracy_equals_the_expected_value():
    case = SHORT["relaxed_accuracy"]
    scores = [metrics.relaxed_accuracy(p, a) for p, a in zip(case["predictions"], case["answers"], strict=True)]
    assert 100 * np.mean(scores) == case["expected"]
    assert metrics.relaxed_accuracy("nan", ["0"]) == metrics.relaxed_accuracy("", ["5"]) == 0
    assert metrics.relaxed_accuracy("0", ["0"]) == 1


def test_anls_equals_the_expected_values():
    case = SHORT["anls"]
    scores = [metrics.anls(prediction, case["answers"]) for prediction, _ in case["items"]]
    for score, (_, expected) in zip(scores, case["items"], strict=True):
        assert score == pytest.approx(expected, abs=0.005)
    assert np.mean(scores) == pytest.approx(case["expected_mean"], abs=case["tolerance"])
    assert metrics.anls("", ["word"]) == 0 and metrics.anls("WO  RD", ["wo rd"]) == 1


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
@settings(max_examples=100, deadline=None)
def test_edit_distance_is_a_metric(a, b, c):
    distance = metrics.levenshtein
    assert distance(a, a) == 0 and distance(a, b) == distance(b, a) <= max(len(a), len(b))
    assert distance(a, c) <= distance(a, b) + distance(b, c)
    assert distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        (" The CAT. ", "the cat", 1), ("cat", "the cat", 0), ("3.5", "3.5", 1), ("3.5", "35", 0), ("", "cat", 0),
        ("blue-green", "blue green", 0), ("%", "%", 1), ("", "%", 0), ("yes,", "Yes", 1),
    ],
)  # fmt: skip
def test_exact_match_ignores_case_and_outer_punctuation_only(prediction, answer, score):
    assert metrics.exact_match(prediction, ["never", answer]) == score


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"), ("(b)", "B"), ("B. cat", "B"), ("The answer is C", "C"), ("a", "A"), ("A.", "A"), ("b)", "B"),
        ("Answer: D", "D"), ('"B"', "B"), ("cat", "B"), ("a cat", ""), ("A dog runs", ""), ("I think", ""), ("", ""),
        ("E", ""),
    ],
)  # fmt: skip
def test_option_letters_are_found_where_an_answer_names_one(prediction, letter):
    assert metrics.option_letter(prediction, ["dog", "cat", "red", "blue"]) == letter


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [("The answer is a dog", "B"), ("The answer is a dog.", "B"), ("A Dog", "B"), ("a cat", "A"), ("The answer is a", "A"), ("The answer is A.", "A"),
     ("The correct answer is option b because", "B"), ("The answer is a bird", ""), ("A because", ""), ("A", "A"), ("B a cat", "B")],
)  # fmt: skip
def test_an_article_before_an_option_is_no_letter(prediction, letter):
    assert metrics.option_letter(prediction, ["a cat", "A dog"]) == letter


def test_intervals_hold_the_mean_and_grow_when_pictures_repeat_questions():
    generator = np.random.default_rng(0)
    per_picture = generator.random(60) < 0.5
    scores, pictures = np.repeat(per_picture, 10), np.repeat(np.arange(60), 10)
    low, high = metrics.bootstrap_interval(scores, pictures, seed=1)
    naive_low, naive_high = metrics.bootstrap_interval(scores, range(600), seed=1)
    assert low < scores.mean() < high
    assert (high - low) > 2.5 * (naive_high - naive_low)  # sqrt(10) where a picture's questions agree
    assert metrics.bootstrap_interval(scores, pictures, seed=1) == (low, high)
    assert metrics.bootstrap_interval([1.0] * 5, "abcde") == (1.0, 1.0)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(150):
        means = generator.beta(2, 2, size=50)
        scores = (generator.random((50, 4)) < means[:, None]).astype(float)
        low, high = metrics.bootstrap_interval(scores.ravel(), np.repeat(np.arange(50), 4), seed=trial, num=500)
        hits += low <= 0.5 <= high
    assert 0.86 <= hits / 150 <= 0.99


def test_paired_differences_cancel_what_both_arms_share():
    generator = np.random.default_rng(5)
    hardness = generator.random((3, 200))
    better, worse = hardness + 0.05, hardness
    pictures = [np.arange(200) // 4] * 3
    difference, low, high = metrics.paired_difference(better, worse, pictures)
    assert difference == pytest.approx(0.05) and low == pytest.approx(0.05) and high == pytest.approx(0.05)
    noise = generator.normal(size=(3, 200))
    noise -= noise.mean()
    difference, low, high = metrics.paired_difference(better + noise, worse, pictures)
    assert difference == pytest.approx(0.05) and low < 0 and high > 0.1
    seeds_differ = better + np.array([[-1.0], [0.0], [1.0]])
    _, low, high = metrics.paired_difference(seeds_differ, worse, pictures)
    assert low < -0.5 and high > 0.5, "training seeds are a source of uncertainty of their own"
    ragged = metrics.paired_difference([[1.0, 1.0], [1.0]], [[0.0, 0.0], [0.0]], [["a", "b"], ["a"]])
    assert ragged == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="not paired|paired scores"):
        metrics.paired_difference([[1.0, 2.0]], [[1.0, 2.0]], [["a"]])


def test_the_most_frequent_answer_joins_spellings():
    assert metrics.most_frequent(["Yes", "no", "yes.", "no", "YES"]) == "Yes"
    assert metrics.most_frequent([]) is None


# ---------------------------------------------------------------------------------------------- public benchmarks


@functools.cache
def upstream_answers():
    """lmms-eval's answer processor for VQA."""
    with metrics.strict_pillow():
        from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
    return EvalAIAnswerProcessor


@functools.cache  # the processor adds every word that it meets to its table of numbers
def vqa_texts():
    """Answers made of what the official normalisation treats in its own way."""
    official = upstream_answers()
    words = [*official.CONTRACTIONS, *official.CONTRACTIONS.values(), *official.NUMBER_MAP, *official.PUNCTUATIONS,
             "The", "a", "an", "dog's", "1,000", "3.5", "5.", "U.S.", "a.m.", "x-ray", "yes,", "no?", "10:30", "CAN'T",
             "red", ".", "\n", "\t"]  # fmt: skip
    return st.lists(st.tuples(st.sampled_from(words), st.sampled_from(["", " "])), max_size=6).map(lambda parts: "".join(map("".join, parts)))


@given(st.data())
@settings(max_examples=600, deadline=None)
def test_vqa_answers_are_normalised_as_by_the_official_scripts(data):
    text = data.draw(vqa_texts())
    official = upstream_answers()()
    assert metrics.normalize_vqa(text, challenge=True) == official(text)
    plain = text.replace("\n", " ").replace("\t", " ").strip()
    assert metrics.normalize_vqa(text) == official.process_digit_article(official.process_punctuation(plain))


def test_every_contraction_of_the_official_table_is_mended():
    for short, mended in upstream_answers().CONTRACTIONS.items():
        if short == short.lower():
            assert metrics.normalize_vqa(f"x {short}") == f"x {mended}"


@given(st.text(alphabet="aB .,'-%1", max_size=6), st.text(alphabet="aB .,'-%1", max_size=6))
@settings(max_examples=200, deadline=None)
def test_gqa_is_compared_as_by_lmms_eval(prediction, answer):
    with metrics.strict_pillow():
        from lmms_eval.api.metrics import exact_match_hf_evaluate
    prediction, answer = prediction.strip(), answer.strip()
    theirs = exact_match_hf_evaluate([prediction], [answer], ignore_case=True, ignore_punctuation=True)["exact_match"]
    assert metrics.gqa_exact(prediction, [answer]) == theirs


@pytest.mark.parametrize(("equal", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_is_the_mean_over_nine_of_ten_annotators(equal, score):
    answers = ["Red"] * equal + [f"other {i}" for i in range(10 - equal)]
    assert metrics.vqa_accuracy("the red.", answers) == pytest.approx(score)
    assert metrics.vqa_accuracy("two", ["2"] * 10) == 1 and metrics.vqa_accuracy("", []) == 0


@pytest.mark.parametrize(
    ("prediction", "label"),
    [
        ("Yes", "yes"), ("no.", "no"), ("Yes, it is", "yes"), ("y", "yes"), ("N", "no"), ("It is yes", "other"), ("", "other"),
        ("Not at all", "no"), ("cannot", "other"), ("x", "other"),
    ],
)  # fmt: skip
def test_yes_and_no_are_read_as_mme_reads_them(prediction, label):
    assert metrics.yes_no(prediction) == label


def mme_case(right: str) -> tuple[np.ndarray, list[dict]]:
    """One letter a question, two questions a picture, two pictures a subtask: 1 right, 0 wrong."""
    rows = [{"attribute": f"task{i // 4}", "picture_id": f"{i // 2}", "answers": ["Yes"]} for i in range(len(right))]
    return np.array([float(letter) for letter in right]), rows


def test_mme_sums_accuracy_and_accuracy_plus_over_subtasks():
    assert metrics.benchmark_score("mme", *mme_case("11111111")) == 400  # two subtasks of at most 200
    assert metrics.benchmark_score("mme", *mme_case("10101010")) == 100  # half right, no picture whole
    assert metrics.benchmark_score("mme", *mme_case("11101100")) == (75 + 50) + (50 + 50)
    scores, rows = mme_case("11111111")
    assert metrics.benchmark_score("mme", scores[1:], rows[1:]) == 350, "half of a pair is no pair"
    scores, rows = mme_case("1110" * 40 + "1100" * 40)
    low, high = metrics.score_interval("mme", scores, rows)
    assert low < metrics.benchmark_score("mme", scores, rows) < high


def test_means_have_lmms_evals_clustered_error():
    from lmms_eval.api.metrics import clustered_stderr

    generator = np.random.default_rng(1)
    scores = np.repeat(generator.random(80) < 0.6, 5).astype(float)
    rows = [{"picture_id": i // 5} for i in range(400)]
    low, high = metrics.score_interval("gqa_exact", scores, rows)
    error = clustered_stderr(list(scores), [row["picture_id"] for row in rows])
    assert (high - low) / 2 == pytest.approx(196 * error) and (low + high) / 2 == pytest.approx(100 * scores.mean())
    drawn = metrics.bootstrap_interval(scores, [row["picture_id"] for row in rows])
    assert (low / 100, high / 100) == pytest.approx(drawn, abs=0.015), "the bootstrap over pictures says the same"


def test_all_right_is_no_certainty():
    """An error or a bootstrap would have no width there; Wilson's interval of as many pictures has one, whatever their questions."""
    rows = [{"picture_id": i // 4} for i in range(40)]
    low, high = metrics.score_interval("anls", [1.0] * 40, rows)
    assert high == 100 and low == pytest.approx(100 / (1 + 1.959964**2 / 10), abs=1e-3)
    assert metrics.score_interval("anls", [0.0] * 40, rows) == pytest.approx((0, 100 - low))
    assert metrics.all_or_none_interval([1.0, 0.0], "ab") is None and metrics.all_or_none_interval([0.5, 0.5], "ab") is None


def test_paired_tests_are_lmms_evals_where_pictures_have_one_question_and_wider_where_they_have_more():
    from lmms_eval.api.metrics import paired_ttest

    generator = np.random.default_rng(2)
    first, second = (generator.random(120) < 0.6).astype(float), (generator.random(120) < 0.4).astype(float)
    theirs = paired_ttest(list(first), list(second))
    assert metrics.paired_test(first, second, range(120)) == pytest.approx(
        [theirs[key] for key in ("mean_diff", "ci_lower", "ci_upper", "p_value")], abs=1e-9)  # fmt: skip
    one, other = np.repeat(first, 4), np.repeat(second, 4)
    _, low, high, p = metrics.paired_test(one, other, np.repeat(np.arange(120), 4))
    assert (high - low) == pytest.approx(theirs["ci_upper"] - theirs["ci_lower"], rel=0.02) and p == pytest.approx(theirs["p_value"], rel=0.2)
    _, naive_low, naive_high, _ = metrics.paired_test(one, other, range(480))
    assert (high - low) > 1.9 * (naive_high - naive_low)
    for arguments in (([1.0], [1.0, 2.0], "ab"), ([1.0, 1.0], [0.0, 1.0], "aa")):
        with pytest.raises(ValueError, match="not paired|at least two"):
            metrics.paired_test(*arguments)


def test_differences_of_mme_and_cider_draw_the_same_pictures_for_both():
    scores, rows = mme_case("1110" * 40)
    assert metrics.paired_scores("mme", scores, scores, rows) == (0, 0, 0, None)
    better = np.maximum(scores, np.arange(len(scores)) % 8 < 4)
    difference, low, high, p = metrics.paired_scores("mme", better, scores, rows)
    assert difference == metrics.benchmark_score("mme", better, rows) - metrics.benchmark_score("mme", scores, rows) > 0
    assert low <= difference <= high and p is None
    captions = np.random.default_rng(0).random(50)
    assert metrics.paired_scores("cider", captions + 0.1, captions, [{"picture_id": i} for i in range(50)])[:3] == pytest.approx([10, 10, 10])


# ---------------------------------------------------------------------------------------------- comparisons of a ledger


def write_ledger(out: Path, cells: dict[tuple[str, str | None], list[float]], majority: str | None = None, **more) -> None:
    """Cells (model, control) -> score of each of the questions about pictures "0", "0", "1", "1", …"""
    rows = []
    for (model, control), scores in cells.items():
        file = f"samples/{model}_{control}.jsonl"
        samples = [{"id": str(i), "picture_id": str(i // 2), "score": score, "answers": ["yes" if i % 3 else "no"], "answer_letter": "",
                    "majority": majority, "attribute": "t"} for i, score in enumerate(scores)]  # fmt: skip
        (out / "samples").mkdir(exist_ok=True)
        (out / file).write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        rows.append({"model": model, "benchmark": "b", "control": control, "data_hash": "h", "split": "val", "limit": None, "metric": "exact_match",
                     "score": 1.0, "samples": file, "shots": 0, **more})  # fmt: skip
    (out / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_questions_that_need_the_picture_are_those_that_blind_and_majority_miss(tmp_path):
    cells = {("one", None): [1, 1, 0, 1, 1, 0], ("one", "blind"): [1, 0, 0, 0, 0, 0],
             ("two", None): [1, 1, 1, 1, 1, 1], ("two", "blind"): [0, 1, 0, 0, 0.6, 0.3]}  # fmt: skip
    write_ledger(tmp_path, cells)
    found = {row["model"]: row for row in compare(tmp_path)["needs_picture"]}
    assert found["one"]["num_questions"] == found["two"]["num_questions"] == 3 and found["one"]["num_asked"] == 6  # 2, 3, 5
    assert found["one"]["score"] == pytest.approx(100 / 3, abs=1e-3) and found["two"]["score"] == 100
    write_ledger(tmp_path, cells, majority="Yes.")  # right on questions 1, 2, 4, 5
    found = {row["model"]: row for row in compare(tmp_path)["needs_picture"]}
    assert found["one"]["num_questions"] == 1 and found["one"]["score"] == 100
    write_ledger(tmp_path, {("one", None): [1, 0]})
    assert compare(tmp_path)["needs_picture"] == [], "without a blind arm or training answers nothing is known"


def test_models_are_told_apart_only_where_the_interval_excludes_zero(tmp_path):
    generator = np.random.default_rng(0)
    base = (generator.random(200) < 0.5).astype(float)
    better = np.maximum(base, generator.random(200) < 0.3)
    alike = np.where(np.arange(200) < 4, 1 - base, base)
    write_ledger(tmp_path, {("base", None): list(base), ("better", None): list(better), ("alike", None): list(alike), ("base", "blind"): [0.0] * 200})
    found = {(row["first"], row["second"]): row for row in compare(tmp_path)["paired"]}
    assert list(found) == [("base", "better"), ("base", "alike"), ("better", "alike")]
    row = found["base", "better"]
    assert row["told_apart"] and row["difference"] == pytest.approx(100 * (base - better).mean(), abs=1e-3) and row["interval"][1] < 0
    assert not found["base", "alike"]["told_apart"] and row["num_questions"] == 200
    assert json.loads(write_comparisons(tmp_path).read_text()) == compare(tmp_path)


def test_table_8_averages_are_over_the_benchmarks_that_have_every_number_of_shots(tmp_path):
    scores = {("a", 0, None): 10, ("a", 4, None): 30, ("a", 4, "shuffled_answers"): 20, ("b", 0, None): 50, ("b", 4, None): 60,
              ("b", 4, "shuffled_answers"): 54, ("b", 0, "blind"): 1, ("alone", 0, None): 99}  # fmt: skip
    rows = [{"model": "m", "benchmark": f"{name}_{shots}shot" if shots else name, "shots": shots, "control": control, "score": score,
             "metric": "anls", "data_hash": "h", "split": "val", "limit": None, "samples": "gone.jsonl"}
            for (name, shots, control), score in scores.items()]  # fmt: skip
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {(row["shots"], row["control"]): row["average"] for row in compare(tmp_path)["in_context"]}
    assert found == {(0, None): 30, (4, None): 45, (4, "shuffled_answers"): 37}
    probe = {"kind": "probing", "model": "m", "benchmark": "pets", "control": None, "score": 90.0}
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [probe, *(r for r in rows if r["shots"] == 0)]))
    assert compare(tmp_path)["in_context"] == [], "without shots there is no such table"


# ---------------------------------------------------------------------------------------------- benchmark folders


def _rows(num_pictures: int) -> list[dict]:
    return [
        {"id": f"{i}-{form}", "picture_id": i, "question_form": form, "answers": [f"{form}{(i * 7) % 3}"]}
        for i in range(num_pictures)
        for form in ("color", "digit")
    ]


def test_wrong_pictures_have_the_same_form_and_another_answer_and_depend_on_the_seed():
    rows = _rows(30)
    chosen, num_other_form = wrong_pictures(rows, seed=1)
    assert num_other_form == 0 and sorted(chosen) == list(range(60))
    for i, j in chosen.items():
        assert rows[i]["question_form"] == rows[j]["question_form"]
        assert rows[i]["picture_id"] != rows[j]["picture_id"] and rows[i]["answers"] != rows[j]["answers"]
    assert wrong_pictures(rows, seed=1)[0] == chosen != wrong_pictures(rows, seed=2)[0]
    assert len(set(chosen.values())) > 20, "not always the same few pictures"


def test_wrong_pictures_of_a_form_with_one_answer_come_from_other_forms_and_are_counted():
    rows = [*_rows(6), {"id": "x", "picture_id": 0, "question_form": "alone", "answers": ["x"]}]
    chosen, num_other_form = wrong_pictures(rows, seed=0)
    assert num_other_form == 1 and rows[chosen[len(rows) - 1]]["picture_id"] != 0
    same = [{"id": str(i), "picture_id": i, "question_form": "f", "answers": ["yes"]} for i in range(3)]
    with pytest.raises(UserError, match="wrong_picture: no row"):
        wrong_pictures(same, seed=0)


def test_a_jsonl_set_becomes_one_benchmark_per_source(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 6), "red").save(tmp_path / "images" / "a.png")
    rows = [
        {
            "id": "1",
            "image": "images/a.png",
            "question": "How much?",
            "answers": ["5"],
            "metric": "relaxed_accuracy",
            "source": "charts",
        },
        {
            "id": "2",
            "image": "images/a.png",
            "question": "Word?",
            "answers": ["x"],
            "metric": "exact_match",
            "source": "words",
            "seen_in_train": True,
        },
    ]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    convert_val_jsonl(tmp_path / "val.jsonl", tmp_path / "root" / "real")
    found = dict(find_benchmarks(tmp_path / "root", ["real"]))
    assert list(found) == ["real/charts", "real/words"]
    words = read_benchmark("real/words", found["real/words"])
    assert words.metric == "exact_match" and words.rows[0]["seen_in_train"] is True
    assert words.prompts == ["Word?\nAnswer the question using a single word or phrase."]
    assert words.data_hash != read_benchmark("real/charts", found["real/charts"]).data_hash


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1: not JSON"),
        ('{"id": 1}', "line 1: image, question, answers, metric, source missing"),
        (
            '{"id": 1, "image": "no.png", "question": "", "answers": [], "metric": "anls", "source": "s"}',
            "no.png does not exist",
        ),
        ('{"id": 1, "image": "x", "question": "", "answers": [], "metric": "anl", "source": "s"}', "nearest: anls"),
    ],
)
def test_broken_rows_are_named_by_file_and_line(tmp_path, line, reason):
    (tmp_path / "val.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=reason):
        convert_val_jsonl(tmp_path / "val.jsonl", tmp_path / "root")
