"""The comparisons of pre-training (benchmarks/objectives.py, benchmarks/native_resolution.py) at a size that takes seconds, and the pool they run in."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY_PRETRAINING

from aimv2_vlm.recipe import load_recipe

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    """The drivers as modules, their result lines going to a folder of the test's own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("record"), "RESULTS", tmp_path / "results")
    return importlib.import_module


KEYS = [key for key in TINY_PRETRAINING if not key.startswith(("train.validate_every", "train.save_every", "train.trackers", "optim.warmup_steps", "optim.batch_size"))]
PROBE = {"epochs": 1.0, "warmup_steps": 0}
COUNTS = {"train": 40, "judged": 12}


def test_objectives_compares_arms_at_equal_samples_and_equal_operations_and_goes_on_after_a_stop(benchmarks, scenes_root, tmp_path):
    objectives, out = benchmarks("objectives"), tmp_path / "out"
    arguments = argparse.Namespace(out=out, steps=4, recorded=False, seeds=[1], arms=["aimv2", "captioning prefix", "captions from a third", "half resolution first"],
                                   tasks=["texture"], budgets=[1.0, 0.5], figure4=[0.5], keys=KEYS, jobs=2, split="dev")
    lines = objectives.run(arguments, COUNTS, (1e-3,), PROBE, scenes_root)
    rates, comparisons = ([line for line in lines if line["name"].startswith("objectives, learning rates") == chosen] for chosen in (True, False))
    assert [line["name"] for line in comparisons] == [
        "objectives, equal samples", "objectives, equal operations, 1 of the budget", "objectives, equal operations, 0.5 of the budget", "objectives, Figure 4, 0.5 of the samples"]
    samples, operations, half, figure4 = comparisons
    assert lines[:2] == [rates[0], samples] and rates[0]["lr"] == dict.fromkeys(arguments.arms, 1e-3) == samples["lr"]
    # a learning rate is chosen once for each arm at each length, by runs of that length
    lengths = [(arm, *steps) for line in rates for arm, steps in line["steps"].items()]
    assert len(lengths) == len(set(lengths)) and set(lengths) == {(arm, *steps) for line in comparisons for arm, steps in line["steps"].items()}
    assert {place.parent.name for place in out.glob("rates/*/stage_1")} == {f"{objectives.place_of(arm, steps)} 0.001" for arm, *steps in lengths}
    assert set(operations["table"]) == set(samples["table"]) == set(half["table"])
    assert samples["steps"]["aimv2"] == [4] and len(samples["steps"]["half resolution first"]) == 2 and figure4["steps"]["aimv2"] == [2]
    # a captioning arm is cheaper a step, so it gets more of them for as many operations
    assert samples["tflop"]["captioning prefix"] <= samples["tflop"]["aimv2"]
    assert operations["steps"]["captioning prefix"][0] >= samples["steps"]["captioning prefix"][0] and operations["steps"]["aimv2"] == [4]
    assert set(samples["table"]["aimv2"]["texture"]) == {"accuracy"}
    row = samples["table"]["captions from a third"]["texture"]
    assert row["interval"][0] <= row["minus_captioning_prefix"] <= row["interval"][1] and row["told_apart"] == (row["interval"][0] > 0 or row["interval"][1] < 0)
    assert "minus_aimv2" in samples["table"]["half resolution first"]["texture"]
    assert "pre-training: finished" in (out / "seed_1" / "aimv2 4" / "log.txt").read_text(encoding="utf-8")
    trained = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert json.loads(json.dumps(objectives.run(arguments, COUNTS, (1e-3,), PROBE, scenes_root))) == json.loads(json.dumps(lines))
    assert trained == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    written = [json.loads(line)["name"] for line in (tmp_path / "results" / "objectives.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == [line["name"] for line in lines]  # once, though the study was started twice
    # what is recorded with the same settings is taken from there, on another machine too; with others it is not
    elsewhere = argparse.Namespace(**vars(arguments) | {"out": tmp_path / "elsewhere", "recorded": True})
    again = objectives.run(elsewhere, COUNTS, (1e-3,), PROBE, scenes_root)
    assert [{k: v for k, v in line.items() if k not in ("machine", "versions")} for line in again] == json.loads(json.dumps(lines))
    assert not list(elsewhere.out.rglob("*.safetensors"))
    asked = {key: samples[key] for key in ("name", "seeds", "lr")}
    assert objectives.recorded("objectives", asked)["table"] == samples["table"] and objectives.recorded("objectives", asked | {"seeds": [2]}) is None
    with pytest.raises(SystemExit, match="about.json: these labelled pictures are other ones"):
        objectives.run(arguments, COUNTS | {"judged": 13}, (1e-3,), PROBE, scenes_root)


@pytest.mark.parametrize(("trunk", "times"), [(2, 1), (0, 2)])
def test_native_resolution_fills_every_cell_of_its_grid(trunk, times, benchmarks, scenes_root, tmp_path):
    native = benchmarks("native_resolution")
    keys = [key for key in KEYS if not key.startswith(("image.size", "optim.micro_batch_size"))]
    arguments = argparse.Namespace(out=tmp_path / "out", trunk=trunk, steps=2, seeds=[1], tasks=["texture"], keys=keys, jobs=2, split="dev", native_times=times)
    line = native.run(arguments, COUNTS, (1e-3,), PROBE, scenes_root)
    rows = native.FROM_TRUNK if trunk else native.FROM_SCRATCH
    assert line["trunk_steps"] == trunk and line["name"].endswith("from one encoder" if trunk else "from scratch")
    assert {row: set(cells) for row, cells in line["grid"]["texture"].items()} == {row: {"56", "112", "native"} for row in rows}
    assert {other: set(cells) for other, cells in line["native_minus"]["texture"].items()} == {row: {"56", "112", "native"} for row in rows if row != "native"}
    assert all(cell["interval"][0] <= cell["points"] <= cell["interval"][1] for cells in line["native_minus"]["texture"].values() for cell in cells.values())
    for row in rows:
        longer = times if row == "native" else 1
        run = tmp_path / "out" / "seed_1" / (row if longer == 1 else f"{row} x{longer}") / "run"
        assert json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["step"] == 1
        recipe = load_recipe("pretrain", str(run / "recipe.yaml"))
        assert (recipe.encoder.path, recipe.decoder.path) == ((f"{tmp_path}/out/trunks/seed_1/run/final",) * 2 if trunk else (f"{run.parent}/start", None))
        assert recipe.optim.steps >= 2 * longer
        assert recipe.encoder.position_embedding == ("learned" if not trunk and row in ("fixed 56", "fixed 112") else "sincos")
    spent = {row: native.patches_a_step(*rows[row]) for row in rows}
    assert spent.pop("native") == pytest.approx(512, rel=0.06) and set(spent.values()) == {512}


def test_arms_of_another_size_begin_from_the_same_tensors(benchmarks, tmp_path):
    from aimv2_vlm.models.encoder import POSITIONS, load_encoder
    from aimv2_vlm.train.run import build_pretraining_model, seeded

    objectives = benchmarks("objectives")
    drawn = seeded(3, lambda: build_pretraining_model(load_recipe("pretrain", "mini_aimv2", ["data_root=/"]), 400)).encoder.state_dict()
    learned = load_encoder(objectives.starting_encoder(tmp_path / "learned", 3, [])).state_dict()
    assert learned.keys() == drawn.keys() and all(torch.equal(learned[name], drawn[name]) for name in drawn)
    sincos = load_encoder(objectives.starting_encoder(tmp_path / "sincos", 3, [], "sincos")).state_dict()
    assert sincos.keys() == drawn.keys() - {POSITIONS} and all(torch.equal(sincos[name], drawn[name]) for name in sincos)
    assert not torch.equal(load_encoder(objectives.starting_encoder(tmp_path / "other", 4, [])).state_dict()[POSITIONS], drawn[POSITIONS])


def test_a_rate_is_chosen_by_the_least_finite_loss_with_a_worse_one_on_both_sides(benchmarks):
    objectives, asked = benchmarks("objectives"), []

    def losses_of(points):
        asked.extend(points)
        best = {"inside": 2.0, "above": 16.0, "below": 0.5}
        return [None if rate > 20 else abs(math.log(rate / best[arm])) for arm, rate in points]

    found = objectives.choose_rates(losses_of, ["inside", "above", "below"], (1.0, 2.0, 4.0))
    assert {arm: next(iter(losses)) for arm, losses in found.items()} == {"inside": 2.0, "above": 16.0, "below": 0.5}
    assert set(found["inside"]) == {1.0, 2.0, 4.0} and set(found["above"]) == {1.0, 2.0, 4.0, 8.0, 16.0, 32.0} and set(found["below"]) == {0.25, 0.5, 1.0, 2.0, 4.0}
    assert found["above"][32.0] is None and len(asked) == len(set(asked)) == 14
    with pytest.raises(SystemExit, match=r"b: the held-out loss is not finite at any of the learning rates \[1.0, 2.0\]"):
        objectives.choose_rates(lambda points: [None] * len(points), ["b"], (1.0, 2.0))


POOL = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
from pool import Pool

def work(number, seconds, fail):
    print("working on", number, flush=True)
    begun = time.time()
    if seconds > 5:
        Path(sys.argv[1], f"waiting_{{number}}").touch()
    time.sleep(seconds)
    if fail:
        raise ValueError("number %d cannot be worked on" % number)
    return {{"number": number, "cores": len(os.sched_getaffinity(0)), "times": [begun, time.time()]}}

if __name__ == "__main__":
    out = Path(sys.argv[1])
    calls = [(out / str(n), work, (n, s, n == int(sys.argv[2]))) for n, s in enumerate(map(float, sys.argv[3:]))]
    with Pool(2) as pool:
        results = pool.run("numbers", calls)
    print(*[one["number"] for one in results], max(one["cores"] for one in results), results[0]["times"][1] > results[1]["times"][0])
"""


def run_pool(tmp_path: Path, failing: int, *seconds: float) -> subprocess.Popen:
    script = tmp_path / "driver.py"
    script.write_text(POOL.format(benchmarks=str(BENCHMARKS)), encoding="utf-8")
    return subprocess.Popen([sys.executable, str(script), str(tmp_path / "out"), str(failing), *map(str, seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, cwd=tmp_path)


def test_the_pool_returns_results_in_order_each_call_on_a_core_of_its_own(tmp_path):
    process = run_pool(tmp_path, -1, 4, 0, 0)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == "0 1 2 1 True\n"  # in order, one core each, the second begun while the first was under way
    assert (tmp_path / "out" / "1" / "log.txt").read_text(encoding="utf-8") == "working on 1\n"
    assert "numbers: 3/3 runs" in err


def test_a_call_that_fails_ends_the_pool_with_its_log_and_begins_no_other(tmp_path):
    process = run_pool(tmp_path, 0, 1, 3, 0, 0)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and f"{tmp_path / 'out' / '0' / 'log.txt'}: this run failed; the last lines say why" in err
    assert "number 0 cannot be worked on" in (tmp_path / "out" / "0" / "log.txt").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "2").exists()


def test_a_signal_before_any_call_has_begun_ends_the_pool_in_one_line(tmp_path):
    process = run_pool(tmp_path, -1, 600, 600)
    assert process.stderr.readline().startswith("numbers: 2 runs, 2 at once")  # its processes are importing torch
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "numbers: stopped by SIGTERM; the same command goes on from there" in err and "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_calls_of_the_pool_and_then_the_pool(tmp_path, number):
    process = run_pool(tmp_path, -1, 600, 600, 600)
    marks = [tmp_path / "out" / f"waiting_{n}" for n in (0, 1)]
    deadline = time.monotonic() + 100
    while not all(mark.exists() for mark in marks) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and f"numbers: stopped by {number.name}; the same command goes on from there" in err
    assert not (tmp_path / "out" / "2").exists()
