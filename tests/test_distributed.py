"""Laws of placement: every strategy is the single-process run, and reads every other one's checkpoints."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import distributed_worker as worker
import pytest
import torch
from safetensors.torch import load_file

from aimv2_vlm.config import UserError
from aimv2_vlm.train import checkpoint
from aimv2_vlm.train.distributed import Placement

STRATEGIES = list(worker.READS)
WORKER = Path(worker.__file__)
# One launch goes through all strategies: about a minute on idle cores, many on busy ones; one xdist worker pays for it.
pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("distributed")]
CURVE, GRADIENT = 2e-6, 1e-6  # largest deviation x max(1, loss); relative norm per tensor


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """What two processes wrote, going through all strategies in one launch."""
    folder = tmp_path_factory.mktemp("distributed")
    run = worker.Run("single")
    run.steps(0, worker.HALF, worker.BATCH)
    run.save(folder / "half_single", worker.HALF)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    command += [*STRATEGIES, "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = folder / "log.txt"
    with open(log, "w") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as launched:
        try:
            status = launched.wait(timeout=840)
        finally:
            launched.terminate()  # not kill: the launcher must take its processes with it
    text = log.read_text()
    log.unlink()
    assert status == 0, text[-4000:]
    return folder


@pytest.fixture(scope="module")
def single() -> SimpleNamespace:
    """The run in one process: curve, weights, gradient of one unclipped step."""
    run = worker.Run("single")
    validation = run.validation()
    curve = run.steps(0, 20, worker.BATCH)
    weights = {name: tensor.clone() for name, tensor in run.placement.full_state(run.model).items()}
    extra = run.steps(20, 21, worker.BATCH)
    return SimpleNamespace(
        curve=curve, weights=weights, gradient=gradient(worker.BATCH), validation=validation, extra=extra
    )


def gradient(size: int) -> dict[str, torch.Tensor]:
    run = worker.Run("single")
    run.steps(5, 6, size, clip=0.0)
    return {name: tensor.clone() for name, tensor in run.tensors().items() if name.startswith("exp_avg.")}


def assert_same_curve(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name in row.keys() - {"grad_norm"}:
            assert abs(row[name] - wanted[name]) <= CURVE * max(1, abs(wanted[name])), name
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


def assert_same_gradient(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert float((found[name] - wanted).norm()) <= GRADIENT * float(wanted.norm()), name


@pytest.fixture(params=STRATEGIES)
def result(request, out) -> SimpleNamespace:
    return SimpleNamespace(strategy=request.param, **json.loads((out / f"{request.param}.json").read_text()))


def test_curve_equals_single_process(result, single) -> None:
    assert any(row["grad_norm"] > worker.OPTIM.clip for row in single.curve)  # clipping is part of what is compared
    assert_same_curve(result.curve, single.curve)


def test_validation_equals_single_process(result, single) -> None:
    for name, value in single.validation.items():
        assert abs(result.validation[name] - value) <= CURVE * max(1, abs(value))


def test_final_weights_are_whole_and_equal(result, single, out) -> None:
    """Frozen ones and all, as one process writes them: with a learning rate x 8 on one group."""
    weights = load_file(out / f"final_{result.strategy}.safetensors")
    assert weights.keys() == single.weights.keys()
    for name, wanted in single.weights.items():
        assert weights[name].shape == wanted.shape
        assert float((weights[name] - wanted).norm()) <= 1e-4 * float(wanted.norm()), name


def test_nan_on_one_process_is_skipped_by_all(result, single) -> None:
    assert not math.isfinite(float(result.poisoned_norm))
    assert result.touched == []
    assert_same_curve(result.after_poison, single.extra)


def test_full_disk_of_one_process_is_an_error_on_all(result, out) -> None:
    assert len(result.disk_full) == 2
    assert all("File too large" in message for message in result.disk_full)
    assert list((out / f"full_{result.strategy}").iterdir()) == []


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_cut_gives_the_same_gradient(size, single) -> None:
    assert_same_gradient(gradient(size), single.gradient)


@pytest.mark.parametrize("size", worker.CUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_cut_gives_the_same_gradient_on_two_processes(strategy, size, out, single) -> None:
    run = worker.Run("single", spoiled=True)
    run.load(out / f"gradient_{strategy}_{size}")
    assert_same_gradient({n: t for n, t in run.tensors().items() if n.startswith("exp_avg.")}, single.gradient)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_single_process_goes_on_from_every_strategy(strategy, out, single) -> None:
    run = worker.Run("single", spoiled=True)
    state = run.load(out / f"half_{strategy}")
    assert state["strategy"] == strategy and state["step"] == worker.HALF
    assert_same_curve(run.steps(worker.HALF, 20, 4), single.curve[worker.HALF :])


@pytest.mark.parametrize(("strategy", "source"), worker.READS.items())
def test_strategy_goes_on_from_another(strategy, source, out, single) -> None:
    assert_same_curve(json.loads((out / f"{strategy}_from_{source}.json").read_text()), single.curve[worker.HALF :])


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_an_optimizer_in_the_hosts_memory_steps_the_same(strategy, out, single) -> None:
    """It goes on from another strategy's checkpoint, and a single process from its."""
    half = worker.HALF
    assert_same_curve(json.loads((out / f"{strategy}_offloaded.json").read_text()), single.curve[half : half + 4])
    run = worker.Run("single", spoiled=True)
    run.load(out / f"offloaded_{strategy}")
    assert_same_curve(run.steps(half + 4, half + 8, 4), single.curve[half + 4 : half + 8])


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_offloading_is_refused_where_nothing_offloads(strategy, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1" if strategy == "single" else "2")
    with pytest.raises(UserError, match="train.offload: optimizer goes with train.strategy: zero2 and zero3"):
        Placement(strategy, offload="optimizer")


def test_bf16_stays_near_fp32(result, single) -> None:
    for row, wanted in zip(result.bf16, single.curve, strict=False):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=2e-2)
        assert row["loss"] != wanted["loss"]


@pytest.fixture(scope="module")
def fp8() -> list[dict[str, float]]:
    return worker.Run("single", precision="fp8").steps(0, 4, worker.BATCH)


def test_fp8_follows_the_single_process(result, fp8) -> None:
    """A scale is of the pictures that are computed together, so micro-batches of another size round otherwise."""
    for row, wanted in zip(result.fp8, fp8, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-2) and row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.1)


@pytest.mark.parametrize("strategy", worker.COMPILED)
def test_a_compiled_model_takes_the_same_steps(strategy, out) -> None:
    """`train.compile` in bf16, inside DDP and block by block between the shards of FSDP2."""
    found = json.loads((out / f"{strategy}.json").read_text())
    assert found["compiled"]["graphs"] >= 1
    for row, wanted in zip(found["compiled"]["curve"], found["bf16"], strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5) and row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


def test_no_pickle_is_written(out) -> None:
    files = [path for path in out.rglob("*") if path.is_file()]
    assert files and {path.suffix for path in files} == {".safetensors", ".json"}


def test_shards_are_spread_over_processes(out) -> None:
    """Under every strategy both processes write about half of a checkpoint."""
    for strategy in STRATEGIES:
        [folder] = (out / f"half_{strategy}").glob(f"{checkpoint.PREFIX}*")
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        assert len(sizes) == 2 and max(sizes) < 2 * min(sizes), strategy


@pytest.mark.parametrize(("strategy", "world", "reason"), [
    ("single", "2", "2 processes were launched"), ("ddp", "1", "one process"), ("fsdp2", "1", "one process"),
    ("zero2", "1", "one process"), ("zero3", "1", "one process"),
])
def test_strategy_that_does_not_fit_the_launch_is_refused(strategy, world, reason, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=reason):
        Placement(strategy)


def test_plugin_of_accelerate_launch_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_DEEPSPEED"):
        Placement("single")
