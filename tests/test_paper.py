"""Our scores beside the paper's: only what may be compared is, and a difference is that of equal columns."""

from __future__ import annotations

import math

import pytest

from aimv2_vlm.data.recognition import DATA_SETS
from aimv2_vlm.evaluation.hub_sets import HUB_SETS
from aimv2_vlm.evaluation.paper import IN_CONTEXT, beside_the_paper, markdown, tables


def row(model, benchmark, score, **more):
    return {"model": model, "benchmark": benchmark, "score": score, "interval": [score - 1, score + 1], "control": None, "complete": True, "limit": None} | more


def test_every_column_is_a_benchmark_of_this_package_and_every_row_is_full():
    known = {"benchmarks": set(HUB_SETS), "probing": set(DATA_SETS), "zero_shot": set(DATA_SETS)}
    for table in tables().values():
        if table.name != "Table 8":
            assert set(table.columns) <= set().union(*(known[kind] for kind in table.kinds)), table.name
        assert all(len(values) == len(table.columns) for values in table.rows.values()), table.name
        assert all(v is None or math.isfinite(v) and 0 < v < 2000 for values in table.rows.values() for v in values)
    assert set(IN_CONTEXT) <= set(HUB_SETS)
    assert tables()["Table 7"].rows["AIMv2 L"][0] == 79.7 and tables()["Table 3"].rows["AIMv2-3B 448px"][0] == 89.5  # as printed


def test_a_model_is_set_against_the_row_whose_name_it_bears():
    found = {b.table.name: b for b in beside_the_paper([
        row("AIMv2 L (seed 2)", "aimv2_vqav2_val", 80.0), row("AIMv2 L (seed 2)", "aimv2_mme_perception", 1400.0), row("mine", "aimv2_vqav2_val", 60.0)])}
    seven = found.pop("Table 7")
    assert not found  # nobody bears a name of Table C3 or 9
    assert seven.columns == ("aimv2_vqav2_val", "aimv2_mme_perception") and seven.paper["AIMv2 L"] == [79.7, 1472]
    first, second = seven.ours["AIMv2 L (seed 2)"]
    assert first.delta == pytest.approx(0.3) and first.interval == (79.0, 81.0) and second.delta == pytest.approx(-72)
    assert seven.ours["mine"][0].delta is None and seven.ours["mine"][1] is None
    words = markdown([seven])
    assert "| **AIMv2 L (seed 2), ours** | 80.0 (79.0 to 81.0), +0.3 | 1400.0 (1399.0 to 1401.0), -72.0 |" in words and "| AIMv2 L, the paper | 79.7 | 1472 |" in words


def test_another_split_a_control_or_a_part_of_the_questions_is_never_put_into_a_column():
    assert beside_the_paper([
        row("AIMv2 L", "aimv2_docvqa_val", 50.0), row("AIMv2 L", "aimv2_vqav2_val", 30.0, control="blind"), row("AIMv2 L", "aimv2_gqa_val", 30.0, limit=100),
        row("AIMv2 L", "aimv2_gqa_val", 30.0, split="val, 12 of 132062 questions"), row("AIMv2 L", "aimv2_gqa_val", 30.0, prompt_suffix="Be brief."),
        row("AIMv2 L", "aimv2_vqav2_val_4shot", 30.0, shots=4, split="validation, 3 of 214354 questions"),
        row("AIMv2 L", "aimv2_docvqa_test", 0.0) | {"score": None}, row("AIMv2-L", "imagenet-1k", 80.0, kind="zero_shot"), row("AIMv2-L LiT", "imagenet-1k", 80.0, kind="probing"),
    ]) == []


def test_probes_are_compared_in_the_papers_way():
    (found,) = beside_the_paper([row("AIMv2-L", "pets", 95.0, kind="probing", best_on_test={"score": 96.0})])
    cell = found.ours["AIMv2-L"][0]
    assert found.table.name == "Table 3" and cell.score == 96.0 and cell.delta == pytest.approx(-0.3) and "chosen on train 95.0" in cell.note


@pytest.mark.parametrize(("model", "benchmark", "more", "words"), [
    ("AIMv2-L", "pets", {"kind": "probing", "best_on_test": None}, "chosen on train, the paper's on test"),
    ("AIMv2-L", "pets", {"kind": "probing", "best_on_test": {"score": 96.0}, "augment": "none"}, "augmentation: none"),
    ("AIMv2-L LiT", "imagenet-1k", {"kind": "zero_shot", "templates": ["a {}"]}, "templates: 1, the paper's are not stated"),
    ("AIMv2 L", "aimv2_gqa_val", {"tiling": "3x3"}, "tiled: 3x3"), ("AIMv2 L", "aimv2_gqa_val", {"source_size": 112}, "pictures reduced to 112 px"),
    ("AIMv2 L", "aimv2_gqa_val", {"num_cut": 1200, "max_new_tokens": 1}, "1,200 answers cut at 1 tokens"),
    ("AIMv2 L", "aimv2_gqa_val", {"tiling": "1x1", "source_size": None, "num_cut": 0}, ""),
])  # fmt: skip
def test_what_was_not_done_as_in_the_paper_stands_beside_the_number(model, benchmark, more, words):
    (found,) = [beside for beside in beside_the_paper([row(model, benchmark, 60.0, **more)]) if model in beside.ours]
    (cell,) = [cell for cell in found.ours[model] if cell is not None]
    assert cell.delta is not None and (words in cell.note if words else cell.note == "")


def test_in_context_means_need_all_eight_benchmarks():
    rows = [row("AIMv2 L", name, 30.0 + i) for i, name in enumerate(IN_CONTEXT)] + [row("AIMv2 L", f"{name}_4shot", 60.0, shots=4) for name in IN_CONTEXT[:7]]
    (table,) = [b for b in beside_the_paper(rows) if b.table.name == "Table 8"]
    assert table.columns == ("0",) and table.ours["AIMv2 L"][0].score == pytest.approx(33.5) and table.ours["AIMv2 L"][0].delta == pytest.approx(33.5 - 39.6)
    (table,) = [b for b in beside_the_paper([*rows, row("AIMv2 L", f"{IN_CONTEXT[7]}_4shot", 60.0, shots=4)]) if b.table.name == "Table 8"]
    assert table.columns == ("0", "4") and table.ours["AIMv2 L"][1].score == 60.0
