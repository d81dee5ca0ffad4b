"""Laws of checkpoints: what is visible is whole, what is broken is passed over, what does not fit is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aimv2_vlm.config import UserError
from aimv2_vlm.train import checkpoint
from aimv2_vlm.train.distributed import Placement

KILLS = 10


@pytest.fixture(scope="module")
def placement() -> Placement:
    return Placement("single", "fp32")


def make_tensors(value: float = 0.0, rows: int = 300) -> dict[str, torch.Tensor]:
    """Odd shapes and a number without dimensions."""
    shapes = {"model.a.weight": (rows, 301), "model.b": (7,), "exp_avg.b": (1, 1, 5), "step.b": ()}
    return {name: torch.full(shape, value) for name, shape in shapes.items()}


def save(folder: Path, step: int, placement: Placement, keep_last: int = 2, **state: object) -> None:
    checkpoint.save(folder, step, make_tensors(step), {"samples": 8 * step, **state}, placement, keep_last)


def load_newest(folder: Path, placement: Placement) -> int:
    """Step of the newest checkpoint; every tensor must hold that number."""
    path, state = checkpoint.newest(folder, placement)
    tensors = make_tensors(-1.0)
    checkpoint.load(path, tensors, placement)
    assert all(bool((tensor == state["step"]).all()) for tensor in tensors.values())
    assert state["samples"] == 8 * state["step"]
    return state["step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------------------------------------------------------------- round trip


def test_tensors_come_back_bit_for_bit(tmp_path, placement) -> None:
    torch.manual_seed(0)
    saved = {name: torch.randn_like(tensor) for name, tensor in make_tensors().items()}
    checkpoint.save(tmp_path, 3, saved, {}, placement, keep_last=1)
    found = make_tensors()
    alias = found["model.b"]
    checkpoint.load(checkpoint.newest(tmp_path, placement)[0], found, placement)
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert torch.equal(alias, saved["model.b"])  # filled in place


def test_nothing_to_load(tmp_path, placement) -> None:
    assert checkpoint.newest(tmp_path / "absent", placement) is None


def test_no_pickle_is_written(tmp_path, placement) -> None:
    save(tmp_path, 1, placement)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}


def test_rotation_keeps_the_newest_complete_ones(tmp_path, placement) -> None:
    for step in range(1, 6):
        save(tmp_path, step, placement)
    assert names(tmp_path) == ["step_00000004", "step_00000005"]
    (tmp_path / "step_00000009").mkdir()  # newer by name, but nothing is in it
    (tmp_path / ".step_00000008.tmp").mkdir()
    save(tmp_path, 6, placement, keep_last=1)
    assert names(tmp_path) == ["step_00000006"]
    assert load_newest(tmp_path, placement) == 6


def test_saving_a_step_again_changes_only_its_words(tmp_path, placement) -> None:
    save(tmp_path, 1, placement, stopped="")
    [shard] = tmp_path.rglob("*.safetensors")
    before = shard.stat()
    save(tmp_path, 1, placement, stopped="SIGTERM")
    assert checkpoint.newest(tmp_path, placement)[1]["stopped"] == "SIGTERM"
    assert (shard.stat().st_ino, shard.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert load_newest(tmp_path, placement) == 1


# ---------------------------------------------------------------------------------------------------------------- kills


def save_forever(folder: Path, placement: Placement) -> None:
    torch.set_num_threads(1)
    found = checkpoint.newest(folder, placement)
    step = found[1]["step"] if found else 0
    while True:
        step += 1
        save(folder, step, placement)


def test_kill_at_any_moment_leaves_something_whole(tmp_path, placement) -> None:
    """kill -9 in save loops (shards, state, rename, rotation); the next process goes on by itself."""
    draw, last = random.Random(0), 1
    save(tmp_path, 1, placement)
    for _ in range(KILLS):
        writer = multiprocessing.get_context("fork").Process(target=save_forever, args=(tmp_path, placement))
        writer.start()
        while names(tmp_path)[-1] == f"step_{last:08d}":  # until it has saved once
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        step = load_newest(tmp_path, placement)
        assert step > last
        last = step
    save(tmp_path, last + 1, placement)
    assert names(tmp_path)[-1] == f"step_{last + 1:08d}"
    assert len(names(tmp_path)) <= 2  # no left-overs


# --------------------------------------------------------------------------------------------------- broken and refused


def break_shard(path: Path, how: str) -> None:
    [shard] = path.glob("*.safetensors")
    content = shard.read_bytes()
    if how == "cut off":
        shard.write_bytes(content[:-1])
    elif how == "no shard":
        shard.unlink()
    elif how == "broken header":
        shard.write_bytes(b"\xff" * 64 + content[64:])
    elif how == "no state":
        (path / "state.json").unlink()
    elif how == "half a state":
        text = (path / "state.json").read_text()
        (path / "state.json").write_text(text[: len(text) // 2])
    elif how == "deep state":
        (path / "state.json").write_text("[" * 100_000)
    elif how == "another step":
        path.rename(path.with_name("step_00000007"))
    else:
        text = (path / "state.json").read_text()
        (path / "state.json").write_text(text.replace('"format": 1', '"format": 99'))


@pytest.mark.parametrize("how", [
    "cut off", "no shard", "broken header", "no state", "half a state", "deep state", "another step", "another format",
])
def test_broken_checkpoint_is_passed_over_with_a_warning(how, tmp_path, placement, capsys) -> None:
    save(tmp_path, 1, placement)
    save(tmp_path, 2, placement)
    break_shard(tmp_path / "step_00000002", how)
    assert load_newest(tmp_path, placement) == 1
    assert "passed over" in capsys.readouterr().err
    save(tmp_path, 2, placement)  # the run reaches that step again
    assert load_newest(tmp_path, placement) == 2


def test_only_broken_ones_is_none(tmp_path, placement) -> None:
    save(tmp_path, 1, placement)
    break_shard(tmp_path / "step_00000001", "cut off")
    assert checkpoint.newest(tmp_path, placement) is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory, placement) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save(folder, 1, make_tensors(1.0, rows=2), {"samples": 8}, placement, keep_last=2)
    return folder


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.sampled_from(["state.json", "shard"]), place=st.integers(0, 1500), value=st.integers(0, 255))
def test_any_changed_byte_is_harmless(part, place, value, saved, placement, tmp_path) -> None:
    """A changed byte of state.json or of a shard's beginning: loaded, passed over or a UserError, nothing else."""
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    [file] = folder.rglob("state.json" if part == "state.json" else "*.safetensors")
    content = bytearray(file.read_bytes())
    content[place % len(content)] = value
    file.write_bytes(content)
    found = checkpoint.newest(folder, placement)
    if found is not None:
        try:
            checkpoint.load(found[0], make_tensors(rows=2), placement)
        except UserError as error:
            assert str(folder) in str(error)


def refused(change: str) -> tuple[dict[str, torch.Tensor], str]:
    tensors = make_tensors()
    if change == "missing":
        tensors["model.new"] = torch.zeros(2)
        return tensors, r"missing model\.new"
    if change == "unexpected":
        del tensors["model.b"]
        return tensors, r"unexpected model\.b"
    tensors["model.b"] = torch.zeros(8)
    return tensors, r"model\.b \[7\] against \[8\]"


@pytest.mark.parametrize("change", ["missing", "unexpected", "reshaped"])
def test_what_does_not_fit_is_refused_by_name(change, tmp_path, placement) -> None:
    save(tmp_path, 1, placement)
    tensors, message = refused(change)
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "step_00000001", tensors, placement)
    assert all(not tensor.any() for tensor in tensors.values())  # nothing was half loaded


# ------------------------------------------------------------------------------------------------------------ disk full


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The operating system refuses to write past this many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("limit", "words"), [(100_000, ""), (600_000, "x" * 700_000)], ids=["shards", "state"])
def test_refused_write_is_one_line_and_leaves_the_previous_one(limit, words, tmp_path, placement) -> None:
    save(tmp_path, 1, placement, keep_last=1)
    with pytest.raises(UserError, match=r"step_00000002.*File too large.*previous one is intact"), largest_file(limit):
        save(tmp_path, 2, placement, keep_last=1, words=words)
    assert names(tmp_path) == ["step_00000001"]
    assert load_newest(tmp_path, placement) == 1
    save(tmp_path, 2, placement, keep_last=1)  # with room again it goes on
    assert load_newest(tmp_path, placement) == 2


def test_folder_that_cannot_be_made_is_one_line(tmp_path, placement) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="could not be written"):
        save(tmp_path / "checkpoints", 1, placement)


def test_state_names_every_file_and_its_size(tmp_path, placement) -> None:
    save(tmp_path, 1, placement)
    folder = tmp_path / "step_00000001"
    files = json.loads((folder / "state.json").read_text())["files"]
    assert files == {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
