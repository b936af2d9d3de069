"""The linear layer of every part of a model."""

from __future__ import annotations

from torch import Tensor, nn

from almostgpt import kernels


class Linear(nn.Linear):
    """``nn.Linear``, its parameters and its gradients, through ``kernels.linear``.

    Decoding a token at a time on a CPU reads every weight once for one row of x, and that kernel reads
    them twice as fast as PyTorch's (docs/cpu.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) → (..., out_features)."""
        return kernels.linear(x, self.weight, self.bias)
