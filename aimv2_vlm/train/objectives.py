"""Objectives: (model, micro-batch) -> sums, and how many terms those sums have, known before anything runs."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from aimv2_vlm.data.transforms import normalize

Batch = dict[str, Any]


class TrainingObjective(Protocol):
    """`weights` names the terms of the loss: loss = sum over terms of weight * (global sum / global count).

    `counts` are integers read on the host, so that they can be added over micro-batches and processes before the first
    backward pass; `sums` are tensors with gradients, plus sums that are only logged (`logged` maps them to their count).
    """

    weights: dict[str, float]
    logged: dict[str, str]

    def counts(self, batch: Batch) -> dict[str, int]: ...

    def sums(self, model: torch.nn.Module, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]: ...


class AIMv2Objective:
    """Pixel regression plus captioning (paper section 2.1): text + alpha * pixel."""

    def __init__(self, pixel_weight: float, num_patches: int, mean: list[float], std: list[float]):
        self.weights = {"text": 1.0, "pixel": pixel_weight}
        self.logged = {"mean_color": "pixel"}
        self.num_patches, self.mean, self.std = num_patches, mean, std

    def counts(self, batch: Batch) -> dict[str, int]:
        good = batch["weights"] > 0
        return {
            "text": int(batch["text_lengths"][good].sum()),
            "pixel": int((self.num_patches - batch["prefix_lengths"][good]).sum()),
            "samples": len(good),
            "tokens": int(good.sum()) * self.num_patches + int(batch["text_lengths"][good].sum()),
        }

    def sums(self, model: torch.nn.Module, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        pixels_BCHW = normalize(batch["pixels"].to(device, non_blocking=True), self.mean, self.std)
        ids, lengths, prefixes, weights = (
            batch[k].to(device, non_blocking=True) for k in ("input_ids", "text_lengths", "prefix_lengths", "weights")
        )
        out = model(pixels_BCHW, ids, lengths, prefixes, weights, return_predictions=False)
        return {"text": out.text_sum, "pixel": out.pixel_sum, "mean_color": out.mean_color_sum.detach()}


class InstructionObjective:
    """Cross-entropy over the supervised (answer) tokens of conversations (section 4.3.1)."""

    weights = {"text": 1.0}
    logged: dict[str, str] = {}

    def counts(self, batch: Batch) -> dict[str, int]:
        supervised = (batch["labels"][:, 1:] != -100) & (batch["weights"] > 0)[:, None]
        return {"text": int(supervised.sum()), "samples": len(batch["weights"]), "tokens": int(batch["attention_mask"].sum())}

    def sums(self, model: torch.nn.Module, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        on_device = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items() if k != "bad"}
        return {"text": model(**on_device)["text_sum"]}
