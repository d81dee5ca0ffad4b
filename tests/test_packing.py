"""Rows of a step on processes and micro-batches: nothing lost, little idle, and rows that never see each other."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from aimv2_vlm.config import UserError
from aimv2_vlm.data.packing import idle_share, pack_rows
from aimv2_vlm.models import assistant as assistants
from aimv2_vlm.models.assistant import cross_entropy_sum, rows_apart, see_rows_apart, supervised_places


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3000), max_size=60), world=st.integers(1, 9), budget=st.integers(1, 6000),
    max_rows=st.none() | st.integers(1, 20),
)  # fmt: skip
def test_every_row_lies_once_within_the_budget_and_processes_have_as_many_micro_batches(lengths, world, budget, max_rows):
    plan = pack_rows(lengths, world, budget, max_rows)
    assert len(plan) == world and len({len(process) for process in plan}) == 1
    assert sorted(row for process in plan for rows in process for row in rows) == list(range(len(lengths)))
    for rows in (rows for process in plan for rows in process):
        assert rows == sorted(rows) and (len(rows) <= 1 or sum(lengths[row] for row in rows) <= budget)
        assert max_rows is None or len(rows) <= max_rows
    assert plan == pack_rows(list(lengths), world, budget, max_rows)


def real_lengths(seed: int, count: int = 128) -> list[int]:
    """As LLaVA's mixture at one view: 576 image tokens, texts of a few to a thousand tokens, one row of sixteen without a picture."""
    rng = random.Random(seed)
    return [(rng.random() > 1 / 16) * 576 + min(1400, int(rng.lognormvariate(5.2, 0.8)) + 8) for _ in range(count)]


@pytest.mark.parametrize("budget", [4096, 8192, 16384])
def test_eight_processes_wait_less_than_three_per_cent(budget):
    for seed in range(10):
        lengths = real_lengths(seed)
        plan = pack_rows(lengths, 8, budget)
        assert idle_share(plan, lengths) <= 0.03 and idle_share(plan, lengths, together=True) <= 0.03


def test_idle_share_is_its_definition():
    lengths = [4, 2, 3, 1]
    plan = [[[0], [3]], [[1], [2]]]  # loads 4, 1 and 2, 3
    assert idle_share(plan, lengths) == 0  # 5 tokens each
    assert idle_share(plan, lengths, together=True) == pytest.approx(1 - 10 / (2 * (4 + 3)))
    assert idle_share([[[]], [[]]], []) == 0


WINDOW = 4
WINDOWED = {"mistral": {}, "phi3": {"pad_token_id": 0}, "gemma3_text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "qwen2": {"use_sliding_window": True, "max_window_layers": 1}}


def decoder(kind: str, attention: str = "sdpa", **more) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, bos_token_id=2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more), attn_implementation=attention).eval()


def windowed(kind: str, attention: str = "sdpa") -> nn.Module:
    """Layers that see WINDOW tokens; weights large enough for what they see to matter."""
    llm = decoder(kind, attention, sliding_window=WINDOW, **WINDOWED[kind])
    for parameter in llm.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return llm


class Holder(nn.Module):
    """As much of an assistant as the switch and the check touch."""

    def __init__(self, llm: nn.Module):
        super().__init__()
        self.model, self.lm_head, self.generation_config = nn.Module(), llm.get_output_embeddings(), None
        self.model.language_model = llm.base_model
        self.model.vision_tower = nn.Linear(1, 1)
        self.config = type("Config", (), {"text_config": llm.config})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", *(f"{kind} with a window" for kind in WINDOWED)])
def test_rows_behind_each_other_are_the_rows_alone(kind, attention):
    """Grouped heads too, and layers that see a few tokens only; hidden states and gradients."""
    llm = windowed(kind.split()[0], attention) if kind.endswith("window") else decoder(kind, attention)
    holder = Holder(llm)
    rows = [torch.randint(0, 50, (n,)) for n in (5, 1, 9)]
    lengths = tuple(map(len, rows))
    alone = [llm.model(input_ids=row[None]).last_hidden_state[0] for row in rows]
    weights = torch.randn(15, 32)  # a sum of squares hardly changes behind the last norm
    (weights * torch.cat(alone)).sum().backward()
    expected = {name: p.grad.clone() for name, p in llm.model.named_parameters()}
    llm.zero_grad()
    see_rows_apart(holder, True)
    assert llm.config._attn_implementation == (assistants.ROWS_APART if attention == "sdpa" else "eager")
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    together = llm.model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False, row_lengths=lengths).last_hidden_state[0]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    (weights * together).sum().backward()
    for name, parameter in llm.model.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    see_rows_apart(holder, False)
    assert llm.config._attn_implementation == attention


def test_a_decoder_that_sees_the_row_before_is_refused(monkeypatch):
    model = assistants.AssistantForTraining(Holder(decoder("llama")))
    assistants.check_rows_apart(model)
    monkeypatch.setattr(assistants, "rows_apart", lambda *a, row_lengths=None, **k: rows_apart(*a, **k))
    with pytest.raises(UserError, match="sees the row before.*micro_batch_size=1"):
        assistants.check_rows_apart(model)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_that_attention_would_leave_out_is_refused_and_kept_as_it_was(kind, together, monkeypatch):
    llm = windowed(kind)
    model = assistants.AssistantForTraining(Holder(llm))
    assistants.check_rows_apart(model, together)
    assert llm.config.sliding_window == WINDOW
    assert {layer.self_attn.sliding_window for layer in llm.model.layers if getattr(layer.self_attn, "sliding_window", None)} <= {WINDOW}
    monkeypatch.setattr(assistants, "rows_apart", lambda *a, sliding_window=None, **k: rows_apart(*a, **k))
    with pytest.raises(UserError, match="attention that tuning would replace.*llm.attention=eager"):
        assistants.check_rows_apart(model, together)
    assert llm.config.sliding_window == WINDOW


@pytest.mark.parametrize("kind", ["gpt_neox", "phi"])
def test_a_last_block_of_other_names_is_computed_whole(kind):
    """Its attention's last layer is not called o_proj; the loss is what all positions give."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=1, bos_token_id=2)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    holder = Holder(llm)
    model = assistants.AssistantForTraining(holder)
    ids, places = torch.randint(0, 50, (1, 9)), torch.tensor([2, 3, 7])
    whole = llm.base_model(input_ids=ids).last_hidden_state[0, places]
    model._places, model._length = places, 9
    picked = llm.base_model(input_ids=ids).last_hidden_state[0, places]
    torch.testing.assert_close(picked, whole, atol=1e-6, rtol=1e-6)


def test_experts_that_return_their_routers_scores_too_are_put_back():
    """GPT-OSS's last block computes what is read alone, as others do."""
    llm = decoder("gpt_oss", "eager", num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=4)
    model = assistants.AssistantForTraining(Holder(llm))
    ids, places = torch.randint(0, 50, (1, 9)), torch.tensor([2, 3, 7])
    whole = llm.base_model(input_ids=ids).last_hidden_state[0, places]
    seen = []
    llm.base_model.layers[-1].mlp.router.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[-2]))
    model._places, model._length = places, 9
    torch.testing.assert_close(llm.base_model(input_ids=ids).last_hidden_state[0, places], whole, atol=1e-6, rtol=1e-6)
    assert seen == [3]


def test_a_decoder_whose_attention_does_not_run_with_rows_apart_is_refused_in_a_line():
    """Falcon builds its mask by itself where its own sdpa is asked for."""
    model = assistants.AssistantForTraining(Holder(decoder("falcon", new_decoder_architecture=True, num_kv_heads=2)))
    with pytest.raises(UserError, match="FalconModel does not run with rows behind each other.*llm.attention=eager"):
        assistants.check_rows_apart(model)


def test_int8_layers_with_outliers_are_no_sign_of_rows_seen():
    """LLM.int8() keeps columns in 16 bits that any token of a call makes large: a row rounds differently behind another."""
    pytest.importorskip("bitsandbytes")
    from aimv2_vlm.config import LanguageModel
    from aimv2_vlm.models import adapters

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=50, hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4,
                                  num_key_value_heads=2, eos_token_id=1, bos_token_id=2)
    llm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in llm.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08)
    holder = Holder(llm)
    adapters.quantize(holder, LanguageModel(quantization="int8"), torch.float32)
    model = assistants.AssistantForTraining(holder)
    linear = holder.model.language_model.layers[0].mlp.down_proj
    before = linear.state.threshold
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assistants, "_outlier_thresholds", lambda module: [])
        with pytest.raises(UserError, match="sees the row before"):
            assistants.check_rows_apart(model)
    assistants.check_rows_apart(model)
    assert linear.state.threshold == before > 0


def test_chunks_of_the_vocabulary_head_change_nothing():
    torch.manual_seed(0)
    head, hidden, targets = nn.Linear(16, 30, bias=False), torch.randn(11, 16, requires_grad=True), torch.randint(0, 30, (11,))
    whole = cross_entropy_sum(head, hidden, targets)
    whole.backward()
    expected = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    parts = cross_entropy_sum(head, hidden, targets, chunk=4)
    parts.backward()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close((hidden.grad, head.weight.grad), expected)


def test_supervised_places_stay_inside_their_row():
    labels = torch.tensor([[-100, 5, 6, -100, -100, 7]])
    assert supervised_places(labels, [3, 3]).tolist() == [0, 1, 4]
    assert supervised_places(labels, [3, 3], torch.tensor([1.0, 0.0])).tolist() == [0, 1]
