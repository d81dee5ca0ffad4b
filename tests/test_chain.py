"""Shards -> encoder -> assistants -> benchmarks -> report, through the command line, at a size that takes a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_TUNING, run_cli

STOCK = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
answers = []
for question in json.loads(sys.argv[3]):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=Image.open(sys.argv[2]).convert("RGB"), text=prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12)
    answers.append(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
assert not any(name.startswith("aimv2_vlm") for name in sys.modules)
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def assistants(scenes_root: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("assistants")
    for grid in ("1x1", "2x2"):
        run_cli("sft", f"demo_scenes_{grid}", f"data_root={scenes_root}", f"encoder.path={tiny_encoder}", f"out={root / grid}",
                "optim.steps=8", *TINY_TUNING)
    return {grid: root / grid / "final" for grid in ("1x1", "2x2")}


@pytest.fixture(scope="module")
def evaluated(scenes_root: Path, assistants: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    models = [{"name": g, "path": str(p)} for g, p in assistants.items()]
    models.append({"name": "2x2 upsampled", "path": str(assistants["2x2"]), "source_size": 56})
    run_cli("eval", "demo_scenes", f"data_root={scenes_root}", f"out={out}", f"models={json.dumps(models)}", "max_new_tokens=8",
            "benchmarks=[scenes_print, scenes_choice]", "precision=fp32")
    return out


def test_every_cell_of_the_sweep_is_in_the_ledger_with_its_controls(evaluated):
    rows = [json.loads(line) for line in (evaluated / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(r["model"], r["benchmark"], r["control"]) for r in rows} == {
        (m, b, c) for m in ("1x1", "2x2", "2x2 upsampled") for b in ("scenes_print", "scenes_choice") for c in (None, "blind", "wrong_picture")}
    assert all(r["num_errors"] == 0 and r["num_questions"] > 0 and 0 <= r["score"] <= 100 for r in rows)
    tokens = {r["model"]: r["tokens_per_picture"] for r in rows}
    assert tokens["1x1"] < tokens["2x2"] == tokens["2x2 upsampled"]


def test_the_report_is_one_page_with_the_scores(evaluated):
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    assert "scenes_print" in page and "2x2 upsampled" in page and "data:image" in page


def test_an_evaluation_goes_on_and_a_finished_one_answers_nothing_again(evaluated, scenes_root, assistants):
    ledger = evaluated / "ledger.jsonl"
    whole = ledger.read_text(encoding="utf-8").splitlines()
    ledger.write_text("\n".join(whole[:-2]) + "\n" + whole[-2][: len(whole[-2]) // 2], encoding="utf-8")
    models = [{"name": g, "path": str(p)} for g, p in assistants.items()]
    models.append({"name": "2x2 upsampled", "path": str(assistants["2x2"]), "source_size": 56})
    done = run_cli("eval", "demo_scenes", f"data_root={scenes_root}", f"out={evaluated}", f"models={json.dumps(models)}", "max_new_tokens=8",
                   "benchmarks=[scenes_print, scenes_choice]", "precision=fp32")
    assert "2 to run" in done.stdout + done.stderr
    strip = lambda lines: [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]  # noqa: E731
    assert strip(ledger.read_text(encoding="utf-8").splitlines()) == strip(whole)


@pytest.mark.parametrize("grid", ["1x1", "2x2"])
def test_a_tuned_assistant_answers_the_same_without_this_package(grid, assistants, scenes_root):
    from PIL import Image

    from aimv2_vlm.evaluation.generation import Generator, load_assistant

    picture = next((scenes_root / "conversations" / "images").rglob("*.jpg"))
    questions = ["Which word is printed?\nAnswer the question using a single word or phrase.", "What color is the circle?"]
    done = subprocess.run([sys.executable, "-c", STOCK, str(assistants[grid]), str(picture), json.dumps(questions)],
                          capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    stock = json.loads(done.stdout.split("ANSWERS")[1])
    model, processor = load_assistant(assistants[grid], "fp32")
    ours = Generator(model, processor, batch_size=2, max_new_tokens=12).answer([([Image.open(picture).convert("RGB")], q) for q in questions])
    assert ours == stock


def test_chat_answers_about_a_picture(assistants, scenes_root, monkeypatch, capsys):
    from aimv2_vlm.serve import chat

    picture = next((scenes_root / "conversations" / "images").rglob("*.jpg"))
    lines = iter(["Which word is printed?", "/image nowhere.jpg", "/reset", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert chat.chat(str(assistants["1x1"]), str(picture), max_new_tokens=4) == 0
    shown = capsys.readouterr()
    assert "nowhere.jpg" in shown.err and len(shown.out.splitlines()) >= 2


def test_a_checkpoint_that_is_none_is_one_clear_line(tmp_path, monkeypatch):
    done = run_cli("chat", tmp_path / "nothing", check=False)
    assert done.returncode == 2 and "nothing" in done.stderr and "Traceback" not in done.stderr
