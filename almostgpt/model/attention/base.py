"""What every kind of attention shares: the projections, norms of queries and keys, and a cache."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from almostgpt.config_model import GPTConfig
from almostgpt.errors import UserError
from almostgpt.model.norm import HeadNorm
from almostgpt.model.position import Position, Positions
from almostgpt.model.quantized import QUANTIZED

if TYPE_CHECKING:
    from almostgpt.kernels import BlockPattern, LinearState


class Cache(Protocol):
    """What attention and the model need of a cache (``almostgpt.inference.cache``)."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens already in it, of each sequence; known without asking the device."""

    def check_model(self, config: GPTConfig) -> None:
        """Raises ``UserError`` where it is for another model."""

    def begin(self, tokens: int, new_lengths: Sequence[int] | None = None) -> Tensor:
        """Called first in a forward pass of so many tokens; returns their positions (B, T) int64."""

    def extend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None
    ) -> Tensor:
        """Attention of a layer over its cached tokens and the new ones, which it stores.

        q (B, H, T, D), k and v (B, Hkv, T, D) are not yet rotated → (B, H, T, D).
        """

    def extend_sparse(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: BlockPattern,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """The same for a layer whose tokens see the keys of some blocks."""

    def state(self, layer: int) -> tuple[LinearState, Tensor | None]:
        """The sums of a layer of linear attention, which its pass updates, and the ``new_lengths``."""

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


class Attention(nn.Module):
    """(B, T, n_embd) → (B, T, n_embd), with MHA, GQA or MQA by ``n_kv_head``.

    Queries, keys and values come from one projection and are read in place as strided views. A kind
    implements ``uncached``, ``cached`` and ``flops``.
    """

    endless = True  # whether it can go on for ever over a cache

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
        self.q_norm = HeadNorm(config) if config.qk_norm else None
        self.k_norm = HeadNorm(config) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        position: Position,
        positions: Positions,
        cu_seqlens: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, self.qkv_heads, self.head_dim)
        if cache is not None:
            y = self.cached(heads, position, positions, cache)
        else:
            y = self.uncached(heads, position, positions, cu_seqlens)
        return self.out(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))

    @abstractmethod
    def uncached(
        self, heads: Tensor, position: Position, positions: Positions, cu_seqlens: Tensor | None
    ) -> Tensor:
        """(B, T, heads of q, k and v, D) → (B, H, T, D).

        With ``cu_seqlens`` documents are packed in the rows, and ``positions`` (B, T) count in each.
        """

    @abstractmethod
    def cached(self, heads: Tensor, position: Position, positions: Tensor, cache: Cache) -> Tensor:
        """The same of tokens that follow those of a cache, which takes them up."""

    @abstractmethod
    def flops(self, tokens: int) -> float:
        """Of a forward pass, for one of so many tokens on average, beside the products with weights."""

    def normed(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, heads, D) → q, k and v, each (B, T, its heads, D), where there are norms normed."""
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def rotated(
        self, heads: Tensor, position: Position, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, queries and keys rotated."""
        if self.q_norm is not None:
            q, k, v = self.normed(heads)
            return position.rotate(q, positions), position.rotate(k, positions), v
        # One launch for both, which lie side by side.
        qk, v = heads.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        q, k = position.rotate(qk, positions).split([self.n_head, self.n_kv_head], dim=2)
        return q, k, v


def by_head(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each (B, T, heads, D) → (B, heads, T, D), as the ops take it; a view."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)
