"""Objectives: (model, micro-batch) -> sums, and how many terms those sums have, known before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from aimv2_vlm.config import Objective
from aimv2_vlm.data.transforms import normalize
from aimv2_vlm.models.assistant import supervised_places
from aimv2_vlm.models.contrastive import contrastive_sum
from aimv2_vlm.models.encoder import NativePictures
from aimv2_vlm.models.pretraining import check_prefixes, scored_places, to_device

Batch = dict[str, Any]


class TrainingObjective(Protocol):
    """`weights` names the terms of the loss: loss = sum over terms of weight * (global sum / global count).

    `counts` are integers read on the host, so that they can be added over micro-batches and processes before the first
    backward pass; `sums` are tensors with gradients, plus sums that are only logged (`logged` maps them to their count).
    `flops` are the operations of the forward and backward pass of a micro-batch, 0 where they are not counted.
    """

    weights: dict[str, float]
    logged: dict[str, str]

    def counts(self, batch: Batch) -> dict[str, int]: ...

    def sums(self, model: torch.nn.Module, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]: ...

    def flops(self, model: torch.nn.Module, batch: Batch) -> float: ...


class Normalization:
    """uint8 pictures -> what the encoder sees; mean and deviation are sent to a device once (sending them waits for it)."""

    def __init__(self, mean: list[float], std: list[float]):
        self.values, self._on = (mean, std), {}

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.device not in self._on:
            self._on[pixels.device] = tuple(torch.tensor(v, device=pixels.device) for v in self.values)
        return normalize(pixels, *self._on[pixels.device])


class GenerativeObjective:
    """Pixel regression, captioning, or both (paper section 2.1; Table 9): text + alpha * pixel."""

    def __init__(self, objective: Objective, patch_size: int, mean: list[float], std: list[float]):
        self.name = objective.name
        self.pixels, self.text = self.name in ("aimv2", "aimv1"), self.name != "aimv1"
        self.prefix = self.pixels or (objective.attention == "prefix" and self.name != "genlip")
        self.weights = ({"text": 1.0} if self.text else {}) | (
            {"pixel": objective.pixel_weight if self.text else 1.0} if self.pixels else {}
        )
        self.logged = {"mean_color": "pixel"} if self.pixels else {}
        self.parallel_fraction = objective.parallel_fraction
        self.caption_patches = objective.caption_patches if self.name == "captioning" else 1.0
        self.patch_size, self.normalize = patch_size, Normalization(mean, std)

    def counts(self, batch: Batch) -> dict[str, int]:
        good = batch["weights"] > 0
        num_real_B = self._num_real(batch)
        text = int(batch["text_lengths"][good].sum())
        counts = {"samples": len(good), "tokens": int(num_real_B[good].sum()) + text * self.text}
        if self.text:
            counts["text"] = text
        if self.pixels:
            counts["pixel"] = int((num_real_B - batch["prefix_lengths"])[good].sum())
        return counts

    def sums(self, model: torch.nn.Module, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        num_patches = self._num_patches(batch)
        if self.prefix:
            check_prefixes(batch["prefix_lengths"], num_patches)
        places = scored_places(
            num_patches, batch["text_lengths"], batch["prefix_lengths"] if self.pixels else None, batch["weights"],
            # Trimming saves work; a GPU rather keeps one shape.
            num_tokens=None if device.type == "cpu" else batch["input_ids"].shape[1],
            num_real_B=batch.get("num_real"),
        )
        extras = {}
        if self.name == "cappa":
            extras["parallel"] = to_device(batch["draws"].double() / 2**63 < self.parallel_fraction, device)
        if self.caption_patches < 1:
            extras["caption_patches"] = to_device(self._drawn_patches(batch, num_patches), device)
        ids, lengths, prefixes = (batch[k].to(device, non_blocking=True) for k in ("input_ids", "text_lengths", "prefix_lengths"))
        arguments = (ids, lengths) if self.name == "genlip" else (ids, lengths, prefixes if self.prefix else None)
        out = model(self._pictures(batch, device), *arguments, places=places.to(device), return_predictions=False, **extras)
        sums = {"text": out.text_sum, "pixel": out.pixel_sum, "mean_color": out.mean_color_sum}
        return {name: value.detach() if name in self.logged else value for name, value in sums.items() if value is not None}

    def flops(self, model: torch.nn.Module, batch: Batch) -> float:
        """What the model needs, without padding and without rows of weight 0; the backward pass costs twice the forward one."""
        counts, num_patches = self.counts(batch), self._num_patches(batch)
        given = round(num_patches * self.caption_patches) if self.caption_patches < 1 else None
        rows = int((batch["weights"] > 0).sum())
        if "num_real" in batch:  # attention of a row goes over its own patches; the mean of a mini-batch of like sizes
            num_patches = (counts["tokens"] - counts.get("text", 0)) / max(1, rows)
        return 3 * model.forward_flops(
            rows, num_patches=num_patches, num_tokens=counts.get("text", 0), scored_patches=counts.get("pixel", 0), caption_patches=given
        )

    def _num_patches(self, batch: Batch) -> int:
        if "patches" in batch:
            return batch["patches"].shape[1]
        height, width = batch["pixels"].shape[-2:]
        return (height // self.patch_size) * (width // self.patch_size)

    def _num_real(self, batch: Batch) -> torch.Tensor:
        return batch["num_real"] if "num_real" in batch else torch.full_like(batch["text_lengths"], self._num_patches(batch))

    def _pictures(self, batch: Batch, device: torch.device) -> torch.Tensor | NativePictures:
        if "patches" not in batch:
            return self.normalize(batch["pixels"].to(device, non_blocking=True))
        patches, positions, num_real = (batch[k].to(device, non_blocking=True) for k in ("patches", "positions", "num_real"))
        in_place = self.normalize(patches.unflatten(-1, (3, self.patch_size, self.patch_size))).flatten(-3)
        is_real_BN = torch.arange(patches.shape[1], device=device) < num_real[:, None]
        return NativePictures(in_place * is_real_BN[..., None], positions, num_real)  # padding: zeros as the encoder sees them

    def _drawn_patches(self, batch: Batch, num_patches: int) -> torch.Tensor:
        """(B, K): for each row the patches that its caption is decoded from, in raster order, a function of its draw.

        K is a share of all places of a row; where a picture has fewer patches than that, padding makes them up.
        """
        kept = max(1, round(num_patches * self.caption_patches))
        real_B = batch["num_real"].tolist() if "num_real" in batch else [num_patches] * len(batch["draws"])
        rows = []
        for draw, real in zip(batch["draws"].tolist(), real_B, strict=True):
            order = torch.randperm(real, generator=torch.Generator().manual_seed(draw))
            rows.append(torch.cat([order, torch.arange(real, num_patches)])[:kept].sort().values)
        return torch.stack(rows)


class ContrastiveObjective:
    """Picture against text over the rows of all processes (clip, lit); the rows of one step are one batch."""

    weights = {"contrastive": 1.0}
    logged: dict[str, str] = {}

    def __init__(self, patch_size: int, mean: list[float], std: list[float]):
        self.patch_size, self.normalize = patch_size, Normalization(mean, std)

    def counts(self, batch: Batch) -> dict[str, int]:
        good = batch["weights"] > 0
        text = int(batch["text_lengths"][good].sum())
        return {"contrastive": int(good.sum()), "samples": len(good), "tokens": int(good.sum()) * self._num_patches(batch) + text}

    def sums(self, model: torch.nn.Module, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        pixels, ids, weights = (batch[k].to(device, non_blocking=True) for k in ("pixels", "input_ids", "weights"))
        return {"contrastive": contrastive_sum(model(self.normalize(pixels), ids), ids, weights)}

    def flops(self, model: torch.nn.Module, batch: Batch) -> float:
        good = batch["weights"] > 0
        return 3 * model.forward_flops(int(good.sum()), num_patches=self._num_patches(batch), num_tokens=int(batch["text_lengths"][good].sum()))

    def _num_patches(self, batch: Batch) -> int:
        return (batch["pixels"].shape[-2] // self.patch_size) * (batch["pixels"].shape[-1] // self.patch_size)


class InstructionObjective:
    """Cross-entropy over the supervised (answer) tokens of conversations (section 4.3.1)."""

    weights = {"text": 1.0}
    logged: dict[str, str] = {}

    def __init__(self, mean: list[float], std: list[float]):
        """Mean and deviation of pictures that come as uint8."""
        self.normalize = Normalization(mean, std)

    def counts(self, batch: Batch) -> dict[str, int]:
        places = supervised_places(batch["labels"], batch["row_lengths"], batch["weights"])
        return {"text": len(places), "samples": batch["num_rows"], "tokens": batch["input_ids"].shape[1]}

    def sums(self, model: torch.nn.Module, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        places = to_device(supervised_places(batch["labels"], batch["row_lengths"], batch["weights"]), device)
        arguments = {k: v for k, v in batch.items() if k not in ("bad", "num_rows", "num_truncated")}
        on_device = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in arguments.items()}
        pixels = on_device.get("pixel_values")
        if pixels is not None and pixels.dtype == torch.uint8:
            on_device["pixel_values"] = self.normalize(pixels)
        return {"text": model(**on_device, places=places)["text_sum"]}

    def flops(self, model: torch.nn.Module, batch: Batch) -> float:
        return 0.0


class ProbeObjective:
    """Cross-entropy of an attentive probe's classes (section 3, Tables A2 and B1); `zero_one` is 1 - top-1 accuracy.

    The probes of a grid add their sums, over the same count: none sees the others' gradients. `zero_one` is their mean then, and each
    has its loss logged under its name.
    """

    weights = {"classification": 1.0}

    def __init__(self, patch_size: int, mean: list[float], std: list[float], points: Sequence[str] = ()):
        """`points`: names of a grid's probes."""
        self.patch_size, self.normalize, self.points = patch_size, Normalization(mean, std), list(points)
        self.logged = dict.fromkeys(["zero_one", *self.points], "classification")

    def counts(self, batch: Batch) -> dict[str, int]:
        good = int((batch["weights"] > 0).sum())
        return {"classification": good, "samples": len(batch["weights"]), "tokens": good * self._num_patches(batch)}

    def sums(self, model: torch.nn.Module, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        labels, weights = (batch[k].to(device, non_blocking=True) for k in ("labels", "weights"))
        logits = self.logits(model, batch, device).float()
        sums = (entropies(logits, labels) * weights).sum(-1)
        wrong = ((logits.argmax(-1) != labels) * weights).sum(-1)
        return {"classification": sums.sum(), "zero_one": wrong.mean()} | dict(zip(self.points, sums.detach().flatten()))

    def logits(self, model: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        """(B, classes), of a grid (G, B, classes), from the batch's pictures or their cached features."""
        weights = batch["weights"].to(device, non_blocking=True)
        if "features" in batch:
            return model(features_BND=batch["features"].to(device, non_blocking=True), weights_B=weights)
        return model(self.normalize(batch["pixels"].to(device, non_blocking=True)), weights_B=weights)

    def flops(self, model: torch.nn.Module, batch: Batch) -> float:
        """The frozen encoder runs forward only, and not at all on cached features."""
        rows = self.counts(batch)["classification"]
        return 3 * model.head_flops(rows, self._num_patches(batch)) + (0.0 if "features" in batch else model.encoder.forward_flops(rows))

    def num_tokens(self, model: torch.nn.Module, batch: Batch) -> int:
        """N of a picture's features."""
        if "features" in batch:
            return batch["features"].shape[1]
        return self._num_patches(batch) + model.encoder.num_tokens - model.encoder.grid_side**2

    def _num_patches(self, batch: Batch) -> int:
        if "features" in batch:
            return batch["features"].shape[1]
        return (batch["pixels"].shape[-2] // self.patch_size) * (batch["pixels"].shape[-1] // self.patch_size)


def entropies(logits: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (nats) of each row: (B, classes) or (G, B, classes) -> (B,) or (G, B)."""
    labels = labels_B.expand(logits.shape[:-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
