"""The attentive probe on a frozen encoder (spec "Recognition probe"; Tables A2 and B1).

Shapes: B batch, C channels, H, W picture, N image patches, D width, h heads, d width of a head, K classes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from transformers import Aimv2VisionModel

from aimv2_vlm.config import UserError
from aimv2_vlm.models.encoder import encode


class TokenNorm(nn.Module):
    """Batch norm without affine over all tokens: `nn.BatchNorm1d(width, eps=1e-6, affine=False)`, with two differences.

    In training the statistics are those of the rows of positive weight, of all processes, so that neither a hole nor the
    number of processes shows. And they are constants of the backward pass, as features of a frozen encoder are.
    """

    def __init__(self, width: int, eps: float = 1e-6, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, features_BND: torch.Tensor, weights_B: torch.Tensor | None = None) -> torch.Tensor:
        """(B, N, D) -> float32 (B, N, D). `weights_B`: rows of weight 0 are not counted; None: all are."""
        features_BND = features_BND.float()
        mean_D, var_D = self._batch_statistics(features_BND, weights_B) if self.training else (self.running_mean, self.running_var)
        return (features_BND - mean_D) * torch.rsqrt(var_D + self.eps)

    @torch.no_grad()
    def _batch_statistics(self, features_BND: torch.Tensor, weights_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance of the batch; the running ones move towards them (the variance unbiased)."""
        batch, num_patches, width = features_BND.shape
        good_B = torch.ones(batch, device=features_BND.device) if weights_B is None else (weights_B > 0).float()
        sums = torch.cat([torch.einsum("bnd,b->d", features_BND, good_B), good_B.sum()[None] * num_patches])
        sums = _sum_over_processes(sums)
        count = sums[-1].clamp(min=1.0)
        mean_D = sums[:width] / count
        squares_D = _sum_over_processes(torch.einsum("bnd,b->d", (features_BND - mean_D).square(), good_B))
        # A batch without rows, or with features that are not finite (its step is skipped), must not stay in the statistics.
        moves_D = torch.isfinite(mean_D) & torch.isfinite(squares_D) & (sums[-1] > 1)
        for running_D, new_D in ((self.running_mean, mean_D), (self.running_var, squares_D / (count - 1).clamp(min=1.0))):
            running_D.copy_(torch.where(moves_D, running_D.lerp(new_D, self.momentum), running_D))
        return mean_D, squares_D / count


def _sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


class AttentiveHead(nn.Module):
    """Normalised tokens -> classes: one learned query attends to linear keys and values, a linear layer classifies.

    With one query and no bias both linears move past the sum over tokens: the query goes through the key weights once a
    step, and the value weights see one weighted mean a head instead of N tokens. That is N times less work.
    """

    def __init__(self, width: int, num_heads: int, num_classes: int):
        super().__init__()
        if width % num_heads:
            raise UserError(f"num_heads: {num_heads} heads do not divide the encoder's width {width}")
        self.num_heads = num_heads
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> logits (B, K)."""
        query_hd, key_hdD, value_hdD = (
            weight.unflatten(0, (self.num_heads, -1)) for weight in (self.query, self.key.weight, self.value.weight)
        )
        query_hD = torch.einsum("hd,hdD->hD", query_hd, key_hdD) * query_hd.shape[-1] ** -0.5
        shares_BhN = torch.einsum("hD,bnD->bhn", query_hD, tokens_BND).softmax(dim=-1)
        pooled_BhD = torch.einsum("bhn,bnD->bhD", shares_BhN.to(tokens_BND.dtype), tokens_BND)
        return self.classifier(torch.einsum("bhD,hdD->bhd", pooled_BhD, value_hdD).flatten(1))


class AttentiveProbe(nn.Module):
    """Frozen encoder (bidirectional, evaluation mode, normalised features), token norm, head with the encoder's heads.

    Several heads over one norm would be a grid of probes: the norm has nothing that is trained and sees the same features.
    """

    def __init__(self, encoder: Aimv2VisionModel, num_classes: int, batch_size: int = 64):
        """`batch_size`: pictures of one frozen forward pass; it bounds memory and changes nothing else."""
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.batch_size = batch_size
        config = encoder.config
        self.norm = TokenNorm(config.hidden_size)
        self.head = AttentiveHead(config.hidden_size, config.num_attention_heads, num_classes)
        self.train()

    def train(self, mode: bool = True) -> AttentiveProbe:
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def features(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalised pictures (B, C, H, W) -> features (B, N, D)."""
        return torch.cat([encode(self.encoder, part) for part in pixels_BCHW.split(self.batch_size)])

    def forward(
        self, pixels_BCHW: torch.Tensor | None = None, *, features_BND: torch.Tensor | None = None, weights_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (B, K) from normalised pictures or from their features; rows of weight 0 stay out of the batch's statistics."""
        if features_BND is None:
            features_BND = self.features(pixels_BCHW)
        return self.head(self.norm(features_BND, weights_B))

    def head_flops(self, rows: float, num_patches: float) -> float:
        """Forward operations of the head's matrix products, as it computes them."""
        width, classes = self.head.classifier.in_features, self.head.classifier.out_features
        return rows * (4 * num_patches * width * self.head.num_heads + 2 * width**2 + 2 * width * classes)
