"""AdamW groups by role and the learning-rate schedules (Tables A1 and C1)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from aimv2_vlm.config import Optimizer, UserError
from aimv2_vlm.models.adapters import import_bitsandbytes

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


def build_optimizer(groups: list[dict], optim: Optimizer) -> torch.optim.Optimizer:
    """AdamW; `optim.states: 8bit` keeps its moments block-wise in 8 bits (in fp32 for tensors below 4,096 elements)."""
    if optim.states == "fp32":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True)
    optimizer = import_bitsandbytes("optim.states").optim.AdamW8bit(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps)
    optimizer.register_step_pre_hook(_clip_or_skip)
    return optimizer


def _clip_or_skip(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """What torch's fused AdamW does itself: gradients over `grad_scale`, and nothing at all where `found_inf` is 1.

    The step counters of these states live on the host, so it has to look.
    """
    skip = bool(optimizer.found_inf)
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        parameter.grad = None if skip else parameter.grad.div_(optimizer.grad_scale)


def keeps_8bit_states(optimizer: torch.optim.Optimizer) -> bool:
    return hasattr(optimizer, "name2qmap")


def state_of_8bit(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Live tensors of a parameter's 8-bit (or small fp32) moments, made where there are none yet, and a copy of its step."""
    state = optimizer.state[parameter]
    if not state:
        place = ((g, p, i, j) for i, g in enumerate(optimizer.param_groups) for j, p in enumerate(g["params"]) if p is parameter)
        optimizer.init_state(*next(place))
    names = {"exp_avg": "state1", "exp_avg_sq": "state2", "exp_avg_scales": "absmax1", "exp_avg_sq_scales": "absmax2"}
    step = torch.tensor(float(state["step"]), device=parameter.device)
    return {name: state[key] for name, key in names.items() if key in state} | {"step": step}


def describe(groups: list[dict]) -> list[str]:
    """One line a group for the log: learning-rate factor, decay, parameters, and how many tensors of each role."""
    return [
        f"optimizer group: lr x {g['lr_scale']:g}, weight decay {g['weight_decay']:g}, {sum(p.numel() for p in g['params']):,} parameters "
        f"({', '.join(f'{count} {role}' for role, count in sorted(g['roles'].items()))})" for g in groups
    ]
