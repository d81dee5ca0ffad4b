"""A pre-training step (forward, backward, clip, AdamW) against the same objective written plainly on the same stock classes.

    python benchmarks/pretrain_step.py [--rounds 7] [--compile]

Model: encoder 512 wide, 8 layers, decoder 4 layers, 32,000 words, 224 px, batch 8, fp32. The plain loop pads captions to 77 tokens,
runs the vocabulary head on the text positions only, the pixel head on every patch, and masks what does not count. Caption lengths: uniform
over 8 to 76 tokens and the end token ("mixed"), and all 77 ("full"), where nothing can be left out. Both sides start from the same weights
and must have the same loss before and after a step.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
import torch.nn.functional as F
from record import interleaved, record

from aimv2_vlm.config import Objective, Optimizer
from aimv2_vlm.data.transforms import normalize
from aimv2_vlm.models.encoder import build_encoder
from aimv2_vlm.models.pretraining import AIMv2ForPreTraining
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.loop import add_counts, run_step
from aimv2_vlm.train.objectives import GenerativeObjective
from aimv2_vlm.train.optim import build_optimizer, parameter_groups

BATCH, SIZE, PATCH, VOCAB, CONTEXT = 8, 224, 14, 32_000, 77
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OPTIM = Optimizer(lr=1e-4, warmup_steps=1, steps=10)


def build() -> AIMv2ForPreTraining:
    torch.manual_seed(0)
    encoder = build_encoder(image_size=SIZE, hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=4)
    return AIMv2ForPreTraining(
        encoder, decoder_hidden_size=512, decoder_intermediate_size=1408, decoder_num_layers=4, decoder_num_heads=4, vocab_size=VOCAB,
        context_length=CONTEXT)


def make_batch(lengths: torch.Tensor, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    num_patches = (SIZE // PATCH) ** 2
    return {
        "pixels": torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), generator=g).to(torch.uint8), "text_lengths": lengths,
        "input_ids": torch.randint(2, VOCAB, (BATCH, CONTEXT), generator=g),
        "prefix_lengths": torch.randint(1, num_patches, (BATCH,), generator=g), "weights": torch.ones(BATCH), "bad": [],
        "draws": torch.zeros(BATCH, dtype=torch.int64),
    }


class Plain:
    """What one writes first: the stock encoder with a mask, the stock blocks as a decoder, two heads, masked means."""

    def __init__(self, model: AIMv2ForPreTraining):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, batch: dict) -> float:
        m = self.model
        pixels = normalize(batch["pixels"], MEAN, STD)
        num_patches = (SIZE // PATCH) ** 2
        q, k = torch.arange(num_patches)[:, None], torch.arange(num_patches)
        can_attend = (k < batch["prefix_lengths"][:, None, None]) | (k <= q)
        features = m.encoder(pixel_values=pixels, attention_mask=can_attend[:, None]).last_hidden_state
        bos = m.bos.expand(BATCH, 1, -1)
        text = torch.cat([bos, m.token_embedding(batch["input_ids"])], 1)[:, :CONTEXT] + m.text_position_embedding.weight[:CONTEXT]
        hidden = m.decoder_norm(m.decoder(torch.cat([m.image_projection(features), text], 1), None).last_hidden_state)
        patches = F.unfold(pixels, PATCH, stride=PATCH).view(BATCH, 3, PATCH * PATCH, -1).permute(0, 3, 2, 1).flatten(2)
        targets = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (m.pixel_head(hidden[:, : num_patches - 1]) - targets[:, 1:]).square().mean(-1)
        scored = torch.arange(1, num_patches) >= batch["prefix_lengths"][:, None]
        logits = m.text_head(hidden[:, num_patches:])
        labels = batch["input_ids"].masked_fill(torch.arange(CONTEXT) >= batch["text_lengths"][:, None], -100)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100) + 0.4 * (error * scored).sum() / scored.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Ours:
    """The project's own step."""

    def __init__(self, model: AIMv2ForPreTraining, compiled: bool):
        self.model, self.placement = model, Placement("single", "fp32")
        self.objective = GenerativeObjective(Objective(), PATCH, MEAN, STD)
        groups = parameter_groups(model.named_parameters(), dict.fromkeys(dict(model.named_parameters()), "bias"), OPTIM, {})
        self.optimizer = build_optimizer(groups, OPTIM)
        if compiled:
            model.compile()

    def step(self, batch: dict) -> float:
        counts = add_counts(self.objective, [batch])
        sums, _ = run_step(self.objective, self.model, self.optimizer, [batch], counts, self.placement, 1.0)
        return float(sums["text"] / counts["text"] + 0.4 * sums["pixel"] / counts["pixel"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="our side compiled (train.compile); needs a C++ compiler")
    arguments = parser.parse_args()
    for name, lengths in (("mixed", torch.randint(9, CONTEXT + 1, (BATCH,), generator=torch.Generator().manual_seed(0))),
                          ("full", torch.full((BATCH,), CONTEXT))):
        model = build()
        plain, ours = Plain(copy.deepcopy(model)), Ours(model, arguments.compile)
        losses: dict[str, list[float]] = {"ours": [], "peer": []}
        sides = {"ours": lambda batch: losses["ours"].append(ours.step(batch)), "peer": lambda batch: losses["peer"].append(plain.step(batch))}
        times = interleaved(sides, ((make_batch(lengths, number),) for number in range(arguments.rounds + 2)))  # the first two warm up
        gap = max(abs(a - b) / max(1.0, b) for a, b in zip(losses["ours"], losses["peer"], strict=True))
        seconds = {side: statistics.median(values[2:]) for side, values in times.items()}
        record("pretrain_step", {
            "name": f"pretrain step, {name} captions" + (", compiled" if arguments.compile else ""), "ours": round(seconds["ours"], 4),
            "peer": round(seconds["peer"], 4), "ratio": round(seconds["peer"] / seconds["ours"], 3), "unit": "s/step",
            "equal": gap < 1e-5, "largest_relative_loss_difference": gap, "rounds": arguments.rounds,
            "mean_caption_tokens": float(lengths.float().mean()), "threads": torch.get_num_threads(),
        })


if __name__ == "__main__":
    main()
