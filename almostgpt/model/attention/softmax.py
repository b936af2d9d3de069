"""Attention by a softmax over keys: all before a token, or the last ones."""

from __future__ import annotations

from torch import Tensor

from almostgpt import kernels
from almostgpt.config_model import GPTConfig
from almostgpt.model.attention.base import Attention, Cache, by_head
from almostgpt.model.position import Position, Positions


class SoftmaxAttention(Attention):
    """Every token attends to itself and to those before it (Vaswani et al. 2017).

    With ``attention=sliding_window`` a local layer (``window_pattern``) stops at ``attention_window``
    keys, the token's own among them (Child et al. 2019; Beltagy et al. 2020). With ``cu_seqlens`` a token
    attends within its own document alone: the rows are then read as one sequence. A cache rotates and
    stores keys, and attends over all that it holds.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__(config, layer)
        self.window = config.window_of(layer)

    def uncached(
        self, heads: Tensor, position: Position, positions: Positions, cu_seqlens: Tensor | None
    ) -> Tensor:
        q, k, v = self.rotated(heads, position, positions)
        if cu_seqlens is not None:  # all rows end to end: (1, B·T, heads, D)
            q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
        return kernels.flash_attention(
            *by_head(q, k, v),
            causal=True,
            window=None if self.window is None else (self.window - 1, 0),
            alibi_slopes=position.slopes,
            cu_seqlens=cu_seqlens,
        )

    def cached(self, heads: Tensor, position: Position, positions: Tensor, cache: Cache) -> Tensor:
        return cache.extend(self.layer, *by_head(*self.normed(heads)), position.slopes)

    def flops(self, tokens: int) -> float:
        """QKᵀ and PV over the keys that a token sees on average; of masked ones nothing is counted."""
        return 4 * self.n_head * self.head_dim * mean_keys(tokens, self.window)


def mean_keys(tokens: int, window: int | None) -> float:
    """Keys that one of so many tokens sees on average."""
    window = min(tokens, window or tokens)
    return (window * (window + 1) / 2 + (tokens - window) * window) / tokens
