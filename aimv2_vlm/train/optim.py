"""AdamW groups by role and the learning-rate schedules (Tables A1 and C1)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from aimv2_vlm.config import Optimizer, UserError

NO_DECAY = ("norm", "bias", "position", "bos", "logit_scale")


def learning_rate(step: int, optim: Optimizer) -> float:
    """Peak group's learning rate for 0-based `step`: linear warm-up from `warmup_lr`, then `optim.schedule`.

    cosine ends at `min_lr`, half_cosine at (lr + min_lr) / 2 (section 3.1), constant stays.
    """
    if step < optim.warmup_steps:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = min(1.0, (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps))
    angle = math.pi * progress * (0.5 if optim.schedule == "half_cosine" else 1.0)
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(angle))


@dataclass(frozen=True)
class Schedule:
    """How long a run lasts and its learning rate at each step; a cooldown takes over after `cooldown_start` steps."""

    optim: Optimizer
    cooldown_start: int | None = None

    @property
    def steps(self) -> int:
        """The step at which the run ends."""
        if self.cooldown_start is None:
            return self.optim.steps
        return self.cooldown_start + max(1, round(self.optim.cooldown.fraction * self.cooldown_start))

    def learning_rate(self, step: int) -> float:
        """For 0-based `step`; the cooldown falls linearly from the schedule's rate to its `min_lr` at the last step."""
        if self.cooldown_start is None or step < self.cooldown_start:
            return learning_rate(step, self.optim)
        start, end = learning_rate(self.cooldown_start, self.optim), self.optim.cooldown.min_lr
        return start + (end - start) * (step + 1 - self.cooldown_start) / (self.steps - self.cooldown_start)


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
            groups[scale, decays] = {
                "params": [], "names": [], "roles": Counter(), "lr_scale": scale, "weight_decay": decay, "lr": optim.lr * scale
            }
        groups[scale, decays]["params"].append(parameter)
        groups[scale, decays]["names"].append(name)
        groups[scale, decays]["roles"][roles[name]] += 1
    if not groups:
        raise UserError("trainable: no parameter is trained; name at least one part")
    return [groups[key] for key in sorted(groups)]


def build_optimizer(groups: list[dict], optim: Optimizer) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True)


def describe(groups: list[dict]) -> list[str]:
    """One line a group for the log: learning-rate factor, decay, parameters, and how many tensors of each role."""
    return [
        f"optimizer group: lr x {g['lr_scale']:g}, weight decay {g['weight_decay']:g}, {sum(p.numel() for p in g['params']):,} parameters "
        f"({', '.join(f'{count} {role}' for role, count in sorted(g['roles'].items()))})" for g in groups
    ]
