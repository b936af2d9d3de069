"""How the model knows where a token stands.

A position part may act in two places: ``embed`` on the token embeddings, ``rotate`` on the queries
and keys of every attention. Either is the identity unless the part overrides it. ``start`` is the
absolute position of the first token of the call, so that a cached decoding step continues at the
right index.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from almostgpt.config import GPTConfig


class Position(nn.Module):
    """The interface of every position part."""

    def embed(self, x: Tensor, start: int) -> Tensor:
        """Adds positions to token embeddings x: (B, T, n_embd) → the same shape."""
        return x

    def rotate(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Puts positions into q: (B, H, T, D) and k: (B, Hkv, T, D)."""
        return q, k


class LearnedPosition(Position):
    """One trained vector a position, added to the embedding (GPT-2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.block_size, config.n_embd))

    def embed(self, x: Tensor, start: int) -> Tensor:
        return x + self.weight[start : start + x.shape[1]]


class SinusoidalPosition(Position):
    """Fixed sines and cosines of geometric wavelengths, added to the embedding (Vaswani et al. 2017).

    As in the paper the embedding is first multiplied by √n_embd: it is initialised small and would
    otherwise drown in the sines.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.scale = config.n_embd**0.5
        angles = _angles(config.block_size, config.n_embd, base=10000.0)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # sin, cos alternate
        self.register_buffer("table", table.float(), persistent=False)

    def embed(self, x: Tensor, start: int) -> Tensor:
        return x * self.scale + self.table[start : start + x.shape[1]].to(x.dtype)


class RotaryPosition(Position):
    """Rotates pairs of q and k by an angle proportional to the position (Su et al. 2021).

    Dimension i is paired with i + D/2, the layout of the Llama family. The rotation is done in fp32:
    a bf16 product would lose what tells far positions apart.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        angles = _angles(config.block_size, config.head_dim, config.rope_base)
        self.register_buffer("cos", angles.cos().float(), persistent=False)  # (block_size, D/2)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def rotate(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        stop = start + q.shape[2]
        cos, sin = self.cos[start:stop].float(), self.sin[start:stop].float()
        return _rotate_halves(q, cos, sin), _rotate_halves(k, cos, sin)


def _angles(positions: int, width: int, base: float) -> Tensor:
    """(positions, width / 2) fp64: position · base^(−2i / width)."""
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


POSITIONS = {"learned": LearnedPosition, "sinusoidal": SinusoidalPosition, "rope": RotaryPosition}
