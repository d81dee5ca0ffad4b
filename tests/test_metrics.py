"""Metrics equal the official ones on stored cases; bootstrap intervals keep pictures together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2_vlm.config import UserError
from aimv2_vlm.evaluation import metrics
from aimv2_vlm.evaluation.benchmarks import convert_val_jsonl, find_benchmarks, read_benchmark, wrong_pictures

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
