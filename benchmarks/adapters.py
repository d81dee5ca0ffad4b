"""Every way of tuning on two CPU processes gives an assistant that answers; and the memory foretold against the memory counted.

    python benchmarks/adapters.py [--only full,lora,qlora,zero3,fsdp2]

Embedded pictures, a small encoder, two tiles, `--steps` steps. One line a way: `ours` is the last loss of the run on two processes, `peer`
that of the same run on one, `equal` says that the two agree within 2e-6 x max(1, loss) x steps and that the written assistant, opened
without any adapter, answers every question. A line "memory ..." a way: `ours` the estimate before the first step, `peer` the most bytes of
tensors alive during two real steps (one process), `equal` within 10 %; `resident` is what the process grew by meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import record

ROOT = Path(__file__).resolve().parents[1]
LORA = ["adapter.kind=lora", "adapter.rank=8", "adapter.alpha=16"]
WAYS = {
    "full": ["train.strategy=ddp"],
    "lora": [*LORA, "train.strategy=ddp"],
    "qlora": [*LORA, "llm.quantization=nf4", "optim.states=8bit", "train.strategy=ddp"],
    "zero3": ["train.strategy=zero3"],
    "fsdp2": [*LORA, "train.strategy=fsdp2"],
}
SIZES = ["llm.hidden_size=64", "llm.intermediate_size=128", "llm.num_layers=2", "llm.num_heads=2", "llm.vocab_size=360", "llm.max_positions=512",
         "optim.warmup_steps=1", "optim.lr=3e-3", "optim.batch_size=8", "optim.micro_batch_size=2", "train.log_every=1", "train.num_workers=0",
         "train.trackers=[]", "precision=fp32"]  # fmt: skip
QUESTIONS = ["Which word is printed?\nAnswer the question using a single word or phrase.", "What color is the circle?"]


def prepare(root: Path) -> Path:
    """Embedded data below `root`; returns the encoder pre-trained on it for a few steps."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import TINY_PRETRAINING, run_cli

    from aimv2_vlm.data import scenes

    scenes.write_pretraining_shards(root / "shards", "train", 64, samples_per_shard=32, workers=1)
    scenes.write_pretraining_shards(root / "held_out", "dev", 16, workers=1)
    scenes.write_conversations(root / "conversations", "train", 24, workers=1)
    run_cli("pretrain", "demo_scenes", f"data_root={root}", f"out={root / 'pretrain'}", "optim.steps=4", *TINY_PRETRAINING)
    return root / "pretrain" / "final"


def last_loss(run: Path) -> float:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][-1]["loss"]


def answers(final: Path, root: Path) -> list[str]:
    from PIL import Image

    from aimv2_vlm.evaluation.generation import Generator, load_assistant

    picture = Image.open(next((root / "conversations" / "images").rglob("*.jpg"))).convert("RGB")
    model, processor = load_assistant(final, "fp32")
    return Generator(model, processor, batch_size=2, max_new_tokens=8).answer([([picture], question) for question in QUESTIONS])


def tune(way: str, root: Path, encoder: Path, steps: int) -> None:
    from conftest import run_cli

    from aimv2_vlm.train import launch

    words = ["sft", "demo_scenes_2x2", f"data_root={root}", f"encoder.path={encoder}", f"optim.steps={steps}", *SIZES]
    start = time.monotonic()
    launch.run_in_processes([*words, *WAYS[way], f"out={root / way}"], 2)
    seconds = time.monotonic() - start
    run_cli(*words, *(word for word in WAYS[way] if "strategy" not in word), f"out={root / way}_one")
    two, one = last_loss(root / way), last_loss(root / f"{way}_one")
    told = answers(root / way / "final", root)
    agree = abs(two - one) <= 2e-6 * max(1.0, one) * steps and len(told) == len(QUESTIONS)
    record("adapters", {"name": f"tuning {way} x 2", "ours": two, "peer": one, "ratio": two / one, "unit": f"loss after {steps} steps", "equal": agree,
                        "answers": told, "keys": WAYS[way], "seconds": round(seconds, 1)}, ("peft", "bitsandbytes"))


def memory_of(way: str) -> None:
    import psutil
    import sft_step
    from transformers.utils import logging

    from aimv2_vlm.config import Adapter, LanguageModel, SftRecipe
    from aimv2_vlm.models import adapters
    from aimv2_vlm.models.assistant import set_trainable
    from aimv2_vlm.train import memory
    from aimv2_vlm.train.optim import build_optimizer, parameter_groups

    logging.set_verbosity_error()
    recipe = SftRecipe(adapter=Adapter("lora" if way != "full" else "none", 16, 32), llm=LanguageModel(quantization="nf4" if way == "qlora" else "none"))
    recipe.optim.states, recipe.optim.batch_size, recipe.optim.micro_batch_size = "8bit" if way == "qlora" else "fp32", 2, 2
    assistant = sft_step.build()
    adapters.quantize(assistant, recipe.llm, torch.float32)
    adapters.add_adapter(assistant, recipe.adapter)
    set_trainable(assistant, ["connector", "llm"])
    ours = sft_step.Ours(assistant)
    names = [name for name, p in ours.model.named_parameters() if p.requires_grad]
    ours.optimizer = build_optimizer(parameter_groups(ours.model.named_parameters(), dict.fromkeys(names, "weight"), recipe.optim, {}), recipe.optim)
    rows = sft_step.make_rows([[100, 20, 1], [80, 30, 1]], 0)
    batch = {
        "input_ids": torch.cat([r["ids"] for r in rows])[None], "labels": torch.cat([r["labels"] for r in rows])[None],
        "position_ids": torch.cat([torch.arange(len(r["ids"])) for r in rows])[None], "row_lengths": [len(r["ids"]) for r in rows],
        "weights": torch.ones(len(rows)), "pixel_values": torch.stack([r["pixels"] for r in rows]),
    }
    estimated = memory.estimate(ours.model, batch, ours.objective.normalize, recipe, ours.placement)
    weights = memory.stored_bytes([*ours.model.parameters(), *ours.model.buffers()])
    before = psutil.Process().memory_info().rss
    with memory.TensorMemory() as counted:
        for _ in range(2):
            ours.step(rows)
    grown = psutil.Process().memory_info().rss - before
    peak = weights + counted.peak
    record("adapters", {"name": f"memory {way}", "ours": estimated.total, "peer": peak, "ratio": estimated.total / peak, "unit": "bytes at the peak of a step",
                        "equal": abs(estimated.total / peak - 1) <= 0.1, "resident": grown, "of_it": str(estimated)}, ("peft", "bitsandbytes"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    for way in (way for way in ("full", "lora", "qlora") if way in wanted):
        memory_of(way)
    with tempfile.TemporaryDirectory() as folder:
        encoder = prepare(Path(folder))
        for way in wanted:
            tune(way, Path(folder), encoder, arguments.steps)


if __name__ == "__main__":
    main()
