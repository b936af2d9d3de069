"""How the model knows where a token stands.

A position part may act in two places: ``embed`` on the token embeddings, ``rotate`` on the queries
and keys of every attention. Either is the identity unless the part overrides it. Both are told the
``positions`` of the call's tokens: a slice that every row shares, which starts behind the cached
tokens, or an index (B, T) of each token in its document. A table is read with either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from almostgpt.config import GPTConfig

Positions = slice | Tensor


class Position(nn.Module):
    """The interface of every position part."""

    def embed(self, x: Tensor, positions: Positions) -> Tensor:
        """Adds positions to token embeddings x: (B, T, n_embd) → the same shape."""
        return x

    def rotate(self, qk: Tensor, positions: Positions) -> Tensor:
        """Puts positions into queries and keys, one head after the other: (B, T, heads, D)."""
        return qk


class LearnedPosition(Position):
    """One trained vector a position, added to the embedding (GPT-2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.block_size, config.n_embd))

    def embed(self, x: Tensor, positions: Positions) -> Tensor:
        return x + self.weight[positions]


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

    def embed(self, x: Tensor, positions: Positions) -> Tensor:
        return x * self.scale + self.table[positions].to(x.dtype)


class RotaryPosition(Position):
    """Rotates pairs of q and k by an angle proportional to the position (Su et al. 2021).

    Dimension i is paired with i + D/2, the layout of the Llama family. The rotation is done in fp32:
    a bf16 product would lose what tells far positions apart.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        angles = _angles(config.block_size, config.head_dim, config.rope_base)
        cos, sin = angles.cos(), angles.sin()
        self.register_buffer("cos", torch.cat([cos, cos], 1).float(), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], 1).float(), persistent=False)

    def rotate(self, qk: Tensor, positions: Positions) -> Tensor:
        # (a, b) → (a cos − b sin, b cos + a sin) for the halves a and b of each head. In one
        # multiply-add over queries and keys together it takes two thirds of the time of the four
        # products written out: 0.7 against 1.1 ms, forward and backward, (12, 64, 8, 32), fp32,
        # 2 cores of an AMD EPYC, torch 2.13, 2026-11-21.
        cos, sin = (table[positions].unsqueeze(-2).float() for table in (self.cos, self.sin))
        x = qk.float()
        a, b = x.chunk(2, dim=-1)
        return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin).to(qk.dtype)


def positions_in_documents(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """The index of every token in its document: (B, T) int32, from borders (n + 1,) int32.

    Nothing here waits for the device. Of empty documents (the padding of the borders is made of
    them) none holds a token: the last border at or before a token is where its document begins.
    """
    token = torch.arange(B * T, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True, out_int32=True) - 1
    return (token - cu_seqlens[document]).view(B, T)


def _angles(positions: int, width: int, base: float) -> Tensor:
    """(positions, width / 2) fp64: position · base^(−2i / width)."""
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)


POSITIONS = {"learned": LearnedPosition, "sinusoidal": SinusoidalPosition, "rope": RotaryPosition}
