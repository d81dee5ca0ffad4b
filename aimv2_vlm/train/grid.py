"""A grid of learning rates and weight decays trained at once: AdamW over stacked parameters, whose first dimension counts the points.

Every point has its own schedule, decay, gradient norm, clipping and step count, so that it is what its separate run would be.

Shapes: G points.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch.optim.adamw import adamw

from aimv2_vlm.config import Optimizer
from aimv2_vlm.train.optim import learning_rate


def grid_points(optim: Optimizer, points: Sequence[Sequence[float]]) -> list[Optimizer]:
    """`optim` (its steps resolved) with the (lr, weight_decay) of each point."""
    found = []
    for lr, weight_decay in points:
        one = copy.deepcopy(optim)
        one.lr, one.weight_decay = lr, weight_decay
        found.append(one)
    return found


class GridAdamW(torch.optim.Optimizer):
    """torch's fused AdamW on each point's slices.

    The gradient of each point is clipped by its own norm; a point whose norm is not finite skips the step alone, weights and step count
    untouched, without the host having to look. The training loop asks `rates` for the learning rates of a step.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], optims: Sequence[Optimizer]):
        """`parameters`: each (G, ...). `optims`: of the G points; they differ in lr and weight_decay only."""
        self.optims = list(optims)
        super().__init__([{"params": list(parameters), "lr": [o.lr for o in self.optims], "rates": self.rates}], {})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"step": torch.zeros(len(self.optims), device=parameter.device),
                                     "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    def rates(self, step: int) -> list[float]:
        """Learning rate of each point at 0-based `step`."""
        return [learning_rate(step, optim) for optim in self.optims]

    @torch.no_grad()
    def step(self) -> None:
        """One step of every point. What `Placement.step` notes about the norm over all points is not read."""
        group = self.param_groups[0]
        parameters = [p for p in group["params"] if p.grad is not None]
        norm_G = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad.flatten(1), dim=1) for p in parameters]), dim=0)
        skip_G = (~torch.isfinite(norm_G)).float()
        clip = self.optims[0].clip
        scale_G = ((norm_G + 1e-6) / clip).clamp(min=1.0) if clip > 0 else torch.ones_like(norm_G)
        moments = [self.state[p] for p in parameters]
        for g, (optim, lr) in enumerate(zip(self.optims, group["lr"], strict=True)):
            adamw(
                [p[g] for p in parameters], [p.grad[g] for p in parameters], [m["exp_avg"][g] for m in moments],
                [m["exp_avg_sq"][g] for m in moments], [], [m["step"][g] for m in moments], fused=True, grad_scale=scale_G[g], found_inf=skip_G[g],
                amsgrad=False, beta1=optim.betas[0], beta2=optim.betas[1], lr=lr, eps=optim.eps, maximize=False,
                weight_decay=optim.weight_decay / (optim.lr if optim.decoupled else 1.0),
            )
