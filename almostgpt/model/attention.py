"""Causal self-attention: (B, T, n_embd) → (B, T, n_embd)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from almostgpt import kernels
from almostgpt.config import GPTConfig
from almostgpt.errors import UserError
from almostgpt.model.position import Position, Positions
from almostgpt.model.quantized import QUANTIZED


class Cache(Protocol):
    """What attention and the model need of a key/value cache (``almostgpt.inference.cache``)."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens already in it, of each sequence; known without asking the device."""

    def check_model(self, config: GPTConfig) -> None:
        """Raises ``UserError`` where it is for another model."""

    def begin(self, tokens: int, new_lengths: Sequence[int] | None = None) -> Tensor:
        """Called first in a forward pass of so many tokens; returns their positions (B, T) int64."""

    def extend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a layer over its cached tokens and the new ones, which it stores.

        q (B, H, T, D), k and v (B, Hkv, T, D) are not yet rotated → (B, H, T, D).
        """

    def advance(self) -> None:
        """Called last, when every layer has stored its tokens: they are cached ones from here on."""


def checked_lengths(new_lengths: Sequence[int], B: int, T: int) -> list[int]:
    """How many of the T tokens of each row are there; raises ``UserError`` where that cannot be."""
    try:
        lengths = [operator.index(length) for length in new_lengths]
    except TypeError:
        lengths = None
    if lengths is None or len(lengths) != B or not all(0 <= length <= T for length in lengths):
        raise UserError(
            f"new_lengths must be {B} whole numbers, one for each row and each within 0 … {T}, "
            f"not {new_lengths}"
        )
    return lengths


class FullAttention(nn.Module):
    """Every token attends to itself and all before it, with MHA, GQA or MQA by ``n_kv_head``.

    With ``cu_seqlens``, to those of its own document alone: the rows are then read as one sequence.
    Queries, keys and values come from one projection and are read in place as strided views. A cache
    rotates and stores them, and attends over all that it holds.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = (
            config.n_head,
            config.n_kv_head,
            config.head_dim,
        )
        linear = QUANTIZED[config.quantize].linear
        self.qkv_heads = config.n_head + 2 * config.n_kv_head
        self.qkv = linear(config.n_embd, self.qkv_heads * self.head_dim, bias=config.qkv_bias)
        self.out = linear(config.n_head * self.head_dim, config.n_embd, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        position: Position,
        positions: Positions,
        cu_seqlens: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, self.qkv_heads, self.head_dim)
        if cache is not None:
            sizes = [self.n_head, self.n_kv_head, self.n_kv_head]
            y = cache.extend(self.layer, *qkv.transpose(1, 2).split(sizes, dim=1))
        else:
            y = self._uncached(qkv, position, positions, cu_seqlens)
        return self.out(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))

    def _uncached(
        self, qkv: Tensor, position: Position, positions: Positions, cu_seqlens: Tensor | None
    ) -> Tensor:
        """(B, T, heads of q, k and v, D) → (B, H, T, D)."""
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        qk = position.rotate(qk, positions)
        if cu_seqlens is not None:  # all rows end to end: (1, B·T, heads, D)
            qk, v = (heads.flatten(0, 1).unsqueeze(0) for heads in (qk, v))
        q, k = qk.split([self.n_head, self.n_kv_head], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        return kernels.flash_attention(q, k, v, causal=True, cu_seqlens=cu_seqlens)


ATTENTIONS = {"full": FullAttention}
