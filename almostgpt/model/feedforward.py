"""The position-wise feed-forward part of a block: (B, T, n_embd) → (B, T, n_embd).

Each returns that and, of a mixture of experts in training, what its router did; else None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from almostgpt import kernels
from almostgpt.config import GPTConfig
from almostgpt.model.experts import MixtureOfExperts
from almostgpt.model.quantized import QUANTIZED


class _Plain(nn.Module):
    """down(activation(up(x)))."""

    activation: Callable[[Tensor], Tensor]

    def __init__(self, config: GPTConfig):
        super().__init__()
        linear = QUANTIZED[config.quantize].linear
        self.up = linear(config.n_embd, config.mlp_hidden, bias=config.bias)
        self.down = linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down(self.activation(self.up(x))), None


class GELU(_Plain):
    """down(gelu(up(x))), with the exact GELU (Hendrycks & Gimpel 2016)."""

    activation = staticmethod(kernels.gelu)


class GELUTanh(_Plain):
    """The same with GPT-2's tanh approximation of GELU."""

    activation = staticmethod(partial(kernels.gelu, approximate="tanh"))


class ReLUSquared(_Plain):
    """down(relu(up(x))²) (So et al. 2021, "Primer")."""

    activation = staticmethod(kernels.relu_squared)


class SwiGLU(nn.Module):
    """down(silu(gate) · up) with gate and up from one projection (Shazeer 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        linear = QUANTIZED[config.quantize].linear
        self.gate_up = linear(config.n_embd, 2 * config.mlp_hidden, bias=config.bias)
        self.down = linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down(kernels.swiglu(self.gate_up(x))), None


FEEDFORWARDS = {
    "gelu": GELU,
    "gelu_tanh": GELUTanh,
    "relu2": ReLUSquared,
    "swiglu": SwiGLU,
    "moe": MixtureOfExperts,
}
