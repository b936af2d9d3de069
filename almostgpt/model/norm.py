"""Normalisation of the residual stream."""

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

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """(x − mean(x)) / std(x) · weight + bias (Ba et al. 2016), the bias as ``config.bias`` says."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, eps=config.norm_eps, bias=config.bias)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
