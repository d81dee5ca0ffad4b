"""Attention masks. `can_attend` is boolean (True = may attend); each implementation gets the form that it reads.

Shapes: B batch, N image patches, S sequence.
"""

from __future__ import annotations

import torch

from aimv2_vlm.config import UserError

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")


def check_attention(implementation: str) -> str:
    """Return `implementation` if masks are known to be right under it; raise `UserError` otherwise."""
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise UserError(
            f"attention: {implementation!r} is not offered (prefix and causal masks are proved only under "
            f"{' and '.join(ATTENTION_IMPLEMENTATIONS)}); choose one of these"
        )
    return implementation


def prefix_can_attend(prefix_lengths_B: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Prefix attention (paper 2.1): patch q sees the first M patches of its row and every patch up to q.

    Returns bool (B, 1, N, N), `can_attend[b, 0, q, k] = (k < M_b) or (k <= q)`.
    """
    position_N = torch.arange(num_patches, device=prefix_lengths_B.device)
    in_prefix_B1N = position_N < prefix_lengths_B[:, None, None]
    return (in_prefix_B1N | (position_N <= position_N[:, None]))[:, None]


def causal_can_attend(num_positions: int, device: torch.device | None = None) -> torch.Tensor:
    """Each position sees itself and what stands before it: bool (1, 1, S, S)."""
    return torch.ones(num_positions, num_positions, dtype=torch.bool, device=device).tril()[None, None]


def for_attention(can_attend: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """The mask as `implementation` reads it: boolean for sdpa, additive (0 or the lowest number of `dtype`) for eager.

    Eager attention of transformers *adds* whatever it is given: a boolean mask would be added as 0/1: a leak.
    """
    if check_attention(implementation) == "sdpa":
        return can_attend
    return torch.zeros(can_attend.shape, dtype=dtype, device=can_attend.device).masked_fill_(
        ~can_attend, torch.finfo(dtype).min
    )
