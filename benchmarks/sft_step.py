"""An instruction-tuning step against transformers' Llava with AdamW on padded batches of 8; same rows, same loss.

    python benchmarks/sft_step.py [--rounds 7]

Decoder 512 wide, 8 layers, 32,000 words; encoder 336 px (576 image tokens), 256 wide, 4 layers, frozen on both sides; connector and decoder learn. Row lengths
are those of 256 conversations about charts, tables, words, receipts and forms (benchmarks/sft_lengths.json: tokens without the picture, supervised tokens,
pictures), eight a step in a seeded order. The peer pads a batch to its longest row, calls the stock model with labels, clips and steps; ours concatenates the
rows and runs the vocabulary head on supervised tokens only.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
from pathlib import Path

import torch
from record import interleaved, record
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from aimv2_vlm.config import Optimizer
from aimv2_vlm.models.assistant import IGNORED, AssistantForTraining, part_of, set_trainable
from aimv2_vlm.models.encoder import build_encoder
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.loop import add_counts, run_step
from aimv2_vlm.train.objectives import InstructionObjective
from aimv2_vlm.train.optim import build_optimizer, parameter_groups

ROWS, SIZE, IMAGE_TOKENS, VOCAB, IMAGE_ID, PAD = 8, 336, 576, 32_000, 31_999, 0
OPTIM = Optimizer(lr=1e-4, steps=10, warmup_steps=1, decoupled=False, weight_decay=0.0, betas=[0.9, 0.999])


def build() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    encoder = build_encoder(image_size=SIZE, hidden_size=256, intermediate_size=704, num_layers=4, num_heads=2)
    llm = LlamaConfig(vocab_size=VOCAB, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, max_position_embeddings=4096)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=encoder.config, text_config=llm, image_token_index=IMAGE_ID, vision_feature_layer=-1, vision_feature_select_strategy="full",
        image_seq_length=IMAGE_TOKENS))
    model.model.vision_tower = encoder
    model.model.language_model, model.lm_head = (made := LlamaForCausalLM(llm)).model, made.lm_head
    set_trainable(model, ["connector", "llm"])
    return model.train()


def make_rows(lengths: list[list[int]], seed: int) -> list[dict]:
    g = torch.Generator().manual_seed(seed)
    rows = []
    for text, supervised, _ in lengths:
        ids = torch.randint(1, VOCAB - 1, (text,), generator=g)
        ids = torch.cat([ids[:4], torch.full((IMAGE_TOKENS,), IMAGE_ID), ids[4:]])
        labels = torch.full_like(ids, IGNORED)
        labels[-supervised:] = ids[-supervised:]
        rows.append({"ids": ids, "labels": labels, "pixels": torch.randn(3, SIZE, SIZE, generator=g)})
    return rows


class Peer:
    """The stock model's own loss on a padded batch."""

    def __init__(self, model: LlavaForConditionalGeneration):
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=OPTIM.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    def step(self, rows: list[dict]) -> float:
        pad = torch.nn.utils.rnn.pad_sequence
        out = self.model(
            input_ids=pad([r["ids"] for r in rows], True, PAD), attention_mask=pad([torch.ones_like(r["ids"]) for r in rows], True, 0),
            labels=pad([r["labels"] for r in rows], True, IGNORED), pixel_values=torch.stack([r["pixels"] for r in rows]), use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out.loss.item()


class Ours:
    """The project's own step."""

    def __init__(self, model: LlavaForConditionalGeneration):
        self.model, self.placement, self.objective = AssistantForTraining(model).train(), Placement("single", "fp32"), InstructionObjective([0.5] * 3, [0.5] * 3)
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = build_optimizer(parameter_groups(self.model.named_parameters(), dict.fromkeys(names, "weight"), OPTIM, {}), OPTIM)
        assert all(part_of(name) != "encoder" for name in names)

    def step(self, rows: list[dict]) -> float:
        batch = {
            "input_ids": torch.cat([r["ids"] for r in rows])[None], "labels": torch.cat([r["labels"] for r in rows])[None],
            "position_ids": torch.cat([torch.arange(len(r["ids"])) for r in rows])[None], "row_lengths": [len(r["ids"]) for r in rows],
            "weights": torch.ones(len(rows)), "pixel_values": torch.stack([r["pixels"] for r in rows]), "num_rows": len(rows), "bad": [],
        }
        counts = add_counts(self.objective, [batch])
        sums, _ = run_step(self.objective, self.model, self.optimizer, [batch], counts, self.placement, 1.0)
        return float(sums["text"] / counts["text"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    lengths = json.loads((Path(__file__).parent / "sft_lengths.json").read_text(encoding="utf-8"))
    random.Random(0).shuffle(lengths)
    model = build()
    ours, peer = Ours(copy.deepcopy(model)), Peer(model)
    losses: dict[str, list[float]] = {"ours": [], "peer": []}
    sides = {"ours": lambda rows: losses["ours"].append(ours.step(rows)), "peer": lambda rows: losses["peer"].append(peer.step(rows))}
    batches = [make_rows(lengths[number * ROWS : (number + 1) * ROWS], number) for number in range(arguments.rounds + 2)]
    padding = [1 - sum(len(r["ids"]) for r in rows) / (ROWS * max(len(r["ids"]) for r in rows)) for rows in batches]
    times = interleaved(sides, ((rows,) for rows in batches))  # the first two warm up
    gap = max(abs(a - b) / max(1.0, b) for a, b in zip(losses["ours"], losses["peer"], strict=True))
    seconds = {side: statistics.median(values[2:]) for side, values in times.items()}
    record("sft_step", {
        "name": "sft step", "ours": round(seconds["ours"], 4), "peer": round(seconds["peer"], 4), "ratio": round(seconds["peer"] / seconds["ours"], 3),
        "unit": "s/step", "equal": gap < 1e-4, "largest_relative_loss_difference": gap, "rounds": arguments.rounds,
        "padding_share_of_peer": round(statistics.mean(padding), 3), "threads": torch.get_num_threads(),
    })


if __name__ == "__main__":
    main()
