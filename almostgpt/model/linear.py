"""Linear layers and the token table: parameters and names of PyTorch's, products of our kernels."""

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
