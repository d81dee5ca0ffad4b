"""Pre-training recipes: the paper's numbers are in them, their costs are computed, every miniature trains."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TINY_PRETRAINING, run_cli
from PIL import Image

from aimv2_vlm import recipe as recipes
from aimv2_vlm.config import PretrainRecipe
from aimv2_vlm.data.native import STRATA, NativeSchedule
from aimv2_vlm.models.encoder import load_encoder
from aimv2_vlm.train.run import CONTRASTIVE, build_pretraining_model, check_pretraining, num_patches

FILES = {path.stem: path for verb, path in recipes.shipped_recipes() if verb == "pretrain"}
MINIATURES = sorted(name for name in FILES if name.startswith("mini_"))
PAPER_SIZE = sorted(name for name in FILES if name.startswith(("aimv2_", "table9_", "figure4_", "genlip_", "continue_")))
# spec.md: peak learning rate (Table A1; base: L's), width, layers, heads, SwiGLU hidden, millions of encoder parameters
SIZES = {
    "base": (1e-3, 768, 12, 6, 2048, 85.6),
    "large": (1e-3, 1024, 24, 8, 2816, 309),
    "huge": (8e-4, 1536, 24, 12, 4096, 681),
    "1b": (8e-4, 2048, 24, 16, 5632, 1235),
    "3b": (4e-4, 3072, 24, 24, 8192, 2721),
}
RATE = 0.45 * 790e12  # FLOP/s of one GPU that the costs are given for


def load(name: str, *overrides: str) -> PretrainRecipe:
    return recipes.load_recipe("pretrain", name, ["data_root=/data", *overrides])


BUILT: dict[str, torch.nn.Module] = {}


def build(recipe: PretrainRecipe) -> torch.nn.Module:
    """The recipe's model on the meta device, from its sizes; recipes with the same model share it."""
    recipe.encoder.path = recipe.decoder.path = None
    key = repr((recipe.encoder, recipe.decoder, recipe.objective, recipe.text.vocab_size, recipe.image.size))
    if key not in BUILT:
        with torch.device("meta"):
            BUILT[key] = build_pretraining_model(recipe, recipe.text.vocab_size)
    return BUILT[key]


def header(name: str) -> dict[str, str]:
    lines = re.findall(r"^# (command|cost|expected):\s+(.*)$", FILES[name].read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == 3
    return dict(lines)


# ------------------------------------------------------------------------------------------------------ the paper's numbers


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_table_a1_and_the_spec_s_parameters(size):
    recipe = load(f"aimv2_{size}_224")
    rate, width, layers, heads, hidden, millions = SIZES[size]
    e, d, o, i = recipe.encoder, recipe.decoder, recipe.optim, recipe.image
    assert (o.lr, e.hidden_size, e.num_layers, e.num_heads, e.intermediate_size) == (rate, width, layers, heads, hidden)
    assert (d.hidden_size, d.num_layers, d.num_heads, d.intermediate_size) == (1024, 12, 8, 2816)
    assert (o.min_lr, o.warmup_lr, o.warmup_steps, o.steps, o.batch_size) == (1e-5, 1e-6, 12_500, 1_500_000, 8192)
    assert (o.betas, o.eps, o.weight_decay, o.decoupled, o.clip, o.schedule) == ([0.9, 0.95], 1e-8, 1e-4, True, 1.0, "cosine")
    assert (i.size, i.scale, i.ratio, i.flip, e.patch_size) == (224, [0.4, 1.0], [0.75, 1.33], 0.5, 14)
    assert (recipe.text.vocab_size, recipe.text.context_length, recipe.text.canonicalize) == (32_000, 77, True)
    assert (recipe.objective.name, recipe.objective.pixel_weight, recipe.precision) == ("aimv2", 0.4, "bf16")
    assert recipe.train.strategy == ("fsdp2" if size in ("1b", "3b") else "auto") and recipe.train.compile
    model = build(recipe)
    assert sum(p.numel() for p in model.encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)


@pytest.mark.parametrize("size", SIZES)
def test_mixtures(size):
    paper, public = load(f"aimv2_{size}_224"), load(f"aimv2_{size}_224_public")
    shares = {(s.name.split("_")[0], "synthetic" if s.caption != "txt" else "alt"): s.weight for s in paper.data.sources}
    assert shares == {("dfn", "alt"): 30, ("dfn", "synthetic"): 30, ("coyo", "alt"): 9, ("hqitp", "alt"): 28, ("hqitp", "synthetic"): 3}
    assert sum(s.weight for s in public.data.sources) == 100 and not any("hqitp" in str(s.path) for s in public.data.sources)
    # apart from where the pairs come from, the public recipe is the paper's
    differing = recipes.differences(recipes.to_dict(paper), recipes.to_dict(public))
    assert sorted(line.split(":")[0] for line in differing) == ["data.sources", "out"]
    assert public.data.sources == load("aimv2_large_224_public").data.sources


@pytest.mark.parametrize("name,size", [("aimv2_large_336", 336), ("aimv2_large_448", 448)])
def test_high_resolution_is_two_billion_pairs_without_decay_and_without_synthetic_captions(name, size):
    recipe = load(name)
    total = sum(s.weight for s in recipe.data.sources)
    assert [round(100 * s.weight / total, 1) for s in recipe.data.sources] == [44.8, 13.4, 41.8]
    assert {s.caption for s in recipe.data.sources} == {"txt"}
    assert recipe.image.size == size and recipe.optim.weight_decay == 0
    assert recipe.optim.steps * recipe.optim.batch_size == pytest.approx(2e9, rel=1e-5)
    assert recipe.encoder.path == recipe.decoder.path == load("aimv2_large_224").out + "/final"


# What each row of Table 9 changes; the default row of every part of it is table9_aimv2.
ROWS = {
    "table9_aimv1": ["objective.name"],
    "table9_cap_bidir": ["objective.name", "objective.attention"],
    "table9_cap_prefix": ["objective.name"],
    "table9_cappa": ["objective.name", "objective.attention"],
    "table9_clip_8k": ["objective.name", "optim.micro_batch_size", "text.canonicalize", "text.tokenizer", "text.vocab_size"],
    "table9_clip_16k": ["objective.name", "optim.batch_size", "optim.micro_batch_size", "optim.steps", "text.canonicalize", "text.tokenizer",
                        "text.vocab_size"],
    "table9_alpha_02": ["objective.pixel_weight"],
    "table9_alpha_06": ["objective.pixel_weight"],
    "table9_separate": ["objective.decoders"],
    "table9_width_512": ["decoder.hidden_size", "decoder.intermediate_size", "decoder.num_heads"],
    "table9_width_1536": ["decoder.hidden_size", "decoder.intermediate_size", "decoder.num_heads"],
    "table9_depth_8": ["decoder.num_layers"],
    "table9_depth_16": ["decoder.num_layers"],
}


def test_table_9_changes_one_thing_a_row_and_sees_two_billion_pairs():
    assert set(ROWS) | {"table9_aimv2"} == {name for name in FILES if name.startswith("table9_")}
    default = load("table9_aimv2")
    seen = {}
    for name in ("table9_aimv2", *ROWS):
        recipe = load(name)
        assert recipe.optim.steps * recipe.optim.batch_size == pytest.approx(2e9, rel=1e-5), name
        differing = [line.split(":")[0] for line in recipes.differences(recipes.to_dict(default), recipes.to_dict(recipe))]
        assert sorted(differing) == sorted([*ROWS.get(name, []), *(["out"] if name in ROWS else [])]), name
        seen[name] = recipes.to_dict(recipe) | {"out": None}
    assert all(seen[a] != seen[b] for a in seen for b in seen if a < b)  # no run is paid twice


# ------------------------------------------------------------------------------------------------------------ every recipe


@pytest.mark.parametrize("name", FILES)
def test_every_recipe_goes_together_and_is_found_by_the_name_in_its_command(name):
    check_pretraining(load(name))
    assert recipes.find_recipe("pretrain", name) == FILES[name]
    assert re.search(rf"\bpretrain {name}\b", header(name)["command"])


@pytest.mark.parametrize("name", PAPER_SIZE)
def test_costs_are_the_model_s_operations(name):
    recipe = load(name)
    native, steps, patches = recipe.image.native, recipe.optim.steps, num_patches(recipe)
    batches = [(patches, recipe.optim.batch_size)]  # (patches a picture, pictures) of what one step is on average
    if native.capacity:
        schedule = NativeSchedule(0, native.capacity)
        batches = [(a, b * native.minibatches / STRATA) for a, b in zip(schedule.budgets, schedule.sizes, strict=True)]
    model = build(recipe)
    operations = 3 * steps * sum(
        model.forward_flops(b, num_patches=a, num_tokens=77 * b, scored_patches=a * b / 2) for a, b in batches)
    cost = re.match(r"([\d.]+e\d+) FLOP \(([\d.]+) TFLOP a picture\) = ([\d,]+) GPU-hours", header(name)["cost"])
    assert float(cost[1]) == pytest.approx(operations, rel=0.02)
    assert float(cost[2]) * 1e12 == pytest.approx(operations / (steps * sum(b for _, b in batches)), rel=0.02)
    assert int(cost[3].replace(",", "")) == pytest.approx(operations / RATE / 3600, rel=0.06)
    assert "not run here" in header(name)["expected"]


@pytest.mark.parametrize("name", PAPER_SIZE)
def test_contrastive_batches_are_whole_and_others_divide(name):
    recipe = load(name)
    gpus = int(re.search(r"--nnodes (\d+)", header(name)["command"])[1]) * 8 if "torchrun" in header(name)["command"] else 1
    per_gpu, rest = divmod(recipe.image.native.minibatches if recipe.image.native.capacity else recipe.optim.batch_size, gpus)
    assert rest == 0
    if recipe.objective.name in CONTRASTIVE:
        assert recipe.optim.micro_batch_size == 0 and per_gpu == 128  # 0: the whole share, whatever the number of GPUs
    elif not recipe.image.native.capacity:
        assert per_gpu % recipe.optim.micro_batch_size == 0  # no ragged last micro-batch


def test_low_resolution_first_costs_what_one_resolution_costs():
    def operations(name: str) -> float:
        recipe = load(name)
        n, tokens = num_patches(recipe), 7.8  # of an embedded caption, on average, with the recipe's tokenizer
        return recipe.optim.steps * recipe.optim.batch_size * build(recipe).forward_flops(1, num_patches=n, num_tokens=tokens, scored_patches=n / 2)

    stages = operations("mini_low_resolution_first") + operations("mini_low_resolution_then_full")
    assert stages == pytest.approx(operations("mini_aimv2"), rel=0.01)
    second = load("mini_low_resolution_then_full")
    assert second.encoder.path == second.decoder.path == load("mini_low_resolution_first").out + "/final"


# ------------------------------------------------------------------------------------------------------------- miniatures

TINY_TOWER = ["optim.micro_batch_size=8", "data.validation_samples=8", *(
    f"objective.text_tower.{key}={value}" for key, value in
    {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "projection_size": 32}.items())]


# Miniatures that are another one but for these keys, which TINY_PRETRAINING would overwrite: rows of Table 9b, c, e and f.
VARIANTS = {
    "mini_clip_128": ("mini_clip", ["optim.batch_size", "optim.steps"]),
    "mini_alpha_02": ("mini_aimv2", ["objective.pixel_weight"]), "mini_alpha_06": ("mini_aimv2", ["objective.pixel_weight"]),
    "mini_width_128": ("mini_aimv2", ["decoder.hidden_size", "decoder.intermediate_size", "decoder.num_heads"]),
    "mini_width_256": ("mini_aimv2", ["decoder.hidden_size", "decoder.intermediate_size", "decoder.num_heads"]),
    "mini_depth_2": ("mini_aimv2", ["decoder.num_layers"]), "mini_depth_4": ("mini_aimv2", ["decoder.num_layers"]),
}


def test_every_row_of_table_9_has_a_miniature_and_a_variant_changes_one_thing():
    seen = set()
    for name, (of, keys) in VARIANTS.items():
        recipe, other = load(name), load(of)
        assert sorted(line.split(":")[0] for line in recipes.differences(recipes.to_dict(other), recipes.to_dict(recipe))) == sorted([*keys, "out"]), name
        assert recipe.optim.steps * recipe.optim.batch_size == other.optim.steps * other.optim.batch_size
        seen.add(repr(recipes.to_dict(recipe) | {"out": None}))
        build(recipe)
    assert len(seen) == len(VARIANTS)
    rows = [name.removeprefix("table9_").split("_")[0] for name in ROWS]
    counted = Counter(name.removeprefix("mini_").split("_")[0] for name in MINIATURES)
    assert all(counted[row] >= rows.count(row) for row in set(rows)), (rows, counted)


@pytest.mark.parametrize("name", [name for name in MINIATURES if name not in VARIANTS])
def test_miniatures_train(name, scenes_root, tiny_encoder, tmp_path):
    goes_on = [f"encoder.path={tiny_encoder}"]
    with_decoder = [*goes_on, f"decoder.path={tiny_encoder}", f"text.tokenizer={tiny_encoder / 'pretraining' / 'tokenizer.model'}", "image.size=56"]
    more = {
        "mini_clip": TINY_TOWER, "mini_lit": TINY_TOWER + goes_on, "mini_native": ["image.native.capacity=512", "image.native.minibatches=1"],
        "mini_high_resolution": with_decoder, "mini_low_resolution_then_full": with_decoder,
    }.get(name, [])
    out = tmp_path / "run"
    run_cli("pretrain", name, f"data_root={scenes_root}", f"out={out}", *TINY_PRETRAINING, "optim.steps=2", "optim.warmup_steps=1",
            "train.validate_every=2", *more)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses) and math.isfinite(rows[-1]["val_loss"])
    recipe = recipes.load_recipe("pretrain", str(out / "recipe.yaml"), [])
    encoder = load_encoder(out / "final")
    assert encoder.config.hidden_size == 32 and encoder.config.patch_size == recipe.encoder.patch_size
    if recipe.image.native.capacity:  # its pictures keep their aspect
        from transformers import AutoImageProcessor

        assert AutoImageProcessor.from_pretrained(out / "final")(Image.new("RGB", (64, 32)), return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 56)
        assert "pictures of any aspect" in (out / "final" / "README.md").read_text(encoding="utf-8")
    if recipe.objective.name not in CONTRASTIVE:
        parts = json.loads((out / "final" / "pretraining" / "config.json").read_text())
        asked = recipe.objective
        assert (parts.get("objective") == "genlip") == (asked.name == "genlip")
        if asked.name != "genlip":
            assert parts["predicts_patches"] == (asked.name in ("aimv2", "aimv1")) and parts["predicts_text"] == (asked.name != "aimv1")
            assert parts["separate_decoders"] == (asked.decoders == "separate") and parts["parallel_captions"] == (asked.name == "cappa")


def test_miniatures_go_on_from_what_the_others_write():
    demo = Path(load("demo_scenes").out) / "final"
    high, lit = load("mini_high_resolution"), load("mini_lit")
    assert Path(high.encoder.path) == Path(high.decoder.path) == Path(lit.encoder.path) == demo
    assert Path(high.text.tokenizer) == demo / "pretraining" / "tokenizer.model"
    assert Path(load("mini_low_resolution_then_full").text.tokenizer) == Path(load("mini_low_resolution_first").out) / "final/pretraining/tokenizer.model"
    assert all(load(name).out == f"runs/{name}" for name in MINIATURES)  # not the demo's, which `base:` brings along
