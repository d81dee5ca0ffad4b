"""A tiny pre-training run through the real loop's parts, for test_distributed.py and benchmarks/distributed_curves.py.

Alone it is the single-process run; under `python -m torch.distributed.run` it goes through strategies one after another
and the main process writes `<strategy>.json` into --out.
"""

from __future__ import annotations

import argparse
import json
import resource
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend

from aimv2_vlm.config import Objective, Optimizer, UserError
from aimv2_vlm.models.encoder import build_encoder
from aimv2_vlm.models.pretraining import AIMv2ForPreTraining
from aimv2_vlm.train import checkpoint
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.loop import add_counts, losses, run_step, validate
from aimv2_vlm.train.objectives import GenerativeObjective
from aimv2_vlm.train.optim import build_optimizer, learning_rate, parameter_groups
from aimv2_vlm.train.precision import convert_to_fp8
from aimv2_vlm.train.run import compile_model

SIZE, PATCH, VOCAB, CONTEXT, BATCH = 56, 14, 61, 12, 8
NUM_PATCHES = (SIZE // PATCH) ** 2
CUTS = [4, 1]  # samples of a micro-batch; the curves are run with 3 and then 1
HALF = 10  # the step whose checkpoint the strategies hand to each other
OPTIM = Optimizer(lr=1e-3, min_lr=1e-4, warmup_steps=3, steps=20, batch_size=BATCH, clip=2.0)
COMPILED = ("ddp", "fsdp2")  # as a whole, block by block
# Who goes on from whose checkpoint; the single process goes on from everyone's.
READS = {"ddp": "zero3", "fsdp2": "single", "zero2": "ddp", "zero3": "fsdp2"}


def build_model(spoiled: bool, encoder_sides: tuple[int, int] = (36, 50), decoder_sides: tuple[int, int] = (28, 38)) -> AIMv2ForPreTraining:
    """One frozen block; odd sizes (width and hidden width), so that shards are uneven. `spoiled`: trained weights that loading must mend."""
    generator = torch.Generator().manual_seed(0)
    encoder = build_encoder(
        image_size=SIZE, hidden_size=encoder_sides[0], intermediate_size=encoder_sides[1], num_layers=2, num_heads=2, generator=generator
    )
    model = AIMv2ForPreTraining(
        encoder, decoder_hidden_size=decoder_sides[0], decoder_intermediate_size=decoder_sides[1], decoder_num_layers=2,
        decoder_num_heads=2, vocab_size=VOCAB, context_length=CONTEXT, generator=generator,
    )
    model.encoder.encoder.layers[0].requires_grad_(False)
    for parameter in filter(lambda p: p.requires_grad and spoiled, model.parameters()):
        parameter.data += 1.0
    return model


def make_optimizer(model: AIMv2ForPreTraining) -> torch.optim.Optimizer:
    """Four groups: with and without decay, learning rate x 1 and x 8 (the connector's factor in tuning)."""
    scales = {name: 8.0 for name, _ in model.named_parameters() if name.startswith("image_projection")}
    return build_optimizer(parameter_groups(model.named_parameters(), model.parameter_roles(), OPTIM, scales), OPTIM)


def sample_rows(step: int) -> dict[str, torch.Tensor]:
    """The global batch of a step: captions of 1 to 12 tokens, prefixes of any length, at times a hole (weight 0)."""
    generator = torch.Generator().manual_seed(1000 + step)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    weights = torch.ones(BATCH)
    weights[step % BATCH] = float(step % 3 != 0)
    return {
        "pixels": draw(0, 256, BATCH, 3, SIZE, SIZE).to(torch.uint8), "input_ids": draw(2, VOCAB, BATCH, CONTEXT),
        "text_lengths": draw(1, CONTEXT + 1, BATCH), "prefix_lengths": draw(1, NUM_PATCHES, BATCH), "weights": weights,
    }


def micro_batches(step: int, size: int, placement: Placement) -> list[dict[str, Any]]:
    """This process's part of the global batch in micro-batches of `size`, the last one maybe smaller."""
    share = BATCH // placement.world
    rows = {key: value[placement.rank * share :][:share] for key, value in sample_rows(step).items()}
    return [{k: v[i : i + size] for k, v in rows.items()} | {"bad": []} for i in range(0, share, size)]


class Poisoned(GenerativeObjective):
    """Not a number on one process only."""

    def __init__(self, rank: int):
        super().__init__(Objective(), PATCH, [0.5] * 3, [0.25] * 3)
        self.rank = rank

    def sums(self, model: torch.nn.Module, batch: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
        bad = torch.distributed.get_rank() == self.rank
        return {k: v * float("nan") if bad else v for k, v in super().sums(model, batch, device).items()}


class Run:
    """A placed model and its optimizer."""

    def __init__(self, strategy: str, spoiled: bool = False, precision: str = "fp32", offload: str = "none", compiled: bool = False):
        self.placement = Placement(strategy, precision, offload)
        self.objective = GenerativeObjective(Objective(), PATCH, [0.5] * 3, [0.25] * 3)
        model = build_model(spoiled) if precision != "fp8" else build_model(spoiled, (48, 64), (32, 48))
        if precision == "fp8":
            convert_to_fp8(model)
        compile_model(model, compiled, self.placement)
        self.model, self.optimizer = self.placement.place(model, make_optimizer)

    def steps(
        self, first: int, last: int, size: int, clip: float = OPTIM.clip, objective: Any = None
    ) -> list[dict[str, float]]:
        """Steps `first` to `last` in micro-batches of `size`; losses and gradient norm of each."""
        rows = []
        objective = objective or self.objective
        for step in range(first, last):
            batches = micro_batches(step, size, self.placement)
            counts = self.placement.sum_counts(add_counts(objective, batches))
            rate = learning_rate(step, OPTIM)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            sums, norm = run_step(objective, self.model, self.optimizer, batches, counts, self.placement, clip)
            rows.append(losses(objective, sums, counts, self.placement) | {"grad_norm": float(norm)})
        return rows

    def validation(self) -> dict[str, float]:
        return validate(self.objective, self.model, micro_batches(99, 3, self.placement), self.placement)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.placement.state_tensors(self.model, self.optimizer)

    def save(self, folder: Path, step: int) -> None:
        state = {"strategy": self.placement.strategy}
        checkpoint.save(folder, step, self.tensors(), state, self.placement, keep_last=2)

    def load(self, folder: Path) -> dict[str, Any]:
        path, state = checkpoint.newest(folder, self.placement)
        tensors = self.tensors()
        checkpoint.load(path, tensors, self.placement)
        self.placement.after_load(self.model, self.optimizer, tensors)
        return state

    def snapshot(self) -> dict[str, torch.Tensor]:
        local = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in self.tensors().items()}
        return {name: tensor.clone() for name, tensor in local.items()}


def gradients(strategy: str, sizes: list[int], out: Path) -> None:
    """A step's gradient for each cut into micro-batches: after one unclipped step AdamW's first moment is 0.1 of it."""
    for size in sizes:
        run = Run(strategy)
        run.steps(5, 6, size, clip=0.0)
        run.save(out / f"gradient_{strategy}_{size}", 1)


def compiled_steps(strategy: str) -> dict[str, Any]:
    """Two steps of the compiled model in bf16, and how many graphs were made of it."""
    compiled, graphs = torch.nn.Module.compile, CompileCounterWithBackend("aot_eager")  # traced as ever; generating code would take minutes
    torch.nn.Module.compile = partialmethod(compiled, backend=graphs)
    try:
        run = Run(strategy, precision="bf16", compiled=True)
        return {"curve": run.steps(0, 2, 4), "graphs": graphs.frame_count}
    finally:
        torch.nn.Module.compile = compiled


def save_where_one_disk_is_full(run: Run, folder: Path) -> list[str]:
    """What every process says when the second one cannot write its shard."""
    message, (soft, hard) = "", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if run.placement.rank == 1 else soft, hard))
    try:
        run.save(folder, 1)
    except UserError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return run.placement.gather_strings([message])


def exercise(strategy: str, out: Path, num_steps: int) -> dict[str, Any]:
    run = Run(strategy)
    result: dict[str, Any] = {"validation": run.validation()}
    result["curve"] = run.steps(0, HALF, 3)
    run.validation()  # a forward pass without a backward one just before saving
    run.save(out / f"half_{strategy}", HALF)
    result["curve"] += run.steps(HALF, num_steps, 3)
    state = run.placement.full_state(run.model)
    if run.placement.is_main:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, out / f"final_{strategy}.safetensors")
    before = run.snapshot()
    result["poisoned_norm"] = str(run.steps(num_steps, num_steps + 1, 2, objective=Poisoned(rank=1))[0]["grad_norm"])
    after = run.snapshot()
    touched = [name for name in before if not torch.equal(before[name], after[name])]
    result["touched"] = run.placement.gather_strings(touched)
    result["disk_full"] = save_where_one_disk_is_full(run, out / f"full_{strategy}")
    result["after_poison"] = run.steps(num_steps, num_steps + 1, 2)  # the run goes on as if that step had not been
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("strategies", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=OPTIM.steps)
    parser.add_argument("--curves-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    OPTIM.steps = arguments.steps
    for strategy in arguments.strategies:
        if arguments.curves_only:
            run = Run(strategy)
            result = {"curve": run.steps(0, arguments.steps, BATCH if strategy == "single" else 3)}
        else:
            result = exercise(strategy, arguments.out, arguments.steps)
            gradients(strategy, CUTS, arguments.out)
            run = Run(strategy, precision="bf16")
            result["bf16"] = run.steps(0, 2, 4)
            result["fp8"] = Run(strategy, precision="fp8").steps(0, 4, 4)
            if strategy in COMPILED:
                result["compiled"] = compiled_steps(strategy)
        if run.placement.is_main:
            (arguments.out / f"{strategy}.json").write_text(json.dumps(result))
    if not arguments.curves_only:
        for strategy in arguments.strategies:
            resumed = Run(strategy, spoiled=True)
            state = resumed.load(arguments.out / f"half_{READS[strategy]}")
            rows = resumed.steps(state["step"], arguments.steps, 3)
            if resumed.placement.is_main:
                (arguments.out / f"{strategy}_from_{state['strategy']}.json").write_text(json.dumps(rows))
            if strategy.startswith("zero"):
                offloaded = Run(strategy, spoiled=True, offload="optimizer")
                offloaded.load(arguments.out / f"half_{READS[strategy]}")
                rows = offloaded.steps(HALF, HALF + 4, 3)
                offloaded.save(arguments.out / f"offloaded_{strategy}", HALF + 4)
                if offloaded.placement.is_main:
                    (arguments.out / f"{strategy}_offloaded.json").write_text(json.dumps(rows))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
