"""Recipes: every shipped one loads and builds, and a wrong one is refused by name before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aimv2_vlm import recipe as recipes
from aimv2_vlm.config import SftRecipe, UserError

SHIPPED = recipes.shipped_recipes()


def load(verb: str, path: Path, *overrides: str):
    return recipes.load_recipe(verb, str(path), ["data_root=/data", *overrides])


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_each_verb_ships_recipes():
    assert {verb for verb, _ in SHIPPED} == set(recipes.FOLDERS)


@pytest.mark.parametrize("verb,path", SHIPPED, ids=[p.stem for _, p in SHIPPED])
def test_every_shipped_recipe_loads_and_builds_on_the_meta_device(verb, path):
    recipe = load(verb, path)
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert "command:" in header and "cost:" in header and "expected:" in header
    if verb == "pretrain":
        import torch

        from aimv2_vlm.train.run import build_pretraining_model, num_patches

        recipe.encoder.path = recipe.decoder.path = None  # sizes stand in the recipe, so it builds offline
        with torch.device("meta"):
            model = build_pretraining_model(recipe, recipe.text.vocab_size)
        assert sum(p.numel() for p in model.parameters()) > 0 and num_patches(recipe) > 1
        assert set(model.parameter_roles()) == {n for n, _ in model.named_parameters()}
    elif verb == "sft":
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        llm = recipe.llm
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(
                vocab_size=llm.vocab_size, hidden_size=llm.hidden_size, intermediate_size=llm.intermediate_size,
                num_hidden_layers=llm.num_layers, num_attention_heads=llm.num_heads, num_key_value_heads=llm.num_kv_heads))
        assert model.lm_head.weight.shape == (llm.vocab_size, llm.hidden_size)
        assert recipe.data.sources and recipe.optim.warmup_steps < recipe.optim.steps
    elif verb == "scaling":
        from aimv2_vlm.scaling import plan

        assert len(plan(recipe)) == len(recipe.sizes) * len(recipe.seeds)
    elif recipe.kind == "benchmarks":
        assert recipe.models and recipe.benchmarks and recipe.benchmark_root
    else:
        from aimv2_vlm.data.recognition import find_data_set
        from aimv2_vlm.evaluation.cells import check_names

        check_names(recipe.models, recipe.data_sets, recipe.out)
        assert all(find_data_set(data.name).classes for data in recipe.data_sets)


def test_floats_follow_yaml_1_2_and_words_stay_words(tmp_path):
    recipe = load("pretrain", write(tmp_path, "optim: {lr: 1e-4, weight_decay: 5E-2}\nencoder: {path: on}\n"))
    assert recipe.optim.lr == 1e-4 and recipe.optim.weight_decay == 0.05 and recipe.encoder.path == "on"


def test_base_files_merge_mappings_replace_lists_and_null_brings_the_default_back(tmp_path):
    write(tmp_path, "seed: 7\noptim: {lr: 3e-4, betas: [0.5, 0.6], eps: 1e-6}\n", "base.yaml")
    recipe = load("pretrain", write(tmp_path, "base: base.yaml\noptim: {betas: [0.1, 0.2], eps: null}\n"))
    assert (recipe.seed, recipe.optim.lr, recipe.optim.betas, recipe.optim.eps) == (7, 3e-4, [0.1, 0.2], 1e-8)


def test_a_section_given_in_part_keeps_the_verbs_own_defaults(tmp_path):
    recipe = load("sft", write(tmp_path, "optim: {steps: 7}\n"))
    default = SftRecipe().optim
    assert recipe.optim.steps == 7 and (recipe.optim.lr, recipe.optim.decoupled) == (default.lr, default.decoupled) == (1e-5, False)


def test_steps_go_before_the_epochs_of_a_base_a_recipe_or_a_default(tmp_path):
    write(tmp_path, "optim: {epochs: 3}\n", "base.yaml")
    assert load("sft", write(tmp_path, "base: base.yaml\noptim: {steps: 7}\n")).optim.epochs is None
    recipe = load("sft", write(tmp_path, "base: base.yaml\n"), "optim.steps=7")
    assert (recipe.optim.steps, recipe.optim.epochs) == (7, None)
    assert load("sft", write(tmp_path, "base: base.yaml\n"), "optim.lr=1").optim.epochs == 3
    assert load("sft", write(tmp_path, "base: base.yaml\n"), "optim.steps=7", "optim.epochs=2").optim.epochs == 2
    assert load("sft", write(tmp_path, "base: base.yaml\noptim: {steps: null}\n")).optim.epochs == 3
    assert load("eval", write(tmp_path, "kind: probing\noptim: {steps: 7}\n")).optim.epochs is None
    assert load("eval", write(tmp_path, "kind: probing\n")).optim.epochs == 100


def test_overrides_reach_into_lists_and_can_set_null(tmp_path):
    path = write(tmp_path, "models: [{name: a, path: x}, {name: b, path: y}]\nlimit: 3\n")
    recipe = load("eval", path, "models.1.path=z", "limit=null")
    assert [m.path for m in recipe.models] == ["x", "z"] and recipe.limit is None


@pytest.mark.parametrize("text,overrides,words", [
    ("optm: {lr: 1}\n", [], ["optm", "optim"]),
    ("optim: {learning_rate: 1}\n", [], ["optim.learning_rate", "optim."]),
    ("optim: {lr: fast}\n", [], ["optim.lr", "float", "fast"]),
    ("train: {strategy: fsdp}\n", [], ["train.strategy", "fsdp2"]),
    ("seed: true\n", [], ["seed", "int"]),
    ("seed: 12345678901234567890123\n", [], ["seed", "below 4.29497e+09"]),
    ("data: [1]\n", [], ["data", "mapping"]),
    ("optim: {lr: 1}\noptim: {lr: 2}\n", [], ["line 2", "twice"]),
    ("optim: {lr: [\n", [], ["not valid YAML"]),
    ("- 1\n", [], ["mapping"]),
    ("base: nowhere.yaml\n", [], ["nowhere.yaml", "does not exist"]),
    ("base: r.yaml\n", [], ["back to itself"]),
    ("seed: 1\n", ["optim.lr"], ["key=value"]),
    ("seed: 1\n", ["optim=1"], ["optim", "mapping"]),
    ("optim: {lr: 0}\n", [], ["optim.lr", "above 0"]),
    ("optim: {batch_size: -4}\n", [], ["optim.batch_size", "at least 1", "-4"]),
    ("optim: {betas: [0.9]}\n", [], ["optim.betas", "2 numbers"]),
    ("optim: {betas: [0.9, 1]}\n", [], ["optim.betas", "below 1"]),
    ("train: {log_every: 0}\n", [], ["train.log_every", "at least 1"]),
])
def test_wrong_recipes_are_refused_naming_file_and_key(tmp_path, text, overrides, words):
    with pytest.raises(UserError) as error:
        load("pretrain", write(tmp_path, text), *overrides)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "wrong"), [("probing", "0"), ("probing", "1.5"), ("zero_shot", "-1"), ("zero_shot", "2")])
def test_a_crop_is_a_share_of_a_pictures_side(tmp_path, kind, wrong):
    with pytest.raises(UserError, match="crop_fraction: must be (above 0|at most 1)"):
        load("eval", write(tmp_path, f"kind: {kind}\ncrop_fraction: {wrong}\n"))
    assert load("eval", write(tmp_path, f"kind: {kind}\ncrop_fraction: 1\n")).crop_fraction == 1


def test_a_missing_data_root_is_named(tmp_path):
    with pytest.raises(UserError, match="data_root"):
        recipes.load_recipe("pretrain", str(write(tmp_path, 'data: {sources: [{path: "{data_root}/x.tar"}]}\n')), [])


def test_an_unknown_recipe_names_near_ones():
    with pytest.raises(UserError, match="demo_scenes"):
        recipes.find_recipe("pretrain", "demo_scens")


def test_a_wrong_key_is_refused_before_torch_is_imported(tmp_path):
    path = write(tmp_path, "optm: {lr: 1}\n")
    code = (f"import sys\nfrom aimv2_vlm.cli import main\nstatus = main(['pretrain', {str(path)!r}])\n"
            "assert status == 2, status\nassert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "optim" in done.stderr and "Traceback" not in done.stderr


def test_what_is_dumped_loads_as_the_same_recipe(tmp_path):
    for verb, path in SHIPPED:
        recipe = load(verb, path)
        again = recipes.load_recipe(verb, str(write(tmp_path, recipes.dump(recipe))), [])
        assert recipes.differences(recipes.to_dict(recipe), recipes.to_dict(again)) == []
    assert {type(load(v, p)) for v, p in SHIPPED} == set(recipes.FOLDERS.values()) | set(recipes.config.EVALUATIONS.values())


def test_recipes_copy_keeps_what_is_there(tmp_path, capsys):
    assert recipes.copy_recipes(str(tmp_path)) == 0
    mine = tmp_path / "pretrain" / "demo_scenes.yaml"
    mine.write_text("seed: 5\n", encoding="utf-8")
    assert recipes.copy_recipes(str(tmp_path)) == 0
    assert mine.read_text(encoding="utf-8") == "seed: 5\n" and "kept" in capsys.readouterr().out
