"""The attentive probe on a frozen encoder (spec "Recognition probe"; Tables A2 and B1).

Shapes: B batch, C channels, H, W picture, N tokens, D width, h heads, d width of a head, K classes, G probes of a grid.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from aimv2_vlm.config import UserError
from aimv2_vlm.models.backbone import Backbone
from aimv2_vlm.models.encoder import full_precision


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
        with full_precision(features_BND.device):
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


def attend(
    tokens_BND: torch.Tensor, query_GD: torch.Tensor, key_GDD: torch.Tensor, value_GDD: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """(G, B, D): what the one query of each of G probes gathers from normalised tokens, through linear keys and values.

    With one query and no bias both linears move past the sum over tokens: the query goes through the key weights once a
    step, and the value weights see one weighted mean a head instead of N tokens. That is N times less work. All probes'
    queries meet the tokens in one matrix product.
    """
    probes, width = query_GD.shape
    query_hGd, key_GhdD, value_GhdD = (weight.unflatten(1, (num_heads, -1)) for weight in (query_GD, key_GDD, value_GDD))
    query_GhD = torch.einsum("ghd,ghdD->ghD", query_hGd, key_GhdD) * (width // num_heads) ** -0.5
    scores_BNq = nn.functional.linear(tokens_BND, query_GhD.flatten(0, 1).to(tokens_BND.dtype))
    shares_BqN = scores_BNq.transpose(1, 2).softmax(dim=-1)
    pooled_BGhD = (shares_BqN.to(tokens_BND.dtype) @ tokens_BND).unflatten(1, (probes, num_heads))
    return torch.einsum("bghD,ghdD->gbhd", pooled_BGhD, value_GhdD).flatten(2)


class AttentiveHead(nn.Module):
    """Normalised tokens -> classes: one learned query attends to linear keys and values, a linear layer classifies."""

    def __init__(self, width: int, num_heads: int, num_classes: int):
        super().__init__()
        if width % num_heads:
            raise UserError(f"num_heads: {num_heads} heads do not divide the encoder's width {width}")
        self.num_heads, self.num_probes = num_heads, 1
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> logits (B, K)."""
        pooled_BD = attend(tokens_BND, self.query[None], self.key.weight[None], self.value.weight[None], self.num_heads)[0]
        with full_precision(pooled_BD.device):  # of 1,000 classes rounded to bf16, two are often equally likely
            return self.classifier(pooled_BD.to(self.classifier.weight.dtype))


class AttentiveHeads(nn.Module):
    """The heads of a grid of probes, stacked: they start alike and never see each other."""

    def __init__(self, head: AttentiveHead, num_probes: int):
        """`head`: what each of the `num_probes` starts from."""
        super().__init__()
        self.num_heads, self.num_probes = head.num_heads, num_probes
        for name, parameter in head.named_parameters():
            setattr(self, name.replace(".", "_"), nn.Parameter(parameter.detach().expand(num_probes, *parameter.shape).clone()))

    def forward(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> logits (G, B, K)."""
        pooled_GBD = attend(tokens_BND, self.query, self.key_weight, self.value_weight, self.num_heads)
        with full_precision(pooled_GBD.device):
            return torch.baddbmm(self.classifier_bias[:, None], pooled_GBD.to(self.classifier_bias.dtype), self.classifier_weight.transpose(1, 2))

    def state_of(self, number: int) -> dict[str, torch.Tensor]:
        """The weights of one probe under `AttentiveHead`'s names."""
        return {"query": self.query[number], "key.weight": self.key_weight[number], "value.weight": self.value_weight[number],
                "classifier.weight": self.classifier_weight[number], "classifier.bias": self.classifier_bias[number]}


class AttentiveProbe(nn.Module):
    """Frozen encoder (evaluation mode), token norm, head with the encoder's heads; or a grid of such heads over one norm.

    The norm has nothing that is trained and sees the same features in every probe of a grid.
    """

    def __init__(self, encoder: Backbone, num_classes: int, batch_size: int = 64, num_probes: int | None = None):
        """`batch_size`: pictures of one frozen forward pass; it bounds memory and changes nothing else. `num_probes`: of a grid."""
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.batch_size = batch_size
        self.norm = TokenNorm(encoder.width)
        head = AttentiveHead(encoder.width, encoder.num_heads, num_classes)
        self.head = head if num_probes is None else AttentiveHeads(head, num_probes)
        self.num_classes = num_classes
        self.train()

    def train(self, mode: bool = True) -> AttentiveProbe:
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def features(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalised pictures (B, C, H, W) -> features (B, N, D)."""
        return torch.cat([self.encoder(part) for part in pixels_BCHW.split(self.batch_size)])

    def forward(
        self, pixels_BCHW: torch.Tensor | None = None, *, features_BND: torch.Tensor | None = None, weights_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (B, K), of a grid (G, B, K), from normalised pictures or from their features.

        Rows of weight 0 stay out of the batch's statistics.
        """
        if features_BND is None:
            features_BND = self.features(pixels_BCHW)
        return self.head(self.norm(features_BND, weights_B))

    def head_flops(self, rows: float, num_patches: float) -> float:
        """Forward operations of the matrix products of all heads, as they are computed."""
        width = self.encoder.width
        return self.head.num_probes * rows * (4 * num_patches * width * self.head.num_heads + 2 * width**2 + 2 * width * self.num_classes)

    def probe_state(self, number: int | None = None) -> dict[str, torch.Tensor]:
        """What `load_state_dict` of a single probe needs beside the encoder: the norm's statistics and one head."""
        head = self.head.state_dict() if number is None else self.head.state_of(number)
        tensors = {f"norm.{k}": v for k, v in self.norm.state_dict().items()} | {f"head.{k}": v for k, v in head.items()}
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
