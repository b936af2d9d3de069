"""The sums of causal linear attention over the tokens so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearState:
    """Sums over all earlier tokens: numerator (B, Hkv, D, Dv) and denominator (B, Hkv, D)."""

    numerator: Tensor
    denominator: Tensor

    @classmethod
    def empty(cls, batch, kv_heads, head_dim, value_dim=None, *, dtype=torch.float32, device="cpu"):
        shape = (batch, kv_heads, head_dim)
        return cls(
            torch.zeros(*shape, value_dim or head_dim, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
