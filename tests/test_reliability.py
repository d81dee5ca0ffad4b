"""Laws of a training run that is killed, stopped, moved or starved: short versions of benchmarks/reliability/.

The runs are the real command line on real shards, in processes forked from a warm parent (benchmarks/reliability/runs.py).
"""

from __future__ import annotations

import errno
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aimv2_vlm.config import Loop, Optimizer, PretrainRecipe, UserError  # noqa: E402
from aimv2_vlm.train import checkpoint  # noqa: E402
from aimv2_vlm.train.distributed import Placement  # noqa: E402
from benchmarks.reliability import elastic, kill, resume, signals, storage  # noqa: E402

pytestmark = [pytest.mark.xdist_group("reliability"), pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks and mounts")]


def faults(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["fault"]]


# ----------------------------------------------------------------------------------------------------- killed and stopped


def test_ten_kills_change_nothing(scenes_root, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(kill, "STEPS", 12)
    found = kill.kills(scenes_root, tmp_path / "kill", 10, 1, tmp_path / "kill.jsonl")
    assert sum(line["killed"] for line in found) == 10 and not faults(found)
    assert {line["kind"] for line in found if line["killed"]} == {"time", "operation"}
    assert found[-1]["phase"] == "finished"  # and compared with the undisturbed run


def test_any_step_and_any_workers_go_on_exactly(scenes_root, tmp_path) -> None:
    cases = [(stop, (0, 2)[stop % 2]) for stop in range(1, 11)]
    found = resume.trials(scenes_root, tmp_path / "resume", cases, 11, 0, tmp_path / "resume.jsonl")
    assert len(found) == 10 and not faults(found)


def test_sigterm_at_ten_moments_and_before_the_first_step(scenes_root, tmp_path) -> None:
    found = signals.trials(scenes_root, tmp_path / "signals", 10, 250, 0, tmp_path / "signals.jsonl")
    assert not faults(found)
    sent = [line for line in found if line["phase"] != "finished"]
    assert sum(line["when"] == "after" for line in sent) == 10 and sum(line["when"] == "before" for line in sent) == 1
    assert all(line["code"] == 75 for line in sent)


# ------------------------------------------------------------------------------------------------------ another topology


def test_worlds_read_one_order(scenes_root, tmp_path) -> None:
    found = elastic.order_trials(scenes_root, tmp_path / "elastic", 3, 0, 8, tmp_path / "elastic.jsonl")
    assert len(found) == 6 and not faults(found)  # three pairs, three chains


def test_one_two_one_processes_train_on_the_same_samples_with_the_same_losses(scenes_root, tmp_path) -> None:
    expected = elastic.undisturbed(scenes_root, tmp_path / "undisturbed")
    facts = elastic.real_trial(scenes_root, tmp_path / "ddp", "ddp", expected)
    assert not facts["fault"] and facts["deviation"] <= 2e-6


# ---------------------------------------------------------------------------------------------------------------- storage


@pytest.fixture(scope="module")
def sound(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return storage.undisturbed(scenes_root, tmp_path_factory.mktemp("sound") / "sound")


@pytest.mark.parametrize(("kind", "seed"), [("full", 0), ("full", 1), ("once", 0), ("once", 1), ("always", 0), ("small", 0),
                                            ("read-only", 0)])
def test_storage_that_fails_is_one_line_and_nothing_is_lost(kind, seed, sound, scenes_root, tmp_path) -> None:
    facts = storage.trial(kind, scenes_root, tmp_path / "run", random.Random(f"{kind} {seed}"), sound)
    if "impossible" in facts:
        pytest.skip(f"no private mount here: {facts['impossible']}")
    assert not facts["fault"]


def save(folder: Path, step: int, placement: Placement) -> None:
    checkpoint.save(folder, step, {"model.a": torch.full((40, 40), float(step))}, {}, placement, keep_last=2)


@pytest.mark.parametrize(("failures", "saved"), [(1, True), (2, True), (3, False)])
def test_a_refused_checkpoint_is_tried_a_few_times_from_the_start(failures, saved, tmp_path, monkeypatch, capsys) -> None:
    """The disk's own answer to fsync: after a failed one the pages may be gone, so everything is written again."""
    placement, left = Placement("single", "fp32"), [failures]
    save(tmp_path, 1, placement)
    sync = checkpoint.sync_tree

    def failing(folder: Path) -> None:
        if left[0]:
            left[0] -= 1
            for file in folder.glob("*.safetensors"):
                file.write_bytes(b"")  # what may be left of it
            raise OSError(errno.EIO, "Input/output error")
        sync(folder)

    monkeypatch.setattr(checkpoint, "sync_tree", failing)
    monkeypatch.setattr(checkpoint, "FIRST_PAUSE_S", 0.001)
    if saved:
        save(tmp_path, 2, placement)
    else:
        with pytest.raises(UserError, match="Input/output error.*previous one is intact"):
            save(tmp_path, 2, placement)
    path, _ = checkpoint.newest(tmp_path, placement)
    found = {"model.a": torch.zeros(40, 40)}
    checkpoint.load(path, found, placement)
    assert bool((found["model.a"] == (2 if saved else 1)).all())
    assert capsys.readouterr().err.count("trying again") == min(failures, checkpoint.WRITE_ATTEMPTS - 1)


def test_a_full_disk_is_not_tried_again(tmp_path, monkeypatch, capsys) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync_tree", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 1, Placement("single", "fp32"))
    assert "trying again" not in capsys.readouterr().err


def test_room_is_judged_by_what_the_run_will_write(tmp_path, monkeypatch) -> None:
    """4 of 6 layers are trained: a checkpoint holds their weights and two moments, `final/` every weight."""
    model = torch.nn.Sequential(*(torch.nn.Linear(100, 100, bias=False) for _ in range(6)))
    for layer in model[4:]:
        layer.requires_grad_(False)
    one, final, placement, folder = 3 * 160_000, 240_000, Placement("single", "fp32"), tmp_path / "run" / "checkpoints"

    def check(free: int, **loop: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, free))
        checkpoint.check_room(folder, model, 100, Loop(save_every=10, **loop), placement)

    check(3 * one + final)
    with pytest.raises(UserError, match=r"3 checkpoints of 0\.48 MB .* 0\.24 MB need 1\.68 MB more, but 1\.68 MB are free.*keep_last \(2\)"):
        check(3 * one + final - 1)
    check(2 * one + final, keep_last=1)
    folder.mkdir(parents=True)
    (folder / "step_00000010").mkdir()
    (folder / "step_00000010" / "model.safetensors").write_bytes(bytes(one))
    check(2 * one + final)  # what is there already is not needed again


def test_a_run_that_writes_few_checkpoints_needs_room_for_those(tmp_path, monkeypatch) -> None:
    model, placement = torch.nn.Linear(100, 100, bias=False), Placement("single", "fp32")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 160_000))
    checkpoint.check_room(tmp_path, model, 10, Loop(save_every=10, keep_last=5), placement)
    with pytest.raises(UserError, match="2 checkpoints"):
        checkpoint.check_room(tmp_path, model, 11, Loop(save_every=10, keep_last=5), placement)


# ----------------------------------------------------------------------------------------------------- data that goes away


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_cannot_be_read_any_more_stops_with_a_checkpoint(workers, tmp_path) -> None:
    from types import SimpleNamespace

    from aimv2_vlm.train.directory import RunDirectory
    from aimv2_vlm.train.loop import train
    from aimv2_vlm.train.optim import Schedule

    placement = Placement("single", "fp32")
    model = torch.nn.Linear(2, 1)
    objective = SimpleNamespace(weights={"text": 1.0}, logged={}, counts=lambda batch: {"text": 2, "samples": 2, "tokens": 2},
                                sums=lambda model, batch, device: {"text": model(batch["x"]).square().sum()}, flops=lambda model, batch: 0.0)

    def micro_batches(step: int) -> list[dict]:
        if step == 3:
            raise UserError("data source 'far': far/00007.tar: Connection refused")
        return [{"x": torch.full((2, 2), float(step)), "bad": []}]

    directory = RunDirectory(tmp_path, PretrainRecipe(out=str(tmp_path)))
    groups = [{"params": list(model.parameters()), "lr_scale": 1.0}]
    with pytest.raises(UserError, match=r"^data source 'far': far/00007\.tar: Connection refused$"):
        train(directory=directory, placement=placement, objective=objective, model=model, optimizer=torch.optim.AdamW(groups, fused=True),
              micro_batches=micro_batches, schedule=Schedule(Optimizer(steps=9, warmup_steps=0, batch_size=2)),
              loop=Loop(num_workers=workers, trackers=[], save_every=100), fingerprint={}, compare=lambda old, new: [])
    directory.close()
    state = checkpoint.newest(directory.checkpoints, placement)[1]
    assert state["step"] == 3 and state["stopped"] == "data cannot be read"
