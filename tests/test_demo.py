"""The demo itself, at a size that takes a minute: every stage runs, the report is there, a second start does nothing again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from conftest import TINY_PRETRAINING, TINY_TUNING

from aimv2_vlm import demo

SMALL = {
    "pretrain": [*TINY_PRETRAINING, "optim.steps=4"],
    "sft": [*TINY_TUNING, "optim.steps=4"],
    "eval": ["limit=4", "max_new_tokens=6", "precision=fp32", "benchmarks=[scenes_objects, scenes_print]"],
}


def test_the_demo_goes_from_nothing_to_a_report_and_a_second_start_repeats_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PRETRAINING_SAMPLES", 40)
    monkeypatch.setattr(demo, "HELD_OUT_SAMPLES", 8)
    monkeypatch.setattr(demo, "TUNING_PICTURES", 12)
    monkeypatch.setattr(demo, "TEST_PICTURES", 6)
    out = tmp_path / "demo"
    assert demo.demo(str(out), overrides=SMALL) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("1x1", "2x2", "2x2 upsampled", "scenes_print")) and "http://" not in page.replace("http://www.w3.org", "")
    made = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".safetensors", ".tar", ".parquet", ".bin")}
    assert demo.demo(str(out), overrides=SMALL) == 0
    assert made == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".safetensors", ".tar", ".parquet", ".bin")}
    cells = [json.loads(line) for line in (out / "eval" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(cells) == 3 * 2 * 3 and {c["source_size"] for c in cells} == {None, 56}


def test_the_controls_train_and_ask_every_arm_of_every_seed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    controls = importlib.import_module("demo_controls")
    for name, value in {"PRETRAINING_SAMPLES": 40, "HELD_OUT_SAMPLES": 8, "TUNING_PICTURES": 12, "TEST_PICTURES": 6}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(controls, "HELD_OUT_STEPS", 2)
    monkeypatch.setattr(controls.Seed, "longer", lambda self: 3)  # at this size the right number is thousands
    overrides = {"pretrain": SMALL["pretrain"], "sft": SMALL["sft"], "eval": ["limit=3", "max_new_tokens=2", "precision=fp32"]}
    controls.run_seeds(tmp_path, [2], "dev", 2, overrides)
    found = controls.findings(tmp_path, [2])
    assert found["uses_picture"]["pretrained 2x2"]["questions"] == 12 and set(found["pretraining"]) == {"shuffled", "random"}
    runs = {place.parent.name: json.loads((place.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
            for place in (tmp_path / "seed_2").glob("*/recipe.yaml")}
    assert runs == {"pretrained": 4, "shuffled": 4, "sft_pretrained_1x1": 4, "sft_pretrained_2x2": 4, "sft_pretrained_2x2_upsampled": 4,
                    "held_out_300_pretrained": 2, "held_out_300_shuffled": 2, "held_out_300_random": 3}
    captions = {arm: "shuffle_captions: true" in (tmp_path / "seed_2" / arm / "recipe.yaml").read_text(encoding="utf-8") for arm in ("pretrained", "shuffled")}
    assert captions == {"pretrained": False, "shuffled": True}


def test_the_claims_of_the_demo_are_computed_from_paired_questions_of_every_seed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    controls = importlib.import_module("demo_controls")
    benchmarks = ("scenes_objects", "scenes_print", "scenes_choice", "scenes_heldout")
    right = {  # arm (and control) -> how many of a benchmark's eight questions it answers, by seed
        "pretrained 1x1": (6, 8), "pretrained 1x1/blind": (2, 2), "pretrained 1x1/wrong_picture": (1, 3), "pretrained 2x2": (8, 8),
        "pretrained 2x2/blind": (1, 1), "pretrained 2x2/wrong_picture": (0, 0), "pretrained 2x2_upsampled": (4, 4), "pretrained 2x2_reduced": (2, 2),
        "pretrained": (7, 7), "shuffled": (4, 4), "random": (5, 5),
    }
    for number, seed in enumerate((1, 2)):
        ledgers: dict[Path, list] = {}
        for arm, counts in right.items():
            model, _, control = arm.partition("/")
            folder = tmp_path / f"seed_{seed}" / ("eval" if "x" in model else f"eval_held_out_{controls.HELD_OUT_PICTURES}")
            folder.mkdir(parents=True, exist_ok=True)
            for benchmark in benchmarks:
                # cap heights in the scene: 4 and 8 px in one view
                rows = [{"id": str(i), "picture_id": f"p{i // 2}", "score": float(i < counts[number]), "print_height": (8.0, 16.0)[i % 2]} for i in range(8)]
                name = f"{arm}-{benchmark}.jsonl".replace("/", "-")
                (folder / name).write_text("\n".join(map(json.dumps, rows[::-1] if seed == 2 else rows)), encoding="utf-8")
                ledgers.setdefault(folder, []).append({"model": model, "benchmark": benchmark, "control": control or None, "samples": name, "majority_score": 12.5})
        for folder, rows in ledgers.items():
            (folder / "ledger.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = controls.findings(tmp_path, [1, 2])
    one_view, tiles = found["uses_picture"]["pretrained 1x1"], found["uses_picture"]["pretrained 2x2"]
    assert (one_view["first"], one_view["second"], one_view["points"], one_view["questions"]) == (87.5, 25.0, 62.5, 32)
    assert one_view["interval"][0] < 62.5 < one_view["interval"][1]
    assert tiles["points"] == 87.5 and tiles["majority"] == 12.5  # blind is stronger than the wrong picture, and both than the majority
    assert {arm: difference["points"] for arm, difference in found["tiling"].items()} == {
        "small print, 2x2_upsampled": 50.0, "large print, 2x2_upsampled": 50.0, "small print, 2x2_reduced": 75.0, "large print, 2x2_reduced": 75.0}
    assert {arm: gain["points"] for arm, gain in found["pretraining"].items()} == {"shuffled": 37.5, "random": 25.0}
    assert found["claims"]["held-out attribute, pretrained - stronger control >= 5"] == 25.0
    assert found["claims"]["uses the picture >= 25"] == 87.5
