"""AdamW groups by role and the learning-rate schedules (Tables A1 and C1)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from aimv2_vlm.config import Optimizer, UserError

NO_DECAY = ("norm", "bias", "position", "bos", "logit_scale")


def learning_rate(step: int, optim: Optimizer) -> float:
    """Peak group's learning rate for 0-based `step`: linear warm-up from `warmup_lr`, then cosine to `min_lr`."""
    if step < optim.warmup_steps:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], roles: dict[str, str], optim: Optimizer, lr_scales: dict[str, float]
) -> list[dict]:
    """Groups of trainable parameters with equal (lr scale, decay).

    roles: name -> role of every parameter; roles in NO_DECAY are not decayed. lr_scales: name -> factor on the
    learning rate (absent = 1). With `optim.decoupled` torch's `lr_t * weight_decay` is made `wd * lr_t / lr_peak`.
    """
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        scale, decays = lr_scales.get(name, 1.0), roles[name] not in NO_DECAY
        if (scale, decays) not in groups:
            decay = optim.weight_decay / (optim.lr * scale if optim.decoupled else 1.0) if decays else 0.0
            groups[scale, decays] = {"params": [], "names": [], "lr_scale": scale, "weight_decay": decay, "lr": optim.lr * scale}
        groups[scale, decays]["params"].append(parameter)
        groups[scale, decays]["names"].append(name)
    if not groups:
        raise UserError("trainable: no parameter is trained; name at least one part")
    return [groups[key] for key in sorted(groups)]


def build_optimizer(groups: list[dict], optim: Optimizer) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True)


def describe(groups: list[dict]) -> list[str]:
    """One line a group for the log: learning-rate factor, decay, tensors, parameters."""
    return [
        f"optimizer group: lr x {g['lr_scale']:g}, weight decay {g['weight_decay']:g}, {len(g['params'])} tensors, "
        f"{sum(p.numel() for p in g['params']):,} parameters" for g in groups
    ]
