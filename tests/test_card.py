"""The model card: true, publishable (no folder of this machine), readable by the hub's own class, and open to scores."""

import json

import pytest
from conftest import TINY_TUNING, run_cli
from huggingface_hub import ModelCard

from aimv2_vlm.config import ConversationSource, PairSource, PretrainRecipe, SftRecipe, UserError
from aimv2_vlm.train.card import add_scores, write_card

ROW = {"benchmark": "scenes_print", "split": "test", "metric": "anls", "score": 47.04, "interval": [44.0, 50.1], "num_questions": 672,
       "num_errors": 0, "complete": True, "tokens_per_picture": 96, "control": None}


def tuned(tmp_path, **changes):
    recipe = SftRecipe(out=str(tmp_path / "my_assistant"), licence="apache-2.0", **changes)
    recipe.encoder.path, recipe.llm.path, recipe.tiling.grid = "/home/someone/runs/l14/final", "lmsys/vicuna-7b-v1.5", "2x2"
    recipe.data.sources = [ConversationSource("/home/someone/data/llava.json", "/home/someone/data/images", "50%", licence="CC BY 4.0"), ConversationSource("own.json")]
    return recipe


REPORT = {"rejected": {"empty_answer": 33}, "bad_samples_in_training": 2,
          "sources": [{"path": "/home/someone/data/llava.json", "taken": 1500, "rows": 3000}, {"path": "own.json", "taken": 10, "rows": 43}]}
LAST = {"step": 900, "samples": 14_400, "loss": 0.5851}
PARTS = {"encoder": 309_000_000, "connector": 21_000_000, "decoder": 6_738_000_000}


def write(tmp_path, recipe, report, last, parts):
    (tmp_path / "data_report.json").write_text(json.dumps(report))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 9.0}) + "\n" + json.dumps(last) + "\n")
    (tmp_path / "final").mkdir()
    write_card(tmp_path / "final", recipe, parts)
    return tmp_path / "final"


def test_a_card_says_what_the_model_is_and_what_it_learned_from(tmp_path):
    final = write(tmp_path, tuned(tmp_path), REPORT, LAST, PARTS)
    card = ModelCard.load(final / "README.md")
    assert card.data.license == "apache-2.0" and card.data.base_model == ["lmsys/vicuna-7b-v1.5"] and card.data.pipeline_tag == "image-text-to-text"
    text = card.content
    for fact in ("# my_assistant", "encoder l14", "vicuna-7b-v1.5", "7,068.0 M parameters", "2x2 tiles", "llava.json, 50% | CC BY 4.0 | 1,500 of 3,000 |",
                 "own.json, all | not stated | 10 of 43 |", "empty_answer 33", "unreadable while training: 2", "900 steps, 14,400 samples; at the end loss 0.5851"):
        assert fact in text, fact
    assert "/home/someone" not in text and "path: …/l14/final" in text


def test_a_pretrained_encoders_card(tmp_path):
    recipe = PretrainRecipe(out="runs/l14")
    recipe.data.sources = [PairSource("/data/dfn/*.tar", name="dfn", weight=0.3, licence="CC BY 4.0")]
    final = write(tmp_path, recipe, {"samples": 24_000, "bad_samples_in_index": 3, "bad_samples_in_training": 1},
               {"step": 10, "samples": 80, "val_loss": 0.5, "val_text_loss": 0.25}, {"encoder": 2_700_000})
    card = ModelCard.load(final / "README.md")
    assert card.data.pipeline_tag == "image-feature-extraction" and card.data.license is None and card.data.base_model is None
    for fact in ("dfn, weight 0.3 | CC BY 4.0", "24,000 pairs; 4 could not be read", "held-out text loss 0.25", "2.7 M parameters"):
        assert fact in card.content, fact


def test_scores_take_the_place_of_older_ones_and_leave_the_rest(tmp_path):
    final = write(tmp_path, tuned(tmp_path), REPORT, LAST, PARTS)
    before = (final / "README.md").read_text()
    add_scores(final, [ROW | {"score": 1.0}])
    add_scores(final, [ROW, ROW | {"control": "blind", "score": 9.9}, ROW | {"benchmark": "scenes_objects", "complete": False, "num_errors": 2}])
    card = ModelCard.load(final / "README.md")
    assert "| scenes_print | test | anls | 47.0 | 44.0 to 50.1 | 672 | 96 |" in card.content and "47.0 (incomplete: 2 errors)" in card.content
    assert "9.9" not in card.content and "1.0 |" not in card.content
    results = card.data.eval_results
    assert [(r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in results] == [("scenes_print", "test", "anls", 47.04)]
    assert card.content.split("## Data")[1] == before.split("## Data")[1]


def test_a_folder_without_our_card_gets_no_scores(tmp_path):
    (tmp_path / "README.md").write_text("# somebody's model\n")
    with pytest.raises(UserError, match="no model card that aimv2-vlm wrote"):
        add_scores(tmp_path, [ROW])
    assert (tmp_path / "README.md").read_text() == "# somebody's model\n"


def test_a_run_writes_its_card_and_a_sweep_its_scores(scenes_root, tiny_encoder, tmp_path):
    card = ModelCard.load(tiny_encoder / "README.md")
    assert "6 steps, 48 samples" in card.content and str(scenes_root) not in card.content
    run_cli("sft", "demo_scenes_1x1", f"data_root={scenes_root}", f"encoder.path={tiny_encoder}", f"out={tmp_path / 'tuned'}", *TINY_TUNING, "optim.steps=2")
    run_cli("eval", "demo_scenes", f"data_root={scenes_root}", f"models=[{{path: {tmp_path / 'tuned' / 'final'}}}]", "benchmarks=[scenes_print]", "controls=[]",
            "train_conversations=[]", "limit=2", "max_new_tokens=2", f"out={tmp_path / 'eval'}", "write_cards=true")
    card = ModelCard.load(tmp_path / "tuned" / "final" / "README.md")
    assert "| scenes_print | " in card.content and card.data.eval_results[0].metric_type == "anls"
    assert "encoder" in card.content and "2 steps, 8 samples" in card.content
