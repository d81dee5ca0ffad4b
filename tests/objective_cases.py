"""Each pre-training objective at a tiny size beside its oracle, for test_objectives.py, test_contrastive.py and benchmarks/objective_curves.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import oracles
import torch
from oracles import Batch, Sizes, State

from aimv2_vlm.config import Decoder, Encoder, ImageInput, Native, Objective, Optimizer, PretrainRecipe, Text, TextTower
from aimv2_vlm.data.native import collate_native, patchify
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.loop import add_counts, losses, run_step, weighted_loss
from aimv2_vlm.train.objectives import TrainingObjective
from aimv2_vlm.train.optim import build_optimizer, learning_rate, parameter_groups
from aimv2_vlm.train.run import build_pretraining_model, pretraining_objective, seeded

SIZES = Sizes(encoder_heads=2, decoder_heads=2, patch=4, mean=[0.5, 0.4, 0.45], std=[0.25, 0.3, 0.2])
SIDE, CONTEXT, VOCAB, EOS, ROWS = 4, 7, 31, 1, 5
NUM_PATCHES = SIDE**2
ALPHA, PARALLEL, SHARE = 0.3, 0.6, 0.4  # no key's default
GRIDS = [(2, 5), (3, 3), (4, 3), (1, 6), (3, 4)]  # of native batches


@dataclass
class Case:
    """keys: of `Objective`. oracle(state, batch, sizes) -> losses."""

    keys: dict[str, Any]
    oracle: Callable[[State, Batch, Sizes], dict[str, torch.Tensor]]
    native: bool = False
    attention: str = "sdpa"
    frozen: tuple[str, ...] = ()  # beginnings of names
    layers: int = 2

    def recipe(self) -> PretrainRecipe:
        return PretrainRecipe(
            image=ImageInput(size=SIDE * SIZES.patch, mean=SIZES.mean, std=SIZES.std, native=Native(capacity=64 if self.native else None)),
            text=Text(context_length=CONTEXT),
            encoder=Encoder(patch_size=SIZES.patch, hidden_size=32, intermediate_size=40, num_layers=self.layers, num_heads=SIZES.encoder_heads,
                            position_embedding="sincos" if self.native else "learned", attention=self.attention),
            decoder=Decoder(hidden_size=24, intermediate_size=36, num_layers=self.layers, num_heads=SIZES.decoder_heads),
            objective=Objective(pixel_weight=ALPHA, parallel_fraction=PARALLEL, **self.keys,
                                text_tower=TextTower(hidden_size=20, intermediate_size=28, num_layers=self.layers, num_heads=SIZES.decoder_heads, projection_size=12)),
        )

    def model(self, spread: float = 0.1) -> torch.nn.Module:
        """The recipe's model; `spread` moves norms, biases and single vectors off the ones and zeros that hide mistakes."""
        recipe = self.recipe()
        if recipe.objective.name == "lit":  # which goes on from a trained encoder; here the encoder of clip is as good
            recipe.objective.name = "clip"
        model = seeded(0, partial(build_pretraining_model, recipe, VOCAB, EOS))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter += spread * torch.randn(parameter.shape)
                parameter.requires_grad_(not name.startswith(self.frozen) if self.frozen else True)
        return model

    def objective(self) -> TrainingObjective:
        return pretraining_objective(self.recipe())

    def batch(self, step: int, rows: int = ROWS) -> Batch:
        """Captions of 1 to 7 tokens, any prefixes, and one row that does not count."""
        generator = torch.Generator().manual_seed(1000 + step)

        def draw(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=generator)

        contrastive = self.keys["name"] in ("clip", "lit")
        lengths = draw(2 if contrastive else 1, CONTEXT + 1, rows)
        lengths[:2] = torch.tensor([CONTEXT, 2])
        weights = torch.ones(rows)
        weights[2 + step % (rows - 2)] = 0
        lengths[weights == 0] = 0  # as the data loader leaves a bad sample
        ids = draw(3, VOCAB, rows, CONTEXT)  # what stands behind a caption may be any id …
        if contrastive:  # … but two towers read rows up to the first end token and compare whole rows
            for row, length in enumerate(lengths.tolist()):
                ids[row, max(0, length - 1) :] = EOS
        batch = {"input_ids": ids, "text_lengths": lengths, "weights": weights, "draws": draw(0, 2**62, rows) * 2, "bad": [],
                 "prefix_lengths": draw(1, NUM_PATCHES, rows)}
        if not self.native:
            return batch | {"pixels": draw(0, 256, rows, 3, SIDE * SIZES.patch, SIDE * SIZES.patch).to(torch.uint8)}
        grids = [GRIDS[(step + row) % len(GRIDS)] for row in range(rows)]
        pictures = [draw(0, 256, 3, r * SIZES.patch, c * SIZES.patch).to(torch.uint8) for r, c in grids]
        made = collate_native([patchify(picture, SIZES.patch) for picture in pictures], grids, 14)
        batch["prefix_lengths"] = torch.cat([draw(1, r * c, 1) for r, c in grids])
        return batch | made


def parallel_rows(batch: Batch) -> torch.Tensor:
    """The 63 random bits of a sample, read as a number from 0 to 1, say whether its caption is decoded in parallel."""
    return batch["draws"].double() / 2**63 < PARALLEL


def kept_patches(case: Case, batch: Batch) -> torch.Tensor:
    """(B, N): which patches captions are decoded from is the objective's draw (see its own laws); what follows is the oracle's."""
    num_patches = batch["patches"].shape[1] if case.native else NUM_PATCHES
    drawn = case.objective()._drawn_patches(batch, num_patches)
    return torch.zeros(len(drawn), num_patches, dtype=torch.bool).scatter(1, drawn, True)


def _generative(**arguments: Any) -> Callable[[State, Batch, Sizes], dict[str, torch.Tensor]]:
    return partial(oracles.generative, **arguments)


def _cappa(state: State, batch: Batch, sizes: Sizes, **arguments: Any) -> dict[str, torch.Tensor]:
    return oracles.generative(state, batch, sizes, parallel=parallel_rows(batch), **arguments)


def _some_patches(state: State, batch: Batch, sizes: Sizes, **arguments: Any) -> dict[str, torch.Tensor]:
    case = CASES["captioning some patches" if "pixels" in batch else "captioning some patches native"]
    return oracles.generative(state, batch, sizes, kept=kept_patches(case, batch), **arguments)


_BIDIRECTIONAL = {"name": "captioning", "attention": "bidirectional"}
CASES = {
    "aimv2": Case({"name": "aimv2"}, _generative(alpha=ALPHA)),
    "aimv2 separate": Case({"name": "aimv2", "decoders": "separate"}, _generative(alpha=ALPHA, separate=True)),
    "aimv2 native": Case({"name": "aimv2"}, _generative(alpha=ALPHA), native=True),
    "aimv1": Case({"name": "aimv1"}, _generative(alpha=1.0, text=False)),
    "aimv1 native": Case({"name": "aimv1"}, _generative(alpha=1.0, text=False), native=True),
    "captioning": Case({"name": "captioning"}, _generative()),
    "captioning bidirectional": Case(_BIDIRECTIONAL, _generative(encoder_bidirectional=True)),
    "captioning some patches": Case({"name": "captioning", "caption_patches": SHARE}, _some_patches),
    "captioning some patches native": Case(_BIDIRECTIONAL | {"caption_patches": SHARE}, partial(_some_patches, encoder_bidirectional=True), native=True),
    "cappa": Case({"name": "cappa"}, _cappa),
    "cappa bidirectional": Case({"name": "cappa", "attention": "bidirectional"}, partial(_cappa, encoder_bidirectional=True)),
    "genlip": Case({"name": "genlip"}, oracles.genlip),
    "clip": Case({"name": "clip"}, oracles.contrastive),
    "lit": Case({"name": "lit"}, oracles.contrastive, frozen=("towers.vision_model.embeddings", "towers.vision_model.encoder", "towers.vision_model.rms_norm")),
}


# -------------------------------------------------------------------------------------------------------------- comparing


def oracle_step(case: Case, state: State, batch: Batch) -> tuple[dict[str, float], State]:
    """The oracle's losses and the gradient of every trainable weight of `state`, in the precision of `state`."""
    leaves = {name: tensor.detach().requires_grad_(not name.startswith(case.frozen) if case.frozen else True) for name, tensor in state.items()}
    found = case.oracle(leaves, batch, SIZES)
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(found["loss"], list(trained.values()), allow_unused=True, materialize_grads=True)
    return {name: float(value.detach()) for name, value in found.items()}, dict(zip(trained, gradients, strict=True))


def loop_gradients(case: Case, model: torch.nn.Module, batches: list[Batch]) -> dict[str, float]:
    """The losses that the loop makes of one step's micro-batches; the step's gradient is left in the model."""
    objective, placement = case.objective(), Placement("single", "fp32")
    counts, totals = add_counts(objective, batches), {}
    for batch in batches:
        sums = objective.sums(model, batch, placement.device)
        weighted_loss(objective, sums, counts).backward()
        totals = {name: totals.get(name, 0) + value.detach() for name, value in sums.items()}
    return losses(objective, totals, counts, placement)


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cut(batch: Batch, sizes: list[int]) -> list[Batch]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [{k: v[end - size : end] for k, v in batch.items()} for size, end in zip(sizes, ends, strict=True)]


def curves(case: Case, optim: Optimizer, rows: int = ROWS) -> tuple[list[float], list[float]]:
    """(losses of the project's loop and optimizer, losses of the oracle under the written-out optimizer), step by step."""
    model, objective, placement = case.model(), case.objective(), Placement("single", "fp32")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), model.parameter_roles(), optim, {}), optim)
    definition = oracles.DecoupledAdamW(state, peak=optim.lr, weight_decay=optim.weight_decay, betas=tuple(optim.betas), eps=optim.eps, clip=optim.clip)
    ours, theirs = [], []
    for step in range(optim.steps):
        batch, rate = case.batch(step, rows), learning_rate(step, optim)
        for group in optimizer.param_groups:
            group["lr"] = rate
        counts = add_counts(objective, [batch])
        sums, _ = run_step(objective, model, optimizer, [batch], counts, placement, optim.clip)
        ours.append(losses(objective, sums, counts, placement)["loss"])
        found, gradients = oracle_step(case, state, batch)
        definition.step(gradients, rate)
        theirs.append(found["loss"])
    return ours, theirs
