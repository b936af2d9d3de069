"""Normalisation of the residual stream.

A norm takes what the layer before it adds to the stream, and the stream up to there (None at the
first); it returns the normalised sum and the sum itself, which is the stream from there on. So one
kernel can add and normalise, and the stream is read and written once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from almostgpt import kernels
from almostgpt.config import GPTConfig


class RMSNorm(nn.Module):
    """x / rms(x) · weight (Zhang & Sennrich 2019): LayerNorm without the mean and the bias."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual: (..., n_embd) → norm(x + residual), x + residual."""
        if residual is not None and residual.dtype != x.dtype:  # a float32 stream under autocast
            x, residual = x + residual, None
        if residual is None:
            return kernels.rms_norm(x, self.weight, self.eps), x
        return kernels.rms_norm(x, self.weight, self.eps, residual=residual)


class LayerNorm(nn.LayerNorm):
    """(x − mean(x)) / std(x) · weight + bias (Ba et al. 2016), the bias as ``config.bias`` says."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, eps=config.norm_eps, bias=config.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual: (..., n_embd) → norm(x + residual), x + residual."""
        stream = x if residual is None else x + residual
        return super().forward(stream), stream


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
