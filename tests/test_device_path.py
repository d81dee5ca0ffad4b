"""What makes a step fast on a GPU, proved without one: operations counted right, one graph, no wait for the device."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from aimv2_vlm.config import Objective, Optimizer, TextTower, UserError
from aimv2_vlm.models.contrastive import TwoTowerForPreTraining
from aimv2_vlm.models.encoder import build_encoder
from aimv2_vlm.models.genlip import GenLIPForPreTraining
from aimv2_vlm.models.pretraining import AIMv2ForPreTraining, encoder_flops
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.objectives import ContrastiveObjective, GenerativeObjective
from aimv2_vlm.train.optim import build_optimizer, parameter_groups
from aimv2_vlm.train.precision import convert_to_fp8

PATCH, SIDE, VOCAB, CONTEXT, BATCH = 14, 56, 50, 8, 4
NUM_PATCHES = (SIDE // PATCH) ** 2
OBJECTIVES = {
    "aimv2": {},
    "separate": {"decoders": "separate"},
    "aimv1": {},
    "captioning": {"attention": "bidirectional"},
    "caption_third": {"caption_patches": 0.34},
    "cappa": {},
    "genlip": {},
    "native": {},
    "clip": {},
}
NAMES = {"separate": "aimv2", "caption_third": "captioning", "native": "aimv2"}


def build(kind: str, *, width: int = 32, layers: int = 2, size: int = SIDE, vocab: int = VOCAB, context: int = CONTEXT):
    """(model, objective) of a kind of OBJECTIVES."""
    name = NAMES.get(kind, kind)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_layers": layers, "num_heads": 2}
    encoder = build_encoder(image_size=size, **sizes, position_embedding="sincos" if kind == "native" else "learned")
    settings = Objective(name=name, **OBJECTIVES[kind])
    if name == "clip":
        tower = TextTower(**sizes, projection_size=width)
        model = TwoTowerForPreTraining(encoder, tower, vocab_size=vocab, context_length=context, eos_token_id=vocab - 1)
        return model, ContrastiveObjective(PATCH, [0.5] * 3, [0.25] * 3)
    if name == "genlip":
        model = GenLIPForPreTraining(encoder, vocab_size=vocab, context_length=context)
    else:
        model = AIMv2ForPreTraining(
            encoder, **{f"decoder_{key}": value for key, value in sizes.items()}, vocab_size=vocab, context_length=context,
            predicts_patches=name in ("aimv2", "aimv1"), predicts_text=name != "aimv1",
            separate_decoders=settings.decoders == "separate", parallel_captions=name == "cappa",
        )  # fmt: skip
    return model, GenerativeObjective(settings, PATCH, [0.5] * 3, [0.25] * 3)


def make_batch(kind: str, seed: int = 0, full: bool = False, size: int = SIDE, vocab: int = VOCAB, context: int = CONTEXT) -> dict:
    """A collated micro-batch as the data gives it; `full`: no padding anywhere and no row of weight 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    num_patches = (size // PATCH) ** 2
    lengths = torch.full((BATCH,), context) if full else draw(2, context + 1, BATCH)
    weights = torch.ones(BATCH)
    weights[1] = float(full)
    batch = {
        "input_ids": draw(2, vocab - 1, BATCH, context), "text_lengths": lengths, "prefix_lengths": draw(1, num_patches - 4, BATCH),
        "draws": draw(0, 2**62, BATCH), "weights": weights, "bad": [],
    }  # fmt: skip
    batch["input_ids"][torch.arange(BATCH), lengths - 1] = vocab - 1
    if kind != "native":
        return batch | {"pixels": draw(0, 256, BATCH, 3, size, size).to(torch.uint8)}
    positions = torch.cartesian_prod(torch.arange(size // PATCH), torch.arange(size // PATCH)).expand(BATCH, -1, -1)
    num_real = torch.full((BATCH,), num_patches) - (0 if full else draw(0, 4, BATCH))
    return batch | {"patches": draw(0, 256, BATCH, num_patches, 3 * PATCH**2).to(torch.uint8), "positions": positions, "num_real": num_real}


def loss_of(objective, sums, batch):
    counts = objective.counts(batch)
    return sum(weight * sums[term] / counts[term] for term, weight in objective.weights.items())


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_operations_are_those_that_torch_counts(kind):
    """Within 1 % at a width where the one product without a backward one (of the pixels) is as small as in the real models."""
    shapes = {"size": 112, "vocab": 2048, "context": 16}
    with torch.device("meta"):
        model, objective = build(kind, width=1024, layers=6, **shapes)
    batch = make_batch(kind, full=True, **shapes)
    with FlopCounterMode(display=False) as counter:
        sums = objective.sums(model, batch, torch.device("meta"))
        loss_of(objective, sums, batch).backward()
    assert objective.flops(model, batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(("sizes", "tera"), [
    ((1024, 2816, 8), 0.83), ((1536, 4096, 12), 1.41), ((2048, 5632, 16), 2.27), ((3072, 8192, 24), 4.57),
])  # fmt: skip
def test_a_picture_costs_what_the_paper_sizes_cost(sizes, tera):
    width, intermediate, heads = sizes
    with torch.device("meta"):
        encoder = build_encoder(image_size=224, hidden_size=width, intermediate_size=intermediate, num_layers=24, num_heads=heads)
        model = AIMv2ForPreTraining(
            encoder, decoder_hidden_size=1024, decoder_intermediate_size=2816, decoder_num_layers=12, decoder_num_heads=8,
            vocab_size=32_000, context_length=77,
        )  # fmt: skip
    cost = 3 * model.forward_flops(1, num_patches=256, num_tokens=77, scored_patches=128)
    assert cost / 1e12 == pytest.approx(tera, abs=0.012)
    if width == 1024:
        assert 1 - 3 * encoder_flops(encoder, 1, 256) / cost == pytest.approx(0.40, abs=0.015)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_padding_and_holes_cost_nothing(kind):
    model, objective = build(kind)
    whole, part = make_batch(kind, full=True), make_batch(kind, full=True)
    part["weights"] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    kept = {k: v[::2] if torch.is_tensor(v) else v for k, v in whole.items()}
    assert objective.flops(model, part) == objective.flops(model, kept) < objective.flops(model, whole)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_forward_and_backward_wait_for_no_device(kind):
    """On the meta device any reading of a value raises."""
    with torch.device("meta"):
        model, objective = build(kind)
    batch = make_batch(kind)
    loss_of(objective, objective.sums(model, batch, torch.device("meta")), batch).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_optimizer_step_waits_for_no_device():
    """Clipping, the check for a gradient that is not finite, the update: in a mode where reading a value raises."""
    placement, optim = Placement("single", "fp32"), Optimizer(steps=10, warmup_steps=1)
    model, _ = build("aimv2")
    mode = FakeTensorMode()
    named = [(name, torch.nn.Parameter(mode.from_tensor(p.detach()))) for name, p in model.named_parameters()]
    with mode:
        optimizer = build_optimizer(parameter_groups(named, model.parameter_roles(), optim, {}), optim)
        for _, parameter in named:
            parameter.grad = torch.empty_like(parameter)
        norm = placement.step(model, optimizer, clip=1.0)
        with pytest.raises(DataDependentOutputException):
            float(norm)


@pytest.mark.parametrize("kind", ["aimv2", "cappa", "genlip", "native", "clip"])  # the others are parts of these
def test_one_graph_and_no_new_one_for_other_lengths(kind):
    """The model compiles without a break; other prefixes and captions make it compile once more (sizes become symbols), not each time."""
    torch._dynamo.reset()
    model, objective = build(kind, layers=1)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    eager = [loss_of(objective, objective.sums(model, make_batch(kind, seed), torch.device("cpu")), make_batch(kind, seed)) for seed in range(5)]
    model.compile(fullgraph=True, backend=count)
    for seed in range(5):
        # every column of ids is read, as on a GPU, where one shape is worth more than trimming
        batch = make_batch(kind, seed)
        batch["text_lengths"][0] = CONTEXT
        batch["input_ids"][0] = torch.arange(2, 2 + CONTEXT) if kind != "clip" else batch["input_ids"][0]
        objective.sums(model, batch, torch.device("cpu"))
    assert len(graphs) <= 2
    compiled = loss_of(objective, objective.sums(model, make_batch(kind, 0), torch.device("cpu")), make_batch(kind, 0))
    torch.testing.assert_close(compiled, eager[0], atol=0, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ fp8


def gradient(model, objective, batch, bf16: bool) -> torch.Tensor:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss_of(objective, objective.sums(model, batch, torch.device("cpu")), batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["aimv2", "genlip", "native", "clip"])
def test_fp8_rounds_the_blocks_products_and_nothing_else(kind):
    """Products of 8 bits (emulated here) give nearly the gradient; weights, names and what lies outside the blocks are as before; still one graph."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, objective = build(kind, width=64)
    batch, names = make_batch(kind), [name for name, _ in model.named_parameters()]
    heads = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layers." not in name]
    weights = {name: (p, p.clone()) for name, p in model.named_parameters()}
    exact, halved = gradient(model, objective, batch, bf16=False), gradient(model, objective, batch, bf16=True)
    in_blocks = sum(isinstance(module, torch.nn.Linear) for module in model.modules()) - len(heads)
    assert heads and convert_to_fp8(model) == in_blocks > 0
    assert [name for name, _ in model.named_parameters()] == names and not [name for name in model.state_dict() if name not in names and "position" not in name]
    assert all(p is weights[name][0] and torch.equal(p, weights[name][1]) and p.dtype == torch.float32 for name, p in model.named_parameters())
    assert all(type(model.get_submodule(name)) is torch.nn.Linear for name in heads)
    eighth = gradient(model, objective, batch, bf16=True)
    near, nearer = (float(torch.nn.functional.cosine_similarity(exact, other, dim=0)) for other in (eighth, halved))
    assert 0.95 < near < 0.9985 and near < nearer
    graphs = []
    model.compile(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    objective.sums(model, batch, torch.device("cpu"))
    assert len(graphs) == 1


def test_fp8_leaves_what_is_frozen_or_has_odd_sides():
    model, _ = build("aimv2", width=32)
    model.encoder.requires_grad_(False)
    decoder = sum(isinstance(module, torch.nn.Linear) for module in model.decoder.modules())
    assert convert_to_fp8(model) == decoder
    assert all(type(module) is torch.nn.Linear for module in model.encoder.modules() if isinstance(module, torch.nn.Linear))
    with pytest.raises(UserError, match="precision: fp8, but no trained linear layer of the blocks has sides that are multiples of 16; write bf16"):
        convert_to_fp8(build("aimv2", width=24)[0])


def test_fp8_without_its_package_or_its_arithmetic_is_refused_in_a_line(monkeypatch):
    model, _ = build("aimv2")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchao.float8", None)
        with pytest.raises(UserError, match=r"precision: fp8 needs torchao .*; pip install 'aimv2-vlm\[fp8\]', or write bf16"):
            convert_to_fp8(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(UserError, match="precision: NVIDIA A100 has no 8-bit products .compute capability 8.0, needed 8.9.; write bf16"):
        convert_to_fp8(model)
