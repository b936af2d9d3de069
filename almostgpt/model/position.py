"""How the model knows where a token stands.

A position part may act in two places: ``embed`` on the token embeddings, ``rotate`` on the queries
and keys of every attention. Either is the identity unless the part overrides it. Both are told the
``positions`` of the call's tokens: a slice that every row shares, or an index (B, T) of each token
in its document, or behind the cached ones. A table is read with either. With a cache ``rotate`` is
not called: the cache rotates what it stores, by the part's ``frequencies``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from almostgpt import kernels
from almostgpt.config import GPTConfig
from almostgpt.kernels.rope import angles_at, turns_of

Positions = slice | Tensor


class Position(nn.Module):
    """The interface of every position part."""

    endless = False  # whether there are positions from block_size on

    @staticmethod
    def frequencies(config: GPTConfig) -> Tensor | None:
        """What ``rotate`` turns each pair of a head by for a position: (R/2,) float64, in radians.

        None: it turns nothing.
        """
        return None

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
        frequencies = _frequencies(config.n_embd, base=10000.0)
        angles = torch.outer(torch.arange(config.block_size, dtype=torch.float64), frequencies)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # sin, cos alternate
        self.register_buffer("table", table.float(), persistent=False)

    def embed(self, x: Tensor, positions: Positions) -> Tensor:
        return x * self.scale + self.table[positions].to(x.dtype)


class RotaryPosition(Position):
    """Rotates pairs of q and k by an angle proportional to the position (Su et al. 2021).

    Dimension i is paired with i + D/2, the layout of the Llama family. Not in place, even where no
    gradient is asked for: as many bytes are moved, and a hook on the projection may keep its output.
    """

    endless = True

    def __init__(self, config: GPTConfig):
        super().__init__()
        turns = turns_of(self.frequencies(config))
        angles = angles_at(torch.arange(config.block_size), turns)  # by the same bits as a cache
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    @staticmethod
    def frequencies(config: GPTConfig) -> Tensor:
        return _frequencies(config.head_dim, config.rope_base)

    def rotate(self, qk: Tensor, positions: Positions) -> Tensor:
        at = positions.start if isinstance(positions, slice) else positions
        return kernels.rope(qk, self.cos, self.sin, at)

    def _apply(self, fn, recurse=True):
        """The tables move with the model, but a cast leaves them in float32, which the op takes.

        In 16 bits they would rotate far positions by other angles than a cache does.
        """
        before = self.cos, self.sin
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = (table.to(self.cos.device) for table in before)
        return self


def positions_in_documents(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """The index of every token in its document: (B, T) int32, from borders (n + 1,) int32.

    Nothing here waits for the device. Of empty documents (the padding of the borders is made of
    them) none holds a token: the last border at or before a token is where its document begins.
    """
    token = torch.arange(B * T, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True, out_int32=True) - 1
    return (token - cu_seqlens[document]).view(B, T)


def _frequencies(width: int, base: float) -> Tensor:
    """(width / 2,) fp64: base^(−2i / width)."""
    return base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)


POSITIONS = {"learned": LearnedPosition, "sinusoidal": SinusoidalPosition, "rope": RotaryPosition}
