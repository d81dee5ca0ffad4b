"""Pre-training throughput of the paper's sizes on the device at hand: images/s, TFLOP/s, share of peak; and the share of a run spent waiting for data.

    python benchmarks/pretrain_gpu.py [--sizes large huge 1b 3b] [--precisions bf16 fp8] [--micro-batch 64] [--steps 20] [--data SHARDS]

Each size is built from its recipe (pretrain/aimv2_<size>_224.yaml), trained for some steps on synthetic uint8 pictures and 77-token captions
through the project's own step (bf16 unless --precisions says more, compiled), and timed without the first steps. TFLOP/s counts matrix products and
dense attention x 3; its share is of 790 TFLOP/s (an H200's measured dense bf16 rate, also for fp8) on a GPU whose name says H200, else of the rate that a
large bf16 matrix product reaches here; both stand in the line. With --data, a run of the first size reads these shards with 8 workers and reports `data_wait`.
Without a GPU one small size is timed in fp32 and the line says so: a check that the script runs, not a figure.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import tempfile
import time

import torch
from record import record

from aimv2_vlm.recipe import load_recipe
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.loop import add_counts, run_step
from aimv2_vlm.train.metrics import matrix_product_tflops
from aimv2_vlm.train.optim import build_optimizer, parameter_groups
from aimv2_vlm.train.precision import convert_to_fp8
from aimv2_vlm.train.run import build_pretraining_model, num_patches, pretrain, pretraining_objective, seeded

H200_TFLOPS = 790.0
SMALL = ["encoder.hidden_size=256", "encoder.intermediate_size=704", "encoder.num_layers=4", "encoder.num_heads=2",
         "decoder.hidden_size=256", "decoder.intermediate_size=704", "decoder.num_layers=2", "decoder.num_heads=2"]


def synthetic_batch(recipe, size: int, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    side, length = recipe.image.size, recipe.text.context_length
    batch = {
        "pixels": torch.randint(0, 256, (size, 3, side, side), generator=g).to(torch.uint8),
        "input_ids": torch.randint(2, recipe.text.vocab_size, (size, length), generator=g),
        "text_lengths": torch.full((size,), length), "prefix_lengths": torch.randint(1, num_patches(recipe), (size,), generator=g),
        "draws": torch.zeros(size, dtype=torch.int64), "weights": torch.ones(size), "bad": [],
    }
    return {k: v.pin_memory() if torch.cuda.is_available() and torch.is_tensor(v) else v for k, v in batch.items()}


def measure(size: str, micro_batch: int, steps: int, overrides: list[str]) -> dict:
    """Median seconds of a step of one micro-batch, and what follows from it."""
    recipe = load_recipe("pretrain", f"aimv2_{size}_224", ["data_root=/nowhere", "train.strategy=single", *overrides])
    placement = Placement("single", recipe.precision)
    with torch.device(placement.device):
        model = seeded(0, lambda: build_pretraining_model(recipe, recipe.text.vocab_size))
    roles, objective = model.parameter_roles(), pretraining_objective(recipe)
    if recipe.precision == "fp8":
        convert_to_fp8(model)
    if recipe.train.compile:
        model.compile()
    model, optimizer = placement.place(model, lambda m: build_optimizer(parameter_groups(m.named_parameters(), roles, recipe.optim, {}), recipe.optim))
    batches = [synthetic_batch(recipe, micro_batch, seed) for seed in range(4)]
    operations = objective.flops(model, batches[0])
    cuda = placement.device.type == "cuda"
    seconds = []
    for step in range(steps + 5):  # the first five compile and warm up
        batch = batches[step % len(batches)]
        start = time.perf_counter()
        run_step(objective, model, optimizer, [batch], add_counts(objective, [batch]), placement, recipe.optim.clip)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    second = statistics.median(seconds[5:])
    here = matrix_product_tflops(placement.device, placement.precision)
    peak = H200_TFLOPS if cuda and "H200" in torch.cuda.get_device_name() else here
    return {
        "images_per_s": round(micro_batch / second, 2), "tflops_per_s": round(operations / second / 1e12, 3),
        "share_of_peak": round(operations / second / 1e12 / peak, 4), "peak_tflops": round(peak, 2), "matrix_product_tflops_here": round(here, 2),
        "micro_batch": micro_batch, "precision": "fp8" if recipe.precision == "fp8" else placement.precision, "compiled": recipe.train.compile,
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def begin_anew() -> None:
    """Nothing of the size before stays on the device (a compiled model is part of a cycle), nor in its peak."""
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def data_wait(size: str, shards: str, micro_batch: int, steps: int) -> float:
    """Share of a real run's time, after its first half, spent waiting for samples."""
    import json

    with tempfile.TemporaryDirectory() as out:
        recipe = load_recipe("pretrain", f"aimv2_{size}_224", [
            "data_root=/nowhere", f"out={out}/run", "train.strategy=single", "train.trackers=[]", "train.num_workers=8", "data.validation=[]",
            f'data.sources=[{{name: shards, path: "{shards}"}}]', "text.tokenizer=train", f"optim.batch_size={micro_batch}",
            f"optim.micro_batch_size={micro_batch}", f"optim.steps={steps}", "optim.warmup_steps=1", "train.log_every=10"])
        folder = pretrain(recipe).parent
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median(row["data_wait"] for row in rows[len(rows) // 2 :] if "data_wait" in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["large", "huge", "1b", "3b"])
    parser.add_argument("--precisions", nargs="+", default=["bf16"], choices=("bf16", "fp8"))
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data", help="glob of image-text shards for the share of time spent waiting for data")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        for size, precision in itertools.product(arguments.sizes, arguments.precisions):
            begin_anew()
            try:
                facts = measure(size, arguments.micro_batch, arguments.steps, [f"precision={precision}"])
            except torch.OutOfMemoryError as error:
                facts = {"micro_batch": arguments.micro_batch, "precision": precision, "out_of_memory": str(error).splitlines()[0]}
            record("pretrain_gpu", {"name": f"pretrain {size} 224 px", "unit": "images/s", **facts})
        begin_anew()
        if arguments.data:
            wait = data_wait(arguments.sizes[0], arguments.data, arguments.micro_batch, 200)
            record("pretrain_gpu", {"name": f"data wait, {arguments.sizes[0]} 224 px", "unit": "share of time", "ours": round(wait, 4)})
        return
    facts = measure("large", 4, 5, [*SMALL, "precision=fp32", "train.compile=false"])
    record("pretrain_gpu", {"name": "pretrain small on a CPU: no GPU here, not a figure", "unit": "images/s", **facts})


if __name__ == "__main__":
    main()
