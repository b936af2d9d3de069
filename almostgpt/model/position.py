"""How the model knows where a token stands.

A position part may act in three places: ``embed`` on the token embeddings, ``rotate`` on the queries
and keys of every attention, and ``slopes`` on its scores. Each does nothing unless the part overrides
it. The first two are told the ``positions`` of the call's tokens: a slice that every row shares, or an
index (B, T) of each token in its document, or behind the cached ones. A table is read with either.
With a cache of keys and values ``rotate`` is not called: the cache rotates what it stores, by the
part's ``frequencies``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from almostgpt import kernels
from almostgpt.config import GPTConfig
from almostgpt.kernels.rope import angles_at, turns_of

Positions = slice | Tensor


class Position(nn.Module):
    """The interface of every position part."""

    endless = False  # whether there are positions from block_size on

    @property
    def slopes(self) -> Tensor | None:
        """(H,) float32: what a score of each head loses for every token of distance; None: nothing."""
        return None

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

    def rotate_anywhere(self, positions: Tensor, *qk: Tensor) -> tuple[Tensor, ...]:
        """``rotate`` of each, by positions (B, T) int64 that may be beyond block_size, where no table is."""
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


class _Constant(nn.Module):
    """Buffers that move with the model, and that a cast leaves in float32.

    The ops take them so; in 16 bits they would give far positions other angles than a cache does.
    """

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, table in before.items():
            if (now := getattr(self, name)).dtype != table.dtype:
                setattr(self, name, table.to(now.device))
        return self


class RotaryPosition(_Constant, Position):
    """Rotates pairs of q and k by an angle proportional to the position (Su et al. 2021).

    Dimension i is paired with i + R/2, the layout of the Llama family, R being ``rope_fraction`` of a
    head; what is beyond R is left as it is. Not in place, even where no gradient is asked for: as many
    bytes are moved, and a hook on the projection may keep its output.
    """

    endless = True

    def __init__(self, config: GPTConfig):
        super().__init__()
        turns = turns_of(self.frequencies(config))
        angles = angles_at(torch.arange(config.block_size), turns)  # by the same bits as a cache
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        self.register_buffer("turns", turns, persistent=False)

    @staticmethod
    def frequencies(config: GPTConfig) -> Tensor:
        width = int(config.head_dim * config.rope_fraction)
        return ROPE_SCALINGS[config.rope_scaling](config, width)

    def rotate(self, qk: Tensor, positions: Positions) -> Tensor:
        at = positions.start if isinstance(positions, slice) else positions
        return kernels.rope(qk, self.cos, self.sin, at)

    def rotate_anywhere(self, positions: Tensor, *qk: Tensor) -> tuple[Tensor, ...]:
        angles = angles_at(positions.reshape(-1), self.turns)
        cos, sin = angles.cos().float(), angles.sin().float()
        row = torch.arange(positions.numel(), device=positions.device).view(positions.shape)
        return tuple(kernels.rope(x, cos, sin, row) for x in qk)


class AlibiPosition(_Constant, Position):
    """Takes from every score a slope times the distance (Press et al. 2022, arXiv:2108.12409).

    The slopes are 2^(−8i/H) for head i = 1 … H; where H is no power of two, those of the power below
    it and, between them, every other one of the power above it, as in the paper's own code.
    """

    endless = True

    def __init__(self, config: GPTConfig):
        super().__init__()
        slopes = torch.tensor(alibi_slopes(config.n_head))
        self.register_buffer("alibi_slopes", slopes, persistent=False)

    @property
    def slopes(self) -> Tensor:
        return self.alibi_slopes


def alibi_slopes(heads: int) -> list[float]:
    power = 1 << (heads.bit_length() - 1)  # the largest power of two that is no more than heads

    def of_power(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    return of_power(power) + of_power(2 * power)[::2][: heads - power]


class NoPosition(Position):
    """Nothing: what order there is comes from the causal mask alone (Kazemnejad et al. 2023, "NoPE")."""

    endless = True

    def __init__(self, config: GPTConfig):
        super().__init__()


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


# ---------------------------------------------------------------- rope for longer texts


def _unscaled(config: GPTConfig, width: int) -> Tensor:
    return _frequencies(width, config.rope_base)


def _linear_scaled(config: GPTConfig, width: int) -> Tensor:
    """As if all positions stood closer together (Chen et al. 2023, arXiv:2306.15595)."""
    return _unscaled(config, width) / config.rope_factor


def _ntk_scaled(config: GPTConfig, width: int) -> Tensor:
    """A larger base: the slowest pair is slowed down by the factor, the fastest not at all.

    "NTK-aware" (bloc97 2023; Peng et al. 2023, arXiv:2309.00071, section 3.1).
    """
    if width == 2:  # one pair, which is the slowest and the fastest
        return _unscaled(config, width)
    return _frequencies(width, config.rope_base * config.rope_factor ** (width / (width - 2)))


def _llama3_scaled(config: GPTConfig, width: int) -> Tensor:
    """Slow pairs by the factor, fast ones not, those between in between (Llama 3.1).

    Slow and fast are meant by the turns that a pair makes within the original block size.
    """
    plain = _unscaled(config, width)
    turns = config.rope_original_block_size * plain / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / config.rope_factor + kept * plain


ROPE_SCALINGS = {
    "none": _unscaled,
    "linear": _linear_scaled,
    "ntk": _ntk_scaled,
    "llama3": _llama3_scaled,
}
POSITIONS = {
    "learned": LearnedPosition,
    "sinusoidal": SinusoidalPosition,
    "rope": RotaryPosition,
    "alibi": AlibiPosition,
    "none": NoPosition,
}
