"""The training loop through the command line: continuation, refusals, honest failure."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY_PRETRAINING, TINY_TUNING, run_cli
from safetensors.torch import load_file

from aimv2_vlm.config import PretrainRecipe
from aimv2_vlm.train import directory
from aimv2_vlm.train.directory import RunDirectory
from aimv2_vlm.train.metrics import TIMED


def weights(final: Path) -> dict[str, torch.Tensor]:
    return {f"{p.parent.name}/{p.name}/{k}": v for p in sorted(final.rglob("*.safetensors")) for k, v in load_file(p).items()}


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    renamed = {k.replace("final/", "", 1): v for k, v in b.items()}
    assert a and {k.replace("final/", "", 1) for k in a} == set(renamed)
    for name, tensor in a.items():
        assert torch.equal(tensor, renamed[name.replace("final/", "", 1)]), name


def pretraining(root: Path, out: Path, *more: str, steps: int = 8) -> list[str]:
    return ["pretrain", "demo_scenes", f"data_root={root}", f"out={out}", f"optim.steps={steps}", *TINY_PRETRAINING, *more]


def tuning(root: Path, encoder: Path, out: Path, *more: str, grid: str = "1x1") -> list[str]:
    return ["sft", f"demo_scenes_{grid}", f"data_root={root}", f"encoder.path={encoder}", f"out={out}", "optim.steps=6", *TINY_TUNING, *more]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def undisturbed(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_cli(*pretraining(scenes_root, out))
    return out


def test_a_run_leaves_everything_a_reader_needs(undisturbed):
    facts = json.loads((undisturbed / "environment.json").read_text(encoding="utf-8"))
    assert facts["versions"]["torch"] and facts["world"] == 1
    train = [r for r in rows(undisturbed) if "loss" in r]
    assert [r["step"] for r in train] == list(range(1, 9)) and train[-1]["samples"] == 64
    for row in train:
        assert row["loss"] == pytest.approx(row["text_loss"] + 0.4 * row["pixel_loss"], rel=1e-5)
    validated = [r for r in rows(undisturbed) if "val_pixel_loss" in r]
    assert [r["step"] for r in validated] == [4, 8] and all(r["val_mean_color_loss"] > 0 for r in validated)
    assert [p.name for p in sorted((undisturbed / "checkpoints").iterdir())] == ["step_00000006", "step_00000008"]
    assert not list(undisturbed.rglob("*.pt")) and not list(undisturbed.rglob("*.bin")) and not list(undisturbed.rglob("*.pkl"))


def test_final_opens_with_plain_automodel_as_the_trained_encoder(undisturbed):
    from transformers import AutoImageProcessor, AutoModel

    from aimv2_vlm.models.pretraining import AIMv2ForPreTraining

    model, info = AutoModel.from_pretrained(undisturbed / "final", output_loading_info=True)
    assert type(model).__name__ == "Aimv2VisionModel" and not info["missing_keys"] and not info["unexpected_keys"]
    trained = AIMv2ForPreTraining.from_pretrained(undisturbed / "final").encoder.state_dict()
    assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())
    processor = AutoImageProcessor.from_pretrained(undisturbed / "final")
    assert processor.image_mean == pytest.approx([0.485, 0.456, 0.406])


def test_a_key_that_is_newer_than_the_run_counts_as_its_default(scenes_root, tmp_path):
    out = tmp_path / "run"
    run_cli(*pretraining(scenes_root, out, "train.stop_after=3"))
    saved = out / "recipe.yaml"
    older = [line for line in saved.read_text(encoding="utf-8").splitlines() if line.strip() != "schedule: cosine"]
    saved.write_text("\n".join(older), encoding="utf-8")
    assert run_cli(*pretraining(scenes_root, out, "train.stop_after=4")).returncode == 0
    saved.write_text("\n".join(older), encoding="utf-8")
    refused = run_cli(*pretraining(scenes_root, out, "optim.schedule=constant"), check=False)
    assert refused.returncode == 2 and "optim.schedule: 'cosine' -> 'constant'" in refused.stderr


def test_a_run_in_fp8_goes_on_bit_for_bit_and_leaves_ordinary_weights(scenes_root, tmp_path):
    """Its linear layers are torch's own again in final/, and another precision does not go on from its checkpoints."""
    keys = ["precision=fp8", "optim.steps=4", "train.validate_every=2"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    told = run_cli(*pretraining(scenes_root, whole, *keys))
    assert "fp8: 14 linear layers of the blocks, the rest in bf16; emulated on this CPU, and slower than fp32" in told.stdout + told.stderr
    run_cli(*pretraining(scenes_root, out, *keys, "train.stop_after=3"))
    refused = run_cli(*pretraining(scenes_root, out, *keys, "precision=bf16"), check=False)
    assert refused.returncode == 2 and "precision: 'fp8' -> 'bf16'" in refused.stderr
    run_cli(*pretraining(scenes_root, out, *keys))
    assert_same_weights(whole / "final", out / "final")
    model = transformers.AutoModel.from_pretrained(whole / "final")
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}


def test_captions_cut_by_the_context_are_counted_across_a_stop(scenes_root, tmp_path):
    out, keys = tmp_path / "run", ["text.context_length=2", "optim.steps=4"]
    run_cli(*pretraining(scenes_root, out, *keys, "train.stop_after=2"))
    run_cli(*pretraining(scenes_root, out, *keys))
    assert [r["truncated"] for r in rows(out) if "samples" in r] == [8, 16, 24, 32]  # every embedded caption has more than one word


@pytest.mark.parametrize("workers", [0, 2])
def test_stopping_and_going_on_gives_the_same_weights_bit_for_bit(undisturbed, scenes_root, tmp_path, workers):
    out = tmp_path / "run"
    run_cli(*pretraining(scenes_root, out, "train.stop_after=5", f"train.num_workers={workers}"))
    assert not (out / "final").exists()
    run_cli(*pretraining(scenes_root, out, f"train.num_workers={2 - workers}"))
    assert_same_weights(undisturbed / "final", out / "final")
    strip = lambda run: [{k: v for k, v in r.items() if k not in TIMED} for r in rows(run)]  # noqa: E731
    assert strip(undisturbed) == strip(out)


def test_kill_9_at_random_moments_never_changes_the_outcome(undisturbed, scenes_root, tmp_path):
    out, draws = tmp_path / "run", random.Random(5)
    command = [sys.executable, "-m", "aimv2_vlm", *pretraining(scenes_root, out, "train.save_every=1")]
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = draws.randint(kills, 6)
        deadline = time.monotonic() + 280
        while process.poll() is None and time.monotonic() < deadline:
            if len(rows(out)) > wanted if (out / "metrics.jsonl").exists() else False:
                time.sleep(draws.random() * 0.05)
                break
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if (out / "final").exists():
            break
    assert kills
    run_cli(*pretraining(scenes_root, out, "train.save_every=1"))
    assert_same_weights(undisturbed / "final", out / "final")


def test_sigterm_saves_within_a_step_and_leaves_with_its_own_exit_code(scenes_root, tmp_path):
    out = tmp_path / "run"
    command = pretraining(scenes_root, out, "train.save_every=100000", "train.validate_every=100000", steps=20_000)
    process = subprocess.Popen([sys.executable, "-m", "aimv2_vlm", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not ((out / "metrics.jsonl").exists() and rows(out)):
        time.sleep(0.005)
    seen = len(rows(out))
    process.send_signal(signal.SIGTERM)
    _, words = process.communicate(timeout=200)
    assert process.returncode == 75, words
    (saved,) = (out / "checkpoints").iterdir()
    state = json.loads((saved / "state.json").read_text(encoding="utf-8"))
    assert state["stopped"] == "SIGTERM" and state["step"] == len(rows(out)) >= seen
    done = run_cli(*command, f"train.stop_after={state['step'] + 1}")
    assert f"going on from step {state['step']}" in done.stderr


def test_a_finished_run_says_so_and_trains_nothing(undisturbed, scenes_root):
    before = os.stat(undisturbed / "metrics.jsonl").st_mtime_ns
    done = run_cli(*pretraining(scenes_root, undisturbed))
    assert "finished" in done.stderr and os.stat(undisturbed / "metrics.jsonl").st_mtime_ns == before


def test_a_changed_recipe_is_refused_naming_the_keys_and_restart_begins_anew(undisturbed, scenes_root, tmp_path):
    out = tmp_path / "run"
    run_cli(*pretraining(scenes_root, out, "train.stop_after=2"))
    done = run_cli(*pretraining(scenes_root, out, "optim.lr=0.5"), check=False)
    assert done.returncode == 2 and "optim.lr" in done.stderr and "--restart" in done.stderr and "Traceback" not in done.stderr
    run_cli(*pretraining(scenes_root, out, "optim.lr=0.003", "--restart"))
    assert (out / "final").exists()


def test_restart_removes_no_folder_that_is_no_run(scenes_root, tmp_path):
    thesis = tmp_path / "home" / "thesis" / "draft.txt"
    thesis.parent.mkdir(parents=True)
    thesis.touch()
    refused = run_cli(*pretraining(scenes_root, tmp_path / "home"), "--restart", check=False)
    assert refused.returncode == 2 and thesis.exists()
    assert "--restart removes what a run left, but this folder holds thesis and no environment.json of a run; choose another out=, or empty it" in refused.stderr


def test_a_start_that_was_cut_short_anywhere_leaves_a_folder_that_restarts(tmp_path, monkeypatch):
    """Whatever the order in which a file system lists a folder, a run's mark goes last; half a mark is none."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".environment.json.tmp").touch()
    RunDirectory(tmp_path / "run", PretrainRecipe(), restart=True).close()
    (tmp_path / "run" / "checkpoints" / "step_1").mkdir(parents=True)
    listed = Path.iterdir

    def refuse(place, *_, **__):
        raise OSError(5, "Input/output error", str(place))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda self: iter(sorted(listed(self), key=lambda entry: entry.name != "environment.json")))
        patch.setattr(directory.shutil, "rmtree", refuse)
        with pytest.raises(OSError):
            RunDirectory(tmp_path / "run", PretrainRecipe(), restart=True)
    assert (tmp_path / "run" / "checkpoints").exists()
    RunDirectory(tmp_path / "run", PretrainRecipe(), restart=True).close()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("name", ["recipe.yaml", "tokenizer/mine.txt", "final/model.safetensors"])
def test_nothing_is_written_over_that_no_run_wrote(scenes_root, tmp_path, name, restart):
    """A recipe of one's own beside one's own files, with out= in the same folder."""
    own = tmp_path / "project" / name
    own.parent.mkdir(parents=True)
    own.write_text("# mine\nseed: 3\n", encoding="utf-8")
    refused = run_cli(*pretraining(scenes_root, tmp_path / "project"), *["--restart"] * restart, check=False)
    assert refused.returncode == 2 and f"{name.split('/')[0]}" in refused.stderr and "choose another out=" in refused.stderr
    assert own.read_text(encoding="utf-8") == "# mine\nseed: 3\n"


def test_changed_data_is_refused_naming_the_shard(scenes_root, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(scenes_root / "shards", data / "shards")
    shutil.copytree(scenes_root / "held_out", data / "held_out")
    run_cli(*pretraining(data, out, "train.stop_after=2"))
    shutil.copy(data / "shards" / "00001.tar", data / "shards" / "00000.tar")
    (data / "shards" / "00000.tar.index.json").unlink(missing_ok=True)
    done = run_cli(*pretraining(data, out), check=False)
    assert done.returncode == 2 and "00000" in done.stderr and "Traceback" not in done.stderr


def test_added_shards_and_changed_ones_are_taken_when_asked_for(scenes_root, tmp_path):
    """append: at the position reached in the order of all samples; restart: at the first sample of the new data."""
    from aimv2_vlm.train import run

    data, out, seen = tmp_path / "data", tmp_path / "run", []
    (data / "shards").mkdir(parents=True)
    shutil.copytree(scenes_root / "held_out", data / "held_out")
    for name in ("00000.tar", "00001.tar"):
        shutil.copy(scenes_root / "shards" / name, data / "shards")

    class Watched(run.PairSteps):
        def __call__(self, step: int) -> list[dict]:
            seen.append(step)
            return super().__call__(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "PairSteps", Watched)
        run_cli(*pretraining(data, out, "train.stop_after=2"))
        shutil.copy(scenes_root / "shards" / "00002.tar", data / "shards")
        done = run_cli(*pretraining(data, out), check=False)
        assert done.returncode == 2 and "00002.tar added" in done.stderr and "data.changed=append" in done.stderr
        done = run_cli(*pretraining(data, out, "data.changed=append", "train.stop_after=3"))
        assert "00002.tar added" in done.stderr + done.stdout and seen == [0, 1, 2]
        shutil.copy(scenes_root / "shards" / "00001.tar", data / "shards" / "00000.tar")
        done = run_cli(*pretraining(data, out, "data.changed=append"), check=False)
        assert done.returncode == 2 and "shard 00000.tar: " in done.stderr and seen == [0, 1, 2]
        done = run_cli(*pretraining(data, out, "data.changed=restart", "train.stop_after=5"))
        assert "at the first sample of the new data" in done.stderr + done.stdout and seen == [0, 1, 2, 0, 1]
        run_cli(*pretraining(data, out))  # goes on in that order
    assert seen == [0, 1, 2, 0, 1, 2, 3, 4] and [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 9))


# ------------------------------------------------------------------------------------------------------------- cooldowns


def test_a_cooldown_goes_on_with_the_token_ids_of_its_run_on_other_data(undisturbed, scenes_root, tmp_path):
    checkpoint = undisturbed / "checkpoints" / "step_00000006"
    cooldown = [f"optim.cooldown.checkpoint={checkpoint}", "optim.cooldown.fraction=0.34", "data.changed=restart"]
    (data := tmp_path / "data").mkdir()
    (data / "held_out").symlink_to(scenes_root / "held_out")
    (data / "shards").symlink_to(scenes_root / "held_out")  # its captions would train another tokenizer
    run_cli(*pretraining(data, tmp_path / "run", *cooldown))
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == (undisturbed / "tokenizer.model").read_bytes()
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [7, 8]
    run_cli(*pretraining(data, tmp_path / "own", "train.stop_after=1"))
    own = tmp_path / "own" / "tokenizer.model"
    assert own.read_bytes() != (undisturbed / "tokenizer.model").read_bytes()
    for key, said in ((f"text.tokenizer={own}", "`train` takes that one"), ("image.mean=[0.1, 0.2, 0.3]", "image.mean"), ("objective.pixel_weight=0.7", "objective.pixel_weight")):
        done = run_cli(*pretraining(data, tmp_path / "other", *cooldown, key), check=False)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


# ------------------------------------------------------------------------------------------------------- pictures packed


def test_a_folder_of_pictures_is_packed_once_and_what_is_left_out_is_counted(tmp_path):
    from aimv2_vlm.data import scenes

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    table = []
    for number in range(20):
        scene = scenes.make_scene("train", number, "detail")
        (pictures / f"{number}.jpg").write_bytes(scenes.encode_jpeg(scenes.render(scene)))
        table.append({"image": f"{number}.jpg", "caption": scenes.sentence(scene), "split": "val" if number >= 16 else "train"})
    (pictures / "captions.jsonl").write_text("\n".join(map(json.dumps, table)))
    (pictures / "3.jpg").unlink()

    def command(out: str, *more: str) -> list[str]:
        return ["pretrain", "continue_pretraining", f"data_root={pictures}", f"out={tmp_path / out}", "optim.steps=3", "encoder.path=null", *TINY_PRETRAINING,
                "encoder.position_embedding=learned", "text.vocab_size=100", f"data.sources.0.path={tmp_path}/packed/train/*.tar",
                f"data.validation.0.path={tmp_path}/packed/val/*.tar", "data.validation_samples=4", *more]

    done = run_cli(*command("a"), check=False)
    assert done.returncode == 2 and "1 of 16 rows could not be packed" in done.stderr and "3.jpg" in done.stderr
    run_cli(*command("a", "data.max_bad_fraction=0.1"))
    report = json.loads((tmp_path / "a" / "data_report.json").read_text(encoding="utf-8"))
    assert report["samples"] == 15 and report["left_out_by_packing"]["mine"]["rows"] == 1 and report["left_out_by_packing"]["mine_val"]["rows"] == 0
    # other pictures under the same name, and shards that nobody packed, are refused; nothing is removed
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    done = run_cli(*command("b", f"data_root={other}", "data.max_bad_fraction=0.1"), check=False)
    assert done.returncode == 2 and "packed from something else" in done.stderr and str(other) in done.stderr
    (tmp_path / "packed" / "train" / "data_report.json").unlink()
    done = run_cli(*command("c"), check=False)
    assert done.returncode == 2 and "holds shards already" in done.stderr and (tmp_path / "packed" / "train" / "00000.tar").exists()
    done = run_cli(*command("c", f"data.sources.0.path=[{tmp_path}/x/*.tar]"), check=False)
    assert done.returncode == 2 and "pack makes the shards of one local folder" in done.stderr


def test_two_processes_cannot_work_in_one_run_directory(scenes_root, tmp_path):
    import fcntl

    out = tmp_path / "run"
    out.mkdir()
    with open(out / ".lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_cli(*pretraining(scenes_root, out), check=False)
    assert done.returncode == 2 and "working in this run directory" in done.stderr


def test_missing_shards_are_one_clear_line(tmp_path):
    done = run_cli(*pretraining(tmp_path / "nowhere", tmp_path / "run"), check=False)
    assert done.returncode == 2 and "nowhere" in done.stderr and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


def test_an_undecodable_picture_is_a_named_hole_and_too_many_stop_the_run(scenes_root, tmp_path):
    from aimv2_vlm.data.shards import write_shards

    def shards(folder: Path, num_bad: int) -> None:
        from aimv2_vlm.data import scenes

        good = [scenes.encode_jpeg(scenes.render(scenes.make_scene("train", i, "detail"))) for i in range(8)]
        pictures = [good[i % 8] if i >= num_bad else good[i % 8][:300] for i in range(1200)]
        write_shards(({"key": f"k{i:05d}", "image_bytes": p, "ext": "jpg", "caption": f"caption {i % 7}", "json": {}}
                      for i, p in enumerate(pictures)), folder, 600)

    for name, num_bad in (("few", 3), ("many", 60)):
        shards(tmp_path / name / "shards", num_bad)
        shutil.copytree(scenes_root / "held_out", tmp_path / name / "held_out")
    more = ["optim.batch_size=400", "optim.micro_batch_size=200", "data.sources.0.caption=txt", "train.log_every=1", "data.validation=[]"]
    run_cli(*pretraining(tmp_path / "few", tmp_path / "a", *more, steps=3))
    report = json.loads((tmp_path / "a" / "data_report.json").read_text(encoding="utf-8"))
    assert report["bad_samples_in_training"] == 3 and sorted(line.split(":")[1].strip() for line in report["named"]) == ["k00000", "k00001", "k00002"]
    done = run_cli(*pretraining(tmp_path / "many", tmp_path / "b", *more, steps=6), check=False)
    assert done.returncode == 2 and "max_bad_fraction" in done.stderr and not (tmp_path / "b" / "final").exists()


# ------------------------------------------------------------------------------------------------------------------ tuning


@pytest.mark.parametrize("grid", ["1x1", "2x2"])
def test_tuning_goes_on_bit_for_bit_and_its_features_are_made_once(scenes_root, tiny_encoder, tmp_path, grid):
    run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "a", grid=grid))
    run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "b", "train.stop_after=3", grid=grid))
    made = os.stat(tmp_path / "b" / "features" / "features.bin").st_mtime_ns
    run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "b", grid=grid))
    assert os.stat(tmp_path / "b" / "features" / "features.bin").st_mtime_ns == made
    assert_same_weights(tmp_path / "a" / "final", tmp_path / "b" / "final")
    tuned = weights(tmp_path / "a" / "final")
    encoder = load_file(tiny_encoder / "model.safetensors")
    for name, tensor in encoder.items():
        (kept,) = [v for k, v in tuned.items() if k.endswith(f"vision_tower.{name}")]
        assert torch.equal(kept, tensor), name  # the encoder is frozen


@pytest.fixture
def spawning():
    """Loader workers begin as they do on macOS: sent everything they need, sharing nothing."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_cached_features_train_the_same_as_fresh_ones_and_workers_may_be_spawned(scenes_root, tiny_encoder, tmp_path, spawning):
    for name, workers in (("on", 0), ("off", 1)):
        run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / name, f"encoder.cache={name}", f"train.num_workers={workers}"))
    a, b = rows(tmp_path / "on"), rows(tmp_path / "off")
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], abs=1e-5)


def test_a_context_too_short_for_the_picture_is_refused_before_training(scenes_root, tiny_encoder, tmp_path):
    done = run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "a", "llm.max_positions=16", grid="2x2"), check=False)
    assert done.returncode == 2 and "positions" in done.stderr and not (tmp_path / "a" / "checkpoints").exists()


def test_broken_rows_are_counted_and_named(scenes_root, tiny_encoder, tmp_path):
    good = json.loads((scenes_root / "conversations" / "conversations.json").read_text(encoding="utf-8"))
    broken = [{"id": "empty", "image": good[0]["image"], "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": " "}]}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(good + broken), encoding="utf-8")
    run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "a", f"data.sources.0.path={path}", "encoder.cache=off", "data.max_bad_fraction=0.1"))
    report = json.loads((tmp_path / "a" / "data_report.json").read_text(encoding="utf-8"))
    assert report["rows"] == len(good) + 1 and report["good"] == len(good) and sum(report["rejected"].values()) == 1
