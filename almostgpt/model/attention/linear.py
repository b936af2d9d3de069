"""Linear attention: products of features in place of a softmax, in O(T) and with a state of one size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import elu

from almostgpt import kernels
from almostgpt.config_model import GPTConfig
from almostgpt.model.attention.base import Attention, Cache, by_head
from almostgpt.model.position import POSITIONS, Position, Positions


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1, above 0 everywhere (Katharopoulos et al. 2020, arXiv:2006.16236)."""
    return elu(x) + 1


# Over the features of one token, never over tokens: what comes later stays unknown.
FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu1": elu1,
    "softmax": partial(torch.softmax, dim=-1),  # Shen et al. 2018, "Efficient Attention"
}


class LinearAttention(Attention):
    """Σ (φ(q)·φ(k)) v / Σ φ(q)·φ(k) over the token and those before it.

    Rotary positions turn the features, in the numerator alone (RoFormer, Su et al. 2021, eq. 19), so
    that what is divided by stays a sum of positive numbers. A cache holds the sums: nothing grows.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__(config, layer)
        self.features = FEATURE_MAPS[config.feature_map]
        self.rotates = POSITIONS[config.position].frequencies(config) is not None

    def uncached(
        self, heads: Tensor, position: Position, positions: Positions, cu_seqlens: Tensor | None
    ) -> Tensor:
        def rotate(*qk: Tensor) -> tuple[Tensor, ...]:
            return tuple(position.rotate(x, positions) for x in qk)

        documents = None if cu_seqlens is None else document_numbers(positions)
        return self._attend(heads, rotate, documents=documents)

    def cached(self, heads: Tensor, position: Position, positions: Tensor, cache: Cache) -> Tensor:
        state, new_lengths = cache.state(self.layer)
        rotate = partial(position.rotate_anywhere, positions)
        return self._attend(heads, rotate, state=state, new_lengths=new_lengths)

    def _attend(
        self, heads: Tensor, rotate: Callable[..., tuple[Tensor, ...]], **options
    ) -> Tensor:
        q, k, v = self.normed(heads)
        q, k = self.features(q), self.features(k)
        if self.rotates:
            options["normalizer"] = by_head(q, k)
            q, k = rotate(q, k)
        return kernels.linear_attention(*by_head(q, k, v), **options)

    def flops(self, tokens: int) -> float:
        """k vᵀ added to each key head's sums, and q times them; what chunks cost more is not counted."""
        return 2 * self.head_dim**2 * (self.n_head + self.n_kv_head)


def document_numbers(positions: Tensor) -> Tensor:
    """(B, T) positions in packed documents → (B, T) int64, the number of each token's document."""
    return (positions == 0).cumsum(1)
