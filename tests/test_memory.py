"""The memory of a tuning step is known before it begins, and what cannot fit is refused with keys that help."""

from __future__ import annotations

import pytest
import torch
from conftest import run_cli
from test_assistant import build, data, dataset, tokenizer_folder  # noqa: F401
from test_training import tuning

from aimv2_vlm.config import Adapter, LanguageModel, SftRecipe, UserError
from aimv2_vlm.models import adapters
from aimv2_vlm.models.assistant import AssistantForTraining, set_trainable
from aimv2_vlm.train import memory
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.loop import add_counts, run_step
from aimv2_vlm.train.objectives import InstructionObjective
from aimv2_vlm.train.optim import build_optimizer, parameter_groups

WITHIN = 0.10
KINDS = {"full": {}, "8bit": {"states": "8bit"}, "lora": {"kind": "lora"}, "qlora": {"kind": "lora", "quantization": "nf4"}, "dora": {"kind": "dora"}}


def start(folder, rows_folder, grid="1x1", states="fp32", kind="none", quantization="none", size=2):
    """(model, micro-batches of a step, objective, recipe, placement) of a small assistant."""
    assistant, processor = build(folder, grid)
    recipe = SftRecipe(adapter=Adapter(kind, 4, 8), llm=LanguageModel(quantization=quantization))
    recipe.optim.states, recipe.optim.batch_size, recipe.optim.micro_batch_size = states, 8, size
    adapters.quantize(assistant, recipe.llm, torch.float32)
    adapters.add_adapter(assistant, recipe.adapter)
    set_trainable(assistant, ["connector", "llm"])
    rows = dataset(rows_folder, processor)
    batches = sorted(rows.microbatches(range(8), size), key=lambda batch: -batch["input_ids"].shape[1])
    statistics = processor.image_processor.image_mean, processor.image_processor.image_std
    return AssistantForTraining(assistant).train(), batches, InstructionObjective(*statistics), recipe, Placement("single", "fp32")


def measured(model, batches, objective, recipe, placement):
    """Bytes of tensors at the fullest moment of two real steps."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), dict.fromkeys(names, "weight"), recipe.optim, {}), recipe.optim)
    with memory.TensorMemory() as counted:
        for _ in range(2):
            run_step(objective, model, optimizer, batches, add_counts(objective, batches), placement, 1.0)
    return memory.stored_bytes([*model.parameters(), *model.buffers()]) + counted.peak


@pytest.mark.parametrize(("kind", "grid", "size"), [*((kind, "1x1", 2) for kind in KINDS), ("full", "2x2", 8), ("lora", "2x2", 3)])
def test_the_estimate_is_the_measured_peak(tokenizer_folder, data, kind, grid, size):  # noqa: F811
    model, batches, objective, recipe, placement = start(tokenizer_folder, data, grid, **KINDS[kind], size=size)
    drawn = torch.get_rng_state()
    estimated = max((memory.estimate(model, batch, objective.normalize, recipe, placement) for batch in batches[:3]), key=lambda found: found.total)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any(p.is_meta or p.grad is not None for p in model.parameters())
    assert abs(estimated.total / measured(model, batches, objective, recipe, placement) - 1) < WITHIN


def test_storages_are_counted_while_they_live():
    with memory.TensorMemory() as counted:
        one = torch.zeros(1000)
        view, same = one[10:20], one.reshape(10, 100)
        assert (counted.now, counted.peak) == (4000, 4000)
        other = one + 1
        assert counted.now == 8000
        del one, other
        assert counted.now == 4000  # the views keep theirs
        del view, same
        assert (counted.now, counted.peak) == (0, 8000)


def test_what_cannot_fit_is_refused_with_keys_that_would_help(tokenizer_folder, data, monkeypatch):  # noqa: F811
    model, batches, objective, recipe, placement = start(tokenizer_folder, data, size=8)
    needed = memory.estimate(model, batches[0], objective.normalize, recipe, placement)
    resident = memory.stored_bytes([*model.parameters(), *model.buffers()])
    check = lambda: memory.check(model, lambda: batches[:1], objective.normalize, recipe, placement)  # noqa: E731

    def leave(room):
        monkeypatch.setattr(memory, "host_memory", lambda: room - resident)

    leave(needed.total)
    assert check() == needed
    short = needed.activations // 4
    leave(needed.total - short)
    budget = int(needed.tokens * (needed.activations - short) / needed.activations)
    with pytest.raises(UserError, match=rf"^memory: a step needs [^\n]*one of these makes room: [^\n]*data.tokens_per_microbatch={budget}\b[^\n]*$") as told:
        check()
    assert "train.memory_check=off" in str(told.value)
    leave(needed.total // 100)
    with pytest.raises(UserError, match="no key alone makes room: .*optim.states=8bit saves") as told:
        check()
    assert "adapter.kind=lora" in str(told.value)
    recipe.train.memory_check = "off"
    assert check() is None


def test_what_a_key_is_said_to_save_it_saves(tokenizer_folder, data):  # noqa: F811
    totals = {}
    for states in ("fp32", "8bit"):
        model, batches, objective, recipe, placement = start(tokenizer_folder, data, states=states)
        totals[states] = memory.estimate(model, batches[0], objective.normalize, recipe, placement)
    learned = [p for p in model.parameters() if p.requires_grad]
    assert totals["fp32"].states - totals["8bit"].states == memory.state_bytes(learned, "fp32") - memory.state_bytes(learned, "8bit") > 0
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), {n: "weight" for n, _ in model.named_parameters()}, recipe.optim, {}), recipe.optim)
    tensors = placement.state_tensors(model, optimizer)
    real = sum(t.numel() * t.element_size() for name, t in tensors.items() if name.startswith("exp_avg"))
    assert real == totals["8bit"].states


def test_the_limit_of_a_control_group_counts(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  4000 kB\nMemAvailable:    3000 kB\n")
    assert memory.host_memory(tmp_path) == 3000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for limit, room in (("max", 3000 * 1024), ("2000000", 500_000), ("9000000", 3000 * 1024)):
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text("1500000\n")
        assert memory.host_memory(tmp_path) == room


def test_a_run_tells_its_memory_in_one_line(scenes_root, tiny_encoder, tmp_path):
    done = run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "a", "optim.steps=2", grid="2x2"))
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("memory: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in ("weights", "gradients", "optimizer", "activations", "tokens"))
