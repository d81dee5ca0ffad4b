"""Scaling studies: a tiny one through the command line, and what is said about points whose law is known."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY_PRETRAINING, run_cli

from aimv2_vlm import scaling
from aimv2_vlm.config import ScalingConfig, UserError
from aimv2_vlm.recipe import load_recipe, parse_overrides
from aimv2_vlm.scaling import Curve, Point, analyse, answer, envelope, optimal_sizes, parametric_fit, plan, training_flops

# 4 and 8 steps of 8 samples; with a cooldown over a fifth 40 and 80 samples, of 96
TINY = {
    "recipe": "demo_scenes", "samples": [32, 64], "resamples": 40,
    "keys": parse_overrides([*TINY_PRETRAINING, "optim.warmup_steps=0", "train.peak_tflops=1"]),
    "sizes": [{"name": name, "keys": {"encoder": {"hidden_size": width}, "optim": {"lr": lr}}} for name, width, lr in (("small", 32, 3e-3), ("large", 64, 2e-3))],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def study(config: Path, scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    run_cli("scaling", config, f"data_root={scenes_root}", f"out={out}")
    return out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_point_is_a_cooled_model_with_its_full_cost_and_its_held_out_loss(study):
    points = rows(study / "points.jsonl")
    assert [(p["size"], p["trunk_samples"], p["samples"]) for p in points] == [
        ("small", 32, 40), ("small", 64, 80), ("large", 32, 40), ("large", 64, 80)]
    for p in points:
        folder = study / "runs" / p["size"] / "seed_0"
        start = p["trunk_samples"] // 8
        cooled = rows(folder / f"cooldown_{start:08d}" / "metrics.jsonl")
        assert [r["val_loss"] for r in cooled if "val_loss" in r] == [p["val_loss"]]
        trained = [r for r in rows(folder / "trunk" / "metrics.jsonl") if "lr" in r and r["step"] <= start] + [r for r in cooled if "lr" in r]
        assert [r["step"] for r in trained] == list(range(1, p["samples"] // 8 + 1))
        assert trained[-1]["lr"] == pytest.approx(1e-6) and trained[start - 1]["lr"] > p["lr"] / 2  # half-cosine, then down to nothing
        # The loop counts the prefixes that were drawn, the study their mean.
        assert p["flops"] == pytest.approx(sum(8 * 1e12 * r["tflops_per_s"] / r["samples_per_s"] for r in trained), rel=0.02)
        tables = scaling.safetensors.numpy.load_file(folder / f"cooldown_{start:08d}" / "held_out.safetensors")
        assert tables["text_sum"].shape == (16,) and tables["text_count"].min() > 0  # all of the held-out pictures, not validation_samples
        means = {term: tables[f"{term}_sum"].sum() / tables[f"{term}_count"].sum() for term in ("text", "pixel")}
        assert [means["text"], means["pixel"], means["text"] + 0.4 * means["pixel"]] == pytest.approx(
            [p["val_text_loss"], p["val_pixel_loss"], p["val_loss"]], rel=1e-5)


def test_the_long_run_keeps_exactly_the_checkpoints_that_cooldowns_begin_at(config, scenes_root, study):
    assert sorted(p.name for p in (study / "runs/large/seed_0/trunk/checkpoints").iterdir()) == ["step_00000004", "step_00000006", "step_00000008"]
    assert [p.name for p in (study / "runs/large/seed_0/cooldown_00000004/checkpoints").iterdir()] == ["step_00000005"]


def test_the_results_open_offline_and_show_both_panels(study):
    page = (study / "scaling.html").read_text(encoding="utf-8")
    assert page.count('<svg class="chart"') == 2 and "small" in page and "http" not in page.replace("http-equiv", "")
    assert (study / "scaling.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in (study / "scaling.svg").read_bytes()[:1000]
    result = json.loads((study / "scaling.json").read_text(encoding="utf-8"))
    assert "16 held-out pictures" in result["interval"]["over"] and "one seed" in result["interval"]["over"]


def test_a_second_start_and_a_budget_train_nothing(config, scenes_root, study):
    words = ["scaling", config, f"data_root={scenes_root}", f"out={study}"]
    made = {p: p.stat().st_mtime_ns for p in (study / "runs").rglob("*") if p.suffix in (".safetensors", ".jsonl")}
    before = (study / "points.jsonl").read_text(encoding="utf-8")
    done = run_cli(*words)
    assert "finished" in done.stderr and (study / "points.jsonl").read_text(encoding="utf-8") == before
    low, high = json.loads((study / "scaling.json").read_text(encoding="utf-8"))["measured_flops"]
    done = run_cli(*words, "--budget", (low * high) ** 0.5)
    assert "size " in done.stdout and "samples" in done.stdout and "95 % interval" in done.stdout and "run 1" not in done.stderr
    assert made == {p: p.stat().st_mtime_ns for p in (study / "runs").rglob("*") if p.suffix in (".safetensors", ".jsonl")}
    for budget in (5 * high, low / 5, float("nan")):
        done = run_cli(*words, "--budget", budget, check=False)
        assert done.returncode == 2 and "--budget" in done.stderr and "4 x" in done.stderr


def test_stopped_in_the_long_run_and_in_a_cooldown_it_goes_on_to_the_same_points(config, scenes_root, study, tmp_path, monkeypatch):
    from aimv2_vlm.train.metrics import MetricsLog

    words = ["scaling", config, f"data_root={scenes_root}", f"out={tmp_path / 'out'}"]
    write = MetricsLog.write

    def stop_at(part: str, step: int, number: int) -> None:
        def noted(log: MetricsLog, row: dict) -> None:
            write(log, row)
            if part in str(log.path) and row["step"] == step:
                os.kill(os.getpid(), number)
        monkeypatch.setattr(MetricsLog, "write", noted)

    done = run_cli(*words, "--collect", check=False)
    assert done.returncode == 2 and "no run of the study is finished" in done.stderr and not (tmp_path / "out").exists()
    stop_at("small/seed_0/trunk", 5, signal.SIGINT)
    assert run_cli(*words, check=False).returncode == 75
    stop_at("small/seed_0/cooldown_00000008", 9, signal.SIGTERM)
    done = run_cli(*words, check=False)
    assert done.returncode == 75 and "going on from step 5" in done.stderr
    monkeypatch.setattr(MetricsLog, "write", write)
    done = run_cli(*words, "--collect")
    assert "3 points are not measured yet" in done.stderr and len(rows(tmp_path / "out" / "points.jsonl")) == 1
    assert not (tmp_path / "out/runs/large").exists()
    run_cli(*words)
    assert rows(tmp_path / "out" / "points.jsonl") == rows(study / "points.jsonl")


def test_runs_made_with_another_recipe_are_not_collected(config, scenes_root, study):
    done = run_cli("scaling", config, f"data_root={scenes_root}", f"out={study}", "sizes.0.keys.optim.lr=0.1", "--collect", check=False)
    assert done.returncode == 2 and "optim.lr" in done.stderr and "Traceback" not in done.stderr


def test_samples_that_come_again_are_refused_or_said(config, scenes_root, tmp_path):
    words = ["scaling", config, f"data_root={scenes_root}", f"out={tmp_path / 'out'}", "samples=[32, 88]"]  # 88 + 18 > 96
    done = run_cli(*words, check=False)
    assert done.returncode == 2 and "104" in done.stderr and "96" in done.stderr and not (tmp_path / "out/runs").exists()
    done = run_cli(*words, "samples=[32]", f"data_root={scenes_root}", "keys.data.validation=[{path: " + str(scenes_root / "shards/*.tar") + "}]", check=False)
    assert done.returncode == 2 and "trained on as well" in done.stderr


@pytest.mark.parametrize("override,words", [
    ("sizes=[{name: small, keys: {optim: {eps: 1e-8}}}]", ["small", "optim.lr"]),
    ("sizes.0.keys.decoder.hidden_size=8", ["small", "decoder", "same for all sizes"]),
    ("sizes.1.name=small", ["sizes", "twice"]),
    ("sizes.1.name=../x", ["../x", "folder"]),
    ("sizes.0.keys.encoder.hiden_size=8", ["small", "hiden_size", "hidden_size"]),
    ("samples=[32, 33]", ["samples", "steps [4, 4]"]),
    ("samples=[]", ["samples", "empty"]),
    ("seeds=[]", ["seeds", "empty"]),
    ("seeds=[0,-1]", ["seeds", "at least 0"]),
    ("seeds=[1180591620717411303424]", ["seeds", "below"]),
    ("cooldown_fraction=0", ["cooldown_fraction"]),
    ("recipe=", ["recipe"]),
    ("keys.optim.warmup_steps=1", ["warmup_steps", "10%", "5 steps"]),
    ("keys.objective.name=clip", ["objective.name", "clip"]),
    ("keys.encoder.path=x", ["encoder.path"]),
    ("keys.optim.epochs=1", ["optim.epochs"]),
    ("keys.data.validation=[]", ["data.validation"]),
])
def test_studies_that_break_a_rule_are_refused_in_one_line(config, override, words):
    with pytest.raises(UserError) as error:
        plan(load_recipe("scaling", str(config), ["data_root=/data", override]))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_the_papers_study_costs_what_the_paper_trains():
    arms = plan(load_recipe("scaling", "paper", ["data_root=/data"]))
    costs = [training_flops(arm.trunk, 32_000, 1, 256 + 77) / 1e12 for arm in arms]
    assert costs == pytest.approx([0.83, 1.41, 2.27, 4.57], rel=0.01)
    assert all(arm.trunk.optim.schedule == "half_cosine" and arm.starts[-1] == 610_352 and len(arm.starts) == 7 for arm in arms)
    assert [arm.trunk.optim.lr for arm in arms] == [1e-3, 8e-4, 8e-4, 4e-4]


# ------------------------------------------------------------------------------------------------------ known laws

E, A, B, ALPHA, BETA = 1.5, 40.0, 300.0, 0.35, 0.45


def curve(parameters: float, samples: np.ndarray, name: str = "") -> Curve:
    return Curve(name or f"n{parameters:.0f}", parameters, 6 * parameters * samples, samples, E + A / parameters**ALPHA + B / samples**BETA)


def law_of(curves: list[Curve], flops: np.ndarray) -> tuple[float, float, int] | None:
    return optimal_sizes(curves, flops, envelope(curves, flops)[0])


def test_a_known_law_is_found_again_by_the_envelope_and_by_the_fit():
    curves = [curve(n, np.geomspace(1e4, 1e8, 25)) for n in np.geomspace(1e4, 1e7, 40)]
    # Where the best size is one of those in the middle, whose curves cover that compute: C = 6 N D, so N_opt ~ C^(beta / (alpha + beta)).
    _, b, distinct = law_of(curves, np.geomspace(1e11, 1e13, 400))
    assert b == pytest.approx(BETA / (ALPHA + BETA), abs=0.02) and distinct > 5
    fit = parametric_fit(curves[::8])
    assert [fit[k] for k in ("E", "A", "alpha", "B", "beta")] == pytest.approx([E, A, ALPHA, B, BETA], rel=0.02) and fit["rms_relative_error"] < 1e-4
    assert parametric_fit(curves[:1]) is None
    few = curves[::8]
    rising = [Curve(c.size, c.parameters, c.flops, c.samples, other.loss) for c, other in zip(few, reversed(few), strict=True)]
    assert parametric_fit(rising) is None  # more parameters, more loss: no power of N to be told


def test_the_envelope_is_the_least_loss_among_the_sizes_measured_there():
    low = Curve("low", 10, np.array([1.0, 100.0]), np.array([1, 100]), np.array([3.0, 2.0]))
    high = Curve("high", 20, np.array([10.0, 1000.0]), np.array([1, 100]), np.array([3.0, 1.0]))
    grid = np.array([0.5, 1.0, 10.0, 50.0, 99.9, 1000.0, 2000.0])
    best, loss = envelope([low, high], grid)
    assert best.tolist() == [-1, -1, 0, 0, 0, -1, -1]  # alone a size is not the best, but the only one
    assert loss[2] == pytest.approx(2.5) and np.isinf(loss[best < 0]).all()  # half-way in log compute
    # A size is not the best where the next one's curve has ended or has not begun.
    middle = Curve("middle", 15, np.array([10.0, 1000.0]), np.array([1, 100]), np.array([2.9, 1.9]))
    best, _ = envelope([low, middle, high], np.array([20.0, 90.0, 110.0, 900.0]))
    assert best.tolist() == [0, 0, 2, 2]
    best, _ = envelope([low, middle, Curve("high", 20, high.flops, high.samples, high.loss + 2)], np.array([20.0, 110.0]))
    assert best.tolist() == [0, -1]  # at 110 the middle one is the best only because the small one's run was shorter
    apart, grid = [low, Curve("far", 20, np.array([1e4, 1e5]), np.array([1, 2]), np.array([1.0, 0.5]))], np.geomspace(1, 1e5, 50)
    assert law_of(apart, grid) is None


def synthetic(noise: float, rng: np.random.Generator, pictures: int = 48, seeds: tuple[int, ...] = (0,), seed_noise: float = 0.0) -> list[Point]:
    """Points of the law; each picture has its own difficulty, shared by all points, and a noise at each point."""
    difficulty, points = rng.normal(0, 0.3, pictures), []
    for n in (1e4, 1e5, 1e6, 1e7):
        for d in np.geomspace(1e4, 1e8, 9):
            for seed in seeds:
                c = curve(n, np.array([d]))
                losses = c.loss[0] + difficulty + rng.normal(0, noise, pictures) + rng.normal(0, seed_noise)
                facts = {"size": c.size, "seed": seed, "encoder_parameters": n, "samples": int(d), "flops": float(c.flops[0]), "val_loss": losses.mean()}
                points.append(Point(facts, losses[None], np.ones((1, pictures)), np.ones(1)))
    return points


def study_config(**keys: object) -> ScalingConfig:
    return ScalingConfig(**{"resamples": 60, "seeds": [0]} | keys)


def test_intervals_cover_the_truth_and_shrink_with_less_noise(monkeypatch):
    monkeypatch.setattr(scaling, "parametric_fit", lambda curves: None)
    rng = np.random.default_rng(3)
    truth = analyse(synthetic(0.0, rng), study_config(resamples=1))["law"]["b"]
    found = [analyse(synthetic(0.4, rng), study_config())["law"]["b_interval"] for _ in range(20)]
    covered = sum(low <= truth <= high for low, high in found)
    assert covered >= 16, covered
    widths = [np.mean([high - low for low, high in found]), np.diff(analyse(synthetic(0.01, rng), study_config())["law"]["b_interval"])[0]]
    assert widths[1] < widths[0] / 4


def test_seeds_widen_the_interval_and_a_point_without_all_of_them_is_left_out(monkeypatch):
    monkeypatch.setattr(scaling, "parametric_fit", lambda curves: None)
    points = synthetic(0.01, np.random.default_rng(5), seeds=(0, 1, 2), seed_noise=0.2)
    several = analyse(points, study_config(seeds=[0, 1, 2]))
    one = analyse([p for p in points if p.facts["seed"] == 0], study_config())
    assert np.diff(several["law"]["b_interval"])[0] > 2 * np.diff(one["law"]["b_interval"])[0] and "3 seeds" in several["interval"]["over"]
    less = analyse(points[:-1], study_config(seeds=[0, 1, 2]))
    assert len(less["left_out"]) == 1 and "seed 2" in less["left_out"][0] and len(less["sizes"][-1]["points"]) == 8


def test_a_budget_is_answered_by_what_was_measured_then_by_the_law_then_refused(monkeypatch):
    monkeypatch.setattr(scaling, "parametric_fit", lambda curves: None)
    result = analyse(synthetic(0.05, np.random.default_rng(7)), study_config())
    low, high = result["measured_flops"]
    inside = answer(result, 1e12)
    assert inside["best"]["size"] == "n100000" and inside["best"]["samples"] == pytest.approx(1e12 / 6e5, rel=1e-4) and inside["beyond"] == 1
    assert inside["law"]["interval"][0] <= inside["law"]["encoder_parameters"] <= inside["law"]["interval"][1]
    beyond = answer(result, 3.9 * high)
    assert beyond["best"] is None and beyond["law"] and "extrapolated 3.9 x" in scaling.describe(beyond)
    for budget in (4.1 * high, low / 4.1, 0.0, -1.0, float("inf")):
        with pytest.raises(UserError, match="4 x"):
            answer(result, budget)
    assert max(found["flops"] for found in result["budgets"]) <= 4 * high
    flat = analyse([p for p in synthetic(0.0, np.random.default_rng(1)) if p.facts["encoder_parameters"] in (1e6, 1e7) and p.facts["samples"] < 1e6], study_config())
    assert flat["law"] is None and "does not bracket" in flat["no_law"]
    with pytest.raises(UserError, match="no law"):
        answer(flat, 2 * flat["measured_flops"][1])
