"""The position-wise feed-forward part of a block: (B, T, n_embd) → (B, T, n_embd)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from almostgpt.config import GPTConfig


class GELU(nn.Module):
    """down(gelu(up(x))), with the exact GELU (Hendrycks & Gimpel 2016)."""

    approximate = "none"

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.mlp_hidden, bias=config.bias)
        self.down = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class GELUTanh(GELU):
    """The same with GPT-2's tanh approximation of GELU."""

    approximate = "tanh"


class SwiGLU(nn.Module):
    """down(silu(gate) · up) with gate and up from one projection (Shazeer 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.mlp_hidden, bias=config.bias)
        self.down = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


FEEDFORWARDS = {"gelu": GELU, "gelu_tanh": GELUTanh, "swiglu": SwiGLU}
