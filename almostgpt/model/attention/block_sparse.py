"""Block-sparse attention (BigBird): the first blocks, the last ones, and some drawn from between."""

from __future__ import annotations

from torch import Tensor

from almostgpt import kernels
from almostgpt.config_model import GPTConfig
from almostgpt.kernels.block_sparse_attention import random_blocks
from almostgpt.model.attention.base import Attention, Cache, by_head
from almostgpt.model.attention.linear import document_numbers
from almostgpt.model.position import Position, Positions


class BlockSparseAttention(Attention):
    """Softmax attention over a number of keys that does not grow with the text (Zaheer et al. 2020).

    A token sees of the tokens before it those in the first ``sparse_global`` blocks, in the last
    ``sparse_window`` (its own among them), and in ``sparse_random`` more, drawn for each layer, head and
    block. A draw knows nothing of the length, so what is seen never changes as a text goes on.
    """

    endless = False  # it may look back at any block, so none can be given away

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__(config, layer)
        self.block, self.window = config.sparse_block, config.sparse_window
        self.global_blocks = config.sparse_global
        blocks = -(-config.block_size // self.block)
        drawn = random_blocks(
            layer, self.n_head, blocks, self.window, self.global_blocks, config.sparse_random
        )
        self.register_buffer("random", drawn, persistent=False)

    @property
    def pattern(self) -> kernels.BlockPattern:
        return kernels.BlockPattern(self.block, self.window, self.global_blocks, self.random)

    def uncached(
        self, heads: Tensor, position: Position, positions: Positions, cu_seqlens: Tensor | None
    ) -> Tensor:
        return kernels.block_sparse_attention(
            *by_head(*self.rotated(heads, position, positions)),
            self.pattern,
            alibi_slopes=position.slopes,
            documents=None if cu_seqlens is None else document_numbers(positions),
        )

    def cached(self, heads: Tensor, position: Position, positions: Tensor, cache: Cache) -> Tensor:
        q, k, v = by_head(*self.normed(heads))
        return cache.extend_sparse(self.layer, q, k, v, self.pattern, position.slopes)

    def flops(self, tokens: int) -> float:
        """QKᵀ and PV over the keys that a token sees on average."""
        others = self.global_blocks + self.window - 1 + self.random.shape[2]
        keys = sum(
            min(p // self.block, others) * self.block + p % self.block + 1 for p in range(tokens)
        )
        return 4 * self.n_head * self.head_dim * keys / tokens
