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
        return rms_norm(x, self.weight, self.eps, residual)


class LayerNorm(nn.LayerNorm):
    """(x − mean(x)) / std(x) · weight + bias (Ba et al. 2016), the bias as ``config.bias`` says."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, eps=config.norm_eps, bias=config.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual: (..., n_embd) → norm(x + residual), x + residual."""
        stream = x if residual is None else x + residual
        return super().forward(stream), stream


class ScaleNorm(nn.Module):
    """g · x / ‖x‖, one trained number for all of the width (Nguyen & Salazar 2019, arXiv:1910.05895).

    With g = √n_embd · weight this is RMSNorm with one weight for every dimension, so its kernel serves
    it. As there g starts from √n_embd: a vector then keeps the length it has at a variance of 1.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.width, self.eps = config.n_embd, config.norm_eps
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual: (..., n_embd) → norm(x + residual), x + residual."""
        return rms_norm(x, self.weight.expand(self.width), self.eps, residual)


class HeadNorm(nn.Module):
    """RMSNorm of every head by itself, with one weight for all heads: x (B, T, heads, D) → the same.

    On queries and keys it bounds the scores (Henry et al. 2020, arXiv:2010.04245; this form: Qwen3).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """norm(x + residual), x + residual, in one kernel where that is possible."""
    if residual is not None and residual.dtype != x.dtype:  # a float32 stream under autocast
        x, residual = x + residual, None
    if residual is None:
        return kernels.rms_norm(x, weight, eps), x
    return kernels.rms_norm(x, weight, eps, residual=residual)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm, "scalenorm": ScaleNorm}
