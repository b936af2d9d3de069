"""Linear layers, those of experts, and the token table: products of our kernels.

Parameters and their names are PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from almostgpt import kernels


class Linear(nn.Linear):
    """x (..., in_features) → (..., out_features)."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (out_features, in_features)."""
        return self.weight


class Embedding(nn.Embedding):
    """ids (...) → (..., columns); and the logits of a model whose output projection it is, too."""

    def logits(self, x: Tensor) -> Tensor:
        """x (..., columns) → (..., rows)."""
        return kernels.linear(x, self.weight)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The table, (rows, columns)."""
        return self.weight


class ExpertLinear(nn.Module):
    """A linear layer an expert: weight (E, out_features, in_features), bias (E · out_features,)."""

    def __init__(self, n_experts: int, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(n_experts * out_features)) if bias else None

    def forward(self, x: Tensor, offsets: Tensor, expert: Tensor) -> Tensor:
        """Rows x (N, in_features), sorted by expert → (N, out_features).

        ``offsets`` (E,) int32 are where each expert's rows end, ``expert`` (N,) int64 whose each row is.
        """
        return expert_product(x, self.weight, self.bias, offsets, expert)


def expert_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, expert: Tensor
) -> Tensor:
    y = kernels.expert_linear(x, weight, offsets)
    return y if bias is None else y + bias.view(weight.shape[0], -1)[expert].to(y.dtype)
