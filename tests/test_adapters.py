"""Adapters and quantisation touch exactly what the plan says, and what they learned is an ordinary checkpoint."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_cli
from safetensors.torch import load_file
from test_assistant import GRIDS, arguments, build, data, dataset, tokenizer_folder  # noqa: F401
from test_training import assert_same_weights, tuning
from torch import nn

from aimv2_vlm.config import Adapter, LanguageModel, Optimizer, SftRecipe, UserError
from aimv2_vlm.models import adapters
from aimv2_vlm.models.assistant import AssistantForTraining, part_of, set_trainable
from aimv2_vlm.train import launch
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.optim import build_optimizer, parameter_groups
from aimv2_vlm.train.run import check_tuning

LORA = ["adapter.kind=lora", "adapter.rank=4", "adapter.alpha=8"]
PARTS = ["connector", "llm"]
KINDS = {
    "lora": (Adapter("lora", 4, 8), "none"), "rslora": (Adapter("lora", 4, 8, rslora=True), "none"), "dora": (Adapter("dora", 4, 8), "none"),
    "qlora": (Adapter("lora", 4, 8), "nf4"), "qdora": (Adapter("dora", 4, 8), "nf4"), "int8": (Adapter("lora", 4, 8), "int8"),
}  # fmt: skip


def adapted(folder, kind="lora", grid="2x2", seed=0, learned=True):
    """(assistant, processor, adapter, llm): with adapters whose product is not 0, if `learned`, and a connector like it."""
    assistant, processor = build(folder, grid, seed=seed)
    adapter, quantization = KINDS[kind]
    llm = LanguageModel(quantization=quantization)
    adapters.quantize(assistant, llm, torch.float32)
    adapters.add_adapter(assistant, adapter)
    set_trainable(assistant, PARTS)
    generator = torch.Generator().manual_seed(5)
    for parameter in (p for p in assistant.parameters() if p.requires_grad and learned):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return assistant.eval(), processor, adapter, llm


def logits(assistant, processor, folder):
    """Of a few rows with pictures, at the supervised places."""
    found = {}
    hook = assistant.lm_head.register_forward_hook(lambda *call: found.update(logits=call[2].detach()))
    rows = dataset(folder, processor)
    with torch.no_grad():
        AssistantForTraining(assistant).eval()(**arguments(rows.collate([rows.fetch(i) for i in (0, 2, 3)])))
    hook.remove()
    return found["logits"]


def close(one, other, tolerance=1e-5):
    return bool((one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1))


# ------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_plan_is_kept_and_tells_every_parameter_once(tokenizer_folder, kind, grid):  # noqa: F811
    plain, _ = build(tokenizer_folder, grid)
    assistant, _, adapter, llm = adapted(tokenizer_folder, kind, grid)
    adapters.check_plan(assistant, adapter, llm, PARTS)
    rows = {row.name: row for row in adapters.plan(assistant)}
    extra = rows.pop("llm: adapters")
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in plain.parameters())
    assert extra.parameters == extra.trainable and rows["llm: blocks, linear"].adapted == 2 * 7
    assert {name for name, row in rows.items() if row.quantized} == ({"llm: blocks, linear"} if llm.quantization != "none" else set())
    assert {name for name, row in rows.items() if row.trainable} == {"connector"} | ({"image_newline"} if grid == "2x2" else set())
    lines = adapters.table(adapters.plan(assistant))
    assert len(lines) == len(rows) + 2 and any("nf4" in line for line in lines) == (llm.quantization == "nf4")


def compress(assistant, name):
    bnb = pytest.importorskip("bitsandbytes")
    linear = assistant.get_submodule(name)
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    layer.weight, layer.bias = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4").to("cpu"), linear.bias
    assistant.set_submodule(name, layer)


def forget_newline(module, state, *_):
    del state["model.image_newline"]


Q_PROJ = "model.language_model.layers.0.self_attn.q_proj"
WRONGS = {  # what is done to a model of the plan -> what the refusal names
    "lm_head quantised": (lambda m: compress(m, "lm_head"), "quantised.*has lm_head"),
    "encoder quantised": (lambda m: compress(m, "model.vision_tower.encoder.layers.0.attention.q_proj"), "quantised.*has model.vision_tower"),
    "connector quantised": (lambda m: compress(m, "model.multi_modal_projector.linear_1"), "quantised.*has model.multi_modal_projector"),
    "a layer left unquantised": (
        lambda m: m.set_submodule(f"{Q_PROJ}.base_layer", adapters._ordinary(m.get_submodule(f"{Q_PROJ}.base_layer"))), f"quantised.*lacks {Q_PROJ}"),
    "a layer without its adapter": (lambda m: m.set_submodule(Q_PROJ, m.get_submodule(Q_PROJ).get_base_layer()), f"adapters.*lacks {Q_PROJ}"),
    "an adapter elsewhere": (lambda m: setattr(m.lm_head, "lora_A", nn.ModuleDict({"default": nn.Linear(2, 2)})), "adapters.*has lm_head"),
    "image_newline frozen": (lambda m: m.model.image_newline.requires_grad_(False), "trainable.*lacks model.image_newline"),
    "the base learns": (lambda m: m.model.language_model.norm.weight.requires_grad_(True), "trainable.*has model.language_model.norm"),
    "the encoder learns": (lambda m: m.model.vision_tower.rms_norm.weight.requires_grad_(True), "trainable.*has model.vision_tower"),
    "image_newline not saved": (lambda m: m.register_state_dict_post_hook(forget_newline), "image_newline.*lacks model.image_newline"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONGS)
def test_a_model_that_is_not_the_plans_is_refused(tokenizer_folder, wrong):  # noqa: F811
    assistant, _, adapter, llm = adapted(tokenizer_folder, "qlora")
    act, named = WRONGS[wrong]
    act(assistant)
    with pytest.raises(UserError, match=named):
        adapters.check_plan(assistant, adapter, llm, PARTS)


def test_targets_are_those_named_and_no_others(tokenizer_folder):  # noqa: F811
    assistant, _ = build(tokenizer_folder, "1x1")
    adapters.add_adapter(assistant, Adapter("lora", 4, targets=["q_proj", "v_proj"]))
    names = {n.split(".lora_")[0].removeprefix("model.language_model.layers.") for n, _ in assistant.named_parameters() if ".lora_" in n}
    assert names == {f"{i}.self_attn.{kind}" for i in range(2) for kind in ("q_proj", "v_proj")}
    with pytest.raises(UserError, match="adapter.targets: linear_1: no linear layer of the decoder's blocks; there are down_proj,"):
        adapters.targeted(assistant, ["linear_1"])


# ------------------------------------------------------------------------------------------------------ merged and apart


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged_in_stock_layers(tokenizer_folder, data, kind):  # noqa: F811
    """8 bits also round what comes in, which merged weights no longer do: there the two differ by that rounding."""
    assistant, processor, *_ = adapted(tokenizer_folder, kind)
    before = logits(assistant, processor, data)
    fresh, *_ = adapted(tokenizer_folder, kind, learned=False)
    assert not close(before, logits(fresh, processor, data), 1e-2)  # the adapter does something
    adapters.merge(assistant)
    after = logits(assistant, processor, data)
    assert close(after, before, 5e-2 if kind == "int8" else 1e-5)
    plain, _ = build(tokenizer_folder, "2x2")
    assert [(n, type(m)) for n, m in assistant.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert assistant.state_dict().keys() == plain.state_dict().keys()


def test_a_forward_pass_leaves_quantised_weights_as_they_are_whatever_the_processor(tokenizer_folder, data, monkeypatch):  # noqa: F811
    import bitsandbytes.nn.modules

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    assistant, processor, *_ = adapted(tokenizer_folder, "qlora")
    layers = [module for module in assistant.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    stored = [(layer.weight.detach().clone(), layer.weight.quant_state.absmax.clone()) for layer in layers]
    logits(assistant, processor, data)
    assert len(layers) == 14 and not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    for layer, (weight, scales) in zip(layers, stored, strict=True):
        assert torch.equal(layer.weight, weight) and torch.equal(layer.weight.quant_state.absmax, scales)


@pytest.mark.parametrize("used", [False, True])
def test_8_bit_layers_move_with_their_scales(tokenizer_folder, data, used):  # noqa: F811
    assistant, processor, *_ = adapted(tokenizer_folder, "int8")
    expected = logits(assistant, processor, data) if used else None  # the first pass moves the scales from the weight to the layer's state
    layers = [module for module in assistant.modules() if type(module).__name__ == "Linear8bitLt"]
    for layer in layers:
        layer.weight.data = layer.weight.data.clone()  # what a parent's `to` does with another device
    adapters.move(assistant, torch.device("cpu"))
    for layer in layers:
        (held,) = (holder for holder in (layer.weight, layer.state) if holder.CB is not None)
        assert held.CB.data_ptr() == layer.weight.data_ptr() and held.SCB is not None
    assert len(layers) == 14 and (not used or torch.equal(logits(assistant, processor, data), expected))


@pytest.mark.parametrize("kind", ["lora", "qdora"])
def test_an_adapter_alone_on_its_base_gives_the_same_logits(tokenizer_folder, data, tmp_path, kind):  # noqa: F811
    """Onto the base before tuning (its connector is another one), and by peft alone onto the written base."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    assistant, processor, adapter, llm = adapted(tokenizer_folder, kind)
    expected = logits(assistant, processor, data)
    adapters.save_adapter(tmp_path / "final" / "adapter", assistant)
    adapters.take_off(assistant)
    adapters.dequantize(assistant)
    assistant.save_pretrained(tmp_path / "final")
    assert not close(logits(assistant, processor, data), expected, 1e-2)

    base, _ = build(tokenizer_folder, "2x2")
    adapters.quantize(base, llm, torch.float32)
    adapters.load_adapter(base, tmp_path / "final" / "adapter")
    assert close(logits(base.eval(), processor, data), expected, 1e-6)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    adapters.load_adapter(opened, tmp_path / "final" / "adapter")  # the written base is the base, in ordinary weights
    assert close(logits(opened.eval(), processor, data), expected)
    stock = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tmp_path / "final"), tmp_path / "final" / "adapter")
    assert close(logits(stock.base_model.model.eval(), processor, data), expected)


def test_an_adapter_for_another_base_is_refused_in_one_line(tokenizer_folder, tmp_path):  # noqa: F811
    assistant, _, adapter, _ = adapted(tokenizer_folder)
    adapters.save_adapter(tmp_path / "adapter", assistant)
    for name, part in (("model.language_model.layers.1.mlp.up_proj.weight", "decoder"), ("model.vision_tower.rms_norm.weight", "encoder")):
        other, _ = build(tokenizer_folder, "2x2")
        with torch.no_grad():
            other.get_parameter(name).view(-1)[3] += 1e-3
        with pytest.raises(UserError, match=f"^adapter.path: [^\n]*was made for another {part}[^\n]*$"):
            adapters.load_adapter(other, tmp_path / "adapter")
        assert not adapters.has_adapter(other)
    quantised, *_ = adapted(tokenizer_folder, "qlora")
    with pytest.raises(UserError, match="another decoder .or another llm.quantization"):
        adapters.load_adapter(quantised, tmp_path / "adapter")
    base, _ = build(tokenizer_folder, "2x2")
    adapters.add_adapter(base, Adapter("lora", 2, 8))
    with pytest.raises(UserError, match=r"differs from the recipe in adapter.rank \(4 there\)"):
        adapters.load_adapter(base, tmp_path / "adapter", Adapter("lora", 2, 8))
    (tmp_path / "adapter" / "connector.safetensors").unlink()
    with pytest.raises(UserError, match="holds no connector.safetensors"):
        adapters.load_adapter(base, tmp_path / "adapter")


# ------------------------------------------------------------------------------------------------------- through the run


@pytest.fixture(scope="module")
def apart(scenes_root, tiny_encoder, tmp_path_factory) -> Path:
    """A 4-bit run with dropout whose adapter lies beside its base."""
    out = tmp_path_factory.mktemp("apart") / "run"
    run_cli(*tuning(scenes_root, tiny_encoder, out, *LORA, "llm.quantization=nf4", "adapter.dropout=0.2", "adapter.merge=false", "optim.lr=1e-2", grid="2x2"))
    return out


def test_evaluation_and_chat_open_an_adapter_that_lies_apart(apart):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from aimv2_vlm.evaluation.generation import load_assistant

    opened, _ = load_assistant(apart / "final", "fp32", "cpu")
    stock = AutoModelForImageTextToText.from_pretrained(apart / "final")
    assert not torch.equal(opened.get_submodule(Q_PROJ).weight, stock.get_submodule(Q_PROJ).weight)
    merged = PeftModel.from_pretrained(stock, apart / "final" / "adapter").merge_and_unload().state_dict()
    for name, tensor in opened.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-5)


def test_an_adapter_apart_is_neither_lost_in_conversion_nor_in_the_card(apart, tmp_path):
    done = run_cli("convert", apart / "final", tmp_path / "llava", "--to", "llava", check=False)
    assert done.returncode == 2 and "its adapter lies apart" in done.stderr and not (tmp_path / "llava").exists()
    [code] = re.findall(r"```python\n(.*?)```", (apart / "final" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    from aimv2_vlm.evaluation.generation import load_assistant

    told: dict = {}
    with contextlib.chdir(apart / "final"):
        exec(code, told)
    merged, _ = load_assistant(apart / "final", "fp32", "cpu")
    torch.testing.assert_close(told["model"].merge_and_unload().state_dict()[f"{Q_PROJ}.weight"], merged.state_dict()[f"{Q_PROJ}.weight"], atol=1e-6, rtol=1e-5)


def test_a_stopped_adapter_run_goes_on_bit_for_bit(apart, scenes_root, tiny_encoder, tmp_path):
    """Frozen weights are quantised anew from the same base; dropout is a function of seed and step."""
    words = tuning(scenes_root, tiny_encoder, tmp_path / "b", *LORA, "llm.quantization=nf4", "adapter.dropout=0.2", "adapter.merge=false", "optim.lr=1e-2",
                   grid="2x2")
    run_cli(*words, "train.stop_after=3")
    [saved] = sorted((tmp_path / "b" / "checkpoints").glob("step_*"))[-1:]
    names = {key.split(".", 1)[1] for file in saved.glob("*.safetensors") for key in load_file(file)}
    assert names and all(part_of(n) == "connector" or ".lora_" in n for n in names)  # what learns and nothing else
    run_cli(*words)
    assert_same_weights(apart / "final", tmp_path / "b" / "final")


def test_dropout_is_really_there(apart, scenes_root, tiny_encoder, tmp_path):
    """The law above would hold for a dropout that does nothing."""
    words = [*LORA, "llm.quantization=nf4", "adapter.dropout=0", "adapter.merge=false", "optim.lr=1e-2"]
    run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "run", *words, grid="2x2"))
    one, other = (load_file(run / "final" / "adapter" / "adapter_model.safetensors") for run in (apart, tmp_path / "run"))
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_a_run_starts_from_an_adapter_of_the_same_base(apart, scenes_root, tiny_encoder, tmp_path):
    path = f"adapter.path={apart / 'final' / 'adapter'}"
    words = [*LORA, "optim.lr=1e-30", "connector_lr_scale=1", "optim.weight_decay=0", "adapter.merge=false", path]
    run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "a", *words, "llm.quantization=nf4", grid="2x2"))
    for name in ("adapter_model", "connector"):  # at no learning rate it stays what it was
        one, other = (load_file(run / "final" / "adapter" / f"{name}.safetensors") for run in (apart, tmp_path / "a"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    done = run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "b", *words, grid="2x2"), check=False)
    assert done.returncode == 2 and "was made for another decoder" in done.stderr and "Traceback" not in done.stderr


def test_only_what_the_plan_names_changes_in_the_written_assistant(scenes_root, tiny_encoder, tmp_path):
    full = tuning(scenes_root, tiny_encoder, tmp_path / "a", "optim.lr=1e-30", "optim.weight_decay=0", "connector_lr_scale=1", grid="2x2")
    done = run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "b", *LORA, "adapter.targets=[q_proj, up_proj]", "optim.lr=1e-2", grid="2x2"))
    assert "with adapter" in done.stdout + done.stderr
    run_cli(*full)
    before, after = (load_file(tmp_path / name / "final" / "model.safetensors") for name in "ab")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if part_of(name) == "connector" or name.split(".")[-2] in ("q_proj", "up_proj") and part_of(name) == "llm"}


def test_two_processes_that_shard_adapters_train_the_assistant_of_one(scenes_root, tiny_encoder, tmp_path):
    words = [*LORA, "optim.lr=1e-2", "optim.steps=3"]
    launch.run_in_processes([*tuning(scenes_root, tiny_encoder, tmp_path / "two", *words, grid="2x2"), "train.strategy=fsdp2"], 2)
    run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "one", *words, grid="2x2"))
    two, one = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys() and max(float((two[k] - one[k]).abs().max()) for k in one) < 1e-4


# ------------------------------------------------------------------------------------------------------- 8-bit moments


def matrix_and_optimizer(states):
    torch.manual_seed(0)
    named = [("w", nn.Parameter(torch.randn(96, 64))), ("b", nn.Parameter(torch.randn(64)))]
    optim = Optimizer(lr=1e-2, states=states, decoupled=False, weight_decay=0.1)
    return named, build_optimizer(parameter_groups(named, dict.fromkeys(("w", "b"), "weight"), optim, {}), optim)


def test_8_bit_moments_step_clip_and_skip_like_whole_ones():
    pytest.importorskip("bitsandbytes")
    placement, ends = Placement("single", "fp32"), {}
    for states in ("fp32", "8bit"):
        named, optimizer = matrix_and_optimizer(states)
        model = nn.ParameterDict(named)
        generator = torch.Generator().manual_seed(1)
        for clip in (0.0, 1.0, 1.0, 0.0):
            for _, parameter in named:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            placement.step(model, optimizer, clip)
        ends[states] = [p.detach().clone() for _, p in named]
        before = {k: v.clone() for k, v in placement.state_tensors(model, optimizer).items()}
        for _, parameter in named:
            parameter.grad = torch.full_like(parameter, float("nan"))
        placement.step(model, optimizer, 1.0)
        after = placement.state_tensors(model, optimizer)
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert (before["exp_avg.w"].dtype, before["exp_avg.b"].dtype) == (torch.uint8, torch.float32)  # small ones stay whole
    moved = 4 * 1e-2
    assert (ends["fp32"][0] - ends["8bit"][0]).abs().mean() < 0.02 * moved and (ends["fp32"][1] - ends["8bit"][1]).abs().max() < 1e-5


def test_8_bit_moments_come_back_bit_for_bit(scenes_root, tiny_encoder, tmp_path):
    words = ["optim.states=8bit", "optim.lr=1e-2"]
    run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "a", *words))
    run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "b", *words, "train.stop_after=3"))
    [saved] = sorted((tmp_path / "b" / "checkpoints").glob("step_*"))[-1:]
    stored = {key: tensor for file in saved.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert stored["exp_avg.assistant.lm_head.weight"].dtype == torch.uint8 and "exp_avg_scales.assistant.lm_head.weight" in stored
    run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "b", *words))
    assert_same_weights(tmp_path / "a" / "final", tmp_path / "b" / "final")


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("keys", "strategy", "named"), [
    (dict(compile=True), "single", "train.compile: true is for pre-training"),
    (dict(quantization="nf4"), "single", "llm.quantization: nf4 weights cannot be trained"),
    (dict(quantization="nf4", kind="lora"), "fsdp2", "llm.quantization: nf4 does not go with train.strategy: fsdp2"),
    (dict(quantization="int8", kind="lora"), "zero3", "llm.quantization: int8 does not go with train.strategy: zero3"),
    (dict(states="8bit"), "zero2", "optim.states: 8bit does not go with train.strategy: zero2"),
    (dict(states="8bit"), "fsdp2", "optim.states: 8bit does not go with train.strategy: fsdp2"),
    (dict(kind="dora"), "zero3", "adapter.kind: dora"),
    (dict(kind="dora", quantization="int8"), "single", "adapter.kind: dora reads whole weights in every pass"),
    (dict(kind="lora", trainable=["connector"]), "single", "adapter.kind: lora trains the llm, but trainable .connector. does not"),
    (dict(path="x"), "single", "adapter.path: names an adapter to start from, but adapter.kind is none"),
    (dict(merge=False), "single", "adapter.merge: false"),
    (dict(kind="lora", merge=False, trainable=["encoder", "llm"]), "single", "adapter.merge: false"),
    (dict(kind="lora", path="x", connector_path="y"), "single", "connector_path: adapter.path brings a connector"),
])  # fmt: skip
def test_pairs_that_do_not_go_together_are_refused_in_one_line(keys, strategy, named):
    recipe = SftRecipe(trainable=keys.pop("trainable", PARTS), connector_path=keys.pop("connector_path", None))
    recipe.llm.quantization, recipe.optim.states = keys.pop("quantization", "none"), keys.pop("states", "fp32")
    recipe.train.compile = keys.pop("compile", False)
    recipe.adapter = Adapter(**keys)
    with pytest.raises(UserError, match=f"^{named}[^\n]*$"):
        check_tuning(recipe, SimpleNamespace(strategy=strategy))


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_every_pair_that_is_named_as_good_passes(strategy):
    recipe = SftRecipe(adapter=Adapter("dora", merge=False), llm=LanguageModel(quantization="nf4"))
    recipe.optim.states = "8bit"
    check_tuning(recipe, SimpleNamespace(strategy=strategy))
    check_tuning(SftRecipe(trainable=["connector"], llm=LanguageModel(quantization="int8")), SimpleNamespace(strategy=strategy))
